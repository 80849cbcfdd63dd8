"""Figures of the report, and how a figure becomes an SVG element or a PNG file."""

import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)
from matplotlib.figure import Figure  # noqa: E402

from recipes.evaluation.frontier import ENOUGH, over_optimization_curve  # noqa: E402

COLORS = ("#4878a8", "#2e8b57", "#c44e52", "#8c6bb1", "#d98b2b", "#5ba4a4", "#a0522d")
GREY = "#8c8c8c"


def to_svg(figure: Figure) -> Markup:
    """The figure as an SVG element; the text in it is escaped by matplotlib."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    return Markup(re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL))


def save_figures(figures: dict[str, Figure], folder: Path) -> dict[str, Markup]:
    """Write `NAME.png` for each figure, and return them as SVG elements."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    return {name: to_svg(figure) for name, figure in figures.items()}


def plain(text: str) -> str:
    """`text` without what matplotlib reads as a formula."""
    return text.replace("$", r"\$")


def colors(report: dict) -> dict[str, str]:
    """One colour for each policy; the reference is grey."""
    others = [name for name in report["policies"] if name != report["reference"]]
    return {report["reference"]: "black"} | {name: COLORS[place % len(COLORS)] for place, name in enumerate(others)}


def figures(report: dict) -> dict[str, Figure]:
    """All figures that the report has data for, by name."""
    drawn = {"reward_kl": plot_reward_kl(report), "win_rates": plot_win_rates(report)}
    if report["over_optimization"]:
        drawn["over_optimization"] = plot_over_optimization(report)
    if report.get("reward_model"):
        drawn["reward_model"] = plot_reward_model(report["reward_model"])
    return {name: figure for name, figure in drawn.items() if figure is not None}


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


def plot_reward_kl(report: dict) -> Figure:
    """Reward against KL: the frontier, best-of-n, the sharpened reference, PPO along training, the policies."""
    figure, axes = plt.subplots(figsize=(8, 4.8))
    draw_reward_kl(axes, report)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_reward_kl(axes, report: dict) -> None:
    data = report["frontier"]
    optimal = sorted(data["optimal"], key=lambda row: row["kl"])
    kl, reward, se = (np.array([row[name] for row in optimal]) for name in ("kl", "reward", "se"))
    sure = np.array([row["effective_samples"] >= ENOUGH for row in optimal])
    axes.fill_between(kl, reward - 1.96 * se, reward + 1.96 * se, color=GREY, alpha=0.2, linewidth=0)
    axes.plot(kl[sure], reward[sure], color=GREY, linewidth=2, label="best possible (tilted reference)")
    unsure = ~sure | np.roll(~sure, -1)  # from the last sure point on
    axes.plot(kl[unsure], reward[unsure], color=GREY, linewidth=2, linestyle=":")
    rows = data["best_of_n"]
    axes.plot([r["kl_with_ties"] for r in rows], [r["reward"] for r in rows], "s-", color="#d98b2b", markersize=4,
              linewidth=1, label=f"best of n = 1 … {rows[-1]['n']}")  # fmt: skip
    if rows := [row for row in data["sharpening"] if row["kl"] is not None]:
        start = report["policies"][report["reference"]]["reward"]["mean"]
        label = f"{plain(report['reference'])} sharpened by temperature"
        axes.plot([0, *(r["kl"] for r in rows)], [start, *(r["reward"] for r in rows)], "^--", color="#8c6bb1",
                  markersize=5, linewidth=1, label=label)  # fmt: skip
        for row in rows:
            axes.annotate(f"{row['temperature']:g}", (row["kl"], row["reward"]), fontsize=7, xytext=(3, -9),
                          textcoords="offset points")  # fmt: skip
    shades = colors(report)
    runs = list(dict.fromkeys(row["run"] for row in data["checkpoints"]))
    for place, run in enumerate(runs):
        rows = [row for row in data["checkpoints"] if row["run"] == run and row["kl"] is not None]
        color = shades.get(run, plt.cm.viridis(place / max(1, len(runs) - 1)))
        axes.plot([r["kl"] for r in rows], [r["reward"] for r in rows], ".-", color=color, alpha=0.8, linewidth=1,
                  label=f"checkpoints of {plain(run)}")  # fmt: skip
    for name, values in report["policies"].items():
        if values["kl"]:
            mean, (low, high) = values["reward"]["mean"], values["reward"]["ci95"]
            error = [[max(0, mean - low)], [max(0, high - mean)]]
            axes.errorbar(max(0, values["kl"]["k1"]["mean"]), mean, error, fmt="o", color=shades[name], markersize=8,
                          label=plain(name), zorder=3)  # fmt: skip
    square_root_axis(axes, f"KL from {plain(report['reference'])}, nats per response (square-root axis)")
    axes.set_ylabel("reward")


