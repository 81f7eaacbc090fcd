"""What the daemon writes: its log, line by line, and standard streams that are closed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
import unittest
from unittest import mock

import registry
from registry import Registry
from tests.daemon import Daemon, DaemonTestCase, free_port, run, unread
from tests.support import (
    Client,
    DataDirectory,
    HTTPTestCase,
    RawConnection,
    digest_of,
    wait_until,
    with_digest,
)


class NothingIsForged(HTTPTestCase):
    """What a client sends never ends up raw in the log, nor among a reply's headers."""

    CONTROLS = (*range(0x01, 0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0), 0xAD, 0xFF)

    def setUp(self) -> None:
        self.lines: list[str] = []
        self.registry = self.enter(Registry(log=self.lines.append))
        self.client = Client(self.registry.netloc, "a")

    def send(self, data: bytes) -> None:
        with RawConnection(self.client.host) as connection:
            connection.send(data)
            connection.stop_sending()
            while connection.read_unless_closed():  # which parses strictly
                pass

    def log_lines(self) -> list[str]:
        """One for each request, once all of them are over."""
        self.registry.close()
        return self.lines

    def test_no_control_character_reaches_the_log(self) -> None:
        sent = 0
        for code in self.CONTROLS:
            raw = bytes([code])
            for head in (
                b"GET /v2/%s HTTP/1.1\r\nHost: a" % raw,
                b"G%sT /v2/ HTTP/1.1\r\nHost: a" % raw,
                b"GET /v2/?%s HTTP/1.1\r\nHost: a" % raw,
                b"GET /v2/ HTTP/1.1\r\nHost: a\r\nUser-Agent: x%sy" % raw,
                b"GET /v2/ HTTP/1.1\r\nHost: a%s\r\nReferer: x%sy\r\nX-Forwarded-For: %s" % (raw, raw, raw),
            ):
                self.send(head + b"\r\nConnection: close\r\n\r\n")
                sent += 1
        lines = self.log_lines()
        self.assertEqual(len(lines), sent)
        for line in lines:
            self.assertTrue(line.isprintable(), line)
            self.assertRegex(line, r"^\d{4}-\d\d-\d\dT\S+ 127\.0\.0\.1 ")

    def test_a_line_of_the_log_is_of_bounded_length(self) -> None:
        for head in (
            f"GET /v2/{'a' * 8000} HTTP/1.1",
            f"GET /v2/{'%AA' * 2500} HTTP/1.1",
            f"{'G' * 8000} /v2/ HTTP/1.1",
            "GET /v2/ HTTP/1.1\r\nUser-Agent: " + "\xe4" * 60_000,
        ):
            self.send(f"{head}\r\nHost: a\r\n\r\n".encode("latin-1"))
        lines = self.log_lines()
        self.assertEqual(len(lines), 4)
        for line in lines:
            self.assertLess(len(line), 2000)

    def test_no_encoded_line_end_makes_a_line_or_a_header(self) -> None:
        forged = "%0d%0aX-Forged:%20yes"
        digest = digest_of(b"x")
        paths = (
            f"/v2/{forged}/blobs/uploads/",
            f"/v2/a/manifests/{forged}",
            f"/v2/a/manifests/{digest}?tag=a{forged}",
            f"/v2/a/blobs/{digest}{forged}",
            f"/v2/a/blobs/uploads/{forged}?digest={digest}",
            f"/v2/a/blobs/uploads/?mount={digest}&from=b{forged}",
            f"/v2/a/tags/list?n=1&last={forged}",
            f"/v2/_catalog?n=0&last={forged}",
            f"/v2/a/referrers/{digest}?artifactType={forged}",
        )
        requests = list(itertools.product(("GET", "POST", "PUT", "PATCH", "DELETE"), paths))
        for method, path in requests:
            response = self.client.request(method, path)
            self.assertNotIn("X-Forged", response.headers, response)
        lines = self.log_lines()
        self.assertEqual(len(lines), len(requests))
        self.assertEqual([line for line in lines if line.startswith("X-Forged")], [])


