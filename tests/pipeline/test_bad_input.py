"""What a user can get wrong with a recipe: one line, exit code 1, nothing written."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from recipes.cli.run import run
from tests import tiny_models as models
from tests.conftest import ROOT, recipe_line, run_recipe, write_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Two bases of different size, an SFT and a reward adapter on the first, small data files."""
    folder = tmp_path_factory.mktemp("files")
    base = models.save_base(folder / "base")
    other = models.save_base(folder / "other", hidden_size=48, num_attention_heads=4)
    models.save_adapter(folder / "sft", base)
    models.save_adapter(folder / "reward", base, "SEQ_CLS")
    models.save_adapter(folder / "other_reward", other, "SEQ_CLS")
    prompts = [{"prompt": prompt} for prompt in models.prompts(64)]
    write_jsonl(folder / "prompts.jsonl", prompts)
    more = models.word_tokenizer()
    more.add_tokens("<more>")
    more.save_pretrained(folder / "more")
    rankings = [
        {"prompt": f"w{n}", "responses": [{"text": f"w{n} w{m}", "rank": m} for m in (1, 2)]} for n in range(8)
    ]
    write_jsonl(folder / "rankings.jsonl", rankings)
    write_jsonl(folder / "wrong.jsonl", [{"question": "w1", "reply": "w2"}])
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def error_of(tmp_path, monkeypatch, capsys):
    """The one line that a recipe's command prints; the output folder must not be touched."""

    def error_of(step: str, arguments: dict, config: Path | None = None) -> str:
        recipe = importlib.import_module(f"recipes.{step}")
        line = recipe_line(step, config, output_dir=tmp_path / "out", **arguments)
        monkeypatch.setattr(sys, "argv", [step, *line])
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as stop:
            run(recipe.main, recipe.ARGUMENTS)
        assert stop.value.code == 1
        assert not (tmp_path / "out").exists()
        lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return error_of


def ppo_files(files, **changes) -> dict:
    names = {"model_name_or_path": "sft", "reward_model_name_or_path": "reward", "dataset_name": "prompts.jsonl"}
    return {key: files.get(name, name) for key, name in (names | changes).items()}


CASES = [
    ("sft", {"dataset_name": "nowhere.jsonl"}, r"nowhere\.jsonl"),
    ("sft", {"dataset_name": "wrong.jsonl"}, r"wrong\.jsonl.*(question|reply)"),
    ("sft", {"model_name_or_path": "nowhere/at/all"}, r"nowhere/at/all"),
    ("sft", {"learning_rat": "1"}, r"Command line: unrecognized arguments: --learning_rat"),
    ("sft", {"load_in_4bit": "true", "use_peft": "false"}, r"cannot perform fine-tuning on purely quantized models"),
    ("sft", {"activation_offloading": "true"}, r"activation_offloading .* this runs on a CPU: leave it out"),
    ("sft", {"lr_scheduler_type": "cosine_with_min_lr"}, r"An argument cannot be used: .*min_lr"),
    ("sft", {"lr_scheduler_kwargs": '{"foo": 1}'}, r"An argument cannot be used: .*foo"),
    (
        "sft",
        {"eval_strategy": "epoch", "metric_for_best_model": "nosuch"},
        r"An argument cannot be used: .*eval_nosuch",
    ),
    ("sft", {"optim": "galore_adamw", "optim_target_modules": "q_proj"}, r"An argument cannot be used: .*galore"),
    ("sft", {"dataset_config": "small"}, r"is one file, and has no configuration 'small'"),
    ("sft", {"eos_token": "<|no|>"}, r"`eos_token` \('<\|no\|>'\) is not found in the vocabulary"),
    (
        "sft",
        {"chat_template_path": "nowhere.jinja"},
        r"--chat_template_path nowhere\.jinja: no template",
    ),
    ("sft", {"lora_target_modules": ["q_proj", "lm_head"]}, r"adapter to `lm_head` is not supported"),
    ("reward", {"bf16_full_eval": "true"}, r"--bf16_full_eval is not used: .*rounds the weights that are saved"),
    ("reward", {"dataset_name": "wrong.jsonl", "model_name_or_path": "sft"}, r"wrong\.jsonl"),
    ("reward", {"dataset_name": "rankings.jsonl", "reference_dataset_name": "gone.jsonl"}, r"gone\.jsonl: no such"),
    (
        "reward",
        {"chat_template_path": "more", "use_peft": "true"},
        r"--chat_template_path .*more adds 1 token that",
    ),
    ("ppo", {"reward_model_name_or_path": "sft"}, r"has no trained score head"),
    ("ppo", {"reward_model_name_or_path": "other_reward"}, r"was trained on the base .*other, the policy on .*base"),
    ("ppo", {"reward_funcs": "no.such.function"}, r"--reward_funcs no\.such\.function: write it as module\.function"),
    ("ppo", {"reward_weights": [1, 2, 3]}, r"--reward_weights has 3 values for 1 reward:"),
    ("ppo", {"load_in_4bit": "true", "use_peft": "false"}, r"freeze the base: set use_peft: true"),
    ("ppo", {"critic_warmup_steps": "4", "max_steps": "4"}, r"has 4 steps, and none would train the policy"),
    (
        "ppo",
        {
            "critic_warmup_steps": "2",
            "num_train_epochs": "1.5",  # of one step each
            "per_device_train_batch_size": "64",
            "gradient_accumulation_steps": "1",
            "num_iterations": "1",
        },
        r"has 2 steps, and none would train the policy",
    ),
    ("ppo", {"critic_warmup_steps": "9000"}, r"has \d+ steps, and none would train the policy"),
    ("ppo", {"kl_coef": "-1"}, r"kl_coef must be at least 0"),
    ("ppo", {"beta": "0.1"}, r"set kl_coef instead of beta"),
    ("ppo", {"per_device_train_batch_size": "100"}, r"One rollout is 100 prompts and the dataset has 64"),
    ("ppo", {"resume_from_checkpoint": "true"}, r"there is no checkpoint in"),
]


