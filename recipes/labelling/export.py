"""Submitted rankings as training data: one JSON object per prompt and labeler."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from recipes.cli.errors import UserError
from recipes.labelling.answers import Answer, Review, ranks_of
from recipes.labelling.database import Database
from recipes.labelling.files import new_file
from recipes.labelling.store import stored_answer
from recipes.labelling.tasks import Response, SampledPrompt


@dataclass(frozen=True)
class Ranking:
    """A ranking that counts, with all that is exported of it."""

    prompt: SampledPrompt
    annotator: str
    answer: Answer
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
            "SELECT c.*, p.sample_id, p.messages, l.name, s.active_seconds AS seconds FROM current_ranking AS c"
            " JOIN task_state AS s ON s.event_id = c.id JOIN prompt AS p ON p.id = c.prompt_id"
            " JOIN labeler AS l ON l.id = c.labeler_id ORDER BY p.position, l.name"
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
                active_seconds=row["seconds"],
                guideline_version=row["guideline_version"],
            )
            for row in rows
        ]


def ranking_row(ranking: Ranking) -> dict:
    """The row that is exported: equal `rank` is a tie, 1 is best; what was not given is left out."""
    ranks = ranks_of(ranking.answer.tiers)
    responses = []
    for response in sorted(ranking.prompt.responses, key=lambda response: ranks[response.id]):
        review = ranking.answer.reviews.get(response.id, Review())
        responses.append(
            {"id": response.sample_id, "text": response.text, "rank": ranks[response.id]}
            | _given(rating=review.rating, flags=list(review.flags), model=response.model)
            | _given(justification=review.justification.strip())
        )
    return {
        "id": f"{ranking.prompt.sample_id}:{ranking.annotator}",
        "prompt_id": ranking.prompt.sample_id,
        "prompt": ranking.prompt.messages,
        "responses": responses,
        "annotator": ranking.annotator,
        **_given(justification=ranking.answer.comment.strip()),
        "seconds": round(ranking.active_seconds, 1),
        **_given(guideline_version=ranking.guideline_version),
    }


def _given(**values):
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def export(database: Database, output: str | Path, include_gold: bool = False) -> dict[str, int]:
    """Writes the rankings that count to a new file; rankings of gold tasks only when asked for.

    Returns counts: `rankings`, `prompts`, `labelers`, `pairs` (strict ones: what a reward model can learn from),
    `tied_pairs`, `all_tied` (rankings without any pair) and `gold_left_out`.

    Raises:
        UserError: nothing to export, or `output` exists.
    """
    everything = read_rankings(database)
    rankings = [ranking for ranking in everything if include_gold or ranking.prompt.gold is None]
    if not rankings:
        raise UserError(f"{database.path}: no submitted rankings to export; nothing was written")
    lines = [json.dumps(ranking_row(ranking), ensure_ascii=False) + "\n" for ranking in rankings]
    with new_file(output) as part:
        part.write_text("".join(lines), encoding="utf-8")

    counts = Counter(gold_left_out=len(everything) - len(rankings), tied_pairs=0, pairs=0, all_tied=0)
    for ranking in rankings:
        ranks = ranks_of(ranking.answer.tiers)
        ties = sum(ranks[a] == ranks[b] for a, b in combinations(ranks, 2))
        counts["tied_pairs"] += ties
        counts["pairs"] += len(ranks) * (len(ranks) - 1) // 2 - ties
        counts["all_tied"] += len(ranking.answer.tiers) == 1
    return {
        "rankings": len(rankings),
        "prompts": len({ranking.prompt.id for ranking in rankings}),
        "labelers": len({ranking.annotator for ranking in rankings}),
        **counts,
    }
