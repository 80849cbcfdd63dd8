"""Is PPO worth it? PPO and what people use instead, from one SFT model, its rankings and one reward model.

    python -m benchmarks.methods --output_dir runs/methods

In the tiny world, where gold, the true quality, is known. PPO is this project's, GRPO, RLOO and DPO are TRL's; best of
n and a low temperature train nothing. All make as many updates, of as many answers: PPO, GRPO and RLOO sample them and
use each twice, DPO takes pairs of the ranked ones. Each has the same number of trials, of which gold on validation
prompts chooses one with the first seed. That one is measured on held-out prompts with every seed, and seeds differ in
all from SFT on.

Every run and every measurement is a file that is not made again: the same line goes on where it stopped. The folder
then holds `methods.json` (every trial and seed), `methods.md` (the tables) and `methods.png`. Set OMP_NUM_THREADS=1:
a model so small gains nothing from a second thread.
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

import numpy as np
import yaml
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig, RLOOTrainer

from benchmarks.turns import ROOT, environment, resident, rounded
from recipes import ppo
from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from recipes.cli.record import git_revision
from recipes.evaluation.frontier import best_of_n, best_of_n_kl_with_ties
from recipes.evaluation.metrics import mean_interval
from recipes.evaluation.plots import COLORS, error_bars, plt
from recipes.evaluation.policies import PolicySpec
from recipes.formatting import format_dataset, load_rows
from recipes.models.loading import load_policy
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer
from recipes.tiny_world import evaluate, world
from recipes.tiny_world.quickstart import PIPELINE, Quickstart, finish

CONFIG = ROOT / "recipes" / "configs" / "tiny_world" / "ppo.yaml"  # TRL's trainers take from it what they know
TRL = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig), "DPO": (DPOTrainer, DPOConfig)}
TRAINED = ("PPO", *TRL)
COOL, BEST = "SFT, low temperature", "SFT, best of n"
# `beta` is the price of a nat of KL; PPO calls it kl_coef. DPO's is in the reward model's own unit, which in this
# world is near the standard deviation that the others divide by.
TRIALS = [{"beta": 0.1, "learning_rate": 1e-3}, {"beta": 0.3, "learning_rate": 1e-3}]
TEMPERATURES = (0.6, 0.4, 0.2)
BEST_OF = (2, 4, 8, 16)
GROUP = 4  # answers to a prompt in GRPO and RLOO, which compare them
MEASURED = {"validation": 4, "heldout": 3}  # answers to a prompt that a policy is measured by
POOL = 16  # answers of SFT to a prompt among which best of n finds its best
MEANS = ("gold", "greedy", "proxy", "kl")
NO_END = 1.0  # what an answer without an end pays: PPO's missing_eos_penalty


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
        work = partial(write, file, partial(job, *args, **kwargs))
        process = multiprocessing.get_context("fork").Process(target=work)  # libraries are imported once
        process.start()
        process.join()
        if process.exitcode != 0:
            raise UserError(f"{file} was not made: {file.with_suffix('.log')} says why.")
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, job: Callable[[], dict]) -> None:
    """Run a job in a process of its own, which then ends: its output goes to a log, and so does its traceback."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.stdout = sys.stderr = log = file.with_suffix(".log").open("w", encoding="utf-8")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    unfinished = file.with_suffix(".partial")
    unfinished.write_text(json.dumps(rounded(job(), 4)) + "\n", encoding="utf-8")
    unfinished.replace(file)


def train(method: str, folder: Path, output: Path, seed: int, beta: float, learning_rate: float) -> dict:
    """Train a method from the models in `folder`, and say what it cost: loading and saving count, imports do not."""
    shutil.rmtree(output, ignore_errors=True)  # what a stopped run left
    shared = {"output_dir": str(output), "seed": seed, "learning_rate": learning_rate, "save_strategy": "no"}
    args = train_ppo(folder, beta, shared) if method == "PPO" else train_trl(method, folder, beta, shared)
    rollouts = 0 if method == "DPO" else args.max_steps // (args.steps_per_generation * args.num_iterations)
    return {
        "cpu_seconds": time.process_time(),
        "memory_mib": resident("VmHWM") / 2**20,  # libraries included
        "samples": rollouts and rollouts * args.generation_batch_size,  # beside the ranked ones
        "commit": git_revision(),
    }


def train_ppo(folder: Path, beta: float, shared: dict):
    flags = {"model_name_or_path": folder / "sft", "reward_model_name_or_path": folder / "reward", "kl_coef": beta}
    flags |= {"dataset_name": evaluate.DATA / "prompts_train.jsonl", "missing_eos_penalty": NO_END, **shared}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ppo.main(*parse(ppo.ARGUMENTS, ["--config", str(CONFIG), *words])).args


