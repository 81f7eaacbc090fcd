"""The command: starting, refusing to start, stopping, being killed, coming back, sharing a directory."""

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

from tests.support import (
    ROOT,
    TIMEOUT,
    Client,
    Daemon,
    DataDirectory,
    HTTPTestCase,
    Image,
    RawConnection,
    descriptor,
    digest_of,
    free_port,
    image_manifest,
    python,
    unique,
    with_digest,
)
from tests.test_full_disk import REASON, mounted

ACCESS_LINE = r"GET\b.*/v2/daemon/image/tags/list.*\b404\b"


def has_ipv6() -> bool:
    try:
        free_port("::1")
    except OSError:
        return False
    return True


class DaemonTestCase(HTTPTestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.realpath(directory.name)

    def start(self, *options: str, data: str = "") -> Daemon:
        daemon = Daemon(data or self.path, *options)
        daemon.start()
        self.addCleanup(daemon.kill)
        return daemon

    def connect(self, daemon: Daemon) -> RawConnection:
        connection = RawConnection(daemon.client.host)
        self.addCleanup(connection.__exit__)
        return connection

    def request_in_flight(self, daemon: Daemon, method: str, path: str, length: int) -> RawConnection:
        """A request whose body the daemon is waiting for."""
        connection = self.connect(daemon)
        path = daemon.client.path(path)
        connection.request(method, path, f"Content-Length: {length}", "Expect: 100-continue")
        self.assert_status(connection.read(), 100)
        return connection

    def assert_image(self, client: Client, image: Image, reference: str) -> None:
        """The image is there, whole."""
        response = client.get(f"manifests/{reference}")
        self.assertEqual((response.status, response.body), (200, image.body), response)
        for content in image.blobs:
            self.assertEqual(client.get(f"blobs/{digest_of(content)}").body, content)


class StartTest(DaemonTestCase):
    def test_the_serving_line_tells_where(self) -> None:
        port = free_port()
        daemon = self.start("--port", str(port))
        self.assertEqual(daemon.output, [f"Serving {self.path} at http://127.0.0.1:{port}"])
        self.assert_status(daemon.client.get("/v2/"), 200)

    def test_the_serving_line_is_on_standard_output_at_once(self) -> None:
        # Read through a pipe while the process runs: an unflushed line would not arrive.
        self.assertTrue(self.start("--quiet").serving)

    def test_an_ipv6_address_is_served_in_brackets(self) -> None:
        if not has_ipv6():
            self.skipTest("no IPv6 here")
        port = free_port("::1")
        daemon = self.start("--host", "::1", "--port", str(port))
        self.assertEqual(daemon.output, [f"Serving {self.path} at http://[::1]:{port}"])
        image = daemon.client.push_image("latest")
        self.assert_image(daemon.client, image, "latest")

    def test_it_starts_from_any_directory_and_needs_its_two_files_only(self) -> None:
        program = Path(self.path, "program")
        program.mkdir()
        for name in ("registry.py", "schema.sql"):
            (program / name).write_bytes((ROOT / name).read_bytes())
        daemon = Daemon(Path(self.path, "data"))
        daemon.program = program / "registry.py"
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


class RefusalTest(DaemonTestCase):
    """What keeps it from starting is one line on standard error."""

    def assert_refused(self, *options: str, data: str = "") -> None:
        result = python("registry.py", "--data", data or self.path, *options)
        self.assertEqual((result.returncode, result.stdout), (1, ""), result)
        self.assertRegex(result.stderr, r"\A[^\n]+\n\Z")
        self.assertNotIn("Traceback", result.stderr)

    def test_a_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            self.assert_refused("--port", str(taken.getsockname()[1]))

    def test_an_address_that_is_not_ours(self) -> None:
        self.assert_refused("--host", "203.0.113.1", "--port", str(free_port()))

    def test_a_data_directory_that_is_a_file(self) -> None:
        path = Path(self.path, "file")
        path.write_bytes(b"")
        self.assert_refused("--port", str(free_port()), data=str(path))
        self.assert_refused("--port", str(free_port()), data=str(path / "below"))

    def test_a_data_directory_that_is_not_writable(self) -> None:
        path = Path(self.path, "read-only")
        path.mkdir(mode=0o555)
        if os.access(path, os.W_OK):
            path = Path("/proc/registry")
        if not path.parent.is_dir():
            self.skipTest("everything is writable here")
        self.assert_refused("--port", str(free_port()), data=str(path))

    def test_a_database_of_a_newer_format(self) -> None:
        self.assertEqual(self.start().stop(), 0)
        self.set_format(2**31 - 1)
        self.assert_refused("--port", str(free_port()))
        self.assertEqual(self.set_format(2**31 - 1), 2**31 - 1)

    def set_format(self, version: int) -> int:
        """Set the database's format and return what it was."""
        with contextlib.closing(sqlite3.connect(Path(self.path, "registry.db"))) as database:
            (before,) = database.execute("PRAGMA user_version").fetchone()
            database.execute(f"PRAGMA user_version = {version}")
            database.commit()
        return before

    def test_a_database_that_is_none(self) -> None:
        Path(self.path, "registry.db").write_bytes(b"no database " * 1000)
        self.assert_refused("--port", str(free_port()))

    @contextlib.contextmanager
    def elsewhere(self, part: str, how: str) -> Iterator[None]:
        """A part of the data directory is on another volume, or at least mounted by itself."""
        path = Path(self.path, part)
        path.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            if how == "link":
                there = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
                path.rmdir()
                path.symlink_to(there)
            elif how == "mount":
                stack.enter_context(mounted(str(path)))
            else:
                there = stack.enter_context(tempfile.TemporaryDirectory(dir=Path(self.path).parent))
                subprocess.run(["mount", "--bind", there, path], check=True)
                stack.callback(subprocess.run, ["umount", "--lazy", path], check=True)
            yield
        path.unlink() if path.is_symlink() else shutil.rmtree(path)

    def test_parts_of_the_data_directory_on_different_volumes(self) -> None:
        hows = [] if REASON else ["mount", "bind"]
        if os.path.isdir("/dev/shm") and os.stat("/dev/shm").st_dev != os.stat(self.path).st_dev:
            hows.append("link")
        if not hows:
            self.skipTest("there is no other volume")
        for how, part in itertools.product(hows, ("blobs", "blobs/sha256", "uploads")):
            with self.subTest(part, how=how), self.elsewhere(part, how):
                self.assert_refused("--port", str(free_port()))
                self.assertEqual(list(Path(self.path).rglob(".probe")), [])
            for path in ("blobs", "uploads"):
                shutil.rmtree(Path(self.path, path), ignore_errors=True)
        self.start()  # now that it is in one piece

    def test_what_is_only_read_may_be_on_different_volumes(self) -> None:
        daemon = self.start()
        content = unique()
        digest = daemon.client.push_blob(content)
        daemon.stop()
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as there:
            blobs = Path(self.path, "blobs")
            shutil.move(blobs, there)
            blobs.symlink_to(Path(there, "blobs"))
            daemon = self.start("--read-only")
            self.assertEqual(daemon.client.get(f"blobs/{digest}").body, content)
            self.assertEqual(list(Path(self.path).rglob(".probe")), [])
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
                result = python("registry.py", "--data", self.path, *options)
                self.assertEqual((result.returncode, result.stdout), (2, ""), result)
                self.assertGreater(len(result.stderr), 0)
                self.assertNotIn("Traceback", result.stderr)


class OldVersionsTest(unittest.TestCase):
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
                done = subprocess.run(
                    [path, "-B", "registry.py"], cwd=ROOT, capture_output=True, text=True, check=False
                )
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertIn("registry.py needs Python 3.9 or newer", done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_sqlite_3_25_gets_one_line(self) -> None:
        script = "import sqlite3, registry; sqlite3.sqlite_version_info = (3, 25, 3); registry.main({})"
        with tempfile.TemporaryDirectory() as data:
            Path(data, "registry.db").write_bytes(b"")
            for arguments in (["--data", data, "--host", "203.0.113.1"], ["verify", "--data", data]):
                done = python("-c", script.format(arguments))
                self.assertRegex(done.stderr, r"\Aregistry\.py: SQLite 3\.26 or newer is needed; [^\n]+\n\Z")
            self.assertEqual(os.listdir(data), ["registry.db"])


class LogTest(DaemonTestCase):
    def test_every_request_is_a_line(self) -> None:
        daemon = self.start()
        daemon.client.get("tags/list")
        self.assertRegex(daemon.read_line(), ACCESS_LINE)
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(daemon.remaining_output(), "")

    def test_quiet_says_nothing_of_requests(self) -> None:
        daemon = self.start("--quiet")
        daemon.client.get("tags/list")
        daemon.client.push_image("latest")
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(daemon.remaining_output(), "")

    def test_a_request_cannot_write_lines_of_its_own(self) -> None:
        daemon = self.start()
        for target in ("/v2/a%0Aforged/tags/list", "/v2/?forged=%0D%0Aforged"):
            self.connect(daemon).request("GET", target, "User-Agent: a\tb \x1b[2J\x85c").read()
        self.assertEqual(daemon.stop(), 0)
        lines = daemon.remaining_output().split("\n")
        self.assertEqual(len(lines), 2, lines)
        for line in lines:
            self.assertTrue(line.isprintable(), line)

    def test_clients_that_go_away_leave_no_traceback(self) -> None:
        daemon = self.start()
        content = os.urandom(8_000_000)
        daemon.client.push_blob(content)
        blob = daemon.client.path(f"blobs/{digest_of(content)}")
        single = daemon.client.path(f"blobs/uploads/?digest={digest_of(b'x')}")
        session = daemon.client.open_upload()
        for method, path in (
            ("GET", blob),
            ("POST", single),
            ("PATCH", session),
            ("PUT", with_digest(session, digest_of(b"x"))),
            ("PUT", daemon.client.path("manifests/latest")),
        ):
            for framing in ("Content-Length: 1000000", "Transfer-Encoding: chunked"):
                lines = () if method == "GET" else (framing,)
                self.connect(daemon).request(method, path, *lines, body=b"5\r\nhello").reset()
        for data in (b"", b"GET", b"\x16\x03\x01", b"GET /v2/ HTTP/1.1\r\n"):
            self.connect(daemon).send(data).reset()
        self.assertEqual(daemon.client.get(f"blobs/{digest_of(content)}").body, content)
        self.assertEqual(daemon.stop(), 0)
        self.assertNotIn("Traceback", daemon.remaining_output())


class ClosedStreamsTest(DaemonTestCase):
    """Standard streams that are closed, or that nobody reads, keep nothing from working."""

    ERROR_CLOSED = ("sh", "-c", 'exec "$@" 2>&-', "sh")
    ALL_CLOSED = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")

    def start_under(self, *under: str) -> Daemon:
        daemon = Daemon(self.path, under=under)
        daemon.start()
        self.addCleanup(daemon.kill)
        return daemon

    def test_without_standard_error_a_connection_serves_on_even_after_an_internal_error(self) -> None:
        daemon = self.start_under(*self.ERROR_CLOSED)
        digest = daemon.client.push_blob(os.urandom(100_000))
        directory = Path(self.path, "blobs", "sha256")
        directory.rename(f"{directory}-away")
        directory.write_bytes(b"")
        with daemon.client.keep_alive() as client:
            for _ in range(2):
                self.assert_status(client.get("tags/list"), 200)
                self.assert_status(client.get(f"blobs/{digest}"), 500)

    @unittest.skipUnless(sys.platform == "linux", "looks at descriptors under /proc")
    def test_no_file_of_the_registry_gets_the_number_of_a_standard_stream(self) -> None:
        port = free_port()
        command = [*self.ALL_CLOSED, sys.executable, str(ROOT / "registry.py"), "--data", self.path]
        process = subprocess.Popen([*command, "--port", str(port), "--workers", "2"])
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)  # killed, it would not wait for its workers
        client = Client(f"127.0.0.1:{port}", "a/b")
        while True:  # there is no line to wait for
            with contextlib.suppress(ConnectionRefusedError):
                client.push_image("latest")
                break
            self.assertIsNone(process.poll())
        streams = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        self.assertEqual(streams, [os.devnull] * 3)

    def test_commands_work_without_standard_streams(self) -> None:
        daemon = self.start("--quiet")
        daemon.client.push_image("latest")
        for under in (self.ERROR_CLOSED, self.ALL_CLOSED):
            for command in ("verify", "gc"):
                with self.subTest(command, under=under):
                    arguments = [*under, sys.executable, "registry.py", command, "--data", self.path]
                    done = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, check=False)
                    self.assertEqual(done.returncode, 0)

    def test_a_repair_goes_on_when_nobody_reads_what_it_says(self) -> None:
        client = self.start("--quiet").client
        image = client.push_image("latest", layers=3)
        for content in image.layers[:2]:
            Path(self.path, "blobs", digest_of(content).replace(":", "/")).write_bytes(b"damaged")
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "registry.py", "verify", "--repair", "--data", self.path]
        done = subprocess.run(
            command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(writer)
        self.assertEqual((done.returncode, done.stderr), (1, ""))
        found = [client.head(f"blobs/{digest_of(content)}").status for content in image.layers]
        self.assertEqual(found, [404, 404, 200])


class StopTest(DaemonTestCase):
    def test_sigterm_lets_a_request_finish(self) -> None:
        content = unique()
        for method, query in (("POST", f"?digest={digest_of(content)}"), ("PATCH", None)):
            with self.subTest(method):
                daemon = self.start()
                path = daemon.client.open_upload() if query is None else f"blobs/uploads/{query}"
                connection = self.request_in_flight(daemon, method, path, len(content))
                connection.send(content[:5])
                daemon.signal(signal.SIGTERM)
                self.wait_until_refused(daemon)
                self.assert_status(connection.send(content[5:]).read(), 201, 202)
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
        program = Path(self.path, "impatient.py")
        program.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport registry\n"
            "registry.STOP_TIMEOUT = registry.OPTIONAL_WRITE_TIMEOUT = 0.1\nsys.exit(registry.main())\n"
        )
        daemon = Daemon(self.path)
        daemon.program = program
        with daemon, contextlib.closing(sqlite3.connect(f"{self.path}/registry.db")) as database:
            content = unique()
            path = f"blobs/uploads/?digest={digest_of(content)}"
            connection = self.request_in_flight(daemon, "POST", path, len(content))
            database.execute("BEGIN IMMEDIATE")
            connection.send(content)
            deadline = time.monotonic() + TIMEOUT
            while not list(Path(self.path, "blobs").glob("*/*")) and time.monotonic() < deadline:
                time.sleep(0.01)  # once it has its name there, nothing but its row is missing
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
        port = str(free_port())
        for _ in range(3):
            daemon = self.start("--port", port)
            self.connect(daemon).request("GET", "/v2/").read()
            self.assertEqual(daemon.stop(), 0)


