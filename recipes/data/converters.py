"""Converters: functions that turn a row of a schema into a `Dialogue` (demonstrations and prompts) or a `Ranking`.

A pair is a ranking of two. A converter is pure; it raises `RowError` for a wrong row and `Skip` for a correct row that
is of no use, such as a tie. Functions that return a `Converter` serve several schemas. `recipes.data.tasks` makes the
rows of each task out of dialogues and rankings.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from recipes.cli.errors import counted
from recipes.data.messages import (
    HUMAN_ASSISTANT,
    NOTHING,
    Messages,
    Roles,
    as_object,
    choice,
    items,
    message,
    normalise,
    number,
    objects,
    optional_text,
    prompt_messages,
    read_messages,
    require,
    split_pair,
    split_turns,
    text,
)
from recipes.data.rows import RowError, Skip, describe, join_names

_SCORE = re.compile(r"\w*(score|rating|reward)s?[-_]chosen|chosen[-_]\w*(score|rating|reward)s?")


@dataclass
class Dialogue:
    """A conversation. Answers in its first `context` messages, and those with the key `weight`, are not learned."""

    messages: Messages
    context: int = 0
    tools: list | None = None


@dataclass
class Ranking:
    """Responses (message lists that continue `prompt`) and their ranks: 1 is best, equal ranks are ties.

    `margin` says by how much the first of two responses is better, if the source tells it. `dropped` lists why some
    responses were left out; the others can still be used.
    """

    prompt: Messages
    responses: list[Messages]
    ranks: list[float]
    margin: float | None = None
    dropped: list[Skip] = field(default_factory=list)
    tools: list | None = None


Converter = Callable[[dict, Roles], Dialogue | Ranking]


@contextmanager
def answers_to(prompt: Messages) -> Iterator[None]:
    """For reading responses: where they are of no use, as in a tie, the prompt still is, to the task "prompt"."""
    try:
        yield
    except Skip as skip:
        skip.prompt = prompt
        raise


def _answers(row: dict, roles: Roles, prompt: Messages, *columns: str) -> list[Messages]:
    with answers_to(prompt):
        return [read_messages(row, column, roles) for column in columns]


def dialogue(column: str) -> Converter:
    """For a list of messages."""

    def convert(row: dict, roles: Roles) -> Dialogue:
        return Dialogue(normalise(items(row, column), column, roles))

    return convert


def conversation_pairs(row: dict, roles: Roles) -> Dialogue:
    turns = []
    for place, pair in objects(row, "conversation"):
        turns += [message("user", text(pair, f"{place}.input")), message("assistant", text(pair, f"{place}.output"))]
    return Dialogue(turns)


def prompt_completion(row: dict, roles: Roles) -> Dialogue:
    context = prompt_messages(row, "prompt", roles)
    return Dialogue(context + read_messages(row, "completion", roles), len(context))


def prompt(column: str) -> Converter:
    return lambda row, roles: Dialogue(prompt_messages(row, column, roles))


def instructions(question: str, answer: str) -> Converter:
    """For a question and an answer."""

    def convert(row: dict, roles: Roles) -> Dialogue:
        return Dialogue([*prompt_messages(row, question, roles), *read_messages(row, answer, roles)])

    return convert


def guanaco(row: dict, roles: Roles) -> Dialogue:
    return Dialogue(split_turns(text(row, "text"), "text", re.compile(r"### (Human|Assistant):"), roles))


def joined(row: dict, roles: Roles) -> Dialogue | Ranking:
    """Rows as `recipes.data.oasst` and `recipes.data.label_studio` make them."""
    kinds = {"responses": ranking, "completion": prompt_completion, "messages": dialogue("messages")}
    return next((kinds[column] for column in kinds if column in row), prompt("prompt"))(row, roles)


def preferences(question: str | None = None) -> Converter:
    """For `chosen` and `rejected`: answers to a question, or whole conversations that share their first turns."""

    def convert(row: dict, roles: Roles) -> Ranking:
        whole = [_is_whole(row.get(column), roles) for column in ("chosen", "rejected")]
        if question and not any(whole):
            context = prompt_messages(row, question, roles)
            return _preferred(row, context, *_answers(row, roles, context, "chosen", "rejected"))
        chosen, rejected = (read_messages(row, column, roles) for column in ("chosen", "rejected"))
        if not any(whole):
            raise RowError("found only an answer, expected the conversation from its first turn on", "chosen")
        talk, (shared, chosen, rejected) = chosen, split_pair(chosen, rejected)
        return _preferred(row, _with_system(row, question or "prompt", talk, roles) + shared, chosen, rejected)

    return convert


def _with_system(row: dict, column: str, talk: Messages, roles: Roles) -> Messages:
    """The system message of a prompt that stands beside a whole conversation which has none; else an empty list.

    Raises:
        Skip: it is not the prompt of that conversation, so that one cannot tell which of them is meant.
    """
    if row.get(column) in NOTHING:
        return []
    turns = prompt_messages(row, column, roles)
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    said = [turn["content"].strip() for turn in talk]
    first = next((turn["content"].strip() for turn in talk if turn["role"] == "user"), "")
    for turn in turns[len(system) :]:
        if turn["content"].strip() not in said and first not in turn["content"]:  # the prompt may be rendered already
            raise Skip("another prompt than that of the conversations in chosen and rejected", column)
    if not system or talk[:1] == system:
        return []
    if talk[0]["role"] == "system":
        raise Skip("another system message than that of the conversations in chosen and rejected", column)
    return system


def _is_whole(value: Any, roles: Roles) -> bool:
    """Whether a cell is a conversation from its first turn on, and not only an answer; a blank system turn is none."""
    for turn in value if isinstance(value, list) else ():
        if not isinstance(turn, dict):
            return False
        role = roles.get(str(turn.get("role", turn.get("from"))).lower())
        if role != "system" or str(turn.get("content", turn.get("value")) or "").strip():
            return role != "assistant"
    return False


def transcripts(row: dict, roles: Roles) -> Ranking:
    sides = [split_turns(text(row, column), column, HUMAN_ASSISTANT, roles) for column in ("chosen", "rejected")]
    return _preferred(row, *split_pair(*sides))


def conversations_preference(row: dict, roles: Roles) -> Ranking:
    context = normalise(items(row, "conversations"), "conversations", roles)
    return _preferred(row, context, *_answers(row, roles, context, "chosen", "rejected"))


def openai_preference(row: dict, roles: Roles) -> Ranking:
    """OpenAI's fine-tuning file for preferences, whose `input` holds the messages and perhaps tools."""
    asked = as_object(require(row, "input"), "input")
    context = normalise(items(asked, "input.messages"), "input.messages", roles)
    if asked.get("input.tools") not in NOTHING:
        raise Skip("tool calls are supported for task 'sft' only", "input.tools")
    return _preferred(row, context, *_answers(row, roles, context, "preferred_output", "non_preferred_output"))


