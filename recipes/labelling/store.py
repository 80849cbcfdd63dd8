"""Everything a labelling job knows: which prompt goes to whom, what was answered, and what counts.

Functions that store something return after the commit; what they return is safe.
"""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass

from recipes.cli.errors import UserError
from recipes.labelling.answers import Answer, Review, check
from recipes.labelling.database import Database
from recipes.labelling.tasks import SampledPrompt

MAX_ID = 2**63 - 1  # the largest integer that SQLite keeps
LEASE_SECONDS = 3600  # an open task that nobody touches for this long is offered to somebody else

# Prompts that labeler :me has not met and that fewer than :overlap people have answered or are working on.
_AVAILABLE = """
FROM prompt AS p
WHERE NOT EXISTS (SELECT 1 FROM gold AS g WHERE g.prompt_id = p.id)
  AND NOT EXISTS (SELECT 1 FROM task_state AS s WHERE s.prompt_id = p.id AND s.labeler_id = :me)
  AND :overlap > (
    SELECT count(*) FROM task_state AS s
    WHERE s.prompt_id = p.id AND CASE WHEN s.kind IS NULL THEN s.touched > :stale ELSE s.kind != 'skip' END)
"""

_UNSEEN_GOLD = """
FROM prompt AS p JOIN gold AS g ON g.prompt_id = p.id
WHERE NOT EXISTS (SELECT 1 FROM task_state AS s WHERE s.prompt_id = p.id AND s.labeler_id = :me)
"""


class ConflictError(UserError):
    """Something else was stored in between, by another tab most often."""


class NotAssignedError(UserError):
    """The labeler has no such task."""


@dataclass(frozen=True)
class Task:
    """A prompt as one labeler sees it; no model name, no gold ranking.

    `responses` are (id, text) in this labeler's fixed order, `answer` is where the labeler left off, `revision` the id
    of the last event (0: none) and `standing` what counts now: None while open, else submit, edit, skip or flag.
    """

    prompt_id: str
    messages: list[dict]
    responses: list[tuple[str, str]]
    answer: Answer
    revision: int
    standing: str | None
    has_draft: bool
    active_seconds: float