class RestartTest(DaemonTestCase):
    def test_everything_pushed_survives_a_kill(self) -> None:
        daemon = self.start()
        image = daemon.client.push_image("latest")
        daemon.client.push_manifest(image.body, "other")
        daemon.client.push_blob(b"{}")
        referrer = image_manifest(descriptor(b"{}"), subject=image.descriptor)
        digest = daemon.client.push_manifest(referrer)
        big = os.urandom(3_000_000)
        daemon.client.at("another").push_blob(big, "sha512")
        daemon.client.push_image("deleted")
        daemon.client.expect(202, "DELETE", "manifests/deleted")
        daemon.kill()
        client = self.start().client
        for reference in ("latest", "other", image.digest):
            self.assert_image(client, image, reference)
        self.assertEqual(client.get("tags/list").json["tags"], ["latest", "other"])
        referrers = client.get(f"referrers/{image.digest}").json["manifests"]
        self.assertEqual([each["digest"] for each in referrers], [digest])
        self.assertEqual(client.at("another").get(f"blobs/{digest_of(big, 'sha512')}").body, big)
        self.assertEqual(client.get("/v2/_catalog").json["repositories"], ["another", "daemon/image"])

    def test_an_upload_goes_on_after_a_kill(self) -> None:
        content = os.urandom(1_000_000)
        for algorithm in ("sha256", "sha512"):
            for hint in ("", f"?digest-algorithm={algorithm}"):
                with self.subTest(algorithm, hint=hint):
                    daemon = self.start()
                    location = daemon.client.open_upload(hint)
                    daemon.client.expect(202, "PATCH", location, content[:400_000])
                    daemon.kill()
                    client = self.start().client
                    self.assertEqual(client.expect(204, "GET", location).headers["Range"], "0-399999")
                    headers = {"Content-Range": "400000-899999"}
                    client.expect(202, "PATCH", location, content[400_000:900_000], headers)
                    digest = digest_of(content, algorithm)
                    client.expect(201, "PUT", with_digest(location, digest), content[900_000:])
                    self.assertEqual(client.get(f"blobs/{digest}").body, content)
                    client.expect(202, "DELETE", f"blobs/{digest}")

    def test_an_upload_killed_in_mid_body_goes_on_from_what_arrived(self) -> None:
        content = os.urandom(1_000_000)
        daemon = self.start()
        location = daemon.client.open_upload()
        daemon.client.expect(202, "PATCH", location, content[:1000])
        connection = self.request_in_flight(daemon, "PATCH", location, 999_000)
        connection.send(content[1000:700_000])
        daemon.kill()
        client = self.start().client
        offset = int(client.expect(204, "GET", location).headers["Range"].partition("-")[2]) + 1
        self.assertIn(offset, range(1000, 700_001))
        client.expect(202, "PATCH", location, content[offset:], {"Content-Range": f"{offset}-999999"})
        client.expect(201, "PUT", with_digest(location, digest_of(content)))
        self.assertEqual(client.get(f"blobs/{digest_of(content)}").body, content)

    def test_a_single_post_killed_in_mid_body_leaves_nothing_to_see(self) -> None:
        content = os.urandom(100_000)
        digest = digest_of(content)
        daemon = self.start()
        connection = self.request_in_flight(daemon, "POST", f"blobs/uploads/?digest={digest}", 100_000)
        connection.send(content[:60_000])
        daemon.kill()
        client = self.start().client
        self.assert_error(client.get(f"blobs/{digest}"), 404)
        self.assertNotIn(digest, DataDirectory(self.path).recorded())
        client.push_blob(content)
        self.assertEqual(client.get(f"blobs/{digest}").body, content)

    def test_a_cancelled_upload_stays_cancelled(self) -> None:
        daemon = self.start()
        location = daemon.client.open_upload()
        daemon.client.expect(204, "DELETE", location)
        daemon.kill()
        self.assert_error(self.start().client.get(location), 404, "BLOB_UPLOAD_UNKNOWN")


