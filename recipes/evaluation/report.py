"""Writes what was measured: report.json, report.html, PNG files, a table for the terminal, W&B."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jinja2
import pandas as pd

from recipes.cli.errors import counted
from recipes.evaluation import plots
from recipes.trainers.ranking_trainer import no_better_than_length

ENOUGH_PROMPTS = 20


def render(template: Path, filters: dict[str, Callable] | None = None, **values) -> str:
    """A page from a template, which may extend `layout.html.jinja`. In HTML, texts of models are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": estimate, "counted": counted, **(filters or {})}
    return environment.get_template(template.name).render(**values)


def estimate(value: dict | float | None, digits: int = 2) -> str:
    """A figure with its interval, as text."""
    if value is None:
        return "–"
    mean, bounds = (value["mean"], value["ci95"]) if isinstance(value, dict) else (value, None)
    # Tiny negative numbers are rounded to -0.0, and `+ 0.0` makes that 0.0: a minus says that a figure is below 0.
    mean, *ends = [f"{round(number, 4) + 0.0:.{digits}f}" for number in (mean, *(bounds or ()))]
    return f"{mean} [{', '.join(ends)}]" if ends else mean  # one prompt has no interval


def write_report(report: dict, output_dir: str) -> None:
    """Write report.json, report.html (one file, no network, no script) and a PNG for each figure."""
    folder = Path(output_dir)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    figures = {"reward_kl": plots.plot_reward_kl({"": report})}
    if report["over_optimization"]:
        figures["over_optimization"] = plots.plot_over_optimization({"": report})
    if report["reward_model"]:
        figures["reward_model"] = plots.plot_reward_model(report["reward_model"])
    for name in {"over_optimization", "reward_model"} - figures.keys():  # of an earlier report with more data
        (folder / f"{name}.png").unlink(missing_ok=True)
    plots.save_png(figures, folder)
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        report=report,
        plots=plots.to_svg(figures),
        verdict=verdict(report),
        about_reward_model=about_reward_model(report["reward_model"]),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def verdict(report: dict) -> str:
    """The result in sentences: the headline policy against the reference, by the first judge and the reward model."""
    headline, reference = report["headline"], report["reference"]
    text = f"Only {reference} was measured."
    if headline != reference:
        found, judges = report["policies"][headline]["difference"], [*report["judges"][:1], "reward"]
        text = " ".join(sentence(headline, reference, judge, found[judge]) for judge in judges)
        proxy, true = found["reward"]["ci95"], found[judges[0]]["ci95"]
        if proxy and proxy[0] > 0 > true[1]:
            text += " The policy exploits errors of the reward model: over-optimisation."
    if 1 < report["n_prompts"] < ENOUGH_PROMPTS:  # too few for the percentiles of a bootstrap
        few = f"with only {report['n_prompts']} prompts the 95 % intervals are too narrow"
        text += f" Warning: {few}. Take {ENOUGH_PROMPTS} or more, better hundreds."
    return text


def sentence(name: str, other: str, judge: str, difference: dict) -> str:
    """Whether `name` scores above or below `other`, by how much, and whether that could be chance."""
    mean, bounds = difference["mean"], difference["ci95"]
    is_same = abs(mean) < 1e-9  # equal scores, averaged over another number of responses
    how = "the same as" if is_same else f"{abs(mean):.2f} {'above' if mean > 0 else 'below'}"
    text = f"By {'the reward model' if judge == 'reward' else judge}, {name} scores {how} {other}"
    if bounds is None:
        return f"{text} on the only prompt, which says nothing about others."
    chance = "; the difference could be chance" if not is_same and bounds[0] <= 0 <= bounds[1] else ""
    low, high = (round(bound, 4) + 0.0 for bound in bounds)
    return f"{text}{chance} (95 % interval {low:+.2f} to {high:+.2f})."


def table(report: dict) -> str:
    """The result in a few lines of text."""
    rows = {}
    for name, values in report["policies"].items():
        rows[name] = {
            **{judge: estimate(values[judge]) for judge in ("reward", *report["judges"])},
            f"KL from {report['reference']}": estimate(values["kl"] and values["kl"]["k1"]),
            "length": estimate(values["length"]["mean"], 1),
            "cut off": estimate(values["truncated"]["mean"]),
            "share of gain": estimate(values.get("share_of_gain")),
        }
    figures = pd.DataFrame.from_dict(rows, orient="index").to_string()
    return "\n".join([verdict(report), "", figures, *about_reward_model(report["reward_model"])])


def about_reward_model(quality: dict | None) -> list[str]:
    """How good the reward model is, and what is wrong with it or with the pairs that it was measured on."""
    if quality is None:
        return []
    pairs, longer = counted(quality["n_pairs"], "pair"), quality["longer_wins_baseline"]
    lines = [
        f"The reward model orders {estimate(quality['accuracy'])} of {pairs} as they were labelled. Preferring the "
        f"longer response is right on {longer:.2f}."
    ]
    if warning := no_better_than_length(quality["accuracy"]["mean"], longer):
        lines.append(warning)
    if seen := quality["trained_on"]:
        shown = ", ".join(dict.fromkeys(seen[:3])) + (", …" if len(seen) > 3 else "")
        lines.append(
            f"Warning: the reward model was trained on the prompts of {len(seen)} of {pairs} ({shown}), so its "
            "accuracy on them says little. Measure it on prompts that were held out."
        )
    return lines


def log_to_wandb(report: dict, output_dir: str) -> None:
    """The figures as a summary, tables and images of one W&B run in the project WANDB_PROJECT."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "huggingface")
    run = wandb.init(project=project, job_type="evaluation", dir=output_dir)
    run.summary["eval"] = report["policies"]
    logged = {f"eval/{path.stem}": wandb.Image(str(path)) for path in sorted(Path(output_dir).glob("*.png"))}
    for name in ("win_rates", "samples"):
        if report[name]:
            table = pd.DataFrame(report[name]).drop(columns="ci95", errors="ignore")
            logged[f"eval/{name}"] = wandb.Table(dataframe=table)
    run.log(logged)
    run.finish()
