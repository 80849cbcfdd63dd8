"""The engine: rows of one source go in, rows for a task come out, and a report tells what became of each."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from recipes.formats.loading import DataError, LostRows, Row, RowError, Rows, check_row
from recipes.formats.messages import ROLES, Skip, describe, listed
from recipes.formats.preview import render
from recipes.formats.report import Report
from recipes.formats.tasks import outputs, row_messages
from recipes.schemas import SCHEMAS, TASKS, detect

SAMPLE = 100  # rows that detection looks at
TEMPLATE_MARKS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>", "<bos>", "<eos>",
)  # fmt: skip
CHOICES = {
    "task": TASKS,
    "on_error": ("raise", "skip"),
    "on_special": ("flag", "drop", "fail"),
    "dedup": ("flag", "drop"),
}


@dataclass
class Formatter:
    """Turns rows into the output rows of a task and fills in a report.

    Args:
        task: "sft", "preference", "ranking" or "prompt"; `recipes.formats.tasks` says what each gives.
        schema: a name in `recipes.schemas.SCHEMAS`, or "auto" to detect it from columns and values.
        mapping: for each column of the schema, `system` and `history`, the column of the source (dots reach into
            objects); and `roles.NAME` for further roles. With "auto", columns that are not mapped do not exist.
        on_error: "raise" stops after all rows are read; "skip" leaves bad rows out, up to `max_error_rate` of the
            rows and at least one.
        margin: adds the column `margin`, which TRL's RewardTrainer subtracts in its loss.
        on_special: rows with the text of a control token are kept and reported ("flag"), left out ("drop") or errors
            ("fail").
        special_tokens: texts to look for beside the marks of common chat templates.
        dedup: repeated rows are kept and reported ("flag") or left out ("drop").
        prompt_completion: for sft, `prompt` and `completion` instead of `messages`, to train on the last turn only.
        tokenizer, max_length: report rows that render to more than `max_length` tokens.
        fail_fast: raise at the first error instead of after all rows.
    Raises:
        DataError: an option that does not exist.
    """

    task: str
    schema: str = "auto"
    mapping: Mapping[str, str] | None = None
    on_error: str = "raise"
    margin: bool = False
    on_special: str = "flag"
    special_tokens: Iterable[str] = ()
    dedup: str = "flag"
    prompt_completion: bool = False
    max_error_rate: float = 0.01
    tokenizer: Any = None
    max_length: int | None = None
    fail_fast: bool = False

    def __post_init__(self):
        for name, options in {**CHOICES, "schema": ("auto", *SCHEMAS)}.items():
            if getattr(self, name) not in options:
                raise DataError(f"unknown {name} {getattr(self, name)!r}; expected one of {listed(options)}")
        if self.schema != "auto" and self.task not in SCHEMAS[self.schema].tasks:
            serves = listed(SCHEMAS[self.schema].tasks)
            raise DataError(f"schema {self.schema!r} serves {serves}, not task {self.task!r}")
        self._columns, self._roles = {}, dict(ROLES)
        for name, target in _flat(self.mapping or {}).items():
            if not isinstance(target, str) or not target:
                raise DataError(f"mapping {name}: found {describe(target)}, expected the name of a column")
            if not name.startswith("roles."):
                self._columns[name] = target
            elif target in ROLES.values():
                self._roles[name.removeprefix("roles.").lower()] = target
            else:
                raise DataError(f"mapping {name}={target}: expected {listed(sorted(set(ROLES.values())))}")
        marks = sorted({*TEMPLATE_MARKS, *self.special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, marks)))

    def __call__(self, rows: Rows | Iterable[dict], report: Report) -> Iterator[tuple[Row, dict]]:
        """Yields each output row with the row it is from.

        Raises:
            DataError: no schema fits; or, at the end, rows that cannot be used, or no usable row at all.
        """
        rows = as_rows(rows)
        report.schema, report.reason = self._choose_schema(rows, report)
        schema = SCHEMAS.get(report.schema)
        source = self._read(rows, report)
        seen, lost = _Digests(), False
        fingerprint = hashlib.sha256()
        for row in schema.gather(source, self.task) if schema and schema.gather else source:
            try:
                if isinstance(row.data, RowError | Skip):
                    raise row.data
                example = schema.convert(row.data, self._roles)
                for output in outputs(example, self.task, self.prompt_completion, self.margin):
                    digest = self._accept(output, row, seen, report)
                    if digest:
                        fingerprint.update(digest)
                        report.rows_out += 1
                        if report.schema == "prompt" and len(output["prompt"]) < len(example.messages):
                            report.add("flags", row, "the answer at the end of the prompt was left out")
                        yield row, output
            except Skip as skip:
                report.add("skipped", row, skip.reason, self._source_column(skip.column))
            except RowError as error:
                report.add("errors", row, error.message, self._source_column(error.column))
                lost = lost or isinstance(error, LostRows)
                if self.fail_fast:
                    self._check_errors(report, lost)
        report.fingerprint = fingerprint.hexdigest()[:16]
        self._check_errors(report, lost)
        report.finish()

    def _read(self, rows: Rows, report: Report) -> Iterator[Row]:
        for row in rows:
            report.rows_in += 1
            if self._columns and isinstance(row.data, dict):
                try:
                    row = row._replace(data=self._mapped(row.data))
                except RowError as error:
                    row = row._replace(data=error)
            yield row

    def _accept(self, output: dict | Skip, row: Row, seen: "_Digests", report: Report) -> bytes | None:
        """The digest of an output row, or None if it is left out; what is said against it goes into the report."""
        try:
            if isinstance(output, Skip):
                raise output
            special = self._special_token(output)
            if special and self.on_special == "fail":
                raise RowError(f"found {special}; remove it, or pass --on_special flag or drop")
            if special and self.on_special == "drop":
                raise Skip(special)
            digest = hashlib.blake2b(json.dumps(output).encode(), digest_size=8).digest()
            duplicate = seen.add(digest)
            if duplicate and self.dedup == "drop":
                raise Skip("duplicate")
        except Skip as skip:
            report.add("skipped", row, skip.reason, self._source_column(skip.column))
            return None
        flags = [special, "duplicate" if duplicate else None, self._too_long(output)]
        if any(len(said) > 1 for said in (output.get("chosen", ()), *output.get("completions", ()))):
            flags.append("the responses diverge before the last turn")
        for flag in filter(None, flags):
            report.add("flags", row, flag)
        return digest

    def _special_token(self, output: dict) -> str | None:
        for turn in row_messages(output):
            found = self._special.search(turn["content"] if len(turn) == 2 else json.dumps(turn, ensure_ascii=False))
            if found:
                return f"special token {found[0]!r} in the {turn['role']} turn"
        return None

    def _too_long(self, output: dict) -> str | None:
        if self.tokenizer is None or self.max_length is None:
            return None
        longest = max(rendered.tokens for rendered in render(output, self.tokenizer))
        return f"longer than {self.max_length} tokens" if longest > self.max_length else None

    def _choose_schema(self, rows: Rows, report: Report) -> tuple[str | None, str]:
        if self.schema != "auto":
            return self.schema, "as asked"
        sample = list(islice((row.data for row in rows if isinstance(row.data, dict)), SAMPLE))
        if not sample:  # nothing readable: the errors of the rows will tell
            return None, "no readable row"
        if self._columns:
            sample = [self._mapped(data, lenient=True) for data in sample]
        try:
            return detect({column for data in sample for column in data}, sample, self.task)
        except DataError as error:
            report.add("errors", next(iter(rows)), str(error))
            raise report.error(f"{rows.source}: {error}") from None

    def _mapped(self, data: dict, lenient: bool = False) -> dict:
        """The row as it would look if its columns had the names that a schema wants."""
        result = {} if self.schema == "auto" else dict(data)
        for target, path in self._columns.items():
            value: Any = data
            for part in [path] if path in data else path.split("."):
                if not isinstance(value, dict) or part not in value:
                    if lenient:
                        break
                    raise RowError(f"missing; this row has {', '.join(map(str, data))}", target)
                value = value[part]
            else:
                result[target] = value
        return result

    def _source_column(self, column: str | None) -> str | None:
        """The name that a column has in the source."""
        name, rest = re.fullmatch(r"([^.\[]*)(.*)", column).groups() if column else ("", "")
        return self._columns[name] + rest if name in self._columns else column

    def _check_errors(self, report: Report, lost: bool) -> None:
        errors = report.counts["errors"].total()
        if lost:
            raise report.error(
                f"{report.errors_text()}\nmend the file: rows after the break cannot be skipped one by one"
            )
        if errors and self.on_error == "raise":
            raise report.error(f"{report.errors_text()}\nfix them, or leave bad rows out with --on_error skip")
        rows = max(report.rows_in, 1000) if self.fail_fast else report.rows_in
        if errors > max(1, self.max_error_rate * rows):
            too_many = f"more than --max_error_rate {self.max_error_rate} allows to skip"
            raise report.error(f"{report.errors_text()}\n{too_many}")


def _flat(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with `roles: {NAME: user}` written as `roles.NAME: user`."""
    roles = mapping.get("roles")
    if not isinstance(roles, Mapping):
        return dict(mapping)
    return {name: mapping[name] for name in mapping if name != "roles"} | {
        f"roles.{each}": roles[each] for each in roles
    }


