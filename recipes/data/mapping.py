"""Mappings: which column of a source is which column of a schema, and which role names it uses."""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from recipes.data.cells import NOTHING, decode_json
from recipes.data.columns import MEANINGFUL
from recipes.data.messages import CONTEXT, ROLES, is_turns
from recipes.data.rows import DECODER, DataError, RowError, describe, join_names


def parse_mapping(items: list[str] | str | Mapping | None) -> dict[str, Any] | None:
    """A mapping as it comes from the command line (key=value items or a JSON object) or from YAML."""
    if not items:
        return None
    if isinstance(items, Mapping):
        return dict(items)
    joined = items if isinstance(items, str) else " ".join(items)
    if joined.lstrip().startswith("{"):
        try:
            return parse_mapping(DECODER.decode(joined))
        except (json.JSONDecodeError, RowError) as error:
            raise DataError(f"--dataset_mapping is not valid JSON: {error}") from None
    for item in joined.split():
        if not re.fullmatch(r"[^=]+=[^=]+", item):
            raise DataError(f"--dataset_mapping: {item!r} is not KEY=COLUMN, e.g. prompt=question.text")
    result: dict[str, Any] = {}
    for item in joined.split():
        name, column = item.split("=")
        if name in result:
            raise DataError(f"--dataset_mapping: {name} is given twice, as {result[name]} and {column}")
        result[name] = column
    return result


class ColumnMapping:
    """Renames columns: from those of a source, where dots reach into objects, to those of a schema.

    `roles.NAME` adds a role. Without `keep_others`, columns that are not mapped are left out.
    """

    def __init__(self, mapping: Mapping[str, Any] | None, keep_others: bool):
        self.columns, self.roles, self.keep_others = {}, dict(ROLES), keep_others
        for name, target in (mapping or {}).items():
            if not isinstance(target, str) or not target:
                raise DataError(f"mapping {name}: found {describe(target)}, expected the name of a column")
            if not name.startswith("roles."):
                self.columns[name] = target
            elif target in ROLES.values():
                self.roles[name.removeprefix("roles.").lower()] = target
            else:
                raise DataError(f"mapping {name}={target}: expected {join_names(sorted(set(ROLES.values())))}")

    def apply(self, row: dict) -> dict:
        """The row with the column names of the schema; raises RowError if one is missing."""
        if not self.columns:
            return row
        result = dict(row) if self.keep_others else {}
        for target, path in self.columns.items():
            value: Any = row
            for part in [path] if path in row else path.split("."):
                if value is not row:
                    value = decode_json(value, target, "an object")  # text in CSV
                if not isinstance(value, dict) or part not in value:
                    raise RowError(f"missing; this row has {join_names(row)}", target)
                value = value[part]
            result[target] = value
        return result

    def unmapped(self, row: dict) -> set[str]:
        """The columns of a row that `apply` leaves out, and of an object that it reaches into the other keys."""
        if not self.columns or self.keep_others:
            return set()
        paths = {*self.columns.values()}
        objects = {path.split(".")[0] for path in paths if path not in row}
        inner = {f"{name}.{key}" for name in objects if isinstance(row.get(name), dict) for key in row[name]}
        used = {part for path in paths for part in (path, ".".join(path.split(".")[:2]))}
        return (row.keys() - objects | inner) - used

    def source_column(self, column: str | None) -> str | None:
        """The name in the source of a column, or of a place in it such as `answers[0].rank`."""
        name, rest = re.fullmatch(r"([^.\[]*)(.*)", column or "", re.DOTALL).groups()
        return self.columns[name] + rest if name in self.columns else column


PARTS = {"sft": ("prompt", "completion"), "prompt": ("prompt",)}  # for other tasks a pair
WORDS = {  # parts of the names that people give to columns
    "prompt": ("prompt", "question", "query", "instruction", "request", "ask", "problem", "user", "input", "context"),
    "completion": ("completion", "answer", "response", "output", "reply", "solution", "target", "assistant"),
    # first, since "non_preferred" holds "preferred"
    "rejected": ("reject", "dispref", "unpref", "nonpref", "non_pref", "worst", "worse", "bad", "negative", "los"),
    "chosen": ("chosen", "preferred", "best", "better", "good", "accept", "positive", "win"),
}


def suggest_mapping(rows: list[dict], task: str) -> str:
    """The whole option for columns of other names: a guess by their names, to be checked.

    Which response is better is never guessed by the order of columns, and a rejected one is no demonstration.
    """
    cells: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            inner = value if isinstance(value, dict) else {}
            cells |= {f"{name}.{key}": inner[key] for key in inner if inner[key]} or {name: value}
    usable = [name for name in cells if task != "sft" or "reject" not in name.lower()]
    turns = [name for name in usable if is_turns(cells[name])]
    left = [name for name in usable if isinstance(cells[name], str) and not re.search(r"\bid$|_id$", name)] + turns
    if task == "sft" and turns:
        guess = {"messages": turns[0]}
    else:
        parts = PARTS.get(task, ("prompt", "chosen", "rejected"))
        guess = {}
        for part in sorted(parts, key=list(WORDS).index):
            named = (name for word in WORDS[part] for name in left if word in name.rsplit(".", 1)[-1].lower())
            guess[part] = next(named, "")
            left = [name for name in left if name != guess[part]]
        for part in parts:
            guess[part] = guess.pop(part) or (left.pop(0) if left and part in PARTS["sft"] else "COLUMN")
    meaningful = {*MEANINGFUL, *CONTEXT, *(("tools", "functions") if task == "sft" else ())}
    known = [name for name in cells if name in meaningful and cells[name] not in NOTHING]
    guess |= {name: name for name in known if name not in guess.values()}  # what would otherwise be ignored
    if any(re.search(r"[=\s]", name) for name in guess.values()):
        return f"--dataset_mapping {shlex.quote(json.dumps(guess, ensure_ascii=False))}"
    return "--dataset_mapping " + " ".join(shlex.quote(f"{part}={name}") for part, name in guess.items())
