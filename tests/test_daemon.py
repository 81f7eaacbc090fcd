"""The command: starting, refusing to start, stopping."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import registry
from tests.daemon import Daemon, DaemonTestCase, command, python, run
from tests.mounts import mounted, no_volume
from tests.support import (
    ROOT,
    HTTPTestCase,
    RawConnection,
    descriptor,
    digest_of,
    image_manifest,
    unique,
    wait_until,
)


class ItStarts(DaemonTestCase):
    def test_the_serving_line_tells_where(self) -> None:
        daemon = self.start()
        self.assertEqual(daemon.output, [f"Serving {self.path} at http://{daemon.client.host}"])
        self.assertRegex(daemon.client.host, r"\A127\.0\.0\.1:[1-9][0-9]*\Z")
        self.assert_status(daemon.client.get("/v2/"), 200)

    def test_a_name_that_cannot_be_printed_is_no_obstacle(self) -> None:
        with mock.patch.dict("tests.daemon.ENVIRONMENT", {"PYTHONIOENCODING": "utf-8:strict"}):
            daemon = Daemon(self.path / os.fsdecode(b"d\xff"))
            with daemon:
                self.assertTrue(daemon.serving[1].endswith("/d\\udcff"), daemon.output)

    def test_an_ipv6_address_is_served_in_brackets(self) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("no IPv6 here")
        daemon = self.start("--host", "::1")
        self.assertTrue(daemon.client.host.startswith("[::1]:"), daemon.output)
        image = daemon.client.push_image("latest")
        self.assert_image(daemon.client, image, "latest")

    def test_it_starts_from_any_directory_and_needs_its_two_files_only(self) -> None:
        program = self.path / "program"
        program.mkdir()
        for name in ("registry.py", "schema.sql"):
            (program / name).write_bytes((ROOT / name).read_bytes())
        daemon = Daemon(self.path / "data")
        daemon.program = [str(program / "registry.py")]
        with daemon:
            self.assert_status(daemon.client.get("/v2/"), 200)

    def test_sparse_takes_parts_of_images(self) -> None:
        for options, status in (((), 400), (("--sparse",), 201)):
            with self.subTest(options):
                client = self.start(*options).client
                client.push_blob(b"{}")
                manifest = image_manifest(descriptor(b"{}"), [descriptor(b"absent")])
                self.assert_status(client.put_manifest(manifest), status)

    def test_without_sync_it_keeps_what_is_pushed(self) -> None:
        daemon = self.start("--no-sync")
        image = daemon.client.push_image("latest")
        self.assertEqual(daemon.stop(), 0)
        self.assert_image(self.start("--no-sync").client, image, "latest")


class ItRefusesToStart(DaemonTestCase):
    """What keeps it from starting is one line on standard error."""

    def assert_refused(self, *options: str, data: str | Path = "", real: bool = False) -> None:
        arguments = ("--data", str(data or self.path), "--port", "0", *options)
        result = python("registry.py", *arguments) if real else command(*arguments)
        self.assertEqual((result.returncode, result.stdout), (1, ""), result)
        self.assertRegex(result.stderr, r"\Aregistry\.py: [^\n]+\n\Z")

    def test_no_room_for_a_single_connection(self) -> None:
        with self.assertRaisesRegex(registry.StartupError, "fewer than 1"):
            registry.Registry(max_connections=0).start()

    def test_tls_where_python_has_none(self) -> None:
        with mock.patch("registry.ssl", None):
            self.assert_refused("--tls-cert", "any.pem")

    def test_a_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            self.assert_refused("--port", str(taken.getsockname()[1]), real=True)

    def test_an_address_that_is_not_ours(self) -> None:
        self.assert_refused("--host", "203.0.113.1")

    def test_a_data_directory_that_is_a_file(self) -> None:
        path = self.path / "file"
        path.write_bytes(b"")
        self.assert_refused(data=path)
        self.assert_refused(data=path / "below")

    def test_a_data_directory_that_is_not_writable(self) -> None:
        path = self.path / "read-only"
        path.mkdir(mode=0o555)
        if os.access(path, os.W_OK):
            path = Path("/proc/registry")
        if not path.parent.is_dir():
            self.skipTest("everything is writable here")
        self.assert_refused(data=path)

    def test_a_database_of_a_newer_format(self) -> None:
        self.assertEqual(self.start().stop(), 0)
        self.set_format(2**31 - 1)
        self.assert_refused()
        self.assertEqual(self.set_format(2**31 - 1), 2**31 - 1)

    def set_format(self, version: int) -> int:
        """Set the database's format and return what it was."""
        with contextlib.closing(sqlite3.connect(self.path / "registry.db")) as database:
            (before,) = database.execute("PRAGMA user_version").fetchone()
            database.execute(f"PRAGMA user_version = {version}")
            database.commit()
        return before

    def test_a_database_that_is_none(self) -> None:
        (self.path / "registry.db").write_bytes(b"no database " * 1000)
        self.assert_refused()

    def other_volume(self) -> str | None:
        """A directory that is not where the data is, if there is one."""
        found = [path for path in (tempfile.gettempdir(), "/dev/shm") if os.path.isdir(path)]
        here = os.stat(self.path).st_dev
        return next((path for path in found if os.stat(path).st_dev != here), None)

    @contextlib.contextmanager
    def elsewhere(self, part: str, how: str) -> Iterator[None]:
        """A part of the data directory is on another volume, or at least mounted by itself."""
        path = self.path / part
        path.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            if how == "link":
                there = stack.enter_context(tempfile.TemporaryDirectory(dir=self.other_volume()))
                path.rmdir()
                path.symlink_to(there)
            elif how == "mount":
                stack.enter_context(mounted(path))
            else:
                there = stack.enter_context(tempfile.TemporaryDirectory(dir=self.path.parent))
                subprocess.run(["mount", "--bind", there, path], check=True)
                stack.callback(subprocess.run, ["umount", "--lazy", path], check=True)
            yield
        path.unlink() if path.is_symlink() else shutil.rmtree(path)

    def test_parts_of_the_data_directory_on_different_volumes(self) -> None:
        hows = [] if no_volume() else ["mount", "bind"]
        if self.other_volume():
            hows.append("link")
        if not hows:
            self.skipTest("there is no other volume")
        for how, part in itertools.product(hows, ("blobs", "blobs/sha256", "uploads")):
            with self.subTest(part, how=how), self.elsewhere(part, how):
                self.assert_refused()
                self.assertEqual(list(self.path.rglob(".probe")), [])
            for path in ("blobs", "uploads"):
                shutil.rmtree(self.path / path, ignore_errors=True)
        self.start()  # now that it is in one piece

    def test_what_is_only_read_may_be_on_different_volumes(self) -> None:
        daemon = self.start()
        content = unique()
        digest = daemon.client.push_blob(content)
        daemon.stop()
        with tempfile.TemporaryDirectory(dir=self.other_volume()) as there:
            blobs = self.path / "blobs"
            shutil.move(blobs, there)
            blobs.symlink_to(Path(there, "blobs"))
            daemon = self.start("--read-only")
            self.assertEqual(daemon.client.get(f"blobs/{digest}").body, content)
            self.assertEqual(list(self.path.rglob(".probe")), [])
            daemon.stop()

    def test_a_bad_option_is_a_usage_error(self) -> None:
        for options in (
            ("--unheard-of",),
            ("--port",),
            ("--port", "x"),
            ("--port", "-1"),
            ("--port", "65536"),
            ("--port", "1e3"),
            ("unheard-of-command",),
        ):
            with self.subTest(options):
                result = command("--data", str(self.path), *options)
                self.assertEqual((result.returncode, result.stdout), (2, ""), result)
                self.assertRegex(result.stderr, r"\Ausage: ")


