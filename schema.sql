-- What registry.py keeps in registry.db. Contents are files named by their
-- digest; these rows say which repository may serve which of them, and hold
-- everything that a listing needs, so that no listing opens a file.
--
-- The last three sections run in one transaction, with foreign keys not
-- enforced: the tables alone on a new database, all three on one of format 1.

-- === Stray rows, which verify --repair deletes

-- No transaction leaves them behind, unless a trigger or a foreign key was out
-- of force. The first would have a file removed that repositories serve. Each
-- statement begins a line, since verify counts what it would delete.

DELETE FROM pending_deletes WHERE digest IN (SELECT digest FROM blobs);
DELETE FROM repository_blobs WHERE repository_id NOT IN (SELECT id FROM repositories);
DELETE FROM repository_blobs WHERE digest NOT IN (SELECT digest FROM blobs);
DELETE FROM manifests
    WHERE (repository_id, digest) NOT IN (SELECT repository_id, digest FROM repository_blobs);
DELETE FROM manifest_references
    WHERE (repository_id, manifest) NOT IN (SELECT repository_id, digest FROM manifests);
DELETE FROM referrers WHERE (repository_id, digest) NOT IN (SELECT repository_id, digest FROM manifests);
DELETE FROM tags WHERE (repository_id, digest) NOT IN (SELECT repository_id, digest FROM manifests);
DELETE FROM blobs WHERE digest NOT IN (SELECT digest FROM repository_blobs);
DELETE FROM repositories WHERE id NOT IN (SELECT repository_id FROM repository_blobs);

-- === Upgrading from format 1, before the tables are made

DROP TRIGGER blob_dropped;
DROP TRIGGER blob_stored;
DROP TRIGGER tag_removed;
DROP TRIGGER tag_moved;
ALTER TABLE repository_blobs RENAME COLUMN told_at TO leased_at;
CREATE TABLE format_1_manifests AS SELECT * FROM manifests;
DROP TABLE manifests;
DROP TABLE uploads;

-- === The tables

CREATE TABLE IF NOT EXISTS repositories (
    id   INTEGER PRIMARY KEY AUTOINCREMENT, -- never given again: who comes late hits nobody else
    name TEXT NOT NULL UNIQUE
);

-- One row per file under blobs/, a manifest's file included. The file is
-- durable before its row exists, and the row goes before the file does.
CREATE TABLE IF NOT EXISTS blobs (
    digest TEXT PRIMARY KEY NOT NULL,
    size   INTEGER NOT NULL CHECK (size >= 0)
) WITHOUT ROWID;

-- Files whose rows are gone and that are to be removed: remembered, so that a
-- crash in between leaves nothing behind.
CREATE TABLE IF NOT EXISTS pending_deletes (
    digest TEXT PRIMARY KEY NOT NULL
) WITHOUT ROWID;

CREATE TRIGGER IF NOT EXISTS blob_dropped AFTER DELETE ON blobs BEGIN
    INSERT INTO pending_deletes (digest) VALUES (OLD.digest);
END;

CREATE TRIGGER IF NOT EXISTS blob_stored AFTER INSERT ON blobs BEGIN
    DELETE FROM pending_deletes WHERE digest = NEW.digest;
END;

