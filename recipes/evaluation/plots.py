"""Figures of the report, and how a figure becomes an SVG element or a PNG file."""

import io
import re
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)
from matplotlib.figure import Figure  # noqa: E402

from recipes.evaluation.frontier import ENOUGH, over_optimization_curve  # noqa: E402

# Okabe and Ito's colours, which people who do not tell red from green can tell apart; none needs a white background.
BLUE, ORANGE = "#0072b2", "#e69f00"
COLORS = (BLUE, "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d00", "#7a5ab5")
GREY = "#8c8c8c"


def save_png(figures: dict[str, Figure], folder: Path) -> None:
    """Write `NAME.png` for each figure."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")


def to_svg(figures: dict[str, Figure]) -> dict[str, Markup]:
    """The figures as SVG elements, closed; the text in them is escaped by matplotlib."""
    elements = {}
    for name, figure in figures.items():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True)
        plt.close(figure)
        text = buffer.getvalue().replace("#000000", "currentColor")  # black is the page's text, also in dark mode
        elements[name] = Markup(re.sub(r"^.*?(?=<svg)", "", text, flags=re.DOTALL))
    return elements


def plain(text: str) -> str:
    """`text` without what matplotlib reads as a formula."""
    return text.replace("$", r"\$")


def colors(report: dict) -> dict[str, str]:
    """One colour for each policy; the reference is black."""
    others = [name for name in report["policies"] if name != report["reference"]]
    return {report["reference"]: "black"} | {name: COLORS[place % len(COLORS)] for place, name in enumerate(others)}


def checkpoints_by_run(report: dict) -> list[tuple[str, tuple, list[dict]]]:
    """Each training run, a shade for it (to be seen on both kinds of page) and its checkpoints that have a KL."""
    rows = [row for row in report["frontier"]["checkpoints"] if row["kl"] is not None]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    shades = plt.cm.viridis(0.3 + 0.55 * np.arange(len(runs)) / max(1, len(runs) - 1))
    return [(run, shade, [row for row in rows if row["run"] == run]) for run, shade in zip(runs, shades, strict=True)]


def figures(report: dict) -> dict[str, Figure]:
    """All figures that the report has data for, by name."""
    drawn = {"reward_kl": plot_reward_kl({"": report})}
    if report["win_rates"]:
        drawn["win_rates"] = plot_win_rates(report["win_rates"])
    if report["over_optimization"]:
        drawn["over_optimization"] = plot_over_optimization({"": report})
    if report.get("reward_model"):
        drawn["reward_model"] = plot_reward_model(report["reward_model"])
    return drawn


def columns(rows: list[dict], *names: str) -> list[np.ndarray]:
    """The values of each name, over the rows; NaN for `None`."""
    return [np.array([row[name] for row in rows], dtype=np.float64) for name in names]


def error_bars(values: list[dict]) -> np.ndarray:
    """Distances (2, n) from each mean of `{"mean", "ci95"}` to the ends of its interval, as matplotlib takes them; 0
    where there is no interval."""
    rows = [(row["mean"], *(row["ci95"] or [row["mean"]] * 2)) for row in values]
    mean, low, high = np.array(rows).T
    return np.maximum(0, np.stack([mean - low, high - mean]))


def square_root_axis(axes, label: str) -> None:
    """KL is roughly quadratic in how far a policy went: on its square root, early and late steps can be seen."""
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(left=0)
    far, ticks = axes.get_xlim()[1], [0.0]
    for tick in (2.0**power for power in range(-6, 12)):
        if tick < far and tick**0.5 - ticks[-1] ** 0.5 > 0.07 * far**0.5:  # room for its label
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(label)


def plot_reward_kl(reports: dict[str, dict]) -> Figure:
    """Reward against KL, a panel for each report by its title.

    The frontier, best-of-n, the sharpened reference, PPO along training, the policies.
    """
    size = (max(8, 5 * len(reports)), 5)
    figure, panels = plt.subplots(1, len(reports), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, (title, report) in zip(panels[0], reports.items(), strict=True):
        draw_reward_kl(axes, report)
        axes.set_title(plain(title))
    shared_legend(figure, panels)
    return figure


def shared_legend(figure: Figure, panels: np.ndarray) -> None:
    legend = panels[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def draw_reward_kl(axes, report: dict) -> None:
    data = report["frontier"]
    optimal = sorted(data["optimal"], key=lambda row: row["kl"])
    kl, reward, se, effective = columns(optimal, "kl", "reward", "se", "effective_samples")
    sure = effective >= ENOUGH
    axes.fill_between(kl, reward - 1.96 * se, reward + 1.96 * se, color=GREY, alpha=0.2, linewidth=0)
    axes.plot(kl[sure], reward[sure], color=GREY, linewidth=2, label="best possible (tilted reference)")
    unsure = ~sure | np.roll(~sure, -1)  # from the last sure point on
    axes.plot(kl[unsure], reward[unsure], color=GREY, linewidth=2, linestyle=":")
    rows = data["best_of_n"]
    label = f"best of n = 1 … {rows[-1]['n']}"
    axes.plot(*columns(rows, "kl_with_ties", "reward"), "s-", color=ORANGE, markersize=4, linewidth=1, label=label)
    if rows := [row for row in data["sharpening"] if row["kl"] is not None]:
        start = {"kl": 0, "reward": report["policies"][report["reference"]]["reward"]["mean"]}
        label = f"{plain(report['reference'])} sharpened by temperature"
        line = columns([start, *rows], "kl", "reward")
        axes.plot(*line, "^--", color=COLORS[3], markersize=5, linewidth=1, label=label)
        for row in rows:
            axes.annotate(f"{row['temperature']:g}", (row["kl"], row["reward"]), fontsize=7, xytext=(3, -9),
                          textcoords="offset points")  # fmt: skip
    shades = colors(report)
    for run, shade, rows in checkpoints_by_run(report):
        line, label = columns(rows, "kl", "reward"), f"checkpoints of {plain(run)}"
        axes.plot(*line, ".-", color=shades.get(run, shade), alpha=0.8, linewidth=1, label=label)
    for name, values in report["policies"].items():
        if values["kl"]:
            axes.errorbar(max(0, values["kl"]["k1"]["mean"]), values["reward"]["mean"], error_bars([values["reward"]]),
                          fmt="o", color=shades[name], markersize=8, label=plain(name), zorder=3)  # fmt: skip
    square_root_axis(axes, f"KL from {plain(report['reference'])}, nats per response (square-root axis)")
    axes.set_ylabel("reward")


def plot_win_rates(rows: list[dict]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.34 * len(rows)))
    places = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    for part, color in (("win", BLUE), ("tie", "#b8b8b8"), ("loss", ORANGE)):
        (widths,) = columns(rows, part)
        axes.barh(places, widths, 0.72, left, color=color, label=part)
        left += widths
    rates = [{"mean": row["win_rate"], "ci95": row["ci95"]} for row in rows]
    (means,) = columns(rates, "mean")
    label = "win + tie / 2"
    axes.errorbar(means, places, xerr=error_bars(rates), fmt="D", color="black", markersize=4, label=label)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [plain(f"{row['a']} against {row['b']} ({row['judge']})") for row in rows])
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def plot_over_optimization(reports: dict[str, dict]) -> Figure:
    """The proxy and each judge against sqrt(KL), in rows, with the curves of Gao et al. (2210.10760).

    A column for each report by its title.
    """
    names = list(next(iter(reports.values()))["over_optimization"]["start"])
    size = (max(6, 5 * len(reports)), 3.3 * len(names))
    figure, panels = plt.subplots(
        len(names), len(reports), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for column, (title, report) in zip(panels.T, reports.items(), strict=True):
        for axes, name in zip(column, names, strict=True):
            draw_over_optimization(axes, report, name)
            label = "reward (the proxy)" if name == "reward" else name
            axes.set_title(plain(f"{title}: {label}" if title else label), fontsize=10)
    shared_legend(figure, panels)
    return figure


def draw_over_optimization(axes, report: dict, name: str) -> None:
    """`name` is the reward's or a judge's."""
    data, best = report["over_optimization"], report["frontier"]["best_of_n"]
    start, fits, runs = data["start"][name], data["fits"][name], checkpoints_by_run(report)
    for (run, shade, rows), marker in zip(runs, cycle("os^Dv"), strict=False):
        axes.plot(*columns(rows, "kl", name), f"{marker}-", color=shade, markersize=4, linewidth=1, label=plain(run))
    far = max(row["kl"] for _, _, rows in runs for row in rows)
    kl = np.linspace(far / 200, far, 200)
    axes.plot(kl, start + over_optimization_curve(kl, fits["rl"]), "--", color="black", linewidth=1, label="PPO, fit")
    axes.plot(*columns(best, "kl_with_ties", name), "x", color=ORANGE, markersize=4, label="best of n")
    if fits["bon"]:
        kl = np.linspace(best[1]["kl_with_ties"] / 20, best[-1]["kl_with_ties"], 100)
        axes.plot(kl, start + over_optimization_curve(kl, fits["bon"]), ":", color=ORANGE, linewidth=1)
    axes.axhline(start, color=GREY, linewidth=0.8)
    square_root_axis(axes, "KL, nats per response (square-root axis)")


def plot_reward_model(quality: dict) -> Figure:
    """Accuracy by length difference, beside the longer-wins rule; and claimed against true probabilities."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    bins = quality["by_length_difference"]
    accuracy = [row["accuracy"] for row in bins]
    left.bar(range(len(bins)), *columns(accuracy, "mean"), color=COLORS[0], yerr=error_bars(accuracy), capsize=3)
    left.axhline(quality["accuracy"]["mean"], color="black", linewidth=1, label="accuracy, all pairs")
    left.axhline(quality["longer_wins_baseline"], color=GREY, linewidth=1, linestyle="--", label="longer wins")
    labels = [f"{row['from']:+d}" if row["from"] == row["to"] else f"{row['from']:+d}…{row['to']:+d}" for row in bins]
    left.set_xticks(range(len(bins)), labels)
    left.set(ylim=(0, 1), xlabel="tokens by which the better response is longer", ylabel="pairs ordered right")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    claimed, often, counts = columns(quality["calibration"]["curve"], "claimed", "right", "n_pairs")
    right.plot([0.5, 1], [0.5, 1], ":", color="black", linewidth=0.8)
    right.plot(claimed, often, "-", color=COLORS[0], linewidth=1)
    right.scatter(claimed, often, 10 + 90 * counts / counts.max(), color=COLORS[0])
    right.set(xlim=(0.49, 1.01), ylim=(0, 1.02), xlabel="confidence, sigmoid(|margin|)", ylabel="how often right")
    figure.tight_layout()
    return figure
