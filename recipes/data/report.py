"""Reports: what became of the rows of a dataset, with counts, reasons and places."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.cli.errors import counted, visible
from recipes.data.rows import DataError, Row, join_names

KINDS = {"skipped": "reason", "flags": "flag", "errors": "message"}  # the lists, and the key of the text in each
KEPT = 10_000  # entries of each list, and different texts and columns that are counted; sums are always complete
SHOWN = 5  # errors in the text of a DataError


@dataclass
class Report:
    """What became of the rows of one source. Each entry names file and line; lists end after 10,000 entries.

    `used`, after training: the rows, responses and tokens that a recipe trained ("train") and evaluated on ("eval").
    """

    source: str
    task: str
    schema: str | None = None
    reason: str = ""
    rows_in: int = 0
    rows_out: int = 0
    tokens: int | None = None  # of the rows that came out, where there is a tokenizer
    used: dict[str, dict] = field(default_factory=dict)
    skipped: list[dict] = field(default_factory=list)
    flags: list[dict] = field(default_factory=list)
    errors: list[dict] = field(default_factory=list)
    counts: dict[str, Counter] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})
    unread: Counter = field(default_factory=Counter)  # columns, and keys of messages, that are not used
    fingerprint: str = ""
    lost: bool = False  # whether rows after an error could not be read

    def __deepcopy__(self, memo: dict) -> "Report":
        return self  # `datasets` and Accelerate copy a stream; what its copies read belongs into the same report

    def clear(self) -> None:
        vars(self).update(vars(Report(self.source, self.task)))

    def add(self, kind: str, row: Row, what: str, column: str | None = None) -> None:
        """`kind` is "skipped", "flags" or "errors"."""
        entries = getattr(self, kind)
        counts = self.counts[kind]
        # messages quote values, so there may be many different ones
        counts[what if what in counts or len(counts) < KEPT else "others"] += 1
        if len(entries) < KEPT:
            place = {"file": row.file, "line": row.line, **({} if kind == "flags" else {"column": column})}
            entries.append({**place, KINDS[kind]: what})

    def finish(self) -> None:
        """Counts the errors, which were accepted, as skipped rows; raises DataError if no row is left."""
        self.counts["skipped"].update(self.counts["errors"])
        self.counts["errors"].clear()
        for error in self.errors:
            error["reason"] = error.pop("message")
        self.skipped += self.errors
        self.errors = []
        self.skipped.sort(key=lambda entry: (entry["file"], entry["line"]))
        if self.rows_in == 0:
            raise self.error(f"{self.source}: no rows: the file or split is empty")
        if self.rows_out == 0:
            skipped = self.counts["skipped"].most_common(SHOWN)
            reasons = ", ".join(f"{what} ({count}{self._first('skipped', what)})" for what, count in skipped)
            useless = f"none of {counted(self.rows_in, 'row')} is of use for {self.task!r}"
            raise self.error(f"{self.source}: {useless}: {reasons}")

    def to_dict(self) -> dict[str, Any]:
        keys = ("source", "task", "schema", "reason", "rows_in", "rows_out", "tokens", "used", *KINDS, "fingerprint")
        counts = {f"{kind}_by_reason": dict(counter.most_common(100)) for kind, counter in self.counts.items()}
        return {**{key: getattr(self, key) for key in keys}, **counts, "not_used": dict(self.unread)}

    def save(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")  # a column's name may be no Unicode

    def __str__(self) -> str:
        rows = f"{counted(self.rows_in, 'row')} in, {self.rows_out} out"
        rows += f" ({counted(self.tokens, 'token')})" if self.tokens is not None else ""
        lines = [f"{self.source}: {rows}; task {self.task}, schema {self.schema} ({self.reason})"]
        for kind, verb in (("skipped", "skipped"), ("flags", "flagged")):
            for what, count in self.counts[kind].most_common(10):
                lines.append(f"  {verb} {count}: {what}{self._first(kind, what)}")
        if self.unread:
            names = sorted(self.unread)
            lines.append(f"  not used: {join_names(names[:20])}{', …' if len(names) > 20 else ''}")
        return visible("\n".join(lines))

    def _first(self, kind: str, what: str) -> str:
        entry = next((entry for entry in getattr(self, kind) if entry[KINDS[kind]] == what), None)
        return f", first at {_place(entry)}" if entry else ""

    def error(self, message: str) -> DataError:
        error = DataError(message)
        error.report = self
        return error

    def errors_text(self) -> str:
        total = self.counts["errors"].total()
        lines = [f"{self.source}: {total} of {counted(self.rows_in, 'row')} cannot be used for task {self.task!r}"]
        for entry in self.errors[:SHOWN]:
            lines.append(f"  {_place(entry)}: {entry['message']}")
        if total > SHOWN:
            lines.append(f"  and {total - SHOWN} more")
        return "\n".join(lines)


def _place(entry: dict) -> str:
    column = entry.get("column")
    return f"{entry['file']}:{entry['line']}{':' + column if column else ''}"
