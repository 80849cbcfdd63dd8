"""Ranking in a shell: the same tasks and the same store as the page, for one labeler at a time."""

import re
import secrets
import time
from dataclasses import replace
from string import ascii_uppercase

from recipes.cli.errors import visible
from recipes.labelling.answers import AnswerError, Review
from recipes.labelling.export import export_command
from recipes.labelling.store import ConflictError, Store, Task

COMMANDS = ("skip", "flag", "undo", "guidelines", "quit")
FLAG_LETTERS = {"h": "harmful", "u": "untruthful", "n": "did_not_answer"}
IDLE_SECONDS = 300  # somebody who takes longer over one question has left the keyboard
HELP = "  Best first, `=` for a tie: B > A = C > D. Or a word: " + ", ".join(COMMANDS) + "."


class _Command(Exception):
    """The labeler typed a command instead of an answer."""


def parse_ranking(text: str, letters: str) -> list[list[str]]:
    """`"B > a=c > D"`, `"b a=c d"` and `"ba=cd"` all give `[["B"], ["A", "C"], ["D"]]`.

    Raises:
        AnswerError: anything but every letter once.
    """
    if not re.fullmatch(r"[A-Z]([\s>,]*=?[\s>,]*[A-Z])*", text.strip().upper()):
        raise AnswerError(f"not a ranking; write {' > '.join(letters)} or the like, with = for a tie")
    tiers = []
    for tied, letter in re.findall(r"(=?)[\s>,]*([A-Z])", text.upper()):
        if tied:
            tiers[-1].append(letter)
        else:
            tiers.append([letter])
    if sorted(letter for tier in tiers for letter in tier) != sorted(letters):
        raise AnswerError(f"use each of {', '.join(letters)} once")
    return tiers


def parse_marks(text: str, letters: str) -> dict[str, tuple[int | None, list[str]]]:
    """By letter: `"A6 b2u Chn"` rates A 6 and B 2, calls B untruthful and C harmful and no answer.

    Raises:
        AnswerError: a word that is no letter with marks.
    """
    marks = {}
    for word in text.split():
        match = re.fullmatch(
            rf"([{letters}])([1-7]?)([{''.join(FLAG_LETTERS)}]*)", word[:1].upper() + word[1:].lower()
        )
        if not match:
            raise AnswerError(
                f"{word!r}: write a letter, a rating from 1 to 7 and problems (h, u, n), as in A6 or B2hu"
            )
        letter, rating, flags = match.groups()
        marks[letter] = (int(rating) if rating else None, [FLAG_LETTERS[flag] for flag in flags])
    return marks


def rank_in_terminal(store: Store, labeler_id: int) -> int:
    """Asks until nothing is left or the labeler quits; returns how many rankings were submitted. Drafts are kept."""
    submitted, prompt_id = 0, None
    print(f"\n{visible(store.guidelines)}")
    while True:
        task = store.task(labeler_id, prompt_id) if prompt_id else store.next_task(labeler_id)
        prompt_id = None
        if task is None:
            print("\nNothing is left to rank. Thank you! The next step:")
            print(export_command(store.path))
            return submitted
        session = _TaskSession(store, labeler_id, task)
        try:
            name = session.run()
            if name == "submit":
                submitted += 1
                print("  Saved.")
            elif name == "quit":
                return submitted
            elif name == "undo" and (last := store.progress(labeler_id)["last"]):
                prompt_id = store.undo(labeler_id, last[0], secrets.token_urlsafe(24))
            elif name == "undo":
                print("  There is nothing to undo.")
            elif name == "guidelines":
                print(f"\n{visible(store.guidelines)}")
            else:
                session.leave(name)
        except (EOFError, KeyboardInterrupt):
            print("\n  Stopped. What you had entered is kept as a draft.")
            return submitted
        except ConflictError as conflict:
            print(f"  {conflict}")


