"""Reward against KL: best-of-n, the best that any policy can do at a KL, and over-optimisation curves.

All from N samples of the reference for each of P prompts and their rewards (P, N). Figures are per prompt, (P,) or
(P, M) for M points of a curve, so that `recipes.evaluation.metrics` can average them and give intervals. KL is
KL(policy || reference) of whole responses, in nats.
"""

from math import comb

import numpy as np

from recipes.evaluation.metrics import interval, prompt_draws

ENOUGH = 5.0  # effective samples a prompt below which a point of the frontier is called uncertain


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n where no two responses have the same reward: log n - (n - 1) / n (2009.01325, appendix G.3).

    With ties it is an upper bound (2401.01879): see `best_of_n_kl_with_ties`.
    """
    return float(np.log(n) - (n - 1) / n)


def best_of_n_kl_with_ties(rewards: np.ndarray, n: int) -> np.ndarray:
    """KL (P,) of best-of-n where responses share rewards, as the short ones of a sharp policy do; plug-in estimate.

    Best-of-n changes the probability p of a level of reward to q = F^n - (F - p)^n, with F the probability of that
    level or less, and nothing within the level: KL = sum over levels of q log(q / p).
    """
    kls = []
    for row in np.asarray(rewards, dtype=np.float64):
        _, counts = np.unique(row, return_counts=True)
        p = counts / len(row)
        upto = np.cumsum(p)
        q = upto**n - (upto - p).clip(min=0) ** n
        kls.append(np.sum(q * np.log(np.where(q > 0, q / p, 1.0))))
    return np.array(kls)


def best_of_n(rewards: np.ndarray, n: int, values: np.ndarray | None = None) -> np.ndarray:
    """Unbiased estimate (P,) of the mean reward of the best of n, from N >= n samples.

    The i-th smallest of N is the largest of n drawn without replacement with probability C(i-1, n-1) / C(N, n).
    With `values` (P, N): their mean on the response that the reward picks, ties picked at random.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    size = rewards.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"best of {n} cannot be estimated from {size}")
    weights = np.array([comb(place, n - 1) / comb(size, n) for place in range(size)])
    values = rewards if values is None else np.asarray(values, dtype=np.float64)
    return np.array([_mean_of_ties(*row) @ weights for row in zip(rewards, values, strict=True)])


