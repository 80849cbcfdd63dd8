"""Takes the tiny world's base model through the whole pipeline with the commands anyone would type.

    bash scripts/quickstart.sh --output_dir runs/quickstart --seed 0

Every stage is a command that is printed before it runs; its full output goes to `OUTPUT_DIR/logs`. Run the same line
again to go on where it stopped.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from recipes.cli.errors import UserError
from recipes.cli.files import write_text
from recipes.cli.screen import headline
from recipes.cli.start import quiet

ROOT = Path(__file__).resolve().parent.parent.parent
RUNNING: list[subprocess.Popen] = []  # what other threads end
PROGRESS = re.compile(r"\d+/\d+(?= \[)|(?<=parts: )\S+")  # of a progress bar; of an evaluation
INTERVAL = 15.0  # seconds between two lines of progress
REAL_MODEL = (
    "accelerate launch -q --config_file accelerate_configs/single_gpu.yaml recipes/sft.py "
    "--config recipes/configs/qwen3_0.6b/sft.yaml --output_dir runs/qwen3_0.6b/sft"
)


@dataclass(frozen=True)
class Stage:
    """One command, what it leaves in the output folder, and the metrics to show at its end, each with its label.

    `continues`: whether the command itself goes on with what a stopped run left.
    """

    name: str
    title: str
    template: str
    output: str
    metrics: dict[str, str] = field(default_factory=dict)
    continues: bool = True

    def command(self, folder: str, seed: int) -> list[str]:
        """The words of the command; `folder` as it is to stand there."""
        return [word.format(folder=folder, output=self.output, seed=seed) for word in self.template.split()]


def recipe(name: str, arguments: str = "") -> str:
    launch = f"accelerate launch -q --config_file accelerate_configs/cpu.yaml recipes/{name}.py"
    config = f"--config recipes/configs/tiny_world/{name}.yaml"
    output = "--output_dir {folder}/{output} --seed {seed} --resume_from_checkpoint auto"
    return f"{launch} {config} {arguments} {output}"


MODELS = "--model_name_or_path {folder}/sft --reward_model_name_or_path {folder}/reward"
GOLD = "--reward_funcs recipes.tiny_world.judge.gold --reward_weights 1 0"
SAMPLE = (
    "python scripts/sample_responses.py --model_name_or_path {folder}/sft "
    "--dataset_name recipes/tiny_world/data/prompts_train.jsonl --num_generations 4 --temperature 1.0 --top_k 0 "
    "--top_p 1.0 --max_completion_length 40 --generation_batch_size 256 --seed {seed} --output {folder}/{output}"
)
RANK = "python -m recipes.tiny_world.labeler --samples {folder}/samples.jsonl --output {folder}/{output} --seed {seed}"
REWARD = recipe("reward", "--model_name_or_path {folder}/sft --dataset_name {folder}/rankings.jsonl")
EVALUATE = "python -m recipes.tiny_world.evaluate --output_dir {folder} --seed {seed}"
ACCURACY = {"eval_accuracy": "accuracy", "eval_longer_wins": "longer wins"}
CURVES = {"objective/scores": "reward", "objective/kl": "KL", "rewards/gold/mean": "gold"}
PPO = recipe("ppo", f"{MODELS} {GOLD}")
PPO_NO_KL = recipe("ppo", f"{MODELS} {GOLD} --kl_coef 0 --max_steps 90")  # longer, so that gold starts to fall
PIPELINE = [  # each entry the stages that run at the same time
    [Stage("sft", "Step 1: learn from demonstrations", recipe("sft"), "sft", {"loss": "loss"})],
    [Stage("sample", "Step 2a: sample 4 responses a prompt", SAMPLE, "samples.jsonl")],
    [Stage("rank", "Step 2b: rank them (a SIMULATED labeler, a program)", RANK, "rankings.jsonl", continues=False)],
    [Stage("reward", "Step 2c: learn a reward model", REWARD, "reward", ACCURACY)],
    [
        Stage("ppo", "Step 3: PPO with a KL penalty", PPO, "ppo", CURVES),
        Stage("ppo_no_kl", "Control: PPO without the KL penalty", PPO_NO_KL, "ppo_no_kl", CURVES),
    ],
    [Stage("evaluate", "Evaluation on held-out prompts", EVALUATE, "evaluation.json")],
]


class Quickstart:
    """The stages in one output folder, and in `quickstart.json` their commands and which are finished."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder.resolve(), seed
        # How the folder stands in the commands.
        self.written = os.path.relpath(self.folder, ROOT) if self.folder.is_relative_to(ROOT) else str(self.folder)
        self.state_file, self.lock = self.folder / "quickstart.json", Lock()
        self.state: dict[str, Any] = {"seed": seed, "seconds": {}, "commands": {}}
        if self.state_file.exists():
            self.state = json.loads(self.state_file.read_text(encoding="utf-8"))
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no quickstart: choose another --output_dir.")
        if (known := self.state["seed"]) != seed:
            raise UserError(f"{folder} holds a quickstart with seed {known}: choose another --output_dir.")
        self.seconds, self.commands = self.state["seconds"], self.state["commands"]
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, noted: dict[str, Any], stage: str, value: Any) -> None:
        with self.lock:
            noted[stage] = value
            write_text(str(self.state_file), json.dumps(self.state, indent=2))

    def run(self, stage: Stage) -> None:
        command, output = stage.command(self.written, self.seed), self.folder / stage.output
        before = self.commands.get(stage.name, command)
        if before != command:
            raise UserError(
                f"{output} was made by another command ({shlex.join(before)}): choose another --output_dir."
            )
        if stage.name in self.seconds and output.exists():
            print(f"\n{stage.title}\n  finished before, in {self.seconds[stage.name]:.0f} s: {output}", flush=True)
            return
        if stage.name in [*self.seconds][:-1]:  # what was made from it would be shown beside what is made now
            raise UserError(f"{output} has been removed after it was made: choose another --output_dir.")
        self.note(self.commands, stage.name, command)
        if output.exists() and not stage.continues:
            aside = output.with_name(f"{output.name}.stopped{time.time():.0f}")
            output.rename(aside)
            print(f"\nPut aside what a stopped run left: {aside}", flush=True)
        print(f"\n{stage.title}\n$ {shlex.join(command)}", flush=True)
        log, started = self.folder / "logs" / f"{stage.name}.log", time.monotonic()
        log.parent.mkdir(exist_ok=True)
        if execute(command, log, stage.name) != 0:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise UserError(f"{stage.title} failed; the end of {log}:\n{tail}")
        self.note(self.seconds, stage.name, time.monotonic() - started)
        found = ""
        if stage.metrics:
            state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
            found = headline(state["log_history"], stage.metrics)
        print(f"  {stage.name}: done in {self.seconds[stage.name]:.0f} s  {found}".rstrip(), flush=True)


