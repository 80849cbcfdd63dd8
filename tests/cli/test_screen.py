"""What a run shows on the way and at its end."""

import logging
import os
import shlex
import sys
import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from recipes.cli.errors import counted
from recipes.cli.progress import LogLines, show_lines
from recipes.cli.screen import headline, log_line, result_line
from recipes.cli.start import NOISY_LOGGERS, quiet
from tests.tiny_models import causal_lm


def test_a_log_is_a_line_of_six_numbers():
    logs = {"grad_norm": 0.5, "loss": 0.123456, "objective/kl": 1.5, "objective/scores": -0.25, "val/ratio": 1.0}
    assert log_line(logs, 2, 60) == "step 2/60  scores -0.25  kl 1.5  loss 0.123  grad_norm 0.5"
    many = {
        name: 1.0 for name in ("loss", "accuracy", "longer_wins", "margin", "entropy", "grad_norm", "learning_rate")
    }
    assert log_line(many, 1, 2).count(" 1") == 7, "six numbers and the step"
    assert log_line({"eval_loss": 0.5, "eval_runtime": 3}, 1, 2) == "step 1/2  evaluation  loss 0.5"
    assert log_line({"train_runtime": 3.0, "entropy": 1.0}, 1, 2) == ""


def test_the_last_line_has_the_result_and_the_next_command(monkeypatch):
    history = [{"objective/scores": value, "objective/kl": 1.0} for value in (0, 0, 0, 4, 1, 1, 1)]
    line = result_line("ppo", "runs/ppo", "runs/sft", history, "python")
    numbers = "score 0.00 -> 1.00, KL 1.00 -> 1.00 (means of the first and last logs)"
    assert line.startswith(f"Saved to runs/ppo: {numbers}. Next: python scripts/chat.py --model")
    assert headline([{"loss": 1.0}, {"loss": 2.0}], {"loss": "loss"}) == "loss 1.00 -> 2.00"
    assert result_line("sft", "x", "base", [], "python").startswith(
        "Saved to x. Next: python scripts/sample_responses.py"
    )
    monkeypatch.setattr(sys, "argv", ["recipes/reward.py", "--config", "configs/a/reward.yaml"])
    line = result_line("reward", "runs/rm", "runs/sft", [], "accelerate launch -q")
    assert "accelerate launch -q recipes/ppo.py --config configs/a/ppo.yaml --model_name_or_path runs/sft" in line
    assert line.endswith("--reward_model_name_or_path runs/rm --output_dir runs/ppo") and "PROMPTS" not in line
    sys.argv += ["--dataset_name", "mine/rankings.jsonl"]
    line = result_line("reward", "mine/rm", "mine/sft", [], "python")
    assert "configs/a/ppo.yaml --dataset_name PROMPTS --model_name_or_path mine/sft" in line
    assert "--dataset_name PROMPTS --output mine/samples.jsonl" in result_line("sft", "mine/sft", "base", [], "python")


def test_the_next_command_can_be_pasted_with_any_names(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/reward.py", "--config=my configs/reward.yaml", "--dataset_name=x"])
    words = shlex.split(result_line("reward", "my runs/rm/", "my runs/sft", [], "python").partition("Next: ")[2])
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given == {
        "--config": "my configs/ppo.yaml",
        "--dataset_name": "PROMPTS",
        "--model_name_or_path": "my runs/sft",
        "--reward_model_name_or_path": "my runs/rm/",
        "--output_dir": "my runs/ppo",
    }
    for recipe in ("sft", "ppo"):
        words = shlex.split(result_line(recipe, "my runs/it", "a base", [], "python").partition("Next: ")[2])
        assert words[3] == "my runs/it" and words[-1] in ("my runs/samples.jsonl", "a base")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return {"loss": (self.weight - x).square().mean()}


@pytest.mark.parametrize("options", [{}, {"disable_tqdm": True}, {"log_level": "debug"}], ids=str)
def test_lines_take_the_place_of_dictionaries(tmp_path, capsys, options):
    args = TrainingArguments(tmp_path, use_cpu=True, max_steps=2, logging_steps=1, report_to="none", **options)
    trainer = Trainer(Model(), args, train_dataset=[{"x": 1.0}] * 16)
    show_lines(trainer)
    trainer.train()
    out = capsys.readouterr().out
    if options == {"log_level": "debug"}:
        assert "{'loss'" in out and "train_runtime" in out
        assert not any(isinstance(callback, LogLines) for callback in trainer.callback_handler.callbacks)
    else:
        assert out.count("step ") == 2 and "step 2/2  loss" in out and "{" not in out


def test_a_number_has_the_noun_that_fits_it():
    assert [counted(number, "row") for number in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1,200 rows"]
    assert counted(2, "summary", "summaries") == "2 summaries" and counted(1, "summary", "summaries") == "1 summary"


def test_what_nobody_can_act_on_is_not_said(monkeypatch):
    """Activation checkpointing is on by default on a GPU, and each rollout turns it off and on."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    model = causal_lm()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet()
        model.gradient_checkpointing_enable()
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    assert not said
    assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in NOISY_LOGGERS)
