"""From rows to TRL's columns: what every task gets, what is skipped, flagged and refused."""

import json
import subprocess
import sys

import pytest

from recipes.data.mixtures import Source
from recipes.formatting import (
    DataError,
    FormattingArguments,
    check_leakage,
    format_dataset,
    list_splits,
    load_formatted,
    load_rows,
    split_by_group,
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def formatted(rows, task, **options):
    return format_dataset(rows, task, **options)[0].to_list()


SILENT = {"role": "system", "content": " "}
DIALOGUE = [user("q"), assistant("a"), user("q2"), assistant(" a2\n")]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
TOOL_TALK = [user("q"), CALL, {"role": "tool", "content": "3", "name": "f"}, assistant("4")]
RANKED = {"prompt": "q", "responses": [{"text": t, "rank": r} for t, r in (("c", 3), ("a", 1), ("b", 1.0), ("d", 7))]}


def test_formatting_is_light_to_import():
    heavy = "{'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)"
    code = f"import sys, recipes.formatting; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_sft_keeps_whole_conversations_verbatim():
    assert formatted([{"messages": DIALOGUE, "text": "ignored"}], "sft") == [{"messages": DIALOGUE}]


def test_sft_can_be_cut_into_prompt_and_last_turn():
    assert formatted([{"messages": DIALOGUE}], "sft", prompt_completion=True) == [
        {"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]}
    ]


def test_ranking_gives_every_strict_pair_once():
    pairs = formatted([RANKED], "preference")
    found = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs]
    assert found == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")]
    assert {row["group_id"] for row in pairs} == {pairs[0]["group_id"]}
    assert all(row["prompt"] == [user("q")] and "margin" not in row for row in pairs)


def test_ranking_task_keeps_one_row_with_the_best_first():
    (row,) = formatted([RANKED], "ranking")
    assert [completion[0]["content"] for completion in row["completions"]] == ["a", "b", "c", "d"]
    assert row["ranks"] == [1, 1, 3, 7]


def test_a_pair_is_a_ranking_of_two():
    (row,) = formatted([{"prompt": "q", "chosen": "a", "rejected": "b"}], "ranking")
    assert (row["completions"], row["ranks"]) == ([[assistant("a")], [assistant("b")]], [1, 2])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q"},
        {"prompt": [user("q")]},
        {"prompt": [user("q"), assistant("a")]},
        {"prompt": "q", "completion": " a"},
        {"messages": [user("q"), assistant("a")]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [assistant("a")], "rejected": []},
        {"conversations": [user("q")], "chosen": assistant("a"), "rejected": []},
        {"conversations": json.dumps([user("q")]), "chosen": assistant("a"), "rejected": assistant("b")},
        {"prompt": "q", "chosen": [SILENT, assistant("a")], "rejected": [SILENT, assistant("b")]},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        RANKED,
    ],
)
def test_prompts_out_of_anything(row):
    assert formatted([row], "prompt") == [{"prompt": [user("q")]}]


