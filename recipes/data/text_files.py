"""Reads JSON Lines, JSON, CSV and lists of prompts row by row, with line numbers, and reports errors by line.

`datasets` would guess types (dates become timestamps, "NA" becomes null, 007 becomes 7.0) and name no line.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from recipes.cli.errors import counted
from recipes.data.cells import decode_json
from recipes.data.messages import json_messages
from recipes.data.rows import (
    DECODER,
    NOT_UTF8,
    DataError,
    LostRows,
    Row,
    RowError,
    RowProblem,
    Skip,
    check_row,
    failures_as_data_error,
    or_error,
)

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # with their names in fsspec
BYTE_ORDER_MARK = "\ufeff"
CHUNK = 2**16  # characters of a JSON list that are read at a time; more where an element is larger
LIMIT = 2**26  # characters of a line, a cell of CSV or an element of a JSON list; memory has to hold them
TOO_LONG = f"longer than {LIMIT >> 20} MiB, which no row may be"
LOST = "nothing after it was read"
# Of JSON: a text, a bracket or a comma, or a quote that is left open. Without alternatives in the repeated part, which
# would take three times as long.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|(["\[\]{},])', re.DOTALL)
_DEPTH = {"[": 1, "{": 1, "]": -1, "}": -1, ",": 0}
_NEXT_ROW = re.compile(r"\}\s*,\s*\{")  # between two elements of a list; in a text where a quote is missing
# Messages that break off, as Excel cuts a cell after 32,767 characters; as JSON or in Python's notation.
_CUT_OFF = re.compile(
    r"""\s*(\[\s*\{(?!.*\}\s*\])|\{(?!.*\}))\s*["'](role|content|from|value|tool_calls)["']\s*:""", re.DOTALL
)

