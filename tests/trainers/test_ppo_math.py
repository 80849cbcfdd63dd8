"""Rewards, advantages and losses against numbers worked out by hand."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from recipes.trainers.ppo_math import (
    adapted_kl_coef,
    compute_gae,
    masked_moments,
    token_kl,
    token_rewards,
    value_losses,
    whiten,
)

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def test_kl_estimators():
    logps, ref_logps = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.0, -1.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    torch.testing.assert_close(token_kl(logps, ref_logps, mask, "k1"), torch.tensor([[0.5, -1.0, 0.0]]))
    k3 = torch.tensor([[math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0, 0.0]])
    torch.testing.assert_close(token_kl(logps, ref_logps, mask, "k3"), k3)


def test_k1_and_k3_have_the_exact_kl_as_their_mean():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        kl = token_kl(p.log()[None], q.log()[None], torch.ones(1, 3), estimator)
        torch.testing.assert_close((kl[0] * p).sum(), exact)


def test_the_score_lands_on_the_last_real_token():
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 9.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, MASK, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.1, 1.85], [-0.2, -1.25, 0.0]]))


def test_compute_gae_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.5, 2.0, 0.0]])
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.6, 7.0]])  # the 7 is padding
    gamma, lam = 0.9, 0.8
    a2 = 1.0 - 0.3
    a1 = 0.0 + gamma * 0.3 - 0.2 + gamma * lam * a2
    a0 = 0.0 + gamma * 0.2 - 0.1 + gamma * lam * a1
    b1 = 2.0 - 0.6
    b0 = 0.5 + gamma * 0.6 - 0.4 + gamma * lam * b1
    expected = torch.tensor([[a0, a1, a2], [b0, b1, 0.0]])
    torch.testing.assert_close(compute_gae(rewards, values, MASK, gamma, lam), expected)


def test_lambda_one_gives_the_return_minus_the_value():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 0.25, -1.0]])
    advantages = compute_gae(rewards, values, torch.ones(1, 3), 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([[6.0, 5.0, 3.0]]) - values)


def test_whitening_ignores_padding_and_can_keep_the_mean():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])
    mean, variance = masked_moments(values, MASK)
    assert (mean.item(), variance.item()) == (3.0, 2.5)
    white = whiten(values, MASK)
    torch.testing.assert_close(white, (values - 3.0) / math.sqrt(2.5) * MASK)
    torch.testing.assert_close(whiten(values, MASK, shift_mean=False), (white + 3.0) * MASK)


def test_moments_of_two_processes_are_those_of_all_tokens():
    """Two threads, a row each, whose `reduce` adds up what both give."""
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])
    given, barrier = [None, None], Barrier(2, timeout=10)

    def moments(row: int):
        def reduce(own):
            given[row] = own
            barrier.wait()
            total = sum(given)
            barrier.wait()
            return total

        return masked_moments(values[row : row + 1], MASK[row : row + 1], reduce)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(moments, range(2)))
    tokens = values[MASK.bool()]
    for mean, variance in found:
        torch.testing.assert_close(mean, tokens.mean())
        torch.testing.assert_close(variance, tokens.var())


def test_value_loss_takes_the_worse_of_plain_and_clipped():
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    losses, clipped = value_losses(values, old, returns, cliprange_value=0.2)
    torch.testing.assert_close(losses, torch.tensor([[0.5 * 0.8**2, 0.5 * 0.9**2]]))
    assert clipped.tolist() == [[True, False]]


@pytest.mark.parametrize(("kl", "expected"), [(12.0, 0.1 * 1.01), (6.6, 0.1 * 1.005), (0.0, 0.1 * 0.99)])
def test_adaptive_kl_moves_in_proportion_and_at_most_a_fifth(kl, expected):
    assert adapted_kl_coef(0.1, kl, target=6.0, episodes=500, horizon=10_000) == pytest.approx(expected)
