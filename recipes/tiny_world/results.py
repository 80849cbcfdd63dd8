"""Makes docs/results.md: the quickstart's claims over several seeds, and PPO at several prices of a nat.

    python -m recipes.tiny_world.results --runs runs/results/seed0 runs/results/seed1 runs/results/seed2 \\
        --output docs/results.md

Each folder is a quickstart; one that is missing is made, the first with seed 0, the second with seed 1 and so on. To
each come PPO runs at several kl_coef, whose checkpoints are kept, and `scripts/evaluate.py` on all of it. Run the same
line again to go on where it stopped.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from recipes.cli.errors import UserError
from recipes.tiny_world import quickstart
from recipes.tiny_world.quickstart import CONFIGS, LAUNCH, ROOT, Quickstart, Stage

SWEEP_STEPS = {0.03: 90, 0.1: 240, 0.3: 240}  # updates at each kl_coef; at the last two, on to where it settles
CHECKPOINTS = 10  # kept of each run
RUNS = {0.0: "ppo_no_kl", **{kl_coef: f"sweep/kl_{kl_coef:g}" for kl_coef in SWEEP_STEPS}}
EVALUATION = ["--max_completion_length", "40", "--generation_batch_size", "512", "--best_of_n", "64"]
WORKERS = 2  # commands at a time, one core each
POLICIES = ("base", "sft", "ppo", "ppo_no_kl")


def sweep(folder: str, seed: int) -> list[Stage]:
    """PPO at further values of kl_coef."""
    found = []
    for kl_coef, steps in SWEEP_STEPS.items():
        name = f"kl_{kl_coef:g}"
        command = [*LAUNCH, "recipes/ppo.py", "--config", f"{CONFIGS}/ppo.yaml"]
        command += ["--model_name_or_path", f"{folder}/sft", "--reward_model_name_or_path", f"{folder}/reward"]
        command += ["--kl_coef", f"{kl_coef:g}", "--max_steps", str(steps), "--save_steps", str(steps // CHECKPOINTS)]
        command += ["--output_dir", f"{folder}/{RUNS[kl_coef]}", "--seed", str(seed)]
        curves = {"objective/scores": "reward", "objective/kl": "KL"}
        found.append(
            Stage(f"sweep_{name}", f"PPO at kl_coef {kl_coef:g}, seed {seed}", command, RUNS[kl_coef], curves)
        )
    return found


def heldout_rankings(folder: str, seed: int) -> list[Stage]:
    """Held-out pairs for the reward model: SFT's answers as the simulated labeler ranks them."""
    prompts = "recipes/tiny_world/data/prompts_heldout.jsonl"
    samples, rankings = f"{folder}/heldout_samples.jsonl", f"{folder}/heldout_rankings.jsonl"
    sample = ["python", "scripts/sample_responses.py", "--model_name_or_path", f"{folder}/sft"]
    sample += ["--dataset_name", prompts, "--num_generations", "4", "--top_k", "0", "--top_p", "1.0"]
    sample += ["--max_completion_length", "40", "--generation_batch_size", "256", "--seed", str(seed + 1000)]
    rank = ["python", "-m", "recipes.tiny_world.labeler", "--samples", samples, "--output", rankings]
    return [
        Stage(
            "heldout_samples", f"Held-out answers, seed {seed}", [*sample, "--output", samples], Path(samples).name, {}
        ),
        Stage("heldout_rankings", "Their ranking", [*rank, "--seed", str(seed + 1000)], Path(rankings).name, {}),
    ]


def evaluation(folder: str, seed: int) -> Stage:
    paths = {"base": "recipes/tiny_world/base"} | {name: f"{folder}/{name}" for name in POLICIES[1:]}
    command = ["python", "scripts/evaluate.py", "--policies", *(f"{name}={path}" for name, path in paths.items())]
    command += ["--reward_model_name_or_path", f"{folder}/reward", "--judges", "recipes.tiny_world.judge.gold"]
    command += ["--dataset_name", "recipes/tiny_world/data/prompts_heldout.jsonl"]
    command += ["--preference_datasets", f"{folder}/heldout_rankings.jsonl", "--seed", str(seed), *EVALUATION]
    command += ["--checkpoints", *(f"kl_{kl_coef:g}={folder}/{run}" for kl_coef, run in RUNS.items())]
    command += ["--output_dir", f"{folder}/evaluation"]
    return Stage("evaluation", f"Evaluation, seed {seed}", command, "evaluation", {})


class Evaluations(Quickstart):
    """A quickstart whose evaluation goes on with the parts that it finds."""

    def continuation(self, stage: Stage) -> list[str]:
        return [] if stage.name in ("evaluation", "heldout_samples") else super().continuation(stage)


def run_all(runs: list[Evaluations]) -> None:
    """The stages of all runs on a few workers, which take them in order.

    A run is evaluated after the next run's PPO was begun: a worker that waits for PPO to finish would stand idle.
    """
    futures: list[Future] = []

    def work(run: Evaluations, stages: list[Stage], needed: list[Future]) -> None:
        for future in needed:
            future.result()
        for stage in stages:
            run.run(stage, alone=False)

    with ThreadPoolExecutor(WORKERS) as pool:

        def submit(run: Evaluations, stages: list[Stage], needed: list[Future]) -> Future:
            futures.append(pool.submit(work, run, stages, needed))
            return futures[-1]

        try:
            ready: list[Callable[[], Future]] = []
            for run in runs:
                folder = written(run.folder)
                jobs = [heldout_rankings(folder, run.seed), *([stage] for stage in sweep(folder, run.seed))]
                needed = [submit(run, stages, []) for stages in jobs]
                ready.append(partial(submit, run, [evaluation(folder, run.seed)], needed))
                if len(ready) > 1:
                    ready.pop(0)()
            ready.pop()()
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for process in (process for run in runs for process in run.running if process.poll() is None):
                os.killpg(process.pid, signal.SIGTERM)
            raise


def written(folder: Path) -> str:
    return os.path.relpath(folder, ROOT) if folder.is_relative_to(ROOT) else str(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of quickstarts, one a seed")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        runs = []
        for seed, folder in enumerate(folder.resolve() for folder in args.runs):
            state = folder / "quickstart.json"
            seed = json.loads(state.read_text(encoding="utf-8"))["seed"] if state.exists() else seed
            if not (folder / "report.json").exists():
                if quickstart.main(["--output_dir", str(folder), "--seed", str(seed)]):
                    return 1
            runs.append(Evaluations(folder, seed))
        if len({run.seed for run in runs}) < len(runs):
            raise UserError(f"--runs: two folders have the same seed ({', '.join(str(run.seed) for run in runs)}).")
        run_all(runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command to go on.", file=sys.stderr)
        return 130
    from recipes.tiny_world.results_page import write_page

    folders = [written(run.folder) for run in runs]
    write_page(
        [run.folder for run in runs], f"python -m recipes.tiny_world.results --runs {' '.join(folders)}", args.output
    )
    print(f"\n{args.output}: results of {len(runs)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
