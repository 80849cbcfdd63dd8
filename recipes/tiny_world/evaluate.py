"""Measures the policies and the reward model of a quickstart on held-out prompts, and writes evaluation.json.

    python -m recipes.tiny_world.evaluate --output_dir runs/quickstart --seed 0

One base with one adapter per policy samples at temperature 1 and greedily. Gold and its parts are the judge's; the
proxy reward is the trained reward model's, in the standardised units that PPO optimised; KL is the k1 estimate
`log pi(y|x) - log pi_sft(y|x)` of whole responses, in nats. No choice is made here on held-out prompts.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from statistics import fmean

from trl import ModelConfig

from recipes.cli.run import run
from recipes.evaluation.metrics import kl_k1
from recipes.evaluation.policies import base_of, token_log_probs
from recipes.evaluation.reward_quality import Pair
from recipes.formatting import format_dataset, load_rows
from recipes.models.loading import load_reward_model, read_reward_statistics, score_conversations
from recipes.models.sampling import Response, SamplingArguments, load_generator, sample
from recipes.models.source import resolve_model
from recipes.tiny_world import judge, labeler
from recipes.trainers.fast.drop_finished import DropFinishedSampler

DATA = Path(__file__).parent / "data"
POLICIES = ("base", "sft", "ppo", "ppo_no_kl")
TEMPERATURES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
BATCH_SIZE = 128
SHOWN = 16


def read_prompts(split: str) -> list[list[dict]]:
    return list(format_dataset(load_rows(DATA / f"prompts_{split}.jsonl"), "prompt")[0]["prompt"])


class Policies:
    """The base with the adapters of a quickstart, one policy active at a time."""

    def __init__(self, folder: Path):
        self.model, self.tokenizer = load_generator(ModelConfig(model_name_or_path=str(folder / "sft")))
        self.model.load_adapter(folder / "sft", "sft")
        for name in ("ppo", "ppo_no_kl"):
            self.model.load_adapter(folder / name, name)

    def use(self, name: str):
        """A context in which the model is the policy `name`."""
        if name == "base":
            return self.model.disable_adapter()
        self.model.set_adapter(name, inference_mode=True)
        return nullcontext()

    def sample(self, name: str, prompts: list[list[dict]], sampling: SamplingArguments) -> list[list[Response]]:
        with self.use(name), DropFinishedSampler().installed(base_of(self.model)):
            return sample(self.model, self.tokenizer, prompts, sampling)

    def log_probs(self, name: str, pairs: list[tuple[list[dict], Response]], temperature: float = 1.0) -> list[float]:
        """Log-probability in nats of each response to its prompt, EOS included."""
        return [sum(tokens) for tokens in self.token_log_probs(name, pairs, temperature)]

    def token_log_probs(
        self, name: str, pairs: list[tuple[list[dict], Response]], temperature: float = 1.0
    ) -> list[list[float]]:
        rows = [(prompt, response.token_ids) for prompt, response in pairs]
        with self.use(name):
            return [logps for logps, _ in token_log_probs(self.model, self.tokenizer, rows, temperature, BATCH_SIZE)]

    def kl(self, name: str, pairs: list[tuple[list[dict], Response]], temperature: float = 1.0) -> float:
        """Mean k1 estimate of KL(policy || SFT) per response, in nats; `pairs` are samples of the policy."""
        policy, sft = self.token_log_probs(name, pairs, temperature), self.token_log_probs("sft", pairs)
        return fmean(kl_k1(*logps) for logps in zip(policy, sft, strict=True))


def flat(prompts: list[list[dict]], groups: list[list[Response]]) -> list[tuple[list[dict], Response]]:
    return [(prompt, response) for prompt, group in zip(prompts, groups, strict=True) for response in group]


def judged(pairs: list[tuple[list[dict], Response]]) -> dict[str, float]:
    """Means of gold and its parts."""
    parts = [judge.judge(prompt[-1]["content"], response.text, response.finished) for prompt, response in pairs]
    return {name: fmean(part[name] for part in parts) for name in parts[0]}


def low_temperature(policies: Policies, sampling: SamplingArguments, prompts, kl: float) -> dict:
    """SFT sharpened by a low temperature as far as PPO went from it: what sharpening alone is worth.

    The temperature is the one whose KL, on validation prompts, comes nearest to `kl`.
    """
    validation = read_prompts("validation")
    distances = {}
    for temperature in TEMPERATURES:
        once = replace(sampling, num_generations=1, temperature=temperature)
        pairs = flat(validation, policies.sample("sft", validation, once))
        distances[temperature] = abs(policies.kl("sft", pairs, temperature) - kl)
    temperature = min(distances, key=distances.get)
    pairs = flat(prompts, policies.sample("sft", prompts, replace(sampling, temperature=temperature)))
    return {
        "temperature": temperature,
        "gold": judged(pairs)["gold"],
        "kl": policies.kl("sft", pairs, temperature),
    }


def reward_model_accuracy(
    score: Callable, prompts: list[list[dict]], groups: list[list[Response]], seed: int
) -> dict[str, float]:
    """How often the reward model orders two held-out SFT samples as the labeler did, and as gold does."""
    labelled, by_gold = [], []
    scores = iter(score(flat(prompts, groups)))
    for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        rows = [{"id": str(i), "text": r.text, "finished": r.finished} for i, r in enumerate(group)]
        ranking = labeler.rank({"id": f"heldout-{number}", "prompt": prompt, "responses": rows, "model": "sft"}, seed)
        answers = [
            (
                response,
                next(scores),
                row["rank"],
                judge.judge(prompt[-1]["content"], response.text, response.finished)["gold"],
            )
            for row, response in zip(ranking["responses"], group, strict=True)
        ]
        for (a, score_a, rank_a, gold_a), (b, score_b, rank_b, gold_b) in permutations(answers, 2):
            pair = Pair(str(number), a.text, b.text, score_a, score_b, len(a.token_ids), len(b.token_ids))
            if rank_a < rank_b:
                labelled.append(pair)
            if gold_a > gold_b:
                by_gold.append(pair)
    return {
        "accuracy": fmean(pair.right for pair in labelled),
        "accuracy_on_gold_order": fmean(pair.right for pair in by_gold),
        "longer_wins_baseline": fmean(pair.longer_wins for pair in labelled),
        "n_pairs": len(labelled),
    }


def evaluate(folder: Path, seed: int, num_generations: int = 4, max_completion_length: int = 40) -> dict:
    """The parts of report.json that are measured on held-out prompts."""
    prompts = read_prompts("heldout")
    policies = Policies(folder)
    reward_model, reward_tokenizer = load_reward_model(resolve_model(str(folder / "reward")), ModelConfig())
    statistics = read_reward_statistics(str(folder / "reward"))
    sampling = SamplingArguments(
        num_generations=num_generations,
        top_k=0,
        top_p=1.0,
        max_completion_length=max_completion_length,
        seed=seed,
        generation_batch_size=2 * BATCH_SIZE,
    )

    def score(pairs: list[tuple[list[dict], Response]]) -> list[float]:
        conversations = [prompt + [{"role": "assistant", "content": response.text}] for prompt, response in pairs]
        scores = score_conversations(reward_model, reward_tokenizer, conversations, BATCH_SIZE)
        return [(value - statistics["mean"]) / statistics["std"] for value in scores]

    results, groups = {}, {}
    for name in POLICIES:
        print(f"Sampling {num_generations} responses to {len(prompts)} held-out prompts from {name}", flush=True)
        groups[name] = policies.sample(name, prompts, sampling)
        pairs = flat(prompts, groups[name])
        greedy = policies.sample(name, prompts, replace(sampling, num_generations=1, temperature=0.0))
        results[name] = judged(pairs) | {
            "proxy_reward": fmean(score(pairs)),
            "kl": 0.0 if name == "sft" else policies.kl(name, pairs),
            "length": fmean(len(response.token_ids) for _, response in pairs),
            "gold_greedy": judged(flat(prompts, greedy))["gold"],
            "n": len(pairs),
        }
    print("Sampling SFT at a low temperature", flush=True)
    shown = range(0, len(prompts), max(1, len(prompts) // SHOWN))
    return {
        "policies": results,
        "sft_low_temperature": low_temperature(policies, sampling, prompts, results["ppo"]["kl"]),
        "reward_model": reward_model_accuracy(score, prompts, groups["sft"], seed),
        "samples": [
            {"prompt": prompts[row][-1]["content"]} | {name: groups[name][row][0].text for name in POLICIES}
            for row in shown
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of a quickstart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = evaluate(args.output_dir, args.seed)
    (args.output_dir / "evaluation.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