-- The links: a repository serves the blobs it is linked to and no others.
-- Times are seconds since the epoch.
CREATE TABLE IF NOT EXISTS repository_blobs (
    repository_id INTEGER NOT NULL REFERENCES repositories (id),
    digest        TEXT NOT NULL REFERENCES blobs (digest),
    leased_at     INTEGER NOT NULL, -- when a client last pushed it, was told that it is here, or untagged it
    needed_by     INTEGER NOT NULL DEFAULT 0, -- manifests of the repository that reference it
    PRIMARY KEY (repository_id, digest)
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS repository_blobs_by_digest ON repository_blobs (digest);

-- What garbage collection looks at: so its cost follows the garbage, not the store.
CREATE INDEX IF NOT EXISTS repository_blobs_unneeded
    ON repository_blobs (leased_at) WHERE needed_by = 0;

-- A blob goes with its last link, and a repository with its last blob.
CREATE TRIGGER IF NOT EXISTS blob_unlinked AFTER DELETE ON repository_blobs BEGIN
    DELETE FROM blobs WHERE digest = OLD.digest
        AND NOT EXISTS (SELECT 1 FROM repository_blobs WHERE digest = OLD.digest);
    DELETE FROM repositories WHERE id = OLD.repository_id
        AND NOT EXISTS (SELECT 1 FROM repository_blobs WHERE repository_id = OLD.repository_id);
END;

-- What a repository has, by the repository's name.
CREATE VIEW IF NOT EXISTS contents AS
    SELECT r.name AS repository, r.id AS repository_id, l.digest, b.size, l.leased_at, l.needed_by
    FROM repositories r JOIN repository_blobs l ON l.repository_id = r.id JOIN blobs b ON b.digest = l.digest;

-- A manifest is a linked blob that was pushed as a manifest. SQLite reads the
-- whole of each row that it compares on its way to another, so long values
-- have no place here.
CREATE TABLE IF NOT EXISTS manifests (
    repository_id INTEGER NOT NULL,
    digest        TEXT NOT NULL,
    media_type    TEXT NOT NULL,
    artifact_type TEXT,
    subject       TEXT,
    pushed_at     INTEGER NOT NULL,
    pulled_at     INTEGER NOT NULL, -- or pushed, if that was later
    PRIMARY KEY (repository_id, digest),
    FOREIGN KEY (repository_id, digest) REFERENCES repository_blobs ON DELETE CASCADE
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS manifests_by_subject
    ON manifests (repository_id, subject, digest) WHERE subject IS NOT NULL;

CREATE INDEX IF NOT EXISTS manifests_by_artifact_type
    ON manifests (repository_id, subject, artifact_type, digest) WHERE subject IS NOT NULL;

-- How each manifest that has a subject is listed: a descriptor, in JSON. Its
-- annotations may be long; the length of a BLOB is known without reading it.
CREATE TABLE IF NOT EXISTS referrers (
    repository_id INTEGER NOT NULL,
    digest        TEXT NOT NULL,
    descriptor    BLOB NOT NULL,
    PRIMARY KEY (repository_id, digest),
    FOREIGN KEY (repository_id, digest) REFERENCES manifests ON DELETE CASCADE
);

CREATE VIEW IF NOT EXISTS referrer_descriptors AS
    SELECT r.name AS repository, m.repository_id, m.subject, m.artifact_type, m.digest,
        length(d.descriptor) AS size, CASE WHEN length(d.descriptor) <= 4096 THEN d.descriptor END AS short
    FROM repositories r JOIN manifests m ON m.repository_id = r.id
    JOIN referrers d ON d.repository_id = m.repository_id AND d.digest = m.digest;

-- What a manifest needs: itself, and its config and layers or an index's
-- children. A child need not be there, so it is no foreign key.
CREATE TABLE IF NOT EXISTS manifest_references (
    repository_id INTEGER NOT NULL,
    manifest      TEXT NOT NULL,
    child         TEXT NOT NULL,
    required      INTEGER NOT NULL, -- 0: it may be absent (foreign layers, sparse mirrors)
    PRIMARY KEY (repository_id, manifest, child),
    FOREIGN KEY (repository_id, manifest) REFERENCES manifests ON DELETE CASCADE
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS manifest_references_by_child
    ON manifest_references (repository_id, child);

-- What manifests need and their repositories lack.
CREATE VIEW IF NOT EXISTS missing_children AS
    SELECT repository_id, manifest, child FROM manifest_references c
    WHERE required AND NOT EXISTS (SELECT 1 FROM repository_blobs l
        WHERE l.repository_id = c.repository_id AND l.digest = c.child);

CREATE TRIGGER IF NOT EXISTS reference_added AFTER INSERT ON manifest_references BEGIN
    UPDATE repository_blobs SET needed_by = needed_by + 1
    WHERE repository_id = NEW.repository_id AND digest = NEW.child;
END;

CREATE TRIGGER IF NOT EXISTS reference_removed AFTER DELETE ON manifest_references BEGIN
    UPDATE repository_blobs SET needed_by = needed_by - 1
    WHERE repository_id = OLD.repository_id AND digest = OLD.child;
END;

-- A child may come after the manifest that names it.
CREATE TRIGGER IF NOT EXISTS blob_linked AFTER INSERT ON repository_blobs BEGIN
    UPDATE repository_blobs SET needed_by = (
        SELECT count(*) FROM manifest_references
        WHERE repository_id = NEW.repository_id AND child = NEW.digest)
    WHERE repository_id = NEW.repository_id AND digest = NEW.digest;
END;

CREATE TABLE IF NOT EXISTS tags (
    repository_id INTEGER NOT NULL,
    name          TEXT NOT NULL,
    digest        TEXT NOT NULL,
    PRIMARY KEY (repository_id, name),
    FOREIGN KEY (repository_id, digest) REFERENCES manifests ON DELETE CASCADE
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS tags_by_digest ON tags (repository_id, digest);

CREATE TRIGGER IF NOT EXISTS tag_removed AFTER DELETE ON tags BEGIN
    UPDATE repository_blobs SET leased_at = CAST(strftime('%s', 'now') AS INTEGER)
    WHERE repository_id = OLD.repository_id AND digest = OLD.digest;
END;

CREATE TRIGGER IF NOT EXISTS tag_moved AFTER UPDATE OF digest ON tags WHEN NEW.digest <> OLD.digest BEGIN
    UPDATE repository_blobs SET leased_at = CAST(strftime('%s', 'now') AS INTEGER)
    WHERE repository_id = OLD.repository_id AND digest = OLD.digest;
END;

-- A link with what its removal would mean: does a manifest of any repository need the blob, does another
-- repository have it.
CREATE VIEW IF NOT EXISTS links AS
    SELECT l.repository_id, l.digest, b.size, l.leased_at, l.needed_by,
        EXISTS (SELECT 1 FROM repository_blobs WHERE digest = l.digest AND needed_by > 0) AS needed,
        EXISTS (SELECT 1 FROM repository_blobs
            WHERE digest = l.digest AND repository_id <> l.repository_id) AS shared
    FROM repository_blobs l JOIN blobs b ON b.digest = l.digest;

-- What keeps a manifest from being collected: an index that lists it, its subject, or a tag, for ever; and a
-- lease, since some time.
CREATE VIEW IF NOT EXISTS keepers AS
    SELECT m.repository_id, m.digest AS kept, c.manifest AS keeper, 9e999 AS since
    FROM manifest_references c JOIN manifests m ON m.repository_id = c.repository_id AND m.digest = c.child
    WHERE c.manifest <> c.child
    UNION ALL
    SELECT m.repository_id, m.digest, s.digest, 9e999
    FROM manifests s JOIN manifests m ON m.repository_id = s.repository_id AND m.subject = s.digest
    UNION ALL
    SELECT repository_id, digest, 'a tag', 9e999 FROM tags
    UNION ALL
    SELECT repository_id, digest, 'a lease', leased_at FROM repository_blobs;

-- Manifests that no other one keeps. An index with a subject is among them all the same, since what it lists
-- may be its subject, or what its subject refers to: such a circle goes as one. (CROSS JOIN: from left to
-- right. There are far fewer manifests than links.)
CREATE VIEW IF NOT EXISTS topmost_manifests AS
    SELECT m.repository_id, m.digest, r.name AS repository, m.subject, m.pushed_at, m.pulled_at, l.leased_at,
        EXISTS (SELECT 1 FROM tags t WHERE t.repository_id = m.repository_id AND t.digest = m.digest) AS tagged
    FROM manifests m CROSS JOIN repository_blobs l USING (repository_id, digest)
        CROSS JOIN repositories r ON r.id = m.repository_id
    WHERE l.needed_by = 1 AND ( -- by itself
        NOT EXISTS (SELECT 1 FROM manifests s WHERE s.repository_id = m.repository_id AND s.digest = m.subject)
        OR EXISTS (SELECT 1 FROM manifest_references c
            JOIN manifests k ON k.repository_id = c.repository_id AND k.digest = c.child
            WHERE c.repository_id = m.repository_id AND c.manifest = m.digest AND c.child <> c.manifest));

-- The latest time that is noted of each blob that no manifest needs, and of each manifest.
CREATE VIEW IF NOT EXISTS latest_times AS
    SELECT repository_id, digest, leased_at AS latest, 0 AS of_manifest
    FROM repository_blobs WHERE needed_by = 0
    UNION ALL
    SELECT m.repository_id, m.digest, max(l.leased_at, m.pushed_at, m.pulled_at), 1
    FROM manifests m CROSS JOIN repository_blobs l USING (repository_id, digest);

-- How many bytes the blobs have that manifests need: by way of those that none needs, which are fewer.
CREATE VIEW IF NOT EXISTS needed_size AS
    SELECT (SELECT coalesce(sum(size), 0) FROM blobs) - (SELECT coalesce(sum(size), 0) FROM blobs b
        WHERE digest IN (SELECT digest FROM repository_blobs WHERE needed_by = 0)
        AND NOT EXISTS (SELECT 1 FROM repository_blobs WHERE digest = b.digest AND needed_by > 0)) AS bytes;

PRAGMA user_version = 2;

-- === Upgrading from format 1, after the tables are made

INSERT INTO manifests
    SELECT repository_id, digest, media_type, artifact_type, subject, pushed_at, pulled_at
    FROM format_1_manifests;

INSERT INTO referrers
    SELECT m.repository_id, m.digest, CAST(
        '{"mediaType":"' || m.media_type || '","digest":"' || m.digest || '","size":' || b.size
        || ifnull(',"artifactType":"' || replace(replace(m.artifact_type, '\', '\\'), '"', '\"') || '"', '')
        || ifnull(',"annotations":' || m.annotations, '') || '}' AS BLOB)
    FROM format_1_manifests m JOIN blobs b ON b.digest = m.digest WHERE m.subject IS NOT NULL;

DROP TABLE format_1_manifests;
INSERT INTO pending_deletes SELECT digest FROM doomed;
DROP TABLE doomed;
