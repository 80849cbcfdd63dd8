"""Makes docs/results.md: the quickstart's claims over several seeds, and PPO at several `kl_coef`.

    python -m recipes.tiny_world.results --runs runs/results/seed0 runs/results/seed1 runs/results/seed2 \\
        --output docs/results.md

Each folder is a quickstart; one that is missing is made, the first with seed 0, the second with seed 1 and so on. To
each come PPO runs at several kl_coef, whose checkpoints are kept, and `scripts/evaluate.py` on all of it. Run the same
line again to go on where it stopped.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from recipes.cli.errors import UserError
from recipes.tiny_world import quickstart
from recipes.tiny_world.quickstart import CURVES, MODELS, RANK, ROOT, SAMPLE, Quickstart, Stage, recipe, run_parallel

SWEEP_STEPS = {"0.03": 90, "0.1": 240, "0.3": 240}  # updates at each kl_coef; at the last two, on to where it settles
CHECKPOINTS = 10  # kept of each run
RUNS = {"0": "ppo_no_kl", **{kl_coef: f"sweep/kl_{kl_coef}" for kl_coef in SWEEP_STEPS}}
WORKERS = 2  # commands at a time, one core each
EVALUATE = (
    "python scripts/evaluate.py --policies base=recipes/tiny_world/base sft={folder}/sft ppo={folder}/ppo "
    "ppo_no_kl={folder}/ppo_no_kl --reward_model_name_or_path {folder}/reward "
    "--judges recipes.tiny_world.judge.gold --dataset_name recipes/tiny_world/data/prompts_heldout.jsonl "
    "--preference_datasets {folder}/heldout_rankings.jsonl --seed {seed} --max_completion_length 40 "
    "--generation_batch_size 512 --best_of_n 64 --checkpoints "
    + " ".join(f"kl_{kl_coef}={{folder}}/{run}" for kl_coef, run in RUNS.items())
    + " --output_dir {folder}/{output}"
)


def evaluation(seed: int) -> Stage:
    return Stage("evaluation", f"Evaluation, seed {seed}", EVALUATE, "evaluation", continues=True)


def evaluated(seed: int) -> list[list[Stage]]:
    """What the evaluation reads beside the quickstart: stages that follow each other, in lists that do not."""
    samples, rankings = "heldout_samples", "heldout_rankings"  # SFT's answers, drawn once more, for the reward model
    sample = SAMPLE.replace("prompts_train", "prompts_heldout").replace("{seed}", str(seed + 1000))
    rank = RANK.replace("samples.jsonl", f"{samples}.jsonl").replace("{seed}", str(seed + 1000))
    jobs = [
        [
            Stage(samples, f"Held-out answers, seed {seed}", sample, f"{samples}.jsonl", continues=True),
            Stage(rankings, "Their ranking", rank, f"{rankings}.jsonl"),
        ]
    ]
    for kl_coef, steps in SWEEP_STEPS.items():
        arguments = f"{MODELS} --kl_coef {kl_coef} --max_steps {steps} --save_steps {steps // CHECKPOINTS}"
        title, command = f"PPO at kl_coef {kl_coef}, seed {seed}", recipe("ppo", arguments)
        jobs.append([Stage(f"sweep_kl_{kl_coef}", title, command, RUNS[kl_coef], CURVES)])
    return jobs


def run_all(runs: list[Quickstart]) -> None:
    """Everything that the evaluations read, then the evaluations; on a few workers, which take the jobs in order."""

    def work(run: Quickstart, stages: list[Stage]) -> None:
        for stage in stages:
            run.run(stage)

    run_parallel([partial(work, run, stages) for run in runs for stages in evaluated(run.seed)], WORKERS)
    run_parallel([partial(work, run, [evaluation(run.seed)]) for run in runs], WORKERS)


def make(folders: list[Path], output: Path) -> None:
    runs = []
    for number, folder in enumerate(folders):
        state = folder / "quickstart.json"
        seed = json.loads(state.read_text(encoding="utf-8"))["seed"] if state.exists() else number
        if not (folder / "report.json").exists():
            quickstart.quickstart(folder, seed)
        runs.append(Quickstart(folder, seed))
    if len({run.seed for run in runs}) < len(runs):
        raise UserError(f"--runs: two folders have the same seed ({', '.join(str(run.seed) for run in runs)}).")
    run_all(runs)
    from recipes.tiny_world.results_page import write_page

    command = f"python -m recipes.tiny_world.results --runs {' '.join(run.written for run in runs)}"
    write_page([run.folder for run in runs], command, output)
    print(f"\n{output}: results of {len(runs)} seeds")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of quickstarts, one a seed")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    args = parser.parse_args(argv)
    return quickstart.finish(partial(make, args.runs, args.output))


if __name__ == "__main__":
    sys.exit(main())
