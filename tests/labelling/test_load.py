"""Many labelers at once, and large jobs. Only ever against a server on this machine, and for some seconds."""

import random
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.labelling.labelling_server import Client, add_labeler, server, write_samples


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


def run(tmp_path, labelers, seconds, think, record_property):
    database = tmp_path / "labels.db"
    samples = write_samples(tmp_path / "samples.jsonl", prompts=1000)
    tokens = {name: add_labeler(database, name) for name in (f"labeler {number}" for number in range(labelers))}
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
    assert figures["p99"] < 0.5, figures


@pytest.mark.slow
def test_fifty_labelers_who_do_not_think(tmp_path, record_property):
    figures = run(tmp_path, labelers=50, seconds=20, think=0, record_property=record_property)
    assert figures["p99"] < 2, figures
