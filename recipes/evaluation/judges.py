"""Python functions as judges: the signature of TRL's reward functions, so that one function serves both."""

import numpy as np

from recipes.cli.arguments import import_function
from recipes.cli.errors import UserError
from recipes.evaluation.policies import Conversation, Sample


def judge_scores(path: str, prompts: list[Conversation], samples: list[list[Sample]]) -> list[list[float]]:
    """Scores by a Python judge, a function of the signature of TRL's reward functions, for each sample of each prompt.

    Raises:
        UserError: it does not return one number per response.
    """
    judge = import_function(path, "--judges")
    flat = [(prompt, sample) for prompt, group in zip(prompts, samples, strict=True) for sample in group]
    scores = judge(
        prompts=[prompt for prompt, _ in flat],
        completions=[[{"role": "assistant", "content": sample.text}] for _, sample in flat],
        completion_ids=[sample.token_ids for _, sample in flat],
    )
    numbers = [score for score in scores if isinstance(score, int | float) and np.isfinite(score)]
    if len(numbers) != len(flat):
        raise UserError(f"--judges {path}: {len(numbers)} numbers for {len(flat)} responses; expected one for each.")
    rest = iter(float(score) for score in scores)
    return [[next(rest) for _ in group] for group in samples]
