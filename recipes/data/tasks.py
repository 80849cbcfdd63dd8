"""The rows of each task, on which TRL trains, made out of a `Dialogue` or a `Ranking`.

    sft         messages; or, with `prompt_completion`, prompt and completion, which is the last turn that is trained
    preference  prompt, chosen, rejected, group_id and, with `margin`, margin: one row per pair with unequal ranks
    ranking     prompt, completions (best first), ranks, group_id: one row per ranked prompt
    prompt      prompt, which ends with the user's turn

Columns are lists of {role, content}, except for numbers and `group_id`, a hash that is equal for equal prompts. SFT
rows of a source with tools also have `tools`, as JSON text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import combinations, groupby

from recipes.data.converters import Dialogue, Ranking
from recipes.data.messages import Messages, check_order, has_weights, without_weights
from recipes.data.rows import RowError, Skip


def outputs(
    example: Dialogue | Ranking, task: str, prompt_completion: bool, margin: bool, assistant_only_loss: bool
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
        if example.dropped and not example.responses:
            return
        prompt = without_weights(example.prompt)
        best_first = _best_first(example, prompt)
        once = _once(best_first)
        yield from [Skip("identical responses")] * (len(best_first) - len(once))
        extra: dict[str, str | float] = {"group_id": group_id(prompt)}
        if margin and task == "preference":
            if example.margin is None:
                raise RowError("a margin was asked for, but this row has no margin and no scores", "margin")
            extra["margin"] = float(example.margin)
        pairs = [(better, worse) for (better, rank), (worse, lower) in combinations(once, 2) if rank < lower]
        if task == "preference":
            for chosen, rejected in pairs:
                yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}
        elif pairs:
            completions, ranks = zip(*once, strict=True)
            yield {"prompt": prompt, "completions": list(completions), "ranks": list(ranks), **extra}


def group_id(prompt: Messages) -> str:
    """16 hexadecimal digits that are equal for equal prompts."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


def row_messages(row: dict) -> Iterator[dict]:
    """All messages of a row of any task."""
    for column in ("messages", "prompt", "completion", "chosen", "rejected"):
        yield from row.get(column, ())
    for completion in row.get("completions", ()):
        yield from completion


def features(task: str, prompt_completion: bool = False, margin: bool = False, keep: Iterable[str] = ()):
    """The `datasets.Features` of a task's rows; messages of sft, which may call tools, and `keep` are any JSON."""
    from datasets import Features, List, Value

    from recipes.data.exact_json import ExactJson

    text, float64 = Value("string"), Value("float64")
    messages = List({"role": text, "content": text})
    columns = {
        "sft": dict.fromkeys(("prompt", "completion") if prompt_completion else ("messages",), List(ExactJson())),
        "preference": dict.fromkeys(("prompt", "chosen", "rejected"), messages) | {"group_id": text},
        "ranking": {"prompt": messages, "completions": List(messages), "ranks": List(float64), "group_id": text},
        "prompt": {"prompt": messages},
    }[task]
    extra = {"tools": text} if task == "sft" else {"margin": float64} if margin and task == "preference" else {}
    return Features(columns | extra | {name: ExactJson() for name in keep})


def _sft(example: Dialogue, prompt_completion: bool, assistant_only_loss: bool) -> Iterator[dict]:
    """One row, or several where turns that are not trained lie between those that are: TRL masks a prompt only."""
    messages = example.messages
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise Skip(f"the last turn is {messages[-1]['role']}, not assistant")
    answers = [index for index in range(example.context, len(messages)) if messages[index]["role"] == "assistant"]
    trained = [index for index in answers if "weight" not in messages[index]]
    if not trained:
        raise Skip("every answer has weight 0")
    messages, last = without_weights(messages), trained[-1]
    if not prompt_completion:
        if trained != answers[: len(trained)]:
            raise Skip("an answer with weight 0 stands before one that is trained, and `messages` cannot mask it")
        yield {"messages": messages[: last + 1]}
    elif not assistant_only_loss:
        yield {"prompt": messages[:last], "completion": messages[last : last + 1]}
    else:
        for is_trained, run in groupby(answers, lambda index: index in trained):
            if is_trained:
                first, *others = run
                end = others[-1] if others else first
                yield {"prompt": messages[:first], "completion": messages[first : end + 1]}


def _prompt(example: Dialogue | Ranking) -> Messages:
    messages = without_weights(example.prompt if isinstance(example, Ranking) else example.messages)
    check_order(messages)
    _refuse_tools(messages, example.tools)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _best_first(example: Ranking, prompt: Messages) -> list[tuple[Messages, float]]:
    """The responses and their ranks."""
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
    return sorted(zip(example.responses, map(float, example.ranks), strict=True), key=lambda ranked: ranked[1])


def _once(best_first: list[tuple[Messages, float]]) -> list[tuple[Messages, float]]:
    """The responses but those whose text a better one has, which would win and lose against those between."""
    best: dict[tuple, float] = {}  # of each text, the best rank
    texts = [tuple(turn["content"].strip() for turn in response) for response, _ in best_first]
    ranked = zip(texts, best_first, strict=True)
    return [(response, rank) for text, (response, rank) in ranked if best.setdefault(text, rank) == rank]


def _refuse_tools(messages: Messages, tools: list | None) -> None:
    if tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in messages):
        raise Skip("tool calls are supported for task 'sft' only")
    if any(len(turn) > 2 for turn in messages):
        raise Skip("reasoning is supported for task 'sft' only")
