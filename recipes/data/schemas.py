"""The table of dataset schemas: the columns by which each one is recognised, and the function that reads its rows."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.data import converters as convert
from recipes.data.converters import Converter
from recipes.data.messages import ROLES, describe, join_names
from recipes.data.oasst import conversation_trees
from recipes.data.text_files import DataError

TASKS = ("sft", "preference", "ranking", "prompt")
SPOKEN = ("sft", "prompt")
RANKED = ("preference", "ranking", "prompt")


@dataclass(frozen=True)
class Kind:
    """What the values of a column look like; `fits` is asked during detection only."""

    description: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Schema:
    """One entry of the table.

    `required` maps columns to the kind of their values. Of several schemas that fit, the lowest `order` wins; None
    means never to be detected, only to be asked for. `gather` turns all rows of a source into those that `convert`
    gets, where one row alone means nothing.
    """

    tasks: tuple[str, ...]
    required: Mapping[str, Kind]
    convert: Converter
    order: int | None = 0
    gather: Callable[[Iterable, str], Iterable] | None = None

    def misfits(self, columns: Iterable[str], sample: list[dict]) -> list[str]:
        """Why the columns, or most of the values in the sample, are not of this schema."""
        problems = [f"column {name!r} is missing" for name in self.required if name not in columns]
        for name, kind in self.required.items():
            values = [row[name] for row in sample if row.get(name) not in (None, "", [])]
            misfits = [value for value in values if not kind.fits(value)]
            if name in columns and kind is not ANY and (not values or 2 * len(misfits) > len(values)):
                found = describe(misfits[0]) if misfits else "nothing in it"
                problems.append(f"column {name!r} should hold {kind.description}, found {found}")
        return problems


def detect(columns: Iterable[str], sample: list[dict], task: str) -> tuple[str, str]:
    """Names the schema of a source from its column names and a sample of rows, and says why.

    Raises:
        DataError: no schema fits, or two fit equally well.
    """
    columns = set(columns)
    open_to = {name: schema for name, schema in SCHEMAS.items() if schema.order is not None}
    misfits = {name: schema.misfits(columns, sample) for name, schema in open_to.items()}
    fitting = [name for name, problems in misfits.items() if not problems]
    best = sorted((name for name in fitting if task in SCHEMAS[name].tasks), key=lambda name: SCHEMAS[name].order)
    if not best:  # where the names of the columns fit one schema, its errors say best what is wrong with the values
        named = [name for name, each in open_to.items() if task in each.tasks and columns.issuperset(each.required)]
        if named and not fitting:
            return min(named, key=lambda name: SCHEMAS[name].order), "column names only; the values do not fit"
        raise DataError(_no_schema(columns, sample, task, fitting, misfits))
    if len(best) > 1 and SCHEMAS[best[0]].order == SCHEMAS[best[1]].order:
        raise DataError(f"the columns fit {best[0]!r} as well as {best[1]!r}; choose one with --dataset_schema")
    return best[0], f"columns {', '.join(SCHEMAS[best[0]].required)}"


def _no_schema(columns: set, sample: list[dict], task: str, fitting: list[str], misfits: dict[str, list[str]]) -> str:
    found = f"no schema for task {task!r} fits the columns {join_names(sorted(map(str, columns))) or '(none)'}"
    if fitting:
        tasks = sorted({task for name in fitting for task in SCHEMAS[name].tasks})
        found += f"; they fit {join_names(map(repr, fitting))}, for the task {' or '.join(tasks)}"
    for column, value in sample[0].items() if len(sample) == 1 else ():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not fitting:
            return f"{found}; the one row holds a list of objects in {column!r}: save that list as the file"
    near = [
        (len(problems) / len(SCHEMAS[name].required), f"{name!r}: {join_names(problems)}")
        for name, problems in misfits.items()
        if task in SCHEMAS[name].tasks and len(problems) < len(SCHEMAS[name].required)
    ]
    if near:
        found += f" (nearly: {'; '.join(text for _, text in sorted(near)[:2])})"
    if "text" in columns and task in SPOKEN:
        found += "; for a text of '### Human:' and '### Assistant:' turns use --dataset_schema guanaco"
    return f"{found}; name the columns with --dataset_mapping, e.g. prompt=COLUMN, or use another --task"


def _list(value: Any) -> list:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def _first_role(value: Any) -> str | None:
    first = _list(value)[:1]
    role = first[0].get("role", first[0].get("from")) if first and isinstance(first[0], dict) else None
    return ROLES.get(role.lower(), role) if isinstance(role, str) else None


def list_of(*keys: tuple[str, ...]) -> Kind:
    """Lists of objects that have all the keys of one of the tuples."""

    def fits(value: Any) -> bool:
        found = _list(value)
        return bool(found) and any(all(isinstance(x, dict) and set(each) <= set(x) for x in found) for each in keys)

    return Kind(" or ".join(f"a list of {{{', '.join(each)}}}" for each in keys), fits)


ANY = Kind("anything", lambda value: True)
TEXT = Kind("text", lambda value: isinstance(value, str))
JSON_LIST = Kind("a list (as JSON)", lambda value: bool(_list(value)))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TRANSCRIPT = Kind(
    "a transcript 'Human: ... Assistant: ...'",
    lambda value: isinstance(value, str) and bool(re.match(r"\s*Human:.*\n\nAssistant:", value, re.DOTALL)),
)
MESSAGES = list_of(("role", "content"), ("role", "tool_calls"), ("from", "value"))
PROMPT = Kind("text or messages", lambda value: isinstance(value, str) or bool(_first_role(value)))
ANSWER = Kind(
    "a text or assistant messages",
    lambda value: isinstance(value, dict) or _first_role(value) == "assistant" or _is_plain(value),
)
CONVERSATION = Kind("messages from the first turn on", lambda value: _first_role(value) in ("user", "system"))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and not TRANSCRIPT.fits(value)


PAIR = {"chosen": ANSWER, "rejected": ANSWER}
PKU_SAFERLHF = {"prompt": PROMPT, "response_0": TEXT, "response_1": TEXT}

# In the order of detection. docs/datasets.md shows a row of each, and how to add one.
SCHEMAS: dict[str, Schema] = {
    # chosen and rejected
    "preference": Schema(RANKED, {"prompt": PROMPT, **PAIR}, convert.preferences("prompt"), 10),
    "preference_implicit": Schema(RANKED, dict.fromkeys(PAIR, CONVERSATION), convert.preferences("prompt"), 10),
    "preference_transcripts": Schema(RANKED, dict.fromkeys(PAIR, TRANSCRIPT), convert.transcripts, 10),
    "question_preference": Schema(RANKED, {"question": TEXT, **PAIR}, convert.preferences("question"), 10),
    "conversations_preference": Schema(
        RANKED, {"conversations": MESSAGES, **PAIR}, convert.conversations_preference, 10
    ),
    # two responses and a label
    "helpsteer2": Schema(
        RANKED,
        {"prompt": PROMPT, "response_1": TEXT, "response_2": TEXT, "preference_strength": ANY},
        convert.strength("prompt", "response_1", "response_2", "preference_strength"),
        20,
    ),
    "helpsteer3": Schema(
        RANKED,
        {"context": PROMPT, "response1": TEXT, "response2": TEXT, "overall_preference": ANY},
        convert.strength("context", "response1", "response2", "overall_preference"),
        20,
    ),
    "pku_saferlhf": Schema(
        RANKED, {**PKU_SAFERLHF, "better_response_id": ANY}, convert.better_response("better_response_id"), 20
    ),
    "pku_saferlhf_safer": Schema(
        RANKED, {**PKU_SAFERLHF, "safer_response_id": ANY}, convert.better_response("safer_response_id"), None
    ),
    "arena_conversations": Schema(
        RANKED,
        {"winner": TEXT, "conversation_a": MESSAGES, "conversation_b": MESSAGES},
        convert.arena_conversations,
        20,
    ),
    "arena_battles": Schema(
        RANKED,
        {
            **dict.fromkeys(("prompt", "response_a", "response_b"), JSON_LIST),
            **dict.fromkeys(("winner_model_a", "winner_model_b", "winner_tie"), ANY),
        },
        convert.arena_battles,
        20,
    ),
    "shp": Schema(RANKED, {"history": TEXT, "human_ref_A": TEXT, "human_ref_B": TEXT, "labels": ANY}, convert.shp, 20),
    "summarize_comparisons": Schema(
        RANKED, {"info": OBJECT, "summaries": list_of(("text",)), "choice": ANY}, convert.summaries, 20
    ),
    "webgpt": Schema(
        RANKED,
        {"question": OBJECT, "answer_0": TEXT, "answer_1": TEXT, "score_0": ANY, "score_1": ANY},
        convert.webgpt,
        20,
    ),
    # any number of ranked responses
    "ranking": Schema(RANKED, {"prompt": PROMPT, "responses": list_of(("text", "rank"))}, convert.ranking, 30),
    "nectar": Schema(
        RANKED,
        {"prompt": PROMPT, "answers": list_of(("answer", "rank"))},
        convert.rankings("answers", "answer", "rank"),
        30,
    ),
    "ultrafeedback": Schema(
        RANKED,
        {"instruction": TEXT, "completions": list_of(("response", "fine-grained_score"))},
        convert.ultrafeedback,
        30,
    ),
    # trees of messages
    "oasst": Schema(
        TASKS,
        {"message_id": TEXT, "parent_id": ANY, "role": TEXT, "text": TEXT},
        convert.oasst,
        40,
        gather=conversation_trees,
    ),
    # conversations
    "messages": Schema(SPOKEN, {"messages": MESSAGES}, convert.messages, 50),
    "conversations": Schema(SPOKEN, {"conversations": MESSAGES}, convert.conversations, 51),
    "conversation_pairs": Schema(
        SPOKEN, {"conversation": list_of(("input", "output"))}, convert.conversation_pairs, 52
    ),
    # a question and its answer
    "prompt_completion": Schema(SPOKEN, {"prompt": PROMPT, "completion": ANSWER}, convert.prompt_completion, 53),
    "open_orca": Schema(
        SPOKEN,
        {"system_prompt": ANY, "question": TEXT, "response": TEXT},
        convert.instructions("question", "response"),
        54,
    ),
    "instruction_output": Schema(
        SPOKEN, {"instruction": TEXT, "output": TEXT}, convert.instructions("instruction", "output"), 55
    ),
    "instruction_response": Schema(
        SPOKEN, {"instruction": TEXT, "response": TEXT}, convert.instructions("instruction", "response"), 55
    ),
    "question_answer": Schema(
        SPOKEN, {"question": TEXT, "answer": TEXT}, convert.instructions("question", "answer"), 56
    ),
    # prompts
    "prompt": Schema(("prompt",), {"prompt": PROMPT}, convert.prompt, 57),
    # only when asked for: a `text` column is otherwise plain text, of which nobody said who speaks
    "guanaco": Schema(SPOKEN, {"text": TEXT}, convert.guanaco, None),
}
