"""The table of dataset schemas: the columns by which each one is recognised, and the function that reads its rows.

To add a schema, add an entry to `SCHEMAS` at the end of this file, its function to `recipes.data.converters`, a
fixture to tests/data/fixtures and a section to docs/datasets.md, which has a complete example: "A schema of your own".
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from recipes.data import converters as convert
from recipes.data.cells import Cells
from recipes.data.converters import Converter
from recipes.data.label_studio import annotations
from recipes.data.mapping import suggest_mapping
from recipes.data.messages import ROLES, Roles
from recipes.data.oasst import conversation_trees
from recipes.data.rows import DataError, RowError, RowProblem, join_names

TASKS = ("sft", "preference", "ranking", "prompt")
DIALOGUE = ("sft", "prompt")  # the tasks that a Dialogue serves
RANKED = ("preference", "ranking", "prompt")  # the tasks that a Ranking serves
PAIR = ("chosen", "rejected")
HELPSTEER2 = ("prompt", "response_1", "response_2", "preference_strength")
SAFERLHF = ("prompt", "response_0", "response_1")
BATTLE = ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie")


@dataclass(frozen=True)
class Schema:
    tasks: tuple[str, ...]  # what its rows can become
    columns: tuple[str, ...]  # that it needs; there may be others
    convert: Converter  # a schema fits a source if this works for most rows
    order: int | None = 0  # if several schemas fit, the lowest wins; None is never detected and must be named
    gather: Callable[[Iterable, str], Iterable] | None = None  # joins the rows of a source into those to convert

    def missing(self, columns: Collection[str]) -> list[str]:
        return [name for name in self.columns if name not in columns]

    def reads(self, sample: list[dict], roles: Roles) -> bool:
        """Whether at least half of the rows that have the columns can be read."""
        if self.gather:
            return True
        read, wrong = 0, 0
        for row in (row for row in sample if not self.missing(row)):
            try:
                self.convert(Cells(row), roles)
                read += 1
            except RowProblem as problem:
                wrong += isinstance(problem, RowError)
        return read > 0 and read >= wrong


def detect(
    columns: Iterable[str], sample: list[dict], task: str, roles: Roles = ROLES, unmapped: list[dict] | None = None
) -> tuple[str, str]:
    """Names the schema of a source from its column names and a sample of rows, and says why; raises DataError.

    `unmapped` are the rows before a mapping, for the advice in an error.
    """
    columns = set(columns)
    candidates = {name: schema for name, schema in SCHEMAS.items() if schema.order is not None}
    named = {name: schema for name, schema in candidates.items() if not schema.missing(columns)}
    serving = {name: schema for name, schema in named.items() if task in schema.tasks}
    fitting = sorted((schema.order, name) for name, schema in serving.items() if schema.reads(sample, roles))
    if fitting:
        best, *others = [name for order, name in fitting if order == fitting[0][0]]
        if others:
            raise DataError(f"the columns fit {best!r} as well as {others[0]!r}; choose one with --dataset_schema")
        return best, f"columns {join_names(SCHEMAS[best].columns)}"
    if serving:  # the errors of the rows say best what is wrong
        return max(serving, key=lambda name: len(serving[name].columns)), "column names only; the values do not fit"

    found = f"no schema for task {task!r} fits the columns {join_names(sorted(columns)) or '(none)'}"
    if others := [name for name, schema in named.items() if schema.reads(sample, roles)]:
        tasks = sorted({task for name in others for task in SCHEMAS[name].tasks})
        found += f"; they fit {join_names(map(repr, others))}, for the task {' or '.join(tasks)}"
    missing = {name: schema.missing(columns) for name, schema in candidates.items() if task in schema.tasks}
    for name in sorted(missing, key=lambda name: len(missing[name]) / len(SCHEMAS[name].columns))[:2]:
        if len(missing[name]) < len(SCHEMAS[name].columns):
            found += f"; nearly: {name!r}: {join_names(f'column {column!r} is missing' for column in missing[name])}"
    if any(re.search(r"[.?!]\s*$", name) for name in columns):
        found += "; these look like data: does the file lack the line with the names of its columns?"
    if "text" in columns and task in DIALOGUE:
        found += "; for a text of '### Human:' and '### Assistant:' turns use --dataset_schema guanaco"
    raise DataError(f"{found}; name the columns, perhaps: {suggest_mapping(unmapped or sample, task)}")


# docs/datasets.md shows a row of each schema, and how to add one.
SCHEMAS: dict[str, Schema] = {
    # chosen and rejected
    "preference_implicit": Schema(RANKED, PAIR, convert.preferences(), 9),
    "preference_transcripts": Schema(RANKED, PAIR, convert.transcripts, 9),
    "preference": Schema(RANKED, ("prompt", *PAIR), convert.preferences("prompt"), 10),
    "question_preference": Schema(RANKED, ("question", *PAIR), convert.preferences("question"), 10),
    "instruction_preference": Schema(RANKED, ("instruction", *PAIR), convert.preferences("instruction"), 10),
    "openai_preference": Schema(
        RANKED, ("input", "preferred_output", "non_preferred_output"), convert.openai_preference, 10
    ),
    "conversations_preference": Schema(RANKED, ("conversations", *PAIR), convert.conversations_preference, 10),
    # two responses and a label
    "helpsteer2": Schema(RANKED, HELPSTEER2, convert.helpsteer2, 20),
    "helpsteer3": Schema(RANKED, ("context", "response1", "response2", "overall_preference"), convert.helpsteer3, 20),
    "pku_saferlhf": Schema(RANKED, (*SAFERLHF, "better_response_id"), convert.pku_saferlhf, 20),
    "pku_saferlhf_safer": Schema(RANKED, (*SAFERLHF, "safer_response_id"), convert.pku_saferlhf_safer, None),
    "arena_conversations": Schema(
        RANKED, ("winner", "conversation_a", "conversation_b"), convert.arena_conversations, 20
    ),
    "arena_battles": Schema(RANKED, BATTLE, convert.arena_battles, 20),
    "shp": Schema(RANKED, ("history", "human_ref_A", "human_ref_B", "labels"), convert.shp, 20),
    "summarize_comparisons": Schema(RANKED, ("info", "summaries", "choice"), convert.summaries, 20),
    "webgpt": Schema(RANKED, ("question", "answer_0", "answer_1", "score_0", "score_1"), convert.webgpt, 20),
    # any number of ranked responses
    "ranking": Schema(RANKED, ("prompt", "responses"), convert.ranking, 30),
    "nectar": Schema(RANKED, ("prompt", "answers"), convert.nectar, 30),
    "ultrafeedback": Schema(RANKED, ("instruction", "completions"), convert.ultrafeedback, 30),
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
    "open_orca": Schema(DIALOGUE, ("question", "response"), convert.answer_to("question", "response"), 54),
    "instruction_output": Schema(DIALOGUE, ("instruction", "output"), convert.answer_to("instruction", "output"), 55),
    "instruction_response": Schema(
        DIALOGUE, ("instruction", "response"), convert.answer_to("instruction", "response"), 55
    ),
    "question_answer": Schema(DIALOGUE, ("question", "answer"), convert.answer_to("question", "answer"), 56),
    # prompts
    "prompt": Schema(("prompt",), ("prompt",), convert.prompt("prompt"), 57),
    "instruction": Schema(("prompt",), ("instruction",), convert.prompt("instruction"), 58),
    # only if named: most columns called `text` hold plain text without roles
    "guanaco": Schema(DIALOGUE, ("text",), convert.guanaco, None),
}
