"""Measures policies on prompts: each is sampled once and scored once.

One model is in memory at a time: first each policy samples, then the reference gives its log-probabilities of all
samples, then the reward model scores them.
"""

import asyncio
import inspect
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial

import numpy as np
import pandas as pd
from trl import ModelConfig

from recipes.cli.arguments import import_function
from recipes.cli.errors import UserError, counted
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.metrics import kl_k1, kl_k3
from recipes.evaluation.parts import Parts, fingerprint, identity
from recipes.evaluation.policies import Conversation, PolicySpec, token_log_probs
from recipes.evaluation.rewards import RewardModel
from recipes.models.compatibility import check_model, check_score_head
from recipes.models.heads import base_of
from recipes.models.loading import check_policy
from recipes.models.sampling import LoadingArguments, Prompt, check_lengths, derived_seed, load_generator, sample
from recipes.models.source import ModelSource, resolve_model
from recipes.models.tokenization import load_tokenizer
from recipes.trainers.fast.drop_finished import DropFinishedSampler
from recipes.trainers.reward_functions import check_rewards


@dataclass(frozen=True)
class Measured:
    """A policy and its responses.

    Args:
        responses: a row each, those to one prompt together: `prompt`, its number; `text`, `token_ids`; `length`, in
            tokens, `truncated`, `entropy`; `k1`, `k3`: estimates of KL to the reference in nats, NaN where the
            vocabularies differ, or where it is infinite because the policy was decoded greedily; and the scores.
        judges: columns with scores: "reward", of the reward model, and the names of the Python judges.
    """

    spec: PolicySpec
    responses: pd.DataFrame
    judges: list[str]

    def array(self, column: str) -> np.ndarray:
        """A column as (prompts, responses)."""
        return self.responses[column].to_numpy(np.float64).reshape(self.responses["prompt"].nunique(), -1)

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        return {name: self.array(name) for name in self.judges}

    @property
    def k1(self) -> np.ndarray | None:
        return None if self.responses["k1"].isna().any() else self.array("k1")

    @property
    def first_texts(self) -> list[str]:
        """The first response to each prompt."""
        return self.responses.groupby("prompt")["text"].first().tolist()


