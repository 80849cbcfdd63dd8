"""Says before a run whether it fits: the peak memory of a recipe on one device, by part, from config.json alone.

    python scripts/estimate_memory.py --config recipes/configs/qwen3_8b/ppo.yaml --gpu_memory_gb 80
    python scripts/estimate_memory.py ppo --model_name_or_path Qwen/Qwen3-0.6B --use_peft true --gpu_memory_gb 8

Takes the arguments of the recipe (`sft`, `reward` or `ppo`, by default the name of the config file) and those of a
launch line. Exit code 0: it fits; 1: it does not. More in docs/memory.md.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__, *(f"{sys.path[0]}/recipes/{step}.py" for step in ("sft", "reward", "ppo")))

import importlib
import re
from dataclasses import dataclass, field, replace

import psutil
import torch
import transformers.training_args
from trl import ModelConfig

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError, counted
from recipes.cli.run import run
from recipes.models.adapters import new_adapter_config
from recipes.models.source import resolve_model
from recipes.trainers.fast.merged_copy import fits_beside
from recipes.trainers.memory import GIB, Setting, estimate
from recipes.trainers.replaced import replaced

STEPS = ("sft", "reward", "ppo")
# Assumed, not measured: what CUDA's context and libraries take, and the share of the allocator's memory lost to gaps.
CUDA_CONTEXT, FRAGMENTATION = 0.6 * GIB, 0.05
PYTHON = 1.0 * GIB  # a process with torch and TRL, on a CPU


@dataclass
class EstimateArguments:
    """What the recipes' own arguments do not say."""

    gpu_memory_gb: float | None = field(
        default=None, metadata={"help": "Memory of one device, in GiB. Default: the GPU's here, with use_cpu the RAM."}
    )
    prompt_tokens: int = field(default=512, metadata={"help": "Longest prompt of PPO, in tokens."})
    responses_per_prompt: int = field(default=2, metadata={"help": "Responses in a ranking, for the reward model."})
    num_processes: int = field(default=1, metadata={"help": "Processes; more than one exchange gradients (DDP)."})


ARGUMENTS = (EstimateArguments,)


def parse_on_any_machine(step: str, words: list[str]) -> tuple:
    """The recipe's arguments and this command's, without the refusal of bf16 where there is no GPU."""
    recipe = importlib.import_module(f"recipes.{step}")
    with replaced(transformers.training_args, is_torch_bf16_gpu_available=lambda: True):
        return parse((*recipe.ARGUMENTS, *ARGUMENTS), words)


