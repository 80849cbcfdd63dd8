"""Joins flat message tables (OpenAssistant's OASST1 and OASST2) into conversations and rankings."""

from collections.abc import Iterable, Iterator
from math import inf

from recipes.data.messages import flag, number, require
from recipes.data.rows import Row, RowError, RowProblem, Skip, describe


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
        try:
            _check(row.data)
        except RowProblem as problem:
            yield row._replace(data=problem)
            continue
        parent = row.data["parent_id"]
        (replies.setdefault(parent, []) if parent else roots).append(row)
    reached = set()
    for root in roots:
        paths = list(_paths(root, replies))
        reached |= {path[-1].line for path in paths}
        if task in ("preference", "ranking"):
            found = [ranking for path in paths for ranking in _ranking(path, replies)]
            yield from found or [root._replace(data=Skip("no message with two ranked replies"))]
        else:
            path = [root] if task == "prompt" else _best_path(root, replies)
            yield root._replace(data={**root.data, "messages": [_turn(row) for row in path]})
    lost = (row for following in replies.values() for row in following if row.line not in reached)
    yield from (row._replace(data=Skip("a reply to a message that is not there", "parent_id")) for row in lost)


def _check(data: dict | RowProblem) -> None:
    if isinstance(data, RowProblem):
        raise data
    for column in ("message_id", "parent_id", "role", "text"):
        value = require(data, column)
        if not isinstance(value, str) and (column, value) != ("parent_id", None):
            raise RowError(f"found {describe(value)}, expected text", column)
    _rank(data)
    if flag(data, "deleted"):
        raise Skip("deleted", "deleted")
    if flag(data, "review_result") is False:
        raise Skip("failed review", "review_result")


def _turn(row: Row) -> dict:
    return {"role": row.data["role"], "content": row.data["text"]}


def _rank(data: dict) -> float | None:
    return None if data.get("rank") in (None, "") else number(data, "rank")


def _best_path(root: Row, replies: dict[str, list[Row]]) -> list[Row]:
    path = [root]
    while following := replies.get(path[-1].data["message_id"]):
        path.append(min(following, key=lambda row: inf if _rank(row.data) is None else _rank(row.data)))
    while len(path) > 1 and path[-1].data["role"] == "prompter":
        path.pop()
    return path


def _paths(root: Row, replies: dict[str, list[Row]]) -> Iterator[list[Row]]:
    """The path from the root to each message of its tree."""
    ahead = [[root]]
    while ahead:
        path = ahead.pop(0)
        yield path
        ahead += [[*path, row] for row in replies.get(path[-1].data["message_id"], [])]


def _ranking(path: list[Row], replies: dict[str, list[Row]]) -> list[Row]:
    """The ranked replies to the last message of a path, if a user wrote it and there are at least two."""
    ranked = [row for row in replies.get(path[-1].data["message_id"], []) if _rank(row.data) is not None]
    if path[-1].data["role"] != "prompter" or len(ranked) < 2:
        return []
    responses = [{"text": row.data["text"], "rank": _rank(row.data) + 1} for row in ranked]
    return [path[-1]._replace(data={"prompt": [_turn(row) for row in path], "responses": responses})]
