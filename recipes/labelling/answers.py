"""What a labeler says about one prompt, and what makes it complete."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from recipes.cli.errors import UserError

ACTIONS = ("draft", "submit", "skip", "flag")
FLAGS = {"harmful": "harmful", "untruthful": "untruthful", "did_not_answer": "did not answer"}
JUSTIFICATIONS = ("required", "optional", "off")
MAX_TEXT = 4000


# Separators, control and format characters (zero width among them), marks without a letter; and what Unicode calls
# letters and symbols although nothing is seen of them.
BLANK_CATEGORIES, BLANKS = ("Z", "M", "Cc", "Cf", "Cs"), "\u115f\u1160\u2800\u3164\uffa0"


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen."""
    return all(unicodedata.category(c).startswith(BLANK_CATEGORIES) or c in BLANKS for c in text)


class AnswerError(UserError):
    """The answer cannot be stored as it is: the text says what is missing or wrong."""


@dataclass(frozen=True)
class Review:
    """About one response: a sentence of reason, a quality from 1 (worst) to 7, and names from `FLAGS`, each once.

    A reason of which nothing can be seen is none.
    """

    justification: str = ""
    rating: int | None = None
    flags: list[str] = field(default_factory=list)

    def __post_init__(self):
        object.__setattr__(self, "justification", "" if is_blank(self.justification) else self.justification)
        object.__setattr__(self, "flags", list(dict.fromkeys(self.flags)))


@dataclass(frozen=True)
class Answer:
    """`tiers`: lists of response ids, best first; ids in one list are tied."""

    tiers: list[list[str]]
    reviews: dict[str, Review] = field(default_factory=dict)
    comment: str = ""

    def __post_init__(self):
        object.__setattr__(self, "comment", "" if is_blank(self.comment) else self.comment)

    def digest(self, *context) -> str:
        """Hash of the answer and of what it answers; equal for a request and its repetition."""
        text = json.dumps([context, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def check(answer: Answer, action: str, response_ids: Iterable[str], justifications: str = "required") -> None:
    """Raises `AnswerError` unless `answer` fits a prompt with these responses and is complete enough for `action`."""
    expected = sorted(response_ids)
    if action not in ACTIONS:
        raise AnswerError(f"unknown action {action!r}: use one of {', '.join(ACTIONS)}")
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
    for review in answer.reviews.values():
        if review.rating is not None and not (type(review.rating) is int and 1 <= review.rating <= 7):
            raise AnswerError(f"a rating is a whole number from 1 to 7, not {review.rating!r}")
        if not set(review.flags) <= set(FLAGS):
            raise AnswerError(f"unknown flag in {review.flags}: use {', '.join(FLAGS)}")
    if action == "submit" and justifications == "required":
        missing = [id for id in expected if not answer.reviews.get(id, Review()).justification]
        if missing:
            raise AnswerError(f"no reason for the rank of {len(missing)} of {len(expected)} responses")
    if action == "flag" and not answer.comment:
        raise AnswerError("say what is wrong with the prompt")


def ranks_of(tiers: Sequence[Sequence[str]]) -> dict[str, int]:
    """Competition ranks, 1 = best; tied responses share one: `[[a], [b, c], [d]]` gives 1, 2, 2, 4."""
    ranks: dict[str, int] = {}
    place = 1
    for tier in tiers:
        ranks.update(dict.fromkeys(tier, place))
        place += len(tier)
    return ranks


def tiers_of(ranks: Mapping[str, float]) -> list[list[str]]:
    """The inverse of `ranks_of`; any numbers will do as ranks."""
    return [[id for id in ranks if ranks[id] == rank] for rank in sorted(set(ranks.values()))]
