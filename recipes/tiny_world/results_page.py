"""Writes docs/results.md from evaluations of several seeds: tables, two figures, and the commit they come from."""

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import yaml

from recipes.cli.run import git_revision
from recipes.evaluation.frontier import ENOUGH
from recipes.evaluation.plots import draw_over_optimization, draw_reward_kl, plt
from recipes.evaluation.report import estimate
from recipes.tiny_world.report import NAMES


def write_page(folders: list[Path], command: str, output: Path) -> None:
    """Write the page to `output`, and its figures to `images` beside it."""
    reports = [read_report(folder) for folder in folders]
    images = output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw(reports, images)
    output.write_text(page(reports, command), encoding="utf-8")


def read_report(folder: Path) -> dict:
    """The report of a run's evaluation, with its quickstart's own, and in `commits` what trained and evaluated it."""
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    quickstart = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    configs = [path for path in folder.rglob("train_config.yaml") if ".stopped" not in str(path)]
    commits = {yaml.safe_load(path.read_text(encoding="utf-8"))["git_revision"] for path in configs}
    own = {"seed": quickstart["seed"], "quickstart": quickstart, "commits": {*commits, report["git_revision"]}}
    return report | own


def draw(reports: list[dict], folder: Path) -> None:
    """A column of plots for each seed."""
    figure, panels = plt.subplots(
        1, len(reports), figsize=(5 * len(reports), 4.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, report in zip(panels[0], reports, strict=True):
        draw_reward_kl(axes, report)
        axes.set_title(f"seed {report['seed']}")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, 2 * len(reports)),
        fontsize=8,
    )
    figure.savefig(folder / "results_reward_kl.png", dpi=110)
    plt.close(figure)

    figure, panels = plt.subplots(
        2, len(reports), figsize=(5 * len(reports), 6.6), squeeze=False, sharey="row", layout="constrained"
    )
    for report, column in zip(reports, panels.T, strict=True):
        draw_over_optimization(column, report)
        column[0].set_title(f"seed {report['seed']}: reward (the proxy)", fontsize=10)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(6, 3 * len(reports)),
        fontsize=8,
    )
    figure.savefig(folder / "results_over_optimization.png", dpi=110)
    plt.close(figure)


def page(reports: list[dict], command: str) -> str:
    """The page in Markdown. Bold is the mean over the seeds, in brackets the lowest and the highest seed."""
    commits = ", ".join(sorted({f"`{commit}`" for report in reports for commit in report["commits"]}))
    seeds = ", ".join(str(report["seed"]) for report in reports)
    first = reports[0]
    per_prompt = first["policies"]["sft"]["n"] // first["n_prompts"]
    return f"""# Results

Made by `{command}`,
a page of commit `{git_revision()}`; the commit that trained and evaluated: {commits}.

The tiny world, seeds {seeds}: the quickstart of each, PPO at several `kl_coef`, and `scripts/evaluate.py` on
{first["n_prompts"]} held-out prompts at temperature {first["temperature"]:g}.

- *Gold* is the true quality, from 0 to 1, that no training step sees.
- The *reward* is the reward model's, in {first["reward_unit"]}.
- KL is measured from SFT, in nats per response.
- Square brackets are 95 % intervals over prompts. **Bold** is the mean over the seeds, with the lowest
  and the highest seed.

## Gold by stage

{by_stage(reports)}

## Who wins

Share of pairs of answers to the same prompt that the first policy wins; ties count half.

{win_rates(reports)}

## The reward model

On held-out pairs of SFT's answers, ordered by the simulated labeler; the last columns ask for the order of gold, and
how far "this sure" is from "this often right".

{reward_models(reports)}

## What PPO reaches of what is possible

![Reward against KL, one panel a seed](images/results_reward_kl.png)

{shares(reports)}

The grey curve is the highest reward that any policy can have at a KL, the reference tilted by exp(reward / beta),
estimated from {per_prompt} samples of SFT a prompt; the *effective samples* are how many of them carry it, and it is
dotted where they are fewer than {ENOUGH:g}. *≤* marks a policy further from SFT than that estimate reaches: the curve
is too low there, and the share an upper bound.

Part of what RL gains is sharpening, becoming surer of what the policy would have said anyway. SFT alone, sampled at
lower temperatures:

{sharpening(reports)}

## Over-optimisation

![Reward and gold against KL, one column a seed](images/results_over_optimization.png)

PPO at each `kl_coef`, at its end; the most gold on the way is of a checkpoint chosen on these very prompts:

{sweep(reports)}

Dashed: gain = d (α − β log d) with d = √KL, fitted to all checkpoints of a seed; dotted: d (α − β d), fitted to
best-of-n (Gao et al. 2022, arXiv 2210.10760).

{fits(reports)}
"""


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def over_seeds(values: list[float], digits: int = 2) -> str:
    return f"**{fmean(values):.{digits}f}** ({min(values):.{digits}f} to {max(values):.{digits}f})"


def by_stage(reports: list[dict]) -> str:
    rows = []
    for name in reports[0]["policies"]:
        found = [report["policies"][name] for report in reports]
        means = {key: [one[key]["mean"] for one in found] for key in ("gold", "reward", "length", "truncated")}
        greedy = [report["quickstart"]["policies"][name]["gold_greedy"] for report in reports]
        gold, reward, length, cut = (over_seeds(values) for values in means.values())
        kl = over_seeds([one["kl"]["k1"]["mean"] for one in found])
        rows.append(
            [NAMES[name], gold, *(estimate(one["gold"]) for one in found), over_seeds(greedy), reward, kl, length, cut]
        )
    seeds = [f"gold, seed {report['seed']}" for report in reports]
    return table(["policy", "gold", *seeds, "gold, greedy", "reward", "KL", "tokens", "cut off"], rows)


