"""The table of dataset schemas: the columns by which each one is recognised, and the function that reads its rows.

To add a schema, add an entry to `SCHEMAS` at the end of this file, its function to `recipes.data.converters`, a
fixture to tests/data/fixtures and a section to docs/datasets.md, which has a complete example: "A schema of your own".
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from recipes.data import converters as convert
from recipes.data.converters import Converter
from recipes.data.label_studio import annotations
from recipes.data.mapping import suggest_mapping
from recipes.data.messages import ROLES, Roles, is_turns
from recipes.data.oasst import conversation_trees
from recipes.data.rows import DataError, RowError, Skip, join_names

TASKS = ("sft", "preference", "ranking", "prompt")
DIALOGUE = ("sft", "prompt")  # the tasks that a Dialogue serves
RANKED = ("preference", "ranking", "prompt")  # the tasks that a Ranking serves
HELPSTEER2 = ("prompt", "response_1", "response_2", "preference_strength")
SAFERLHF = ("prompt", "response_0", "response_1")
HELPSTEER3 = ("context", "response1", "response2", "overall_preference")


@dataclass(frozen=True)
class Schema:
    """One entry of the table.

    Args:
        tasks: what rows of this schema can become.
        columns: the columns that it needs; there may be others.
        convert: turns a row into a `Dialogue` or a `Ranking`. A schema fits a source if this works for most rows.
        order: if several schemas fit, the lowest order wins; None is never detected and must be named.
        gather: joins all rows of a source into the rows that `convert` gets, for tables of single messages.
    """

    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    convert: Converter
    order: int | None = 0
    gather: Callable[[Iterable, str], Iterable] | None = None

    def problems(self, columns: Iterable[str], sample: list[dict], roles: Roles) -> list[str]:
        """Why the columns, or most rows of the sample, do not fit this schema; empty if they fit."""
        missing = [f"column {name!r} is missing" for name in self.columns if name not in columns]
        if missing or self.gather:
            return missing
        read, errors, skips = 0, [], []
        for row in (row for row in sample if row.keys() >= set(self.columns)):
            try:
                self.convert(row, roles)
                read += 1
            except RowError as error:
                errors.append(f"{error.column}: {error.message}")
            except Skip as skip:
                read += skip.prompt is not None  # its responses are of no use, yet they could be read
                skips.append(f"{skip.column}: {skip.message}")
        if read and read >= len(errors):
            return []
        return (errors or skips or ["no row has all of its columns"])[:1]


def detect(
    columns: Iterable[str], sample: list[dict], task: str, roles: Roles = ROLES, unmapped: list[dict] | None = None
) -> tuple[str, str]:
    """Names the schema of a source from its column names and a sample of rows, and says why.

    `unmapped` are the rows before a mapping, for the advice in an error.

    Raises:
        DataError: no schema fits, or two fit equally well.
    """
    columns = set(columns)
    candidates = {name: schema for name, schema in SCHEMAS.items() if schema.order is not None}
    problems = {name: schema.problems(columns, sample, roles) for name, schema in candidates.items()}
    fitting = [name for name in candidates if not problems[name]]
    best = sorted((name for name in fitting if task in SCHEMAS[name].tasks), key=lambda name: SCHEMAS[name].order)
    if not best:  # if only the names of the columns fit, the errors of the rows say best what is wrong
        named = [name for name, each in candidates.items() if task in each.tasks and columns.issuperset(each.columns)]
        if named:
            return max(named, key=lambda name: len(SCHEMAS[name].columns)), "column names only; the values do not fit"
        advice = f"name the columns, perhaps: {suggest_mapping(unmapped or sample, task)}"
        raise DataError(f"{_no_schema(columns, sample, task, fitting, problems)}; {advice}")
    if len(best) > 1 and SCHEMAS[best[0]].order == SCHEMAS[best[1]].order:
        raise DataError(f"the columns fit {best[0]!r} as well as {best[1]!r}; choose one with --dataset_schema")
    return best[0], f"columns {', '.join(SCHEMAS[best[0]].columns)}"


def _no_schema(columns: set, sample: list[dict], task: str, fitting: list[str], problems: Mapping[str, list]) -> str:
    found = f"no schema for task {task!r} fits the columns {join_names(sorted(map(str, columns))) or '(none)'}"
    if fitting:
        tasks = sorted({task for name in fitting for task in SCHEMAS[name].tasks})
        found += f"; they fit {join_names(map(repr, fitting))}, for the task {' or '.join(tasks)}"
    for column, value in sample[0].items() if len(sample) == 1 else ():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not fitting and not is_turns(value):
            found += f"; the one row holds a list of objects in {column!r}: save that list as the file"
    near = sorted(
        (len(problems[name]) / len(SCHEMAS[name].columns), f"{name!r}: {join_names(problems[name])}")
        for name in problems
        if task in SCHEMAS[name].tasks and 0 < len(problems[name]) < len(SCHEMAS[name].columns)
    )
    if near:
        found += f" (nearly: {'; '.join(text for _, text in near[:2])})"
    if any(re.search(r"[.?!]\s*$", str(name)) for name in columns):
        found += "; these look like data: does the file lack the line with the names of its columns?"
    if "text" in columns and task in DIALOGUE:
        found += "; for a text of '### Human:' and '### Assistant:' turns use --dataset_schema guanaco"
    return found


# docs/datasets.md shows a row of each schema, and how to add one.
SCHEMAS: dict[str, Schema] = {
    # chosen and rejected
    "preference_implicit": Schema(RANKED, ("chosen", "rejected"), convert.preferences(), 9),
    "preference_transcripts": Schema(RANKED, ("chosen", "rejected"), convert.transcripts, 9),
    "preference": Schema(RANKED, ("prompt", "chosen", "rejected"), convert.preferences("prompt"), 10),
    "question_preference": Schema(RANKED, ("question", "chosen", "rejected"), convert.preferences("question"), 10),
    "instruction_preference": Schema(
        RANKED, ("instruction", "chosen", "rejected"), convert.preferences("instruction"), 10
    ),
    "openai_preference": Schema(
        RANKED, ("input", "preferred_output", "non_preferred_output"), convert.openai_preference, 10
    ),
    "conversations_preference": Schema(
        RANKED, ("conversations", "chosen", "rejected"), convert.conversations_preference, 10
    ),
    # two responses and a label
    "helpsteer2": Schema(RANKED, HELPSTEER2, convert.strength(*HELPSTEER2), 20),
    "helpsteer3": Schema(RANKED, HELPSTEER3, convert.strength(*HELPSTEER3), 20),
    "pku_saferlhf": Schema(
        RANKED, (*SAFERLHF, "better_response_id"), convert.better_response("better_response_id"), 20
    ),
    "pku_saferlhf_safer": Schema(
        RANKED, (*SAFERLHF, "safer_response_id"), convert.better_response("safer_response_id"), None
    ),
    "arena_conversations": Schema(
        RANKED, ("winner", "conversation_a", "conversation_b"), convert.arena_conversations, 20
    ),
    "arena_battles": Schema(
        RANKED,
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        convert.arena_battles,
        20,
    ),
    "shp": Schema(RANKED, ("history", "human_ref_A", "human_ref_B", "labels"), convert.shp, 20),
    "summarize_comparisons": Schema(RANKED, ("info", "summaries", "choice"), convert.summaries, 20),
    "webgpt": Schema(RANKED, ("question", "answer_0", "answer_1", "score_0", "score_1"), convert.webgpt, 20),
    # any number of ranked responses
    "ranking": Schema(RANKED, ("prompt", "responses"), convert.ranking, 30),
    "nectar": Schema(RANKED, ("prompt", "answers"), convert.rankings("answers", "answer", "rank"), 30),
    # by fine-grained_score: overall_score holds parsing errors (10 that means 1)
    "ultrafeedback": Schema(
        RANKED,
        ("instruction", "completions"),
        convert.rankings("completions", "response", "fine-grained_score", "instruction", scores=True),
        30,
    ),
    "distilabel": Schema(RANKED, ("instruction", "generations", "ratings"), convert.distilabel, 30),
    # trees of messages
    "oasst": Schema(TASKS, ("message_id", "parent_id", "role", "text"), convert.joined, 40, conversation_trees),
    # exports of an annotation tool
    "label_studio": Schema((*RANKED, "sft"), ("data", "annotations"), convert.joined, 41, annotations),
    "label_studio_min": Schema(RANKED, ("annotation_id", "annotator", "lead_time"), convert.joined, 41, annotations),
    # conversations
    "messages": Schema(DIALOGUE, ("messages",), convert.dialogue("messages"), 50),
    "conversations": Schema(DIALOGUE, ("conversations",), convert.dialogue("conversations"), 51),
    "conversation_pairs": Schema(DIALOGUE, ("conversation",), convert.conversation_pairs, 52),
    # a question and its answer
    "prompt_completion": Schema(DIALOGUE, ("prompt", "completion"), convert.prompt_completion, 53),
    "open_orca": Schema(DIALOGUE, ("question", "response"), convert.instructions("question", "response"), 54),
    "instruction_output": Schema(
        DIALOGUE, ("instruction", "output"), convert.instructions("instruction", "output"), 55
    ),
    "instruction_response": Schema(
        DIALOGUE, ("instruction", "response"), convert.instructions("instruction", "response"), 55
    ),
    "question_answer": Schema(DIALOGUE, ("question", "answer"), convert.instructions("question", "answer"), 56),
    # prompts
    "prompt": Schema(("prompt",), ("prompt",), convert.prompt("prompt"), 57),
    "instruction": Schema(("prompt",), ("instruction",), convert.prompt("instruction"), 58),
    # only if named: most columns called `text` hold plain text without roles
    "guanaco": Schema(DIALOGUE, ("text",), convert.guanaco, None),
}
