"""Makes docs/results.md: the quickstart's claims over several seeds, and PPO at several `kl_coef`.

    python -m benchmarks.tiny_world --runs runs/results/seed0 runs/results/seed1 runs/results/seed2 \\
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
from statistics import fmean

import numpy as np
import yaml

from recipes.cli.errors import UserError
from recipes.cli.record import git_revision
from recipes.evaluation.frontier import ENOUGH
from recipes.evaluation.plots import plot_over_optimization, plot_reward_kl, save_png
from recipes.evaluation.report import render
from recipes.tiny_world import quickstart
from recipes.tiny_world.quickstart import CURVES, MODELS, RANK, ROOT, SAMPLE, Quickstart, Stage, recipe, run_parallel
from recipes.tiny_world.report import NAMES

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
    return Stage("evaluation", f"Evaluation, seed {seed}", EVALUATE, "evaluation")


def evaluated(seed: int) -> list[list[Stage]]:
    """What the evaluation reads beside the quickstart: stages that follow each other, in lists that do not."""
    samples, rankings = "heldout_samples", "heldout_rankings"  # SFT's answers, drawn once more, for the reward model
    sample = SAMPLE.replace("prompts_train", "prompts_heldout").replace("{seed}", str(seed + 1000))
    rank = RANK.replace("samples.jsonl", f"{samples}.jsonl").replace("{seed}", str(seed + 1000))
    jobs = [
        [
            Stage(samples, f"Held-out answers, seed {seed}", sample, f"{samples}.jsonl"),
            Stage(rankings, "Their ranking", rank, f"{rankings}.jsonl", continues=False),
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
    command = f"python -m benchmarks.tiny_world --runs {' '.join(run.written for run in runs)}"
    write_page([run.folder for run in runs], command, output)
    print(f"\n{output}: results of {len(runs)} seeds")


def write_page(folders: list[Path], command: str, output: Path) -> None:
    """Write the page to `output`, and its figures to `images` beside it."""
    reports = [read_report(folder) for folder in folders]
    images = output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    titled = {f"seed {report['seed']}": report for report in reports}
    save_png({"results_reward_kl": plot_reward_kl(titled)}, images)
    save_png({"results_over_optimization": plot_over_optimization(titled)}, images)
    page = render(
        Path(__file__).with_name("tiny_world.md.jinja"),
        filters={"over_seeds": over_seeds},
        reports=reports,
        sweep=sweep(reports),
        command=command,
        revision=git_revision(),
        commits=sorted({f"`{commit}`" for report in reports for commit in report["commits"]}),
        names=NAMES,
        enough=ENOUGH,
    )
    output.write_text(page, encoding="utf-8")


def read_report(folder: Path) -> dict:
    """The report of a run's evaluation, with its quickstart's own, and in `commits` what trained and evaluated it."""
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    quickstart = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    configs = folder.rglob("train_config.yaml")
    commits = {yaml.safe_load(path.read_text(encoding="utf-8"))["git_revision"] for path in configs}
    own = {"seed": quickstart["seed"], "quickstart": quickstart, "commits": {*commits, report["git_revision"]}}
    return report | own


def over_seeds(values, digits: int = 2) -> str:
    """The mean over the seeds, with the lowest and the highest seed."""
    values = list(values)
    return f"**{fmean(values):.{digits}f}** ({min(values):.{digits}f} to {max(values):.{digits}f})"


def sweep(reports: list[dict]) -> list[dict]:
    """Of PPO at each kl_coef, one a seed: the last checkpoint, and the one with the most gold.

    `effective_samples` carry the estimate of the best possible reward at the last KL, one a seed; `beyond` where that
    estimate does not reach the KL of a seed.
    """
    rows = []
    optimal = [sorted(report["frontier"]["optimal"], key=lambda best: best["kl"]) for report in reports]
    for run in dict.fromkeys(point["run"] for point in reports[0]["frontier"]["checkpoints"]):
        runs = [[point for point in report["frontier"]["checkpoints"] if point["run"] == run] for report in reports]
        last = [points[-1] for points in runs]
        effective = [
            np.interp(point["kl"], [best["kl"] for best in curve], [best["effective_samples"] for best in curve])
            for point, curve in zip(last, optimal, strict=True)
        ]
        rows.append(
            {
                "kl_coef": run.removeprefix("kl_"),
                "last": last,
                "most": [max(points, key=lambda point: point["gold"]) for points in runs],
                "effective_samples": effective,
                "beyond": any(point["kl"] > curve[-1]["kl"] for point, curve in zip(last, optimal, strict=True)),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of quickstarts, one a seed")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    args = parser.parse_args(argv)
    return quickstart.finish(partial(make, args.runs, args.output))


if __name__ == "__main__":
    sys.exit(main())
