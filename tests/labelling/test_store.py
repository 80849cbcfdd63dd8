"""The labelling store, its files and its figures, without a server."""

import gzip
import json
import math
import multiprocessing
import os
import pty
import random
import re
import select
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from recipes.cli.errors import UserError
from recipes.formatting import format_dataset, load_rows
from recipes.labelling import accounts, store
from recipes.labelling import report as reports
from recipes.labelling.agreement import (
    agreement_report,
    agrees_with_gold,
    kendalls_w,
    krippendorff_alpha,
    mean_ranks,
    outcomes,
)
from recipes.labelling.answers import Answer, AnswerError, Review, Submission, ranks_of, tiers_of
from recipes.labelling.export import export
from recipes.labelling.markdown import render
from recipes.labelling.store import ConflictError, NotAssignedError, Store
from recipes.labelling.tasks import read_tasks
from recipes.labelling.terminal import parse_marks, parse_ranking, rank_in_terminal
from tests.labelling.labelling_server import HOSTILE, SCRIPT, cli, write_samples


@pytest.fixture
def make(tmp_path):
    """Makes a store with so many prompts, gold tasks and labelers; returns it and the labelers' ids."""

    def make(prompts=4, labelers=1, gold=0, responses=4, **options):
        job = Store(tmp_path / "labels.db", create=True, guidelines="Rank.", **options)
        tasks, _ = read_tasks(write_samples(tmp_path / "samples.jsonl", prompts, responses))
        job.add_tasks(tasks, "samples.jsonl")
        if gold:
            job.add_tasks(gold_tasks(tmp_path, gold), "gold.jsonl")
        for number in range(labelers):
            accounts.add_labeler(job, f"labeler {number}")
        return job, [labeler.id for labeler in accounts.labelers(job)]

    return make


def gold_tasks(folder, count):
    """Gold tasks whose right order is good, fair, bad."""
    responses = [{"text": "good", "rank": 1}, {"text": "fair", "rank": 2}, {"text": "bad", "rank": 3}]
    rows = [{"id": f"g{n}", "prompt": f"Gold {n}?", "responses": responses} for n in range(count)]
    (folder / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_tasks(folder / "gold.jsonl", gold=True)[0]


def reviewed(task, tiers=None, reason="because"):
    return Answer(tiers or task.answer.tiers, {id: Review(reason) for id in task.responses})


def record(job, labeler, task, action, answer=None, seconds=0.0):
    """As a page that has just been loaded does."""
    revision = job.task(labeler, task.prompt_id).revision
    sent = Submission(task.prompt_id, action, answer or task.answer, os.urandom(16).hex(), revision, seconds)
    return job.record(labeler, sent)


def submit(job, labeler, task, tiers=None):
    return record(job, labeler, task, "submit", reviewed(task, tiers))


def by_text(task):
    return {text: id for id, (_, text) in task.responses.items()}


# Files


def test_import_is_idempotent_and_gives_new_responses_a_new_task(tmp_path, make):
    job, _ = make(prompts=3)
    tasks, _ = read_tasks(tmp_path / "samples.jsonl")
    assert job.add_tasks(tasks, "samples.jsonl") == 0 and job.size()["prompt"] == 3
    more, _ = read_tasks(write_samples(tmp_path / "more.jsonl", prompts=4, responses=3))
    assert job.add_tasks(more, "more.jsonl") == 4, "other responses to a known prompt are another comparison"


def test_repeated_responses_are_left_out_and_counted(tmp_path):
    rows = [
        {"prompt": "a", "responses": [{"text": "x"}, {"text": "x"}, {"text": "y"}]},
        {"prompt": "b", "responses": [{"text": "x"}, {"text": "x"}]},
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    tasks, left_out = read_tasks(tmp_path / "s.jsonl")
    assert [[r.text for r in task.responses] for task in tasks] == [["x", "y"]]
    assert left_out == {"repeated_responses": 2, "too_few_responses": 1}


@pytest.mark.parametrize("name", ["samples.jsonl.gz", "samples"])
def test_samples_may_be_compressed_and_have_any_name(tmp_path, name):
    rows = write_samples(tmp_path / "samples.jsonl", prompts=2).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    assert read_tasks(tmp_path / name) == read_tasks(tmp_path / "samples.jsonl")


def test_a_prompt_is_stored_as_it_was_sampled(tmp_path):
    """Its id is a hash of it: another reading of the same file would refuse to go on with a job."""
    turns = [{"role": "developer", "content": ""}, {"role": "user", "content": "q"}]
    prompts = [" Two spaces \n", [turn | {"name": "x"} for turn in turns]]
    answers = [{"text": "a"}, {"text": "b"}]
    rows = [{"prompt": prompt, "system": "ignored", "responses": answers} for prompt in prompts]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "q", "responses": []}]))
    tasks, left_out = read_tasks(path)
    wanted = [
        [{"role": "user", "content": prompts[0]}],
        [{"role": m["role"], "content": m["content"]} for m in prompts[1]],
    ]
    assert [task.messages for task in tasks] == wanted and left_out["too_few_responses"] == 1
    assert tasks[0].id == "308477272e33e35a0888", "the id that jobs of earlier versions have"