def add_base(model_args: ModelConfig, step: str, config: str) -> ModelConfig:
    """`model_args` with the base and the adapter of the sft.yaml beside the config, where they name none."""
    beside = os.path.join(os.path.dirname(config), "sft.yaml")
    if model_args.model_name_or_path is not None:
        return model_args
    if step == "sft" or not os.path.exists(beside):
        raise UserError("Command line: --model_name_or_path is required.")
    sft = parse_on_any_machine("sft", ["--config", beside])[2]
    names = [name for name in vars(sft) if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    return replace(model_args, **{name: getattr(sft, name) for name in ("model_name_or_path", *names)})


def read_setting(step: str, training_args, model_args: ModelConfig, args: EstimateArguments) -> Setting:
    source = resolve_model(model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code)
    lora = new_adapter_config(model_args)
    if lora is not None and source.base is not None:  # the adapter of a folder is trained on
        lora = source.peft_config
        lora.task_type, lora.modules_to_save, lora.inference_mode = "CAUSAL_LM", None, False
    is_ppo = step == "ppo"
    response_tokens = training_args.max_completion_length if is_ppo else 0
    tokens = args.prompt_tokens + response_tokens if is_ppo else training_args.max_length
    if tokens is None:
        raise UserError("max_length: null has no longest row: set --max_length.")
    rows = training_args.per_device_train_batch_size
    samples_here = is_ppo and not training_args.use_vllm
    dtype = model_args.dtype or "float32"
    quantization = "8bit" if model_args.load_in_8bit else None
    if model_args.load_in_4bit:
        quantization = "4bit nested" if model_args.use_bnb_nested_quant else "4bit"
    return Setting(
        step=step,
        config=source.config,
        rows=rows * args.responses_per_prompt if step == "reward" else rows,
        tokens=tokens,
        response_tokens=response_tokens,
        rollout_rows=rows * training_args.steps_per_generation if samples_here else 0,
        scoring_rows=training_args.local_rollout_forward_batch_size if is_ppo else 0,
        merged_copy=samples_here and not training_args.use_cpu and "merged_copy" in training_args.fast_paths,
        lora=lora,
        dtype=getattr(torch, dtype) if dtype != "auto" else source.config.dtype or torch.float32,
        autocast=training_args.bf16,
        quantization=quantization,
        trust_remote_code=source.trust_remote_code,
        checkpointing=training_args.gradient_checkpointing,
        attn_implementation=model_args.attn_implementation,
        optimizer=training_args.optim,
        accumulates=training_args.gradient_accumulation_steps > 1,
        buckets=args.num_processes > 1,
        on_cpu=training_args.use_cpu,
    )


def device_memory(gpu_memory_gb: float | None, on_cpu: bool) -> float:
    """Bytes of the device that the run has to fit."""
    if gpu_memory_gb is not None:
        return gpu_memory_gb * GIB
    if on_cpu:
        return psutil.virtual_memory().total
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    raise UserError("There is no GPU here: give the memory of the one you mean, as --gpu_memory_gb 24.")


def show(title: str, parts: dict[str, float], note: str = "") -> None:
    print(f"{title:42}{sum(parts.values()) / GIB:8.2f}{note}")
    for name, size in parts.items():
        print(f"  {name:40}{size / GIB:8.2f}")


def main():
    words = [part for word in sys.argv[1:] for part in re.split("(?<=^--config)=", word)]
    config = words[words.index("--config") + 1] if "--config" in words[:-1] else ""
    named = [words.pop(0)] if words and not words[0].startswith("-") else []
    step = named[0] if named else os.path.splitext(os.path.basename(config))[0]
    if step not in STEPS:
        raise UserError(f"Command line: begin with {', '.join(STEPS)}, or give the --config of one.")
    *_, training_args, model_args, _, args = parse_on_any_machine(step, words)
    model_args = add_base(model_args, step, config)
    setting = read_setting(step, training_args, model_args, args)
    memory = device_memory(args.gpu_memory_gb, setting.on_cpu)
    found = estimate(setting)
    copied = found.phases.get("generation", {}).get("merged copy", 0)
    if not fits_beside(copied, memory - sum(found.held.values())):  # PPO then samples without it
        setting = replace(setting, merged_copy=False)
        found = estimate(setting)
    reserved = {"Python (assumed)": PYTHON} if setting.on_cpu else {}
    if step == "ppo" and training_args.use_vllm and training_args.vllm_mode == "colocate":
        reserved["vLLM"] = training_args.vllm_gpu_memory_utilization * memory
    if not setting.on_cpu:
        gaps = FRAGMENTATION * (found.total + sum(reserved.values()))
        reserved["CUDA context and gaps (assumed)"] = CUDA_CONTEXT + gaps

    weights = setting.quantization or str(setting.dtype).removeprefix("torch.")
    kind = "full fine-tuning" if setting.lora is None else f"LoRA of rank {setting.lora.r}"
    rows = f"{counted(setting.rows, 'row')} of {counted(setting.tokens, 'token')}"
    print(f"{step} of {model_args.model_name_or_path}: {kind}, {weights}, {rows} at a time; in GiB:\n")
    show("all the time", found.held | reserved)
    for phase, parts in found.phases.items():
        show(f"in {phase}", parts, "  <- the most" if phase == found.worst and len(found.phases) > 1 else "")
    needed = found.total + sum(reserved.values())
    print(f"\n{'fits' if needed <= memory else 'does not fit'}: {needed / GIB:.1f} of {memory / GIB:.1f} GiB")
    sys.exit(0 if needed <= memory else 1)


if __name__ == "__main__":
    run(main)
