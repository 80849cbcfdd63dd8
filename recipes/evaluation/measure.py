"""Measures policies on prompts: each is sampled once and scored once.

One model is in memory at a time: first each policy samples, then the reference gives its log-probabilities of all
samples, then the reward model scores them.
"""

import asyncio
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice

import numpy as np
from trl import ModelConfig

from recipes.cli.arguments import import_function
from recipes.cli.errors import UserError, counted
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.metrics import kl_k1, kl_k3
from recipes.evaluation.parts import Parts, fingerprint, identity
from recipes.evaluation.policies import Conversation, PolicySpec, Sample, token_log_probs, with_prompts
from recipes.evaluation.rewards import RewardModel
from recipes.models.heads import base_of
from recipes.models.loading import check_policy
from recipes.models.sampling import LoadingArguments, Prompt, Response, check_lengths, load_generator, sample
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer
from recipes.trainers.fast.drop_finished import DropFinishedSampler
from recipes.trainers.reward_functions import check_rewards


@dataclass(frozen=True)
class Measured:
    """What is known of the samples of one policy, as arrays (prompts, responses).

    Args:
        k1, k3: estimates of KL to the reference per response, in nats; `None` where the vocabularies differ, or where
            it is infinite because the policy was decoded greedily.
        scores: "reward", the reward model's, and each Python judge's by its name.
    """

    spec: PolicySpec
    samples: list[list[Sample]]
    k1: np.ndarray | None
    k3: np.ndarray | None
    scores: dict[str, np.ndarray]

    @property
    def reward(self) -> np.ndarray:
        return self.scores["reward"]

    def each(self, what: Callable[[Sample], float]) -> np.ndarray:
        return np.array([[what(sample) for sample in group] for group in self.samples], dtype=np.float64)


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
            **{field.name: getattr(model_args, field.name) for field in fields(LoadingArguments)},
        }
        self.plan = args.plan()
        self.reference = next(spec for spec in self.plan if spec.name == args.reference)
        self.loaded: tuple = (None, None, None)

    def measure(self, plan: Sequence[PolicySpec] | None = None) -> dict[str, Measured]:
        """Everything of a plan, by name and in its order; by default of `EvaluationArguments.plan`."""
        plan = self.plan if plan is None else plan
        self.check(plan)
        samples, ref_logps, measured = {}, {}, {}
        for spec in sorted(plan, key=lambda spec: spec.path):  # so that each model is loaded once
            groups = self.parts.get(f"samples-{spec.name}", self.made_from(spec), partial(self.draw, spec))
            samples[spec.name] = [[Sample(**row) for row in group] for group in groups]
        for spec in plan:
            made_from = self.made_from(spec) | {"reference": self.made_from(self.reference)}
            find = partial(self.reference_logps, spec, samples[spec.name])
            ref_logps[spec.name] = self.parts.get(f"reference-{spec.name}", made_from, find)
        self.loaded = (None, None, None)
        known: dict[str, dict] = defaultdict(dict)  # by what scores, the score of each response
        for spec in plan:
            groups = samples[spec.name]
            made_from = self.made_from(spec) | {"reward model": self.reward.made_from}
            score = partial(self.reward.rewards, self.conversations, groups)
            rewards = self.parts.get(f"rewards-{spec.name}", made_from, score)
            k1, k3 = (estimates(which, groups, ref_logps[spec.name]) for which in (kl_k1, kl_k3))
            texts = [[sample.text for sample in group] for group in groups]
            whole = [[(sample.text, *sample.token_ids) for sample in group] for group in groups]
            scores = {"reward": same_for_same(rewards, texts, known["reward"])}
            for path in self.args.judges:
                name, judged = path.rpartition(".")[2], judge_scores(path, self.conversations, groups)
                scores[name] = same_for_same(judged, whole, known[name])
            measured[spec.name] = Measured(spec, groups, k1, k3, scores)
        return measured

    def check(self, plan: Sequence[PolicySpec]) -> None:
        """Before anything is sampled: the policies are there, and all models have room for prompts and responses."""
        paths = dict.fromkeys(spec.path for spec in plan)
        policies = [resolve_model(path, trust_remote_code=self.args.trust_remote_code) for path in paths]
        for source in policies:
            check_policy(source)
        for source in (*policies, self.reward.source):
            check_lengths(source, load_tokenizer(source), self.prompts, self.args)

    def temperature_at(self, kl: float, temperatures: Sequence[float]) -> float:
        """The temperature that takes the reference nearest to `kl` nats from itself, by one response a prompt.

        Its gain is the control for a policy with that KL: a lower temperature gains that without RL.
        """
        sharpened = self.measure([self.reference.at(temperature, 1) for temperature in temperatures]).values()
        return min(sharpened, key=lambda one: abs(one.k1.mean() - kl)).spec.temperature

    def made_from(self, spec: PolicySpec) -> dict:
        return self.common | {
            "model": identity(spec.path),
            "num_generations": spec.num_generations,
            "temperature": spec.temperature,
        }

    def load(self, path: str):
        if self.loaded[0] != path:
            self.loaded = (None, None, None)
            model_args = replace(self.model_args, model_name_or_path=path)
            self.loaded = (path, *load_generator(model_args, self.args.trust_remote_code))
        return self.loaded[1:]

    def draw(self, spec: PolicySpec) -> list[list[dict]]:
        """The policy's `Sample`s as dictionaries."""
        model, tokenizer = self.load(spec.path)
        sampling = copy(self.args)
        sampling.num_generations, sampling.temperature = spec.num_generations, spec.temperature
        with DropFinishedSampler().installed(base_of(model)):
            groups = sample(model, tokenizer, self.conversations, sampling, f"Sampling {spec.name}")
        known = self.log_probs(spec.path, groups, spec.temperature or 1.0, f"Log-probs of {spec.name}")
        return [
            [
                vars(response) | {"logps": logps, "entropy": entropy}
                for response, (logps, entropy) in zip(*pair, strict=True)
            ]
            for pair in zip(groups, known, strict=True)
        ]

    def reference_logps(self, spec: PolicySpec, samples: list[list[Sample]]) -> list[list[list[float]]] | None:
        """The reference's log-probabilities of a policy's samples, `None` where there is no KL between them."""
        if spec == self.reference:
            return [[sample.logps for sample in group] for group in samples]
        if spec.temperature == 0:
            return None
        own = load_tokenizer(resolve_model(spec.path, trust_remote_code=self.args.trust_remote_code))
        path, temperature = self.reference.path, self.reference.temperature
        if own.get_vocab() != self.load(path)[1].get_vocab():  # its token ids mean something else
            print(f"{spec.name} has another vocabulary than {self.reference.name}: there is no KL between them.")
            return None
        known = self.log_probs(path, samples, temperature, f"KL of {spec.name}")
        return [[logps for logps, _ in group] for group in known]

    def log_probs(
        self, path: str, groups: Sequence[Sequence[Response]], temperature: float, title: str
    ) -> list[list[tuple[list[float], float]]]:
        """`token_log_probs` by the model at `path` of the responses to each prompt, in the same groups."""
        pairs = [(prompt, response.token_ids) for prompt, response in with_prompts(self.conversations, groups)]
        found = iter(token_log_probs(*self.load(path), pairs, temperature, self.args.eval_batch_size, title))
        return [list(islice(found, len(group))) for group in groups]