def stored_answer(db, event) -> Answer:
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
        self.guidelines = guidelines
        self.guideline_version = self._guideline_version(guidelines) if guidelines else None

    def _guideline_version(self, text):
        with self.transaction(write=True) as db:
            db.execute("INSERT OR IGNORE INTO guideline (text) VALUES (?)", (text,))
            return db.execute("SELECT version FROM guideline WHERE text = ?", (text,)).fetchone()["version"]

    def add_tasks(self, tasks: list[SampledPrompt], source: str) -> int:
        """Adds the new ones, all or none, and returns how many. A `gold` ranking makes its prompt an attention task.

        Raises:
            UserError: a prompt has two different gold rankings, or was changed since it was added from this `source`.
        """
        added, present = 0, {task.id for task in tasks}
        with self.transaction(write=True) as db:
            for task in tasks:
                if not db.execute("SELECT 1 FROM prompt WHERE id = ?", (task.id,)).fetchone():
                    _refuse_corrected(db, task, source, present)
                    db.execute(
                        "INSERT INTO prompt (id, sample_id, messages, source) VALUES (?, ?, ?, ?)",
                        (task.id, task.sample_id, json.dumps(task.messages), source),
                    )
                    for r in task.responses:
                        values = (r.id, task.id, r.sample_id, r.text, r.model, json.dumps(r.sampling))
                        db.execute("INSERT INTO response VALUES (?, ?, ?, ?, ?, ?)", values)
                    added += 1
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

    def has_tasks(self, labeler_id: int) -> bool:
        """Whether the labeler has ever been given one."""
        with self.transaction() as db:
            return bool(db.execute("SELECT 1 FROM task_state WHERE labeler_id = ?", (labeler_id,)).fetchone())

    def next_task(self, labeler_id: int) -> Task | None:
        """The labeler's oldest open task, else a new one; None when nothing is left."""
        oldest_open = (
            "SELECT s.prompt_id FROM task_state AS s JOIN assignment AS a USING (prompt_id, labeler_id)"
            " WHERE s.labeler_id = ? AND s.kind IS NULL ORDER BY a.assigned_at LIMIT 1"
        )
        with self.transaction() as db:
            row = db.execute(oldest_open, (labeler_id,)).fetchone()
            found = None if row else self._find(db, labeler_id)
        if found:  # searched while others could write: looked at again, from there on, while they wait
            with self.transaction(write=True) as db:
                row = db.execute(oldest_open, (labeler_id,)).fetchone()
                if row is None and (
                    free := self._find(db, labeler_id, found["position"]) or self._find(db, labeler_id)
                ):
                    row, shown = free, json.dumps(self._unused_order(db, free["prompt_id"]))
                    values = (row["prompt_id"], labeler_id, shown, time.time())
                    db.execute("INSERT INTO assignment VALUES (?, ?, ?, ?)", values)
        return self.task(labeler_id, row["prompt_id"]) if row else None

    def _find(self, db, labeler_id, position=0):
        for pool in self._pools(db, labeler_id):
            find = f"SELECT p.id AS prompt_id, p.position {pool} AND p.position >= :from ORDER BY p.position LIMIT 1"
            if row := db.execute(find, self._availability(labeler_id) | {"from": position}).fetchone():
                return row

    def _availability(self, labeler_id):
        return {"me": labeler_id, "overlap": self.overlap, "stale": time.time() - LEASE_SECONDS}

    def _pools(self, db, labeler_id):
        """Where to look for a task, in this order. One unforeseeable task in every `gold_every` is an attention task;
        those left over come last, so that the count of tasks left goes down evenly and gives none of them away."""
        if not self.gold_every:
            return [_AVAILABLE]
        done = db.execute("SELECT count(*) FROM task_state WHERE labeler_id = ?", (labeler_id,)).fetchone()[0]
        block, place = divmod(done, self.gold_every)
        is_gold_turn = place == random.Random(f"{labeler_id} {block}").randrange(self.gold_every)
        return [_UNSEEN_GOLD, _AVAILABLE] if is_gold_turn else [_AVAILABLE, _UNSEEN_GOLD]

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
        key = (prompt_id, labeler_id)
        with self.transaction() as db:
            row = db.execute(
                "SELECT p.messages, a.shown, s.kind, s.event_id, s.active_seconds FROM assignment AS a"
                " JOIN task_state AS s USING (prompt_id, labeler_id) JOIN prompt AS p ON p.id = a.prompt_id"
                " WHERE a.prompt_id = ? AND a.labeler_id = ?",
                key,
            ).fetchone()
            if row is None:
                raise NotAssignedError("you have no such task")
            shown = json.loads(row["shown"])
            texts = dict(db.execute("SELECT id, text FROM response WHERE prompt_id = ?", (prompt_id,)).fetchall())
            events = "SELECT * FROM event WHERE prompt_id = ? AND labeler_id = ?"
            last = db.execute(f"{events} ORDER BY id DESC LIMIT 1", key).fetchone()
            content = last
            if last is not None and last["kind"] == "undo":
                # What was changed since the undone answer stays on the screen. Else back to what counts again; with
                # nothing before it, the undone answer stays to be changed.
                content = db.execute(f"{events} AND kind != 'undo' ORDER BY id DESC LIMIT 1", key).fetchone()
                if content["kind"] != "draft":
                    event_id = row["event_id"] or last["undoes"]
                    content = db.execute("SELECT * FROM event WHERE id = ?", (event_id,)).fetchone()
            return Task(
                prompt_id=prompt_id,
                messages=json.loads(row["messages"]),
                responses=[(id, texts[id]) for id in shown],
                answer=stored_answer(db, content) if content else Answer([[id] for id in shown]),
                revision=last["id"] if last else 0,
                standing=row["kind"],
                has_draft=bool(content) and content["kind"] == "draft",
                active_seconds=row["active_seconds"],
            )

    def record(
        self,
        labeler_id: int,
        prompt_id: str,
        action: str,
        answer: Answer,
        key: str,
        revision: int | None = None,
        active_seconds: float = 0.0,
        client_time: float | None = None,
    ) -> int:
        """Stores an answer and returns its event id; the same `key` again stores nothing and returns the same id.

        `revision` is the event the labeler's screen was based on (None: do not check). `active_seconds` since the last
        event counts up to the time that has really passed.

        Raises:
            AnswerError: incomplete or malformed. NotAssignedError: not this labeler's task.
            ConflictError: the task has changed since `revision`, or `key` was used for something else.
        """
        digest = answer.digest(labeler_id, prompt_id, action)
        with self.transaction(write=True) as db:
            if (stored := self._replayed(db, key, digest)) is not None:
                return stored
            state = self._state(db, prompt_id, labeler_id)
            check(answer, action, json.loads(state["shown"]), self.justifications)
            last = "SELECT coalesce(max(id), 0) FROM event WHERE prompt_id = ? AND labeler_id = ?"
            if revision not in (None, db.execute(last, (prompt_id, labeler_id)).fetchone()[0]):
                raise ConflictError("this task was changed in another tab or window: reload to see what is stored")
            kind = "edit" if action == "submit" and state["kind"] in ("submit", "edit") else action
            event_id = self._insert_event(
                db,
                prompt_id=prompt_id,
                labeler_id=labeler_id,
                kind=kind,
                tiers=json.dumps(answer.tiers),
                comment=answer.comment,
                active_seconds=_credible(active_seconds, state),
                key=key,
                digest=digest,
                client_time=client_time,
            )
            db.executemany(
                "INSERT INTO review VALUES (?, ?, ?, ?, ?)",
                [(event_id, id, r.justification, r.rating, json.dumps(r.flags)) for id, r in answer.reviews.items()],
            )
        return event_id

    def add_reading(self, labeler_id: int, prompt_id: str, active_seconds: float) -> None:
        """Counts time that was spent on a task without changing anything; what is stored of it stays the same."""
        with self.transaction(write=True) as db:
            state = self._state(db, prompt_id, labeler_id)
            seconds = _credible(active_seconds, state)
            db.execute("INSERT INTO reading VALUES (?, ?, ?, ?)", (prompt_id, labeler_id, seconds, time.time()))

    @staticmethod
    def _state(db, prompt_id, labeler_id):
        state = db.execute(
            "SELECT s.kind, s.touched, a.shown FROM task_state AS s JOIN assignment AS a USING (prompt_id, labeler_id)"
            " WHERE s.prompt_id = ? AND s.labeler_id = ?",
            (prompt_id, labeler_id),
        ).fetchone()
        if state is None:
            raise NotAssignedError("you have no such task")
        return state

    def undo(self, labeler_id: int, event_id: int, key: str) -> str:
        """Takes back an answer that counts, so that the one before it counts again; returns its prompt's id."""
        digest = Answer([]).digest(labeler_id, event_id, "undo")
        with self.transaction(write=True) as db:
            prompt = db.execute("SELECT prompt_id FROM event WHERE id = ?", (event_id,)).fetchone()
            if self._replayed(db, key, digest) is None:
                mine = "SELECT 1 FROM standing WHERE id = ? AND labeler_id = ?"
                if db.execute(mine, (event_id, labeler_id)).fetchone() is None:
                    raise ConflictError("that answer does not stand any more: nothing was undone")
                self._insert_event(
                    db,
                    prompt_id=prompt["prompt_id"],
                    labeler_id=labeler_id,
                    kind="undo",
                    undoes=event_id,
                    comment="",
                    active_seconds=0.0,
                    key=key,
                    digest=digest,
                )
        return prompt["prompt_id"]

    @staticmethod
    def _replayed(db, key, digest):
        row = db.execute("SELECT id, digest FROM event WHERE key = ?", (key,)).fetchone()
        if row and row["digest"] != digest:
            raise ConflictError("this request's key was used before, for something else")
        return row["id"] if row else None

    def _insert_event(self, db, **columns):
        columns |= {"guideline_version": self.guideline_version, "server_time": time.time()}
        names, marks = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        return db.execute(f"INSERT INTO event ({names}) VALUES ({marks})", columns).lastrowid

    def progress(self, labeler_id: int) -> dict:
        """How many tasks the labeler has `ranked`, `skipped`, `flagged` and `left`, the `active_seconds` spent on all,
        and `last`: the (event id, kind) that undo would take back, or None."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT coalesce(kind, 'open') AS kind, count(*) AS tasks, max(event_id) AS last,"
                " total(active_seconds) AS seconds FROM task_state WHERE labeler_id = ? GROUP BY kind",
                (labeler_id,),
            ).fetchall()
            tasks = Counter({row["kind"]: row["tasks"] for row in rows})
            args = self._availability(labeler_id)
            new = [db.execute(f"SELECT count(*) {pool}", args).fetchone()[0] for pool in self._pools(db, labeler_id)]
        last = max((row["last"], row["kind"]) for row in [*rows, {"last": 0, "kind": None}] if row["last"] is not None)
        return {
            "ranked": tasks["submit"] + tasks["edit"],
            "skipped": tasks["skip"],
            "flagged": tasks["flag"],
            "left": tasks["open"] + sum(new),
            "active_seconds": sum(row["seconds"] for row in rows),
            "last": last if last[0] else None,
        }

    def history(self, labeler_id: int, before: int = MAX_ID, limit: int = MAX_ID) -> list[dict]:
        """The labeler's answers that stand, newest first, and earlier than event `before`: `id` of the event,
        `prompt_id`, `kind`, `messages`, `server_time`."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT s.id, s.prompt_id, s.kind, s.server_time, p.messages FROM standing AS s"
                " JOIN prompt AS p ON p.id = s.prompt_id WHERE s.labeler_id = ? AND s.id < ?"
                " ORDER BY s.id DESC LIMIT ?",
                (labeler_id, before, limit),
            ).fetchall()
        return [dict(row) | {"messages": json.loads(row["messages"])} for row in rows]


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


def _credible(active_seconds, state):
    """No more than has passed since the labeler's last request."""
    return max(0.0, min(active_seconds, time.time() - state["touched"]))
