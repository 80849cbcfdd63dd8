"""Figures of the report, and how a figure becomes an SVG element or a PNG file."""

import io
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from recipes.evaluation.frontier import ENOUGH, over_optimization_curve

plt.switch_backend("Agg")
plt.rcParams |= {"lines.linewidth": 1, "lines.markersize": 4, "legend.frameon": False, "legend.fontsize": 8}

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
        elements[name] = Markup(text[text.index("<svg") :])
    return elements


def columns(rows: list[dict], *names: str) -> list[np.ndarray]:
    """The values of each name, over the rows; NaN for `None`."""
    return [np.array([row[name] for row in rows], dtype=np.float64) for name in names]


def error_bars(values: list[dict]) -> np.ndarray:
    """Distances (2, n) from each mean of `{"mean", "ci95"}` to the ends of its interval, as matplotlib takes them; 0
    where there is no interval."""
    rows = [(row["mean"], *(row["ci95"] or [row["mean"]] * 2)) for row in values]
    mean, low, high = np.array(rows).T
    return np.maximum(0, np.stack([mean - low, high - mean]))


def checkpoints_by_run(report: dict) -> list[tuple[str, tuple, list[dict]]]:
    """Each training run, a shade for it (to be seen on both kinds of page) and its checkpoints that have a KL."""
    rows = [row for row in report["frontier"]["checkpoints"] if row["kl"] is not None]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    shades = plt.cm.viridis(np.linspace(0.3, 0.85, len(runs)))
    return [(run, shade, [row for row in rows if row["run"] == run]) for run, shade in zip(runs, shades, strict=True)]


