"""Arguments that say the same thing under different names: one that is given is used, or refused beside the other.

A flag of the command line comes before the YAML. That holds for one name by itself; here it is made to hold for
`--max_steps 24` over a YAML's `total_episodes`.
"""

import sys
from collections.abc import Mapping
from typing import Any

from recipes.cli.errors import UserError

# What a flag takes the place of in the YAML, where it would not count beside it.
OVERRIDES = {
    "max_steps": ("total_episodes",),
    "total_episodes": ("max_steps",),
    "num_train_epochs": ("max_steps", "total_episodes"),
    "dataset_name": ("datasets",),
    "datasets": ("dataset_name",),
    "steps_per_generation": ("generation_batch_size",),
    "generation_batch_size": ("steps_per_generation",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs",),
}
# An argument, the other that it depends on, and the value that the other needs for it.
NEEDS = (
    ("save_steps", "save_strategy", "steps"),
    ("eval_steps", "eval_strategy", "steps"),
    ("logging_steps", "logging_strategy", "steps"),
    ("warmup_steps", "lr_scheduler_type", "constant_with_warmup"),
)


def given_flags(words: list[str]) -> dict[str, str]:
    """The flags on a command line with the first word of their values, by name."""
    given = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name.replace("-", "_")] = value if equals else following
    return given


def without_overridden(config: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The values of a YAML but for those whose place a flag of another name takes."""
    unset = {"max_steps": "-1"}
    overridden = {
        other for name, value in given.items() if value != unset.get(name) for other in OVERRIDES.get(name, ())
    }
    return {name: value for name, value in config.items() if name not in overridden}


def limit_steps(groups: tuple, given: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Let the smaller of `max_steps` and `total_episodes` end a run that was given both at once."""
    asked = int(given.get("max_steps", config.get("max_steps", -1)))
    for group in groups:
        if getattr(group, "total_episodes", None) is not None and asked > 0:
            group.max_steps = min(group.max_steps, asked)


def check_used(values: Mapping[str, Any], given: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Check that what was given counts.

    Args:
        values: all arguments as they were parsed.
        given: the flags; they come before `config`, the values of the YAML.

    Raises:
        UserError: an argument would go unused beside another that was given with it.
    """
    if values.get("dataset_name") and values.get("datasets"):
        raise UserError("dataset_name and datasets are two sources of rows: set one of them.")
    for name, other, wanted in NEEDS:
        if not values.get(name) or name not in (*given, *config) or other not in values:
            continue
        value = getattr(values[other], "value", values[other])
        fits = value != "constant" if other == "lr_scheduler_type" else value == wanted
        switched_off = name not in given and other in given  # by a flag, and the YAML's value with it
        if not fits and not switched_off:
            raise UserError(
                f"{name} {values[name]:g} is not used while {other} is {value}: set {other} to {wanted}, or leave "
                f"{name} out."
            )
    if "num_train_epochs" in given and (others := {"max_steps", "total_episodes"} & {*given}):
        print(f"--num_train_epochs is not used: --{others.pop()} sets the length of the run.", file=sys.stderr)
