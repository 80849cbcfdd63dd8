"""Shows what a dataset becomes before any model is loaded: the rows that TRL would train on, and what was left out.

    python scripts/inspect_dataset.py rankings.jsonl --task preference --output rows.jsonl --report report.json
    python scripts/inspect_dataset.py demonstrations.jsonl --task sft --tokenizer runs/sft --max_length 512

Exits with 0, or with 1 and the errors; the report is written either way. With a tokenizer, every row is rendered and
measured, and the first ones are shown as the model will see them; ⟦…⟧ is the part that is trained on (sft: the last
turn) or scored (preference).
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

import argparse
import json
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

from recipes.cli.errors import UserError, counted, visible
from recipes.cli.files import complete_file
from recipes.cli.help import OneLineParser
from recipes.data.preview import sequences
from recipes.data.report import Report
from recipes.data.schemas import TASKS
from recipes.formatting import Formatter, RowArguments, load_rows

SHOWN = 3


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, RowArguments]:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="file (.jsonl, .json, .csv, .parquet), folder or Hub name")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--split", default="train", help="default: train; rows 10 to 19 of it are train[10:20]")
    parser.add_argument("--dataset_config", help="configuration of a Hub dataset")
    for each in fields(RowArguments):
        kind = {"choices": get_args(each.type)} if get_origin(each.type) is Literal else {"type": type(each.default)}
        kind = {"nargs": "+", "action": "extend"} if each.default is None else kind
        parser.add_argument(f"--{each.name}", default=each.default, help=each.metadata["help"], **kind)
    parser.add_argument("--keep_columns", nargs="+", action="extend", default=[], help="columns to keep, for PPO")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that format")
    parser.add_argument("--tokenizer", metavar="MODEL", help="render and measure rows as for this model")
    kind = {"nargs": "?", "const": "true", "default": "false", "choices": ["true", "false"]}
    parser.add_argument("--trust_remote_code", help="run code that comes with the tokenizer's model", **kind)
    parser.add_argument("--max_length", type=int, help="with --tokenizer, report rows of more tokens")
    parser.add_argument("--output", type=Path, help="write the formatted rows here, as JSON Lines")
    parser.add_argument("--report", type=Path, help="write the report here, as JSON")
    args = parser.parse_args(argv)
    if args.max_length is not None and not args.tokenizer:
        parser.error("--max_length counts tokens: it needs --tokenizer")
    if {"file", "line"} & set(args.keep_columns):
        parser.error("--keep_columns: file and line tell where a row is from; rename these columns")
    written = [path for path in (args.output, args.report) if path]
    for path in written:
        if Path(args.source).exists() and path.resolve().is_relative_to(Path(args.source).resolve()):
            parser.error(f"{path} is part of the dataset itself; choose another file to write to")
        if path.exists():
            parser.error(f"{path} exists, and nothing is ever written over: remove it or choose another file")
    if len({path.resolve() for path in written}) < len(written):
        parser.error(f"--output and --report are the same file, {args.output}")
    return args, RowArguments(**{each.name: getattr(args, each.name) for each in fields(RowArguments)})


def inspect(args: argparse.Namespace, format_args: RowArguments, report: Report) -> None:
    options = {**format_args.options(), "keep_columns": args.keep_columns, "max_length": args.max_length}
    options["prompt_completion"] = args.task == "sft"  # as recipes/sft.py
    tokenizer = None
    if args.tokenizer:
        # These import torch, which takes seconds.
        from recipes.models.source import resolve_model
        from recipes.models.tokenization import load_tokenizer

        source = resolve_model(args.tokenizer, trust_remote_code=args.trust_remote_code == "true")
        tokenizer = load_tokenizer(source)
        if args.task == "prompt":  # other rows are cut in training
            with suppress(UserError):  # a folder with nothing but a tokenizer
                options["positions"] = source.positions
    rows = load_rows(args.source, args.split, args.dataset_config)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    shown = []
    with complete_file(args.output) if args.output else open(os.devnull, "w", encoding="utf-8") as file:
        for row, output in Formatter(args.task, tokenizer=tokenizer, **options)(rows, report, args.num_proc):
            output.pop("group_id", None)
            if "completion" in output:
                output = {"messages": output.pop("prompt") + output.pop("completion"), **output}
            file.write(json.dumps({"file": row.file, "line": row.line, **output}, ensure_ascii=False) + "\n")
            if len(shown) < SHOWN:
                shown.append(f"{row.file}:{row.line}\n{preview(output, tokenizer)}")
    print(visible("\n".join([*shown, str(report)])))


def preview(row: dict, tokenizer) -> str:
    """The row as the model will see it; without a tokenizer, as JSON."""
    if tokenizer is None:
        return json.dumps(row, ensure_ascii=False)
    lines = []
    for name, ids, shared, _ in sequences(row, tokenizer):
        lines.append(f"{name}: {counted(len(ids), 'token')}, {len(ids) - shared} of them in the marked part")
        lines.append(f"{tokenizer.decode(ids[:shared])}⟦{tokenizer.decode(ids[shared:])}⟧")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args, format_args = parse_args(argv)
    report = Report(args.source, args.task)
    try:
        try:
            inspect(args, format_args, report)
        except (UserError, OSError) as error:
            if not report.errors:
                report.errors.append({"file": args.source, "line": None, "column": None, "message": str(error)})
            raise
        finally:
            if args.report:
                report.save(args.report)
    except (UserError, OSError) as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
