-- What a labelling database holds. Answers are events: written once, never changed, so nothing can be lost.
-- This makes a new database, upgrades one of version 1, and changes nothing in one of version 2: of two processes that
-- upgrade at once, the second finds it done.

CREATE TABLE IF NOT EXISTS prompt (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,         -- hash of the messages and the responses: importing twice changes nothing
    sample_id TEXT NOT NULL,         -- its id in the file it came from
    messages TEXT NOT NULL,          -- JSON
    source TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS response (
    id TEXT PRIMARY KEY,             -- hash of prompt and text: tells a labeler nothing about model or file order
    prompt_id TEXT NOT NULL REFERENCES prompt (id),
    sample_id TEXT NOT NULL,
    text TEXT NOT NULL,
    model TEXT,
    sampling TEXT                    -- JSON
);
CREATE INDEX IF NOT EXISTS response_prompt ON response (prompt_id);
CREATE TABLE IF NOT EXISTS gold (                  -- attention tasks: prompts whose right ranking is known
    prompt_id TEXT PRIMARY KEY REFERENCES prompt (id),
    tiers TEXT NOT NULL              -- JSON: lists of response ids, best first
);
CREATE TABLE IF NOT EXISTS guideline (
    version INTEGER PRIMARY KEY,
    text TEXT NOT NULL UNIQUE
);
CREATE TABLE IF NOT EXISTS labeler (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    token_hash TEXT UNIQUE           -- null: may use the terminal, cannot log in
);
CREATE TABLE IF NOT EXISTS session (
    id_hash TEXT PRIMARY KEY,
    labeler_id INTEGER NOT NULL REFERENCES labeler (id),
    expires REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS assignment (
    prompt_id TEXT NOT NULL REFERENCES prompt (id),
    labeler_id INTEGER NOT NULL REFERENCES labeler (id),
    shown TEXT NOT NULL,             -- JSON: response ids in the order this labeler sees
    assigned_at REAL NOT NULL,
    PRIMARY KEY (prompt_id, labeler_id)
);
CREATE INDEX IF NOT EXISTS assignment_labeler ON assignment (labeler_id);
CREATE TABLE IF NOT EXISTS event (
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
CREATE INDEX IF NOT EXISTS event_task ON event (prompt_id, labeler_id);
CREATE UNIQUE INDEX IF NOT EXISTS event_undone ON event (undoes) WHERE undoes IS NOT NULL;
CREATE TABLE IF NOT EXISTS review (
    event_id INTEGER NOT NULL REFERENCES event (id),
    response_id TEXT NOT NULL REFERENCES response (id),
    justification TEXT NOT NULL,
    rating INTEGER CHECK (rating BETWEEN 1 AND 7),
    flags TEXT NOT NULL,             -- JSON
    PRIMARY KEY (event_id, response_id)
);

-- What the events amount to, kept up to date by triggers: a page must not read the history of a large job.
DROP VIEW IF EXISTS current_ranking;
DROP VIEW IF EXISTS standing;
CREATE VIEW IF NOT EXISTS not_undone AS            -- answers; the last one of a labeler to a prompt counts
SELECT * FROM event AS e
WHERE kind IN ('submit', 'edit', 'skip', 'flag') AND NOT EXISTS (SELECT 1 FROM event AS u WHERE u.undoes = e.id);
CREATE TABLE IF NOT EXISTS task_state ( -- where a labeler stands with a prompt
    prompt_id TEXT NOT NULL,
    labeler_id INTEGER NOT NULL,
    event_id INTEGER REFERENCES event (id), -- the answer that counts: the last not undone; null while open
    kind TEXT,                       -- of that event
    touched REAL NOT NULL,           -- server time of the last sign of the labeler
    active_seconds REAL NOT NULL,    -- sum over events, and over `reading`, a table that earlier databases have
    PRIMARY KEY (prompt_id, labeler_id),
    FOREIGN KEY (prompt_id, labeler_id) REFERENCES assignment (prompt_id, labeler_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS task_state_labeler ON task_state (labeler_id, kind);
CREATE TRIGGER IF NOT EXISTS assignment_state AFTER INSERT ON assignment BEGIN
    INSERT INTO task_state VALUES (new.prompt_id, new.labeler_id, NULL, NULL, new.assigned_at, 0);
END;
CREATE TRIGGER IF NOT EXISTS event_state AFTER INSERT ON event BEGIN
    UPDATE task_state
    SET touched = new.server_time, active_seconds = active_seconds + new.active_seconds, (event_id, kind) = (
        SELECT id, kind FROM not_undone
        WHERE prompt_id = new.prompt_id AND labeler_id = new.labeler_id ORDER BY id DESC LIMIT 1)
    WHERE prompt_id = new.prompt_id AND labeler_id = new.labeler_id;
END;
CREATE VIEW standing AS SELECT e.* FROM task_state AS s JOIN event AS e ON e.id = s.event_id;
CREATE VIEW current_ranking AS SELECT * FROM standing WHERE kind IN ('submit', 'edit');

INSERT OR IGNORE INTO task_state
SELECT a.prompt_id, a.labeler_id, last.id, last.kind, coalesce(max(e.server_time), a.assigned_at), total(e.active_seconds)
FROM assignment AS a LEFT JOIN event AS e USING (prompt_id, labeler_id) LEFT JOIN event AS last ON last.id = (
    SELECT max(id) FROM not_undone AS n WHERE n.prompt_id = a.prompt_id AND n.labeler_id = a.labeler_id)
GROUP BY a.prompt_id, a.labeler_id;
PRAGMA user_version = 2;
