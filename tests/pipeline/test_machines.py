"""Machines that are not here, as far as they can be tried: Slurm, sharding with FSDP2, missing packages."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from recipes.cli.arguments import parse
from recipes.cli.checkpoints import newest_whole
from recipes.cli.errors import UserError
from recipes.ppo import PPOScriptArguments, check_arguments
from recipes.trainers.ppo_config import PPOConfig
from tests.cli.test_launch import PROBE
from tests.conftest import ROOT, recipe_line, run_command
from tests.pipeline.conftest import sft_arguments
from tests.pipeline.killing import assert_same_result, stop
from tests.trainers.fsdp_worker import options
from tests.trainers.ppo_worker import train

SLURM = ROOT / "scripts" / "slurm"
SRUN = """
[ "$1" = --kill-on-bad-exit=1 ] && shift
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
for pid in $pids; do wait "$pid" || exit 1; done
"""
SCONTROL = '[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\n127.0.0.2\\n"'
SBATCH = """
echo "$*" >>"$LOG"
wc -l <"$LOG"
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def job(tmp_path) -> dict[str, str]:
    """The environment of a job on two machines with one GPU each, `srun` and `scontrol` included."""
    program(tmp_path / "bin" / "srun", SRUN)
    program(tmp_path / "bin" / "scontrol", SCONTROL)
    slurm = {"NODELIST": "node[1-2]", "NUM_NODES": "2", "ID": "123456"}
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {f"SLURM_JOB_{name}": value for name, value in slurm.items()} | {"PATH": path}
    return env | {"SLURM_GPUS_ON_NODE": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}


def bash(*args, **env) -> subprocess.CompletedProcess:
    words = ["bash", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **env}, timeout=60, check=False)


@pytest.mark.parametrize("script", sorted(SLURM.iterdir()), ids=lambda path: path.name)
def test_slurm_scripts_are_bash(script):
    assert bash("-n", script).returncode == 0


def test_a_slurm_job_launches_once_on_each_machine(tmp_path, job):
    program(tmp_path / ".venv" / "bin" / "accelerate", 'line=$(printf "<%s>" "$@"); echo "$line"')
    arguments = ["recipes/sft.py", "--output_dir", "runs/two words"]
    result = bash(SLURM / "recipe.sbatch", *arguments, **job)
    expected = (
        "<launch><--machine_rank><{}><--config_file><accelerate_configs/multi_node.yaml><--num_machines><2>"
        "<--num_processes><2><--main_process_ip><127.0.0.1><--main_process_port><23456>"
        "<recipes/sft.py><--output_dir><runs/two words>"
    )
    assert sorted(result.stdout.splitlines()) == [expected.format(rank) for rank in (0, 1)], result.stderr
    again = bash(SLURM / "recipe.sbatch", *arguments, **job, SLURM_RESTART_COUNT="1", ACCELERATE_CONFIG="other.yaml")
    assert again.stdout.count("launch") == 2
    for line in again.stdout.splitlines():
        assert "<--config_file><other.yaml>" in line and line.endswith("<--resume_from_checkpoint><auto>")


@pytest.mark.slow
def test_a_slurm_job_is_one_run_on_all_machines(tmp_path, job):
    """Through the real launcher; 127.0.0.1 plays both machines."""
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "ACCELERATE_CONFIG": "accelerate_configs/multi_cpu.yaml"}
    arguments = [tmp_path / "probe.py", "--use_cpu", "true", "--report_to", "none", "--output_dir", tmp_path / "out"]
    output = run_command(["bash", SLURM / "recipe.sbatch", *arguments], timeout=240, env=job).stdout
    assert "Running: 2 processes on cpu" in output
    assert output.count("sum 3") == 2