def test_margin_is_opt_in_and_must_be_there():
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}]
    assert "margin" not in formatted(rows, "preference")[0]
    assert formatted(rows, "preference", margin=True)[0]["margin"] == 2.0
    with pytest.raises(DataError, match="rows:2:margin: a margin was asked for"):
        format_dataset([*rows, {**rows[0], "rejected": "c", "margin": None}], "preference", margin=True)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "q", "chosen": "a", "rejected": " a "}, "identical responses"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty text"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "empty text"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "empty list"),
        ({"prompt": "q", "chosen": [user("x")], "rejected": "y"}, "the prompts of chosen and rejected differ"),
        ({"prompt": DIALOGUE[:1] * 2, "chosen": "a", "rejected": "b"}, "turns do not alternate: user after user"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 3}, "tie: equal scores"),
    ],
)
def test_useless_pairs_are_skipped_and_counted(row, reason):
    good = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": None, "score_rejected": None}
    dataset, report = format_dataset([good, row, {**good, "rejected": "c"}], "preference")
    assert len(dataset) == 2
    assert [(entry["line"], entry["reason"]) for entry in report.skipped] == [(2, reason)]


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([assistant("a")], "the first turn is assistant, not user"),
        ([user("q"), user("q"), assistant("a")], "turns do not alternate: user after user"),
        ([user("q"), assistant("a"), user("q")], "the last turn is user, not assistant"),
        ([{"role": "system", "content": "s"}], "no user turn"),
        ([user("q"), assistant(None)], "empty assistant message"),
        ([user(" "), assistant("a")], "empty user message"),
        ([], "empty list"),
    ],
)
def test_useless_conversations_are_skipped_and_counted(turns, reason):
    dataset, report = format_dataset([{"messages": DIALOGUE}, {"messages": turns}], "sft")
    assert len(dataset) == 1
    assert [(entry["line"], entry["reason"]) for entry in report.skipped] == [(2, reason)]


@pytest.mark.parametrize(
    "row, place",
    [
        ({"prompt": "q"}, "rows:2:responses: missing"),
        ({**RANKED, "prompt": 7}, "rows:2:prompt: found 7"),
        ({**RANKED, "responses": "no list"}, "rows:2:responses: found the text"),
        ({"prompt": "q", "responses": [{"text": "a", "rank": True}]}, r"rows:2:responses\[0\].rank: found True"),
        ({"prompt": "q", "responses": [{"text": "a", "rank": "1"}]}, r"rows:2:responses\[0\].rank: found the text"),
        ({"prompt": "q", "responses": [{"text": "a"}]}, r"rows:2:responses\[0\].rank: missing"),
        ({"prompt": "q", "responses": ["a"]}, r"rows:2:responses\[0\]: found the text"),
        ({**RANKED, "prompt": [{"role": "bot", "content": "q"}]}, r"rows:2:prompt\[0\].role: unknown role"),
        ({**RANKED, "prompt": [{"role": "user"}]}, r"rows:2:prompt\[0\]: found an object with role"),
        ({**RANKED, "prompt": [user([{"type": "image"}])]}, r"rows:2:prompt\[0\].content: found"),
    ],
)
def test_wrong_rows_fail_with_their_place(row, place):
    with pytest.raises(DataError, match=place) as caught:
        format_dataset([RANKED, row], "preference")
    assert caught.value.report.rows_in == 2


def test_score_that_contradicts_the_order_is_an_error():
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 3}]
    with pytest.raises(DataError, match="rows:1:score_chosen: 1 is lower than score_rejected 3"):
        format_dataset(rows, "preference")


def test_first_five_errors_and_the_total_are_shown():
    with pytest.raises(DataError) as caught:
        format_dataset([RANKED, *[{"prompt": "q"}] * 7], "preference")
    assert str(caught.value).count("responses: missing") == 5
    assert "7 of 8 rows cannot be used" in str(caught.value) and "and 2 more" in str(caught.value)
    assert len(caught.value.report.errors) == 7


def test_a_report_of_many_different_errors_stays_small(monkeypatch):
    monkeypatch.setattr("recipes.data.report.KEPT", 20)
    with pytest.raises(DataError, match="300 of 301 rows cannot be used") as caught:
        format_dataset([{"prompt": "q"}, *({"prompt": number} for number in range(300))], "prompt")
    report = caught.value.report
    assert len(report.errors) == 20 and len(report.counts["errors"]) == 21
    assert report.counts["errors"]["others"] == 280 and report.counts["errors"].total() == 300


def test_errors_can_be_skipped_up_to_a_cap():
    rows = [{"prompt": f"{number}"} for number in range(200)]
    bad = {"prompt": 5}
    dataset, report = format_dataset([*rows, bad, bad], "prompt", on_error="skip")
    assert (len(dataset), report.rows_in, [entry["line"] for entry in report.skipped]) == (200, 202, [201, 202])
    with pytest.raises(DataError, match="3 of 203 .*\n(.*\n)*more than --max_error_rate 0.01"):
        format_dataset([*rows, bad, bad, bad], "prompt", on_error="skip")


