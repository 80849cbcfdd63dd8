"""Joins flat message tables (OpenAssistant's OASST1 and OASST2) into conversations and rankings."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import inf

from recipes.data.cells import Cells
from recipes.data.rows import Row, RowError, RowProblem, Skip, describe


def conversation_trees(rows: Iterable[Row], task: str) -> Iterator[Row]:
    """Rows of the schemas "messages" and "ranking" out of rows with message_id, parent_id, role, text and rank.

    sft: one conversation per tree, by the best ranked reply (rank 0) at each step, up to the last of an assistant.
    prompt: the first message of each tree. preference, ranking: the ranked replies to each message of a user. Messages
    that are deleted or failed review are left out with all replies to them. The whole table is held in memory. A
    result has the line of its first message or, for rankings, of the message that was replied to.
    """
    replies: dict[str | None, list[Row]] = defaultdict(list)  # to a message; those to none begin a tree
    for row in rows:
        try:
            _check(Cells(row.read()))
        except RowProblem as problem:
            yield row._replace(data=problem)
        else:
            replies[row.data["parent_id"] or None].append(row)
    for root in replies.pop(None, []):
        best, rankings = [root], []
        for path, following in _walk(root, replies):
            if following and path[-1] is best[-1]:
                best.append(min(following, key=lambda row: _rank(row.data, inf)))
            ranks = [(_rank(row.data), row.data["text"]) for row in following]
            responses = [{"text": text, "rank": rank + 1} for rank, text in ranks if rank is not None]
            if path[-1].data["role"] == "prompter" and len(responses) > 1:
                data = {"prompt": [_turn(row) for row in path], "responses": responses}
                rankings.append(path[-1]._replace(data=data))
        if task in ("preference", "ranking"):
            yield from rankings or [root._replace(data=Skip("no message with two ranked replies"))]
            continue
        while len(best) > 1 and (task == "prompt" or best[-1].data["role"] == "prompter"):
            best.pop()
        yield root._replace(data={**root.data, "messages": [_turn(row) for row in best]})
    for row in (row for following in replies.values() for row in following):
        yield row._replace(data=Skip("a reply to a message that is not there", "parent_id"))


def _check(data: Cells) -> None:
    for column in ("message_id", "parent_id", "role", "text"):
        value = data.require(column)
        if not isinstance(value, str) and (column, value) != ("parent_id", None):
            raise RowError(f"found {describe(value)}, expected text", column)
    _rank(data)
    if data.flag("deleted"):
        raise Skip("deleted", "deleted")
    if data.flag("review_result") is False:
        raise Skip("failed review", "review_result")


def _rank(data: dict, default: float | None = None) -> float | None:
    return default if data.get("rank") in (None, "") else Cells(data).number("rank")


def _turn(row: Row) -> dict:
    return {"role": row.data["role"], "content": row.data["text"]}


def _walk(root: Row, replies: dict[str | None, list[Row]]) -> Iterator[tuple[list[Row], list[Row]]]:
    """The path from the root to each message of its tree, with the replies to it, which are taken out of `replies`."""
    ahead = [[root]]
    while ahead:
        path = ahead.pop(0)
        following = replies.pop(path[-1].data["message_id"], [])
        yield path, following
        ahead += [[*path, row] for row in following]
