"""The time that clients are given, and what they still owe when they have their reply."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import registry
from tests.credentials import users_line
from tests.support import (
    MEBIBYTE,
    TIMEOUT,
    Client,
    DataDirectory,
    HTTPTestCase,
    RawConnection,
    digest_of,
    elapsed,
    is_open,
)


class TimeoutTest(HTTPTestCase):
    """A registry of little patience, so that the test needs little too."""

    def setUp(self) -> None:
        patience = {"HEADER_TIMEOUT": 0.4, "STALL_TIMEOUT": 0.4, "IDLE_TIMEOUT": 0.4, "LINGER_TIMEOUT": 0.2}
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(mock.patch.multiple(registry, **patience))
        data = stack.enter_context(tempfile.TemporaryDirectory())
        self.data = DataDirectory(data)
        self.running = stack.enter_context(registry.Registry(data=data, sync=False))
        self.client = Client(self.running.netloc, "slow")

    def connect(self) -> RawConnection:
        connection = RawConnection(self.client.host)
        self.addCleanup(connection.__exit__)
        return connection

    def assert_hung_up_on(self, connection: RawConnection) -> None:
        self.assertLess(elapsed(connection.drain), 5)

    def test_a_silent_client_is_hung_up_on(self) -> None:
        self.assert_hung_up_on(self.connect())

    def test_an_idle_client_is_hung_up_on(self) -> None:
        connection = self.connect().request("GET", "/v2/")
        self.assert_status(connection.read(), 200)
        self.assert_hung_up_on(connection)

    def test_a_head_that_trickles_in_is_hung_up_on(self) -> None:
        connection = self.connect().send(b"GET /v2/ HTTP/1.1\r\n")
        deadline = time.monotonic() + 5
        while is_open(connection):
            self.assertLess(time.monotonic(), deadline, "the time for a head was not up yet")
            connection.send(b"X")
            time.sleep(0.05)

    def test_a_body_that_stalls_is_hung_up_on(self) -> None:
        for framing in ("Content-Length: 10", "Transfer-Encoding: chunked"):
            with self.subTest(framing):
                path = self.client.path(f"blobs/uploads/?digest={digest_of(b'x')}")
                connection = self.connect().request("POST", path, framing, body=b"5\r\n")
                self.assert_hung_up_on(connection)
        self.assertEqual(self.data.unfinished(), [])

    def test_a_body_that_trickles_in_is_taken(self) -> None:
        content = b"drips"
        path = self.client.path(f"blobs/uploads/?digest={digest_of(content)}")
        connection = self.connect().request("POST", path, f"Content-Length: {len(content)}")
        for byte in content:
            time.sleep(0.1)
            connection.send(bytes([byte]))
        self.assert_status(connection.read(), 201)

    def test_a_body_kept_in_memory_may_not_trickle_in_for_ever(self) -> None:
        patch = mock.patch.object(registry, "SLOWEST_BODY", registry.COUNT_LIMIT)
        patch.start()
        self.addCleanup(patch.stop)
        for framing, piece in (("Content-Length: 1000", b"x"), ("Transfer-Encoding: chunked", b"1\r\nx\r\n")):
            with self.subTest(framing):
                connection = self.connect().request("PUT", self.client.path("manifests/tag"), framing)
                deadline = time.monotonic() + 5
                while is_open(connection):
                    self.assertLess(time.monotonic(), deadline, "the time for a manifest was not up yet")
                    connection.send(piece)
                    time.sleep(0.05)

    def test_a_reply_that_is_not_read_is_given_up(self) -> None:
        digest = self.client.push_blob(os.urandom(8 * MEBIBYTE))
        connection = self.connect().request("GET", self.client.path(f"blobs/{digest}"))
        self.assert_status(connection.read_head(), 200)
        deadline = time.monotonic() + TIMEOUT
        while self.running.server.connections and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertEqual(self.running.server.connections, set())


class EarlyReplyTest(HTTPTestCase):
    """Requests that are answered before their body has come, from clients without any right."""

    LIMIT = 4
    SMALL, LARGE, CHUNKED = "Content-Length: 10", "Content-Length: 1000000000", "Transfer-Encoding: chunked"

    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        users = Path(self.stack.enter_context(tempfile.TemporaryDirectory())) / "users"
        users.write_text(users_line("a", "b"))
        self.registry = registry.Registry(users=str(users), max_connections=self.LIMIT)
        self.stack.enter_context(self.registry)
        self.client = Client(self.registry.netloc, "early")

    def patch(self, **constants: float) -> None:
        self.stack.enter_context(mock.patch.multiple(registry, **constants))

    def connect(self) -> RawConnection:
        return self.stack.enter_context(RawConnection(self.client.host))

    def begin(self, *lines: str, body: bytes = b"") -> RawConnection:
        """A push whose body will not come."""
        return self.connect().request("POST", self.client.path("blobs/uploads/"), *lines, body=body)

    def assert_served(self) -> None:
        """A new client gets an answer, if need be once the others' time is up."""
        deadline = time.monotonic() + TIMEOUT
        while (status := self.connect().request("GET", "/v2/").read().status) == 503:
            self.assertLess(time.monotonic(), deadline, "there was no room for another")
        self.assertEqual(status, 401)

    def test_the_reply_does_not_wait_for_the_body(self) -> None:
        self.patch(EVICTION_DELAY=0.0)
        for framing, body in (
            (self.SMALL, b""),
            (self.SMALL, b"12345"),
            (self.LARGE, b""),
            (self.CHUNKED, b""),
            (self.CHUNKED, b"5\r\nhel"),
            (self.CHUNKED, b"5\r\nhello"),
        ):
            for end in (RawConnection.stop_sending, lambda connection: None):
                with self.subTest(framing, body=body):
                    connection = self.begin(framing, body=body)
                    end(connection)
                    self.assert_error(connection.read(), 401, "UNAUTHORIZED")

    def test_a_small_rest_may_follow_and_another_request_after_it(self) -> None:
        connection = self.begin(self.SMALL, body=b"123")
        response = connection.read()
        self.assert_error(response, 401)
        self.assertNotIn("Connection", response.headers)
        for piece in (b"456", b"7890"):
            connection.send(piece)
        self.assert_error(connection.request("GET", "/v2/unknown").read(), 404)

    def test_a_rest_of_unknown_length_ends_the_connection(self) -> None:
        for lines in ((self.CHUNKED,), (self.LARGE,), (self.SMALL, "Expect: 100-continue")):
            with self.subTest(lines):
                connection = self.begin(*lines)
                self.assertEqual(connection.read().headers["Connection"], "close")
                self.assertTrue(connection.is_closed())

    def test_a_client_that_sends_all_of_its_body_first_can_read_the_reply(self) -> None:
        body = b"x" * (32 * MEBIBYTE)
        for framing in (f"Content-Length: {len(body)}", self.CHUNKED):
            with self.subTest(framing):
                connection = self.begin(framing)
                for start in range(0, len(body), MEBIBYTE):
                    connection._socket.sendall(body[start : start + MEBIBYTE])
                self.assert_error(connection.read(), 401)
                self.assertTrue(connection.is_closed())

    def test_a_rest_that_trickles_in_is_cut_off(self) -> None:
        self.patch(LINGER_TIMEOUT=0.3)
        for framing in ("Content-Length: 100000", self.LARGE, self.CHUNKED):
            with self.subTest(framing):
                connection = self.begin(framing)
                self.assert_error(connection.read(), 401)
                deadline = time.monotonic() + 5
                while is_open(connection):
                    self.assertLess(time.monotonic(), deadline, "the rest is still being awaited")
                    connection.send(b"x")
                    time.sleep(0.02)

    def test_whoever_owes_a_rest_makes_room(self) -> None:
        self.patch(LINGER_TIMEOUT=10 * TIMEOUT, EVICTION_DELAY=0.0)
        for framing in (self.SMALL, self.LARGE, self.CHUNKED):
            with self.subTest(framing):
                held = [self.begin(framing) for _ in range(self.LIMIT)]
                for connection in held:
                    self.assert_error(connection.read(), 401)
                self.assert_served()

    def test_whoever_does_not_read_errors_makes_room(self) -> None:
        self.patch(EVICTION_DELAY=0.0)
        with registry.Registry(max_connections=1) as running, RawConnection(running.netloc) as connection:
            connection._socket.settimeout(0.5)
            with contextlib.suppress(OSError):  # once neither side has room for more
                while True:
                    connection._socket.sendall(b"GET /v2/unknown HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
            self.assert_status(Client(running.netloc).get("/v2/"), 200)

    def test_whoever_sends_a_form_slowly_makes_room(self) -> None:
        self.patch(EVICTION_DELAY=0.0)
        for _ in range(self.LIMIT):
            connection = self.connect().request("POST", "/token", self.SMALL, "Expect: 100-continue")
            self.assert_status(connection.read(), 100)
        self.assert_served()

    def test_whoever_is_refused_again_and_again_makes_room(self) -> None:
        """Each time with the end of one body, and the head of the next request that owes one."""
        for path, *lines in ((self.client.path("blobs/uploads/"),), ("/token", "Expect: 100-continue")):
            with self.subTest(path):
                held = [self.connect() for _ in range(self.LIMIT)]
                deadline = time.monotonic() + TIMEOUT
                while True:
                    for connection in held:
                        connection.request("POST", path, self.SMALL, *lines).read_unless_closed()
                    with RawConnection(self.client.host) as honest:
                        if honest.request("GET", "/v2/").read().status == 401:
                            break
                    self.assertLess(time.monotonic(), deadline, "there was no room for another")
                    for connection in held:
                        connection.send(b"1234567890")
                        if lines:
                            connection.read_unless_closed()

    def test_stopping_does_not_wait_for_a_rest(self) -> None:
        self.patch(LINGER_TIMEOUT=10 * TIMEOUT)
        held = [self.begin(framing) for framing in (self.SMALL, self.LARGE, self.CHUNKED)]
        for connection in held:
            self.assert_error(connection.read(), 401)
        self.assertLess(elapsed(self.registry.close), 5)
        for connection in held:
            self.assertTrue(connection.is_closed())
