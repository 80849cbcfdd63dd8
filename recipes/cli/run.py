"""What every recipe does around its training: guard the output folder, record the run, end it, fail with one line."""

import atexit
import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NoReturn

import torch
import yaml
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from recipes.cli.launch import world_size

PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
SECRETS = re.compile(r"(^|_)(?<!eos_)(?<!pad_)(token|key|password|secret)$")


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


def finish(trainer: Trainer, recipe: str, reports: Mapping[str, Any], *arguments) -> None:
    """Save model, tokenizer, model card, trainer state and a record of the run, and leave the process group.

    `train_config.yaml` comes last: a folder that holds it holds a finished run.

    Args:
        reports: what became of the rows, by dataset, as `load_formatted` gives them.
        arguments: the dataclasses that the run was started with.
    """
    trainer.save_model()
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        trainer.create_model_card()
        for name, report in reports.items():
            report.save(os.path.join(trainer.args.output_dir, f"data_report_{name.replace(' ', '_')}.json"))
        save_train_config(trainer.args.output_dir, recipe, reports, arguments)
        print(f"Saved to {trainer.args.output_dir}", file=sys.stderr)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def save_train_config(output_dir: str, recipe: str, reports: Mapping[str, Any], arguments: tuple) -> None:
    """Write every resolved argument, the versions, the git revision and the datasets' fingerprints, but no secret."""
    values = {}
    for group in arguments:
        values |= {field.name: getattr(group, field.name, None) for field in dataclasses.fields(group)}
    content = {
        "recipe": recipe,
        "arguments": dict(sorted(plain(values).items())),
        "datasets": {
            name: {"source": report.source, "rows": report.rows_out, "fingerprint": report.fingerprint}
            for name, report in reports.items()
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


def run(main: Callable, argument_types: tuple[type, ...] = ()) -> None:
    """Run `main` with these dataclasses, read from the command line.

    What the user can mend is one line and exit code 1; a bug keeps its traceback.

    A process that fails ends at once, so that the launcher ends the others, which may be waiting for it. One
    of several that is done ends without waiting for threads: one that never ends would hold all machines.
    """
    try:
        main(*(parse(argument_types) if argument_types else ()))
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
