"""How far labelers agree with each other and with gold tasks, and how they work.

A pair of responses has one of three outcomes: the first is better, a tie, the second is better. Ranks of different
prompts are not on one scale, so everything but Kendall's W (which is per prompt) is computed on pair outcomes.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Literal, NamedTuple

import krippendorff
import numpy as np

from recipes.labelling.answers import ranks_of
from recipes.labelling.database import Database

# Labelers hired for training and held-out ones: Ouyang et al. 2022 (arXiv 2203.02155), section 3.4.
INSTRUCTGPT = (0.726, 0.773)
RESAMPLES = 1000
STANDINGS = {"submit": "ranked", "edit": "ranked", "skip": "skipped", "flag": "flagged"}

Outcomes = dict[tuple[str, str], int]
Level = Literal["nominal", "ordinal", "interval"]


class Comparison(NamedTuple):
    """In how many pairs of responses two rankings say the same; `strict` ones are those that neither of them ties."""

    pairs: int
    same: int
    strict: int
    same_strict: int


def outcomes(tiers: Sequence[Sequence[str]]) -> Outcomes:
    """For every pair of response ids (in alphabetical order): 1 if the first is better, -1 if worse, 0 for a tie."""
    ranks = ranks_of(tiers)
    return {(a, b): (ranks[b] > ranks[a]) - (ranks[b] < ranks[a]) for a, b in combinations(sorted(ranks), 2)}


def compare(a: Outcomes, b: Outcomes) -> Comparison:
    both = [(outcome, b[pair]) for pair, outcome in a.items()]
    strict = [(x, y) for x, y in both if x and y]
    return Comparison(len(both), sum(x == y for x, y in both), len(strict), sum(x == y for x, y in strict))


def compare_with_gold(gold: Outcomes, said: Outcomes) -> Comparison:
    """Over the pairs that gold orders. A tie is wrong there: who ties everything has not passed."""
    ordered = {pair: outcome for pair, outcome in gold.items() if outcome}
    same = sum(said[pair] == outcome for pair, outcome in ordered.items())
    return Comparison(len(ordered), same, len(ordered), same)


def krippendorff_alpha(counts: np.ndarray, level: Level = "nominal") -> float | None:
    """Krippendorff's alpha: 1 is perfect agreement, 0 what chance gives. None where it is 0/0.

    `counts`, integers (things judged, values in their order): how many people gave a thing that value.
    """
    comparable = counts[counts.sum(axis=1) > 1]
    if np.count_nonzero(comparable.sum(axis=0)) < 2:
        return None
    return float(krippendorff.alpha(value_counts=comparable, level_of_measurement=level))


def kendalls_w(rankings: Sequence[Sequence[Sequence[Hashable]]]) -> float | None:
    """Kendall's coefficient of concordance with its correction for ties: 1 if all rank alike, 0 if ranks cancel out.

    `rankings`: one list of tiers per labeler, over the same responses. None if everything is tied.
    """
    m, n = len(rankings), sum(map(len, rankings[0]))
    sums: dict[Hashable, float] = defaultdict(float)
    for tiers in rankings:
        place = 0
        for tier in tiers:
            for response in tier:
                sums[response] += place + (len(tier) + 1) / 2
            place += len(tier)
    mean = m * (n + 1) / 2
    ties = sum(len(tier) ** 3 - len(tier) for tiers in rankings for tier in tiers)
    spread = m**2 * (n**3 - n) - m * ties
    return 12 * sum((total - mean) ** 2 for total in sums.values()) / spread if spread else None


class Judgement(NamedTuple):
    """A ranking that counts, without the texts. `shown`: response ids in the order on the screen; `gold`: the
    known order of an attention task, else None."""

    prompt_id: str
    sample_id: str
    annotator: str
    tiers: list[list[str]]
    outcomes: Outcomes
    shown: list[str]
    active_seconds: float
    gold: list[list[str]] | None


def read_judgements(database: Database) -> list[Judgement]:
    """In the order the prompts were imported, then by labeler."""
    with database.transaction() as db:
        rows = db.execute(
            "SELECT p.id, p.sample_id, l.name, e.tiers, a.shown, s.active_seconds, g.tiers AS gold"
            " FROM task_state AS s JOIN event AS e ON e.id = s.event_id JOIN prompt AS p ON p.id = s.prompt_id"
            " JOIN labeler AS l ON l.id = s.labeler_id JOIN assignment AS a USING (prompt_id, labeler_id)"
            " LEFT JOIN gold AS g ON g.prompt_id = p.id WHERE s.kind IN ('submit', 'edit') ORDER BY p.position, l.name"
        ).fetchall()
    judgements = []
    for prompt_id, sample_id, name, tiers, shown, seconds, gold in rows:
        tiers, shown, gold = json.loads(tiers), json.loads(shown), json.loads(gold or "null")
        judgements.append(Judgement(prompt_id, sample_id, name, tiers, outcomes(tiers), shown, seconds, gold))
    return judgements


def agreement_report(database: Database) -> dict:
    """All the figures as plain values; a figure that nobody's data gives yet is None. Shares are in [0, 1]."""
    judgements = read_judgements(database)
    by_prompt = defaultdict(list)
    for judgement in judgements:
        if judgement.gold is None:  # attention tasks are easy on purpose: they would flatter the figures
            by_prompt[judgement.prompt_id].append(judgement)
    shared = {id: given for id, given in by_prompt.items() if len(given) > 1}

    compared = defaultdict(list)  # by pair of labelers: (prompt, comparison)
    for id, given in shared.items():
        for a, b in combinations(given, 2):
            compared[a.annotator, b.annotator].append((id, compare(a.outcomes, b.outcomes)))
    everybody = [comparison for pair in compared.values() for comparison in pair]
    concordances = [kendalls_w([judgement.tiers for judgement in given]) for given in shared.values()]
    concordances = [w for w in concordances if w is not None]
    counts = _outcome_counts(shared.values())
    return {
        "rankings": len(judgements),
        "prompts": len({judgement.prompt_id for judgement in judgements}),
        "prompts_shared": len(shared),
        "pairwise": {
            "with_ties": _share(everybody, ties=True),
            "without_ties": _share(everybody),
            "instructgpt": list(INSTRUCTGPT),
        },
        "krippendorff_alpha": {
            "nominal": krippendorff_alpha(counts, "nominal"),
            "ordinal": krippendorff_alpha(counts, "ordinal"),
        },
        "kendalls_w": fmean(concordances) if concordances else None,
        "labelers": _labelers(database, judgements, compared),
        "labeler_pairs": [
            {"a": a, "b": b, "prompts": len(pair), **_share(pair)} for (a, b), pair in sorted(compared.items())
        ],
        "flagged": _flagged(database),
    }


