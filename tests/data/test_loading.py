"""Rows keep their file and line, and what is wrong with a file is said once, by place."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from decimal import Decimal

import pytest
from fsspec.compression import compr

from recipes.data.rows import RowError
from recipes.formatting import DataError, format_dataset, list_splits, load_rows

GOOD = b'{"prompt": "q"}\n'


def read(path, **options):
    return [
        (row.line, row.data.message if isinstance(row.data, RowError) else row.data)
        for row in load_rows(path, **options)
    ]


@pytest.mark.parametrize(
    "raw, expected",
    [
        (GOOD + b"\n \t\r\n" + GOOD, [(1, {"prompt": "q"}), (4, {"prompt": "q"})]),
        (b"\xef\xbb\xbf" + GOOD, [(1, {"prompt": "q"})]),
        (GOOD.replace(b"\n", b"\r\n") * 2, [(1, {"prompt": "q"}), (2, {"prompt": "q"})]),
        (GOOD[:-1], [(1, {"prompt": "q"})]),
        (b'{"prompt": "2026-11-22T00:00:00"}\n', [(1, {"prompt": "2026-11-22T00:00:00"})]),
        (b'{"prompt": "a\\u2028b\xe2\x80\xa8c \\ud83d\\ude00"}\n', [(1, {"prompt": "a\u2028b\u2028c 😀"})]),
        (b'{"a": 1, "a": 2}\n' + GOOD, [(1, "the key 'a' stands twice"), (2, {"prompt": "q"})]),
        (b'{"m": [{"role": "user", "role": "x"}]}\n', [(1, "the key 'role' stands twice")]),
        (GOOD + b'{"prompt": "q', [(1, {"prompt": "q"}), (2, "not valid JSON at character 12: Unterminated")]),
        (b"garbage\n", [(1, "not valid JSON at character 1: Expecting value")]),
        (b'{"prompt": "q"} {"prompt": "r"}\n', [(1, "not valid JSON at character 17: Extra data")]),
        (b'{"prompt": "half \\ud83d"}\n', [(1, "the text holds half a character (\\ud83d, a lone surrogate)")]),
        (b'{"messages": [{"content": "\\uDC00"}]}\n', [(1, "the text holds half a character (\\udc00")]),
        (b'{"prompt": "caf\xe9"}\n' + GOOD, [(1, "not UTF-8 (byte 0xe9), perhaps of Windows"), (2, {"prompt": "q"})]),
        (b'{"caf\xe9": "x"}\n' + GOOD, [(1, "not UTF-8 (byte 0xe9), perhaps of Windows"), (2, {"prompt": "q"})]),
        (b'{"prompt": "\\udc80"}\n', [(1, "the text holds half a character (\\udc80")]),
        (b'{"rank": NaN}\n', [(1, "NaN is not valid JSON")]),
        (
            b'{"a": ' + b"1" * 5000 + b"}\n" + GOOD,
            [(1, "not usable as JSON: Exceeds the limit"), (2, {"prompt": "q"})],
        ),
        (b"7\n", [(1, "found a int, expected an object")]),
        (b"[" * 100_000, [(1, "the list does not end")]),
        (b"[" + b"[" * 100_000 + b"]" * 100_000 + b"]", [(1, "the JSON is nested too deeply")]),
        (b'{"a":' * 100_000 + b"\n" + GOOD, [(1, "the JSON is nested too deeply"), (2, {"prompt": "q"})]),
        (b"", []),
        (b"\xef\xbb\xbf\n", []),
    ],
)
def test_json_lines(tmp_path, raw, expected):
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw)
    check(read(path), expected)


def check(found, expected):
    assert len(found) == len(expected)
    for (line, data), (expected_line, expected_data) in zip(found, expected, strict=True):
        assert line == expected_line
        assert data.startswith(expected_data) if isinstance(expected_data, str) else data == expected_data


@pytest.mark.parametrize(
    "raw, expected",
    [
        (b'[{"a": 1},\n\n {"a": 2}]\n', [(1, {"a": 1}), (3, {"a": 2})]),
        (b' \n[\n  {\n    "a": 1\n  },\n  {\n    "a": 2\n  }\n]', [(3, {"a": 1}), (6, {"a": 2})]),
        (b"[]", []),
        (b"[ ]\n", []),
        (b'[{"a": 1},\n 5,\n {"a": 2}]', [(1, {"a": 1}), (2, "found a int, expected an object"), (3, {"a": 2})]),
        (b'[{"a": 1, "a": 2},\n {"b": 1}]', [(1, "the key 'a' stands twice"), (2, {"b": 1})]),
        (b'[{"a": 1},\n {"a": ', [(1, {"a": 1}), (2, "the list does not end")]),
        (b'[{"a": 1}\n {"a": 2}]', [(1, "not valid JSON at line 2 of the row, character 2: Extra data")]),
        (b'[{"a": 1},\n{"a": 1 2},\n{"a": 2}]', [(1, {"a": 1}), (2, "not valid JSON at character 9"), (3, {"a": 2})]),
        (b'[{"a": "x "y" z"},\n{"a": 2}]', [(1, "not valid JSON at character 11"), (2, {"a": 2})]),
        (b'[{"a": "}, {", "b": 1 2},\n{"a": 2}]', [(1, "not valid JSON at character 22: Expecting ',' delim")]),
        (b'[{"a": 1},]', [(1, {"a": 1})]),
        (b'[{"a": 1}]\nmore', [(1, {"a": 1}), (2, "the list does not end, or something follows it")]),
        (b'[{"a": 1},\n{"a": "\xe9"},{"a": 2}]', [(1, {"a": 1}), (2, "not UTF-8 (byte 0xe9)"), (2, {"a": 2})]),
        (b'[{"a": "\\ud800"}, {"a": 1}]', [(1, "the text holds half a character"), (1, {"a": 1})]),
        (b'{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a":\n 1}\n', [(1, "not valid JSON at character 6"), (2, "not valid JSON at character 3")]),
    ],
)
def test_json_lists(tmp_path, raw, expected):
    path = tmp_path / "data.json"
    path.write_bytes(raw)
    check(read(path), expected)


@pytest.mark.parametrize(
    "raw, expected",
    [
        (b"a,b\n007,NA\n1e3,\nTrue,null\n", [(2, "007,NA"), (3, "1e3,"), (4, "True,null")]),
        (b'\xef\xbb\xbfa,b\r\n"x\r\ny",2\r\n\r\n3,4\r\n', [(2, "x\r\ny,2"), (5, "3,4")]),
        (b'a,b\n"say ""hi"", you",2\n', [(2, 'say "hi", you,2')]),
        (b"a,b\n1,2,3\n4\n5,6\n", [(2, "found 3 fields, expected 2"), (3, "found 1 field, expected 2"), (4, "5,6")]),
        (b'a,b\n1,2\n3,"open\n4,5\n', [(2, "1,2"), (3, "not valid CSV: unexpected end of data")]),
        (b"a,b\ncaf\xe9,2\n3,4\n", [(2, "not UTF-8 (byte 0xe9)"), (3, "3,4")]),
        (b"a,b\n", []),
        (b"", []),
        (b"a,b\n" + b"x" * 300_000 + b",2\n", [(2, "x" * 300_000 + ",2")]),
    ],
)
def test_csv_cells_stay_text(tmp_path, raw, expected):
    path = tmp_path / "data.csv"
    path.write_bytes(raw)
    found = [(line, data if isinstance(data, str) else ",".join(data.values())) for line, data in read(path)]
    check(found, expected)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"prompt,prompt\nq,r\n", "two columns are called 'prompt'\n"),
        (b"prompt,,\nq,,\n", "two columns have no name: delete them, or name them\n"),  # as Excel leaves them
        (b"prompt;completion\nHi, you;Yes, I\n", "the only column is 'prompt;completion': .* separated by commas\n"),
        ("prompt,réponse\nq,a\n".encode("cp1252"), "not UTF-8 .*iconv -f CP1252 -t UTF-8\n"),
        (b"prompt\tcompletion\nq\ta\n", "the only column is .* separated by commas\n"),
    ],
)
def test_csv_headers(tmp_path, content, problem):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"data.csv:1: {problem}"):
        format_dataset(load_rows(path), "prompt", on_error="skip")


def test_files_that_were_joined(tmp_path):
    """Each with a byte order mark, and CSV with a header, which was a row."""
    mark, path = b"\xef\xbb\xbf", tmp_path / "data.csv"
    path.write_bytes((mark + b"prompt,completion\r\nq,a\r\n") * 2 + b"prompt,completion\r\n")
    dataset, report = format_dataset(load_rows(path), "sft")
    assert len(dataset) == 2 and [entry["line"] for entry in report.skipped] == [3, 5]
    for name in ("data.jsonl", "data.txt"):
        (tmp_path / name).write_bytes((mark + GOOD) * 2)
        first, second = format_dataset(load_rows(tmp_path / name), "prompt")[0]
        assert first == second


def test_csv_can_hold_messages_as_json_and_numbers_as_text(tmp_path):
    turns = [{"role": "user", "content": "q, é"}, {"role": "assistant", "content": "a"}]
    with (tmp_path / "chat.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(turns)]])
    assert format_dataset(load_rows(tmp_path / "chat.csv"), "sft")[0].to_list() == [{"messages": turns}]
    (tmp_path / "pairs.csv").write_text("history,human_ref_A,human_ref_B,labels\nq,007,2026-01-01,0\n")
    (pair,) = format_dataset(load_rows(tmp_path / "pairs.csv"), "preference")[0]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("2026-01-01", "007")


@pytest.mark.parametrize(
    "source",
    ["none.jsonl", "runs/none.parquet", "./none", "../none/here", "~/none", "/none/here", "a/b/c", "C:\\x", ""],
)
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source):
    with pytest.raises(DataError, match="no such file or folder") as caught:
        load_rows(source)
    assert "\n" not in str(caught.value)


def test_files_without_a_split_beside_others_are_said_to_be_left_out(tmp_path, capsys):
    for name in ("train", "more", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD)
    assert list_splits(tmp_path) == ["train", "test"] and len(list(load_rows(tmp_path))) == 1
    said = capsys.readouterr().err
    assert said.count("not read, as other files are named by split") == 1 and "more.jsonl" in said
    (tmp_path / "more.jsonl").unlink()
    assert list_splits(tmp_path) and not capsys.readouterr().err


def test_names_that_are_no_unicode_break_no_report(tmp_path):
    """It was written after the training, whose model was then lost."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "q", "half \\ud83d": 1}\n')
    _, report = format_dataset(load_rows(path), "prompt")
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["not_used"] == {"half \ud83d": 1}
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    os.rename(path, name)
    with pytest.raises(DataError, match="its name is not UTF-8, .*rename it"):
        load_rows(name)


