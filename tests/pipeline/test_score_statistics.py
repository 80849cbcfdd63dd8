"""Mean and standard deviation of a reward model's scores: stored, found, given, refused, and said."""

import json
import math
from pathlib import Path

import pytest
from huggingface_hub import constants

from recipes.cli.errors import UserError, counted
from recipes.models.loading import load_score_statistics, read_reward_statistics, save_reward_statistics
from recipes.models.source import ModelSource
from recipes.ppo import PPOScriptArguments, check_arguments
from tests.trainers.conftest import config


def settled(tmp_path, reward, normalize=True, **given):
    """The two numbers, as a recipe settles them."""
    args = config(tmp_path, **given)
    load_score_statistics(args, ModelSource(str(reward)), normalize)
    return args.score_mean, args.score_std


@pytest.fixture
def stored(tmp_path) -> Path:
    assert save_reward_statistics(str(tmp_path), [1.0, 3.0], "rankings.jsonl")["mean"] == 2.0
    return tmp_path


@pytest.mark.parametrize(
    ("normalize", "given", "numbers", "line"),
    [
        (True, {}, (2.0, math.sqrt(2)), "minus 2 (of {0}), divided by 1.414 (of {0})."),
        (True, {"score_mean": 0.0, "score_std": 1.0}, (0.0, 1.0), "minus 0 (given), divided by 1 (given)."),
        (True, {"score_std": 4.0}, (2.0, 4.0), "minus 2 (of {0}), divided by 4 (given)."),
        (False, {}, (0.0, 1.0), "minus 0 (--normalize_scores false), divided by 1 (--normalize_scores false)."),
        (False, {"score_mean": 0.5}, (0.5, 1.0), "minus 0.5 (given), divided by 1 (--normalize_scores false)."),
    ],
)
def test_what_is_given_counts_first_and_is_told_from_the_default(stored, capsys, normalize, given, numbers, line):
    assert settled(stored, stored, normalize, **given) == pytest.approx(numbers)
    assert f"Scores: {line.format(stored)}" in capsys.readouterr().err


def test_without_statistics_scores_stay_and_a_line_says_so(tmp_path, capsys):
    assert settled(tmp_path, tmp_path) == (0.0, 1.0)
    assert f"minus 0 ({tmp_path} has no reward_statistics.json)" in capsys.readouterr().err


def test_statistics_of_a_reward_model_on_the_hub_are_found(stored, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--someone--reward"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (stored / "reward_statistics.json").rename(repository / "snapshots" / "c0ffee" / "reward_statistics.json")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert settled(tmp_path, "someone/reward") == pytest.approx((2.0, math.sqrt(2)))
    assert read_reward_statistics("someone/other") is None


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5], [0.5, math.nan]])
def test_scores_without_a_spread_are_not_stored(tmp_path, capsys, scores):
    assert save_reward_statistics(str(tmp_path), scores, "rankings.jsonl") is None
    assert not (tmp_path / "reward_statistics.json").exists()
    assert f"the scores of {counted(len(scores), 'conversation')} of rankings.jsonl have" in capsys.readouterr().err


@pytest.mark.parametrize("std", [0, -1, math.nan, None, "wide"])
def test_a_stored_spread_that_cannot_divide_is_refused(tmp_path, std):
    (tmp_path / "reward_statistics.json").write_text(json.dumps({"mean": 0.0, "std": std}))
    with pytest.raises(UserError, match="reward_statistics.json has no mean and no std above 0"):
        settled(tmp_path, tmp_path)
    assert settled(tmp_path, tmp_path, score_mean=0.0, score_std=1.0) == (0.0, 1.0)


def test_a_spread_without_a_reward_model_is_refused(tmp_path):
    script_args = PPOScriptArguments(dataset_name="x", reward_funcs=["module.function"])
    with pytest.raises(UserError, match="--score_std is about the reward model's score"):
        check_arguments(script_args, config(tmp_path, score_std=2.0))
