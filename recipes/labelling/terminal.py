"""Ranking in a shell: the same tasks and the same store as the page, for one labeler at a time."""

import re
import secrets
import time
from contextlib import suppress
from dataclasses import replace

from recipes.cli.errors import visible
from recipes.labelling.answers import AnswerError, Flag, Submission, is_blank
from recipes.labelling.store import ConflictError, Store, Task

with suppress(ImportError):
    import readline  # noqa: F401 (`input` then takes lines of any length; the terminal itself cuts them at 4,095 bytes)

COMMANDS = ("skip", "flag", "undo", "guidelines", "quit")
FLAG_LETTERS: dict[str, Flag] = {"h": "harmful", "u": "untruthful", "n": "did_not_answer"}
IDLE_SECONDS = 300  # somebody who takes longer over one question has left the keyboard
HELP = f"Best first, `=` for a tie: B > A = C > D. Or a word: {', '.join(COMMANDS)}."
MARKS = (
    "Ratings 1-7 and problems, h(armful) u(ntruthful) n(o answer), as in A6 B2u\n"
    f"(Enter submits; or a word: {', '.join(COMMANDS)}): "
)


class _Command(Exception):
    """The labeler typed a command instead of an answer."""


def parse_ranking(text: str, letters: str) -> list[list[str]]:
    """`"B > a=c > D"`, `"b a=c d"` and `"ba=cd"` all give `[["B"], ["A", "C"], ["D"]]`.

    Raises:
        AnswerError: anything but every letter once.
    """
    compact = re.sub(r"[\s>,]", "", text.upper())
    tiers = re.findall(r"[A-Z](?:=[A-Z])*", compact)
    if "".join(tiers) != compact:
        raise AnswerError(f"not a ranking; write {' > '.join(letters)} or the like, with = for a tie")
    ranking = [tier.split("=") for tier in tiers]
    if sorted(letter for tier in ranking for letter in tier) != sorted(letters):
        raise AnswerError(f"use each of {', '.join(letters)} once")
    return ranking


def parse_marks(text: str, letters: str) -> dict[str, tuple[int | None, list[Flag]]]:
    """By letter: `"A6 b2u Chn"` rates A 6 and B 2, calls B untruthful and C harmful and no answer.

    Raises:
        AnswerError: a word that is no letter with marks.
    """
    marks = {}
    for word in text.split():
        match = re.fullmatch(rf"([{letters}])([1-7]?)([{''.join(FLAG_LETTERS).upper()}]*)", word.upper())
        if not match:
            raise AnswerError(
                f"{word!r}: write a letter, a rating from 1 to 7 and problems (h, u, n), as in A6 or B2hu"
            )
        letter, rating, flags = match.groups()
        marks[letter] = (int(rating) if rating else None, [FLAG_LETTERS[flag] for flag in flags.lower()])
    return marks


def rank_in_terminal(store: Store, labeler_id: int) -> int:
    """Asks until nothing is left or the labeler quits; returns how many rankings were submitted. Drafts are kept."""
    submitted = 0
    print(f"\n{visible(store.guidelines)}")
    while task := store.next_task(labeler_id):
        try:
            _TaskSession(store, labeler_id, task).run()
            submitted += 1
            print("  Saved.")
        except _Command:
            pass
        except ConflictError as conflict:
            print(f"  {conflict}")
        except (EOFError, KeyboardInterrupt):
            print("\n  Stopped. What you had entered is kept as a draft.")
            return submitted
    print("\nNothing is left to rank. Thank you!")
    return submitted


class _TaskSession:
    """One task: shown, asked for, stored. Every line entered becomes a draft."""

    def __init__(self, store: Store, labeler_id: int, task: Task):
        self.store, self.labeler_id, self.task = store, labeler_id, task
        self.answer, self.revision = task.answer, task.revision
        self.letter = {id: letter for id, (letter, _) in task.responses.items()}
        self.ids = {letter: id for id, letter in self.letter.items()}
        self.letters = "".join(self.ids)
        self.seconds = 0.0

    def run(self):
        """Returns once the ranking is submitted.

        Raises:
            _Command: the labeler typed one; it was carried out.
        """
        progress = self.store.progress(self.labeler_id)
        print(f"\n{'─' * 78}\n{progress['ranked']} ranked, {progress['left']} left\n")
        for message in self.task.messages:
            print(f"{visible(message['role']).upper()}: {visible(message['content'])}")
        for letter, text in self.task.responses.values():
            print(f"\n[{letter}] {visible(text)}")
        print()
        self.ask_until_valid(self.rank)
        if self.store.justifications != "off":
            for id in [id for tier in self.answer.tiers for id in tier]:
                self.ask_until_valid(self.justify, id)
        self.ask_until_valid(self.mark_and_submit)

    def ask_until_valid(self, step, *args):
        while True:
            try:
                return step(*args)
            except AnswerError as error:
                print(f"  {error}")

    def rank(self):
        has_content = self.task.revision > 0
        if has_content:
            before = " > ".join("=".join(self.letter[id] for id in tier) for tier in self.answer.tiers)
            text = self.ask(f"Ranking [{before}] (Enter keeps it, ? for help): ")
        else:
            best, *others = reversed(self.letters)
            text = self.ask(f"Ranking, best first, = for a tie (as in {best} > {'='.join(others)}; ? for help): ")
        if text == "?" or not (text or has_content):
            raise AnswerError(HELP)
        if text:
            self.answer.tiers = [[self.ids[letter] for letter in tier] for tier in parse_ranking(text, self.letters)]
            self.record("draft")

    def justify(self, id):
        review, required = self.answer.reviews[id], self.store.justifications == "required"
        hint = "(one sentence)" if required else "(one sentence, or Enter for none)"
        if review.justification:
            hint = f"[{visible(review.justification)}] (Enter keeps it)"
        text = self.ask(f"Why is {self.letter[id]} there? {hint}: ", commands=False) or review.justification
        if required and is_blank(text):
            raise AnswerError("one sentence of reason, please")
        review.justification = text
        self.record("draft")

    def mark_and_submit(self):
        while text := self.ask(MARKS):
            for letter, (rating, flags) in parse_marks(text, self.letters).items():
                review = self.answer.reviews[self.ids[letter]]
                review.rating, review.flags = rating, flags
            self.record("draft")
        self.record("submit")

    def ask(self, question, commands=True):
        start = time.monotonic()
        text = input(question).strip()
        self.seconds += min(time.monotonic() - start, IDLE_SECONDS)
        if commands and text.lower() in COMMANDS:
            self.obey(text.lower())
            raise _Command
        return text

    def obey(self, command):
        last = self.store.progress(self.labeler_id)["last"]
        if command == "quit":
            raise EOFError
        if command == "guidelines":
            print(f"\n{visible(self.store.guidelines)}")
        elif command == "undo" and last:
            self.store.undo(self.labeler_id, last, secrets.token_urlsafe(24))
        elif command == "undo":
            print("  There is nothing to undo.")
        else:
            answer = self.answer
            if command == "flag":  # in a copy: a comment that is refused must not spoil what follows
                answer = replace(answer, comment=self.ask("What is wrong with the prompt? ", commands=False))
            self.record(command, answer)

    def record(self, action, answer=None):
        key, revision = secrets.token_urlsafe(24), self.revision
        sent = Submission(self.task.prompt_id, action, answer or self.answer, key, revision, self.seconds, time.time())
        self.revision = self.store.record(self.labeler_id, sent)
        self.seconds = 0.0
