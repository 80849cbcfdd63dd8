"""Signals that end a run: it stops after the step it is in, and it does not outlive its launcher."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from recipes.cli.launch import requested

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers and schedulers often send the same signal twice, to the group and to each process, at once or nearly so.
SAME_SIGNAL_SECONDS = 5.0
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

_received: list[signal.Signals] = []


def received() -> signal.Signals | None:
    """The signal that asked this process to stop, while `stops_after_a_step` is active."""
    return _received[0] if _received else None


@contextlib.contextmanager
def stops_after_a_step() -> Iterator[None]:
    """Within, SIGTERM and SIGINT are only noted, for the trainer to stop in good order; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():  # only that one can handle signals
        yield
        return
    owner, first = os.getpid(), 0.0

    def note(number: int, frame) -> None:
        nonlocal first
        if os.getpid() != owner or (_received and time.monotonic() - first > SAME_SIGNAL_SECONDS):
            end(number)  # in a worker that was forked from this process, or a second time
        elif not _received:
            first = time.monotonic()  # before it is noted: the other signal may interrupt this function here
            _received.append(signal.Signals(number))
            text = f"\n{_received[0].name}: stopping after this step, with a checkpoint; once more ends at once.\n"
            os.write(2, text.encode() if os.environ.get("RANK", "0") == "0" else b"")

    # A program that was started in the background ignores Ctrl-C, and goes on to.
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    late = None
    try:
        yield
        late = received()  # it came after the last step
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()
    if late is not None:
        end(late)


def end(number: int) -> None:
    """What the signal does to a program that does not handle it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def die_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher ends, however it ends; only Linux can do that.

    `accelerate launch` with one process ends on SIGTERM without passing it on to what it launched.
    """
    if sys.platform != "linux" or (requested() is None and "TORCHELASTIC_RUN_ID" not in os.environ):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it ended just before
        end(signal.SIGTERM)
