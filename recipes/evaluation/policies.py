"""Samples of a policy with the log-probabilities that KL and entropy come from."""

import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import selective_log_softmax_and_entropy

from recipes.cli.errors import UserError
from recipes.models.sampling import Response, SamplingArguments, sample
from recipes.trainers.fast.drop_finished import DropFinishedSampler

Conversation = list[dict]


@dataclass(frozen=True)
class Sample(Response):
    """A response with what its policy thought of it.

    Args:
        logps: log-probability of each token at the sampling temperature, (T,), EOS included.
        entropy: mean entropy of the next token over the response, in nats.
    """

    logps: list[float]
    entropy: float

    def to_json(self) -> dict:
        return asdict(self) | {"logps": [round(value, 5) for value in self.logps]}


@dataclass(frozen=True)
class Sampled:
    """What is sampled: a policy under a name, how often per prompt, and how sharply; a checkpoint has run and step."""

    name: str
    path: str
    num_generations: int
    temperature: float
    run: str | None = None
    step: int | None = None


def draw_samples(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Conversation],
    sampling: SamplingArguments,
    batch_size: int,
    name: str,
) -> list[list[Sample]]:
    """`num_generations` samples of the policy for each prompt, in their order."""
    with DropFinishedSampler().installed(base_of(model)):
        groups = sample(model, tokenizer, prompts, sampling, f"Sampling {name}")
    pairs = [(prompt, r.token_ids) for prompt, group in zip(prompts, groups, strict=True) for r in group]
    known = iter(token_log_probs(model, tokenizer, pairs, sampling.temperature, batch_size, f"Log-probs of {name}"))
    samples = []
    for group in groups:
        rows = []
        for response in group:
            logps, entropy = next(known)
            rows.append(Sample(response.text, response.finished, response.token_ids, logps, entropy))
        samples.append(rows)
    return samples


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
    for the responses only, in batches of rows of like length.
    """
    starts = tokenizer.apply_chat_template(
        [prompt for prompt, _ in pairs], add_generation_prompt=True, return_dict=False
    )
    rows = [start + ids for start, (_, ids) in zip(starts, pairs, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: (len(starts[row]), len(rows[row])))
    keeps = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    results: list[tuple[list[float], float]] = [([], 0.0)] * len(rows)
    for first in tqdm(range(0, len(order), batch_size), desc=title, disable=None):
        batch = order[first : first + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [rows[row] for row in batch]}, padding_side="right", return_tensors="pt"
        ).to(model.device)
        width = inputs["input_ids"].size(1)
        skipped = min(len(starts[row]) for row in batch) - 1  # logits before the first response are not made
        logits = model(**inputs, **({"logits_to_keep": width - skipped} if keeps else {})).logits
        logits = logits[:, (0 if keeps else skipped) : -1].float() / temperature
        targets = inputs["input_ids"][:, skipped + 1 :]
        logps, entropies = selective_log_softmax_and_entropy(logits, targets, entropy_requires_grad=False)
        for place, row in enumerate(batch):
            response = slice(len(starts[row]) - 1 - skipped, len(rows[row]) - 1 - skipped)
            results[row] = (logps[place, response].tolist(), entropies[place, response].mean().item())
    return results


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def same_vocabulary(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether token ids of one mean the same to the other, so that log-probabilities can be compared."""
    return tokenizer.get_vocab() == other.get_vocab()


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
    places = {round((number + 1) * len(found) / count) - 1 for number in range(count)} if count < len(found) else None
    return found if places is None else [found[place] for place in sorted(places)]


def named_paths(flag: str, items: Iterable[str]) -> dict[str, str]:
    """`name=path` items as a dictionary in their order.

    Raises:
        UserError: an item has another form, or a name stands there twice.
    """
    paths: dict[str, str] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not separator or not path or not name or not all(char.isalnum() or char in "._-" for char in name):
            raise UserError(f"{flag} {item}: write it as NAME=PATH, the name of letters, digits, dots, _ and -.")
        if name in paths:
            raise UserError(f"{flag}: the name {name} stands there twice.")
        paths[name] = path
    return paths
