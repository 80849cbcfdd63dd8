"""The reward recipe with the model in shards (FSDP2), on CPUs; it keeps the scores behind the statistics, too.

accelerate launch --config_file accelerate_configs/fsdp2.yaml -m tests.pipeline.fsdp_recipe [arguments of the recipe]
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from recipes import reward
from recipes.cli import arguments
from recipes.cli.run import run


def main() -> None:
    PartialState(cpu=True)
    # Accelerate shards on GPUs only and takes a CPU for plain DDP; torch shards on both.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # Both refuse shards on a CPU.
    reward.check_launch = lambda training_args: None
    arguments.check_gpus = lambda: None
    save = reward.save_reward_statistics

    def save_scores(folder, scores, source):
        Path(folder, "scores.json").write_text(json.dumps(scores), encoding="utf-8")
        return save(folder, scores, source)

    reward.save_reward_statistics = save_scores
    reward.main(*arguments.parse(reward.ARGUMENTS, sys.argv[1:]))


if __name__ == "__main__":
    run(main)
