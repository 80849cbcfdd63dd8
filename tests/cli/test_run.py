"""Around the training: output folders, checkpoints that are whole, the record of a run, and how a run ends."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainerState, TrainingArguments
from trl import ModelConfig

from recipes.cli import lock, record, signals
from recipes.cli.checkpoints import newest_whole, problem, put_in_place, recover, rotate, unfinished
from recipes.cli.errors import RunEnded, UserError
from recipes.cli.files import move_contents, sizes
from recipes.cli.run import RunFolder, run
from recipes.data.report import Report
from tests.conftest import ROOT


@pytest.fixture
def training_args(tmp_path):
    def training_args(**kwargs) -> TrainingArguments:
        options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"}
        return TrainingArguments(**(options | kwargs))

    yield training_args
    lock.release_all()


@pytest.fixture
def resume(training_args):
    """The checkpoint that a run would go on from, and everything it was refused for."""

    def resume(wish, **kwargs) -> str | None:
        args = training_args(resume_from_checkpoint=wish, **kwargs)
        try:
            RunFolder("sft", args)
        finally:
            lock.release_all()
        return args.resume_from_checkpoint

    return resume


def save(output_dir, step: int, resumable: bool = True) -> str:
    """A whole checkpoint of three files."""
    folder = unfinished(str(output_dir), f"checkpoint-{step}")
    os.makedirs(folder)
    for name in ("optimizer.pt", "model.safetensors"):
        with open(os.path.join(folder, name), "w") as file:
            file.write("x" * 100)
    TrainerState(global_step=step, epoch=1.0).save_to_json(os.path.join(folder, "trainer_state.json"))
    return put_in_place(folder, str(output_dir), sizes(folder), resumable)


def begin(training_args, **kwargs) -> None:
    """The record that a run writes when its training starts."""
    args = training_args(**kwargs)
    os.makedirs(args.output_dir, exist_ok=True)
    record.write_record(os.path.join(args.output_dir, record.RECORD), record.describe("sft", (args,)))


def test_an_output_folder_that_holds_something_is_kept(training_args, resume, tmp_path):
    assert resume(None) is None
    assert not (tmp_path / "out").exists(), "nothing is left of a run that did not begin"
    (tmp_path / "out").mkdir()
    assert resume("false") is None
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="out is not empty.*--resume_from_checkpoint true"):
        resume(None)
    with pytest.raises(UserError, match="there is no checkpoint in .*out"):
        resume("true")
    with pytest.raises(UserError, match="there is no checkpoint in .*out"):
        resume("auto")
    with pytest.raises(UserError, match="--resume_from_checkpoint elsewhere: there is no such folder"):
        resume("elsewhere")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_is_none_is_named(training_args, resume, tmp_path):
    begin(training_args)
    save(tmp_path / "out", 9)
    with pytest.raises(UserError, match="out: checkpoint.json, which is written last, is missing"):
        resume(str(tmp_path / "out"))
    with pytest.raises(UserError, match="--resume_from_checkpoint .*oot/checkpoint-9: there is no such folder"):
        resume(str(tmp_path / "oot" / "checkpoint-9"))


def test_an_output_folder_that_is_a_file_is_kept(resume, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out: File exists"):
        resume(None)
    assert (tmp_path / "out").read_text() == "a file"


def test_a_folder_that_cannot_be_written_is_one_line(training_args, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file/out: Not a directory"):
        RunFolder("sft", training_args(output_dir=str(tmp_path / "file" / "out")))


def test_resuming_takes_the_newest_whole_checkpoint(training_args, resume, tmp_path, capsys):
    begin(training_args)
    paths = [save(tmp_path / "out", step) for step in (8, 9, 10, 11)]
    assert resume("true") == paths[3] and resume("auto") == paths[3]
    assert resume(paths[0]) == paths[0]
    os.remove(os.path.join(paths[3], "optimizer.pt"))
    with open(os.path.join(paths[2], "model.safetensors"), "r+") as file:
        file.truncate(7)
    capsys.readouterr()
    assert resume("true") == paths[1]
    assert capsys.readouterr().err.splitlines() == [
        f"{paths[3]} is not whole: optimizer.pt is missing",
        f"{paths[2]} is not whole: model.safetensors has 7 of 100 bytes",
        f"{tmp_path / 'out'}: going on from {paths[1]}.",
    ]
    with pytest.raises(UserError, match=f"checkpoint-10: model.safetensors has 7 of 100 bytes.* good.* is {paths[1]}"):
        resume(paths[2])
    os.remove(os.path.join(paths[1], "checkpoint.json"))
    with pytest.raises(UserError, match="checkpoint-9: checkpoint.json, which is written last, is missing"):
        resume(paths[1])
    (tmp_path / "out" / "checkpoint-8" / "checkpoint.json").write_text('{"files": ')
    with pytest.raises(UserError, match="there is no whole checkpoint in .*out; .*-11 is not whole: .*-10 is .*-9 is"):
        resume("auto")
    with pytest.raises(UserError, match="checkpoint-8: checkpoint.json cannot be read"):
        resume(paths[0])
    with pytest.raises(UserError, match="checkpoint-99: there is no such folder"):
        resume(str(tmp_path / "out" / "checkpoint-99"))


def test_a_run_without_a_checkpoint_starts_again_unless_it_is_finished(training_args, resume, tmp_path, capsys):
    begin(training_args)
    for wish in ("true", "auto"):
        assert resume(wish) is None
        assert "out: no checkpoint yet, starting from the beginning." in capsys.readouterr().err
    (tmp_path / "out" / record.RESULT).write_text((tmp_path / "out" / record.RECORD).read_text())
    TrainerState(global_step=9, epoch=3.0).save_to_json(str(tmp_path / "out" / "trainer_state.json"))
    with pytest.raises(UserError, match="there is no checkpoint in .*out"):
        resume("true", num_train_epochs=5)


def test_what_holds_the_model_only_is_not_resumed(training_args, resume, tmp_path):
    begin(training_args)
    path = save(tmp_path / "out", 9, resumable=False)
    with pytest.raises(UserError, match="--save_only_model true leaves out"):
        resume("true", save_only_model=True)
    with pytest.raises(UserError, match=r"checkpoint-9: it holds the model only \(save_only_model\)"):
        resume(path)


def test_a_run_goes_on_from_a_checkpoint_of_another_in_a_new_folder_only(training_args, resume, tmp_path):
    begin(training_args)
    path = save(tmp_path / "out", 9)
    assert resume(path, output_dir=str(tmp_path / "other")) == path
    with pytest.raises(UserError, match=r"--learning_rate was 5e-05, now 0\.1"):
        resume(path, output_dir=str(tmp_path / "other"), learning_rate=0.1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other is not empty, and .* is a checkpoint of another run"):
        resume(path, output_dir=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "--seed was 42, now 1"),
        ({"learning_rate": 0.1}, r"--learning_rate was 5e-05, now 0\.1"),
        ({"per_device_train_batch_size": 3}, "--per_device_train_batch_size was 8, now 3"),
        ({"optim": "sgd"}, "--optim was .*, now sgd"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "--lr_scheduler_kwargs was None, now {'power': 2}"),
        ({"max_steps": 5}, None),
        ({"num_train_epochs": 5}, None),
        ({"logging_steps": 1}, None),
        ({"save_steps": 1, "save_total_limit": 2}, None),
        ({"eval_steps": 1}, None),
        ({"run_name": "again", "disable_tqdm": True}, None),
        ({"dataloader_num_workers": 1}, None),
    ],
    ids=str,
)
def test_a_changed_argument_is_refused_by_name_or_changes_nothing(training_args, resume, tmp_path, change, message):
    begin(training_args)
    path = save(tmp_path / "out", 9)
    if message is None:
        assert resume("true", **change) == path
    else:
        with pytest.raises(UserError, match=f"goes on only as it was started: {message}. Set that back"):
            resume("true", **change)


@dataclass
class Models:
    model_name_or_path: str


def test_every_argument_that_may_change_is_in_the_docs():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for name in record.FREE.pattern.split("|"):
        assert f"`{name.replace('.*', '*')}`" in page, name


def test_the_digest_of_an_adapter_covers_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, weights in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        folder.mkdir()
        (folder / weights).write_bytes(b"1")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = record.digest(str(adapter))
    (base / "model.safetensors").write_bytes(b"2")
    after = record.digest(str(adapter))
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')  # where sampling stops
    assert len({before, after, record.digest(str(adapter))}) == 3


@pytest.mark.parametrize(
    "weights", ["adapter_model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
)
def test_another_model_under_the_same_name_is_noticed(training_args, tmp_path, weights):
    model = tmp_path / "sft"
    model.mkdir()
    (model / weights).write_bytes(bytes(1_000_000))
    before = record.describe("ppo", (training_args(), Models(str(model))))
    link = tmp_path / "link"
    link.symlink_to(model)
    assert record.changes(before, record.describe("ppo", (training_args(), Models(str(link))))) == []
    (model / "README.md").write_text("a new card")
    assert record.changes(before, record.describe("ppo", (training_args(), Models(str(model))))) == []
    (model / weights).write_bytes(bytes(999_999) + b"1")
    now = record.describe("ppo", (training_args(), Models(str(model))))
    (change,) = record.changes(before, now)
    assert change.startswith("the digest of --model_name_or_path was ")
    assert (
        record.changes(before, record.describe("sft", (training_args(), Models(str(link)))))[0]
        == "recipe was ppo, now sft"
    )


def test_a_template_file_that_was_edited_is_noticed(tmp_path):
    @dataclass
    class Arguments:
        chat_template_path: str

    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    arguments = (Arguments(str(template)), TrainingArguments(str(tmp_path), use_cpu=True))
    before = record.describe("sft", arguments)
    assert before["models"] == {"chat_template_path": "f24189f08c85a1eb"}, "as in the records of older runs"
    assert record.changes(before, record.describe("sft", arguments)) == []
    template.write_text("{{ messages[0] }}")
    (change,) = record.changes(before, record.describe("sft", arguments))
    assert change.startswith("the digest of --chat_template_path was ")


def test_other_rows_and_another_launch_are_noticed(training_args, monkeypatch):
    def described(fingerprint, **setup):
        found = record.describe("sft", (training_args(),))
        record.add_rows(found, {"train": Report("rows.jsonl", "sft", fingerprint=fingerprint)}, {})
        found["setup"] |= setup
        return yaml.safe_load(yaml.safe_dump(found))

    assert record.changes(described("a"), described("a")) == []
    assert record.changes(described("a"), described("b")) == ["the digest of the train rows was a, now b"]
    assert record.changes(described("a"), described("a", processes=2)) == ["processes was 1, now 2"]
    before = described("a")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # by another file of accelerate_configs/
    assert record.changes(before, described("a")) == ["precision was no, now bf16"]


def test_a_finished_run_is_left_alone_unless_more_steps_are_asked_for(training_args, resume, tmp_path):
    out = tmp_path / "out"
    begin(training_args, max_steps=9)
    path = save(out, 9)
    TrainerState(global_step=9, epoch=0.9, max_steps=9).save_to_json(str(out / "trainer_state.json"))
    assert resume("true", max_steps=9) == path, "killed before the last file: the rest is done"
    record.write_record(str(out / record.RESULT), record.describe("sft", (training_args(max_steps=9),)))
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    for length in ({"max_steps": 9}, {"max_steps": 5}, {"num_train_epochs": 0.5}):
        for wish in ("true", "auto", path):
            with pytest.raises(RunEnded, match="out holds a finished run of 9 steps: nothing to do") as end:
                resume(wish, **length)
            assert end.value.code == 0
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert resume("true", max_steps=10) == path
    assert resume("true", num_train_epochs=2) == path
    with pytest.raises(UserError, match="--seed was 42, now 1"):
        resume("true", max_steps=9, seed=1)


def test_what_a_kill_in_the_middle_of_a_save_leaves(training_args, resume, tmp_path):
    begin(training_args)
    out = tmp_path / "out"
    older = save(out, 8)
    (out / ".unfinished" / "checkpoint-9").mkdir(parents=True)
    (out / ".unfinished" / "checkpoint-9" / "optimizer.pt").write_text("half")
    assert resume("true") == older
    assert not (out / ".unfinished").exists()
    os.rename(save(out, 9), tmp_path / "whole")
    (out / ".unfinished").mkdir()
    os.rename(tmp_path / "whole", out / ".unfinished" / "checkpoint-9")  # all was written, only its name was missing
    assert resume("true") == str(out / "checkpoint-9")


def test_a_checkpoint_saved_twice_at_one_step_is_replaced(tmp_path):
    for content in ("first", "second"):
        folder = tmp_path / ".unfinished" / "checkpoint-3"
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_text(content)
        put_in_place(str(folder), str(tmp_path), sizes(str(folder)), True)
        assert (tmp_path / "checkpoint-3" / "optimizer.pt").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_rotation_counts_whole_checkpoints_only(tmp_path):
    paths = {step: save(tmp_path, step) for step in (1, 2, 3, 4, 5)}
    os.remove(os.path.join(paths[5], "optimizer.pt"))
    copies = ["checkpoint-9.old", "checkpoint-best"]  # a user keeps them
    for name in copies:
        shutil.copytree(paths[2], tmp_path / name)
    rotate(str(tmp_path), None, paths[4])
    assert len(list(tmp_path.glob("checkpoint-*"))) == 7
    rotate(str(tmp_path), 2, paths[4], paths[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-4",
        "checkpoint-5",
        *copies,
    ]
    assert newest_whole(str(tmp_path))[0] == paths[4]
    recover(str(tmp_path))
    assert problem(paths[4]) is None


def test_files_move_each_as_a_whole_and_the_last_after_all_others(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "critic").mkdir(parents=True)
    for name in ("a.txt", "critic/b.txt", "z.txt"):
        (source / name).write_text("new")
    target.mkdir()
    for name in ("a.txt", "z.txt"):
        (target / name).write_text("old")
    moved, is_whole = [], []
    replace = os.replace

    def note(a, b):
        moved.append(os.path.basename(b))
        is_whole.append((target / "a.txt").exists())
        replace(a, b)

    monkeypatch.setattr(os, "replace", note)
    move_contents(str(source), str(target), last="a.txt")
    assert moved[-1] == "a.txt" and sorted(moved) == ["a.txt", "b.txt", "z.txt"]
    assert not any(is_whole), "a run that is extended replaces an older result"
    assert (target / "z.txt").read_text() == (target / "critic" / "b.txt").read_text() == "new"
    assert not source.exists()


HOLD = """
import os, sys, time
from recipes.cli import lock
lock.hold(sys.argv[1], "the folder")
if os.fork() == 0:  # a worker that outlives its parent
    print("held", flush=True)
