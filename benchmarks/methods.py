"""Is PPO worth it? PPO and what people use instead, from one SFT model, its rankings and one reward model.

    python benchmarks/methods.py --output_dir runs/methods

In the tiny world, where gold, the true quality, is known. The seeds differ in everything from SFT on. PPO is this
project's, GRPO, RLOO and DPO are TRL's; best-of-n and a low temperature need no training. All start from the SFT
model. PPO, GRPO and RLOO sample as many answers and make as many updates; DPO makes as many updates on the ranked
answers. Each has the same number of trials, chosen by gold on validation prompts with the first seed, and is measured
on held-out prompts with every seed.

Every run and every measurement is a file that is not made again: the same line goes on where it stopped. The folder
then holds `methods.json` (every trial, every seed), `methods.md` (the table) and `methods.png`. Run it with
OMP_NUM_THREADS=1: so small a model gains nothing from a second thread.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
import yaml

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when TRL is imported

from matplotlib.figure import Figure  # noqa: E402
from transformers import set_seed  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig, RLOOTrainer  # noqa: E402
from turns import ROOT, environment, resident, rounded  # noqa: E402

from recipes import ppo  # noqa: E402
from recipes.cli.arguments import parse  # noqa: E402
from recipes.cli.errors import UserError  # noqa: E402
from recipes.cli.record import git_revision  # noqa: E402
from recipes.evaluation.frontier import best_of_n, best_of_n_kl_with_ties  # noqa: E402
from recipes.evaluation.metrics import mean_interval  # noqa: E402
from recipes.evaluation.plots import COLORS, error_bars, square_root_axis  # noqa: E402
from recipes.evaluation.policies import PolicySpec  # noqa: E402
from recipes.formatting import format_dataset, load_rows  # noqa: E402
from recipes.models.loading import load_policy  # noqa: E402
from recipes.models.source import resolve_model  # noqa: E402
from recipes.models.tokenization import load_tokenizer  # noqa: E402
from recipes.tiny_world import evaluate, world  # noqa: E402
from recipes.tiny_world.quickstart import PIPELINE, Quickstart, finish  # noqa: E402

CONFIG = ROOT / "recipes" / "configs" / "tiny_world" / "ppo.yaml"  # also TRL's methods take from it what they know
TRL = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig), "DPO": (DPOTrainer, DPOConfig)}
METHODS = ("PPO", *TRL)
COOL, BEST = "SFT, low temperature", "SFT, best of n"
# `beta` is what a nat of KL costs in units of the reward. PPO calls it kl_coef; DPO's is that of a reward in the unit
# of the reward model, whose scores have a standard deviation near 1.
TRIALS = [
    {"beta": 0.1, "learning_rate": 1e-3},
    {"beta": 0.3, "learning_rate": 1e-3},
    {"beta": 0.1, "learning_rate": 3e-4},
]
TEMPERATURES = (0.6, 0.4, 0.2)
BEST_OF = (2, 4, 8, 16)
SEEDS = (0, 1, 2)
GROUP = 4  # answers to a prompt in GRPO and RLOO, which compare them
SAMPLES = {"validation": 8, "heldout": 4}  # answers to a prompt that a policy is measured by
SFT_SAMPLES = 32  # of SFT to a held-out prompt, among which best-of-n finds its best
CLIPPED = 1.0  # what an answer pays that has no end, PPO's missing_eos_penalty


def pipeline(folder: Path, seed: int) -> None:
    """What all methods start from: SFT, samples, rankings and reward model of a quickstart."""
    state = Quickstart(folder, seed)
    for (stage,) in PIPELINE[:4]:
        state.run(stage)


def once(file: Path, job: Callable[..., dict], *args, **kwargs) -> dict:
    """What the job found, in this or an earlier run; it has a process of its own, and its output is in `.log`."""
    if not file.exists():
        print(file.with_suffix(""), flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(
            target=_write, args=(file, partial(job, *args, **kwargs))
        )
        process.start()
        process.join()
        if process.exitcode != 0:
            raise UserError(f"{file} was not made: {file.with_suffix('.log')} says why.")
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, job: Callable[[], dict]) -> None:
    with file.with_suffix(".log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    found = json.dumps(rounded(job(), 4))
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(found + "\n", encoding="utf-8")
    partial_file.replace(file)


def train(method: str, folder: Path, output: Path, seed: int, beta: float, learning_rate: float) -> dict:
    """Train in `output`, and say what it cost: loading and saving count, imports do not."""
    shutil.rmtree(output, ignore_errors=True)  # what a stopped run left
    run_ppo = partial(train_ppo, folder, output, seed, beta, learning_rate)
    samples = run_ppo() if method == "PPO" else train_trl(method, folder, output, seed, beta, learning_rate)
    memory = resident("VmHWM") / 2**20
    return {"cpu_seconds": time.process_time(), "memory_mib": memory, "samples": samples, "commit": git_revision()}


def train_ppo(folder: Path, output: Path, seed: int, beta: float, learning_rate: float) -> int:
    flags = {"model_name_or_path": folder / "sft", "reward_model_name_or_path": folder / "reward", "seed": seed}
    flags |= {"kl_coef": beta, "learning_rate": learning_rate, "output_dir": output, "save_strategy": "no"}
    flags |= {"missing_eos_penalty": CLIPPED}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    args = ppo.main(*parse(ppo.ARGUMENTS, ["--config", str(CONFIG), *words])).args
    return args.generation_batch_size * args.max_steps // args.steps_per_generation // args.num_iterations


def train_trl(method: str, folder: Path, output: Path, seed: int, beta: float, learning_rate: float) -> int:
    trainer_class, config_class = TRL[method]
    known = {field.name for field in fields(config_class)}
    values = {name: value for name, value in yaml.safe_load(CONFIG.read_text("utf-8")).items() if name in known}
    values |= {"output_dir": str(output), "seed": seed, "beta": beta, "learning_rate": learning_rate}
    values |= {"save_strategy": "no", "disable_tqdm": True}
    source = resolve_model(str(folder / "sft"))
    tokenizer = load_tokenizer(source)
    if method == "DPO":
        data, task, extra = folder / "rankings.jsonl", "preference", {}
    else:
        data, task, extra = evaluate.DATA / "prompts_train.jsonl", "prompt", {"reward_funcs": reward_function(folder)}
        values["num_generations"] = GROUP
    dataset, _ = format_dataset(load_rows(str(data)), task)
    set_seed(seed)
    model = load_policy(source, ModelConfig(use_peft=True))
    args = config_class(**values)
    trainer = trainer_class(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **extra)
    trainer.train()
    trainer.model.save_pretrained(output, selected_adapters=["default"])
    tokenizer.save_pretrained(output)
    if method == "DPO":
        return 0  # it samples nothing beyond the ranked answers
    return args.generation_batch_size * args.max_steps // args.steps_per_generation // args.num_iterations


def reward_function(folder: Path) -> Callable[..., list[float]]:
    """PPO's reward without its KL, as a reward function of TRL: standardised scores, less where the end is missing."""
    reward = evaluate.evaluation(folder, "validation", seed=0).reward

    def proxy(prompts, completions, completion_ids, **_) -> list[float]:
        raw = reward.raw_scores([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        ended = [ids[-1] == world.END_TOKEN_ID for ids in completion_ids]
        return [
            (score - reward.mean) / reward.std - CLIPPED * (not end) for score, end in zip(raw, ended, strict=True)
        ]

    return proxy


def measure(folder: Path, split: str, path: Path, name: str, samples: int, temperature: float = 1.0) -> dict:
    """Gold, proxy reward and KL to SFT, in nats, of each sample, (prompts, samples); gold of greedy answers."""
    spec = PolicySpec(name, str(path), samples, temperature)
    found = evaluate.evaluation(folder, split, seed=0).measure([spec, spec.at(0, 1)])
    sampled, greedy = found.values()
    one = {"gold": sampled.scores["gold"], "proxy": sampled.reward, "kl": sampled.k1, "greedy": greedy.scores["gold"]}
    return {key: values.tolist() for key, values in one.items()}


def best_of(found: dict, n: int) -> dict:
    """What the best of n answers would be, (prompts, 1), from a measurement of SFT."""
    gold, proxy = np.array(found["gold"]), np.array(found["proxy"])
    best = {"gold": best_of_n(proxy, n, gold), "proxy": best_of_n(proxy, n), "kl": best_of_n_kl_with_ties(proxy, n)}
    return {key: values[:, None] for key, values in best.items()}


def summary(found: list[dict]) -> dict:
    """Means over all seeds with 95 % intervals over prompts, and the mean of each seed."""
    return {
        key: mean_interval(np.concatenate([one[key] for one in found], axis=1))
        | {"seeds": [float(np.mean(one[key])) for one in found]}
        for key in found[0]
    }


def make(output_dir: Path) -> None:
    """All runs and measurements, then the file with every trial, the table and the picture."""
    folders = {seed: output_dir / f"seed{seed}" for seed in SEEDS}
    for seed, folder in folders.items():
        pipeline(folder, seed)

    def trained(method: str, trial: dict, seed: int) -> tuple[Path, dict]:
        name = f"{method}_beta{trial['beta']:g}_lr{trial['learning_rate']:g}"
        output = folders[seed] / "methods" / name
        return output, once(output.with_name(f"{name}.json"), train, method, folders[seed], output, seed, **trial)

    def measured(split: str, seed: int, path: Path, name: str, samples: int = 0, temperature: float = 1.0) -> dict:
        file = folders[seed] / "methods" / f"{name}_{split}.json"
        return once(file, measure, folders[seed], split, path, name, samples or SAMPLES[split], temperature)

    def cooled(split: str, seed: int, temperature: float) -> dict:
        return measured(split, seed, folders[seed] / "sft", f"SFT_T{temperature:g}", temperature=temperature)

    trials = []
    for temperature in TEMPERATURES:
        found = cooled("validation", SEEDS[0], temperature)
        trials.append({"method": COOL, "setting": {"temperature": temperature}, **summary([found])})
    for method in METHODS:
        for trial in TRIALS:
            path, cost = trained(method, trial, SEEDS[0])
            found = measured("validation", SEEDS[0], path, path.name)
            trials.append({"method": method, "setting": trial, **summary([found]), "cost": cost})
    ranked = sorted(trials, key=lambda trial: trial["gold"]["mean"])
    chosen = {trial["method"]: trial["setting"] for trial in ranked}  # the last of each, which has most gold

    sft = [measured("heldout", seed, folders[seed] / "sft", "SFT", SFT_SAMPLES) for seed in SEEDS]
    rows = [{"method": "SFT", "setting": {}, **summary(sft)}]
    for temperature in TEMPERATURES:  # all of them, for the picture
        found = [cooled("heldout", seed, temperature) for seed in SEEDS]
        rows.append({"method": COOL, "setting": {"temperature": temperature}, **summary(found)})
    for n in (n for n in BEST_OF if n <= SFT_SAMPLES):
        rows.append({"method": BEST, "setting": {"n": n}, **summary([best_of(one, n) for one in sft])})
    for method in METHODS:
        runs = [trained(method, chosen[method], seed) for seed in SEEDS]
        found = [measured("heldout", seed, path, path.name) for seed, (path, _) in zip(SEEDS, runs, strict=True)]
        rows.append(
            {"method": method, "setting": chosen[method], **summary(found), "costs": [cost for _, cost in runs]}
        )

    result = {**environment(), "chosen": chosen, "trials": trials, "heldout": rows}
    (output_dir / "methods.json").write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    (output_dir / "methods.md").write_text(tables(trials, rows, chosen), encoding="utf-8")
    figure(rows).savefig(output_dir / "methods.png", dpi=150, bbox_inches="tight")
    print(f"\n{tables(trials, rows, chosen)}\n{output_dir}: methods.json, methods.md and methods.png")


def words(setting: dict) -> str:
    names = {"learning_rate": "rate", "temperature": "T"}
    return ", ".join(f"{names.get(name, name)} {value:g}" for name, value in setting.items())


def number(found: dict | None, digits: int = 2, interval: bool = False) -> str:
    if found is None:
        return "–"
    low, high = found["ci95"]
    return f"{found['mean']:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if interval else "")


def tables(trials: list[dict], rows: list[dict], chosen: dict[str, dict]) -> str:
    """The held-out results of what was chosen and the validation results of every trial, in Markdown."""
    lines = ["| method | setting | gold | gold, each seed | gold, greedy | proxy reward | KL | CPU s | memory, MiB |"]
    lines.append("|" + " --- |" * 9)
    for row in rows:
        if row["setting"] != chosen.get(row["method"], row["setting"]):
            continue
        costs = row.get("costs")
        spent = [
            f"{fmean(cost[name] for cost in costs):.0f}" if costs else "–" for name in ("cpu_seconds", "memory_mib")
        ]
        seeds = ", ".join(f"{mean:.2f}" for mean in row["gold"]["seeds"])
        cells = [row["method"], words(row["setting"]), number(row["gold"], interval=True), seeds]
        cells += [number(row.get("greedy")), number(row["proxy"], interval=True), number(row["kl"], interval=True)]
        lines.append(f"| {' | '.join([*cells, *spent])} |")
    lines += ["", "| method | trial | gold, validation | proxy reward | KL | CPU s |", "|" + " --- |" * 6]
    for trial in trials:
        setting = (
            f"**{words(trial['setting'])}**"
            if trial["setting"] == chosen[trial["method"]]
            else words(trial["setting"])
        )
        cells = [
            trial["method"],
            setting,
            number(trial["gold"], 3, interval=True),
            number(trial["proxy"]),
            number(trial["kl"]),
        ]
        lines.append(
            f"| {' | '.join(cells)} | {trial['cost']['cpu_seconds']:.0f} |"
            if "cost" in trial
            else f"| {' | '.join(cells)} | – |"
        )
    return "\n".join(lines) + "\n"


def figure(rows: list[dict]) -> Figure:
    """Gold against KL on held-out prompts: a point for each trained method, lines for what needs no training."""
    drawing, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    start = next(row for row in rows if row["method"] == "SFT")
    for color, method in zip(COLORS, (COOL, BEST, *METHODS), strict=False):
        own = [row for row in rows if row["method"] == method]
        line = [start, *own] if method in (COOL, BEST) else own
        kl, gold = ([row[key] for row in line] for key in ("kl", "gold"))
        axes.errorbar(
            [one["mean"] for one in kl],
            [one["mean"] for one in gold],
            xerr=error_bars(kl),
            yerr=error_bars(gold),
            fmt="s--" if method in (COOL, BEST) else "o",
            color=color,
            markersize=4 if method in (COOL, BEST) else 8,
            linewidth=1,
            label=method,
        )
        for row in own:
            if method in (COOL, BEST):
                text = words(row["setting"]).replace(" ", " = ")
                place = (row["kl"]["mean"], row["gold"]["mean"])
                axes.annotate(text, place, textcoords="offset points", xytext=(4, -10), fontsize=7, color=color)
    axes.plot(start["kl"]["mean"], start["gold"]["mean"], "k*", markersize=12, label="SFT")
    square_root_axis(axes, "KL to SFT, nats per answer")
    axes.set_ylabel("gold, held-out prompts, sampled at temperature 1 (but where T stands)")
    axes.legend(fontsize=8)
    return drawing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs; the same one goes on")
    return finish(partial(make, parser.parse_args().output_dir.resolve()))


if __name__ == "__main__":
    sys.exit(main())
