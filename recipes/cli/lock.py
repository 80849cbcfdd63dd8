"""A lock that one process holds on a file or folder, and that is gone with the process, however it ends."""

import fcntl
import os
import socket

from recipes.cli.errors import UserError

_held: dict[str, int] = {}  # open files by path: `flock` belongs to the open file
_made: set[str] = set()  # folders that were made for a lock


def hold(path: str, what: str) -> None:
    """Hold the lock file `path` until `release`, or until this process ends; refuse where another holds `what`."""
    path = os.path.abspath(path)
    if path in _held:
        return
    if not os.path.isdir(folder := os.path.dirname(path)):
        os.makedirs(folder)
        _made.add(folder)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise UserError(f"{what} is in use by {owner or 'another run'}: wait for it, or stop it first.") from None
        except OSError as error:
            os.unlink(path)
            os.close(handle)
            raise UserError(f"{what} is on a disk that locks no files ({error.strerror}): choose another.") from error
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(handle)  # its last holder removed this file between our two calls
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[path] = handle


def release(path: str) -> None:
    """Give a lock back and remove its file."""
    path = os.path.abspath(path)
    if path in _held:
        os.unlink(path)
        os.close(_held.pop(path))


def release_all() -> None:
    """Give back every lock of this process, and remove the folders that were made for a lock and stayed empty."""
    for path in [*_held]:
        release(path)
    for folder in _made:
        if os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
    _made.clear()


def _close_in_child() -> None:
    for handle in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)  # a worker that outlives this process holds nothing
