"""Reads the arguments of a recipe or tool: YAML and flags into dataclasses, with errors of one line."""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from trl import ModelConfig, TrlParser

from recipes.cli.config import read_config
from recipes.cli.errors import UserError
from recipes.cli.launch import check_gpus
from recipes.cli.precedence import check_ranges, check_used, without_overridden
from recipes.cli.record import SECRETS


class RecipeParser(TrlParser):
    """`TrlParser` with errors of one line, several trackers, and lists that may be given in parts."""

    where = "Command line"

    def add_argument(self, *names, **options):
        if "--report_to" in names and "choices" not in options:
            options["nargs"] = "+"
        if options.get("nargs") == "+":
            options["action"] = "extend"  # else the last part would count alone
        return super().add_argument(*names, **options)

    def error(self, message: str):
        raise UserError(f"{self.where}: {message}.")

    def given(self, words: list[str], where: str) -> dict[str, Any]:
        """The arguments that these flags give, and no default; `where` they stand is said in errors."""
        self.where = where
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
        return vars(self.parse_args(words))

    def given_in_config(self, path: str) -> dict[str, Any]:
        words, typed, where = [], {}, f"--config {path}"
        kinds = {name: kind for each in self.dataclass_types for name, kind in get_type_hints(each).items()}
        for name, value in read_config(path).items():
            if isinstance(value, str):
                words.append(f"--{name}={value}")
            elif value and isinstance(value, list) and all(isinstance(item, str) for item in value):
                words += [f"--{name}", *value]
            elif value is None and type(None) not in get_args(kinds.get(name)):
                raise UserError(f"{where}: {name} cannot be null: leave it out to have its default.")
            else:
                typed[name] = value
        return self.given(words, where) | typed


def parse(dataclass_types: tuple[type, ...], args: list[str] | None = None) -> tuple:
    """Dataclasses from `--config FILE.yaml` and flags, which win; what cannot be used is a `UserError`."""
    check_gpus()
    parser = RecipeParser(dataclass_types, allow_abbrev=False)  # a misspelt flag may not pass for another
    parser.add_argument("--config", action="append")
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-3 for a flag
    if args is None:
        args = sys.argv[1:]
        sys.argv[1:] = without_secrets(args)  # cards and trackers write it down
    flags = parser.given(args, "Command line")
    files = flags.pop("config", [])
    if len(files) > 1:
        raise UserError("Command line: --config takes one YAML file.")
    config = parser.given_in_config(files[0]) if files else {}
    given = without_overridden(config, flags) | flags
    check_ranges(given)
    try:
        parsed = parser.parse_dict(given)
    except json.JSONDecodeError as error:
        raise UserError(f"{error.doc} is not valid JSON: {error}.") from error
    except (ValueError, TypeError, OSError, ImportError) as error:  # the last: an argument that needs a package
        raise UserError(" ".join(str(error).split())) from error
    check_used({name: value for group in parsed for name, value in vars(group).items()}, flags, config)
    for group in parsed:
        if isinstance(group, ModelConfig):
            group.given = {*flags, *config}  # no field, so it is not recorded: a value may be given and be the default
    return parsed


def without_secrets(words: list[str]) -> list[str]:
    """A command line without the flags whose names say that they are secret."""
    kept: list[str] = []
    secret = False
    for word in words:
        if word.startswith("--"):
            secret = SECRETS.search(word[2:].replace("-", "_").partition("=")[0]) is not None
        if not secret:
            kept.append(word)
    return kept


def import_function(path: str, flag: str) -> Callable:
    """The function `module.function`; a `UserError` names `flag` where it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{flag} {path}: write it as module.function, importable from here ({why}).") from error
    if not callable(function):
        raise UserError(f"{flag} {path} is no function, but {function!r}.")
    return function
