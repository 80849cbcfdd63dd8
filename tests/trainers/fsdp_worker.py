"""The run of `ppo_worker.py` with a sharded model (FSDP2), on CPUs, then the same resumed from its middle.

accelerate launch --config_file accelerate_configs/fsdp2.yaml --mixed_precision no \
    -m tests.trainers.fsdp_worker FOLDER BATCH [full]
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from tests.trainers.ppo_worker import train

# Adam keeps a state to resume from; with so large an epsilon its steps follow the size of the gradient, as SGD's do.
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1.0}


def main(folder: Path, batch: int, full: bool) -> None:
    PartialState(cpu=True)
    # Accelerate shards on GPUs only and takes a CPU for plain DDP; torch shards on both.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    options = {"accelerator_config": {"use_configured_state": True}, "save_strategy": "steps", "save_steps": 2}
    options |= ADAM | {"full": full}
    trainer = train(str(folder / "whole"), batch, **options)
    parameters = list(trainer.model.parameters())
    shares = {
        "type": trainer.accelerator.distributed_type.value,
        "here": sum(parameter.to_local().numel() for parameter in parameters),
        "all": sum(parameter.numel() for parameter in parameters),
    }
    trainer.save_model()
    (folder / f"shares_{trainer.accelerator.process_index}.json").write_text(json.dumps(shares), encoding="utf-8")
    train(str(folder / "resumed"), batch, resume=str(folder / "whole" / "checkpoint-2"), **options).end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["full"])
