"""Every dataset shape in docs/datasets.md: the exact rows that each task gets, and what is skipped and why."""

import csv
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.data.mapping import parse_mapping
from recipes.data.schemas import SCHEMAS, TASKS, detect
from recipes.formatting import DataError, format_dataset, load_rows

FIXTURES = {path.stem: json.loads(path.read_text("utf-8")) for path in Path(__file__).parent.glob("fixtures/*.json")}
CASES = [(name, task) for name, fixture in sorted(FIXTURES.items()) for task in fixture["expect"]]


def brief(value):
    """Messages as "role: content", as the fixtures have them; those with more to them stay as they are."""
    if isinstance(value, dict) and value.keys() == {"role", "content"}:
        return f"{value['role']}: {value['content']}"
    if isinstance(value, dict) and value.get("role") == "tool":
        return f"tool: {value['content']}"
    if isinstance(value, dict):
        return {key: brief(item) for key, item in value.items()} if "role" not in value else value
    return [brief(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name, task", CASES)
def test_exact_rows(tmp_path, name, task):
    fixture = FIXTURES[name]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in fixture["rows"]), encoding="utf-8")
    dataset, report = format_dataset(load_rows(path), task, schema=fixture.get("ask", "auto"))
    rows = [{key: value for key, value in brief(row).items() if key not in ("group_id", "tools")} for row in dataset]
    only = {"sft": "messages", "prompt": "prompt"}.get(task)
    assert [row[only] if only else row for row in rows] == fixture["expect"][task]["rows"]
    skipped = [[entry["line"], entry["column"], entry["reason"]] for entry in report.skipped]
    assert skipped == fixture["expect"][task]["skipped"]
    if task in SCHEMAS[fixture["schema"]].tasks:
        assert report.schema == fixture["schema"]


