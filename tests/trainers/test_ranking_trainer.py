"""RankingRewardTrainer against TRL's RewardTrainer on the same pairs, and against loss values by hand."""

import itertools
import math
import signal

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer

from recipes.cli.errors import RunEnded, UserError
from recipes.trainers.ranking_trainer import (
    RankingRewardTrainer,
    accuracy_in_words,
    collate_rankings,
    majority_rankings,
    ranking_loss,
    strict_pairs,
)
from tests import tiny_models as models

NONE = float("nan")
RANKS = [[1, 2, 3, 4], [1, 1, 2, 2], [2, 1, 1, 1]]


def rankings(ranks=RANKS, seed=0) -> Dataset:
    """One row for each list of ranks, with responses of one to six words."""
    generator = torch.Generator().manual_seed(seed)
    prompts = models.prompts(len(ranks), seed=seed)
    completions = []
    for row in ranks:
        lengths = torch.randint(1, 7, (len(row),), generator=generator).tolist()
        words = [torch.randint(59, (n,), generator=generator).tolist() for n in lengths]
        completions.append(
            [[{"role": "assistant", "content": " ".join(f"w{word}" for word in text)}] for text in words]
        )
    return Dataset.from_dict({"prompt": prompts, "completions": completions, "ranks": ranks})


def expanded(dataset) -> Dataset:
    rows = []
    for row in dataset:
        for i, j in itertools.permutations(range(len(row["ranks"])), 2):
            if row["ranks"][i] < row["ranks"][j]:
                rows.append(
                    {"prompt": row["prompt"], "chosen": row["completions"][i], "rejected": row["completions"][j]}
                )
    return Dataset.from_list(rows)


def config(folder, **kwargs) -> RewardConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return RewardConfig(str(folder), **(defaults | kwargs))


def trainer_of(cls, folder, dataset, **kwargs):
    return cls(
        model=models.reward_model(),
        args=config(folder, **kwargs),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=models.word_tokenizer(),
    )


@pytest.mark.parametrize(
    "wrong",
    [{"label_smoothing_factor": 0.1}, {"train_sampling_strategy": "group_by_length"}, {"pad_token": "<eos>"}],
    ids=str,
)
def test_arguments_that_rankings_have_no_use_for_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        trainer_of(RankingRewardTrainer, tmp_path, rankings(), **wrong)


def test_loss_by_hand():
    scores, ranks = (
        torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, NONE]]),
        torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, NONE]]),
    )
    first = -(math.log(1 / (1 + math.exp(-1.5))) + math.log(1 / (1 + math.exp(1.5)))) / 2
    second = -math.log(1 / (1 + math.exp(-1.0)))
    assert ranking_loss(scores, ranks).item() == pytest.approx((first + second) / 2)


def test_ties_and_other_prompts_make_no_pair():
    row, better, worse = strict_pairs(torch.tensor([[1.0, 1.0, 2.0], [1.0, NONE, NONE]]))
    assert sorted(zip(row.tolist(), better.tolist(), worse.tolist(), strict=True)) == [(0, 0, 2), (0, 1, 2)]


@pytest.mark.parametrize("center", [None, 0.1])
@pytest.mark.parametrize("row", range(len(RANKS)))
def test_loss_and_gradients_equal_trls_on_the_same_pairs(tmp_path, row, center):
    dataset = rankings(RANKS[row : row + 1])
    losses, gradients = [], []
    for cls, data in ((RankingRewardTrainer, dataset), (RewardTrainer, expanded(dataset))):
        trainer = trainer_of(cls, tmp_path, data, center_rewards_coefficient=center, per_device_train_batch_size=16)
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in trainer.model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_response_runs_once(tmp_path):
    trainer = trainer_of(RankingRewardTrainer, tmp_path, rankings())
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].size(0) == sum(map(len, RANKS))
    assert sorted(batch["ranks"].tolist()) == sorted(RANKS)


def test_scores_are_in_the_order_of_the_rows_and_trackers_hear_nothing(tmp_path):
    """Trainer's event for predictions would give W&B and Trackio an empty row each time."""
    trainer = trainer_of(RankingRewardTrainer, tmp_path, rankings(), per_device_eval_batch_size=2)
    heard = []

    class Tracker(TrainerCallback):
        def on_predict(self, *args, **kwargs):
            heard.append(kwargs)

    trainer.add_callback(Tracker)
    rows = [[5, 6, 7, 8], [5], [5, 9, 9]]
    scores = trainer.score(rows)
    expected = [trainer.model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert scores == pytest.approx(expected, abs=1e-5) and not heard
    assert not trainer._rankings["eval"]


def test_training_learns_the_order_and_logs_it(tmp_path):
    trainer = trainer_of(RankingRewardTrainer, tmp_path, rankings(), num_train_epochs=25)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] == 1.0 > before["eval_accuracy"]
    assert after["eval_margin"] > 0.5
    assert after["eval_longer_wins"] == before["eval_longer_wins"]
    pairs = expanded(rankings())
    words = [[len(row[side][0]["content"].split()) for side in ("chosen", "rejected")] for row in pairs]
    wins = [1.0 if better > worse else 0.5 * (better == worse) for better, worse in words]
    assert after["eval_longer_wins"] == pytest.approx(sum(wins) / len(wins))
    assert after["eval_margin/rank_gap_3_or_more"] > 0


