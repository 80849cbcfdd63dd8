"""Columns that change what a row means, whatever its schema is: they are used, or the row is left out by name."""

from collections.abc import Iterable

from recipes.data.cells import NOTHING, Cells
from recipes.data.messages import MASKED, MEDIA, not_learned, refuse, unused_keys
from recipes.data.rows import RowError, Skip

LABELS = {"label", "kto_tag"}  # of unpaired preferences (TRL, LLaMA-Factory): false is a bad answer
WEIGHTS = MASKED | {"weight", "sample_weight", "train", "loss_mask"}
REFUSED = MEDIA | {"chat_template_kwargs"}
MEANINGFUL = LABELS | WEIGHTS | REFUSED


def unread_columns(row: Cells) -> set[str]:
    """Columns that nothing looked at, and keys of messages that are not known, such as `messages[].id`."""
    keys = {f"{column}[].{key}" for column in row.seen & row.keys() for key in unused_keys(row[column])}
    return (row.keys() - row.seen) | keys


def check_columns(row: Cells, task: str, own: Iterable[str] = ()) -> None:
    """Skips a row that is not to be learned, or that has images or another column that must not be ignored.

    `own` columns are those that the schema reads itself.
    """
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


def read_tools(row: Cells) -> list | None:
    """The tools that the assistant may call, from `tools` or OpenAI's older `functions`."""
    if row.get("tools") not in NOTHING:
        return list(row.objects("tools"))
    if row.get("functions") not in NOTHING:
        return [{"type": "function", "function": function} for function in row.objects("functions")]
    return None
