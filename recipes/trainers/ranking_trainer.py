"""Reward training on whole rankings: each response is run once, however many pairs it takes part in.

InstructGPT (2203.02155, section 3.5) puts all pairs of one prompt's K ranked responses into one batch element. That
costs K forward passes instead of the K(K - 1) of separate pairs, and a response is not repeated in many batches, which
made their reward model overfit in a single epoch.
"""

import functools
import json
import textwrap
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from trl import RewardTrainer
from trl.trainer.utils import pad

from recipes.cli.errors import UserError, counted, visible
from recipes.trainers.checkpoints import WholeCheckpoints

CALIBRATION_BINS = 10


def collate_rankings(examples: list[dict[str, Any]], pad_token_id: int, multiple: int | None = None) -> dict:
    """Flattens R rankings into one batch of their N responses, padded to a multiple of tokens.

    `[{"response_ids": [[int]], "ranks": [float]}]` → `input_ids`, `attention_mask` (N, T) and `ranks` (R, K), NaN
    where a ranking has fewer than K responses.
    """
    ids = [torch.tensor(response) for example in examples for response in example["response_ids"]]
    ranks = [torch.tensor(example["ranks"], dtype=torch.float) for example in examples]
    return {
        "input_ids": pad(ids, pad_token_id, pad_to_multiple_of=multiple),
        "attention_mask": pad([torch.ones_like(row) for row in ids], pad_to_multiple_of=multiple),
        "ranks": pad(ranks, torch.nan),
    }


