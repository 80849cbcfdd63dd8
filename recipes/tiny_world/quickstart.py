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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock

from recipes.cli.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = "recipes/configs/tiny_world"
LAUNCH = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml"]
NO_KL_STEPS = 90  # longer than PPO with KL, so that the gold curve has time to turn
PROGRESS = re.compile(r"(\d+)/(\d+) \[")
REAL_MODEL = (
    "accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/sft.py "
    "--model_name_or_path Qwen/Qwen3-0.6B-Base --use_peft true --learning_rate 2e-4 "
    "--dataset_name HuggingFaceH4/no_robots --output_dir runs/qwen3/sft"
)


@dataclass(frozen=True)
class Stage:
    """One command, what it leaves in the output folder, and the metrics worth a line (with their share of text)."""

    name: str
    title: str
    command: list[str]
    output: str
    metrics: dict[str, str]


def stages(folder: str, seed: int) -> list[list[Stage]]:
    """The pipeline, each entry the stages that run at the same time; `folder` as it is written in the commands."""

    def recipe(name: str, output: str, *arguments: str) -> list[str]:
        line = [*LAUNCH, f"recipes/{name}.py", "--config", f"{CONFIGS}/{name}.yaml", *arguments]
        return [*line, "--output_dir", f"{folder}/{output}", "--seed", str(seed)]

    def ppo(output: str, *arguments: str) -> list[str]:
        models = ["--model_name_or_path", f"{folder}/sft", "--reward_model_name_or_path", f"{folder}/reward"]
        gold = ["--reward_funcs", "recipes.tiny_world.judge.gold", "--reward_weights", "1", "0"]
        return recipe("ppo", output, *models, *gold, *arguments)

    sample = ["python", "scripts/sample_responses.py", "--model_name_or_path", f"{folder}/sft"]
    sample += ["--dataset_name", "recipes/tiny_world/data/prompts_train.jsonl", "--num_generations", "4"]
    sample += ["--temperature", "1.0", "--top_k", "0", "--top_p", "1.0", "--max_completion_length", "40"]
    sample += ["--generation_batch_size", "256", "--seed", str(seed), "--output", f"{folder}/samples.jsonl"]
    rank = ["python", "-m", "recipes.tiny_world.labeler", "--samples", f"{folder}/samples.jsonl"]
    rank += ["--output", f"{folder}/rankings.jsonl", "--seed", str(seed)]
    reward = ["--model_name_or_path", f"{folder}/sft", "--dataset_name", f"{folder}/rankings.jsonl"]
    evaluate = ["python", "-m", "recipes.tiny_world.evaluate", "--output_dir", folder, "--seed", str(seed)]
    curves = {"objective/scores": "reward", "objective/kl": "KL", "rewards/gold/mean": "gold"}
    accuracy = {"eval_accuracy": "accuracy", "eval_longer_wins": "longer wins"}
    no_kl = ppo("ppo_no_kl", "--kl_coef", "0", "--max_steps", str(NO_KL_STEPS))
    return [
        [Stage("sft", "Step 1: learn from demonstrations", recipe("sft", "sft"), "sft", {"loss": "loss"})],
        [Stage("sample", "Step 2a: sample 4 responses a prompt", sample, "samples.jsonl", {})],
        [Stage("rank", "Step 2b: rank them (a SIMULATED labeler, a program)", rank, "rankings.jsonl", {})],
        [Stage("reward", "Step 2c: learn a reward model", recipe("reward", "reward", *reward), "reward", accuracy)],
        [
            Stage("ppo", "Step 3: PPO with a KL penalty", ppo("ppo"), "ppo", curves),
            Stage("ppo_no_kl", "Control: PPO with nothing that holds it near SFT", no_kl, "ppo_no_kl", curves),
        ],
        [Stage("evaluate", "Evaluation on held-out prompts", evaluate, "evaluation.json", {})],
    ]


class Progress:
    """The state of a running stage in one line: rewritten on a terminal where it runs alone, else now and then."""

    def __init__(self, name: str, alone: bool):
        self.name, self.start = name, time.monotonic()
        self.shown = self.start
        self.live = alone and sys.stdout.isatty()
        self.interval = 0.2 if self.live else 30.0

    def update(self, text: str) -> None:
        now = time.monotonic()
        if now - self.shown >= self.interval:
            self.shown = now
            line = f"  {now - self.start:4.0f} s  {self.name}: {text}"
            print(f"\r{line:<78}" if self.live else line, end="" if self.live else "\n", flush=True)

    def finish(self, text: str) -> float:
        seconds = time.monotonic() - self.start
        print(f"{chr(13) if self.live else ''}{f'  {self.name}: done in {seconds:.0f} s  {text}':<78}", flush=True)
        return seconds


