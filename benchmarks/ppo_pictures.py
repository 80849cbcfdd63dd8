"""Draws PPO runs of the tiny world side by side, a column each, as docs/images/ppo_runs.png shows them.

python benchmarks/ppo_pictures.py docs/images/ppo_runs.png "Healthy=runs/quickstart/ppo" "Collapsed=runs/collapsed"
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = {
    "score, gold (dashed)": ("objective/scores", "rewards/gold/mean"),
    "KL, nats a response": ("objective/kl",),
    "entropy, nats a response": ("objective/entropy",),
    "explained variance": ("val/explained_variance",),
}


def draw(runs: dict[str, Path], output: Path) -> None:
    """One column for each run, one row for each metric; the axes of a row are shared, cut where a run leaves them."""
    figure, axes = plt.subplots(len(ROWS), len(runs), figsize=(3 * len(runs), 7.5), sharex="col", squeeze=False)
    for column, (title, folder) in enumerate(runs.items()):
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        axes[0, column].set_title(title)
        axes[-1, column].set_xlabel("update")
        for row, (label, names) in enumerate(ROWS.items()):
            for name, style in zip(names, (("C0", "-"), ("C1", "--")), strict=False):
                points = [(entry["step"], entry[name]) for entry in history if name in entry]
                axes[row, column].plot(*zip(*points, strict=True), color=style[0], linestyle=style[1])
            axes[row, column].grid(alpha=0.3)
            if column == 0:
                axes[row, 0].set_ylabel(label, fontsize=8)
    for axis in axes[-1]:
        axis.set_ylim(-1.5, 1)  # the critic starts far below 0
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "runs", nargs="+", help="TITLE=FOLDER of a run with --reward_funcs recipes.tiny_world.judge.gold"
    )
    args = parser.parse_args()
    draw({title: Path(folder) for title, folder in (each.split("=", 1) for each in args.runs)}, args.output)
