"""Checks that processes and device match the launch command: their number, the device, and that it is one run.

On a CPU Accelerate ignores some requests for several processes; one way trains copies that overwrite each other. The
request is read from the command line of `accelerate launch`, the parent of this process.
"""

import os
import shlex
from dataclasses import dataclass

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, get_int_from_env
from huggingface_hub import HfApi, is_offline_mode
from transformers import TrainingArguments

from recipes.cli.errors import UserError, counted, first_line
from recipes.cli.screen import say

SHARDED = ("FSDP", "DEEPSPEED")
PLAIN = {"NO": "not distributed"}  # Accelerate's name says little


@dataclass(frozen=True)
class Request:
    """What `accelerate launch` was asked for; `kind` is Accelerate's name of a distributed type."""

    num_processes: int
    kind: str
    use_cpu: bool
    config_file: str | None
    gpu_ids: str  # "all", or such as "0,1"
    command: str  # the beginning of a line that starts another script in the same way

    def __str__(self) -> str:
        source = self.config_file or "accelerate launch without a config file"
        kind = PLAIN.get(self.kind, self.kind) + (", CPU" if self.use_cpu else "")
        return f"{count(self.num_processes)} ({kind}, by {source})"


def count(processes: int) -> str:
    return counted(processes, "process", "processes")


def world_size() -> int:
    """Number of processes that the launcher (Accelerate, torchrun or mpirun) announced to this one."""
    return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)


