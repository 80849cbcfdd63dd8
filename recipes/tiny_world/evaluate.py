"""Measures the policies and the reward model of a quickstart on held-out prompts, and writes evaluation.json.

    python -m recipes.tiny_world.evaluate --output_dir runs/quickstart --seed 0

`recipes.evaluation` measures. Here stand the policies, the prompts, the judges (gold and its parts) and the form of
the result. No choice is made on held-out prompts.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from trl import ModelConfig

from recipes.cli.run import run
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.measure import Evaluation, Measured
from recipes.evaluation.reward_quality import ordering, sampled_pairs
from recipes.evaluation.rewards import RewardModel
from recipes.formatting import format_dataset, load_rows
from recipes.models.sampling import Prompt
from recipes.tiny_world import judge, labeler

DATA = Path(__file__).parent / "data"
POLICIES = ("base", "sft", "ppo", "ppo_no_kl")
TEMPERATURES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
SHOWN = 16


def evaluation(folder: Path, split: str, seed: int) -> Evaluation:
    """The quickstart's policies on the prompts of a split; its parts are kept in the quickstart's folder."""
    paths = {"base": Path(__file__).parent / "base"} | {name: folder / name for name in POLICIES[1:]}
    args = EvaluationArguments(
        policies=[f"{name}={path}" for name, path in paths.items()],
        reward_model_name_or_path=str(folder / "reward"),
        judges=[f"recipes.tiny_world.judge.{name}" for name in judge.REWARD_FUNCTIONS],
        output_dir=str(folder / "measured" / split),
        temperatures=[],
        best_of_n=4,
        num_generations=4,
        max_completion_length=40,
        seed=seed,
        generation_batch_size=256,
        eval_batch_size=128,
    )
    rows = format_dataset(load_rows(DATA / f"prompts_{split}.jsonl"), "prompt")[0]["prompt"]
    prompts = [Prompt(str(number), messages, f"{split} prompt {number}") for number, messages in enumerate(rows)]
    return Evaluation(args, ModelConfig(), prompts, RewardModel(args, ModelConfig()))


def reward_model_accuracy(responses: pd.DataFrame, prompts: list[Prompt], seed: int) -> dict[str, float]:
    """How often the reward model orders two held-out SFT samples as the labeler does, and as gold does."""
    ranks = []
    for prompt, (_, group) in zip(prompts, responses.groupby("prompt"), strict=True):
        texts = zip(group["text"], ~group["truncated"], strict=True)
        rows = [{"id": str(i), "text": text, "finished": finished} for i, (text, finished) in enumerate(texts)]
        line = {"id": f"heldout-{prompt.id}", "prompt": prompt.messages, "responses": rows, "model": "sft"}
        ranks += [response["rank"] for response in labeler.rank(line, seed)["responses"]]
    labelled = ordering(sampled_pairs(responses.assign(quality=[-rank for rank in ranks]), "quality"))
    by_gold = ordering(sampled_pairs(responses, "gold"))
    accuracy = {"accuracy": labelled["accuracy"]["mean"], "accuracy_on_gold_order": by_gold["accuracy"]["mean"]}
    return labelled | accuracy


def means(one: Measured, *columns: str) -> dict[str, float]:
    """Means over a policy's responses, under the names of report.json."""
    return one.responses[list(columns)].mean().rename({"reward": "proxy_reward", "k1": "kl"}).to_dict()


def evaluate(folder: Path, seed: int) -> dict:
    """The parts of report.json that are measured on held-out prompts."""
    heldout = evaluation(folder, "heldout", seed)
    greedy = {spec.name: spec.at(0, 1) for spec in heldout.plan}
    measured = heldout.measure([*heldout.plan, *greedy.values()])
    # SFT at the lower temperature that takes it as far as PPO went: what a lower temperature gains without RL.
    validation, kl = evaluation(folder, "validation", seed), measured["ppo"].k1.mean()
    lower = validation.measure([validation.reference.at(temperature, 1) for temperature in TEMPERATURES]).values()
    temperature = min(lower, key=lambda one: abs(one.k1.mean() - kl)).spec.temperature
    (sharpened,) = heldout.measure([heldout.reference.at(temperature, 4)]).values()
    policies = {
        name: means(measured[name], *judge.REWARD_FUNCTIONS, "reward", "k1", "length")
        | {"gold_greedy": means(measured[spec.name], "gold")["gold"], "n": len(measured[name].responses)}
        for name, spec in greedy.items()
    }
    questions = [prompt.messages[-1]["content"] for prompt in heldout.prompts]
    samples = pd.DataFrame({"prompt": questions, **{name: measured[name].first_texts for name in POLICIES}})
    return {
        "policies": policies,
        "sft_low_temperature": {"temperature": temperature, **means(sharpened, "gold", "k1")},
        "reward_model": reward_model_accuracy(measured["sft"].responses, heldout.prompts, seed),
        "samples": samples[:: max(1, len(samples) // SHOWN)].to_dict("records"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of a quickstart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text = json.dumps(evaluate(args.output_dir, args.seed), indent=2, ensure_ascii=False)
    (args.output_dir / "evaluation.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
