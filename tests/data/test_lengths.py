"""Every row is rendered and measured before training: what the template refuses, what does not fit, what is cut."""

import json

import pytest
from trl import ScriptArguments, SFTConfig, SFTTrainer

from recipes.data.splits import split_by_group
from recipes.formatting import DataError, FormattingArguments, format_dataset, load_formatted
from recipes.models.tokenization import PLAIN_CHAT_TEMPLATE
from scripts import inspect_dataset
from tests import tiny_models as models
from tests.conftest import write_jsonl

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.fixture
def tokenizer():
    return models.word_tokenizer()


def words(number: int) -> str:
    return " ".join(["w1"] * number)


def demonstration(prompt: int, answer: int) -> dict:
    """A row of `prompt` + 3 tokens of context and `answer` + 1 trained ones, by the template of the tiny models."""
    return {"prompt": words(prompt), "completion": words(answer)}


def ranking(*lengths: int, ranks=None) -> dict:
    texts = [{"text": f"{words(length)} w{i}", "rank": (ranks or range(1, 9))[i]} for i, length in enumerate(lengths)]
    return {"prompt": "w1", "responses": texts}


@pytest.mark.parametrize("task", ["prompt", "sft", "ranking"])
def test_a_row_that_the_template_refuses_is_named(tokenizer, task):
    tokenizer.chat_template = NO_SYSTEM + tokenizer.chat_template
    row = {"prompt": demonstration(2, 2), "sft": demonstration(2, 2), "ranking": ranking(1, 2)}[task]
    rows = [row] * 6 + [{"system": "w3", **row}] + [row] * 13
    with pytest.raises(DataError, match=r"rows:7: the chat template does not take .*System role not supported"):
        format_dataset(rows, task, tokenizer=tokenizer)
    dataset, report = format_dataset(rows, task, tokenizer=tokenizer, on_error="skip")
    assert len(dataset) == report.rows_out == 19
    assert [entry["line"] for entry in report.skipped] == [7]


SAYS_ALL = (
    "{% if tools %}{{ tools | tojson }} {% endif %}{% for m in messages %}{{ '<' + m.role + '> ' }}"
    "{% if m.reasoning_content %}{{ m.reasoning_content + ' ' }}{% endif %}{{ m.content + ' ' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }} {% endif %}{{ '<eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
USER, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


LLAMA = "not (m.tool_calls and m.content)"  # as Llama 3.1, which writes the call alone


@pytest.mark.parametrize(
    "turns, tools, template, left_out",
    [
        ([{"role": "system", "content": "w3"}, USER, ANSWER], None, "m.role != 'system'", "system messages"),
        ([USER, {"role": "assistant", "tool_calls": [CALL]}], None, "", "tool calls"),
        ([USER, ANSWER], [CALL], "", "the list of tools"),
        (
            [USER, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": "w3"}, ANSWER],
            None,
            "m.role != 'tool'",
            "tool results",
        ),
        ([USER, {**ANSWER, "tool_calls": [CALL, CALL]}], None, None, "all but one of a turn's calls"),
        ([USER, {**ANSWER, "tool_calls": [CALL]}], None, LLAMA, "what is said beside tool calls"),
    ],
)
def test_what_a_template_leaves_out_without_an_error_is_said(tokenizer, turns, tools, template, left_out):
    """Our own plain template left out the calls: rows of them trained empty answers."""
    row = {"messages": turns, **({"tools": tools} if tools else {})}
    rows = [{"messages": [USER, ANSWER]}, row]
    tokenizer.chat_template = SAYS_ALL
    assert len(format_dataset(rows, "sft", tokenizer=tokenizer)[0]) == 2
    if template:
        tokenizer.chat_template = SAYS_ALL.replace("in messages %}", f"in messages if {template} %}}")
    elif template is None:  # as gpt-oss
        tokenizer.chat_template = SAYS_ALL.replace("m.tool_calls |", "m.tool_calls[0] |")
    else:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    with pytest.raises(DataError, match=f"rows:2: the chat template leaves out {left_out}, and this row has some"):
        format_dataset(rows, "sft", tokenizer=tokenizer)


def test_reasoning_that_a_template_leaves_out_is_flagged(tokenizer):
    rows = [{"messages": [USER, {**ANSWER, **said}]} for said in ({"thinking": "w3"}, {"content": "w3 </think> w2"})]
    tokenizer.chat_template = SAYS_ALL.replace("m.reasoning", "false and m.reasoning").replace(
        "m.content +", "m.content.split('</think>')[-1] +"
    )
    _, report = format_dataset(rows, "sft", tokenizer=tokenizer)
    assert [entry["flag"] for entry in report.flags] == ["the chat template leaves out reasoning"] * 2
    tokenizer.chat_template = SAYS_ALL
    assert format_dataset(rows, "sft", tokenizer=tokenizer)[1].flags == []


def test_a_prompt_that_a_template_renders_anew_is_flagged(tokenizer):
    """As gpt-oss does with reasoning before the result of a tool: what follows it in the prompt is trained too."""
    first = {"role": "assistant", "content": "w2", "reasoning_content": "w3"}
    rows = [{"messages": [USER, ANSWER, USER, ANSWER]}, {"messages": [USER, first, USER, ANSWER]}]
    tokenizer.chat_template = SAYS_ALL.replace("if m.reason", "if messages|length < 4 and m.reason")
    _, report = format_dataset(rows, "sft", tokenizer=tokenizer, prompt_completion=True)
    (entry,) = report.flags
    assert entry["line"] == 2 and entry["flag"].startswith("the chat template renders the prompt otherwise before an")
    tokenizer.chat_template = SAYS_ALL.replace("'<assistant> '", "'<assistant> w9 '")  # as the start of `<think>`
    assert format_dataset(rows, "sft", tokenizer=tokenizer, prompt_completion=True)[1].flags == []


def test_answers_that_a_template_leaves_out_are_not_trained(tokenizer):
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }} {% endfor %}<assistant>"
    with pytest.raises(DataError, match="rows:1: the chat template leaves nothing of the answer"):
        format_dataset([demonstration(2, 2)], "sft", tokenizer=tokenizer, prompt_completion=True)
    with pytest.raises(DataError, match=r"the chat template makes all responses equal \(1, first at rows:1"):
        format_dataset([ranking(2, 3)], "ranking", tokenizer=tokenizer)


