"""Functions that converters are written with: they read the cells of a row and make messages out of them.

Each takes the name of the column that it reads, so that errors and skips can name it. The contents of messages are
never changed; texts that become messages only lose outer whitespace.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from recipes.data.rows import RowError, Skip, check_surrogates, describe, join_names

Messages = list[dict[str, Any]]
Roles = Mapping[str, str]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers gives templates each under both first names
EXTRAS = {"tool_calls": list, "tool_call_id": str, "name": str, **dict.fromkeys(REASONING, str)}
# Keys of a message that say whether it is learned (OpenAI's weight, axolotl, ms-swift), and those that say it is not.
LEARNED = {"weight", "train", "training", "loss", "loss_mask", "loss_weight", "loss_scale"}
MASKED = {"masked", "mask"}
# What changes the meaning of a text and cannot be used: media, answers that are only begun, weights of single tokens.
MEDIA = {"image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos"}
UNUSABLE = MEDIA | {"prefix", "partial", "train_detail", "training_detail"}
USED = {"role", "content", "from", "value", "function_call", *EXTRAS, *LEARNED, *MASKED, *UNUSABLE}
SPEAKER = {"role", "from"}
MESSAGE = "expected a message {role, content} or {from, value}"

CONTEXT = ("system", "system_prompt", "history")  # columns that come before a conversation, whatever its schema is
NOTHING = (None, "", "null", [], "[]", {}, "{}")
FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
HUMAN_ASSISTANT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def require(row: dict, column: str) -> Any:
    """The value of a column that has to be there."""
    if column not in row:
        raise RowError(f"missing; there are {join_names(row) or 'no columns'}", column)
    return row[column]


def text(row: dict, column: str) -> str:
    """A required text without outer whitespace; an empty one skips the row."""
    require(row, column)
    value = optional_text(row, column)
    if not value:
        raise Skip("empty text", column)
    return value


def optional_text(row: dict, column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise RowError(f"found {describe(value)}, expected text", column)
    return (value or "").strip()


def decode_json(value: Any, column: str, kind: str) -> Any:
    """A list or an object, which is JSON text in formats that have neither (CSV)."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"found {describe(value)}, expected {kind} (as JSON)", column) from None
        check_surrogates(value, column)
    return value


def items(row: dict, column: str) -> list:
    """A required list."""
    value = decode_json(require(row, column), column, "a list")
    if value in (None, "", []):
        raise Skip("empty list", column)
    if not isinstance(value, list):
        raise RowError(f"found {describe(value)}, expected a list", column)
    return value


def as_object(value: Any, column: str) -> dict:
    """An object inside a row, to be read like a row: its keys become full places such as `answers[0].rank`."""
    value = decode_json(value, column, "an object")
    if not isinstance(value, dict):
        raise RowError(f"found {describe(value)}, expected an object", column)
    return {f"{column}.{key}": item for key, item in value.items()}


def objects(row: dict, column: str) -> Iterator[tuple[str, dict]]:
    """The objects of a required list, to be read like rows, each with its place, such as `answers[0]`."""
    for index, item in enumerate(items(row, column)):
        place = f"{column}[{index}]"
        yield place, as_object(item, place)


def number(row: dict, column: str, text_too: bool = True) -> float:
    """A required number. With `text_too` it may be written as text, as all numbers in CSV are."""
    value = found = require(row, column)
    if isinstance(value, str) and text_too:
        with suppress(ValueError):
            found = float(value)
    with suppress(OverflowError):  # an integer beyond all floats
        if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found):
            return found
    raise RowError(f"found {describe(value)}, expected a number", column)


def flag(row: dict, column: str) -> bool | None:
    """An optional yes or no, which may be written as text, as in CSV."""
    value = row.get(column)
    found = FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if found is None and value not in (None, ""):
        raise RowError(f"found {describe(value)}, expected true or false", column)
    return found


