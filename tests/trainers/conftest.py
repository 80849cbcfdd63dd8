"""What the tests of the trainers share: a base with an SFT and a reward adapter on disk, and a PPOTrainer on them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from recipes.models.adapters import add_score_roles
from recipes.trainers.ppo_trainer import PPOConfig, PPOTrainer
from tests import tiny_models as models

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, an SFT adapter and a reward adapter on disk, with random weights that change the outputs."""
    folder = tmp_path_factory.mktemp("ppo")
    paths = {name: str(folder / name) for name in ("base", "sft", "reward")}
    models.causal_lm().save_pretrained(paths["base"])
    models.word_tokenizer().save_pretrained(paths["base"])
    torch.manual_seed(3)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(paths["base"]), LoraConfig(task_type="CAUSAL_LM", **LORA)
    )
    policy.save_pretrained(paths["sft"])
    reward = AutoModelForSequenceClassification.from_pretrained(paths["base"], num_labels=1)
    reward = get_peft_model(reward, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA))
    reward.save_pretrained(paths["reward"])
    return paths


def config(output_dir, **kwargs) -> PPOConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return PPOConfig(str(output_dir), **(defaults | kwargs))


def shared_base_policy(world) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(world["base"])
    model = PeftModel.from_pretrained(base, world["sft"], is_trainable=True)
    add_score_roles(model, {"reward": world["reward"], "critic": world["reward"]})
    return model


def make_trainer(world, output_dir, model=None, rows=64, trainer_kwargs=None, **kwargs) -> PPOTrainer:
    return PPOTrainer(
        args=config(output_dir, **kwargs),
        processing_class=AutoTokenizer.from_pretrained(world["base"]),
        model=shared_base_policy(world) if model is None else model,
        train_dataset=Dataset.from_dict({"prompt": models.prompts(rows)}),
        **(trainer_kwargs or {}),
    )


def history(trainer, name) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]