def plot_win_rates(report: dict) -> Figure | None:
    rows = report["win_rates"]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.34 * len(rows)))
    places = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    for part, color in (("win", "#2e8b57"), ("tie", "#d8d8d8"), ("loss", "#c44e52")):
        widths = np.array([row[part] for row in rows])
        axes.barh(places, widths, 0.72, left, color=color, label=part)
        left += widths
    rates = np.array([row["win_rate"] for row in rows])
    bounds = np.array([row["ci95"] for row in rows])
    error = np.maximum(0, np.stack([rates - bounds[:, 0], bounds[:, 1] - rates]))
    axes.errorbar(rates, places, xerr=error, fmt="D", color="black", markersize=4, label="win + tie / 2")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [plain(f"{row['a']} against {row['b']} ({row['judge']})") for row in rows])
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def plot_over_optimization(report: dict) -> Figure:
    """Proxy and judges against sqrt(KL), with the curves of Gao et al. (2210.10760)."""
    names = list(report["over_optimization"]["start"])
    figure, panels = plt.subplots(1, len(names), figsize=(5.2 * len(names), 3.8), squeeze=False)
    draw_over_optimization(panels[0], report)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def draw_over_optimization(panels, report: dict) -> None:
    """One panel for the reward and one for each judge."""
    data, rows = report["over_optimization"], report["frontier"]["checkpoints"]
    rows = [row for row in rows if row["kl"] is not None]
    best = report["frontier"]["best_of_n"]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    far = max(row["kl"] for row in rows)
    for axes, (name, start) in zip(panels, data["start"].items(), strict=True):
        for place, run in enumerate(runs):
            own = [row for row in rows if row["run"] == run]
            color = plt.cm.viridis(place / max(1, len(runs) - 1))
            axes.plot([max(0, r["kl"]) for r in own], [r[name] for r in own], "o-", color=color, markersize=4,
                      linewidth=1, label=plain(run))  # fmt: skip
        fits = data["fits"][name]
        kl = np.linspace(far / 200, far, 200)
        axes.plot(
            kl, start + over_optimization_curve(kl, fits["rl"]), "--", color="black", linewidth=1, label="PPO, fit"
        )
        axes.plot([r["kl_with_ties"] for r in best], [r[name] for r in best], "s", color="#d98b2b", markersize=4,
                  label="best of n")  # fmt: skip
        kl = np.linspace(best[1]["kl"] / 20, best[-1]["kl"], 100)
        axes.plot(kl, start + over_optimization_curve(kl, fits["bon"]), ":", color="#d98b2b", linewidth=1)
        axes.axhline(start, color=GREY, linewidth=0.8)
        square_root_axis(axes, "KL, nats per response (square-root axis)")
        axes.set_title("reward (the proxy)" if name == "reward" else plain(name), fontsize=10)


def plot_reward_model(quality: dict) -> Figure:
    """Accuracy by length difference, beside the longer-wins rule; and claimed against true probabilities."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    bins = quality["by_length_difference"]
    means = np.array([row["accuracy"]["mean"] for row in bins])
    bounds = np.array([row["accuracy"]["ci95"] for row in bins])
    error = np.maximum(0, np.stack([means - bounds[:, 0], bounds[:, 1] - means]))
    left.bar(range(len(bins)), means, color=COLORS[0], yerr=error, capsize=3)
    left.axhline(quality["accuracy"]["mean"], color="black", linewidth=1, label="accuracy, all pairs")
    left.axhline(quality["longer_wins_baseline"], color=GREY, linewidth=1, linestyle="--", label="longer wins")
    labels = [f"{row['from']:+d}" if row["from"] == row["to"] else f"{row['from']:+d}…{row['to']:+d}" for row in bins]
    left.set_xticks(range(len(bins)), labels)
    left.set(ylim=(0, 1), xlabel="tokens by which the better response is longer", ylabel="pairs ordered right")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    curve = quality["calibration"]["curve"]
    right.plot([0.5, 1], [0.5, 1], ":", color="black", linewidth=0.8)
    right.plot([row["claimed"] for row in curve], [row["right"] for row in curve], "-", color=COLORS[0], linewidth=1)
    most = max(row["n_pairs"] for row in curve)
    sizes = [10 + 90 * row["n_pairs"] / most for row in curve]
    right.scatter([row["claimed"] for row in curve], [row["right"] for row in curve], sizes, color=COLORS[0])
    right.set(xlim=(0.49, 1.01), ylim=(0, 1.02), xlabel="sigmoid(|margin|): how sure it is", ylabel="how often right")
    figure.tight_layout()
    return figure
