"""Two hosts, played by two network namespaces joined by a cable of their own, train what two processes of one do."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, recipe_line, run_command

pytestmark = pytest.mark.slow
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = "29517"  # of the namespace, so that nothing else can hold it
REWARD = "def words(prompts, completions, **kwargs):\n    return [len(c[0]['content']) / 10 for c in completions]\n"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def hosts():
    """Names of two namespaces that reach each other and nothing else."""
    names = [f"rlhf{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (Debian package iproute2)")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        remove(names)
        pytest.skip(f"needs permission to make network namespaces: {error.stderr.strip()}")
    yield names
    remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Path:
    """A user's folder with a reward function."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "length_reward.py").write_text(REWARD, encoding="utf-8")
    return folder


def launch(user: Path, step: str, launcher: list[str], host: str | None = None, **arguments) -> str:
    line = ["ip", "netns", "exec", host] if host else []
    line += ["accelerate", "launch", "--config_file", ROOT / "accelerate_configs" / "multi_cpu.yaml", *launcher]
    line += [ROOT / "recipes" / f"{step}.py", *recipe_line(step, **arguments)]
    env = {"PYTHONPATH": str(ROOT)} | ({"GLOO_SOCKET_IFNAME": "cable"} if host else {})
    return run_command(line, timeout=400, cwd=user, env=env).stdout


def on_two_hosts(user: Path, step: str, hosts: list[str], **arguments) -> list[str]:
    def on_host(rank: int) -> str:
        machines = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
        address = ["--main_process_ip", ADDRESSES[0], "--main_process_port", PORT]
        return launch(user, step, machines + address, hosts[rank], **arguments)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(on_host, (0, 1)))


@pytest.fixture(scope="module")
def sft(data, user, hosts, tmp_path_factory) -> dict[str, Path]:
    """SFT on one host and on two."""
    folder = tmp_path_factory.mktemp("sft")
    arguments = {"model_name_or_path": data["base"], "dataset_name": data["demonstrations"]}
    arguments |= {"per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "no", "logging_steps": 1}
    launch(user, "sft", [], **arguments, output_dir=folder / "one")
    outputs = on_two_hosts(user, "sft", hosts, **arguments, output_dir=folder / "two")
    assert "Launched: 2 processes" in outputs[0] and "Running: 2 processes on cpu" in outputs[0]
    assert "Saved to" in outputs[0] and "Saved to" not in outputs[1]
    return {name: folder / name for name in ("one", "two")}


def assert_same_run(one: Path, two: Path, metrics: tuple[str, ...], steps: int) -> None:
    logs = [json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"] for run in (one, two)]
    for name in metrics:
        rows = [[row[name] for row in log if name in row] for log in logs]
        assert len(rows[0]) == steps
        assert rows[0] == pytest.approx(rows[1], rel=1e-5, abs=1e-7), name
    weights = [load_file(run / "adapter_model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_sft_on_two_hosts_is_sft_on_one(sft):
    assert_same_run(sft["one"], sft["two"], ("loss", "grad_norm"), steps=4)


def test_ppo_on_two_hosts_is_ppo_on_one(data, user, hosts, sft, tmp_path):
    arguments = {"model_name_or_path": sft["two"], "dataset_name": data["prompts"]}
    arguments |= {"reward_funcs": "length_reward.words", "per_device_train_batch_size": 4, "max_completion_length": 8}
    arguments |= {"max_steps": 4, "warmup_steps": 0, "save_strategy": "no", "logging_steps": 1}
    launch(user, "ppo", [], **arguments, output_dir=tmp_path / "one")
    on_two_hosts(user, "ppo", hosts, **arguments, output_dir=tmp_path / "two")
    metrics = ("loss/policy_avg", "loss/value_avg", "grad_norm", "policy/approxkl_avg")
    assert_same_run(tmp_path / "one", tmp_path / "two", metrics, steps=4)
    assert_same_run(tmp_path / "one", tmp_path / "two", ("objective/kl", "objective/scores"), steps=2)
