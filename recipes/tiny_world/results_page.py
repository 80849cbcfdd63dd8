"""Writes docs/results.md from evaluations of several seeds: tables, two figures, and the commit they come from."""

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import yaml

from recipes.cli.record import git_revision
from recipes.evaluation.frontier import ENOUGH
from recipes.evaluation.plots import plot_over_optimization, plot_reward_kl, save_png
from recipes.evaluation.report import render
from recipes.tiny_world.report import NAMES


def write_page(folders: list[Path], command: str, output: Path) -> None:
    """Write the page to `output`, and its figures to `images` beside it."""
    reports = [read_report(folder) for folder in folders]
    images = output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    titled = {f"seed {report['seed']}": report for report in reports}
    save_png({"results_reward_kl": plot_reward_kl(titled)}, images)
    save_png({"results_over_optimization": plot_over_optimization(titled)}, images)
    page = render(
        Path(__file__).with_name("results.md.jinja"),
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
    configs = [path for path in folder.rglob("train_config.yaml") if ".stopped" not in str(path)]
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