class Quickstart:
    """The stages in one output folder, and in `quickstart.json` their commands and which are finished."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.state_file = folder / "quickstart.json"
        self.seconds: dict[str, float] = {}
        self.commands: dict[str, list[str]] = {}
        self.lock = Lock()
        self.running: list[subprocess.Popen] = []
        if self.state_file.exists():
            state = json.loads(self.state_file.read_text(encoding="utf-8"))
            if state["seed"] != seed:
                raise UserError(
                    f"{folder} holds a quickstart with seed {state['seed']}: choose another --output_dir for seed "
                    f"{seed}, or --seed {state['seed']} to go on with this one."
                )
            self.seconds, self.commands = state["seconds"], state.get("commands", {})
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no quickstart: choose another --output_dir.")
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        partial = self.state_file.with_suffix(".partial")
        state = {"seed": self.seed, "seconds": self.seconds, "commands": self.commands}
        with self.lock:
            partial.write_text(json.dumps(state, indent=2), encoding="utf-8")
            partial.replace(self.state_file)

    def run_together(self, group: list[Stage]) -> None:
        pool = ThreadPoolExecutor(len(group))
        try:
            for done in [pool.submit(self.run, stage, len(group) == 1) for stage in group]:
                done.result()
        finally:  # Ctrl-C reaches this thread alone, and the pool waits for its commands
            for process in self.running:
                if process.poll() is None:  # the launcher together with what it launched
                    os.killpg(process.pid, signal.SIGTERM)
            pool.shutdown()

    def run(self, stage: Stage, alone: bool) -> None:
        if self.commands.setdefault(stage.name, stage.command) != stage.command:
            raise UserError(
                f"{self.folder}: the stage {stage.name} was made by another command "
                f"({shlex.join(self.commands[stage.name])}): choose another --output_dir."
            )
        if stage.name in self.seconds and (self.folder / stage.output).exists():
            seconds = self.seconds[stage.name]
            print(f"\n{stage.title}\n  finished before, in {seconds:.0f} s: {self.folder / stage.output}", flush=True)
            return
        self.save()
        command = stage.command + self.continuation(stage)
        print(f"\n{stage.title}\n$ {shlex.join(command)}", flush=True)
        log, progress = self.folder / "logs" / f"{stage.name}.log", Progress(stage.name, alone)
        if execute(command, log, progress, self.running) != 0:
            tail = "\n".join(re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())[-15:])
            raise UserError(f"{stage.title} failed; the end of {log}:\n{tail}")
        self.seconds[stage.name] = progress.finish(headline(self.folder / stage.output, stage.metrics))
        self.save()

    def continuation(self, stage: Stage) -> list[str]:
        """Flags to go on with what a stopped run left; what cannot be continued is put aside, never deleted."""
        output = self.folder / stage.output
        if stage.name == "sample" or not output.exists():
            return []
        if output.is_dir() and any(output.glob("checkpoint-*/trainer_state.json")):
            return ["--resume_from_checkpoint", "true"]
        aside = next(
            path for n in range(1, 1000) if not (path := output.with_name(f"{output.name}.stopped{n}")).exists()
        )
        output.rename(aside)
        print(f"\nPut aside what a stopped run left: {aside}", flush=True)
        return []


def execute(command: list[str], log: Path, progress: Progress, running: list[subprocess.Popen]) -> int:
    """Run a command with its output in `log` and its progress on the terminal; return its exit code.

    The process is added to `running`, so that another thread can end it.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # So small a model gains nothing from a second thread, and loses much where another program wants the core.
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    running.append(process)
    text = "starting"
    with log.open("wb") as file:
        while chunk := os.read(process.stdout.fileno(), 65536):
            file.write(chunk)
            file.flush()
            if steps := PROGRESS.findall(chunk.decode(errors="replace")):
                text = f"{steps[-1][0]} of {steps[-1][1]}"
            progress.update(text)
    return process.wait()


def headline(output: Path, metrics: dict[str, str]) -> str:
    """First and last values of a run's metrics, averaged over three logged rows."""
    if not metrics:
        return ""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    parts = []
    for name, label in metrics.items():
        values = [row[name] for row in state["log_history"] if name in row]
        if len(values) > 1:
            parts.append(f"{label} {fmean(values[:3]):.2f} -> {fmean(values[-3:]):.2f}")
        elif values:
            parts.append(f"{label} {values[0]:.2f}")
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl-C, together with the running stage
    folder = args.output_dir.resolve()
    written = os.path.relpath(folder, ROOT) if folder.is_relative_to(ROOT) else str(folder)
    try:
        quickstart = Quickstart(folder, args.seed)
        print(f"The whole pipeline on a CPU, seed {args.seed}, into {written} (commands run in {ROOT})")
        plan = stages(written, args.seed)
        for group in plan:
            quickstart.run_together(group)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command to go on.", file=sys.stderr)
        return 130

    from recipes.tiny_world.report import table, write_report

    total = sum(max(quickstart.seconds[stage.name] for stage in group) for group in plan)
    report = write_report(folder, args.seed, quickstart.seconds | {"total": total})
    samples = report["policies"]["ppo"]["n"]
    print(f"\nIn {total / 60:.1f} minutes. On {samples} samples for held-out prompts (gold: true quality):\n")
    print(table(report))
    print(f"\nPlots and samples: {folder / 'report.html'}    Numbers: {folder / 'report.json'}")
    print("\nThe labeler above is a program. To rank the same answers yourself:")
    print(f"python scripts/rank_responses.py serve --database labels.db --samples {written}/samples.jsonl")
    print(f"\nThe same on a real model, with a GPU, starts with:\n{REAL_MODEL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
