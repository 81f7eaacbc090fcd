"""Hostile clients, hostile content, and a data directory that somebody has meddled with."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import itertools
import json
import math
import os
import re
import tempfile
import threading
import time
import tracemalloc
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import registry
from tests.credentials import AuthorizedClient, basic, users_line
from tests.support import (
    MEBIBYTE,
    OCI_MANIFEST,
    TIMEOUT,
    Client,
    Daemon,
    DataDirectory,
    HTTPTestCase,
    RawConnection,
    RegistryTestCase,
    descriptor,
    digest_of,
    elapsed,
    encode,
    image_manifest,
    unique,
    with_digest,
)

LINUX = os.path.isdir("/proc/self/fd")
HELD = 1000  # hostile connections at once


def allow_many_files() -> None:
    """As many open files as the system lets us have: each connection of a test takes one."""
    registry.raise_descriptor_limit()


# === Slow clients ===


class Swarm:
    """Hostile connections: a quarter is silent, one idle after a request, one in mid-head, one in mid-body.

    The latter two go on at a byte a second each.
    """

    def __init__(self, host: str, size: int) -> None:
        self._stack = contextlib.ExitStack()
        self._connections: list[RawConnection] = []
        self._slow: list[RawConnection] = []
        self._stop = threading.Event()
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        client = Client(host, "hostile/swarm")
        kinds = itertools.cycle((self._be_silent, self._be_idle, self._begin_head, self._begin_body))
        for begin in itertools.islice(kinds, size):
            connection = self._stack.enter_context(RawConnection(host))
            self._connections.append(connection)
            begin(connection, client)

    def __enter__(self) -> Swarm:
        self._feeder.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._feeder.join()
        self._stack.close()

    def alive(self) -> int:
        """How many the registry has not hung up on."""
        return sum(_is_open(connection) for connection in self._connections)

    def _be_silent(self, connection: RawConnection, client: Client) -> None:
        pass

    def _be_idle(self, connection: RawConnection, client: Client) -> None:
        connection.request("GET", "/v2/").read()

    def _begin_head(self, connection: RawConnection, client: Client) -> None:
        connection.send(b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: ")
        self._slow.append(connection)

    def _begin_body(self, connection: RawConnection, client: Client) -> None:
        path = client.path(f"blobs/uploads/?digest={digest_of(b'x')}")
        connection.request("POST", path, "Content-Length: 1000000")
        self._slow.append(connection)

    def _feed(self) -> None:
        while not self._stop.wait(1.0):
            for connection in self._slow:
                connection.send(b"x")


def _is_open(connection: RawConnection) -> bool:
    """Whether nothing came on a connection that waits for nothing; its end would have."""
    connection._socket.settimeout(0)
    try:
        return bool(connection._socket.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


class SlowClientTest(HTTPTestCase):
    """What slow clients cost the honest ones."""

    @classmethod
    def setUpClass(cls) -> None:
        allow_many_files()

    def test_a_thousand_hostile_connections_keep_no_honest_client_waiting(self) -> None:
        with tempfile.TemporaryDirectory() as data, Daemon(data, "--no-sync", "--quiet") as daemon:
            image = daemon.client.push_image("latest")
            with Swarm(daemon.client.host, HELD) as swarm:
                with concurrent.futures.ThreadPoolExecutor(4) as pool:
                    visits = [
                        pool.submit(elapsed, lambda: self.visit(daemon.client, image.body))
                        for _ in range(150)
                    ]
                    times = sorted(visit.result(6 * TIMEOUT) for visit in visits)
                self.assertLess(times[len(times) * 99 // 100], 1, times[-5:])
                self.assertEqual(swarm.alive(), HELD)
            self.assertEqual(daemon.stop(), 0)
            self.assertNotIn("Traceback", daemon.remaining_output())

    def visit(self, client: Client, manifest: bytes) -> None:
        """A pull and a push, each on a connection of its own."""
        self.assertEqual(client.get("manifests/latest").body, manifest)
        client.push_blob(unique())

    @unittest.skipUnless(LINUX, "counts the entries of /proc/PID/task")
    def test_hostile_connections_are_freed_once_they_are_gone(self) -> None:
        with tempfile.TemporaryDirectory() as data, Daemon(data, "--no-sync", "--quiet") as daemon:
            before = _threads(daemon)
            with Swarm(daemon.client.host, 100):
                pass
            deadline = time.monotonic() + TIMEOUT
            kept = before + registry.IDLE_THREADS
            while _threads(daemon) > kept and time.monotonic() < deadline:
                time.sleep(0.02)
            self.assertLessEqual(_threads(daemon), kept)
            self.assertEqual(DataDirectory(data).unfinished(), [])


def _threads(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/task"))


class ConnectionLimitTest(HTTPTestCase):
    """More clients than the registry will serve at once."""

    LIMIT = 8

    def setUp(self) -> None:
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.running = stack.enter_context(registry.Registry(max_connections=self.LIMIT))
        self.client = Client(self.running.netloc, "many")
        self.stack = stack

    def connect(self) -> RawConnection:
        return self.stack.enter_context(RawConnection(self.client.host))

    def begin_upload(self) -> RawConnection:
        """A connection in the middle of a request."""
        path = self.client.path(f"blobs/uploads/?digest={digest_of(b'x')}")
        connection = self.connect().request("POST", path, "Content-Length: 1", "Expect: 100-continue")
        self.assert_status(connection.read(), 100)
        return connection

    def test_there_are_no_more_than_files_to_answer_them_from(self) -> None:
        few = (128, registry.resource.getrlimit(registry.resource.RLIMIT_NOFILE)[1])
        with mock.patch.object(registry.resource, "getrlimit", return_value=few), registry.Registry() as one:
            for _ in range(128):
                self.stack.enter_context(RawConnection(one.netloc)).send(b"GET /v2/ HTTP/1.1\r\n")
            self.assert_status(Client(one.netloc).get("/v2/"), 200)
            self.assertLess(len(one.server.connections), 64)

    def test_whoever_has_been_idle_longest_makes_room(self) -> None:
        idle, fresh = ([self.connect() for _ in range(self.LIMIT)] for _ in range(2))
        for connection in idle:
            self.assertTrue(connection.is_closed())
        for connection in fresh:
            self.assert_status(connection.request("GET", "/v2/").read(), 200)

    def test_the_limit_holds_however_fast_they_come(self) -> None:
        connections = [self.connect() for _ in range(20 * self.LIMIT)]
        deadline = time.monotonic() + 2
        while (count := sum(map(_is_open, connections))) > self.LIMIT and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertLessEqual(count, self.LIMIT)

    def test_nobody_in_mid_request_has_to_make_room(self) -> None:
        busy = [self.begin_upload() for _ in range(self.LIMIT)]
        refused = self.connect().request("GET", "/v2/")
        self.assert_error(refused.read(), 503, "TOOMANYREQUESTS")
        self.assertTrue(refused.is_closed())
        for connection in busy:
            self.assert_status(connection.send(b"x").read(), 201)

    def test_uploads_that_trickle_in_and_downloads_that_nobody_reads_make_room(self) -> None:
        digest = self.client.push_blob(os.urandom(8 * MEBIBYTE))
        path = self.client.path(f"blobs/{digest}")
        patience = {"HEADER_TIMEOUT": 0.0, "EVICTION_TIMEOUT": TIMEOUT}
        for hold in (self.begin_upload, lambda: self.connect().request("GET", path)):
            with self.subTest(hold), mock.patch.multiple(registry, **patience):
                held = [hold() for _ in range(self.LIMIT)]
                while any(each.reader.evictable_at == math.inf for each in self.connections()):
                    time.sleep(0.01)  # until the last of them is in its body
                self.assertEqual(len(held), self.LIMIT)
                for _ in range(3):
                    with RawConnection(self.client.host) as honest:
                        self.assert_status(honest.request("GET", "/v2/").read(), 200)

    def test_those_that_got_no_thread_take_no_room(self) -> None:
        error, stderr = RuntimeError("can't start new thread"), io.StringIO()
        failing = mock.patch.object(threading.Thread, "start", side_effect=error)
        with failing, contextlib.redirect_stderr(stderr):
            for _ in range(self.LIMIT):
                self.assertTrue(self.connect().is_closed())
        self.assertIn(str(error), stderr.getvalue())
        busy = [self.begin_upload() for _ in range(self.LIMIT)]
        for connection in busy:
            self.assert_status(connection.send(b"x").read(), 201)

    def test_those_that_move_their_bytes_need_not_make_room(self) -> None:
        content = os.urandom(32 * MEBIBYTE)
        path = self.client.path(f"blobs/{self.client.push_blob(content)}")
        upload = self.client.path(f"blobs/uploads/?digest={digest_of(b'x')}")

        def push() -> None:
            self.connect().request("POST", upload, "Content-Length: 2000", body=bytes(1000))

        def pull() -> None:
            self.connect().request("GET", path)._take(4 * MEBIBYTE)

        for move in (push, pull):
            patches = {"HEADER_TIMEOUT": 0.0, "SLOWEST_BODY": 1}
            while self.connections():  # or whoever comes would take the place of one that is not done yet
                time.sleep(0.01)
            with self.subTest(move.__name__), mock.patch.multiple(registry, **patches):
                for _ in range(self.LIMIT):
                    move()
                earned, deadline = time.monotonic() + 500, time.monotonic() + TIMEOUT
                while sum(each.reader.evictable_at > earned for each in self.connections()) < self.LIMIT:
                    self.assertLess(time.monotonic(), deadline, "what was moved counts for nothing")
                    time.sleep(0.01)
                self.assert_error(self.connect().request("GET", "/v2/").read(), 503)
                for connection in self.connections():
                    connection.hang_up()
                while self.connections() and time.monotonic() < deadline:
                    time.sleep(0.01)

    def connections(self) -> list[registry.Connection]:
        """Those that the registry serves."""
        return list(self.running.server.connections)

    def test_there_is_room_again_once_somebody_leaves(self) -> None:
        busy = [self.begin_upload() for _ in range(self.LIMIT)]
        self.assert_error(self.connect().request("GET", "/v2/").read(), 503)
        busy[0].reset()
        status, deadline = 503, time.monotonic() + TIMEOUT
        while status == 503 and time.monotonic() < deadline:
            with RawConnection(self.client.host) as connection:
                status = connection.request("GET", "/v2/").read().status
        self.assertEqual(status, 200)

    def test_hostile_connections_above_the_limit_keep_no_honest_client_waiting(self) -> None:
        for _ in range(10 * self.LIMIT):
            self.connect().send(b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: ")
        for _ in range(20):
            self.assertLess(elapsed(lambda: self.client.expect(200, "GET", "/v2/")), 1)


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
        while _is_open(connection):
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
                while _is_open(connection):
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
                while _is_open(connection):
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


class CacheTest(HTTPTestCase):
    """What strangers send is not kept."""

    def test_long_paths_and_header_names_are_not_remembered(self) -> None:
        with registry.Registry() as running, Client(running.netloc, "long").keep_alive() as client:
            client.get("/v2/")
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            for number in range(200):
                client.get(f"/v2/{number}/{'a' * 7000}/manifests/latest")
                client.get(f"/v2/a/manifests/{number}{'a' * 7000}")
                client.get("/v2/", {f"X-{number}{'a' * 7000}": "y"})
            self.assertLess(tracemalloc.get_traced_memory()[0], MEBIBYTE)


# === Hostile JSON ===


BOMB = 4 * MEBIBYTE


def _filled(head: bytes, piece: bytes, tail: bytes) -> bytes:
    """As many pieces between head and tail as a manifest may have."""
    return head + piece * ((BOMB - len(head) - len(tail)) // len(piece)) + tail


def _descriptors(begin: str, end: str) -> bytes:
    """A manifest of as many layers as fit in, each another one."""
    text, numbers = [begin], itertools.count()
    size = len(begin) + len(end)
    while size < BOMB - 100:
        text.append(f'{{"digest":"sha256:{next(numbers):064x}"}},')
        size += len(text[-1])
    return ("".join(text)[:-1] + end).encode()


CONFIG = json.dumps(descriptor(b"{}"))
HEAD = f'{{"schemaVersion":2,"config":{CONFIG},"layers":['
BOMBS = {
    "brackets": b"[" * BOMB,
    "nested arrays": b"[" * (BOMB // 2) + b"]" * (BOMB // 2),
    "nested objects": _filled(b"", b'{"a":', b""),
    "nested in a manifest": _filled(HEAD.encode(), b"[", b""),
    "nested just deep enough to parse": HEAD.encode() + b'],"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "one huge number": _filled(b'{"schemaVersion":', b"2", b"}"),
    "one huge fraction": _filled(b'{"schemaVersion":2.', b"0", b"}"),
    "a huge exponent": b'{"schemaVersion":2e999999999999999999}',
    "a huge negative exponent": b'{"schemaVersion":2e-999999999999999999}',
    "many numbers": _filled(b'{"schemaVersion":2,"a":[', b"1e9,", b"1]}"),
    "many empty objects": _filled(b'{"schemaVersion":2,"a":[', b"{},", b"1]}"),
    "many empty arrays": _filled(b'{"schemaVersion":2,"a":[', b"[],", b"1]}"),
    "one name over and over": _filled(b"{", b'"a":1,', b'"a":1}'),
    "layers over and over": _filled(b'{"schemaVersion":2,', b'"layers":[],', b'"a":1}'),
    "one long string": _filled(b'{"schemaVersion":2,"a":"', b"x", b'"}'),
    "one string of escapes": _filled(b'{"schemaVersion":2,"a":"', b"\\ud800", b'"}'),
    "white space": _filled(b"", b" ", b"{}"),
    "absent layers": _descriptors(HEAD, "]}"),
}


class BombTest(RegistryTestCase):
    """Manifests made to cost more than they weigh."""

    options: ClassVar = {"sync": False}

    def test_none_takes_long_or_is_stored(self) -> None:
        before = self.data.files()
        for name, body in BOMBS.items():
            with self.subTest(name):
                self.assertLessEqual(len(body), BOMB)
                started = time.perf_counter()
                response = self.client.put_manifest(body, "bomb", OCI_MANIFEST)
                self.assertLess(time.perf_counter() - started, 5)
                self.assert_error(response, 400, "MANIFEST_INVALID", "MANIFEST_BLOB_UNKNOWN")
                self.assertLess(len(response.body), MEBIBYTE)
        self.assertEqual(self.data.files(), before)
        self.assert_nothing_unfinished()

    def test_many_foreign_layers_hold_nobody_up(self) -> None:
        """They may be absent, so that all of them are recorded."""
        self.client.push_blob(b"{}")
        body = _descriptors(HEAD, "]}").replace(b'"}', b'","urls":["a"]}')[:BOMB]
        body = body[: body.rindex(b"},") + 1] + b"]}"
        times: list[float] = []
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            push = pool.submit(self.client.put_manifest, body, "many", OCI_MANIFEST)
            while not push.done():
                times.append(elapsed(lambda: self.other.push_blob(unique())))
        self.assert_status(push.result(), 201, 400)
        self.assertLess(max(times), 5)

    def test_a_larger_one_is_refused_unread(self) -> None:
        for headers in (f"Content-Length: {BOMB + 1}", f"Content-Length: {2**50}"):
            connection = self.connect().request("PUT", self.client.path("manifests/bomb"), headers)
            self.assert_error(connection.read(), 413, "SIZE_INVALID")

    def test_a_larger_one_in_chunks_is_refused(self) -> None:
        pieces = iter([b"[" * MEBIBYTE] * 6)
        response = self.client.put("manifests/bomb", pieces, {"Content-Type": OCI_MANIFEST})
        self.assert_error(response, 413, "SIZE_INVALID")

    def test_a_name_given_twice_is_what_the_reader_of_the_bytes_sees(self) -> None:
        """Whatever is made of it, the bytes served are the bytes pushed."""
        for blob in (b"{}", b"layer"):
            self.client.push_blob(blob)
        manifest = encode(image_manifest(descriptor(b"{}"), [descriptor(b"layer")]))
        twice = manifest.replace(b'"layers"', b'"layers": [], "layers"')
        response = self.client.put_manifest(twice, "twice", OCI_MANIFEST)
        self.assert_status(response, 201, 400)
        if response.status == 201:
            self.assertEqual(self.client.get("manifests/twice").body, twice)


@unittest.skipUnless(LINUX, "reads /proc/PID/status")
class MemoryTest(HTTPTestCase):
    LIMIT = 512  # MiB, for the whole process

    def test_bombs_at_once_cost_bounded_memory(self) -> None:
        with tempfile.TemporaryDirectory() as data, Daemon(data, "--no-sync", "--quiet") as daemon:
            client = daemon.client
            bodies = [
                BOMBS[name] for name in ("many empty objects", "many empty arrays", "absent layers")
            ] * 2
            with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
                pushes = [pool.submit(client.put_manifest, body, "bomb", OCI_MANIFEST) for body in bodies]
                for push in pushes:
                    self.assert_error(push.result(6 * TIMEOUT), 400)
            self.assert_status(client.get("/v2/"), 200)
            status = Path(f"/proc/{daemon.process.pid}/status").read_text("ascii")
            peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) // 1024
            self.assertLess(peak, self.LIMIT, "MiB")


# === Paths and links ===


TRAVERSALS = (
    "..",
    "../..",
    "../../../../../../etc/passwd",
    "..%2f..%2fsecret",
    "%2e%2e%2f%2e%2e%2fsecret",
    "%252e%252e%252fsecret",
    "..%5c..%5csecret",
    "..;/secret",
    "%c0%ae%c0%ae%c0%afsecret",
    "%uff0e%uff0e/secret",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "file:%2f%2f%2fetc%2fpasswd",
    "a%00",
    "%00",
    ".",
    "sha256:..%2f..%2f..%2fsecret",
    "sha256:%2e%2e",
    "sha256:" + "a" * 60 + "/../",
    "registry.db",
    "~root",
    "C:%5csecret",
    "con",
    "a" * 300,
)


def _fill_in(path: str, values: dict[str, str]) -> str:
    """A route's path with values for its parts."""
    return re.sub(r"<(\w+)>", lambda part: values[part[1]], path)


