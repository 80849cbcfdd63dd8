"""Functions that converters are written with: they make messages out of the cells of a row.

The contents of messages are never changed; texts that become messages only lose outer whitespace.
"""

import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from recipes.data.cells import NOTHING, Cells
from recipes.data.rows import RowError, Skip, describe, join_names

Messages = list[dict[str, Any]]
Roles = Mapping[str, str]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers gives templates each under both first names
EXTRAS = ("tool_call_id", "name", *REASONING)
# Keys of a message that say whether it is learned (OpenAI's weight, axolotl, ms-swift), and those that say it is not.
LEARNED = {"weight", "train", "training", "loss", "loss_mask", "loss_weight", "loss_scale"}
MASKED = {"masked", "mask"}
# What changes the meaning of a text and cannot be used: media, answers that are only begun, weights of single tokens.
MEDIA = {"image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos"}
UNUSABLE = MEDIA | {"prefix", "partial", "train_detail", "training_detail"}
USED = {"role", "content", "from", "value", "tool_calls", "function_call", *EXTRAS, *LEARNED, *MASKED, *UNUSABLE}
MESSAGE = "expected a message {role, content} or {from, value}"

CONTEXT = ("system", "system_prompt", "history")  # columns that come before a conversation, whatever its schema is
HUMAN_ASSISTANT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
# Messages that are no JSON, as `str` of a list gives them, and with it pandas.
_KEY = """["'](?:role|content|from|value|tool_calls)["']\\s*:"""
_WRITTEN = re.compile(rf"\s*\[?\s*\{{\s*{_KEY}.*?{_KEY}", re.DOTALL)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def normalise(raw: list, column: str, roles: Roles) -> Messages:
    """Messages with the role names of chat templates and unchanged contents; blank system messages are left out."""
    result = []
    for index, turn in enumerate(raw):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(f"found {describe(turn)}, {MESSAGE}", where)
        sharegpt = "from" in turn and turn.get("role") is None
        role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
        if role_key not in turn or not (content_key in turn or turn.get("tool_calls") or turn.get("function_call")):
            raise RowError(f"found {describe(turn)}, {MESSAGE}", where)
        name, content = str(turn[role_key]).lower(), turn.get(content_key)
        role = roles.get(name)
        if role is None:
            found = f"unknown role: found {describe(turn[role_key])}, expected one of {join_names(sorted(roles))}"
            raise RowError(f"{found}; or map it: roles.NAME=user", f"{where}.{role_key}")
        if not isinstance(content, str):
            content = _joined_text(content, f"{where}.{content_key}")
        extras = _extras(Cells(turn, where), role) if len(turn) > 2 or content_key not in turn else {}
        if name == "function_call":
            content, extras = "", extras | {"tool_calls": _tool_calls(content, f"{where}.{content_key}")}
        if content.strip() or "tool_calls" in extras or role == "tool":
            result.append({"role": role, "content": content, **extras})
        elif role != "system":
            raise Skip(f"empty {role} message", f"{where}.{content_key}")
    return result


def _extras(turn: Cells, role: str) -> dict[str, Any]:
    """The other keys of a message that chat templates know, if they are not empty; `weight` 0 if it is not learned."""
    refuse(turn, UNUSABLE)
    masked = role == "assistant" and not_learned(turn, LEARNED | MASKED)
    result: dict[str, Any] = {"weight": 0} if masked else {}
    if turn.get("tool_calls") not in NOTHING:
        result["tool_calls"] = [_with_arguments(dict(call)) for call in turn.objects("tool_calls")]
    elif turn.get("function_call"):  # OpenAI's older form
        result["tool_calls"] = _tool_calls(turn["function_call"], turn.where("function_call"))
    for key in EXTRAS:
        value = turn.get(key)
        if value in (None, "", []) or (key == "name" and role != "tool"):
            continue
        if not isinstance(value, str):
            raise RowError(f"found {describe(value)}, expected text", turn.where(key))
        result[key] = value
    return result


def refuse(cells: Cells, keys: set[str]) -> None:
    """Skips a row that has one of the keys, in itself or in a message: it must not be ignored."""
    for key in sorted(keys & cells.keys()):
        if cells[key] not in (*NOTHING, False):
            raise Skip(f"{key} cannot be used", cells.where(key))


def not_learned(cells: Cells, keys: set[str]) -> str | None:
    """The first of the keys that says not to learn from a row or a message."""
    return next((key for key in sorted(keys & cells.keys()) if cells.flag(key) is (key in MASKED)), None)


def has_weights(messages: Messages) -> bool:
    return any("weight" in turn for turn in messages)


def without_weights(messages: Messages) -> Messages:
    """Messages without that mark, which chat templates do not know."""
    return [{key: turn[key] for key in turn if key != "weight"} for turn in messages]


def _joined_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    texts = []
    for block in content if isinstance(content, list) else [content]:
        cells = block if isinstance(block, dict) else {}
        media = any(cells[key] not in NOTHING for key in MEDIA & cells.keys())
        if cells.get("type") != "text" or media or not isinstance(cells.get("text"), str):
            what = f"a block of type {cells['type']!r}" if "type" in cells else describe(block)
            raise RowError(f"found {what}, expected text or a list of text blocks", where)
        texts.append(cells["text"])
    return "".join(texts)


