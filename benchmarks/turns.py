"""Sides of a benchmark take turns: each lives in a process of its own, and only one runs at a time.

A side loads its models, then is stopped; each time the parent says go it runs one turn and reports its CPU seconds,
wall seconds and peak memory. So imports and loading are not timed, and A B A B A B sees the same weather on both.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Side:
    """A side's process, seen from the parent. `turn` runs one turn and returns what the side reports."""

    def __init__(self, command: list[str], device: str, environment: dict[str, str] | None = None):
        offline = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | offline | hidden | (environment or {}),
        )

    def ready(self) -> None:
        """Wait until the side has loaded."""
        self._read()

    def turn(self) -> dict:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"error: a side ended early:\n{self.errors.read()[-3000:]}")
        # Nothing of this side runs beside another's turn, not even the end of its process after the last one.
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            file.close()


def alternate(
    commands: dict[str, list[str]], alternations: int, device: str, warm_up: int = 1
) -> dict[str, list[dict]]:
    """The turns of each side, A B A B A B, without the first `warm_up` of each."""
    turns = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        sides = {name: Side(command, device) for name, command in commands.items()}
        for side in sides.values():
            stack.callback(side.close)
        for side in sides.values():
            side.ready()
        for number in range(warm_up + alternations):
            for name, side in sides.items():
                result = side.turn()
                if number >= warm_up:
                    turns[name].append(result)
                    print(f"{name}: {sum(result['wall'].values()):.2f} s", file=sys.stderr, flush=True)
    return turns


class Meter:
    """A side's own clock and memory gauge, and its line to the parent.

    Memory is in bytes: `libraries` before any model was built, `models` once they were, `peak` during the turn. On a
    CPU it is resident memory, on a GPU what torch has allocated there. `report` goes along with the next report.
    """

    def __init__(self, device: str):
        self.device = device
        self.line = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no report
        self.memory, self.report, self.waits = {}, {}, False

    def loaded(self, what: str) -> None:
        """Note the memory now, once the `libraries` or the `models` are there."""
        gc.collect()
        self.memory[what] = self._allocated()

    def start(self) -> None:
        """Tell the parent that this side is ready, wait for its turn, and start the clocks."""
        if not self.waits:  # later the report of the turn before says so
            self._say({"ready": True})
        self.waits = True
        if not sys.stdin.readline():
            raise SystemExit("the parent has gone")
        self._forget_peak()
        self.report, self.cpu, self.wall = {}, defaultdict(float), defaultdict(float)
        self.phase, self.since = "other", self._now()

    def switch(self, phase: str) -> None:
        """From now on time goes to `phase`."""
        now = self._now()
        self.cpu[self.phase] += now[0] - self.since[0]
        self.wall[self.phase] += now[1] - self.since[1]
        self.phase, self.since = phase, now

    def timed(self, function, phase: str, then: str):
        """`function`, whose time goes to `phase`, and the time after it to `then`."""

        def run(*args, **kwargs):
            self.switch(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(then)

        return run

    def finish(self) -> None:
        """Report the turn to the parent."""
        self.switch("other")
        memory = self.memory | {"peak": self._peak()}
        self._say({"cpu": self.cpu, "wall": self.wall, "memory": memory, **self.report})

    def _say(self, message: dict) -> None:
        self.line.write(json.dumps(message) + "\n")
        self.line.flush()

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def _allocated(self) -> int:
        if self.device == "cuda":
            import torch

            return torch.cuda.memory_allocated()
        return resident("VmRSS")

    def _forget_peak(self) -> None:
        if self.device == "cuda":
            import torch

            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()

    def _peak(self) -> int:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return resident("VmHWM")


def forget_peak() -> int:
    """Let VmHWM begin anew at what is resident now, and return that, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def resident(name: str) -> int:
    """Bytes of a line of Linux' /proc/self/status: VmRSS, what is resident now, or VmHWM, the most so far."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def medians(turns: list[dict], clock: str) -> dict[str, float]:
    """Median seconds of each phase over the turns, and of their `total`."""
    found = {phase: statistics.median(turn[clock].get(phase, 0.0) for turn in turns) for phase in turns[0][clock]}
    return found | {"total": statistics.median(sum(turn[clock].values()) for turn in turns)}


def compare(peer: list[dict], ours: list[dict], phases: tuple[str, ...]) -> dict:
    """Ratios of medians: times are the peer's over ours, memory is ours over the peer's.

    `peak_memory_ratio` leaves out what the libraries took before any model was built, as a GPU's memory does;
    `total` is the whole process, and `above_models` what training took beyond the loaded models.
    """
    clocks = {clock: (medians(peer, clock), medians(ours, clock)) for clock in ("cpu", "wall")}
    peaks = {}
    for name, base in (("above_libraries", "libraries"), ("above_models", "models"), ("total", None)):
        if base not in (None, *peer[0]["memory"]):
            continue
        sides = [max(turn["memory"]["peak"] - turn["memory"].get(base, 0) for turn in turns) for turns in (peer, ours)]
        peaks[name] = {"peer_gib": sides[0] / 2**30, "ours_gib": sides[1] / 2**30, "ratio": sides[1] / sides[0]}

    def ratio(clock: str, phase: str) -> float:
        theirs, own = clocks[clock]
        return theirs[phase] / own[phase] if own[phase] else float("nan")

    return {
        "ratio_cpu": ratio("cpu", "total"),
        "ratio_wall": ratio("wall", "total"),
        "peak_memory_ratio": peaks["above_libraries"]["ratio"],
        "phases": {
            phase: {
                "ratio_cpu": ratio("cpu", phase),
                "ratio_wall": ratio("wall", phase),
                "share_of_peer": clocks["cpu"][0][phase] / clocks["cpu"][0]["total"],
                "share_of_ours": clocks["cpu"][1][phase] / clocks["cpu"][1]["total"],
            }
            for phase in phases
        },
        "peak_memory": peaks,
    }


def parser(description: str, alternations: int) -> argparse.ArgumentParser:
    """The arguments of every benchmark whose sides take turns."""
    arguments = argparse.ArgumentParser(description=description.splitlines()[0])
    arguments.add_argument("--alternations", type=int, default=alternations)
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments.add_argument("--output", help="JSON file for the result, the environment and every turn.")
    return arguments


def rounded(value, digits: int = 4):
    """`value` with its numbers rounded to so many significant digits, however deep they are."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def environment() -> dict:
    """Where a result comes from: commit, versions and the kind of machine."""
    from recipes.cli.record import git_revision  # not for the sides, whose memory it would be

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": git_revision(),
        "machine": f"{os.cpu_count()} cores, {models[0] if models else platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "versions": {name: version(name).split("+")[0] for name in ("torch", "trl", "transformers", "peft")},
    }


def publish(result: dict, output: str | None, **details) -> None:
    """Print `result` as the last line; with `output`, write it with its environment and details to that file."""
    result = rounded(result)
    if output:
        text = json.dumps({**environment(), "result": result, **rounded(details)}, indent=1)
        Path(output).write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
