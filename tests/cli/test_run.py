"""Around the training: output folders, the record of a run, and how a run fails."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import yaml
from transformers import TrainingArguments

from recipes.cli import lock
from recipes.cli import record as records
from recipes.cli import run as runs
from recipes.cli.errors import UserError
from recipes.cli.record import RECORD, RESULT, add_datasets, describe, write_record
from recipes.cli.run import RunFolder
from recipes.data.report import Report
from tests.conftest import ROOT


@pytest.fixture
def training_args(tmp_path):
    def training_args(**kwargs) -> TrainingArguments:
        return TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", **kwargs)

    return training_args


@dataclass
class NoModel:
    """Stands for the arguments beside Trainer's."""

    kl_coef: float = 0.05


def claim(args: TrainingArguments, **others) -> str | None:
    """The checkpoint that a run with these arguments goes on from; the folder is free again afterwards."""
    try:
        return RunFolder("ppo", args, NoModel(**others)).training_args.resume_from_checkpoint
    finally:
        lock.release_all()


def test_an_output_folder_that_holds_something_is_kept(training_args, tmp_path):
    assert claim(training_args()) is None
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / runs.LOCK).touch()
    assert claim(training_args()) is None, "what a killed run leaves that never began is in nobody's way"
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="out is not empty.*--resume_from_checkpoint true"):
        claim(training_args())
    with pytest.raises(UserError, match="there is no checkpoint in .*out"):
        claim(training_args(resume_from_checkpoint="true"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "all of it"


def test_an_output_folder_that_is_a_file_is_kept(training_args, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out is a file"):
        claim(training_args())
    assert (tmp_path / "out").read_text() == "a file"


def test_a_second_run_on_one_folder_is_refused_while_the_first_holds_it(training_args):
    first = RunFolder("ppo", training_args(), NoModel())
    command = "import sys; from recipes.cli import lock; lock.hold(sys.argv[1], '--output_dir out')"
    path = f"{first.path}/{runs.LOCK}"
    second = [sys.executable, "-c", command, path]
    held = subprocess.run(second, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    lock.release_all()
    assert held.returncode == 1 and "UserError" in held.stderr
    assert subprocess.run(second, timeout=60, cwd=ROOT, check=False).returncode == 0


def test_a_resumed_run_has_the_arguments_it_was_started_with(training_args, tmp_path):
    started = RunFolder("ppo", training_args(), NoModel())
    write_record(tmp_path / "out" / RECORD, started.record)
    lock.release_all()
    resume = {"resume_from_checkpoint": "true"}
    assert claim(training_args(**resume, logging_steps=7, max_steps=9)) is None  # it had no checkpoint yet
    with pytest.raises(UserError, match="--learning_rate was .*--kl_coef was 0.05, now 5.0|--kl_coef .*--learning"):
        claim(training_args(**resume, learning_rate=0.1), kl_coef=5.0)


@dataclass
class Secretive:
    hub_token: str = "hf_secret"
    wandb_api_key: str = "key_secret"
    eos_token: str = "<|end|>"
    model_init_kwargs: dict = field(default_factory=lambda: {"token": "inner_secret", "x": (1, 2)})


def test_the_record_of_a_run_is_complete_and_holds_no_secret(training_args, tmp_path):
    reports = {"train": Report("rows.jsonl", "sft", rows_in=3, rows_out=2, fingerprint="abc")}
    args = training_args(learning_rate=3e-4, hub_token="another_secret")
    written = describe("sft", (Secretive(), args))
    add_datasets(written, reports)
    write_record(tmp_path / RESULT, written)
    text = (tmp_path / RESULT).read_text(encoding="utf-8")
    assert "secret" not in text
    record = yaml.safe_load(text)
    assert record["recipe"] == "sft"
    assert record["arguments"]["learning_rate"] == 3e-4
    assert record["arguments"]["eos_token"] == "<|end|>"
    assert record["arguments"]["model_init_kwargs"] == {"x": [1, 2]}
    assert record["datasets"] == {"train": {"source": "rows.jsonl", "rows": 2, "fingerprint": "abc"}}
    assert record["packages"]["trl"].startswith("1.16")
    secret = {"hub_token", "wandb_api_key"}
    fields = {f.name for group in (Secretive(), args) for f in dataclasses.fields(group)}
    assert record["arguments"].keys() == fields - secret


def test_outside_of_a_checkout_there_is_no_revision(tmp_path, monkeypatch):
    assert len(records.git_revision().removesuffix("-dirty")) == 40
    monkeypatch.setattr(records, "__file__", str(tmp_path / "record.py"))
    assert records.git_revision() is None
    monkeypatch.setenv("PATH", "")
    assert records.git_revision() is None


def test_what_the_user_can_mend_is_one_line_and_a_bug_is_not(capsys):
    def wrong_input():
        raise UserError("the file is empty.")

    def bug():
        raise KeyError("x")

    with pytest.raises(SystemExit, match="1"):
        runs.run(wrong_input)
    assert capsys.readouterr().err == "error: the file is empty.\n"
    with pytest.raises(KeyError):
        runs.run(bug)