class _Digests:
    """A set of 8-byte digests that takes 16 to 32 bytes for each; a Python set takes over a hundred."""

    def __init__(self):
        self.count, self.table = 0, array("Q", bytes(8 * 2**10))

    def add(self, digest: bytes) -> bool:
        """Whether the digest was there before."""
        key = int.from_bytes(digest) or 1
        known = self._put(key)
        if 2 * self.count > len(self.table):
            keys, self.count, self.table = self.table, 0, array("Q", bytes(16 * len(self.table)))
            for other in filter(None, keys):
                self._put(other)
        return known

    def _put(self, key: int) -> bool:
        table, mask = self.table, len(self.table) - 1
        place = key & mask
        while table[place]:
            if table[place] == key:
                return True
            place = (place + 1) & mask
        table[place] = key
        self.count += 1
        return False


def as_rows(rows: Rows | Iterable[dict]) -> Rows:
    """Rows of a dataset or of a list in memory, numbered from 1 and of the file "rows"."""
    if isinstance(rows, Rows):
        return rows
    held = rows if hasattr(rows, "features") else [_checked(data) for data in rows]
    return Rows("rows", partial(_held, held))


def _held(rows: Iterable[dict | RowError]) -> Iterator[Row]:
    return (Row("rows", number, data) for number, data in enumerate(rows, 1))


def _checked(data: Any) -> dict | RowError:
    try:
        return check_row(data)
    except RowError as error:
        return error