def test_no_usable_row_is_an_error():
    with pytest.raises(DataError, match="none of 1 row is of use for 'preference': identical responses"):
        format_dataset([{"prompt": "q", "chosen": "a", "rejected": "a"}], "preference")
    with pytest.raises(DataError, match="no rows"):
        format_dataset([], "sft")


def test_special_token_text_is_flagged_dropped_or_refused():
    rows = [{"prompt": "q"}, {"prompt": "x <|im_end|>\n<|im_start|>system"}, {"prompt": "<|mine|>"}]
    dataset, report = format_dataset(rows, "prompt", special_tokens=["<|mine|>"])
    assert len(dataset) == 3 and [flag["line"] for flag in report.flags] == [2, 3]
    dataset, report = format_dataset(rows, "prompt", special_tokens=["<|mine|>"], on_special="drop")
    assert len(dataset) == 1 and [skip["line"] for skip in report.skipped] == [2, 3]
    with pytest.raises(DataError, match=r"rows:2: found special token '<\|im_end\|>' in the user turn"):
        format_dataset(rows, "prompt", on_special="fail")


def test_duplicates_are_flagged_or_dropped():
    rows = [{"prompt": "q"}, {"prompt": "r"}, {"prompt": "q"}]
    dataset, report = format_dataset(rows, "prompt")
    assert len(dataset) == 3 and report.flags == [{"file": "rows", "line": 3, "flag": "duplicate"}]
    dataset, report = format_dataset(rows, "prompt", dedup="drop")
    assert len(dataset) == 2 and report.skipped[0]["line"] == 3


def test_mapping_reaches_into_objects_and_overrides_detection():
    row = {"question": {"text": "q"}, "best": "a", "worst": 3, "messages": DIALOGUE, "who.ever": "b"}
    mapping = {"prompt": "question.text", "chosen": "best", "rejected": "who.ever"}
    (pair,) = formatted([row], "preference", mapping=mapping)
    assert (pair["prompt"], pair["rejected"]) == ([user("q")], [assistant("b")])
    with pytest.raises(DataError, match="rows:2:question.text: missing"):
        format_dataset([row, {**row, "question": {}}], "preference", mapping=mapping)
    with pytest.raises(DataError, match="rows:2:question.text: found 5"):
        format_dataset([row, {**row, "question": {"text": 5}}], "preference", mapping=mapping)


def test_mapping_adds_system_history_and_roles():
    row = {"q": "q2", "a": "a2", "sys": "s", "before": [["q1", "a1"]]}
    mapping = {"instruction": "q", "output": "a", "system": "sys", "history": "before"}
    assert formatted([row], "sft", mapping=mapping) == [
        {"messages": [{"role": "system", "content": "s"}, user("q1"), assistant("a1"), user("q2"), assistant("a2")]}
    ]
    turns = [{"from": "teacher", "value": "q"}, {"from": "Pupil", "value": "a"}]
    mapping = {"conversations": "talk", "roles.teacher": "user", "roles.pupil": "assistant"}
    assert formatted([{"talk": turns}], "sft", mapping=mapping) == [{"messages": [user("q"), assistant("a")]}]


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"prompt": 5}, "mapping prompt: found 5 .int., expected the name of a column"),
        ({"roles.bot": "robot"}, "mapping roles.bot=robot: expected assistant, system, tool, user"),
        ({"promt": "q"}, "fits the columns promt"),
        ({"prompt": "z"}, "rows:1:z: missing; this row has q"),
    ],
)
def test_wrong_mappings_are_refused(mapping, message):
    with pytest.raises(DataError, match=message):
        format_dataset([{"q": "x"}], "prompt", mapping=mapping)


