"""The ranking page over HTTP: a real server process, real requests, and the same database read afterwards."""

import ctypes
import json
import re
import resource
import secrets
import socket
import sqlite3
import stat
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPConnection

import httpx
import pytest
import uvicorn

from recipes.labelling import server as page_server
from recipes.labelling.store import Store, standing_answers
from tests.labelling.labelling_server import HOSTILE, Client, add_labeler, cli, server, write_samples


def rows(database, query, *args):
    with sqlite3.connect(database) as db:
        return db.execute(query, args).fetchall()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A server that all tests share; each uses labelers of its own, and so has its own tasks and orders."""
    folder = tmp_path_factory.mktemp("labelling")
    samples = write_samples(folder / "samples.jsonl", prompts=6)
    with server(folder / "labels.db", "--samples", samples, "--overlap", "100") as running:
        running.database = folder / "labels.db"
        yield running


@pytest.fixture
def labeler(job, request):
    """Makes logged-in clients with names of this test."""
    names = iter("abcdef")
    return lambda: Client(job.url, add_labeler(job.database, f"{request.node.name} {next(names)}"))


# Who may come in


def test_only_a_known_token_opens_the_page_and_it_never_stands_in_a_url(job):
    token = add_labeler(job.database, "login")
    client = Client(job.url)
    assert client.http.get("/").headers["location"] == "/login"
    assert client.http.get("/", params={"token": token}).status_code == 303, "a token in the URL must not log in"
    wrong = client.http.post("/login", data={"token": "wrong"})
    assert wrong.status_code == 401 and "not known" in wrong.text and "set-cookie" not in wrong.headers

    login = client.http.post("/login", data={"token": token})
    cookie = login.headers["set-cookie"]
    assert login.status_code == 303 and login.headers["location"] == "/"
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and token not in cookie
    page = client.http.get("/")
    assert page.status_code == 200 and token not in page.text
    (session,) = client.http.cookies.values()
    on_disk = b"".join(file.read_bytes() for file in job.database.parent.glob("labels.db*"))
    assert token.encode() not in on_disk and session.encode() not in on_disk, "only hashes are stored"


def test_forged_stale_and_replaced_sessions_are_refused(job):
    token = add_labeler(job.database, "sessions")
    client = Client(job.url, token)
    name, value = next(iter(client.http.cookies.items()))
    assert client.http.get("/answers").status_code == 200

    forged = httpx.Client(base_url=job.url, cookies={name: value[:-1] + ("A" if value[-1] != "A" else "B")})
    assert forged.get("/answers").status_code == 303
    assert forged.post("/api/answer", json={}, headers={"Origin": job.url}).status_code == 401

    copied = httpx.Client(base_url=job.url, cookies={name: value})
    assert copied.get("/answers").status_code == 200
    client.http.post("/logout")
    assert copied.get("/answers").status_code == 303, "logging out must end the session on the server"

    client = Client(job.url, token)
    cli("add-labeler", "sessions", "--new_token", "--database", job.database)
    assert client.http.get("/answers").status_code == 303, "a new token must end old sessions"
    assert Client(job.url).http.post("/login", data={"token": token}).status_code == 401


def test_posts_from_other_sites_are_refused(job, labeler):
    client = labeler()
    task = client.task()
    body = client.body(task)
    foreign = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": job.url, "Sec-Fetch-Site": "cross-site"},
        {"Origin": job.url, "Sec-Fetch-Site": "same-site"},
    ]
    for headers in foreign:
        assert client.post(body, headers=headers).status_code == 403, headers
        assert client.http.post("/undo", data={"event": 1, "key": "k" * 20}, headers=headers).status_code == 403
    no_origin = httpx.Client(base_url=job.url, cookies=client.http.cookies)
    assert no_origin.post("/api/answer", json=body).status_code == 403
    form = client.http.post("/api/answer", content=json.dumps(body), headers={"Content-Type": "text/plain"})
    assert form.status_code == 422, "only JSON, which a form of another site cannot send"
    assert not rows(job.database, "SELECT 1 FROM event WHERE key = ?", body["key"])
    assert client.post(body).status_code == 200


def test_answers_of_others_are_out_of_reach(job, labeler):
    ann, bob = labeler(), labeler()
    task = ann.task()
    ann.answer(task)
    bob_task = bob.task()
    assert bob.http.get("/task/0123456789abcdef").status_code == 404
    event = rows(job.database, "SELECT max(id) FROM event")[0][0]
    taken = bob.http.post("/undo", data={"event": event, "key": secrets.token_hex(16)})
    assert taken.status_code == 409
    assert bob_task.standing == "" and set(bob_task.reasons.values()) == {""}, "bob saw ann's answer"


def test_headers_and_what_the_page_loads(job, labeler):
    page = labeler().http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["cache-control"] == "no-store"
    assert "uvicorn" not in str(page.headers).lower()
    links = re.findall(r'(?:src|href|action)="([^"]+)"', page.text)
    assert links and all(link.startswith("/") and not link.startswith("//") for link in links)
    assert "<style" not in page.text and "style=" not in page.text and not re.search(r"<script(?! src)", page.text)
    for path in ("/docs", "/openapi.json", "/static/../store.py", "/static/%2e%2e/store.py"):
        assert httpx.get(job.url + path).status_code == 404


def test_a_token_can_be_typed(job):
    token = add_labeler(job.database, "typist")
    assert re.fullmatch(r"([0-9a-hjkmnp-tv-z]{4}-){2}[0-9a-hjkmnp-tv-z]{4}", token)
    for typed in (token.upper(), token.replace("-", ""), f" {token.replace('-', ' ')}\n", token.replace("0", "O")):
        assert Client(job.url).http.post("/login", data={"token": typed}).status_code == 303, typed
    for typed in (token[:-1], "", "-", token[::-1]):
        assert Client(job.url).http.post("/login", data={"token": typed}).status_code in (401, 422), typed
    again = cli("add-labeler", "typist", "--new_token", "--database", job.database)
    assert re.search(r"'typist' \(shown only now\): \S{14}$", again)
    assert Client(job.url).http.post("/login", data={"token": token}).status_code == 401
    page = httpx.get(job.url + "/login").text
    assert f"add-labeler NAME --new_token --database {job.database}" in page


def test_what_is_said_about_tokens_and_the_next_step(tmp_path):
    samples = write_samples(tmp_path / "samples.jsonl", prompts=1)
    with server(tmp_path / "labels.db", "--samples", samples) as running:
        token = re.search(r"First labeler .* \(shown only now\): (\S+)", running.log)[1]
        client = Client(running.url, token)
        client.answer(client.task())
        done = client.http.get("/").text
        assert "All done" in done and f"--output {tmp_path / 'rankings.jsonl'}" in done
    with server(tmp_path / "labels.db") as running:
        assert token not in running.log
        assert f"add-labeler NAME --new_token --database {tmp_path / 'labels.db'}" in running.log


def test_guidelines_are_open_until_some_time_was_spent(labeler):
    client = labeler()
    task = client.task()
    assert '<details class="guidelines" open>' in task.source
    client.answer(task, "draft", active_seconds=1.0)
    assert '<details class="guidelines" >' in client.task().source


# What the labeler sees


def test_models_are_hidden_and_orders_are_fixed_per_labeler(job, labeler):
    clients = [labeler() for _ in range(3)]
    orders = [client.task().shown for client in clients]
    assert len({tuple(order) for order in orders}) == 3 and len({tuple(sorted(order)) for order in orders}) == 1
    for client, order in zip(clients, orders, strict=True):
        assert [client.task().shown for _ in range(3)] == [order] * 3
        for path in ("/", "/answers", "/login"):
            response = client.http.get(path)
            assert "model-nobody-may-see" not in response.text + str(response.headers)
        reply = client.post(client.body(client.task(), "draft"))
        assert set(reply.json()) == {"revision"}


def test_hostile_text_is_shown_as_text(tmp_path):
    row = {"prompt": "".join(HOSTILE), "responses": [{"text": text} for text in HOSTILE], "model": "m"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row))
    database = tmp_path / "labels.db"
    token = add_labeler(database, "ann")
    with server(database, "--samples", tmp_path / "samples.jsonl") as running:
        client = Client(running.url, token)
        task = client.task()
        assert sorted(task.texts.values()) == sorted(HOSTILE)
        assert task.prompt == "".join(HOSTILE)
        reasons = dict(zip(task.ids, HOSTILE, strict=True))
        client.answer(task, "draft", reviews={id: {"justification": text} for id, text in reasons.items()})
        task = client.task()
        assert task.reasons == reasons
        client.answer(
            task, comment="<script>x</script>", reviews={i: {"justification": r} for i, r in reasons.items()}
        )
        pages = [client.http.get(path).text for path in (f"/task/{task.prompt_id}", "/answers", "/")]
    for page in [task.source, *pages]:
        assert not re.search(r"<(script(?! src=\"/static/)|img|svg|h1>outside)", page)
    cli("agreement", "--database", database, "--format", "html", "--output", tmp_path / "report.html")
    cli("export", "--database", database, "--output", tmp_path / "rankings.jsonl")
    exported = json.loads((tmp_path / "rankings.jsonl").read_text())
    assert {r["text"]: r["justification"] for r in exported["responses"]} == {
        task.texts[id]: reason.strip() for id, reason in reasons.items()
    }


# Answers


def test_drafts_come_back_and_submitting_needs_reasons(labeler):
    client = labeler()
    task = client.task()
    a, b, c, d = task.ids
    tiers = [[c], [a, d], [b]]
    reviews = {a: {"justification": "why & how", "rating": 6, "flags": ["untruthful"]}}
    client.answer(task, "draft", tiers=tiers, reviews=reviews, comment="so far")
    restored = client.task()
    assert restored.tiers == tiers and restored.reasons[a] == "why & how" and restored.reasons[b] == ""
    assert 'value="6" selected' in restored.source and 'value="untruthful" checked' in restored.source
    refused = client.post(client.body(restored, tiers=tiers, reviews=reviews))
    assert refused.status_code == 422 and "no reason for the rank of 3 of 4" in refused.json()["error"]
    assert client.task().prompt_id == task.prompt_id, "still open"


def test_malformed_answers_are_refused_and_say_why(job, labeler):
    client = labeler()
    task = client.task()
    a, b, c, d = task.ids
    wrong = {
        "every response": [
            {"tiers": [[a], [b], [c]]},
            {"tiers": [[a], [b], [c], [d], [a]]},
            {"tiers": [[a, b, c, d], []]},
            {"tiers": [[a], [b], [c], ["other"]]},
            {"tiers": []},
        ],
        "than or equal to": [{"reviews": {a: {"justification": "x", "rating": value}}} for value in (0, 8)],
        "should be 'harmful', 'untruthful' or": [{"reviews": {a: {"justification": "x", "flags": ["rude"]}}}],
        "no response of this prompt": [{"reviews": {"other": {"justification": "x"}}}],
        "should be 'draft', 'submit', 'skip' or": [{"action": "edit"}],
        "what is wrong": [{"action": "flag"}],
        "rating": [{"reviews": {a: {"justification": "x", "rating": True}}}],
        "labeler_id: unexpected": [{"labeler_id": 1}],
        "at most 4000": [{"comment": "x" * 4001}],
        "key": [{"key": "short"}],
        "revision": [{"revision": None}],
        "active_seconds": [{"active_seconds": -1}],
    }
    for expected, bodies in wrong.items():
        for changes in bodies:
            response = client.post(client.body(task, **changes))
            assert response.status_code == 422, (changes, response.text)
            assert expected in response.json()["error"].lower(), (changes, response.text)
            assert response.json()["error"].startswith("NOT saved")
    assert client.post(client.body(task, comment="x" * 2_000_000)).status_code == 413
    assert client.post(client.body(task, prompt_id="unknown")).status_code == 404
    assert not rows(job.database, "SELECT 1 FROM event WHERE prompt_id = ? AND tiers LIKE '%other%'", task.prompt_id)
    assert client.task().revision == 0


HUGE = 2**70


def test_numbers_and_texts_that_no_page_sends(job, labeler):
    """Each is refused, or stored as far as it makes sense; none is an internal error, and each says what is wrong."""
    client = labeler()
    task = client.task()
    a = task.ids[0]
    lone_surrogate = r"\ud800"
    bodies = [
        {"revision": HUGE},
        {"revision": -HUGE},
        {"active_seconds": float("nan")},
        {"active_seconds": float("inf")},
        {"client_time": float("inf")},
        {"reviews": {a: {"justification": "x", "rating": HUGE}}},
        {"prompt_id": "x" * 100_000},
        {"key": "k" * 65},
    ]
    texts = [json.dumps(client.body(task, "draft", **changes)) for changes in bodies]
    for field in ("comment", "key", "prompt_id", "action"):
        body = client.body(task, **{"action": "draft"} | {field: "no half" + "HERE" * 5})
        texts.append(json.dumps(body).replace("HERE", lone_surrogate))
    texts += ["[" * 200_000, "{", "", "null", '"text"', "1" * 5000]
    for text in texts:
        reply = client.http.post("/api/answer", content=text, headers={"Content-Type": "application/json"})
        assert reply.status_code in (400, 404, 422), (text[:200], reply.text)
        assert reply.json()["error"].startswith("NOT saved: "), (text[:200], reply.text)
    assert not rows(
        job.database, "SELECT 1 FROM event WHERE prompt_id = ? AND comment LIKE 'no half%'", task.prompt_id
    )
    client.answer(task, "draft", active_seconds=float(HUGE))
    for event in (HUGE, -1, 2**63, "x", ""):
        assert client.http.post("/undo", data={"event": event, "key": "k" * 20}).status_code == 422
        assert client.http.get("/answers", params={"before": event}).status_code == 422
    assert client.http.post("/undo", data={"event": 2**63 - 1, "key": "k" * 20}).status_code == 409
    assert client.http.post("/login", data={"token": "\ud800".encode("utf-8", "surrogatepass")}).status_code < 500
    assert client.http.post("/login", data={"token": "t" * 900_000}).status_code == 401
    nowhere = client.http.get("/nowhere")
    assert nowhere.status_code == 404 and "That did not work" in nowhere.text


def test_repeated_marks_and_reasons_that_nobody_can_see(job, labeler):
    client = labeler()
    task = client.task()
    a, *others = task.ids
    twice = {a: {"justification": "x", "flags": ["harmful", "untruthful", "harmful"]}}
    event = client.answer(task, "draft", reviews=twice)
    stored = rows(job.database, "SELECT flags FROM review WHERE event_id = ?", event)
    assert stored == [('["harmful", "untruthful"]',)]
    task = client.task()
    for unseen in (
        "\u200b",
        " \u00a0\u2003",
        "\u2060\ufeff\u00ad",
        "\u3164",
        "\u2800",
        "\u0301",
        "\u202e\u2066",
        "\x00",
    ):
        reviews = {id: {"justification": "seen"} for id in others} | {a: {"justification": unseen}}
        refused = client.post(client.body(task, reviews=reviews))
        assert refused.status_code == 422 and "rank of 1 of 4" in refused.json()["error"], repr(unseen)
        flagged = client.post(client.body(task, "flag", comment=unseen))
        assert flagged.status_code == 422 and "what is wrong" in flagged.json()["error"], repr(unseen)
    for seen in ("!", "好", "👍\ufe0f", "e\u0301", "لا"):
        task = client.task(f"/task/{task.prompt_id}")
        client.answer(task, reviews={id: {"justification": seen} for id in task.ids})


def test_submit_edit_undo_skip_flag(job, labeler):
    client = labeler()
    first = client.task()
    client.answer(first, tiers=[[id] for id in reversed(first.ids)])
    second = client.task()
    assert second.prompt_id != first.prompt_id

    path = f"/task/{first.prompt_id}"
    before = client.task(path)
    assert before.standing == "submit" and before.ids == first.ids[::-1]
    client.answer(before, tiers=[first.ids])
    assert client.task(path).tiers == [first.ids] and client.task(path).standing == "edit"
    assert client.undo() == path
    assert client.task(path).ids == first.ids[::-1] and client.task(path).standing == "submit", "the edit is gone"
    client.undo()
    reopened = client.task("/")
    assert reopened.prompt_id == first.prompt_id and reopened.standing == ""
    assert reopened.ids == first.ids[::-1] and reopened.reasons[first.ids[0]] == f"reason {first.ids[0]}"

    client.answer(reopened, "skip")
    assert client.task().prompt_id == second.prompt_id
    flagged = client.post(client.body(second, "flag", comment="holds a phone number"))
    assert flagged.status_code == 200
    answers = client.http.get("/answers").text
    assert answers.count("<li>") == 2 and "skipped" in answers and "flagged" in answers
    third = client.task()
    assert third.prompt_id not in (first.prompt_id, second.prompt_id)
    assert client.undo() == f"/task/{second.prompt_id}"
    client.answer(client.task(path))
    assert client.task(path).standing == "submit", "a skipped task can be ranked after all"
    mine = "labeler_id = (SELECT labeler_id FROM event WHERE id = ?)"
    of_first = f"SELECT kind FROM event WHERE prompt_id = ? AND {mine} ORDER BY id"
    kinds = rows(job.database, of_first, first.prompt_id, flagged.json()["revision"])
    assert [kind for (kind,) in kinds] == ["submit", "edit", "undo", "undo", "skip", "submit"]


def test_the_same_key_is_stored_once(job, labeler):
    client = labeler()
    task = client.task()
    body = client.body(task)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: client.post(body), range(8)))
    assert [reply.status_code for reply in replies] == [200] * 8
    assert len({reply.json()["revision"] for reply in replies}) == 1
    assert len(rows(job.database, "SELECT 1 FROM event WHERE key = ?", body["key"])) == 1
    other = client.post(client.body(task, tiers=[task.ids], key=body["key"]))
    assert other.status_code == 409 and "key" in other.json()["error"]
    stolen = labeler()
    stolen.task()
    assert stolen.post(body).status_code == 409, "a key of somebody else gives nothing away"


def test_two_tabs_cannot_overwrite_each_other(labeler):
    client = labeler()
    tab_one, tab_two = client.task(), client.task()
    with ThreadPoolExecutor(8) as pool:
        bodies = [client.body(tab_one, tiers=[tab_one.ids]) for _ in range(8)]
        codes = sorted(reply.status_code for reply in pool.map(client.post, bodies))
    assert codes == [200] + [409] * 7
    late = client.post(client.body(tab_two, "draft"))
    assert late.status_code == 409 and "another tab" in late.json()["error"]
    assert client.task(f"/task/{tab_one.prompt_id}").tiers == [tab_one.ids]


def test_many_who_come_at_once_get_a_task_each_and_no_prompt_twice_too_often(tmp_path):
    """Twelve labelers, six prompts, two people each: all twelve places are given, none of them twice."""
    database = tmp_path / "labels.db"
    tokens = [add_labeler(database, f"labeler {number}") for number in range(12)]
    samples = write_samples(tmp_path / "samples.jsonl", prompts=6)
    with server(database, "--samples", samples, "--overlap", "2", "--gold_every", "0") as running:
        clients = [Client(running.url, token) for token in tokens]
        with ThreadPoolExecutor(24) as pool:  # every labeler in two tabs
            tasks = list(pool.map(lambda client: client.task().prompt_id, clients * 2))
    assert tasks[:12] == tasks[12:], "both tabs show the same task"
    assert sorted(Counter(tasks[:12]).values()) == [2] * 6


def test_progress_and_time_are_summed_by_the_server(job, labeler):
    client = labeler()
    task = client.task()
    assert "0 ranked, 6 left" in task.source
    client.answer(task, "draft", active_seconds=0.0)
    reopened = client.task()
    client.answer(reopened, active_seconds=10_000.0)
    mine = "labeler_id = (SELECT max(id) FROM labeler)"
    of_task = f"SELECT sum(active_seconds) FROM event WHERE prompt_id = ? AND {mine}"
    ((seconds,),) = rows(job.database, of_task, task.prompt_id)
    assert 0 < seconds < 60, "a page cannot claim more time than has passed"
    assert "1 ranked, 5 left" in client.task().source


# What must survive


def test_no_acknowledged_answer_is_lost_when_the_server_is_killed(tmp_path):
    """Five labelers write drafts as fast as they can; the server dies of SIGKILL; unanswered requests are repeated."""
    database = tmp_path / "labels.db"
    samples = write_samples(tmp_path / "samples.jsonl", prompts=2)
    tokens = [add_labeler(database, f"labeler {n}") for n in range(4)]
    acknowledged, unanswered = {}, {}

    def write(client):
        task = client.task()
        for number in range(10_000):
            body = client.body(task, "draft", comment=f"draft {number}")
            try:
                reply = client.post(body)
            except httpx.TransportError:
                unanswered[client] = body
                return
            task.revision = acknowledged[body["key"]] = reply.json()["revision"]

    with server(database, "--samples", samples, "--overlap", "4") as running:
        clients = [Client(running.url, token) for token in tokens]
        with ThreadPoolExecutor(len(clients)) as pool:
            futures = [pool.submit(write, client) for client in clients]
            while len(acknowledged) < 60:
                assert not any(future.done() for future in futures)
            running.kill()
            for future in futures:
                future.result()
    stored = dict(rows(database, "SELECT key, id FROM event"))
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]
    assert len(acknowledged) >= 60 and acknowledged.items() <= stored.items()

    with server(database, "--overlap", "4") as running:
        for client, body in unanswered.items():
            client.move(running.url)
            reply = client.post(body)
            assert reply.status_code == 200, "the session and the repeated request outlive the server"
            assert len(rows(database, "SELECT 1 FROM event WHERE key = ?", body["key"])) == 1
            assert body["answer"]["comment"] in client.task().source


def _without_root_override():
    """Root writes to read-only files all the same, unless a child gives that capability up."""
    cap_dac_override, pr_capbset_drop = 1, 24
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="drops a Linux capability")
def test_a_read_only_database_says_not_saved_and_recovers(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    database = folder / "labels.db"
    token = add_labeler(database, "ann")
    samples = write_samples(tmp_path / "samples.jsonl")
    with server(database, "--samples", samples, preexec_fn=_without_root_override) as running:
        client = Client(running.url, token)
        task = client.task()
        body = client.body(task)
        files = list(folder.iterdir())
        for file in files:
            file.chmod(stat.S_IRUSR)
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        try:
            refused = client.post(body)
        finally:
            folder.chmod(stat.S_IRWXU)
            for file in files:
                file.chmod(stat.S_IRUSR | stat.S_IWUSR)
        assert refused.status_code == 503
        assert refused.json()["error"].startswith("NOT saved: the server cannot use its database")
        assert not rows(database, "SELECT 1 FROM event")
        assert client.post(body).status_code == 200


def test_a_full_disk_says_not_saved_and_keeps_what_was_stored(tmp_path):
    database = tmp_path / "labels.db"
    token = add_labeler(database, "ann")
    samples = write_samples(tmp_path / "samples.jsonl")
    limit = 600_000  # bytes in one file: the write-ahead log gets there first

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    stored = []
    with server(database, "--samples", samples, preexec_fn=small_disk) as running:
        client = Client(running.url, token)
        task = client.task()
        for number in range(300):
            body = client.body(task, "draft", comment=f"{number} " + "x" * 3900)
            reply = client.post(body)
            if reply.status_code != 200:
                break
            task.revision = reply.json()["revision"]
            stored.append(body["key"])
        assert reply.status_code == 503 and reply.json()["error"].startswith("NOT saved")
        assert client.post(body).status_code == 503
    assert len(stored) > 10
    assert [key for (key,) in rows(database, "SELECT key FROM event ORDER BY id")] == stored
    with server(database) as running:
        client = Client(running.url, token)
        assert client.post(body).status_code == 200
        assert client.task().revision == task.revision + 1


def test_connections_that_never_finish_a_request_keep_nobody_out(tmp_path):
    """More of them than the server has file handles: half a request, half an answer, or nothing at all."""
    database = tmp_path / "labels.db"
    token = add_labeler(database, "ann")
    samples = write_samples(tmp_path / "samples.jsonl")

    def few_handles():
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    with server(database, "--samples", samples, preexec_fn=few_handles) as running:
        address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
        starts = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"POST /api/answer HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"]
        with ExitStack() as stack:
            for number in range(200):
                connection = stack.enter_context(socket.create_connection(address, timeout=30))
                with suppress(OSError):
                    connection.sendall(starts[number % 3])
            for _ in range(3):
                client = Client(running.url, token)
                client.answer(client.task())


def test_a_connection_without_an_answer_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(page_server, "ANSWER_SECONDS", 2)
    store = Store(tmp_path / "labels.db", create=True)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(page_server.create_app(store), http=page_server.Connection, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        slow = socket.create_connection(listener.getsockname(), timeout=30)
        used = HTTPConnection(*listener.getsockname(), timeout=30)
        slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        start = time.monotonic()
        for _ in range(100):
            used.request("GET", "/static/icon.svg")
            assert used.getresponse().read(), "one that is in use stays open"
            try:
                slow.sendall(b"y")
            except OSError:
                break
            time.sleep(0.1)
        assert 1.5 < time.monotonic() - start < 10
    finally:
        running.should_exit = True
        thread.join(timeout=10)


def test_export_equals_what_was_submitted_by_several_labelers(tmp_path):
    database = tmp_path / "labels.db"
    tokens = {name: add_labeler(database, name) for name in ("ann", "bob", "cyd")}
    samples = write_samples(tmp_path / "samples.jsonl", prompts=5, responses=3)
    submitted = {}
    with server(database, "--samples", samples, "--overlap", "2") as running:
        clients = {name: Client(running.url, token) for name, token in tokens.items()}
        for turn in range(6):
            for name, client in clients.items():
                task = client.task()
                if task.done:
                    continue
                a, b, c = task.ids
                tiers = [[b], [a, c]] if turn % 2 else [[c], [b], [a]]
                reviews = {id: {"justification": f"{name}: {task.texts[id]}", "rating": 1 + turn} for id in task.ids}
                client.answer(task, tiers=tiers, reviews=reviews)
                submitted[task.prompt, name] = [sorted(task.texts[id] for id in tier) for tier in tiers]
        assert all(client.task().done for client in clients.values())
    labelers_of = {}
    for prompt, name in submitted:
        labelers_of.setdefault(prompt, set()).add(name)
    assert len(labelers_of) == 5 and all(len(names) == 2 for names in labelers_of.values()), "--overlap 2"

    output = tmp_path / "rankings.jsonl"
    printed = cli("export", "--database", database, "--output", output)
    exported = [json.loads(line) for line in output.read_text().splitlines()]
    assert f"{len(submitted)} rankings of 5 prompts by 3 labelers" in printed
    assert {(row["prompt"][0]["content"], row["annotator"]) for row in exported} == set(submitted)
    for row in exported:
        ranks = {}
        for response in row["responses"]:
            ranks.setdefault(response["rank"], []).append(response["text"])
            assert response["justification"] == f"{row['annotator']}: {response['text']}"
            assert response["model"] == "model-nobody-may-see" and 1 <= response["rating"] <= 7
        tiers = [sorted(ranks[rank]) for rank in sorted(ranks)]
        assert tiers == submitted[row["prompt"][0]["content"], row["annotator"]]
    with Store(database).transaction() as db:
        assert len(standing_answers(db, "submit", "edit")) == len(exported)

    again = cli("export", "--database", database, "--output", output, check=False)
    assert again.returncode == 1 and "exists already" in again.stderr and len(again.stderr.splitlines()) == 1


def test_a_port_in_use_is_one_clear_line(job, tmp_path):
    taken = job.url.rsplit(":", 1)[1]
    for port, reason in ((taken, "in use"), ("70000", "0-65535")):
        refused = cli("serve", "--database", job.database, "--port", port, check=False)
        assert refused.returncode == 1 and reason in refused.stderr and "choose another --port" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
