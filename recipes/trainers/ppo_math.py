"""The arithmetic of PPO on token sequences: rewards, advantages, whitening and the value loss, as pure functions.

Shapes: B responses of at most T tokens, right padded; `mask` is (B, T) with 1 at real response tokens, EOS included.
All tensors are float32 unless a docstring says otherwise.
"""

from collections.abc import Callable

import torch


def masked_moments(
    values: torch.Tensor, mask: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance over the tokens of `mask`, on all processes when `reduce` sums over them.

    Two passes, because the sum of squares loses the variance of a large mean in float32.
    """
    total, count = reduce(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    mean = total / count.clamp(min=1)
    squares = reduce((((values - mean) * mask) ** 2).sum())
    return mean, squares / (count - 1).clamp(min=1)


def whiten(values, mask, reduce=lambda x: x, shift_mean: bool = True) -> torch.Tensor:
    """Scale `values` (B, T) to variance 1 over the tokens of `mask`, and to mean 0 unless `shift_mean` is off.

    Rewards keep their mean, advantages lose it (1909.08593, as in TRL's `masked_whiten`). Padding becomes 0.
    """
    mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def token_kl(logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimate of KL(policy || reference) in nats at each sampled token, (B, T), from its two log-probabilities.

    `"k1"` = log(p/q) is unbiased and can be negative; `"k3"` = q/p - 1 + log(p/q) is never negative and has less
    variance (http://joschu.net/blog/kl-approx.html). In the reward, where no gradient flows through it, k3 is the
    weaker penalty: its expected policy gradient is that of KL(p || q) - KL(q || p), which vanishes near the reference.
    """
    log_ratio = (ref_logps - logps) * mask
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """`r_t = -kl_coef * KL_t`, plus the response's score (B,) at its last real token: (B, T)."""
    rewards = -kl_coef * kl * mask
    last = (mask.sum(1).long() - 1).clamp(min=0)
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """Generalised advantage estimation (1506.02438), (B, T); the value after the last token is 0.

    `values[:, t]` is the critic's value of the state before token t.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.size(1) - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange_value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped squared error at each token, (B, T), and where the clipped one was the larger (bool).

    `0.5 * max((V - R)^2, (clip(V, V_old ± cliprange_value) - R)^2)`, as in 1707.06347's reference code.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    plain, cut = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.max(plain, cut), cut > plain


def policy_losses(
    log_ratio: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped loss at each token, (B, T), and statistics of the update, (B, T) each.

    `-min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A)` (1707.06347, equation 7), with
    `log_ratio = log(new policy / rollout's policy)`.
    """
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses = torch.max(plain, clipped)
    return losses, {
        "policy/approxkl_avg": 0.5 * log_ratio**2,
        "policy/clipfrac_avg": clipped > plain,
        "loss/policy_avg": losses,
        "val/ratio": ratio,
    }


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Ziegler's proportional controller (1909.08593, section 2.2): the coefficient rises where there is too much KL.

    `kl` is nats a response of the last rollout, and `episodes` is what that held on all processes.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