time.sleep(30)
"""


def test_a_lock_is_gone_with_its_process(tmp_path):
    path = str(tmp_path / "new" / ".lock")
    with subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(UserError, match=f"the folder is in use by process {process.pid} on .*: wait for it"):
                lock.hold(path, "the folder")
        process.kill()
        process.wait(30)
        lock.hold(path, "the folder")
        lock.hold(path, "the folder")  # one process holds it once
        lock.release(path)
        assert not os.path.exists(path)


def test_a_disk_that_locks_no_files_is_named(training_args, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"--output_dir .*out is on a disk that locks no files \(Function"):
        RunFolder("sft", training_args())
    lock.release_all()
    assert not (tmp_path / "out").exists()


@dataclass
class Secretive:
    hub_token: str = "hf_secret"
    wandb_api_key: str = "key_secret"
    eos_token: str = "<|end|>"
    model_init_kwargs: dict = field(default_factory=lambda: {"token": "inner_secret", "x": (1, 2)})


def test_a_set_is_recorded_in_an_order(training_args):
    modules = {"q_proj", "k_proj", "v_proj", "o_proj"}
    found = record.describe("sft", (training_args(), ModelConfig(lora_target_modules=modules)))
    assert found["arguments"]["lora_target_modules"] == sorted(modules)


def test_the_record_of_a_run_is_complete_and_holds_no_secret(training_args, tmp_path):
    args = training_args(learning_rate=3e-4, hub_token="another_secret")
    found = record.describe("sft", (Secretive(), args))
    report = Report("rows.jsonl", "sft", rows_in=3, rows_out=2, fingerprint="abc")
    record.add_rows(found, {"train": report}, {})
    record.write_record(str(tmp_path / "record.yaml"), found)
    text = (tmp_path / "record.yaml").read_text(encoding="utf-8")
    assert "secret" not in text
    read = record.read_record(str(tmp_path / "record.yaml"))
    assert read["recipe"] == "sft"
    assert read["arguments"]["learning_rate"] == 3e-4
    assert read["arguments"]["eos_token"] == "<|end|>"
    assert read["arguments"]["model_init_kwargs"] == {"x": [1, 2]}
    assert read["datasets"] == {"train": {"source": "rows.jsonl", "rows": 2, "fingerprint": "abc"}}
    assert read["packages"]["trl"].startswith("1.16")
    secret = {"hub_token", "wandb_api_key"}
    fields = {f.name for group in (Secretive(), args) for f in dataclasses.fields(group)}
    assert read["arguments"].keys() == fields - secret
    assert record.changes(read, found) == []
    (tmp_path / "record.yaml").write_text("not a record")
    with pytest.raises(UserError, match=r"record\.yaml cannot be read as the record of a run"):
        record.read_record(str(tmp_path / "record.yaml"))


def test_outside_of_a_checkout_there_is_no_revision(tmp_path, monkeypatch):
    assert len(record.git_revision().removesuffix("-dirty")) == 40
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record.git_revision() is None
    monkeypatch.setenv("PATH", "")
    assert record.git_revision() is None


def test_what_the_user_can_mend_is_one_line_and_a_bug_is_not(capsys):
    def wrong_input():
        raise UserError("the file is empty.")

    def bug():
        raise KeyError("x")

    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    def missing_package():
        raise ImportError("You need to\n\ninstall `galore_torch`")

    def interrupted():
        raise KeyboardInterrupt

    def stopped():
        raise RunEnded("Stopped.", 143)

    def done():
        raise RunEnded("Nothing to do.")

    with pytest.raises(SystemExit, match="1"):
        run(wrong_input)
    assert capsys.readouterr().err == "error: the file is empty.\n"
    with pytest.raises(KeyError):
        run(bug)
    for main, line in (
        (full_disk, "error: runs/x: No space left on device."),
        (missing_package, "error: You need to install `galore_torch`"),
    ):
        with pytest.raises(SystemExit, match="1"):
            run(main)
        assert capsys.readouterr().err == f"{line}\n"
    with pytest.raises(SystemExit, match="130"):
        run(interrupted)
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="143"):
        run(stopped)
    assert capsys.readouterr().err == "Stopped.\n"
    run(done)
    assert capsys.readouterr().err == "Nothing to do.\n"


def test_one_signal_is_noted_and_a_second_one_ends_the_process(tmp_path, monkeypatch, capfd):
    # A test run that was started in the background ignores SIGINT.
    monkeypatch.setattr(signals, "SIGNALS", (signal.SIGTERM, signal.SIGUSR1))
    before = signal.getsignal(signal.SIGTERM)
    assert signals.received() is None
    ended = []
    monkeypatch.setattr(signals, "end", ended.append)
    with signals.stops_after_a_step():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # launchers send it twice at once
        assert signals.received() == signal.SIGTERM and ended == []
        monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", -1.0)
        signal.raise_signal(signal.SIGUSR1)
        assert ended == [signal.SIGUSR1]
    assert ended == [signal.SIGUSR1, signal.SIGTERM], "what comes after the last step is not lost"
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr().err.count("SIGTERM: stopping after this step") == 1


def test_another_signal_while_the_first_is_noted_is_not_a_second_wish(monkeypatch):
    monkeypatch.setattr(signals, "SIGNALS", (signal.SIGTERM, signal.SIGUSR1))
    ended, waiting, clock = [], [signal.SIGUSR1], signals.time.monotonic

    def interrupted() -> float:
        if waiting:
            signal.raise_signal(waiting.pop())
        return clock()

    monkeypatch.setattr(signals, "end", ended.append)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=interrupted))
    with signals.stops_after_a_step():
        signal.raise_signal(signal.SIGTERM)
        assert not waiting and signals.received() is not None and ended == []


def test_a_manifest_lists_every_file_of_every_folder(tmp_path):
    folder = tmp_path / ".unfinished" / "checkpoint-3"
    (folder / "critic").mkdir(parents=True)
    (folder / "critic" / "model.safetensors").write_text("weights")
    path = put_in_place(str(folder), str(tmp_path), sizes(str(folder)), True)
    manifest = json.loads((tmp_path / "checkpoint-3" / "checkpoint.json").read_text())
    assert manifest == {"resumable": True, "files": {"critic/model.safetensors": 7}}
    os.remove(tmp_path / "checkpoint-3" / "critic" / "model.safetensors")
    assert problem(path) == "critic/model.safetensors is missing"