def test_a_break_in_the_file_cannot_be_skipped(tmp_path):
    (tmp_path / "cut.json").write_text('[{"prompt": "a"},\n{"prompt": "b"},\n{"prom')
    (tmp_path / "open.csv").write_text('prompt\na\n"b\nc\n')
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="mend the file"):
            format_dataset(load_rows(path), "prompt", on_error="skip")


def test_schema_can_be_named():
    row = {"messages": DIALOGUE, "prompt": "p", "completion": "c"}
    assert formatted([row], "sft", schema="prompt_completion") == [{"messages": [user("p"), assistant("c")]}]
    with pytest.raises(DataError, match="unknown schema 'nonsense'"):
        format_dataset([row], "sft", schema="nonsense")
    with pytest.raises(DataError, match="schema 'prompt' serves prompt, not task 'sft'"):
        format_dataset([row], "sft", schema="prompt")


def test_tool_conversations_survive_for_sft_and_are_skipped_elsewhere():
    rows = [{"messages": DIALOGUE, "tools": None}, {"messages": TOOL_TALK, "tools": '[{"type": "function"}]'}]
    assert formatted(rows, "sft") == [
        {"messages": DIALOGUE, "tools": None},
        {"messages": TOOL_TALK, "tools": '[{"type": "function"}]'},
    ]
    dataset, report = format_dataset(rows, "prompt")
    assert len(dataset) == 1 and report.skipped[0]["reason"] == "tool calls are supported for task 'sft' only"


def test_split_by_group_keeps_all_rows_of_a_prompt_together():
    rows = [{**RANKED, "prompt": f"q{number % 50}"} for number in range(100)]
    dataset = format_dataset(rows, "preference")[0]
    train, test = split_by_group(dataset, 0.3, seed=1)
    assert len(train) + len(test) == len(dataset) and len(test) % 10 == 0 and len(test) > 0
    assert not set(train["group_id"]) & set(test["group_id"])
    assert split_by_group(dataset, 0.3, seed=1)[1].to_list() == test.to_list()
    assert split_by_group(dataset, 0.3, seed=2)[1].to_list() != test.to_list()
    assert check_leakage(train, test).flags == []
    assert check_leakage(train, train.select([0])).flags == [
        {"file": "test", "line": 1, "flag": "the prompt is also in train"}
    ]


class Script:
    dataset_streaming = False
    dataset_config, dataset_train_split, dataset_test_split = None, "train", "test"

    def __init__(self, dataset_name):
        self.dataset_name = dataset_name and str(dataset_name)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_recipes_get_train_and_eval_splits(tmp_path, capsys):
    rows = [{"prompt": f"q{number}"} for number in range(40)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    datasets = load_formatted("prompt", Script(path), FormattingArguments(test_split_size=0.25), evaluate=True)
    assert len(datasets["train"]) + len(datasets["eval"]) == 40 and len(datasets["eval"]) > 2
    assert "40 rows in, 40 out" in capsys.readouterr().err

    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "new"}, {"prompt": "q1"}])
    assert list_splits(tmp_path) == ["train", "test"]
    datasets = load_formatted("prompt", Script(tmp_path), FormattingArguments(), evaluate=True)
    assert (len(datasets["train"]), len(datasets["eval"])) == (40, 2)
    assert "the prompt is also in train, first at test:2" in capsys.readouterr().err
    assert list(load_formatted("prompt", Script(tmp_path), FormattingArguments())) == ["train"]


def test_a_test_split_that_was_chosen_is_not_replaced_in_silence(tmp_path, capsys):
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"prompt": f"{split} {number}"} for number in range(9)])
    script = Script(tmp_path)
    script.dataset_test_split = "validation[0:4]"
    assert len(load_formatted("prompt", script, FormattingArguments(), evaluate=True)["eval"]) == 4
    script.dataset_test_split = "held_out"
    assert "no split 'held_out'" not in capsys.readouterr().err
    load_formatted("prompt", script, FormattingArguments(), evaluate=True)
    assert "has no split 'held_out' (--dataset_test_split): rows to evaluate on are from" in capsys.readouterr().err
    assert list(load_formatted("prompt", script, FormattingArguments())) == ["train"]


