"""Converters: functions that turn a row of a schema into a `Dialogue` (demonstrations and prompts) or a `Ranking`.

A pair is a ranking of two. A converter is pure; it raises `RowError` for a wrong row and `Skip` for a correct row that
is of no use, such as a tie. Functions that return a `Converter` serve several schemas. `recipes.data.tasks` makes the
rows of each task out of dialogues and rankings.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from recipes.data.messages import (
    HUMAN_ASSISTANT,
    NOTHING,
    Messages,
    Roles,
    as_object,
    choice,
    flag,
    in_context,
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

SCORES = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score"))


@dataclass
class Dialogue:
    messages: Messages
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


Converter = Callable[[dict, Roles], Dialogue | Ranking]


def dialogue(column: str) -> Converter:
    """For a list of messages, perhaps with `tools`."""

    def convert(row: dict, roles: Roles) -> Dialogue:
        tools = None if row.get("tools") in NOTHING else items(row, "tools")
        return Dialogue(in_context(row, normalise(items(row, column), column, roles)), tools)

    return convert


def conversation_pairs(row: dict, roles: Roles) -> Dialogue:
    turns = []
    for place, pair in objects(row, "conversation"):
        turns += [message("user", text(pair, f"{place}.input")), message("assistant", text(pair, f"{place}.output"))]
    return Dialogue(in_context(row, turns))


def prompt_completion(row: dict, roles: Roles) -> Dialogue:
    if flag(row, "label") is False:  # TRL's unpaired preferences: a completion not to be learned
        raise Skip("labelled as a bad completion", "label")
    return Dialogue(prompt_messages(row, "prompt", roles) + read_messages(row, "completion", roles))


def prompt(row: dict, roles: Roles) -> Dialogue:
    return Dialogue(prompt_messages(row, "prompt", roles))


def instructions(question: str, answer: str) -> Converter:
    """For a question and an answer; `input` or `context` follows the question after a blank line."""

    def convert(row: dict, roles: Roles) -> Dialogue:
        parts = (text(row, question), optional_text(row, "input"), optional_text(row, "context"))
        turns = [message("user", "\n\n".join(filter(None, parts))), message("assistant", text(row, answer))]
        return Dialogue(in_context(row, turns))

    return convert


def guanaco(row: dict, roles: Roles) -> Dialogue:
    return Dialogue(split_turns(text(row, "text"), "text", re.compile(r"### (Human|Assistant):"), roles))


def oasst(row: dict, roles: Roles) -> Dialogue | Ranking:
    """Rows as `recipes.data.oasst` joins them."""
    return (ranking if "responses" in row else dialogue("messages"))(row, roles)


def preferences(question: str | None = None) -> Converter:
    """For `chosen` and `rejected`: answers to a question, or whole conversations that share their first turns."""

    def convert(row: dict, roles: Roles) -> Ranking:
        chosen, rejected = (read_messages(row, column, roles) for column in ("chosen", "rejected"))
        if not chosen or not rejected:
            raise Skip("empty list", "rejected" if chosen else "chosen")
        if chosen[0]["role"] == rejected[0]["role"] == "assistant":
            if question is None:
                raise RowError("found only an answer, expected the conversation from its first turn on", "chosen")
            return Ranking(prompt_messages(row, question, roles), [chosen, rejected], [1, 2], _margin(row))
        shared, chosen, rejected = split_pair(chosen, rejected)
        return Ranking(in_context(row, shared), [chosen, rejected], [1, 2], _margin(row))

    return convert


def transcripts(row: dict, roles: Roles) -> Ranking:
    sides = [split_turns(text(row, column), column, HUMAN_ASSISTANT, roles) for column in ("chosen", "rejected")]
    shared, chosen, rejected = split_pair(*sides)
    return Ranking(shared, [chosen, rejected], [1, 2], _margin(row))


def conversations_preference(row: dict, roles: Roles) -> Ranking:
    responses = [read_messages(row, column, roles) for column in ("chosen", "rejected")]
    turns = normalise(items(row, "conversations"), "conversations", roles)
    return Ranking(in_context(row, turns), responses, [1, 2], _margin(row))


def _margin(row: dict) -> float | None:
    if row.get("margin") not in (None, ""):
        return number(row, "margin")
    for better, worse in SCORES:
        if row.get(better) not in (None, "") and row.get(worse) not in (None, ""):
            margin = number(row, better) - number(row, worse)
            if margin < 0:
                raise RowError(f"{row[better]} is lower than {worse} {row[worse]}, yet chosen is the better", better)
            if margin == 0:
                raise Skip("tie: equal scores", better)
            return margin
    return None


def best_of_two(
    question: Messages, first: Messages, second: Messages, best: int, margin: float | None = None
) -> Ranking:
    """`best` is 0 or 1."""
    return Ranking(question, [second, first] if best else [first, second], [1, 2], margin)


def better_response(label: str) -> Converter:
    """For prompt, response_0, response_1 and the column that says which of them is better."""

    def convert(row: dict, roles: Roles) -> Ranking:
        responses = [read_messages(row, column, roles) for column in ("response_0", "response_1")]
        return best_of_two(prompt_messages(row, "prompt", roles), *responses, choice(row, label, (0, 1)))

    return convert


def strength(question: str, first: str, second: str, label: str) -> Converter:
    """For HelpSteer's preferences: -3 … -1 for the first response, 1 … 3 for the second, 0 is a tie."""
    marker = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")

    def convert(row: dict, roles: Roles) -> Ranking:
        value = choice(row, label, range(-3, 4))
        if value == 0:
            raise Skip("tie", label)
        if isinstance(row.get(question), str):
            context = split_turns(text(row, question), question, marker, roles, first="user")
        else:
            context = prompt_messages(row, question, roles)
        responses = [read_messages(row, column, roles) for column in (first, second)]
        return best_of_two(context, *responses, best=value > 0, margin=abs(value))

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
    found = [text(summary, f"{place}.text") for place, summary in objects(row, "summaries")]
    best = choice(row, "choice", range(len(found)))
    if len(found) != 2:
        raise RowError(f"found {len(found)} summaries, expected 2", "summaries")
    responses = [[message("assistant", summary)] for summary in found]
    return best_of_two([message("user", "\n\n".join((*filter(None, parts), "TL;DR:")))], *responses, best)


