"""Shows what a dataset becomes before any model is loaded: the rows that TRL would train on, and what was left out.

    python scripts/inspect_dataset.py rankings.jsonl --task preference --output rows.jsonl --report report.json

Exits with 0, or with 1 and the errors; the report is written either way.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from recipes.data_report import Report
from recipes.errors import UserError
from recipes.formatting import Formatter, FormattingArguments, load_rows

SHOWN = 3


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    defaults = FormattingArguments()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="file (.jsonl, .json, .csv, .parquet), folder or Hub name")
    parser.add_argument("--task", required=True, choices=("sft", "preference", "prompt"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--dataset_config", help="configuration of a Hub dataset")
    parser.add_argument("--dataset_schema", default=defaults.dataset_schema)
    parser.add_argument("--dataset_mapping", nargs="+", metavar="KEY=COLUMN")
    parser.add_argument("--on_error", default=defaults.on_error, choices=("raise", "skip"))
    parser.add_argument("--max_error_rate", type=float, default=defaults.max_error_rate)
    parser.add_argument("--on_special", default=defaults.on_special, choices=("flag", "drop", "fail"))
    parser.add_argument("--dedup", default=defaults.dedup, choices=("flag", "drop"))
    parser.add_argument("--output", type=Path, help="write the formatted rows here, as JSON Lines")
    parser.add_argument("--report", type=Path, help="write the report here, as JSON")
    return parser.parse_args(argv)


def formatted_lines(args: argparse.Namespace, report: Report) -> Iterator[dict]:
    format_args = FormattingArguments(
        dataset_schema=args.dataset_schema,
        dataset_mapping=args.dataset_mapping,
        on_error=args.on_error,
        max_error_rate=args.max_error_rate,
        on_special=args.on_special,
        dedup=args.dedup,
    )
    rows = load_rows(args.source, args.split, args.dataset_config)
    for row, output in Formatter(args.task, **format_args.options())(rows, report):
        output.pop("group_id", None)
        yield {"file": row.file, "line": row.line, **output}


def write(args: argparse.Namespace, report: Report) -> list[str]:
    """Writes `--output`, which appears only once it is complete, and returns its first lines."""
    first = []
    folder = args.output.parent if args.output else None
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, delete=False) as file:
        try:
            for output in formatted_lines(args, report):
                line = json.dumps(output, ensure_ascii=False)
                first += [line] if len(first) < SHOWN else []
                if args.output:
                    file.write(line + "\n")
            if args.output:
                file.close()
                os.replace(file.name, args.output)
        finally:
            Path(file.name).unlink(missing_ok=True)
    return first


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for path in filter(None, (args.output, args.report)):
        if path.resolve() == Path(args.source).resolve() or not path.parent.is_dir():
            print(f"error: {path}: this is the dataset itself, or its folder is missing", file=sys.stderr)
            return 1
    report, failed = Report(args.source, args.task), False
    try:
        print(*write(args, report), report, sep="\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if not report.errors:
            report.errors.append({"file": args.source, "line": None, "column": None, "message": str(error)})
        failed = True
    if args.report:
        report.save(args.report)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
