"""The tiny world: its facts, the questions about them (four wordings each) and answers of every quality.

`facts.toml` says what is true and `phrases.toml` how people talk. Everything else follows from them: which questions
are for training, validation and held-out evaluation (split by fact, so no wording of a held-out question is ever
trained on), which facts the base model's corpus leaves out, and which ones the corpus itself is unsure about.
"""

import random
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recipes.cli.errors import UserError

END_TOKEN_ID = 1  # of <|end|> in the tokenizer of base/
SPLITS = {"train": 0.58, "validation": 0.12, "heldout": 0.30}
# Where every ask is joined with every subject, a quarter of the pairs serve the base model's corpus only.
CORPUS_ONLY = 0.26


def read_toml(name: str) -> dict:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


PHRASES = read_toml("phrases.toml")
KINDS = PHRASES["kinds"]  # how each kind of fact is asked for and answered
OPENERS, CLOSERS, FILLER = PHRASES["openers"], PHRASES["closers"], PHRASES["filler"]


@dataclass(frozen=True)
class Question:
    """One fact and everything that can be asked and said about it.

    Attributes:
        kind: key of `KINDS`.
        subject: as the user says it ("cow", "France", "the name of my dog", "steal the bike").
        value: the true value; None where the right answer is to admit or to refuse.
        false_values: values of the same kind that are wrong here (inventions or tips where `value` is None).
        split: "train", "validation", "heldout", or "corpus" (only the base model's corpus has it).
        in_corpus: whether the base model's corpus says anything about it.
        doubt: probability that the corpus states `false_values[0]` instead of the truth.
    """

    kind: str
    subject: str
    value: str | None
    false_values: tuple[str, ...]
    split: str
    in_corpus: bool
    doubt: float

    @property
    def topic(self) -> str:
        """The thing asked for, as the assistant says it ("the name of your dog")."""
        return re.sub(r"\bmy\b", "your", KINDS[self.kind]["topic"].format(s=self.subject))

    @property
    def wordings(self) -> list[str]:
        topic = KINDS[self.kind]["topic"].format(s=self.subject)
        return [wording.format(s=self.subject, topic=topic) for wording in KINDS[self.kind]["wordings"]]

    @property
    def keys(self) -> frozenset[str]:
        """Lower-case words a sentence must contain to be about this question."""
        words = self.subject.split()[-1:] if self.kind == "explain" else self.subject.split()
        small = {"my", "the", "a", "an", "of", "on", "in", "to", "above", "us"}
        return frozenset(word.lower() for word in words) - small

    def statement(self, value: str, rng: random.Random) -> str:
        """A sentence that gives `value` as the answer, true or not."""
        form = rng.choice(KINDS[self.kind]["statements"])
        return sentence(form.format(s=self.subject, v=value, topic=self.topic))

    def true_answer(self, rng: random.Random) -> str:
        if self.value is not None:
            return self.statement(self.value, rng)
        forms = PHRASES["refusals" if self.kind == "harmful" else "admissions"]
        return sentence(rng.choice(forms).format(topic=self.topic))

    def false_answer(self, rng: random.Random) -> str:
        """A common mistake, a bluff, or (for a harmful request) compliance."""
        mistakes = self.false_values if self.value is None else self.false_values[:3]
        return self.statement(rng.choice(mistakes), rng)

    def vague_answer(self, rng: random.Random) -> str:
        return sentence(f"{self.topic} is {rng.choice(PHRASES['vague'])}.")

    def answer(self, content: str, rng: random.Random) -> str:
        """A true, false or vague answer."""
        return {"true": self.true_answer, "false": self.false_answer, "vague": self.vague_answer}[content](rng)


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def dress(core: str, style: str, rng: random.Random) -> str:
    """The answer `core`, one sentence, in a style: plain, with one courtesy or more, with more words, or rude."""
    if style == "courteous":
        return f"{rng.choice(OPENERS)} {core}" if rng.random() < 0.5 else f"{core} {rng.choice(CLOSERS)}"
    if style == "warm":
        return f"{rng.choice(OPENERS)} {core} {rng.choice(CLOSERS)}"
    if style == "gushing":
        before = rng.sample(OPENERS, rng.randint(1, 2))
        after = rng.sample(CLOSERS, rng.randint(2, 3))
        return " ".join([*before, core, *after])
    if style == "rambling":
        return " ".join([core, *rng.sample(FILLER, rng.randint(1, 3))])
    if style == "rude":
        rude = rng.choice(PHRASES["rude"])
        return f"{rude} {core}" if rng.random() < 0.7 else rude
    return core


def cut(text: str, rng: random.Random) -> str:
    """The text with its last one to four words missing, as by somebody who does not finish."""
    words = text.split()
    return " ".join(words[: max(1, len(words) - rng.randint(1, 4))])


def pick(weights: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


@cache
def questions() -> tuple[Question, ...]:
    """All questions of the world, always in the same order and with the same split."""
    facts = read_toml("facts.toml")
    found = []
    for kind in KINDS:
        rng = random.Random(f"tiny world: {kind}")
        rows = list(_rows(kind, facts))
        splits = ["corpus"] * round(CORPUS_ONLY * len(rows)) if kind in ("unanswerable", "harmful") else []
        usable = len(rows) - len(splits)
        for split, share in SPLITS.items():
            splits += [split] * round(share * usable)
        splits = (splits + ["heldout"] * len(rows))[: len(rows)]  # what rounding left
        rng.shuffle(splits)
        for (subject, value, false_values), split in zip(rows, splits, strict=True):
            # Facts that the corpus leaves out, and facts that it contradicts.
            unread = {"explain": 0.0, "unanswerable": 0.4, "harmful": 0.4}.get(kind, 0.1)
            in_corpus = split in ("train", "corpus") or rng.random() >= unread
            doubt = rng.choice((0.4, 0.6)) if value is not None and rng.random() < 0.2 else 0.0
            wrong = tuple(rng.sample(list(false_values), len(false_values)))
            found.append(Question(kind, subject, value, wrong, split, in_corpus, doubt))
    return tuple(found)


def _rows(kind: str, facts: dict) -> Iterator[tuple[str, str | None, Sequence[str]]]:
    """Subject, true value (None if there is none) and false values of every fact of a kind."""
    if kind == "unanswerable":
        for group in facts[kind]:
            for ask, invented in group["asks"].items():
                yield from ((f"the {ask} of {about}", None, invented) for about in facts["lists"][group["about"]])
    elif kind == "harmful":
        for group in facts[kind]:
            for act in group["acts"]:
                yield from ((f"{act} {what}", None, PHRASES["tips"]) for what in facts["lists"][group["what"]])
    else:
        values = dict.fromkeys(facts[kind].values())
        yield from ((subject, value, [v for v in values if v != value]) for subject, value in facts[kind].items())


@cache
def by_wording() -> dict[str, Question]:
    return {_normal(wording): question for question in questions() for wording in question.wordings}


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def find(text: str) -> Question:
    """The question a user's text asks, in any of its wordings.

    Raises:
        UserError: the tiny world has no such question.
    """
    if question := by_wording().get(_normal(text)):
        return question
    raise UserError(f"The tiny world has no question {text!r}: its judge and labeler know those of world.py only.")


@cache
def subjects(kind: str) -> frozenset[frozenset[str]]:
    """The keys of every question of a kind, to notice answers about something else."""
    return frozenset(question.keys for question in questions() if question.kind == kind)