@pytest.mark.parametrize(
    ("step", "changes", "message"), CASES, ids=[f"{step}-{list(changes)[0]}" for step, changes, _ in CASES]
)
def test_one_line(files, error_of, step, changes, message):
    arguments = {key: files.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    arguments = (ppo_files(files) if step == "ppo" else {"model_name_or_path": files["base"]}) | arguments
    line = error_of(step, arguments)
    assert re.search(message, line), line


def test_an_unknown_key_in_the_yaml(files, error_of, tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text("lora_rank: 4\n", encoding="utf-8")
    line = error_of("sft", {"model_name_or_path": files["base"]}, config)
    assert f"--config {config}: unrecognized arguments: --lora_rank=4" in line


def test_an_adapter_whose_base_is_gone(files, error_of, tmp_path):
    orphan = tmp_path / "orphan"
    shutil.copytree(files["sft"], orphan)
    config = json.loads((orphan / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (orphan / "adapter_config.json").write_text(json.dumps(config))
    line = error_of("ppo", ppo_files(files) | {"model_name_or_path": orphan})
    assert f"{orphan} is an adapter on the base {tmp_path / 'gone'}" in line


def test_an_adapter_that_does_not_fit_the_base_it_names(files, error_of, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(files["other_reward"], wrong)
    config = json.loads((wrong / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = files["base"]
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    line = error_of("ppo", ppo_files(files) | {"reward_model_name_or_path": wrong})
    assert f"The adapter {wrong} does not fit the base {files['base']}" in line


def test_a_reward_adapter_that_lost_its_head(files, error_of, tmp_path):
    headless = tmp_path / "headless"
    shutil.copytree(files["reward"], headless)
    weights = load_file(headless / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "score" not in k}, headless / "adapter_model.safetensors")
    line = error_of("ppo", ppo_files(files) | {"reward_model_name_or_path": headless})
    assert f"The reward adapter {headless} has no trained score head" in line


def test_a_reward_model_of_another_base_is_taken_when_asked_for(files, tmp_path):
    """Beside the policy, with its own base: nothing to refuse then."""
    arguments = ppo_files(files) | {"reward_model_name_or_path": files["other_reward"], "separate_reward_model": True}
    arguments |= {"per_device_train_batch_size": 8, "max_steps": 1, "max_completion_length": 4, "save_strategy": "no"}
    run_recipe("ppo", output_dir=tmp_path / "out", **arguments)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