def _flagged(database) -> list[dict]:
    """What labelers said is wrong with prompts. Rankings of them by others count, and are exported."""
    with database.transaction() as db:
        rows = db.execute(
            "SELECT p.sample_id AS prompt, l.name AS labeler, s.comment FROM standing AS s"
            " JOIN prompt AS p ON p.id = s.prompt_id JOIN labeler AS l ON l.id = s.labeler_id"
            " WHERE s.kind = 'flag' ORDER BY p.position, l.name"
        )
        return [dict(row) for row in rows]


def _outcome_counts(shared) -> np.ndarray:
    """(pairs of responses, 3): how many labelers said worse, tie, better. Each pair stands there both ways round, for
    which response comes first is a matter of names, not of opinion."""
    rows = [
        [said.count(outcome) for outcome in (-1, 0, 1)]
        for given in shared
        for said in zip(*(judgement.outcomes.values() for judgement in given), strict=True)
    ]
    counts = np.array(rows, dtype=int).reshape(-1, 3)
    return np.concatenate([counts, counts[:, ::-1]])


def _share(compared: Iterable[tuple[str, Comparison]], ties: bool = False) -> dict:
    """The share of pairs that two people judge alike, of those that nobody ties or (`ties`) of all, and its 95 %
    bootstrap interval: prompts are drawn again with replacement, as the pairs of one prompt go together."""
    by_prompt = defaultdict(lambda: (0, 0))
    for id, comparison in compared:
        same, pairs = (comparison.same, comparison.pairs) if ties else (comparison.same_strict, comparison.strict)
        by_prompt[id] = (by_prompt[id][0] + same, by_prompt[id][1] + pairs)
    figures = Counter(figure for figure in by_prompt.values() if figure[1])
    if not figures:
        return {"share": None, "ci95": None, "pairs": 0}
    # Prompts with the same figures are drawn together: (kinds of prompts,), and how many there are of each.
    same, pairs = np.array(list(figures)).T
    prompts = np.array(list(figures.values()))
    interval = None
    if prompts.sum() > 1:
        drawn = np.random.default_rng(0).multinomial(prompts.sum(), prompts / prompts.sum(), size=RESAMPLES)
        interval = np.quantile((drawn @ same) / (drawn @ pairs), [0.025, 0.975]).tolist()
    total = int(pairs @ prompts)
    return {"share": int(same @ prompts) / total, "ci95": interval, "pairs": total}


def _labelers(database, judgements, compared):
    with database.transaction() as db:
        names = [name for (name,) in db.execute("SELECT name FROM labeler ORDER BY name")]
        standings = db.execute(
            "SELECT l.name, s.kind, count(*) FROM task_state AS s JOIN labeler AS l ON l.id = s.labeler_id"
            " WHERE s.kind IS NOT NULL GROUP BY l.name, s.kind"
        ).fetchall()
    counts = {name: dict.fromkeys(STANDINGS.values(), 0) for name in names}
    for name, kind, count in standings:
        counts[name][STANDINGS[kind]] += count
    given, others = defaultdict(list), defaultdict(list)
    for judgement in judgements:
        given[judgement.annotator].append(judgement)
    for pair, comparisons in compared.items():
        for name in pair:
            others[name] += comparisons
    return {name: counts[name] | _labeler(given[name], others[name]) for name in names}


def _labeler(given, others):
    seconds = [judgement.active_seconds for judgement in given]
    said = [outcome for judgement in given for outcome in judgement.outcomes.values()]
    gold = [(j, compare_with_gold(outcomes(j.gold), j.outcomes)) for j in given if j.gold is not None]
    return {
        "median_seconds": median(seconds) if given else None,
        "rankings_per_hour": len(given) * 3600 / sum(seconds) if sum(seconds) else None,
        "seconds": seconds,
        "tied": said.count(0) / len(said) if said else None,
        # Far above what chance gives (1 in K! for K responses): somebody may submit without reading.
        "left_as_shown": fmean(j.tiers == [[id] for id in j.shown] for j in given) if given else None,
        "with_others": _share(others),
        "gold": {
            "tasks": len(gold),
            **_share([(j.prompt_id, comparison) for j, comparison in gold]),
            "disagreed": [j.sample_id for j, comparison in gold if comparison.same < comparison.pairs],
        },
    }
