"""Turns rows of any known schema into the columns that TRL trains on, and tells what became of every row.

The output is always conversational and holds only these columns (`messages` stands for a list of {role, content}):
    sft         messages; or, with `prompt_completion`, prompt: messages, completion: messages (the last turn)
    preference  prompt, chosen, rejected: messages; group_id: str; margin: float where asked for
    ranking     prompt: messages; completions: list of messages, best first; ranks: list of float; group_id: str
    prompt      prompt: messages that end with the user's turn
SFT rows with tool calls also get `tools` (JSON text, as TRL takes it). `group_id` is a hash of the prompt: rows of one
prompt belong into one split. Nothing here knows a model; a tokenizer is passed in where one is needed.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.data_report import Report
from recipes.loading import DataError, Row, RowError, Rows, list_splits, load_rows
from recipes.schemas import ROLES, SCHEMAS, TASKS, Dialogue, Messages, Ranking, Skip, check_order, detect

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "DataError", "FormattingArguments", "Report", "check_leakage", "detect", "format_dataset", "format_rows",
    "list_splits", "load_formatted", "load_rows", "split_by_group",
]  # fmt: skip

SAMPLE = 100  # rows that detection looks at
TEMPLATE_MARKS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>", "<bos>", "<eos>",
)  # fmt: skip


@dataclass
class FormattingArguments:
    """How the dataset of a recipe is read; used together with TRL's ScriptArguments.

    Args:
        dataset_schema: name of the schema (docs/datasets.md), or "auto" to detect it from columns and values.
        dataset_mapping: which column holds what, as key=value items or one JSON object, e.g. `prompt=question.text
            chosen=best rejected=worst`; dots reach into objects, and `roles.NAME=user` adds a role.
        on_error: "raise" stops at rows that cannot be used; "skip" leaves them out, up to `max_error_rate`.
        max_error_rate: with `on_error=skip`, the share of bad rows that is still accepted (one row always is).
        on_special: text that a tokenizer may read as a control token is kept and reported ("flag"), leaves the row
            out ("drop") or counts as an error ("fail").
        dedup: rows that were there before are kept and reported ("flag") or left out ("drop").
        test_split_size: share of the prompts that is held out for evaluation, where the dataset has no test split.
    """

    dataset_schema: str = field(default="auto", metadata={"help": "Schema of the dataset; see docs/datasets.md."})
    dataset_mapping: list[str] | None = field(
        default=None, metadata={"help": "Columns by name, as key=value items or one JSON object."}
    )
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "Stop at rows that cannot be used, or leave them out."}
    )
    max_error_rate: float = field(
        default=0.01, metadata={"help": "With on_error=skip, the share of bad rows that is still accepted."}
    )
    on_special: Literal["flag", "drop", "fail"] = field(
        default="flag", metadata={"help": "What to do with rows that hold the text of a control token."}
    )
    dedup: Literal["flag", "drop"] = field(default="flag", metadata={"help": "What to do with repeated rows."})
    test_split_size: float = field(
        default=0.1, metadata={"help": "Share of the prompts to evaluate on, where the dataset has no test split."}
    )

    def options(self) -> dict[str, Any]:
        """As keyword arguments of `format_dataset`."""
        return {
            "schema": self.dataset_schema,
            "mapping": parse_mapping(self.dataset_mapping),
            "on_error": self.on_error,
            "max_error_rate": self.max_error_rate,
            "on_special": self.on_special,
            "dedup": self.dedup,
        }


def parse_mapping(items: list[str] | str | Mapping | None) -> dict[str, str] | None:
    """A mapping as it comes from the command line (key=value items or a JSON object) or from YAML."""
    if not items or isinstance(items, Mapping):
        return dict(items) if items else None
    items = items.split() if isinstance(items, str) and not items.lstrip().startswith("{") else items
    joined = items if isinstance(items, str) else " ".join(items)
    if joined.lstrip().startswith("{"):
        try:
            return parse_mapping(json.loads(joined))
        except json.JSONDecodeError as error:
            raise DataError(f"--dataset_mapping is not valid JSON: {error}") from None
    for item in items:
        if not re.fullmatch(r"[^=]+=[^=]+", item):
            raise DataError(f"--dataset_mapping: {item!r} is not KEY=COLUMN, e.g. prompt=question.text")
    return dict(item.split("=") for item in items)


def format_dataset(
    rows: Rows | Iterable[dict],
    task: str,
    schema: str = "auto",
    mapping: Mapping[str, str] | None = None,
    on_error: str = "raise",
    margin: bool = False,
    on_special: str = "flag",
    special_tokens: Iterable[str] = (),
    dedup: str = "flag",
    prompt_completion: bool = False,
    max_error_rate: float = 0.01,
) -> tuple["Dataset", Report]:
    """Formats rows for a task; the columns are listed at the top of this module.

    Args:
        rows: from `load_rows`, or any list or `datasets` dataset of dictionaries.
        task: "sft", "preference", "ranking" or "prompt".
        margin: adds the column `margin`, which TRL's RewardTrainer subtracts in its loss.
        special_tokens: texts to look for beside the marks of common chat templates, e.g. `all_special_tokens`.
        prompt_completion: for sft, `prompt` and `completion` instead of `messages`, to train on the last turn only.
        Others: see `FormattingArguments`.
    Returns:
        The dataset, memory-mapped from a file that lives as long as the process, and the report.
    Raises:
        DataError: rows that cannot be used, an unknown schema, or no usable row; its `report` is complete.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    rows = _as_rows(rows)
    options = {
        "schema": schema, "mapping": mapping, "on_error": on_error, "max_error_rate": max_error_rate, "margin": margin,
        "on_special": on_special, "special_tokens": special_tokens, "dedup": dedup,
        "prompt_completion": prompt_completion,
    }  # fmt: skip
    folder = datasets.fingerprint.get_temporary_cache_files_directory()
    for with_tools in (False, True):  # tool calls need a column of free JSON, known only once one is met
        report = Report(rows.source, task)
        features = _features(task, prompt_completion, margin, with_tools)
        path = str(Path(folder) / f"formatted-{os.urandom(8).hex()}.arrow")
        try:
            with ArrowWriter(features=features, path=path, writer_batch_size=1000) as writer:
                for _, output in format_rows(rows, task, report, **options):
                    if not with_tools and _has_tools(output):
                        raise _HasTools
                    writer.write({"tools": None, **output} if with_tools else output)
                writer.finalize()
            return datasets.Dataset.from_file(path), report
        except _HasTools:
            continue
    raise AssertionError("the second pass stores everything")


