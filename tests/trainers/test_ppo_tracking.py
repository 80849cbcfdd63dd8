"""What PPO tells trackers: phases, histograms, spreads, gradient norms, readable completions."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

from recipes.trainers.ppo_tracking import PPOLogging, describe, gradient_norms, readable
from recipes.trainers.rollout import Rollout


def logging_trainer(callbacks=()) -> SimpleNamespace:
    """What `PPOLogging` needs to measure a rollout of two responses."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(device=torch.device("cpu")),
        state=SimpleNamespace(is_world_process_zero=True, global_step=7),
        callback_handler=SimpleNamespace(callbacks=callbacks),
        _seconds=defaultdict(float),
        _inner_seconds=0.0,
        _sampled=[(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 15.0]))],
    )


def test_phases_add_up_and_an_inner_one_is_not_counted_twice(monkeypatch):
    clock = iter((0.0, 1.0, 4.0, 10.0))  # update begins, sampling within it takes 3 s, the whole 10 s
    monkeypatch.setattr("recipes.trainers.ppo_tracking.time.perf_counter", lambda: next(clock))
    trainer = logging_trainer()
    with PPOLogging._phase(trainer, "update"), PPOLogging._phase(trainer, "sample"):
        pass
    assert trainer._seconds == {"sample": 3.0, "update": 7.0}
    found = PPOLogging._measured(trainer)
    assert (found["time/sample"], found["time/update"], found["time/tokens_per_second"]) == (3.0, 7.0, 2.0)
    assert 0.01 < found["memory/peak_gib"] < 1000
    assert not trainer._seconds and not trainer._sampled, "once a rollout"


def test_an_evaluation_is_in_no_phase_though_sampling_leaves_the_model_in_training():
    trainer = logging_trainer()
    trainer.model.training = False
    with PPOLogging._phase(trainer, "sample"):
        trainer.model.training = True
    assert not trainer._seconds


def test_trackers_get_histograms(tmp_path):
    tracker = TensorBoardCallback(SummaryWriter(tmp_path))
    trainer = logging_trainer([tracker])
    trainer._seconds["sample"] = 1.0
    PPOLogging._measured(trainer)
    tracker.tb_writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["histograms"] == ["train/objective/scores_histogram", "train/completions/length_histogram"]
    (scores,) = events.Histograms("train/objective/scores_histogram")
    assert (scores.step, scores.histogram_value.min, scores.histogram_value.max) == (7, 1.0, 3.0)


def test_a_conversation_is_readable():
    assert readable([{"role": "assistant", "content": "Hello"}]) == "Hello" == readable("Hello")
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert readable(turns) == "system: Be kind.\nuser: Hi"


def test_advantages_are_described_before_whitening():
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    rollout = Rollout([[1]], [[1]], False, mask=mask)
    rollout.values, rollout.returns = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[2.0, 4.0], [6.0, 9.0]])
    found = describe(rollout, torch.tensor([1.0, 3.0]), torch.tensor([3.0, 4.0]), Accelerator(cpu=True).reduce)
    assert found["advantages/mean"] == pytest.approx(2.0) and found["advantages/std"] == pytest.approx(1.0)
    assert found["values/mean"] == pytest.approx(2.0) and found["returns/mean"] == pytest.approx(4.0)
    assert (found["objective/scores_min"], found["objective/scores_max"], found["objective/scores_std"]) == (1, 3, 1)
    assert (found["prompts/mean_length"], found["prompts/max_length"]) == (3.5, 4.0)


def test_explained_variance():
    returns, mask, ones = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), torch.ones(1)
    for values, expected in ((returns, 1.0), (torch.full((1, 3), 2.0), 0.0)):
        rollout = Rollout([[1]], [[1]], False, mask=mask, values=values, returns=returns)
        assert describe(rollout, ones, ones, lambda x: x)["val/explained_variance"] == expected


def test_gradient_norms_of_policy_and_critic_are_apart():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 1, bias=False) for name in ("layer", "critic")})
    model["layer"].weight.grad, model["critic"].weight.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert gradient_norms(model) == {"grad_norm/policy": 5.0, "grad_norm/critic": 2.0}
    model["layer"].weight.grad = None  # critic_warmup_steps
    assert gradient_norms(model) == {"grad_norm/policy": 0.0, "grad_norm/critic": 2.0}


def test_gradient_norms_are_without_the_scale_of_fp16():
    model = torch.nn.ModuleDict({"critic": torch.nn.Linear(2, 1, bias=False)})
    model["critic"].weight.grad = torch.tensor([[0.0, 2.0]])
    accelerator = SimpleNamespace(sync_gradients=True, scaler=SimpleNamespace(get_scale=lambda: 4.0))
    trainer = SimpleNamespace(accelerator=accelerator, _policy=model, _metrics={"train": defaultdict(list)})
    PPOLogging._log_gradient_norms(trainer)
    assert trainer._metrics["train"] == {"grad_norm/policy": [0.0], "grad_norm/critic": [0.5]}