def choice(row: dict, column: str, options: Collection[int]) -> int:
    """A required whole number out of a few."""
    value = require(row, column)
    found = int(value) if isinstance(value, bool) else number(row, column)
    if found not in options:
        raise RowError(f"found {describe(value)}, expected one of {join_names(options)}", column)
    return int(found)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def normalise(raw: list, column: str, roles: Roles) -> Messages:
    """Messages with the role names of chat templates and unchanged contents; blank system messages are left out."""
    result = []
    for index, turn in enumerate(raw):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(f"found {describe(turn)}, {MESSAGE}", where)
        role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
        if role_key not in turn or not (content_key in turn or turn.get("tool_calls") or turn.get("function_call")):
            raise RowError(f"found {describe(turn)}, {MESSAGE}", where)
        name, content = str(turn[role_key]).lower(), turn.get(content_key)
        role = roles.get(name)
        if role is None:
            found = f"unknown role: found {describe(turn[role_key])}, expected one of {join_names(sorted(roles))}"
            raise RowError(f"{found}; or map it: roles.NAME=user", f"{where}.{role_key}")
        if not isinstance(content, str):
            content = _joined_text(content, f"{where}.{content_key}")
        extras = _extras(turn, role, where) if len(turn) > 2 or content_key not in turn else {}
        if name == "function_call":
            content, extras = "", {"tool_calls": _tool_calls(content, f"{where}.{content_key}")}
        if content.strip() or "tool_calls" in extras or role == "tool":
            result.append({"role": role, "content": content, **extras})
        elif role != "system":
            raise Skip(f"empty {role} message", f"{where}.{content_key}")
    return result


def _extras(turn: dict, role: str, where: str) -> dict[str, Any]:
    """The other keys of a message that chat templates know, if they are not empty; `weight` 0 if it is not learned."""
    refuse(turn, UNUSABLE, f"{where}.")
    masked = role == "assistant" and not_learned(turn, LEARNED | MASKED, f"{where}.")
    result: dict[str, Any] = {"weight": 0} if masked else {}
    for key, kind in EXTRAS.items():
        value = turn.get(key)
        if value in (None, "", []) or (key == "name" and role != "tool"):
            continue
        if not isinstance(value, kind) or (kind is list and not all(isinstance(call, dict) for call in value)):
            wanted = "a list of objects" if kind is list else "text"
            raise RowError(f"found {describe(value)}, expected {wanted}", f"{where}.{key}")
        result[key] = value
    if "tool_calls" not in result and turn.get("function_call"):  # OpenAI's older form
        result["tool_calls"] = _tool_calls(turn["function_call"], f"{where}.function_call")
    return result


def refuse(values: dict, keys: set[str], where: str = "") -> None:
    """Skips a row that has one of the keys (or whose message at `where` has it): it must not be ignored."""
    for key in sorted(keys & values.keys()):
        if values.get(key) not in (*NOTHING, False):
            raise Skip(f"{key} cannot be used", f"{where}{key}")


def not_learned(values: dict, keys: set[str], where: str = "") -> str | None:
    """The first of the keys that says not to learn from a row (or from its message at `where`)."""
    for key in sorted(keys & values.keys()):
        if flag({where + key: values[key]}, where + key) is (key in MASKED):
            return where + key
    return None


def has_weights(messages: Messages) -> bool:
    """Whether some are marked as not learned."""
    return any("weight" in turn for turn in messages)


def without_weights(messages: Messages) -> Messages:
    """Messages without that mark, which chat templates do not know."""
    return [{key: turn[key] for key in turn if key != "weight"} for turn in messages]


def _joined_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    texts = []
    for block in content if isinstance(content, list) else [content]:
        block = block if isinstance(block, dict) else {}
        media = [key for key in sorted(MEDIA & block.keys()) if block[key] not in NOTHING]
        if block.get("type") != "text" or media or not isinstance(block.get("text"), str):
            what = f"a block of type {block['type']!r}" if "type" in block else describe(content)
            what += f" with {media[0]}" if media else ""
            raise RowError(f"found {what}, expected text or a list of text blocks", where)
        texts.append(block["text"])
    return "".join(texts)


