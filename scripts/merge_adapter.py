"""Merges a LoRA adapter into its base, into a full model that loads without peft. A reward adapter keeps its head.

    python scripts/merge_adapter.py --model_name_or_path runs/ppo --output_dir merged

The sum is computed in float32 and stored in the base's own precision, or in `--dtype`.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

import shutil
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from trl import ModelConfig

from recipes.cli.checkpoints import tidy, unfinished
from recipes.cli.errors import UserError, first_line
from recipes.cli.files import is_write_error, move_contents
from recipes.cli.record import arguments_of
from recipes.cli.run import holds_anything, run
from recipes.models.compatibility import check_model
from recipes.models.loading import STATISTICS, TRAINED_PROMPTS, load_policy, load_reward_model, not_finite
from recipes.models.source import find_file, resolve_model
from recipes.models.tokenization import load_tokenizer


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


ARGUMENTS = (MergeArguments,)


def refuse_lossy_merge(adapter: str, base: str, base_is_quantized: bool) -> None:
    accept = "or accept the loss with --allow_quantized_merge true."
    if base_is_quantized:
        raise UserError(
            f"The base {base} is quantised: rounding the sum to its few bits loses part of the adapter. "
            f"Set base_model_name_or_path in adapter_config.json to the unquantised base, {accept}"
        )
    trained_with = arguments_of(adapter)
    if trained_with.get("load_in_4bit") or trained_with.get("load_in_8bit"):
        raise UserError(
            f"The adapter {adapter} was trained on a quantised base: on unquantised weights it answers otherwise. "
            f"Use it unmerged with --load_in_4bit true, {accept}"
        )


def merge(args: MergeArguments) -> None:
    """Write the full model; nothing is written where something is wrong."""
    adapter, folder = args.model_name_or_path, args.output_dir
    source = resolve_model(adapter, trust_remote_code=args.trust_remote_code)
    quantized = getattr(source.config, "quantization_config", None) is not None  # or no such folder
    if source.base is None:
        raise UserError(f"{adapter} is not an adapter (it has no adapter_config.json): there is nothing to merge.")
    if os.path.isfile(folder) or holds_anything(folder):
        raise UserError(f"The output folder {folder} is not empty, and nothing is ever written over: choose another.")
    if not args.allow_quantized_merge:
        refuse_lossy_merge(adapter, source.base, quantized)
    tokenizer = load_tokenizer(source)
    check_model(source, tokenizer)
    model_args = ModelConfig(dtype="float32")
    is_reward_model = source.has_score_head or source.peft_config.task_type == "SEQ_CLS"
    model = load_reward_model(source, model_args)[0] if is_reward_model else load_policy(source, model_args)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    if not quantized:
        model.to(source.config.dtype or torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype))
    if name := not_finite(model):
        raise UserError(f"{adapter} on {source.base} has weights that are not finite, in {name}: nothing was saved.")
    aside = unfinished(folder, "merged")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed merge left
    try:
        os.makedirs(aside)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for file in filter(None, (find_file(adapter, name) for name in (STATISTICS, TRAINED_PROMPTS))):
            shutil.copy(file, aside)
        move_contents(aside, folder, last="config.json")
        tidy(folder)
    except Exception as error:
        if not is_write_error(error):
            raise
        shutil.rmtree(unfinished(folder), ignore_errors=True)
        raise UserError(f"The merged model cannot be written to {folder}: {first_line(error)}.") from error
    print(f"Merged {adapter} into {source.base}: {folder}")


if __name__ == "__main__":
    run(merge, ARGUMENTS)
