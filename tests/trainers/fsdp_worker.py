"""Runs with a sharded model (FSDP2), on CPUs: that of `ppo_worker.py`, the same resumed from its middle, and SFT that
diverges.

accelerate launch --config_file accelerate_configs/fsdp2.yaml --mixed_precision no \
    -m tests.trainers.fsdp_worker FOLDER BATCH [full]
"""

import json
import sys
from functools import partial
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from recipes.cli.run import run
from recipes.trainers.checkpoints import WholeSFTTrainer
from tests import tiny_models as models
from tests.trainers.ppo_worker import train

# Adam keeps a state to resume from; with so large an epsilon its steps follow the size of the gradient, as SGD's do.
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1.0}
SHARDS = {"accelerator_config": {"use_configured_state": True}, "save_strategy": "steps"}


def options(full: bool) -> dict:
    """What the runs of PPO have in common with those that they are compared with."""
    return ADAM | {"full": full} | ({} if full else {"ema_decay": 0.5})


def main(folder: Path, batch: int, full: bool) -> None:
    PartialState(cpu=True)
    # Accelerate shards on GPUs only and takes a CPU for plain DDP; torch shards on both.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    own = SHARDS | options(full) | {"save_steps": 2}
    trainer = train(str(folder / "whole"), batch, **own)
    parameters = list(trainer.model.parameters())
    shares = {
        "type": trainer.accelerator.distributed_type.value,
        "here": sum(parameter.to_local().numel() for parameter in parameters),
        "all": sum(parameter.numel() for parameter in parameters),
    }
    trainer.save_model()
    (folder / f"shares_{trainer.accelerator.process_index}.json").write_text(json.dumps(shares), encoding="utf-8")
    train(str(folder / "resumed"), batch, resume=str(folder / "whole" / "checkpoint-2"), **own)
    run(partial(diverge, folder / "diverged", full))


def diverge(folder: Path, full: bool) -> None:
    """SFT whose first step leaves weights that are not finite (full), or so large that the next loss is not."""
    model = models.causal_lm()
    if not full:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    args = SFTConfig(
        str(folder),
        learning_rate=float("inf") if full else 1e30,
        lr_scheduler_type="constant",
        max_steps=3,
        save_steps=1,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **SHARDS,
    )
    rows = {"prompt": models.prompts(16), "completion": [[{"role": "assistant", "content": "w7 w8"}]] * 16}
    tokenizer = models.word_tokenizer()
    WholeSFTTrainer(model, args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["full"])
