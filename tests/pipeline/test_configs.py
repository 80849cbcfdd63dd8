"""The configs of real bases: they parse, agree with each other and with their comments, and run on small models."""

import importlib
import json
import math
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PretrainedConfig

from recipes.cli.arguments import parse
from recipes.cli.precedence import SAME
from recipes.data.schemas import detect
from scripts.estimate_memory import STEPS
from tests import tiny_models as models
from tests.conftest import ROOT, recipe_line, run_recipe, write_jsonl
from tests.trainers.test_memory import SHAPES

CONFIGS = ROOT / "recipes" / "configs"
BASES = sorted(path.parent.name for path in CONFIGS.glob("*/ppo.yaml") if path.parent.name != "tiny_world")
TASKS = {"sft": "sft", "reward": "ranking", "ppo": "prompt"}
# Hub datasets, and the file in tests/data/fixtures that holds rows of their schema
DATASETS = {
    "HuggingFaceH4/no_robots": "no_robots",
    "HuggingFaceH4/ultrachat_200k": "ultrachat",
    "openbmb/UltraFeedback": "ultrafeedback",
    "trl-lib/Capybara": "messages",
    "trl-lib/hh-rlhf-helpful-base": "trl_preference",
    "trl-lib/tldr": "tldr",
    "trl-lib/tldr-preference": "trl_preference",
    "trl-lib/ultrafeedback-prompt": "prompts",
}


def text(base: str, step: str) -> str:
    return (CONFIGS / base / f"{step}.yaml").read_text(encoding="utf-8")


def values(base: str, step: str) -> dict:
    return yaml.safe_load(text(base, step))


def processes(base: str, step: str) -> int:
    found = re.search(r"--num_processes (\d+)", text(base, step))
    return int(found[1]) if found else 1


def flag(base: str, step: str, name: str) -> str:
    return re.search(rf"--{name} (\S+)", text(base, step))[1]


def test_every_base_has_three_steps_and_a_page():
    assert BASES == sorted(SHAPES)
    for base in BASES:
        assert sorted(path.stem for path in (CONFIGS / base).glob("*.yaml")) == sorted(STEPS)
        page = (CONFIGS / base / "README.md").read_text(encoding="utf-8")
        for step in STEPS:
            launch = " ".join(
                re.sub(r"^# *|\\$", "", line) for line in text(base, step).split("\n\n")[0].splitlines()[1:]
            )
            assert " ".join(launch.split()) in " ".join(page.replace("\\\n", " ").split()), f"{base}/README.md: {step}"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("base", BASES)
def test_a_config_parses_with_every_key_known(base, step):
    """`use_cpu` because a GPU's bf16 is refused where there is none."""
    recipe = importlib.import_module(f"recipes.{step}")
    parsed = parse(recipe.ARGUMENTS, recipe_line(step, CONFIGS / base / f"{step}.yaml", use_cpu=True))
    given = {name: value for name, value in values(base, step).items() if name != "use_cpu"}
    known = {name: getattr(each, name) for each in parsed for name in given if hasattr(each, name)}
    differing = {name for name in given if given[name] != known[name] and str(given[name]) != str(known[name])}
    assert differing <= {"report_to"}, "only `none` is turned into a list"


@pytest.mark.parametrize("base", BASES)
def test_batches_are_those_of_the_comments(base):
    for step in STEPS:
        config = values(base, step)
        batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * processes(base, step)
        if step == "ppo":
            rollout = config["per_device_train_batch_size"] * config["steps_per_generation"] * processes(base, step)
            assert rollout == int(re.search(r"# Rollout: (\d+) episodes", text(base, step))[1])
            assert rollout % batch == 0
            if found := re.search(r"(\d+) rollouts", text(base, step).replace(",", "")):
                assert math.ceil(config["total_episodes"] / rollout) == int(found[1])
        else:
            steps, size = re.search(r"# Optimisation: ([\d,]+) steps of (\d+)", text(base, step)).groups()
            assert batch == int(size)
            if found := re.search(r"\[:(\d+)\]", config.get("dataset_train_split", "")):
                rows = int(found[1]) * (1 - config.get("test_split_size", 0))
                assert math.ceil(rows / batch) * config["num_train_epochs"] == pytest.approx(int(steps), abs=1)


