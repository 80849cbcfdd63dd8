"""Reads the arguments of a recipe or tool: YAML and flags into dataclasses, with errors of one line."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from datetime import date
from typing import Any, get_args, get_type_hints

import yaml
from trl import ModelConfig, TrlParser

from recipes.cli.errors import UserError
from recipes.cli.help import unknown
from recipes.cli.launch import check_devices
from recipes.cli.precedence import check_ranges, check_used, given_flags, without_overridden
from recipes.cli.screen import say

RESUME = "resume_from_checkpoint"  # true or a path


class RecipeParser(TrlParser):
    """`TrlParser` with errors of one line, and with several trackers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.dest == "report_to" and action.choices is None:
                action.nargs = "+"

    def error(self, message: str):
        raise UserError(f"Command line: {message}.")

    def unknown(self, name: str, where: str) -> UserError:
        known = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        return unknown(name, known, where)


def parse(dataclass_types: tuple[type, ...], args: list[str] | None = None) -> tuple:
    """Dataclasses from `--config FILE.yaml` and flags, which win; several `--config` are not merged.

    Raises:
        UserError: an unknown key or flag, a bad value, a missing or malformed file, a machine that cannot run it.
    """
    check_devices()
    words = sys.argv[1:] if args is None else args
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    parser = RecipeParser(dataclass_types, allow_abbrev=False)  # a misspelt flag may not pass for another
    config: dict[str, Any] = {}
    if "--config" in words:
        place = words.index("--config")
        files, words = words[place + 1 : place + 2], words[:place] + words[place + 2 :]
        if not files or "--config" in words:
            raise UserError("Command line: --config takes one YAML file.")
        config = read_config(files[0], parser)
        os.environ |= {str(name): str(value) for name, value in (config.pop("env", None) or {}).items()}
    given = given_flags(words)
    if args is None:  # a caller may add one that counts
        check_given_once(words, parser)
    check_ranges({**config, **given})
    parser.set_defaults_with_config(**without_overridden(config, given))
    try:  # an `.args` file beside the script, which HfArgumentParser would read, is not asked for
        *parsed, rest = parser.parse_args_into_dataclasses(words, True, look_for_args_file=False)
    except json.JSONDecodeError as error:
        name = next((name for name, value in {**config, **given}.items() if value == error.doc), "an argument")
        raise UserError(f"{name} {error.doc} is not valid JSON: {error}.") from error
    except (ValueError, TypeError, OSError, ImportError) as error:  # the last: an argument that needs a package
        raise UserError(" ".join(str(error).split())) from error
    if rest:
        raise parser.unknown(rest[0].removeprefix("--"), "Command line")
    values = {name: value for group in parsed for name, value in vars(group).items()}
    check_used(values, given, config)
    for group in parsed:
        if isinstance(group, ModelConfig):
            group.given = {*given, *config}  # no field, so it is not recorded: a value may be given and be the default
    return tuple(parsed)


def check_given_once(words: list[str], parser: RecipeParser) -> None:
    """Refuse a list that is given in several parts, of which argparse keeps the last; of other flags, say so."""
    many = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    names = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        if name in many:
            raise UserError(f"Command line: --{name} is given twice: give it once, with all its values.")
        say(f"--{name} is given twice: the last one counts.")


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"--config {node.start_mark.name}: {twice[0]} is given twice.")
        return super().construct_mapping(node, deep)


def read_config(config: str, parser: RecipeParser) -> dict[str, Any]:
    """The values of a YAML file; refuses what argparse lets pass, because it converts the type of strings only."""
    try:
        with open(config, encoding="utf-8") as file:
            values = yaml.load(file, UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"--config {config}: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:  # the first: not UTF-8, or a day that no month has
        raise UserError(f"--config {config} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {config}: expected lines of the form argument: value.")
    if not isinstance(values.get("env") or {}, dict):
        raise UserError(f"--config {config}: env takes lines of the form VARIABLE: value, not {values['env']}.")
    actions = {action.dest: action for action in parser._actions}
    hints = {name: hint for group in parser.dataclass_types for name, hint in get_type_hints(group).items()}
    for name, value in values.items():
        if name not in actions and name != "env":
            raise parser.unknown(name, f"--config {config}")
        action = actions.get(name)
        if action is None or value is None:
            continue
        many = action.nargs not in (None, "?")
        items = value if many and isinstance(value, list) else [value]
        whole = action.type is int and any(isinstance(item, float) and not item.is_integer() for item in items)
        wrong = action.type in (int, float) and any(isinstance(item, bool | list | dict | date) for item in items)
        if whole or wrong or (not many and isinstance(value, list)):
            kind = {int: "a whole number", float: "a number"}.get(action.type, "one value")
            raise UserError(f"--config {config}: {name} takes {kind}, not {value}.")
        if isinstance(value, bool | int | float | date) and takes_text(hints.get(name)) and name != RESUME:
            text = f"{name} takes a text, and {value} is none as YAML reads it"
            raise UserError(f"--config {config}: {text}: put it in quotes.")
        if many and not isinstance(value, list | dict):
            values[name] = items  # else a text would be a list of its letters
        if isinstance(value, str) and value.startswith("~"):
            values[name] = os.path.expanduser(value)
    return values


def takes_text(hint: Any) -> bool:
    """Whether a field is a text, perhaps one of several, and no number, yes or no."""
    kinds = {*(get_args(hint) or (hint,))} - {type(None)}
    return (str in kinds and kinds.isdisjoint({bool, int, float})) or all(isinstance(kind, str) for kind in kinds)


def import_function(path: str, flag: str) -> Callable:
    """The function `module.function`.

    Raises:
        UserError: it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{flag} {path}: write it as module.function, importable from here ({error}).") from error
    except Exception as error:
        raise UserError(f"{flag} {path}: {module} cannot be imported: {type(error).__name__}: {error}.") from error
    if not callable(function):
        raise UserError(f"{flag} {path} is no function, but {function!r}.")
    return function
