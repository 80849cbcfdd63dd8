"""A recipe with the model in shards (FSDP2), on CPUs.

accelerate launch --config_file accelerate_configs/fsdp2.yaml --mixed_precision no \
    -m tests.pipeline.fsdp_recipe STEP [arguments of the recipe]
"""

import importlib
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from recipes.cli import arguments
from recipes.cli.run import run


def main() -> None:
    PartialState(cpu=True)
    # Accelerate shards on GPUs only and takes a CPU for plain DDP; torch shards on both.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    recipe = importlib.import_module(f"recipes.{sys.argv[1]}")
    # Both refuse shards on a CPU.
    recipe.check_launch = lambda training_args: None
    arguments.check_devices = lambda: None
    recipe.main(*arguments.parse(recipe.ARGUMENTS, sys.argv[2:]))


if __name__ == "__main__":
    run(main)