def webgpt(row: dict, roles: Roles) -> Ranking:
    question = text(as_object(require(row, "question"), "question"), "question.full_text")
    margin = number(row, "score_0") - number(row, "score_1")
    if margin == 0:
        raise Skip("tie: equal scores", "score_0")
    answers = [read_messages(row, column, roles) for column in ("answer_0", "answer_1")]
    return best_of_two([message("user", question)], *answers, best=margin < 0, margin=abs(margin))


def shp(row: dict, roles: Roles) -> Ranking:
    answers = [read_messages(row, column, roles) for column in ("human_ref_A", "human_ref_B")]
    return best_of_two([message("user", text(row, "history"))], *answers, best=1 - choice(row, "labels", (0, 1)))


def arena_conversations(row: dict, roles: Roles) -> Ranking:
    winner = require(row, "winner")
    if isinstance(winner, str) and re.fullmatch(r"tie( ?\(both ?bad\))?|both_?bad", winner):
        raise Skip("tie" if winner == "tie" else "both bad", "winner")
    if winner not in ("model_a", "model_b"):
        raise RowError(f"found {describe(winner)}, expected model_a, model_b, tie or both_bad", "winner")
    sides = ("conversation_a", "conversation_b")
    shared, first, second = split_pair(*(normalise(items(row, column), column, roles) for column in sides))
    return best_of_two(shared, first, second, best=winner == "model_b")


def arena_battles(row: dict, roles: Roles) -> Ranking:
    """Prompts and responses are lists of turns, written as JSON."""
    labels = ("winner_model_a", "winner_model_b", "winner_tie")
    flags = [choice(row, label, (0, 1)) for label in labels]
    if sum(flags) != 1:
        raise RowError(f"found {flags} in {join_names(labels)}, expected exactly one 1", labels[0])
    if flags[2]:
        raise Skip("tie", labels[2])
    questions = items(row, "prompt")
    sides = []
    for column in ("response_a", "response_b"):
        answers = items(row, column)
        if len(answers) != len(questions):
            raise RowError(f"found {len(answers)} turns, but prompt has {len(questions)}", column)
        pairs = zip(questions, answers, strict=True)
        turns = [turn for user, reply in pairs for turn in (message("user", user), message("assistant", reply))]
        sides.append(normalise(turns, column, roles))
    return best_of_two(*split_pair(*sides), best=flags[1])


def rankings(column: str, text_key: str, rank_key: str) -> Converter:
    """For a prompt and a list of {text, rank} objects, in any order."""

    def convert(row: dict, roles: Roles) -> Ranking:
        result = Ranking(prompt_messages(row, "prompt", roles), [], [])
        for place, response in objects(row, column):
            rank = number(response, f"{place}.{rank_key}", text_too=False)
            _add_response(result, response, f"{place}.{text_key}", rank)
        return result

    return convert


ranking = rankings("responses", "text", "rank")


def _add_response(result: Ranking, response: dict, column: str, rank: float) -> None:
    try:
        result.responses.append([message("assistant", text(response, column))])
        result.ranks.append(rank)
    except Skip as skip:
        result.dropped.append(skip)


def ultrafeedback(row: dict, roles: Roles) -> Ranking:
    """Ranked by `fine-grained_score`: `overall_score` holds parsing errors (10 that means 1)."""
    result = Ranking([message("user", text(row, "instruction"))], [], [])
    for place, response in objects(row, "completions"):
        score = f"{place}.fine-grained_score"
        require(response, f"{place}.response")
        if response.get(score) is None:
            result.dropped.append(Skip("no score", score))
        else:
            _add_response(result, response, f"{place}.response", -number(response, score, text_too=False))
    result.ranks = [1 + sum(other < rank for other in result.ranks) for rank in result.ranks]
    return result
