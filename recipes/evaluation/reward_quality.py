"""How well a reward model orders pairs of responses that people (or programs) ordered.

Pairs are a data frame, a row for two responses to one prompt:

* `group`: equal for pairs of one prompt;
* `chosen`, `rejected`: their texts;
* `margin`, `length_difference`: the reward model's score, and the tokens, of the better one minus those of the other;
* `source`, and `annotator` or None: where the pair is from, and who ordered it.
"""

import numpy as np
import pandas as pd

from recipes.evaluation.metrics import ratio_interval

LENGTH_BINS = 5
CALIBRATION_BINS = 10


def sampled_pairs(responses: pd.DataFrame, quality: str) -> pd.DataFrame:
    """All pairs of responses to the same prompt that differ in the column `quality`, as `ordering` takes them.

    Args:
        responses: as in `recipes.evaluation.measure.Measured`, with `prompt`, `reward` and `length`.
    """
    pairs = responses.merge(responses, on="prompt", suffixes=("", "_of_other"))
    pairs = pairs[pairs[quality] > pairs[f"{quality}_of_other"]]
    margin, longer_by = (pairs[column] - pairs[f"{column}_of_other"] for column in ("reward", "length"))
    return pd.DataFrame({"group": pairs["prompt"], "margin": margin, "length_difference": longer_by})


def reward_model_quality(pairs: pd.DataFrame) -> dict:
    """Accuracy with its interval (prompts are resampled whole), the baseline, and where the model is right."""
    result = ordering(pairs)
    result |= {"by_length_difference": by_length_difference(pairs), "calibration": calibration(pairs)}
    if pairs["source"].nunique() > 1:
        result["by_source"] = {name: ordering(part) for name, part in pairs.groupby("source")}
    if pairs["annotator"].notna().any():
        result["labelers"] = {name: ordering(part) for name, part in pairs.groupby("annotator")}
        result["labelers_with_each_other"] = labeler_agreement(pairs)
    return result


def share_right(difference: pd.Series) -> pd.Series:
    """Of differences between the better and the worse response: 1 where above 0, 0.5 where equal to 0, else 0."""
    return (np.sign(difference) + 1) / 2


def ordering(pairs: pd.DataFrame) -> dict:
    """The share of pairs that the scores order as the labels do, `{"mean", "ci95"}`, and what longer-wins gets."""
    accuracy = ratio_interval(share_right(pairs["margin"]), np.ones(len(pairs)), pairs["group"])
    baseline = float(share_right(pairs["length_difference"]).mean())
    return {"accuracy": accuracy, "longer_wins_baseline": baseline, "n_pairs": len(pairs)}


def by_length_difference(pairs: pd.DataFrame) -> list[dict]:
    """Accuracy in bins of about equally many pairs, by how much longer (in tokens) the better response is."""
    lengths = pairs["length_difference"]
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
    rows = []
    for _, part in pairs.groupby(np.searchsorted(edges, lengths)):
        own = part["length_difference"]
        rows.append({"from": int(own.min()), "to": int(own.max()), **ordering(part)})
    return rows


def calibration(pairs: pd.DataFrame) -> dict:
    """Whether the model is right as often as it claims.

    It claims to be right with probability `sigmoid(|margin|)`, between 0.5 and 1. For equal bins of it: the mean
    claim, how often the model was right, and the number of pairs. "error" is the mean distance between the two, over
    pairs (the expected calibration error).
    """
    claimed = 1 / (1 + np.exp(-pairs["margin"].abs()))
    bins = ((claimed - 0.5) * 2 * CALIBRATION_BINS).astype(int).clip(upper=CALIBRATION_BINS - 1)
    table = pd.DataFrame({"claimed": claimed, "right": share_right(pairs["margin"])})
    curve = table.groupby(bins).mean().assign(n_pairs=bins.value_counts())
    error = np.average((curve["claimed"] - curve["right"]).abs(), weights=curve["n_pairs"])
    return {"error": float(error), "curve": curve.to_dict("records")}


def labeler_agreement(pairs: pd.DataFrame) -> dict | None:
    """How often two labelers who both ordered two responses did it the same way; `None` if nobody shared any."""
    chosen, rejected = pairs["chosen"], pairs["rejected"]
    in_order = chosen < rejected  # so that both opinions on two texts stand under the same key
    key = {"group": pairs["group"], "a": chosen.where(in_order, rejected), "b": rejected.where(in_order, chosen)}
    votes = pd.DataFrame(key | {"annotator": pairs["annotator"], "vote": in_order}).dropna(subset="annotator")
    votes = votes.drop_duplicates([*key, "annotator"])  # nobody agrees with themselves
    votes = votes.groupby([*key])["vote"].agg(["sum", "count"])
    votes = votes[votes["count"] > 1]
    if votes.empty:
        return None
    first, second = votes["sum"], votes["count"] - votes["sum"]
    same = (first * (first - 1) + second * (second - 1)) / 2
    compared = votes["count"] * (votes["count"] - 1) / 2
    agreement = ratio_interval(same, compared, votes.index.get_level_values("group"))
    return agreement | {"n_pairs": int(compared.sum())}
