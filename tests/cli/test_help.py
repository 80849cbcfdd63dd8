"""`--help` and mistyped flags are answered from source, before torch is imported, as the real parser would."""

import importlib
import os
import subprocess
import sys

import pytest

from recipes.cli import help
from recipes.cli.arguments import RecipeParser
from tests.conftest import ROOT

RECIPES = [f"recipes/{step}.py" for step in ("sft", "reward", "ppo")]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").glob("*.py"))
WITHOUT_DATACLASSES = ("scripts/inspect_dataset.py", "scripts/rank_responses.py")  # argparse, and quick to import


@pytest.mark.parametrize("command", [*RECIPES, *(path for path in SCRIPTS if path not in WITHOUT_DATACLASSES)])
def test_source_says_what_the_parser_says(command):
    flags = help.read_flags(str(ROOT / command))
    module = importlib.import_module(command.removesuffix(".py").replace("/", "."))
    actions = [action for action in RecipeParser(module.ARGUMENTS)._actions if action.dest != "help"]
    options = [option.removeprefix("--") for action in actions for option in action.option_strings]
    assert {option for flag in flags.values() for option in flag.options} == set(options)
    for action in actions:
        flag = flags[action.dest]
        if action.nargs != 0:  # not the --no_… of a flag
            assert flag.required == (action.required or (flag.name == "output_dir" and command in RECIPES))
            assert flag.help == " ".join((action.help or "").split()) or "…" in flag.help, flag
            if isinstance(action.default, bool | int | float):
                assert flag.default in (str(action.default), "False"), flag
    everything = help.show(str(ROOT / command), flags, True)
    assert all(f"\n  --{name} " in everything for name in flags)


def test_every_most_used_flag_is_one():
    known = {name for path in RECIPES for name in help.read_flags(str(ROOT / path))}
    assert set(help.MOST_USED) <= known


def answer(command: str, *words, cwd=ROOT, code=None) -> tuple[int, list[str]]:
    """Exit code and lines of a command; the test fails where it imports torch."""
    python = [sys.executable, "-X", "importtime", str(ROOT / command), *words]
    result = subprocess.run(python, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)
    assert "| torch\n" not in result.stderr and "| transformers\n" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    return result.returncode, [*result.stdout.splitlines(), *lines]


def test_what_flags_say_stands_in_one_column_below_one_that_is_too_long():
    command = str(ROOT / "scripts" / "sample_responses.py")
    text = help.show(command, help.read_flags(command), True)
    lines = text.split("\nRowArguments:\n")[1].split("\n\n")[0].split("\n")
    lines.remove("  --on_special Literal['flag', 'drop', 'fail']")
    assert len(lines) > 5 and {line[42:44] for line in lines} == {"  "}


@pytest.mark.parametrize("command", [*RECIPES, *SCRIPTS])
def test_help_needs_no_torch(command):
    code, lines = answer(command, "--help")
    assert code == 0 and len(lines) < 75
    assert any(line.startswith(("  --", "options:")) for line in lines)


def test_help_may_be_read_by_head():
    read, write = os.pipe()
    os.close(read)
    python = [sys.executable, str(ROOT / "scripts/chat.py"), "--help"]
    result = subprocess.run(python, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert result.stderr == b""


def test_the_rest_is_behind_help_all():
    short, long = (answer("recipes/ppo.py", flag)[1] for flag in ("--help", "--help_all"))
    flags = [line for line in short if line.startswith("  --")]
    assert flags[0].startswith("  --model_name_or_path") and 30 <= len(flags) <= 45
    assert not any("--adam_beta1" in line for line in short) and any("--adam_beta1 float" in line for line in long)
    assert "TrainingArguments:" in long and "PPOConfig:" in long
    assert "PPOConfig:" in answer("scripts/estimate_memory.py", "--help_all")[1], "it takes them too"


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("recipes/sft.py", ["--usepeft", "true"], "there is no argument usepeft; did you mean use_peft?"),
        ("recipes/ppo.py", ["--kl-coeff=0.1", "--output_dir", "x"], "no argument kl-coeff; did you mean kl_coef?"),
        (
            "recipes/reward.py",
            ["--config", "bad.yaml"],
            "bad.yaml: there is no argument leaning_rate; did you",
        ),
        ("recipes/reward.py", ["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file in "),
        ("recipes/sft.py", ["--config", "bed.yaml"], "(did you mean bad.yaml?)"),
        ("recipes/sft.py", ["--config", "recipes/configs/tiny_world/sft.yaml"], f"(cd {ROOT} to name it so)"),
        ("recipes/sft.py", ["--config", f"{ROOT}/recipes/configs/tiny_world/sft.yaml"], "--output_dir is required"),
        ("scripts/sample_responses.py", ["--seed", "1"], "--dataset_name and --output are required"),
        ("scripts/sample_responses.py", ["--lora_rank", "1"], "there is no argument lora_rank"),
        ("scripts/estimate_memory.py", ["ppo", "--kl_coeff", "1"], "did you mean kl_coef?"),
        (
            "scripts/rank_responses.py",
            ["agreement", "--database", "x", "--fromat", "x"],
            "arguments: --fromat",
        ),
        (
            "scripts/inspect_dataset.py",
            ["x.jsonl", "--task", "sft", "--tokeniser", "x"],
            "arguments: --tokeniser",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_at_once(tmp_path, command, words, expected):
    (tmp_path / "bad.yaml").write_text("leaning_rate: 1\nlabels: 2\n")
    code, lines = answer(command, *words, cwd=tmp_path)
    assert code and len(lines) == 1 and lines[0].startswith("error: ")
    assert expected in lines[0]


def test_a_python_without_the_environment_says_what_to_type(tmp_path):
    bare = [sys.executable, "-S", "-I", str(ROOT / "recipes" / "sft.py"), "--output_dir", "x"]
    result = subprocess.run(bare, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: This Python") and result.stderr.count("\n") == 1
    assert ".venv/bin/activate" in result.stderr