def _preferred(row: dict, context: Messages, chosen: Messages, rejected: Messages) -> Ranking:
    with answers_to(context):
        return Ranking(context, [chosen, rejected], [1, 2], _margin(row))


def _margin(row: dict) -> float | None:
    found = None
    for better in filter(_SCORE.fullmatch, row):
        worse = better.replace("chosen", "rejected")
        if not all(isinstance(row.get(column), int | float | str) and row[column] != "" for column in (better, worse)):
            continue  # there is none, or an object of several
        margin = number(row, better) - number(row, worse)
        if margin < 0:
            raise RowError(f"{row[better]} is lower than {worse} {row[worse]}, yet chosen is the better", better)
        if margin == 0:
            raise Skip("tie: equal scores", better)
        found = margin
    if row.get("margin") in (None, ""):
        return found
    if (margin := number(row, "margin")) < 0:
        raise RowError(f"{row['margin']} says that rejected is the better", "margin")
    return margin


def best_of_two(prompt: Messages, responses: list[Messages], best: int, margin: float | None = None) -> Ranking:
    """Of two responses, `best` (0 or 1) is the better."""
    return Ranking(prompt, responses[::-1] if best else responses, [1, 2], margin)


def better_response(label: str) -> Converter:
    """For prompt, response_0, response_1 and the column that says which of them is better."""

    def convert(row: dict, roles: Roles) -> Ranking:
        context = prompt_messages(row, "prompt", roles)
        responses = _answers(row, roles, context, "response_0", "response_1")
        return best_of_two(context, responses, choice(row, label, (0, 1)))

    return convert


def strength(question: str, first: str, second: str, label: str) -> Converter:
    """For HelpSteer's preferences: -3 … -1 for the first response, 1 … 3 for the second, 0 is a tie."""
    marker = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")

    def convert(row: dict, roles: Roles) -> Ranking:
        if isinstance(row.get(question), str):
            context = split_turns(text(row, question), question, marker, roles, first="user")
        else:
            context = prompt_messages(row, question, roles)
        value = choice(row, label, range(-3, 4))
        if value == 0:
            raise Skip("tie", label, context)
        responses = _answers(row, roles, context, first, second)
        return best_of_two(context, responses, value > 0, abs(value))

    return convert


def summaries(row: dict, roles: Roles) -> Ranking:
    """The prompt is laid out as in TRL's conversion of this dataset; the post or article is not changed."""
    info = as_object(require(row, "info"), "info")
    title, post, article = (optional_text(info, f"info.{key}") for key in ("title", "post", "article"))
    subreddit = optional_text(info, "info.subreddit")
    if not post and not article:
        raise Skip("empty text", "info.post")
    body = f"POST: {post}" if post else article
    parts = (f"SUBREDDIT: r/{subreddit}" if subreddit and post else "", f"TITLE: {title}" if title else "", body)
    context = [message("user", "\n\n".join((*filter(None, parts), "TL;DR:")))]
    with answers_to(context):
        found = [text(summary, f"{place}.text") for place, summary in objects(row, "summaries")]
    best = choice(row, "choice", range(len(found)))
    if len(found) != 2:
        raise RowError(f"found {counted(len(found), 'summary', 'summaries')}, expected 2", "summaries")
    return best_of_two(context, [[message("assistant", summary)] for summary in found], best)


