"""Keys and columns that change what a row means are used, or the row is left out by name; the rest is reported."""

import csv
import json
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from recipes.data.converters import Dialogue
from recipes.data.mapping import parse_mapping
from recipes.data.schemas import SCHEMAS, Schema
from recipes.formatting import DataError, format_dataset, load_rows


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def call(name="rain", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


GOOD = {"messages": [user("good"), assistant("row")]}
TURNS = [user("q"), assistant("a")]
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
CALLING = {"role": "assistant", "tool_calls": [call(city="Oslo"), call(city="Bergen")]}
RESULTS = [{"role": "tool", "name": "rain", "content": answer} for answer in ("no", "yes")]
TALK = [user("Rain?"), {**CALLING, "content": ""}, *RESULTS, assistant("In Bergen.")]


def skipped(row, task="sft", good=GOOD, **options):
    dataset, report = format_dataset([good, row], task, **options)
    assert len(dataset) == report.rows_out == 1
    (entry,) = report.skipped
    assert entry["line"] == 2
    return entry["column"], entry["reason"]


def test_a_tool_call_needs_no_content():
    """TRL's documented form, and OpenAI's older one."""
    old = {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": '{"city": "Oslo"}'}}
    rows = [
        {"messages": [user("Rain?"), CALLING, *RESULTS, assistant("In Bergen.")], "tools": json.dumps([call()])},
        {"messages": [user("Rain?"), CALLING], "tools": [call()]},
        {"prompt": [user("Rain?")], "completion": [CALLING], "tools": [call()]},
        {
            "messages": [user("Rain?"), old, {"role": "function", "name": "rain", "content": "no"}, assistant("No.")],
            "functions": [{"name": "rain"}],
        },
    ]
    dataset, report = format_dataset(rows[:2], "sft")
    assert report.skipped == [] and [row["messages"] for row in dataset] == [TALK, TALK[:2]]
    (row,) = format_dataset(rows[2:3], "sft")[0]
    assert row == {"messages": TALK[:2], "tools": json.dumps([call()])}
    (row,) = format_dataset(rows[3:], "sft")[0]
    assert row["messages"][1]["tool_calls"] == [
        {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
    ]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(row["tools"]) == [{"type": "function", "function": {"name": "rain"}}]


@pytest.mark.parametrize("given, kept", [('{"city": "Oslo"}', {"city": "Oslo"}), ("{", "{"), ("7", "7"), (None, None)])
def test_arguments_of_tool_calls_are_objects(given, kept):
    """As text, of which OpenAI's files are full, most chat templates quote them once more."""
    talk = [user("Rain?"), {**CALLING, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": given}}]}]
    (row,) = format_dataset([{"messages": talk}], "sft")[0]
    assert row["messages"][1]["tool_calls"] == [{"id": "1", "function": {"name": "f", "arguments": kept}}]


def test_tools_are_objects():
    """Also where each is JSON text, which chat templates would quote; a mere name is none."""
    row = {"messages": [user("q"), assistant("a")], "tools": [json.dumps(call())]}
    assert json.loads(format_dataset([row], "sft")[0][0]["tools"]) == [call()]
    with pytest.raises(DataError, match=r"rows:1:tools\[0\]: found the text 'rain', expected an object"):
        format_dataset([{**row, "tools": ["rain"]}], "sft")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_kept_under_every_name(key):
    turns = [user("q"), assistant("a", **{key: "because"})]
    assert format_dataset([{"messages": turns}], "sft")[0].to_list()[0]["messages"] == turns
    pair = {"prompt": "q", "chosen": turns[1:], "rejected": "b"}
    assert skipped(pair, "preference", PAIR)[1] == "reasoning is supported for task 'sft' only"


@pytest.mark.parametrize("task, good", [("sft", GOOD), ("prompt", GOOD), ("preference", PAIR), ("ranking", PAIR)])
@pytest.mark.parametrize(
    "column, value",
    [
        ("images", ["a.png"]),
        ("image", {"bytes": None, "path": "a.png"}),
        ("videos", '["a.mp4"]'),
        ("audio", "a.wav"),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_columns_that_cannot_be_used_leave_the_row_out(task, good, column, value):
    row = {**good, column: value} if task != "sft" else {"messages": [user("q"), assistant("a")], column: value}
    assert skipped(row, task, good) == (column, f"{column} cannot be used")
    for nothing in (None, "", [], {}):
        assert len(format_dataset([{**good, column: nothing}], task)[0]) == 1


@pytest.mark.parametrize(
    "key, value", [("images", ["a.png"]), ("audio", {"id": "x"}), ("prefix", True), ("partial", 1)]
)
def test_keys_of_messages_that_cannot_be_used_leave_the_row_out(key, value):
    row = {"messages": [user("q"), assistant("a", **{key: value})]}
    assert skipped(row) == (f"messages[1].{key}", f"{key} cannot be used")
    assert skipped(row, "prompt")[0] == f"messages[1].{key}"
    assert len(format_dataset([{"messages": [user("q"), assistant("a", **{key: False})]}], "sft")[0]) == 1


def test_an_image_in_a_text_is_never_trained_as_text():
    for task, good, row in (
        ("sft", GOOD, {"messages": [user("<image>What is this?"), assistant("A cat.")]}),
        ("prompt", GOOD, {"messages": [user("<image>What is this?"), assistant("A cat.")]}),
        ("preference", PAIR, {**PAIR, "prompt": "<image>\nWhat is this?"}),
    ):
        assert skipped(row, task, good)[1] == "<image> stands for an image, which cannot be used"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("q"), assistant("bad")]},  # LLaMA-Factory's KTO
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad"}]},
        {"prompt": "q", "completion": "bad"},  # TRL's unpaired preferences
        {"instruction": "q", "output": "bad"},
    ],
)
@pytest.mark.parametrize("column, value", [("label", False), ("label", 0), ("label", "false"), ("kto_tag", False)])
def test_bad_answers_are_not_trained_but_their_prompts_are_prompts(row, column, value):
    bad, good = {**row, column: value}, {**row, column: True}
    assert skipped(bad, good=good) == (column, "labelled as a bad completion")
    assert format_dataset([bad], "prompt")[0].to_list() == [{"prompt": [user("q")]}]
    with pytest.raises(DataError, match=f"rows:2:{column}: found the text 'neutral', expected true or false"):
        format_dataset([good, {**row, column: "neutral"}], "sft")


@pytest.mark.parametrize("column, value", [("weight", 0), ("sample_weight", 0.0), ("train", False), ("masked", True)])
def test_rows_that_are_not_to_be_learned_are_left_out(column, value):
    reason = f"{column} says that the row is not to be learned"
    assert skipped({"messages": [user("q"), assistant("a")], column: value}) == (column, reason)
    assert skipped({**PAIR, column: value}, "preference", PAIR) == (column, reason)
    with pytest.raises(DataError, match=f"rows:2:{column}: found 0.5"):
        format_dataset([GOOD, {**GOOD, column: 0.5}], "sft")


def test_a_schema_may_read_such_a_column_itself(monkeypatch):
    def convert(row, roles):
        return Dialogue([user(row["text"]), assistant(row["label"])])

    monkeypatch.setitem(SCHEMAS, "own", Schema(("sft",), ("text", "label"), convert))
    row = {"text": "q", "label": "neutral"}
    assert format_dataset([row], "sft")[0].to_list() == [{"messages": [user("q"), assistant("neutral")]}]
    with pytest.raises(DataError, match="rows:1:label: found the text 'neutral'.*; a --dataset_mapping without it"):
        format_dataset([{**GOOD, **row}], "sft", schema="messages")


def test_tools_outside_of_sft_leave_the_row_out():
    reason = (None, "tool calls are supported for task 'sft' only")
    assert skipped({"prompt": "r", "tools": [call()]}, "prompt", {"prompt": "q"}) == reason
    assert skipped({**PAIR, "tools": [call()]}, "preference", PAIR) == reason


# What is trained of u1 a1 u2 a2 u3 a3, by the turns that are masked: the last turn, and every assistant turn.
MASKS = [
    ([], [("u1 a1 u2 a2 u3", "a3")], [("u1", "a1 u2 a2 u3 a3")]),
    ([0], [("u1 a1 u2 a2 u3", "a3")], [("u1 a1 u2", "a2 u3 a3")]),
    ([1], [("u1 a1 u2 a2 u3", "a3")], [("u1", "a1"), ("u1 a1 u2 a2 u3", "a3")]),
    ([2], [("u1 a1 u2", "a2")], [("u1", "a1 u2 a2")]),
    ([1, 2], [("u1", "a1")], [("u1", "a1")]),
    ([0, 2], [("u1 a1 u2", "a2")], [("u1 a1 u2", "a2")]),
]


def masked_talk(masked, key="weight", no=0, yes=1):
    turns = []
    for number in range(3):
        turns += [user(f"u{number + 1}"), assistant(f"a{number + 1}", **{key: no if number in masked else yes})]
    return {"messages": turns}


@pytest.mark.parametrize("masked, last, every", MASKS)
def test_answers_with_weight_0_are_not_trained(masked, last, every):
    for only, expected in ((False, last), (True, every)):
        options = {"prompt_completion": True, "assistant_only_loss": only}
        dataset, report = format_dataset([masked_talk(masked)], "sft", **options)
        parts = [[row["prompt"], row["completion"]] for row in dataset]
        assert all(turn.keys() == {"role", "content"} for row in parts for part in row for turn in part)
        assert [tuple(" ".join(turn["content"] for turn in part) for part in row) for row in parts] == expected
        flag = "answers with weight 0 are not trained"
        assert [entry["flag"] for entry in report.flags] == ([flag] * len(dataset) if masked else [])


def test_messages_whose_masked_answer_would_be_trained_are_left_out():
    dataset, _ = format_dataset([masked_talk([2])], "sft")
    assert [turn["content"] for turn in dataset[0]["messages"]] == ["u1", "a1", "u2", "a2"]
    for masked in ([0], [1], [0, 2]):
        assert "cannot mask it" in skipped(masked_talk(masked))[1]
    assert skipped(masked_talk([0, 1, 2]))[1] == "every answer has weight 0"
    assert format_dataset([masked_talk([1, 2])], "prompt")[0][0]["prompt"][-1] == user("u3")


@pytest.mark.parametrize(
    "key, no, yes",
    [
        ("weight", 0.0, None),
        ("weight", False, 1.0),
        ("train", False, True),
        ("loss", False, True),
        ("masked", True, 0),
    ],
)
def test_every_way_to_mask_an_answer(key, no, yes):
    (row,) = format_dataset([masked_talk([2], key, no, yes)], "sft", prompt_completion=True)[0]
    assert row["completion"] == [assistant("a2")]
    with pytest.raises(DataError, match=rf"rows:2:messages\[3\].{key}: found 0.5"):
        format_dataset([GOOD, masked_talk([1], key, 0.5, yes)], "sft")
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: no}]
    assert skipped({"conversations": said}, good={"conversations": said[:1] + [{"from": "gpt", "value": "b"}]})[1] == (
        "every answer has weight 0"
    )


def test_a_response_with_weight_0_is_not_preferred():
    row = {"prompt": "q", "chosen": [assistant("a", weight=0)], "rejected": "b"}
    assert skipped(row, "preference", PAIR)[1] == "a response has weight 0"
    row = {"prompt": [user("q"), assistant("a", weight=0), user("r")], "chosen": "a", "rejected": "b"}
    assert format_dataset([row], "preference")[0][0]["prompt"] == [user("q"), assistant("a"), user("r")]


def test_answers_in_a_prompt_are_context():
    talk = masked_talk([])["messages"]
    row = {"prompt": talk[:3], "completion": talk[3:4]}
    for only in (False, True):
        options = {"prompt_completion": True, "assistant_only_loss": only}
        assert format_dataset([row], "sft", **options)[0].to_list() == [
            {"prompt": [user("u1"), assistant("a1"), user("u2")], "completion": [assistant("a2")]}
        ]
        masked = {**row, "completion": [assistant("a2", weight=0)]}
        assert skipped(masked, good=row, **options)[1] == "every answer has weight 0"
    assert len(format_dataset([masked], "prompt")[0]) == 1


@pytest.mark.parametrize("assistant_only", [False, True])
def test_trl_trains_exactly_the_answers_that_have_a_weight(tiny_base, tmp_path, assistant_only):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [masked_talk(masked) for masked, _, _ in MASKS]
    options = {"prompt_completion": True, "assistant_only_loss": assistant_only}
    dataset, _ = format_dataset(rows, "sft", **options)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", assistant_only_loss=assistant_only)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    prepared = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    trained = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in prepared]
    kept = [[number for number in range(3) if number not in masked] for masked, _, _ in MASKS]
    if assistant_only:
        assert "".join(trained) == "".join(f"a{number + 1}<|end|>" for numbers in kept for number in numbers)
    else:
        assert trained == [f"a{numbers[-1] + 1}<|end|>" for numbers in kept]


def test_what_is_not_used_is_in_the_report(tmp_path):
    rows = [
        {"messages": [user("q"), assistant("a", name="Ann")], "category": "x", "images": None},
        {"messages": [{**user("r"), "id": 7}, assistant("b")], "category": "y", "source": "z"},
    ]
    _, report = format_dataset(rows, "sft")
    names = {"category": 2, "source": 1, "messages[].id": 1, "messages[].name": 1}
    assert report.to_dict()["not_used"] == names
    assert "not used: category, messages[].id, messages[].name, source" in str(report)
    rows = [{"question": {"text": "q"}, "best": "a", "worst": "b", "score": 3}]
    mapping = {"prompt": "question.text", "chosen": "best", "rejected": "worst"}
    assert format_dataset(rows, "preference", mapping=mapping)[1].unread == {"score": 1}
    options = {"mapping": {"prompt": "question.text"}, "keep_columns": ["score"]}
    assert format_dataset(rows, "prompt", **options)[1].unread == {"best": 1, "worst": 1}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -1},
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0},
        {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 0},
        {"data": {"prompt": "q", "answer1": "a", "answer2": "b"}, "annotations": [
            {"result": [{"type": "pairwise", "to_name": "answer1,answer2", "value": {"selected": "left"}}]}
        ]},
    ],
)  # fmt: skip
def test_a_system_column_is_used_whatever_the_schema_is(row, column):
    place = row["data"] if "data" in row else row
    place[column] = "Be brief."
    dataset, report = format_dataset([row], "preference")
    assert dataset[0]["prompt"] == [SYSTEM, user("q")] and dataset[0]["chosen"] == [assistant("a")]
    assert format_dataset([row], "prompt")[0].to_list() == [{"prompt": [SYSTEM, user("q")]}]
    del place[column]
    assert format_dataset([row], "preference")[0][0]["prompt"] == [user("q")]