def square_root_axis(axes: Axes, of: str) -> None:
    """KL is roughly quadratic in how far a policy went: on its square root, early and late steps can be seen."""
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    axes.xaxis.set_major_locator(FixedLocator([0, 0.2, 1, 2, 5, 10, 20, 50, 100, 200, 500]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"KL from {of}, nats per response (square-root axis)")


def in_panels(rows: list[Callable[[Axes, dict], None]], reports: dict[str, dict], height: float) -> Figure:
    """A row of panels for each function that draws one, a column for each report by its title, and one legend."""
    size = (max(8, 5 * len(reports)), height * len(rows))
    figure, panels = plt.subplots(
        len(rows), len(reports), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for draw, row in zip(rows, panels, strict=True):
        for axes, (title, report) in zip(row, reports.items(), strict=True):
            draw(axes, report)
            axes.set_title(title, fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def plot_reward_kl(reports: dict[str, dict]) -> Figure:
    """The frontier, best-of-n, the sharpened reference, PPO along training, the policies."""
    return in_panels([draw_reward_kl], reports, 5)


def plot_over_optimization(reports: dict[str, dict]) -> Figure:
    """The proxy and each judge against sqrt(KL), with the curves of Gao et al. (2210.10760)."""
    names = next(iter(reports.values()))["over_optimization"]["start"]
    return in_panels([partial(draw_over_optimization, name=name) for name in names], reports, 3.3)


def draw_reward_kl(axes: Axes, report: dict) -> None:
    data, policies, reference = report["frontier"], report["policies"], report["reference"]
    optimal = sorted(data["optimal"], key=lambda row: row["kl"])
    kl, reward, se, effective = columns(optimal, "kl", "reward", "se", "effective_samples")
    sure = effective >= ENOUGH
    axes.fill_between(kl, reward - 1.96 * se, reward + 1.96 * se, color=GREY, alpha=0.2, linewidth=0)
    axes.plot(kl, reward, ":", color=GREY, linewidth=2)
    axes.plot(kl[sure], reward[sure], color=GREY, linewidth=2, label="best possible (tilted reference)")
    rows = data["best_of_n"]
    label = f"best of n = 1 … {rows[-1]['n']}"
    axes.plot(*columns(rows, "kl_with_ties", "reward"), "s-", color=ORANGE, label=label)
    if rows := [row for row in data["sharpening"] if row["kl"] is not None]:
        start = {"kl": 0, "reward": policies[reference]["reward"]["mean"]}
        label = f"{reference} sharpened by temperature"
        axes.plot(*columns([start, *rows], "kl", "reward"), "^--", color=COLORS[3], label=label)
        for row in rows:
            place, temperature = (row["kl"], row["reward"]), f"{row['temperature']:g}"
            axes.annotate(temperature, place, fontsize=7, xytext=(3, -9), textcoords="offset points")
    colors = {reference: "black", **dict(zip([name for name in policies if name != reference], cycle(COLORS)))}
    for run, shade, rows in checkpoints_by_run(report):
        color, label = colors.get(run, shade), f"checkpoints of {run}"
        axes.plot(*columns(rows, "kl", "reward"), ".-", color=color, alpha=0.8, label=label)
    for name, values in policies.items():
        if values["kl"]:
            place = (max(0.0, values["kl"]["k1"]["mean"]), values["reward"]["mean"])
            look = {"fmt": "o", "color": colors[name], "markersize": 8, "zorder": 3, "label": name}
            axes.errorbar(*place, error_bars([values["reward"]]), **look)
    square_root_axis(axes, reference)
    axes.set_ylabel("reward")


def draw_over_optimization(axes: Axes, report: dict, name: str) -> None:
    """`name` is the reward's or a judge's."""
    data, best = report["over_optimization"], report["frontier"]["best_of_n"]
    start, fits, runs = data["start"][name], data["fits"][name], checkpoints_by_run(report)
    for (run, shade, rows), marker in zip(runs, cycle("os^Dv"), strict=False):
        axes.plot(*columns(rows, "kl", name), f"{marker}-", color=shade, label=run)
    far = max(row["kl"] for _, _, rows in runs for row in rows)
    kl = np.linspace(far / 200, far, 200)
    axes.plot(kl, start + over_optimization_curve(kl, fits["rl"]), "--", color="black", label="PPO, fit")
    axes.plot(*columns(best, "kl_with_ties", name), "x", color=ORANGE, label="best of n")
    if fits["bon"]:
        kl = np.linspace(best[1]["kl_with_ties"] / 20, best[-1]["kl_with_ties"], 100)
        axes.plot(kl, start + over_optimization_curve(kl, fits["bon"]), ":", color=ORANGE)
    axes.axhline(start, color=GREY)
    square_root_axis(axes, report["reference"])
    axes.set_ylabel("reward (the proxy)" if name == "reward" else name)


def plot_reward_model(quality: dict) -> Figure:
    """Accuracy by length difference, beside the longer-wins rule; and claimed against true probabilities."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    bins = quality["by_length_difference"]
    accuracy = [row["accuracy"] for row in bins]
    labels = [f"{row['from']:+d} … {row['to']:+d}" for row in bins]
    left.bar(labels, *columns(accuracy, "mean"), color=BLUE, yerr=error_bars(accuracy), capsize=3)
    left.axhline(quality["accuracy"]["mean"], color="black", label="accuracy, all pairs")
    left.axhline(quality["longer_wins_baseline"], color=GREY, linestyle="--", label="longer wins")
    left.set(ylim=(0, 1), xlabel="tokens by which the better response is longer", ylabel="pairs ordered right")
    left.legend(loc="lower right")
    claimed, often, counts = columns(quality["calibration"]["curve"], "claimed", "right", "n_pairs")
    right.plot([0.5, 1], [0.5, 1], ":", color="black")
    right.plot(claimed, often, color=BLUE)
    right.scatter(claimed, often, 10 + 90 * counts / counts.max(), color=BLUE)
    right.set(xlim=(0.49, 1.01), ylim=(0, 1.02), xlabel="confidence, sigmoid(|margin|)", ylabel="how often right")
    return figure
