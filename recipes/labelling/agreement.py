"""How far labelers agree with each other and with attention tasks, and how they work.

A pair of responses has one of three outcomes: the first is better (1), a tie (0), the second is better (-1). Ranks of
different prompts are not on one scale, so everything but Kendall's W (which is per prompt) is computed on outcomes.
"""

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations
from statistics import fmean, median
from typing import Literal

import krippendorff
import numpy as np

from recipes.labelling.answers import ranks_of
from recipes.labelling.database import Database
from recipes.labelling.store import COUNTS, standing_answers

# Labelers hired for training and held-out ones: Ouyang et al. 2022 (arXiv 2203.02155), section 3.4.
INSTRUCTGPT = (0.726, 0.773)
RESAMPLES = 1000


class Judgement:
    """A ranking that counts: `ranks` (responses,), `outcomes` (pairs,), and of an attention task `gold`, which says of
    every pair that has a right outcome whether this is it."""

    def __init__(self, ranking: sqlite3.Row):
        tiers = json.loads(ranking["tiers"])
        self.prompt_id = ranking["prompt_id"]
        self.sample_id = ranking["sample_id"]
        self.labeler = ranking["labeler"]
        self.seconds = ranking["seconds"]
        self.left_as_shown = tiers == [[id] for id in json.loads(ranking["shown"])]
        self.ranks = mean_ranks(tiers)
        self.outcomes = outcomes(self.ranks)
        self.gold = None
        if ranking["gold"] is not None:
            self.gold = agrees_with_gold(self.outcomes, outcomes(mean_ranks(json.loads(ranking["gold"]))))


def mean_ranks(tiers: Sequence[Sequence]) -> np.ndarray:
    """(responses,), in the order of their ids: 1 is best, tied responses share the mean of their places."""
    ranks = ranks_of(tiers)
    sizes = Counter(ranks.values())
    return np.array([ranks[id] + (sizes[ranks[id]] - 1) / 2 for id in sorted(ranks)])


def outcomes(ranks: np.ndarray) -> np.ndarray:
    """(pairs of responses,): 1 if the first is better, -1 if worse, 0 for a tie."""
    first, second = _pairs(len(ranks))
    return np.sign(ranks[second] - ranks[first])


