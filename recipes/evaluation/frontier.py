"""Reward against KL: best-of-n, the best that any policy can do at a KL, and over-optimisation curves.

All from N samples of the reference for each of P prompts and their rewards (P, N). A curve is columns (P, M), a value
for each prompt at each of its M points, so that prompts can be resampled. KL is KL(policy || reference) of whole
responses, in nats.
"""

from math import comb

import numpy as np

from recipes.evaluation.metrics import over_prompts, with_interval

ENOUGH = 5.0  # effective samples a prompt below which a point of the frontier is called uncertain
Curve = dict[str, np.ndarray]


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n where no two responses have the same reward (2009.01325, appendix G.3); else an upper bound."""
    return float(np.log(n) - (n - 1) / n)


def best_of_n_kl_with_ties(rewards: np.ndarray, n: int) -> np.ndarray:
    """KL (P,) of best-of-n where responses share rewards (2401.01879), as short ones do; plug-in estimate.

    Best-of-n changes the probability p of a level of reward to q = F^n - (F - p)^n, with F the probability of that
    level or less, and nothing within the level: KL = sum over levels of q log(q / p).
    """
    kls = []
    for row in rewards:
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
    size = rewards.shape[1]
    weights = np.array([comb(place, n - 1) / comb(size, n) for place in range(size)])
    values = rewards if values is None else values
    return np.array([_mean_of_ties(*row) @ weights for row in zip(rewards, values, strict=True)])


def _mean_of_ties(rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (N,) in the order of the rewards, each the mean over the responses with the same reward."""
    _, level = np.unique(rewards, return_inverse=True)
    return (np.bincount(level, weights=values) / np.bincount(level))[np.sort(level)]


def tilted(rewards: np.ndarray, betas: np.ndarray, scores: Curve) -> Curve:
    """The policy with the highest reward at its KL, `pi_ref(y) exp(r(y) / beta) / Z`, by importance weighting.

    Samples of the reference get the weights `softmax(r / beta)`; then reward = sum w r and KL = sum w log(N w). Both
    are biased in the order 1 / N, which the jackknife over two halves of the samples takes away:
    2 * estimate(N) - mean of estimate(N / 2).

    Args:
        rewards: (P, N), N >= 2.
        betas: (M,), in the unit of the rewards, from large (the reference) to small.
        scores: (P, N) each, the rewards and others.

    Returns:
        "kl", at most log 2N, the means of `scores` by their names, and "effective_samples" 1 / sum w^2, how many
        samples carry the estimate.
    """
    whole, even, odd = (
        _tilted(rewards[:, part], betas, {name: values[:, part] for name, values in scores.items()})
        for part in (slice(None), slice(0, None, 2), slice(1, None, 2))
    )
    corrected = {name: 2 * whole[name] - (even[name] + odd[name]) / 2 for name in whole}
    return corrected | {"effective_samples": whole["effective_samples"]}


def _tilted(rewards: np.ndarray, betas: np.ndarray, scores: Curve) -> Curve:
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
    """Betas (32,) from hardly any tilt to almost the best sample, scaled by the rewards' deviation within prompts."""
    std = float(rewards.std(1).mean())
    return (std if std > 0 else 1.0) * np.geomspace(20.0, 0.02, 32)


def gain_at_equal_kl(
    policy: tuple[np.ndarray, np.ndarray], reference: np.ndarray, curve: tuple[np.ndarray, np.ndarray]
) -> dict:
    """How a policy compares with a curve of reward against KL where the curve has the policy's KL.

    Between its points, and from the reference to its first one, the curve is taken as straight in sqrt(KL), as it is
    near the reference.

    Args:
        policy: its KL and reward, (P,) each.
        reference: the reference's reward, (P,).
        curve: KL and reward, (P, M) each.

    Returns:
        "share": the policy's gain over the reference as a share of the curve's, `None` where fewer than 97.5 % of the
        draws have such a gain, as at a KL that cannot be told from 0; "difference": policy minus curve; "kl"; and
        "beyond": the curve ends before the policy's KL, and its last point is taken.
    """
    kl, reward, start = map(over_prompts, (*policy, reference))
    curve_kl, curve_reward = map(over_prompts, curve)
    distances = np.sqrt(np.column_stack([np.zeros_like(start), curve_kl]).clip(min=0))
    rewards = np.column_stack([start, curve_reward])
    order = np.argsort(distances, axis=1, kind="stable")
    distances, rewards = (np.take_along_axis(part, order, axis=1) for part in (distances, rewards))
    at_kl = np.array([np.interp(*row) for row in zip(np.sqrt(kl.clip(min=0)), distances, rewards, strict=True)])
    known = at_kl > start
    share = (reward - start)[known] / (at_kl - start)[known]
    return {
        "difference": with_interval(reward - at_kl),
        "share": with_interval(share) if known[0] and known.mean() >= 0.975 else None,
        "kl": float(kl[0]),
        "beyond": bool(kl[0] > curve_kl[0].max()),
    }


def over_optimization_curve(kl: np.ndarray, fit: dict) -> np.ndarray:
    """The gain (M,) at KL (M,) above 0 by a curve of Gao et al. (2210.10760), of which `fit` has form, alpha and beta.

    With d = sqrt(KL): "bon" is d (alpha - beta d), "rl" is d (alpha - beta log d).
    """
    d = np.sqrt(kl)
    return d * (fit["alpha"] - fit["beta"] * (d if fit["form"] == "bon" else np.log(d)))


def fit_over_optimization(kl: np.ndarray, gain: np.ndarray, form: str) -> dict:
    """Least-squares fit of such a curve to gains in reward over the reference, at two or more KLs.

    Returns:
        "form", "alpha", "beta", and "residual", the root mean square of what the curve leaves.
    """
    # The curve is linear in alpha and beta: what each is multiplied with is the curve where it is 1 and the other 0.
    units = ({"form": form, "alpha": 1, "beta": 0}, {"form": form, "alpha": 0, "beta": 1})
    terms = np.column_stack([over_optimization_curve(kl, unit) for unit in units])
    (alpha, beta), *_ = np.linalg.lstsq(terms, gain, rcond=None)
    fit = {"form": form, "alpha": float(alpha), "beta": float(beta)}
    return fit | {"residual": float(np.sqrt(np.mean((over_optimization_curve(kl, fit) - gain) ** 2)))}
