"""Checks that what runs is what was launched: the right number of processes, on the right device, as one run.

Several ways of asking for more processes than one are ignored without an error on a CPU, and one of them trains
independent copies that overwrite each other. The request is read from the command line of `accelerate launch`, this
process's parent; what runs is what `torch.distributed` says.
"""

import os
import sys
from dataclasses import dataclass

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from recipes.errors import UserError

SHARDED = ("FSDP", "DEEPSPEED")


@dataclass(frozen=True)
class Request:
    """What `accelerate launch` was asked for; `kind` is Accelerate's name of a distributed type."""

    num_processes: int
    kind: str
    use_cpu: bool
    source: str

    def __str__(self) -> str:
        processes = "1 process" if self.num_processes == 1 else f"{self.num_processes} processes"
        return f"{processes} ({self.kind}{', CPU' if self.use_cpu else ''}, by {self.source})"


def requested() -> Request | None:
    """The request of the `accelerate launch` that started this process, or `None` without one."""
    words = psutil.Process().parent().cmdline()
    names = [os.path.basename(word) for word in words]
    for command in (["accelerate", "launch"], ["accelerate-launch"], ["-m", "accelerate.commands.launch"]):
        for start in range(3):
            if names[start : start + len(command)] == command:
                return read_request(words[start + len(command) :])
    return None


def read_request(launch_arguments: list[str]) -> Request:
    """The request in the arguments of `accelerate launch`: flags first, then the config file."""
    args = launch_command_parser().parse_args(launch_arguments)
    config_file = args.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    config = load_config_from_file(args.config_file) if config_file and not args.cpu else None
    flags = {"FSDP": args.use_fsdp, "DEEPSPEED": args.use_deepspeed, "MULTI_GPU": args.multi_gpu}
    kind = next((name for name, given in flags.items() if given), None)
    if kind is None:
        kind = "NO" if config is None else DistributedType(config.distributed_type).value
    num_processes = args.num_processes or getattr(config, "num_processes", None) or 1
    use_cpu = bool(args.cpu or getattr(config, "use_cpu", False))
    return Request(num_processes, kind, use_cpu, config_file or "accelerate launch")


def check_devices() -> None:
    """Refuse more processes than GPUs, before torch fails on the GPU that is not there.

    Raises:
        UserError: this machine has GPUs, and fewer than the processes started on it.
    """
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    request = requested()
    if 0 < gpus < local and not (request and request.use_cpu):
        raise UserError(f"{local} processes were launched on {gpus} GPUs: lower --num_processes of accelerate launch.")


def check_launch(training_args: TrainingArguments) -> None:
    """Compare the request with what runs, and print both.

    Raises:
        UserError: another number of processes, another kind of distribution or another device than asked for.
    """
    state = training_args.distributed_state
    running = f"{state.num_processes} process{'es' * (state.num_processes > 1)} on {training_args.device.type}"
    running += f" ({state.distributed_type.value})"
    request, world_size = requested(), int(os.environ.get("WORLD_SIZE", "1"))
    problem = find_problem(request, state.num_processes, state.distributed_type.value, world_size, training_args)
    if problem is not None:
        asked = request if request is not None else f"{world_size} processes"
        raise UserError(f"Launched: {asked}. Running: {running}. {problem}")
    if state.is_main_process:
        print(f"Launched: {request or f'{world_size} process'}. Running: {running}.", file=sys.stderr)


def find_problem(
    request: Request | None, num_processes: int, kind: str, world_size: int, training_args: TrainingArguments
) -> str | None:
    """What to do about a launch that did not do what was asked, or `None` where it did."""
    on_cpu = training_args.device.type == "cpu"
    if world_size != num_processes:
        return "Each process would train by itself: add the training argument --use_cpu true."
    if request is None:
        return None
    if request.kind in SHARDED and kind != request.kind:
        return f"{request.kind} shards nothing here: on a CPU launch with accelerate_configs/multi_cpu.yaml."
    if request.num_processes != num_processes:
        several = "multi_cpu.yaml and --use_cpu true" if on_cpu else "multi_gpu.yaml"
        return f"For several processes launch with accelerate_configs/{several}; for one, --num_processes 1."
    if request.use_cpu and not on_cpu:
        return "Add the training argument --use_cpu true, or launch with accelerate_configs/single_gpu.yaml."
    if not request.use_cpu and on_cpu and request.source != "accelerate launch":
        if training_args.use_cpu and torch.cuda.is_available():
            return "The training arguments say use_cpu: true: take it out to run on the GPU."
        return "There is no GPU here: launch with accelerate_configs/cpu.yaml and --use_cpu true."
    return None