def estimates(which: Callable, samples: list[list[Sample]], ref_logps: list | None) -> np.ndarray | None:
    """An estimator of KL on each sample, (prompts, responses)."""
    if ref_logps is None:
        return None
    groups = zip(samples, ref_logps, strict=True)
    return np.array(
        [[which(sample.logps, ref) for sample, ref in zip(group, refs, strict=True)] for group, refs in groups]
    )


def same_for_same(scores: Iterable, responses: Sequence[Sequence], known: dict) -> np.ndarray:
    """`scores` (prompts, responses), in which equal responses to a prompt have the score of the first.

    In its last digits a model's score depends on the batch, and a response would win or lose against itself. `known`
    is kept for the next policy.
    """
    for row, group in enumerate(zip(responses, scores, strict=True)):
        for response, score in zip(*group, strict=True):
            known.setdefault((row, response), score)
    return np.array([[known[row, response] for response in group] for row, group in enumerate(responses)])


def judge_scores(path: str, prompts: list[Conversation], samples: list[list[Sample]]) -> np.ndarray:
    """Scores (prompts, responses) by a Python judge, a function of the signature of TRL's reward functions.

    Raises:
        UserError: it does not return one number per response.
    """
    judge = import_function(path, "--judges")
    flat = with_prompts(prompts, samples)
    scores = judge(
        prompts=[prompt for prompt, _ in flat],
        completions=[[{"role": "assistant", "content": sample.text}] for _, sample in flat],
        completion_ids=[sample.token_ids for _, sample in flat],
    )
    if inspect.iscoroutine(scores):  # as TRL's reward functions may be
        scores = asyncio.run(scores)
    values = np.array(check_rewards(scores, f"--judges {path}", len(flat)), dtype=np.float64)
    if not np.isfinite(values).all():
        raise UserError(
            f"--judges {path}: numbers for only {np.isfinite(values).sum()} of {counted(len(flat), 'response')}."
        )
    return values.reshape(len(prompts), -1)