class Evaluation:
    """Policies on prompts, with the parts of it that are on disk."""

    def __init__(self, args: EvaluationArguments, model_args: ModelConfig, prompts: list[Prompt], reward: RewardModel):
        self.args, self.model_args, self.prompts, self.reward = args, model_args, prompts, reward
        self.conversations: list[Conversation] = [prompt.messages for prompt in prompts]
        self.parts = Parts(args.output_dir)
        self.common = {
            "prompts": fingerprint(self.conversations),
            **{name: getattr(args, name) for name in ("max_completion_length", "seed", "generation_batch_size")},
            **{field.name: getattr(model_args, field.name) for field in fields(LoadingArguments)},
        }
        self.plan = args.plan()
        self.reference = next(spec for spec in self.plan if spec.name == args.reference)
        self.loaded: dict[str, tuple] = {}  # by path, one at a time

    def measure(self, plan: Sequence[PolicySpec] | None = None) -> dict[str, Measured]:
        """Everything of a plan, by name and in its order; by default of `EvaluationArguments.plan`."""
        plan = self.plan if plan is None else plan
        self.check(plan)
        tables = {}
        for spec in sorted(plan, key=lambda spec: spec.path):  # so that each model is loaded once
            rows = self.parts.get(f"samples-{spec.name}", self.made_from(spec), partial(self.draw, spec))
            tables[spec.name] = pd.DataFrame(rows)
        for spec in plan:
            table, made_from = tables[spec.name], self.made_from(spec) | {"reference": self.made_from(self.reference)}
            find = partial(self.reference_logps, spec, table)
            table["ref_logps"] = self.parts.get(f"reference-{spec.name}", made_from, find)
        self.loaded.clear()
        for spec in plan:
            table, made_from = tables[spec.name], self.made_from(spec) | {"reward model": self.reward.made_from}
            score = partial(self.reward.rewards, self.conversations, table)
            table["reward"] = self.parts.get(f"rewards-{spec.name}", made_from, score)
        responses = pd.concat({spec.name: tables[spec.name] for spec in plan})
        responses["length"], responses["truncated"] = responses["token_ids"].map(len), ~responses.pop("finished")
        logps = list(zip(responses["logps"], responses["ref_logps"], strict=True))
        for name, estimate in (("k1", kl_k1), ("k3", kl_k3)):
            responses[name] = [np.nan if ref is None else estimate(own, ref) for own, ref in logps]
        for name, path in self.args.judges_by_name.items():
            responses[name] = judge_scores(path, self.conversations, responses)
        judges = ["reward", *self.args.judges_by_name]
        same_for_same(responses, judges)
        return {spec.name: Measured(spec, responses.loc[spec.name], judges) for spec in plan}

    def check(self, plan: Sequence[PolicySpec]) -> None:
        """Before anything is sampled: the policies are there, and all models have room for prompts and responses."""
        policies = [self.source(path) for path in dict.fromkeys(spec.path for spec in plan)]
        for source in policies:
            check_policy(source)
        check_score_head(self.reward.source)
        for source in (*policies, self.reward.source):
            check_model(source, tokenizer := load_tokenizer(source))
            check_lengths(source, tokenizer, self.prompts, self.args)

    def made_from(self, spec: PolicySpec) -> dict:
        own = {"num_generations": spec.num_generations, "temperature": spec.temperature}
        return self.common | {"model": identity(spec.path)} | own

    def source(self, path: str) -> ModelSource:
        return resolve_model(path, trust_remote_code=self.args.trust_remote_code)

    def load(self, path: str):
        if path not in self.loaded:
            self.loaded.clear()
            model_args = replace(self.model_args, model_name_or_path=path)
            self.loaded[path] = load_generator(model_args, self.args.trust_remote_code)
        return self.loaded[path]

    def draw(self, spec: PolicySpec) -> list[dict]:
        """The policy's responses, with the number of the prompt, log-probabilities and mean entropy of the tokens."""
        model, tokenizer = self.load(spec.path)
        sampling = copy(self.args)
        sampling.num_generations, sampling.temperature = spec.num_generations, spec.temperature
        # Of its own: with the same random numbers, responses of two policies are alike, and win rates take them for
        # independent ones.
        sampling.seed = derived_seed(self.args.seed, spec.name)
        with DropFinishedSampler().installed(base_of(model)):
            groups = sample(model, tokenizer, self.conversations, sampling, f"Sampling {spec.name}")
        rows = [{"prompt": row} | vars(response) for row, group in enumerate(groups) for response in group]
        found = self.log_probs(spec.path, pd.DataFrame(rows), spec.temperature or 1.0, f"Log-probs of {spec.name}")
        return [row | {"logps": logps, "entropy": entropy} for row, (logps, entropy) in zip(rows, found, strict=True)]

    def reference_logps(self, spec: PolicySpec, responses: pd.DataFrame) -> list[list[float]] | None:
        """The reference's log-probabilities of a policy's responses, `None` where there is no KL between them."""
        reference = self.reference
        if spec == reference:
            return responses["logps"].tolist()
        if spec.temperature == 0:
            return None
        own = load_tokenizer(self.source(spec.path))
        if own.get_vocab() != self.load(reference.path)[1].get_vocab():  # its token ids mean something else
            print(f"{spec.name} has another vocabulary than {reference.name}: there is no KL between them.")
            return None
        found = self.log_probs(reference.path, responses, reference.temperature, f"KL of {spec.name}")
        return [logps for logps, _ in found]

    def log_probs(self, path: str, responses: pd.DataFrame, temperature: float, title: str) -> list:
        """`token_log_probs` of responses by the model at `path`."""
        rows = responses[["prompt", "token_ids"]].itertuples(index=False)
        pairs = [(self.conversations[prompt], ids) for prompt, ids in rows]
        return token_log_probs(*self.load(path), pairs, temperature, self.args.eval_batch_size, title)


def same_for_same(responses: pd.DataFrame, judges: Iterable[str]) -> None:
    """Give equal responses to a prompt the score of the first, whatever policy they are from.

    In its last digits a model's score depends on the batch, and a response would win or lose against itself.
    """
    key = [responses["prompt"], responses["text"], responses["token_ids"].map(tuple)]
    for name in judges:  # the reward model reads the text only
        same = responses.groupby(key[:2] if name == "reward" else key, sort=False)
        responses[name] = same[name].transform("first")


def judge_scores(path: str, prompts: list[Conversation], responses: pd.DataFrame) -> np.ndarray:
    """Scores (responses,) by a Python judge, a function of the signature of TRL's reward functions.

    Raises:
        UserError: it does not return one number per response.
    """
    scores = import_function(path, "--judges")(
        prompts=[prompts[row] for row in responses["prompt"]],
        completions=[[{"role": "assistant", "content": text}] for text in responses["text"]],
        completion_ids=responses["token_ids"].tolist(),
    )
    if inspect.iscoroutine(scores):  # as TRL's reward functions may be
        scores = asyncio.run(scores)
    values = np.array(check_rewards(scores, f"--judges {path}", len(responses)), dtype=np.float64)
    if unknown := (~np.isfinite(values)).sum():
        raise UserError(f"--judges {path}: no numbers for {unknown} of {counted(len(responses), 'response')}.")
    return values
