"""Reads what is to be ranked: sampled responses, and gold tasks whose ranking is known."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from recipes.cli.errors import UserError
from recipes.labelling.answers import tiers_of

MAX_RESPONSES = 26  # they are called A to Z
MAX_LINE = 10_000_000


@dataclass(frozen=True)
class Response:
    """One response. `id` depends on prompt and text alone; `sample_id` is its name in the file it came from."""

    id: str
    sample_id: str
    text: str
    model: str | None
    sampling: dict | None


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt with its responses; `gold` holds tiers of response ids, best first, when the ranking is known."""

    id: str
    sample_id: str
    messages: list[dict]
    responses: list[Response]
    gold: list[list[str]] | None = None


def read_tasks(path: str | Path, gold: bool = False) -> tuple[list[SampledPrompt], dict[str, int]]:
    """Reads a JSON Lines file of sampled responses, or, with `gold`, of rankings (every response has a `rank`).

    Returns the tasks and how often something was left out: `repeated_responses` (the same text twice under one
    prompt) and `too_few_responses` (prompts with fewer than two different ones).

    Raises:
        UserError: the file or a line of it cannot be used; nothing is returned then.
    """
    tasks, left_out = [], {"repeated_responses": 0, "too_few_responses": 0}
    seen = {}  # by id: where it stands, and what for
    for number, row in _rows(path):
        try:
            task, repeated = _task(row, gold, default_id=str(number))
            line, known = seen.setdefault(task.sample_id, (number, task.id))
            if known != task.id:
                raise ValueError(f"the id {task.sample_id!r} stands on line {line} already, with other texts")
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{path}, line {number}: {what}") from error
        left_out["repeated_responses"] += repeated
        if len(task.responses) < 2:
            left_out["too_few_responses"] += 1
        else:
            tasks.append(task)
    return tasks, left_out


def _rows(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), start=1):
                if len(line) > MAX_LINE:
                    raise UserError(f"{path}, line {number}: longer than {MAX_LINE} characters; one object per line")
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{path}, line {number}: not JSON ({error}); one object per line") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason})") from error


def _task(row, gold, default_id):
    if not isinstance(row, dict):
        raise TypeError("expected an object with 'prompt' and 'responses'")
    json.dumps(row, ensure_ascii=False).encode()  # half a character, which JSON can hold and no file can
    messages = _messages(row["prompt"])
    rows = row["responses"]
    if not isinstance(rows, list) or not all(isinstance(response, dict) for response in rows):
        raise TypeError("'responses' must be a list of objects with a 'text'")

    distinct = {}
    for index, response in enumerate(rows):
        if not isinstance(response["text"], str):
            raise TypeError(f"the 'text' of response {index + 1} must be a string")
        distinct.setdefault(response["text"], (index, response))
    if len(distinct) > MAX_RESPONSES:
        raise ValueError(f"{len(distinct)} responses: a person can rank at most {MAX_RESPONSES}")

    prompt_id = _hash(messages, sorted(distinct))
    responses, ranks = [], {}
    for text, (index, response) in distinct.items():
        response_id = _hash(prompt_id, text)
        model = response.get("model", row.get("model"))
        if model is not None and not isinstance(model, str):
            raise TypeError(f"the 'model' of response {index + 1} must be a string")
        responses.append(
            Response(
                id=response_id,
                sample_id=str(response.get("id", index)),
                text=text,
                model=model,
                sampling=response.get("sampling", row.get("sampling")),
            )
        )
        if gold:
            ranks[response_id] = _rank(response["rank"], index)
    tiers = tiers_of(ranks) if gold else None
    task = SampledPrompt(prompt_id, str(row.get("id", default_id)), messages, responses, tiers)
    return task, len(rows) - len(distinct)


def _messages(prompt):
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise TypeError("'prompt' must be a text or a list of messages")
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise TypeError("every message of 'prompt' needs a 'role' and a 'content', both strings")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _rank(rank, index):
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
        raise TypeError(f"the 'rank' of response {index + 1} must be a number, 1 for the best")
    return rank


def _hash(*content):
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
