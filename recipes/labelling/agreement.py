"""How far labelers agree with each other and with gold tasks, and how they work.

A pair of responses has one of three outcomes: the first is better, a tie, the second is better. Ranks of different
prompts are not on one scale, so everything but Kendall's W (which is per prompt) is computed on pair outcomes.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from statistics import fmean, median

import numpy as np

from recipes.labelling.answers import ranks_of
from recipes.labelling.database import Database
from recipes.labelling.rankings import Ranking, count_standing, read_rankings

# Labelers hired for training and held-out ones, in percent: Ouyang et al. 2022 (arXiv 2203.02155), section 3.4.
INSTRUCTGPT = (72.6, 77.3)
RESAMPLES = 1000

Outcomes = dict[tuple[str, str], int]


def outcomes(tiers: Sequence[Sequence[str]]) -> Outcomes:
    """For every pair of response ids (in alphabetical order): 1 if the first is better, -1 if worse, 0 for a tie."""
    ranks = ranks_of(tiers)
    return {(a, b): (ranks[b] > ranks[a]) - (ranks[b] < ranks[a]) for a, b in combinations(sorted(ranks), 2)}


def krippendorff_alpha(units: Iterable[Sequence[float]], level: str = "nominal") -> float | None:
    """Krippendorff's alpha: 1 is perfect agreement, 0 what chance gives. None if it is 0/0.

    `units`: for each thing judged, the values it was given, any number of them (fewer than two count for nothing).
    `level`: "nominal", "ordinal" or "interval". Formulas: Krippendorff, "Computing Krippendorff's Alpha-Reliability"
    (2011), section E.
    """
    coincidences: Counter = Counter()
    for values in units:
        for index, a in enumerate(values):
            for other, b in enumerate(values):
                if index != other:
                    coincidences[a, b] += 1 / (len(values) - 1)
    totals: Counter = Counter()
    for (a, _), weight in coincidences.items():
        totals[a] += weight
    order, n = sorted(totals), sum(totals.values())

    def distance(a, b):
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return (a - b) ** 2
        low, high = sorted((order.index(a), order.index(b)))
        return (sum(totals[value] for value in order[low : high + 1]) - (totals[a] + totals[b]) / 2) ** 2

    observed = sum(weight * distance(a, b) for (a, b), weight in coincidences.items())
    expected = sum(totals[a] * totals[b] * distance(a, b) for a in order for b in order if a != b)
    return 1 - (n - 1) * observed / expected if expected else None


def kendalls_w(rankings: Sequence[Sequence[Sequence[Hashable]]]) -> float | None:
    """Kendall's coefficient of concordance with its correction for ties: 1 if all rank alike, 0 if ranks cancel out.

    `rankings`: one list of tiers per labeler, over the same responses. None if everything is tied.
    """
    m, n = len(rankings), sum(map(len, rankings[0]))
    sums: Counter = Counter()
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


def agreement_report(database: Database) -> dict:
    """All the figures as plain values; a figure that nobody's data gives yet is None. Shares are in [0, 1]."""
    everything = read_rankings(database)
    by_prompt = defaultdict(list)
    for ranking in everything:
        if ranking.prompt.gold is None:  # attention tasks are easy on purpose: they would flatter the figures
            by_prompt[ranking.prompt.id].append(ranking)
    shared = {id: rankings for id, rankings in by_prompt.items() if len(rankings) > 1}
    comparisons = [_compare(rankings) for rankings in shared.values()]
    units = [unit for rankings in shared.values() for unit in _units(rankings)]
    concordances = [kendalls_w([ranking.answer.tiers for ranking in rankings]) for rankings in shared.values()]
    concordances = [w for w in concordances if w is not None]
    return {
        "rankings": len(everything),
        "prompts": len({ranking.prompt.id for ranking in everything}),
        "prompts_shared": len(shared),
        "pairwise": {
            "with_ties": _share(comparisons, "same", "all"),
            "without_ties": _share(comparisons, "same_strict", "strict"),
            "instructgpt": [value / 100 for value in INSTRUCTGPT],
        },
        "krippendorff_alpha": {level: krippendorff_alpha(units, level) for level in ("nominal", "ordinal")},
        "kendalls_w": fmean(concordances) if concordances else None,
        "labelers": _labelers(database, everything, shared),
        "labeler_pairs": _labeler_pairs(shared),
    }


