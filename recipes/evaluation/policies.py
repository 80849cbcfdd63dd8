"""What is sampled, and the log-probabilities that KL and entropy come from."""

import inspect
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import selective_log_softmax_and_entropy

from recipes.models.heads import base_of

Conversation = list[dict]

LOGITS_AT_ONCE = 2**28  # 1 GiB in float32


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
    prompts = [prompt for prompt, _ in pairs]
    starts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
    rows = [start + ids for start, (_, ids) in zip(starts, pairs, strict=True)]
    left = sorted(range(len(rows)), key=lambda row: (len(starts[row]), len(rows[row])))
    vocabulary = base_of(model).config.get_text_config().vocab_size
    can_skip = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    results = {}
    with tqdm(total=len(rows), desc=title, disable=None) as progress:
        while left:
            first = len(starts[left[0]]) - 1  # where the logits of the first response begin
            longest = max(len(rows[row]) for row in left[:batch_size]) - first
            batch = left[: min(batch_size, max(1, LOGITS_AT_ONCE // (longest * vocabulary)))]
            del left[: len(batch)]
            inputs = tokenizer.pad(
                {"input_ids": [rows[row] for row in batch]}, padding_side="right", return_tensors="pt"
            ).to(model.device)
            ids = inputs["input_ids"]
            keep = ids.size(1) - first
            kept = {"logits_to_keep": keep} if can_skip else {}
            logits = model(**inputs, **kept).logits[:, -keep:-1].float()
            logps, entropies = selective_log_softmax_and_entropy(logits, ids[:, first + 1 :], temperature=temperature)
            for place, row in enumerate(batch):
                response = slice(len(starts[row]) - 1 - first, len(rows[row]) - 1 - first)
                tokens = [round(value, 5) for value in logps[place, response].tolist()]
                results[row] = (tokens, entropies[place, response].mean().item())
            progress.update(len(batch))
    return [results[row] for row in range(len(rows))]
