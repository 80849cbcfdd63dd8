"""Agreement figures for people to read: as text, or as one HTML file with its plots inside."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader

from recipes.cli.errors import counted, visible
from recipes.cli.screen import aligned


class Cell(NamedTuple):
    """What people read; and what is drawn below it in HTML: a dot, and a bar from and to, as shares of the width."""

    text: str
    dot: float | None = None
    bar: list[float] | None = None


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def share(figure: dict, of: str = "") -> Cell:
    """`71.4 % (65.0–77.9)`, from a figure with `share` and `ci95`."""
    bounds = figure["ci95"]
    text = percent(figure["share"]) + (f" ({100 * bounds[0]:.1f}–{100 * bounds[1]:.1f})" if bounds else "")
    return Cell(text + of, figure["share"], bounds)


def figures(report: dict) -> list[list[Cell]]:
    """A header, and what holds for the whole job: a name, the figure and a note."""
    pairwise, alpha = report["pairwise"], report["krippendorff_alpha"]
    table = [[Cell("all labelers"), Cell(""), Cell("")]]
    for name, figure in (("left out", pairwise["without_ties"]), ("counted", pairwise["with_ties"])):
        note = counted(figure["pairs"], "comparison")
        table.append([Cell(f"Pairwise agreement, ties {name}"), share(figure), Cell(note)])
    theirs = Cell(", ".join(map(percent, pairwise["instructgpt"])), bar=pairwise["instructgpt"])
    alphas = Cell(f"{number(alpha['nominal'])}, {number(alpha['ordinal'])}")
    return [
        *table,
        [Cell("InstructGPT's labelers"), theirs, Cell("hired for training, held out")],
        [Cell("Krippendorff's alpha"), alphas, Cell("pair outcomes: nominal, ordinal; 1 is perfect, 0 is chance")],
        [Cell("Kendall's W"), Cell(number(report["kendalls_w"])), Cell("mean over prompts; 1: all rank alike")],
    ]


def _tenths(labeler: dict) -> np.ndarray:
    """The seconds that a tenth of the labeler's rankings took less than, and a tenth more."""
    return np.quantile(labeler["seconds"] or [0], [0.1, 0.9])


def longest_seconds(report: dict) -> float:
    """Where the axis of times ends."""
    return max([1.0, *(float(_tenths(labeler)[1]) for labeler in report["labelers"].values())])


def labeler_table(report: dict) -> list[list[Cell]]:
    """A header and one row per labeler."""
    titles = "labeler,ranked,skipped,flagged,median s,tied,left as shown,with others,with attention tasks"
    table = [[Cell(title) for title in titles.split(",")]]
    longest = longest_seconds(report)
    for name, labeler in report["labelers"].items():
        counts = [str(labeler[count]) for count in ("ranked", "skipped", "flagged")]
        time, gold = Cell("–"), labeler["gold"]
        if labeler["seconds"]:
            median = labeler["median_seconds"]
            time = Cell(f"{median:.0f}", median / longest, (_tenths(labeler) / longest).tolist())
        habits = [Cell(percent(labeler[habit])) for habit in ("tied", "left_as_shown")]
        others = [share(labeler["with_others"]), share(gold, f" of {gold['tasks']}")]
        table.append([*map(Cell, [name, *counts]), time, *habits, *others])
    return table


def render(report: dict, format: str, title: str = "") -> str:
    """As JSON, as text, or as a self-contained HTML page: nothing is loaded, and everything that labelers or models
    wrote is escaped."""
    if format == "json":
        return json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    summary = f"{counted(report['rankings'], 'ranking')} of {counted(report['prompts'], 'prompt')}; ranked by several "
    summary += f"labelers (attention tasks apart): {counted(report['prompts_shared'], 'prompt')}."
    if not report["prompts_shared"]:
        summary += " Agreement needs prompts that two people rank: `serve --overlap 2`."
    remarks = [
        f"{name} disagreed with attention tasks: {', '.join(labeler['gold']['disagreed'])}"
        for name, labeler in report["labelers"].items()
        if labeler["gold"]["disagreed"]
    ]
    remarks += [f"{flag['labeler']} flagged {flag['prompt']}: {flag['comment'].strip()}" for flag in report["flagged"]]
    tables = [figures(report), labeler_table(report)]
    if format == "text":
        lines = [aligned([[cell.text for cell in row] for row in table]) + "\n" for table in tables]
        return visible("\n".join([summary, "", *lines, *remarks]))
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("agreement.html")
    made, longest = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), longest_seconds(report)
    return page.render(title=title, summary=summary, tables=tables, remarks=remarks, longest=longest, made=made)
