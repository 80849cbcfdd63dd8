"""Arguments from YAML and flags: what wins, and one line for what cannot be meant."""

import importlib
import os
import sys
from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from recipes.cli import arguments, start
from recipes.cli.config import read_config
from recipes.cli.errors import UserError
from recipes.data.mapping import parse_mapping
from tests.conftest import ROOT


@dataclass
class Arguments:
    name: str = field(metadata={"help": "required"})
    steps: int = 10
    rate: float = 0.1
    use_peft: bool = False
    modules: list[str] | None = None
    options: dict | None = None
    weights: list[float] | None = None


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
        ("name: a\nstep: 3", (), "config.yaml: unrecognized arguments: --step=3"),
        ("name: a", ("--usepeft", "true"), "Command line: unrecognized arguments: --usepeft true"),
        ("name: a", ("--step", "3"), "Command line: unrecognized arguments: --step 3"),
        ("name: a", ("surprise",), "Command line: .*surprise"),
        ("name: a\nname: b", (), "config.yaml is not valid YAML: name is given twice"),
        ("name: a\noptions: {x: 1, x: 2}", (), "config.yaml is not valid YAML: x is given twice"),
        ("name: a\nsteps: 2.5", (), "config.yaml: argument --steps: invalid int value: '2.5'"),
        ("name: a\nrate: [1, 2]", (), "config.yaml: unrecognized arguments: 2"),
        ("name: a\nsteps: true", (), "config.yaml: argument --steps: invalid int value: 'true'"),
        ("name: a\nsteps: many", (), "steps.*many"),
        ("name: a\nsteps: .inf", (), "config.yaml: argument --steps: invalid int value"),
        ("name: a\nsteps: 2024-01-01", (), "config.yaml: argument --steps: invalid int value"),
        ("name: a\nsteps:", (), "config.yaml: steps cannot be null: leave it out to have its default"),
        ("name: 2024-13-45", (), "config.yaml is not valid YAML"),
        ("name: a", ("--rate", "fast"), "rate.*fast"),
        ("name: a\n  steps: [", (), "config.yaml is not valid YAML"),
        ("just words", (), "config.yaml: expected lines of the form"),
        ("name: a\nenv: [1]", (), r"config.yaml: env takes lines of the form VARIABLE: value, not \['1'\]"),
        ("steps: 3", (), "name"),
        ("name: a", ("--config",), "argument --config: expected one argument"),
        ("name: a", ("--config", "b.yaml"), "--config takes one YAML file"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path, text, flags, expected):
    with pytest.raises(UserError, match=expected) as error:
        parse(tmp_path, text, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["2024", "2024-01-01", "12:30", "no", "1e5", "0x10", "'null'"])
def test_a_name_is_the_text_that_stands_in_the_yaml(tmp_path, text):
    assert parse(tmp_path, f"name: {text}\nmodules: [{text}]") == Arguments(text.strip("'"), modules=[text.strip("'")])


def test_null_and_mappings_are_what_yaml_says(tmp_path):
    parsed = parse(tmp_path, "name: a\nweights: ~\noptions: {x: 0.5, y: [1, true], z: 1e-6}\nmodules: []")
    assert parsed == Arguments("a", options={"x": 0.5, "y": [1, True], "z": 1e-6}, modules=[])


def test_a_text_where_a_list_is_wanted_is_a_list_of_one(tmp_path):
    """It was a list of its letters."""
    assert parse(tmp_path, "name: a\nmodules: all-linear").modules == ["all-linear"]
    mapping = "prompt=a completion=b"
    assert parse_mapping(parse(tmp_path, f"name: a\nmodules: {mapping}").modules) == {"prompt": "a", "completion": "b"}


def test_a_negative_number_with_an_exponent_is_no_flag(tmp_path):
    assert parse(tmp_path, "name: a\nweights: [-1e-3, 1]\n").weights == [-1e-3, 1]
    parsed = parse(tmp_path, "name: a\n", "--weights", "2", "-1.5e-3", "-.5", "--rate", "-1e-3")
    assert (parsed.weights, parsed.rate) == ([2, -1.5e-3, -0.5], -1e-3)


def test_the_home_folder_is_known_in_the_yaml_and_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(tmp_path, "name: ~/runs").name == f"{tmp_path}/runs"
    assert start.expand_home("--output_dir=~/runs") == f"--output_dir={tmp_path}/runs"
    assert start.expand_home("sft=~/runs") == f"sft={tmp_path}/runs"
    assert start.expand_home("~x = ~") == "~x = ~"


