"""What every recipe does around its training: parse, guard the output folder, record the run, fail with one line."""

import dataclasses
import difflib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable

import torch
import yaml
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from recipes.errors import UserError
from recipes.launch import check_devices

PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
SECRETS = re.compile(r"(^|_)(token|key|password|secret)$")


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
    parser = RecipeParser(dataclass_types, allow_abbrev=False)  # a misspelt flag may not pass for another
    try:
        *parsed, in_config, in_flags = parser.parse_args_and_config(
            args, return_remaining_strings=True, separate_remaining_strings=True
        )
    except OSError as error:
        raise UserError(f"--config {config}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {config} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if in_config:
        raise parser.unknown(in_config[0].removeprefix("--"), f"--config {config}")
    if in_flags:
        raise parser.unknown(in_flags[0].removeprefix("--"), "Command line")
    return tuple(parsed)


def split_config_flag(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]


def guard_output_dir(training_args: TrainingArguments) -> None:
    """Refuse to write over an earlier run, and turn `--resume_from_checkpoint true` into the newest checkpoint.

    Raises:
        UserError: the folder holds something and the run does not resume, or there is nothing to resume from.
    """
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
    elif not os.path.isdir(resume):
        raise UserError(f"--resume_from_checkpoint {resume}: there is no such folder.")


def finish(trainer: Trainer, recipe: str, datasets: dict, *arguments) -> None:
    """Save model, tokenizer, model card, trainer state and `train_config.yaml`, and leave the process group."""
    trainer.save_model()
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        trainer.create_model_card()
        save_train_config(trainer.args.output_dir, recipe, datasets, arguments)
        print(f"Saved to {trainer.args.output_dir}", file=sys.stderr)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def save_train_config(output_dir: str, recipe: str, datasets: dict, arguments: tuple) -> None:
    """Write every resolved argument, the versions, the git revision and the datasets' fingerprints."""
    values = {}
    for group in arguments:
        fields = group.to_dict() if isinstance(group, TrainingArguments) else dataclasses.asdict(group)
        values |= {name: plain(value) for name, value in fields.items() if not SECRETS.search(name)}
    content = {
        "recipe": recipe,
        "arguments": dict(sorted(values.items())),
        "datasets": {name: {"rows": len(data), "fingerprint": data._fingerprint} for name, data in datasets.items()},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_revision": git_revision(),
    }
    with open(os.path.join(output_dir, "train_config.yaml"), "w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)


def plain(value):
    """`value` in types that YAML knows."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def git_revision() -> str | None:
    """Commit of the checkout the recipes run from, `None` outside of one."""
    command = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(main: Callable[[], None]) -> None:
    """Run a recipe. What the user can mend is one line and exit code 1; a bug keeps its traceback."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
