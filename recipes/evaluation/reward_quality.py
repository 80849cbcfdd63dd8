"""How well a reward model orders pairs that people (or programs) ordered, as pure functions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import comb
from statistics import fmean

import numpy as np

from recipes.evaluation.metrics import ratio_interval
from recipes.models.sampling import Response

LENGTH_BINS = 5
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Pair:
    """One ordered pair of responses to a prompt. Scores are the reward model's; lengths in tokens."""

    group: str  # equal for pairs of one prompt
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_length: int
    rejected_length: int
    source: str = ""
    annotator: str | None = None

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score

    @property
    def right(self) -> float:
        """1 if the better response has the higher score, 0.5 for equal scores."""
        return (self.margin > 0) + 0.5 * (self.margin == 0)

    @property
    def length_difference(self) -> int:
        return self.chosen_length - self.rejected_length

    @property
    def longer_wins(self) -> float:
        """1 if the better response is the longer one, 0.5 for equal lengths."""
        return (self.length_difference > 0) + 0.5 * (self.length_difference == 0)


def sampled_pairs(samples: Sequence[Sequence[Response]], scores: np.ndarray, quality: np.ndarray) -> list[Pair]:
    """All pairs of responses to the same prompt that differ in `quality`, the better one first.

    Args:
        scores: the reward model's, (prompts, responses).
        quality: what is to be found again by the scores, (prompts, responses): a judge's scores, or minus the rank.
    """
    return [
        Pair(str(row), a.text, b.text, scores[row, i], scores[row, j], len(a.token_ids), len(b.token_ids))
        for row, group in enumerate(samples)
        for (i, a), (j, b) in permutations(enumerate(group), 2)
        if quality[row, i] > quality[row, j]
    ]


def reward_model_quality(pairs: Sequence[Pair]) -> dict:
    """Accuracy with its interval (prompts are resampled whole), the baseline, and where the model is right."""
    result = ordering(pairs)
    result |= {"by_length_difference": by_length_difference(pairs), "calibration": calibration(pairs)}
    sources, annotators = {pair.source for pair in pairs}, {pair.annotator for pair in pairs} - {None}
    if len(sources) > 1:
        result["by_source"] = {name: ordering([p for p in pairs if p.source == name]) for name in sorted(sources)}
    if annotators:
        parts = {name: [p for p in pairs if p.annotator == name] for name in sorted(annotators)}
        result["labelers"] = {name: ordering(part) for name, part in parts.items()}
        result["labelers_with_each_other"] = labeler_agreement(pairs)
    return result


def ordering(pairs: Sequence[Pair]) -> dict:
    """The share of pairs that the scores order as the labels do, `{"mean", "ci95"}`, and what longer-wins gets."""
    accuracy = ratio_interval([pair.right for pair in pairs], [1.0] * len(pairs), [pair.group for pair in pairs])
    baseline = fmean(pair.longer_wins for pair in pairs)
    return {"accuracy": accuracy, "longer_wins_baseline": baseline, "n_pairs": len(pairs)}


def by_length_difference(pairs: Sequence[Pair]) -> list[dict]:
    """Accuracy in bins of about equally many pairs, by how much longer (in tokens) the better response is."""
    differences = np.array([pair.length_difference for pair in pairs])
    edges = np.unique(np.quantile(differences, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
    places = np.searchsorted(edges, differences, side="left")
    rows = []
    for place in np.unique(places):
        part = [pairs[row] for row in np.flatnonzero(places == place).tolist()]
        lengths = [pair.length_difference for pair in part]
        found = {"accuracy": ordering(part)["accuracy"], "n_pairs": len(part)}
        rows.append({"from": min(lengths), "to": max(lengths), **found})
    return rows


def calibration(pairs: Sequence[Pair]) -> dict:
    """Whether the model is right as often as it claims.

    It claims to be right with probability `sigmoid(|margin|)`, between 0.5 and 1. For equal bins of it: the mean
    claim, how often the model was right, and the number of pairs. "error" is the mean distance between the two, over
    pairs (the expected calibration error).
    """
    claims = 1 / (1 + np.exp(-np.abs([pair.margin for pair in pairs])))
    right = np.array([pair.right for pair in pairs])
    places = np.minimum(((claims - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    curve = []
    for place in np.unique(places):
        mean = [float(values[places == place].mean()) for values in (claims, right)]
        curve.append({"claimed": mean[0], "right": mean[1], "n_pairs": int((places == place).sum())})
    error = sum(abs(row["claimed"] - row["right"]) * row["n_pairs"] for row in curve) / len(pairs)
    return {"error": float(error), "curve": curve}


def labeler_agreement(pairs: Sequence[Pair]) -> dict | None:
    """How often two labelers who both ordered two responses did it the same way; `None` if nobody shared any."""
    opinions: dict[tuple, list[bool]] = defaultdict(list)
    for pair in pairs:
        if pair.annotator is not None:
            first, second = sorted((pair.chosen, pair.rejected))
            opinions[pair.group, first, second].append(pair.chosen == first)
    same, compared, groups = [], [], []
    for (group, _, _), votes in opinions.items():
        if len(votes) > 1:
            compared.append(comb(len(votes), 2))
            same.append(comb(votes.count(True), 2) + comb(votes.count(False), 2))
            groups.append(group)
    return ratio_interval(same, compared, groups) | {"n_pairs": sum(compared)} if same else None