def win_rates(reports: list[dict]) -> str:
    wanted = [("sft", "base"), ("ppo", "sft"), ("ppo", "base"), ("ppo_no_kl", "ppo")]
    rows = []
    for a, b in wanted:
        for judge in ("gold", "reward_model"):
            found = [
                row
                for report in reports
                for row in report["win_rates"]
                if (row["a"], row["b"], row["judge"]) == (a, b, judge)
            ]
            cells = [estimate({"mean": row["win_rate"], "ci95": row["ci95"]}) for row in found]
            mean = over_seeds([row["win_rate"] for row in found])
            rows.append([f"{NAMES[a]} against {NAMES[b]}", judge.replace("_", " "), mean, *cells])
    return table(["", "judge", "win + tie / 2", *(f"seed {report['seed']}" for report in reports)], rows)


def reward_models(reports: list[dict]) -> str:
    rows = []
    for report in reports:
        quality, own = report["reward_model"], report["quickstart"]["reward_model"]
        figures = [quality["n_pairs"], estimate(quality["accuracy"]), f"{quality['longer_wins_baseline']:.2f}"]
        figures += [f"{own['accuracy_on_gold_order']:.2f}", f"{quality['calibration']['error']:.2f}"]
        rows.append([report["seed"], *figures])
    return table(["seed", "pairs", "accuracy", "longer wins", "accuracy, gold's order", "calibration error"], rows)


def shares(reports: list[dict]) -> str:
    """PPO's share of the possible gain, and its distance from best-of-n."""
    rows = []
    for report in reports:
        ppo = report["policies"]["ppo"]
        share, bon = ppo["share_of_gain"], ppo["gain_over_best_of_n"]
        rows.append(
            [
                report["seed"],
                f"{ppo['kl']['k1']['mean']:.2f}",
                ("≤ " if share["beyond"] else "") + estimate(share),
                f"{share['effective_samples']:.1f}",
                estimate(bon) if bon else "no n has that KL",
            ]
        )
    found = over_seeds([report["policies"]["ppo"]["share_of_gain"]["mean"] for report in reports])
    head = ["seed", "PPO's KL", "share of the possible gain", "effective samples"]
    head.append("reward minus best-of-n's at equal KL")
    longer = [
        f"{share_of_gain(reports, last)} after {last[0]['step']} updates at `kl_coef` {run.removeprefix('kl_')}"
        for run, last in ends(reports).items()
        if not beyond(reports, last)
    ]
    told = f"\n\nThat is a short run; in the table at the end it is {', '.join(longer)}." if longer else ""
    return f"PPO gains {found} of the possible reward at its KL.\n\n{table(head, rows)}{told}"


def ends(reports: list[dict]) -> dict[str, list[dict]]:
    """The last checkpoint of each run of the sweep, one of each seed."""
    last = [{row["run"]: row for row in report["frontier"]["checkpoints"]} for report in reports]
    return {run: [rows[run] for rows in last] for run in last[0]}


def beyond(reports: list[dict], points: list[dict]) -> bool:
    """Whether a seed's point is further from SFT than the estimate of the best possible reward reaches."""
    reach = [max(point["kl"] for point in report["frontier"]["optimal"]) for report in reports]
    return any(point["kl"] > limit for point, limit in zip(points, reach, strict=True))


def effective_samples(reports: list[dict], points: list[dict]) -> str:
    """How many samples carry the estimate of the best possible reward at the KL of each seed's point."""
    found = []
    for report, point in zip(reports, points, strict=True):
        curve = sorted((best["kl"], best["effective_samples"]) for best in report["frontier"]["optimal"])
        found.append(float(np.interp(point["kl"], *zip(*curve, strict=True))))
    return f"{min(found):.1f} to {max(found):.1f}"


def share_of_gain(reports: list[dict], points: list[dict]) -> str:
    return ("≤ " if beyond(reports, points) else "") + over_seeds([point["share_of_gain"] for point in points])


def sharpening(reports: list[dict]) -> str:
    rows = []
    for points in zip(*(report["frontier"]["sharpening"] for report in reports), strict=True):
        figures = [over_seeds([point[key] for point in points]) for key in ("kl", "reward", "gold")]
        rows.append([f"{points[0]['temperature']:g}", *figures])
    return table(["temperature", "KL", "reward", "gold"], rows)


def sweep(reports: list[dict]) -> str:
    rows = []
    for run, last in ends(reports).items():
        curves = [[row for row in report["frontier"]["checkpoints"] if row["run"] == run] for report in reports]
        most = [max(curve, key=lambda row: row["gold"]) for curve in curves]
        kl, reward, gold = (over_seeds([point[key] for point in last]) for key in ("kl", "reward", "gold"))
        peak = f"{over_seeds([point['gold'] for point in most])} at KL {fmean(point['kl'] for point in most):.1f}"
        share, samples = share_of_gain(reports, last), effective_samples(reports, last)
        rows.append([run.removeprefix("kl_"), last[0]["step"], kl, reward, share, samples, gold, peak])
    head = ["kl_coef", "updates", "KL", "reward", "share of gain", "effective samples", "gold", "most gold on the way"]
    return table(head, rows)


def fits(reports: list[dict]) -> str:
    rows = []
    for report in reports:
        for name, forms in report["over_optimization"]["fits"].items():
            cells = [f"{forms[form][key]:.3f}" for form in ("rl", "bon") for key in ("alpha", "beta", "residual")]
            rows.append([report["seed"], name, *cells])
    head = ["PPO α", "PPO β", "rms error", "best-of-n α", "best-of-n β", "rms error"]
    return table(["seed", "", *head], rows)
