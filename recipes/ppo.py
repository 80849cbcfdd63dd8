"""Step 3, PPO: the policy answers prompts, the reward model scores the answers, a KL penalty keeps it near SFT.

    accelerate launch -q --config_file accelerate_configs/cpu.yaml recipes/ppo.py \\
        --config recipes/configs/tiny_world/ppo.yaml \\
        --model_name_or_path runs/sft --reward_model_name_or_path runs/reward --output_dir runs/ppo

The reward is `RM - kl_coef * KL(policy || SFT)`. With LoRA, one copy of the base plays policy, reference, reward model
and critic, one adapter each. docs/ppo.md explains the flags and the metrics.

At launch `begin` answers `--help` and mistyped flags before slow imports, and `run` reads the arguments for `main`,
whose `folder.train` trains with `PPOTrainer`: the four steps of recipes/trainers/ppo_trainer.py.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

from dataclasses import dataclass, field, replace

from transformers import set_seed
from trl import ModelConfig, ScriptArguments

from recipes.cli.arguments import import_function
from recipes.cli.errors import UserError, counted
from recipes.cli.launch import check_launch
from recipes.cli.run import RunFolder, refuse_stream, run, settle_evaluation
from recipes.cli.screen import say
from recipes.formatting import FormattingArguments, load_formatted
from recipes.models.compatibility import check_ppo_models
from recipes.models.loading import load_ppo_models, load_score_statistics, report_half_precision
from recipes.models.source import ModelSource, resolve_model
from recipes.models.tokenization import load_tokenizer
from recipes.trainers.ppo_config import PPOConfig
from recipes.trainers.ppo_trainer import PPOTrainer


@dataclass
class PPOScriptArguments(ScriptArguments):
    """TRL's script arguments, and where the reward comes from."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward adapter on the policy's base, or a full reward model."}
    )
    separate_reward_model: bool = field(
        default=False, metadata={"help": "Load a reward adapter with its own base; it then scores decoded text."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Python rewards `module.function`; --reward_weights has the model's first."}
    )
    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Demonstrations for --ptx_coef, of any schema that recipes/sft.py takes."}
    )
    ptx_dataset_split: str = field(default="train", metadata={"help": "Split of the demonstrations for --ptx_coef."})
    normalize_scores: bool = field(
        default=True,
        metadata={"help": "Standardise scores by the mean and standard deviation that recipes/reward.py stored."},
    )


ARGUMENTS = (PPOScriptArguments, PPOConfig, ModelConfig, FormattingArguments)


def check_arguments(script_args: PPOScriptArguments, training_args: PPOConfig) -> None:
    """Refuse what cannot run or would go unused, before anything is loaded."""
    if training_args.deepspeed_plugin is not None:
        raise UserError(
            "PPO does not run by DeepSpeed, which keeps gradients that PPO leaves out and splits weights before roles "
            "are copied: launch with accelerate_configs/fsdp2.yaml."
        )
    if (training_args.ptx_coef > 0) != (script_args.ptx_dataset_name is not None):
        raise UserError("PPO-ptx needs both --ptx_coef above 0 and --ptx_dataset_name.")
    sources = [*filter(None, [script_args.reward_model_name_or_path]), *(script_args.reward_funcs or [])]
    if not sources:
        raise UserError("There is nothing to score with: set --reward_model_name_or_path, --reward_funcs or both.")
    of_reward_model = [name for name in ("score_mean", "score_std") if getattr(training_args, name) is not None]
    if of_reward_model and script_args.reward_model_name_or_path is None:
        raise UserError(f"--{of_reward_model[0]} is about the reward model's score: set --reward_model_name_or_path.")
    weights = training_args.reward_weights
    if weights is not None and len(weights) != len(sources):
        raise UserError(
            f"--reward_weights has {counted(len(weights), 'value')} for {counted(len(sources), 'reward')}: "
            f"{', '.join(sources)}."
        )


def main(
    script_args: PPOScriptArguments,
    training_args: PPOConfig,
    model_args: ModelConfig,
    format_args: FormattingArguments,
) -> PPOTrainer:
    """Train, save to `training_args.output_dir`, and return the trainer."""
    check_launch(training_args)
    refuse_stream(script_args)
    check_arguments(script_args, training_args)
    folder = RunFolder("ppo", script_args, training_args, model_args, format_args)

    trusted = training_args.trust_remote_code
    policy = resolve_model(model_args.model_name_or_path, model_args.model_revision, trusted)
    reward: ModelSource | None = None
    if script_args.reward_model_name_or_path:
        reward = resolve_model(script_args.reward_model_name_or_path, trust_remote_code=trusted)
    tokenizer = load_tokenizer(policy)
    check_ppo_models(policy, reward, tokenizer, script_args.separate_reward_model, model_args.use_peft)
    if reward is not None:
        load_score_statistics(training_args, reward, script_args.normalize_scores)

    evaluate = training_args.eval_strategy != "no"
    positions = [source.positions for source in (policy, reward) if source is not None and source.positions]
    room = {"positions": min(positions, default=None), "completion_length": training_args.max_completion_length}
    datasets = load_formatted("prompt", script_args, format_args, tokenizer, evaluate, training_args.seed, **room)
    settle_evaluation(training_args, datasets)
    prompts, rollout = len(datasets["train"]), training_args.generation_batch_size // training_args.num_generations
    training_args.check_prompts(prompts)
    training_args.check_warmup(prompts)
    if left := prompts % rollout:
        say(f"Each epoch leaves out {left} of {counted(prompts, 'prompt')}, other ones each time.")
    if script_args.ptx_dataset_name is not None:
        source = ScriptArguments(script_args.ptx_dataset_name, dataset_train_split=script_args.ptx_dataset_split)
        rules = replace(format_args, dataset_schema="auto", dataset_mapping=None, datasets=None, keep_columns=None)
        room = {"cut_at": training_args.ptx_max_length, "positions": policy.positions}
        ptx = load_formatted("sft", source, rules, tokenizer, prompt_completion=True, **room)
        datasets.reports["ptx"], datasets["ptx"] = ptx.reports["train"], ptx["train"]

    set_seed(training_args.seed)
    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        ptx_dataset=datasets.get("ptx"),
        reward_funcs=[import_function(path, "--reward_funcs") for path in script_args.reward_funcs or []],
        **load_ppo_models(policy, reward, model_args, script_args.separate_reward_model),
    )
    report_half_precision(trainer.model)
    folder.train(trainer, datasets.reports)
    folder.finish(trainer, datasets.reports)
    return trainer


if __name__ == "__main__":
    run(main, ARGUMENTS)
