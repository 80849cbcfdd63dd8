"""Arguments from YAML and flags: what wins, and one line for what cannot be meant."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from recipes.cli import arguments
from recipes.cli.errors import UserError


@dataclass
class Arguments:
    name: str = field(metadata={"help": "required"})
    steps: int = 10
    rate: float = 0.1
    use_peft: bool = False
    modules: list[str] | None = None
    options: dict | None = None


def parse(tmp_path, text: str, *flags: str) -> Arguments:
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    (parsed,) = arguments.parse((Arguments,), ["--config", str(config), *flags])
    return parsed


def test_flags_win_over_the_yaml_and_both_over_defaults(tmp_path):
    text = "name: a\nsteps: 3\nrate: 1e-5\nuse_peft: true\nmodules: [q, v]\noptions: {x: 1}\n"
    parsed = parse(tmp_path, text, "--name", "b", "--modules", "all")
    assert parsed == Arguments("b", 3, 1e-5, True, ["all"], {"x": 1})
    (parsed,) = arguments.parse((Arguments,), [f"--config={tmp_path / 'config.yaml'}"])
    assert parsed == Arguments("a", 3, 1e-5, True, ["q", "v"], {"x": 1})


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("name: a\nstep: 3", (), r"config.yaml: .*no argument step; did you mean steps\?"),
        ("name: a", ("--usepeft", "true"), r"Command line: .*usepeft; did you mean use_peft\?"),
        ("name: a", ("--step", "3"), r"Command line: .*step; did you mean steps\?"),
        ("name: a", ("surprise",), "Command line: .*surprise"),
        ("name: a\nname: b", (), "config.yaml: name is given twice"),
        ("name: a\nsteps: 2.5", (), "config.yaml: steps takes a whole number, not 2.5"),
        ("name: a\nrate: [1, 2]", (), "config.yaml: rate takes a number"),
        ("name: a\nsteps: true", (), "config.yaml: steps takes a whole number"),
        ("name: a\nsteps: many", (), "steps.*many"),
        ("name: a", ("--rate", "fast"), "rate.*fast"),
        ("name: a\n  steps: [", (), "config.yaml is not valid YAML"),
        ("just words", (), "config.yaml: expected lines of the form"),
        ("name: a\nenv: [1]", (), r"config.yaml: env takes lines of the form VARIABLE: value, not \[1\]"),
        ("steps: 3", (), "name"),
        ("name: a", ("--config",), "--config takes one YAML file"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path, text, flags, expected):
    with pytest.raises(UserError, match=expected) as error:
        parse(tmp_path, text, *flags)
    assert "\n" not in str(error.value)


def test_a_missing_config_file_is_named():
    with pytest.raises(UserError, match="nowhere.yaml: No such file"):
        arguments.parse((Arguments,), ["--config", "nowhere.yaml"])


def test_several_trackers_are_taken(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to"]
    for trackers in (["wandb", "tensorboard"], ["trackio"], []):
        assert arguments.parse((TrainingArguments,), [*words, *(trackers or ["none"])])[0].report_to == trackers


BEST = "load_best_model_at_end: true"


def recipe_arguments(tmp_path, text: str, *flags: str) -> dict:
    from recipes.ppo import ARGUMENTS

    config = tmp_path / "config.yaml"
    config.write_text(f"use_cpu: true\nbf16: false\n{text}", encoding="utf-8")
    groups = arguments.parse(ARGUMENTS, ["--config", str(config), "--output_dir", str(tmp_path / "out"), *flags])
    return {name: value for group in groups for name, value in vars(group).items()}


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        # 8 episodes a rollout, 4 epochs of one minibatch: 4 steps for 8 episodes
        ("total_episodes: 800", ("--max_steps", "24"), {"max_steps": 24}),
        ("max_steps: 24", ("--total_episodes", "800"), {"max_steps": 400}),
        ("max_steps: 24", ("--num_train_epochs", "7"), {"max_steps": -1, "num_train_epochs": 7}),
        ("total_episodes: 8", ("--num_train_epochs", "7"), {"max_steps": -1, "num_train_epochs": 7}),
        ("total_episodes: 8", ("--max_steps", "-1"), {"max_steps": 4}),
        ("num_train_epochs: 7", ("--max_steps", "24"), {"max_steps": 24, "num_train_epochs": 3}),
        ("total_episodes: 800\nmax_steps: 24", ("--max_steps", "8"), {"max_steps": 8}),
        ("max_steps: 24\ntotal_episodes: 8", ("--max_steps", "-1"), {"max_steps": 4}),
        ("max_steps: -1\ntotal_episodes: 8", (), {"max_steps": 4}),
        ("datasets: [a.jsonl]", ("--dataset_name", "b.jsonl"), {"datasets": None, "dataset_name": "b.jsonl"}),
        ("dataset_name: b.jsonl", ("--datasets", "a.jsonl"), {"datasets": ["a.jsonl"], "dataset_name": None}),
        ("steps_per_generation: 2", ("--generation_batch_size", "32"), {"steps_per_generation": 4}),
        ("activation_checkpointing: false", ("--gradient_checkpointing", "true"), {"activation_checkpointing": True}),
        ("activation_checkpointing: true", ("--no_gradient_checkpointing",), {"activation_checkpointing": False}),
        ("lr_scheduler_type: cosine\nwarmup_steps: 5", ("--lr_scheduler_type", "constant"), {"warmup_steps": 5}),
        ("eval_strategy: steps\neval_steps: 5", ("--eval_strategy", "no"), {"eval_steps": 5}),
        ("use_peft: true\nlora_r: 4", ("--use_peft", "false"), {"use_peft": False, "lora_r": 4}),
    ],
)
def test_a_flag_comes_before_what_the_yaml_says_by_another_name(tmp_path, text, flags, expected):
    values = recipe_arguments(tmp_path, text, *flags)
    assert {name: values[name] for name in expected} == expected


def test_a_value_that_a_flag_takes_the_place_of_is_named(tmp_path, capsys):
    recipe_arguments(tmp_path, "num_train_epochs: 7\nwarmup_steps: 2", "--max_steps", "24", "--warmup_steps", "3")
    assert capsys.readouterr().err == "--max_steps takes the place of num_train_epochs: 7 in the YAML.\n"
    recipe_arguments(tmp_path, "max_steps: 8", "--max_steps", "24")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "pair",
    [
        {"max_steps": "24", "total_episodes": "400"},
        {"max_steps": "24", "num_train_epochs": "2"},
        {"total_episodes": "400", "num_train_epochs": "2"},
        {"dataset_name": "a.jsonl", "datasets": "b.jsonl"},
        {"steps_per_generation": "2", "generation_batch_size": "16"},
        {"activation_checkpointing": "true", "gradient_checkpointing": "false"},
    ],
    ids="-".join,
)
def test_two_names_of_one_thing_in_one_place_are_refused(tmp_path, pair):
    one, other = pair
    words = [word for name, value in pair.items() for word in (f"--{name}", value)]
    with pytest.raises(UserError, match=f"--{one} and --{other} both set .*: remove --{one} or --{other}"):
        recipe_arguments(tmp_path, "", *words)
    text = "".join(f"{name}: {value}\n" for name, value in pair.items())
    with pytest.raises(UserError, match=f"YAML: {one} and {other} both set .*: remove {one} or {other}"):
        recipe_arguments(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("save_strategy: epoch", ("--save_steps", "5"), "save_steps 5 is not used while save_strategy is epoch"),
        ("save_strategy: epoch\nsave_steps: 5", (), "save_steps 5 is not used while save_strategy is epoch"),
        ("", ("--eval_steps", "5"), "eval_steps 5 is not used while eval_strategy is no"),
        ("logging_strategy: epoch", ("--logging_steps", "5"), "logging_steps 5 is not used"),
        ("lr_scheduler_type: constant", ("--warmup_steps", "5"), "set lr_scheduler_type to constant_with_warmup"),
        ("", ("--lora_r", "4"), "lora_r 4 is not used while use_peft is False: set use_peft to true"),
        ("use_peft: false\nlora_target_modules: [q_proj]", (), "lora_target_modules .* is not used"),
        (
            "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 2",
            ("--save_steps", "3"),
            "3.* multiple of 2",
        ),
        ("", ("--adaptive_kl_horizon", "50"), "adaptive_kl_horizon 50 is not used while adaptive_kl_target is None"),
        ("", ("--ptx_dataset_split", "test"), "ptx_dataset_split test is not used while ptx_dataset_name is None"),
        ("max_error_rate: 0.2", (), "max_error_rate 0.2 is not used while on_error is raise"),
        (f"{BEST}\nsave_strategy: epoch", (), "requires the save and eval strategy to match"),
        ("load_in_4bit: true", ("--load_in_8bit", "true"), "8 bit and 4 bit"),
    ],
)
def test_what_would_go_unused_is_refused(tmp_path, text, flags, message):
    with pytest.raises(UserError, match=message) as error:
        recipe_arguments(tmp_path, text, *flags)
    assert "\n" not in str(error.value)
