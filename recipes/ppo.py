"""Step 3, PPO: the policy answers prompts, the reward model scores the answers, a KL penalty keeps it near SFT.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/ppo.py \\
        --config recipes/configs/tiny_world/ppo.yaml \\
        --model_name_or_path runs/sft --reward_model_name_or_path runs/reward --output_dir runs/ppo

The reward is `RM - kl_coef * KL(policy || SFT)`. With LoRA, one copy of the base plays policy, reference, reward model
and critic, one adapter each. Every flag of TRL's `ScriptArguments`, `GRPOConfig` and `ModelConfig` works, and
`PPOConfig` adds PPO's own; docs/ppo.md explains them and the metrics.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import set_seed
from trl import ModelConfig, ScriptArguments

from recipes.errors import UserError
from recipes.formatting import FormattingArguments, load_formatted
from recipes.launch import check_launch
from recipes.modeling import load_ppo_models, read_reward_statistics
from recipes.ppo_trainer import PPOConfig, PPOTrainer
from recipes.runs import finish, guard_output_dir, parse, run
from recipes.tokenization import load_tokenizer


@dataclass
class PPOScriptArguments(ScriptArguments):
    """TRL's script arguments, and where the reward comes from."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward adapter on the policy's base, or a full reward model."}
    )
    separate_reward_model: bool = field(
        default=False,
        metadata={"help": "Load a reward adapter of another base with its own base; it then scores decoded text."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Python functions `module.function` of TRL's signature, added to the reward model's score with "
            "--reward_weights (the reward model's weight comes first)."
        },
    )
    normalize_scores: bool = field(
        default=True,
        metadata={"help": "Standardise scores with the mean and spread that recipes/reward.py stored."},
    )


def import_reward_func(path: str) -> Callable:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--reward_funcs {path}: write it as module.function, importable from here ({error})."
        ) from error


def check_rewards(script_args: PPOScriptArguments, training_args: PPOConfig) -> None:
    """Refuse what cannot give a reward, before anything is loaded."""
    sources = [script_args.reward_model_name_or_path or [], *(script_args.reward_funcs or [])]
    sources = [source for source in sources if source]
    if not sources:
        raise UserError("There is nothing to score with: set --reward_model_name_or_path, --reward_funcs or both.")
    weights = training_args.reward_weights
    if weights is not None and len(weights) != len(sources):
        raise UserError(
            f"--reward_weights has {len(weights)} values for {len(sources)} rewards: {', '.join(sources)}."
        )


def main():
    script_args, training_args, model_args, format_args = parse(
        (PPOScriptArguments, PPOConfig, ModelConfig, FormattingArguments)
    )
    check_launch(training_args)
    check_rewards(script_args, training_args)
    guard_output_dir(training_args)
    reward_path = script_args.reward_model_name_or_path
    statistics = read_reward_statistics(reward_path) if reward_path and script_args.normalize_scores else None
    if statistics is not None:
        training_args.score_mean, training_args.score_std = statistics["mean"], statistics["std"]

    tokenizer = load_tokenizer(
        model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code
    )
    datasets = load_formatted(
        "prompt",
        script_args,
        format_args,
        tokenizer,
        evaluate=training_args.eval_strategy != "no",
        seed=training_args.seed,
    )

    set_seed(training_args.seed)
    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        reward_funcs=[import_reward_func(path) for path in script_args.reward_funcs or []],
        **load_ppo_models(model_args, reward_path, script_args.separate_reward_model, training_args.trust_remote_code),
    )
    prompts, rollout = len(datasets["train"]), training_args.generation_batch_size // training_args.num_generations
    if prompts % rollout:
        trainer.accelerator.print(
            f"Each epoch leaves out {prompts % rollout} of {prompts} prompts, other ones each time."
        )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish(trainer, "ppo", datasets, script_args, training_args, model_args, format_args)


if __name__ == "__main__":
    run(main)
