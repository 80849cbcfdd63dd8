"""Who may label: names, tokens and login sessions. The database holds hashes only: reading it lets nobody log in."""

import hashlib
import secrets
import time
from typing import NamedTuple

from recipes.cli.errors import UserError, visible
from recipes.labelling.answers import is_blank
from recipes.labelling.database import Database

SESSION_SECONDS = 14 * 24 * 3600
MAX_NAME = 80
TOKEN_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"  # without i, l, o and u, which are misread
MISREAD = str.maketrans("ilo", "110")


class Labeler(NamedTuple):
    id: int
    name: str


def _hash(secret):
    # For secrets of 192 random bits or more: a slow hash would protect nothing further.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _new_token():
    return "-".join("".join(secrets.choice(TOKEN_LETTERS) for _ in range(4)) for _ in range(3))


def _token_hash(token):
    """A token is short, 60 bits, so that people can type it, and the hash slow, so that nobody with a copy of the
    database can try them all. All share one salt, because a token is random and is looked up by its hash."""
    typed = token.lower().translate(MISREAD)
    letters = "".join(c for c in typed if c in TOKEN_LETTERS)
    return "scrypt:" + hashlib.scrypt(letters.encode(), salt=b"recipes.labelling", n=2**13, r=8, p=1).hex()


def add_labeler(database: Database, name: str, new_token: bool = False) -> str:
    """Adds a labeler, or with `new_token` gives a known one another token and ends their sessions.

    Returns the token to log in with. It is not stored and cannot be shown again.
    """
    name = name.strip()
    # `isprintable` refuses the joiners of Persian and Sinhala names, and the wide space of Japanese ones.
    if is_blank(name) or len(name) > MAX_NAME or visible(name) != name or {"\n", "\t"} & {*name}:
        raise UserError(f"a labeler's name has 1 to {MAX_NAME} printable characters, not {name!r}")
    token = _new_token()
    token_hash = _token_hash(token)
    with database.transaction(write=True) as db:
        known = db.execute("SELECT id FROM labeler WHERE name = ?", (name,)).fetchone()
        if known and not new_token:
            raise UserError(f"labeler {name!r} exists; --new_token replaces a lost token")
        if new_token and not known:
            raise UserError(f"there is no labeler {name!r} in {database.path}; leave --new_token out to add one")
        if known:
            db.execute("UPDATE labeler SET token_hash = ? WHERE id = ?", (token_hash, known["id"]))
            db.execute("DELETE FROM session WHERE labeler_id = ?", (known["id"],))
        else:
            db.execute("INSERT INTO labeler (name, token_hash) VALUES (?, ?)", (name, token_hash))
    return token


def labelers(database: Database) -> list[Labeler]:
    with database.transaction() as db:
        return [Labeler(*row) for row in db.execute("SELECT id, name FROM labeler ORDER BY id")]


def named_labeler(database: Database, name: str) -> Labeler:
    """For the terminal, where having the file is the permission: the labeler of that name, added if new."""
    name = name.strip()
    if name not in (labeler.name for labeler in labelers(database)):
        add_labeler(database, name)
    return next(labeler for labeler in labelers(database) if labeler.name == name)


def log_in(database: Database, token: str) -> str | None:
    """Returns the secret id of a new session, or None for an unknown token."""
    hashes = (_token_hash(token[:MAX_NAME]), _hash(token.strip()))  # the second of a token that version 1 gave
    session = secrets.token_urlsafe(32)
    with database.transaction(write=True) as db:
        row = db.execute("SELECT id FROM labeler WHERE token_hash IN (?, ?)", hashes).fetchone()
        if row is None:
            return None
        db.execute("DELETE FROM session WHERE expires < ?", (time.time(),))
        db.execute("INSERT INTO session VALUES (?, ?, ?)", (_hash(session), row["id"], time.time() + SESSION_SECONDS))
    return session


def session_labeler(database: Database, session: str) -> Labeler | None:
    with database.transaction() as db:
        row = db.execute(
            "SELECT l.id, l.name FROM session AS s JOIN labeler AS l ON l.id = s.labeler_id"
            " WHERE s.id_hash = ? AND s.expires > ?",
            (_hash(session), time.time()),
        ).fetchone()
    return Labeler(*row) if row else None


def log_out(database: Database, session: str) -> None:
    with database.transaction(write=True) as db:
        db.execute("DELETE FROM session WHERE id_hash = ?", (_hash(session),))