def test_a_corrected_file_does_not_add_a_second_task_under_an_id(tmp_path):
    def serve(*rows):
        samples = tmp_path / "samples.jsonl"
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = cli(
            "terminal", "--database", tmp_path / "labels.db", "--samples", samples, "--labeler", "ann", check=False
        )
        return done.stderr if done.returncode else ""

    def row(text, **id):
        return id | {"prompt": text, "responses": [{"text": f"{text} a"}, {"text": f"{text} b"}]}

    assert serve(row("one", id="p1"), row("twoo", id="p2")) == ""
    refused = serve(row("one", id="p1"), row("two", id="p2"), row("three", id="p3"))
    assert f"{tmp_path / 'samples.jsonl'}: 'p2' has other texts than when it was added" in refused
    assert "another id" in refused and len(refused.splitlines()) == 1
    assert Store(tmp_path / "labels.db").size()["prompt"] == 2, "all or none"
    assert serve(row("one", id="p1"), row("twoo", id="p2"), row("two", id="p2b")) == ""

    refused = serve(row("one", id="p1"), row("twoo", id="p2"), row("other", id="p1"))
    assert "line 3: id: 'p1' stands on line 1 already, with other texts" in refused
    for file in tmp_path.glob("labels.db*"):
        file.unlink()
    assert serve(row("one"), row("two")) == ""
    assert "'2' has other texts" in serve(row("one"), row("twoo"))
    assert serve(row("before"), row("one"), row("two")) == "", "a line number is an id that moves"
    assert serve(row("before", id=None), row("one", id=None), row("two", id="")) == "", "no id, as pandas writes it"
    assert Store(tmp_path / "labels.db").size()["prompt"] == 3


def test_a_database_of_version_1_is_upgraded(tmp_path):
    """Version 1 wrote it: a ranking and a change that was undone, a change, a skip, a flag, an undone one, a draft."""
    path = tmp_path / "labels.db"
    with sqlite3.connect(path) as db:
        db.executescript(Path(__file__).with_name("version_1.sql").read_text())
        before = [tuple(row) for row in db.execute("SELECT * FROM standing ORDER BY id")]
        events = db.execute("SELECT * FROM event").fetchall()
        (seconds,) = db.execute("SELECT total(active_seconds) FROM event").fetchone()
    token = "W53KDGasIOGuLft4qzAyHvyURppDKkzP"  # ann's
    for _ in range(2):
        job = Store(path, overlap=2)
        with job.transaction() as db:
            assert [tuple(row) for row in db.execute("SELECT * FROM standing ORDER BY id")] == before
            assert [tuple(row) for row in db.execute("SELECT * FROM event")] == events
            assert db.execute("SELECT total(active_seconds) FROM task_state").fetchone()[0] == pytest.approx(seconds)
        job.close()
    ann, bob = (labeler.id for labeler in accounts.labelers(job))
    progress = job.progress(ann)
    assert [progress[kind] for kind in ("ranked", "skipped", "flagged", "left")] == [2, 1, 1, 1]
    assert accounts.log_in(job, token) and accounts.log_in(job, token.lower()) is None
    assert [response["rank"] for row in export_rows(job) for response in row["responses"]] == [1, 2] * 2
    task = job.next_task(bob)
    assert task.has_draft and submit(job, bob, task) and job.progress(bob)["ranked"] == 1