class SharedDirectoryTest(DaemonTestCase):
    """Two daemons on one data directory."""

    def setUp(self) -> None:
        super().setUp()
        self.one, self.two = self.start().client, self.start().client

    def test_each_sees_what_is_pushed_to_the_other(self) -> None:
        for here, there in ((self.one, self.two), (self.two, self.one)):
            image = here.push_image("latest")
            self.assert_image(there, image, "latest")
            self.assert_image(there, image, image.digest)

    def test_each_sees_what_is_deleted_from_the_other(self) -> None:
        image = self.one.push_image("latest")
        self.assert_image(self.two, image, "latest")
        self.one.expect(202, "DELETE", f"manifests/{image.digest}")
        self.one.expect(202, "DELETE", f"blobs/{digest_of(image.config)}")
        for client in (self.two, self.one):
            for path in (
                "manifests/latest",
                f"manifests/{image.digest}",
                f"blobs/{digest_of(image.config)}",
            ):
                self.assert_error(client.get(path), 404)

    def test_an_upload_may_change_daemons_between_pieces(self) -> None:
        content = os.urandom(500_000)
        for algorithm in ("sha256", "sha512"):
            with self.subTest(algorithm):
                location = self.one.open_upload()
                for start, client in (
                    (0, self.one),
                    (100_000, self.two),
                    (200_000, self.one),
                    (300_000, self.one),
                ):
                    piece = content[start : start + 100_000]
                    headers = {"Content-Range": f"{start}-{start + 99_999}"}
                    client.expect(202, "PATCH", location, piece, headers)
                digest = digest_of(content, algorithm)
                self.two.expect(201, "PUT", with_digest(location, digest), content[400_000:])
                self.assertEqual(self.one.get(f"blobs/{digest}").body, content)
                self.assert_error(self.one.get(location), 404, "BLOB_UPLOAD_UNKNOWN")

    def test_a_tag_moved_by_one_is_moved_for_the_other(self) -> None:
        for here in (self.one, self.two, self.one):
            image = here.push_image("latest")
            for client in (self.one, self.two):
                self.assertEqual(client.get("manifests/latest").body, image.body)
                self.assertEqual(
                    client.head("manifests/latest").headers["Docker-Content-Digest"], image.digest
                )


class ProgramTest(unittest.TestCase):
    def test_help_is_help(self) -> None:
        result = python("registry.py", "--help")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        for option in ("--data", "--host", "--port", "--sparse", "--quiet", "--no-sync"):
            self.assertIn(option, result.stdout)

    def test_nothing_but_the_standard_library_is_needed(self) -> None:
        result = python("-I", "-S", "registry.py", "--help")
        self.assertEqual((result.returncode, result.stderr), (0, ""), sys.executable)