def _tool_calls(content: str | dict, where: str) -> list[dict]:
    with suppress(ValueError, RecursionError):
        content = json.loads(content) if isinstance(content, str) else content
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError(f"found {describe(content)}, expected a function call as JSON {{name, arguments}}", where)
    return [{"type": "function", "function": call} for call in calls]


def is_turns(value: Any) -> bool:
    """Whether a cell is a list of messages."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(turn, dict) and turn.keys() & SPEAKER for turn in turns)


def unused_keys(value: Any) -> set[str]:
    """The keys that `normalise` leaves out of the messages of a cell."""
    if not is_turns(value):
        return set()
    keys = set().union(*value) - USED
    if any(turn.get("name") and ROLES.get(turn.get("role", "")) != "tool" for turn in value):
        keys.add("name")
    return keys


def check_order(messages: Messages, column: str | None = None) -> None:
    """Chat templates need [system,] user, assistant, user, assistant, …; tool results follow an assistant."""
    allowed: Collection[str] = ("system", "user")
    after = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    last = None
    for turn in messages:
        role = turn["role"]
        if role not in allowed:
            reason = f"turns do not alternate: {role} after {last}" if last else f"the first turn is {role}, not user"
            raise Skip(reason, column)
        allowed, last = after[role], role
    if last in (None, "system"):
        raise Skip("no user turn", column)


def conversation(row: dict, column: str, roles: Roles) -> Messages:
    """A column that holds a list of messages."""
    return normalise(items(row, column), column, roles)


def read_messages(row: dict, column: str, roles: Roles, text_role: str = "assistant") -> Messages:
    """A column that holds a text (the message of `text_role`), one message or a list of messages."""
    value = require(row, column)
    if isinstance(value, list):
        return conversation(row, column, roles)
    if isinstance(value, dict):
        return normalise([value], column, roles)
    if json_messages(value) is not None:
        raise RowError("found messages written as JSON text, expected the list itself (json.loads gives it)", column)
    return [message(text_role, text(row, column))]


def json_messages(value: Any) -> list | dict | None:
    """The messages, or the message, that a text holds as JSON; `None` where it is another text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return None
    with suppress(ValueError, RecursionError):
        found = json.loads(value)
        turns = found if isinstance(found, list) else [found]
        if is_turns(turns) and all(str(turn.get("role", turn.get("from"))).lower() in ROLES for turn in turns):
            return found
    return None


def prompt_messages(row: dict, column: str, roles: Roles) -> Messages:
    """The messages of a prompt column.

    A text is one user message, unless it is a transcript "\\n\\nHuman: …\\n\\nAssistant:" that ends before the answer.
    After an instruction or a question, `input` or `context` follows after a blank line.
    """
    value = row.get(column)
    if isinstance(value, str) and column in ("instruction", "question"):
        parts = (text(row, column), optional_text(row, "input"), optional_text(row, "context"))
        return [message("user", "\n\n".join(filter(None, parts)))]
    if isinstance(value, str) and value.startswith("\n\nHuman:") and value.rstrip().endswith("\n\nAssistant:"):
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


def in_context(row: dict, messages: Messages, own: Collection[str] = ()) -> Messages:
    """Messages after the row's optional `system` (or `system_prompt`) and `history` of [user, assistant] texts.

    `own` columns are those that the schema reads itself.
    """
    for column in ("system", "system_prompt"):
        if column not in own:
            messages = add_system(messages, optional_text(row, column), column)
    history = []
    for index, pair in enumerate([] if "history" in own or row.get("history") in NOTHING else items(row, "history")):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"found {describe(pair)}, expected [user text, assistant text]", f"history[{index}]")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            where = f"history[{index}][{len(history) % 2}]"
            history.append(message(role, text({where: said}, where)))
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
