"""What a labeler says about one prompt, and what makes it complete."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import Field

from recipes.cli.errors import UserError

JUSTIFICATIONS = ("required", "optional", "off")
MAX_TEXT = 4000
MAX_ID = 2**63 - 1  # the largest integer that SQLite keeps
Action = Literal["draft", "submit", "skip", "flag"]
Flag = Literal["harmful", "untruthful", "did_not_answer"]
FLAGS: tuple[Flag, ...] = get_args(Flag)
# Bounds for what the page sends.
Key = Annotated[str, Field(min_length=16, max_length=64)]
EventId = Annotated[int, Field(ge=0, le=MAX_ID)]

# Separators, control and format characters (zero width among them), marks without a letter; and what Unicode calls
# letters and symbols although nothing is seen of them.
BLANK_CATEGORIES, BLANKS = ("Z", "M", "Cc", "Cf", "Cs"), "\u115f\u1160\u2800\u3164\uffa0"


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen."""
    return all(unicodedata.category(c).startswith(BLANK_CATEGORIES) or c in BLANKS for c in text)


class AnswerError(UserError):
    """The answer cannot be stored as it is: the text says what is missing or wrong."""


@dataclass
class Review:
    """About one response; `rating` is its quality from 1 (worst) to 7."""

    __pydantic_config__ = {"extra": "forbid"}  # the server reads requests into these classes

    justification: str = ""
    rating: Annotated[int, Field(strict=True, ge=1, le=7)] | None = None
    flags: list[Flag] = field(default_factory=list)


@dataclass
class Answer:
    """`tiers`: lists of response ids, best first; ids in one list are tied."""

    __pydantic_config__ = {"extra": "forbid"}

    tiers: list[list[str]]
    reviews: dict[str, Review] = field(default_factory=dict)
    comment: str = ""


@dataclass
class Submission:
    """An answer on its way to be stored, which the same `key` does once.

    `revision` is the event that the labeler's screen was based on (0: none), `active_seconds` is the time spent since
    then, and `client_time` is in seconds since 1970.
    """

    __pydantic_config__ = {"extra": "forbid"}

    prompt_id: Annotated[str, Field(max_length=64)]
    action: Action
    answer: Answer
    key: Key
    revision: EventId
    active_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    client_time: Annotated[float, Field(allow_inf_nan=False)] | None = None


def check(answer: Answer, action: Action, response_ids: Iterable[str], justifications: str = "required") -> None:
    """Raises `AnswerError` unless `answer` fits a prompt with these responses and is complete enough for `action`."""
    expected = sorted(response_ids)
    if sorted(id for tier in answer.tiers for id in tier) != expected or not all(answer.tiers):
        raise AnswerError("the ranking must hold every response of the prompt exactly once")
    if not set(answer.reviews) <= set(expected):
        raise AnswerError("a review belongs to no response of this prompt")
    texts = [answer.comment, *(review.justification for review in answer.reviews.values())]
    if any(len(text) > MAX_TEXT for text in texts):
        raise AnswerError(f"a text has at most {MAX_TEXT} characters")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise AnswerError("a text holds half a character, or bytes that are not UTF-8") from error
    missing = [id for id in expected if is_blank(answer.reviews.get(id, Review()).justification)]
    if action == "submit" and justifications == "required" and missing:
        raise AnswerError(f"no reason for the rank of {len(missing)} of {len(expected)} responses")
    if action == "flag" and is_blank(answer.comment):
        raise AnswerError("say what is wrong with the prompt")


def ranks_of(tiers: Sequence[Sequence[str]]) -> dict[str, int]:
    """Competition ranks, 1 = best; tied responses share one: `[[a], [b, c], [d]]` gives 1, 2, 2, 4."""
    ranks: dict[str, int] = {}
    for tier in tiers:
        ranks |= dict.fromkeys(tier, len(ranks) + 1)
    return ranks


def tiers_of(ranks: Mapping[str, float]) -> list[list[str]]:
    """The inverse of `ranks_of`; any numbers will do as ranks."""
    return [[id for id in ranks if ranks[id] == rank] for rank in sorted(set(ranks.values()))]
