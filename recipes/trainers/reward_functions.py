"""Python reward functions: what they give is checked before it becomes a score."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

from trl.trainer.utils import get_callable_name, is_async_callable

from recipes.cli.errors import UserError, counted

# What TRL calls reward functions with, beside the columns of the dataset
KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def checked(function: Callable, columns: Iterable[str] | None = None) -> Callable:
    """`function`, of TRL's signature, with a UserError that names it where it does not give one number a response.

    None stands for a response that the function does not judge. Functions may be asynchronous. One that cannot be
    called with TRL's keywords and the dataset's columns, where these are known, is a UserError at once.
    """
    name = get_callable_name(function)
    title = f"The reward function {name!r}"
    try:
        if columns is not None:
            signature = inspect.signature(function, follow_wrapped=False)  # a decorator may pass on less than it takes
            signature.bind(**dict.fromkeys({*KEYWORDS, *columns} - {"prompt", "completion"}))
    except ValueError:  # code that is not Python has no signature
        pass
    except TypeError as error:
        form = f"{name}(prompts, completions, **kwargs)"
        needed = "--keep_columns passes it columns of the prompts"
        raise UserError(f"{title} cannot be called by TRL: {error}. Write it as {form}; {needed}.") from error

    def call(**kwargs):
        return check_rewards(function(**kwargs), title, len(kwargs["completions"]))

    async def call_async(**kwargs):
        return check_rewards(await function(**kwargs), title, len(kwargs["completions"]))

    wrapper = functools.wraps(function)(call_async if is_async_callable(function) else call)
    wrapper.__name__ = name
    return wrapper


def check_rewards(rewards: Any, title: str, count: int) -> list[float | None]:
    """What the function `title` returned for `count` completions, as numbers or None; all else is a UserError."""
    one_each = f"expected a list of {counted(count, 'number')}, one for each completion, or None for one not judged"
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if not isinstance(rewards, list | tuple):
        raise UserError(f"{title} returned {rewards!r:.60}; {one_each}.")
    if len(rewards) != count:
        raise UserError(f"{title} returned {counted(len(rewards), 'reward')}; {one_each}.")
    numbers: list[float | None] = []
    for row, reward in enumerate(rewards):
        reward = reward.item() if hasattr(reward, "item") else reward
        if reward is not None and (not isinstance(reward, Real) or not math.isfinite(reward)):
            raise UserError(f"{title} returned {reward!r:.60} for completion {row}; {one_each}.")
        numbers.append(None if reward is None else float(reward))
    return numbers