class TraversalTest(RegistryTestCase):
    """No segment of any path, and no parameter, is ever taken for a file's name."""

    options: ClassVar = {"sync": False}
    SECRET = b"the secret beside the data directory"

    def setUp(self) -> None:
        super().setUp()
        self.client.push_image("latest")
        parent = self.data.path.parent
        for name in ("secret", "sha256:secret"):
            file = parent / name
            file.write_bytes(self.SECRET)
            self.addCleanup(file.unlink)
        self.before = self.snapshot()

    def snapshot(self) -> list[str]:
        """Every file of the data directory but SQLite's, which come and go."""
        paths = (str(path.relative_to(self.data.path)) for path in self.data.path.rglob("*"))
        return sorted(path for path in paths if not path.startswith("registry.db"))

    def paths(self) -> Iterator[tuple[str, str]]:
        """Every route with every traversal in each of its places."""
        good = {
            "name": self.client.repository,
            "reference": "latest",
            "digest": digest_of(b"x"),
            "session": "0" * 32,
        }
        for route in registry.ROUTES:
            places = re.findall(r"<(\w+)>", route.path)
            for place, bad in itertools.product(places, TRAVERSALS):
                yield route.method, _fill_in(route.path, {**good, place: bad})
        upload = self.client.path("blobs/uploads/")
        for bad in TRAVERSALS:
            for query in (f"?mount={digest_of(b'x')}&from={bad}", f"?mount={bad}", f"?digest={bad}"):
                yield "POST", upload + query
            yield "GET", self.client.path(f"tags/list?last={bad}")
            yield "GET", f"/{bad}"
            yield "GET", f"/v2/{bad}"

    def test_every_segment_of_every_route(self) -> None:
        with self.client.keep_alive() as client:
            for method, path in self.paths():
                with self.subTest(method, path=path):
                    response = client.request(method, path)
                    self.assertLess(response.status, 500, response)
                    self.assertNotIn(self.SECRET, response.body)
                    self.assertNotIn(b"root:", response.body)
                    if response.status == 202 and "Docker-Upload-UUID" in response.headers:
                        client.expect(204, "DELETE", response.headers["Location"])
        self.assertEqual(self.snapshot(), self.before)


