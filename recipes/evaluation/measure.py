"""Measures policies on prompts: each is sampled once and scored once.

One model is in memory at a time: first each policy samples, then the reference gives its log-probabilities of all
samples, then the reward model scores them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from trl import ModelConfig

from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.judges import judge_scores
from recipes.evaluation.metrics import kl_k1, kl_k3
from recipes.evaluation.parts import Parts, fingerprint, identity
from recipes.evaluation.policies import Conversation, Sample, Sampled, draw_samples, same_vocabulary, token_log_probs
from recipes.evaluation.rewards import RewardModel
from recipes.models.sampling import Prompt, SamplingArguments, check_lengths, load_generator
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer


@dataclass(frozen=True)
class Measured:
    """What is known of the samples of one policy, as arrays (prompts, responses).

    Args:
        k1, k3: estimates of KL to the reference per response, in nats; `None` where the vocabularies differ.
        reward: the reward model's. scores: each Python judge's, by name.
    """

    spec: Sampled
    samples: list[list[Sample]]
    k1: np.ndarray | None
    k3: np.ndarray | None
    reward: np.ndarray
    scores: dict[str, np.ndarray]

    def each(self, what: Callable[[Sample], float]) -> np.ndarray:
        return np.array([[what(sample) for sample in group] for group in self.samples], dtype=np.float64)

    def values(self) -> dict[str, np.ndarray]:
        """The reward and the judges' scores by name."""
        return {"reward": self.reward} | self.scores


class Evaluation:
    """Policies on prompts, with the parts of it that are on disk."""

    def __init__(self, args: EvaluationArguments, model_args: ModelConfig, prompts: list[Prompt], reward: RewardModel):
        self.args, self.model_args, self.reward = args, model_args, reward
        self.prompts = prompts
        self.conversations: list[Conversation] = [prompt.messages for prompt in prompts]
        self.parts = Parts(args.output_dir)
        self.common = {
            "prompts": fingerprint(self.conversations),
            "max_completion_length": args.max_completion_length,
            "seed": args.seed,
            "generation_batch_size": args.generation_batch_size,
        }
        self.loaded: tuple = (None, None, None)

    def measure(self) -> dict[str, Measured]:
        """Everything of `EvaluationArguments.plan`, by name and in its order."""
        plan = self.args.plan()
        reference = next(spec for spec in plan if spec.name == self.args.reference)
        samples, ref_logps, measured = {}, {}, {}
        for spec in sorted(plan, key=lambda spec: spec.path):  # so that each model is loaded once
            groups = self.parts.get(f"samples-{spec.name}", self.made_from(spec), lambda s=spec: self.draw(s))
            samples[spec.name] = [[Sample(**row) for row in group] for group in groups]
        for spec in plan:
            made_from = self.made_from(spec) | {"reference": self.made_from(reference)}
            ref_logps[spec.name] = self.parts.get(
                f"reference-{spec.name}", made_from, lambda s=spec: self.reference_logps(s, reference, samples[s.name])
            )
        self.loaded = (None, None, None)
        for spec in plan:
            rewards = self.parts.get(
                f"rewards-{spec.name}",
                self.made_from(spec) | {"reward model": self.reward.made_from},
                lambda s=spec: self.reward.rewards(self.conversations, samples[s.name], f"Rewards of {s.name}"),
            )
            k1, k3 = (estimates(which, samples[spec.name], ref_logps[spec.name]) for which in (kl_k1, kl_k3))
            scores = {
                path.rpartition(".")[2]: np.array(judge_scores(path, self.conversations, samples[spec.name]))
                for path in self.args.judges
            }
            measured[spec.name] = Measured(spec, samples[spec.name], k1, k3, np.array(rewards), scores)
        return measured

    def made_from(self, spec: Sampled) -> dict:
        return self.common | {
            "model": identity(spec.path),
            "num_generations": spec.num_generations,
            "temperature": spec.temperature,
        }

    def load(self, path: str):
        if self.loaded[0] != path:
            self.loaded = (None, None, None)
            model_args = copy.copy(self.model_args)
            model_args.model_name_or_path = path
            self.loaded = (path, *load_generator(model_args, self.args.trust_remote_code))
        return self.loaded[1:]

    def draw(self, spec: Sampled) -> list[list[dict]]:
        model, tokenizer = self.load(spec.path)
        sampling = SamplingArguments(
            num_generations=spec.num_generations,
            temperature=spec.temperature,
            top_k=self.args.top_k,
            top_p=self.args.top_p,
            max_completion_length=self.args.max_completion_length,
            seed=self.args.seed,
            generation_batch_size=self.args.generation_batch_size,
        )
        check_lengths(model, tokenizer, self.prompts, sampling)
        groups = draw_samples(model, tokenizer, self.conversations, sampling, self.args.eval_batch_size, spec.name)
        return [[sample.to_json() for sample in group] for group in groups]

    def reference_logps(
        self, spec: Sampled, reference: Sampled, samples: list[list[Sample]]
    ) -> list[list[list[float]]] | None:
        """The reference's log-probabilities of a policy's samples, `None` where its tokens mean something else."""
        if spec == reference:
            return [[sample.logps for sample in group] for group in samples]
        model, tokenizer = self.load(reference.path)
        if not same_vocabulary(
            load_tokenizer(resolve_model(spec.path, trust_remote_code=self.args.trust_remote_code)), tokenizer
        ):
            print(f"{spec.name} has another vocabulary than {reference.name}: there is no KL between them.")
            return None
        groups = zip(self.conversations, samples, strict=True)
        pairs = [(prompt, sample.token_ids) for prompt, group in groups for sample in group]
        found = iter(
            token_log_probs(
                model, tokenizer, pairs, reference.temperature, self.args.eval_batch_size, f"KL of {spec.name}"
            )
        )
        return [[[round(value, 5) for value in next(found)[0]] for _ in group] for group in samples]


def estimates(which: Callable, samples: list[list[Sample]], ref_logps: list | None) -> np.ndarray | None:
    """An estimator of KL on each sample, (prompts, responses)."""
    if ref_logps is None:
        return None
    groups = zip(samples, ref_logps, strict=True)
    return np.array(
        [[which(sample.logps, ref) for sample, ref in zip(group, refs, strict=True)] for group, refs in groups]
    )
