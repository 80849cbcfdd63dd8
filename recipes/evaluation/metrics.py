"""Estimators of single figures, as pure functions. Arrays are (prompts, responses) unless they say otherwise.

Responses to one prompt are alike, so every interval resamples whole prompts, with all their responses (cluster
bootstrap): each figure is a function of means over prompts, and a draw gives the prompts new weights. Intervals of
several figures use the same draws, so that differences between policies are paired by prompt.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000


def prompt_draws(num_prompts: int) -> np.ndarray:
    """Weights (RESAMPLES, prompts) of prompts drawn with replacement, the same each time; each row sums to 1."""
    equal = np.full(num_prompts, 1 / num_prompts)
    return np.random.default_rng(0).multinomial(num_prompts, equal, RESAMPLES) / num_prompts


def interval(draws: np.ndarray, num_prompts: int) -> list[float] | None:
    """The central 95 % of bootstrap draws, (RESAMPLES,). `None` for one prompt: its draws are all the same."""
    return np.percentile(draws, [2.5, 97.5]).tolist() if num_prompts > 1 else None


def mean_interval(values: np.ndarray) -> dict:
    """`{"mean", "ci95"}` of values (prompts,) or (prompts, responses), in the values' unit."""
    values = np.asarray(values, dtype=np.float64)
    per_prompt = values.reshape(len(values), -1).mean(1)
    return {"mean": float(per_prompt.mean()), "ci95": interval(prompt_draws(len(values)) @ per_prompt, len(values))}


def ratio_interval(parts: ArrayLike, wholes: ArrayLike, groups: ArrayLike) -> dict:
    """`{"mean", "ci95"}` of sum(parts) / sum(wholes), where items of one group are resampled together."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    part, whole = (np.bincount(group, weights=values) for values in (parts, wholes))
    draws = prompt_draws(len(part))
    drawn_part, drawn_whole = draws @ part, draws @ whole
    known = drawn_whole > 0
    bounds = interval(drawn_part[known] / drawn_whole[known], len(part))
    return {"mean": float(part.sum() / whole.sum()), "ci95": bounds}


def kl_k1(logps: Sequence[float], ref_logps: Sequence[float]) -> float:
    """Unbiased estimate, in nats, of KL(policy || reference) from one response of the policy.

    Log-probabilities of its tokens, (T,). It can be negative; Schulman, "Approximating KL divergence" (2020), calls
    it k1.
    """
    return float(np.sum(np.subtract(logps, ref_logps)))


def kl_k3(logps: Sequence[float], ref_logps: Sequence[float]) -> float:
    """As `kl_k1`, never negative: the sum over tokens of `exp(-x) - 1 + x`, x = log pi - log pi_ref.

    Given what came before, each term has the mean of x, so this is unbiased too. Far from the reference exp(-x) has a
    long tail.
    """
    log_ratio = np.subtract(logps, ref_logps)
    return float(np.sum(np.expm1(-log_ratio) + log_ratio))


def distinct_n(token_ids: Sequence[Sequence[int]], n: int) -> float | None:
    """Share of different n-grams among all n-grams of all responses (Li et al. 2016); `None` where there are none.

    It falls as responses are added: compare equal numbers of responses only.
    """
    grams = [tuple(ids[start : start + n]) for ids in token_ids for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def outcomes(scores_a: np.ndarray, scores_b: np.ndarray) -> np.ndarray:
    """Shares of wins, ties and losses of a, (prompts, 3), over all pairs of one response of a and one of b."""
    sign = np.sign(scores_a[:, :, None] - scores_b[:, None, :])
    return np.stack([(sign == outcome).mean((1, 2)) for outcome in (1, 0, -1)], 1)


def win_rate(shares: np.ndarray) -> dict:
    """From `outcomes` (prompts, 3): `win`, `tie`, `loss`, and `win_rate` = win + tie / 2 with its `ci95`."""
    win, tie, loss = shares.mean(0).tolist()
    rate = mean_interval(shares[:, 0] + shares[:, 1] / 2)
    return {"win": win, "tie": tie, "loss": loss, "win_rate": rate["mean"], "ci95": rate["ci95"], "n": len(shares)}
