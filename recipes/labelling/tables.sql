-- What a labelling database holds. Answers are events: written once, never changed, so nothing can be lost.
-- Version 1 had these tables alone; state.sql makes version 2 of them.

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

CREATE TRIGGER prompt_no_update BEFORE UPDATE ON prompt BEGIN SELECT RAISE(ABORT, 'prompt is written once'); END;
CREATE TRIGGER prompt_no_delete BEFORE DELETE ON prompt BEGIN SELECT RAISE(ABORT, 'prompt is written once'); END;
CREATE TRIGGER response_no_update BEFORE UPDATE ON response BEGIN SELECT RAISE(ABORT, 'response is written once'); END;
CREATE TRIGGER response_no_delete BEFORE DELETE ON response BEGIN SELECT RAISE(ABORT, 'response is written once'); END;
CREATE TRIGGER gold_no_update BEFORE UPDATE ON gold BEGIN SELECT RAISE(ABORT, 'gold is written once'); END;
CREATE TRIGGER gold_no_delete BEFORE DELETE ON gold BEGIN SELECT RAISE(ABORT, 'gold is written once'); END;
CREATE TRIGGER guideline_no_update BEFORE UPDATE ON guideline BEGIN SELECT RAISE(ABORT, 'guideline is written once'); END;
CREATE TRIGGER guideline_no_delete BEFORE DELETE ON guideline BEGIN SELECT RAISE(ABORT, 'guideline is written once'); END;
CREATE TRIGGER assignment_no_update BEFORE UPDATE ON assignment BEGIN SELECT RAISE(ABORT, 'assignment is written once'); END;
CREATE TRIGGER assignment_no_delete BEFORE DELETE ON assignment BEGIN SELECT RAISE(ABORT, 'assignment is written once'); END;
CREATE TRIGGER event_no_update BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'event is written once'); END;
CREATE TRIGGER event_no_delete BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'event is written once'); END;
CREATE TRIGGER review_no_update BEFORE UPDATE ON review BEGIN SELECT RAISE(ABORT, 'review is written once'); END;
CREATE TRIGGER review_no_delete BEFORE DELETE ON review BEGIN SELECT RAISE(ABORT, 'review is written once'); END;
