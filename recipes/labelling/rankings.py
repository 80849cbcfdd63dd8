"""Reads the submitted rankings that count, for export and for agreement."""

import json
from dataclasses import dataclass

from recipes.labelling.answers import Answer
from recipes.labelling.database import Database
from recipes.labelling.store import stored_answer
from recipes.labelling.tasks import Response, SampledPrompt


@dataclass(frozen=True)
class Ranking:
    """A ranking with all that is known about it. `shown` is the order of response ids on the labeler's screen."""

    prompt: SampledPrompt
    annotator: str
    answer: Answer
    shown: list[str]
    active_seconds: float
    guideline_version: int | None


def read_rankings(database: Database) -> list[Ranking]:
    """In the order the prompts were imported, then by labeler."""
    with database.transaction() as db:
        responses = {}
        for r in db.execute("SELECT * FROM response ORDER BY rowid"):
            response = Response(r["id"], r["sample_id"], r["text"], r["model"], json.loads(r["sampling"]))
            responses.setdefault(r["prompt_id"], []).append(response)
        gold = {row["prompt_id"]: json.loads(row["tiers"]) for row in db.execute("SELECT * FROM gold")}
        rows = db.execute(
            "SELECT c.*, p.sample_id, p.messages, a.shown, l.name, (SELECT total(active_seconds) FROM event AS e"
            " WHERE e.prompt_id = c.prompt_id AND e.labeler_id = c.labeler_id) AS seconds"
            " FROM current_ranking AS c JOIN prompt AS p ON p.id = c.prompt_id JOIN labeler AS l"
            " ON l.id = c.labeler_id JOIN assignment AS a ON a.prompt_id = c.prompt_id"
            " AND a.labeler_id = c.labeler_id ORDER BY p.position, l.name"
        ).fetchall()
        return [
            Ranking(
                prompt=SampledPrompt(
                    row["prompt_id"],
                    row["sample_id"],
                    json.loads(row["messages"]),
                    responses[row["prompt_id"]],
                    gold.get(row["prompt_id"]),
                ),
                annotator=row["name"],
                answer=stored_answer(db, row),
                shown=json.loads(row["shown"]),
                active_seconds=row["seconds"],
                guideline_version=row["guideline_version"],
            )
            for row in rows
        ]
