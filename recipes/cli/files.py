"""Atomic writes: a file appears under its name only when it is complete, also if the process is killed meanwhile."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError


def sync(path: str | os.PathLike) -> None:
    """Wait until a file, or the list of a folder's entries, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not os.path.isdir(path):  # some network disks cannot do it for folders
            raise
    finally:
        os.close(handle)


def is_write_error(error: BaseException) -> bool:
    """Whether an error says that a file could not be written, as on a full disk, whichever library wrote it."""
    by_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return by_torch or isinstance(error, OSError | SafetensorError)


def sync_tree(folder: str) -> None:
    """Wait until everything below a folder is on the disk."""
    for path in [Path(folder), *Path(folder).rglob("*")]:
        sync(path)


def sizes(folder: str) -> dict[str, int]:
    """Bytes of every file below a folder, by its path from there."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


@contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[TextIO]:
    """A text file to write that has either its old content or the new one, never a part of it."""
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        sync(partial)
        os.replace(partial, path)
        sync(os.path.dirname(path) or ".")
    finally:
        with suppress(OSError):  # it has its name
            os.remove(partial)


def write_text(path: str, text: str) -> None:
    with complete_file(path) as file:
        file.write(text)


def move_contents(source: str, target: str, last: str) -> None:
    """Move every file below `source` to the same place below `target`, each as a whole, and `last` after all others.

    Files of the same name are replaced, and the emptied `source` is removed. An older `last` goes first: it says that
    its `target` is whole.
    """
    sync_tree(source)
    Path(target, last).unlink(missing_ok=True)
    names = sorted(sizes(source), key=lambda name: name == last)
    folders = {os.path.dirname(os.path.join(target, name)) for name in names}
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    for name in names:
        if name == last:
            for folder in folders:
                sync(folder)
        os.replace(os.path.join(source, name), os.path.join(target, name))
    sync(target)
    shutil.rmtree(source)
