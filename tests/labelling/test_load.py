"""Many labelers at once, and large jobs. Only ever against a server on this machine, and for some seconds."""

import json
import random
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import httpx
import pytest

from recipes.labelling import accounts
from tests.labelling.jobs import write_job
from tests.labelling.labelling_server import Client, add_labeler, cli, server, write_samples

TASKS = 10_000

# The limits are those of a machine with nothing else to do; here other tests run beside this one.
SHARED = 3


def labour(client, seconds, think):
    """Ranks as fast as `think` (mean seconds between requests) allows: a page, two drafts, a submit, the next page.

    Returns the seconds each request took, the keys that were acknowledged and what was refused.
    """
    took, acknowledged, refused = [], set(), []
    pause = random.Random(client.name)

    def timed(call):
        if think:
            time.sleep(pause.expovariate(1 / think))
        start = time.perf_counter()
        reply = call()
        took.append(time.perf_counter() - start)
        return reply

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            task = timed(client.task)
        except AssertionError as error:
            refused.append(str(error)[:200])
            continue
        assert not task.done, "the job is too small for this test"
        for action in ("draft", "draft", "submit"):
            body = client.body(task, action, active_seconds=think)
            reply = timed(lambda body=body: client.post(body))
            if reply.status_code != 200:
                refused.append(reply.text)
                break
            acknowledged.add(body["key"])
            task.revision = reply.json()["revision"]
    return took, acknowledged, refused


def run(tmp_path, labelers, seconds, think, record_property, prompts=1000):
    database = tmp_path / "labels.db"
    samples = write_samples(tmp_path / "samples.jsonl", prompts + 2)
    tokens = {name: add_labeler(database, name) for name in (f"person {number}" for number in range(labelers))}
    with server(database, "--samples", samples, "--overlap", "2") as running:
        clients = []
        for name, token in tokens.items():
            clients.append(Client(running.url, token))
            clients[-1].name = name
        with ThreadPoolExecutor(labelers) as pool:
            results = list(pool.map(lambda client: labour(client, seconds, think), clients))
    took = sorted(time for result in results for time in result[0])
    acknowledged = {key for result in results for key in result[1]}
    refused = [text for result in results for text in result[2]]
    with sqlite3.connect(database) as db:
        stored = {key for (key,) in db.execute("SELECT key FROM event")}
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    figures = {
        "requests": len(took), "p50": took[len(took) // 2], "p99": took[int(len(took) * 0.99)], "max": took[-1],
        "acknowledged": len(acknowledged), "lost": len(acknowledged - stored), "refused": len(refused),
    }  # fmt: skip
    print(figures)
    for name, value in figures.items():
        record_property(name, value)
    assert refused == []
    assert acknowledged <= stored
    return figures


@pytest.mark.slow
def test_fifty_labelers_who_think(tmp_path, record_property):
    figures = run(tmp_path, labelers=50, seconds=20, think=2.0, record_property=record_property)
    assert figures["p99"] < 0.5 * SHARED, figures


@pytest.mark.slow
def test_fifty_labelers_who_do_not_think(tmp_path, record_property):
    figures = run(tmp_path, labelers=50, seconds=20, think=0, record_property=record_property)
    assert figures["p99"] < 2 * SHARED, figures


@pytest.fixture(scope="module")
def large_job(tmp_path_factory):
    """10,000 tasks, 9,000 of them ranked three times by 20 labelers: 27,000 rankings, 81,000 events."""
    path = tmp_path_factory.mktemp("large") / "labels.db"
    job, ids = write_job(path, TASKS, labelers=20, overlap=3, share=0.9)
    tokens = [accounts.add_labeler(job, f"labeler {number}", new_token=True) for number in range(len(ids))]
    job.close()
    return path, tokens


@pytest.mark.slow
def test_pages_of_a_large_job(large_job, record_property):
    database, tokens = large_job
    took = {}
    with server(database, "--overlap", "3") as running:
        client = Client(running.url, tokens[0])
        for _ in range(15):
            task = client.task()
            pages = {
                "next task": "/", "a task": f"/task/{task.prompt_id}", "answers": "/answers",
                "answers before": "/answers?before=40000",
            }  # fmt: skip
            for name, path in pages.items():
                start = time.perf_counter()
                assert client.http.get(path).status_code == 200
                took.setdefault(name, []).append(time.perf_counter() - start)
            start = time.perf_counter()
            client.answer(task)
            took.setdefault("submit", []).append(time.perf_counter() - start)
    figures = {name: round(median(values), 4) for name, values in took.items()}
    print(figures)
    for name, value in figures.items():
        record_property(name, value)
    assert max(figures.values()) < 0.15, figures


@pytest.mark.slow
@pytest.mark.parametrize("format", ["text", "json", "html"])
def test_agreement_of_a_large_job(large_job, record_property, format):
    database, _ = large_job
    cli("agreement", "--database", database)  # what the operating system keeps in memory
    start = time.perf_counter()
    printed = cli("agreement", "--database", database, "--format", format)
    took = time.perf_counter() - start
    print(took)
    record_property("seconds", took)
    if format == "json":
        assert json.loads(printed)["rankings"] >= 27_000
    assert took < 3 * SHARED, "the whole command, with its start"


@pytest.mark.slow
def test_fifty_labelers_on_a_large_job(large_job, tmp_path, record_property):
    database, _ = large_job
    cli("backup", "--database", database, "--output", tmp_path / "labels.db")
    figures = run(tmp_path, labelers=50, seconds=20, think=3.0, record_property=record_property, prompts=0)
    assert figures["p99"] < 0.5 * SHARED, figures


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path, record_property):
    """Eight labelers write as fast as they can while the server is killed at twenty random moments; what was not
    answered is sent again, as the page does. Everything that was acknowledged is there, once."""
    database = tmp_path / "labels.db"
    samples = write_samples(tmp_path / "samples.jsonl", prompts=500)
    tokens = [add_labeler(database, f"labeler {number}") for number in range(8)]
    chance = random.Random(0)
    acknowledged, unanswered, clients = {}, {}, []

    def write(client):
        """Until the server dies."""
        try:
            if client in unanswered:
                reply = client.post(unanswered[client])
                assert reply.status_code == 200, reply.text
                acknowledged[unanswered.pop(client)["key"]] = reply.json()["revision"]
            while True:
                task = client.task()
                for action in ("draft", "draft", "submit"):
                    unanswered[client] = client.body(task, action)
                    reply = client.post(unanswered[client])
                    assert reply.status_code == 200, reply.text
                    task.revision = acknowledged[unanswered.pop(client)["key"]] = reply.json()["revision"]
        except httpx.TransportError:
            return

    for _ in range(20):
        with server(database, "--samples", samples, "--overlap", "8") as running:
            if not clients:
                clients = [Client(running.url, token) for token in tokens]
            for client in clients:
                client.move(running.url)
            with ThreadPoolExecutor(len(clients)) as pool:
                futures = [pool.submit(write, client) for client in clients]
                time.sleep(chance.uniform(0.2, 1.2))
                running.kill()
                for future in futures:
                    future.result()
    with sqlite3.connect(database) as db:
        stored = dict(db.execute("SELECT key, id FROM event"))
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    lost = acknowledged.items() - stored.items()
    figures = {"kills": 20, "acknowledged": len(acknowledged), "lost": len(lost)}
    print(figures)
    for name, value in figures.items():
        record_property(name, value)
    assert len(acknowledged) > 200 and not lost
    assert len(stored) - len(acknowledged) <= len(clients), "stored and never answered: the last kill only"