Places = Iterator[tuple[int, dict | RowProblem]]  # lines of the file, and what `Row.data` is there


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds, below the one that says how it is compressed."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def read_text_file(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .ndjson, .json, .csv or .txt file, compressed or not.

    Raises:
        DataError: nothing of the file can be read, or its compressed form is damaged.
    """
    from fsspec.compression import compr

    packing = COMPRESSED.get(path.suffix.lower())
    if packing not in compr:
        raise DataError(f"{path}: there is no package for {path.suffix} files; pip install backports.zstd")
    suffix = suffix_of(path)
    with failures_as_data_error(path), path.open("rb") as packed, compr[packing](packed, mode="rb") as stream:
        head = stream.read(CHUNK)
        _check_is_text(path, head)
        stream.seek(0)
        # Bytes that are not UTF-8 become surrogates, which `_check_utf8` finds.
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="\n")
        if suffix == ".csv":
            rows = _read_csv(text)
        elif suffix == ".txt":
            rows = _read_lines(text, lambda line: {"prompt": _check_utf8(line)})
        elif re.match(rb"(\xef\xbb\xbf)?\s*\[", head):
            rows = _read_json_list(text)
        else:
            rows = _read_lines(text, _json_row)
        for line, data in rows:
            yield Row(str(path), line, data)


def _check_is_text(path: Path, head: bytes) -> None:
    """Refuses files that begin like no text; a .txt among them would be taken for prompts."""
    if b"\0" in head:
        kinds = "perhaps UTF-16, compressed, Parquet or a workbook"
        raise DataError(f"{path}: this is no text in UTF-8, whatever its name says, but {kinds}; convert it")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: this is the address of a file in Git LFS; fetch the file itself, e.g. git lfs pull")
    if b"\r" in head and b"\n" not in head:
        raise DataError(f"{path}: lines end with carriage returns alone; convert them, e.g. tr '\\r' '\\n'")


def _lines(text: TextIO) -> Iterator[str]:
    """The lines of a file.

    Raises:
        LostRows: a line is longer than LIMIT; it is never held as a whole.
    """
    while line := text.readline(LIMIT + 1):
        if len(line) > LIMIT:
            raise LostRows(f"the line is {TOO_LONG}; {LOST}")
        yield line


def _read_lines(text: TextIO, read: Callable[[str], dict]) -> Places:
    """The lines that are not blank."""
    number = 0
    try:
        for number, line in enumerate(_lines(text), 1):
            if not line.isspace():
                # A file that was appended to another begins with a mark too.
                yield number, or_error(read, line.rstrip().removeprefix(BYTE_ORDER_MARK))
    except LostRows as error:
        yield number + 1, error


def _check_utf8(text: str, column: str | None = None) -> str:
    """The text itself, unless it holds bytes that are not UTF-8: then raises RowError."""
    if bad := NOT_UTF8.search(text):
        what = f"not UTF-8 (byte 0x{ord(bad[0]) - 0xDC00:02x}), perhaps of Windows"
        raise RowError(f"{what}; convert the file, e.g. iconv -f CP1252 -t UTF-8", column)
    return text


def _json_row(text: str) -> dict:
    """The row that a line of JSON Lines holds."""
    try:
        return check_row(DECODER.decode(_check_utf8(text)))
    except (ValueError, RecursionError) as error:
        hint = "is the file cut off, or a row on many lines? Write each on one line, or all in one list"
        raise RowError(f"{_not_json(error)}; {hint}") from None


def _json_element(text: str) -> dict:
    """The row that an element of a JSON list holds.

    Raises:
        LostRows: a quote or a comma is missing, so that what was cut out of the list as one element may be many.
    """
    try:
        return check_row(DECODER.decode(_check_utf8(text)))
    except (ValueError, RecursionError) as error:
        after_an_end = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if after_an_end or any(_NEXT_ROW.search(token[0]) for token in _TOKEN.finditer(text)):
            raise LostRows(f"{_not_json(error)}; is a quote or a comma missing? {LOST}") from None
        raise RowError(_not_json(error)) from None


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
        return f"not valid JSON at {line}character {error.colno}: {error.msg}"
    return "the JSON is nested too deeply" if isinstance(error, RecursionError) else f"not usable as JSON: {error}"


def _read_json_list(text: TextIO) -> Places:
    """The elements of one JSON list, each at the line it starts on.

    They are cut at the commas of the list, so that a broken element is one bad row; where the brackets or quotes do
    not match, the rest is lost. Not by `ijson`, which gives no lines.
    """
    part, at, depth = "", 0, 0  # what is in memory, how far it was looked at, and the brackets that are open there
    line = 1
    while more := text.read(max(CHUNK, len(part))):
        part, start = part + more, 0
        for token in _TOKEN.finditer(part, at):
            mark = token[1]
            if mark is None:  # a text
                continue
            at = token.start()
            if mark == '"':  # its text goes on in what is not read yet
                break
            depth += _DEPTH[mark]
            if (mark, depth) in (("[", 1), (",", 1), ("]", 0)):
                element = part[start:at]
                if element.strip():
                    data = or_error(_json_element, element.lstrip())
                    yield line + _lines_before(element), data
                    if isinstance(data, LostRows):
                        return
                line, start = line + element.count("\n"), token.end()
        else:
            at = len(part)
        part, at = part[start:], at - start
        if len(part) > LIMIT:
            yield line + _lines_before(part), LostRows(f"an element of the list is {TOO_LONG}; {LOST}")
            return
    if depth or part.strip():
        hint = "is the file cut off, or is a quote or a bracket missing?"
        yield line + _lines_before(part), LostRows(f"the list does not end, or something follows it: {hint}")


def _lines_before(text: str) -> int:
    """How many lines end before the first character that is not blank."""
    return text[: len(text) - len(text.lstrip())].count("\n")


def _read_csv(text: TextIO) -> Places:
    reader = csv.reader(_lines(text), strict=True)
    csv.field_size_limit(LIMIT)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
                _check_header(header)
            elif cells:
                yield line, or_error(_csv_row, header, cells)
            line = reader.line_num + 1
    except LostRows as error:
        yield line, error
    except csv.Error as error:
        hint = "is a quote left open, or are columns not separated by commas?"
        yield line, LostRows(f"not valid CSV: {error}; {hint} Nothing after it was read")


def _check_header(header: list[str]) -> None:
    for name in header:
        try:
            _check_utf8(name)
        except RowError as error:
            raise LostRows(error.message) from None
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        named = f"are called {twice!r}" if twice else "have no name: delete them, or name them"
        raise LostRows(f"two columns {named}")
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):  # as Excel writes it in much of Europe
        raise LostRows(f"the only column is {header[0]!r}: columns must be separated by commas")


def _csv_row(header: list[str], cells: list[str]) -> dict:
    if len(cells) != len(header):
        expected = f"expected {len(header)} as in the header; quote fields that hold a comma"
        raise RowError(f"found {counted(len(cells), 'field')}, {expected}")
    if [cells[0].removeprefix(BYTE_ORDER_MARK), *cells[1:]] == header:
        raise Skip("the header again, as where files were joined")
    row = dict(zip(header, cells, strict=True))
    for column, cell in row.items():
        if json_messages(_check_utf8(cell, column)) or _CUT_OFF.match(cell):
            row[column] = decode_json(cell, column, "messages that json.dumps wrote")
    return row
