"""People as judges: a blind task for the ranking app, and the win rates that its rankings give."""

import json
from pathlib import Path

import numpy as np

from recipes.cli.errors import UserError
from recipes.evaluation.parts import fingerprint
from recipes.evaluation.policies import Conversation
from recipes.formatting import load_rows

Rankings = dict[str, list[dict[str, float]]]  # for each prompt (as JSON), `{text: rank}` of each labeler


def write_ranking_task(path: Path, prompts: list[Conversation], texts: dict[str, list[str]]) -> int:
    """Write what people rank blind in the ranking app to a new file, and return the number of prompts.

    One response of each policy; the file does not say whose, and their order changes from prompt to prompt. Prompts
    to which all policies gave the same response are left out, since there is nothing to rank.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        distinct = sorted({group[number] for group in texts.values()}, key=lambda text: fingerprint([prompt, text]))
        if len(distinct) > 1:
            responses = [{"id": f"e{number}-{place}", "text": text} for place, text in enumerate(distinct)]
            rows.append({"id": f"e{number}", "prompt": prompt, "responses": responses})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return len(rows)


def read_people(path: str) -> Rankings:
    """Rankings that the app exported.

    Raises:
        UserError: the file cannot be read, or a row is no ranking.
    """
    rankings: Rankings = {}
    for row in load_rows(path):
        try:
            ranks = {response["text"]: float(response["rank"]) for response in row.data["responses"]}
            rankings.setdefault(json.dumps(row.data["prompt"]), []).append(ranks)
        except (KeyError, TypeError, ValueError) as error:
            what = getattr(row.data, "message", error)
            raise UserError(f"{row.file}:{row.line}: not a ranking as rank_responses.py exports it: {what}") from error
    return rankings


def people_outcomes(
    rankings: Rankings, prompts: list[Conversation], texts_a: list[str], texts_b: list[str]
) -> np.ndarray:
    """Wins, ties and losses of a, (prompts, 3), over the labelers of each prompt; NaN where nobody ranked them.

    Equal texts are a tie, which nobody has to rank. Where people ranked only a share of the other prompts, the same
    share of the ties counts, so that ties weigh as much as they do over all prompts.
    """
    shares = np.full((len(prompts), 3), np.nan)
    for row, (prompt, a, b) in enumerate(zip(prompts, texts_a, texts_b, strict=True)):
        labelers = rankings.get(json.dumps(prompt), [])
        signs = np.array([np.sign(ranks[b] - ranks[a]) for ranks in labelers if a in ranks and b in ranks])
        if signs.size and a != b:
            shares[row] = [(signs == outcome).mean() for outcome in (1, 0, -1)]
    equal = np.flatnonzero([a == b for a, b in zip(texts_a, texts_b, strict=True)])
    others = len(prompts) - len(equal)
    ranked = np.isfinite(shares[:, 0]).sum() / others if others else 1.0
    shares[equal[: round(ranked * len(equal))]] = [0, 1, 0]
    return shares