def run_parallel(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Run jobs on threads, in their order; the first that fails, or Ctrl-C, ends the running commands of all."""
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(job) for job in jobs]):
            future.result()
    finally:  # Ctrl-C reaches this thread alone, and the pool waits for its commands
        pool.shutdown(wait=False, cancel_futures=True)
        for process in RUNNING:
            if process.poll() is None:  # the launcher together with what it launched
                os.killpg(process.pid, signal.SIGTERM)
        pool.shutdown()


def execute(command: list[str], log: Path, name: str) -> int:
    """Run a command with its output in `log` and a line of progress now and then; return its exit code."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of loading, not of training
        "TOKENIZERS_PARALLELISM": "false",
        # A model this small is no faster with a second thread, and much slower where another program uses that core.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    RUNNING.append(process)
    started = shown = time.monotonic()
    with log.open("wb", buffering=0) as file:
        # Until what the launcher launched has ended too: a run that is stopped saves after its launcher is gone.
        while chunk := os.read(process.stdout.fileno(), 65536):
            file.write(chunk)
            found = PROGRESS.findall(chunk.decode(errors="replace"))
            if found and (now := time.monotonic()) - shown >= INTERVAL:
                shown = now
                print(f"  {now - started:4.0f} s  {name}: {found[-1]}", flush=True)
    return process.wait()


def finish(work: Callable[[], None]) -> int:
    """Do the work and return the exit code; an error of the user's or Ctrl-C is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl-C, together with the running stage
    try:
        work()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command to go on.", file=sys.stderr)
        return 130
    return 0


def quickstart(folder: Path, seed: int) -> None:
    """The whole pipeline, its report, and what to do next."""
    state = Quickstart(folder, seed)
    print(f"The whole pipeline on a CPU, seed {seed}, into {state.written} (commands run in {ROOT})")
    for group in PIPELINE:
        run_parallel([partial(state.run, stage) for stage in group], len(group))

    quiet()  # of what the report's libraries say on import
    from recipes.tiny_world.report import table, write_report

    total = sum(max(state.seconds[stage.name] for stage in group) for group in PIPELINE)
    report = write_report(state.folder, seed, state.seconds | {"total": total})
    samples = report["policies"]["ppo"]["n"]
    print(f"\nIn {total / 60:.1f} minutes. On {samples} samples for held-out prompts (gold: true quality):\n")
    print(table(report))
    print(f"\nPlots and samples: {state.folder / 'report.html'}    Numbers: {state.folder / 'report.json'}")
    print("\nThe labeler above is a program. To rank the same answers yourself:")
    print(f"python scripts/rank_responses.py serve --database labels.db --samples {state.written}/samples.jsonl")
    print(f"\nThe same on a real model, with a GPU, starts with:\n{REAL_MODEL}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return finish(partial(quickstart, args.output_dir, args.seed))


if __name__ == "__main__":
    sys.exit(main())
