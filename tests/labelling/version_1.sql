PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE assignment (
    prompt_id TEXT NOT NULL REFERENCES prompt (id),
    labeler_id INTEGER NOT NULL REFERENCES labeler (id),
    shown TEXT NOT NULL,             -- JSON: response ids in the order this labeler sees
    assigned_at REAL NOT NULL,
    PRIMARY KEY (prompt_id, labeler_id)
);
INSERT INTO "assignment" VALUES('12ad47124298e5c20dea',1,'["21899cfe3fefa0fb31dc", "c9d0627ed7bc39c42a10"]',1.79585766878502225878e+09);
INSERT INTO "assignment" VALUES('257af6f3063e5df241df',1,'["b0f941d7a20372b31630", "80d68ea82ca6320f24c5"]',1.79585766880975818637e+09);
INSERT INTO "assignment" VALUES('55c12328eb66d4c05577',1,'["72c04c09411840368fd9", "8e76ca5b9bd51a8c96c8"]',1.79585766881856107707e+09);
INSERT INTO "assignment" VALUES('c44ab06b72c5561caba9',1,'["bb4e2485737402764218", "c36fb301cfeec0d82fc3"]',1.79585766882957315439e+09);
INSERT INTO "assignment" VALUES('c9c479730412dff87dfe',1,'["eb4fe0d1b14ef560f8f0", "b06e745e13ede9a757cc"]',1.79585766884568476678e+09);
INSERT INTO "assignment" VALUES('12ad47124298e5c20dea',2,'["c9d0627ed7bc39c42a10", "21899cfe3fefa0fb31dc"]',1.79585766886929106716e+09);
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
INSERT INTO "event" VALUES(1,'12ad47124298e5c20dea',1,'draft',NULL,'[["21899cfe3fefa0fb31dc"], ["c9d0627ed7bc39c42a10"]]','',0.0,'key0','09cc32ad1fe5ad84bc8f54a9fef0a08b5db9a5be26f12a3afcaef558b5b289dd',1,1.79585766879153418537e+09,NULL);
INSERT INTO "event" VALUES(2,'12ad47124298e5c20dea',1,'submit',NULL,'[["21899cfe3fefa0fb31dc"], ["c9d0627ed7bc39c42a10"]]','',0.0,'key1','283567c88dfbf181e9c95c538d0f0aa490b873919c9f9bc79c008a0f381bd321',1,1.79585766879438543316e+09,NULL);
INSERT INTO "event" VALUES(3,'12ad47124298e5c20dea',1,'edit',NULL,'[["c9d0627ed7bc39c42a10"], ["21899cfe3fefa0fb31dc"]]','',0.0,'key2','273e494bf70344af88e1ff31bad637b2488ba0c76495f36599af676cd48039d7',1,1.79585766880372166634e+09,NULL);
INSERT INTO "event" VALUES(4,'12ad47124298e5c20dea',1,'undo',3,NULL,'',0.0,'u0','ea18216b71d3556e36a0ccbfe4bac649960315dac379b303788ad88463d1d0b8',1,1.79585766880618190764e+09,NULL);
INSERT INTO "event" VALUES(5,'257af6f3063e5df241df',1,'submit',NULL,'[["b0f941d7a20372b31630"], ["80d68ea82ca6320f24c5"]]','',0.0,'key3','397cc1f152422fe35d01c4a5f164d8fac5797a6500d35984b195c7d45f51ce7a',1,1.79585766881264543527e+09,NULL);
INSERT INTO "event" VALUES(6,'257af6f3063e5df241df',1,'edit',NULL,'[["80d68ea82ca6320f24c5"], ["b0f941d7a20372b31630"]]','',0.0,'key4','2b7929f4bea65ea16fcdef147f0751c9749a9f972153f65db3a819f3c198e32b',1,1.79585766881572580339e+09,NULL);
INSERT INTO "event" VALUES(7,'55c12328eb66d4c05577',1,'skip',NULL,'[["72c04c09411840368fd9"], ["8e76ca5b9bd51a8c96c8"]]','',0.0,'key5','e70015623408df8d4693a11c369910b92cceba99962ced5a068483a8cc587c64',1,1.79585766882250118256e+09,NULL);
INSERT INTO "event" VALUES(8,'c44ab06b72c5561caba9',1,'flag',NULL,'[["bb4e2485737402764218"], ["c36fb301cfeec0d82fc3"]]','nonsense',0.0,'key6','96c91c90ed47a4e5b76828993ff6f61be4593c82a65b2dafc2ae269aadf1d4ae',1,1.79585766883736419672e+09,NULL);
INSERT INTO "event" VALUES(9,'c9c479730412dff87dfe',1,'submit',NULL,'[["eb4fe0d1b14ef560f8f0"], ["b06e745e13ede9a757cc"]]','',0.0,'key7','6917608dab44cbbc85bc475036a495fb3e65bff4591b79b85d8b169183a10fd2',1,1.79585766885340595245e+09,NULL);
INSERT INTO "event" VALUES(10,'c9c479730412dff87dfe',1,'undo',9,NULL,'',0.0,'u1','1f757758945f110e40a89c70971dbcc0ebf14f502395a7e06e12f0b0ce507f85',1,1.79585766886073327063e+09,NULL);
INSERT INTO "event" VALUES(11,'12ad47124298e5c20dea',2,'draft',NULL,'[["c9d0627ed7bc39c42a10"], ["21899cfe3fefa0fb31dc"]]','',0.0,'key8','8e68ec8acf07613791d502e4b5cc0c0dd23a26ca29b6f0e5e81cac92c0581b42',1,1.79585766887736606595e+09,NULL);
CREATE TABLE gold (                  -- attention tasks: prompts whose right ranking is known
    prompt_id TEXT PRIMARY KEY REFERENCES prompt (id),
    tiers TEXT NOT NULL              -- JSON: lists of response ids, best first
);
CREATE TABLE guideline (
    version INTEGER PRIMARY KEY,
    text TEXT NOT NULL UNIQUE
);
INSERT INTO "guideline" VALUES(1,'Rank.');
CREATE TABLE labeler (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    token_hash TEXT UNIQUE           -- null: may use the terminal, cannot log in
);
INSERT INTO "labeler" VALUES(1,'ann','10ca388cfbd3b9864bdb696d14e825b3391f23776460070a53d8861f6026419d');
INSERT INTO "labeler" VALUES(2,'bob','de95ca116b42acd9df81542de71455876de85e4b2028eac8541ee929249a7c96');
CREATE TABLE prompt (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,         -- hash of the messages and the responses: importing twice changes nothing
    sample_id TEXT NOT NULL,         -- its id in the file it came from
    messages TEXT NOT NULL,          -- JSON
    source TEXT NOT NULL
);
INSERT INTO "prompt" VALUES(1,'12ad47124298e5c20dea','p0','[{"role": "user", "content": "Question 0?"}]','samples.jsonl');
INSERT INTO "prompt" VALUES(2,'257af6f3063e5df241df','p1','[{"role": "user", "content": "Question 1?"}]','samples.jsonl');
INSERT INTO "prompt" VALUES(3,'55c12328eb66d4c05577','p2','[{"role": "user", "content": "Question 2?"}]','samples.jsonl');
INSERT INTO "prompt" VALUES(4,'c44ab06b72c5561caba9','p3','[{"role": "user", "content": "Question 3?"}]','samples.jsonl');
INSERT INTO "prompt" VALUES(5,'c9c479730412dff87dfe','p4','[{"role": "user", "content": "Question 4?"}]','samples.jsonl');
CREATE TABLE response (
    id TEXT PRIMARY KEY,             -- hash of prompt and text: tells a labeler nothing about model or file order
    prompt_id TEXT NOT NULL REFERENCES prompt (id),
    sample_id TEXT NOT NULL,
    text TEXT NOT NULL,
    model TEXT,
    sampling TEXT                    -- JSON
);
INSERT INTO "response" VALUES('c9d0627ed7bc39c42a10','12ad47124298e5c20dea','0','Answer 0 to question 0.',NULL,'null');
INSERT INTO "response" VALUES('21899cfe3fefa0fb31dc','12ad47124298e5c20dea','1','Answer 1 to question 0.',NULL,'null');
INSERT INTO "response" VALUES('b0f941d7a20372b31630','257af6f3063e5df241df','0','Answer 0 to question 1.',NULL,'null');
INSERT INTO "response" VALUES('80d68ea82ca6320f24c5','257af6f3063e5df241df','1','Answer 1 to question 1.',NULL,'null');
INSERT INTO "response" VALUES('72c04c09411840368fd9','55c12328eb66d4c05577','0','Answer 0 to question 2.',NULL,'null');
INSERT INTO "response" VALUES('8e76ca5b9bd51a8c96c8','55c12328eb66d4c05577','1','Answer 1 to question 2.',NULL,'null');
INSERT INTO "response" VALUES('c36fb301cfeec0d82fc3','c44ab06b72c5561caba9','0','Answer 0 to question 3.',NULL,'null');
INSERT INTO "response" VALUES('bb4e2485737402764218','c44ab06b72c5561caba9','1','Answer 1 to question 3.',NULL,'null');
INSERT INTO "response" VALUES('eb4fe0d1b14ef560f8f0','c9c479730412dff87dfe','0','Answer 0 to question 4.',NULL,'null');
INSERT INTO "response" VALUES('b06e745e13ede9a757cc','c9c479730412dff87dfe','1','Answer 1 to question 4.',NULL,'null');
CREATE TABLE review (
    event_id INTEGER NOT NULL REFERENCES event (id),
    response_id TEXT NOT NULL REFERENCES response (id),
    justification TEXT NOT NULL,
    rating INTEGER CHECK (rating BETWEEN 1 AND 7),
    flags TEXT NOT NULL,             -- JSON
    PRIMARY KEY (event_id, response_id)
);
INSERT INTO "review" VALUES(1,'21899cfe3fefa0fb31dc','reason draft',3,'["harmful"]');
INSERT INTO "review" VALUES(1,'c9d0627ed7bc39c42a10','reason draft',3,'["harmful"]');
INSERT INTO "review" VALUES(2,'21899cfe3fefa0fb31dc','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(2,'c9d0627ed7bc39c42a10','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(3,'c9d0627ed7bc39c42a10','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(3,'21899cfe3fefa0fb31dc','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(5,'b0f941d7a20372b31630','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(5,'80d68ea82ca6320f24c5','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(6,'80d68ea82ca6320f24c5','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(6,'b0f941d7a20372b31630','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(7,'72c04c09411840368fd9','reason skip',3,'["harmful"]');
INSERT INTO "review" VALUES(7,'8e76ca5b9bd51a8c96c8','reason skip',3,'["harmful"]');
INSERT INTO "review" VALUES(8,'bb4e2485737402764218','reason flag',3,'["harmful"]');
INSERT INTO "review" VALUES(8,'c36fb301cfeec0d82fc3','reason flag',3,'["harmful"]');
INSERT INTO "review" VALUES(9,'eb4fe0d1b14ef560f8f0','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(9,'b06e745e13ede9a757cc','reason submit',3,'["harmful"]');
INSERT INTO "review" VALUES(11,'c9d0627ed7bc39c42a10','reason draft',3,'["harmful"]');
INSERT INTO "review" VALUES(11,'21899cfe3fefa0fb31dc','reason draft',3,'["harmful"]');
CREATE TABLE session (
    id_hash TEXT PRIMARY KEY,
    labeler_id INTEGER NOT NULL REFERENCES labeler (id),
    expires REAL NOT NULL
);
CREATE INDEX response_prompt ON response (prompt_id);
CREATE INDEX assignment_labeler ON assignment (labeler_id);
CREATE INDEX event_task ON event (prompt_id, labeler_id);
CREATE UNIQUE INDEX event_undone ON event (undoes) WHERE undoes IS NOT NULL;
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
COMMIT;