def _tool_calls(content: str | dict, where: str) -> list[dict]:
    with suppress(ValueError, RecursionError):
        content = json.loads(content) if isinstance(content, str) else content
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError(f"found {describe(content)}, expected a function call as JSON {{name, arguments}}", where)
    return [_with_arguments({"type": "function", "function": call}) for call in calls]


def _with_arguments(call: dict) -> dict:
    """A tool call with its arguments as an object: OpenAI's text of JSON would be quoted again by chat templates."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    with suppress(ValueError, TypeError, RecursionError):  # not text, or not JSON
        arguments = json.loads(call.get("arguments"))
        return {**call, "arguments": arguments} if isinstance(arguments, dict) else call
    return call


def is_turns(value: Any) -> bool:
    """Whether a cell is a list of messages."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns)


def unused_keys(value: Any) -> set[str]:
    """The keys that `normalise` leaves out of the messages of a cell."""
    if not is_turns(value):
        return set()
    keys = set().union(*value) - USED
    if any(turn.get("name") and ROLES.get(turn.get("role", "")) != "tool" for turn in value):
        keys.add("name")
    return keys


def check_order(messages: Messages) -> None:
    """Chat templates need [system,] user, assistant, user, assistant, …; tool results follow an assistant."""
    allowed: Collection[str] = ("system", "user")
    after = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    last = None
    for turn in messages:
        role = turn["role"]
        if role not in allowed:
            reason = f"turns do not alternate: {role} after {last}" if last else f"the first turn is {role}, not user"
            raise Skip(reason)
        allowed, last = after[role], role
    if last in (None, "system"):
        raise Skip("no user turn")


def conversation(row: Cells, column: str, roles: Roles) -> Messages:
    """A column that holds a list of messages."""
    return normalise(row.entries(column), row.where(column), roles)


def read_messages(row: Cells, column: str, roles: Roles, text_role: str = "assistant") -> Messages:
    """A column that holds a text (the message of `text_role`), one message or a list of messages."""
    value = row.require(column)
    if isinstance(value, list):
        return conversation(row, column, roles)
    if isinstance(value, dict):
        return normalise([value], column, roles)
    where, turns = row.where(column), json_messages(value)
    if turns and all(str(turn.get("role", turn.get("from"))).lower() in roles for turn in turns):
        raise RowError("found messages written as JSON text, expected the list itself (json.loads gives it)", where)
    if not turns and isinstance(value, str) and value.rstrip()[-1:] in ("]", "}") and _WRITTEN.match(value):
        raise RowError(f"found {describe(value)}, expected messages that json.dumps wrote", where)
    return [message(text_role, row.text(column))]


def json_messages(value: Any) -> list[dict]:
    """The messages that a text holds as JSON; none where it is another text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            turns = found if isinstance(found, list) else [found]
            if is_turns(turns) and all(turn.keys() & {"content", "value", "tool_calls"} for turn in turns):
                return turns
    return []


def prompt_messages(row: Cells, column: str, roles: Roles) -> Messages:
    """The messages of a prompt column; a text is the user's, or a transcript that ends with "Assistant:".

    After an instruction or a question, `input` or `context` follows after a blank line.
    """
    value = row.get(column)
    if isinstance(value, str) and column in ("instruction", "question"):
        asked = read_messages(row, column, roles, "user")[0]["content"]
        parts = (asked, row.optional_text("input"), row.optional_text("context"))
        return [message("user", "\n\n".join(filter(None, parts)))]
    if isinstance(value, str) and value.lstrip().startswith("Human:") and value.rstrip().endswith("\n\nAssistant:"):
        transcript = value.rstrip().removesuffix("Assistant:")
        return split_turns(transcript, column, HUMAN_ASSISTANT, roles)
    return read_messages(row, column, roles, "user")


def add_system(messages: Messages, system: str, column: str) -> Messages:
    """Messages after a system message, unless it is empty; skips those that have another one."""
    if not system:
        return messages
    if not messages or messages[0]["role"] != "system":
        return [message("system", system), *messages]
    if messages[0]["content"].strip() != system.strip():
        raise Skip("the row has another system message too", column)
    return messages


def in_context(row: Cells, messages: Messages, own: Collection[str] = ()) -> Messages:
    """Messages after the row's optional `system` (or `system_prompt`) and `history` of [user, assistant] texts.

    `own` columns are those that the schema reads itself.
    """
    for column in ("system", "system_prompt"):
        if column not in own:
            messages = add_system(messages, row.optional_text(column), column)
    history = []
    pairs = [] if "history" in own or row.get("history") in NOTHING else row.entries("history")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"found {describe(pair)}, expected [user text, assistant text]", f"history[{index}]")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            where = f"history[{index}][{len(history) % 2}]"
            history.append(message(role, Cells({where: said}).text(where)))
    start = 1 if messages and messages[0]["role"] == "system" else 0
    return messages[:start] + history + messages[start:]


def split_turns(value: str, column: str, marker: re.Pattern, roles: Roles, first: str | None = None) -> Messages:
    """Splits a transcript at its markers, whose group 1 is the role; `first` is the role of text before them."""
    start, *rest = marker.split(value)
    raw = [message(role, turn.strip()) for role, turn in zip(rest[::2], rest[1::2], strict=True)]
    if first:
        raw.insert(0, message(first, start.strip()))
    elif start.strip() or not raw:
        raise RowError(f"found {describe(value)}, expected turns that start with a marker such as Human:", column)
    return normalise(raw, column, roles)
