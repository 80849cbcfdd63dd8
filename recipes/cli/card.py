"""The model card of a run: base, data, method, numbers, the command, and code that loads the result."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from recipes.cli.errors import counted
from recipes.cli.launch import launcher
from recipes.cli.record import SECRETS, used_in_words
from recipes.cli.screen import RESULTS

METHODS = {
    "sft": "Supervised fine-tuning on demonstrations, with the loss on the response only (TRL's SFTTrainer).",
    "reward": "A reward model by `-log sigmoid(score(better) - score(worse))` over all strict pairs of each ranking "
    "([InstructGPT](https://arxiv.org/abs/2203.02155)).",
    "ppo": "[PPO](https://arxiv.org/abs/1707.06347) with the reward `score - kl_coef * KL(policy || start)` "
    "([InstructGPT](https://arxiv.org/abs/2203.02155)).",
}
GENERATE = """\
from {library} import {auto_class}
from transformers import AutoTokenizer

model = {auto_class}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].size(1):], skip_special_tokens=True))
"""
SCORE = """\
import torch
from {library} import {auto_class}
from transformers import AutoTokenizer

model = {auto_class}.from_pretrained("{name}", num_labels=1)
tokenizer = AutoTokenizer.from_pretrained("{name}")
question = {{"role": "user", "content": "Why is the sky blue?"}}
messages = [question, {{"role": "assistant", "content": "Air scatters blue light most."}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
with torch.no_grad():
    print(model(**inputs).logits[0, 0].item())  # higher is better
"""


def model_card(record: Mapping[str, Any], log_history: list[dict[str, Any]], base: str | None) -> str:
    """Markdown with the Hub's metadata.

    Args:
        record: what [`describe`], `add_datasets` and `add_used` say of the run.
        log_history: Trainer's rows of metrics, in their order.
        base: the base of an adapter; `None` where a full model was trained.
    """
    recipe, arguments = record["recipe"], record["arguments"]
    name, start = arguments["hub_model_id"] or arguments["output_dir"], arguments["model_name_or_path"]
    datasets = record.get("datasets", {})
    data = [f"- {key}: {counted(each['rows'], 'row')} of `{each['source']}`" for key, each in datasets.items()]
    data += [f"- {sentence}" for sentence in used_in_words(record)]
    sources = [each["source"] for each in datasets.values()]
    metadata = ModelCardData(
        library_name="peft" if base else "transformers",
        base_model=None if os.path.isdir(base or start) else base or start,  # the Hub knows no folders
        datasets=sorted({*filter(is_hub_dataset, sources)}) or None,
        tags=["trl", recipe, *(["lora"] if base else [])],
    )
    numbers = [f"| `{key}` | {first:.4g} | {last:.4g} |" for key, first, last in first_and_last(recipe, log_history)]
    versions = ", ".join(f"{package} {version}" for package, version in record["packages"].items())
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {os.path.basename(name.rstrip('/'))}",
        f"{METHODS[recipe]} {'A LoRA adapter on' if base else 'A full model, trained from'} `{base or start}`"
        + (f", starting from `{start}`." if base and base != start else "."),
        "## Load it\n\n```python\n" + loading_code(recipe, name, base) + "```",
        "## Data\n\n" + "\n".join(data),
        "## Numbers\n\n| | first | last |\n|---|---|---|\n" + "\n".join(numbers),
        "## How it was made\n\n"
        + (f"```bash\n{command}\n```\n\n" if (command := command_line(recipe)) else "")
        + f"All arguments are in `train_config.yaml`. Revision {record['git_revision']}; {versions}.",
    ]
    if reward_model := arguments.get("reward_model_name_or_path"):
        parts[2] += f" The score is that of `{reward_model}`; kl_coef is {arguments['kl_coef']}."
    return "\n\n".join(parts) + "\n"


def is_hub_dataset(source: str) -> bool:
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None and not os.path.exists(source)


def first_and_last(recipe: str, log_history: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    found = []
    of_training = ("accuracy", "longer_wins") if recipe == "reward" else ()  # all there is without an evaluation
    for name in (*RESULTS[recipe], *of_training):
        values = [row[name] for row in log_history if row.get(name) is not None]
        found += [(name, values[0], values[-1])] if values else []
    return found


def loading_code(recipe: str, name: str, base: str | None) -> str:
    task = "SequenceClassification" if recipe == "reward" else "CausalLM"
    auto_class = f"Auto{'Peft' if base else ''}ModelFor{task}"
    code = SCORE if recipe == "reward" else GENERATE
    return code.format(library="peft" if base else "transformers", auto_class=auto_class, name=name)


def command_line(recipe: str) -> str | None:
    """The command of this process without secrets, `None` where it is not the recipe's."""
    if os.path.basename(sys.argv[0]) != f"{recipe}.py":
        return None
    words = []
    for word in sys.argv:
        flag, _, _ = word.removeprefix("--").replace("-", "_").partition("=")
        if words and words[-1] == "<secret>" and not word.startswith("--"):
            continue
        words += ["<secret>"] if word.startswith("--") and SECRETS.search(flag) else [word]
    return f"{launcher()} {shlex.join(word for word in words if word != '<secret>')}"
