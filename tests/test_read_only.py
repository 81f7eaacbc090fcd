"""A read-only daemon: what it refuses, and where it cannot write itself, alone or beside one that does."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from unittest import mock

from registry import Database, Registry
from tests.access import GRANTS, AccessTestCase, user
from tests.daemon import ENVIRONMENT, Daemon, command, run
from tests.mounts import as_nobody, no_read_only, on_read_only_disk
from tests.support import Client, HTTPTestCase, Image, digest_of, with_digest


class ReadOnlyTestCase(HTTPTestCase):
    """A data directory that others may read, and daemons that cannot write to it."""

    def setUp(self) -> None:
        if no_read_only():
            self.skipTest(no_read_only())
        directory = self.temporary()
        directory.chmod(0o755)
        self.data = directory / "data"
        self.start_afresh()

    def start_afresh(self) -> None:
        """An empty data directory that anybody may read: one that the daemon makes lets nobody else in."""
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(mode=0o755)

    def push(self, running: Registry, tag: str) -> Image:
        return Client(running.netloc, "team/app").push_image(tag)

    def read_only_daemon(self, under: list[str], data: Path | None = None) -> Client:
        daemon = self.enter(Daemon(data or self.data, "--read-only", "--quiet", under=under))
        return daemon.client.at("team/app")


class ReadOnlyBesideAWriter(ReadOnlyTestCase):
    def test_what_a_daemon_pushes_that_starts_and_stops_later_is_seen_at_once(self) -> None:
        for under in (as_nobody, on_read_only_disk):
            with self.subTest(under.__name__):
                self.start_afresh()
                with Registry(self.data) as running:
                    first = self.push(running, "first")
                client = self.read_only_daemon(under(str(self.data)))
                self.assert_image(client, first, "first")
                for number in range(5):
                    with Registry(self.data) as running:
                        for tag in (f"{number}a", f"{number}b"):
                            self.assert_error(client.get(f"manifests/{tag}"), 404, "MANIFEST_UNKNOWN")
                            self.assert_image(client, self.push(running, tag), tag)
                    self.assert_image(client, first, "first")
                with Registry(self.data) as running:
                    Client(running.netloc, "team/app").expect(202, "DELETE", "manifests/first")
                    self.assert_error(client.get("manifests/first"), 404, "MANIFEST_UNKNOWN")

    def test_it_may_start_while_the_other_writes(self) -> None:
        for under in (as_nobody, on_read_only_disk):
            with self.subTest(under.__name__), Registry(self.data) as running:
                client = self.read_only_daemon(under(str(self.data)))
                for tag in ("a", "b", "a"):
                    self.assert_image(client, self.push(running, tag), tag)

    def test_what_is_locked_for_a_moment_is_not_read_without_locks(self) -> None:
        with Registry(self.data):
            pass
        locked = mock.Mock(side_effect=sqlite3.OperationalError("database is locked"))
        for read_only in (True, False):
            with (
                mock.patch.object(Database, "query", locked),
                self.assertRaisesRegex(sqlite3.Error, "locked"),
            ):
                Database(str(self.data / "registry.db"), read_only=read_only)


class ReadOnlyMedium(ReadOnlyTestCase):
    def copy(self, *suffixes: str) -> Path:
        """A copy of a registry under way, of its database only the files with these suffixes."""
        copy = self.data.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.data / "blobs", copy / "blobs")
        for suffix in suffixes:
            # in a process of its own: one that closes SQLite's files loses SQLite's locks
            subprocess.run(["cp", "-a", self.data / f"registry.db{suffix}", copy], check=True)
        return copy

    def test_a_log_left_behind_is_served_too(self) -> None:
        for under in (as_nobody, on_read_only_disk):
            for suffixes in (("", "-wal"), ("", "-wal", "-shm")):
                with self.subTest(under.__name__, suffixes=suffixes):
                    self.start_afresh()
                    with Registry(self.data) as running:
                        image = self.push(running, "v1")
                        copy = self.copy(*suffixes)
                    client = self.read_only_daemon(under(str(copy)), copy)
                    for _ in range(2):
                        self.assert_image(client, image, "v1")
                    self.assertEqual(client.get("tags/list").json["tags"], ["v1"])

    def test_nothing_to_serve_is_said_in_one_line(self) -> None:
        for content in (None, b""):
            if content is not None:
                (self.data / "registry.db").write_bytes(content)
            for under in ([], as_nobody(""), on_read_only_disk(str(self.data))):
                with self.subTest(under, content=content):
                    options = ("--read-only", "--port", "0", "--data", str(self.data))
                    done = run(*under, sys.executable, *Daemon.PROGRAM, *options)
                    self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done)
                    self.assertIn("registry.db", done.stderr)

    def test_a_store_can_be_opened_to_look_at_it_and_leaves_no_copy(self) -> None:
        with Registry(self.data) as running:
            digest = Client(running.netloc, "team/app").push_blob(b"content")
            copy = self.copy("", "-wal")
        temporary = self.data.with_name("temporary")
        temporary.mkdir()
        os.chmod(temporary, 0o777)
        for data in (self.data, copy):
            script = (
                f"import registry; store = registry.Store({str(data)!r}, read_only=True)\n"
                "print(*store.query('SELECT digest FROM blobs')[0], flush=True)\n"
                "store.close()"
            )
            for under in (as_nobody(""), on_read_only_disk(str(data))):
                with self.subTest(under, data=data.name):
                    command, environment = (
                        [*under, sys.executable, "-S", "-c", script],
                        {"TMPDIR": str(temporary)},
                    )
                    done = run(*command, env={**ENVIRONMENT, **environment})
                    self.assertEqual(done.stdout.strip(), digest, done)
                    self.assertEqual(list(temporary.iterdir()), [])


class OnlyReadsWork(AccessTestCase):
    def fill(self) -> Client:
        self.data.path.mkdir(exist_ok=True)
        client = self.serve_anybody()
        self.image = client.push_image("latest")
        return client

    def writes(self, session: str) -> list[tuple[str, str]]:
        """A request for every route that changes something."""
        digest = digest_of(b"x")
        return [
            ("PUT", "manifests/latest"),
            ("DELETE", "manifests/latest"),
            ("DELETE", f"manifests/{self.image.digest}"),
            ("POST", "blobs/uploads/"),
            ("POST", f"blobs/uploads/?digest={digest}"),
            ("POST", f"blobs/uploads/?mount={digest_of(self.image.config)}&from=team/app"),
            ("PATCH", session),
            ("PUT", with_digest(session, digest)),
            ("DELETE", session),
            ("DELETE", f"blobs/{digest_of(self.image.config)}"),
        ]

    def assert_only_reads(self, client: Client, session: str) -> None:
        for method, path in self.writes(session):
            with self.subTest(method, path=path):
                body = b"x" if method in ("PUT", "POST", "PATCH") else None
                self.assert_error(client.request(method, path, body), 405, "UNSUPPORTED")
        self.assertEqual(client.get("manifests/latest").body, self.image.body)
        for blob in self.image.blobs:
            self.assertEqual(client.get(f"blobs/{digest_of(blob)}").body, blob)
            self.assertEqual(client.head(f"blobs/{digest_of(blob)}").status, 200)
        self.assertEqual(client.get("tags/list").json["tags"], ["latest"])
        self.assertEqual(client.get("/v2/_catalog").json["repositories"], ["team/app"])
        self.assertEqual(client.get(f"referrers/{self.image.digest}").status, 200)

    def test_every_write_is_405_and_every_read_works(self) -> None:
        session = self.fill().open_upload()
        client = self.serve(users=None, read_only=True)
        before = self.data.files(), self.data.unfinished()
        self.assert_only_reads(client, session)
        for path, methods in (("manifests/latest", "GET, HEAD"), ("blobs/uploads/", ""), (session, "")):
            self.assertEqual(client.request("BREW", path).headers["Allow"], methods)
            self.assertEqual(client.put(path, b"x").headers["Allow"], methods)
        self.assertEqual((self.data.files(), self.data.unfinished()), before)

    def test_users_are_asked_for_all_the_same(self) -> None:
        self.fill()
        client = self.serve(GRANTS, read_only=True)
        self.assert_status(client.get("manifests/latest"), 401)
        self.assert_status(client.as_caller(user("puller")).get("manifests/latest"), 200)
        token = client.as_caller(user("puller")).bearer("repository:team/app:pull")
        self.assert_status(client.as_caller(token).get("manifests/latest"), 200)
        self.assert_error(client.as_caller(user("deleter")).post("blobs/uploads/"), 405, "UNSUPPORTED")

    def test_it_needs_data_to_serve(self) -> None:
        done = command("--read-only", "--port", "0", "--data", str(self.directory / "absent"))
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done)
        self.assertFalse((self.directory / "absent").exists())

    def test_the_disk_may_be_read_only(self) -> None:
        if no_read_only():
            self.skipTest(no_read_only())
        session = self.fill().open_upload()
        data = self.data.path
        daemon = self.enter(Daemon(data, "--read-only", under=on_read_only_disk(data)))
        self.assert_only_reads(daemon.client.at("team/app"), session)
