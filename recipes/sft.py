"""Step 1, supervised fine-tuning: a base model learns from (instruction, response) demonstrations.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py \\
        --config recipes/configs/tiny_world/sft.yaml --output_dir runs/sft

Every flag of TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig` works, in the YAML or on the command line. The
loss is on the response only: the last assistant turn, or every one with `--assistant_only_loss true`.
"""

from transformers import set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from recipes.cli.launch import check_launch
from recipes.cli.run import finish, guard_output_dir, parse, run
from recipes.formatting import FormattingArguments, load_formatted
from recipes.models.compatibility import check_model
from recipes.models.loading import hide_router_logits, load_policy
from recipes.models.tokenization import load_tokenizer


def main():
    script_args, training_args, model_args, format_args = parse(
        (ScriptArguments, SFTConfig, ModelConfig, FormattingArguments)
    )
    check_launch(training_args)
    guard_output_dir(training_args)

    if training_args.assistant_only_loss and format_args.on_special == "flag":
        # Here transformers cannot tell a template's control tokens from those that stand in a message.
        format_args.on_special = "drop"
    tokenizer = load_tokenizer(
        model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code
    )
    check_model(model_args, tokenizer, training_args.trust_remote_code)
    datasets = load_formatted(
        "sft",
        script_args,
        format_args,
        tokenizer,
        evaluate=training_args.eval_strategy != "no",
        prompt_completion=not training_args.assistant_only_loss,
        num_proc=training_args.dataset_num_proc,
        seed=training_args.seed,
    )

    set_seed(training_args.seed)
    trainer = SFTTrainer(
        model=load_policy(model_args, training_args.trust_remote_code),
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    hide_router_logits(trainer.accelerator.unwrap_model(trainer.model))
    finish(trainer, "sft", datasets, script_args, training_args, model_args, format_args)


if __name__ == "__main__":
    run(main)
