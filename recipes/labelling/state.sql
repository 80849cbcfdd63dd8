-- What the events amount to, kept up to date by triggers: a page must not read the history of a large job.
-- It follows tables.sql in a new database, and upgrades one of version 1, which worked `standing` out anew each time.

DROP VIEW IF EXISTS current_ranking;
DROP VIEW IF EXISTS standing;
CREATE VIEW not_undone AS            -- answers; the last one of a labeler to a prompt counts
SELECT * FROM event AS e
WHERE kind IN ('submit', 'edit', 'skip', 'flag') AND NOT EXISTS (SELECT 1 FROM event AS u WHERE u.undoes = e.id);
CREATE TABLE reading (               -- time spent on a task without changing anything: no event carries it
    prompt_id TEXT NOT NULL,
    labeler_id INTEGER NOT NULL,
    active_seconds REAL NOT NULL,
    server_time REAL NOT NULL,
    FOREIGN KEY (prompt_id, labeler_id) REFERENCES assignment (prompt_id, labeler_id)
);
CREATE TABLE task_state (            -- where a labeler stands with a prompt
    prompt_id TEXT NOT NULL,
    labeler_id INTEGER NOT NULL,
    event_id INTEGER REFERENCES event (id), -- the answer that counts: the last not undone; null while open
    kind TEXT,                       -- of that event
    touched REAL NOT NULL,           -- server time of the last sign of the labeler
    active_seconds REAL NOT NULL,    -- sum over events and reading
    PRIMARY KEY (prompt_id, labeler_id),
    FOREIGN KEY (prompt_id, labeler_id) REFERENCES assignment (prompt_id, labeler_id)
) WITHOUT ROWID;
CREATE INDEX task_state_labeler ON task_state (labeler_id, kind);
CREATE TRIGGER assignment_state AFTER INSERT ON assignment BEGIN
    INSERT INTO task_state VALUES (new.prompt_id, new.labeler_id, NULL, NULL, new.assigned_at, 0);
END;
CREATE TRIGGER event_state AFTER INSERT ON event BEGIN
    UPDATE task_state
    SET touched = new.server_time, active_seconds = active_seconds + new.active_seconds, (event_id, kind) = (
        SELECT id, kind FROM not_undone
        WHERE prompt_id = new.prompt_id AND labeler_id = new.labeler_id ORDER BY id DESC LIMIT 1)
    WHERE prompt_id = new.prompt_id AND labeler_id = new.labeler_id;
END;
CREATE TRIGGER reading_state AFTER INSERT ON reading BEGIN
    UPDATE task_state SET touched = new.server_time, active_seconds = active_seconds + new.active_seconds
    WHERE prompt_id = new.prompt_id AND labeler_id = new.labeler_id;
END;
CREATE VIEW standing AS SELECT e.* FROM task_state AS s JOIN event AS e ON e.id = s.event_id;
CREATE VIEW current_ranking AS SELECT * FROM standing WHERE kind IN ('submit', 'edit');

CREATE TRIGGER reading_no_update BEFORE UPDATE ON reading BEGIN SELECT RAISE(ABORT, 'reading is written once'); END;
CREATE TRIGGER reading_no_delete BEFORE DELETE ON reading BEGIN SELECT RAISE(ABORT, 'reading is written once'); END;

INSERT INTO task_state
SELECT a.prompt_id, a.labeler_id, last.id, last.kind, coalesce(max(e.server_time), a.assigned_at), total(e.active_seconds)
FROM assignment AS a LEFT JOIN event AS e USING (prompt_id, labeler_id) LEFT JOIN event AS last ON last.id = (
    SELECT max(id) FROM not_undone AS n WHERE n.prompt_id = a.prompt_id AND n.labeler_id = a.labeler_id)
GROUP BY a.prompt_id, a.labeler_id;
PRAGMA user_version = 2;
