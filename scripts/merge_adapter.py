"""Merges a LoRA adapter into its base, into a full model that loads without peft. A reward adapter keeps its head.

    python scripts/merge_adapter.py --model_name_or_path runs/ppo --output_dir merged

The sum is computed in float32 and stored in the base's own precision, or in `--dtype`.
"""

import os
import shutil
from dataclasses import dataclass, field

import torch
import yaml
from peft import PeftConfig
from transformers import AutoConfig
from trl import ModelConfig

from recipes.cli.errors import UserError
from recipes.cli.run import parse, run
from recipes.models.loading import load_policy, load_reward_model
from recipes.models.tokenization import adapter_base, load_tokenizer


@dataclass
class MergeArguments:
    model_name_or_path: str = field(metadata={"help": "Adapter folder or Hub name."})
    output_dir: str = field(metadata={"help": "New folder for the full model."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision of the result; auto is the base's.", "choices": ["auto", "bfloat16", "float32"]},
    )
    allow_quantized_merge: bool = field(
        default=False,
        metadata={"help": "Merge into a 4-bit or 8-bit base although rounding loses part of the adapter."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def trained_on_quantized_base(adapter: str) -> bool:
    """What the record of the run says; `False` where the adapter has none."""
    path = os.path.join(adapter, "train_config.yaml")
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        arguments = yaml.safe_load(file)["arguments"]
    return bool(arguments.get("load_in_4bit") or arguments.get("load_in_8bit"))


def merge(args: MergeArguments) -> None:
    """Write the full model; nothing is written where something is wrong.

    Raises:
        UserError: not an adapter, a quantised base, a reward adapter without head, or a folder that is in use.
    """
    adapter, folder = args.model_name_or_path, args.output_dir
    base = adapter_base(adapter)
    if base is None:
        raise UserError(f"{adapter} is not an adapter (it has no adapter_config.json): there is nothing to merge.")
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"The output folder {folder} is in use, and nothing is ever written over: choose another.")
    config = AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
    quantized = getattr(config, "quantization_config", None) is not None
    if not args.allow_quantized_merge:
        accept = "or accept the loss with --allow_quantized_merge true."
        if quantized:
            raise UserError(
                f"The base {base} is quantised: rounding the sum to its few bits loses part of the adapter. Set "
                f"base_model_name_or_path in adapter_config.json to the unquantised base, {accept}"
            )
        if trained_on_quantized_base(adapter):
            raise UserError(
                f"The adapter {adapter} was trained on a quantised base: on unquantised weights it answers otherwise. "
                f"Use it unmerged with --load_in_4bit true, {accept}"
            )

    model_args = ModelConfig(model_name_or_path=adapter, dtype="float32")
    if PeftConfig.from_pretrained(adapter).task_type == "SEQ_CLS":
        model, tokenizer = load_reward_model(adapter, model_args, args.trust_remote_code)
    else:
        model = load_policy(model_args, args.trust_remote_code)
        tokenizer = load_tokenizer(adapter, trust_remote_code=args.trust_remote_code)
    if not quantized:
        model.to(config.dtype or torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    statistics = os.path.join(adapter, "reward_statistics.json")
    if os.path.exists(statistics):
        shutil.copy(statistics, folder)
    print(f"Merged {adapter} into {base}: {folder}")


def main():
    (args,) = parse((MergeArguments,))
    merge(args)


if __name__ == "__main__":
    run(main)
