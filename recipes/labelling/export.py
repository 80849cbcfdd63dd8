"""Submitted rankings as training data: one JSON object per prompt and labeler."""

import json
import shlex
from collections import Counter, defaultdict
from itertools import count
from math import comb
from pathlib import Path
from typing import NamedTuple

from recipes.cli.errors import UserError
from recipes.labelling.answers import Answer, Review, ranks_of
from recipes.labelling.database import Database
from recipes.labelling.files import new_file
from recipes.labelling.store import stored_answer


class Ranking(NamedTuple):
    """A ranking that counts: whose prompt it is, whether that is an attention task, and what is exported of it."""

    prompt_id: str
    is_gold: bool
    row: dict


def read_rankings(database: Database) -> list[Ranking]:
    """In the order the prompts were imported, then by labeler."""
    with database.transaction() as db:
        responses = defaultdict(list)
        for response in db.execute("SELECT * FROM response ORDER BY rowid"):
            responses[response["prompt_id"]].append(response)
        rows = db.execute(
            "SELECT c.*, p.sample_id, p.messages, l.name, s.active_seconds AS seconds,"
            " EXISTS (SELECT 1 FROM gold AS g WHERE g.prompt_id = p.id) AS is_gold FROM current_ranking AS c"
            " JOIN task_state AS s ON s.event_id = c.id JOIN prompt AS p ON p.id = c.prompt_id"
            " JOIN labeler AS l ON l.id = c.labeler_id ORDER BY p.position, l.name"
        ).fetchall()
        return [
            Ranking(
                prompt_id=row["prompt_id"],
                is_gold=bool(row["is_gold"]),
                row=ranking_row(row, stored_answer(db, row), responses[row["prompt_id"]]),
            )
            for row in rows
        ]


def ranking_row(event, answer: Answer, shown: list) -> dict:
    """The row that is exported: equal `rank` is a tie, 1 is best; what was not given is left out.

    `event` and `shown` (the responses) are rows of the database.
    """
    ranks = ranks_of(answer.tiers)
    responses = []
    for response in sorted(shown, key=lambda response: ranks[response["id"]]):
        review = answer.reviews.get(response["id"], Review())
        responses.append(
            {"id": response["sample_id"], "text": response["text"], "rank": ranks[response["id"]]}
            | _given(rating=review.rating, flags=review.flags, model=response["model"])
            | _given(justification=review.justification.strip())
        )
    return {
        "id": f"{event['sample_id']}:{event['name']}",
        "prompt_id": event["sample_id"],
        "prompt": json.loads(event["messages"]),
        "responses": responses,
        "annotator": event["name"],
        **_given(justification=answer.comment.strip()),
        "seconds": round(event["seconds"], 1),
        **_given(guideline_version=event["guideline_version"]),
    }


def export_command(database: Path) -> str:
    """The command that exports to a new file beside the database."""
    names = (f"rankings{number or ''}.jsonl" for number in count())
    output = next(path for name in names if not (path := database.with_name(name)).exists())
    return shlex.join(
        ["python", "scripts/rank_responses.py", "export", "--database", str(database), "--output", str(output)]
    )


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
    rankings = [ranking for ranking in everything if include_gold or not ranking.is_gold]
    if not rankings:
        raise UserError(f"{database.path}: no submitted rankings to export; nothing was written")
    with new_file(output) as part:
        lines = (json.dumps(ranking.row, ensure_ascii=False) + "\n" for ranking in rankings)
        part.write_text("".join(lines), encoding="utf-8")

    tiers = [Counter(response["rank"] for response in ranking.row["responses"]) for ranking in rankings]
    tied = sum(comb(size, 2) for counts in tiers for size in counts.values())
    return {
        "rankings": len(rankings),
        "prompts": len({ranking.prompt_id for ranking in rankings}),
        "labelers": len({ranking.row["annotator"] for ranking in rankings}),
        "pairs": sum(comb(counts.total(), 2) for counts in tiers) - tied,
        "tied_pairs": tied,
        "all_tied": sum(len(counts) == 1 for counts in tiers),
        "gold_left_out": len(everything) - len(rankings),
    }