class OldVersionsAreToldSo(HTTPTestCase):
    """A Python or SQLite that is too old is told so in one line."""

    MESSAGE = r"\Aregistry\.py needs Python 3\.9 or newer; this is 3\.8\n\Z"

    def test_python_3_8_gets_one_line(self) -> None:
        script = (
            "import runpy, sys; sys.version_info = (3, 8, 18); runpy.run_path('registry.py', run_name={})"
        )
        done = python("-c", script.format("'__main__'"))
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, self.MESSAGE)
        done = python("-c", script.format("'registry'"))  # as an import does
        self.assertRegex(
            done.stderr, r"\nImportError: registry\.py needs Python 3\.9 or newer; this is 3\.8\n\Z"
        )

    def test_an_older_python_stumbles_first_over_the_line_that_says_what_is_needed(self) -> None:
        source = (ROOT / "registry.py").read_text(encoding="ascii")  # Python 2 takes nothing else
        first = min(node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.NamedExpr))
        self.assertIn("registry.py needs Python 3.9 or newer", source.splitlines()[first - 1])

    def test_every_old_python_of_this_machine_says_so(self) -> None:
        versions = Path.home() / ".pyenv" / "versions"
        found = [path for path in versions.glob("*/bin/python") if re.match(r"2|3\.[0-8]\.", path.parts[-3])]
        if not found:
            self.skipTest("no Python before 3.9 here")
        for path in found:
            with self.subTest(str(path)):
                done = run(path, "-B", "registry.py")
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertIn("registry.py needs Python 3.9 or newer", done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_sqlite_3_25_gets_one_line(self) -> None:
        data = self.temporary()
        (data / "registry.db").write_bytes(b"")
        with mock.patch.object(sqlite3, "sqlite_version_info", (3, 25, 3)):
            for arguments in (("--host", "203.0.113.1"), ("verify",)):
                done = command(*arguments, "--data", str(data))
                self.assertRegex(done.stderr, r"\Aregistry\.py: SQLite 3\.26 or newer is needed; [^\n]+\n\Z")
        self.assertEqual(os.listdir(data), ["registry.db"])


class ItStops(DaemonTestCase):
    def test_sigterm_lets_a_request_finish(self) -> None:
        content = unique()
        for method, query, status in (("POST", f"?digest={digest_of(content)}", 201), ("PATCH", None, 202)):
            with self.subTest(method):
                daemon = self.start()
                path = daemon.client.open_upload() if query is None else f"blobs/uploads/{query}"
                connection = self.request_in_flight(daemon, method, path, len(content))
                connection.send(content[:5])
                daemon.signal(signal.SIGTERM)
                self.wait_until_refused(daemon)
                self.assert_status(connection.send(content[5:]).read(), status)
                replied = time.monotonic()
                self.assertEqual(daemon.wait(), 0)
                self.assertLess(time.monotonic() - replied, 4, "there was nothing left to wait for")
        restarted = self.start().client
        self.assertEqual(restarted.get(f"blobs/{digest_of(content)}").body, content)

    def wait_until_refused(self, daemon: Daemon) -> None:
        """Knock until nobody opens: the daemon has seen the signal, or does not mean to close its port."""
        with contextlib.suppress(OSError):
            for _ in range(1000):
                RawConnection(daemon.client.host).__exit__()

    def test_sigterm_does_not_wait_for_idle_connections(self) -> None:
        daemon = self.start()
        silent, idle = self.connect(daemon), self.connect(daemon)
        self.assert_status(idle.request("GET", "/v2/").read(), 200)
        self.assertEqual(daemon.stop(), 0)
        self.assertTrue(silent.is_closed())
        self.assertTrue(idle.is_closed())

    def test_sigterm_does_not_wait_for_a_request_that_waits_for_the_database(self) -> None:
        daemon = Daemon(self.path)
        impatient = "import registry; registry.STOP_TIMEOUT = registry.OPTIONAL_WRITE_TIMEOUT = 0.1;"
        daemon.program = ["-c", daemon.CODE.replace("import registry;", impatient)]
        with daemon, contextlib.closing(sqlite3.connect(f"{self.path}/registry.db")) as database:
            content = unique()
            path = f"blobs/uploads/?digest={digest_of(content)}"
            connection = self.request_in_flight(daemon, "POST", path, len(content))
            database.execute("BEGIN IMMEDIATE")
            connection.send(content)
            blobs = self.path / "blobs"  # once it has its name there, nothing but its row is missing
            wait_until(lambda: list(blobs.glob("*/*")), "for the blob's file")
            self.assertEqual(daemon.stop(), 0)
            self.assertNotIn("Traceback", daemon.remaining_output())

    @unittest.skipUnless(sys.platform == "linux", "finds the threads of a process under /proc")
    def test_sigterm_is_heard_whichever_thread_takes_it(self) -> None:
        daemon = self.start()
        self.assert_status(self.connect(daemon).request("GET", "/v2/").read(), 200)
        threads = {int(name) for name in os.listdir(f"/proc/{daemon.process.pid}/task")}
        for thread in threads - {daemon.process.pid}:
            os.kill(thread, signal.SIGTERM)
            break
        self.assertEqual(daemon.wait(), 0)

    def test_an_interrupt_is_a_stop_too(self) -> None:
        daemon = self.start()
        daemon.client.get("/v2/")
        daemon.signal(signal.SIGINT)
        self.assertEqual(daemon.wait(), 0)
        self.assertNotIn("Traceback", daemon.remaining_output())

    def test_the_port_is_free_at_once(self) -> None:
        port = "0"
        for _ in range(3):
            daemon = self.start("--port", port)
            port = daemon.client.host.rpartition(":")[2]
            self.connect(daemon).request("GET", "/v2/").read()
            self.assertEqual(daemon.stop(), 0)


class ItNeedsNothingElse(unittest.TestCase):
    def test_help_is_help(self) -> None:
        result = python("registry.py", "--help")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        for option in ("--data", "--host", "--port", "--sparse", "--quiet", "--no-sync"):
            self.assertIn(option, result.stdout)

    def test_nothing_but_the_standard_library_is_needed(self) -> None:
        result = python("-I", "-S", "registry.py", "--help")
        self.assertEqual((result.returncode, result.stderr), (0, ""), sys.executable)
