"""Work in several processes, in order and with little of it in memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from recipes.data.text_files import DataError

AHEAD = 2  # items that wait for each process

_work: Callable | None = None  # of a worker process


def in_order(work: Callable[[Any], Any], items: Iterable, num_proc: int) -> Iterator:
    """`map(work, items)` by `num_proc` processes, which unlike those of `Pool.imap` read only a few items ahead.

    Processes are forked, as by `datasets`: they know what was registered in this one.
    """
    if num_proc < 2:
        yield from map(work, items)
        return
    pending = deque()
    with ProcessPoolExecutor(num_proc, get_context("fork"), _start, (work,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(_run, item))
                if len(pending) > AHEAD * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError("a process that formats rows was killed, perhaps for want of memory; use fewer") from None
        finally:
            for future in pending:
                future.cancel()


def _start(work: Callable) -> None:
    global _work
    _work = work


def _run(item: Any) -> Any:
    return _work(item)