@unittest.skipUnless(hasattr(os, "symlink"), "plants symbolic links")
class SymlinkTest(RegistryTestCase):
    """Somebody has put links into the data directory; none of them leads anywhere."""

    options: ClassVar = {"sync": False}
    SECRET = b"what a link points at"

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.victim = Path(directory.name) / "victim"
        self.victim.write_bytes(self.SECRET)

    def assert_victim_untouched(self) -> None:
        self.assertEqual(self.victim.read_bytes(), self.SECRET)
        self.assertEqual(self.victim.stat().st_nlink, 1)

    def plant(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(self.victim)

    def blob_path(self, digest: str) -> Path:
        return self.data.path / "blobs" / digest.replace(":", "/")

    def replaced_blob(self, size: int) -> str:
        """A blob of this size that was replaced by a link; its digest."""
        digest = self.client.push_blob(unique().ljust(size, b"."))
        self.plant(self.blob_path(digest))
        return digest

    def session_path(self, location: str) -> Path:
        return self.data.path / "uploads" / location.rpartition("/")[2]

    def test_a_blob_that_is_a_link_is_not_served(self) -> None:
        for size in (len(self.SECRET), len(self.SECRET) + 5):
            digest = self.replaced_blob(size)
            for headers in ({}, {"Range": "bytes=0-3"}):
                response = self.client.get(f"blobs/{digest}", headers)
                self.assert_error(response, 404, "BLOB_UNKNOWN")
            response = self.other.post(f"blobs/uploads/?mount={digest}&from={self.client.repository}")
            self.assert_status(response, 202)

    def test_a_manifest_that_is_a_link_is_not_served(self) -> None:
        self.client.push_blob(b"{}")
        manifest = encode(image_manifest(descriptor(b"{}")))
        self.victim.write_bytes(b" " * len(manifest))
        self.client.push_manifest(manifest, "latest")
        self.plant(self.blob_path(digest_of(manifest)))
        with mock.patch.object(self.registry.store, "_cache", registry.Cache(0)):
            self.assert_error(self.client.get("manifests/latest"), 404, "MANIFEST_UNKNOWN")

    def test_pushing_over_a_link_replaces_it(self) -> None:
        content = unique()
        path = self.blob_path(digest_of(content))
        self.plant(path)
        self.client.push_blob(content)
        self.assertFalse(path.is_symlink())
        self.assert_blob(self.client, content)
        self.assert_victim_untouched()

    def test_deleting_a_link_deletes_no_more(self) -> None:
        digest = self.replaced_blob(len(self.SECRET))
        self.assert_status(self.client.delete(f"blobs/{digest}"), 202)
        self.assert_victim_untouched()

    def test_an_upload_that_is_a_link_is_not_written_to(self) -> None:
        requests: tuple[tuple[str, str, Any], ...] = (
            ("PATCH", "", b"more"),
            ("PATCH", "", b""),
            ("PUT", digest_of(self.SECRET + b"more"), b"more"),
            ("PUT", digest_of(self.SECRET), b""),
            ("PUT", digest_of(b"other"), b""),
            ("DELETE", "", None),
        )
        for method, digest, body in requests:
            with self.subTest(method, digest=digest):
                self.victim.write_bytes(self.SECRET)
                location = self.client.open_upload()
                self.plant(self.session_path(location))
                response = self.client.request(
                    method, with_digest(location, digest) if digest else location, body
                )
                self.assertLess(response.status, 500, response)
                self.assertNotEqual(response.status, 201, response)
                self.assert_victim_untouched()
                self.assertEqual(self.data.files().get(digest_of(self.SECRET)), None)

    def test_an_upload_that_is_a_link_tells_nothing(self) -> None:
        location = self.client.open_upload()
        self.plant(self.session_path(location))
        response = self.client.get(location)
        self.assertNotIn(f"0-{len(self.SECRET) - 1}", response.headers.getall("Range"))

    def test_no_file_of_its_own_is_written_through_a_link(self) -> None:
        users, absent = self.victim.with_name("users"), self.victim.with_name("absent")
        users.write_text(users_line("a", "b"))
        for name, target in itertools.product(("reserve", "token.key"), (self.victim, absent)):
            with self.subTest(name, target=target.name), tempfile.TemporaryDirectory() as data:
                self.victim.write_bytes(self.SECRET)
                absent.unlink(missing_ok=True)
                (Path(data) / name).symlink_to(target)
                with contextlib.suppress(registry.StartupError):
                    self.use(registry.Registry(data, users=str(users)))
                self.assert_victim_untouched()
                self.assertFalse(absent.exists())

    def use(self, running: registry.Registry) -> None:
        """Start a registry and push something to it."""
        with running:
            AuthorizedClient(running.netloc, "a", basic("a", "b")).push_blob(b"x")


class SessionTest(RegistryTestCase):
    options: ClassVar = {"sync": False}

    def test_ids_cannot_be_guessed(self) -> None:
        """96 random bits: none comes twice, and each bit is set in about half of them."""
        ids = [self.client.open_upload().rpartition("/")[2] for _ in range(256)]
        self.assertEqual(len(set(ids)), 256)
        for bit in range(96):
            ones = sum(int(session[8:32], 16) >> bit & 1 for session in ids)
            self.assertTrue(64 < ones < 192, f"bit {bit}: {ones} of 256")
        for session in ids:
            self.assertRegex(session, r"\A[0-9a-f]{32}-sha256-[0-9a-f]{16}\Z")

    def test_an_id_close_to_one_is_none(self) -> None:
        path, slash, session = self.client.open_upload().rpartition("/")
        for near in (
            session[:-1],
            session + "0",
            f"{session}0"[1:],
            session + "%00",
            session + "%20",
            "0" * 32,
        ):
            with self.subTest(near):
                self.assert_error(self.client.patch(path + slash + near, b"x"), 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_status(self.client.get(path + slash + session), 204)


# === Injection ===


class InjectionTest(HTTPTestCase):
    """What a client sends never ends up raw in the log, nor among a reply's headers."""

    CONTROLS = (*range(0x01, 0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0), 0xAD, 0xFF)
    SECRET = "correct-horse-battery-staple"

    def setUp(self) -> None:
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.daemon = stack.enter_context(Daemon(stack.enter_context(tempfile.TemporaryDirectory())))

    def send(self, data: bytes) -> None:
        with RawConnection(self.daemon.client.host) as connection:
            connection.send(data)
            connection.stop_sending()
            while connection.read_unless_closed():  # which parses strictly
                pass

    def log_lines(self) -> list[str]:
        self.assertEqual(self.daemon.stop(), 0)
        return self.daemon.remaining_output().split("\n")

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
            response = self.daemon.client.request(method, path)
            self.assertNotIn("X-Forged", response.headers, response)
        lines = self.log_lines()
        self.assertEqual(len(lines), len(requests))
        self.assertEqual([line for line in lines if line.startswith("X-Forged")], [])

    def test_no_manifest_puts_a_header_into_a_reply(self) -> None:
        client = self.daemon.client
        client.push_blob(b"{}")
        forged = "a/b\r\nX-Forged: yes"
        for more in (
            {"mediaType": forged},
            {"artifactType": forged},
            {"subject": {**descriptor(b"x"), "digest": digest_of(b"x") + "\r\nX-Forged: yes"}},
            {"annotations": {forged: forged}},
        ):
            with self.subTest(more):
                manifest = {**image_manifest(descriptor(b"{}")), **more}
                response = client.put("manifests/latest", encode(manifest))
                self.assertNotIn("X-Forged", response.headers, response)
                if response.status == 201:
                    self.assertNotIn("X-Forged", client.get("manifests/latest").headers)

    def test_credentials_never_reach_the_log(self) -> None:
        basic = base64.b64encode(f"alice:{self.SECRET}".encode()).decode()
        for value in (
            f"Basic {basic}",
            f"Bearer {self.SECRET}",
            self.SECRET,
            f"Basic {self.SECRET}",
            f"\xff{self.SECRET}",
        ):
            head = (
                f"GET /v2/ HTTP/1.1\r\nHost: a\r\nAuthorization: {value}\r\nProxy-Authorization: {value}\r\n"
            )
            self.send((head + "Connection: close\r\n\r\n").encode("latin-1"))
            self.send((head + "malformed\r\n\r\n").encode("latin-1"))
        output = "\n".join(self.log_lines())
        self.assertNotIn(self.SECRET, output)
        self.assertNotIn(basic, output)


if __name__ == "__main__":
    unittest.main()
