"""A read-only daemon: what it refuses, and where it cannot write itself, alone or beside one that does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path

from registry import Registry
from tests.access import GRANTS, AccessTestCase, user
from tests.support import (
    ROOT,
    Client,
    Daemon,
    HTTPTestCase,
    Image,
    digest_of,
    free_port,
    python,
    with_digest,
)

NOBODY = 65534
AS_NOBODY = f"""
import encodings.idna, os, sys
sys.path.insert(0, {str(ROOT)!r})
import registry  # now, and what it imports later: nobody may not be let into Python's directory
registry.build_parser().parse_args(['--port', '0'])
os.setgid({NOBODY})
os.setuid({NOBODY})
_, _, program, *arguments = sys.argv
sys.exit(exec(arguments[0]) if program == "-c" else registry.main(arguments))
"""
READ_ONLY_DISK = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'


def as_nobody(_data: str) -> list[str]:
    """A command that runs another Python command as a user who owns nothing."""
    return [sys.executable, "-c", AS_NOBODY]


def on_read_only_disk(data: str) -> list[str]:
    """A command that runs another, to which the disk with the data directory is read-only."""
    return ["unshare", "--mount", "sh", "-c", READ_ONLY_DISK, "sh", data]


def reason_against() -> str:
    """Why these tests cannot run here; empty if they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "only root may mount, and become somebody else"
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        for under in (as_nobody(path), on_read_only_disk(path)):
            check = [*under, sys.executable, "-c", "pass"]
            try:
                subprocess.run(check, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                return f"not possible here: {error}"
    return ""


REASON = reason_against()


@unittest.skipIf(REASON, REASON)
class ReadOnlyTestCase(HTTPTestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        os.chmod(directory.name, 0o755)
        self.data = Path(directory.name) / "data"
        self.start_afresh()

    def start_afresh(self) -> None:
        """An empty data directory that anybody may read: one that the daemon makes lets nobody else in."""
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(mode=0o755)

    def push(self, running: Registry, tag: str) -> Image:
        return Client(running.netloc, "team/app").push_image(tag)

    def read_only_daemon(self, under: list[str], data: Path | None = None) -> Client:
        daemon = Daemon(data or self.data, "--read-only", "--quiet", under=under)
        daemon.start()
        self.addCleanup(daemon.kill)
        return daemon.client.at("team/app")

    def assert_pulled(self, client: Client, image: Image, tag: str) -> None:
        self.assertEqual(client.expect(200, "GET", f"manifests/{tag}").body, image.body)
        for content in image.blobs:
            self.assertEqual(client.expect(200, "GET", f"blobs/{digest_of(content)}").body, content)


class ReadOnlyBesideAWriter(ReadOnlyTestCase):
    def test_what_a_daemon_pushes_that_starts_and_stops_later_is_seen_at_once(self) -> None:
        for under in (as_nobody, on_read_only_disk):
            with self.subTest(under.__name__):
                self.start_afresh()
                with Registry(self.data) as running:
                    first = self.push(running, "first")
                client = self.read_only_daemon(under(str(self.data)))
                self.assert_pulled(client, first, "first")
                for number in range(5):
                    with Registry(self.data) as running:
                        for tag in (f"{number}a", f"{number}b"):
                            self.assert_error(client.get(f"manifests/{tag}"), 404, "MANIFEST_UNKNOWN")
                            self.assert_pulled(client, self.push(running, tag), tag)
                    self.assert_pulled(client, first, "first")
                with Registry(self.data) as running:
                    Client(running.netloc, "team/app").expect(202, "DELETE", "manifests/first")
                    self.assert_error(client.get("manifests/first"), 404, "MANIFEST_UNKNOWN")

    def test_it_may_start_while_the_other_writes(self) -> None:
        for under in (as_nobody, on_read_only_disk):
            with self.subTest(under.__name__), Registry(self.data) as running:
                client = self.read_only_daemon(under(str(self.data)))
                for tag in ("a", "b", "a"):
                    self.assert_pulled(client, self.push(running, tag), tag)


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
                        self.assert_pulled(client, image, "v1")
                    self.assertEqual(client.get("tags/list").json["tags"], ["v1"])

    def test_nothing_to_serve_is_said_in_one_line(self) -> None:
        for content in (None, b""):
            if content is not None:
                (self.data / "registry.db").write_bytes(content)
            for under in ([], as_nobody(""), on_read_only_disk(str(self.data))):
                with self.subTest(under, content=content):
                    command = [*under, sys.executable, str(ROOT / "registry.py"), "--read-only"]
                    command += ["--port", str(free_port()), "--data", str(self.data)]
                    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
                    self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done)
                    self.assertIn("registry.db", done.stderr)

    def test_a_store_can_be_opened_to_verify_it_and_leaves_no_copy(self) -> None:
        with Registry(self.data) as running:
            digest = Client(running.netloc, "team/app").push_blob(b"content")
            copy = self.copy("", "-wal")
        temporary = self.data.with_name("temporary")
        temporary.mkdir()
        os.chmod(temporary, 0o777)
        for data in (self.data, copy):
            script = (
                f"import registry; store = registry.Store({str(data)!r}, read_only=True)\n"
                "with store.transaction() as db:\n"
                "    print(*db.execute('SELECT digest FROM blobs').fetchone(), flush=True)\n"
                "store.close()"
            )
            for under in (as_nobody(""), on_read_only_disk(str(data))):
                with self.subTest(under, data=data.name):
                    command, environment = [*under, sys.executable, "-c", script], {"TMPDIR": str(temporary)}
                    done = subprocess.run(
                        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
                        check=False, timeout=10,
                    )  # fmt: skip
                    self.assertEqual(done.stdout.strip(), digest, done)
                    self.assertEqual(list(temporary.iterdir()), [])


def can_remount() -> bool:
    """Whether a mount namespace can be made here."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


class ReadOnlyTest(AccessTestCase):
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
        options = ("--read-only", "--port", "0", "--data", str(self.directory / "absent"))
        done = python("registry.py", *options)
        self.assertEqual(done.returncode, 1, done)
        self.assertNotIn("Traceback", done.stderr)
        self.assertFalse((self.directory / "absent").exists())

    @unittest.skipUnless(can_remount(), "needs root's rights and unshare")
    def test_the_disk_may_be_read_only(self) -> None:
        session = self.fill().open_upload()
        self.resources.enter_context(self.daemon_on_read_only_disk())
        self.assert_only_reads(Client(self.host, "team/app"), session)

    @contextlib.contextmanager
    def daemon_on_read_only_disk(self) -> Iterator[None]:
        """A daemon to which the data directory is mounted read-only."""
        data, port = str(self.data.path), str(free_port())
        self.host = f"127.0.0.1:{port}"
        script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
        command = [sys.executable, str(ROOT / "registry.py"), "--read-only", "--port", port, "--data", data]
        with subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, "sh", data, *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            try:
                self.assertIn("Serving", process.stdout.readline())
                yield
            finally:
                process.kill()