class _HasTools(Exception):
    pass


def _has_tools(output: dict) -> bool:
    messages = (turn for key in ("messages", "prompt", "completion") for turn in output.get(key, ()))
    return "tools" in output or any(len(turn) > 2 for turn in messages)


def _features(task: str, prompt_completion: bool, margin: bool, with_tools: bool):
    from datasets import Features, Json, List, Value

    text = Value("string")
    messages = List(Json()) if with_tools else List({"role": text, "content": text})
    columns: dict[str, Any] = {
        "sft": {"prompt": messages, "completion": messages} if prompt_completion else {"messages": messages},
        "preference": {"prompt": messages, "chosen": messages, "rejected": messages},
        "ranking": {"prompt": messages, "completions": List(messages), "ranks": List(Value("float64"))},
        "prompt": {"prompt": messages},
    }[task]
    if task in ("preference", "ranking"):
        columns["group_id"] = text
    if task == "preference" and margin:
        columns["margin"] = Value("float64")
    if task == "sft" and with_tools:
        columns["tools"] = text
    return Features(columns)


def format_rows(
    rows: Rows | Iterable[dict],
    task: str,
    report: Report,
    *,
    schema: str = "auto",
    mapping: Mapping[str, str] | None = None,
    on_error: str = "raise",
    max_error_rate: float = 0.01,
    margin: bool = False,
    on_special: str = "flag",
    special_tokens: Iterable[str] = (),
    dedup: str = "flag",
    prompt_completion: bool = False,
) -> Iterator[tuple[Row, dict]]:
    """The engine of `format_dataset`: yields each output row with its source row, and fills in the report.

    All rows are read before errors are raised, so that the report is complete.
    """
    rows = _as_rows(rows)
    if task not in TASKS:
        raise report.error(f"unknown task {task!r}; expected {', '.join(TASKS)}")
    roles, mapping = _split_mapping(mapping)
    report.schema, report.reason = _choose_schema(rows, report, schema, mapping)
    special = re.compile("|".join(map(re.escape, sorted({*TEMPLATE_MARKS, *special_tokens}, key=len, reverse=True))))
    seen: set[int] = set()
    fingerprint = hashlib.sha256()
    for row in rows:
        report.rows_in += 1
        try:
            outputs = _outputs(row, task, report, mapping, roles, margin, prompt_completion)
            for output in outputs:
                found = _special_token(output, special)
                if found and on_special != "flag":
                    if on_special == "fail":
                        raise RowError(f"found {found}; remove it, or use on_special=flag or drop")
                    raise Skip(found)
                key = hashlib.blake2b(json.dumps(output, sort_keys=True).encode(), digest_size=8).digest()
                number = int.from_bytes(key)
                duplicate = number in seen
                if duplicate and dedup == "drop":
                    report.add("skipped", row, "duplicate")
                    continue
                seen.add(number)
                for flag in filter(None, (found, duplicate and "duplicate")):
                    report.add("flags", row, flag)
                fingerprint.update(key)
                report.rows_out += 1
                yield row, output
        except Skip as skip:
            report.add("skipped", row, skip.reason, _source_column(skip.column, mapping))
        except RowError as error:
            report.add("errors", row, error.message, _source_column(error.column, mapping))
    report.fingerprint = fingerprint.hexdigest()[:16]
    _finish(report, on_error, max_error_rate)