def _units(rankings):
    """Pair outcomes, each pair both ways round: which response comes first is a matter of names, not of opinion."""
    judged = [outcomes(ranking.answer.tiers) for ranking in rankings]
    for pair in judged[0]:
        values = [outcome[pair] for outcome in judged]
        yield values
        yield [-value for value in values]


def _compare(rankings: Sequence[Ranking]) -> Counter:
    counts: Counter = Counter()
    for a, b in combinations(rankings, 2):
        counts += _compare_tiers(a.answer.tiers, b.answer.tiers)
    return counts


def _compare_tiers(tiers, other_tiers) -> Counter:
    counts: Counter = Counter()
    others = outcomes(other_tiers)
    for pair, outcome in outcomes(tiers).items():
        other = others[pair]
        counts["all"] += 1
        counts["same"] += outcome == other
        if outcome and other:
            counts["strict"] += 1
            counts["same_strict"] += outcome == other
    return counts


def _share(comparisons: Sequence[Counter], part: str, whole: str) -> dict:
    """A share and its 95 % interval: prompts are drawn again with replacement, as pairs of one prompt go together."""
    parts = np.array([counts[part] for counts in comparisons], dtype=float)
    wholes = np.array([counts[whole] for counts in comparisons], dtype=float)
    wanted = wholes > 0
    parts, wholes = parts[wanted], wholes[wanted]
    interval = None
    if len(wholes) > 1:
        draw = np.random.default_rng(0)
        samples = (draw.integers(len(wholes), size=len(wholes)) for _ in range(RESAMPLES))
        shares = [parts[sample].sum() / wholes[sample].sum() for sample in samples]
        interval = [float(bound) for bound in np.quantile(shares, [0.025, 0.975])]
    return {
        "share": float(parts.sum() / wholes.sum()) if len(wholes) else None,
        "ci95": interval,
        "pairs": int(wholes.sum()),
    }


def _labelers(database, everything, shared):
    result = {}
    for name, standing in count_standing(database).items():
        mine = [ranking for ranking in everything if ranking.annotator == name]
        seconds = [ranking.active_seconds for ranking in mine]
        judged = [outcome for ranking in mine for outcome in outcomes(ranking.answer.tiers).values()]
        gold = [
            (ranking.prompt.sample_id, _compare_tiers(ranking.prompt.gold, ranking.answer.tiers))
            for ranking in mine
            if ranking.prompt.gold is not None
        ]
        others = [
            _compare_tiers(ranking.answer.tiers, other.answer.tiers)
            for rankings in shared.values()
            for ranking in rankings
            for other in rankings
            if ranking.annotator == name != other.annotator
        ]
        result[name] = standing | {
            "median_seconds": median(seconds) if mine else None,
            "rankings_per_hour": len(mine) * 3600 / sum(seconds) if sum(seconds) else None,
            "seconds": seconds,
            "tied": judged.count(0) / len(judged) if judged else None,
            # Far above what chance gives (1 in K! for K responses): somebody may submit without reading.
            "left_as_shown": fmean(_is_as_shown(ranking) for ranking in mine) if mine else None,
            "with_others": _share(others, "same_strict", "strict"),
            "gold": {
                "tasks": len(gold),
                **_share([counts for _, counts in gold], "same_strict", "strict"),
                "disagreed": [id for id, counts in gold if counts["same_strict"] < counts["strict"]],
            },
        }
    return result


def _is_as_shown(ranking):
    return ranking.answer.tiers == [[id] for id in ranking.shown]


def _labeler_pairs(shared):
    pairs = defaultdict(list)
    for rankings in shared.values():
        for a, b in combinations(rankings, 2):
            pairs[a.annotator, b.annotator].append(_compare([a, b]))
    return [
        {"a": a, "b": b, "prompts": len(comparisons), **_share(comparisons, "same_strict", "strict")}
        for (a, b), comparisons in sorted(pairs.items())
    ]
