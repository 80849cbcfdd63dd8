"""Writes what was measured: report.json, report.html, PNG files, a table for the terminal, W&B."""

import json
import os
from pathlib import Path

import jinja2
from markupsafe import Markup

from recipes.evaluation import plots


def page_template(path: Path) -> jinja2.Template:
    """A page in which everything is escaped: what models say is never markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["estimate"] = estimate
    return environment.get_template(path.name)


def estimate(value: dict | float | None, digits: int = 2) -> str:
    """A figure with its interval, as text."""
    if value is None:
        return "–"
    if not isinstance(value, dict):
        return f"{value:.{digits}f}"
    low, high = value["ci95"]
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def write_report(report: dict, output_dir: str) -> None:
    """Write report.json, report.html (one file, no network, no script) and a PNG for each figure."""
    folder = Path(output_dir)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    drawn: dict[str, Markup] = plots.save_figures(plots.figures(report), folder)
    judges = judge_names(report)
    page = page_template(Path(__file__).with_name("report.html.jinja"))
    text = page.render(report=report, plots=drawn, judges=judges)
    (folder / "report.html").write_text(text, encoding="utf-8")


def judge_names(report: dict) -> list[str]:
    """Python judges, in the order in which they were given."""
    own = list(report["policies"][report["reference"]])
    return own[1 : own.index("kl")]


def table(report: dict) -> str:
    """The result in a few lines of text."""
    judges = judge_names(report)
    rows = [["", "reward", *judges, f"KL from {report['reference']}", "length", "cut off", "share of gain"]]
    for name, values in report["policies"].items():
        kl = values["kl"] and values["kl"]["k1"]
        judged = [estimate(values[judge]) for judge in judges]
        share = estimate(values["share_of_gain"]) if values.get("share_of_gain") else ""
        reward, length, cut = estimate(values["reward"]), values["length"]["mean"], values["truncated"]["mean"]
        rows.append([name, reward, *judged, estimate(kl), f"{length:.1f}", f"{cut:.2f}", share])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if quality := report.get("reward_model"):
        lines.append(
            f"Reward model: right on {estimate(quality['accuracy'])} of {quality['n_pairs']} pairs; the longer "
            f"response on {quality['longer_wins_baseline']:.2f}."
        )
    return "\n".join(lines)


def log_to_wandb(report: dict, output_dir: str, run_name: str | None) -> None:
    """The figures as a summary, tables and images of one W&B run in the project WANDB_PROJECT."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "huggingface")
    run = wandb.init(project=project, name=run_name, job_type="evaluation", dir=output_dir)
    summary, columns = {}, ["policy", "reward", *judge_names(report), "kl", "length", "truncated"]
    policies = wandb.Table(columns=columns)
    for name, values in report["policies"].items():
        kl = values["kl"]["k1"]["mean"] if values["kl"] else None
        means = {column: values[column]["mean"] for column in columns[1:] if column != "kl"} | {"kl": kl}
        policies.add_data(name, *(means[column] for column in columns[1:]))
        summary |= {f"eval/{name}/{column}": value for column, value in means.items() if value is not None}
    rates = wandb.Table(columns=["a", "b", "judge", "win", "tie", "loss", "win_rate"])
    for row in report["win_rates"]:
        rates.add_data(*(row[column] for column in rates.columns))
    samples = wandb.Table(columns=["prompt", "change", *report["policies"]])
    for row in report["samples"]:
        samples.add_data(*(row[column] for column in samples.columns))
    images = {f"eval/{path.stem}": wandb.Image(str(path)) for path in sorted(Path(output_dir).glob("*.png"))}
    tables = {"eval/policies": policies, "eval/win_rates": rates, "eval/samples": samples}
    run.log(summary | tables | images)
    run.finish()
