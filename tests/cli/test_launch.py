"""Every wrong way to launch that Accelerate accepts without an error, through the real `accelerate launch`."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from transformers import TrainingArguments
from trl import SFTConfig

from recipes.cli import launch as launch_module
from recipes.cli.errors import UserError
from recipes.cli.launch import check_gpus, check_hub, check_launch, check_wandb, find_problem, read_request
from tests.conftest import ROOT, run_command

PROBE = """
import sys
sys.modules["bitsandbytes"] = None  # not needed here, and slow to import
import torch
from transformers import HfArgumentParser, TrainingArguments
from recipes.cli.launch import check_gpus, check_launch
from recipes.cli.run import run
def main():
    check_gpus()
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    check_launch(training_args)
    total = training_args.distributed_state.process_index + torch.ones(1, device=training_args.device)
    if training_args.distributed_state.num_processes > 1:
        torch.distributed.all_reduce(total)
    print(f"sum {total.item():.0f}")
run(main)
"""
COMMON = "compute_environment: LOCAL_MACHINE\nnum_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\n"
MULTI_CPU = COMMON + "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
CONFIGS = ROOT / "accelerate_configs"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def launch(tmp_path):
    def launch(launcher: list, training: list, ok: bool):
        (tmp_path / "probe.py").write_text(PROBE)
        (tmp_path / "old_multi_cpu.yaml").write_text(MULTI_CPU)
        command = ["accelerate", "launch", "-q", *launcher, "probe.py", "--report_to", "none", *training]
        return run_command(command, timeout=180, ok=ok, cwd=tmp_path).stdout

    return launch


@pytest.mark.parametrize(
    "command",
    [
        "python /venv/bin/accelerate launch",
        "/venv/bin/accelerate-launch",
        "python -m accelerate.commands.launch",
        "python -m accelerate.commands.accelerate_cli launch",
        "python -X importtime -W ignore -u /venv/bin/accelerate launch",
    ],
)
def test_every_spelling_of_accelerate_launch_is_read(monkeypatch, command):
    words = [*command.split(), "--cpu", "--num_processes", "2", "recipes/sft.py", "--output_dir", "x"]
    monkeypatch.setattr(launch_module.psutil, "Process", lambda _: SimpleNamespace(cmdline=lambda: words))
    request = launch_module.requested()
    assert request is not None and (request.num_processes, request.use_cpu) == (2, True)
    assert launch_module.launcher() == "accelerate launch -q --cpu --num_processes 2", "for the card and what is next"


@pytest.mark.parametrize(
    ("asked", "own", "used"),
    [("fp16", {"bf16": True}, "bf16"), ("bf16", {}, "bf16"), ("no", {"bf16": True}, "bf16"), ("no", {}, "")],
)
def test_of_two_wishes_for_the_precision_the_one_that_counts_is_said(tmp_path, monkeypatch, capsys, asked, own, used):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    check_launch(TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **own))
    assert capsys.readouterr().err.endswith(f", mixed precision {used}.\n" if used else "(not distributed).\n")


@pytest.mark.slow
def test_a_launch_that_runs_as_asked_says_so(launch):
    output = launch(["--config_file", CONFIGS / "multi_cpu.yaml"], ["--use_cpu", "true"], ok=True)
    assert output.count("Launched: 2 processes") == 1
    assert "Running: 2 processes on cpu (MULTI_CPU)" in output
    assert output.count("sum 3") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "training", "asked", "running", "advice"),
    [
        pytest.param(
            ["--config_file", "old_multi_cpu.yaml"], ["--use_cpu", "true"],
            "2 processes (MULTI_CPU, CPU, by old_multi_cpu.yaml)", "1 process on cpu", "multi_cpu.yaml and --use_cpu",
            id="MULTI_CPU starts one process",
        ),
        pytest.param(
            ["--cpu", "--num_processes", "2"], ["--use_cpu", "true"],
            "2 processes (not distributed, CPU", "1 process on cpu", "multi_cpu.yaml and --use_cpu",
            id="--cpu starts one process",
        ),
        pytest.param(
            ["--config_file", CONFIGS / "multi_cpu.yaml"], [],
            "2 processes", "1 process on cpu", "add the training argument --use_cpu true",
            id="two processes train apart", marks=no_gpu,
        ),
        pytest.param(
            ["--use_fsdp", "--num_processes", "2", "--main_process_port", "0"], ["--use_cpu", "true"],
            "2 processes (FSDP", "2 processes on cpu (MULTI_CPU)", "FSDP shards nothing",
            id="FSDP shards nothing on a CPU",
        ),
        pytest.param(
            ["--config_file", CONFIGS / "single_gpu.yaml", "--num_processes", "2"], [],
            "2 processes (not distributed", "1 process on", "for one, --num_processes 1",
            id="single_gpu with two processes", marks=needs_gpu,
        ),
        pytest.param(
            ["--config_file", CONFIGS / "cpu.yaml"], [],
            "1 process (not distributed, CPU", "1 process on cuda", "--use_cpu true",
            id="a CPU asked for, a GPU used", marks=needs_gpu,
        ),
    ],
)  # fmt: skip
def test_a_launch_that_runs_otherwise_stops(launch, launcher, training, asked, running, advice):
    output = launch(launcher, training, ok=False)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert f"Launched: {asked}" in errors[0]
    assert f"Running: {running}" in errors[0]
    assert advice in errors[0]
    assert "sum" not in output
    if "multi_cpu.yaml" in advice:  # one process was started, whose failure `-q` adds nothing to
        assert output.splitlines()[-1] == errors[0]


@pytest.mark.slow
@needs_gpu
def test_more_processes_than_gpus_stop(launch):
    gpus = torch.cuda.device_count()
    launcher = ["--config_file", CONFIGS / "multi_gpu.yaml", "--num_processes", str(gpus + 1)]
    output = launch(launcher, [], ok=False)
    assert f"error: {gpus + 1} processes on {gpus} GPU" in output


@no_gpu
@pytest.mark.parametrize(
    ("launcher", "use_cpu", "problem"),
    [
        (["--config_file", f"{CONFIGS}/cpu.yaml"], True, None),
        (["--use_deepspeed"], True, "DEEPSPEED shards nothing"),
        (["--config_file", f"{CONFIGS}/single_gpu.yaml"], True, "set it to false to train on the GPU"),
        (["--config_file", f"{CONFIGS}/cpu.yaml", "--num_processes", "3"], True, "for one, --num_processes 1"),
        (["--multi_gpu", "--num_processes", "2"], True, "multi_cpu.yaml and --use_cpu true"),
        (["--cpu", "--num_processes", "1"], True, None),
    ],
)
def test_what_is_wrong_with_one_process_on_a_cpu(tmp_path, launcher, use_cpu, problem):
    training_args = TrainingArguments(str(tmp_path), use_cpu=use_cpu, report_to="none")
    found = find_problem(read_request([*launcher, "train.py"]), 1, training_args)
    assert found is problem or problem in found


def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    for name, value in {"WANDB_API_KEY": "", "WANDB_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="there is no W&B key; type wandb login"):
        check_launch(TrainingArguments(str(tmp_path), use_cpu=True, report_to="wandb"))


def test_offloading_of_activations_without_a_gpu_is_one_line(tmp_path, monkeypatch):
    """Also where `use_cpu` is a flag that the YAML did not expect, or is not set: TRL would fail on `None`."""
    options = {"bf16": False, "activation_offloading": True, "report_to": "none"}
    several = [SFTConfig(str(tmp_path), use_cpu=use_cpu, **options) for use_cpu in (True, False)]
    monkeypatch.setattr(SFTConfig, "device", torch.device("cpu"))
    for args in several:
        with pytest.raises(UserError, match="activation_offloading moves .*, and this runs on a CPU: leave it out"):
            check_launch(args)


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    training_args = TrainingArguments(str(tmp_path), use_cpu=True, push_to_hub=True, report_to="none")
    with pytest.raises(UserError, match="push_to_hub true: the Hub .*HF_HUB_OFFLINE is set"):
        check_launch(training_args)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "process_index", 1)
        check_launch(training_args)  # which pushes nothing
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(UserError, match="the Hub does not let this machine in"):
        check_hub("hf_none")


@pytest.mark.parametrize(
    ("launcher", "num_processes", "n_gpu", "problem"),
    [
        (["--config_file", f"{CONFIGS}/single_gpu.yaml"], 1, 1, None),
        (["--config_file", f"{CONFIGS}/single_gpu.yaml"], 1, 4, "split its batches over all GPUs"),
        (["--config_file", f"{CONFIGS}/multi_gpu.yaml"], 2, 1, None),
        (["--config_file", f"{CONFIGS}/fsdp2.yaml"], 2, 1, None),
        (["--config_file", f"{CONFIGS}/deepspeed_zero2.yaml"], 2, 1, None),
        (["--config_file", f"{CONFIGS}/deepspeed_zero3.yaml", "--num_processes", "8"], 8, 1, None),
        (["--config_file", f"{CONFIGS}/multi_node.yaml", "--machine_rank", "1"], 16, 1, None),
        (["--config_file", f"{CONFIGS}/multi_node.yaml"], 8, 1, "--num_processes 1"),
        (["--config_file", f"{CONFIGS}/cpu.yaml"], 1, 1, "--use_cpu true"),
        ([], 2, 1, None),
    ],
)
def test_what_is_wrong_on_gpus(monkeypatch, launcher, num_processes, n_gpu, problem):
    """The decision alone, with what transformers reports on a GPU, so that it is also tested without one."""
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    on_gpu = SimpleNamespace(device=torch.device("cuda"), n_gpu=n_gpu)
    found = find_problem(read_request([*launcher, "train.py"]), num_processes, on_gpu)
    assert found is problem or problem in found


def test_more_processes_than_gpus_are_counted(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="3 processes on 2 GPUs: lower --num_processes .* to 2"):
        check_gpus()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus()


@pytest.mark.parametrize(
    ("visible", "flags", "refused"),
    [("3", [], True), ("", [], True), ("0,1", [], False), ("3", ["--gpu_ids", "3"], False), (None, [], False)],
)
def test_gpus_that_the_environment_does_not_allow_are_not_taken(monkeypatch, visible, flags, refused):
    """Accelerate puts the `gpu_ids` of its file in their place: the run went to somebody else's GPU."""
    words = ["accelerate", "launch", "--config_file", f"{CONFIGS}/single_gpu.yaml", *flags, "train.py"]
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    process = SimpleNamespace(cmdline=lambda: words, environ=lambda: env)
    monkeypatch.setattr(launch_module.psutil, "Process", lambda _: process)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if not refused:
        return check_gpus()
    with pytest.raises(UserError, match=f"gpu_ids 0 would take other GPUs than .*names, {visible}: .* with --gpu_ids"):
        check_gpus()