def train_trl(method: str, folder: Path, beta: float, shared: dict):
    trainer_class, config_class = TRL[method]
    known = {field.name for field in fields(config_class)}
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name in known} | shared | {"beta": beta}
    if method == "DPO":
        task, data, rewards = "preference", folder / "rankings.jsonl", {}
        config["per_device_train_batch_size"] //= 2  # a pair is two answers
    else:
        task, data = "prompt", evaluate.DATA / "prompts_train.jsonl"
        rewards, config["num_generations"] = {"reward_funcs": reward_function(folder)}, GROUP
    dataset, _ = format_dataset(load_rows(str(data)), task)
    set_seed(shared["seed"])
    source = resolve_model(str(folder / "sft"))
    model, tokenizer = load_policy(source, ModelConfig(use_peft=True)), load_tokenizer(source)
    args = config_class(**config)
    trainer = trainer_class(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **rewards)
    trainer.train()
    trainer.model.save_pretrained(args.output_dir, selected_adapters=["default"])
    tokenizer.save_pretrained(args.output_dir)
    return args


def reward_function(folder: Path) -> Callable[..., list[float]]:
    """PPO's reward without its KL, for TRL: standardised scores, less where the end is missing."""
    model = evaluate.evaluation(folder, "validation", seed=0).reward

    def proxy(prompts, completions, completion_ids, **_) -> list[float]:
        raw = model.raw_scores([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        missing = [NO_END * (ids[-1] != world.END_TOKEN_ID) for ids in completion_ids]
        return [(score - model.mean) / model.std - price for score, price in zip(raw, missing, strict=True)]

    return proxy


def measure(folder: Path, split: str, path: Path, name: str, samples: int, temperature: float) -> dict:
    """Gold, proxy reward and KL to SFT, in nats, of each sample, (prompts, samples); gold of greedy answers."""
    spec = PolicySpec(name, str(path), samples, temperature)
    sampled, greedy = evaluate.evaluation(folder, split, seed=0).measure([spec, spec.at(0, 1)]).values()
    scores = {"gold": sampled.scores["gold"], "greedy": greedy.scores["gold"], "proxy": sampled.scores["reward"]}
    return {key: values.tolist() for key, values in (scores | {"kl": sampled.k1}).items()}


def best_of(found: dict, n: int) -> dict:
    """What the best of n answers would be, (prompts, 1), from a measurement of SFT."""
    gold, proxy = np.array(found["gold"]), np.array(found["proxy"])
    best = {"gold": best_of_n(proxy, n, gold), "proxy": best_of_n(proxy, n), "kl": best_of_n_kl_with_ties(proxy, n)}
    return {key: values[:, None] for key, values in best.items()}


def row(method: str, setting: dict, found: list[dict], costs: list[dict] = ()) -> dict:
    """Means over all seeds with 95 % intervals over prompts, and the mean of each seed."""
    means = {
        key: mean_interval(np.concatenate([one[key] for one in found], axis=1))
        | {"seeds": [float(np.mean(one[key])) for one in found]}
        for key in found[0]
    }
    return {"method": method, "setting": setting, **means, "costs": list(costs)}


def make(output_dir: Path, seeds: list[int]) -> None:
    """All runs and measurements, then the file with every trial, the tables and the picture."""
    folders = {seed: output_dir / f"seed{seed}" for seed in seeds}
    for seed, folder in folders.items():
        pipeline(folder, seed)

    def untrained(split: str, seed: int, name: str, temperature: float = 1.0, samples: int = 0) -> dict:
        file, path = folders[seed] / "methods" / f"{name}_{split}.json", folders[seed] / "sft"
        return once(file, measure, folders[seed], split, path, name, samples or MEASURED[split], temperature)

    def trained(split: str, seed: int, method: str, trial: dict) -> tuple[dict, dict]:
        path = folders[seed] / "methods" / f"{method}_beta{trial['beta']:g}_lr{trial['learning_rate']:g}"
        cost = once(path.with_name(f"{path.name}.json"), train, method, folders[seed], path, seed, **trial)
        file = path.with_name(f"{path.name}_{split}.json")
        return once(file, measure, folders[seed], split, path, path.name, MEASURED[split], 1.0), cost

    trials = []
    for temperature in TEMPERATURES:
        found = untrained("validation", seeds[0], f"SFT_T{temperature:g}", temperature)
        trials.append(row(COOL, {"temperature": temperature}, [found]))
    for trial in TRIALS:
        for method in TRAINED:
            found, cost = trained("validation", seeds[0], method, trial)
            trials.append(row(method, trial, [found], [cost]))
    best = {trial["method"]: trial["setting"] for trial in sorted(trials, key=lambda trial: trial["gold"]["mean"])}
    report(output_dir, trials, [])  # so that there is something to look at

    pool = [untrained("heldout", seed, "SFT", samples=POOL) for seed in seeds]
    rows = [row("SFT", {}, pool)]
    found = [untrained("heldout", seed, "SFT_low", best[COOL]["temperature"]) for seed in seeds]
    rows.append(row(COOL, best[COOL], found))
    rows += [row(BEST, {"n": n}, [best_of(one, n) for one in pool]) for n in BEST_OF if n <= POOL]
    for method in TRAINED:
        found, costs = zip(*[trained("heldout", seed, method, best[method]) for seed in seeds], strict=True)
        rows.append(row(method, best[method], found, costs))

    report(output_dir, trials, rows)
    print(f"\n{table(rows)}\nIn {output_dir}: methods.json, methods.md, methods.png")


def report(output_dir: Path, trials: list[dict], rows: list[dict]) -> None:
    """Write the figures, the tables, and the picture of the held-out rows, or of the trials where there are none."""
    result = rounded({**environment(), "trials": trials, "heldout": rows})
    (output_dir / "methods.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    trials = sorted(trials, key=lambda trial: (COOL, *TRAINED).index(trial["method"]))
    text = "\n".join(table(part) for part in (rows, trials) if part)
    (output_dir / "methods.md").write_text(text, encoding="utf-8")
    draw(rows or trials, output_dir / "methods.png")


def words(setting: dict) -> str:
    short = {"learning_rate": "rate", "temperature": "T"}
    return ", ".join(f"{short.get(name, name)} {value:g}" for name, value in setting.items())


def table(rows: list[dict]) -> str:
    """Rows in Markdown: means with 95 % intervals over prompts, and costs, the mean of a run."""
    lines = ["| method | setting | gold | each seed | gold, greedy | proxy reward | KL | CPU s | MiB | samples |"]
    lines.append("|" + " --- |" * 10)
    for one in rows:
        cells = [one["method"], words(one["setting"])]
        form = "{mean:.2f} [{ci95[0]:.2f}, {ci95[1]:.2f}]"
        cells += [form.format(**one[key]) if key in one else "" for key in MEANS]
        cells.insert(3, ", ".join(f"{mean:.2f}" for mean in one["gold"]["seeds"]))
        for name in ("cpu_seconds", "memory_mib", "samples"):
            cells.append(f"{fmean(cost[name] for cost in one['costs']):.0f}" if one["costs"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], file: Path) -> None:
    """Gold against KL, of sampled and of greedy answers: a line through what was measured of each method."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharey=True)
    for axes, key, title in zip(panels, ("gold", "greedy"), ("sampled", "the same policies, greedy"), strict=True):
        for color, method in zip(COLORS, (BEST, COOL, *TRAINED), strict=False):
            own = [one for one in rows if one["method"] == method and key in one]
            if not own or (method == COOL and key == "greedy"):  # greedy, every temperature is the same
                continue
            line = own if method in TRAINED else [one for one in rows if one["method"] == "SFT"] + own
            values = {name: [one[name] for one in line] for name in ("kl", key)}
            places = [[one["mean"] for one in found] for found in values.values()]
            look = {"fmt": "o-" if method in TRAINED else "s--", "markersize": 5, "linewidth": 1, "color": color}
            axes.errorbar(*places, xerr=error_bars(values["kl"]), yerr=error_bars(values[key]), label=method, **look)
            for one in own if method not in TRAINED else []:
                place = (one["kl"]["mean"], one[key]["mean"])
                text = words(one["setting"])
                axes.annotate(text, place, xytext=(4, 5), textcoords="offset points", fontsize=7, color=color)
        untrained = next(one for one in rows if one["method"] in ("SFT", COOL))["greedy"]["mean"]
        axes.axhline(untrained, color="black", linewidth=1, linestyle=":", label="SFT, greedy")
        axes.set(xlabel="KL to SFT when sampled, nats per answer")
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("gold")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs; the same one goes on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of whole pipelines; the first tunes")
    args = parser.parse_args()
    return finish(partial(make, args.output_dir.resolve(), args.seeds))


if __name__ == "__main__":
    sys.exit(main())
