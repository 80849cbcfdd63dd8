"""A set of 8-byte digests whose memory does not grow with their number."""

import sqlite3


class Digests:
    """In a temporary file that SQLite deletes; 16 MiB of it, about a million digests, are cached in memory."""

    def __init__(self):
        # not the same thread: `datasets` may read a stream in another one
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._file.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;"
            "CREATE TABLE seen (digest INTEGER PRIMARY KEY); BEGIN"
        )

    def add(self, digest: bytes) -> bool:
        """Adds a digest; returns whether it was there before."""
        number = int.from_bytes(digest, signed=True)
        return self._file.execute("INSERT OR IGNORE INTO seen VALUES (?)", (number,)).rowcount == 0
