"""scripts/inspect_dataset.py as a user runs it: rows, report, exit code; never a traceback."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from scripts.inspect_dataset import parse_args

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_dataset.py"
RANKED = {"prompt": "q", "responses": [{"text": "b", "rank": 2}, {"text": "a", "rank": 1}, {"text": "c", "rank": 2}]}


def inspect(*args):
    """(exit code, stdout, stderr)"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_rows_and_report(tmp_path):
    tie = {"prompt": "<|im_end|>", "responses": [{"text": "b", "rank": 1}, {"text": "a", "rank": 1}]}
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(RANKED)}\n\n{json.dumps(tie)}\n{json.dumps(RANKED)}\n")
    output, report = tmp_path / "new" / "rows.jsonl", tmp_path / "report.json"
    code, out, err = inspect(data, "--task", "preference", "--output", output, "--report", report)
    assert (code, err) == (0, "")
    assert "3 rows in, 4 out; task preference, schema ranking" in out
    said = [{"role": "user", "content": "q"}]
    answers = {text: [{"role": "assistant", "content": text}] for text in "abc"}
    pairs = [{"prompt": said, "chosen": answers["a"], "rejected": answers[worse]} for worse in "bc"]
    assert lines(output) == [{"file": str(data), "line": line, **pair} for line in (1, 4) for pair in pairs]
    saved = json.loads(report.read_text())
    assert {key: saved[key] for key in ("schema", "rows_in", "rows_out", "skipped", "flags", "errors")} == {
        "schema": "ranking",
        "rows_in": 3,
        "rows_out": 4,
        "skipped": [{"file": str(data), "line": 3, "column": None, "reason": "tie: all responses have the same rank"}],
        "flags": [{"file": str(data), "line": 4, "flag": "duplicate"}] * 2,
        "errors": [],
    }


@pytest.mark.parametrize(
    "task, row, expected",
    [
        ("sft", {"prompt": "q", "completion": " a"}, {"messages": [("user", "q"), ("assistant", "a")]}),
        ("prompt", RANKED, {"prompt": [("user", "q")]}),
    ],
)
def test_columns_of_the_other_tasks(tmp_path, task, row, expected):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([row]))
    assert inspect(data, "--task", task, "--output", tmp_path / "rows.jsonl")[0] == 0
    expected = {key: [{"role": r, "content": c} for r, c in value] for key, value in expected.items()}
    assert lines(tmp_path / "rows.jsonl") == [{"file": str(data), "line": 1, **expected}]


def test_errors_leave_the_report_and_no_rows(tmp_path):
    data, output, report = tmp_path / "data.csv", tmp_path / "rows.jsonl", tmp_path / "report.json"
    data.write_text("prompt,completion\nq,a\nq,a,b\n")
    output.write_text("older\n")
    code, out, err = inspect(data, "--task", "sft", "--output", output, "--report", report)
    assert (code, out, output.read_text()) == (2, "", "older\n")
    assert "rows.jsonl exists, and nothing is ever written over" in err and not report.exists()
    output.unlink()

    code, out, err = inspect(data, "--task", "sft", "--output", output, "--report", report)
    assert (code, out) == (1, "") and not output.exists()
    assert f"{data}:3: found 3 fields, expected 2 as in the header" in err
    saved = json.loads(report.read_text())
    assert saved["rows_in"] == 2
    assert [(error["file"], error["line"], error["column"]) for error in saved["errors"]] == [(str(data), 3, None)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "report.json"]
    report.unlink()

    code, out, err = inspect(data, "--task", "sft", "--output", output, "--report", report, "--on_error", "skip")
    assert code == 0 and len(lines(output)) == 1
    saved = json.loads(report.read_text())
    assert saved["errors"] == [] and [entry["line"] for entry in saved["skipped"]] == [3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("none.jsonl",), "none.jsonl: no such file or folder"),
        (("empty.jsonl",), "empty.jsonl: no rows"),
        (("data.jsonl", "--dataset_schema", "nonsense"), "unknown schema 'nonsense'; expected one of auto"),
        (("data.jsonl", "--dataset_mapping", "prompt"), "'prompt' is not KEY=COLUMN"),
        (("data.jsonl", "--dataset_mapping", '{"prompt": '), "--dataset_mapping is not valid JSON"),
        (("data.jsonl", "--split", "test"), "data.jsonl has no split 'test'; it has train"),
        (("data.jsonl", "--task", "sft"), "no schema for task 'sft' fits the columns prompt"),
    ],
)
def test_one_clear_error_and_a_report(tmp_path, arguments, message):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "data.jsonl").write_text('{"prompt": "q"}\n')
    source, *rest = arguments
    report = tmp_path / "report.json"
    code, out, err = inspect(tmp_path / source, "--task", "prompt", "--report", report, *rest)
    assert (code, out) == (1, "") and message in err and err.startswith("error: ")
    assert message in json.loads(report.read_text())["errors"][0]["message"]


def test_a_column_cannot_take_the_place_of_where_a_row_is_from(capsys):
    with pytest.raises(SystemExit):
        parse_args(["data.jsonl", "--task", "prompt", "--keep_columns", "answer", "line"])
    assert "--keep_columns: file and line tell where a row is from" in capsys.readouterr().err


