"""The SQLite file behind a labelling job: opened safely, written in transactions, copied while in use."""

import sqlite3
import threading
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from urllib.parse import quote

from recipes.cli.errors import UserError
from recipes.labelling.files import new_file

BUSY_SECONDS = 10
VERSION = 2
WRITTEN_ONCE = ("prompt", "response", "gold", "guideline", "assignment", "event", "review")
SCHEMA = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8") + "".join(
    f"CREATE TRIGGER IF NOT EXISTS {table}_no_{change} BEFORE {change} ON {table}"
    f" BEGIN SELECT RAISE(ABORT, '{table} is written once'); END;"
    for table in WRITTEN_ONCE
    for change in ("update", "delete")
)


class Database:
    """A labelling database, made when `create` is set and the file is missing.

    WAL mode and synchronous=FULL: what was committed is on the disk. Every transaction has a connection of its own, so
    threads and processes may share the file, and a file that was taken away is noticed.

    Raises:
        UserError: no such file, or not a labelling database.
    """

    def __init__(self, path: str | Path, create: bool = False):
        self.path = Path(path)
        # Writers of this process wait in turn. SQLite lets those who wait look again now and then, and some starve.
        self._writing = threading.Lock()
        if create and not self.path.exists():
            try:
                with _new_database(self.path) as part, closing(sqlite3.connect(part, isolation_level=None)) as db:
                    db.execute("PRAGMA journal_mode = WAL")
                    db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            except UserError:
                if not self.path.exists():  # else another process has just made it
                    raise
        if not self.path.exists():
            raise UserError(f"{self.path}: no such database; `serve --samples FILE` makes one")
        try:
            # Held open: the write-ahead log would otherwise be folded in and deleted after every single call.
            self._anchor = self._connect()
            version = self._anchor.execute("PRAGMA user_version").fetchone()[0]
            if version == 1:
                self._anchor.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
                version = VERSION
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{self.path}: cannot be opened as a labelling database ({error})") from error
        if version != VERSION:
            raise UserError(f"{self.path}: not a labelling database of version {VERSION} (its version is {version})")

    def _connect(self):
        uri = f"file:{quote(str(self.path.absolute()))}?mode=rw"  # rw: a file that vanished is never made anew
        db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        return db

    @contextmanager
    def transaction(self, write: bool = False):
        """Yields a connection inside BEGIN … COMMIT; whatever is raised rolls back. Writers take turns."""
        with self._writing if write else nullcontext(), closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def backup(self, output: str | Path) -> None:
        """Writes a consistent copy, even while people work. Never overwrites."""
        with _new_database(output) as part, closing(self._connect()) as source, closing(sqlite3.connect(part)) as copy:
            source.backup(copy)

    def close(self) -> None:
        self._anchor.close()


def _new_database(path):
    """A new file, for its owner only. What a database of that name has left, SQLite would take for a part of it."""
    for left in (Path(f"{path}-wal"), Path(f"{path}-journal")):
        if left.exists() and not Path(path).exists():
            raise UserError(f"{left}: belongs to a database that is gone; move it away, or choose another name")
    return new_file(path, mode=0o600)
