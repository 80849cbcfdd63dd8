"""Joins flat message tables (OpenAssistant's OASST1 and OASST2) into conversations and rankings."""

from collections.abc import Iterable, Iterator
from math import inf

from recipes.data.messages import flag, number
from recipes.data.rows import Row, RowError, Skip, describe


def conversation_trees(rows: Iterable[Row], task: str) -> Iterator[Row]:
    """Rows of the schemas "messages" and "ranking" out of rows with message_id, parent_id, role, text and rank.

    sft: one conversation per tree, which follows the best ranked reply (rank 0) at each step and ends with an
    assistant. prompt: the first message of each tree. preference and ranking: the ranked replies to each message of a
    user. Messages that are deleted or failed review are left out with all replies to them. The whole table is held in
    memory. A result carries the line of its first message or, for rankings, of the message that was replied to.
    """
    roots: list[Row] = []
    replies: dict[str, list[Row]] = {}
    for row in rows:
        problem = row.data if isinstance(row.data, RowError) else _problem(row.data)
        if problem:
            yield row._replace(data=problem)
        elif row.data["parent_id"]:
            replies.setdefault(row.data["parent_id"], []).append(row)
        else:
            roots.append(row)
    for root in roots:
        if task in ("preference", "ranking"):
            found = list(_rankings(root, replies))
            yield from found or [root._replace(data=Skip("no message with two ranked replies"))]
        else:
            path = [root] if task == "prompt" else _best_path(root, replies)
            yield root._replace(data={**root.data, "messages": [_turn(row) for row in path]})
    reached = {row.line for root in roots for path in _paths(root, replies) for row in path[-1:]}
    lost = (row for following in replies.values() for row in following if row.line not in reached)
    yield from (row._replace(data=Skip("a reply to a message that is not there", "parent_id")) for row in lost)


def _problem(data: dict) -> RowError | Skip | None:
    for column in ("message_id", "parent_id", "role", "text"):
        if column not in data:
            return RowError("missing; OASST rows have message_id, parent_id, role and text", column)
        if not isinstance(data[column], str) and not (column == "parent_id" and data[column] is None):
            return RowError(f"found {describe(data[column])}, expected text", column)
    try:
        _rank(data)
        if flag(data, "deleted"):
            return Skip("deleted", "deleted")
        return Skip("failed review", "review_result") if flag(data, "review_result") is False else None
    except RowError as error:
        return error


def _turn(row: Row) -> dict:
    return {"role": row.data["role"], "content": row.data["text"]}


def _best_path(root: Row, replies: dict[str, list[Row]]) -> list[Row]:
    path = [root]
    while following := replies.get(path[-1].data["message_id"]):
        path.append(min(following, key=lambda row: inf if _rank(row.data) is None else _rank(row.data)))
    while len(path) > 1 and path[-1].data["role"] == "prompter":
        path.pop()
    return path


def _rank(data: dict) -> float | None:
    return None if data.get("rank") in (None, "") else number(data, "rank")


def _paths(root: Row, replies: dict[str, list[Row]]) -> Iterator[list[Row]]:
    """The path from the root to each message of its tree."""
    ahead = [[root]]
    while ahead:
        path = ahead.pop(0)
        yield path
        ahead += [[*path, row] for row in replies.get(path[-1].data["message_id"], [])]


def _rankings(root: Row, replies: dict[str, list[Row]]) -> Iterator[Row]:
    for path in _paths(root, replies):
        following = replies.get(path[-1].data["message_id"], [])
        ranked = [row for row in following if _rank(row.data) is not None]
        if path[-1].data["role"] == "prompter" and len(ranked) > 1:
            responses = [{"text": row.data["text"], "rank": _rank(row.data) + 1} for row in ranked]
            yield path[-1]._replace(data={"prompt": [_turn(row) for row in path], "responses": responses})
