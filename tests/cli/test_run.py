"""Around the training: output folders, the record of a run, and how a run fails."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import yaml
from transformers import TrainingArguments

from recipes.cli import run as runs
from recipes.cli.errors import UserError
from recipes.data.report import Report


@pytest.fixture
def training_args(tmp_path):
    def training_args(**kwargs) -> TrainingArguments:
        return TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", **kwargs)

    return training_args


def test_an_output_folder_that_holds_something_is_kept(training_args, tmp_path):
    runs.guard_output_dir(training_args())
    (tmp_path / "out").mkdir()
    runs.guard_output_dir(training_args())
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="out is not empty.*--resume_from_checkpoint true"):
        runs.guard_output_dir(training_args())
    with pytest.raises(UserError, match="there is no checkpoint in .*out"):
        runs.guard_output_dir(training_args(resume_from_checkpoint="true"))
    with pytest.raises(UserError, match="elsewhere: there is no checkpoint"):
        runs.guard_output_dir(training_args(resume_from_checkpoint="elsewhere"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_output_folder_that_is_a_file_is_kept(training_args, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out is a file"):
        runs.guard_output_dir(training_args())


def test_resuming_takes_the_newest_checkpoint(training_args, tmp_path):
    for step in (9, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    for wish, step in (("true", 10), (str(tmp_path / "out" / "checkpoint-9"), 9)):
        args = training_args(resume_from_checkpoint=wish)
        runs.guard_output_dir(args)
        assert args.resume_from_checkpoint == str(tmp_path / "out" / f"checkpoint-{step}")


@dataclass
class Secretive:
    hub_token: str = "hf_secret"
    wandb_api_key: str = "key_secret"
    eos_token: str = "<|end|>"
    model_init_kwargs: dict = field(default_factory=lambda: {"token": "inner_secret", "x": (1, 2)})


def test_the_record_of_a_run_is_complete_and_holds_no_secret(training_args, tmp_path):
    (tmp_path / "out").mkdir()
    reports = {"train": Report("rows.jsonl", "sft", rows_in=3, rows_out=2, fingerprint="abc")}
    args = training_args(learning_rate=3e-4, hub_token="another_secret")
    runs.save_train_config(args.output_dir, "sft", reports, (Secretive(), args))
    text = (tmp_path / "out" / "train_config.yaml").read_text(encoding="utf-8")
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
    assert len(runs.git_revision().removesuffix("-dirty")) == 40
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs.git_revision() is None
    monkeypatch.setenv("PATH", "")
    assert runs.git_revision() is None


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
