"""Agreement figures for people to read: as text, or as one HTML file with its plots inside."""

from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from recipes.cli.errors import counted
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
    table = [
        "labeler,ranked,skipped,flagged,median s,per hour,tied,left as shown,with others,with gold tasks".split(",")
    ]
    for name, labeler in report["labelers"].items():
        counts = [str(labeler[count]) for count in ("ranked", "skipped", "flagged")]
        pace = [number(labeler[figure], 0) for figure in ("median_seconds", "rankings_per_hour")]
        habits = [percent(labeler[figure]) for figure in ("tied", "left_as_shown")]
        gold = f"{interval(labeler['gold'])} of {labeler['gold']['tasks']}"
        table.append([name, *counts, *pace, *habits, interval(labeler["with_others"]), gold])
    return table


def as_text(report: dict) -> str:
    alpha, (hired, held_out) = report["krippendorff_alpha"], report["pairwise"]["instructgpt"]
    strict, ties = report["pairwise"]["without_ties"], report["pairwise"]["with_ties"]
    lines = [
        f"{counted(report['rankings'], 'ranking')} of {counted(report['prompts'], 'prompt')}; "
        f"ranked by several labelers (gold tasks apart): {counted(report['prompts_shared'], 'prompt')}.",
        "" if report["prompts_shared"] else "Agreement needs prompts that two people rank: `serve --overlap 2`.\n",
        f"Pairwise agreement, ties left out  {interval(strict)}   {counted(strict['pairs'], 'comparison')}",
        f"Pairwise agreement, ties counted   {interval(ties)}   {counted(ties['pairs'], 'comparison')}",
        f"  InstructGPT's labelers           {percent(hired)} (hired for training), {percent(held_out)} (held out)",
        f"Krippendorff's alpha, pair outcomes  nominal {number(alpha['nominal'])}, ordinal {number(alpha['ordinal'])}",
        f"Kendall's W, mean over prompts       {number(report['kendalls_w'])}",
        "",
        aligned(labeler_table(report)),
    ]
    for name, labeler in report["labelers"].items():
        if labeler["gold"]["disagreed"]:
            lines.append(f"{name} disagreed with gold tasks: {', '.join(labeler['gold']['disagreed'])}")
    return "\n".join(lines) + "\n"


def as_html(report: dict, title: str) -> str:
    """A self-contained page: nothing is loaded, everything that labelers or models wrote is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "interval": interval, "number": number, "counted": counted}
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    template = environment.get_template("agreement.html")
    return template.render(report=report, table=labeler_table(report), title=title, made=made)
