"""Agreement figures for people to read: as text, or as one HTML file with its plots inside."""

from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

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


def _comparisons(figure):
    return f"{interval(figure)}   {figure['pairs']} comparisons"


def as_text(report: dict) -> str:
    pairwise, alpha = report["pairwise"], report["krippendorff_alpha"]
    low, high = (100 * value for value in pairwise["instructgpt"])
    lines = [
        f"{report['rankings']} rankings of {report['prompts']} prompts; "
        f"{report['prompts_shared']} prompts were ranked by several labelers (gold tasks apart).",
        "",
        f"Pairwise agreement, ties left out  {_comparisons(pairwise['without_ties'])}",
        f"Pairwise agreement, ties counted   {_comparisons(pairwise['with_ties'])}",
        f"  InstructGPT's labelers           {low:.1f} % (hired for training), {high:.1f} % (held out)",
        f"Krippendorff's alpha, pair outcomes  nominal {number(alpha['nominal'])}, ordinal {number(alpha['ordinal'])}",
        f"Kendall's W, mean over prompts       {number(report['kendalls_w'])}",
        "",
    ]
    if not report["prompts_shared"]:
        lines.insert(1, "Agreement needs prompts that two people rank: `serve --overlap 2`.")
    header = (
        "labeler",
        "ranked",
        "skipped",
        "flagged",
        "median s",
        "per hour",
        "tied",
        "as shown",
        "with others",
        "gold",
    )
    rows = [header] + [
        (
            name,
            str(labeler["ranked"]),
            str(labeler["skipped"]),
            str(labeler["flagged"]),
            number(labeler["median_seconds"], 0),
            number(labeler["rankings_per_hour"], 0),
            percent(labeler["tied"]),
            percent(labeler["left_as_shown"]),
            percent(labeler["with_others"]["share"]),
            f"{percent(labeler['gold']['share'])} of {labeler['gold']['tasks']} tasks",
        )
        for name, labeler in report["labelers"].items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, labeler in report["labelers"].items():
        if labeler["gold"]["disagreed"]:
            lines.append(f"{name} disagreed with gold tasks: {', '.join(labeler['gold']['disagreed'])}")
    return "\n".join(lines) + "\n"


def as_html(report: dict, title: str) -> str:
    """A self-contained page: nothing is loaded, everything that labelers or models wrote is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "interval": interval, "number": number}
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("agreement.html").render(report=report, title=title, made=made)
