"""Atomic creation of files: each appears under its name only when it is complete, and replaces nothing."""

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recipes.cli.errors import UserError
from recipes.cli.files import sync


@contextmanager
def new_file(path: str | Path, mode: int = 0o666) -> Iterator[Path]:
    """Yields an empty file beside `path` to write; it gets its name once the block has ended and it is on the disk.

    `mode`: its permissions, less the umask.

    Raises:
        UserError: `path` exists, or could not be written; it is as it was then.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        if path.exists():
            raise FileExistsError
        part.touch(mode, exist_ok=False)
        yield part
        sync(part)
        try:
            os.link(part, path)  # unlike a rename it fails where somebody else has made the file in the meantime
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.rename(part, path)
        sync(path.parent)
    except FileExistsError as error:
        raise UserError(f"{path}: exists already and was left as it is; choose another name") from error
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}; nothing was written") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
