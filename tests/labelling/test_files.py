"""Files that appear only when they are whole: killed at random moments, on a full disk, twice under one name."""

import json
import os
import random
import resource
import signal
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from recipes.cli.errors import UserError
from recipes.labelling import files
from recipes.labelling.database import Database
from recipes.labelling.export import export, export_command
from recipes.labelling.files import new_file
from recipes.labelling.store import Store
from scripts import rank_responses
from tests.labelling.jobs import write_job
from tests.labelling.labelling_server import cli, write_samples

KILLS = 20


def killed_at_random(folder, work):
    """Runs `work(name)` in children that are killed at a random moment after the first trace of `name` in the folder.

    Returns the names.
    """
    start = time.perf_counter()
    work("whole")
    duration = time.perf_counter() - start
    chance = random.Random(0)
    names = [f"killed {number}" for number in range(KILLS)]
    for name in names:
        child = os.fork()
        if child == 0:
            work(name)
            os._exit(0)
        while not any(name in entry for entry in os.listdir(folder)):
            time.sleep(0.0005)
        time.sleep(duration / 10 * chance.random() ** 4)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return names


def assert_whole_or_absent(folder, names, is_whole):
    found = [name for name in names if (folder / name).exists()]
    torn = [name for name in found if not is_whole(folder / name)]
    assert torn == [], f"{len(torn)} of {len(names)} kills left a torn file under the final name"
    assert len(found) < len(names), "no kill came in time: the test has proved nothing"


def test_killed_export_leaves_a_whole_file_or_none(tmp_path):
    job, _ = write_job(tmp_path / "labels.db", prompts=200)
    names = killed_at_random(tmp_path, lambda name: export(Database(job.path), tmp_path / name))
    whole = (tmp_path / "whole").read_text()
    assert_whole_or_absent(tmp_path, names, lambda path: path.read_text() == whole)


def test_killed_backup_leaves_a_whole_file_or_none(tmp_path):
    job, _ = write_job(tmp_path / "labels.db", prompts=200)
    names = killed_at_random(tmp_path, lambda name: Database(job.path).backup(tmp_path / name))

    def is_whole(path):
        with sqlite3.connect(path) as db:
            return db.execute("SELECT count(*) FROM event").fetchone() == (200 * 2 * 3,)

    assert_whole_or_absent(tmp_path, names, is_whole)


def test_killed_creation_leaves_a_whole_database_or_none(tmp_path):
    names = killed_at_random(tmp_path, lambda name: Database(tmp_path / name, create=True))

    def is_whole(path):
        Store(path, guidelines="Rank.").close()
        return True

    assert_whole_or_absent(tmp_path, names, is_whole)


def test_the_disk_has_it_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    with new_file(tmp_path / "file") as part:
        part.write_text("content")
        assert not (tmp_path / "file").exists()
    assert calls == ["fsync", "link", "fsync"], "the content, the name, and the folder that holds the name"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", link)
    with new_file(tmp_path / "file") as part:
        part.write_text("content")
    assert (tmp_path / "file").read_text() == "content" and len(list(tmp_path.iterdir())) == 1


def test_a_file_made_in_the_meantime_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="exists already"), new_file(tmp_path / "file") as part:
        part.write_text("mine")
        (tmp_path / "file").write_text("somebody else's")
    assert (tmp_path / "file").read_text() == "somebody else's" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("command", ["export", "backup"])
def test_a_full_disk_names_the_file_that_was_not_written(tmp_path, command):
    job, _ = write_job(tmp_path / "labels.db", prompts=200)
    job.close()
    output = tmp_path / "elsewhere" / "output"
    output.parent.mkdir()

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))

    failed = cli(command, "--database", job.path, "--output", output, check=False, preexec_fn=small_disk)
    assert failed.returncode == 1 and failed.stderr.startswith(f"error: {output}: ") and "written" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1 and list(output.parent.iterdir()) == []
    assert json.loads(cli("agreement", "--database", job.path, "--format", "json"))["rankings"] == 400


def test_a_new_database_takes_nothing_from_one_that_is_gone(tmp_path):
    old = Store(tmp_path / "labels.db", create=True, guidelines="Rank.")  # in use, so its log is still beside it
    old.path.unlink()
    with pytest.raises(UserError, match="labels.db-wal: belongs to a database that is gone"):
        Database(tmp_path / "labels.db", create=True)
    (tmp_path / "labels.db-wal").rename(tmp_path / "copy.db-wal")
    other = Database(tmp_path / "labels.db", create=True)
    with pytest.raises(UserError, match="copy.db-wal: belongs to"):
        other.backup(tmp_path / "copy.db")
    with other.transaction() as db:
        assert db.execute("SELECT count(*) FROM guideline").fetchone()[0] == 0


def test_what_is_committed_is_on_the_disk(tmp_path):
    with Database(tmp_path / "labels.db", create=True).transaction(write=True) as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2, "FULL: every commit is synced"
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_samples_in_several_parts_are_all_added(capsys):
    """Of `--samples A --samples B` only B was, and `--sample` passed for `--samples`."""
    args = rank_responses.parse_args("serve --database x.db --samples a b --samples c --gold g".split())
    assert args.samples == [Path("a"), Path("b"), Path("c")] and args.gold == [Path("g")]
    with pytest.raises(SystemExit):
        rank_responses.parse_args("serve --database x.db --sample a".split())
    assert "unrecognized arguments: --sample" in capsys.readouterr().err


def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "recipes.labelling.agreement", None)
    assert rank_responses.main(["agreement", "--database", str(tmp_path / "x.db")]) == 1
    assert "error: agreement needs a package: " in capsys.readouterr().err


def test_guidelines_that_are_no_utf8_are_named(tmp_path, capsys):
    (tmp_path / "rules.txt").write_bytes("Bücher".encode("latin-1"))
    words = ["terminal", "--database", str(tmp_path / "x.db"), "--guidelines", str(tmp_path / "rules.txt")]
    assert rank_responses.main(words) == 1
    assert f"error: {tmp_path / 'rules.txt'}: cannot be read" in capsys.readouterr().err


def test_guidelines_of_a_windows_editor_begin_with_their_heading(tmp_path):
    (tmp_path / "rules.txt").write_text("# Rank", encoding="utf-8-sig")
    args = f"terminal --database {tmp_path / 'x.db'} --guidelines {tmp_path / 'rules.txt'} --samples".split()
    job = rank_responses.open_store(rank_responses.parse_args([*args, str(write_samples(tmp_path / "s.jsonl"))]))
    assert job.guidelines == "# Rank"


def test_the_command_to_export_names_a_file_that_is_not_there(tmp_path):
    (tmp_path / "rankings.jsonl").touch()
    assert export_command(tmp_path / "my labels.db").endswith(f"--output {tmp_path / 'rankings1.jsonl'}")
    assert f"'{tmp_path / 'my labels.db'}'" in export_command(tmp_path / "my labels.db")
