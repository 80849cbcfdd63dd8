"""Turns what a quickstart measured into report.json, report.html and a table for the terminal."""

import json
from pathlib import Path

import pandas as pd

from recipes.cli.errors import counted
from recipes.evaluation.plots import COLORS, Figure, plt, to_svg
from recipes.evaluation.report import render

NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_no_kl": "PPO without KL"}
LINES = {"ppo": "-", "ppo_no_kl": "--"}
SMOOTHING = 5  # rollouts in the moving average of the curves
LABELS = {
    "step": "optimizer steps",
    "objective/scores": "proxy reward (what PPO sees)",
    "objective/kl": "KL from SFT (nats per response)",
    "rewards/gold/mean": "gold (what we want)",
}


def write_report(folder: Path, seed: int, seconds: dict[str, float]) -> dict:
    """Write report.json and report.html into the folder of a finished quickstart and return the report.

    `seconds` of each stage, and their `total`: less than their sum, since some run at the same time.
    """
    measured = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    seconds = {stage: round(value, 1) for stage, value in seconds.items()}
    report = {"seed": seed, "seconds": seconds, **measured}
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plots = to_svg({"gold": plot_gold(report), "training": plot_training(folder)})
    page = render(Path(__file__).with_name("report.html.jinja"), report=report, plots=plots, names=NAMES)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return report


def by_policy(report: dict) -> pd.DataFrame:
    """The figures of each policy, and those of SFT at a low temperature, in rows."""
    control = report["sft_low_temperature"]
    rows = {NAMES[name]: values for name, values in report["policies"].items()}
    return pd.DataFrame.from_dict(rows | {f"SFT, T = {control['temperature']}": control}, orient="index")


def plot_gold(report: dict) -> Figure:
    table = by_policy(report)[["gold", "gold_greedy"]].set_axis(["sampled", "greedy"], axis="columns")
    axes = table.plot.bar(figsize=(8, 3.2), width=0.78, rot=0, color=[COLORS[0], COLORS[4]])
    for bars in axes.containers:
        axes.bar_label(bars, fmt=lambda gold: f"{gold:.2f}" if gold else "", fontsize=8)  # pandas draws none as 0
    axes.set(ylim=(0, 1), ylabel="gold")
    return axes.figure


def plot_training(folder: Path) -> Figure:
    """Proxy reward, KL and gold over each PPO run, and gold against the proxy; a square is the end of a run."""
    step, proxy, kl, gold = LABELS
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for (name, line), color in zip(LINES.items(), COLORS, strict=False):
        curves = read_curves(folder / name)
        for axes, (x, y) in zip(panels.flat, ((step, proxy), (step, kl), (step, gold), (proxy, gold)), strict=True):
            axes.plot(curves[x], curves[y], line, color=color, marker="s", markevery=[-1], label=NAMES[name])
            axes.set(xlabel=LABELS[x], ylabel=LABELS[y])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def read_curves(run: Path) -> pd.DataFrame:
    """The metrics of `LABELS` over a PPO run's rollouts as moving averages, from its trainer state."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    rows = pd.DataFrame(state["log_history"]).dropna(subset="objective/kl")
    return rows[list(LABELS)].rolling(SMOOTHING, min_periods=1).mean().assign(step=rows["step"])


def table(report: dict) -> str:
    """The result in a few lines of text."""
    columns, model = ["gold", "gold_greedy", "proxy_reward", "kl", "length"], report["reward_model"]
    pairs = counted(model["n_pairs"], "held-out pair")
    return (
        f"{by_policy(report)[columns].to_string(float_format='{:.2f}'.format, na_rep='')}\n"
        f"Reward model: {model['accuracy']:.2f} of {pairs} as the labeler ordered them, "
        f"{model['accuracy_on_gold_order']:.2f} as gold does; the longer response would be right in "
        f"{model['longer_wins_baseline']:.2f}."
    )
