"""The rows of each task, on which TRL trains, made out of a `Dialogue` or a `Ranking`.

    sft         messages; or, with `prompt_completion`, prompt and completion, which is the last turn that is trained
    preference  prompt, chosen, rejected, group_id and, with `margin`, margin: one row per pair with unequal ranks
    ranking     prompt, completions (best first), ranks, group_id: one row per ranked prompt
    prompt      prompt, which ends with the user's turn

Columns are lists of {role, content}, except for numbers and `group_id`, a hash that is equal for equal prompts. SFT
rows of a source with tool calls also have `tools`, as JSON text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import groupby

from recipes.data.converters import Dialogue, Ranking
from recipes.data.messages import Messages, check_order, has_weights, without_weights
from recipes.data.rows import RowError, Skip


def outputs(
    example: Dialogue | Ranking,
    task: str,
    prompt_completion: bool = False,
    margin: bool = False,
    assistant_only_loss: bool = False,
) -> Iterator[dict | Skip]:
    """The rows for a task, and a `Skip` for each part of the example that is left out.

    Raises:
        Skip: the whole example is left out.
        RowError: `margin` is set, and the example has none.
    """
    if task == "prompt":
        yield {"prompt": _prompt(example)}
    elif task == "sft":
        assert isinstance(example, Dialogue), "the schema says that it serves sft"
        tools = {"tools": json.dumps(example.tools)} if example.tools else {}
        for row in _sft(example, prompt_completion, assistant_only_loss):
            yield row | tools
    else:
        assert isinstance(example, Ranking), f"the schema says that it serves {task}"
        yield from example.dropped
        ranking = _ranking(example)
        if task == "ranking":
            yield from _once(ranking)
        else:
            yield from _pairs(ranking, _margin(example) if margin else {})


def group_id(prompt: Messages) -> str:
    """16 hexadecimal digits that are equal for equal prompts."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


def row_messages(row: dict) -> Iterator[dict]:
    """All messages of a row of any task."""
    for column in ("messages", "prompt", "completion", "chosen", "rejected"):
        yield from row.get(column, ())
    for completion in row.get("completions", ()):
        yield from completion


def has_tools(row: dict) -> bool:
    return "tools" in row or any(len(turn) > 2 for turn in row_messages(row))


def features(
    task: str, prompt_completion: bool = False, margin: bool = False, tools: bool = False, keep: Iterable[str] = ()
):
    """The `datasets.Features` of a task's rows; messages with tool calls and the columns to `keep` are any JSON."""
    from datasets import Features, List, Value

    from recipes.data.exact_json import ExactJson

    text, float64 = Value("string"), Value("float64")
    messages = List(ExactJson()) if tools else List({"role": text, "content": text})
    columns = {
        "sft": dict.fromkeys(("prompt", "completion") if prompt_completion else ("messages",), messages),
        "preference": dict.fromkeys(("prompt", "chosen", "rejected"), messages) | {"group_id": text},
        "ranking": {"prompt": messages, "completions": List(messages), "ranks": List(float64), "group_id": text},
        "prompt": {"prompt": messages},
    }[task]
    extra = {"margin": float64} if task == "preference" and margin else {"tools": text} if tools else {}
    return Features(columns | extra | {name: ExactJson() for name in keep})


def _sft(example: Dialogue, prompt_completion: bool, assistant_only_loss: bool) -> Iterator[dict]:
    """One row, or several where turns that are not trained lie between those that are: TRL masks a prompt only."""
    messages = example.messages
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise Skip(f"the last turn is {messages[-1]['role']}, not assistant")
    if not prompt_completion and not has_weights(messages):
        yield {"messages": messages}
        return
    answers = [index for index in range(example.context, len(messages)) if messages[index]["role"] == "assistant"]
    runs = [list(run) for masked, run in groupby(answers, lambda index: "weight" in messages[index]) if not masked]
    if not runs:
        raise Skip("every answer has weight 0")
    if not prompt_completion and (len(runs) > 1 or runs[0][0] != answers[0]):
        raise Skip("an answer with weight 0 stands before one that is trained, and `messages` cannot mask it")
    messages = without_weights(messages)
    if not prompt_completion:
        yield {"messages": messages[: runs[0][-1] + 1]}
        return
    for run in runs if assistant_only_loss else [runs[-1][-1:]]:
        yield {"prompt": messages[: run[0]], "completion": messages[run[0] : run[-1] + 1]}


def _prompt(example: Dialogue | Ranking) -> Messages:
    messages = without_weights(example.prompt if isinstance(example, Ranking) else example.messages)
    check_order(messages)
    _refuse_tools(messages, example.tools)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _ranking(example: Ranking) -> dict:
    prompt = without_weights(example.prompt)
    for response in example.responses:
        check_order(prompt + response)
        if has_weights(response):
            raise Skip("a response has weight 0")
        _refuse_tools(prompt + response, example.tools)
        if prompt[-1]["role"] != "user" or response[-1]["role"] != "assistant":
            raise Skip("a prompt must end with a user turn and a response with an assistant turn")
    if len(example.responses) < 2:
        raise Skip("fewer than two responses")
    if len(set(example.ranks)) == 1:
        raise Skip("tie: all responses have the same rank")
    order = sorted(range(len(example.ranks)), key=example.ranks.__getitem__)
    return {
        "prompt": prompt,
        "completions": [example.responses[index] for index in order],
        "ranks": [float(example.ranks[index]) for index in order],
        "group_id": group_id(prompt),
    }


def _once(ranking: dict) -> Iterator[dict | Skip]:
    """The ranking without responses whose text a better one has: their pair trains nothing, and counts as wrong."""
    best: dict[str, float] = {}  # of each text, the best rank
    kept = []
    for completion, rank in zip(ranking["completions"], ranking["ranks"], strict=True):
        text = json.dumps([turn["content"].strip() for turn in completion])
        if best.setdefault(text, rank) == rank:
            kept.append((completion, rank))
        else:
            yield Skip("identical responses")
    if len(set(best.values())) > 1:
        completions, ranks = map(list, zip(*kept, strict=True))
        yield ranking | {"completions": completions, "ranks": ranks}


def _refuse_tools(messages: Messages, tools: list | None) -> None:
    if tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in messages):
        raise Skip("tool calls are supported for task 'sft' only")
    if any(len(turn) > 2 for turn in messages):
        raise Skip("reasoning is supported for task 'sft' only")


def _margin(example: Ranking) -> dict[str, float]:
    if example.margin is None:
        raise RowError("a margin was asked for, but this row has no margin and no scores", "margin")
    return {"margin": float(example.margin)}


def _pairs(ranking: dict, extra: dict) -> Iterator[dict | Skip]:
    ranked = list(zip(ranking["completions"], ranking["ranks"], strict=True))
    texts = [[turn["content"].strip() for turn in completion] for completion, _ in ranked]
    for better, (chosen, rank) in enumerate(ranked):
        for worse in range(better + 1, len(ranked)):
            rejected, lower = ranked[worse]
            if texts[better] == texts[worse] and rank < lower:
                yield Skip("identical responses")
            elif rank < lower:
                pair = {"prompt": ranking["prompt"], "chosen": chosen, "rejected": rejected}
                yield pair | {"group_id": ranking["group_id"]} | extra