class RequestsAreLogged(DaemonTestCase):
    """What the daemon prints."""

    def test_every_request_is_a_line(self) -> None:
        daemon = self.start()
        daemon.client.get("tags/list")
        self.assertRegex(daemon.read_line(), r"GET\b.*/v2/daemon/image/tags/list.*\b404\b")
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(daemon.remaining_output(), "")

    def test_quiet_says_nothing_of_requests(self) -> None:
        daemon = self.start("--quiet")
        daemon.client.get("tags/list")
        daemon.client.push_image("latest")
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(daemon.remaining_output(), "")

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


class StreamsMayBeClosed(DaemonTestCase):
    """Standard streams that are closed, or that nobody reads, keep nothing from working."""

    ERROR_CLOSED = ("sh", "-c", 'exec "$@" 2>&-', "sh")
    ALL_CLOSED = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")

    def test_without_standard_error_a_connection_serves_on_even_after_an_internal_error(self) -> None:
        daemon = self.start(under=self.ERROR_CLOSED)
        digest = daemon.client.push_blob(os.urandom(100_000))
        directory = self.path / "blobs" / "sha256"
        directory.rename(f"{directory}-away")
        directory.write_bytes(b"")
        with daemon.client.keep_alive() as client:
            for _ in range(2):
                self.assert_status(client.get("tags/list"), 200)
                self.assert_status(client.get(f"blobs/{digest}"), 500)

    def test_a_log_that_cannot_be_written_keeps_no_connection_from_serving_on(self) -> None:
        full = mock.Mock(**{"write.side_effect": OSError(errno.ENOSPC, "no space left on device")})
        for stream in (None, mock.Mock(**{"write.side_effect": BrokenPipeError}), full):
            with (
                contextlib.redirect_stderr(stream),
                Registry(log=registry.write_log) as running,
                Client(running.netloc).keep_alive() as client,
            ):
                for _ in range(2):
                    self.assert_status(client.get("/v2/"), 200)
            self.assertTrue(stream is None or stream.write.called)

    @unittest.skipUnless(sys.platform == "linux", "looks at descriptors under /proc")
    def test_no_file_of_the_registry_gets_the_number_of_a_standard_stream(self) -> None:
        port = free_port()
        command = [*self.ALL_CLOSED, sys.executable, *Daemon.PROGRAM, "--data", str(self.path)]
        process = subprocess.Popen([*command, "--port", str(port), "--workers", "2"])
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)  # killed, it would not wait for its workers
        client = Client(f"127.0.0.1:{port}", "a/b")
        wait_until(lambda: self.is_served(client) or process.poll() is not None, "for a port that answers")
        client.push_image("latest")
        streams = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        self.assertEqual(streams, [os.devnull] * 3)

    def is_served(self, client: Client) -> bool:
        """There is no line to wait for."""
        with contextlib.suppress(ConnectionRefusedError):
            return client.get("/v2/").status == 200
        return False

    def test_commands_work_without_standard_streams(self) -> None:
        daemon = self.start("--quiet")
        daemon.client.push_image("latest")
        for under in (self.ERROR_CLOSED, self.ALL_CLOSED):
            for command in ("verify", "gc"):
                with self.subTest(command, under=under):
                    done = run(*under, sys.executable, *Daemon.PROGRAM, command, "--data", self.path)
                    self.assertEqual(done.returncode, 0)

    def test_a_repair_goes_on_when_nobody_reads_what_it_says(self) -> None:
        client = self.start("--quiet").client
        image = client.push_image("latest", layers=3)
        for content in image.layers[:2]:
            DataDirectory(self.path).blob(digest_of(content)).write_bytes(b"damaged")
        done = unread("verify", "--repair", "--data", str(self.path))
        self.assertEqual((done.returncode, done.stderr), (1, ""))
        found = [client.head(f"blobs/{digest_of(content)}").status for content in image.layers]
        self.assertEqual(found, [404, 404, 200])
