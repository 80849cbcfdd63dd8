"""Agreement figures for people to read: as text, or as one HTML file with its plots inside."""

from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

from recipes.cli.errors import counted, visible
from recipes.cli.screen import aligned

TEMPLATES = Path(__file__).parent / "templates"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def interval(figure: dict) -> str:
    """`71.4 % (65.0–77.9)`, from a figure with `share` and `ci95`."""
    if figure["share"] is None:
        return "–"
    bounds = figure["ci95"]
    return percent(figure["share"]) + (f" ({100 * bounds[0]:.1f}–{100 * bounds[1]:.1f})" if bounds else "")


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def labeler_table(report: dict) -> list[list[str]]:
    """A header and one row per labeler, the cells as people read them."""
    table = ["labeler,ranked,skipped,flagged,median s,tied,left as shown,with others,with attention tasks".split(",")]
    for name, labeler in report["labelers"].items():
        counts = [str(labeler[count]) for count in ("ranked", "skipped", "flagged")]
        habits = [number(labeler["median_seconds"], 0), percent(labeler["tied"]), percent(labeler["left_as_shown"])]
        gold = f"{interval(labeler['gold'])} of {labeler['gold']['tasks']}"
        table.append([name, *counts, *habits, interval(labeler["with_others"]), gold])
    return table


def render(report: dict, format: str, title: str = "") -> str:
    """As text, or as a self-contained HTML page: nothing is loaded, and everything that labelers or models wrote is
    escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {function.__name__: function for function in (percent, interval, number, counted, aligned)}
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    template = environment.get_template(f"agreement.{format}")
    text = template.render(report=report, table=labeler_table(report), title=title, made=made)
    return visible(text) if format == "text" else text
