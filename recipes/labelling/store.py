"""Everything a labelling job knows: which prompt goes to whom, what was answered, and what counts.

Functions that store something return after the commit; what they return is safe.
"""

import hashlib
import json
import random
import sqlite3
import time
from dataclasses import asdict, dataclass
from string import ascii_uppercase

from recipes.cli.errors import UserError
from recipes.labelling.answers import MAX_ID, Answer, Review, Submission, check, is_blank
from recipes.labelling.database import Database
from recipes.labelling.tasks import SampledPrompt

LEASE_SECONDS = 3600  # an open task that nobody touches for this long is offered to somebody else

# Prompts that labeler :me has not met: attention tasks, and others that fewer than :overlap people have answered or
# are working on.
_AVAILABLE = """
SELECT p.id FROM prompt AS p LEFT JOIN gold AS g ON g.prompt_id = p.id
WHERE NOT EXISTS (SELECT 1 FROM task_state AS s WHERE s.prompt_id = p.id AND s.labeler_id = :me)
  AND CASE WHEN g.prompt_id IS NOT NULL THEN :gold_every > 0 ELSE :overlap > (
    SELECT count(*) FROM task_state AS s
    WHERE s.prompt_id = p.id AND CASE WHEN s.kind IS NULL THEN s.touched > :stale ELSE s.kind != 'skip' END) END
"""

# Over rows of task_state.
COUNTS = """
count(*) FILTER (WHERE kind IN ('submit', 'edit')) AS ranked,
count(*) FILTER (WHERE kind = 'skip') AS skipped,
count(*) FILTER (WHERE kind = 'flag') AS flagged
"""


class ConflictError(UserError):
    """Something else was stored in between, by another tab most often."""


class NotAssignedError(UserError):
    """The labeler has no such task."""


@dataclass(frozen=True)
class Task:
    """A prompt as one labeler sees it; no model name, no gold ranking.

    `responses` are letter and text by id, in this labeler's fixed order, `answer` is where the labeler left off, with
    a review of each, `revision` the id of the last event (0: none) and `standing` what counts now: None while open,
    else submit, edit, skip or flag.
    """

    prompt_id: str
    messages: list[dict]
    responses: dict[str, tuple[str, str]]
    answer: Answer
    revision: int
    standing: str | None
    has_draft: bool
    active_seconds: float


def standing_answers(db: sqlite3.Connection, *kinds: str) -> list[sqlite3.Row]:
    """The answers of these kinds that count, in the order the prompts were imported, then by labeler: rows of `event`
    with the prompt's `sample_id` and `messages`, the order `shown`, the task's `seconds` and `gold` tiers or None. Of
    prompts with the same `sample_id`, which come from several files, those after the first get a number."""
    return db.execute(
        "SELECT e.*, p.sample_id || iif(p.n > 1, '-' || p.n, '') AS sample_id, p.messages, l.name AS labeler, a.shown,"
        " s.active_seconds AS seconds, g.tiers AS gold FROM task_state AS s JOIN event AS e ON e.id = s.event_id"
        " JOIN (SELECT *, row_number() OVER (PARTITION BY sample_id ORDER BY position) AS n FROM prompt) AS p"
        " ON p.id = s.prompt_id"
        " JOIN labeler AS l ON l.id = s.labeler_id JOIN assignment AS a USING (prompt_id, labeler_id)"
        " LEFT JOIN gold AS g ON g.prompt_id = p.id"
        f" WHERE s.kind IN ({', '.join('?' * len(kinds))}) ORDER BY p.position, l.name",
        kinds,
    ).fetchall()


def stored_answer(db: sqlite3.Connection, event: sqlite3.Row) -> Answer:
    """The content of an `event` row (an undo has none)."""
    reviews = db.execute("SELECT * FROM review WHERE event_id = ?", (event["id"],))
    return Answer(
        json.loads(event["tiers"]),
        {r["response_id"]: Review(r["justification"], r["rating"], json.loads(r["flags"])) for r in reviews},
        event["comment"],
    )