class _TaskSession:
    """One task: shown, asked for, stored. Every line entered becomes a draft."""

    def __init__(self, store: Store, labeler_id: int, task: Task):
        self.store, self.labeler_id, self.task = store, labeler_id, task
        self.answer, self.revision = task.answer, task.revision
        self.ids = {letter: id for letter, (id, _) in zip(ascii_uppercase, task.responses, strict=False)}
        self.letter = {id: letter for letter, id in self.ids.items()}
        self.letters = "".join(self.ids)
        self.seconds = 0.0

    def run(self) -> str:
        """Asks for everything and submits it; returns "submit", or the command that was typed instead of an answer."""
        try:
            self.ask_for_all()
        except _Command as command:
            return str(command)
        return "submit"

    def ask_for_all(self):
        progress = self.store.progress(self.labeler_id)
        print(f"\n{'─' * 78}\n{progress['ranked']} ranked, {progress['left']} left\n")
        for message in self.task.messages:
            print(f"{visible(message['role']).upper()}: {visible(message['content'])}")
        for letter, (_, text) in zip(self.letters, self.task.responses, strict=True):
            print(f"\n[{letter}] {visible(text)}")
        print()
        self.ask_until_valid(self.rank)
        if self.store.justifications != "off":
            for id in [id for tier in self.answer.tiers for id in tier]:
                self.ask_until_valid(lambda id=id: self.justify(id))
        self.ask_until_valid(self.mark)
        self.ask_until_valid(self.submit)

    def leave(self, action):
        """Skips the task, or flags it with a reason."""
        if action == "flag":
            self.answer = replace(self.answer, comment=self.ask("What is wrong with the prompt? ", commands=False))
        try:
            self.record(action)
        except AnswerError as error:
            print(f"  Not saved: {error}")

    def rank(self):
        has_content = self.task.revision > 0
        before = " > ".join("=".join(self.letter[id] for id in tier) for tier in self.answer.tiers)
        if has_content:
            text = self.ask(f"Ranking [{before}] (Enter keeps it, ? for help): ")
        else:
            best, *others = reversed(self.letters)
            text = self.ask(f"Ranking, best first, = for a tie (as in {best} > {'='.join(others)}; ? for help): ")
        if text in ("", "?"):
            if text == "?" or not has_content:
                raise AnswerError(HELP.strip())
            return
        tiers = [[self.ids[letter] for letter in tier] for tier in parse_ranking(text, self.letters)]
        self.answer = replace(self.answer, tiers=tiers)
        self.record("draft")

    def justify(self, id):
        review = self.answer.reviews.get(id, Review())
        needed = "one sentence" if self.store.justifications == "required" else "one sentence, or Enter for none"
        hint = f"[{visible(review.justification)}] (Enter keeps it)" if review.justification else f"({needed})"
        text = self.ask(f"Why is {self.letter[id]} there? {hint}: ", commands=False) or review.justification
        if not text and self.store.justifications == "required":
            raise AnswerError("one sentence of reason, please")
        self.review(id, justification=text)
        self.record("draft")

    def mark(self):
        marks = "Ratings 1-7 and problems, h(armful) u(ntruthful) n(o answer), as in A6 B2u (Enter for none): "
        for letter, (rating, flags) in parse_marks(self.ask(marks), self.letters).items():
            self.review(self.ids[letter], rating=rating, flags=flags)
        self.record("draft")

    def submit(self):
        if self.ask(f"Enter submits (or {', '.join(COMMANDS)}): "):
            raise AnswerError(f"press Enter to submit, or type one of {', '.join(COMMANDS)}")
        self.record("submit")

    def review(self, id, **changes):
        changed = replace(self.answer.reviews.get(id, Review()), **changes)
        self.answer = replace(self.answer, reviews=self.answer.reviews | {id: changed})

    def ask(self, question, commands=True):
        start = time.monotonic()
        text = input(question).strip()
        self.seconds += min(time.monotonic() - start, IDLE_SECONDS)
        if commands and text.lower() in COMMANDS:
            raise _Command(text.lower())
        return text

    def ask_until_valid(self, step):
        while True:
            try:
                return step()
            except AnswerError as error:
                print(f"  {error}")

    def record(self, action):
        sent = (secrets.token_urlsafe(24), self.revision, self.seconds, time.time())
        self.revision = self.store.record(self.labeler_id, self.task.prompt_id, action, self.answer, *sent)
        self.seconds = 0.0