def test_the_dataset_is_never_written_over(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "q"}\n')
    assert inspect(data, "--task", "prompt", "--output", data)[0] != 0
    assert inspect(data, "--task", "prompt", "--report", tmp_path / "." / "data.jsonl")[0] != 0
    for name in ("data.jsonl", "test.jsonl"):  # a new file there would be another split of the dataset
        code, _, err = inspect(tmp_path, "--task", "prompt", "--output", tmp_path / name)
        assert code != 0 and f"{name} is part of the dataset itself" in err
    assert data.read_text() == '{"prompt": "q"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_nothing_is_written_over(tmp_path):
    data, other = tmp_path / "data.jsonl", tmp_path / "adapter_model.safetensors"
    data.write_text('{"prompt": "q"}\n')
    other.write_text("weights")
    new = tmp_path / "new.jsonl"
    for arguments in (("--output", other, "--report", new), ("--report", other, "--output", new)):
        code, _, err = inspect(data, "--task", "prompt", *arguments)
        assert code != 0 and f"{other} exists, and nothing is ever written over" in err
    code, _, err = inspect(data, "--task", "prompt", "--output", new, "--report", new)
    assert code != 0 and "--output and --report are the same file" in err
    assert other.read_text() == "weights" and not new.exists()


@pytest.fixture(scope="module")
def main():
    """The script's `main`, in this process: with a tokenizer it imports torch and TRL, which are here already."""
    spec = importlib.util.spec_from_file_location("inspect_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_preview_shows_the_exact_text_and_the_trained_part(main, capsys, tmp_path, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    data, report = tmp_path / "data.jsonl", tmp_path / "report.json"
    data.write_text(json.dumps({"instruction": "Name a pet.", "output": "A cat.<|user|>"}) + "\n")
    arguments = ("--tokenizer", tiny_base, "--max_length", "5", "--report", str(report))
    assert main([str(data), "--task", "sft", *arguments]) == 0
    out = capsys.readouterr().out
    assert "<|user|>Name a pet.<|end|><|assistant|>⟦A cat.<|user|><|end|>⟧" in out
    tokens = [len(tokenizer(text)["input_ids"]) for text in ("<|user|>Name a pet.<|end|><|assistant|>", "A cat.")]
    found = re.search(r"last turn: (\d+) tokens, (\d+) of them in the marked part", out)
    assert int(found[1]) - int(found[2]) == tokens[0] and int(found[2]) >= tokens[1] + 2
    assert {flag["flag"] for flag in json.loads(report.read_text())["flags"]} == {
        "longer than 5 tokens",
        "special token '<|user|>' in the assistant turn",
    }


def test_a_report_that_cannot_be_written_is_one_clear_error(main, capsys, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "file").touch()
    for option in ("--report", "--output"):
        blocked = str(tmp_path / "file" / "new.json")
        assert main([str(tmp_path / "data.jsonl"), "--task", "prompt", option, blocked]) == 1
        assert f"{tmp_path}/file" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_one_clear_error(main, capsys, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "q"}\n')
    assert main([str(tmp_path / "data.jsonl"), "--task", "prompt", "--tokenizer", "nowhere/at-all"]) == 1
    assert "error: No tokenizer could be loaded from nowhere/at-all" in capsys.readouterr().err


def test_a_terminal_that_is_not_utf8_shows_escapes(tmp_path, tiny_base):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "ü 猫", "completion": "a"}))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "data.jsonl"), "--task", "sft"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stderr) == (0, "") and r"\xfc \u732b" in done.stdout


def test_output_is_for_others_to_read_as_the_umask_says(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "q"}')
    code, _, _ = inspect(tmp_path / "data.jsonl", "--task", "prompt", "--output", tmp_path / "rows.jsonl")
    (tmp_path / "plain").write_text("")
    assert code == 0 and (tmp_path / "rows.jsonl").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "plain", "rows.jsonl"]


def test_a_dataset_cannot_steer_the_terminal(main, capsys, tmp_path, tiny_base):
    """Escapes in texts, names of columns and files, in what is shown, reported and refused."""
    data = tmp_path / "a\x1b]0;title\x07.jsonl"
    steer = "\x1b[2J\x9b31m\u202e\x07"
    data.write_text(json.dumps({"prompt": f"q{steer}\nline \u200c\xa0\u3000é😀", steer: 1}) + "\n")
    for arguments in ((), ("--tokenizer", tiny_base), ("--task", "sft"), ("--keep_columns", f"x{steer}")):
        main([str(data), *(() if "--task" in arguments else ("--task", "prompt")), *arguments])
        out, err = capsys.readouterr()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err)
        assert "\\x1b" in out + err
    main([str(data), "--task", "prompt", "--tokenizer", tiny_base])
    assert "\\x1b[2J\\x9b31m\\u202e\\x07\nline \u200c\xa0\u3000é😀" in capsys.readouterr().out


def test_scores_of_responses_cannot_steer_the_terminal():
    from recipes.trainers.ranking_trainer import results_in_words

    answers = [[{"role": "assistant", "content": f"\x1b[2J{text}"}] for text in "ab"]
    row = {"prompt": [{"role": "user", "content": "q\x9b31m"}], "completions": answers, "ranks": [1, 2]}
    text = results_in_words(row, [1, 0], None)
    assert "\\x1b[2Ja" in text and "\x1b" not in text


def test_a_template_that_loops_without_end_is_stopped(main, capsys, tmp_path, tiny_base, monkeypatch):
    monkeypatch.setattr("recipes.models.control_tokens.RENDER_SECONDS", 0.3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ours = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    (tmp_path / "data.jsonl").write_text('{"prompt": "q"}\n')
    late = ours + "{% if messages[0].content == 'q' %}" + endless + "{% endif %}"
    for name, template in (("always", endless), ("late", late)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        assert main([str(tmp_path / "data.jsonl"), "--task", "prompt", "--tokenizer", str(tmp_path / name)]) == 1
        assert "error: The chat template takes more than 0.3 s for one conversation" in capsys.readouterr().err
