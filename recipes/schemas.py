"""The table of dataset schemas: which columns each one has, and how one of its rows becomes chat messages.

A schema's `convert` is a pure function from a row to a `Dialogue` (demonstrations and prompts) or a `Ranking` (pairs
are rankings of two). It raises `RowError` for a row that is wrong and `Skip` for one that is merely of no use. What
the three tasks make of a Dialogue or a Ranking is not its business: see `recipes.formatting`.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.loading import DataError, RowError, check_surrogates

Messages = list[dict[str, Any]]

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
MESSAGE_EXTRAS = ("tool_calls", "tool_call_id", "reasoning_content")
TASKS = ("sft", "preference", "ranking", "prompt")


class Skip(Exception):
    """The row is well formed but of no use, such as a tie; it is counted and left out."""

    def __init__(self, reason: str, column: str | None = None):
        super().__init__(reason)
        self.reason, self.column = reason, column


@dataclass
class Dialogue:
    messages: Messages
    tools: list | None = None


@dataclass
class Ranking:
    """Responses (message lists that continue `prompt`) and their ranks: 1 is best, equal ranks are ties.

    `dropped` are responses that had to be left out, while the others are still of use.
    """

    prompt: Messages
    responses: list[Messages]
    ranks: list[float]
    margin: float | None = None
    dropped: list[Skip] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """What the values of a column look like; `fits` is asked during detection only."""

    description: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Schema:
    """`required` maps columns to the kind of their values; of several schemas that fit, the lowest `order` wins."""

    tasks: tuple[str, ...]
    required: Mapping[str, Kind]
    convert: Callable[[dict, Mapping[str, str]], Dialogue | Ranking]
    order: int = 0

    def misfits(self, columns: Iterable[str], sample: list[dict]) -> list[str]:
        """Why the columns, or most of the values in the sample, are not of this schema."""
        problems = [f"column {name!r} is missing" for name in self.required if name not in columns]
        for name, kind in self.required.items():
            values = [row[name] for row in sample if row.get(name) not in (None, "", [])]
            misfits = [value for value in values if not kind.fits(value)]
            if name in columns and (not values or 2 * len(misfits) > len(values)):
                found = describe(misfits[0]) if misfits else "nothing in it"
                problems.append(f"column {name!r} should hold {kind.description}, found {found}")
        return problems


def detect(columns: Iterable[str], sample: list[dict], task: str) -> tuple[str, str]:
    """Names the schema of a source from its column names and a sample of rows, and says why.

    Raises:
        DataError: no schema fits, or two fit equally well.
    """
    columns = set(columns)
    misfits = {name: schema.misfits(columns, sample) for name, schema in SCHEMAS.items()}
    fitting = [name for name, problems in misfits.items() if not problems]
    best = sorted((name for name in fitting if task in SCHEMAS[name].tasks), key=lambda name: SCHEMAS[name].order)
    if not best:  # where the names of the columns fit one schema, its errors say best what is wrong with the values
        named = [name for name, each in SCHEMAS.items() if task in each.tasks and columns.issuperset(each.required)]
        if named and not fitting:
            return min(named, key=lambda name: SCHEMAS[name].order), "column names only; the values do not fit"
        raise DataError(_no_schema(columns, sample, task, fitting, misfits))
    if len(best) > 1 and SCHEMAS[best[0]].order == SCHEMAS[best[1]].order:
        raise DataError(f"the columns fit {best[0]!r} as well as {best[1]!r}; choose one with --dataset_schema")
    return best[0], f"columns {', '.join(SCHEMAS[best[0]].required)}"


def _no_schema(columns: set, sample: list[dict], task: str, fitting: list[str], misfits: dict[str, list[str]]) -> str:
    found = f"no schema for task {task!r} fits the columns {', '.join(sorted(map(str, columns))) or '(none)'}"
    if fitting:
        tasks = sorted({task for name in fitting for task in SCHEMAS[name].tasks})
        return f"{found}; they fit {' and '.join(map(repr, fitting))}, which serves the task {' or '.join(tasks)}"
    for row in sample[:1]:
        for column, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict) and len(sample) == 1:
                return f"{found}; the one row holds a list of objects in {column!r}: save that list as the file"
    near = sorted((len(problems), name) for name, problems in misfits.items() if task in SCHEMAS[name].tasks)
    near = [f"{name!r}: {', '.join(misfits[name])}" for count, name in near if count < len(SCHEMAS[name].required)]
    hint = f" (nearly: {'; '.join(near[:3])})" if near else ""
    return f"{found}{hint}; name the columns with --dataset_mapping, e.g. prompt=COLUMN, or use another --task"


def describe(value: Any) -> str:
    """A short description of an unexpected value, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {value[:40]!r}{'...' if len(value) > 40 else ''}"
    if isinstance(value, list):
        return f"a list of {describe(value[0])}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    return f"{value!r} ({type(value).__name__})"


def cell(row: dict, column: str) -> Any:
    if column not in row:
        raise RowError(f"missing; this row has {', '.join(map(str, row)) or 'no columns'}", column)
    return row[column]