@cache
def _pairs(responses: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(responses, 1)


def agrees_with_gold(said: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """For the pairs that gold orders. A tie is wrong there: who ties everything has not passed."""
    return (said == gold)[gold != 0]


def krippendorff_alpha(counts: np.ndarray, level: Literal["nominal", "ordinal", "interval"]) -> float | None:
    """Krippendorff's alpha: 1 is perfect agreement, 0 what chance gives. None where it is 0/0.

    `counts`, integers (things judged, values in their order): how many people gave a thing that value.
    """
    comparable = counts[counts.sum(axis=1) > 1]
    if np.count_nonzero(comparable.sum(axis=0)) < 2:
        return None
    return float(krippendorff.alpha(value_counts=comparable, level_of_measurement=level))


def kendalls_w(ranks: np.ndarray) -> float | None:
    """Kendall's coefficient of concordance, corrected for ties: 1 if all rank alike, 0 if ranks cancel out.

    `ranks`: (labelers, responses), as of `mean_ranks`. None if everything is tied.
    """
    most = len(ranks) * ranks.var(axis=1).sum()
    return float(ranks.sum(axis=0).var() / most) if most else None


def agreement_report(database: Database) -> dict:
    """All the figures as plain values; a figure that nobody's data gives yet is None. Shares are in [0, 1]."""
    with database.transaction() as db:
        judgements = [Judgement(ranking) for ranking in standing_answers(db, "submit", "edit")]
        flags = standing_answers(db, "flag")  # rankings of these prompts by others count, and are exported
        labelers = db.execute(
            f"SELECT l.name, {COUNTS} FROM labeler AS l LEFT JOIN task_state AS s ON s.labeler_id = l.id"
            " GROUP BY l.id ORDER BY l.name"
        ).fetchall()
    by_prompt, by_labeler = defaultdict(list), defaultdict(list)
    for judgement in judgements:
        by_labeler[judgement.labeler].append(judgement)
        if judgement.gold is None:  # attention tasks are easy on purpose: they would flatter the figures
            by_prompt[judgement.prompt_id].append(judgement)
    shared = {id: given for id, given in by_prompt.items() if len(given) > 1}

    with_ties, without_ties = [], defaultdict(list)  # the second by labeler, None for all of them
    for id, given in shared.items():
        for a, b in combinations(given, 2):
            same = a.outcomes == b.outcomes
            with_ties.append((id, same))
            for name in (None, a.labeler, b.labeler):
                without_ties[name].append((id, same[a.outcomes * b.outcomes != 0]))
    counts = _outcome_counts(shared.values())
    concordances = [kendalls_w(np.stack([judgement.ranks for judgement in given])) for given in shared.values()]
    concordances = [w for w in concordances if w is not None]
    return {
        "rankings": len(judgements),
        "prompts": len({judgement.prompt_id for judgement in judgements}),
        "prompts_shared": len(shared),
        "pairwise": {
            "with_ties": _share(with_ties),
            "without_ties": _share(without_ties[None]),
            "instructgpt": list(INSTRUCTGPT),
        },
        "krippendorff_alpha": {
            "nominal": krippendorff_alpha(counts, "nominal"),
            "ordinal": krippendorff_alpha(counts, "ordinal"),
        },
        "kendalls_w": fmean(concordances) if concordances else None,
        "labelers": {
            name: {"ranked": ranked, "skipped": skipped, "flagged": flagged}
            | _habits(by_labeler[name])
            | {"with_others": _share(without_ties[name])}
            for name, ranked, skipped, flagged in labelers
        },
        "flagged": [{"prompt": f["sample_id"], "labeler": f["labeler"], "comment": f["comment"]} for f in flags],
    }


def _habits(given: list[Judgement]) -> dict:
    """How a labeler works, and their agreement with attention tasks."""
    gold = [judgement for judgement in given if judgement.gold is not None]
    return {
        "median_seconds": median(judgement.seconds for judgement in given) if given else None,
        "seconds": [judgement.seconds for judgement in given],
        "tied": float(np.mean(np.concatenate([judgement.outcomes for judgement in given]) == 0)) if given else None,
        # Far above what chance gives (1 in K! for K responses): somebody may submit without reading.
        "left_as_shown": fmean(judgement.left_as_shown for judgement in given) if given else None,
        "gold": {
            "tasks": len(gold),
            **_share([(judgement.prompt_id, judgement.gold) for judgement in gold]),
            "disagreed": [judgement.sample_id for judgement in gold if not judgement.gold.all()],
        },
    }


def _outcome_counts(shared: Iterable[list[Judgement]]) -> np.ndarray:
    """(pairs of responses, 3): how many labelers said worse, tie, better. Each pair stands there both ways round, for
    which response comes first is a matter of names, not of opinion."""
    counts = [np.zeros((0, 3), dtype=int)]
    for given in shared:
        said = np.stack([judgement.outcomes for judgement in given], axis=1)
        counts.append(np.stack([(said == outcome).sum(axis=1) for outcome in (-1, 0, 1)], axis=1))
    table = np.concatenate(counts)
    return np.concatenate([table, table[:, ::-1]])


def _share(compared: Iterable[tuple[str, np.ndarray]]) -> dict:
    """The share of pairs that are judged alike, and its 95 % bootstrap interval: prompts are drawn again with
    replacement, as the pairs of one prompt go together. `compared`: of a prompt, whether each pair is."""
    by_prompt: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2, dtype=int))
    for id, alike in compared:
        if alike.size:
            by_prompt[id] += (alike.sum(), alike.size)
    if not by_prompt:
        return {"share": None, "ci95": None, "pairs": 0}
    # Prompts with the same figures are drawn together: (kinds of prompts,), and how many there are of each.
    kinds, prompts = np.unique(list(by_prompt.values()), axis=0, return_counts=True)
    same, pairs = kinds.T
    interval = None
    if np.unique(same / pairs).size > 1:  # else all draws are the same, and would look like certainty
        drawn = np.random.default_rng(0).multinomial(prompts.sum(), prompts / prompts.sum(), size=RESAMPLES)
        interval = np.quantile((drawn @ same) / (drawn @ pairs), [0.025, 0.975]).tolist()
    total = int(pairs @ prompts)
    return {"share": int(same @ prompts) / total, "ci95": interval, "pairs": total}