def webgpt(row: dict, roles: Roles) -> Ranking:
    context = [message("user", text(as_object(require(row, "question"), "question"), "question.full_text"))]
    margin = number(row, "score_0") - number(row, "score_1")
    if margin == 0:
        raise Skip("tie: equal scores", "score_0", context)
    answers = _answers(row, roles, context, "answer_0", "answer_1")
    return best_of_two(context, answers, margin < 0, abs(margin))


def shp(row: dict, roles: Roles) -> Ranking:
    context = [message("user", text(row, "history"))]
    answers = _answers(row, roles, context, "human_ref_A", "human_ref_B")
    return best_of_two(context, answers, 1 - choice(row, "labels", (0, 1)))


def arena_conversations(row: dict, roles: Roles) -> Ranking:
    winner = require(row, "winner")
    tie = isinstance(winner, str) and re.fullmatch(r"tie( ?\(both ?bad\))?|both_?bad", winner)
    if not tie and winner not in ("model_a", "model_b"):
        raise RowError(f"found {describe(winner)}, expected model_a, model_b, tie or both_bad", "winner")
    sides = ("conversation_a", "conversation_b")
    shared, first, second = split_pair(*(normalise(items(row, column), column, roles) for column in sides))
    if tie:
        raise Skip("tie" if winner == "tie" else "both bad", "winner", shared)
    return best_of_two(shared, [first, second], winner == "model_b")


def arena_battles(row: dict, roles: Roles) -> Ranking:
    """Prompts and responses are lists of turns, written as JSON."""
    labels = ("winner_model_a", "winner_model_b", "winner_tie")
    flags = [choice(row, label, (0, 1)) for label in labels]
    if sum(flags) != 1:
        raise RowError(f"found {flags} in {join_names(labels)}, expected exactly one 1", labels[0])
    questions = items(row, "prompt")
    sides = []
    for column in ("response_a", "response_b"):
        answers = items(row, column)
        if len(answers) != len(questions):
            raise RowError(f"found {counted(len(answers), 'turn')}, but prompt has {len(questions)}", column)
        pairs = zip(questions, answers, strict=True)
        turns = [turn for user, reply in pairs for turn in (message("user", user), message("assistant", reply))]
        sides.append(normalise(turns, column, roles))
    shared, first, second = split_pair(*sides)
    if flags[2]:
        raise Skip("tie", labels[2], shared)
    return best_of_two(shared, [first, second], flags[1])


def rankings(column: str, text_key: str, rank_key: str, question: str = "prompt", scores: bool = False) -> Converter:
    """For a prompt and a list of {text, rank} objects in any order; with `scores`, the highest is the best."""

    def convert(row: dict, roles: Roles) -> Ranking:
        context = prompt_messages(row, question, roles)
        with answers_to(context):
            found = objects(row, column)
        places = [(values, f"{place}.{text_key}", f"{place}.{rank_key}") for place, values in found]
        return _ranked(context, places, scores)

    return convert


ranking = rankings("responses", "text", "rank")


def distilabel(row: dict, roles: Roles) -> Ranking:
    """`ratings` has one number for each of `generations`; the highest is the best."""
    context = prompt_messages(row, "instruction", roles)
    with answers_to(context):
        columns = items(row, "generations"), items(row, "ratings")
    if len(columns[0]) != len(columns[1]):
        raise RowError(
            f"found {counted(len(columns[1]), 'rating')} of {counted(len(columns[0]), 'generation')}", "ratings"
        )
    names = [(f"generations[{index}]", f"ratings[{index}]") for index in range(len(columns[0]))]
    cells = zip(names, *columns, strict=True)
    return _ranked(context, [({name[0]: answer, name[1]: rating}, *name) for name, answer, rating in cells], True)


def _ranked(context: Messages, found: list[tuple[dict, str, str]], scores: bool) -> Ranking:
    """Of responses, each with the keys of its text and of its rank or score."""
    result = Ranking(context, [], [])
    for values, answer, rank in found:
        require(values, answer)
        if scores and values.get(rank) is None:
            result.dropped.append(Skip("no score", rank))
            continue
        if rank not in values:
            raise RowError("missing: rank the responses first, with scripts/rank_responses.py", rank)
        value = number(values, rank, text_too=scores)
        try:
            result.responses.append([message("assistant", text(values, answer))])
            result.ranks.append(-value if scores else value)
        except Skip as skip:
            result.dropped.append(skip)
    if scores:
        result.ranks = [1 + sum(other < rank for other in result.ranks) for rank in result.ranks]
    return result