def test_two_system_messages_that_differ_leave_the_row_out():
    row = {"system": "Be brief.", "messages": [{**SYSTEM, "content": "Be long."}, user("q"), assistant("a")]}
    for task in ("sft", "prompt"):
        assert skipped(row, task) == ("system", "the row has another system message too")
    row["messages"][0] = SYSTEM
    assert format_dataset([row], "sft")[0][0]["messages"] == row["messages"]
    row["history"] = [["q0", "a0"]]
    turns = [SYSTEM, user("q0"), assistant("a0"), user("q"), assistant("a")]
    assert format_dataset([row], "sft")[0][0]["messages"] == turns


def test_a_prompt_beside_whole_conversations_is_theirs():
    """Its system message is used; with another prompt the row is left out, since only one of the two can be meant."""
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    for prompt in ("q", " q ", "<|user|>q<|assistant|>", [user("q")], None):
        assert format_dataset([{**row, "prompt": prompt}], "preference")[0][0]["prompt"] == [user("q")]
    dataset, _ = format_dataset([{**row, "prompt": [SYSTEM, user("q")]}], "preference")
    assert dataset[0]["prompt"] == [SYSTEM, user("q")]
    for prompt in ("r", [user("r")], [SYSTEM, user("r")]):
        reason = "another prompt than that of the conversations in chosen and rejected"
        assert skipped({**row, "prompt": prompt}, "preference", {**row, "prompt": "q"}) == ("prompt", reason)
    with_system = {side: [{**SYSTEM, "content": "Be long."}, *row[side]] for side in row}
    good = {**row, "prompt": "q"}
    assert skipped({**with_system, "prompt": [SYSTEM, user("q")]}, "preference", good)[0] == "prompt"


