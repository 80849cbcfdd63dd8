"""What every recipe does around its training: parse, guard the output folder, record the run, fail with one line."""

import atexit
import dataclasses
import difflib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from enum import Enum
from typing import NoReturn

import torch
import yaml
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from recipes.cli.errors import UserError
from recipes.cli.launch import check_devices, world_size
from recipes.formatting import FormattedDatasets

PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
SECRETS = re.compile(r"(^|_)(?<!eos_)(?<!pad_)(token|key|password|secret)$")


class RecipeParser(TrlParser):
    """`TrlParser` whose errors are one line instead of a page of usage."""

    def error(self, message: str):
        raise UserError(f"Command line: {message}.")

    def unknown(self, name: str, where: str) -> UserError:
        known = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ". --help lists all arguments."
        return UserError(f"{where}: there is no argument {name}{hint}")


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
    try:
        if config is not None:
            check_config(config, parser)
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
    return tuple(parsed)


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"--config {node.start_mark.name}: {twice[0]} stands there twice.")
        return super().construct_mapping(node, deep)


def check_config(config: str, parser: RecipeParser) -> None:
    """Refuse what argparse lets pass in a YAML file, because it converts the type of strings only."""
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


def guard_output_dir(training_args: TrainingArguments) -> None:
    """Refuse to write over an earlier run, and turn `--resume_from_checkpoint true` into the newest checkpoint.

    Raises:
        UserError: the folder holds something and the run does not resume, or there is nothing to resume from.
    """
    if os.path.exists(training_args.output_dir) and not os.path.isdir(training_args.output_dir):
        raise UserError(f"--output_dir {training_args.output_dir} is a file: choose another.")
    folder, resume = training_args.output_dir, training_args.resume_from_checkpoint
    wants = str(resume).lower()
    if wants in ("none", "false", "no", "0", ""):
        training_args.resume_from_checkpoint = None
        if os.path.isdir(folder) and os.listdir(folder):
            raise UserError(
                f"The output folder {folder} is not empty, and nothing is ever written over: "
                "choose another --output_dir, or continue it with --resume_from_checkpoint true."
            )
    elif wants in ("true", "yes", "1"):
        checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        if checkpoint is None:
            raise UserError(f"--resume_from_checkpoint true: there is no checkpoint in {folder}.")
        training_args.resume_from_checkpoint = checkpoint
    elif not os.path.isfile(os.path.join(resume, TRAINER_STATE_NAME)):
        raise UserError(f"--resume_from_checkpoint {resume}: there is no checkpoint.")
    training_args.distributed_state.wait_for_everyone()  # no process may write before all have looked


def finish(trainer: Trainer, recipe: str, datasets: FormattedDatasets, *arguments) -> None:
    """Save model, tokenizer, model card, trainer state and a record of the run, and leave the process group.

    `train_config.yaml` comes last: a folder that holds it holds a finished run.
    """
    trainer.save_model()
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        trainer.create_model_card()
        for name, report in datasets.reports.items():
            report.save(os.path.join(trainer.args.output_dir, f"data_report_{name.replace(' ', '_')}.json"))
        save_train_config(trainer.args.output_dir, recipe, datasets, arguments)
        print(f"Saved to {trainer.args.output_dir}", file=sys.stderr)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def save_train_config(output_dir: str, recipe: str, datasets: FormattedDatasets, arguments: tuple) -> None:
    """Write every resolved argument, the versions, the git revision and the datasets' fingerprints, but no secret."""
    values = {}
    for group in arguments:
        values |= {field.name: getattr(group, field.name, None) for field in dataclasses.fields(group)}
    content = {
        "recipe": recipe,
        "arguments": dict(sorted(plain(values).items())),
        "datasets": {
            name: {"source": report.source, "rows": report.rows_out, "fingerprint": report.fingerprint}
            for name, report in datasets.reports.items()
        },
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_revision": git_revision(),
    }
    with open(os.path.join(output_dir, "train_config.yaml"), "w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)


def plain(value):
    """`value` in types that YAML knows, without the entries whose names say that they are secret."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if not SECRETS.search(str(key))}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def git_revision() -> str | None:
    """Commit of the checkout the recipes run from, `None` outside of one."""
    command = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(main: Callable[[], None]) -> None:
    """Run a recipe. What the user can mend is one line and exit code 1; a bug keeps its traceback.

    A process that fails ends at once, so that the launcher ends the others, which may be waiting for it. One
    of several that is done ends without waiting for threads: one that never ends would hold all machines.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # mostly the first process fails in the same way, says so, and this one is ended meanwhile
        fail(f"error: {error}\n")
    except Exception:
        if not torch.distributed.is_initialized():
            raise
        fail(traceback.format_exc())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if world_size() > 1:
        atexit._run_exitfuncs()  # trackers close here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def fail(text: str) -> NoReturn:
    """Print `text` and end with exit code 1, in a process group without the teardown that may wait for the others."""
    print(text, end="", file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(1)
    sys.exit(1)
