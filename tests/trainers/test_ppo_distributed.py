"""PPO on two processes is PPO on one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_command
from tests.trainers.ppo_worker import train

NAMES = ("objective/kl", "objective/scores", "objective/kl_coef", "loss/policy_avg", "loss/value_avg", "val/ratio")


def test_the_number_of_processes_does_not_change_the_updates(tmp_path):
    """Whitening, KL controller, token means and gradients, over two rollouts of two epochs on the same responses."""
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    train(str(one), 8)
    line = ["accelerate", "launch", "--config_file", "accelerate_configs/multi_cpu.yaml", "--main_process_port", "0"]
    run_command([*line, "-m", "tests.trainers.ppo_worker", str(two), "4"], timeout=400)
    logs = [json.loads((folder / "log.json").read_text(encoding="utf-8")) for folder in (one, two)]
    for name in NAMES:
        rows = [[row[name] for row in log if name in row] for log in logs]
        assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5), name
    assert logs[0][3]["policy/approxkl_avg"] > 1e-4, "the updates moved the policy"
    weights = [load_file(folder / "trained.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
