"""Formats datasets for the recipes: any source becomes the columns that TRL trains on, or an error says why not.

`recipes.data.tasks` lists the columns of each task, `recipes.data.schemas` the datasets that are understood.
This module may import `recipes.data` and `recipes.cli`: it needs no model, at most a tokenizer.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from recipes.cli.screen import say
from recipes.data.formatter import Formatter, as_rows
from recipes.data.loading import Rows, list_splits, load_rows
from recipes.data.mapping import parse_mapping
from recipes.data.mixtures import Source, combine, parse_sources
from recipes.data.report import Report
from recipes.data.rows import DataError
from recipes.data.schemas import detect
from recipes.data.splits import check_leakage, split_by_group

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = [
    "DataError", "FormattedDatasets", "Formatter", "FormattingArguments", "Report", "RowArguments", "check_leakage",
    "detect", "format_dataset", "has_test_split", "list_splits", "load_formatted", "load_rows", "split_by_group",
]  # fmt: skip
BATCH = 1000  # rows that are written at a time


def format_dataset(
    rows: Rows | Iterable[dict], task: str, streaming: bool = False, num_proc: int | None = None, **options
) -> tuple["Dataset | IterableDataset", Report]:
    """Formats rows, of `load_rows` or any list or `datasets` dataset of dictionaries, for a task.

    Args:
        streaming: formats while the result is iterated: an IterableDataset, whose report fills up on the way and
            whose errors are raised at the row where they are met.
        num_proc: processes that format; the result is the same for any number. Streams take one.
        options: of `Formatter`.
    Returns:
        The dataset, memory-mapped from a file that lives as long as the process, and the report.
    Raises:
        DataError: rows that cannot be used, an unknown schema, or no usable row; its `report` is complete.
    """
    rows = as_rows(rows)
    formatter, report = Formatter(task, fail_fast=streaming, **options), Report(rows.source, task)
    if not streaming:
        launched = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes, each of which formats all rows
        return _write(formatter, rows, report, (num_proc or 1) // launched), report
    from datasets import IterableDataset

    parts = {"formatter": formatter, "rows": rows, "report": report}
    return IterableDataset.from_generator(_stream, formatter.features(), parts), report


def _stream(formatter: Formatter, rows: Rows, report: Report) -> Iterator[dict]:
    return (output for _, output in formatter(rows, report))


def _write(formatter: Formatter, rows: Rows, report: Report, num_proc: int) -> "Dataset":
    """Writes an Arrow file itself: `Dataset.from_generator` wraps errors and rounds numbers in tool calls."""
    import datasets
    import pyarrow

    columns = formatter.features()
    folder = datasets.fingerprint.get_temporary_cache_files_directory()
    path = os.path.join(folder, f"formatted-{os.urandom(8).hex()}.arrow")
    outputs = (output for _, output in formatter(rows, report, num_proc))
    if formatter.task == "sft" or formatter.keep_columns:  # only these have free JSON; others would only be copied
        outputs = (datasets.features.features.encode_nested_example(columns, output) for output in outputs)
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, columns.arrow_schema) as writer:
        while batch := list(islice(outputs, BATCH)):
            writer.write_table(pyarrow.Table.from_pylist(batch, columns.arrow_schema))
    dataset = datasets.Dataset.from_file(path)
    if "tools" in columns and dataset.data["tools"].null_count == len(dataset):
        dataset = dataset.remove_columns("tools")
    dataset._fingerprint = report.fingerprint  # of the content, so that it is the same in the next run
    return dataset


@dataclass
class RowArguments:
    """How the rows of a dataset are read; docs/datasets.md explains more."""

    dataset_schema: str = field(
        default="auto", metadata={"help": "Name of the schema (docs/datasets.md lists them), or auto to detect it."}
    )
    dataset_mapping: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which column holds what, as key=value items or one JSON object, e.g. prompt=question.text "
            "chosen=best rejected=worst; dots reach into objects, and roles.NAME=user adds a role."
        },
    )
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "Stop at rows that cannot be used, or leave them out."}
    )
    max_error_rate: float = field(
        default=0.01, metadata={"help": "With on_error=skip, the share of bad rows that is still accepted."}
    )
    on_special: Literal["flag", "drop", "fail"] = field(
        default="flag", metadata={"help": "Report, leave out or refuse rows that hold the text of a control token."}
    )
    dedup: Literal["flag", "drop"] = field(default="flag", metadata={"help": "Report or leave out repeated rows."})

    def options(self) -> dict[str, Any]:
        """As keyword arguments of `format_dataset`."""
        given = {name: getattr(self, name) for name in ("on_error", "max_error_rate", "on_special", "dedup")}
        return given | {"schema": self.dataset_schema, "mapping": parse_mapping(self.dataset_mapping)}


@dataclass
class FormattingArguments(RowArguments):
    """How the dataset of a recipe is read, beside TRL's ScriptArguments."""

    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "A mixture instead of dataset_name: SOURCE or SOURCE=FRACTION, its share of the mixture; in YAML "
            "also mappings with path and perhaps name, split, data_files, schema, mapping and fraction."
        },
    )
    keep_columns: list[str] | None = field(
        default=None, metadata={"help": "For PPO, columns that its Python reward functions get as keyword arguments."}
    )
    test_split_size: float = field(
        default=0.1, metadata={"help": "Share of the prompts to evaluate on, where the dataset has no test split."}
    )

    def options(self) -> dict[str, Any]:
        return super().options() | {"keep_columns": self.keep_columns or ()}


