"""Whether an argument that is given counts: it is used, or refused in one line before anything loads.

A flag comes before the YAML, also where the YAML has another name for it: `--max_steps 24` takes the place of a YAML's
`total_episodes`, and a line says so.
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from trl import ModelConfig

from recipes.cli.errors import UserError
from recipes.cli.screen import say

# What is decided, and the names of which one counts.
SAME = {
    "the length of the run": ("max_steps", "total_episodes", "num_train_epochs"),
    "where the rows are from": ("dataset_name", "datasets"),
    "the size of a rollout": ("steps_per_generation", "generation_batch_size"),
    "activation checkpointing": ("activation_checkpointing", "gradient_checkpointing"),
    "its options": ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
}
IS_LORA = re.compile("lora_|use_rslora|use_dora")
# argument: (the argument that decides whether it is used, values that leave it unused, a value that uses it)
UNUSED = {
    "save_steps": ("save_strategy", ("no", "epoch", "best"), "steps"),
    "eval_steps": ("eval_strategy", ("no", "epoch"), "steps"),
    "do_eval": ("eval_strategy", ("no",), "epoch"),
    "eval_on_start": ("eval_strategy", ("no",), "epoch"),
    "test_split_size": ("eval_strategy", ("no",), "epoch"),
    "logging_steps": ("logging_strategy", ("no", "epoch"), "steps"),
    "warmup_steps": ("lr_scheduler_type", ("constant",), "constant_with_warmup"),
    "adaptive_kl_horizon": ("adaptive_kl_target", (None,), "a KL in nats"),
    "ptx_max_length": ("ptx_dataset_name", (None,), "demonstrations"),
    "ptx_dataset_split": ("ptx_dataset_name", (None,), "demonstrations"),
    "separate_reward_model": ("reward_model_name_or_path", (None,), "a reward model"),
    "max_error_rate": ("on_error", ("raise",), "skip"),
    **{each.name: ("use_peft", (False,), "true") for each in fields(ModelConfig) if IS_LORA.match(each.name)},
    **{each.name: ("load_in_4bit", (False,), "true") for each in fields(ModelConfig) if "bnb_" in each.name},
}

# arguments of TRL that no recipe has a use for, and what does it here
REFUSED = {
    "model_init_kwargs": "--dtype, --attn_implementation and others of ModelConfig say how to load the model",
    "dataset_text_field": "rows become messages: name their columns with --dataset_mapping",
    "dataset_kwargs": "every row is prepared here",
    "ignore_bias_buffers": "no buffer is left out",
    "bf16_full_eval": "evaluation has the precision of training; after it, this rounds the weights that are saved",
    "fp16_full_eval": "evaluation has the precision of training; after it, this rounds the weights that are saved",
    "do_train": "a recipe trains",
    "do_predict": "scripts/sample_responses.py answers prompts",
}
PATHS = re.compile(r".*_path|.*_dir|.*dataset_name|output|compare")  # arguments whose value cannot be an empty text
AT_LEAST_0, AT_LEAST_1, SHARE = (0, math.inf, "0 or more"), (1, math.inf, "1 or more"), (0, 1, "0 to 1")
BELOW_1 = (0, math.nextafter(1, 0), "0 or more, and below 1")
# argument: the least and the greatest value that means something, in words
RANGES = {
    "max_steps": (1, math.inf, "1 or more, or -1 for a run of --num_train_epochs"),
    **dict.fromkeys(("num_train_epochs", "repetition_penalty"), (sys.float_info.min, math.inf, "more than 0")),
    "top_p": (sys.float_info.min, 1, "more than 0, at most 1"),
    **dict.fromkeys(("learning_rate", "max_grad_norm", "weight_decay", "adam_epsilon"), AT_LEAST_0),
    **dict.fromkeys(("dataloader_num_workers", "center_rewards_coefficient", "top_k", "temperature"), AT_LEAST_0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "max_length"), AT_LEAST_1),
    **dict.fromkeys(("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"), AT_LEAST_1),
    **dict.fromkeys(("lora_r", "lora_alpha", "num_prompts", "num_checkpoints", "num_generations"), AT_LEAST_1),
    "pad_to_multiple_of": AT_LEAST_1,
    **dict.fromkeys(("curve_generations", "eval_batch_size", "prompt_tokens", "responses_per_prompt"), AT_LEAST_1),
    "max_completion_length": AT_LEAST_1,
    "best_of_n": (2, math.inf, "2 or more"),
    **dict.fromkeys(("max_error_rate", "label_smoothing_factor", "min_p"), SHARE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), BELOW_1),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1, "0 to 4294967295")),
}


def without_overridden(config: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a YAML but for those whose place a flag of another name takes, which a line on stderr names.

    Two names of the same thing on the command line, or in the YAML where no flag decides, are refused.
    """
    kept = dict(config)
    for what, names in SAME.items():
        by_flag = [f"--{name}" for name in names if is_set(name, flags.get(name))]
        in_yaml = [name for name in names if name not in flags and is_set(name, config.get(name))]
        decides = by_flag or in_yaml
        if len(decides) > 1:
            where = "Command line" if by_flag else "YAML"
            raise UserError(f"{where}: {' and '.join(decides)} both set {what}: remove {' or '.join(decides)}.")
        for name in in_yaml if by_flag else ():
            del kept[name]
            say(f"{by_flag[0]} takes the place of {name}: {config[name]} in the YAML.")
    return kept


def is_set(name: str, value: Any) -> bool:
    return value is not None and (name, value) != ("max_steps", -1)


def check_ranges(given: Mapping[str, Any]) -> None:
    """Refuse a number that libraries take for another wish, or refuse after everything has loaded."""
    for name in RANGES.keys() & given.keys():
        value, (least, most, wanted) = given[name], RANGES[name]
        if name == "pad_to_multiple_of" and isinstance(value, str):  # TRL reads the number in it, and knows "auto"
            value = int(value) if re.fullmatch(r"-?\d+", value) else None
        is_number = isinstance(value, int | float) and math.isfinite(value)  # no list or mapping of a YAML
        if is_set(name, value) and not (is_number and least <= value <= most):
            raise UserError(f"--{name} {value}: expected {wanted}.")


def check_used(values: Mapping[str, Any], flags: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse a path that is empty, and what would go unused of the `flags` and of the YAML's `config`.

    `values` are all arguments as they were parsed; they decide what is used.
    """
    for name, value in {**config, **flags}.items():
        if name in REFUSED and value not in (None, name == "do_train"):
            raise UserError(f"--{name} is not used: {REFUSED[name]}.")
        if value == "" and PATHS.fullmatch(name):
            raise UserError(f"--{name} is empty: is it a variable that is not set?")
        if PATHS.fullmatch(name) and re.search(r"\$\{?[A-Za-z_]", str(value)):
            raise UserError(
                f"--{name} {value}: only a shell fills in variables: write the path out, or give the flag."
            )
        if name in UNUSED and values[name]:
            other, without, wanted = UNUSED[name]
            decides = getattr(values.get(other), "value", values.get(other))
            switched_off = name not in flags and other in flags  # by a flag, and the YAML's value with it
            if decides in without and not switched_off:
                raise UserError(
                    f"{name} is not used while {other} is {decides}: set {other} to {wanted}, or leave {name} out."
                )
