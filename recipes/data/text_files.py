"""Reads JSON Lines, JSON, CSV and lists of prompts row by row, with line numbers, and reports errors by line.

`datasets` would guess types (dates become timestamps, "NA" becomes null, 007 becomes 7.0) and name no line.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from recipes.cli.errors import counted
from recipes.data.messages import json_messages
from recipes.data.rows import (
    DECODER,
    NOT_UTF8,
    DataError,
    LostRows,
    Row,
    RowError,
    RowProblem,
    check_surrogates,
    decode_object,
    not_json,
    not_utf8,
    skip_space,
)

try:
    from compression import zstd  # Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
PROMPTS_SUFFIX = ".txt"  # one prompt a line
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd and zstd.open}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, *([zstd.ZstdError] if zstd else []))
CHUNK = 2**16  # characters of a JSON list that are read at a time; more where an element is larger
LIMIT = 2**26  # bytes of a line, characters of a cell of CSV or of an element of a JSON list; memory has to hold them
# How files of other kinds begin, which may have been given the wrong suffix.
NO_TEXT = {b"\x1f\x8b": "a .gz file", b"\xfd7zXZ": "a .xz file", b"\x28\xb5\x2f\xfd": "a .zst file"}
NO_TEXT |= {b"PAR1": "a .parquet file", b"PK\x03\x04": "a .zip file or a workbook"}
TOO_LONG = f"longer than {LIMIT >> 20} MiB, which no row may be"
# Messages in a cell of CSV: as JSON, or with single quotes in Python's notation, as pandas writes them.
_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value|tool_calls)["']\s*:""")
_SPACE = r"[ \t\n\r]*"
_OPENING = re.compile(rf"{_SPACE}\[{_SPACE}(?P<closing>\])?{_SPACE}")  # of a JSON list
_SEPARATOR = re.compile(rf"{_SPACE}(?:,|(?P<closing>\])){_SPACE}")