def test_a_split_beside_a_mixture_is_refused(tmp_path):
    for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
        script = Script(None)
        setattr(script, name, "validation")
        with pytest.raises(DataError, match="a source of a mixture has its own name and split"):
            load_formatted("prompt", script, FormattingArguments(datasets=[prompts(tmp_path, "a", 2)]))


@pytest.mark.parametrize("rate", [-0.1, 5, float("nan")])
def test_the_rate_of_errors_is_a_share(rate):
    with pytest.raises(DataError, match="max_error_rate .* is a share of the rows: expected 0 to 1"):
        format_dataset([{"prompt": "q"}], "prompt", on_error="skip", max_error_rate=rate)


def prompts(tmp_path, name, count, **more):
    return str(write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}", **more} for i in range(count)]))


def mixed(tmp_path, *sources, task="prompt", **options):
    return load_formatted(task, Script(None), FormattingArguments(datasets=list(sources)), **options)


def test_mixtures_take_shares_without_repeating_rows(tmp_path, capsys):
    a, b = prompts(tmp_path, "a", 10), prompts(tmp_path, "b", 90)
    assert len(mixed(tmp_path, a, b)["train"]) == 100
    train = mixed(tmp_path, f"{a}=1", {"path": b, "fraction": 3})["train"]
    assert [row["prompt"][0]["content"][0] for row in train] == ["a"] * 10 + ["b"] * 30
    with pytest.raises(DataError, match="of 10 rows none is of .*b.jsonl: give it a larger fraction"):
        mixed(tmp_path, f"{a}=0.99", f"{b}=0.01")
    odd = prompts(tmp_path, "v=2", 5)
    assert len(mixed(tmp_path, odd, a)["train"]) == 15 and len(mixed(tmp_path, f"{odd}=1", f"{a}=1")["train"]) == 10
    datasets = mixed(tmp_path, f"{a}=0.5", f"{b}=0.5", evaluate=True)
    assert len(datasets["train"]) + len(datasets["eval"]) == 20
    assert list(datasets.reports) == ["train 1", "train 2"]
    assert f"{b}: 90 rows in, 90 out" in capsys.readouterr().err


def test_mixed_sources_have_their_own_schema_and_mapping(tmp_path):
    write_jsonl(tmp_path / "own.jsonl", [{"ask": "q", "reply": "a", "messages": 5}])
    write_jsonl(tmp_path / "tools.jsonl", [{"messages": TOOL_TALK, "tools": [{"type": "function"}]}])
    own = {"path": str(tmp_path / "own.jsonl"), "mapping": {"prompt": "ask", "completion": "reply"}}
    train = mixed(tmp_path, own, str(tmp_path / "tools.jsonl"), task="sft")["train"]
    assert train.to_list() == [
        {"messages": [user("q"), assistant("a")], "tools": None},
        {"messages": TOOL_TALK, "tools": '[{"type": "function"}]'},
    ]


@pytest.mark.parametrize(
    "sources, message",
    [
        (["a.jsonl=0.5", "b.jsonl"], "give every source a fraction, or none"),
        (["a.jsonl=much"], "a.jsonl=much: no such file or folder"),
        ([{"path": "a.jsonl", "fraction": -1}], "the fraction of a.jsonl is -1; expected more than 0"),
        ([{"path": "a.jsonl", "weight": 1}], "found {'path': 'a.jsonl', 'weight': 1}"),
        ([{"name": "a.jsonl"}], "a source has path"),
        ([5], "a source has path and perhaps more .*found 5"),
        (["missing.jsonl"], "missing.jsonl: no such file or folder"),
    ],
)
def test_wrong_mixtures_are_refused(tmp_path, sources, message):
    with pytest.raises(DataError, match=message):
        mixed(tmp_path, *sources)