def text(row: dict, column: str) -> str:
    """A required text without outer whitespace; an empty one skips the row."""
    value = optional_text(row, column) if column in row else cell(row, column)
    if not value:
        raise Skip("empty text", column)
    return value


def optional_text(row: dict, column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise RowError(f"found {describe(value)}, expected text", column)
    return (value or "").strip()


def items(row: dict, column: str) -> list:
    """A required list, which may be written as JSON text where the format knows no lists (CSV)."""
    value = cell(row, column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise RowError(f"found {describe(value)}, expected a list (as JSON)", column) from None
        check_surrogates(value, column)
    if value is None or value == [] or value == "":
        raise Skip("empty list", column)
    if not isinstance(value, list):
        raise RowError(f"found {describe(value)}, expected a list", column)
    return value


def number(row: dict, column: str, where: str | None = None) -> float:
    value = cell(row, column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"found {describe(value)}, expected a number", where or column)
    return value


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def normalise(raw: list, column: str, roles: Mapping[str, str]) -> Messages:
    """Messages with the roles of chat templates and untouched contents; blank system messages are left out."""
    result = []
    for index, turn in enumerate(raw):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(f"found {describe(turn)}, expected a message {{role, content}}", where)
        keys = ("role", "content") if "role" in turn else ("from", "value")
        missing = [key for key in keys if key not in turn and not (key == "content" and turn.get("tool_calls"))]
        if missing:
            raise RowError(f"found {describe(turn)}, expected a message {{role, content}} or {{from, value}}", where)
        role = _role(turn[keys[0]], f"{where}.{keys[0]}", roles)
        extras = {key: turn[key] for key in MESSAGE_EXTRAS if turn.get(key)}
        if role == "tool" and turn.get("name"):
            extras["name"] = turn["name"]
        content = _content(turn.get(keys[1]), f"{where}.{keys[1]}")
        if content.strip() or "tool_calls" in extras or role == "tool":
            result.append({"role": role, "content": content, **extras})
        elif role != "system":
            raise Skip(f"empty {role} message", f"{where}.{keys[1]}")
    return result


def _role(role: Any, where: str, roles: Mapping[str, str]) -> str:
    if isinstance(role, str) and role.lower() in roles:
        return roles[role.lower()]
    known = ", ".join(sorted(roles))
    raise RowError(f"unknown role: found {describe(role)}, expected one of {known}; or map it: roles.NAME=user", where)


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(block, dict) and block.get("type") == "text" for block in content):
        texts = [block.get("text") for block in content]
        if all(isinstance(part, str) for part in texts):
            return "".join(texts)
    raise RowError(f"found {describe(content)}, expected text or a list of text blocks", where)


def check_order(messages: Messages, column: str | None = None) -> None:
    """Chat templates need [system,] user, assistant, user, assistant, …; tool results follow an assistant."""
    allowed, last = ("system", "user"), None
    after = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    for turn in messages:
        role = turn["role"]
        if role not in allowed:
            reason = f"turns do not alternate: {role} after {last}" if last else f"the first turn is {role}, not user"
            raise Skip(reason, column)
        allowed, last = after[role], role
    if last in (None, "system"):
        raise Skip("no user turn", column)


def turns(row: dict, column: str, roles: Mapping[str, str], role: str) -> Messages:
    """A column that holds a text (said by `role`), one message or a list of messages."""
    value = cell(row, column)
    if isinstance(value, dict):
        return normalise([value], column, roles)
    if isinstance(value, list):
        return normalise(items(row, column), column, roles)
    return [message(role, text(row, column))]


def context(row: dict, roles: Mapping[str, str], current: Messages) -> Messages:
    """`current` after the row's optional `system` text and `history` of [user, assistant] texts."""
    system = optional_text(row, "system")
    history = []
    for index, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"found {describe(pair)}, expected [user text, assistant text]", f"history[{index}]")
        said = dict(zip(("user", "assistant"), pair, strict=True))
        history += [message(role, text(said, role)) for role in said]
    if system and not (current and current[0]["role"] == "system"):
        history.insert(0, message("system", system))
    return history + current


def messages(row: dict, roles: Mapping[str, str]) -> Dialogue:
    return _dialogue(row, "messages", roles)


def conversations(row: dict, roles: Mapping[str, str]) -> Dialogue:
    return _dialogue(row, "conversations", roles)


def _dialogue(row: dict, column: str, roles: Mapping[str, str]) -> Dialogue:
    tools = items(row, "tools") if row.get("tools") not in (None, "", [], "[]") else None
    return Dialogue(context(row, roles, normalise(items(row, column), column, roles)), tools)


def prompt_completion(row: dict, roles: Mapping[str, str]) -> Dialogue:
    prompt = context(row, roles, turns(row, "prompt", roles, "user"))
    return Dialogue(prompt + turns(row, "completion", roles, "assistant"))


def instruction_output(row: dict, roles: Mapping[str, str]) -> Dialogue:
    asked = "\n\n".join(filter(None, (text(row, "instruction"), optional_text(row, "input"))))
    answer = message("assistant", text(row, "output"))
    return Dialogue(context(row, roles, [message("user", asked), answer]))