@pytest.mark.parametrize(
    "row, column",
    [
        ({"prompt": json.dumps([user("q")]), "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "q", "chosen": json.dumps([assistant("a")]), "rejected": "b"}, "chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": json.dumps({"from": "gpt", "value": "b"})}, "rejected"),
    ],
)
def test_messages_as_json_text_are_no_text(row, column):
    with pytest.raises(DataError, match=f"rows:1:{re.escape(column)}: found messages written as JSON text"):
        format_dataset([row], "preference")


def test_messages_in_pythons_notation_are_no_text():
    """As pandas makes them of lists, in any kind of file: they were trained as what the assistant says."""
    for column in ("prompt", "chosen"):
        row = {"prompt": "q", "chosen": "a", "rejected": "b", column: str([assistant("it's")])}
        with pytest.raises(DataError, match=rf"rows:1:{column}: found the text .*expected messages that json.dumps"):
            format_dataset([row], "preference")
    with pytest.raises(DataError, match="rows:1:instruction: found the text .*expected messages that json.dumps"):
        format_dataset([{"instruction": str(TURNS), "output": "a"}], "sft")


@pytest.mark.parametrize(
    "answer", ['[{"role": "admin", "content": "x"}]', '{"from": "Oslo", "to": "Rome"}', '{"id": 1, "role": "user"}']
)
def test_an_answer_in_json_is_a_text(tmp_path, answer):
    """In CSV each was an error, since its keys are also those of messages."""
    text = {"prompt": 'Write [{"role": …}]', "completion": answer}
    assert format_dataset([text], "sft")[0][0]["messages"][1]["content"] == answer
    if "content" not in answer:
        with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([text, text.values()])
        assert format_dataset(load_rows(tmp_path / "data.csv"), "sft")[0][0]["messages"][1]["content"] == answer


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "input_audio", "input_audio": {"data": "x"}},
        {"type": "video", "video": "a.mp4"},
        {"type": "text", "text": "Look:", "image": "a.png"},
        {"type": "refusal", "refusal": "No."},
    ],
)
def test_a_block_that_is_not_text_is_named(block):
    row = {"messages": [user([{"type": "text", "text": "What is this?"}, block]), assistant("A cat.")]}
    with pytest.raises(DataError, match=rf"rows:2:messages\[0\].content: found a block of type '{block['type']}'"):
        format_dataset([GOOD, row], "sft")