@pytest.mark.parametrize("late", [False, True])
def test_a_smaller_batch_does_not_begin_again_with_trained_weights(tmp_path, monkeypatch, late):
    trainer = trainer_of(RankingRewardTrainer, tmp_path, rankings(), auto_find_batch_size=True, max_steps=3)
    step, failures = RankingRewardTrainer.training_step, []

    def out_of_memory(self, *args, **kwargs):
        if self.state.global_step == late and not failures:
            failures.append(self._train_batch_size)
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RankingRewardTrainer, "training_step", out_of_memory)
    if late:
        with pytest.raises(UserError, match="Memory ran out after step 1, .* --per_device_train_batch_size 3 or less"):
            trainer.train()
    else:
        trainer.train()
        assert trainer._train_batch_size < failures[0]


def test_a_signal_saves_also_where_only_the_best_is_saved(tmp_path, monkeypatch):
    options = {
        "eval_strategy": "epoch",
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "num_train_epochs": 2,
    }
    trainer = trainer_of(RankingRewardTrainer, tmp_path, rankings(), per_device_train_batch_size=8, **options)
    monkeypatch.setattr("recipes.cli.signals.received", lambda: signal.SIGTERM)
    monkeypatch.setattr(RankingRewardTrainer, "evaluate", lambda self, **kwargs: {"eval_loss": math.inf})
    with pytest.raises(RunEnded, match=r"after step 1\. --resume_from_checkpoint true goes on from .*checkpoint-1"):
        trainer.train()


def test_accuracy_weighs_every_pair_the_same(tmp_path):
    """One batch with 6 pairs, one with 3: a mean of batch means would differ."""
    dataset = rankings([RANKS[0], RANKS[2]])
    trainer = trainer_of(RankingRewardTrainer, tmp_path, dataset, per_device_eval_batch_size=1)
    accuracy = trainer.evaluate()["eval_accuracy"]
    right = total = 0
    for row in expanded(dataset):
        ids = [
            trainer.processing_class.apply_chat_template(
                row["prompt"] + row[side], return_tensors="pt", return_dict=False
            )
            for side in ("chosen", "rejected")
        ]
        better, worse = (trainer.model(input_ids=x).logits.item() for x in ids)
        right, total = right + (better > worse), total + 1
    assert accuracy == pytest.approx(right / total)


def test_an_evaluation_that_is_not_finite_ends_in_one_line(tmp_path):
    trainer = trainer_of(RankingRewardTrainer, tmp_path, rankings())
    trainer.model.score.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="the loss of the evaluation is nan"):
        trainer.evaluate()


def test_calibration_error_by_hand(tmp_path):
    trainer = trainer_of(RankingRewardTrainer, tmp_path, rankings())
    trainer.model.eval()
    scores, ranks = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.1, 0.0]]), torch.tensor([[1.0, 2.0]] * 3)
    trainer._keep_rankings(torch.stack([scores, ranks, torch.ones(3, 2)], 2))
    logs = {}
    trainer.log(logs)
    sure, unsure = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.1))
    assert logs["eval_calibration_error"] == pytest.approx((abs(2 * sure - 1) + abs(unsure - 1)) / 3, abs=1e-6)


def test_majority_of_labelers():
    words = [[{"role": "assistant", "content": f"w{i}"}] for i in range(3)]
    prompt = models.prompts(1)[0]
    ranks = [[1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]]
    rows = [{"prompt": prompt, "completions": words, "ranks": r, "group_id": "g"} for r in ranks]
    rows.append({"prompt": models.prompts(2)[1], "completions": words[:2], "ranks": [2.0, 1.0], "group_id": "h"})
    merged = majority_rankings(Dataset.from_list(rows))
    assert [(r["ranks"], [c[0]["content"] for c in r["completions"]]) for r in merged] == [
        ([1.0, 2.0, 3.0], ["w0", "w1", "w2"]),
        ([1.0, 2.0], ["w1", "w0"]),
    ]
    cycle = [{**rows[0], "ranks": r} for r in ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0])]
    assert majority_rankings(Dataset.from_list(cycle))[0]["ranks"] == [1.0, 1.0, 1.0]
    unsure = {**rows[0], "completions": [*words[:2], words[0]]}  # the first text is both better and worse
    assert majority_rankings(Dataset.from_list([unsure]))[0]["ranks"] == [1.0, 1.0]
    later = [[{"role": "assistant", "content": f"w{i}"}] for i in (7, 8)]
    rounds = [rows[0], {**rows[0], "completions": later, "ranks": [1.0, 2.0]}]
    assert [r["ranks"] for r in majority_rankings(Dataset.from_list(rounds))] == [[1, 2, 3], [1, 2]]  # no pair across


def test_overlong_responses_leave_their_ranking(tmp_path):
    rows = rankings()
    longest = [{"role": "assistant", "content": " ".join(["w1"] * 60)}]
    rows = rows.map(
        lambda row, i: {"completions": [longest, *row["completions"][1:]]} if i != 1 else row, with_indices=True
    )
    trainer = trainer_of(RankingRewardTrainer, tmp_path, rows, max_length=40)
    # The third ranking's other responses are all tied, so nothing of it is left.
    assert [len(row["ranks"]) for row in trainer.train_dataset] == [3, 4]
    with pytest.raises(ValueError, match="No ranking of the train dataset"):
        trainer_of(RankingRewardTrainer, tmp_path, rows, max_length=3)


def test_collator_pads_right():
    batch = collate_rankings([{"response_ids": [[5, 6, 7], [8]], "ranks": [1, 2]}], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(("right", "pairs", "shown"), [(7, 11, "± 0.25"), (11, 11, "± 0.17"), (700, 1100, "± 0.03")])
def test_the_accuracy_says_how_sure_it_is(right, pairs, shown):
    found = accuracy_in_words({"eval_accuracy": right / pairs, "eval_longer_wins": 0.5, "eval_pairs": pairs})
    assert f"orders {right} of {pairs:,} held-out pairs as the labeler did ({right / pairs:.3f} {shown});" in found