def prompt(row: dict, roles: Mapping[str, str]) -> Dialogue:
    return Dialogue(context(row, roles, turns(row, "prompt", roles, "user")))


SCORES = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score"))


def preference(row: dict, roles: Mapping[str, str]) -> Ranking:
    """`chosen` and `rejected` are answers to `prompt`, or whole conversations that share their first turns."""
    chosen, rejected = (turns(row, column, roles, "assistant") for column in ("chosen", "rejected"))
    if not chosen or not rejected:
        raise Skip("empty list", "rejected" if chosen else "chosen")
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        asked = context(row, roles, turns(row, "prompt", roles, "user"))
    else:
        asked, chosen, rejected = split_pair(chosen, rejected)
        asked = context(row, roles, asked)
    return Ranking(asked, [chosen, rejected], [1, 2], _margin(row))


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Cuts two conversations after the turns that they share: (prompt, chosen, rejected)."""
    if chosen == rejected:
        raise Skip("identical responses", "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0 or chosen[shared - 1]["role"] == "assistant":
        raise Skip("the prompts of chosen and rejected differ", "rejected")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _margin(row: dict) -> float | None:
    if row.get("margin") is not None:
        return number(row, "margin")
    for better, worse in SCORES:
        if row.get(better) is not None and row.get(worse) is not None:
            margin = number(row, better) - number(row, worse)
            if margin < 0:
                raise RowError(f"{row[better]} is lower than {worse} {row[worse]}, yet chosen is the better", better)
            if margin == 0:
                raise Skip("tie: equal scores", better)
            return margin
    return None


def ranking(row: dict, roles: Mapping[str, str]) -> Ranking:
    """`responses` are {text, rank} objects in any order; see docs/datasets.md."""
    return ranked(row, roles, "responses", "text", "rank")


def ranked(row: dict, roles: Mapping[str, str], column: str, text_key: str, rank_key: str) -> Ranking:
    asked = context(row, roles, turns(row, "prompt", roles, "user"))
    result = Ranking(asked, [], [])
    for index, response in enumerate(items(row, column)):
        where = f"{column}[{index}]"
        if not isinstance(response, dict):
            raise RowError(f"found {describe(response)}, expected {{{text_key}, {rank_key}}}", where)
        for key in (text_key, rank_key):
            if key not in response:
                raise RowError(f"missing; this response has {', '.join(response) or 'no keys'}", f"{where}.{key}")
        rank = number(response, rank_key, f"{where}.{rank_key}")
        said = {f"{where}.{text_key}": response[text_key]}
        try:
            result.responses.append([message("assistant", text(said, f"{where}.{text_key}"))])
            result.ranks.append(rank)
        except Skip as skip:
            result.dropped.append(skip)
    return result


def _first_role(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        role = value[0].get("role", value[0].get("from"))
        return ROLES.get(role.lower(), role) if isinstance(role, str) else ""
    return ""


def _listed(value: Any) -> list:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def list_of(*keys: tuple[str, ...]) -> Kind:
    """Lists of objects that have all the keys of one of the tuples."""

    def fits(value: Any) -> bool:
        found = _listed(value)
        return bool(found) and any(all(isinstance(x, dict) and set(each) <= set(x) for x in found) for each in keys)

    return Kind(" or ".join(f"a list of {{{', '.join(each)}}}" for each in keys), fits)


TEXT = Kind("text", lambda value: isinstance(value, str))
MESSAGES = list_of(("role", "content"), ("role", "tool_calls"), ("from", "value"))
PROMPT = Kind("text or messages", lambda value: isinstance(value, str) or bool(_first_role(value)))
ANSWER = Kind(
    "a text or assistant messages",
    lambda value: isinstance(value, str | dict) or _first_role(value) == "assistant",
)
CONVERSATION = Kind("messages from the first turn on", lambda value: _first_role(value) in ("user", "system"))

RANKED = ("preference", "ranking", "prompt")
SPOKEN = ("sft", "prompt")

SCHEMAS: dict[str, Schema] = {
    "preference": Schema(RANKED, {"prompt": PROMPT, "chosen": ANSWER, "rejected": ANSWER}, preference, 10),
    "preference_implicit": Schema(RANKED, {"chosen": CONVERSATION, "rejected": CONVERSATION}, preference, 10),
    "ranking": Schema(RANKED, {"prompt": PROMPT, "responses": list_of(("text", "rank"))}, ranking, 30),
    "messages": Schema(SPOKEN, {"messages": MESSAGES}, messages, 50),
    "conversations": Schema(SPOKEN, {"conversations": MESSAGES}, conversations, 51),
    "prompt_completion": Schema(SPOKEN, {"prompt": PROMPT, "completion": ANSWER}, prompt_completion, 53),
    "instruction_output": Schema(SPOKEN, {"instruction": TEXT, "output": TEXT}, instruction_output, 55),
    "prompt": Schema(("prompt",), {"prompt": PROMPT}, prompt, 58),
}
