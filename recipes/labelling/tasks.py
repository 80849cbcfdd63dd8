"""Reads what is to be ranked: sampled responses, and attention tasks whose ranking is known."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from recipes.cli.errors import UserError
from recipes.data.cells import Cells
from recipes.data.messages import Messages
from recipes.data.rows import RowError, RowProblem, describe
from recipes.data.text_files import read_text_file
from recipes.labelling.answers import tiers_of

MAX_RESPONSES = 26  # they are called A to Z


class Response(NamedTuple):
    """`id` depends on prompt and text alone; `sample_id` is its name in the file it came from."""

    id: str
    sample_id: str
    text: str
    model: str | None
    sampling: dict | None


class SampledPrompt(NamedTuple):
    """A prompt with its responses; `gold` holds tiers of response ids, best first, when the ranking is known."""

    id: str
    sample_id: str
    messages: Messages
    responses: list[Response]
    gold: list[list[str]] | None


def read_tasks(path: str | Path, gold: bool = False) -> tuple[list[SampledPrompt], dict[str, int]]:
    """Reads a JSON Lines file of sampled responses, or, with `gold`, of rankings (every response has a `rank`).

    Returns the tasks and how often something was left out: `repeated_responses` (the same text twice under one
    prompt) and `too_few_responses` (prompts with fewer than two different ones).

    Raises:
        UserError: the file or a line of it cannot be used; nothing is returned then.
    """
    tasks, left_out = [], {"repeated_responses": 0, "too_few_responses": 0}
    seen: dict[str, tuple[int, str]] = {}  # by id: where it stands, and what for
    for row in read_text_file(Path(path)):
        try:
            task, repeated = _task(Cells(row.read()), gold, default_id=row.line)
            line, known = seen.setdefault(task.sample_id, (row.line, task.id))
            if known != task.id:
                raise RowError(f"{task.sample_id!r} stands on line {line} already, with other texts", "id")
        except RowProblem as problem:
            column = f"{problem.column}: " if problem.column else ""
            raise UserError(f"{path}, line {row.line}: {column}{problem.message}") from problem
        left_out["repeated_responses"] += repeated
        if len(task.responses) < 2:
            left_out["too_few_responses"] += 1
        else:
            tasks.append(task)
    return tasks, left_out


def _task(row: Cells, gold: bool, default_id: int) -> tuple[SampledPrompt, int]:
    messages = _messages(row)
    given = [] if row.get("responses") == [] else list(row.objects("responses"))
    texts = [_string(cells.require("text"), cells.where("text")) for cells in given]
    prompt_id = _hash(messages, sorted({*texts}))
    responses: dict[str, Response] = {}
    ranks: dict[str, float] = {}
    for index, (text, cells) in enumerate(zip(texts, given, strict=True)):
        id = _hash(prompt_id, text)
        if gold:
            rank = cells.number("rank", text_too=False)
            if ranks.setdefault(id, rank) != rank:
                raise RowError("the same text has another rank before", cells.where("rank"))
        if id not in responses:
            model = cells.get("model", row.get("model"))
            model = None if model is None else _string(model, cells.where("model"))
            sampling = cells.get("sampling", row.get("sampling"))
            responses[id] = Response(id, _name(cells, index), text, model, sampling)
    if len(responses) > MAX_RESPONSES:
        raise RowError(f"found {len(responses)}, and a person can rank at most {MAX_RESPONSES}", "responses")
    task = SampledPrompt(prompt_id, _name(row, default_id), messages, [*responses.values()], tiers_of(ranks) or None)
    return task, len(given) - len(responses)


def _name(cells: Cells, default: int) -> str:
    return str(default if cells.get("id") in (None, "") else cells["id"])


def _messages(row: Cells) -> Messages:
    """The prompt as it stands: people rank what was sampled for it, and its id is a hash of its messages."""
    prompt = row.require("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    keys = ("role", "content")
    return [{key: _string(turn.require(key), turn.where(key)) for key in keys} for turn in row.objects("prompt")]


def _string(value: Any, column: str) -> str:
    """The text as it is: an answer may be empty or end in spaces."""
    if not isinstance(value, str):
        raise RowError(f"found {describe(value)}, expected text", column)
    return value


def _hash(*content) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
