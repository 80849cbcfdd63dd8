"""One side of a PPO benchmark: trains rollout after rollout, one each time the parent says go (see turns.py).

    python benchmarks/ppo_side.py ours|ours_full_critic|without_PATH|without_all|trl SHAPE ROLLOUTS DEVICE

Phases are timed by wrapping methods from outside: `generate`, `score` (log-probabilities, rewards, values and
advantages) and `train` (all epochs with their optimizer steps).
"""

import json
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from turns import Meter
from workload import ALONE, LORA, Shape, force_lengths, response_tokens, word, word_tokenizer


class TakeTurns(TrainerCallback):
    """A turn is `steps` optimizer steps, which begin with the generation of a rollout."""

    def __init__(self, meter: Meter, steps: int, turns: int):
        self.meter, self.steps, self.turns = meter, steps, turns

    def on_train_begin(self, args, state, control, **kwargs):
        self.meter.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.meter.finish()
            if state.global_step < self.steps * self.turns:
                self.meter.start()


def common(shape: Shape, device: str) -> dict:
    """Arguments that both trainers take."""
    return {
        "per_device_train_batch_size": shape.micro_batch,
        "gradient_accumulation_steps": shape.batch // shape.micro_batch,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "kl_coef": 0.05,
        "seed": 0,
        "use_cpu": device == "cpu",
        "bf16": device == "cuda",
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        **ALONE,
    }


def policy(shape: Shape, device: str):
    torch.manual_seed(0)
    base = LlamaForCausalLM(shape.config()).to(device)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))


def scalar_model(shape: Shape, device: str) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(shape.config(num_labels=1)).to(device)


def ours(shape: Shape, rows: list[list[int]], rollouts: int, device: str, meter: Meter, folder: str, side: str):
    from recipes.models.adapters import add_score_roles
    from recipes.trainers.ppo_config import FAST_PATHS
    from recipes.trainers.ppo_trainer import PPOConfig, PPOTrainer

    left_out = FAST_PATHS if side == "without_all" else [side.removeprefix("without_")]
    args = PPOConfig(
        folder,
        fast_paths=[path for path in FAST_PATHS if path not in left_out],
        steps_per_generation=shape.batch // shape.micro_batch,
        num_iterations=shape.epochs,
        max_completion_length=shape.limit(),
        max_steps=rollouts * shape.epochs,
        shuffle_dataset=False,
        **common(shape, device),
    )
    meter.loaded("libraries")
    model = policy(shape, device)
    full_critic = side == "ours_full_critic"
    add_score_roles(model, {"reward": None} if full_critic else {"reward": None, "critic": None})
    # A reward model whose scores differ, like the peer's.
    torch.nn.init.normal_(model.get_base_model().score.modules_to_save["reward"].weight, std=0.02)
    value_model = scalar_model(shape, device) if full_critic else None
    meter.loaded("models")
    trainer = PPOTrainer(
        args=args,
        processing_class=word_tokenizer(shape.vocabulary),
        model=model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(word, row)) for row in rows]}),
        callbacks=[TakeTurns(meter, shape.epochs, rollouts)],
    )
    generate = meter.timed(trainer._generate_single_turn, "generate", "score")

    def counted(*args, **kwargs):
        completion_ids, logps = generate(*args, **kwargs)
        meter.report["response_tokens"] = response_tokens(completion_ids)
        return completion_ids, logps

    trainer._generate_single_turn = counted
    trainer._generate_and_score_completions = meter.timed(trainer._generate_and_score_completions, "score", "train")
    trainer.train()


def trl(shape: Shape, rows: list[list[int]], rollouts: int, device: str, meter: Meter, folder: str):
    import numpy
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    args = PPOConfig(
        folder,
        num_ppo_epochs=shape.epochs,
        response_length=shape.limit(),
        total_episodes=rollouts * shape.batch,
        stop_token="eos",
        num_sample_generations=0,
        **common(shape, device),
    )
    meter.loaded("libraries")
    model = policy(shape, device)
    reward_model, value_model = scalar_model(shape, device), scalar_model(shape, device)
    model.generation_config.pad_token_id = shape.config().pad_token_id
    meter.loaded("models")
    loader = ppo_trainer.DataLoader
    ppo_trainer.DataLoader = lambda *args, **kwargs: loader(*args, **(kwargs | {"shuffle": False}))
    trainer = PPOTrainer(
        args=args,
        processing_class=word_tokenizer(shape.vocabulary),
        model=model,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        callbacks=[TakeTurns(meter, 1, rollouts)],
    )
    generate = meter.timed(ppo_trainer.batch_generation, "generate", "score")

    def counted(model, queries, *args, **kwargs):
        sequences, logits = generate(model, queries, *args, **kwargs)
        meter.report["response_tokens"] = response_tokens(sequences[:, queries.shape[1] :].tolist())
        return sequences, logits

    ppo_trainer.batch_generation = counted
    # Each epoch begins with the order of its rows.
    permutation = numpy.random.permutation
    numpy.random.permutation = meter.timed(permutation, "train", "train")
    trainer.train()


def main():
    side, shape, rollouts, device = sys.argv[1], Shape(**json.loads(sys.argv[2])), int(sys.argv[3]), sys.argv[4]
    meter = Meter(device)
    force_lengths(shape.limit())
    # One rollout more than is trained: on the last batch of a dataset TRL 1.12 does not accumulate gradients.
    rows = shape.prompts(rollouts + 1, warm_up=rollouts > 1)
    with tempfile.TemporaryDirectory() as folder:
        if side == "trl":
            trl(shape, rows, rollouts, device, meter, folder)
        else:
            ours(shape, rows, rollouts, device, meter, folder, side)


if __name__ == "__main__":
    main()
