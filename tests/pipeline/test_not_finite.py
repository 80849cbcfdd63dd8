"""NaN and infinity end every recipe at the first loss, gradient or score that has them, and reach no file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.cli.errors import UserError
from recipes.models.loading import not_finite
from scripts.merge_adapter import MergeArguments, merge
from tests import tiny_models as models
from tests.conftest import run_recipe
from tests.pipeline.conftest import ppo_arguments, reward_arguments, sft_arguments

ADAPTER = "adapter_model.safetensors"
SCORE = "base_model.model.score.modules_to_save.default.weight"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> str:
    """A base with one NaN."""
    folder = models.save_base(tmp_path_factory.mktemp("spoilt"))
    weights = load_file(f"{folder}/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return folder


def weights_in(folder) -> list:
    return [path for path in folder.rglob("*.safetensors") if ".unfinished" not in path.parts]


@pytest.mark.parametrize("step", ["sft", "reward"])
def test_a_base_with_nan_is_refused_at_the_first_loss(data, spoilt, tmp_path, step):
    own = {"model_name_or_path": spoilt}
    arguments = sft_arguments(data, tmp_path / "run", **own)
    if step == "reward":
        arguments = reward_arguments(data, spoilt, tmp_path / "run")
    with pytest.raises(UserError) as error:
        run_recipe(step, **arguments)
    text = str(error.value)
    assert "After step 0: the loss is nan" in text and "layers.1.mlp.down_proj" in text and "as the model was" in text
    assert "There is no checkpoint to go on from" in text and not weights_in(tmp_path / "run")


@pytest.mark.parametrize("step", ["sft", "reward", "ppo"])
def test_a_gradient_that_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(
    data, runs, tmp_path, monkeypatch, step
):
    """The third backward gives an infinite gradient; the checkpoint of the second step is whole."""
    out = tmp_path / "run"
    arguments = {
        "sft": sft_arguments(data, out),
        "reward": reward_arguments(data, runs / "sft", out),
        "ppo": ppo_arguments(data, runs, out),
    }[step]
    from recipes.trainers.checkpoints import WholeCheckpoints

    clip = WholeCheckpoints._clip_grad_norm

    def spoil(self, model):
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        return clip(self, model)

    monkeypatch.setattr(WholeCheckpoints, "_clip_grad_norm", spoil)
    own = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": 1.0, "per_device_train_batch_size": 4}
    own |= {"eval_strategy": "no", "test_split_size": 0} if step == "reward" else {}
    with pytest.raises(UserError, match=rf"After step 2: the norm of the gradients is \w+\..*{out}/checkpoint-2\."):
        run_recipe(step, **arguments | own)
    assert all(tensor.isfinite().all() for path in weights_in(out) for tensor in load_file(path).values())
    assert not (out / ADAPTER).exists()


def test_weights_that_became_nan_are_not_saved(data, tmp_path, monkeypatch):
    from recipes.trainers.checkpoints import WholeSFTTrainer

    train = WholeSFTTrainer.train

    def train_and_spoil(self, *args, **kwargs):
        train(self, *args, **kwargs)
        next(p for p in self.model.parameters() if p.requires_grad).data.fill_(torch.nan)

    monkeypatch.setattr(WholeSFTTrainer, "train", train_and_spoil)
    with pytest.raises(UserError, match="such weights are not saved"):
        run_recipe("sft", **sft_arguments(data, tmp_path / "run", max_steps=2, save_strategy="no"))
    assert not weights_in(tmp_path / "run")


def test_scores_that_are_not_finite_end_the_reward_recipe(data, runs, tmp_path, monkeypatch):
    from recipes.trainers.ranking_trainer import RankingRewardTrainer

    save_model = RankingRewardTrainer.save_model

    def save_and_spoil(self, *args, **kwargs):
        save_model(self, *args, **kwargs)
        self.model.get_parameter(SCORE).data.fill_(torch.nan)

    monkeypatch.setattr(RankingRewardTrainer, "save_model", save_and_spoil)
    arguments = reward_arguments(data, runs / "sft", tmp_path / "run", max_steps=1, save_strategy="no")
    with pytest.raises(UserError, match=r"not finite numbers: \d+ of \d+ scores"):
        run_recipe("reward", **arguments)
    assert not (tmp_path / "run" / "reward_statistics.json").exists()


def test_merge_refuses_weights_that_are_not_finite(data, tmp_path):
    adapter = tmp_path / "adapter"
    models.save_adapter(adapter, data["base"])
    weights = load_file(adapter / ADAPTER)
    next(iter(weights.values()))[0, 0] = torch.inf
    save_file(weights, adapter / ADAPTER)
    with pytest.raises(UserError, match="has weights that are not finite"):
        merge(MergeArguments(str(adapter), str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


def test_policy_critic_and_average_are_those_of_the_best_step(data, runs, tmp_path):
    own = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6, "ema_decay": 0.5}
    # The best of steps 2, 4 and 6 is the first one with the fewest tokens seen.
    own |= {"load_best_model_at_end": True, "metric_for_best_model": "num_tokens", "test_split_size": 0.2}
    own |= {"per_device_train_batch_size": 4, "greater_is_better": False, "learning_rate": 1e-2}
    out = tmp_path / "run"
    trainer = run_recipe("ppo", **ppo_arguments(data, runs, out, **own))
    best = trainer.state.best_model_checkpoint
    assert json.loads((out / "trainer_state.json").read_text())["best_global_step"] == 2 < trainer.state.global_step
    for role in (".", "critic", "ema"):
        saved, chosen = load_file(out / role / ADAPTER), load_file(f"{best}/{role}/{ADAPTER}")
        assert all(torch.equal(saved[name], chosen[name]) for name in chosen), role
    assert not_finite(trainer.model) is None


def test_the_best_checkpoint_of_a_run_that_was_moved_is_found_and_kept(data, tmp_path):
    """The state names it by its old path: Trainer forgets it, the rotation deletes it, and the last one is saved."""
    own = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2, "test_split_size": 0.2}
    own |= {"load_best_model_at_end": True, "metric_for_best_model": "num_tokens", "greater_is_better": False}
    own |= {"save_strategy": "steps", "lr_scheduler_type": "constant", "warmup_steps": 0}
    run_recipe("sft", **sft_arguments(data, tmp_path / "run", max_steps=3, **own))
    (tmp_path / "run").rename(tmp_path / "moved")
    again = sft_arguments(data, tmp_path / "moved", max_steps=4, resume_from_checkpoint="true", **own)
    trainer = run_recipe("sft", **again)
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-1")
    saved, best = (load_file(tmp_path / "moved" / name / ADAPTER) for name in (".", "checkpoint-1"))
    assert all(torch.equal(saved[name], best[name]) for name in best)
