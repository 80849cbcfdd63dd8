"""Keeps training and evaluation apart: no prompt of one may be in the other."""

import hashlib
from typing import TYPE_CHECKING

import numpy

from recipes.data.report import Report
from recipes.data.rows import DataError, Row
from recipes.data.tasks import group_id

if TYPE_CHECKING:
    from datasets import Dataset


def check_leakage(train: "Dataset", test: "Dataset") -> Report:
    """Flags the rows of `test` whose prompt is also a prompt in `train`; both come from `format_dataset`."""
    shared = numpy.isin(_prompt_digests(test), _prompt_digests(train))
    report = Report("test", "leakage", reason="rows whose prompt is not in train", rows_in=len(test))
    report.rows_out = len(test) - int(shared.sum())
    for index in numpy.flatnonzero(shared):
        report.add("flags", Row("test", int(index) + 1, None), "the prompt is also in train")
    return report


def _prompt_digests(dataset: "Dataset") -> numpy.ndarray:
    """(rows,) uint64, equal for equal prompts."""
    column = next(name for name in ("group_id", "prompt", "messages") if name in dataset.column_names)
    values = (row[column] for row in dataset.select_columns(column))
    if column != "group_id":
        values = (group_id(value[:-1] if column == "messages" else value) for value in values)
    return numpy.fromiter((int(value, 16) for value in values), numpy.uint64, len(dataset))


def split_by_group(dataset: "Dataset", test_size: float, seed: int = 0) -> tuple["Dataset", "Dataset | None"]:
    """Splits into (train, test) so that all rows of one prompt fall on the same side.

    Args:
        test_size: share of the prompts, between 0 and 1, that goes to test. The side of a prompt depends on nothing
            but the prompt and the seed, so it stays when rows are added; but of two prompts or more, at least one goes
            to each side. A single prompt cannot be split: test is `None`.
    """
    if not 0 < test_size < 1:
        raise DataError(f"the share of the test split is {test_size}; expected a number between 0 and 1")
    hashes = (hashlib.sha256(f"{seed}:{digest:016x}".encode()).digest() for digest in _prompt_digests(dataset))
    places = numpy.fromiter((int.from_bytes(each[:8]) / 2**64 for each in hashes), float, len(dataset))
    distinct = numpy.unique(places)
    if len(distinct) < 2:
        return dataset, None
    # From the second lowest place up to the highest, so that the lowest is always below and the highest never.
    in_test = places < min(max(test_size, distinct[1]), distinct[-1])
    return dataset.select(numpy.flatnonzero(~in_test)), dataset.select(numpy.flatnonzero(in_test))
