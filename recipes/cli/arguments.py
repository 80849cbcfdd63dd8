"""Reads the arguments of a recipe or tool: YAML and flags into dataclasses, with errors of one line."""

import importlib
import sys
from collections.abc import Callable

import yaml
from trl import TrlParser

from recipes.cli.errors import UserError
from recipes.cli.help import unknown
from recipes.cli.launch import check_devices
from recipes.cli.precedence import check_used, given_flags, limit_steps, without_overridden


class RecipeParser(TrlParser):
    """`TrlParser` with errors of one line, YAML that gives way to flags of the same meaning, and several trackers."""

    given: dict[str, str] = {}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.dest == "report_to" and action.choices is None:
                action.nargs = "+"

    def set_defaults_with_config(self, **config):
        return super().set_defaults_with_config(**without_overridden(config, self.given))

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
    args = [part for word in (sys.argv[1:] if args is None else args) for part in split_config_flag(word)]
    config = args[args.index("--config") + 1] if "--config" in args[:-1] else None
    if "--config" in args and (config is None or args.count("--config") > 1):
        raise UserError("Command line: --config takes one YAML file.")
    parser = RecipeParser(dataclass_types, allow_abbrev=False)  # a misspelt flag may not pass for another
    parser.given = given_flags(args)
    in_config: dict = {}
    try:
        if config is not None:
            in_config = check_config(config, parser)
        *parsed, _, in_flags = parser.parse_args_and_config(
            args, return_remaining_strings=True, separate_remaining_strings=True
        )
    except OSError as error:
        raise UserError(f"--config {config}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {config} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (ValueError, TypeError, ImportError) as error:  # the last: an argument that needs a package
        raise UserError(" ".join(str(error).split())) from error
    if in_flags:
        raise parser.unknown(in_flags[0].removeprefix("--"), "Command line")
    values = {name: value for group in parsed for name, value in vars(group).items()}
    check_used(values, parser.given, in_config)
    limit_steps(tuple(parsed), parser.given, without_overridden(in_config, parser.given))
    return tuple(parsed)


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"--config {node.start_mark.name}: {twice[0]} stands there twice.")
        return super().construct_mapping(node, deep)


def check_config(config: str, parser: RecipeParser) -> dict:
    """The values of a YAML file; refuses what argparse lets pass, because it converts the type of strings only."""
    with open(config, encoding="utf-8") as file:
        values = yaml.load(file, UniqueKeyLoader)
    if not isinstance(values, dict):
        raise UserError(f"--config {config}: expected lines of the form argument: value.")
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name not in actions and name != "env":
            raise parser.unknown(name, f"--config {config}")
        action = actions.get(name)
        if action is None or value is None or isinstance(value, str):
            continue
        many = action.nargs not in (None, "?")
        items = value if many and isinstance(value, list) else [value]
        whole = action.type is int and any(isinstance(item, float) and item != int(item) for item in items)
        wrong = action.type in (int, float) and any(isinstance(item, bool | list | dict) for item in items)
        if whole or wrong or (not many and isinstance(value, list)):
            kind = {int: "a whole number", float: "a number"}.get(action.type, "one value")
            raise UserError(f"--config {config}: {name} takes {kind}, not {value}.")
    return values


def split_config_flag(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]


def import_function(path: str, flag: str) -> Callable:
    """The function `module.function`.

    Raises:
        UserError: it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{flag} {path}: write it as module.function, importable from here ({error}).") from error
