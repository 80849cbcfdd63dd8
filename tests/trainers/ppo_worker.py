"""One PPO run whose responses are a function of the prompt, for tests that start it on several processes.

accelerate launch --config_file accelerate_configs/multi_cpu.yaml tests/trainers/ppo_worker.py FOLDER BATCH
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from recipes.trainers.ppo_trainer import PPOConfig, PPOTrainer
from tests import tiny_models as models


class Fixed(PPOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        rows = []
        for ids in prompt_ids:
            generator = torch.Generator().manual_seed(sum(ids))
            length = int(torch.randint(1, 9, (1,), generator=generator))
            rows.append([*torch.randint(5, 64, (length - 1,), generator=generator).tolist(), 1 if length < 8 else 7])
        return rows, None


def reward(prompts, completions, **kwargs):
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


def train(folder: str, batch: int, resume: str | None = None, full: bool = False, **changes) -> PPOTrainer:
    """Two rollouts of 16 episodes, two epochs of one minibatch each; writes the log and the trained weights.

    `full` trains all weights of the policy and of a critic beside it, instead of adapters.
    """
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    options = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 4,
        "max_completion_length": 8,
        "whiten_rewards": True,
        "missing_eos_penalty": 0.5,
        "adaptive_kl_target": 0.1,
        "adaptive_kl_horizon": 100,
        "learning_rate": 0.01 if full else 0.1,
        "optim": "sgd",  # Adam's first steps are the sign of the gradient and would hide its size
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    trainer = Fixed(
        args=PPOConfig(folder, **(options | changes)),
        processing_class=models.word_tokenizer(),
        model=models.causal_lm() if full else get_peft_model(models.causal_lm(), lora),
        reward_model=models.reward_model(),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": models.prompts(32)}),
    )
    # Each process draws its LoRA anew; DDP starts from the first one's, and so does the run on one process.
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if (parameter.requires_grad or ".ema." in name) and not full:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    trainer.train(resume_from_checkpoint=resume)
    kept = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad or "ema" in name.split(".")}
    names = {name: whole(p) for name, p in kept.items()}
    if trainer.accelerator.is_main_process:
        save_file(names, Path(folder) / "trained.safetensors")
        (Path(folder) / "log.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
    return trainer


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a parameter, gathered from all processes where they hold shares of it."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.clone()


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2])).end()