def test_decimals_are_numbers(tmp_path):
    """As DuckDB writes 1.5 into Parquet: scores against the order of a pair were no scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    row |= {"score_chosen": Decimal("1.5"), "score_rejected": Decimal("2.5")}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="score_chosen: 1.5 is lower than score_rejected 2.5"):
        format_dataset(load_rows(tmp_path / "pairs.parquet"), "ranking")


def test_a_label_that_is_a_class_is_read_by_its_name():
    """By its number, class 0 was a bad answer, also where it is called "good"."""
    from datasets import ClassLabel, Dataset, Features, Value

    rows = {"prompt": ["q", "q", "q"], "completion": ["a", "b", "c"], "label": [1, 0, None]}
    for names, expected in ((["false", "true"], "ac"), (["true", "false"], "bc")):
        kinds = {"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=names)}
        features = Features(kinds)
        dataset, _ = format_dataset(Dataset.from_dict(rows, features), "sft")
        assert "".join(row["messages"][1]["content"] for row in dataset) == expected


def test_a_mapping_reaches_into_objects_of_csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('id,q\n1,"{""text"": ""a""}"\n')
    assert format_dataset(load_rows(path), "prompt", mapping={"prompt": "q.text"})[0][0]["prompt"][0]["content"] == "a"
    with pytest.raises(DataError, match="data.csv:2:id.text: missing; this row has id, q"):
        format_dataset(load_rows(path), "prompt", mapping={"prompt": "id.text"})


def test_a_mistyped_path_is_told_from_what_is_there(tmp_path):
    (tmp_path / "prompts.jsonl").touch()
    with pytest.raises(DataError, match=r"no such file or folder \(did you mean .*/prompts.jsonl\?\)"):
        load_rows(tmp_path / "promts.jsonl")


def test_a_hub_name_that_cannot_be_reached_is_one_line():
    with pytest.raises(
        DataError, match="no file or folder 'nobody/nothing' is here, and could not load nobody/nothing: "
    ) as caught:
        load_rows("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot read .xlsx; use .jsonl"):
        load_rows(tmp_path / "data.xlsx")
    (tmp_path / "wide.csv").write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(DataError, match="no text in UTF-8, .*perhaps UTF-16"):
        list(load_rows(tmp_path / "wide.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="bad.parquet"):
        list(load_rows(tmp_path / "bad.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .jsonl"):
        load_rows(tmp_path / "empty")


@pytest.mark.parametrize(
    "content, what",
    [
        (gzip.compress(GOOD, mtime=0), "no text in UTF-8, whatever its name says, but perhaps UTF-16, compressed"),
        (lzma.compress(GOOD), "no text in UTF-8"),
        (b"PAR1\x15\x00", "no text in UTF-8"),
        (b"PK\x03\x04\x14\x00", "no text in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS; .* git lfs pull"),
    ],
)
def test_a_file_of_another_kind_than_its_suffix_is_named(tmp_path, content, what):
    """A pointer of Git LFS with the suffix .txt was three prompts."""
    for suffix in (".jsonl", ".json", ".csv", ".txt"):
        path = tmp_path / f"data{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"data{suffix}: .*{what}"):
            list(load_rows(path))


def test_media_columns_are_not_decoded_and_no_error_of_a_decoder_is_a_traceback(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    media = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"prompt": {"dtype": "string", "_type": "Value"}, "audio": {"_type": "Audio"}, "image": {"_type": "Image"}}
    hub = {"huggingface": json.dumps({"info": {"features": types}})}
    columns = pa.schema([("prompt", pa.string()), ("audio", media), ("image", media)], metadata=hub)
    row = {"prompt": "q", "audio": {"bytes": b"no sound"}, "image": {"bytes": b"no image"}}
    pq.write_table(pa.Table.from_pylist([row], schema=columns), tmp_path / "media.parquet")
    with pytest.raises(DataError, match="none of 1 row is of use for 'prompt': audio cannot be used"):
        format_dataset(load_rows(tmp_path / "media.parquet"), "prompt")

    pq.write_table(pa.table({"prompt": ["q"]}), tmp_path / "plain.parquet")

    def broken(*_):
        raise ImportError("To support decoding, install this\nand that")
        yield

    monkeypatch.setattr("datasets.iterable_dataset.IterableDataset.__iter__", broken)
    with pytest.raises(DataError, match="plain.parquet: ImportError: To support decoding, install this") as caught:
        list(load_rows(tmp_path / "plain.parquet"))
    assert "\n" not in str(caught.value)


def test_splits_of_a_folder_come_from_file_names(tmp_path):
    for name in ("train-1.jsonl", "train-0.jsonl", "validation.csv", "test.json", "README.md"):
        (tmp_path / name).write_text("prompt\nv\n" if name.endswith("csv") else json.dumps({"prompt": name}) + "\n")
    assert sorted(list_splits(tmp_path)) == ["test", "train", "validation"]
    assert [(os.path.basename(row.file), row.line) for row in load_rows(tmp_path)] == [
        ("train-0.jsonl", 1),
        ("train-1.jsonl", 1),
    ]
    assert read(tmp_path, split="validation") == [(2, {"prompt": "v"})]
    with pytest.raises(DataError, match="has no split 'dev'; it has train, validation, test"):
        load_rows(tmp_path, split="dev")
    with pytest.raises(DataError, match="has no split 'test'; it has train"):
        load_rows(tmp_path / "train-0.jsonl", split="test")
    assert read(tmp_path, data_files="test.json") == [(1, {"prompt": "test.json"})]
    assert read("json", data_files=str(tmp_path / "test.json")) == [(1, {"prompt": "test.json"})]
    assert read(tmp_path, data_files={"test": ["test.json"]}, split="test") == [(1, {"prompt": "test.json"})]
    with pytest.raises(DataError, match=r"for each pattern of data_files \['test.json', 'tset.json'\]"):
        load_rows(tmp_path, data_files=["test.json", "tset.json"])


CARD = """---
license: mit
configs:
- config_name: helpful
  default: true
  data_files:
  - {split: train, path: helpful/part-*.jsonl}
  - {split: test, path: held/*.csv}
- config_name: harmless
  data_dir: harmless
---
# A dataset
"""


def test_a_copy_of_a_hub_dataset_is_read_as_its_card_says(tmp_path):
    for name in ("helpful/part-1", "helpful/part-0", "helpful/other", "harmless/train", "harmless/validation"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x.csv").write_text("prompt\nheld\n")
    (tmp_path / "README.md").write_text("# Words without YAML\n")
    assert read(tmp_path) == [(1, {"prompt": "harmless/train"})]  # by the names of files

    (tmp_path / "README.md").write_text(CARD)
    assert list_splits(tmp_path) == ["train", "test"]
    assert read(tmp_path) == [(1, {"prompt": "helpful/part-0"}), (1, {"prompt": "helpful/part-1"})]
    assert read(tmp_path, split="test") == [(2, {"prompt": "held"})]
    assert list_splits(tmp_path, "harmless") == ["train", "validation"]
    assert read(tmp_path, name="harmless", split="validation") == [(1, {"prompt": "harmless/validation"})]
    for options, message in (
        ({"name": "nice"}, "has no configuration 'nice' .--dataset_config.; it has helpful, harmless"),
        ({"split": "dev"}, "has no split 'dev'; it has train, test"),
    ):
        with pytest.raises(DataError, match=message):
            load_rows(tmp_path, **options)

    for card, message in (
        (
            CARD.replace("  default: true\n", ""),
            "has no configuration 'default' .--dataset_config.; it has helpful, harmless",
        ),
        (
            CARD.replace("part-*", "no-*").replace("held", "no"),
            "holds no .jsonl, .ndjson, .json, .csv, .parquet, .txt file",
        ),
        (
            CARD.replace("helpful/part-*.jsonl", "[helpful/part-0.jsonl, gone.jsonl]"),
            "has no split 'train'; it has test",
        ),
        (CARD.replace("{split", "{{split"), "could not load .*README.md"),
        (CARD.replace("config_name: helpful", "name: helpful"), "README.md.*Each config must include `config_name`"),
    ):
        (tmp_path / "README.md").write_text(card)
        with pytest.raises(DataError, match=message) as caught:
            load_rows(tmp_path)
        assert "\n" not in str(caught.value)


def test_text_files_hold_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf Name a bird. \r\n\n[7]\ncaf\xe9\n" + b"last")
    found = [data if isinstance(data, str) else data["prompt"].strip() for _, data in read(path)]
    assert [line for line, _ in read(path)] == [1, 3, 4, 5]
    assert found[:2] == ["Name a bird.", "[7]"] and "byte 0xe9" in found[2] and found[3] == "last"
    path.write_text("a\nb\n")
    assert format_dataset(load_rows(path), "prompt")[0].to_list() == [
        {"prompt": [{"role": "user", "content": text}]} for text in "ab"
    ]
    with pytest.raises(DataError, match="no schema for task 'sft' fits the columns prompt"):
        format_dataset(load_rows(path), "sft")
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress(b"c\n"))
    assert {os.path.basename(row.file) for row in load_rows(tmp_path)} == {"other.txt.gz", "prompts.txt"}
    (tmp_path / "data.jsonl").write_bytes(GOOD)  # beside data, a text is a licence or a note
    assert {os.path.basename(row.file) for row in load_rows(tmp_path)} == {"data.jsonl"}


@pytest.mark.parametrize(
    "name, before, long, after, expected",
    [
        ("data.jsonl", GOOD, b'{"prompt": "%s"}\n', GOOD, [1, "the line is longer than 64 MiB"]),
        ("data.txt", b"q\n", b"%s\n", b"q\n", [1, "the line is longer than 64 MiB"]),
        ("data.json", b'[{"a": "q"},\n', b'{"a": "%s"},', b'{"a": 1}]', [1, "an element of the list is longer than"]),
        ("data.csv", b"a\nq\n", b"%s\n", b"q\n", [2, "the line is longer than 64 MiB"]),
        ("data.csv", b"a\nq\n", b'"%s"\n', b"q\n", [2, "the line is longer than 64 MiB"]),
        ("data.csv", b"a\nq\n", b'"\n%s\n"\n', b"q\n", [2, "not valid CSV: field larger than field limit"]),
    ],
)
def test_a_row_has_a_limit(tmp_path, monkeypatch, name, before, long, after, expected):
    monkeypatch.setattr("recipes.data.text_files.LIMIT", 1000)
    monkeypatch.setattr("recipes.data.text_files.CHUNK", 64)
    (tmp_path / name).write_bytes(before + long.replace(b"%s", b"x" * 980) + after)
    assert [type(data) for _, data in read(tmp_path / name)] == [dict] * 3
    lines = b"\n".join([b"x" * 900] * 3) if long.startswith(b'"\n') else b"x" * 2100
    (tmp_path / name).write_bytes(before + long.replace(b"%s", lines) + after)
    found = [(0, line if isinstance(data, dict) else data) for line, data in read(tmp_path / name)]
    check(found, [(0, item) for item in expected])


def test_a_line_without_end_takes_little_memory(tmp_path):
    """200 MB of one line in 200 KB of a file, read by a process that may use 300 MiB more than it has."""
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b"\n" + GOOD)
    code = (
        "import resource, sys; from recipes.formatting import load_rows; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; rows = list(load_rows(sys.argv[1])); "
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before; "
        "assert [row.line for row in rows] == [1] and grown < 190 * 2**10, (rows, grown)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_zst_without_its_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl.zst").write_bytes(b"")
    monkeypatch.delitem(compr, "zstd", raising=False)
    with pytest.raises(DataError, match="data.jsonl.zst: there is no package .* pip install backports.zstd"):
        read(tmp_path / "data.jsonl.zst")


def zst(data):
    zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})  # as the program zstd


PACKERS = [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zst)]


@pytest.mark.parametrize("suffix, compress", PACKERS)
def test_compressed_files(tmp_path, suffix, compress):
    path = tmp_path / f"train.jsonl{suffix}"
    packed = compress(b"\xef\xbb\xbf" + GOOD) + compress(b"\n" + GOOD * 5000)  # in two parts
    path.write_bytes(packed)
    assert read(path)[:2] == read(tmp_path)[:2] == [(1, {"prompt": "q"}), (3, {"prompt": "q"})]
    (tmp_path / f"list.json{suffix}").write_bytes(compress(b'[{"a": 1},\n{"a": 2}]'))
    assert read(tmp_path / f"list.json{suffix}") == [(1, {"a": 1}), (2, {"a": 2})]
    for broken in (packed[: len(packed) // 2], packed[:20] + b"rubbish" + packed[27:], b"no archive"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=f"could not load .*train.jsonl{suffix}: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_dataset_script_is_never_run(tmp_path):
    (tmp_path / "owner").mkdir()
    script = tmp_path / "owner" / "owner.py"
    script.write_text("raise SystemExit('the script ran')\n")
    for source in (script, script.parent):
        with pytest.raises(DataError, match="cannot read .py|holds no .jsonl"):
            load_rows(source)


def test_slices_and_saved_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(9)))
    assert [line for line, _ in read(path, split="train[2:5]")] == [3, 4, 5]
    assert len(read(path, split="train[:4]")) == 4
    with pytest.raises(DataError, match="not a split name"):
        load_rows(path, split="train[:10%]")
    parts = DatasetDict(train=Dataset.from_list([{"prompt": "a"}]), test=Dataset.from_list([{"prompt": "b"}]))
    parts.save_to_disk(tmp_path / "saved")
    assert list_splits(tmp_path / "saved") == ["train", "test"]
    assert read(tmp_path / "saved", split="test") == [(1, {"prompt": "b"})]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_rows(tmp_path / "saved", split="dev")


def test_arrow_does_not_fill_tool_calls_with_nulls(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    def turns(**arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        user, done = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        return [
            user,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            done,
        ]

    rows = [{"messages": turns(a=1)}, {"messages": turns(b="x")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tools.parquet")
    for source in (load_rows(tmp_path / "tools.parquet"), Dataset(pa.Table.from_pylist(rows))):
        dataset, _ = format_dataset(source, "sft")
        assert [row["messages"] for row in dataset] == [row["messages"] for row in rows]


def test_arrow_does_not_fill_functions_with_nulls(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"functions": [{"name": "f", "parameters": {name: {"type": "string"}}}]} for name in "ab"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "functions.parquet")
    assert [row.data for row in load_rows(tmp_path / "functions.parquet")] == rows


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mac.txt", b"one\rtwo\r", "mac.txt: lines end with carriage returns alone; convert them"),
        ("mac.csv", b"prompt\rone\r", "mac.csv: lines end with carriage returns alone"),
        ("semicolons.csv", b'"prompt";"completion"\n"q";"a"\n', "are columns not separated by commas"),
        ("headless.csv", b"What is it?,A bird.\nAnd this?,A cat.\n", "does the file lack the line with the names"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, name, content, message):
    """A .txt of an old Mac was one prompt; the advice for a CSV without header was to map its first row."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        format_dataset(load_rows(tmp_path / name), "prompt" if name == "mac.txt" else "sft")


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "run [v1] ü?"
    folder.mkdir()
    pq.write_table(pa.table({"prompt": ["q"]}), folder / "train.parquet")
    (folder / "test[0].jsonl").write_text('{"prompt": "r"}')
    for source in (folder, folder / "train.parquet"):
        assert [row.data for row in load_rows(source)] == [{"prompt": "q"}]
    assert [row.data for row in load_rows(folder / "test[0].jsonl")] == [{"prompt": "r"}]


@pytest.mark.parametrize("text, rows", [("", []), ("\n \n", []), ('\r\n\n{"prompt": "q"}\r\n', [{"prompt": "q"}])])
def test_blank_lines_before_the_first_object_are_none(tmp_path, text, rows):
    path = tmp_path / "data.json"
    path.write_text(text)
    assert [row.data for row in load_rows(path)] == rows
    if not rows:
        with pytest.raises(DataError, match="no rows: the file or split is empty"):
            format_dataset(load_rows(path), "prompt")


def test_messages_in_csv_may_begin_with_any_key(tmp_path):
    turns = [{"id": 1, "role": "user", "content": "q"}]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], [json.dumps(turns)]])
    dataset, _ = format_dataset(load_rows(tmp_path / "data.csv"), "prompt")
    assert dataset.to_list() == [{"prompt": [{"role": "user", "content": "q"}]}]


def test_a_large_element_of_a_json_list_does_not_slow_those_after_it(tmp_path):
    path, small = tmp_path / "data.json", [{"a": "q"}] * 30_000
    path.write_text(json.dumps([{"a": "q" * 2**22}, *small]))
    start = time.process_time()
    assert read(path)[1:] == [(1, row) for row in small]
    assert time.process_time() - start < 3


@pytest.mark.parametrize("wrong", ['"x"y"}, ', '"x"} '])
def test_rows_that_a_broken_list_hides_in_one_element_are_not_skipped_as_one(tmp_path, wrong):
    """Between two missing quotes, or before a missing comma."""
    path = tmp_path / "data.json"
    rows = '{"prompt": "q"}, ' * 50
    path.write_text(f'[{rows}{{"prompt": {wrong}{rows}{{"prompt": {wrong}{rows}{{"prompt": "q"}}]')
    with pytest.raises(DataError, match="is a quote or a comma missing\\? nothing after it(.|\n)*mend the file"):
        format_dataset(load_rows(path), "prompt", on_error="skip")


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_json_lists_are_read_in_parts(tmp_path, monkeypatch, chunk):
    """The same rows and errors, wherever a part ends."""
    monkeypatch.setattr("recipes.data.text_files.CHUNK", chunk)
    path = tmp_path / "data.json"
    data = [{"a": f'é😀 "{n}"\n\\ ', "b": [n, -1.5e3, None, True, {"c": "x" * (n % 90)}]} for n in range(40)]
    for indent in (None, 1):
        path.write_text(json.dumps(data, indent=indent, ensure_ascii=indent is None), encoding="utf-8")
        rows = read(path)
        assert [row for _, row in rows] == data
        lines = path.read_text("utf-8").split("\n")
        assert all(lines[line - 1].lstrip(" [").startswith("{") for line, _ in rows)
    text = path.read_text("utf-8")
    starts = [line for line, _ in rows]
    for broken, line, reason in (
        (text[:-9], starts[39], "the list does not end"),
        (text.replace('"7\\"', '"7"'), starts[7], "not valid JSON at line 2 of the row, character 16: Expecting"),
        (text.replace("},\n {", "}\n {", 1), starts[0], "not valid JSON at line 13 of the row, character 2: Extra"),
        (text + "]", text.count("\n") + 1, "the list does not end, or something follows it"),
    ):
        path.write_text(broken, encoding="utf-8")
        check([(at, found) for at, found in read(path) if isinstance(found, str)], [(line, reason)])
    path.write_bytes(text.encode().replace('😀 \\"30'.encode(), b'\xff \\"30'))
    rows = read(path)
    line, message = rows[30]
    assert '"30' in path.read_bytes().split(b"\n")[line].decode("utf-8", "replace") and "byte 0xff" in message
    assert [row for _, row in rows[:30] + rows[31:]] == data[:30] + data[31:]