def test_a_config_that_is_not_utf8_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_bytes("name: Bücher".encode("latin-1"))
    with pytest.raises(UserError, match="config.yaml is not valid YAML: .*utf-8"):
        arguments.parse((Arguments,), ["--config", str(tmp_path / "config.yaml")])


def test_variables_of_the_yaml_are_set_before_libraries_are_imported(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("env: {HF_HUB_OFFLINE: 1, MY_MODE: on, MY_GPUS: , 7: x}\nname: a")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("MY_MODE", "")
    monkeypatch.setenv("MY_GPUS", "0")
    assert read_config(str(tmp_path / "config.yaml")) == {"name": "a"}
    assert [os.environ[name] for name in ("HF_HUB_OFFLINE", "MY_MODE", "MY_GPUS")] == ["1", "on", ""]


def test_of_a_flag_that_is_given_twice_the_last_counts_and_a_list_has_all_parts(tmp_path):
    words = ["--name", "a", "--steps", "1", "--steps=2", "--modules", "q", "k", "--modules", "v"]
    assert arguments.parse((Arguments,), words)[0] == Arguments("a", 2, modules=["q", "k", "v"])
    assert parse(tmp_path, "name: a\nmodules: [o]", "--modules", "q", "--modules=v").modules == ["q", "v"]


def test_an_args_file_beside_the_script_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "sft.py")])
    (tmp_path / "sft.args").write_text("--steps 7")
    assert arguments.parse((Arguments,), ["--name", "a"])[0].steps == 10


