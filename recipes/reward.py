"""Step 2, reward model: a model learns to score responses as a person ranked them.

    accelerate launch -q --config_file accelerate_configs/cpu.yaml recipes/reward.py \\
        --config recipes/configs/tiny_world/reward.yaml \\
        --model_name_or_path runs/sft --dataset_name rankings.jsonl --output_dir runs/reward

The loss is `-log sigmoid(score(better) - score(worse))` over all pairs of a prompt with unequal ranks. It starts from
the SFT adapter, as in InstructGPT; a base or an older reward model works too. All flags of TRL's `RewardConfig` work.
"""

import os
import random
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

from dataclasses import dataclass, field, replace

from transformers import set_seed
from trl import ModelConfig, RewardConfig, ScriptArguments

from recipes.cli.errors import UserError, refusals_in_one_line
from recipes.cli.launch import check_launch
from recipes.cli.run import RunFolder, check_steps, refuse_stream, run, settle_evaluation
from recipes.formatting import FormattingArguments, load_formatted
from recipes.models.adapters import float32_adapters
from recipes.models.compatibility import check_model, check_reward_base
from recipes.models.loading import (
    load_reward_trainee,
    report_half_precision,
    save_reward_statistics,
    save_trained_prompts,
)
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer, set_chat_template
from recipes.trainers.ranking_trainer import RankingRewardTrainer, conversations, keep_majorities, results_in_words
from recipes.trainers.replaced import replaced


@dataclass
class RewardScriptArguments(ScriptArguments):
    """TRL's script arguments, and what is done with several labelers and with the stored score statistics."""

    aggregation: str = field(
        default="keep",
        metadata={
            "help": "Several labelers' rankings of the same responses: `keep` all, or one by `majority` of each pair.",
            "choices": ["keep", "majority"],
        },
    )
    reference_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Demonstrations: mean and standard deviation of their scores are stored for PPO's normalisation "
            "(InstructGPT sets their mean to 0). Default: the ranked responses that were trained."
        },
    )


MOST_REFERENCES = 4096  # conversations scored after training; Ziegler et al. (1909.08593) took 256

ARGUMENTS = (RewardScriptArguments, RewardConfig, ModelConfig, FormattingArguments)


def load_references(script_args, format_args, tokenizer, max_length: int | None) -> list[list[int]]:
    """Token ids of the demonstrations whose scores PPO normalises by, none above `max_length`; [] without any."""
    source = script_args.reference_dataset_name
    if source is None:
        return []
    rules = replace(format_args, dataset_schema="auto", dataset_mapping=None, datasets=None)
    demonstrations = load_formatted("sft", ScriptArguments(dataset_name=source), rules, tokenizer)
    rows = tokenizer.apply_chat_template(list(demonstrations["train"]["messages"]), return_dict=False)
    rows = [ids for ids in rows if max_length is None or len(ids) <= max_length]
    if not rows:
        raise UserError(f"--reference_dataset_name {source}: no row has max_length tokens or fewer.")
    return rows


def main(
    script_args: RewardScriptArguments,
    training_args: RewardConfig,
    model_args: ModelConfig,
    format_args: FormattingArguments,
) -> RankingRewardTrainer:
    """Train, save to `training_args.output_dir`, and return the trainer."""
    check_launch(training_args)
    refuse_stream(script_args)
    folder = RunFolder("reward", script_args, training_args, model_args, format_args)

    start = resolve_model(model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code)
    check_reward_base(start)
    tokenizer = load_tokenizer(start)
    check_model(start, tokenizer)
    template = training_args.chat_template_path
    template = set_chat_template(tokenizer, start, template, may_add_tokens=not model_args.use_peft)
    datasets = load_formatted(
        "ranking",
        script_args,
        format_args,
        tokenizer,
        evaluate=training_args.eval_strategy != "no",
        num_proc=training_args.dataset_num_proc,
        seed=training_args.seed,
        cut_at=training_args.max_length,
        positions=start.positions,
    )
    if script_args.aggregation == "majority":
        keep_majorities(datasets)
    settle_evaluation(training_args, datasets)
    references = load_references(script_args, format_args, tokenizer, training_args.max_length)

    set_seed(training_args.seed)
    model = load_reward_trainee(start, model_args)
    with float32_adapters(model), refusals_in_one_line(), replaced(training_args, chat_template_path=template):
        trainer = RankingRewardTrainer(
            model=model,
            args=training_args,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            processing_class=tokenizer,
        )
    report_half_precision(model)
    check_steps(trainer)
    folder.train(trainer, datasets.reports)
    folder.save_model(trainer)  # before anything else can fail
    evaluation = trainer.final_evaluation()
    if evaluation is not None:
        trainer.save_metrics("eval", evaluation)

    rows = references or [ids for ranking in trainer.train_dataset["response_ids"] for ids in ranking]
    rows = random.Random(training_args.seed).sample(rows, min(len(rows), MOST_REFERENCES))
    scores = trainer.score(rows)
    example = datasets.get("eval", datasets["train"])[0]
    example_scores = trainer.score(conversations(example, tokenizer))
    if trainer.accelerator.is_main_process:
        source = script_args.reference_dataset_name or script_args.dataset_name
        save_reward_statistics(training_args.output_dir, scores, source)
        save_trained_prompts(training_args.output_dir, datasets["train"]["group_id"])
    trainer.accelerator.print(results_in_words(example, example_scores, evaluation))
    folder.finish(trainer, datasets.reports)
    return trainer


if __name__ == "__main__":
    run(main, ARGUMENTS)
