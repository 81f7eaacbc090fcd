"""A data directory of an older registry: brought up to date at the start, with nothing lost."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests.daemon import command
from tests.support import (
    OCI_CONFIG,
    OCI_MANIFEST,
    Client,
    DataDirectory,
    HTTPTestCase,
    descriptor,
    digest_of,
    image_index,
    image_manifest,
    run_at_once,
    unique,
)

# What format 1 was, without its comments.
FORMAT_1 = """
CREATE TABLE repositories (
    id   INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE
);
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY NOT NULL,
    size   INTEGER NOT NULL CHECK (size >= 0)
) WITHOUT ROWID;
CREATE TABLE doomed (
    digest TEXT PRIMARY KEY NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER blob_dropped AFTER DELETE ON blobs BEGIN
    INSERT INTO doomed (digest) VALUES (OLD.digest);
END;
CREATE TRIGGER blob_stored AFTER INSERT ON blobs BEGIN
    DELETE FROM doomed WHERE digest = NEW.digest;
END;
CREATE TABLE repository_blobs (
    repository_id INTEGER NOT NULL REFERENCES repositories (id),
    digest        TEXT NOT NULL REFERENCES blobs (digest),
    told_at       INTEGER NOT NULL,
    needed_by     INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (repository_id, digest)
) WITHOUT ROWID;
CREATE INDEX repository_blobs_by_digest ON repository_blobs (digest);
CREATE INDEX repository_blobs_unneeded
    ON repository_blobs (told_at) WHERE needed_by = 0;
CREATE TRIGGER blob_unlinked AFTER DELETE ON repository_blobs BEGIN
    DELETE FROM blobs WHERE digest = OLD.digest
        AND NOT EXISTS (SELECT 1 FROM repository_blobs WHERE digest = OLD.digest);
    DELETE FROM repositories WHERE id = OLD.repository_id
        AND NOT EXISTS (SELECT 1 FROM repository_blobs WHERE repository_id = OLD.repository_id);
END;
CREATE TABLE manifests (
    repository_id INTEGER NOT NULL,
    digest        TEXT NOT NULL,
    media_type    TEXT NOT NULL,
    artifact_type TEXT,
    subject       TEXT,
    annotations   TEXT,
    pushed_at     INTEGER NOT NULL,
    pulled_at     INTEGER NOT NULL,
    PRIMARY KEY (repository_id, digest),
    FOREIGN KEY (repository_id, digest) REFERENCES repository_blobs ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX manifests_by_subject
    ON manifests (repository_id, subject, digest) WHERE subject IS NOT NULL;
CREATE TABLE manifest_references (
    repository_id INTEGER NOT NULL,
    manifest      TEXT NOT NULL,
    child         TEXT NOT NULL,
    required      INTEGER NOT NULL,
    PRIMARY KEY (repository_id, manifest, child),
    FOREIGN KEY (repository_id, manifest) REFERENCES manifests ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX manifest_references_by_child
    ON manifest_references (repository_id, child);
CREATE TRIGGER reference_added AFTER INSERT ON manifest_references BEGIN
    UPDATE repository_blobs SET needed_by = needed_by + 1
    WHERE repository_id = NEW.repository_id AND digest = NEW.child;
END;
CREATE TRIGGER reference_removed AFTER DELETE ON manifest_references BEGIN
    UPDATE repository_blobs SET needed_by = needed_by - 1
    WHERE repository_id = OLD.repository_id AND digest = OLD.child;
END;
CREATE TRIGGER blob_linked AFTER INSERT ON repository_blobs BEGIN
    UPDATE repository_blobs SET needed_by = (
        SELECT count(*) FROM manifest_references
        WHERE repository_id = NEW.repository_id AND child = NEW.digest)
    WHERE repository_id = NEW.repository_id AND digest = NEW.digest;
END;
CREATE TABLE tags (
    repository_id INTEGER NOT NULL,
    name          TEXT NOT NULL,
    digest        TEXT NOT NULL,
    PRIMARY KEY (repository_id, name),
    FOREIGN KEY (repository_id, digest) REFERENCES manifests ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX tags_by_digest ON tags (repository_id, digest);
CREATE TRIGGER tag_removed AFTER DELETE ON tags BEGIN
    UPDATE repository_blobs SET told_at = CAST(strftime('%s', 'now') AS INTEGER)
    WHERE repository_id = OLD.repository_id AND digest = OLD.digest;
END;
CREATE TRIGGER tag_moved AFTER UPDATE OF digest ON tags WHEN NEW.digest <> OLD.digest BEGIN
    UPDATE repository_blobs SET told_at = CAST(strftime('%s', 'now') AS INTEGER)
    WHERE repository_id = OLD.repository_id AND digest = OLD.digest;
END;
CREATE TABLE uploads (
    id         TEXT PRIMARY KEY NOT NULL,
    repository TEXT NOT NULL,
    algorithm  TEXT NOT NULL
) WITHOUT ROWID;
PRAGMA user_version = 1;
"""
TRIGGER = re.compile(r"CREATE TRIGGER .*?END;", re.DOTALL)
SAME = ("repositories", "blobs", "manifest_references", "tags", "sqlite_sequence")
MANIFEST = "repository_id, digest, media_type, artifact_type, subject, pushed_at, pulled_at"
MARKS = "?, ?, ?, ?, ?, ?, ?, ?"
DOOMED = digest_of(b"doomed")


class OldDirectoriesAreUpgraded(HTTPTestCase):
    def setUp(self) -> None:
        self.data = DataDirectory(self.temporary())
        self.subject = unique()
        with self.serve() as client:
            self.fill(client)
            self.before = self.seen(client)
        self.downgrade()

    @contextlib.contextmanager
    def serve(self) -> Iterator[Client]:
        with registry.Registry(data=str(self.data.path), sync=False) as running:
            yield Client(running.netloc, "team/app")

    def fill(self, client: Client) -> None:
        """Push something of every kind."""
        images = [client.push_image(f"v{n}", annotations={"n": str(n)}) for n in range(3)]
        client.push_manifest(image_index([image.descriptor for image in images]), "index")
        client.expect(202, "DELETE", "manifests/v2")
        client.push_blob(b"{}")
        manifest = image_manifest(descriptor(b"{}", OCI_CONFIG), subject=descriptor(self.subject))
        for more in ({}, {"annotations": {"\u00fc": '"quoted"'}}, {"artifactType": 'a/"\\\u00fc\U0001f600'}):
            client.push_manifest({**manifest, **more})
        client.push_manifest(image_index([], subject=descriptor(self.subject)))
        client.at("other").expect(201, "POST", f"blobs/uploads/?mount={digest_of(b'{}')}&from=team/app")
        gone = client.at("gone")
        gone.expect(202, "DELETE", f"blobs/{gone.push_blob(unique())}")

    def seen(self, client: Client) -> dict[Any, Any]:
        """All that the registry says of its repositories."""
        found: dict[Any, Any] = {}
        digests = [digest for (digest,) in self.data.rows("SELECT digest FROM blobs")]
        for name in client.expect(200, "GET", "/v2/_catalog").json["repositories"]:
            here = client.at(name)
            found[name] = here.get("tags/list").json
            for path in (*(f"manifests/{each}" for each in found[name]["tags"] + digests),
                         *(f"blobs/{each}" for each in digests)):  # fmt: skip
                response = here.get(path)
                found[name, path] = response.status, response.headers["Content-Type"], response.body
            found[name, "referrers"] = here.get(f"referrers/{digest_of(self.subject)}").json
        return found

    def downgrade(self) -> None:
        """Write the same rows into a database of format 1."""
        rows = {name: self.data.rows(f"SELECT * FROM {name}") for name in (*SAME, "repository_blobs")}
        manifests = self.data.rows(f"SELECT {MANIFEST} FROM manifests")
        for path in self.data.path.glob("registry.db*"):
            path.unlink()
        with contextlib.closing(sqlite3.connect(self.data.path / "registry.db")) as database:
            database.executescript(TRIGGER.sub("", FORMAT_1))
            database.execute("DELETE FROM sqlite_sequence")
            for name, content in rows.items():
                marks = ", ".join("?" * len(content[0]))
                database.executemany(f"INSERT INTO {name} VALUES ({marks})", content)
            for row in manifests:
                content = self.data.path / "blobs" / row[1].replace(":", "/")
                annotations = json.loads(content.read_bytes()).get("annotations")
                values = (*row, json.dumps(annotations) if annotations else None)
                database.execute(f"INSERT INTO manifests ({MANIFEST}, annotations) VALUES ({MARKS})", values)
            database.execute("INSERT INTO doomed VALUES (?)", (DOOMED,))
            database.execute("INSERT INTO uploads VALUES ('session', 'team/app', 'sha256')")
            database.commit()
            database.executescript("\n".join(TRIGGER.findall(FORMAT_1)))

    def kept(self, time: str) -> list[Any]:
        """What both formats have, but for the name of one column."""
        links = self.data.rows(f"SELECT repository_id, digest, {time}, needed_by FROM repository_blobs")
        rows = [self.data.rows(f"SELECT * FROM {name}") for name in SAME]
        return [*rows, links, self.data.rows(f"SELECT {MANIFEST} FROM manifests")]

    def dump(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.data.path / "registry.db")) as database:
            return [*database.iterdump(), str(database.execute("PRAGMA user_version").fetchall())]

    def test_every_row_is_kept(self) -> None:
        before = self.kept("told_at")
        registry.Store(self.data.path).close()
        self.assertEqual(self.kept("leased_at"), before)
        self.assertEqual(self.data.rows("SELECT digest FROM pending_deletes"), [(DOOMED,)])
        self.assertEqual(self.data.rows("PRAGMA foreign_key_check"), [])
        self.assertEqual(self.data.rows("PRAGMA integrity_check"), [("ok",)])
        self.assertEqual(self.data.rows("PRAGMA user_version"), [(registry.FORMAT_VERSION,)])

    def test_everything_is_served_as_before(self) -> None:
        for _ in range(2):
            with self.serve() as client:
                self.assertEqual(self.seen(client), self.before)
        result = command("verify", "--data", str(self.data.path))
        self.assertEqual(result.returncode, 0, result)

    def test_the_result_is_what_a_new_database_is(self) -> None:
        with tempfile.TemporaryDirectory() as new:
            for path in (self.data.path, new):
                registry.Store(path).close()
            self.assertEqual(self.schema(self.data), self.schema(DataDirectory(new)))

    @staticmethod
    def schema(data: DataDirectory) -> dict[str, str]:
        """Everything that a database has, without comments and white space."""
        rows = data.rows("SELECT name, sql FROM sqlite_master")
        return {name: " ".join(re.sub("--.*", "", sql or "").split()) for name, sql in rows}

    def test_what_goes_wrong_halfway_changes_nothing(self) -> None:
        before, read = self.dump(), Path.read_text
        with mock.patch.object(Path, "read_text", lambda *a, **o: read(*a, **o) + "SELECT wrong();"):
            self.assertRaises(registry.StartupError, registry.Store, self.data.path)
        self.assertEqual(self.dump(), before)
        with self.serve() as client:
            self.assertEqual(self.seen(client), self.before)

    def test_registries_may_start_at_once(self) -> None:
        for store in run_at_once(*[functools.partial(registry.Store, self.data.path)] * 4):
            store.close()
        with self.serve() as client:
            self.assertEqual(self.seen(client), self.before)

    def test_a_file_that_no_registry_uses_any_more_goes(self) -> None:
        file = self.data.path / "generation"
        for exists in (False, True):  # once nothing is brought up to date, a file of that name is somebody's
            file.write_bytes(bytes(8))
            registry.Store(self.data.path).close()
            self.assertEqual(file.exists(), exists)

    def test_a_read_only_registry_says_what_to_do(self) -> None:
        with self.assertRaisesRegex(registry.StartupError, "format 1.*--read-only"):
            registry.Store(self.data.path, read_only=True)

    def test_types_of_any_length_are_kept(self) -> None:
        """Format 1 took what would be refused now."""
        kind, long = "a/" + "b" * 5_000, "a/" + "b" * 300_000
        with contextlib.closing(sqlite3.connect(self.data.path / "registry.db")) as database:
            database.execute(
                "UPDATE manifests SET artifact_type = ? WHERE artifact_type IS NOT NULL", (long,)
            )
            database.execute("UPDATE manifests SET media_type = ? WHERE subject IS NULL", (kind,))
            database.commit()
        with self.serve() as client:
            response = client.get("manifests/v1")
            self.assertEqual((response.status, response.headers["Content-Type"]), (200, kind))
            listed = client.get(f"referrers/{digest_of(self.subject)}").json["manifests"]
            self.assertEqual(sorted(each.get("artifactType", "") for each in listed), ["", long, long, long])
            client.push_manifest(client.get("manifests/v0").body, "again", OCI_MANIFEST)