@pytest.mark.parametrize("base", BASES)
def test_the_three_steps_fit_together(base):
    sft, reward, ppo = (values(base, step) for step in STEPS)
    for name in ("use_peft", "dtype", "load_in_4bit", "use_bnb_nested_quant", "bf16"):
        assert len({sft.get(name), reward.get(name), ppo.get(name)}) == 1, name
    assert flag(base, "reward", "model_name_or_path") == flag(base, "ppo", "model_name_or_path")
    assert flag(base, "reward", "model_name_or_path") == flag(base, "sft", "output_dir")
    assert flag(base, "ppo", "reward_model_name_or_path") == flag(base, "reward", "output_dir")
    assert sft["max_length"] <= reward["max_length"]
    prompt = 512 if base != "smollm2_135m" else 416
    assert prompt + ppo["max_completion_length"] <= reward["max_length"], "the reward model has not seen such lengths"


@pytest.mark.parametrize("base", BASES)
def test_datasets_have_a_schema_that_formatting_recognises(base):
    for step in STEPS:
        config = values(base, step)
        wanted = {config["dataset_name"]: TASKS[step]}
        if config.get("reference_dataset_name"):
            wanted[config["reference_dataset_name"]] = "sft"
        for name, task in wanted.items():
            fixture = ROOT / "tests" / "data" / "fixtures" / f"{DATASETS[name]}.json"
            rows = json.loads(fixture.read_text(encoding="utf-8"))["rows"]
            assert detect(rows[0], rows[:1], task)[0] in (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")


# Real runs: only the model, the datasets, the device and the number of steps are others


def small(base: str) -> PretrainedConfig:
    """The architecture of a base, at the size of a toy."""
    config = SHAPES[base]()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "layer_types": ["full_attention"] * 2}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    "base", ["smollm2_135m", pytest.param("qwen3_0.6b", marks=pytest.mark.slow), "pythia_1b_tldr"]
)
def test_the_three_steps_run(base, tmp_path):
    """LoRA with the CPU's config, a 4-bit base with activation checkpointing, and full fine-tuning of four models."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small(base)).save_pretrained(tmp_path / "base")
    tokenizer = models.word_tokenizer(words=50)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "base")
    prompts = models.prompts(64, words=50)
    answers = [[{"role": "assistant", "content": f"w{i % 50} w{i % 7} w3"}] for i in range(128)]
    demonstrations = [{"messages": prompt + answer} for prompt, answer in zip(prompts, answers, strict=False)]
    pairs = [{"prompt": prompt, "chosen": answers[i], "rejected": answers[i + 64]} for i, prompt in enumerate(prompts)]
    files = {
        "sft": write_jsonl(tmp_path / "sft.jsonl", demonstrations),
        "reward": write_jsonl(tmp_path / "reward.jsonl", pairs),
        "ppo": write_jsonl(tmp_path / "ppo.jsonl", [{"prompt": prompt} for prompt in prompts]),
    }
    starts = {"sft": tmp_path / "base", "reward": tmp_path / "sft", "ppo": tmp_path / "sft"}
    for step in STEPS:
        config = values(base, step)
        flags = {"model_name_or_path": starts[step], "dataset_name": files[step], "output_dir": tmp_path / step}
        flags |= {"use_cpu": "true", "bf16": "false", "dataloader_pin_memory": "false"}
        if step == "ppo":
            flags |= {"reward_model_name_or_path": tmp_path / "reward", "dataset_train_split": "train"}
            flags |= {"total_episodes": 1}  # one rollout
        else:
            flags |= {"max_steps": 2}
        if config.get("reference_dataset_name"):
            flags["reference_dataset_name"] = files["sft"]
        run_recipe(step, CONFIGS / base / f"{step}.yaml", **flags)
        record = yaml.safe_load((tmp_path / step / "train_config.yaml").read_text(encoding="utf-8"))["arguments"]
        ours = (*flags, "report_to", *SAME["the length of the run"])
        changed = {name for name in config if name not in ours and record[name] != config[name]}
        assert not changed, f"{step} ran with other values than its config's"
