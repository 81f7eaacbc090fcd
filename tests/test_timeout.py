"""The time that clients are given, and what they still owe when they have their reply."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from unittest import mock

import registry
from registry import Registry
from tests.credentials import basic, users_line
from tests.support import (
    MEBIBYTE,
    TIMEOUT,
    Client,
    DataDirectory,
    HTTPTestCase,
    RawConnection,
    digest_of,
    elapsed,
    wait_until,
)


class TimeRunsOut(HTTPTestCase):
    """A registry of little patience, so that the test needs little too."""

    def setUp(self) -> None:
        self.patch(HEADER_TIMEOUT=0.2, STALL_TIMEOUT=0.2, IDLE_TIMEOUT=0.2, LINGER_TIMEOUT=0.1)
        self.data = DataDirectory(self.temporary())
        self.running = self.enter(Registry(self.data.path, sync=False))
        self.client = Client(self.running.netloc, "slow")

    def connect(self) -> RawConnection:
        return self.enter(RawConnection(self.client.host))

    def assert_hung_up_on(self, connection: RawConnection) -> None:
        self.assertLess(elapsed(connection.drain), 5)

    def assert_cut_off(self, connection: RawConnection, piece: bytes = b"x") -> None:
        """It is hung up on though it goes on sending."""
        wait_until(lambda: not connection.send(piece).is_open(), "for its time to be up")

    def test_a_silent_client_is_hung_up_on(self) -> None:
        self.assert_hung_up_on(self.connect())

    def test_an_idle_client_is_hung_up_on(self) -> None:
        connection = self.connect().request("GET", "/v2/")
        self.assert_status(connection.read(), 200)
        self.assert_hung_up_on(connection)

    def test_a_head_that_trickles_in_is_hung_up_on(self) -> None:
        self.assert_cut_off(self.connect().send(b"GET /v2/ HTTP/1.1\r\n"))

    def test_a_body_that_stalls_is_hung_up_on(self) -> None:
        path = self.client.path(f"blobs/uploads/?digest={digest_of(b'x')}")
        framings = ("Content-Length: 10", "Transfer-Encoding: chunked")
        connections = [self.connect().request("POST", path, framing, body=b"5\r\n") for framing in framings]
        for framing, connection in zip(framings, connections):
            with self.subTest(framing):
                self.assert_hung_up_on(connection)
        self.assertEqual(self.data.unfinished(), [])

    def test_a_body_that_trickles_in_is_taken(self) -> None:
        """It takes longer than it may stall. So does each byte where the machine is slow: then once more."""
        self.patch(STALL_TIMEOUT=0.3)
        content = b"drip"
        path = self.client.path(f"blobs/uploads/?digest={digest_of(content)}")
        longest = TIMEOUT
        while longest > 0.2:
            connection = self.connect().request("POST", path, f"Content-Length: {len(content)}")
            longest = max(elapsed(lambda: self.drip(connection, byte)) for byte in content)  # noqa: B023
        self.assert_status(connection.read(), 201)

    def drip(self, connection: RawConnection, byte: int) -> None:
        time.sleep(0.1)
        connection.send(bytes([byte]))

    def test_a_body_kept_in_memory_may_not_trickle_in_for_ever(self) -> None:
        self.patch(SLOWEST_BODY=10**18)
        for framing, piece in (
            ("Content-Length: 10000", b"x"),
            ("Transfer-Encoding: chunked", b"1\r\nx\r\n"),
        ):
            with self.subTest(framing):
                self.assert_cut_off(
                    self.connect().request("PUT", self.client.path("manifests/tag"), framing), piece
                )

    def test_a_reply_that_is_not_read_is_given_up(self) -> None:
        self.patch(STALL_TIMEOUT=0.1)
        digest = self.client.push_blob(os.urandom(8 * MEBIBYTE))
        connection = self.connect().request("GET", self.client.path(f"blobs/{digest}"))
        self.assert_status(connection.read_head(), 200)
        wait_until(lambda: not self.running.server.connections, "for it to be given up")


class HeadsAndBodies(HTTPTestCase):
    def test_the_time_for_a_head_is_none_for_its_body(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            self.addCleanup(end.close)
        reader, received = registry.SocketReader(ours), iter((b"GET / HTTP/1.1\r\n", b"Host: a\r\n\r\nbody"))
        deadlines: list[float] = []

        def within(_seconds: float, *_operation: object) -> bytes:
            deadlines.append(reader.deadline)
            return next(received)

        with mock.patch.object(reader, "_within", within):
            self.assertEqual(reader.read_head(), b"GET / HTTP/1.1\r\nHost: a")
        self.assertEqual((deadlines[0], reader.deadline), (0.0, 0.0))
        self.assertGreater(deadlines[1], time.monotonic())


class RepliesBeforeTheBody(HTTPTestCase):
    """Requests that are answered before their body has come, from clients without any right."""

    LIMIT = 4
    SMALL, LARGE, CHUNKED = "Content-Length: 10", "Content-Length: 1000000000", "Transfer-Encoding: chunked"
    AUTHORIZATION = "Authorization: " + basic("a", "b")

    def setUp(self) -> None:
        users = self.temporary() / "users"
        users.write_text(users_line("a", "b"))
        self.registry = self.enter(Registry(users=str(users), max_connections=self.LIMIT))
        self.client = Client(self.registry.netloc, "early")

    def connect(self) -> RawConnection:
        return self.enter(RawConnection(self.client.host))

    def begin(self, *lines: str, body: bytes = b"") -> RawConnection:
        """A push whose body will not come."""
        return self.connect().request("POST", self.client.path("blobs/uploads/"), *lines, body=body)

    def assert_served(self) -> None:
        """A new client gets an answer, if need be once the others' time is up."""
        wait_until(lambda: self.client.get("/v2/").status != 503, "for room for another")
        self.assert_status(self.client.get("/v2/"), 401)

    def test_the_reply_does_not_wait_for_the_body(self) -> None:
        self.patch(EVICTION_DELAY=0.0, EVICTION_TIMEOUT=TIMEOUT)
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
        self.patch(LINGER_TIMEOUT=0.1)
        for framing in ("Content-Length: 100000", self.LARGE, self.CHUNKED):
            with self.subTest(framing):
                connection = self.begin(framing)
                self.assert_error(connection.read(), 401)
                wait_until(lambda: not connection.send(b"x").is_open(), "for the rest not to be")  # noqa: B023

    def test_whoever_owes_a_rest_makes_room(self) -> None:
        self.patch(LINGER_TIMEOUT=10 * TIMEOUT, EVICTION_DELAY=0.0, EVICTION_TIMEOUT=TIMEOUT)
        for framing in (self.SMALL, self.LARGE, self.CHUNKED):
            with self.subTest(framing):
                held = [self.begin(framing) for _ in range(self.LIMIT)]
                for connection in held:
                    self.assert_error(connection.read(), 401)
                self.assert_served()

    def test_whoever_owes_a_rest_after_a_good_reply_makes_room(self) -> None:
        self.patch(LINGER_TIMEOUT=10 * TIMEOUT, EVICTION_DELAY=0.0, EVICTION_TIMEOUT=TIMEOUT)
        for framing in (self.SMALL, self.LARGE, self.CHUNKED):
            with self.subTest(framing):
                for _ in range(self.LIMIT):
                    connection = self.connect().request("GET", "/v2/", framing, self.AUTHORIZATION)
                    self.assert_status(connection.read(), 200)
                self.assert_served()

    def test_whoever_does_not_read_errors_makes_room(self) -> None:
        self.patch(EVICTION_DELAY=0.0, EVICTION_TIMEOUT=TIMEOUT)
        with Registry(max_connections=1) as running, RawConnection(running.netloc) as connection:
            connection._socket.settimeout(0.2)
            with contextlib.suppress(OSError):  # once neither side has room for more
                while True:
                    connection._socket.sendall(b"GET /v2/unknown HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
            self.assert_status(Client(running.netloc).get("/v2/"), 200)

    def test_whoever_sends_a_manifest_slowly_makes_room(self) -> None:
        self.patch(EVICTION_DELAY=0.0, EVICTION_TIMEOUT=TIMEOUT)
        path, lines = self.client.path("manifests/slow"), ("Expect: 100-continue", self.AUTHORIZATION)
        for _ in range(self.LIMIT):
            connection = self.connect().request("PUT", path, self.SMALL, *lines)
            self.assert_status(connection.read(), 100)
        self.assert_served()

    def test_whoever_is_refused_again_and_again_makes_room(self) -> None:
        """Each time with the end of one body, and the head of the next request that owes one."""
        self.patch(EVICTION_DELAY=0.2, EVICTION_TIMEOUT=TIMEOUT)
        for path, *lines in (
            (self.client.path("blobs/uploads/"),),
            (self.client.path("manifests/bad"), "Expect: 100-continue", self.AUTHORIZATION),
        ):
            with self.subTest(path):
                held = [self.connect() for _ in range(self.LIMIT)]
                wait_until(lambda: self.is_served_beside(held, path, *lines), "for room")  # noqa: B023

    def is_served_beside(self, held: list[RawConnection], path: str, *lines: str) -> bool:
        """Whether there is room for another while all these are refused once more."""
        method = "PUT" if lines else "POST"
        for connection in held:
            connection.request(method, path, self.SMALL, *lines).read_unless_closed()
        status = self.client.get("/v2/").status
        for connection in held:
            connection.send(b"1234567890")
            if lines:
                connection.read_unless_closed()
        return status == 401

    def test_nobody_waits_for_more_from_who_has_sent_its_last(self) -> None:
        self.patch(LINGER_TIMEOUT=10 * TIMEOUT)
        connection = self.connect().request("GET", "/v2/", "Connection: close", self.AUTHORIZATION)
        self.assert_status(connection.read(), 200)
        wait_until(lambda: not self.registry.server.connections, "for it to be closed")

    def test_stopping_does_not_wait_for_a_rest(self) -> None:
        self.patch(LINGER_TIMEOUT=10 * TIMEOUT)
        held = [self.begin(framing) for framing in (self.SMALL, self.LARGE, self.CHUNKED)]
        for connection in held:
            self.assert_error(connection.read(), 401)
        self.assertLess(elapsed(lambda: self.registry.close(timeout=0.1)), 5)
        for connection in held:
            self.assertTrue(connection.is_closed())
