"""Estimators of single figures, as pure functions. Arrays are (prompts, responses) unless they say otherwise.

Responses to one prompt are alike, so every interval resamples whole prompts, with all their responses (cluster
bootstrap): each figure is a function of means over prompts, and a draw counts some prompts twice and others not at
all. Figures of the same prompts have the same draws, so that differences between policies are paired by prompt.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000


@lru_cache(maxsize=1)
def prompt_counts(num_prompts: int) -> np.ndarray:
    """How often each prompt counts, (1 + RESAMPLES, prompts): once, then as drawn with replacement, always the same.

    A single prompt has no draws: all would be alike.
    """
    once = np.ones((1, num_prompts))
    draws = np.random.default_rng(0).multinomial(num_prompts, once[0] / num_prompts, RESAMPLES)
    return np.concatenate([once, draws]) if num_prompts > 1 else once


def over_prompts(values: np.ndarray) -> np.ndarray:
    """Means over prompts of values (prompts, ...): first over all of them, then over those of each draw."""
    return prompt_counts(len(values)) @ values / len(values)


def with_interval(figure: np.ndarray) -> dict:
    """`{"mean", "ci95"}` of a figure and its draws, as `over_prompts` has them: the central 95 %, or `None`."""
    bounds = np.percentile(figure[1:], [2.5, 97.5]).tolist() if len(figure) > 1 else None
    return {"mean": float(figure[0]), "ci95": bounds}


def mean_interval(values: ArrayLike) -> dict:
    """`{"mean", "ci95"}` of values (prompts,) or (prompts, responses), in the values' unit."""
    values = np.asarray(values, dtype=np.float64)
    return with_interval(over_prompts(values.reshape(len(values), -1).mean(1)))


def ratio_interval(parts: ArrayLike, wholes: ArrayLike, groups: ArrayLike) -> dict:
    """`{"mean", "ci95"}` of sum(parts) / sum(wholes), where items of one group are resampled together."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    part, whole = (over_prompts(np.bincount(group, weights=values)) for values in (parts, wholes))
    return with_interval(part / whole)


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
    rate = mean_interval(shares @ [1, 0.5, 0])
    return {"win": win, "tie": tie, "loss": loss, "win_rate": rate["mean"], "ci95": rate["ci95"], "n": len(shares)}
