"""Converters: functions that turn a row of a schema into a `Dialogue` (demonstrations and prompts) or a `Ranking`.

A pair is a ranking of two. A converter is pure; it raises `RowError` for a wrong row and `Skip` for a correct row that
is of no use. One function serves several schemas, as a `partial` with the names of their columns.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from recipes.cli.errors import counted
from recipes.data.cells import NOTHING, Cells
from recipes.data.messages import (
    HUMAN_ASSISTANT,
    Messages,
    Roles,
    add_system,
    conversation,
    is_turns,
    message,
    normalise,
    prompt_messages,
    read_messages,
    split_turns,
)
from recipes.data.rows import RowError, Skip, describe, join_names

_SIDES = ("chosen", "rejected")
_SCORE = re.compile(r"\w*(score|rating|reward)s?[-_]chosen|chosen[-_]\w*(score|rating|reward)s?")
_HELPSTEER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


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
    responses, or all, were left out; the prompt and the others can still be used.
    """

    prompt: Messages
    responses: list[Messages] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    margin: float | None = None
    dropped: list[Skip] = field(default_factory=list)
    tools: list | None = None


Converter = Callable[[Cells, Roles], Dialogue | Ranking]
Reader = Callable[[Cells, str, Roles], Messages]  # of a column
Verdict = Callable[[Cells], tuple[int, float | None]]  # the better of two responses, 0 or 1, and by how much


def dialogue(column: str) -> Converter:
    """For a list of messages."""
    return lambda row, roles: Dialogue(conversation(row, column, roles))


def conversation_pairs(row: Cells, roles: Roles) -> Dialogue:
    if is_turns(row.get("conversation")):
        return Dialogue(conversation(row, "conversation", roles))
    turns = []
    for pair in row.objects("conversation"):
        turns += [message("user", pair.text("input")), message("assistant", pair.text("output"))]
    return Dialogue(turns)


def prompt_completion(row: Cells, roles: Roles) -> Dialogue:
    context = prompt_messages(row, "prompt", roles)
    return Dialogue(context + read_messages(row, "completion", roles), len(context))


def prompt(column: str) -> Converter:
    return lambda row, roles: Dialogue(prompt_messages(row, column, roles))


def answer_to(question: str, answer: str) -> Converter:
    return lambda row, roles: Dialogue(prompt_messages(row, question, roles) + read_messages(row, answer, roles))


def guanaco(row: Cells, roles: Roles) -> Dialogue:
    return Dialogue(split_turns(row.text("text"), "text", re.compile(r"### (Human|Assistant):"), roles))


def joined(row: Cells, roles: Roles) -> Dialogue | Ranking:
    """Rows as `recipes.data.oasst` and `recipes.data.label_studio` make them."""
    if "responses" in row:
        return ranking(row, roles)
    if "completion" in row:
        return prompt_completion(row, roles)
    if "messages" in row:
        return Dialogue(conversation(row, "messages", roles))
    return Dialogue(prompt_messages(row, "prompt", roles))


def compared(
    question: str, first: str, second: str, verdict: Verdict, row: Cells, roles: Roles, read: Reader = prompt_messages
) -> Ranking:
    """For a prompt and two columns with responses."""
    responses = (read_messages(row, column, roles) for column in (first, second))
    return _compare(row, read(row, question, roles), responses, verdict)


def _compare(row: Cells, prompt: Messages, responses: Iterable[Messages], verdict: Verdict) -> Ranking:
    """Ranks two responses. Where they are of no use, as in a tie, the prompt still is, to the task "prompt"."""
    try:
        first, second = responses
        best, margin = verdict(row)
    except Skip as skip:
        return Ranking(prompt, dropped=[skip])
    return Ranking(prompt, [second, first] if best else [first, second], [1, 2], margin)


def _compare_whole(row: Cells, verdict: Verdict, first: Messages, second: Messages) -> Ranking:
    """Ranks two whole conversations: the turns that they share are the prompt."""
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    if first == second:
        return Ranking(first[:-1], dropped=[Skip("identical responses", "rejected")])
    if shared == 0 or first[shared - 1]["role"] in ("assistant", "system"):
        raise Skip("the prompts of chosen and rejected differ", "rejected")
    if shared == min(len(first), len(second)):
        raise Skip("one conversation is only the beginning of the other", "rejected")
    return _compare(row, first[:shared], (first[shared:], second[shared:]), verdict)


def _chosen(row: Cells) -> tuple[int, float | None]:
    """The first is better, with which the scores and the margin that a row declares must agree."""
    margin = None
    for better in filter(_SCORE.fullmatch, row):
        worse = better.replace("chosen", "rejected")
        if not all(isinstance(row.get(column), int | float | str) and row[column] != "" for column in (better, worse)):
            continue  # there is none, or an object of several
        margin = row.number(better) - row.number(worse)
        if margin < 0:
            raise RowError(f"{row[better]} is lower than {worse} {row[worse]}, yet chosen is the better", better)
        if margin == 0:
            raise Skip("tie: equal scores", better)
    if row.get("margin") not in (None, ""):
        margin = row.number("margin")
        if margin < 0:
            raise RowError(f"{row['margin']} says that rejected is the better", "margin")
    return 0, margin


