"""Hub names go through the real `datasets` and huggingface_hub, to a server here that speaks for the Hub."""

import gzip
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import pytest

from tests.conftest import run_command

CARD = b"""---
configs:
- config_name: chat
  default: true
  data_files:
  - {split: train, path: chat/*.jsonl.gz}
  - {split: test, path: chat/held.jsonl}
- {config_name: broken, data_files: broken.jsonl}
---
"""
REVISION = "a" * 40


def rows(*numbers: int) -> bytes:
    talks = ([{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "2026-11-22"}] for n in numbers)
    return "".join(json.dumps({"messages": talk}) + "\n" for talk in talks).encode()


REPOSITORIES = {
    "owner/data": {
        "README.md": CARD,
        "chat/a.jsonl.gz": gzip.compress(rows(0, 1, 2)),
        "chat/held.jsonl": rows(9),
        "broken.jsonl": b'{"messages": [',
    },
    "owner/script": {"README.md": b"", "script.py": b"raise SystemExit('the script ran')"},
    "owner/empty": {"README.md": b""},
}


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that reads a public dataset."""

    def do_GET(self):
        api, *parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        parts = parts[1:] if api == "api" else parts
        files, action, path = REPOSITORIES.get("/".join(parts[:2])), parts[2:3], "/".join(parts[4:])
        if files is None:
            return self.answer({}, 404, "RepoNotFound")
        if action == ["resolve"]:
            return self.answer(files[path]) if path in files else self.answer({}, 404, "EntryNotFound")
        if action == ["tree"]:
            return self.answer([entry(files, name) for name in names(files) if name.startswith(path)])
        if action == ["paths-info"]:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
            return self.answer([entry(files, name) for name in paths if name in names(files)])
        return self.answer({"id": "/".join(parts[:2]), "sha": REVISION, "siblings": [{"rfilename": f} for f in files]})

    do_HEAD = do_POST = do_GET

    def answer(self, content, code=200, error=""):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        tag = hashlib.sha1(body).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": REVISION, "X-Error-Code": error, "Content-Length": len(body)}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def names(files: dict) -> list[str]:
    return [*files, *{name.split("/")[0] for name in files if "/" in name}]


def entry(files: dict, name: str) -> dict:
    kind = "file" if name in files else "directory"
    return {
        "type": kind,
        "path": name,
        "size": len(files.get(name, b"")),
        "oid": hashlib.sha1(name.encode()).hexdigest(),
    }


READ = """
import json
from recipes.formatting import DataError, format_dataset, list_splits, load_rows

def told(what):
    try:
        return what()
    except DataError as error:
        return str(error)

def rows(*source, **options):
    return told(lambda: [(row.file, row.line, row.data["messages"]) for row in load_rows(*source, **options)])

print(json.dumps({
    "splits": list_splits("owner/data"),
    "train": rows("owner/data"),
    "streamed": rows("owner/data", streaming=True),
    "slice": rows("owner/data", split="train[1:2]"),
    "test": rows("owner/data", split="test"),
    "formatted": list(format_dataset(load_rows("owner/data"), "sft", num_proc=2)[0]["messages"]),
    "errors": [rows("owner/data", split="dev"), rows("owner/data", name="none"), rows("owner/data", name="broken"),
               rows("owner/script"), rows("owner/empty"), rows("owner/nothing")],
}))
"""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_hub_datasets(hub, tmp_path):
    env = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    output = run_command([sys.executable, "-c", READ], timeout=240, env=env).stdout
    found = json.loads(next(line for line in output.splitlines() if line.startswith('{"splits"')))
    talks = [json.loads(line)["messages"] for line in rows(0, 1, 2, 9).splitlines()]
    assert found["splits"] == ["train", "test"]
    assert found["train"] == found["streamed"] == [["owner/data", n + 1, talks[n]] for n in range(3)]
    assert found["slice"] == [["owner/data", 2, talks[1]]] and found["test"] == [["owner/data", 1, talks[3]]]
    assert found["formatted"] == talks[:3]
    expected = [
        """could not load owner/data: ValueError: Unknown split "dev". Should be one of ['train', 'test']""",
        "could not load owner/data: ValueError: BuilderConfig 'none' not found. Available: ['chat', 'broken']",
        "could not load owner/data: ",
        "could not load owner/script: RuntimeError: Dataset scripts are no longer supported, but found script.py",
        "could not load owner/empty: EmptyDatasetError: ",
        "no file or folder 'owner/nothing' is here, and could not load owner/nothing: DatasetNotF",
    ]
    for message, part in zip(found["errors"], expected, strict=True):
        assert part in message and "\n" not in message and "An error occurred while generating" not in message