def test_names_of_sources_may_be_numbers():
    assert (Source.parse("2024").path, Source.parse("2024").fraction) == ("2024", None)
    source = Source.parse({"path": "a.jsonl", "name": 2024, "split": 1})  # as YAML reads them
    assert (source.name, source.split) == ("2024", "1")


def test_no_dataset_is_refused():
    with pytest.raises(DataError, match="set --dataset_name"):
        load_formatted("sft", Script(None), FormattingArguments())


def test_streams_cannot_be_split_but_can_be_mixed(tmp_path):
    a, b = prompts(tmp_path, "a", 10), prompts(tmp_path, "b", 10)
    script = Script(a)
    script.dataset_streaming = True
    with pytest.raises(DataError, match="a stream cannot be split"):
        load_formatted("prompt", script, FormattingArguments(), evaluate=True)
    both = load_formatted("prompt", script, FormattingArguments(datasets=[a, b]))["train"]
    assert len(list(both)) == 20
    mixed_stream = load_formatted("prompt", script, FormattingArguments(datasets=[f"{a}=1", f"{b}=1"]))["train"]
    assert {row["prompt"][0]["content"][0] for row in mixed_stream} == {"a", "b"}


def test_mixed_streams_keep_tool_calls_and_fill_their_reports(tmp_path):
    """Columns were guessed from the first rows, and what they had not was dropped, or could not be mixed."""
    plain = {"messages": [user("q"), assistant("a")]}
    late = write_jsonl(tmp_path / "late.jsonl", [plain] * 20 + [{"messages": TOOL_TALK, "tools": [{"name": "f"}]}])
    script = Script(None)
    script.dataset_streaming = True
    for rows in ([plain], [{"messages": TOOL_TALK}]):
        sources = [str(late), str(write_jsonl(tmp_path / "other.jsonl", rows))]
        datasets = load_formatted("sft", script, FormattingArguments(datasets=sources))
        train = list(datasets["train"])
        assert [report.rows_in for report in datasets.reports.values()] == [21, 1]
        assert train[20] == {"messages": TOOL_TALK, "tools": '[{"name": "f"}]'}
        assert train[21] == {**rows[0], "tools": None}


def test_many_duplicates_are_all_found():
    rows = [{"prompt": str(number % 3000)} for number in range(9000)]
    dataset, report = format_dataset(rows, "prompt", dedup="drop")
    assert len(dataset) == 3000 and report.counts["skipped"] == {"duplicate": 6000}
    assert [row["prompt"][0]["content"] for row in dataset] == [str(number) for number in range(3000)]


def test_a_late_first_readable_row_is_still_detected(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("broken\n" * 150 + '{"prompt": "q"}\n')
    with pytest.raises(DataError, match="150 of 151 rows cannot be used") as caught:
        format_dataset(load_rows(path), "prompt")
    assert caught.value.report.rows_out == 1


def test_prompts_lose_a_trailing_answer_and_say_so():
    _, report = format_dataset([{"prompt": [user("q"), assistant("a")]}], "prompt")
    assert [flag["flag"] for flag in report.flags] == ["the answer at the end of the prompt was left out"]


def test_the_fingerprint_is_of_the_content(tmp_path):
    one = format_dataset([RANKED], "preference")
    two = format_dataset([{**RANKED, "id": 5}], "preference")
    other = format_dataset([RANKED], "ranking")
    assert one[0]._fingerprint == one[1].fingerprint == two[1].fingerprint != other[1].fingerprint


def test_saved_and_parquet_datasets_are_read_back(tmp_path):
    dataset = format_dataset([RANKED], "preference")[0]
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "pairs.parquet")
    for source in (tmp_path / "saved", tmp_path / "pairs.parquet"):
        assert formatted(load_rows(source), "preference") == dataset.to_list()
