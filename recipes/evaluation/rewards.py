"""The reward model as a judge of samples, and of the pairs that it is measured on."""

import json

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm
from trl import ModelConfig

from recipes.cli.errors import UserError
from recipes.data.report import Report
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.parts import identity
from recipes.evaluation.policies import Conversation, Sample, with_prompts
from recipes.evaluation.reward_quality import Pair
from recipes.formatting import Formatter, FormattingArguments, load_rows
from recipes.models.loading import load_reward_model, read_reward_statistics, score_conversations


class RewardModel:
    """A reward model, loaded once something is to be scored. Rewards are in the unit that PPO optimises."""

    def __init__(self, args: EvaluationArguments, model_args: ModelConfig):
        self.args, self.model_args = args, model_args
        self.path = args.reward_model_name_or_path
        statistics = read_reward_statistics(self.path) if args.normalize_scores else None
        self.mean, self.std = (statistics["mean"], statistics["std"]) if statistics else (0.0, 1.0)
        self.unit = "standard deviations of the ranked responses' scores" if statistics else "raw scores"
        self.made_from = identity(self.path) | {"mean": self.mean, "std": self.std}
        self.loaded = None

    def load(self):
        if self.loaded is None:
            model, tokenizer = load_reward_model(self.path, self.model_args, self.args.trust_remote_code)
            self.loaded = (model.to(PartialState().device), tokenizer)
        return self.loaded

    def raw_scores(self, conversations: list[Conversation], title: str) -> list[float]:
        """Scores of conversations, in their order; one that is there twice runs once.

        Raises:
            UserError: a score is not a finite number.
        """
        model, tokenizer = self.load()
        keys = [json.dumps(conversation) for conversation in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        order = sorted(distinct, key=len)
        scores: dict[str, float] = {}
        size = 16 * self.args.eval_batch_size
        for start in tqdm(range(0, len(order), size), desc=title, disable=None):
            chunk = order[start : start + size]
            values = score_conversations(model, tokenizer, [distinct[key] for key in chunk], self.args.eval_batch_size)
            scores |= zip(chunk, values, strict=True)
        if not np.isfinite(list(scores.values())).all():
            raise UserError(f"The reward model {self.path} gives scores that are not finite numbers.")
        return [scores[key] for key in keys]

    def rewards(
        self, prompts: list[Conversation], samples: list[list[Sample]], title: str = "Rewards"
    ) -> list[list[float]]:
        """The reward of each sample of each prompt."""
        conversations = [
            prompt + [{"role": "assistant", "content": sample.text}]
            for prompt, sample in with_prompts(prompts, samples)
        ]
        scores = (np.array(self.raw_scores(conversations, title)) - self.mean) / self.std
        return scores.reshape(len(prompts), -1).tolist()

    def pairs(self, rows: list[dict]) -> list[Pair]:
        """Pairs from `read_pairs`, with raw scores: `sigmoid` turns their differences into probabilities."""
        _, tokenizer = self.load()
        sides = ("chosen", "rejected")
        scores = iter(self.raw_scores([row["prompt"] + row[side] for row in rows for side in sides], "Pairs"))
        pairs = []
        for row in rows:
            texts = ["\n".join(turn["content"] for turn in row[side]) for side in sides]
            lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
            values = (next(scores), next(scores))
            pairs.append(Pair(row["group_id"], *texts, *values, *lengths, row["source"], row["annotator"]))
        return pairs


def read_pairs(sources: list[str], format_args: FormattingArguments) -> list[dict]:
    """The pairs of preference datasets, with `source` and `annotator`.

    `source` is a row's own column of that name, else the name of the dataset.
    """
    pairs = []
    for source in sources:
        rows = load_rows(source)
        about = {}
        for row in rows:
            if isinstance(row.data, dict):
                annotator = row.data.get("annotator")
                origin = {"source": str(row.data.get("source") or source)}
                about[row.file, row.line] = origin | {"annotator": None if annotator is None else str(annotator)}
        report = Report(rows.source, "preference")
        formatter = Formatter("preference", **format_args.options())
        pairs += [output | about[row.file, row.line] for row, output in formatter(rows, report)]
        print(report)
    return pairs