class Store(Database):
    """`overlap` labelers rank each prompt; one task in `gold_every` is an attention task (0: none);
    `justifications` is required, optional or off."""

    def __init__(self, path, create=False, overlap=1, gold_every=10, justifications="required", guidelines=""):
        super().__init__(path, create)
        self.overlap, self.gold_every, self.justifications = overlap, gold_every, justifications
        self.guidelines, self.guideline_version = guidelines, None
        if guidelines:
            with self.transaction(write=True) as db:
                db.execute("INSERT OR IGNORE INTO guideline (text) VALUES (?)", (guidelines,))
                version = db.execute("SELECT version FROM guideline WHERE text = ?", (guidelines,)).fetchone()
                self.guideline_version = version["version"]

    def add_tasks(self, tasks: list[SampledPrompt], source: str) -> int:
        """Adds the new ones, all or none, and returns how many. A `gold` ranking makes its prompt an attention task.

        Raises:
            UserError: a prompt has two different gold rankings, or was changed since it was added from this `source`.
        """
        added, present = 0, {task.id for task in tasks}
        with self.transaction(write=True) as db:
            for task in tasks:
                is_new = db.execute(
                    "INSERT OR IGNORE INTO prompt (id, sample_id, messages, source) VALUES (?, ?, ?, ?)",
                    (task.id, task.sample_id, json.dumps(task.messages), source),
                ).rowcount
                if is_new:
                    added += 1
                    _refuse_corrected(db, task, source, present)
                    for r in task.responses:
                        values = (r.id, task.id, r.sample_id, r.text, r.model, json.dumps(r.sampling))
                        db.execute("INSERT INTO response VALUES (?, ?, ?, ?, ?, ?)", values)
                if task.gold:
                    tiers = json.dumps([sorted(tier) for tier in task.gold])
                    db.execute("INSERT OR IGNORE INTO gold VALUES (?, ?)", (task.id, tiers))
                    known = db.execute("SELECT tiers FROM gold WHERE prompt_id = ?", (task.id,)).fetchone()
                    if known["tiers"] != tiers:
                        raise UserError(f"{source}: {task.sample_id!r} has two different gold rankings; keep one")
        return added

    def size(self) -> dict[str, int]:
        with self.transaction() as db:
            return {t: db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("prompt", "gold", "labeler")}

    def next_task(self, labeler_id: int) -> Task | None:
        """The labeler's oldest open task, else a new one; None when nothing is left."""
        open_task = (
            "SELECT s.prompt_id AS id FROM task_state AS s JOIN assignment AS a USING (prompt_id, labeler_id)"
            " WHERE s.labeler_id = ? AND s.kind IS NULL ORDER BY a.assigned_at LIMIT 1"
        )
        with self.transaction() as db:
            task = db.execute(open_task, (labeler_id,)).fetchone()
            available = [] if task else self._available(db, labeler_id)
        if not available:
            return self.task(labeler_id, task["id"]) if task else None
        with self.transaction(write=True) as db:  # the long search let others write: which is still to be had?
            id = next((id for id in available if self._available(db, labeler_id, id)), None)
            if id and not db.execute(open_task, (labeler_id,)).fetchone():
                values = (id, labeler_id, json.dumps(self._unused_order(db, id)), time.time())
                db.execute("INSERT INTO assignment VALUES (?, ?, ?, ?)", values)
        return self.next_task(labeler_id)

    def _available(self, db, labeler_id, only=None):
        """Ids of the prompts that the labeler can be given, the next one first (of `only` this prompt, if given).

        One unforeseeable task in every `gold_every` is an attention task; those left over come last, so that the count
        of tasks left goes down evenly and gives none of them away.
        """
        given = db.execute("SELECT count(*) FROM task_state WHERE labeler_id = ?", (labeler_id,)).fetchone()[0]
        block, place = divmod(given, self.gold_every or 1)
        values = {
            "me": labeler_id,
            "overlap": self.overlap,
            "stale": time.time() - LEASE_SECONDS,
            "gold_every": self.gold_every,
            "gold_turn": place == random.Random(f"{labeler_id} {block}").randrange(self.gold_every or 1),
            "only": only,
        }
        query = _AVAILABLE + ("AND p.id = :only " if only else "")
        query += "ORDER BY (g.prompt_id IS NOT NULL) != :gold_turn, p.position"
        return [id for (id,) in db.execute(query, values)]

    def _unused_order(self, db, prompt_id):
        """A random order, while possible one that no other labeler of this prompt sees."""
        rows = db.execute("SELECT shown FROM assignment WHERE prompt_id = ?", (prompt_id,))
        used = [json.loads(row["shown"]) for row in rows]
        order = [row["id"] for row in db.execute("SELECT id FROM response WHERE prompt_id = ?", (prompt_id,))]
        for _ in range(200):
            random.SystemRandom().shuffle(order)
            if order not in used:
                break
        return order

    def task(self, labeler_id: int, prompt_id: str) -> Task:
        """A task the labeler has been given before, with the content it was left with."""
        with self.transaction() as db:
            state = self._state(db, labeler_id, prompt_id)
            texts = dict(db.execute("SELECT id, text FROM response WHERE prompt_id = ?", (prompt_id,)).fetchall())
            shown = json.loads(state["shown"])
            newest_first = "SELECT * FROM event WHERE prompt_id = ? AND labeler_id = ? ORDER BY id DESC"
            events = {event["id"]: event for event in db.execute(newest_first, (prompt_id, labeler_id))}
            content = next((event for event in events.values() if event["kind"] != "undo"), None)
            has_draft = content is not None and content["kind"] == "draft"
            revision = max(events, default=0)
            if content and not has_draft:
                # The answer that counts; after an undo with nothing before it, the undone answer, to be changed.
                content = events[state["event_id"] or events[revision]["undoes"]]
            answer = stored_answer(db, content) if content else Answer([[id] for id in shown])
            answer.reviews = {id: Review() for id in shown} | answer.reviews
            return Task(
                prompt_id=prompt_id,
                messages=json.loads(state["messages"]),
                responses={id: (letter, texts[id]) for letter, id in zip(ascii_uppercase, shown, strict=False)},
                answer=answer,
                revision=revision,
                standing=state["kind"],
                has_draft=has_draft,
                active_seconds=state["active_seconds"],
            )

    @staticmethod
    def _state(db, labeler_id, prompt_id):
        state = db.execute(
            "SELECT s.*, a.shown, p.messages FROM task_state AS s JOIN assignment AS a USING (prompt_id, labeler_id)"
            " JOIN prompt AS p ON p.id = s.prompt_id WHERE s.labeler_id = ? AND s.prompt_id = ?",
            (labeler_id, prompt_id),
        ).fetchone()
        if state is None:
            raise NotAssignedError("you have no such task")
        return state

    def record(self, labeler_id: int, sent: Submission) -> int:
        """Stores an answer and returns its event id; the same key again stores nothing and returns the same id.

        Raises:
            AnswerError: incomplete or malformed. NotAssignedError: not this labeler's task.
            ConflictError: the task has changed since the revision, or the key was used for something else.
        """
        request = json.dumps([labeler_id, asdict(sent)], sort_keys=True)
        digest = hashlib.sha256(request.encode()).hexdigest()
        with self.transaction(write=True) as db:
            known = db.execute("SELECT id, digest FROM event WHERE key = ?", (sent.key,)).fetchone()
            if known and known["digest"] != digest:
                raise ConflictError("this request's key was used before, for something else")
            if known:
                return known["id"]
            state = self._state(db, labeler_id, sent.prompt_id)
            check(sent.answer, sent.action, json.loads(state["shown"]), self.justifications)
            last = "SELECT coalesce(max(id), 0) FROM event WHERE prompt_id = ? AND labeler_id = ?"
            if sent.revision != db.execute(last, (sent.prompt_id, labeler_id)).fetchone()[0]:
                raise ConflictError("this task was changed in another tab or window: reload to see what is stored")
            is_edit = sent.action == "submit" and state["kind"] in ("submit", "edit")
            event = {
                "prompt_id": sent.prompt_id,
                "labeler_id": labeler_id,
                "kind": "edit" if is_edit else sent.action,
                "tiers": json.dumps(sent.answer.tiers),
                "comment": _seen(sent.answer.comment),
                # no more than has passed since the labeler's last event
                "active_seconds": max(0.0, min(sent.active_seconds, time.time() - state["touched"])),
                "key": sent.key,
                "digest": digest,
                "guideline_version": self.guideline_version,
                "server_time": time.time(),
                "client_time": sent.client_time,
            }
            names = ", ".join(event)
            insert = f"INSERT INTO event ({names}) VALUES ({', '.join('?' * len(event))})"
            event_id = db.execute(insert, [*event.values()]).lastrowid
            for id, review in sent.answer.reviews.items():
                flags = json.dumps(list(dict.fromkeys(review.flags)))  # each once
                values = (event_id, id, _seen(review.justification), review.rating, flags)
                db.execute("INSERT INTO review VALUES (?, ?, ?, ?, ?)", values)
        return event_id

    def undo(self, labeler_id: int, event_id: int, key: str) -> str:
        """Takes back an answer that counts, so that the one before it counts again; returns its prompt's id."""
        undone = "SELECT prompt_id FROM event WHERE undoes = :event AND labeler_id = :me AND key = :key"
        version, now = self.guideline_version, time.time()
        values = {"event": event_id, "me": labeler_id, "key": key, "now": now, "version": version}
        with self.transaction(write=True) as db:
            if not db.execute(undone, values).fetchone():
                db.execute(
                    "INSERT INTO event (prompt_id, labeler_id, kind, undoes, comment, active_seconds, key, digest,"
                    " server_time, guideline_version) SELECT prompt_id, labeler_id, 'undo', id, '', 0, :key, '', :now,"
                    " :version FROM standing WHERE id = :event AND labeler_id = :me",
                    values,
                )
            found = db.execute(undone, values).fetchone()
        if found is None:
            raise ConflictError("that answer does not stand any more: nothing was undone")
        return found["prompt_id"]

    def progress(self, labeler_id: int) -> dict:
        """How many tasks the labeler has `ranked`, `skipped`, `flagged` and `left`, the active `seconds` spent on all,
        and the event (`last`) and its kind (`last_kind`) that undo would take back, or None."""
        with self.transaction() as db:
            done = db.execute(
                f"SELECT {COUNTS}, count(*) FILTER (WHERE kind IS NULL) AS left, total(active_seconds) AS seconds,"
                " max(event_id) AS last, kind AS last_kind FROM task_state WHERE labeler_id = ?",
                (labeler_id,),
            ).fetchone()
            return dict(done) | {"left": done["left"] + len(self._available(db, labeler_id))}

    def history(self, labeler_id: int, before: int = MAX_ID, limit: int = MAX_ID) -> list[sqlite3.Row]:
        """The labeler's answers that stand, newest first, and earlier than event `before`: `id` of the event,
        `prompt_id`, `kind`, `text` of the last message."""
        with self.transaction() as db:
            return db.execute(
                "SELECT s.id, s.prompt_id, s.kind, json_extract(p.messages, '$[#-1].content') AS text"
                " FROM standing AS s JOIN prompt AS p ON p.id = s.prompt_id"
                " WHERE s.labeler_id = ? AND s.id < ? ORDER BY s.id DESC LIMIT ?",
                (labeler_id, before, limit),
            ).fetchall()


def _refuse_corrected(db, task, source, present):
    """A row that was corrected keeps its id and has other texts: added, it would be a second task under that id. Where
    ids are line numbers, a line that moved is told from one that was changed by its text, `present` elsewhere."""
    same_id = "SELECT id FROM prompt WHERE source = ? AND sample_id = ?"
    for (id,) in db.execute(same_id, (source, task.sample_id)):
        if id not in present:
            raise UserError(
                f"{source}: {task.sample_id!r} has other texts than when it was added. People may have ranked those:"
                " give the corrected row another id, or start another --database"
            )


def _seen(text):
    """A text of which nothing can be seen is none."""
    return "" if is_blank(text) else text
