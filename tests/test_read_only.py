"""A read-only daemon on a directory or a disk that it cannot write to, beside one that writes, and alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from registry import Registry
from tests.support import ROOT, Client, Daemon, HTTPTestCase, Image, digest_of, free_port

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


if __name__ == "__main__":
    unittest.main()
