"""The model card of a run: base, data, method, numbers, the command, and code that loads the result."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from recipes.cli.launch import launcher
from recipes.cli.record import used_in_words
from recipes.cli.screen import RESULTS, first_and_last

TEMPLATE = os.path.join(os.path.dirname(__file__), "model_card.md.jinja")


def model_card(record: Mapping[str, Any], log_history: list[dict[str, Any]], base: str | None) -> str:
    """Markdown with the Hub's metadata, of a run's record and Trainer's log; `base` is that of an adapter."""
    recipe, arguments, datasets = record["recipe"], record["arguments"], record.get("datasets", {})
    name, start = arguments["hub_model_id"] or arguments["output_dir"], arguments["model_name_or_path"]
    library = "peft" if base else "transformers"
    metadata = ModelCardData(
        library_name=library,
        base_model=None if os.path.isdir(base or start) else base or start,  # the Hub knows no folders
        datasets=sorted({each["source"] for each in datasets.values() if is_hub_dataset(each["source"])}) or None,
        tags=["trl", recipe, *(["lora"] if base else [])],
    )
    metrics = [*RESULTS[recipe], *(["accuracy", "longer_wins"] if recipe == "reward" else [])]  # without an evaluation
    card = ModelCard.from_template(
        metadata,
        TEMPLATE,
        recipe=recipe,
        name=name,
        title=os.path.basename(name.rstrip("/")),
        library=library,
        base=base,
        start=start,
        reward_model=arguments.get("reward_model_name_or_path"),
        kl_coef=arguments.get("kl_coef"),
        datasets=datasets,
        used=used_in_words(record),
        numbers=first_and_last(log_history, metrics),
        command=command_line(recipe),
        revision=record["git_revision"],
        versions=", ".join(f"{package} {version}" for package, version in record["packages"].items()),
    )
    return f"{card}\n"


def is_hub_dataset(source: str) -> bool:
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None and not os.path.exists(source)


def command_line(recipe: str) -> str | None:
    """The command of this process, `None` where it is not the recipe's."""
    return f"{launcher()} {shlex.join(sys.argv)}" if os.path.basename(sys.argv[0]) == f"{recipe}.py" else None