def preferences(question: str | None = None) -> Converter:
    """For `chosen` and `rejected`: answers to a question, or whole conversations that share their first turns."""

    def convert(row: Cells, roles: Roles) -> Ranking:
        whole = any(_is_whole(row.get(column), roles) for column in _SIDES)
        if question and not whole:
            return compared(question, *_SIDES, _chosen, row, roles)
        chosen, rejected = (read_messages(row, column, roles) for column in _SIDES)
        if not whole:
            advice = "or a column with the prompt: --dataset_mapping prompt=NAME chosen=chosen rejected=rejected"
            raise RowError(f"found only an answer, expected the conversation from its first turn, {advice}", "chosen")
        result = _compare_whole(row, _chosen, chosen, rejected)
        column = question or "prompt"
        result.prompt = add_system(result.prompt, _system_beside(row, column, chosen, roles), column)
        return result

    return convert


def _is_whole(value: Any, roles: Roles) -> bool:
    """Whether a cell is a conversation from its first turn on, and not only an answer."""
    turns = value if is_turns(value) else []
    said = (roles.get(str(turn.get("role") or turn.get("from")).lower()) for turn in turns)
    return next((role for role in said if role != "system"), "assistant") != "assistant"


def _system_beside(row: Cells, column: str, talk: Messages, roles: Roles) -> str:
    """The system message of the prompt beside a whole conversation, or ""; skips the row if the prompt is another."""
    if row.get(column) in NOTHING:
        return ""
    system = ""
    first = next((turn["content"].strip() for turn in talk if turn["role"] == "user"), "")
    for turn in prompt_messages(row, column, roles):
        if turn["role"] == "system":
            system = turn["content"]
        elif first not in turn["content"]:  # the prompt may be rendered already
            if turn["content"].strip() not in [other["content"].strip() for other in talk]:
                raise Skip("another prompt than that of the conversations in chosen and rejected", column)
    return system


def transcripts(row: Cells, roles: Roles) -> Ranking:
    sides = (split_turns(row.text(column), column, HUMAN_ASSISTANT, roles) for column in _SIDES)
    return _compare_whole(row, _chosen, *sides)


def _openai_prompt(row: Cells, column: str, roles: Roles) -> Messages:
    """`input` of OpenAI's fine-tuning file for preferences holds the messages and perhaps tools."""
    asked = row.object(column)
    if asked.get("tools") not in NOTHING:
        raise Skip("tool calls are supported for task 'sft' only", asked.where("tools"))
    return conversation(asked, "messages", roles)


conversations_preference = partial(compared, "conversations", *_SIDES, _chosen, read=conversation)
openai_preference = partial(
    compared, "input", "preferred_output", "non_preferred_output", _chosen, read=_openai_prompt
)


def _strength(label: str, row: Cells) -> tuple[int, float]:
    """-3 … -1 for the first response, 1 … 3 for the second, 0 is a tie."""
    value = row.choice(label, range(-3, 4))
    if value == 0:
        raise Skip("tie", label)
    return int(value > 0), abs(value)


def _better(label: str, row: Cells) -> tuple[int, None]:
    """The number of the better response."""
    return row.choice(label, (0, 1)), None


def _helpsteer_prompt(row: Cells, column: str, roles: Roles) -> Messages:
    if isinstance(row.get(column), str):
        return split_turns(row.text(column), column, _HELPSTEER, roles, first="user")
    return prompt_messages(row, column, roles)


_helpsteer = partial(compared, read=_helpsteer_prompt)
helpsteer2 = partial(_helpsteer, "prompt", "response_1", "response_2", partial(_strength, "preference_strength"))
helpsteer3 = partial(_helpsteer, "context", "response1", "response2", partial(_strength, "overall_preference"))
pku_saferlhf = partial(compared, "prompt", "response_0", "response_1", partial(_better, "better_response_id"))
pku_saferlhf_safer = partial(compared, "prompt", "response_0", "response_1", partial(_better, "safer_response_id"))
shp = partial(compared, "history", "human_ref_B", "human_ref_A", partial(_better, "labels"))  # 1: A is better


def _webgpt_question(row: Cells, column: str, roles: Roles) -> Messages:
    return [message("user", row.object(column).text("full_text"))]


def _webgpt_scores(row: Cells) -> tuple[int, float]:
    margin = row.number("score_0") - row.number("score_1")
    if margin == 0:
        raise Skip("tie: equal scores", "score_0")
    return int(margin < 0), abs(margin)


webgpt = partial(compared, "question", "answer_0", "answer_1", _webgpt_scores, read=_webgpt_question)


