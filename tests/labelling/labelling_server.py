"""A real ranking server in a process of its own, and clients that speak to it as the page does."""

import html
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx

from recipes.labelling import accounts
from recipes.labelling.database import Database

SCRIPT = Path(__file__).parents[2] / "scripts" / "rank_responses.py"


HOSTILE = [
    "<script>document.title = 'ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    "</div></li></ol><h1>outside</h1>",
    '"><svg onload=alert(1)>',
    "${document.title = 'ran'} {{ 7 * 7 }} {% raw %} #{7*7}",
    "[click](javascript:alert(1)) ![x](http://tracker.example/x.png)",
    "&lt;b&gt; &amp;amp; \u202eoverridden\u202c \x07 bell",
    "</textarea><script>document.title = 'ran'</script>",
]


def write_samples(path, prompts=4, responses=4, model="model-nobody-may-see"):
    rows = [
        {
            "id": f"p{p}",
            "prompt": [{"role": "user", "content": f"Question {p}?"}],
            "responses": [{"id": f"{model}-{r}", "text": f"Answer {r} to question {p}."} for r in range(responses)],
            "model": model,
            "sampling": {"temperature": 1.0},
        }
        for p in range(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cli(*args, check=True, **kwargs):
    """Runs the command line; returns what it printed, or (with `check=False`) the finished process."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=60, input="", **kwargs
    )
    if not check:
        return process
    assert process.returncode == 0, process.stderr
    return process.stdout


def add_labeler(path, name):
    database = Database(path, create=True)
    try:
        return accounts.add_labeler(database, name)
    finally:
        database.close()


@contextmanager
def server(database, *args, preexec_fn=None):
    """Yields an object with `url`, `process` and `log` (what it printed until it was ready)."""
    command = [sys.executable, str(SCRIPT), "serve", "--database", str(database), "--port", "0", *map(str, args)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=preexec_fn
    )
    try:
        log = ""
        for line in process.stdout:
            log += line
            if found := re.search(r"Ranking page: (http://\S+)/", line):
                break
        else:
            raise AssertionError(f"the server did not start: {log}")
        yield Running(found[1], process, log)
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stdout.close()


class Running:
    def __init__(self, url, process, log):
        self.url, self.process, self.log = url, process, log

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)


class Client:
    """One labeler's browser, without the JavaScript."""

    def __init__(self, url, token=None):
        self.http = httpx.Client(base_url=url, headers={"Origin": url}, timeout=30)
        if token:
            response = self.http.post("/login", data={"token": token})
            assert response.status_code == 303, response.text

    def move(self, url):
        """To a server that was started anew: the session stays."""
        self.http = httpx.Client(base_url=url, headers={"Origin": url}, cookies=self.http.cookies, timeout=30)

    def task(self, path="/"):
        page = self.http.get(path)
        assert page.status_code == 200, page.text
        return TaskPage(page.text)

    def body(self, task, action="submit", **changes):
        answer = {
            "tiers": [[id] for id in task.ids],
            "reviews": {id: {"justification": f"reason {id}"} for id in task.ids},
            "comment": "",
        }
        return {
            "prompt_id": task.prompt_id,
            "action": action,
            "answer": {name: changes.pop(name, value) for name, value in answer.items()},
            "key": secrets.token_hex(16),
            "revision": task.revision,
            "active_seconds": 0.0,
        } | changes

    def post(self, body, **kwargs):
        return self.http.post("/api/answer", json=body, **kwargs)

    def answer(self, task, action="submit", **changes):
        response = self.post(self.body(task, action, **changes))
        assert response.status_code == 200, response.text
        return response.json()["revision"]

    def undo(self):
        page = self.http.get("/").text
        event, key = (re.search(rf'name="{name}" value="([^"]+)"', page)[1] for name in ("event", "key"))
        response = self.http.post("/undo", data={"event": event, "key": key})
        assert response.status_code == 303, response.text
        return response.headers["location"]


class TaskPage:
    """What stands on the ranking page; `ids` in the order of the cards."""

    def __init__(self, source):
        self.source = source
        self.done = "All done" in source
        if self.done:
            return
        self.prompt_id = re.search(r'data-prompt="(\w+)"', source)[1]
        self.revision = int(re.search(r'data-revision="(\d+)"', source)[1])
        self.standing = re.search(r'data-standing="(\w*)"', source)[1]
        self.shown = re.search(r'data-shown="([^"]*)"', source)[1].split()
        self.cards = re.findall(r'<li class="card" data-id="(\w+)" data-letter="(\w)" (data-tied)?', source)
        self.ids = [id for id, _, _ in self.cards]
        self.tiers = []
        for id, _, tied in self.cards:
            if tied:
                self.tiers[-1].append(id)
            else:
                self.tiers.append([id])
        texts = re.findall(r'<div class="text" id="text-(\w+)" dir="auto">(.*?)</div>', source, re.S)
        self.texts = {id: html.unescape(text) for id, text in texts}
        reasons = re.findall(r'<textarea name="justification".*?>\n(.*?)</textarea>', source, re.S)
        self.reasons = dict(zip(self.ids, map(html.unescape, reasons), strict=True))
        self.prompt = html.unescape(re.search(r'<div class="message">.*?dir="auto">(.*?)</div>', source, re.S)[1])
