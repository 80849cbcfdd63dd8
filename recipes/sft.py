"""Step 1, supervised fine-tuning: a base model learns from (instruction, response) demonstrations.

    accelerate launch -q --config_file accelerate_configs/cpu.yaml recipes/sft.py \\
        --config recipes/configs/tiny_world/sft.yaml --output_dir runs/sft

Every flag of TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig` works, in the YAML or on the command line. The
loss is on the response only: the last assistant turn, or every one with `--assistant_only_loss true`.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

from transformers import set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig

from recipes.cli.errors import refusals_in_one_line
from recipes.cli.launch import check_launch
from recipes.cli.run import RunFolder, check_steps, run, settle_evaluation
from recipes.formatting import FormattingArguments, load_formatted
from recipes.models.adapters import float32_adapters
from recipes.models.compatibility import check_model
from recipes.models.loading import disable_router_logits, load_policy, report_half_precision
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer, set_chat_template
from recipes.trainers.checkpoints import WholeSFTTrainer
from recipes.trainers.replaced import replaced

ARGUMENTS = (ScriptArguments, SFTConfig, ModelConfig, FormattingArguments)


def cuts_the_end(args: SFTConfig) -> bool:
    """Whether TRL cuts rows at their end, so that a prompt that fills `max_length` leaves nothing to train."""
    return args.packing_strategy == "bfd" if args.packing else args.truncation_mode == "keep_start"


def main(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    format_args: FormattingArguments,
) -> WholeSFTTrainer:
    """Train, save to `training_args.output_dir`, and return the trainer."""
    check_launch(training_args)
    folder = RunFolder("sft", script_args, training_args, model_args, format_args)

    base = resolve_model(model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code)
    tokenizer = load_tokenizer(base)
    check_model(base, tokenizer)
    template = training_args.chat_template_path
    template = set_chat_template(tokenizer, base, template, may_add_tokens=not model_args.use_peft)

    datasets = load_formatted(
        "sft",
        script_args,
        format_args,
        tokenizer,
        evaluate=training_args.eval_strategy != "no",
        prompt_completion=training_args.completion_only_loss is not False,
        assistant_only_loss=training_args.assistant_only_loss,
        num_proc=training_args.dataset_num_proc,
        seed=training_args.seed,
        positions=base.positions,
        **{"cut_at" if cuts_the_end(training_args) else "max_length": training_args.max_length},
    )
    settle_evaluation(training_args, datasets)

    set_seed(training_args.seed)
    model = load_policy(base, model_args)
    with float32_adapters(model), refusals_in_one_line(), replaced(training_args, chat_template_path=template):
        trainer = WholeSFTTrainer(
            model=model,
            args=training_args,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            processing_class=tokenizer,
        )
    report_half_precision(model)
    check_steps(trainer)
    folder.train(trainer, datasets.reports)
    disable_router_logits(trainer.accelerator.unwrap_model(trainer.model))
    folder.finish(trainer, datasets.reports)
    return trainer


if __name__ == "__main__":
    run(main, ARGUMENTS)