@pytest.mark.parametrize(
    "better", ["score_chosen", "chosen-rating", "chosen_reward", "rm_score_chosen", "chosen_avg_rating"]
)
def test_scores_that_contradict_the_order_are_errors(better):
    worse = better.replace("chosen", "rejected")
    with pytest.raises(DataError, match=f"rows:1:{better}: 1 is lower than {worse} 3"):
        format_dataset([{**PAIR, better: 1, worse: 3}], "ranking")
    assert skipped({**PAIR, better: 2, worse: 2}, "ranking", PAIR) == (better, "tie: equal scores")
    assert len(format_dataset([{**PAIR, better: [1, 2], worse: [3, 4]}], "ranking")[0]) == 1
    with pytest.raises(DataError, match="rows:1:margin: -2 says that rejected is the better"):
        format_dataset([{**PAIR, "margin": -2, better: 3, worse: 1}], "ranking")


def test_a_text_beats_itself_in_no_ranking():
    """Its pair was trained by the reward recipe, and its accuracy could not count it as right."""
    row = {"prompt": "q", "responses": [{"text": text, "rank": rank} for rank, text in enumerate(["a", " a", "b"], 1)]}
    dataset, report = format_dataset([row], "ranking")
    assert [entry["reason"] for entry in report.skipped] == ["identical responses"]
    assert (dataset[0]["completions"], dataset[0]["ranks"]) == ([[assistant("a")], [assistant("b")]], [1.0, 3.0])
    assert skipped({**PAIR, "rejected": "a "}, "ranking", PAIR) == (None, "identical responses")
    row["responses"][1]["rank"] = 1
    assert format_dataset([row], "ranking")[1].skipped == []


