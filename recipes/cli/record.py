"""The record of a run: what it was started with, and whether a later start asks for the same."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import yaml
from transformers import TrainingArguments

from recipes.cli.errors import UserError, counted
from recipes.cli.files import write_text

RECORD = "run_arguments.yaml"  # written when training starts
RESULT = "train_config.yaml"  # written last: a folder that holds it holds a finished run
PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
SECRETS = re.compile(r"(^|_)(?<!eos_)(?<!pad_)(token|key|password|secret)$")
LENGTH = ("max_steps", "num_train_epochs", "total_episodes")
# What a resumed run may be given anew, because it changes nothing that is trained; docs/reliability.md lists it.
FREE = re.compile(
    "|".join(LENGTH)
    + r"|output_dir|resume_from_checkpoint"
    + r"|logging_.*|log_.*|report_to|run_name|project|trackio_.*|disable_tqdm|num_completions_to_print"
    + r"|include_num_input_tokens_seen|skip_memory_metrics|debug"
    + r"|save_.*|enable_jit_checkpoint|push_to_hub|hub_.*"
    + r"|do_.*|eval_.*|per_device_eval_batch_size|num_generations_eval|batch_eval_metrics|include_for_metrics"
    + r"|prediction_loss_only|dataset_test_split"
    + r"|dataloader_num_workers|dataloader_pin_memory|dataloader_persistent_workers|dataloader_prefetch_factor"
    + r"|dataset_num_proc|ddp_timeout"
)
MODEL_FILES = re.compile(
    r".*\.safetensors(\.index\.json)?|(pytorch|adapter)_model.*\.bin|(adapter_|tokenizer_|generation_)?config\.json"
    r"|tokenizer\.json|chat_template\.jinja|reward_statistics\.json"
)
TEMPLATE = "chat_template_path"  # a folder or a file
SAMPLE = 65_536  # bytes of each end of a file that take part in its digest


def all_arguments(arguments: tuple) -> dict[str, Any]:
    """The fields of all dataclasses, by name, but no secret."""
    values = {}
    for group in arguments:
        values |= {field.name: getattr(group, field.name, None) for field in dataclasses.fields(group)}
    return dict(sorted(plain(values).items()))


def describe(recipe: str, arguments: tuple) -> dict[str, Any]:
    """Every argument, the local models by their content, processes and device, the versions."""
    values = all_arguments(arguments)
    training_args = next(group for group in arguments if isinstance(group, TrainingArguments))
    folders = {
        name: value
        for name, value in values.items()
        if isinstance(value, str) and not FREE.fullmatch(name)
        if os.path.isdir(value) or (name == TEMPLATE and os.path.isfile(value))
    }
    return {
        "recipe": recipe,
        "arguments": values,
        "models": {name: digest(folder) for name, folder in folders.items()},
        "setup": {
            "processes": training_args.world_size,
            "device": training_args.device.type,
            "precision": training_args.mixed_precision,  # perhaps that of accelerate launch
        },
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_revision": git_revision(),
    }


def add_rows(record: dict[str, Any], reports: Mapping[str, Any], datasets: Mapping[str, Any]) -> None:
    """Put where the rows are from, and what is used of them as the trainer has it, into the record and the reports."""
    record["used"] = {name: count(dataset) for name, dataset in datasets.items() if hasattr(dataset, "__len__")}
    if "train" in record["used"]:
        record["setup"]["training_rows"] = record["used"]["train"]["rows"]
    record["datasets"] = {}
    for name, report in reports.items():
        found = {"source": report.source, "rows": report.rows_out, "fingerprint": report.fingerprint}
        record["datasets"][name] = found
        if name.startswith(("train", "eval")):
            report.used = record["used"]


def used_in_words(record: Mapping[str, Any]) -> list[str]:
    """What [`add_rows`] counted, a sentence for training and one for evaluation."""
    verbs = {"train": "Training", "eval": "Evaluating"}
    return [
        f"{verbs[name]} on {', '.join(counted(number, what.removesuffix('s')) for what, number in counts.items())}."
        for name, counts in record.get("used", {}).items()
    ]


def count(dataset: Any) -> dict[str, int]:
    """Rows of a dataset, responses of rankings, and tokens where it holds token ids."""
    found = Counter(rows=len(dataset))
    for column in [name for name in ("input_ids", "response_ids") if name in dataset.column_names][:1]:
        for batch in dataset.select_columns(column).with_format("arrow").iter(1000):
            ids = batch[column]
            if column == "response_ids":
                found["responses"] += pc.sum(pc.list_value_length(ids)).as_py()
                ids = pc.list_flatten(ids)
            found["tokens"] += pc.sum(pc.list_value_length(ids)).as_py()
    return dict(found)


def write_record(path: str, record: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True))


def read_record(path: str) -> dict[str, Any] | None:
    """A record, or `None` where there is none; a file that is no record is a `UserError`."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            record = yaml.safe_load(file)
        record["arguments"].items()
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as the record of a run: {' '.join(str(error).split())}.") from error
    return record