@pytest.mark.slow
def test_a_job_that_slurm_moves_goes_on_and_ends_as_one_that_was_not_moved(data, tmp_path, job):
    """Slurm tells every process of a job to stop, then starts its script anew, also before anything was written."""
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "ACCELERATE_CONFIG": "accelerate_configs/multi_cpu.yaml"}
    steps = {"max_steps": 60, "save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 4}

    def script(name: str) -> list:
        arguments = recipe_line("sft", **sft_arguments(data, tmp_path / name, **steps))
        return ["bash", SLURM / "recipe.sbatch", "recipes/sft.py", *arguments]

    run_command(script("whole"), timeout=400, env=job)
    moved = os.environ | job | {"SLURM_RESTART_COUNT": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(script("moved"), env=moved, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while newest_whole(str(tmp_path / "moved"))[0] is None and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes = psutil.Process(process.pid).children(recursive=True)
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        assert process.wait(120) != 0
        assert psutil.wait_procs(processes, timeout=120)[1] == []
    finally:
        stop(process.pid)
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Stopped by SIGTERM after step" in text, text[-3000:]
    result = run_command(script("moved"), timeout=400, env=job | {"SLURM_RESTART_COUNT": "2"})
    assert "moved: going on from" in result.stdout
    assert_same_result(tmp_path / "whole", tmp_path / "moved")


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("SLURM_SUBMIT_DIR", "submit this script with sbatch"), ("SLURM_GPUS_ON_NODE", "submit it with --gpus-per-node")],
)
def test_a_job_that_cannot_run_says_why(job, missing, expected):
    result = bash(SLURM / "recipe.sbatch", "recipes/sft.py", **(job | {missing: ""}))
    assert result.returncode != 0 and expected in result.stderr


def test_the_three_steps_wait_for_each_other(tmp_path, job):
    program(tmp_path / "bin" / "sbatch", SBATCH)
    result = bash(
        SLURM / "pipeline.sh", "recipes/configs/qwen3_8b", "runs/q", "--nodes", "4", **job, LOG=str(tmp_path / "log")
    )
    assert result.stdout == "sft 1, reward 2, ppo 3\n", result.stderr
    sft, reward, ppo = (tmp_path / "log").read_text().splitlines()
    config, common = "recipes/configs/qwen3_8b", "--nodes 4 scripts/slurm/recipe.sbatch"
    assert sft == (
        f"--parsable --job-name rlhf-sft {common} recipes/sft.py --config {config}/sft.yaml --output_dir runs/q/sft"
    )
    assert reward.startswith(f"--parsable --job-name rlhf-reward --dependency=afterok:1 {common} recipes/reward.py")
    assert reward.endswith("--output_dir runs/q/reward --model_name_or_path runs/q/sft")
    assert ppo.startswith(f"--parsable --job-name rlhf-ppo --dependency=afterok:2 {common} recipes/ppo.py")
    assert ppo.endswith("--model_name_or_path runs/q/sft --reward_model_name_or_path runs/q/reward")


def test_ppo_by_deepspeed_stops_before_any_weights():
    with pytest.raises(UserError, match="launch with accelerate_configs/fsdp2.yaml"):
        check_arguments(PPOScriptArguments(), SimpleNamespace(deepspeed_plugin=object()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs another check comes first")
def test_deepspeed_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    # transformers leaves its half-made configuration here, and every later load in this process would ask it.
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None)
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--deepspeed", "zero.json"]
    with pytest.raises(UserError, match="deepspeed") as error:
        parse((PPOConfig,), flags)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="shards on CPUs: on GPUs launch fsdp2.yaml itself")
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_sharded_model_trains_saves_and_resumes_as_a_whole_one(full, tmp_path):
    """PPO by `fsdp2.yaml` on two processes, against the same on one. Then a run diverges, which ends it."""
    for name in ("one", "whole", "resumed"):
        (tmp_path / name).mkdir()
    trainer = train(str(tmp_path / "one"), 8, **options(full))
    trainer.save_model()
    line = ["accelerate", "launch", "--config_file", "accelerate_configs/fsdp2.yaml", "--mixed_precision", "no"]
    worker = ["-m", "tests.trainers.fsdp_worker", tmp_path, "4", *["full"] * full]
    ended = run_command([*line, *worker], timeout=400, ok=False)

    (why,) = [text for text in ended.stdout.splitlines() if text.startswith("error: ")]
    if full:
        assert re.match(r"error: After step 1: \S+ is not finite, and such weights are not saved\.", why)
    else:
        assert why.startswith("error: After step 1: the loss is nan.") and f"{tmp_path}/diverged/checkpoint-1." in why
    kept = list((tmp_path / "diverged").rglob("*.safetensors"))
    assert len(kept) == (not full)
    assert all(tensor.isfinite().all() for path in kept for tensor in load_file(path).values())
    shares = [json.loads((tmp_path / f"shares_{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert all(share["type"] == "FSDP" and share["here"] < 0.6 * share["all"] for share in shares)
    assert shares[0]["here"] + shares[1]["here"] == shares[0]["all"]
    one, whole, resumed = (
        [row for row in json.loads((tmp_path / name / "log.json").read_text(encoding="utf-8")) if "loss" in row]
        for name in ("one", "whole", "resumed")
    )
    for name in ("loss/policy_avg", "loss/value_avg", "val/ratio", "grad_norm"):
        assert [row[name] for row in whole] == pytest.approx([row[name] for row in one], rel=1e-3, abs=1e-5), name
        assert [row[name] for row in resumed] == [row[name] for row in whole], name
    assert one[3]["policy/approxkl_avg"] > 1e-4, "the updates moved the policy"
    saved = "model.safetensors" if full else "adapter_model.safetensors"
    for name in ("trained.safetensors", saved, f"critic/{saved}", *[f"ema/{saved}"] * (not full)):
        weights, shared = load_file(tmp_path / "one" / name), load_file(tmp_path / "whole" / name)
        assert shared.keys() - weights.keys() <= {"lm_head.weight"}, "tied weights, written twice from shares"
        for key, value in weights.items():
            torch.testing.assert_close(shared[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    trained = [load_file(tmp_path / name / "trained.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])
