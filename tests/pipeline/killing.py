"""Recipes in processes of their own that are forked from one with everything imported, to be killed at any moment.

A run of the tiny models takes about a second then. `Watcher` counts what a run does to the files of its output folder,
and does something to the process just before the n-th of these operations.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from recipes.cli.run import run
from tests.conftest import recipe_line

TIMEOUT = 120
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Watcher:
    """An audit hook: each operation on files of `folder` is a line in `trace`.

    Args:
        events: what happens just before the operation of each number.
    """

    def __init__(self, folder: str, trace: str, events: dict[int, Callable[[], None]]):
        self.folder, self.events, self.count = folder, events, 0
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not arguments or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        number, self.count = self.count, self.count + 1
        if number in self.events:
            self.events[number]()
        os.write(self.trace, f"{event} {arguments[0]}\n".encode())


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def fill_disk() -> None:
    """From now on a file of this process can have 50 kB, which its log needs and its weights exceed."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def length(completions, **kwargs) -> list[float]:
    """A reward function."""
    return [float(len(completion[0]["content"])) for completion in completions]


def work(step: str, arguments: dict, events: dict) -> None:
    """What the child does: the recipe as its command would run it, with its output in a file."""
    folder = str(arguments["output_dir"])
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    gc.freeze()  # each trainer calls `gc.collect`, which would walk all that was imported
    sys.addaudithook(Watcher(folder, f"{folder}.trace", events))
    recipe = importlib.import_module(f"recipes.{step}")
    sys.argv = [step, *recipe_line(step, **arguments)]
    run(recipe.main, recipe.ARGUMENTS)


class Recipe:
    """One recipe with its arguments, started again and again in one output folder."""

    def __init__(self, step: str, output_dir: str | Path, **arguments):
        self.step, self.folder = step, Path(output_dir)
        self.arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}

    def at(self, output_dir: str | Path) -> "Recipe":
        """The same recipe in another folder."""
        return Recipe(self.step, output_dir, **self.arguments)

    def start(self, kill_at=None, signal_at=None, stop_at=None, full_at=None, **changes):
        """A process that runs the recipe, with what happens to it at an operation on files of that number.

        It is killed, gets a SIGTERM, is stopped until SIGCONT, or the disk is full from there on.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"recipes.{step}" for step in ("sft", "reward", "ppo")])
        events = {kill_at: partial(send, signal.SIGKILL), signal_at: partial(send, signal.SIGTERM)}
        events |= {stop_at: partial(send, signal.SIGSTOP), full_at: fill_disk}
        Path(f"{self.folder}.trace").unlink(missing_ok=True)
        arguments = self.arguments | {"output_dir": str(self.folder)} | changes
        process = context.Process(target=work, args=(self.step, arguments, events))
        process.start()
        return process

    def run(self, kill_at: int | None = None, after: float | None = None, **changes) -> int:
        """The exit code; -9 after a SIGKILL at operation `kill_at` on files, or `after` seconds."""
        process = self.start(kill_at, **changes)
        process.join(TIMEOUT if after is None else after)
        if process.is_alive():
            process.kill()
            process.join()
            assert after is not None, f"still running after {TIMEOUT} s: {self.log()}"
        return process.exitcode

    def command(self, config: str, **changes) -> list[str]:
        """The command that runs it by one of the files in accelerate_configs."""
        launcher = ["accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml"]
        arguments = self.arguments | {"output_dir": str(self.folder)} | changes
        return [*launcher, f"recipes/{self.step}.py", *recipe_line(self.step, **arguments)]

    def log(self) -> str:
        return Path(f"{self.folder}.log").read_text(encoding="utf-8", errors="replace")

    def trace(self) -> list[str]:
        return Path(f"{self.folder}.trace").read_text(encoding="utf-8").splitlines()


def stop(pid: int) -> None:
    """Kill a process that a test started, with all it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def assert_same_result(one: Path, other: Path) -> None:
    """The same files; every weight is equal bit by bit, and every logged number but the seconds."""
    assert names(one) ^ names(other) <= {".lock"}, "a lock whose process is gone may stay behind"
    for name in names(one) - {".lock"}:
        if name.endswith((".safetensors", "rng_state.pth", "scheduler.pt", "reward_statistics.json")):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("trainer_state.json", "eval_results.json"):
        if (one / name).exists():
            first, second = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (one, other))
            assert without_seconds(first) == without_seconds(second), f"{name}: {first} {second}"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def without_seconds(value):
    """`value` without what depends on the speed of the machine or on the folder's name."""
    if isinstance(value, list):
        return [without_seconds(item) for item in value]
    if isinstance(value, dict):
        timed = ("runtime", "per_second", "step_time", "best_model_checkpoint")
        return {key: without_seconds(item) for key, item in value.items() if not key.endswith(timed)}
    return value