def read_text_file(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .ndjson, .json, .csv or .txt file, compressed or not.

    Raises:
        DataError: nothing of the file can be read, or its compressed form is damaged.
    """
    packed = path.suffix.lower()
    if packed == ".zst" and zstd is None:
        raise DataError(f"{path}: there is no package for {packed} files; pip install backports.zstd")
    try:
        with COMPRESSED.get(packed, open)(path, "rb") as stream:
            yield from _read_text(path, stream)
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or f"the file is damaged: {error}"
        raise DataError(f"{path}: {reason}") from error


def _read_text(path: Path, stream: BinaryIO) -> Iterator[Row]:
    file = str(path)
    suffix = Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()
    head = stream.read(CHUNK)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: this is UTF-16; convert it, e.g. iconv -f UTF-16 -t UTF-8 {path.name}")
    for mark, what in NO_TEXT.items():
        if head.startswith(mark):
            raise DataError(f"{file}: this is {what}, whatever its name says")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{file}: this is the address of a file in Git LFS; fetch the file itself, e.g. git lfs pull")
    if b"\r" in head and b"\n" not in head:
        raise DataError(f"{file}: lines end with carriage returns alone; convert them, e.g. tr '\\r' '\\n'")
    start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    stream.seek(start)
    if suffix == ".csv":
        yield from _read_csv(file, stream)
    elif suffix == PROMPTS_SUFFIX:
        yield from (row._replace(data=_prompt(row.data)) for row in _read_lines(file, stream))
    elif head[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_json_list(file, stream)
    elif suffix == ".json" and not _first_line(stream).endswith(b"}"):
        yield Row(file, 1, RowError("one JSON object over many lines; expected a list [...] or an object per line"))
    else:
        stream.seek(start)
        yield from _read_lines(file, stream)


def _first_line(stream: BinaryIO) -> bytes:
    """The first line that is not blank; an empty file has as many objects as one that begins with "}"."""
    lines = iter(lambda: stream.readline(LIMIT), b"")
    return next((line.strip() for line in lines if line.strip()), b"}")


def _read_lines(file: str, stream: BinaryIO) -> Iterator[Row]:
    """Rows whose data are lines that are not blank, or an error for a line that is too long."""
    for number, line in enumerate(_lines(stream), 1):
        if line is None:
            yield Row(file, number, RowError(f"the line is {TOO_LONG}"))
        elif not line.isspace():
            yield Row(file, number, line)


def _lines(stream: IO) -> Iterator:
    """The lines of a stream of bytes or text; None for one of more than LIMIT, which is never held as a whole."""
    while line := stream.readline(LIMIT + 1):
        whole = len(line) <= LIMIT
        yield line if whole else None
        while not whole and line and line[-1:] not in ("\n", b"\n"):
            line = stream.readline(CHUNK)


def _prompt(line: bytes | RowProblem) -> dict | RowProblem:
    if isinstance(line, RowProblem):
        return line
    text = line.decode("utf-8", "surrogateescape")
    bad = NOT_UTF8.search(text)
    return RowError(not_utf8(bad)) if bad else {"prompt": text}


def _characters(stream: BinaryIO) -> io.TextIOWrapper:
    """The text of a file. Bytes that are not UTF-8 become surrogates, so that their place can be told."""
    return io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="\n")


def _read_json_list(file: str, stream: BinaryIO) -> Iterator[Row]:
    """The elements of one JSON list, each at the line it starts on. Nothing after the first syntax error is read.

    Not by `ijson`: it gives no lines, keeps the last of two equal keys and reads half a surrogate pair as "?".
    """
    characters = _characters(stream)
    text, line, column, ended = "", 1, 0, False  # what is in memory, and where in the file it begins
    before = _OPENING
    while True:
        try:
            value, start, end = _next_element(text, before)
        except json.JSONDecodeError as error:
            cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")
            if ended or not cut:
                error.colno += column if error.lineno == 1 else 0
                yield Row(file, line + error.lineno - 1, _lost(error))
                return
            end = len(text)
        if end == len(text) and not ended:  # the rest of the element may follow
            if len(text) > LIMIT:
                yield Row(file, line, LostRows(f"an element of the list is {TOO_LONG}; nothing after it was read"))
                return
            more = characters.read(max(CHUNK, len(text)))
            if bad := NOT_UTF8.search(more):
                line += text.count("\n") + more.count("\n", 0, bad.start())
                yield Row(file, line, LostRows(not_utf8(bad)))
                return
            text, ended = text + more, not more
            continue
        if value is not None:
            yield Row(file, line + text.count("\n", 0, start), value)
        if value is None or isinstance(value, LostRows):
            return
        newline = text.rfind("\n", 0, end)
        line, column = line + text.count("\n", 0, end), end - newline - 1 + (column if newline < 0 else 0)
        text, before = text[end:], _SEPARATOR


def _next_element(text: str, before: re.Pattern) -> tuple[dict | RowError | None, int, int]:
    """The next element, or None where the list ends; and where in the text it starts and ends."""
    found = before.match(text)
    if found is None:
        raise json.JSONDecodeError("expected ',' or ']' after an element", text, skip_space(text, 0))
    start = found.end()
    if found["closing"]:
        if start < len(text):
            raise json.JSONDecodeError("text after the end of the list", text, start)
        return None, start, start
    try:
        value, end = decode_object(text, start)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        value, end = _lost(error), start
    return value, start, end


def _lost(error: ValueError | RecursionError) -> LostRows:
    return LostRows(f"{not_json(error)}; nothing after it was read")


def _read_csv(file: str, stream: BinaryIO) -> Iterator[Row]:
    reader = csv.reader(_csv_lines(_characters(stream)), strict=True)
    csv.field_size_limit(LIMIT)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "are columns separated by commas?" if header is None else "is a quote left open?"
            yield Row(file, line, LostRows(f"not valid CSV: {error}; {hint} Nothing after it was read"))
            return
        if not cells:
            continue
        if header is None:
            header = _check_header(file, line, cells)
        else:
            yield Row(file, line, _csv_row(header, cells))


def _csv_lines(characters: IO[str]) -> Iterator[str]:
    for line in _lines(characters):
        if line is None:
            raise csv.Error(f"the line is {TOO_LONG}")
        yield line


def _check_header(file: str, line: int, header: list[str]) -> list[str]:
    problem = None
    if len(set(header)) < len(header):
        problem = f"two columns are called {next(name for name in header if header.count(name) > 1)!r}"
    elif not all(name.strip() for name in header):
        problem = "a column has no name; name it, or leave out pandas' index with to_csv(index=False)"
    elif len(header) == 1 and re.search("[;\t|]", header[0]):
        problem = f"the only column is {header[0]!r}: columns must be separated by commas"
    if problem:
        raise DataError(f"{file}:{line}: CSV header: {problem}")
    return header


def _csv_row(header: list[str], cells: list[str]) -> dict | RowError:
    if len(cells) != len(header):
        return RowError(
            f"found {counted(len(cells), 'field')}, expected {len(header)} as in the header; "
            "quote fields that hold a comma"
        )
    row = dict(zip(header, cells, strict=True))
    for column, cell in row.items():
        if bad := NOT_UTF8.search(cell):
            return RowError(not_utf8(bad), column)
        if json_messages(cell) is not None or _MESSAGES.match(cell):
            try:
                row[column] = DECODER.decode(cell)
                check_surrogates(row[column], column)
            except RowError as error:
                return error
            except (ValueError, RecursionError):
                wanted = "messages that are not valid JSON; write them with json.dumps"
                return RowError(f"found {cell[:40]!r}, {wanted}", column)
    return row
