"""Turns what a quickstart measured into report.json, report.html and a table for the terminal."""

import json
from pathlib import Path
from statistics import fmean

from recipes.cli.errors import counted
from recipes.cli.screen import aligned
from recipes.evaluation.plots import Figure, plt, to_svg
from recipes.evaluation.report import render

NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_no_kl": "PPO without KL"}
COLORS = {"base": "#8c8c8c", "sft": "#56b4e9", "ppo": "#0072b2", "ppo_no_kl": "#d55e00"}
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


def plot_gold(report: dict) -> Figure:
    policies, control = report["policies"], report["sft_low_temperature"]
    figure, axes = plt.subplots(figsize=(8, 3.2))
    for place, (name, values) in enumerate(policies.items()):
        bars = axes.bar([place - 0.2, place + 0.2], [values["gold"], values["gold_greedy"]], 0.38, color=COLORS[name])
        bars[1].set_alpha(0.5)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    bar = axes.bar([len(policies)], [control["gold"]], 0.38, color=COLORS["sft"], hatch="//", edgecolor="white")
    axes.bar_label(bar, fmt="%.2f", fontsize=8)
    labels = [NAMES[name] for name in policies] + [f"SFT, T = {control['temperature']}"]
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylim=(0, 1), ylabel="gold (solid T = 1, pale greedy)")
    return figure


def plot_training(folder: Path) -> Figure:
    """Proxy reward, KL and gold over each PPO run, and gold against the proxy; a square is the end of a run."""
    step, proxy, kl, gold = LABELS
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for name, line in LINES.items():
        curves = read_curves(folder / name)
        for axes, (x, y) in zip(panels.flat, ((step, proxy), (step, kl), (step, gold), (proxy, gold)), strict=True):
            axes.plot(curves[x], curves[y], line, color=COLORS[name], marker="s", markevery=[-1], label=NAMES[name])
            axes.set(xlabel=LABELS[x], ylabel=LABELS[y])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def read_curves(run: Path) -> dict[str, list[float]]:
    """The metrics of `LABELS` over a PPO run's rollouts as moving averages, from its trainer state."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    rows = [row for row in state["log_history"] if "objective/kl" in row]
    windows = [rows[max(0, end - SMOOTHING) : end] for end in range(1, len(rows) + 1)]
    curves = {name: [fmean(row[name] for row in window) for window in windows] for name in LABELS}
    return curves | {"step": [row["step"] for row in rows]}


def table(report: dict) -> str:
    """The result in a few lines of text."""
    columns = ("gold", "gold_greedy", "proxy_reward", "kl", "length")
    control, model = report["sft_low_temperature"], report["reward_model"]
    policies = {NAMES[name]: values for name, values in report["policies"].items()}
    policies[f"SFT, T = {control['temperature']}"] = control
    rows = [
        [name, *(f"{values[column]:.2f}" if column in values else "" for column in columns)]
        for name, values in policies.items()
    ]
    pairs = counted(model["n_pairs"], "held-out pair")
    return (
        f"{aligned([['', *columns], *rows])}\n"
        f"Reward model: {model['accuracy']:.2f} of {pairs} as the labeler ordered them, "
        f"{model['accuracy_on_gold_order']:.2f} as gold does; the longer response would be right in "
        f"{model['longer_wins_baseline']:.2f}."
    )
