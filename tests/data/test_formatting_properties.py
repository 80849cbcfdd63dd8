"""Any row formats to a valid row, or is skipped with a reason, or is refused by file, row and column."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.data.report import Report
from recipes.data.schemas import SCHEMAS
from recipes.data.tasks import row_messages
from recipes.formatting import DataError, Formatter, load_rows

FIXTURES = [json.loads(path.read_text("utf-8")) for path in Path(__file__).parent.glob("fixtures/*.json")]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["user", "gpt", "tool", "\n\nHuman: x\n\nAssistant: y", "[]", '["a"]', "1", "nan", "### Human: a"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def places(value, path=()):
    """The path of every cell, at any depth."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


@st.composite
def mutated(draw):
    """A fixture and one of its rows after a few cells were replaced, removed or doubled."""
    fixture = draw(st.sampled_from(FIXTURES))
    row = copy.deepcopy(draw(st.sampled_from(fixture["rows"])))
    for _ in range(draw(st.integers(0, 3))):
        *path, key = draw(st.sampled_from([path for path in places(row) if path] or [("new",)]))
        parent = row
        for part in path:
            parent = parent[part]
        action = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if action == "replace" or key == "new":
            parent[key] = draw(VALUES)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
    return fixture, row


def texts(value):
    """Every text in a row, those inside of JSON text too."""
    if isinstance(value, str):
        yield value
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return
        if not isinstance(inner, str | int | float | bool | None):
            yield from texts(inner)
    elif isinstance(value, dict | list):
        blocks = {key: item for key, item in value.items() if key != "type"} if isinstance(value, dict) else None
        for item in value if blocks is None else blocks.values():
            yield from texts(item)


def check_valid(output, task):
    """What TRL's trainers and chat templates rely on."""
    columns = {"sft": {"messages"}, "prompt": {"prompt"}, "ranking": {"prompt", "completions", "ranks", "group_id"}}
    expected = columns.get(task, {"prompt", "chosen", "rejected", "group_id"})
    assert output.keys() - {"tools"} == expected
    for turn in row_messages(output):
        assert isinstance(turn["content"], str) and None not in turn.values()
        assert turn["content"].strip() or turn["role"] == "tool" or turn.get("tool_calls")
    answers = [output[column] for column in ("chosen", "rejected") if column in output] + output.get("completions", [])
    talks = [output["prompt"] + answer for answer in answers] or [output.get("messages") or output["prompt"]]
    for talk in talks:
        after = [turn["role"] for turn in talk[1:]] + [None]  # calls and results of tools stand inside of a turn
        roles = [turn["role"] for turn, then in zip(talk, after, strict=True) if "tool" not in (turn["role"], then)]
        assert roles[roles[0] == "system" :: 2] == ["user"] * len(roles[roles[0] == "system" :: 2])
        assert set(roles) <= {"system", "user", "assistant"}
        assert talk[-1]["role"] == ("user" if task == "prompt" else "assistant")
    if task == "ranking":
        assert output["ranks"] == sorted(output["ranks"]) and len(set(output["ranks"])) > 1
    if task == "preference":
        assert [turn["content"].strip() for turn in output["chosen"]] != [
            turn["content"].strip() for turn in output["rejected"]
        ]
    json.dumps(output, allow_nan=False, ensure_ascii=False).encode("utf-8")


def check_one(fixture, row, task, schema):
    report = Report("rows", task)
    outputs = []
    try:
        outputs = [output for _, output in Formatter(task, schema=schema)([row], report)]
        assert outputs
    except DataError as error:
        assert report.errors or report.skipped, str(error)
        assert all(entry["file"] == "rows" and entry["line"] == 1 for entry in report.errors + report.skipped)
    for output in outputs:
        check_valid(output, task)


@given(mutated(), st.booleans())
@QUICK
def test_any_row_formats_or_is_skipped_or_refused(case, asked):
    fixture, row = case
    before = repr(row)
    for task in SCHEMAS[fixture["schema"]].tasks:
        check_one(fixture, row, task, fixture["schema"] if asked else fixture.get("ask", "auto"))
        assert repr(row) == before


AWKWARD = [
    None,
    True,
    0,
    -1.5,
    10**400,
    float("nan"),
    "",
    " ",
    "x",
    "\ud800",
    "[]",
    "[1]",
    "nan",
    [],
    [None],
    [[]],
    {},
    {"a": None},
]


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture["dataset"])
def test_every_cell_may_hold_anything(fixture):
    for path in list(places(fixture["rows"][0])):
        for value in AWKWARD if path else ():
            row = copy.deepcopy(fixture["rows"][0])
            parent = row
            for part in path[:-1]:
                parent = parent[part]
            parent[path[-1]] = value
            for task in SCHEMAS[fixture["schema"]].tasks:
                check_one(fixture, row, task, fixture["schema"])


def _talk(draw_text):
    turn = st.tuples(draw_text, draw_text)
    return st.lists(turn, min_size=1, max_size=3).map(
        lambda pairs: [
            {"role": role, "content": said}
            for pair in pairs
            for role, said in zip(("user", "assistant"), pair, strict=True)
        ]
    )


@given(st.lists(_talk(st.text(min_size=1).filter(str.strip)), min_size=1, max_size=5))
@QUICK
def test_messages_are_never_changed(talks):
    report = Report("rows", "sft")
    outputs = [output for _, output in Formatter("sft")([{"messages": talk} for talk in talks], report)]
    assert outputs == [{"messages": talk} for talk in talks]
    cut = Formatter("sft", prompt_completion=True)([{"messages": talk} for talk in talks], Report("rows", "sft"))
    assert [output["prompt"] + output["completion"] for _, output in cut] == talks


@given(mutated())
@QUICK
def test_every_output_text_stands_in_the_row(case):
    """Also joined or cut, a text is made of what the row holds."""
    fixture, row = case
    if fixture["schema"] == "summarize_comparisons":  # whose prompt has headings
        return
    for task in SCHEMAS[fixture["schema"]].tasks:
        try:
            outputs = [output for _, output in Formatter(task, schema=fixture["schema"])([row], Report("rows", task))]
        except DataError:
            continue
        held = list(texts(row))
        for output in outputs:
            for turn in row_messages(output):
                parts = [turn["content"], *turn["content"].split("\n\n")]
                whole = any(turn["content"] in text for text in held)
                blocks = "".join(held).find(turn["content"]) >= 0
                assert whole or blocks or all(any(part in text for text in held) for part in parts[1:])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_any_file_is_read_or_refused(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    seeds = [json.dumps(fixture["rows"]).encode() for fixture in FIXTURES[:5]]
    seeds += [b"\n".join(json.dumps(row).encode() for row in fixture["rows"]) for fixture in FIXTURES[:5]]
    seeds += [b'prompt,completion\nq,a\n"q, q",a\n', b"prompt;a\n", b""]

    @given(st.sampled_from(seeds), st.integers(0, 200), st.binary(max_size=6), st.integers(0, 3))
    @QUICK
    def check(raw, at, inserted, removed):
        path.write_bytes(raw[:at] + inserted + raw[at + removed :])
        for task in ("sft", "preference", "prompt"):
            report = Report(str(path), task)
            try:
                for row, output in Formatter(task)(load_rows(path), report):
                    assert row.file == str(path) and row.line >= 1
                    check_valid(output, task)
            except DataError as error:
                assert str(path) in str(error)
                assert all(entry["file"] == str(path) and entry["line"] >= 1 for entry in report.errors)

    check()
