"""More clients, longer heads and slower ones than the registry will serve."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import itertools
import math
import os
import threading
import time
import tracemalloc
import unittest
from collections.abc import Callable
from unittest import mock

import registry
from registry import Registry
from tests.daemon import LINUX, Daemon, held, held_at_rest
from tests.support import (
    MEBIBYTE,
    TIMEOUT,
    Client,
    DataDirectory,
    HTTPConnectionTestCase,
    HTTPTestCase,
    RawConnection,
    digest_of,
    elapsed,
    unique,
    wait_until,
)

HELD = 1000  # hostile connections at once


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
        return sum(connection.is_open() for connection in self._connections)

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


class SlowClientsDisturbNobody(HTTPTestCase):
    """What slow clients cost the honest ones."""

    @classmethod
    def setUpClass(cls) -> None:
        registry.raise_descriptor_limit()  # each connection takes a file

    def test_a_thousand_hostile_connections_keep_no_honest_client_waiting(self) -> None:
        with Daemon(self.temporary(), "--no-sync", "--quiet") as daemon:
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
        data = DataDirectory(self.temporary())
        with Daemon(data.path, "--no-sync", "--quiet") as daemon:
            before = held_at_rest(daemon.process.pid)
            with Swarm(daemon.client.host, 100):
                pass
            wait_until(lambda: held(daemon.process.pid) == before, "for threads and files to go")
            self.assertEqual(data.unfinished(), [])


class ConnectionsAreLimited(HTTPTestCase):
    """More clients than the registry will serve at once."""

    LIMIT = 8

    def setUp(self) -> None:
        self.running = self.enter(Registry(max_connections=self.LIMIT))
        self.client = Client(self.running.netloc, "many")

    def connect(self) -> RawConnection:
        return self.enter(RawConnection(self.client.host))

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
                self.enter(RawConnection(one.netloc)).send(b"GET /v2/ HTTP/1.1\r\n")
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
        wait_until(lambda: sum(map(RawConnection.is_open, connections)) <= self.LIMIT, "for some to go")

    def test_nobody_in_mid_request_has_to_make_room(self) -> None:
        busy = [self.begin_upload() for _ in range(self.LIMIT)]
        refused = self.connect().request("GET", "/v2/")
        self.assert_error(refused.read(), 503, "TOOMANYREQUESTS")
        self.assertTrue(refused.is_closed())
        for connection in busy:
            self.assert_status(connection.send(b"x").read(), 201)

    def test_uploads_that_trickle_in_and_replies_that_nobody_reads_make_room(self) -> None:
        digest = self.client.push_blob(os.urandom(8 * MEBIBYTE))
        path = self.client.path(f"blobs/{digest}")

        def begin_download() -> RawConnection:
            return self.connect().request("GET", path)

        def begin_listing() -> RawConnection:
            return self.connect().request("GET", self.client.path("tags/list"))

        def in_body(each: registry.Connection) -> bool:
            return not each.idle and each.reader.evictable_at < math.inf

        # What the system takes into its buffers counts as moved, and is to earn no time here.
        patience = {"HEADER_TIMEOUT": 0.0, "SLOWEST_BODY": 2**50, "EVICTION_TIMEOUT": TIMEOUT}
        long_list = mock.patch.object(registry.Store, "tags", lambda *_: ["x" * 1_000] * 10_000)
        for begin in (self.begin_upload, begin_download, begin_listing):
            with self.subTest(begin.__name__), long_list, mock.patch.multiple(registry, **patience):
                held = [begin() for _ in range(self.LIMIT)]
                self.wait_for_each(in_body)
                for _ in range(3):
                    self.assert_status(self.client.get("/v2/"), 200)
                for connection in held:
                    connection.reset()
                wait_until(lambda: not self.connections(), "for all to go")

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
            # or whoever comes would take the place of one that is not done yet
            wait_until(lambda: not self.connections(), "for all to go")
            with self.subTest(move.__name__), mock.patch.multiple(registry, **patches):
                for _ in range(self.LIMIT):
                    move()
                earned = time.monotonic() + 500
                self.wait_for_each(lambda each, earned=earned: each.reader.evictable_at > earned)
                self.assert_error(self.connect().request("GET", "/v2/").read(), 503)
                for connection in self.connections():
                    connection.hang_up()
                wait_until(lambda: not self.connections(), "for all to go")

    def connections(self) -> list[registry.Connection]:
        """Those that the registry serves."""
        return list(self.running.server.connections)

    def wait_for_each(self, condition: Callable[[registry.Connection], bool]) -> None:
        """Until it holds for all that there may be."""
        wait_until(lambda: sum(map(condition, self.connections())) == self.LIMIT, "for connections")

    def test_there_is_room_again_once_somebody_leaves(self) -> None:
        busy = [self.begin_upload() for _ in range(self.LIMIT)]
        self.assert_error(self.connect().request("GET", "/v2/").read(), 503)
        busy[0].reset()
        wait_until(lambda: self.client.get("/v2/").status == 200, "for room")

    def test_hostile_connections_above_the_limit_keep_no_honest_client_waiting(self) -> None:
        for _ in range(10 * self.LIMIT):
            self.connect().send(b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: ")
        for _ in range(20):
            self.assertLess(elapsed(lambda: self.client.expect(200, "GET", "/v2/")), 1)


class StrangersAreNotRemembered(HTTPTestCase):
    """What strangers send is not kept."""

    def test_long_paths_and_header_names_are_not_remembered(self) -> None:
        with registry.Registry() as running, Client(running.netloc, "long").keep_alive() as client:
            client.get("/v2/")
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            for number in range(150):
                client.get(f"/v2/{number}/{'a' * 7000}/manifests/latest")
                client.get(f"/v2/a/manifests/{number}{'a' * 7000}")
                client.get("/v2/", {f"X-{number}{'a' * 7000}": "y"})
            self.assertLess(tracemalloc.get_traced_memory()[0], MEBIBYTE)

    def test_only_so_many_paths_are_remembered(self) -> None:
        most = registry.find_path.cache_info().maxsize or math.inf
        self.assertLessEqual(most * 2 * registry.NAME_LIMIT, MEBIBYTE)


class HeadsAreLimited(HTTPConnectionTestCase):
    """How long heads may be."""

    def test_a_request_line_over_8_kib_is_414(self) -> None:
        for length in (8 * 1024 + 1, 65 * 1024, MEBIBYTE):
            with self.subTest(length):
                connection = self.connect().request("GET", "/v2/?" + "x" * length)
                self.assert_error(connection.read(), 414)
                self.assertTrue(connection.is_closed())

    def test_a_request_line_that_never_ends_is_414(self) -> None:
        self.assert_error(self.send(b"GET /v2/?" + b"x" * MEBIBYTE).read(), 414)

    def test_a_request_line_under_8_kib_is_read(self) -> None:
        self.assert_status(self.client.get("/v2/?" + "x" * 8000), 200)

    def test_headers_over_64_kib_are_431(self) -> None:
        for lines in ([f"X: {'x' * 65 * 1024}"], [f"X-{n}: {'x' * 1000}" for n in range(80)]):
            with self.subTest(len(lines)):
                connection = self.connect().request("GET", "/v2/", *lines)
                self.assert_error(connection.read(), 431)
                self.assertTrue(connection.is_closed())

    def test_headers_that_never_end_are_431(self) -> None:
        for endless in (b"X: " + b"x" * MEBIBYTE, b"X: y\r\n" * 100_000):
            with self.subTest(endless[:10]):
                connection = self.send(b"GET /v2/ HTTP/1.1\r\nHost: a\r\n" + endless)
                self.assert_error(connection.read(), 431)

    def test_more_than_100_header_lines_are_431(self) -> None:
        connection = self.connect().request("GET", "/v2/", *[f"X-{n}: y" for n in range(101)])
        self.assert_error(connection.read(), 431)
        self.assertTrue(connection.is_closed())

    def test_headers_under_the_limits_are_read(self) -> None:
        for lines in ([f"X-{n}: y" for n in range(95)], [f"X-{n}: {'y' * 6000}" for n in range(10)]):
            connection = self.connect().request("GET", "/v2/", *lines)
            self.assert_status(connection.read(), 200)
