"""Reads JSON Lines, JSON and CSV files row by row, with line numbers, and reports errors by line.

`datasets` would guess types (dates become timestamps, "NA" becomes null, 007 becomes 7.0) and name no line.
"""

import csv
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from recipes.data.rows import (
    DECODER,
    NOT_UTF8,
    DataError,
    LostRows,
    Row,
    RowError,
    check_surrogates,
    decode_object,
    not_json,
    not_utf8,
    skip_space,
)

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
CHUNK = 2**16  # characters of a JSON list that are read at a time; more where an element is larger
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Messages in a cell of CSV: as JSON, or with single quotes in Python's notation, as pandas writes them.
_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value|tool_calls)["']\s*:""")
_SPACE = r"[ \t\n\r]*"
_OPENING = re.compile(rf"{_SPACE}\[{_SPACE}(?P<closing>\])?{_SPACE}")  # of a JSON list
_SEPARATOR = re.compile(rf"{_SPACE}(?:,|(?P<closing>\])){_SPACE}")


def read_text_file(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .ndjson, .json or .csv file, compressed or not.

    Raises:
        DataError: nothing of the file can be read, or its compressed form is damaged.
    """
    try:
        with _open_text(path) as stream:
            yield from _read_text(path, stream)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or f"the file is damaged: {error}"
        raise DataError(f"{path}: {reason}") from error


def _open_text(path: Path) -> BinaryIO:
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import fsspec

    try:
        return fsspec.open(str(path), "rb", compression="infer").open()
    except ValueError as error:
        raise DataError(f"{path}: no package for {path.suffix} is installed; pip install zstandard") from error


def _read_text(path: Path, stream: BinaryIO) -> Iterator[Row]:
    file = str(path)
    suffix = path.suffixes[-2 if path.suffix.lower() in COMPRESSED else -1].lower()
    head = stream.read(64)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: this is UTF-16; convert it, e.g. iconv -f UTF-16 -t UTF-8 {path.name}")
    start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    stream.seek(start)
    if suffix == ".csv":
        yield from _read_csv(file, stream)
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_json_list(file, stream)
    elif suffix == ".json" and not stream.readline().rstrip().endswith(b"}"):
        yield Row(file, 1, RowError("one JSON object over many lines; expected a list [...] or an object per line"))
    else:
        stream.seek(start)
        yield from _read_jsonl(file, stream)


def _read_jsonl(file: str, stream: Iterable[bytes]) -> Iterator[Row]:
    return (Row(file, number, raw) for number, raw in enumerate(stream, 1) if not raw.isspace())


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
    reader = csv.reader(_characters(stream), strict=True)
    csv.field_size_limit(2**31 - 1)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(file, line, LostRows(f"not valid CSV: {error}; is a quote left open? Nothing after it was read"))
            return
        if not cells:
            continue
        if header is None:
            header = _check_header(file, line, cells)
        else:
            yield Row(file, line, _csv_row(header, cells))


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
            f"found {len(cells)} fields, expected {len(header)} as in the header; quote fields that hold a comma"
        )
    row = dict(zip(header, cells, strict=True))
    for column, cell in row.items():
        if bad := NOT_UTF8.search(cell):
            return RowError(not_utf8(bad), column)
        if _MESSAGES.match(cell):
            try:
                row[column] = DECODER.decode(cell)
                check_surrogates(row[column], column)
            except RowError as error:
                return error
            except (ValueError, RecursionError):
                wanted = "messages that are not valid JSON; write them with json.dumps"
                return RowError(f"found {cell[:40]!r}, {wanted}", column)
    return row
