"""Turns the rows of one source into rows for a task, and reports what became of each."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from typing import Any, NamedTuple

from recipes.data.cells import Cells
from recipes.data.columns import MEANINGFUL, check_columns, read_tools, unread_columns
from recipes.data.control_tokens import control_tokens, own_marks, search_pattern
from recipes.data.converters import Dialogue, Ranking
from recipes.data.digests import Digests
from recipes.data.loading import Rows, as_rows
from recipes.data.mapping import ColumnMapping
from recipes.data.messages import REASONING, has_weights, in_context
from recipes.data.parallel import map_in_order
from recipes.data.preview import check_positions, left_out, sequences
from recipes.data.report import KEPT, Report
from recipes.data.rows import DataError, LostRows, Row, RowError, RowProblem, Skip, describe, join_names
from recipes.data.schemas import SCHEMAS, TASKS, Schema, detect
from recipes.data.tasks import features, outputs, row_messages

SAMPLE = 100  # rows that detection looks at
CHOICES = {
    "task": TASKS,
    "on_error": ("raise", "skip"),
    "on_special": ("flag", "drop", "fail"),
    "dedup": ("flag", "drop"),
}
# What TRL's trainers read from a row of prompts, or hand to reward functions themselves.
RESERVED = (
    "prompt", "prompts", "completion", "completions", "completion_ids", "image", "images", "tools",
    "chat_template_kwargs", "trainer_state", "log_extra", "log_metric", "environments",
)  # fmt: skip
# Flags of rows that are not used whole.
CUT = "the answer at the end of the prompt was left out"
UNTRAINED = "answers with weight 0 are not trained"
# As gpt-oss, which leaves out the reasoning before a tool's result once an answer follows.
REWRITTEN = "the chat template renders the prompt otherwise before an answer, so that some of it is trained"


class Kept(NamedTuple):
    """An output row that is of use, unless it is a duplicate of an earlier one."""

    output: dict
    digest: bytes
    flags: list[str]
    tokens: int


@dataclass
class Formatter:
    """Turns rows into the output rows of a task and fills in a report.

    `recipes.formatting.RowArguments` says what schema, mapping, on_error, max_error_rate, on_special and dedup are.
    """

    task: str  # one of `TASKS`; `recipes.data.tasks` lists their columns
    schema: str = "auto"
    mapping: Mapping[str, str] | None = None
    on_error: str = "raise"
    max_error_rate: float = 0.01
    on_special: str = "flag"
    special_tokens: Iterable[str] = ()  # to look for, beside those of the tokenizer and of common chat templates
    dedup: str = "flag"
    margin: bool = False  # adds the column `margin`, which TRL's RewardTrainer subtracts in its loss
    prompt_completion: bool = False  # for sft, `prompt` and `completion`, the last turn, instead of `messages`
    assistant_only_loss: bool = False  # `completion` begins with the first answer that is trained
    tokenizer: Any = None  # renders every row; what its chat template refuses is an error of the row
    max_length: int | None = None  # rows of more tokens are reported
    # The length in tokens that training cuts rows to. Longer rows are reported; sft rows with nothing to train before
    # it, responses of a ranking that are longer, and rankings without a pair then are left out.
    cut_at: int | None = None
    positions: int | None = None  # tokens that the model has room for; rows that need more are errors
    completion_length: int = 0  # tokens that a prompt needs beside its own
    fail_fast: bool = False  # raise at the first error instead of after all rows
    keep_columns: Iterable[str] = ()  # for prompts, columns of the source that stay, for PPO's reward functions

    def __post_init__(self):
        for name, options in {**CHOICES, "schema": ("auto", *SCHEMAS)}.items():
            if getattr(self, name) not in options:
                raise DataError(f"unknown {name} {getattr(self, name)!r}; expected one of {join_names(options)}")
        if self.schema != "auto" and self.task not in SCHEMAS[self.schema].tasks:
            serves = join_names(SCHEMAS[self.schema].tasks)
            raise DataError(f"schema {self.schema!r} serves {serves}, not task {self.task!r}")
        if not 0 <= self.max_error_rate <= 1:
            raise DataError(f"max_error_rate {self.max_error_rate} is a share of the rows: expected 0 to 1")
        if self.keep_columns and self.task != "prompt":
            raise DataError(f"keep_columns is for prompts and their reward functions, not for task {self.task!r}")
        for name in self.keep_columns or ():
            if name in RESERVED:
                raise DataError(f"keep_columns: {name!r} has a meaning of its own for TRL; rename that column")
        self._mapping = ColumnMapping(self.mapping, keep_others=self.schema != "auto")
        # There transformers cannot tell a template's control tokens from those that stand in a message.
        if self.assistant_only_loss and self.on_special == "flag":
            self.on_special = "drop"
        own = () if self.tokenizer is None else control_tokens(self.tokenizer)
        self._control_tokens = search_pattern([*self.special_tokens, *own])
        self._left_out = {} if self.tokenizer is None else left_out(self.tokenizer)

    def __call__(self, rows: Rows | Iterable[dict], report: Report, num_proc: int = 1) -> Iterator[tuple[Row, dict]]:
        """Yields each output row together with the row of the source that it comes from, without its data.

        Raises:
            DataError: no schema fits; or, at the end, rows that cannot be used, or no usable row at all.
        """
        report.clear()  # each epoch of a stream reads all rows again
        rows = as_rows(rows)
        report.schema, report.reason = self._choose_schema(rows, report)
        schema = SCHEMAS.get(report.schema)
        source: Iterable[Row] = self._source(rows, report)
        if schema and schema.gather:
            source = schema.gather((row.map(self._mapping.apply) for row in source), self.task)
        seen, fingerprint = Digests(), hashlib.sha256()
        for row, results, unread in map_in_order(partial(self._format, schema), source, num_proc):
            report.unread.update(unread if len(report.unread) < KEPT else report.unread.keys() & unread)
            for result in results:
                if isinstance(result, RowProblem):
                    kind = "skipped" if isinstance(result, Skip) else "errors"
                    report.add(kind, row, result.message, self._mapping.source_column(result.column))
                    report.lost = report.lost or isinstance(result, LostRows)
                    if self.fail_fast:
                        self._check_errors(report)
                    continue
                duplicate = seen.add(result.digest)
                if duplicate and self.dedup == "drop":
                    report.add("skipped", row, "duplicate")
                    continue
                for flag in (*result.flags, "duplicate") if duplicate else result.flags:
                    report.add("flags", row, flag)
                fingerprint.update(result.digest)
                report.rows_out += 1
                if self.tokenizer is not None:
                    report.tokens = (report.tokens or 0) + result.tokens
                yield row, result.output
        report.fingerprint = fingerprint.hexdigest()[:16]
        self._check_errors(report)
        report.finish()

    def _source(self, rows: Rows, report: Report) -> Iterator[Row]:
        for row in rows:
            report.rows_in += 1
            yield row

    def features(self):
        """The `datasets.Features` of the output rows."""
        return features(self.task, self.prompt_completion, self.margin, self.keep_columns)

    def _check_errors(self, report: Report) -> None:
        errors = report.counts["errors"].total()
        advice = None
        if report.lost:
            advice = "mend the file: rows after the break cannot be skipped one by one"
        elif errors and self.on_error == "raise":
            advice = "fix them, or leave bad rows out with --on_error skip"
        elif errors > max(1, self.max_error_rate * max(report.rows_in, 1000 if self.fail_fast else 0)):
            advice = f"more than --max_error_rate {self.max_error_rate} allows to skip"
        if advice:
            raise report.error(f"{report.errors_text()}\n{advice}")

    def _format(self, schema: Schema | None, row: Row) -> tuple[Row, list[Kept | RowProblem], Iterable[str]]:
        """The place of a row, what became of it, and the columns that were not used."""
        results: list[Kept | RowProblem] = []
        unread: Iterable[str] = ()
        try:
            data = row.read()
            gathered = schema is not None and schema.gather is not None  # such rows are mapped already
            columns = Cells(data if gathered else self._mapping.apply(data))
            kept = self._kept_columns(data)
            example = self._example(schema, columns)
            # Of gathered rows, and of those whose responses are of no use, not all columns were looked at.
            whole = not gathered and (isinstance(example, Dialogue) or bool(example.responses))
            if whole and (idle := self._mapping.columns.keys() - columns.seen - MEANINGFUL):
                name = min(idle)
                raise RowError(f"mapped as {name}, which the schema has no use for", name)
            messages = example.messages if isinstance(example, Dialogue) else []
            masked = self.task == "sft" and has_weights(messages)
            for output in outputs(example, self.task, self.prompt_completion, self.margin, self.assistant_only_loss):
                if isinstance(output, Skip):
                    results.append(output)
                    continue
                cut = schema is SCHEMAS["prompt"] and len(output["prompt"]) < len(messages)
                results += self._checked(output | kept, [CUT] * cut + [UNTRAINED] * masked)
            if whole:
                unread = (unread_columns(columns) | self._mapping.unmapped(data)) - kept.keys()
        except RowProblem as problem:
            results.append(problem)
        return row._replace(data=None), results, unread

    def _example(self, schema: Schema, row: Cells) -> Dialogue | Ranking:
        check_columns(row, self.task, schema.columns)
        example = schema.convert(row, self._mapping.roles)
        if isinstance(example, Ranking):
            example.prompt = in_context(row, example.prompt, schema.columns)
        else:
            before = len(example.messages)
            example.messages = in_context(row, example.messages, schema.columns)
            example.context += len(example.messages) - before if example.context else 0
        example.tools = read_tools(row)
        return example

    def _kept_columns(self, data: dict) -> dict:
        for name in self.keep_columns:
            if name not in data:
                raise RowError(f"missing, and --keep_columns asks for it; this row has {join_names(data)}", name)
            try:
                json.dumps(data[name], allow_nan=False)
            except (TypeError, ValueError):
                raise RowError(f"found {describe(data[name])}, which is not JSON and cannot be kept", name) from None
        return {name: data[name] for name in self.keep_columns}

    def _checked(self, output: dict, notes: list[str]) -> list[Kept | Skip]:
        special = self._special_token(output)
        if special and self.on_special == "fail":
            raise RowError(f"found {special}; remove it, or pass --on_special flag or drop")
        if special and self.on_special == "drop":
            why = ", which --assistant_only_loss true takes for the end of a turn" if self.assistant_only_loss else ""
            return [Skip(special + why)]
        flags = [special] if special else []
        skips, tokens = self._measure(output, flags) if self.tokenizer is not None else ([], 0)
        flags += notes
        if any(len(response) > 1 for response in (output.get("chosen", ()), *output.get("completions", ()))):
            flags.append("the responses diverge before the last turn")
        digest = hashlib.blake2b(json.dumps(output).encode(), digest_size=8).digest()
        return [*skips, Kept(output, digest, flags, tokens)]

    def _measure(self, output: dict, flags: list[str]) -> tuple[list[Skip], int]:
        """What is left out of a row because it is too long, and the tokens of the rest; may shorten a ranking.

        Raises:
            RowError: the chat template refuses the row, or the model has no room for it.
            Skip: nothing of it can be trained.
        """
        self._check_left_out(output, flags)
        found = list(sequences(output, self.tokenizer))
        first, longest, cut_at = found[0], max(len(sequence.ids) for sequence in found), self.cut_at
        if self.task == "sft" and first.shared == len(first.ids):
            raise RowError("the chat template leaves nothing of the answer")
        if "completion" in output and first.rewritten and not self.assistant_only_loss:
            flags.append(REWRITTEN)
        if len(found) > 1 and all(sequence.ids == first.ids for sequence in found):
            raise Skip("the chat template makes all responses equal")
        skips: list[Skip] = []
        if self.max_length is not None and longest > self.max_length:
            flags.append(f"longer than {self.max_length} tokens")
        if cut_at is not None and longest > cut_at:
            if self.task == "ranking":
                fits = [len(sequence.ids) <= cut_at for sequence in found]
                found = list(compress(found, fits))
                output["completions"] = list(compress(output["completions"], fits))
                output["ranks"] = list(compress(output["ranks"], fits))
                skips = [Skip(f"a response is longer than max_length={cut_at} tokens")] * fits.count(False)
                if len(set(output["ranks"])) < 2:
                    raise Skip(f"fewer than two responses of unequal rank within max_length={cut_at} tokens")
            elif "completion" in output and first.shared >= cut_at:
                raise Skip(f"nothing to train: the prompt fills max_length={cut_at} tokens")
            else:
                flags.append(f"cut at max_length={cut_at} tokens")
        limit = cut_at or self.max_length or longest
        lengths = [min(len(sequence.ids), limit) for sequence in found]
        check_positions(max(lengths), self.positions, self.completion_length)
        return skips, sum(lengths)

    def _check_left_out(self, output: dict, flags: list[str]) -> None:
        """Check that the chat template renders all of a row; reasoning that it leaves out is a flag."""
        if not self._left_out:
            return
        turns = list(row_messages(output))
        used = {*output, *(turn["role"] for turn in turns), *(key for turn in turns for key in turn)}
        used |= {"reasoning_content"} if used & {*REASONING} else set()
        used |= {"second"} if any(len(turn.get("tool_calls", ())) > 1 for turn in turns) else set()
        used |= {"said"} if any("tool_calls" in turn and turn["content"].strip() for turn in turns) else set()
        used |= {"</think>"} if any("</think>" in turn["content"] for turn in turns) else set()
        for part in self._left_out.keys() & used:
            what = f"the chat template leaves out {self._left_out[part]}"
            if self._left_out[part] != "reasoning":
                raise RowError(f"{what}, and this row has some: train with a template that renders them")
            flags.append(what)

    def _special_token(self, output: dict) -> str | None:
        found = None
        for turn in row_messages(output):
            text = turn["content"] if len(turn) == 2 else json.dumps(turn, ensure_ascii=False)
            if "<image>" in text:
                raise Skip("<image> stands for an image, which cannot be used")
            foreign = (match[0] for match in self._control_tokens.finditer(text) if match[0] not in own_marks(turn))
            if found is None and (token := next(foreign, None)):
                found = f"special token {token!r} in the {turn['role']} turn"
        return found

    def _choose_schema(self, rows: Rows, report: Report) -> tuple[str | None, str]:
        if self.schema != "auto":
            return self.schema, "named by the user"
        pairs = ((row.data, row.map(self._mapping.apply).data) for row in rows)
        sample = list(islice((pair for pair in pairs if not isinstance(pair[1], RowProblem)), SAMPLE))
        if not sample:  # the errors of the rows will say why
            return None, "no readable row"
        unmapped, mapped = map(list, zip(*sample, strict=True))
        columns = {column for row in mapped for column in row}
        try:
            return detect(columns, mapped, self.task, self._mapping.roles, unmapped)
        except DataError as error:
            report.add("errors", next(iter(rows)), str(error))
            raise report.error(f"{rows.source}: {error}") from None