def test_the_suggested_mapping_keeps_what_changes_the_meaning_of_a_row():
    rows = [{"prompt": "q", "response": "a", "label": label, "system": "s", "n": 1} for label in (True, False)]
    with pytest.raises(DataError, match="perhaps: --dataset_mapping") as caught:
        format_dataset(rows, "sft")
    line = str(caught.value).partition("--dataset_mapping ")[2]
    assert line == "prompt=prompt completion=response label=label system=system"
    _, report = format_dataset(rows, "sft", mapping=parse_mapping(line))
    assert [(entry["line"], entry["reason"]) for entry in report.skipped] == [(2, "labelled as a bad completion")]


def test_what_follows_a_question_is_part_of_it():
    for row in ({"question": "q", "context": "c", "chosen": "a", "rejected": "b"}, {"instruction": "q", "input": "c"}):
        assert format_dataset([row], "prompt")[0].to_list() == [{"prompt": [user("q\n\nc")]}]


def test_a_function_call_is_one_however_its_role_is_written():
    said = [{"from": "human", "value": "q"}, {"from": "Function_Call", "value": '{"name": "f", "arguments": {}}'}]
    (row,) = format_dataset([{"conversations": said}], "sft")[0]
    assert row["messages"][1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    masked = {"conversations": [said[0], {**said[1], "weight": 0}]}  # the mark was lost
    assert skipped(masked, good={"conversations": said})[1] == "every answer has weight 0"


def test_a_mapped_column_that_nothing_reads_is_an_error():
    rows = [{"q": "q", "a": "a", "persona": "Be brief."}]
    mapping = {"prompt": "q", "completion": "a", "system": "persona"}
    assert format_dataset(rows, "sft", mapping=mapping)[0][0]["messages"][0] == SYSTEM
    mapping["sytem"] = mapping.pop("system")
    with pytest.raises(DataError, match="rows:1:persona: mapped as sytem, which the schema has no use for"):
        format_dataset(rows, "sft", mapping=mapping)
    mapping["label"] = mapping.pop("sytem")  # it changes demonstrations, so a mapping for both steps may have it
    assert len(format_dataset(rows, "prompt", mapping=mapping)[0]) == 1


def test_names_of_unused_columns_have_a_limit(monkeypatch):
    """As where each row has columns of its own."""
    monkeypatch.setattr("recipes.data.formatter.KEPT", 30)
    _, report = format_dataset([{"prompt": "q", "x": 1, f"c{number:02}": 1} for number in range(100)], "prompt")
    assert len(report.unread) == 30 and report.unread["x"] == 100
    assert "c19, …" in str(report) and "c20" not in str(report)


@pytest.mark.parametrize(
    "row", [{"c": "a", "r": "a "}, {"c": "a", "r": ""}, {"c": TURNS, "r": TURNS}, {"c": "a", "r": "b", "x": 1, "y": 1}]
)
def test_a_tie_has_no_unused_columns(row):
    """Its columns were not all looked at, which says nothing of the schema."""
    mapping = {
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "margin": "m",
        "score_chosen": "x",
        "score_rejected": "y",
    }
    good = {"p": "q", "c": "a", "r": "b", "m": 1, "x": 2, "y": 1}
    _, report = format_dataset([good, good, {**good, **row}], "preference", mapping=mapping)
    assert report.unread == {} and [entry["line"] for entry in report.skipped] == [3]


def test_the_rest_of_an_object_that_a_mapping_reaches_into_is_reported():
    rows = [{"in": {"q": "q", "tools": [1], "deep": {"a": "a", "b": "b"}}}]
    _, report = format_dataset(rows, "sft", mapping={"prompt": "in.q", "completion": "in.deep.a"})
    assert report.unread == {"in.tools": 1}


@pytest.mark.parametrize("items", [["prompt=a", "prompt=b"], "prompt=a prompt=b", ['{"prompt": "a", "prompt": "b"}']])
def test_a_mapping_names_each_column_once(items):
    with pytest.raises(DataError, match="prompt.*twice"):
        parse_mapping(items)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": " a "},
        {"prompt": "q", "chosen": "a", "rejected": ""},
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1},
        {"chosen": TURNS, "rejected": TURNS},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: a"},
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": ""}},
        {"prompt": "q", "responses": [{"text": "a", "rank": 1}]},
        {"prompt": "q", "answers": []},
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
        {"prompt": "q", "response_0": "", "response_1": "b", "better_response_id": 0},
        {"winner": "tie", "conversation_a": TURNS, "conversation_b": [user("q"), assistant("b")]},
        {"winner": "model_a", "conversation_a": TURNS, "conversation_b": TURNS},
        {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 0, "score_1": 0},
        {"instruction": "q", "generations": ["a"], "ratings": [None]},
    ],
)
def test_a_prompt_is_of_use_whatever_its_responses_are(row):
    assert format_dataset([row], "prompt")[0].to_list() == [{"prompt": [user("q")]}]
    with pytest.raises(DataError, match="none of 1 row is of use for 'preference'"):
        format_dataset([row], "preference")


def test_no_row_of_use_names_the_column():
    with pytest.raises(DataError, match=r"of use for 'prompt': empty text \(2, first at rows:1:prompt\)"):
        format_dataset([{"prompt": ""}, {"prompt": None}], "prompt")


def test_responses_that_nobody_has_ranked_are_said_to_be_so():
    with pytest.raises(DataError, match=r"responses\[0\].rank: missing: rank the responses first"):
        format_dataset([{"prompt": "q", "responses": [{"text": "a"}, {"text": "b"}]}], "ranking")
