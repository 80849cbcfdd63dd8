"""Kill a run anywhere, resume it, and it ends as if nothing had been: `python -m pytest -m kill`, about 30 minutes.

Each recipe is killed with SIGKILL at random moments, and before each operation on files while it starts, saves and
finishes; and gets a SIGTERM at random moments. The counts of a run go into docs/reliability.md.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from recipes.cli.checkpoints import newest_whole, problem
from tests.conftest import ROOT, run_command
from tests.pipeline.conftest import ppo_arguments, reward_arguments, sft_arguments
from tests.pipeline.killing import Recipe, assert_same_result, stop

pytestmark = [pytest.mark.kill, pytest.mark.slow]
LAUNCHES = 8
RANDOM_KILLS = 20  # at 40 to 100 % of the time that a run takes: before, nothing is written yet
STEPS = ("sft", "reward", "ppo")
TITLES = {"sft": "SFT", "reward": "Reward model", "ppo": "PPO"}
COUNTS: dict[tuple[str, str], int] = {}


@pytest.fixture(scope="module", autouse=True)
def written_counts():
    """Puts the counts of the runs that passed into the table of docs/reliability.md."""
    yield
    page = ROOT / "docs" / "reliability.md"
    text = page.read_text(encoding="utf-8")
    for (step, how), count in COUNTS.items():
        text, found = re.subn(rf"(\| {TITLES[step]}, {how} \| )\d+( \| 0 \|)", rf"\g<1>{count}\g<2>", text)
        assert found == 1, f"docs/reliability.md has no row for {TITLES[step]}, {how}"
    page.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def recipes(data, tmp_path_factory) -> dict[str, Recipe]:
    """The three recipes, each run once without a stop. They save, log and end at steps that do not coincide."""
    folder = tmp_path_factory.mktemp("killed")
    often = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "logging_steps": 2}
    recipes = {
        "sft": Recipe("sft", **sft_arguments(data, folder / "sft", **often, max_steps=10)),
        "reward": Recipe(
            "reward", **reward_arguments(data, folder / "sft", folder / "reward", **often, num_train_epochs=2)
        ),
        "ppo": Recipe("ppo", **ppo_arguments(data, folder, folder / "ppo", **often, ema_decay=0.9)),
    }
    for step in STEPS:
        began = time.monotonic()
        assert recipes[step].run() == 0, recipes[step].log()
        recipes[step].seconds = time.monotonic() - began
    began = time.monotonic()  # the first run also waited for the imports
    assert recipes["sft"].at(folder / "again").run() == 0
    recipes["sft"].seconds = time.monotonic() - began
    return recipes


def complete(recipe: Recipe) -> None:
    """Start a killed run again, as a scheduler does, and compare its end with the uninterrupted one's."""
    for checkpoint in recipe.folder.glob("checkpoint-*"):
        assert problem(str(checkpoint)) is None, f"{checkpoint} has its name and is not whole"
    assert recipe.run(resume_from_checkpoint="auto") == 0, recipe.log()


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_random_moment(recipes, tmp_path, step):
    whole, moments = recipes[step], random.Random(step)
    for number in range(RANDOM_KILLS):
        recipe = whole.at(tmp_path / f"{number}")
        recipe.run(after=whole.seconds * moments.uniform(0.4, 1.0))
        complete(recipe)
        assert_same_result(whole.folder, recipe.folder)
        shutil.rmtree(recipe.folder)
    COUNTS[step, "at a random moment"] = RANDOM_KILLS


@pytest.mark.parametrize("step", STEPS)
def test_told_to_stop_at_a_random_moment(recipes, tmp_path, step):
    whole, moments, codes = recipes[step], random.Random(step), Counter()
    for number in range(RANDOM_KILLS):
        recipe = whole.at(tmp_path / f"{number}")
        process = recipe.start()
        time.sleep(whole.seconds * moments.uniform(0.4, 1.0))
        process.terminate()
        process.join(60)
        codes[process.exitcode] += 1
        complete(recipe)
        assert_same_result(whole.folder, recipe.folder)
        shutil.rmtree(recipe.folder)
    # It stops after a step, or at once while nothing is trained, or is done before the signal comes.
    assert codes.keys() <= {128 + signal.SIGTERM, -signal.SIGTERM, 0}, codes
    COUNTS[step, "told to stop at a random moment"] = RANDOM_KILLS


@pytest.mark.parametrize("step", STEPS)
def test_two_processes_killed_at_a_random_moment(recipes, tmp_path, step):
    """Through the real launcher; all three processes are killed at once. Each run has several epochs."""
    moments, last = random.Random(step), 24
    arguments = recipes[step].arguments | {"per_device_train_batch_size": 4, "max_steps": last}
    arguments.pop("num_train_epochs", None)
    whole = Recipe(step, **(arguments | {"output_dir": tmp_path / "whole"}))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def saved(recipe: Recipe) -> int:
        newest, _ = newest_whole(str(recipe.folder))
        return int(newest.rpartition("-")[2]) if newest else 0

    run_command(whole.command("multi_cpu"), timeout=240)
    for number in range(LAUNCHES):
        recipe, until = whole.at(tmp_path / f"{number}"), moments.randrange(0, last, 3)
        with open(tmp_path / "log", "w") as log:
            line = recipe.command("multi_cpu")
            launcher = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"PATH": path}, stdout=log, stderr=log)
        try:
            while saved(recipe) < until and launcher.poll() is None:
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.3))
        finally:
            stop(launcher.pid)
            launcher.wait(60)
        for checkpoint in recipe.folder.glob("checkpoint-*"):
            assert problem(str(checkpoint)) is None, f"{checkpoint} has its name and is not whole"
        run_command(recipe.command("multi_cpu", resume_from_checkpoint="auto"), timeout=240)
        assert_same_result(whole.folder, recipe.folder)
    COUNTS[step, "two processes, at a random moment"] = LAUNCHES


def stages(trace: list[str]) -> list[int]:
    """The operations of a run's start, of the save that first deletes an older checkpoint, and of all after the last.

    The other saves do the same as these.
    """
    saves = {}  # first operation of each save
    for number, line in enumerate(trace):
        if match := re.search(r"unfinished/checkpoint-(\d+)", line):
            saves.setdefault(int(match[1]), number)
    first, second, third, *others = saves.values()
    return [*range(first), *range(second, third), *range(others[-1] if others else third, len(trace))]


@pytest.mark.parametrize("step", STEPS)
def test_killed_before_each_operation_on_files(recipes, tmp_path, step):
    whole = recipes[step]
    numbers = stages(whole.trace())
    for number in numbers:
        recipe = whole.at(tmp_path / f"{number}")
        assert recipe.run(number) == -signal.SIGKILL, recipe.log()
        complete(recipe)
        assert_same_result(whole.folder, recipe.folder)
        shutil.rmtree(recipe.folder)
    COUNTS[step, "before an operation on files"] = len(numbers)
