"""The tables of a labelling database. Answers are events: written once, never changed, so nothing can be lost."""

VERSION = 1

TABLES = """
CREATE TABLE prompt (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,         -- hash of the messages and the responses: importing twice changes nothing
    sample_id TEXT NOT NULL,         -- its id in the file it came from
    messages TEXT NOT NULL,          -- JSON
    source TEXT NOT NULL
);
CREATE TABLE response (
    id TEXT PRIMARY KEY,             -- hash of prompt and text: tells a labeler nothing about model or file order
    prompt_id TEXT NOT NULL REFERENCES prompt (id),
    sample_id TEXT NOT NULL,
    text TEXT NOT NULL,
    model TEXT,
    sampling TEXT                    -- JSON
);
CREATE INDEX response_prompt ON response (prompt_id);
CREATE TABLE gold (                  -- attention tasks: prompts whose right ranking is known
    prompt_id TEXT PRIMARY KEY REFERENCES prompt (id),
    tiers TEXT NOT NULL              -- JSON: lists of response ids, best first
);
CREATE TABLE guideline (
    version INTEGER PRIMARY KEY,
    text TEXT NOT NULL UNIQUE
);
CREATE TABLE labeler (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    token_hash TEXT UNIQUE           -- null: may use the terminal, cannot log in
);
CREATE TABLE session (
    id_hash TEXT PRIMARY KEY,
    labeler_id INTEGER NOT NULL REFERENCES labeler (id),
    expires REAL NOT NULL
);
CREATE TABLE assignment (
    prompt_id TEXT NOT NULL REFERENCES prompt (id),
    labeler_id INTEGER NOT NULL REFERENCES labeler (id),
    shown TEXT NOT NULL,             -- JSON: response ids in the order this labeler sees
    assigned_at REAL NOT NULL,
    PRIMARY KEY (prompt_id, labeler_id)
);
CREATE INDEX assignment_labeler ON assignment (labeler_id);
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    prompt_id TEXT NOT NULL,
    labeler_id INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('draft', 'submit', 'edit', 'skip', 'flag', 'undo')),
    undoes INTEGER REFERENCES event (id) CHECK ((undoes IS NULL) = (kind != 'undo')),
    tiers TEXT,                      -- JSON, as in gold
    comment TEXT NOT NULL,           -- why overall; for a flag, what is wrong
    active_seconds REAL NOT NULL,    -- since the labeler's event before
    key TEXT NOT NULL UNIQUE,        -- idempotency: the same key is stored once
    digest TEXT NOT NULL,            -- of what was sent under that key
    guideline_version INTEGER REFERENCES guideline (version),
    server_time REAL NOT NULL,       -- seconds since 1970, UTC
    client_time REAL,
    FOREIGN KEY (prompt_id, labeler_id) REFERENCES assignment (prompt_id, labeler_id)
);
CREATE INDEX event_task ON event (prompt_id, labeler_id);
CREATE UNIQUE INDEX event_undone ON event (undoes) WHERE undoes IS NOT NULL;
CREATE TABLE review (
    event_id INTEGER NOT NULL REFERENCES event (id),
    response_id TEXT NOT NULL REFERENCES response (id),
    justification TEXT NOT NULL,
    rating INTEGER CHECK (rating BETWEEN 1 AND 7),
    flags TEXT NOT NULL,             -- JSON
    PRIMARY KEY (event_id, response_id)
);

-- Where a labeler stands with a prompt: the last answer that is neither undone nor followed by another.
CREATE VIEW standing AS
SELECT * FROM event AS e
WHERE e.kind IN ('submit', 'edit', 'skip', 'flag')
  AND NOT EXISTS (SELECT 1 FROM event AS u WHERE u.undoes = e.id)
  AND NOT EXISTS (
    SELECT 1 FROM event AS later
    WHERE later.prompt_id = e.prompt_id AND later.labeler_id = e.labeler_id AND later.id > e.id
      AND later.kind IN ('submit', 'edit', 'skip', 'flag')
      AND NOT EXISTS (SELECT 1 FROM event AS u WHERE u.undoes = later.id)
  );
CREATE VIEW current_ranking AS SELECT * FROM standing WHERE kind IN ('submit', 'edit');
"""

WRITTEN_ONCE = ("prompt", "response", "gold", "guideline", "assignment", "event", "review")

TRIGGERS = "".join(
    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} is written once'); END;\n"
    for table in WRITTEN_ONCE
    for verb in ("UPDATE", "DELETE")
)
