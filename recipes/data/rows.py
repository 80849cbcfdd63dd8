"""A row of a source, and what can be wrong with it."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from recipes.cli.errors import UserError, first_line

NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


class DataError(UserError):
    """Data that cannot be used. `report` is the formatting report where formatting had begun, else None."""

    report: Any = None


@contextmanager
def failures_as_data_error(source: str | Path) -> Iterator[None]:
    """Failures of the Hub, `datasets` and decoders have dozens of types; the user needs the source and one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        generating = type(error).__name__ == "DatasetGenerationError"
        cause = error.__cause__ if generating and error.__cause__ else error
        unknown = isinstance(error, FileNotFoundError | ConnectionError) and not Path(source).expanduser().exists()
        missing = f"no file or folder {str(source)!r} is here, and " if unknown else ""
        raise DataError(f"{missing}could not load {source}: {type(cause).__name__}: {first_line(cause)}") from error


class RowProblem(Exception):
    """Why one row is not used; `column` is the place in the row, such as `answers[0].rank`."""

    def __init__(self, message: str, column: str | None = None):
        super().__init__(message)
        self.message, self.column = message, column


class Skip(RowProblem):
    """The row is correct but of no use, such as a tie; it is counted and left out."""


class RowError(RowProblem):
    """The row is wrong; the message says what was found, what was expected and what to do."""


class LostRows(RowError):
    """All rows that follow in the file are lost too, so that this error cannot be skipped like one bad row."""


class Row(NamedTuple):
    """`line` is 1-based: the physical line in a text file (a CSV header is line 1), else the number of the row."""

    file: str
    line: int
    data: Any  # a dict, or the RowProblem that stands for it

    def read(self) -> dict:
        """The dict, or raises the RowProblem that stands for it."""
        if isinstance(self.data, RowProblem):
            raise self.data
        return self.data

    def map(self, change: Callable[[dict], dict]) -> "Row":
        """The row with what `change` makes of its dict."""
        return self._replace(data=or_error(lambda: change(self.read())))


def or_error(read: Callable[..., dict], *arguments) -> dict | RowProblem:
    """What `read` gives, or the `RowProblem` that it raises."""
    try:
        return read(*arguments)
    except RowProblem as problem:
        return problem


def join_names(names: Iterable) -> str:
    return ", ".join(str(name) or "(no name)" for name in names)


def describe(value: Any) -> str:
    """A short description of an unexpected value, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {value[:40]!r}{'...' if len(value) > 40 else ''}"
    if isinstance(value, list):
        return f"a list of {describe(value[0])}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with {join_names(value) or 'no keys'}"
    return f"{str(value)[:40]} ({type(value).__name__})"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"the key {twice!r} stands twice in one object; remove one of them", twice)
    return result


def _no_constant(constant: str):
    raise RowError(f"{constant} is not valid JSON; write a number or null")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
ENCODER = json.JSONEncoder(ensure_ascii=False, skipkeys=True, default=str)


def check_row(value: Any) -> dict:
    """The row itself, if it is an object whose text can be stored; raises RowError."""
    if not isinstance(value, dict):
        raise RowError(f"found a {type(value).__name__}, expected an object {{...}} with named columns")
    for column, cell in value.items():
        check_text(cell, column)
    return value


def check_text(value: Any, column: str | None = None) -> None:
    """Raises RowError for half a UTF-16 pair, which UTF-8 cannot store: `datasets` would fail much later."""
    try:
        ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RowError(f"the text holds half a character ({half}, a lone surrogate); repair it", column) from None
