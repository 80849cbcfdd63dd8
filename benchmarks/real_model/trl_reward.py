"""TRL's own RewardTrainer in place of recipes/reward.py: the same flags, start, pairs and budget."""

from trl import RewardTrainer

from recipes.cli.arguments import parse
from recipes.formatting import load_formatted
from recipes.models.loading import load_reward_trainee
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer
from recipes.reward import ARGUMENTS


def main():
    script_args, training_args, model_args, format_args = parse(ARGUMENTS)
    start = resolve_model(model_args.model_name_or_path)
    tokenizer = load_tokenizer(start)
    dataset = load_formatted("preference", script_args, format_args, tokenizer)["train"]
    trainer = RewardTrainer(
        model=load_reward_trainee(start, model_args),
        args=training_args,
        train_dataset=dataset.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    trainer.state.save_to_json(f"{training_args.output_dir}/trainer_state.json")


if __name__ == "__main__":
    main()