def summaries(row: Cells, roles: Roles) -> Ranking:
    """The prompt is laid out as in TRL's conversion of this dataset; the post or article is not changed."""
    info = row.object("info")
    title, post, article, subreddit = map(info.optional_text, ("title", "post", "article", "subreddit"))
    if not post and not article:
        raise Skip("empty text", info.where("post"))
    body = f"POST: {post}" if post else article
    parts = (f"SUBREDDIT: r/{subreddit}" if subreddit and post else "", f"TITLE: {title}" if title else "", body)
    prompt = [message("user", "\n\n".join((*filter(None, parts), "TL;DR:")))]
    if (count := len(row.entries("summaries"))) != 2:
        raise RowError(f"found {counted(count, 'summary', 'summaries')}, expected 2", "summaries")
    found = ([message("assistant", summary.text("text"))] for summary in row.objects("summaries"))
    return _compare(row, prompt, found, partial(_better, "choice"))


def arena_conversations(row: Cells, roles: Roles) -> Ranking:
    turn = str(row.get("turn"))  # that was judged: in MT-bench not always the last
    end = 2 * int(turn) or None if turn.isdecimal() else None
    talks = (conversation(row, column, roles)[:end] for column in ("conversation_a", "conversation_b"))
    return _compare_whole(row, _arena_winner, *talks)


def _arena_winner(row: Cells) -> tuple[int, None]:
    winner = row.require("winner")
    if isinstance(winner, str) and re.fullmatch(r"tie( ?\(.*\))?|both_?bad", winner):
        raise Skip("both bad" if "bad" in winner else "tie", "winner")
    if winner not in ("model_a", "model_b"):
        raise RowError(f"found {describe(winner)}, expected model_a, model_b, tie or both_bad", "winner")
    return int(winner == "model_b"), None


def arena_battles(row: Cells, roles: Roles) -> Ranking:
    """Prompts and responses are lists of turns, written as JSON."""
    questions = row.entries("prompt")
    talks = []
    for column in ("response_a", "response_b"):
        answers = row.entries(column)
        if len(answers) != len(questions):
            raise RowError(f"found {counted(len(answers), 'turn')}, but prompt has {len(questions)}", column)
        turns = []
        for asked, answer in zip(questions, answers, strict=True):
            turns += [message("user", asked), message("assistant", answer)]
        talks.append(normalise(turns, column, roles))
    return _compare_whole(row, _battle_winner, *talks)


def _battle_winner(row: Cells) -> tuple[int, None]:
    labels = ("winner_model_a", "winner_model_b", "winner_tie")
    flags = [row.choice(label, (0, 1)) for label in labels]
    if sum(flags) != 1:
        raise RowError(f"found {flags} in {join_names(labels)}, expected exactly one 1", labels[0])
    if flags[2]:
        raise Skip("tie", labels[2])
    return flags[1], None


def rankings(
    question: str, column: str, answer: str, rank: str, row: Cells, roles: Roles, scores: bool = False
) -> Ranking:
    """For a prompt and a list of objects with an answer and a rank; with `scores`, the highest is the best."""
    found = ((cells, answer, rank) for cells in row.objects(column))
    return _ranked(prompt_messages(row, question, roles), found, scores)


ranking = partial(rankings, "prompt", "responses", "text", "rank")
nectar = partial(rankings, "prompt", "answers", "answer", "rank")
# overall_score holds parsing errors (10 that means 1)
ultrafeedback = partial(rankings, "instruction", "completions", "response", "fine-grained_score", scores=True)


def distilabel(row: Cells, roles: Roles) -> Ranking:
    return _ranked(prompt_messages(row, "instruction", roles), _rated_generations(row), scores=True)


def _rated_generations(row: Cells) -> Iterator[tuple[Cells, str, str]]:
    """`ratings` has one number for each of `generations`."""
    generations, ratings = row.entries("generations"), row.entries("ratings")
    if len(generations) != len(ratings):
        found = f"found {counted(len(ratings), 'rating')} of {counted(len(generations), 'generation')}"
        raise RowError(found, "ratings")
    for index, (generation, rating) in enumerate(zip(generations, ratings, strict=True)):
        answer, score = f"generations[{index}]", f"ratings[{index}]"
        yield Cells({answer: generation, score: rating}), answer, score


def _ranked(prompt: Messages, found: Iterable[tuple[Cells, str, str]], scores: bool) -> Ranking:
    """Ranks responses, each with the keys of its text and of its rank or score."""
    result = Ranking(prompt)
    try:
        found = list(found)
    except Skip as skip:
        return Ranking(prompt, dropped=[skip])
    for cells, answer, rank in found:
        cells.require(answer)
        if scores and cells.get(rank) is None:
            result.dropped.append(Skip("no score", cells.where(rank)))
            continue
        if rank not in cells:
            advice = "missing: rank the responses first, with scripts/rank_responses.py"
            raise RowError(advice, cells.where(rank))
        value = cells.number(rank, text_too=scores)
        try:
            result.responses.append([message("assistant", cells.text(answer))])
            result.ranks.append(value)
        except Skip as skip:
            result.dropped.append(skip)
    if scores:
        result.ranks = [1 + sum(other > score for other in result.ranks) for score in result.ranks]
    return result
