"""Work in several processes, in order and with few rows in memory.

`datasets.map(num_proc=…)` would need the source on disk a second time, as Arrow, and the errors of rows as columns.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any

BATCH = 1000  # rows that a process gets at a time
AHEAD = 4 * BATCH  # rows for each process that are read at a time; `Executor.map` alone would read all

_work: Callable | None = None  # of a worker process


def map_in_order(work: Callable[[Any], Any], rows: Iterable, num_proc: int) -> Iterator:
    """`map(work, rows)` by `num_proc` processes.

    They are forked, as by `datasets`: they know the schemas that were registered in this one.
    """
    if num_proc < 2:
        yield from map(work, rows)
        return
    rows = iter(rows)
    with ProcessPoolExecutor(num_proc, get_context("fork"), _start, (work,)) as pool:
        while window := list(islice(rows, AHEAD * num_proc)):
            yield from pool.map(_run, window, chunksize=BATCH)


def _start(work: Callable) -> None:
    global _work
    _work = work


def _run(row: Any) -> Any:
    return _work(row)
