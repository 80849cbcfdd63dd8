"""Samples of a policy with the log-probabilities that KL and entropy come from."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import selective_log_softmax_and_entropy

from recipes.cli.errors import UserError
from recipes.models.heads import base_of
from recipes.models.sampling import Response

Conversation = list[dict]
T = TypeVar("T")

LOGITS_AT_ONCE = 2**28  # 1 GiB in float32


@dataclass(frozen=True)
class Sample(Response):
    """A response with log-probabilities and entropy of its policy.

    Args:
        logps: log-probability of each token at the sampling temperature, (T,), EOS included; of a greedy one, at 1.
        entropy: mean entropy of the next token over the response, in nats.
    """

    logps: list[float]
    entropy: float


@dataclass(frozen=True)
class PolicySpec:
    """A named policy, its samples per prompt and its temperature; a checkpoint has run and step."""

    name: str
    path: str
    num_generations: int
    temperature: float
    run: str | None = None
    step: int | None = None

    def at(self, temperature: float, num_generations: int) -> "PolicySpec":
        """The same policy at another temperature; 0 decodes greedily."""
        name = f"{self.name}@T{temperature:g}"
        return replace(self, name=name, num_generations=num_generations, temperature=temperature)


def with_prompts(prompts: list[Conversation], groups: Iterable[Iterable[T]]) -> list[tuple[Conversation, T]]:
    """Each response of each prompt's group beside its prompt, in one list."""
    return [(prompt, response) for prompt, group in zip(prompts, groups, strict=True) for response in group]


@torch.no_grad()
def token_log_probs(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[Conversation, list[int]]],
    temperature: float,
    batch_size: int,
    title: str = "Log-probs",
) -> list[tuple[list[float], float]]:
    """For each prompt and response tokens: log-probability of each token, and the mean entropy, in nats.

    `temperature` divides the logits. The prompt is written with the tokenizer's own chat template. Logits are made
    for the responses only, in batches of rows of like length; fewer rows where that would be more than
    `LOGITS_AT_ONCE` numbers. Log-probabilities have five digits, to be stored.
    """
    starts = tokenizer.apply_chat_template(
        [prompt for prompt, _ in pairs], add_generation_prompt=True, return_dict=False
    )
    rows = [start + ids for start, (_, ids) in zip(starts, pairs, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: (len(starts[row]), len(rows[row])))
    keeps = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    results: list[tuple[list[float], float]] = [([], 0.0)] * len(rows)
    vocabulary, first = base_of(model).config.get_text_config().vocab_size, 0
    progress = tqdm(total=len(order), desc=title, disable=None)
    while first < len(order):
        batch = order[first : first + batch_size]
        longest = max(len(rows[row]) for row in batch) - min(len(starts[row]) for row in batch) + 1
        batch = batch[: max(1, LOGITS_AT_ONCE // (longest * vocabulary))]
        first += len(batch)
        progress.update(len(batch))
        inputs = tokenizer.pad(
            {"input_ids": [rows[row] for row in batch]}, padding_side="right", return_tensors="pt"
        ).to(model.device)
        width = inputs["input_ids"].size(1)
        skipped = min(len(starts[row]) for row in batch) - 1  # logits before the first response are not made
        logits = model(**inputs, **({"logits_to_keep": width - skipped} if keeps else {})).logits
        logits = logits[:, (0 if keeps else skipped) : -1].float()
        targets = inputs["input_ids"][:, skipped + 1 :]
        logps, entropies = selective_log_softmax_and_entropy(logits, targets, temperature=temperature)
        for place, row in enumerate(batch):
            response = slice(len(starts[row]) - 1 - skipped, len(rows[row]) - 1 - skipped)
            tokens = [round(value, 5) for value in logps[place, response].tolist()]
            results[row] = (tokens, entropies[place, response].mean().item())
    return results


def checkpoints(run: str, count: int) -> list[tuple[int, str]]:
    """`(step, folder)` of up to `count` checkpoints of a training run, spread evenly, the last one included.

    Raises:
        UserError: there is none.
    """
    found = sorted(
        (int(path.name.rpartition("-")[2]), str(path))
        for path in Path(run).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal() and path.is_dir()
    )
    if not found:
        raise UserError(f"--checkpoints {run}: there is no checkpoint-N folder in it: train with --save_steps.")
    count = min(count, len(found))
    return [found[round((number + 1) * len(found) / count) - 1] for number in range(count)]


def named_paths(flag: str, items: Iterable[str]) -> dict[str, str]:
    """`name=path` items as a dictionary in their order.

    Raises:
        UserError: an item has another form, or a name is given twice.
    """
    paths: dict[str, str] = {}
    for item in items:
        name, _, path = item.partition("=")
        if not path or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{flag} {item}: write it as NAME=PATH, the name of letters, digits, dots, _ and -.")
        if name in paths:
            raise UserError(f"{flag}: the name {name} is given twice.")
        paths[name] = path
    return paths
