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
        ("name: a\nname: b", (), "config.yaml: name stands there twice"),
        ("name: a\nsteps: 2.5", (), "config.yaml: steps takes a whole number, not 2.5"),
        ("name: a\nrate: [1, 2]", (), "config.yaml: rate takes a number"),
        ("name: a\nsteps: true", (), "config.yaml: steps takes a whole number"),
        ("name: a\nsteps: many", (), "steps.*many"),
        ("name: a", ("--rate", "fast"), "rate.*fast"),
        ("name: a\n  steps: [", (), "config.yaml is not valid YAML"),
        ("just words", (), "config.yaml: expected lines of the form"),
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
