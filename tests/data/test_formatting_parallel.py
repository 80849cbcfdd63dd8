"""Several processes give what one gives: rows, order, report, errors; and memory does not grow with the rows."""

import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

from recipes.data import parallel
from recipes.data.digests import Digests
from recipes.data.report import Report
from recipes.formatting import DataError, Formatter, format_dataset, load_rows

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def ranking(number):
    """Rankings of which some are ties, duplicates, wrong, or hold the text of a control token."""
    if number % 97 == 5:
        return {"prompt": f"q{number}", "responses": "none"}
    said = "<|im_end|>" if number % 11 == 0 else f"a{number % 700}"
    texts = (said, "b", "b" if number % 7 else "c")
    return {"prompt": f"q{number % 700}", "responses": [{"text": t, "rank": r // 2} for r, t in enumerate(texts, 1)]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [json.dumps(ranking(number)) for number in range(2500)]
    lines[1234], lines[2345] = '{"prompt": "cut', "\ufeff"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("options", [{}, {"dedup": "drop", "on_special": "drop"}], ids=["flag", "drop"])
@pytest.mark.parametrize("task", ["preference", "ranking"])
def test_rows_and_report_are_the_same(path, task, options):
    options = options | {"on_error": "skip", "max_error_rate": 0.05}
    (one, report), (two, other) = (format_dataset(load_rows(path), task, num_proc=n, **options) for n in (1, 3))
    assert one.to_list() == two.to_list() and len(one) >= 600
    assert report.to_dict() == other.to_dict() and one._fingerprint == two._fingerprint
    assert len(report.skipped) >= 28
    assert {entry["flag"].split()[0] for entry in report.flags} == (
        set() if "dedup" in options else {"special", "duplicate"}
    )

    rows = []
    for processes in (1, 3):
        again = Report(str(path), task)
        rows.append(
            [(row.line, output) for row, output in Formatter(task, **options)(load_rows(path), again, processes)]
        )
        assert again.to_dict() == report.to_dict()
    assert rows[0] == rows[1] and [output for _, output in rows[0]] == one.to_list()


def test_errors_are_the_same(path):
    found = []
    for processes in (1, 2):
        with pytest.raises(DataError, match="28 of 2,500 rows cannot be used") as caught:
            format_dataset(load_rows(path), "preference", num_proc=processes)
        found.append((str(caught.value), caught.value.report.to_dict()))
    assert found[0] == found[1]
    assert ":1235: not valid JSON" in found[0][0] or found[0][1]["errors"][13]["line"] == 1235


@pytest.mark.parametrize("name", ["data.csv", "data.parquet", "data.json"])
def test_other_files_are_formatted_by_several_processes_too(tmp_path, name):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"q{number}", "completion": "007"} for number in range(2100)])
    if name.endswith("json"):
        (tmp_path / name).write_text(json.dumps(rows.to_list(), indent=1))
    else:
        (rows.to_csv if name.endswith("csv") else rows.to_parquet)(tmp_path / name)
    one, two = (format_dataset(load_rows(tmp_path / name), "sft", num_proc=n)[0].to_list() for n in (1, 2))
    assert one == two and one[2099]["messages"][0]["content"] == "q2099"


def test_tool_calls_late_in_the_file_change_the_columns_for_all(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 0.7, "n": 10**30, "s": "7", "e": 1e-12}}}
    tools = [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        TALK[1],
    ]
    rows = [{"messages": TALK}] * 1500 + [{"messages": tools}]
    for processes in (1, 2):
        dataset, _ = format_dataset(rows, "sft", num_proc=processes)
        assert dataset[0] == {"messages": TALK}
        assert dataset[1500] == {"messages": tools}  # no digit of a number is lost
    dataset.save_to_disk(tmp_path / "saved")
    assert list(format_dataset(load_rows(tmp_path / "saved"), "sft")[0]) == list(dataset)


def test_a_process_that_is_killed_is_an_error_and_no_loss_of_rows():
    def killed(item):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
        list(parallel.map_in_order(killed, range(9), 2))


def test_few_items_are_read_ahead(monkeypatch):
    monkeypatch.setattr(parallel, "AHEAD", 2)
    read = []

    def items():
        for number in range(100):
            read.append(number)
            yield number

    results = parallel.map_in_order(abs, items(), 2)
    assert next(results) == 0 and len(read) <= 2 * parallel.AHEAD + 1
    assert list(results) == list(range(1, 100))


def test_digests_are_remembered_beyond_memory():
    digests, numbers = Digests(), [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(3000)]
    assert not any(digests.add(number.to_bytes(8)) for number in numbers)
    assert all(digests.add(number.to_bytes(8)) for number in numbers)
    assert digests.add(bytes(8)) and not digests.add(bytes([255] * 8))
