"""The reward model as a judge of samples, and of the pairs that it is measured on."""

import json
from functools import cached_property

import numpy as np
from accelerate import PartialState
from trl import ModelConfig

from recipes.cli.errors import UserError
from recipes.data.report import Report
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.parts import identity
from recipes.evaluation.policies import Conversation, Sample, with_prompts
from recipes.evaluation.reward_quality import Pair
from recipes.formatting import Formatter, RowArguments, load_rows
from recipes.models.loading import (
    load_reward_model,
    read_reward_statistics,
    read_trained_prompts,
    score_conversations,
)
from recipes.models.source import resolve_model


class RewardModel:
    """A reward model, loaded once something is to be scored. Rewards are in the unit that PPO optimises."""

    def __init__(self, args: EvaluationArguments, model_args: ModelConfig):
        self.args, self.model_args = args, model_args
        self.path = args.reward_model_name_or_path
        self.source = resolve_model(self.path, trust_remote_code=args.trust_remote_code)
        statistics = read_reward_statistics(self.path) if args.normalize_scores else None
        self.mean, self.std = (statistics["mean"], statistics["std"]) if statistics else (0.0, 1.0)
        self.unit = "standard deviations of the ranked responses' scores" if statistics else "raw scores"
        self.made_from = identity(self.path) | {"mean": self.mean, "std": self.std}

    @cached_property
    def loaded(self):
        model, tokenizer = load_reward_model(self.source, self.model_args)
        return model.to(PartialState().device), tokenizer

    def raw_scores(self, conversations: list[Conversation]) -> list[float]:
        """Scores of conversations, in their order; one that is there twice runs once.

        Raises:
            UserError: a score is not a finite number.
        """
        model, tokenizer = self.loaded
        keys = [json.dumps(conversation) for conversation in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        values = score_conversations(model, tokenizer, list(distinct.values()), self.args.eval_batch_size)
        if not np.isfinite(values).all():
            raise UserError(f"The reward model {self.path} gives scores that are not finite numbers.")
        scores = dict(zip(distinct, values, strict=True))
        return [scores[key] for key in keys]

    def rewards(self, prompts: list[Conversation], samples: list[list[Sample]]) -> list[list[float]]:
        """The reward of each sample of each prompt."""
        conversations = [
            prompt + [{"role": "assistant", "content": sample.text}]
            for prompt, sample in with_prompts(prompts, samples)
        ]
        scores = (np.array(self.raw_scores(conversations)) - self.mean) / self.std
        return scores.reshape(len(prompts), -1).tolist()

    def pairs(self, rows: list[dict]) -> list[Pair]:
        """Pairs from `read_pairs`, with raw scores: `sigmoid` turns their differences into probabilities."""
        tokenizer = self.loaded[1]
        sides = [(row, side) for row in rows for side in ("chosen", "rejected")]
        texts = ["\n".join(turn["content"] for turn in row[side]) for row, side in sides]
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        scores = self.raw_scores([row["prompt"] + row[side] for row, side in sides])
        return [
            Pair(
                group=row["group_id"],
                chosen=texts[2 * place],
                rejected=texts[2 * place + 1],
                chosen_score=scores[2 * place],
                rejected_score=scores[2 * place + 1],
                chosen_length=lengths[2 * place],
                rejected_length=lengths[2 * place + 1],
                source=row["source"],
                annotator=row["annotator"],
            )
            for place, row in enumerate(rows)
        ]

    def trained_on(self, rows: list[dict]) -> list[str]:
        """The places of those pairs whose prompt was in the training data of the reward model, as far as is known."""
        known = read_trained_prompts(self.path)
        return [row["place"] for row in rows if row["group_id"] in known]


def read_pairs(sources: list[str], format_args: RowArguments) -> list[dict]:
    """The pairs of preference datasets, with `source`, `annotator` and `place`, the file and line.

    `source` is a row's own column of that name, else the name of the dataset.
    """
    pairs = []
    for source in sources:
        rows = load_rows(source)
        known = {(row.file, row.line): row.data for row in rows if isinstance(row.data, dict)}
        report = Report(rows.source, "preference")
        formatter = Formatter("preference", **format_args.options())
        for row, output in formatter(rows, report):
            data = known[row.file, row.line]
            annotator = None if data.get("annotator") is None else str(data["annotator"])
            own = {"source": str(data.get("source") or source), "annotator": annotator}
            pairs.append(output | own | {"place": f"{row.file}:{row.line}"})
        print(report)
    return pairs