def _mean_of_ties(rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (N,) in the order of the rewards, each the mean over the responses with the same reward."""
    _, level = np.unique(rewards, return_inverse=True)
    return (np.bincount(level, weights=values) / np.bincount(level))[np.sort(level)]


def tilted(rewards: np.ndarray, betas: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The policy with the highest reward at its KL, `pi_ref(y) exp(r(y) / beta) / Z`, by importance weighting.

    Samples of the reference get the weights `softmax(r / beta)`; then reward = sum w r and KL = sum w log(N w). Both
    are biased in the order 1 / N, which the jackknife over two halves of the samples takes away:
    2 * estimate(N) - mean of estimate(N / 2).

    Args:
        rewards: (P, N), N >= 2.
        betas: (M,), in the unit of the rewards, from large (the reference) to small.
        scores: (P, N) each, the rewards and others, averaged with the weights.

    Returns:
        "kl", which cannot be estimated beyond log N, `scores` by their names, and "effective_samples" 1 / sum w^2,
        which says how many samples carry the estimate: each (P, M).
    """
    whole = _tilted(rewards, betas, scores)
    even, odd = (
        _tilted(rewards[:, start::2], betas, {name: values[:, start::2] for name, values in scores.items()})
        for start in (0, 1)
    )
    corrected = {name: 2 * whole[name] - (even[name] + odd[name]) / 2 for name in whole}
    return corrected | {"effective_samples": whole["effective_samples"]}


def _tilted(rewards: np.ndarray, betas: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    logits = rewards[:, None] / betas[:, None]  # (P, M, N)
    logits -= logits.max(-1, keepdims=True)
    log_weights = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    weights = np.exp(log_weights)
    return {
        "kl": (weights * (log_weights + np.log(rewards.shape[1]))).sum(-1),
        "effective_samples": 1 / (weights**2).sum(-1),
        **{name: (weights * values[:, None]).sum(-1) for name, values in scores.items()},
    }


def beta_grid(rewards: np.ndarray) -> np.ndarray:
    """Betas (32,) from hardly any tilt to almost the best sample, scaled by the spread of rewards to a prompt."""
    spread = float(np.asarray(rewards).std(1).mean())
    return (spread if spread > 0 else 1.0) * np.geomspace(20.0, 0.02, 32)


def gain_at_equal_kl(
    policy: tuple[np.ndarray, np.ndarray], reference: np.ndarray, curve: tuple[np.ndarray, np.ndarray]
) -> dict:
    """How a policy compares with a curve of reward against KL where the curve has the policy's KL.

    Between its points, and from the reference to its first one, the curve is taken as straight in sqrt(KL): so it is
    near the reference, for tilting as for a mixture of the reference with best-of-n.

    Args:
        policy: its KL and reward, (P,) each.
        reference: the reference's reward, (P,).
        curve: KL and reward, (P, M) each.

    Returns:
        "share": the policy's gain over the reference as a share of the curve's, `None` unless the curve gains in at
        least 97.5 % of the draws, as it does not at a KL that cannot be told from 0; "difference": policy minus curve;
        each `{"mean", "ci95"}`, over the same drawn prompts; "kl"; "beyond": the curve ends before the policy's KL,
        and its last point is taken.
    """
    rows = np.column_stack([*policy, reference])
    weights = np.vstack([np.full((1, len(rows)), 1 / len(rows)), prompt_draws(len(rows))])
    kl, reward, start = (weights @ rows).T
    curve_kl, curve_reward = (weights @ part for part in curve)
    distance, curve_distance = np.sqrt(kl.clip(min=0)), np.sqrt(curve_kl.clip(min=0))
    order = np.argsort(curve_distance, axis=1)
    at_kl = np.array(
        [
            np.interp(x, np.concatenate([[0.0], xs[places]]), np.concatenate([[y0], ys[places]]))
            for x, y0, xs, ys, places in zip(distance, start, curve_distance, curve_reward, order, strict=True)
        ]
    )
    possible = at_kl - start
    share = np.divide(reward - start, possible, out=np.full_like(possible, np.nan), where=possible > 0)
    difference, known = reward - at_kl, np.isfinite(share)
    is_known = known[0] and known[1:].mean() >= 0.975
    drawn = interval(share[1:][known[1:]], len(rows)) if is_known else None
    return {
        "difference": {"mean": float(difference[0]), "ci95": interval(difference[1:], len(rows))},
        "share": {"mean": float(share[0]), "ci95": drawn} if is_known else None,
        "kl": float(kl[0]),
        "beyond": bool(kl[0] > curve_kl[0].max()),
    }


def fit_over_optimization(kl: np.ndarray, gain: np.ndarray, form: str) -> dict:
    """Least-squares fit of the curves of Gao et al. (2210.10760) to gains in reward over the reference.

    With d = sqrt(KL): "bon" is d (alpha - beta d), "rl" is d (alpha - beta log d).

    Args:
        kl, gain: (M,), M >= 2 points with KL > 0.
    Returns:
        "form", "alpha", "beta", and "residual", the root mean square of what the curve leaves.
    """
    kl, gain = np.asarray(kl, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    known = kl > 0
    if known.sum() < 2:
        raise ValueError("an over-optimisation curve needs two points with KL above 0")
    kl, gain = kl[known], gain[known]
    d = np.sqrt(kl)
    design = np.column_stack([d, -d * d if form == "bon" else -d * np.log(d)])
    (alpha, beta), *_ = np.linalg.lstsq(design, gain, rcond=None)
    residual = float(np.sqrt(np.mean((design @ [alpha, beta] - gain) ** 2)))
    return {"form": form, "alpha": float(alpha), "beta": float(beta), "residual": residual}


def over_optimization_curve(kl: np.ndarray, fit: dict) -> np.ndarray:
    """The fitted gain (M,) at KL (M,) above 0."""
    d = np.sqrt(np.asarray(kl, dtype=np.float64))
    return d * (fit["alpha"] - fit["beta"] * (d if fit["form"] == "bon" else np.log(d)))
