"""Turns what a quickstart measured into report.json, report.html and a table for the terminal."""

import json
from pathlib import Path

from markupsafe import Markup

from recipes.evaluation.plots import plt, to_svg
from recipes.evaluation.report import page_template

NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_no_kl": "PPO without KL"}
COLORS = {"base": "#8c8c8c", "sft": "#4878a8", "ppo": "#2e8b57", "ppo_no_kl": "#c44e52"}
RUNS = ("ppo", "ppo_no_kl")
SMOOTHING = 5  # rollouts in the moving average of the curves


def write_report(folder: Path, seed: int, seconds: dict[str, float]) -> dict:
    """Write report.json and report.html into the folder of a finished quickstart and return the report.

    `seconds` of each stage, and their `total`: less than their sum, since some run at the same time.
    """
    measured = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    seconds = {stage: round(value, 1) for stage, value in seconds.items()}
    report = {"seed": seed, "seconds": seconds, **measured}
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    history = {name: read_history(folder / name) for name in RUNS}
    plots = {
        "gold": plot_gold(report),
        "reward_model": plot_reward_model(report["reward_model"]),
        "training": plot_training(history),
        "hacking": plot_hacking(history),
    }
    page = page_template(Path(__file__).with_name("report.html.jinja")).render(report=report, plots=plots, names=NAMES)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return report


def read_history(run: Path) -> list[dict]:
    """One row per rollout of a PPO run, from its trainer state."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    return [row for row in state["log_history"] if "objective/kl" in row]


def curve(history: list[dict], name: str) -> list[float]:
    """A metric over training, as a moving average."""
    values = [row[name] for row in history]
    windows = [values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def plot_gold(report: dict) -> Markup:
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
    return to_svg(figure)


def plot_reward_model(values: dict) -> Markup:
    figure, axes = plt.subplots(figsize=(5, 1.8))
    bars = {
        "longer wins (baseline)": values["longer_wins_baseline"],
        "reward model, gold order": values["accuracy_on_gold_order"],
        "reward model, labels": values["accuracy"],
    }
    drawn = axes.barh(list(bars), list(bars.values()), color=[COLORS["base"], COLORS["sft"], COLORS["sft"]])
    axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1), xlabel="share of held-out pairs ordered right (dotted: a coin)")
    return to_svg(figure)


def plot_training(history: dict[str, list[dict]]) -> Markup:
    panels = {
        "objective/scores": "proxy reward",
        "objective/kl": "KL from SFT (nats per response)",
        "rewards/gold/mean": "gold",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3), layout="constrained")
    for panel, (metric, label) in zip(axes, panels.items(), strict=True):
        for name in RUNS:
            panel.plot([row["step"] for row in history[name]], curve(history[name], metric), color=COLORS[name])
        panel.set(xlabel="optimizer steps", ylabel=label)
    figure.legend([NAMES[name] for name in RUNS], loc="outside upper center", ncols=2, frameon=False)
    return to_svg(figure)


def plot_hacking(history: dict[str, list[dict]]) -> Markup:
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for name in RUNS:
        proxy, gold = curve(history[name], "objective/scores"), curve(history[name], "rewards/gold/mean")
        axes.plot(proxy, gold, color=COLORS[name], label=NAMES[name], marker=".", markersize=3, linewidth=1)
        axes.plot(proxy[-1], gold[-1], color=COLORS[name], marker="s")
    axes.set(xlabel="proxy reward (what PPO sees)", ylabel="gold (what we want)")
    axes.legend(frameon=False)
    return to_svg(figure)


def table(report: dict) -> str:
    """The result in a few lines of text."""
    columns = ("gold", "gold_greedy", "proxy_reward", "kl", "length")
    lines = [f"{'':16}" + "".join(f"{name:>14}" for name in columns)]
    for name, values in report["policies"].items():
        lines.append(f"{NAMES[name]:16}" + "".join(f"{values[column]:14.2f}" for column in columns))
    control, model = report["sft_low_temperature"], report["reward_model"]
    lines.append(f"{'SFT, T = ' + str(control['temperature']):16}{control['gold']:14.2f}{control['kl']:42.2f}")
    lines.append(
        f"Reward model: {model['accuracy']:.2f} of {model['n_pairs']} held-out pairs as the labeler ordered them, "
        f"{model['accuracy_on_gold_order']:.2f} as gold does; the longer response would be right in "
        f"{model['longer_wins_baseline']:.2f}."
    )
    return "\n".join(lines)