def _finish(report: Report, on_error: str, max_error_rate: float) -> None:
    errors = report.counts["errors"].total()
    if errors and on_error == "skip":
        if errors > max(1, max_error_rate * report.rows_in):
            raise report.error(f"{report.errors_text()}\nmore than --max_error_rate {max_error_rate} allows to skip")
        report.skip_errors()
    elif errors:
        raise report.error(f"{report.errors_text()}\nfix them, or leave bad rows out with --on_error skip")
    if report.rows_in == 0:
        raise report.error(f"{report.source}: no rows: the file or split is empty")
    if report.rows_out == 0:
        reasons = ", ".join(f"{what} ({count})" for what, count in report.counts["skipped"].most_common(5))
        raise report.error(f"{report.source}: none of {report.rows_in} rows is of use for {report.task!r}: {reasons}")


def _as_rows(rows: Rows | Iterable[dict]) -> Rows:
    if isinstance(rows, Rows):
        return rows
    held = rows if hasattr(rows, "features") else list(rows)
    return Rows("rows", lambda: (Row("rows", number, data) for number, data in enumerate(held, 1)))


def _split_mapping(mapping: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Separates `roles.NAME` entries, which extend the roles, from columns."""
    roles = dict(ROLES)
    columns = dict(mapping or {})
    for key in [key for key in columns if key.startswith("roles.")]:
        role = columns.pop(key)
        if role not in ROLES.values():
            raise DataError(f"mapping {key}={role}: a role must become {', '.join(sorted(set(ROLES.values())))}")
        roles[key.removeprefix("roles.").lower()] = role
    return roles, columns


def _choose_schema(rows: Rows, report: Report, schema: str, mapping: dict[str, str]) -> tuple[str | None, str]:
    task = report.task
    if schema != "auto":
        if schema not in SCHEMAS:
            raise DataError(f"unknown schema {schema!r}; expected auto or one of {', '.join(SCHEMAS)}")
        if task not in SCHEMAS[schema].tasks:
            raise DataError(f"schema {schema!r} serves {', '.join(SCHEMAS[schema].tasks)}, not task {task!r}")
        return schema, "as asked"
    sample = [row.data for row in islice(rows, SAMPLE) if isinstance(row.data, dict)]
    if not sample:  # nothing readable: the errors of the rows will tell
        return None, "no readable row"
    if mapping:
        sample = [_mapped(data, mapping, lenient=True) for data in sample]
    try:
        return detect({column for data in sample for column in data}, sample, task)
    except DataError as error:
        report.add("errors", next(iter(rows)), str(error))
        raise report.error(f"{rows.source}: {error}") from None


def _mapped(data: dict, mapping: dict[str, str], lenient: bool = False) -> dict:
    """The row as it would look if its columns had the names of a schema; only mapped columns are left."""
    result = {}
    for target, path in mapping.items():
        value: Any = data
        for part in [path] if path in data else path.split("."):
            if not isinstance(value, dict) or part not in value:
                if lenient:
                    break
                raise RowError(f"missing; this row has {', '.join(map(str, data))}", path)
            value = value[part]
        else:
            result[target] = value
    return result


def _source_column(column: str | None, mapping: dict[str, str]) -> str | None:
    name = re.match(r"[^.\[]*", column)[0] if column else None
    return column.replace(name, mapping[name], 1) if name in mapping else column


def _outputs(row: Row, task, report, mapping, roles, margin, prompt_completion) -> Iterable[dict]:
    if isinstance(row.data, RowError):
        raise row.data
    data = _mapped(row.data, mapping) if mapping else row.data
    example = SCHEMAS[report.schema].convert(data, roles)
    if task == "sft":
        return [_sft(example, prompt_completion)]
    if task == "prompt":
        return [_prompt(example, row, report)]
    for skip in example.dropped:
        report.add("skipped", row, skip.reason, skip.column)
    check = _check_ranking(example, row, report)
    return [check] if task == "ranking" else _pairs(check, example.margin, margin, row, report)


def _sft(example: Dialogue, prompt_completion: bool) -> dict:
    messages = example.messages
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise Skip(f"the last turn is {messages[-1]['role']}, not assistant")
    output = {"prompt": messages[:-1], "completion": messages[-1:]} if prompt_completion else {"messages": messages}
    return {**output, "tools": json.dumps(example.tools)} if example.tools else output


def _prompt(example: Dialogue | Ranking, row: Row, report: Report) -> dict:
    messages = example.prompt if isinstance(example, Ranking) else example.messages
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    check_order(messages)
    _refuse_tools(messages)
    if messages[-1]["role"] != "user":
        raise Skip(f"the prompt ends with a {messages[-1]['role']} turn")
    return {"prompt": messages}


def _refuse_tools(messages: Messages) -> None:
    if any(turn["role"] == "tool" or len(turn) > 2 for turn in messages):
        raise Skip("tool calls are supported for task 'sft' only")


def _check_ranking(example: Ranking, row: Row, report: Report) -> dict:
    for response in example.responses:
        check_order(example.prompt + response)
        _refuse_tools(example.prompt + response)
        if example.prompt[-1]["role"] != "user" or response[-1]["role"] != "assistant":
            raise Skip("a prompt must end with a user turn and a response with an assistant turn")
    if len(example.responses) < 2:
        raise Skip("fewer than two responses")
    if len(set(example.ranks)) == 1:
        raise Skip("tie: all responses have the same rank")
    if any(len(response) > 1 for response in example.responses):
        report.add("flags", row, "the responses diverge before the last turn")
    order = sorted(range(len(example.ranks)), key=example.ranks.__getitem__)
    return {
        "prompt": example.prompt,
        "completions": [example.responses[index] for index in order],
        "ranks": [float(example.ranks[index]) for index in order],
        "group_id": group_id(example.prompt),
    }


def _pairs(ranking: dict, value: float | None, margin: bool, row: Row, report: Report) -> Iterator[dict]:
    if margin and value is None:
        raise RowError("a margin was asked for, but this row has no margin and no scores", "margin")
    ranked = list(zip(ranking["completions"], ranking["ranks"], strict=True))
    for index, (chosen, rank) in enumerate(ranked):
        for rejected, worse in ranked[index + 1 :]:
            if rank == worse:
                continue
            if [turn["content"].strip() for turn in chosen] == [turn["content"].strip() for turn in rejected]:
                report.add("skipped", row, "identical responses")
                continue
            output = {"prompt": ranking["prompt"], "chosen": chosen, "rejected": rejected}
            yield {**output, "group_id": ranking["group_id"], **({"margin": float(value)} if margin else {})}


def group_id(prompt: Messages) -> str:
    """16 hexadecimal digits that are equal for equal prompts."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


def _special_token(output: dict, special: re.Pattern) -> str | None:
    for column in ("messages", "prompt", "completion", "chosen", "rejected", "completions"):
        for turn in output.get(column, ()):
            for said in turn if isinstance(turn, list) else (turn,):
                found = special.search(said["content"])
                if found:
                    return f"special token {found[0]!r} in a {said['role']} message"
    return None


def check_leakage(train: "Dataset", test: "Dataset") -> Report:
    """Flags the rows of `test` whose prompt is also a prompt in `train`; both come from `format_dataset`."""
    report = Report("test", "leakage", reason="rows whose prompt is also in train")
    known = {key for example in train for key in [_prompt_id(example)]}
    for number, example in enumerate(test, 1):
        report.rows_in += 1
        if _prompt_id(example) in known:
            report.add("flags", Row("test", number, example), "the prompt is also in train")
        else:
            report.rows_out += 1
    return report


def _prompt_id(example: dict) -> str:
    if "group_id" in example:
        return example["group_id"]
    return group_id(example["prompt"] if "prompt" in example else example["messages"][:-1])


def split_by_group(dataset: "Dataset", test_size: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
    """Splits into (train, test) so that all rows of one prompt fall on the same side.

    Args:
        test_size: share of the prompts, between 0 and 1, that goes to test. The side of a prompt depends on nothing
            but the prompt and the seed, so it stays when rows are added.
    """
    if not 0 < test_size < 1:
        raise DataError(f"test_size is {test_size}; expected a share between 0 and 1")

    def in_test(example: dict) -> bool:
        digest = hashlib.sha256(f"{seed}:{_prompt_id(example)}".encode()).digest()
        return int.from_bytes(digest[:8]) < test_size * 2**64

    sides: tuple[list[int], list[int]] = ([], [])
    for index, example in enumerate(dataset):
        sides[in_test(example)].append(index)
    if not sides[0] or not sides[1]:
        raise DataError(f"{len(dataset)} rows are too few prompts for a test share of {test_size}; try another seed")
    return dataset.select(sides[0]), dataset.select(sides[1])


class FormattedDatasets(dict):
    """Datasets by split ("train", perhaps "eval"), and in `reports` what became of their rows."""

    def __init__(self):
        super().__init__()
        self.reports: dict[str, Report] = {}


def load_formatted(
    task: str,
    script_args,
    format_args: FormattingArguments,
    tokenizer=None,
    evaluate: bool = False,
    seed: int = 0,
    **options,
) -> FormattedDatasets:
    """The datasets of a recipe: {"train": Dataset} and, with `evaluate`, "eval".

    "eval" is the source's split `dataset_test_split` or, where it has none, `test_split_size` of the prompts of
    "train". The first process prints the reports to stderr.

    Args:
        script_args: TRL's ScriptArguments: dataset_name, dataset_config and the names of the splits.
        tokenizer: its control tokens are looked for in the text of the rows.
        options: further keyword arguments of `format_dataset`, such as `prompt_completion` or `margin`.
    """
    source, name = script_args.dataset_name, script_args.dataset_config
    if source is None:
        raise DataError("no dataset: set --dataset_name to a file, a folder or a Hub name")
    options = {**format_args.options(), "special_tokens": control_tokens(tokenizer), **options}
    datasets = FormattedDatasets()

    def load(key: str, split: str) -> None:
        datasets[key], datasets.reports[key] = format_dataset(load_rows(source, split, name), task, **options)

    load("train", script_args.dataset_train_split)
    if evaluate and script_args.dataset_test_split in list_splits(source, name):
        load("eval", script_args.dataset_test_split)
        datasets.reports["leakage"] = check_leakage(datasets["train"], datasets["eval"])
    elif evaluate:
        datasets["train"], datasets["eval"] = split_by_group(datasets["train"], format_args.test_split_size, seed)
    if os.environ.get("RANK", "0") == "0":
        print(*datasets.reports.values(), sep="\n", file=sys.stderr)
    return datasets


def control_tokens(tokenizer) -> list[str]:
    """The special tokens of a tokenizer, and the added tokens that its chat template writes."""
    if tokenizer is None:
        return []
    template = str(tokenizer.chat_template or "")
    tokens = tokenizer.added_tokens_decoder.values()
    return [each.content for each in tokens if each.special or (each.content.strip() and each.content in template)]