def strict_pairs(ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, better and worse response, (P,) each, of every pair of one ranking with unequal `ranks` (R, K)."""
    return torch.nonzero(ranks[:, :, None] < ranks[:, None], as_tuple=True)


def ranking_loss(
    scores: torch.Tensor, ranks: torch.Tensor, center_rewards_coefficient: float | None = None
) -> torch.Tensor:
    """`-log sigmoid(better - worse)`, averaged over the strict pairs of each prompt, then over prompts.

    Scores and ranks (1 is best, equal is a tie, NaN is none) are (R, K). `center_rewards_coefficient` adds TRL's
    `coefficient * (better + worse)^2` to each pair (2312.09244).
    """
    row, better, worse = strict_pairs(ranks)
    losses = -nn.functional.logsigmoid(scores[row, better] - scores[row, worse])
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (scores[row, better] + scores[row, worse]) ** 2
    pairs = row.bincount(minlength=len(ranks)).to(losses)
    return (losses / pairs[row]).sum() / pairs.count_nonzero().clamp(min=1)


def majority_rankings(dataset: Dataset) -> Dataset:
    """One ranking out of several labelers': a response's place is its pairwise majorities won minus lost.

    That is Copeland's rule; equal counts are ties. Only rankings of the same responses count together: with others, of
    a later round of samples perhaps, responses would be ordered that nobody has compared.
    """
    rankings: dict[tuple[str, ...], list[dict]] = {}
    for row in dataset:
        rankings.setdefault((row["group_id"], *sorted({*map(json.dumps, row["completions"])})), []).append(row)
    rows = []
    for (_, *keys), group in rankings.items():
        ahead = np.zeros((len(keys), len(keys)))  # how many prefer one response to another, minus those who do not
        for row in group:
            given, which = np.array(row["ranks"]), [keys.index(json.dumps(each)) for each in row["completions"]]
            np.add.at(ahead, np.ix_(which, which), np.sign(given - given[:, None]))  # a text may come twice
        won = np.sign(ahead).sum(1)
        order = np.argsort(-won, kind="stable")
        ranks = [float(1 + (won > won[i]).sum()) for i in order]
        rows.append({**group[0], "completions": [json.loads(keys[i]) for i in order], "ranks": ranks})
    return Dataset.from_list(rows, features=dataset.features)


def keep_majorities(datasets: dict[str, Dataset]) -> None:
    """Leave one ranking of the same responses, and none in which all are then equal; nothing left is a UserError."""
    for name in [*datasets]:
        datasets[name] = majority_rankings(datasets[name]).filter(lambda row: len(set(row["ranks"])) > 1)
        if not len(datasets[name]):
            del datasets[name]
    if "train" not in datasets:
        raise UserError("--aggregation majority leaves only ties to train on: keep all rankings.")


def conversations(row: dict, tokenizer) -> list[list[int]]:
    """Token ids of the prompt of a ranking with each of its responses."""
    return tokenizer.apply_chat_template([row["prompt"] + text for text in row["completions"]], return_dict=False)


def results_in_words(row: dict, scores: list[float], metrics: dict[str, float] | None) -> str:
    """Rank, score and beginning of each response of a ranking, and what an evaluation found, where there was one."""
    shown = [
        visible(textwrap.shorten(messages[-1]["content"], 90, placeholder=" …"))
        for messages in (row["prompt"], *row["completions"])
    ]
    lines = [f"{'A held-out prompt' if metrics else 'A prompt of the training data'}: {shown[0]}"]
    for rank, score, text in zip(row["ranks"], scores, shown[1:], strict=True):
        lines.append(f"  rank {rank:g}  score {score:+.3f}  {text}")
    return "\n".join([*lines, accuracy_in_words(metrics)] if metrics else lines)


def accuracy_in_words(metrics: dict[str, float]) -> str:
    """How many held-out pairs a reward model orders as the labeler did, beside what length alone would.

    ± is half of Agresti and Coull's 95 % interval (1998) for independent pairs; those of one prompt are not.
    """
    accuracy, baseline, pairs = (metrics[f"eval_{name}"] for name in ("accuracy", "longer_wins", "pairs"))
    ordered = f"{round(accuracy * pairs)} of {counted(round(pairs), 'held-out pair')}"
    share = (accuracy * pairs + 2) / (pairs + 4)
    error = 1.96 * (share * (1 - share) / (pairs + 4)) ** 0.5
    text = f"The reward model orders {ordered} as the labeler did ({accuracy:.3f} ± {error:.2f}); the longer response "
    return f"{text}is the better one in {baseline:.3f}. {no_better_than_length(accuracy, baseline)}".rstrip()


def no_better_than_length(accuracy: float, baseline: float) -> str:
    """A warning where a reward model orders pairs no better than preferring the longer response; else empty."""
    if accuracy > baseline:
        return ""
    return (
        "Warning: that is no better than preferring the longer response. PPO would optimise noise or length: get more "
        "rankings, or rankings of responses that differ more."
    )


def ranking_metrics(rankings: list[torch.Tensor]) -> dict[str, float]:
    """What is logged of batches (R, K, 3) of score, rank and length in tokens; every strict pair weighs the same.

    `longer_wins` is the accuracy of preferring the longer response, a tie counting one half; `margin` the better minus
    the worse score; `calibration_error` how far the confidence `sigmoid(|margin|)` is from the accuracy, in ten bins
    (expected calibration error, 1706.04599).
    """
    scores, ranks, lengths = pad(rankings, padding_value=torch.nan).flatten(0, 1).double().unbind(-1)
    row, better, worse = strict_pairs(ranks)
    margin = scores[row, better] - scores[row, worse]
    longer = (lengths[row, better] - lengths[row, worse]).sign()
    right, confidence = (margin > 0).double(), margin.abs().sigmoid()
    bins = (confidence * 2 * CALIBRATION_BINS - CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)  # NaN: 0
    overconfidence = torch.zeros(CALIBRATION_BINS).double().index_add(0, bins, confidence - right)
    metrics = {
        "accuracy": right.mean(),
        "longer_wins": (1 + longer).mean() / 2,
        "margin": margin.mean(),
        "calibration_error": overconfidence.abs().sum() / len(margin),
        "mean_reward": scores.nanmean(),
        "std_reward": scores[~ranks.isnan()].std(correction=0),
        "pairs": len(margin),
    }
    gap = (ranks[row, worse] - ranks[row, better]).round().clamp(1, 3)
    for distance, name in enumerate(("1", "2", "3_or_more"), 1):
        if (gap == distance).any():
            metrics[f"margin/rank_gap_{name}"] = margin[gap == distance].mean()
    return {name: float(value) for name, value in metrics.items()}


class RankingRewardTrainer(WholeCheckpoints, RewardTrainer):
    """TRL's `RewardTrainer` on rows `{"prompt": messages, "completions": [messages], "ranks": [number]}`.

    `per_device_train_batch_size` counts prompts; all other arguments are `RewardTrainer`'s. One that rankings have no
    use for is a UserError; that no row has two responses of unequal rank within `max_length` is a ValueError.
    """

    kept: tuple[str, ...] = (*WholeCheckpoints.kept, "_rankings")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise UserError("--label_smoothing_factor is not used: rankings have no labels to smooth. Leave it out.")
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            raise UserError("--train_sampling_strategy goes by a row's length; rankings have several: leave it out.")
        if self.args.pad_token is not None and self.args.pad_token == self.processing_class.eos_token:
            raise UserError(f"--pad_token {self.args.pad_token} is the EOS token, before which scores would be read.")
        if kwargs.get("data_collator") is None:
            padding = {"pad_token_id": self.processing_class.pad_token_id, "multiple": self.args.pad_to_multiple_of}
            self.data_collator = functools.partial(collate_rankings, **padding)
        self._signature_columns = ["response_ids", "ranks"]
        self._rankings: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}  # batches since the last log

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name) -> Dataset:
        def tokenize(row):
            ids = conversations(row, processing_class)
            kept = [i for i, response in enumerate(ids) if args.max_length is None or len(response) <= args.max_length]
            return {"response_ids": [ids[i] for i in kept], "ranks": [row["ranks"][i] for i in kept]}

        if "response_ids" in dataset.column_names:
            return dataset
        tokenized = dataset.map(
            tokenize, remove_columns=dataset.column_names, desc=f"Tokenizing {dataset_name} dataset"
        )
        usable = tokenized.filter(lambda row: len(set(row["ranks"])) > 1, desc=f"Filtering {dataset_name} dataset")
        if not len(usable):
            raise ValueError(
                f"No ranking of the {dataset_name} dataset has two responses of unequal rank within "
                f"max_length={args.max_length} tokens."
            )
        return usable

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ranks = inputs.pop("ranks")
        outputs = model(**inputs, use_cache=False)

        def by_ranking(values: torch.Tensor) -> torch.Tensor:
            return torch.full_like(ranks, torch.nan).masked_scatter(~ranks.isnan(), values.to(ranks))

        scores, lengths = by_ranking(outputs.logits), by_ranking(inputs["attention_mask"].sum(1))
        loss = ranking_loss(scores, ranks, self.args.center_rewards_coefficient)
        self._keep_rankings(torch.stack([scores.detach(), ranks, lengths], 2))
        return (loss, outputs) if return_outputs else loss

    def _keep_rankings(self, rankings: torch.Tensor) -> None:
        """Keep rankings (R, K, 3) of all processes for the next log, but none that only fills the last batch up."""
        for dim in (0, 1):
            rankings = self.accelerator.pad_across_processes(rankings, dim=dim, pad_index=torch.nan)
        if self.model.training:
            self._rankings["train"].append(self.accelerator.gather(rankings).cpu())
        else:
            self._rankings["eval"].append(self.accelerator.gather_for_metrics(rankings).cpu())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        if self._rankings[mode]:
            logs |= {prefix + name: value for name, value in ranking_metrics(self._rankings[mode]).items()}
            self._rankings[mode].clear()
        super().log(logs, start_time)

    def final_evaluation(self) -> dict[str, float] | None:
        """Metrics of the final model: the last evaluation's, if it was at the final step, else those of a new one."""
        if self.eval_dataset is None:
            return None
        step = self.state.best_global_step if self.args.load_best_model_at_end else self.state.global_step
        rows = (row for row in reversed(self.state.log_history) if row["step"] == step and "eval_pairs" in row)
        return next(rows, None) or self.evaluate()

    def score(self, rows: list[list[int]]) -> list[float]:
        """Finite scores of token rows, in their order, or a UserError; every process computes a share of them."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # similar lengths waste no padding
        alone = Dataset.from_dict({"response_ids": [[rows[row]] for row in order], "ranks": [[1.0]] * len(rows)})
        found = self.evaluation_loop(self.get_test_dataloader(alone), "Prediction", prediction_loss_only=False)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "prediction_bar"):  # which this ends; a tracker would log an empty row
                callback.on_predict(self.args, self.state, self.control)
        self._rankings["eval"].clear()
        scores = np.concatenate(found.predictions).reshape(-1)
        if wrong := (~np.isfinite(scores)).sum():
            share = f"{wrong} of {counted(len(scores), 'score')}"
            raise UserError(f"Scores that are not finite numbers: {share}. Train in float32 or bfloat16.")
        return scores[np.argsort(order)].tolist()
