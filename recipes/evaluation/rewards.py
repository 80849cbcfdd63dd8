"""The reward model as a judge of samples, and of the pairs that it is measured on."""

import json
from functools import cached_property

import numpy as np
import pandas as pd
from accelerate import PartialState
from trl import ModelConfig

from recipes.cli.errors import UserError
from recipes.data.report import Report
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.parts import identity
from recipes.evaluation.policies import Conversation
from recipes.formatting import Formatter, RowArguments, has_test_split, load_rows
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
        self.made_from = [identity(self.path), self.mean, self.std]

    @cached_property
    def loaded(self):
        model, tokenizer = load_reward_model(self.source, self.model_args)
        return model.to(PartialState().device), tokenizer

    def raw_scores(self, conversations: list[Conversation]) -> np.ndarray:
        """Scores of conversations, in their order; one that is there twice runs once.

        Raises:
            UserError: a score is not a finite number.
        """
        keys = [json.dumps(conversation) for conversation in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        values = score_conversations(*self.loaded, list(distinct.values()), self.args.eval_batch_size)
        if not np.isfinite(values).all():
            raise UserError(f"The reward model {self.path} gives scores that are not finite numbers.")
        scores = dict(zip(distinct, values, strict=True))
        return np.array([scores[key] for key in keys])

    def rewards(self, prompts: list[Conversation], responses: pd.DataFrame) -> list[float]:
        """The reward of each response, of which `prompt` is the number of the prompt."""
        texts = zip(responses["prompt"], responses["text"], strict=True)
        scores = self.raw_scores([prompts[row] + [{"role": "assistant", "content": text}] for row, text in texts])
        return ((scores - self.mean) / self.std).tolist()

    def pairs(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Pairs from `read_pairs`, scored: `sigmoid` turns `margin`, of raw scores, into a probability."""
        texts, lengths = {}, {}
        for side in ("chosen", "rejected"):
            texts[side] = ["\n".join(turn["content"] for turn in turns) for turns in rows[side]]
            ids = self.loaded[1](texts[side], add_special_tokens=False)["input_ids"]
            lengths[side] = np.array([len(each) for each in ids])
        scores = self.raw_scores([*(rows["prompt"] + rows["chosen"]), *(rows["prompt"] + rows["rejected"])])
        chosen, rejected = np.split(scores, 2)
        longer_by = lengths["chosen"] - lengths["rejected"]
        return rows.assign(**texts, margin=chosen - rejected, length_difference=longer_by)

    def trained_on(self, rows: pd.DataFrame) -> list[str]:
        """The places of those pairs whose prompt was in the training data of the reward model, as far as is known."""
        return rows["place"][rows["group"].isin(read_trained_prompts(self.path))].tolist()


def read_pairs(sources: list[str], format_args: RowArguments, test_split: str = "test", **checks) -> pd.DataFrame:
    """The pairs of preference datasets: `prompt`, `chosen` and `rejected`, messages; and what `reward_quality` names.

    They are of the test split, or of the train split where a dataset has no other. `source` is a row's own column of
    that name, else the name of the dataset; `place` is the file and line. `checks` are further options of `Formatter`.
    """
    pairs = []
    for source in sources:
        rows = load_rows(source, test_split if has_test_split(source, test_split) else "train")
        known = {(row.file, row.line): row.data for row in rows if isinstance(row.data, dict)}
        report = Report(rows.source, "preference")
        for row, output in Formatter("preference", **format_args.options(), **checks)(rows, report):
            data = known[row.file, row.line]
            annotator = None if data.get("annotator") is None else str(data["annotator"])
            own = {"source": str(data.get("source") or source), "annotator": annotator}
            pairs.append(output | own | {"place": f"{row.file}:{row.line}"})
        print(report)
    return pd.DataFrame(pairs).rename(columns={"group_id": "group"})