def test_a_prompt_needs_room_for_its_completion(tokenizer):
    rows = [{"prompt": words(length)} for length in (3, 109, 110)]  # the template adds three tokens
    options = {"tokenizer": tokenizer, "positions": 128, "completion_length": 16}
    with pytest.raises(
        DataError, match=r"rows:3: 113 tokens and --max_completion_length 16 are more than the 128 pos"
    ):
        format_dataset(rows, "prompt", **options)
    _, report = format_dataset(rows, "prompt", on_error="skip", **options)
    assert (report.rows_out, report.tokens) == (2, 6 + 112)


def test_a_demonstration_longer_than_the_positions_is_an_error_unless_it_is_cut(tokenizer):
    rows = [demonstration(2, 2), demonstration(2, 140)]
    with pytest.raises(DataError, match="rows:2: .* are more than the 128 positions of the model"):
        format_dataset(rows, "sft", tokenizer=tokenizer, positions=128)
    assert format_dataset(rows, "sft", tokenizer=tokenizer, positions=128, cut_at=64)[1].rows_out == 2


def test_what_sft_cuts_and_leaves_out_is_what_trl_does(tokenizer, tmp_path):
    rows = [demonstration(prompt, 1 + prompt % 3) for prompt in range(2, 22)]
    options = {"tokenizer": tokenizer, "prompt_completion": True}
    dataset, report = format_dataset(rows, "sft", **options, cut_at=16)
    everything, _ = format_dataset(rows, "sft", **options)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=16)
    trl = [
        SFTTrainer(models.causal_lm(), args, train_dataset=part, processing_class=tokenizer).train_dataset
        for part in (everything, dataset)
    ]
    assert trl[0].to_list() == trl[1].to_list() and 0 < len(dataset) < len(rows)
    assert report.rows_out == len(dataset) and report.tokens == sum(map(len, trl[1]["input_ids"]))
    assert report.counts["skipped"] == {
        "nothing to train: the prompt fills max_length=16 tokens": len(rows) - len(dataset)
    }
    cut = [
        row
        for row in everything
        if len(tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]) > 16
    ]
    assert report.counts["flags"] == {"cut at max_length=16 tokens": len(cut) - (len(rows) - len(dataset))}


def test_nothing_but_long_rows_is_one_clear_line(tokenizer):
    rows = [demonstration(30, 2)] * 3
    with pytest.raises(DataError, match=r"none of 3 rows is of use for 'sft': nothing to train: .* max_length=16"):
        format_dataset(rows, "sft", tokenizer=tokenizer, prompt_completion=True, cut_at=16)


def test_single_responses_that_are_too_long_are_counted(tokenizer):
    rows = [ranking(1, 2, 40), ranking(1, 40), ranking(1, 2, 40, ranks=[1, 1, 2]), ranking(3, 1)]
    dataset, report = format_dataset(rows, "ranking", tokenizer=tokenizer, cut_at=20)
    assert [row["ranks"] for row in dataset] == [[1.0, 2.0], [1.0, 2.0]]
    assert report.counts["skipped"] == {
        "a response is longer than max_length=20 tokens": 1,
        "fewer than two responses of unequal rank within max_length=20 tokens": 2,
    }
    assert [entry["line"] for entry in report.skipped] == [1, 2, 3]


def test_inspection_renders_every_row_not_only_those_it_shows(tiny_base, tmp_path, capsys):
    rows = [{"prompt": "Name a pet."}] * 9 + [{"prompt": "pet " * 2000}]
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    assert inspect_dataset.main([data, "--task", "prompt", "--tokenizer", tiny_base]) == 1
    assert "prompts.jsonl:10: " in (said := capsys.readouterr().err) and "positions of the model" in said


@pytest.mark.parametrize("prompts", [2, 5, 6, 8, 10])
@pytest.mark.parametrize("seed", range(4))
def test_at_least_one_prompt_is_on_each_side(prompts, seed):
    rows = [{"prompt": f"w{number}"} for number in range(prompts) for _ in range(2)]
    for size in (0.01, 0.1, 0.99):
        parts = split_by_group(format_dataset(rows, "prompt")[0], size, seed)
        texts = [{row["prompt"][0]["content"] for row in part} for part in parts]
        assert texts[0] and texts[1] and not texts[0] & texts[1]
        assert sum(map(len, parts)) == 2 * prompts


def test_one_prompt_is_trained_without_evaluation_and_says_so(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rankings.jsonl", [ranking(1, 2), ranking(3, 1)])
    datasets = load_formatted("ranking", ScriptArguments(path), FormattingArguments(), evaluate=True)
    assert list(datasets) == ["train"] and len(datasets["train"]) == 2
    assert "only one prompt" in capsys.readouterr().err


def test_the_report_on_disk_counts_tokens(tokenizer, tmp_path):
    _, report = format_dataset([demonstration(2, 3)], "sft", tokenizer=tokenizer)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["tokens"] == 9
