"""Columns that change what a row means, whatever its schema is: they are used, or the row is left out by name."""

from collections.abc import Iterable
from typing import Any

from recipes.data.messages import MASKED, MEDIA, NOTHING, items, not_learned, refuse, unused_keys
from recipes.data.rows import RowError, Skip

LABELS = {"label", "kto_tag"}  # of unpaired preferences (TRL, LLaMA-Factory): false is a bad answer
WEIGHTS = MASKED | {"weight", "sample_weight", "train", "loss_mask"}
REFUSED = MEDIA | {"chat_template_kwargs"}
MEANINGFUL = LABELS | WEIGHTS | REFUSED


class ReadRow(dict):
    """A row that knows which of its columns were looked at."""

    def __init__(self, row: dict):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)

    def unread(self) -> set[str]:
        """Columns that nothing looked at, and keys of messages that are not known, such as `messages[].id`."""
        names = self.keys() - self.read
        for column in self.keys() & self.read:
            if keys := unused_keys(super().get(column)):
                names |= {f"{column}[].{key}" for key in keys}
        return names


def check_columns(row: dict, task: str, own: Iterable[str] = ()) -> None:
    """Skips a row that is not to be learned, or that has images or another column that must not be ignored.

    `own` columns are those that the schema reads itself.
    """
    if row.keys().isdisjoint(MEANINGFUL):
        return
    refuse(row, REFUSED.difference(own))
    try:
        unlearned = None if task == "prompt" else not_learned(row, WEIGHTS.difference(own))
        bad = not_learned(row, LABELS.difference(own)) if task == "sft" else None
    except RowError as error:  # a class or a number of another meaning, perhaps
        raise RowError(f"{error.message}; a --dataset_mapping without it ignores it", error.column) from None
    if unlearned:
        raise Skip(f"{unlearned} says that the row is not to be learned", unlearned)
    if bad:
        raise Skip("labelled as a bad completion", bad)


def read_tools(row: dict) -> list | None:
    """The tools that the assistant may call, from `tools` or OpenAI's older `functions`."""
    if row.get("tools") not in NOTHING:
        return items(row, "tools")
    if row.get("functions") not in NOTHING:
        return [{"type": "function", "function": function} for function in items(row, "functions")]
    return None