def arguments_of(folder: str) -> dict[str, Any]:
    """The arguments of the run that a model, a checkpoint or its `ema/` is of; empty where they are not known."""
    path = os.path.abspath(folder)
    while True:
        record = read_record(os.path.join(path, RESULT)) or read_record(os.path.join(path, RECORD))
        if record is not None:
            return record["arguments"]
        if not re.fullmatch(r"ema|checkpoint-\d+", os.path.basename(path)):
            return {}
        path = os.path.dirname(path)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a later start of a run differs in from its first, one phrase each."""
    was = fixed(before)
    return [
        f"{name} was {was[name]}, now {value}"
        for name, value in fixed(now).items()
        if name in was and not same(was[name], value)
    ]


def fixed(record: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change from one start of a run to the next, by the name that a message gives it."""
    found = {"recipe": record["recipe"], **record.get("setup", {})}
    found |= {f"--{name}": value for name, value in record["arguments"].items() if not FREE.fullmatch(name)}
    found |= {f"the digest of --{name}": digest for name, digest in record.get("models", {}).items()}
    for name, data in record.get("datasets", {}).items():
        if not name.startswith(("eval", "leakage")):
            found[f"the digest of the {name} rows"] = data["fingerprint"]
    return found


def same(was: Any, value: Any) -> bool:
    """Whether two values of an argument are equal, or two paths of the same file."""
    paths = isinstance(was, str) and isinstance(value, str) and os.path.exists(was) and os.path.exists(value)
    return was == value or (paths and os.path.samefile(was, value))


def refuse_changes(before: Mapping[str, Any] | None, now: Mapping[str, Any], folder: str) -> None:
    """Refuse to go on with another run than the one in `folder`, by every argument that changes what is trained."""
    if before is not None and (found := changes(before, now)):
        raise UserError(
            f"The run in {folder} goes on only as it was started: {'; '.join(found)}. "
            "Set that back, or start anew in another --output_dir."
        )


def wants_more(arguments: Mapping[str, Any], finished: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether a run that `finished` with other arguments, in Trainer's `state`, is asked for further steps."""
    if all(arguments.get(name) == finished.get(name) for name in LENGTH):
        return False
    if arguments["max_steps"] > 0:
        return arguments["max_steps"] > state["global_step"]
    return arguments["num_train_epochs"] > state["epoch"] + 1e-6


def plain(value):
    """`value` in types that YAML knows, without the entries whose names say that they are secret."""

    def simpler(other):
        if isinstance(other, set):
            return sorted(other, key=str)  # its own order differs from one start to the next
        return vars(other) if dataclasses.is_dataclass(other) else str(other)

    def without_secrets(entries):
        return {name: entry for name, entry in entries.items() if not SECRETS.search(name)}

    return json.loads(json.dumps(value, default=simpler), object_hook=without_secrets)


def digest(path: str) -> str:
    """A short digest of a file, or of a model's files: name, size and both ends of each, since weights are large.

    That of an adapter covers its base, where it is a folder.
    """
    if os.path.isfile(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    total = hashlib.sha256()
    for name in sorted(filter(MODEL_FILES.fullmatch, os.listdir(path))):
        with open(os.path.join(path, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            total.update(f"{name} {size} ".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            total.update(file.read())
    with suppress(OSError, ValueError, AttributeError, RecursionError):  # no adapter, or one that is refused later
        adapter = json.loads(Path(path, "adapter_config.json").read_text(encoding="utf-8"))
        if os.path.isdir(base := adapter.get("base_model_name_or_path") or ""):
            total.update(digest(base).encode())
    return total.hexdigest()[:16]


def git_revision() -> str | None:
    """Commit of the checkout the recipes run from, `None` outside of one."""
    command = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
