"""Submitted rankings as training data: one JSON object per prompt and labeler."""

import json
import shlex
from collections import Counter
from itertools import count
from math import comb
from pathlib import Path

from recipes.cli.errors import UserError
from recipes.labelling.answers import Review, ranks_of
from recipes.labelling.database import Database
from recipes.labelling.files import new_file
from recipes.labelling.store import standing_answers, stored_answer


def export(database: Database, output: str | Path, include_gold: bool = False) -> dict[str, int]:
    """Writes the rankings that count to a new file; rankings of attention tasks only when asked for.

    Returns counts: `rankings`, `prompts`, `labelers`, `pairs` (strict ones: what a reward model can learn from),
    `tied_pairs`, `all_tied` (rankings without any pair) and `gold_left_out`.

    Raises:
        UserError: nothing to export, or `output` exists.
    """
    with database.transaction() as db:
        everything = standing_answers(db, "submit", "edit")
        rankings = [ranking for ranking in everything if include_gold or ranking["gold"] is None]
        rows = [_row(db, ranking) for ranking in rankings]
    if not rows:
        raise UserError(f"{database.path}: no submitted rankings to export; nothing was written")
    with new_file(output) as part:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    ranks = [Counter(response["rank"] for response in row["responses"]) for row in rows]
    tied = sum(comb(responses, 2) for ranking in ranks for responses in ranking.values())
    return {
        "rankings": len(rankings),
        "prompts": len({ranking["prompt_id"] for ranking in rankings}),
        "labelers": len({ranking["labeler"] for ranking in rankings}),
        "pairs": sum(comb(ranking.total(), 2) for ranking in ranks) - tied,
        "tied_pairs": tied,
        "all_tied": sum(len(ranking) == 1 for ranking in ranks),
        "gold_left_out": len(everything) - len(rankings),
    }


def _row(db, ranking) -> dict:
    """What is exported: equal `rank` is a tie, 1 is best; what was not given is left out."""
    answer, ranked = stored_answer(db, ranking), []
    ranks = ranks_of(answer.tiers)
    responses = db.execute("SELECT * FROM response WHERE prompt_id = ? ORDER BY rowid", (ranking["prompt_id"],))
    for response in sorted(responses, key=lambda response: ranks[response["id"]]):
        review = answer.reviews.get(response["id"], Review())
        ranked.append(
            {"id": response["sample_id"], "text": response["text"], "rank": ranks[response["id"]]}
            | _given(rating=review.rating, flags=review.flags, model=response["model"])
            | _given(justification=review.justification.strip())
        )
    return {
        "id": f"{ranking['sample_id']}:{ranking['labeler']}",
        "prompt_id": ranking["sample_id"],
        "prompt": json.loads(ranking["messages"]),
        "responses": ranked,
        "annotator": ranking["labeler"],
        **_given(justification=answer.comment.strip()),
        "seconds": round(ranking["seconds"], 1),
        **_given(guideline_version=ranking["guideline_version"]),
    }


def _given(**values):
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def export_command(database: Path) -> str:
    """The command that exports to a new file beside the database."""
    names = (f"rankings{number or ''}.jsonl" for number in count())
    output = next(path for name in names if not (path := database.with_name(name)).exists())
    return shlex.join(
        ["python", "scripts/rank_responses.py", "export", "--database", str(database), "--output", str(output)]
    )