def requested() -> Request | None:
    """The request of the `accelerate launch` that started this process; `None` without one, or if it is hidden."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    before = ""
    for place, name in enumerate(map(os.path.basename, words), 1):
        whole = name in ("accelerate-launch", "accelerate.commands.launch")
        if whole or (name == "launch" and before.startswith("accelerate")):
            return read_request(words[place:])
        before = name
    return None


def launcher() -> str:
    """How this process was started, as the beginning of another command."""
    request = requested()
    return request.command if request else "python"


def read_request(launch_arguments: list[str]) -> Request:
    """The request in the arguments of `accelerate launch`: flags first, then the config file."""
    args = launch_command_parser().parse_args(launch_arguments)
    has_default = os.path.isfile(default_config_file) and not args.cpu  # then Accelerate does not read it
    config_file = args.config_file or (default_config_file if has_default else None)
    config = load_config_from_file(args.config_file) if config_file else None
    kind = "NO" if config is None else DistributedType(config.distributed_type).value
    flags = {"FSDP": args.use_fsdp, "DEEPSPEED": args.use_deepspeed, "MULTI_GPU": args.multi_gpu}
    kind = next((name for name, given in flags.items() if given), kind)
    num_processes = args.num_processes or getattr(config, "num_processes", None) or world_size()
    use_cpu = bool(args.cpu or getattr(config, "use_cpu", False))
    gpu_ids = args.gpu_ids or getattr(config, "gpu_ids", None) or "all"
    own = launch_arguments[: -1 - len(args.training_script_args)]
    words = [word for word in own if word not in ("-q", "--quiet", "-m", "--module")]
    command = shlex.join(["accelerate", "launch", "-q", *words])
    return Request(num_processes, kind, use_cpu, config_file, gpu_ids, command)


def check_gpus() -> None:
    """Refuse a GPU configuration without a GPU, GPUs that are not ours, and more processes than GPUs."""
    local, gpus, request = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count(), requested()
    if request and request.config_file and not request.use_cpu and not torch.accelerator.is_available():
        instead = "cpu.yaml" if request.num_processes == 1 else "multi_cpu.yaml"
        raise UserError(
            f"Launched: {request}. No GPU was found: launch with accelerate_configs/{instead} and --use_cpu true."
        )
    if gpus and request and request.gpu_ids != "all":  # which Accelerate puts in the place of what is allowed
        ours = psutil.Process(os.getppid()).environ().get("CUDA_VISIBLE_DEVICES", request.gpu_ids)
        if not {*request.gpu_ids.split(",")} <= {*ours.split(",")}:
            raise UserError(
                f"Launched: {request}. Its gpu_ids {request.gpu_ids} would take other GPUs than CUDA_VISIBLE_DEVICES "
                f"names, {ours}: choose from these with --gpu_ids."
            )
    if 0 < gpus < local and not (request and request.use_cpu):
        raise UserError(
            f"{count(local)} on {counted(gpus, 'GPU')}: lower --num_processes of accelerate launch to {gpus}."
        )


def check_wandb() -> None:
    """Refuse to log to W&B without its key, which wandb finds out after the models have loaded."""
    if os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError("--report_to wandb: there is no W&B key; type wandb login, or set WANDB_MODE=offline.")


def check_hub(token: str | None) -> None:
    """Refuse to push to a Hub that does not let this machine in, which it would say after the training."""
    try:
        HfApi().whoami(token=token)
    except Exception as error:  # of the Hub, or of the network below it
        what = "HF_HUB_OFFLINE is set" if is_offline_mode() else first_line(error)
        raise UserError(
            f"--push_to_hub true: the Hub does not let this machine in ({what}); type hf auth login, or leave it "
            "out and push the folder later with hf upload."
        ) from error


def check_launch(training_args: TrainingArguments) -> None:
    """Refuse services that do not answer, and a run by other processes or devices than asked for; print both."""
    if training_args.process_index == 0:  # it logs and pushes, and other machines may have no keys
        if "wandb" in training_args.report_to:
            check_wandb()
        if training_args.push_to_hub:
            check_hub(training_args.hub_token)
    if getattr(training_args, "activation_offloading", False) and training_args.device.type == "cpu":
        raise UserError("activation_offloading moves activations off a GPU, and this runs on a CPU: leave it out.")
    state = training_args.distributed_state
    kind = state.distributed_type.value
    running = f"{count(state.num_processes)} on {training_args.device.type} ({PLAIN.get(kind, kind)})"
    if (mixed := training_args.mixed_precision) != "no":  # accelerate launch may wish for another
        running += f", mixed precision {mixed}"
    request = requested()
    problem = find_problem(request, state.num_processes, training_args)
    asked = request or f"{count(world_size())} without accelerate launch"
    if problem is not None:
        raise UserError(f"Launched: {asked}. Running: {running}. {problem}")
    what = type(training_args).__name__.removesuffix("Config")
    say(f"{what} into {training_args.output_dir}. Launched: {asked}. Running: {running}.")


def find_problem(request: Request | None, num_processes: int, training_args: TrainingArguments) -> str | None:
    """What to do about a launch that did not do what was asked, or `None` where it did."""
    on_cpu = training_args.device.type == "cpu"
    if training_args.n_gpu > 1:
        return "One process would split its batches over all GPUs: use --gpu_ids 0 or multi_gpu.yaml."
    if request is not None and request.kind in SHARDED and on_cpu:
        return f"{request.kind} shards nothing on a CPU: launch with accelerate_configs/multi_cpu.yaml."
    if world_size() != num_processes:
        on_cpus, on_gpus = "add the training argument --use_cpu true", "launch with accelerate_configs/multi_gpu.yaml"
        return f"Each process would train by itself: {on_gpus if torch.cuda.is_available() else on_cpus}."
    if request is None:
        return None
    if request.num_processes != num_processes:
        several = "multi_cpu.yaml and --use_cpu true" if on_cpu else "multi_gpu.yaml"
        return f"For several processes launch with accelerate_configs/{several}; for one, --num_processes 1."
    if request.use_cpu and not on_cpu:
        return "Add the training argument --use_cpu true, or launch with accelerate_configs/single_gpu.yaml."
    if on_cpu and not request.use_cpu and request.config_file is not None:
        return "The training argument use_cpu is true: set it to false to train on the GPU, or launch with cpu.yaml."
    return None
