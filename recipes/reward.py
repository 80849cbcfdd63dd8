"""Step 2, reward model: a model learns to score responses as a person ranked them.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/reward.py \\
        --config recipes/configs/tiny_world/reward.yaml \\
        --model_name_or_path runs/sft --dataset_name rankings.jsonl --output_dir runs/reward

The loss is `-log sigmoid(score(better) - score(worse))` over all pairs of a prompt with unequal ranks; plain
chosen/rejected pairs are rankings of two. It starts from the SFT adapter, as in InstructGPT; a base or an older reward
model works too. Every flag of TRL's `ScriptArguments`, `RewardConfig` and `ModelConfig` works.
"""

import sys

if __name__ == "__main__":
    sys.path[0] = ""  # the working directory instead of this file's, as for `python -m`: a user's modules come first

from dataclasses import dataclass, field

from transformers import set_seed
from trl import ModelConfig, RewardConfig, ScriptArguments

from recipes.cli.launch import check_launch
from recipes.cli.run import RunFolder, run
from recipes.formatting import FormattingArguments, load_formatted
from recipes.models.compatibility import check_model, check_reward_base
from recipes.models.loading import (
    keep_head_in_float32,
    load_reward_trainee,
    save_reward_statistics,
    score_conversations,
)
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer
from recipes.trainers.ranking_trainer import RankingRewardTrainer, majority_rankings


@dataclass
class RewardScriptArguments(ScriptArguments):
    """TRL's script arguments, and what is done with several labelers and with the stored score statistics."""

    aggregation: str = field(
        default="keep",
        metadata={
            "help": "Rankings of one prompt by several labelers: `keep` all, or one by `majority` of each pair.",
            "choices": ["keep", "majority"],
        },
    )
    reference_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Demonstrations whose mean score and spread are stored for PPO's normalisation (InstructGPT sets "
            "their mean to 0). Default: all ranked responses."
        },
    )


ARGUMENTS = (RewardScriptArguments, RewardConfig, ModelConfig, FormattingArguments)


def reference_conversations(script_args, format_args, datasets, tokenizer) -> tuple[list[list[dict]], str]:
    """The conversations whose scores PPO normalises by, and where they are from."""
    if script_args.reference_dataset_name is None:
        rows = [row for split in datasets.values() for row in split]
        conversations = [row["prompt"] + completion for row in rows for completion in row["completions"]]
        return conversations, script_args.dataset_name
    demonstrations = load_formatted(
        "sft", ScriptArguments(dataset_name=script_args.reference_dataset_name), FormattingArguments(), tokenizer
    )
    return list(demonstrations["train"]["messages"]), script_args.reference_dataset_name


def main(
    script_args: RewardScriptArguments,
    training_args: RewardConfig,
    model_args: ModelConfig,
    format_args: FormattingArguments,
) -> RankingRewardTrainer:
    """Train, save to `training_args.output_dir`, and return the trainer."""
    check_launch(training_args)
    folder = RunFolder("reward", script_args, training_args, model_args, format_args)

    start = resolve_model(model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code)
    check_reward_base(start)
    tokenizer = load_tokenizer(start)
    check_model(start, tokenizer)
    evaluate = training_args.eval_strategy != "no"
    datasets = load_formatted(
        "ranking",
        script_args,
        format_args,
        tokenizer,
        evaluate=evaluate,
        num_proc=training_args.dataset_num_proc,
        seed=training_args.seed,
    )
    if script_args.aggregation == "majority":
        datasets["train"] = majority_rankings(datasets["train"])

    set_seed(training_args.seed)
    trainer = RankingRewardTrainer(
        model=load_reward_trainee(start, model_args),
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=tokenizer,
    )
    keep_head_in_float32(trainer.accelerator.unwrap_model(trainer.model))
    folder.train(trainer, datasets.reports)
    if evaluate:
        trainer.save_metrics("eval", trainer.evaluate())

    if trainer.accelerator.is_main_process:
        conversations, source = reference_conversations(script_args, format_args, datasets, tokenizer)
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        scores = score_conversations(model, tokenizer, conversations, training_args.per_device_eval_batch_size)
        save_reward_statistics(training_args.output_dir, scores, source)
    folder.finish(trainer, datasets.reports)
    return trainer


if __name__ == "__main__":
    run(main, ARGUMENTS)
