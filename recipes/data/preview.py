"""A formatted row as the model will see it, rendered by the chat template."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from jinja2 import TemplateError

from recipes.data.rows import RowError

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)  # of templates
PROBE = "probe0"  # a text that no template holds


class Sequence(NamedTuple):
    """One sequence of a row as TRL's trainers see it: token ids, the first `shared` of which are the prompt's.

    What follows them is trained on (sft) or scored (preference). `rewritten` if some of it is the prompt's too, which
    the template renders in another way once an answer follows.
    """

    name: str
    ids: list[int]
    shared: int
    rewritten: bool = False


def sequences(row: dict, tokenizer) -> Iterator[Sequence]:
    """The sequences of a row: its prompt, or the prompt with each response.

    Raises:
        RowError: the chat template refuses the conversation.
    """
    tools = json.loads(row["tools"]) if row.get("tools") else None
    responses = [(column, row[column]) for column in ("completion", "chosen", "rejected") if column in row]
    ranked = zip(row.get("ranks", ()), row.get("completions", ()), strict=True)
    responses += [(f"rank {rank:g}", response) for rank, response in ranked]
    prompt = row.get("prompt")
    if "messages" in row:
        prompt, responses = row["messages"][:-1], [("last turn", row["messages"][-1:])]
    start = _ids(tokenizer, prompt, tools, add_generation_prompt=True)
    if not responses:
        yield Sequence("prompt", start, len(start))
    for name, response in responses:
        whole = _ids(tokenizer, prompt + response, tools)
        shared = len(os.path.commonprefix([start, whole]))
        # Where only the mark that begins an answer differs, such as `<think>`, or the last token, the prompt is whole.
        rewritten = shared < len(start) and shared < len(_ids(tokenizer, prompt, tools)) - 1
        yield Sequence(name, whole, shared, rewritten)


def left_out(tokenizer) -> dict[str, str]:
    """What a chat template leaves out without an error, and its name: many know no tools, some no system message."""
    user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    system, result = {"role": "system", "content": PROBE}, {"role": "tool", "content": PROBE}
    tool = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {"type": "object"}}}

    def calls(*names: str) -> dict:
        functions = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
        return {"role": "assistant", "content": "", "tool_calls": functions}

    probes: dict[str, tuple[str, list, list | None]] = {
        "system": ("system messages", [system, user, answer], None),
        "tool": ("tool results", [user, calls("f"), result, answer], None),
        "tool_calls": ("tool calls", [user, calls(PROBE)], None),
        "second": ("all but one of a turn's calls", [user, calls("f", PROBE)], None),
        "said": ("what is said beside tool calls", [user, {**calls("f"), "content": PROBE}], None),
        "tools": ("the list of tools", [user, answer], [tool]),
        "reasoning_content": ("reasoning", [user, {**answer, "reasoning_content": PROBE}], None),
        "</think>": ("reasoning", [user, {**answer, "content": f"<think>{PROBE}</think>!"}], None),
    }
    found = {}
    for part, (name, messages, tools) in probes.items():
        with suppress(*REFUSALS):  # then it refuses the rows too
            if PROBE not in tokenizer.apply_chat_template(messages, tools=tools, tokenize=False):
                found[part] = name
    return found


def check_positions(tokens: int, positions: int | None, completion_length: int = 0) -> None:
    """Raises RowError unless the model has a place for every token of a sequence and of a completion after it."""
    if positions is not None and tokens + completion_length > positions:
        completion = f" and --max_completion_length {completion_length}" if completion_length else ""
        raise RowError(f"{tokens} tokens{completion} are more than the {positions} positions of the model")


def _ids(tokenizer, messages: list[dict], tools: list | None, **options) -> list[int]:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, **options)["input_ids"]
    except REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RowError(f"the chat template does not take this conversation: {reason}") from error