def write(rows, path):
    """The rows as a file of the kind that its suffix says."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if path.suffix == ".jsonl":  # as some editors on Windows write it
        path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in rows).encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            for row in rows:
                cells = {column: "" if cell is None else cell for column, cell in row.items()}
                writer.writerow({c: cell if isinstance(cell, str) else json.dumps(cell) for c, cell in cells.items()})
    else:
        pq.write_table(pa.Table.from_pylist([{column: row.get(column) for column in columns} for row in rows]), path)


@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    fixture, found = FIXTURES[name], {}
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        path = tmp_path / f"data{suffix}"
        try:
            write(fixture["rows"], path)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            continue  # columns of several types: no Parquet file can hold them
        if (name, suffix) == ("trl_preference", ".csv"):
            continue  # its empty list would be the answer "[]"
        for task in fixture["expect"]:
            dataset, report = format_dataset(load_rows(path), task, schema=fixture.get("ask", "auto"))
            skipped = [(entry["column"], entry["reason"]) for entry in report.skipped]
            found.setdefault(task, []).append((list(dataset), skipped, report.schema))
    for results in found.values():
        assert len(results) > 1 and all(result == results[0] for result in results[1:])


def test_yes_and_no_are_understood_in_csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion,label\nq,a,TRUE\nq,b,false\nq,c,0\nq,d,\n")
    assert [row["messages"][1]["content"] for row in format_dataset(load_rows(path), "sft")[0]] == ["a", "d"]
    path.write_text("prompt,completion,label\nq,a,perhaps\n")
    with pytest.raises(DataError, match="data.csv:2:label: found the text 'perhaps', expected true or false"):
        format_dataset(load_rows(path), "sft")
    path.write_text(
        "message_id,parent_id,role,text,rank,deleted,review_result\n"
        "a,,prompter,q,,False,True\nb,a,assistant,good,1,,\nc,a,assistant,gone,0,True,\nd,a,assistant,best,0,,\n"
    )
    dataset, report = format_dataset(load_rows(path), "preference")
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in dataset] == [("best", "good")]
    assert [(entry["line"], entry["reason"]) for entry in report.skipped] == [(4, "deleted")]


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': 'q'}]",
        '[{"role": "user", "content": "q"}',
        '[{"role": "user", "content": "q [1]"}, {"role": "assistant", "content": "cut',  # by Excel
        "[{'role': 'user', 'content': 'cut",
        '{"role": "user", "content": "cut',
    ],
)
def test_messages_in_csv_that_are_not_json_are_no_prompt(tmp_path, cell):
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], ["first"], [cell]])
    with pytest.raises(DataError, match="data.csv:3:prompt: found .*expected messages that json.dumps wrote"):
        format_dataset(load_rows(path), "prompt")


def test_every_schema_has_a_fixture():
    assert {fixture["schema"] for fixture in FIXTURES.values()} == set(SCHEMAS)


@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_detection_is_the_same_for_the_tasks_of_a_schema(name):
    rows, schema = FIXTURES[name]["rows"], FIXTURES[name]["schema"]
    columns = {column for row in rows for column in row}
    if SCHEMAS[schema].order is not None:
        for task in SCHEMAS[schema].tasks:
            assert detect(columns, rows, task)[0] == schema


@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_a_task_that_a_source_does_not_serve_is_refused(name):
    fixture = FIXTURES[name]
    for task in set(TASKS) - set(SCHEMAS[fixture["schema"]].tasks) - set(fixture["expect"]):
        with pytest.raises(DataError, match="no schema for task|serves|of use for"):
            format_dataset(fixture["rows"], task, schema=fixture.get("ask", "auto"))


@pytest.mark.parametrize("name", sorted(FIXTURES.keys() - {"oasst", "tools_sharegpt"}))
def test_null_everywhere_is_skipped_or_refused_by_place(name):
    """Each cell in turn becomes null, in the middle of good rows."""
    fixture = FIXTURES[name]
    good = fixture["rows"][0]
    for task in fixture["expect"].keys() & set(SCHEMAS[fixture["schema"]].tasks):
        for column in good:
            rows = [good, {**good, column: None}, good]
            try:
                _, report = format_dataset(rows, task, schema=fixture["schema"])
                assert all(
                    entry["line"] == 2 and entry["reason"] for entry in report.skipped if entry["column"] == column
                )
            except DataError as error:
                assert f"rows:2:{column}: " in str(error)


@pytest.mark.parametrize(
    "schema, change, message",
    [
        ("summarize_comparisons", {"choice": 2}, "choice: found 2 .int., expected one of 0, 1"),
        ("arena_conversations", {"winner": "nobody"}, "winner: found the text 'nobody', expected model_a"),
        ("arena_battles", {"winner_tie": 1}, "winner_model_a: found .1, 0, 1. in winner_model_a"),
        ("arena_battles", {"response_a": '["\\ud83d"]'}, "response_a: the text holds half a character"),
        ("arena_battles", {"response_a": "[]"}, "response_a: empty list"),
        ("arena_battles", {"response_a": '["a", "b"]'}, "response_a: found 2 turns, but prompt has 1"),
        ("pku_saferlhf", {"better_response_id": 0.5}, "better_response_id: found 0.5 .float., expected one of 0, 1"),
        ("helpsteer2", {"preference_strength": -100}, "preference_strength: found -100 .int., expected one of -3"),
        ("shp", {"labels": "1.5"}, "labels: found the text '1.5', expected one of 0, 1"),
        ("webgpt", {"score_0": "high"}, "score_0: found the text 'high', expected a number"),
        ("webgpt", {"question": "Why?"}, "question: found the text 'Why.', expected an object"),
        ("nectar", {"answers": [{"answer": "a", "rank": None}]}, r"answers\[0\].rank: found null, expected a number"),
        ("ultrafeedback", {"completions": [{"model": "x"}]}, r"completions\[0\].response: missing"),
        ("oasst", {"role": "robot"}, r"messages\[0\].role: unknown role"),
        ("oasst", {"text": 3}, "text: found 3 .int., expected text"),
        ("conversations", {"tools": "{bad"}, "tools: found the text '{bad', expected a list"),
        ("preference_transcripts", {"chosen": "no markers"}, "chosen: found the text 'no markers', expected turns"),
        ("instruction_output", {"history": [["q"]]}, r"history\[0\]: found a list of the text 'q', expected \[user"),
    ],
)
def test_wrong_cells_are_refused_by_place(schema, change, message):
    fixture = next(fixture for fixture in FIXTURES.values() if fixture["schema"] == schema)
    good, task = fixture["rows"][0], next(iter(fixture["expect"]))
    change = {**change, **({"message_id": "new"} if schema == "oasst" else {})}
    if message.endswith("empty list"):
        _, report = format_dataset([good, {**good, **change}], task, schema=schema)
        assert [(entry["line"], entry["reason"]) for entry in report.skipped] == [(2, "empty list")]
    else:
        with pytest.raises(DataError, match=f"rows:2:{message}"):
            format_dataset([good, {**good, **change}], task, schema=schema)


@pytest.mark.parametrize(
    "fixture, change, message",
    [
        ("pairwise", {"type": "pairwise", "value": {"selected": "both"}}, r"annotations\[0\]: found the text 'both'"),
        (
            "pairwise",
            {"type": "pairwise", "value": "left"},
            r"annotations\[0\]: found the text 'left', expected an obj",
        ),
        ("ranker", {"type": "ranker", "value": {"ranker": {"good": ["a"], "bad": ["b"]}}}, "the items lie in buckets"),
        ("ranker", {"type": "ranker", "value": {"ranker": ["z"]}}, "the text 'z' is the id of no item"),
    ],
)
def test_wrong_annotations_of_label_studio_are_refused_by_place(fixture, change, message):
    good = FIXTURES[f"label_studio_{fixture}"]["rows"][0]
    row = {**good, "annotations": [{"result": [change]}]}
    with pytest.raises(DataError, match=f"rows:2:.*{message}"):
        format_dataset([good, row], "preference")


def test_label_studio_names_of_its_own():
    """Names of tags that are not those of the data, another name of the prompt, and several results."""
    data = {"ask": "q", "left text": "one", "right text": "two"}
    result = {"type": "pairwise", "to_name": "txt-1,txt-2", "value": {"selected": "right"}}
    row = {"data": data, "annotations": [{"result": [result, {"type": "textarea", "value": {"text": ["why"]}}]}]}
    with pytest.raises(DataError, match=r"found no prompt among ask, left text, right text; name it: --dataset_map"):
        format_dataset([row], "preference")
    mapping = {"data": "data", "annotations": "annotations", "prompt": "data.ask"}
    (pair,) = brief(format_dataset([row], "preference", mapping=mapping)[0].to_list())
    assert (pair["prompt"], pair["chosen"]) == (["user: q"], ["assistant: two"])
    three = {**row, "data": {**data, "more": "three"}}
    with pytest.raises(DataError, match="cannot tell which two of left text, right text, more were compared"):
        format_dataset([three], "preference", mapping=mapping)
    shown = {**row, "data": {**data, "image": "a.png"}}
    with pytest.raises(DataError, match="none of 1 row is of use for 'preference': image cannot be used"):
        format_dataset([shown], "preference", mapping=mapping)
    echo = {"data": {"prompt": "q", "answer1": "q", "answer2": "a"}, "annotations": [{"result": [result]}]}
    assert brief(format_dataset([echo], "preference")[0].to_list())[0]["rejected"] == ["assistant: q"]
    twice = {**row, "annotations": [{"result": [result, result]}]}
    with pytest.raises(DataError, match="found 2 results of pairwise or ranker, expected one"):
        format_dataset([twice], "preference", mapping=mapping)


def test_nothing_that_matters_is_dropped_in_silence():
    row = {"instruction": "q", "input": "i", "response": "a", "system_prompt": "s"}
    (dialogue,) = brief(format_dataset([row], "sft")[0].to_list())
    assert dialogue == {"messages": ["system: s", "user: q\n\ni", "assistant: a"]}
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    _, report = format_dataset(rows, "sft")
    assert [(entry["line"], entry["reason"]) for entry in report.skipped] == [(2, "labelled as a bad completion")]


def test_messages_of_two_forms_may_share_a_parquet_file():
    """Arrow gives each the keys of the other, with nulls."""
    unset = {"role": None, "content": None}
    said = [{"from": "human", "value": "q", **unset}, {"from": "gpt", "value": "a", **unset}]
    assert brief(format_dataset([{"conversations": said}], "sft")[0][0]) == {"messages": ["user: q", "assistant: a"]}
    pair = {"chosen": said, "rejected": [said[0], {**said[1], "value": "b"}]}
    assert brief(format_dataset([pair], "preference")[0][0])["rejected"] == ["assistant: b"]


def test_a_conversation_may_be_messages():
    """As in lmsys-chat-1m and WildChat."""
    turns = [{"role": "user", "content": "q", "toxic": False}, {"role": "assistant", "content": "a"}]
    assert brief(format_dataset([{"conversation": turns}], "sft")[0].to_list()) == [
        {"messages": ["user: q", "assistant: a"]}
    ]


def test_answers_whose_prompt_has_another_name_ask_for_a_mapping():
    with pytest.raises(DataError, match="rows:1:chosen: found only an answer, .*: --dataset_mapping prompt="):
        format_dataset([{"query": "q", "chosen": "a", "rejected": "b"}], "preference")


def test_two_schemas_that_fit_are_an_error():
    row = {"prompt": "q", "question": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="fit 'preference' as well as 'question_preference'; choose one with"):
        format_dataset([row], "preference")


def test_a_schema_is_detected_where_it_reads_most_rows():
    pair = {"prompt": "q", "completion": "a"}
    always_null = {**pair, "messages": None, "conversations": []}
    assert detect(always_null, [always_null] * 3, "sft")[0] == "prompt_completion"
    assert detect(pair, [{"prompt": "q"}, pair, {**pair, "prompt": 5}], "sft")[0] == "prompt_completion"
    assert detect(pair, [pair, {**pair, "prompt": 5}, {**pair, "prompt": 6}], "sft")[1].startswith("column names only")
    apart = [{"prompt": "q"}, {"completion": "a"}]
    assert detect(pair, apart, "sft") == ("prompt_completion", "column names only; the values do not fit")
    with pytest.raises(DataError, match="rows:1:completion: missing; there are prompt"):
        format_dataset(apart, "sft")


def test_detection_knows_the_roles_of_a_mapping():
    turns = [{"from": "teacher", "value": "q"}, {"from": "gpt", "value": "a"}]
    row = {"conversations": turns}
    with pytest.raises(DataError, match=r"rows:1:conversations\[0\].from: unknown role: found the text 'teacher'"):
        format_dataset([row], "sft")
    mapping = {"conversations": "conversations", "roles.teacher": "user"}
    _, report = format_dataset([row], "sft", mapping=mapping)
    assert (report.schema, report.reason) == ("conversations", "columns conversations")


def test_near_misses_are_named():
    with pytest.raises(DataError, match="nearly: 'preference': column 'rejected' is missing"):
        format_dataset([{"prompt": "q", "chosen": "a", "best": "b"}], "preference")
    with pytest.raises(DataError, match="--dataset_schema guanaco"):
        format_dataset([{"text": "### Human: q### Assistant: a"}], "sft")


@pytest.mark.parametrize(
    "task, row, line",
    [
        ("preference", {"query": "q", "good": "a", "bad": "b"}, "prompt=query chosen=good rejected=bad"),
        ("ranking", {"row_id": "7", "Frage": "q", "A": "a", "B": "b"}, "prompt=Frage chosen=COLUMN rejected=COLUMN"),
        ("sft", {"bot_reply": "a", "user_input": "q", "n": 3}, "prompt=user_input completion=bot_reply"),
        ("ranking", {"q": "q", "preference": "A", "one": "a"}, "prompt=q chosen=COLUMN rejected=COLUMN"),
        ("sft", {"query": "q", "rejected": "b", "chosen": "a"}, "prompt=query completion=chosen"),
        ("sft", {"rejected": [{"from": "human", "value": "q"}], "talk": [{"from": "human"}]}, "messages=talk"),
        ("sft", {"talk": [{"from": "human", "value": "q"}]}, "messages=talk"),
        ("prompt", {"meta": {"ask": "q"}, "n": 3}, "prompt=meta.ask"),
        ("sft", {"my question": "q", "x=y": "a"}, """'{"prompt": "my question", "completion": "x=y"}'"""),
        ("preference", {"question": "q", "best": "a"}, "prompt=question chosen=best rejected=COLUMN"),
        (
            "preference",
            {"ask": "q", "unpreferred": "b", "preferred": "a"},
            "prompt=ask chosen=preferred rejected=unpreferred",
        ),
    ],
)
def test_wrong_columns_print_the_whole_mapping(task, row, line):
    with pytest.raises(DataError) as caught:
        format_dataset([row], task)
    assert f"name the columns, perhaps: --dataset_mapping {line}" in str(caught.value)
    if "COLUMN" not in line and task != "ranking" and "talk" not in line:
        arguments = shlex.split(line)
        assert len(format_dataset([row], task, mapping=parse_mapping(arguments))[0]) == 1


def test_a_mapping_of_wrong_parts_is_corrected_with_the_names_of_the_source():
    with pytest.raises(DataError, match="perhaps: --dataset_mapping prompt=q completion=answer$"):
        format_dataset([{"q": "q", "answer": "a"}], "sft", mapping={"promt": "q", "completion": "answer"})


DOCS = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text("utf-8")


def test_docs_show_a_working_row_of_every_schema():
    shown = re.findall(r"^#### `(\w+)`\n.*?```json\n(.*?)```", DOCS, re.MULTILINE | re.DOTALL)
    assert sorted(name for name, _ in shown) == sorted(SCHEMAS)
    for name, block in shown:
        rows = [json.loads(line) for line in block.splitlines()]
        schema = "auto" if SCHEMAS[name].order is not None else name
        dataset, report = format_dataset(rows, SCHEMAS[name].tasks[0], schema=schema)
        assert (report.schema, len(report.skipped)) == (name, 0)
        if "preference" in SCHEMAS[name].tasks:
            for pair in format_dataset(rows, "preference", schema=schema)[0]:
                assert pair["chosen"][0]["content"] in ("A crow.", "Bird seen.", "Bird.")
                assert pair["rejected"][0]["content"] in ("No.", "Bird.")


def test_docs_code_adds_a_schema(monkeypatch):
    code = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)[1]
    monkeypatch.setitem(SCHEMAS, "riddle", None)  # what the code adds is taken back after the test
    exec(code, {})
    dataset, report = format_dataset([{"riddle": "q", "solution": "a"}], "sft")
    assert report.schema == "riddle" and brief(dataset[0]) == {"messages": ["user: q", "assistant: a"]}
