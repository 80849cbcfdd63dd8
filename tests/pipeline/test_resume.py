"""Runs that are stopped, killed, resumed with other arguments or started twice; `-m kill` does it at length."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes.cli.checkpoints import newest_whole, problem
from tests.conftest import ROOT, run_command, write_jsonl
from tests.pipeline.conftest import ppo_arguments, reward_arguments, sft_arguments
from tests.pipeline.killing import Recipe, assert_same_result, stop

STEPS = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def recipes(data, tmp_path_factory) -> dict[str, Recipe]:
    """The three recipes, each run once without a stop."""
    folder = tmp_path_factory.mktemp("resume")
    often = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "logging_steps": 2}
    recipes = {
        "sft": Recipe("sft", **sft_arguments(data, folder / "sft", **often, max_steps=10)),
        "reward": Recipe("reward", **reward_arguments(data, folder / "sft", folder / "reward", **often)),
        "ppo": Recipe("ppo", **ppo_arguments(data, folder, folder / "ppo", **often, ema_decay=0.9)),
    }
    for recipe in recipes.values():
        assert recipe.run() == 0, recipe.log()
        recipe.operations = recipe.trace()
    return recipes


def error(recipe: Recipe) -> str:
    """The one line that the last run ended with."""
    (line,) = [line for line in recipe.log().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in recipe.log()
    return line


def operations(recipe: Recipe, pattern: str) -> list[int]:
    """The numbers of the operations on files that match, in the run without a stop."""
    return [number for number, line in enumerate(recipe.operations) if re.search(pattern, line)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before_its_name", "before_its_manifest", "while_finishing"])
def test_a_killed_run_ends_as_if_it_had_not_been(recipes, tmp_path, step, when):
    whole, recipe = recipes[step], recipes[step].at(tmp_path / "run")
    number = {
        "before_its_name": operations(whole, r"rename .*\.unfinished/checkpoint-\d+$")[1],
        "before_its_manifest": operations(whole, r"open .*\.unfinished/checkpoint-\d+/checkpoint\.json")[1],
        "while_finishing": operations(whole, r"rename .*\.unfinished/result/train_config\.yaml$")[0],
    }[when]
    assert recipe.run(number) == -signal.SIGKILL, recipe.log()
    for checkpoint in recipe.folder.glob("checkpoint-*"):
        assert problem(str(checkpoint)) is None
    assert recipe.run(resume_from_checkpoint="true") == 0, recipe.log()
    assert_same_result(whole.folder, recipe.folder)


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_is_told_to_stop_saves_and_goes_on_as_if_it_had_not_been(recipes, tmp_path, step):
    whole, recipe = recipes[step], recipes[step].at(tmp_path / "run")
    code = recipe.run(signal_at=operations(whole, r"open .*unfinished/checkpoint-3/")[0])
    assert code == 128 + signal.SIGTERM, recipe.log()
    saved, _ = newest_whole(str(recipe.folder))
    assert f"Stopped by SIGTERM after step 4. --resume_from_checkpoint true goes on from {saved}." in recipe.log()
    assert not (recipe.folder / "train_config.yaml").exists()
    assert recipe.run(resume_from_checkpoint="true") == 0, recipe.log()
    assert_same_result(whole.folder, recipe.folder)


@pytest.mark.parametrize("step", STEPS)
def test_a_finished_run_that_is_resumed_changes_nothing(recipes, step):
    recipe = recipes[step]
    before = {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*")}
    for wish in ("true", "auto", newest_whole(str(recipe.folder))[0]):
        assert recipe.run(resume_from_checkpoint=wish) == 0
        assert recipe.log().splitlines()[-1].endswith("steps: nothing to do.")
    assert before == {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*")}


def test_a_finished_run_can_be_given_more_steps(recipes, tmp_path):
    """As an uninterrupted one of that length makes them: the rate is constant, so the length changes nothing."""
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    long, short = recipes["sft"].at(tmp_path / "long"), recipes["sft"].at(tmp_path / "short")
    assert long.run(**constant, max_steps=13) == 0
    assert short.run(**constant, max_steps=7) == 0
    assert short.run(**constant, max_steps=13, resume_from_checkpoint="true") == 0, short.log()
    assert_same_weights(long.folder, short.folder)


def assert_same_weights(one: Path, other: Path) -> None:
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def stopped(recipes, tmp_path_factory) -> dict[str, Recipe]:
    """Runs killed after their first checkpoint."""
    found = {}
    for step in STEPS:
        found[step] = recipes[step].at(tmp_path_factory.mktemp("stopped") / step)
        number = operations(recipes[step], r"open .*\.unfinished/checkpoint-\d+/checkpoint\.json")[1]
        assert found[step].run(number) == -signal.SIGKILL
    return found


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        ("ppo", {"kl_coef": 5}, r"--kl_coef was 0\.1, now 5\.0"),
        ("ppo", {"learning_rate": 0.5, "seed": 3}, r"--learning_rate was .*, now 0\.5; --seed was 42, now 3"),
        ("ppo", {"reward_model_name_or_path": "sft"}, r"--reward_model_name_or_path was .*/reward, now .*/sft"),
        ("sft", {"lora_alpha": 3}, r"--lora_alpha was 32, now 3"),
        ("sft", {"max_length": 9}, r"--max_length was 128, now 9"),
        ("reward", {"center_rewards_coefficient": 1}, r"--center_rewards_coefficient was 0\.01, now 1\.0"),
        ("reward", {"save_only_model": True}, r"--save_only_model true leaves out of checkpoints"),
    ],
)
def test_arguments_that_change_what_is_trained_are_refused_by_name(recipes, stopped, step, change, message):
    recipe = stopped[step]
    change = {name: recipes[value].folder if value in STEPS else value for name, value in change.items()}
    before = {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*") if path.is_file()}
    assert recipe.run(resume_from_checkpoint="true", **change) == 1
    assert re.search(message, error(recipe)), error(recipe)
    assert before == {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*") if path.is_file()}


def test_rows_that_have_changed_are_noticed(data, recipes, tmp_path):
    rows = [json.loads(line) for line in Path(data["demonstrations"]).read_text(encoding="utf-8").splitlines()]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = recipes["sft"].at(tmp_path / "run")
    recipe.arguments["dataset_name"] = source
    assert recipe.run(operations(recipes["sft"], r"unfinished/checkpoint-6$")[0]) == -signal.SIGKILL
    write_jsonl(tmp_path / "rows.jsonl", rows[1:] + rows[:1])
    assert recipe.run(resume_from_checkpoint="true") == 1
    assert "the digest of the train rows was " in error(recipe)


@pytest.mark.parametrize("step", STEPS)
def test_every_file_of_a_checkpoint_is_missed(stopped, step):
    recipe = stopped[step]
    checkpoint, _ = newest_whole(str(recipe.folder))
    files = json.loads((Path(checkpoint) / "checkpoint.json").read_text(encoding="utf-8"))["files"]
    needed = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    needed |= {"running_state_0.pt"} | ({"critic/adapter_model.safetensors"} if step == "ppo" else set())
    assert needed <= files.keys()
    for name in sorted(files)[:: 1 if step == "sft" else 5]:
        path = Path(checkpoint) / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert recipe.run(resume_from_checkpoint=checkpoint) == 1
        assert f"{checkpoint}: {name} has {len(content) - 1} of {len(content)} bytes" in error(recipe)
        path.unlink()
        assert recipe.run(resume_from_checkpoint=checkpoint) == 1
        assert f"{checkpoint}: {name} is missing" in error(recipe)
        path.write_bytes(content)


def test_the_critic_of_full_fine_tuning_is_missed(recipes, data, tmp_path):
    full = {"use_peft": False, "model_name_or_path": data["base"], "learning_rate": 1e-4}
    arguments = recipes["ppo"].arguments | full | {"reward_funcs": "tests.pipeline.killing.length"}
    del arguments["reward_model_name_or_path"], arguments["ema_decay"]
    recipe = Recipe("ppo", **(arguments | {"output_dir": tmp_path / "run", "max_steps": 3}))
    assert recipe.run() == 0, recipe.log()
    checkpoint, _ = newest_whole(str(recipe.folder))
    (Path(checkpoint) / "critic" / "model.safetensors").unlink()
    recipe = recipe.at(tmp_path / "resumed")
    assert recipe.run(resume_from_checkpoint=checkpoint, max_steps=4) == 1
    assert f"{checkpoint}: critic/model.safetensors is missing. There is no checkpoint to go on from." in error(recipe)


@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_is_full_leaves_the_older_checkpoint(recipes, tmp_path, step):
    """Large files cannot be written once the first checkpoint is there."""
    recipe = recipes[step].at(tmp_path / "run")
    assert recipe.run(full_at=operations(recipes[step], r"mkdir .*\.unfinished$")[1]) == 1
    line = error(recipe)
    assert re.search("step [56] cannot be written below .*The last good .*/checkpoint-3\\.", line), line
    assert {path.name for path in recipe.folder.glob("checkpoint-*")} == {"checkpoint-3"}
    assert recipe.run(resume_from_checkpoint="true") == 0, recipe.log()
    assert_same_result(recipes[step].folder, recipe.folder)


def test_a_second_run_in_the_same_folder_is_refused(recipes, tmp_path):
    recipe = recipes["sft"].at(tmp_path / "run")
    first = recipe.start(stop_at=operations(recipes["sft"], r"mkdir .*\.unfinished/checkpoint-6$")[0])
    wait_for(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED)
    for wish in ("true", "auto", "false"):
        assert recipe.run(resume_from_checkpoint=wish) == 1
        line = recipe.log().splitlines()[-1]
        expected = "is not empty" if wish == "false" else f"run is in use by process {first.pid} on "
        assert line.startswith("error: ") and expected in line
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 0
    assert_same_result(recipes["sft"].folder, recipe.folder)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def hear_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "multi_cpu"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_training_ends_with_its_launcher(recipes, tmp_path, config, number):
    """The signal goes to the launcher alone, in the middle of a run; a resume at once finds nothing in its way."""
    recipe = recipes["sft"].at(tmp_path / "run")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    line = recipe.command(config, max_steps=100_000)
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            line,
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            stdout=log,
            stderr=log,
            preexec_fn=hear_ctrl_c,
        )
    try:
        wait_for(lambda: newest_whole(str(recipe.folder))[0] or launcher.poll() is not None)
        workers = psutil.Process(launcher.pid).children(recursive=True)
        launcher.send_signal(number)
        launcher.wait(60)
        psutil.wait_procs(workers, timeout=60)
        assert [worker for worker in workers if worker.is_running()] == []
    finally:
        stop(launcher.pid)
    log = (tmp_path / "log").read_text(encoding="utf-8")
    checkpoint = newest_whole(str(recipe.folder))[0]
    assert f"--resume_from_checkpoint true goes on from {checkpoint}" in log, log[-3000:]
    step = int(checkpoint.rpartition("-")[2])
    resumed = run_command(recipe.command(config, resume_from_checkpoint="true", max_steps=step + 3))
    assert f"going on from {checkpoint}" in resumed.stdout
    state = json.loads((recipe.folder / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == step + 3


@pytest.mark.slow
@pytest.mark.parametrize("step", ["sft", "ppo"])
def test_two_processes_see_the_rows_of_a_later_epoch_in_its_order(recipes, tmp_path, step):
    """Resumed in the middle of the second epoch, with rows still to come in it."""
    options = {"per_device_train_batch_size": 4, "save_steps": {"sft": 8, "ppo": 15}[step], "save_total_limit": 5}
    options |= {"max_steps": {"sft": 12, "ppo": 24}[step]}
    whole, resumed = recipes[step].at(tmp_path / "whole"), recipes[step].at(tmp_path / "resumed")
    run_command(whole.command("multi_cpu", **options), timeout=240)
    checkpoint = whole.folder / f"checkpoint-{options['save_steps']}"
    run_command(resumed.command("multi_cpu", **options, resume_from_checkpoint=checkpoint), timeout=240)
    assert_same_weights(whole.folder, resumed.folder)
