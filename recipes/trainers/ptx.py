"""Supervised batches beside PPO's, for PPO-ptx (2203.02155), so that the policy forgets less."""

import json

import torch
from datasets import Dataset
from trl.data_utils import common_prefix_length, is_conversational
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes.cli.errors import UserError

IGNORED = -100


class PtxBatches:
    """Endless batches of demonstrations; which one a step gets depends on the seed and the step only.

    Args:
        dataset: rows with `prompt` and `completion`, as messages or text; only the completion is trained. Rows of
            pretraining have `text`, all of which is trained.
        max_length: tokens of a row; longer ones are cut at the end, and a row without a trained one is a UserError.
        template_arguments: of the chat template, the same as in rollouts.
    """

    def __init__(self, dataset: Dataset, tokenizer, batch_size: int, max_length: int, seed: int, **template_arguments):
        self.tokenizer, self.batch_size, self.max_length, self.seed = tokenizer, batch_size, max_length, seed
        self.template_arguments = template_arguments
        self.rows = dataset.map(self._tokenize, with_indices=True, remove_columns=dataset.column_names)
        self.collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
        self.epoch, self.order = -1, [0]

    def _tokenize(self, row: dict, index: int) -> dict[str, list[int]]:
        if "text" in row:
            prompt, ids = [], [*self.tokenizer(row["text"])["input_ids"], self.tokenizer.eos_token_id]
        elif is_conversational(row):
            tools = row.get("tools")
            options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **self.template_arguments}
            render = self.tokenizer.apply_chat_template
            prompt = render(row["prompt"], add_generation_prompt=True, return_dict=False, **options)
            ids = render(row["prompt"] + row["completion"], return_dict=False, **options)
        else:
            prompt = self.tokenizer(row["prompt"])["input_ids"]
            ids = [*self.tokenizer(row["prompt"] + row["completion"])["input_ids"], self.tokenizer.eos_token_id]
        ids = ids[: self.max_length]
        # TRL's rule for SFT: a generation prompt need not be a prefix of the finished answer.
        masked = common_prefix_length(prompt, ids)
        if masked == len(ids):
            raise UserError(
                f"Row {index + 1} of the ptx dataset has nothing to train within {self.max_length} tokens: "
                "raise ptx_max_length or drop it."
            )
        return {"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]}

    def __call__(self, step: int, process_index: int, num_processes: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` of one process at one micro-step, (batch_size, longest)."""
        first = (step * num_processes + process_index) * self.batch_size
        return self.collate([self._row(number) for number in range(first, first + self.batch_size)])

    def _row(self, number: int) -> dict[str, list[int]]:
        epoch, place = divmod(number, len(self.rows))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.rows), generator=generator).tolist()
        return self.rows[self.order[place]]
