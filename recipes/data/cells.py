"""The cells of a row, each read by name as what it should be; errors and skips name its place."""

import math
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

from recipes.data.rows import DECODER, RowError, Skip, check_text, describe, join_names

NOTHING = (None, "", "null", [], "[]", {}, "{}")
FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


class Cells(dict):
    """A row, or an object at a place in it such as `answers[0]`. It knows which of its keys were looked at: `seen`."""

    def __init__(self, cells: dict, place: str = ""):
        super().__init__(cells)
        self.place = place
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def where(self, key: str) -> str:
        """The place of a cell, such as `answers[0].rank`."""
        return f"{self.place}.{key}" if self.place else key

    def require(self, key: str) -> Any:
        """A value that has to be there."""
        if key not in self:
            raise RowError(f"missing; there are {join_names(self) or 'no columns'}", self.where(key))
        return self[key]

    def text(self, key: str) -> str:
        """A required text without outer whitespace; an empty one skips the row."""
        self.require(key)
        value = self.optional_text(key)
        if not value:
            raise Skip("empty text", self.where(key))
        return value

    def optional_text(self, key: str) -> str:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise RowError(f"found {describe(value)}, expected text", self.where(key))
        return (value or "").strip()

    def entries(self, key: str) -> list:
        """A required list; an empty one skips the row."""
        value = decode_json(self.require(key), self.where(key), "a list")
        if value in (None, "", []):
            raise Skip("empty list", self.where(key))
        if not isinstance(value, list):
            raise RowError(f"found {describe(value)}, expected a list", self.where(key))
        return value

    def object(self, key: str) -> "Cells":
        return as_object(self.require(key), self.where(key))

    def objects(self, key: str) -> "Iterator[Cells]":
        """The objects of a required list."""
        for index, entry in enumerate(self.entries(key)):
            yield as_object(entry, f"{self.where(key)}[{index}]")

    def number(self, key: str, text_too: bool = True) -> float:
        """A required number. With `text_too` it may be written as text, as all numbers in CSV are."""
        value = found = self.require(key)
        if isinstance(value, str) and text_too:
            with suppress(ValueError):
                found = float(value)
        with suppress(OverflowError):  # an integer beyond all floats
            if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found):
                return found
        raise RowError(f"found {describe(value)}, expected a number", self.where(key))

    def choice(self, key: str, options: Collection[int]) -> int:
        """A required whole number out of a few."""
        value = self.require(key)
        found = int(value) if isinstance(value, bool) else self.number(key)
        if found not in options:
            raise RowError(f"found {describe(value)}, expected one of {join_names(options)}", self.where(key))
        return int(found)

    def flag(self, key: str) -> bool | None:
        """An optional yes or no, which may be written as text, as in CSV."""
        value = self.get(key)
        found = FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
        if found is None and value not in (None, ""):
            raise RowError(f"found {describe(value)}, expected true or false", self.where(key))
        return found


def as_object(value: Any, place: str) -> Cells:
    value = decode_json(value, place, "an object")
    if not isinstance(value, dict):
        raise RowError(f"found {describe(value)}, expected an object", place)
    return Cells(value, place)


def decode_json(value: Any, place: str, kind: str) -> Any:
    """A list or an object, which is JSON text in formats that have neither (CSV)."""
    if isinstance(value, str) and value.strip():
        try:
            value = DECODER.decode(value)
        except (ValueError, RecursionError):
            raise RowError(f"found {describe(value)}, expected {kind} (as JSON)", place) from None
        check_text(value, place)
    return value