def at_once(work, count=8):
    """Runs `work` in so many processes that begin at the same moment; returns their exit codes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)

    def run():
        barrier.wait()
        work()

    processes = [context.Process(target=run) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_a_database_that_several_make_or_upgrade_at_once(tmp_path):
    """The first one did it, and the others stopped: the tables, or the file, existed already."""
    assert at_once(lambda: Store(tmp_path / "new.db", create=True, guidelines="Rank.")) == [0] * 8
    with closing(sqlite3.connect(tmp_path / "old.db")) as db:
        db.executescript(Path(__file__).with_name("version_1.sql").read_text())
        db.execute("PRAGMA journal_mode = WAL")
    assert at_once(lambda: Store(tmp_path / "old.db", guidelines="Rank.")) == [0] * 8
    assert Store(tmp_path / "old.db").progress(1)["ranked"] == 2


def test_where_labelers_stand_is_what_their_events_say(make):
    """Whatever is done, in whatever order, the table that triggers keep equals the history, read from the start."""
    job, labelers = make(prompts=5, labelers=3, overlap=3)
    chance = random.Random(0)
    for step in range(250):
        me = chance.choice(labelers)
        known = job.history(me)
        tasks = [answer["prompt_id"] for answer in known]
        if (task := job.next_task(me)) is not None:
            tasks.append(task.prompt_id)
        task = job.task(me, chance.choice(tasks))
        action = chance.choice(["draft", "submit", "skip", "flag", "undo"])
        if action == "undo" and known:
            job.undo(me, chance.choice(known)["id"], f"u{step}")
        elif action != "undo":
            record(job, me, task, action, replace(reviewed(task), comment="because"), seconds=0.01)
    with job.transaction() as db:
        events = [dict(row) for row in db.execute("SELECT * FROM event ORDER BY id")]
        undone = {event["undoes"] for event in events}
        expected = {}
        for event in events:
            if event["kind"] in ("submit", "edit", "skip", "flag") and event["id"] not in undone:
                expected[event["prompt_id"], event["labeler_id"]] = (event["id"], event["kind"])
        states = {(s["prompt_id"], s["labeler_id"]): dict(s) for s in db.execute("SELECT * FROM task_state")}
        seconds = {
            key: db.execute(
                "SELECT total(active_seconds) FROM event WHERE prompt_id = ? AND labeler_id = ?", key
            ).fetchone()[0]
            for key in states
        }
    assert len(events) > 100 and len(undone) > 10
    stands = {key: (s["event_id"], s["kind"]) for key, s in states.items() if s["kind"]}
    assert stands == expected
    assert {key: s["active_seconds"] for key, s in states.items()} == pytest.approx(seconds)


@pytest.mark.parametrize("flag", ["--overlap", "--gold_every"])
@pytest.mark.parametrize("number", ["-1", "1.5", "x", "1" * 40])
def test_numbers_on_the_command_line_have_bounds(tmp_path, flag, number):
    refused = cli("serve", "--database", tmp_path / "labels.db", f"{flag}={number}", check=False)
    assert refused.returncode and flag in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "labels.db").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: found a list, expected an object"),
        ('{"responses": []}', "line 2: prompt: missing"),
        ('{"prompt": "q"}', "line 2: responses: missing"),
        ('{"prompt": [], "responses": []}', "line 2: prompt: empty list"),
        ('{"prompt": [{"role": "user"}], "responses": []}', "line 2: prompt[0].content: missing"),
        ('{"prompt": "q", "responses": ["a", "b"]}', "line 2: responses[0]: found the text 'a', expected an object"),
        ('{"prompt": "q", "responses": [{"text": 1}]}', "line 2: responses[0].text: found 1"),
        (
            '{"prompt": "q", "responses": [{"text": "\\ud800"}, {"text": "b"}]}',
            "line 2: responses: the text",
        ),
        ('{"prompt": "q", "model": {}, "responses": [{"text": "a"}]}', "line 2: responses[0].model: found an object"),
        (
            json.dumps({"prompt": "q", "responses": [{"text": str(n)} for n in range(27)]}),
            "line 2: responses: found",
        ),
        (
            '{"id": "\\ud800", "prompt": "q", "responses": [{"text": "a"}, {"text": "b"}]}',
            "line 2: id: the text",
        ),
        ("[" * 100_000, "line 2: the JSON is nested too deeply"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_made(tmp_path, line, expected):
    good = json.dumps({"prompt": "q", "responses": [{"text": "a"}, {"text": "b"}]})
    samples = tmp_path / "samples.jsonl"
    samples.write_text(f"{good}\n{line}\n")
    refused = cli("terminal", "--database", tmp_path / "labels.db", "--samples", samples, check=False)
    assert refused.returncode == 1 and f"{samples}, {expected}" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not (tmp_path / "labels.db").exists()


def test_gold_needs_ranks_that_do_not_contradict(tmp_path, make):
    job, _ = make()
    for rank in (None, True, "1", float("nan"), 1e999):
        (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "q", "responses": [{"text": "a", "rank": rank}]}))
        with pytest.raises(UserError, match=r"responses\[0\].rank: found|NaN is not|Infinity is not"):
            read_tasks(tmp_path / "bad.jsonl", gold=True)
    row = {"id": "g", "prompt": "q", "responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]}
    twice = row | {"responses": [*row["responses"], {"text": "a", "rank": 3}]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(twice))
    with pytest.raises(UserError, match=r"responses\[2\].rank: the same text has another rank before"):
        read_tasks(tmp_path / "bad.jsonl", gold=True)
    turned = row | {"responses": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}]}
    (tmp_path / "two.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(turned))
    with pytest.raises(UserError, match="two different gold rankings"):
        job.add_tasks(read_tasks(tmp_path / "two.jsonl", gold=True)[0], "two.jsonl")
    assert job.size()["gold"] == 0, "all or none"


def test_files_that_are_no_labelling_database(tmp_path):
    with pytest.raises(UserError, match="no such database"):
        Store(tmp_path / "missing.db")
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        Store(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="not a labelling database"):
        Store(tmp_path / "other.db", create=True)


def test_a_token_is_never_replaced_in_another_database_or_for_another_name(tmp_path):
    """A mistyped name got a token that logs nobody in, or in as somebody new."""
    database = tmp_path / "labels.db"
    arguments = ("add-labeler", "ann", "--database")
    refused = cli(*arguments, database, "--new_token", check=False)
    assert refused.returncode == 1 and "no such database" in refused.stderr and not database.exists()
    assert "is new: serve it with --samples" in cli(*arguments, database)
    with pytest.raises(UserError, match="there is no labeler 'amn' in .*labels.db; leave --new_token out"):
        accounts.add_labeler(Store(database), "amn", new_token=True)
    assert "is new" not in cli(*arguments, database, "--new_token")


def test_names_in_any_script_and_nothing_that_cannot_be_seen(tmp_path):
    job = Store(tmp_path / "labels.db", create=True)
    for name in ("نگین\u200cالسادات", "ශ්\u200dරී", "山田\u3000太郎", "👩\u200d🔬"):
        accounts.add_labeler(job, name)
    for name in ("", " ", "\u200d", "a\nb", "a\tb", "a\x1b[31m", "\u202ebob", "\udcff", "x" * 81):
        with pytest.raises(UserError, match="printable characters"):
            accounts.add_labeler(job, name)


# Who gets what


def test_every_labeler_has_an_order_of_their_own(make):
    job, labelers = make(prompts=1, labelers=6, responses=3, overlap=6)
    orders = [tuple(job.next_task(labeler).responses) for labeler in labelers]
    assert set(orders) == set(permutations(orders[0])), "six labelers, six orders"
    assert [tuple(job.next_task(labeler).responses) for labeler in labelers] == orders


def test_overlap_counts_people_at_work_and_frees_what_was_skipped_or_left(make, monkeypatch):
    job, (ann, bob, cyd) = make(prompts=1, labelers=3, overlap=1)
    task = job.next_task(ann)
    assert job.next_task(bob) is None, "ann works on the only prompt"
    record(job, ann, task, "skip")
    assert job.next_task(ann) is None, "what was skipped does not come back by itself"
    assert job.next_task(bob).prompt_id == task.prompt_id
    assert job.next_task(cyd) is None
    later = time.time() + store.LEASE_SECONDS + 1
    monkeypatch.setattr(store.time, "time", lambda: later)
    assert job.next_task(cyd).prompt_id == task.prompt_id, "bob has left it lying"
    record(job, cyd, task, "flag", Answer(task.answer.tiers, comment="nonsense"))
    assert job.progress(ann)["left"] == 0


@pytest.mark.parametrize("gold_every", [2, 4])
def test_gold_tasks_come_once_in_so_many_and_nothing_gives_them_away(make, gold_every):
    job, (ann,) = make(prompts=12, gold=3, gold_every=gold_every)
    seen, left = [], []
    while task := job.next_task(ann):
        left.append(job.progress(ann)["left"])
        seen.append(task.messages[0]["content"].startswith("Gold"))
        assert "gold" not in json.dumps({k: v for k, v in vars(task).items() if k != "messages"}, default=vars).lower()
        submit(job, ann, task)
    assert left == list(range(15, 0, -1)), "the count of tasks left must not show which ones are gold"
    for block in range(3):
        assert sum(seen[block * gold_every : (block + 1) * gold_every]) == 1
    assert sum(seen) == 3 and len(seen) == 15


def test_no_gold_when_switched_off_and_a_job_of_gold_alone(make, tmp_path):
    job, (ann,) = make(prompts=2, gold=2, gold_every=0)
    for _ in range(2):
        submit(job, ann, job.next_task(ann))
    assert job.next_task(ann) is None
    only = Store(tmp_path / "only.db", create=True)
    only.add_tasks(gold_tasks(tmp_path, 2), "gold.jsonl")
    accounts.add_labeler(only, "ann")
    submit(only, 1, only.next_task(1))
    assert only.next_task(1) is not None


# What counts


def test_events_are_written_once(make):
    job, (ann,) = make()
    submit(job, ann, job.next_task(ann))
    for table in ("event", "review", "assignment", "prompt", "response", "guideline"):
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET rowid = rowid"):
            with pytest.raises(sqlite3.Error, match="written once"), job.transaction(write=True) as db:
                db.execute(statement)


def test_undo_goes_back_one_answer_at_a_time(make):
    job, (ann,) = make()
    task = job.next_task(ann)
    ids = list(task.responses)
    first = submit(job, ann, task, [[id] for id in ids])
    second = submit(job, ann, task, [ids])
    with pytest.raises(ConflictError):
        job.undo(ann, first, "u0")
    for _ in range(2):
        assert job.undo(ann, second, "u1") == task.prompt_id, "the same key undoes once"
    assert job.task(ann, task.prompt_id).answer.tiers == [[id] for id in ids]
    job.undo(ann, first, "u2")
    again = job.task(ann, task.prompt_id)
    assert again.standing is None and again.answer.tiers == [[id] for id in ids] and job.progress(ann)["last"] is None
    with pytest.raises(ConflictError):
        job.undo(ann, first, "u3")


def test_undo_keeps_what_was_changed_since(make):
    job, (ann,) = make()
    task = job.next_task(ann)
    ids = list(task.responses)
    answers = [[[id] for id in ids], [ids], [ids[:2], ids[2:]]]
    first, second = (submit(job, ann, task, tiers) for tiers in answers[:2])
    record(job, ann, task, "draft", Answer(answers[2]))
    for number, event in enumerate((second, first)):
        job.undo(ann, event, f"u{number}")
        now = job.task(ann, task.prompt_id)
        assert now.answer.tiers == answers[2] and now.has_draft
    submit(job, ann, task, answers[2])
    job.undo(ann, job.progress(ann)["last"], "u2")
    now = job.task(ann, task.prompt_id)
    assert now.answer.tiers == answers[2] and not now.has_draft, "the draft was submitted: it is none any more"


def test_a_draft_over_a_submitted_ranking_does_not_count(make):
    job, (ann,) = make()
    task = job.next_task(ann)
    ids = list(task.responses)
    submit(job, ann, task, [[id] for id in ids])
    record(job, ann, task, "draft", Answer([ids]))
    now = job.task(ann, task.prompt_id)
    assert now.answer.tiers == [ids] and now.standing == "submit" and now.has_draft
    (row,) = (ranking for ranking in export_rows(job))
    assert [response["rank"] for response in row["responses"]] == [1, 2, 3, 4]


def export_rows(job):
    output = job.path.with_name(f"{time.time_ns()}.jsonl")
    export(job, output)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_justifications_may_be_optional_or_off(make):
    job, (ann,) = make()
    task = job.next_task(ann)
    for reason in ("", "  \n"):
        with pytest.raises(AnswerError, match="no reason for the rank of 4 of 4 responses"):
            record(job, ann, task, "submit", reviewed(task, reason=reason))
    job.justifications = "optional"
    record(job, ann, task, "submit", Answer(task.answer.tiers))
    assert "justification" not in export_rows(job)[0]["responses"][0]


def test_nobody_can_answer_what_was_not_assigned(make):
    job, (ann, bob) = make(labelers=2)
    task = job.next_task(ann)
    with pytest.raises(NotAssignedError):
        job.record(bob, Submission(task.prompt_id, "submit", reviewed(task), key="k", revision=0))
    with pytest.raises(NotAssignedError):
        job.task(bob, task.prompt_id)


def test_time_is_summed_over_events_and_never_more_than_has_passed(make, monkeypatch):
    job, (ann,) = make()
    now = time.time()
    monkeypatch.setattr(store.time, "time", lambda: now)
    task = job.next_task(ann)
    for passed, claimed in ((10, 4), (10, 7.5), (5, 1000)):
        now += passed
        record(job, ann, task, "draft", seconds=claimed)
    assert job.task(ann, task.prompt_id).active_seconds == pytest.approx(4 + 7.5 + 5)


def test_backup_is_a_whole_database_and_overwrites_nothing(make, tmp_path):
    job, (ann,) = make()
    submit(job, ann, job.next_task(ann))
    copy = tmp_path / "copy.db"
    cli("backup", "--database", job.path, "--output", copy)
    assert export_rows(Store(copy))[0]["annotator"] == "labeler 0"
    assert copy.stat().st_mode & 0o077 == 0 == job.path.stat().st_mode & 0o077, "for its owner only"
    again = cli("backup", "--database", job.path, "--output", copy, check=False)
    assert again.returncode == 1 and "exists already" in again.stderr


# Export


def test_ranks_and_tiers_are_inverse():
    tiers = [["a"], ["b", "c"], ["d"]]
    assert ranks_of(tiers) == {"a": 1, "b": 2, "c": 2, "d": 4}
    assert tiers_of(ranks_of(tiers)) == tiers
    assert tiers_of({"x": 7.5, "y": -1}) == [["y"], ["x"]]


def test_export_counts_ties_and_the_formatting_module_takes_it(make, tmp_path):
    job, (ann, bob) = make(prompts=3, labelers=2, gold=1, gold_every=2, overlap=2)
    rankings = 0
    for labeler in (ann, bob):
        while task := job.next_task(labeler):
            ids = list(task.responses)
            is_gold = len(ids) == 3
            tiers = [[id] for id in ids] if is_gold else [[ids[0]], ids[1:3], [ids[3]]]
            if task.messages[0]["content"] == "Question 2?":
                tiers = [ids]
            submit(job, labeler, task, tiers)
            rankings += not is_gold
    output = tmp_path / "rankings.jsonl"
    counts = export(job, output)
    assert counts == {
        "rankings": 6, "prompts": 3, "labelers": 2, "gold_left_out": 2,
        "pairs": 4 * 5, "tied_pairs": 4 * 1 + 2 * 6, "all_tied": 2,
    }  # fmt: skip
    pairs, report = format_dataset(load_rows(str(output)), "preference")
    assert len(pairs) == counts["pairs"] and not report.errors
    assert len(report.skipped) == counts["all_tied"]
    assert len(set(pairs["group_id"])) == 2, "all pairs of a prompt stay together"
    row = pairs[0]
    assert row["prompt"][0]["content"].startswith("Question") and row["chosen"][0]["role"] == "assistant"
    ranked, _ = format_dataset(load_rows(str(output)), "ranking")
    assert len(ranked) == 4 and ranked[0]["ranks"] == [1.0, 2.0, 2.0, 4.0]

    assert export(job, tmp_path / "all.jsonl", include_gold=True)["rankings"] == 8
    tasks, _ = read_tasks(tmp_path / "rankings.jsonl", gold=True)
    assert len(tasks) == 6 and all(task.gold for task in tasks), "rankings can become gold tasks"


def test_prompts_of_two_files_have_ids_of_their_own_in_an_export(make, tmp_path):
    """`scripts/sample_responses.py` numbers the prompts of every file from p1 on."""
    job, (ann,) = make(prompts=1)
    later = {"id": "p0", "prompt": "Another?", "responses": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "later.jsonl").write_text(json.dumps(later))
    job.add_tasks(read_tasks(tmp_path / "later.jsonl")[0], "later.jsonl")
    while task := job.next_task(ann):
        submit(job, ann, task)
    export(job, tmp_path / "rankings.jsonl")
    assert [task.sample_id for task in read_tasks(tmp_path / "rankings.jsonl", gold=True)[0]] == [
        "p0:labeler 0",
        "p0-2:labeler 0",
    ]


def test_nothing_to_export_is_an_error(make, tmp_path):
    job, _ = make()
    nothing = cli("export", "--database", job.path, "--output", tmp_path / "r.jsonl", check=False)
    assert nothing.returncode == 1 and "no submitted rankings" in nothing.stderr
    assert not (tmp_path / "r.jsonl").exists()


# Agreement


def test_krippendorff_alpha_gives_the_published_values():
    """Four observers, twelve units, missing values: Krippendorff (2011), example D."""
    observers = """
        1 2 3 3 2 1 4 1 2 . . .
        1 2 3 3 2 2 4 1 2 5 . 3
        . 3 3 3 2 3 4 2 2 5 1 .
        1 2 3 3 2 4 4 1 2 5 1 ."""
    table = [line.split() for line in observers.strip().splitlines()]
    counts = np.array([[unit.count(value) for value in "12345"] for unit in zip(*table, strict=True)])
    published = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849}
    assert {level: round(krippendorff_alpha(counts, level), 3) for level in published} == published
    assert krippendorff_alpha(np.array([[2, 0], [2, 0]]), "nominal") is None
    assert krippendorff_alpha(np.array([[1, 0], [0, 1]]), "nominal") is None, "nobody to agree with"
    assert krippendorff_alpha(np.array([[2, 0], [0, 2]]), "nominal") == 1


def test_kendalls_w_gives_the_published_values():
    """Three executives and six applicants, W = .16: Siegel, Nonparametric Statistics (1956), chapter 9."""

    def w(*rankings):
        return kendalls_w(np.stack([mean_ranks(tiers_of(dict(enumerate(ranks)))) for ranks in rankings]))

    assert round(w([1, 6, 3, 2, 5, 4], [1, 5, 6, 4, 2, 3], [6, 3, 2, 5, 4, 1]), 2) == 0.16
    # With ties: Friedman's chi-square over m (n - 1), which scipy corrects for ties the same way.
    assert w([1, 2, 2, 4], [1, 1, 3, 4], [1, 2, 2, 2]) == pytest.approx(0.8194444444)
    assert w([1, 1], [1, 1]) is None
    assert w([1, 2], [2, 1]) == 0


def test_pair_outcomes():
    assert outcomes(mean_ranks([["b"], ["a", "c"]])).tolist() == [-1, 0, 1], "a and b, a and c, b and c"


def test_agreement_report_counts_by_hand(make, tmp_path):
    """Two prompts of three responses: one ranked alike, one turned round with a tie; a gold task failed by one."""
    job, (ann, bob) = make(prompts=2, labelers=2, responses=3, gold=1, gold_every=3, overlap=2)
    for labeler in (ann, bob):
        while task := job.next_task(labeler):
            id = by_text(task)
            if "good" in id:
                order = ["good", "fair", "bad"] if labeler == ann else ["bad", "fair", "good"]
                submit(job, labeler, task, [[id[text]] for text in order])
                continue
            question = task.messages[0]["content"][9]
            a, b, c = (id[f"Answer {number} to question {question}."] for number in range(3))
            if labeler == ann or question == "0":
                submit(job, labeler, task, [[a], [b], [c]])
            else:
                submit(job, labeler, task, [[c], [a, b]])
    report = agreement_report(job)
    # Prompt 0: three pairs alike. Prompt 1: a>b against a tie, a>c and b>c turned round.
    assert report["pairwise"]["with_ties"]["share"] == pytest.approx(3 / 6)
    assert report["pairwise"]["without_ties"]["share"] == pytest.approx(3 / 5)
    assert report["pairwise"]["without_ties"]["pairs"] == 5
    low, high = report["pairwise"]["without_ties"]["ci95"]
    assert low == 0 and high == 1, "prompt 0 twice, or prompt 1 twice"
    # W is 1 on prompt 0; on prompt 1 the rank sums are 1 + 2.5, 2 + 2.5, 3 + 1.
    spread = sum((total - 4) ** 2 for total in (3.5, 4.5, 4.0))
    assert report["kendalls_w"] == pytest.approx((1 + 12 * spread / (4 * 24 - 2 * 6)) / 2)
    # Six pairs, both ways round: they disagree in 6 of 12. Of their 24 values 11 are better, 11 worse and 2 ties: of
    # the 24 * 23 ways to draw two of them, 2 * 11 * 11 + 2 * 22 * 2 give two that differ.
    expected = (2 * 11 * 11 + 2 * 22 * 2) / (24 * 23)
    assert report["krippendorff_alpha"]["nominal"] == pytest.approx(1 - (6 / 12) / expected)
    first, second = report["labelers"]["labeler 0"], report["labelers"]["labeler 1"]
    assert first["gold"] == {"tasks": 1, "share": 1.0, "ci95": None, "pairs": 3, "disagreed": []}
    assert second["gold"]["share"] == 0 and second["gold"]["disagreed"] == ["g0"]
    assert first["ranked"] == 3 and second["tied"] == pytest.approx(1 / 9)
    order, ties = (outcomes(mean_ranks(tiers)) for tiers in ([["a"], ["b"], ["c"]], [["a", "b", "c"]]))
    assert agrees_with_gold(ties, order).tolist() == [False] * 3, "who ties everything has not passed"
    assert agrees_with_gold(order, ties).size == 0, "and what gold leaves open, nobody can get wrong"
    assert report["prompts_shared"] == 2, "gold tasks do not flatter the agreement"

    text = reports.render(report, "text")
    assert "60.0 %" in text and "72.6 %" in text and "77.3 %" in text and "disagreed with attention tasks: g0" in text
    page = reports.render(report, "html", "<Agreement>")
    assert '<b style="left: 60.0%">' in page and "&lt;Agreement&gt;" in page and "60.0 %" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page
    printed = json.loads(cli("agreement", "--database", job.path, "--format", "json"))
    assert printed == json.loads(json.dumps(report))
    for _ in range(2):
        done = cli(
            "agreement", "--database", job.path, "--format", "html", "--output", tmp_path / "a.html", check=False
        )
    assert done.returncode == 1 and "exists already" in done.stderr


def test_alpha_does_not_depend_on_which_response_comes_first(make):
    """Labelers who differ at random reach about 0, wherever the better responses happen to stand in the file."""
    job, labelers = make(prompts=60, labelers=2, responses=2, overlap=2)
    for index, labeler in enumerate(labelers):
        for turn in range(60):
            task = job.next_task(labeler)
            ids = sorted(task.responses)
            submit(job, labeler, task, [[id] for id in (ids if index == 0 or turn % 2 else ids[::-1])])
    report = agreement_report(job)
    assert report["pairwise"]["with_ties"]["share"] == 0.5
    assert math.isclose(report["krippendorff_alpha"]["nominal"], 0, abs_tol=0.01)


def test_labelers_who_agreed_on_two_prompts_are_not_sure_to_agree_on_all(make):
    job, labelers = make(prompts=2, labelers=2, overlap=2)
    for labeler in labelers:
        while task := job.next_task(labeler):
            submit(job, labeler, task, [[id] for id in sorted(task.responses)])
    assert agreement_report(job)["pairwise"]["with_ties"] == {"share": 1.0, "ci95": None, "pairs": 12}


def test_what_is_wrong_with_a_flagged_prompt_is_reported(make):
    """Labelers have to write it down, and no command showed it."""
    job, (ann, bob) = make(prompts=2, labelers=2, overlap=2)
    task = job.next_task(ann)
    for labeler, comment in ((ann, "holds a\x1b[31m phone number"), (bob, "a mistake")):
        job.next_task(labeler)
        flag = record(job, labeler, task, "flag", Answer(task.answer.tiers, comment=comment))
    job.undo(bob, flag, "u")
    report = agreement_report(job)
    assert report["flagged"] == [{"prompt": "p0", "labeler": "labeler 0", "comment": "holds a\x1b[31m phone number"}]
    assert "labeler 0 flagged p0: holds a\\x1b[31m phone number" in reports.render(report, "text")
    assert "labeler 0 flagged p0: holds a" in reports.render(report, "html", "Agreement")


def test_reports_before_anybody_agrees_on_anything(make):
    job, _ = make()
    report = agreement_report(job)
    assert report["pairwise"]["with_ties"] == {"share": None, "ci95": None, "pairs": 0}
    assert "--overlap 2" in reports.render(report, "text") and "--overlap 2" in reports.render(
        report, "html", "Agreement"
    )


# Markdown


def test_markdown_is_shown_and_nothing_else_gets_through():
    text = "# Title\n\nSome **bold** `code` <b>raw</b> &lt;\n\n```python\nif a < b:\n    x()\n```\n\n- one\n- two\n\n"
    text += "|a|b|\n|-|-|\n|1|2|"
    html = render(text)
    for part in (
        "<h4>Title</h4>", "<strong>bold</strong>", "<code>code</code>", "&lt;b&gt;raw&lt;/b&gt;", "&amp;lt;",
        "<pre><code>if a &lt; b:\n    x()\n</code></pre>", "<li>one</li>", "<td>1</td>",
    ):  # fmt: skip
        assert part in html, part
    links = (
        "[link](http://evil.example) ![image](http://evil.example/x.png) <http://evil.example> [r]\n\n[r]: http://x"
    )
    html = render(f"**see** {links}")
    assert "<a" not in html and "<img" not in html and "[link](http://evil.example)" in html
    for text in [
        *HOSTILE,
        "*x*<script>alert(1)</script>",
        "```\n</code></pre><script>x</script>",
        "| <img src=x onerror=y> |\n|-|",
    ]:
        html = render(f"**x**\n\n{text}")
        assert set(re.findall(r"<(\w+)", html)) <= {
            "p",
            "br",
            "strong",
            "em",
            "pre",
            "code",
            "table",
            "thead",
            "tr",
            "th",
        }
        assert not re.search(r"<[^>]*\s(on\w+|href|src|style)", html)
    for plain in ("plain", "two\n\nparagraphs", "2 * 3 * 4", "a < b", "", "x" * 30_000 + "**b**"):
        assert render(plain) is None, "shown as it was written"
    for left_out in ("|a|b|\n|-|-|\n|1|2|three|", "> " * 30 + "words", "```python some words\nx\n```"):
        assert render(left_out) is None, "nobody could judge what is not shown"
    assert "<ol start" in render("7. a\n- 2) b\n\n> ~~~ c++ \n> x\n> ~~~\n"), "nothing is left out"


@pytest.mark.parametrize(
    "unit",
    ["*a **a ", "[", "`a", "> ", "_a", "[a]: x\n", "|", "  - x\n", "**", "![", "<a ", "&", "\\\\", "\n", "1. ", "```"],
)
def test_markdown_of_a_mean_model_takes_no_time(unit):
    start = time.perf_counter()
    render((unit * 20_000)[:20_000])
    assert time.perf_counter() - start < 2


# Terminal


@pytest.mark.parametrize("text", ["B > A = C > D", "b a=c d", "ba=cd", "b>a =c,d", "B > a=c>D"])
def test_rankings_can_be_typed_in_several_ways(text):
    assert parse_ranking(text, "ABCD") == [["B"], ["A", "C"], ["D"]]


@pytest.mark.parametrize("text", ["", "ABC", "ABCDD", "A==BCD", "=ABCD", "A>B>C>E", "1 2 3 4", "ABCD!", "A B C D ="])
def test_what_is_no_ranking_is_refused(text):
    with pytest.raises(AnswerError):
        parse_ranking(text, "ABCD")


def test_marks():
    assert parse_marks("A6 b2u Chn", "ABC") == {
        "A": (6, []), "B": (2, ["untruthful"]), "C": (None, ["harmful", "did_not_answer"]),
    }  # fmt: skip
    for text in ("D5", "A8", "A5x", "5A"):
        with pytest.raises(AnswerError):
            parse_marks(text, "ABC")


def test_a_comment_that_is_refused_does_not_spoil_the_ranking(make, monkeypatch, capsys):
    """It stayed in the answer, and every line after it was refused for it."""
    job, (ann,) = make(prompts=1, justifications="off")
    typed = iter(["flag", "x" * 4001, "D > C > B > A", "", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(typed))
    assert rank_in_terminal(job, ann) == 1
    assert capsys.readouterr().out.count("at most 4000") == 1


def test_a_long_line_in_a_terminal_is_whole():
    """It was cut at 4,095 bytes, without a word."""
    main, side = pty.openpty()
    code = "from recipes.labelling import terminal\nprint(len(input('? ')))"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=side, stdout=side, cwd=SCRIPT.parents[1])
    printed, typed = b"", b"x" * 6000 + b"\n"
    while process.poll() is None:
        readable, writable, _ = select.select([main], [main] if typed and b"? " in printed else [], [], 0.1)
        if readable:
            printed += os.read(main, 4096)
        if writable:
            typed = typed[os.write(main, typed[:100]) :]
    while select.select([main], [], [], 0)[0]:
        printed += os.read(main, 4096)
    os.close(main), os.close(side)
    assert printed.split()[-1] == b"6000"


def test_ranking_in_a_terminal_from_draft_to_export(tmp_path):
    """A pseudo-terminal: quit in the middle, come back to the draft, submit, undo, skip; then export."""
    samples = write_samples(tmp_path / "samples.jsonl", prompts=2, responses=3, model="hidden-model")
    database = tmp_path / "labels.db"
    args = ["--database", database, "--labeler", "ann"]

    def session(*lines):
        main, side = pty.openpty()
        command = [sys.executable, str(SCRIPT), "terminal", *map(str, args), "--samples", str(samples)]
        process = subprocess.Popen(command, stdin=side, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.write(main, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape") + b"\x04")
        printed, _ = process.communicate(timeout=60)
        os.close(main), os.close(side)
        assert process.returncode == 0, printed
        assert "hidden-model" not in printed
        return printed

    printed = session("B > A", "?", "C > A=B", "first \udcff reason", "first reason")
    assert "Ranking, best first" in printed and "? for help" in printed and "(one sentence)" in printed
    assert "not UTF-8" in printed
    assert "use each of A, B, C once" in printed and "kept as a draft" in printed
    printed = session("flag")
    assert "What is wrong with the prompt?" in printed and "Traceback" not in printed
    printed = session("", "", "second", "third", "A6 Bu", "", "skip")
    assert f"export --database {database} --output {tmp_path / 'rankings.jsonl'}" in printed, "what comes next"
    assert "Ranking [C > A=B]" in printed and "[first reason]" in printed and "Saved." in printed
    assert "Nothing is left to rank" in printed and "1 ranking submitted" in printed
    (row,) = export_rows(Store(database))
    assert [response["rank"] for response in row["responses"]] == [1, 2, 2]
    assert {r["justification"] for r in row["responses"]} == {"first reason", "second", "third"}
    assert [r.get("rating") for r in row["responses"]].count(6) == 1
    assert [r.get("flags") for r in row["responses"]].count(["untruthful"]) == 1
