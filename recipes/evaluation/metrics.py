"""Estimators of single figures, as pure functions. Arrays are (prompts, responses) unless they say otherwise.

Responses to one prompt are alike, so every interval resamples whole prompts, with all their responses (cluster
bootstrap): each figure is a function of means over prompts, and a draw gives the prompts new weights. Intervals of
several figures use the same draws, so that differences between policies are paired by prompt.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000


def prompt_draws(num_prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Weights (resamples, prompts) of prompts drawn with replacement; each row sums to 1."""
    draws = np.random.default_rng(seed).multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), resamples)
    return draws / num_prompts


def interval(draws: np.ndarray, num_prompts: int) -> list[float] | None:
    """The central 95 % of bootstrap draws, (resamples,). `None` for one prompt, whose draws are all the same: it says
    nothing about others."""
    return [float(bound) for bound in np.percentile(draws, [2.5, 97.5])] if num_prompts > 1 else None


def mean_interval(values: np.ndarray) -> dict:
    """`{"mean", "ci95"}` of values (prompts,) or (prompts, responses), in the values' unit."""
    values = np.asarray(values, dtype=np.float64)
    per_prompt = values.reshape(len(values), -1).mean(1)
    return {"mean": float(per_prompt.mean()), "ci95": interval(prompt_draws(len(values)) @ per_prompt, len(values))}


def ratio_interval(parts: Sequence[float], wholes: Sequence[float], groups: Sequence) -> dict:
    """`{"mean", "ci95"}` of sum(parts) / sum(wholes), where items of one group are resampled together."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    sums = [np.bincount(group, weights=np.asarray(values, dtype=np.float64)) for values in (parts, wholes)]
    draws = prompt_draws(len(sums[0]))
    part, whole = draws @ sums[0], draws @ sums[1]
    drawn = part[whole > 0] / whole[whole > 0]
    return {"mean": float(sums[0].sum() / sums[1].sum()), "ci95": interval(drawn, len(sums[0]))}


def kl_k1(logps: Sequence[float], ref_logps: Sequence[float]) -> float:
    """Unbiased estimate, in nats, of KL(policy || reference) from one response of the policy.

    Log-probabilities of its tokens, (T,). It can be negative; Schulman, "Approximating KL divergence" (2020), calls
    it k1.
    """
    return float(np.sum(np.subtract(logps, ref_logps)))


def kl_k3(logps: Sequence[float], ref_logps: Sequence[float]) -> float:
    """As `kl_k1`, never negative: the sum over tokens of `exp(-x) - 1 + x`, x = log pi - log pi_ref.

    Given what came before, each term has the mean of x, so this is unbiased too. Its spread is smaller near the
    reference, and larger far from it, where exp(-x) has a long tail.
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
    difference = np.asarray(scores_a)[:, :, None] - np.asarray(scores_b)[:, None, :]
    return np.stack([(difference > 0).mean((1, 2)), (difference == 0).mean((1, 2)), (difference < 0).mean((1, 2))], 1)


def win_rate(shares: np.ndarray) -> dict:
    """From `outcomes` (prompts, 3): `win`, `tie`, `loss`, and `win_rate` = win + tie / 2 with its `ci95`."""
    shares = np.asarray(shares, dtype=np.float64)
    win, tie, loss = (float(share) for share in shares.mean(0))
    rate = mean_interval(shares[:, 0] + shares[:, 1] / 2)
    return {"win": win, "tie": tie, "loss": loss, "win_rate": rate["mean"], "ci95": rate["ci95"], "n": len(shares)}