@no_gpu
@pytest.mark.parametrize("name", ["single_gpu", "multi_gpu", "fsdp2", "multi_node"])
def test_a_gpu_configuration_without_a_gpu_is_one_line(monkeypatch, name):
    request = read_request(["--config_file", f"{CONFIGS}/{name}.yaml", "train.py"])
    monkeypatch.setattr(launch_module, "requested", lambda: request)
    with pytest.raises(UserError, match=rf"{name}.yaml\)\. No GPU was found: .*/(multi_)?cpu.yaml and --use_cpu true"):
        check_gpus()


FAILS = """
import sys
sys.modules["bitsandbytes"] = None  # not needed here, and slow to import
from accelerate import PartialState
from recipes.cli.errors import UserError
from recipes.cli.run import run
def main():
    state = PartialState(cpu=True)
    if state.process_index == 1:
        raise {error}
    state.wait_for_everyone()
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"),
    [("UserError('the second disk is full.')", "error: the second disk is full."), ("KeyError('a bug')", "Traceback")],
)
def test_a_process_that_fails_alone_is_heard_and_ends_the_others(tmp_path, error, expected):
    (tmp_path / "fails.py").write_text(FAILS.format(error=error))
    command = ["accelerate", "launch", "--config_file", CONFIGS / "multi_cpu.yaml", tmp_path / "fails.py"]
    output = run_command(command, timeout=120, ok=False).stdout
    assert expected in output


ENDS = """
import atexit, sys, threading
sys.modules["bitsandbytes"] = None  # not needed here, and slow to import
from accelerate import PartialState
from recipes.cli.run import run
def main():
    PartialState(cpu=True).wait_for_everyone()
    atexit.register(print, "closed")
    threading.Thread(target=threading.Event().wait).start()
run(main)
"""


@pytest.mark.slow
def test_processes_that_are_done_end_although_a_thread_does_not(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    command = ["accelerate", "launch", "--config_file", CONFIGS / "multi_cpu.yaml", tmp_path / "ends.py"]
    assert run_command(command, timeout=180).stdout.count("closed") == 2
