"""Label Studio's exports (JSON and JSON-MIN) as rows of a prompt and responses, or of a prompt and a completion.

Understood are the tags Pairwise (two texts, one is selected), Ranker without buckets (items in order) and TextArea (a
written answer). A task may have several annotations: each becomes a row.
"""

from collections.abc import Iterable, Iterator

from recipes.data.cells import Cells, as_object, decode_json
from recipes.data.messages import CONTEXT, MEDIA, refuse
from recipes.data.rows import Row, RowError, RowProblem, Skip, describe, join_names

PROMPTS = ("prompt", "instruction", "question", "query", "text")
OWN = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time")  # columns of JSON-MIN


def annotations(rows: Iterable[Row], task: str) -> Iterator[Row]:
    """Rows that `converters.joined` reads. The prompt is the mapping's, or the first of `PROMPTS` that is there."""
    for row in rows:
        try:
            yield from (row._replace(data=found) for found in _annotations(Cells(row.read()), task))
        except RowProblem as problem:
            yield row._replace(data=problem)


def _annotations(row: Cells, task: str) -> Iterator[dict | RowProblem]:
    if "annotations" in row:
        data = Cells(row.object("data"))
    else:
        data = Cells({name: row[name] for name in row if name not in OWN})
    refuse(data, MEDIA)
    mapped = "annotations" in row and "prompt" in row
    named = None if mapped else next((name for name in PROMPTS if name in data), None)
    if named is None and not mapped:
        advice = "name it: --dataset_mapping data=data annotations=annotations prompt=data.NAME"
        raise RowError(f"found no prompt among {join_names(data)}; {advice}", "data")
    prompt = {"prompt": row["prompt"] if mapped else data[named]}
    prompt |= {name: cells[name] for cells in (data, row) for name in CONTEXT if name in cells}
    if task == "prompt":
        yield prompt
        return
    used = {*CONTEXT, named, *(name for name in data if mapped and data[name] == row["prompt"])}
    data = Cells({name: data[name] for name in data if name not in used})
    wanted = ("textarea",) if task == "sft" else ("pairwise", "ranker")
    for found in list(row.objects("annotations")) if "annotations" in row else [data]:
        try:
            results = [result for result in _results(found) if result.get("type") in wanted]
            if len(results) != 1:
                raise Skip(f"found {len(results)} results of {' or '.join(wanted)}, expected one", found.place or None)
            yield prompt | _READERS[results[0]["type"]](results[0], data, found.place)
        except RowProblem as problem:
            yield problem


def _results(found: Cells) -> list[dict]:
    """The results, {type, value, to_name}, of an annotation at a place, or in the columns of JSON-MIN.

    There a column has the value, or a list of values, of a tag; written texts are plain columns.
    """
    if found.place:
        if found.flag("was_cancelled"):
            raise Skip("cancelled", found.place)
        return [result for result in found.entries("result") if isinstance(result, dict)]
    kinds, results = {"selected": "pairwise", "ranker": "ranker"}, []
    for name, cell in found.items():
        if isinstance(cell, str) and cell.startswith(("[{", '{"')):  # in CSV
            cell = decode_json(cell, name, "a result")
        for value in cell if isinstance(cell, list) else [cell]:
            keys = kinds.keys() & value.keys() if isinstance(value, dict) else ()
            results += [{"type": kinds[key], "value": value} for key in keys]
    return results


def _pairwise(result: dict, data: dict, place: str) -> dict:
    selected = as_object(result.get("value"), place).get("selected")
    if selected not in ("left", "right"):
        raise RowError(f"found {describe(selected)}, expected left or right", place)
    names = str(result.get("to_name", "answer1,answer2")).replace(" ", "").split(",")
    if not data.keys() >= set(names):  # names of tags that are not those of the data
        names = [name for name in data if isinstance(data[name], str)]
    if len(names) != 2:
        raise RowError(f"cannot tell which two of {join_names(data)} were compared", place)
    first, second = names if selected == "left" else reversed(names)
    return {"responses": [{"text": data[first], "rank": 1}, {"text": data[second], "rank": 2}]}


def _ranker(result: dict, data: dict, place: str) -> dict:
    order = as_object(result.get("value"), place).get("ranker")
    if isinstance(order, dict) and len(order) == 1:
        (order,) = order.values()
    if not isinstance(order, list):
        raise RowError("the items lie in buckets, which have no order; use a Ranker without buckets", place)
    cells = (item for cell in data.values() if isinstance(cell, list) for item in cell if isinstance(item, dict))
    texts = {str(item.get("id")): item.get("body", item.get("text")) for item in cells}
    if unknown := [name for name in order if str(name) not in texts]:
        raise RowError(f"{describe(unknown[0])} is the id of no item", place)
    return {"responses": [{"text": texts[str(name)], "rank": rank} for rank, name in enumerate(order, 1)]}


def _textarea(result: dict, data: dict, place: str) -> dict:
    text = as_object(result.get("value"), place).get("text")
    if isinstance(text, list) and len(text) == 1:
        (text,) = text
    if not isinstance(text, str):
        raise RowError(f"found {describe(text)}, expected one text", place)
    return {"completion": text}


_READERS = {"pairwise": _pairwise, "ranker": _ranker, "textarea": _textarea}
