"""Errors of one line: exceptions for bad input and for a run that ends early, and how their text is written."""

import difflib
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

# Zero-width joiners: Persian, Indic scripts and emoji need them, and they cannot control a terminal.
_PRINTED = ("\n", "\t", "\u200c", "\u200d")


class UserError(Exception):
    """One clear line: what was found, where, and what to do. Recipes and tools print it and exit with 1."""

    def __str__(self) -> str:
        return visible(super().__str__())  # it may quote a dataset


def visible(text: str) -> str:
    """Text that is safe to print: control characters, and those that change the direction of text, become escapes."""

    def shown(char: str) -> str:
        if char.isprintable() or char in _PRINTED or unicodedata.category(char) == "Zs":
            return char
        return char.encode("unicode_escape").decode()

    return "".join(map(shown, text))


class RunEnded(Exception):
    """Ends a run early without an error: the sentence to print, and the exit code."""

    def __init__(self, text: str, code: int = 0):
        super().__init__(text, code)
        self.text, self.code = text, code


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """What a library says of an argument that it does not take, or of a package that it misses, is the user's line."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error


def did_you_mean(path: str) -> str:
    """The end of a message about a path that does not exist: what is beside it and has nearly its name, else ""."""
    parent, name = os.path.split(path)
    near = difflib.get_close_matches(name, os.listdir(parent or ".")) if os.path.isdir(parent or ".") else []
    return f" (did you mean {os.path.join(parent, near[0])}?)" if near else ""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 row", "2 rows", "1,200 rows"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
