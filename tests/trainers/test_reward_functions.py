"""What a Python reward function may return: one number or None for each completion, and anything else is one line."""

import asyncio
import functools
import inspect
import math
import re

import numpy as np
import pytest
import torch

from recipes.cli.errors import UserError
from recipes.trainers.reward_functions import checked


def call(returned, asynchronous=False):
    """What a reward function named `mine` that returns this for two completions is taken for."""

    def mine(completions, **kwargs):
        return returned

    async def mine_async(completions, **kwargs):
        return returned

    mine_async.__name__ = "mine"
    function = checked(mine_async if asynchronous else mine)
    assert function.__name__ == "mine" and inspect.iscoroutinefunction(function) == asynchronous
    rewards = function(prompts=["a", "b"], completions=["c", "d"], completion_ids=[[1], [2]])
    return asyncio.run(rewards) if asynchronous else rewards


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (1, 0.5),
        [True, 0.5],
        np.array([1, 0.5]),
        torch.tensor([1, 0.5]),
        [torch.tensor(1.0), np.float32(0.5)],
    ],
)
def test_numbers_of_any_kind(returned, asynchronous):
    assert call(returned, asynchronous) == [1.0, 0.5]


def test_none_passes_over_a_response():
    assert call([None, 2]) == [None, 2.0]


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (lambda prompts, completions: [], "got an unexpected keyword argument"),
        (lambda completions, solution, **kwargs: [], "missing a required argument: 'solution'"),
    ],
)
def test_a_function_that_cannot_be_called_is_one_line_before_the_first_rollout(function, shown):
    with pytest.raises(UserError, match=f"cannot be called by TRL: {shown}"):
        checked(function, ["prompt", "answer"])
    checked(lambda completions, answer, **kwargs: [], ["prompt", "answer"])


def test_what_takes_all_keywords_or_shows_none_is_no_wrong_signature():
    @functools.wraps(lambda completions: completions)
    def decorated(completions, **kwargs):
        return [0.0 for _ in completions]

    assert checked(decorated, ["prompt", "answer"])(completions=["w1"], answer=["w2"]) == [0.0]
    checked(max, ["prompt"])  # inspect knows no signature of it


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (1.0, "returned 1.0"),
        (torch.tensor(1.0), "returned 1.0"),
        (None, "returned None"),
        ("good", "returned 'good'"),
        ({"a": 1.0, "b": 2.0}, "returned {'a': 1.0, 'b': 2.0}"),
        ([], "returned 0 rewards"),
        ([1.0], "returned 1 reward"),
        ([1.0, 2.0, 3.0], "returned 3 rewards"),
        ([1.0, "2"], "returned '2' for completion 1"),
        ([[1.0], [2.0]], "returned [1.0] for completion 0"),
        ([math.nan, math.nan], "returned nan for completion 0"),
        (np.array([0.0, np.nan]), "returned nan for completion 1"),
    ],
)
def test_anything_else_names_the_function_what_it_gave_and_what_is_wanted(returned, shown, asynchronous):
    with pytest.raises(UserError, match=re.escape(shown) + "; expected a list of 2 numbers"):
        call(returned, asynchronous)