class FormattedDatasets(dict):
    """Datasets by split ("train", perhaps "eval"), and `reports` on their rows."""

    def __init__(self):
        self.reports: dict[str, Report] = {}


def has_test_split(source, split: str, name: str | None = None) -> bool:
    """Whether a source has the split to evaluate on, which may be a slice such as `train[0:100]`.

    A line on stderr says where it has not, unless the split is the default "test".
    """
    found = split.partition("[")[0] in list_splits(source, name)
    if not found and split != "test":
        say(f"{source} has no split {split!r} (--dataset_test_split): rows to evaluate on are from its other splits.")
    return found


def load_formatted(
    task: str,
    script_args,
    format_args: FormattingArguments,
    tokenizer=None,
    evaluate: bool = False,
    seed: int = 0,
    **options,
) -> FormattedDatasets:
    """The datasets of a recipe: {"train": dataset} and, with `evaluate`, "eval".

    "eval" is the source's split `dataset_test_split` or, where it has none and for mixtures, `test_split_size` of the
    prompts of "train"; a single prompt is not split. The first process prints the reports to stderr.

    Args:
        script_args: TRL's ScriptArguments: dataset_name, dataset_config, the names of the splits, and
            dataset_streaming, which gives IterableDatasets that are formatted while they are read.
        tokenizer: rows are rendered by its chat template, and searched for its control tokens.
        options: further keyword arguments of `format_dataset`, such as `prompt_completion` or `cut_at`.
    Raises:
        DataError: there is no dataset, or it cannot be used.
    """
    streaming = script_args.dataset_streaming
    options = {**format_args.options(), "tokenizer": tokenizer, "streaming": streaming, **options}
    datasets = FormattedDatasets()
    for key, sources in _sources(script_args, format_args, evaluate).items():
        formatted = []
        for number, source in enumerate(sources, 1):
            rows = load_rows(source.path, source.split, source.name, source.data_files, streaming)
            dataset, report = format_dataset(rows, task, **options | source.options())
            formatted.append(dataset)
            datasets.reports[key if len(sources) == 1 else f"{key} {number}"] = report
        datasets[key] = combine(formatted, sources, streaming, seed)
    if streaming:
        return datasets
    if "eval" in datasets:
        datasets.reports["leakage"] = check_leakage(datasets["train"], datasets["eval"])
    elif evaluate:
        datasets["train"], held_out = split_by_group(datasets["train"], format_args.test_split_size, seed)
        if held_out is None:
            say("There is only one prompt: it is trained on, and nothing is held out to evaluate.")
        else:
            datasets["eval"] = held_out
    say("\n".join(map(str, datasets.reports.values())))
    return datasets


def _sources(script_args, format_args: FormattingArguments, evaluate: bool) -> dict[str, list[Source]]:
    """The sources of "train" and, where there is a split to evaluate on, of "eval"."""
    path, name = script_args.dataset_name, script_args.dataset_config
    train = Source(path, name, script_args.dataset_train_split)
    if format_args.datasets:
        if (name, train.split, script_args.dataset_test_split) != (None, "train", "test"):
            raise DataError(
                "datasets: a source of a mixture has its own name and split, and rows to evaluate on are held out: "
                "leave out dataset_config, dataset_train_split and dataset_test_split"
            )
        sources = {"train": parse_sources(format_args.datasets)}
    elif path is None:
        raise DataError("no dataset: set --dataset_name to a file, a folder or a Hub name")
    else:
        sources = {"train": [train]}
        if evaluate and has_test_split(path, script_args.dataset_test_split, name):
            sources["eval"] = [replace(train, split=script_args.dataset_test_split)]
    if evaluate and script_args.dataset_streaming and "eval" not in sources:
        raise DataError("a stream cannot be split: evaluate on a source with a test split, or do not stream")
    return sources