@pytest.mark.parametrize(
    "text, message",
    [
        ("def correct(:", "--judge broken.correct: write it as module.function, .*SyntaxError: .*line 1"),
        ("1 / 0", "importable from here .ZeroDivisionError"),
        ("correct = 3", "--judge broken.correct is no function, but 3"),
        ("", "--judge broken.correct: write it as module.function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(UserError, match=message):
        arguments.import_function("broken.correct", "--judge")


def test_the_last_part_of_a_name_is_the_function_also_where_it_is_a_file_too(tmp_path, monkeypatch):
    (tmp_path / "my_judges").mkdir()
    (tmp_path / "my_judges" / "__init__.py").write_text("from .polite import polite")
    (tmp_path / "my_judges" / "polite.py").write_text("def polite(**_): return 1.0")
    (tmp_path / "my_judges" / "broken.py").write_text("import nowhere_at_all")
    (tmp_path / "my-judge.py").write_text("def polite(**_): return 2.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert arguments.import_function("my_judges.polite", "--judge")() == 1.0
    assert arguments.import_function("my-judge.polite", "--judge")() == 2.0
    with pytest.raises(UserError, match="importable from here .*No module named 'nowhere_at_all'"):
        arguments.import_function("my_judges.broken.polite", "--judge")


def test_of_several_processes_only_the_first_says_at_once_what_is_wrong(monkeypatch, capsys):
    """The launcher ends the others meanwhile; eight of them said the same."""
    waited = []
    monkeypatch.setattr(start.time, "sleep", lambda seconds: waited.append(capsys.readouterr().err or seconds))
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", "nowhere.yaml"])
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="1"):
            start.begin(str(ROOT / "recipes" / "sft.py"))
        assert "nowhere.yaml: there is no such file" in capsys.readouterr().err
        assert waited == [5] * int(rank)


def test_a_missing_config_file_is_named():
    with pytest.raises(UserError, match="nowhere.yaml: there is no such file"):
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
        ("pad_to_multiple_of: auto", ("--pad_to_multiple_of", "8"), {"pad_to_multiple_of": 8}),
    ],
)
def test_a_flag_comes_before_what_the_yaml_says_by_another_name(tmp_path, text, flags, expected):
    values = recipe_arguments(tmp_path, text, *flags)
    assert {name: values[name] for name in expected} == expected


def test_a_value_that_a_flag_takes_the_place_of_is_named(tmp_path, capsys):
    recipe_arguments(tmp_path, "num_train_epochs: 7\nwarmup_steps: 2", "--max_steps", "24", "--warmup_steps", "3")
    assert capsys.readouterr().err == "--max_steps takes the place of num_train_epochs: 7.0 in the YAML.\n"
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
        ("save_strategy: epoch", ("--save_steps", "5"), "save_steps is not used while save_strategy is epoch"),
        ("save_strategy: epoch\nsave_steps: 5", (), "save_steps is not used while save_strategy is epoch"),
        ("", ("--eval_steps", "5"), "eval_steps is not used while eval_strategy is no"),
        ("logging_strategy: epoch", ("--logging_steps", "5"), "logging_steps is not used"),
        ("lr_scheduler_type: constant", ("--warmup_steps", "5"), "set lr_scheduler_type to constant_with_warmup"),
        ("", ("--lora_r", "4"), "lora_r is not used while use_peft is False: set use_peft to true"),
        ("use_peft: false\nlora_target_modules: [q_proj]", (), "lora_target_modules is not used"),
        ("bnb_4bit_quant_type: fp4", (), "bnb_4bit_quant_type is not used while load_in_4bit is False"),
        (
            "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 2",
            ("--save_steps", "3"),
            "3.* multiple of 2",
        ),
        ("", ("--adaptive_kl_horizon", "50"), "adaptive_kl_horizon is not used while adaptive_kl_target is None"),
        ("", ("--ptx_dataset_split", "test"), "ptx_dataset_split is not used while ptx_dataset_name is None"),
        (
            "separate_reward_model: true",
            (),
            "separate_reward_model is not used while reward_model_name_or_path is None",
        ),
        ("max_error_rate: 0.2", (), "max_error_rate is not used while on_error is raise"),
        ("learning_rate: {a: 1}", (), "--learning_rate {'a': 1}: expected 0 or more"),
        ("", ("--pad_to_multiple_of", "0"), "--pad_to_multiple_of 0: expected 1 or more"),
        ("pad_to_multiple_of: -8", (), "--pad_to_multiple_of -8: expected 1 or more"),
        ("top_k: []", (), r"--top_k \[\]: expected 0 or more"),
        (f"{BEST}\nsave_strategy: epoch", (), "requires the save and eval strategy to match"),
        ("load_in_4bit: true", ("--load_in_8bit", "true"), "8 bit and 4 bit"),
        ("", ("--ignore_bias_buffers", "true"), "--ignore_bias_buffers is not used"),
        ("do_train: false", (), "--do_train is not used: a recipe trains"),
        ("do_eval: true", (), "do_eval is not used while eval_strategy is no"),
        ("", ("--eval_on_start", "true"), "eval_on_start is not used while eval_strategy is no"),
        ("", ("--test_split_size", "0.2"), "test_split_size is not used while eval_strategy is no: set eval_strategy"),
        ("", ("--lr_scheduler_kwargs", "{bad}"), "{bad} is not valid JSON"),
        ("", ("--accelerator_config", "nowhere.json"), "No such file or directory: 'nowhere.json'"),
        ("", ("--dataset_name", ""), "--dataset_name is empty: is it a variable that is not set"),
        ("dataset_name: $SCRATCH/a.jsonl", (), r"--dataset_name \$SCRATCH/a.jsonl: only a shell fills in variables"),
        ("reward_model_name_or_path: ''", (), "--reward_model_name_or_path is empty"),
    ],
)
def test_what_would_go_unused_is_refused(tmp_path, text, flags, message):
    with pytest.raises(UserError, match=message) as error:
        recipe_arguments(tmp_path, text, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        "max_steps 0",
        "max_steps -5",
        "num_train_epochs 0",
        "num_train_epochs nan",
        "learning_rate -1e-5",
        "learning_rate nan",
        "learning_rate inf",
        "per_device_train_batch_size 0",
        "gradient_accumulation_steps 0",
        "weight_decay -1",
        "seed -1",
        "lora_r 0",
        "lora_dropout 1",
        "adam_beta1 1",
        "label_smoothing_factor 2",
        "dataloader_num_workers -1",
        "steps_per_generation 0",
        "top_p 2",
        "top_k -1",
    ],
)
def test_numbers_that_no_run_can_have_are_refused_before_anything_loads(tmp_path, wrong):
    """`--max_steps 0` trained all epochs; the others ended in tracebacks after the models had loaded."""
    name, value = wrong.split()
    with pytest.raises(UserError, match=f"--{name} .*: expected ") as error:
        recipe_arguments(tmp_path, "use_peft: true", f"--{name}={value}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("step", ["sft", "reward"])
@pytest.mark.parametrize("name", ["model_init_kwargs", "dataset_text_field", "dataset_kwargs"])
def test_arguments_of_trl_without_effect_here_are_refused(tmp_path, step, name):
    recipe = importlib.import_module(f"recipes.{step}")
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (group,) = (each for each in arguments.parse(recipe.ARGUMENTS, words) if isinstance(each, TrainingArguments))
    if hasattr(group, name):  # RewardConfig has one of them
        with pytest.raises(UserError, match=f"--{name} is not used: "):
            arguments.parse(recipe.ARGUMENTS, [*words, f"--{name}", '{"a": 1}'])
