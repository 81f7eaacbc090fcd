"""A registry in this process: quick to start, silent, and gone without a trace."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
import unittest
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from registry import Registry, StartupError
from tests.daemon import ENVIRONMENT, free_port, python
from tests.support import (
    TIMEOUT,
    Client,
    HTTPTestCase,
    RawConnection,
    digest_of,
    elapsed,
    run_at_once,
    unique,
    wait_until,
    with_digest,
)

SCRIPT = """
import json
import urllib.error
import urllib.request
from registry import Registry

def request(method, path, body=None, headers={}):
    made = urllib.request.Request(path, body, headers, method=method)
    with urllib.request.urlopen(made) as reply:
        return reply.read()

for _ in range(2):
    with Registry() as registry:
        assert registry.url == "http://" + registry.netloc
        here, there = registry.url + "/v2/some/name/", registry.url + "/v2/another/"
        config = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        descriptor = {"mediaType": "a/b", "digest": config, "size": 2}
        document = {"schemaVersion": 2, "config": descriptor, "layers": [], "subject": descriptor}
        manifest = json.dumps(document).encode()
        kind = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
        request("POST", here + "blobs/uploads/?digest=" + config, b"{}")
        request("POST", there + "blobs/uploads/?from=some/name&mount=" + config)
        request("POST", there + "blobs/uploads/?mount=" + config)
        request("POST", there + "blobs/uploads/")
        for tag in ("latest", "other"):
            request("PUT", here + "manifests/" + tag, manifest, kind)
        assert request("GET", here + "manifests/latest") == manifest
        assert request("GET", here + "blobs/" + config) == b"{}"
        for path in ("tags/list", "tags/list?n=1", "tags/list?last=a&n=1", "referrers/" + config):
            request("GET", here + path)
        request("GET", here + "referrers/" + config + "?artifactType=a/b")
        request("GET", registry.url + "/v2/_catalog?n=1")
        request("DELETE", here + "manifests/latest")
        request("DELETE", there + "blobs/" + config)
        for method, path in (
            ("GET", "manifests/unheard-of"),
            ("GET", "blobs/nonsense"),
            ("DELETE", "blobs/" + config),
            ("DELETE", "manifests/unheard-of"),
        ):
            try:
                request(method, here + path)
            except urllib.error.HTTPError as error:
                error.close()
"""


class ItServesInThisProcess(HTTPTestCase):
    def test_it_tells_where_it_is(self) -> None:
        with Registry() as registry:
            self.assertRegex(registry.netloc, r"\A127\.0\.0\.1:[1-9][0-9]*\Z")
            self.assertEqual(registry.url, f"http://{registry.netloc}")
            self.assert_status(Client(registry.netloc).get("/v2/"), 200)

    def test_it_takes_the_port_it_is_given(self) -> None:
        port = free_port()
        for _ in range(3):
            with Registry(port=port) as registry:
                self.assertEqual(registry.netloc, f"127.0.0.1:{port}")
                with RawConnection(registry.netloc) as connection:
                    connection.request("GET", "/v2/").read()

    def test_several_are_strangers_to_each_other(self) -> None:
        with contextlib.ExitStack() as stack:
            clients = [Client(stack.enter_context(Registry()).netloc, "a/b") for _ in range(4)]
            self.assertEqual(len({client.host for client in clients}), 4)
            images = [client.push_image("latest") for client in clients]
            for client, image in zip(clients, images):
                self.assertEqual(client.get("manifests/latest").body, image.body)
                found = [client.get(f"manifests/{other.digest}").status for other in images]
                self.assertEqual(sorted(found), [200, 404, 404, 404])

    def test_one_ending_does_not_end_another(self) -> None:
        with Registry() as kept:
            with Registry() as ended:
                Client(ended.netloc).get("/v2/")
            self.assert_status(Client(kept.netloc).get("/v2/"), 200)

    def test_a_directory_of_its_own_outlives_it(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            for data in (directory, Path(directory), Path(directory, "made", "if", "missing")):
                with self.subTest(data):
                    with Registry(data=data) as registry:
                        image = Client(registry.netloc, "a").push_image("latest")
                        location = Client(registry.netloc, "a").open_upload()
                        Client(registry.netloc).expect(202, "PATCH", location, b"abc")
                    with Registry(data=data) as registry:
                        client = Client(registry.netloc, "a")
                        self.assertEqual(client.get("manifests/latest").body, image.body)
                        client.expect(201, "PUT", with_digest(location, digest_of(b"abcdef")), b"def")

    def test_it_can_be_used_from_any_thread(self) -> None:
        def push() -> bytes:
            with Registry() as registry:
                return Client(registry.netloc, "a").push_image("latest").body

        self.assertEqual(len(set(run_at_once(*[push] * 4))), 4)

    def test_an_error_in_the_block_comes_out_of_it(self) -> None:
        with self.assertRaisesRegex(ZeroDivisionError, "by zero"), Registry() as registry:
            host = registry.netloc
            raise ZeroDivisionError("by zero")
        with self.assertRaises(OSError):
            RawConnection(host)

    def test_it_starts_in_no_time(self) -> None:
        def start() -> None:
            with Registry() as registry:
                Client(registry.netloc).get("/v2/")

        self.assertLess(min(elapsed(start) for _ in range(9)), 0.05)  # the others waited for other processes


class NothingIsLeft(HTTPTestCase):
    """What is left of a registry once it has ended."""

    def setUp(self) -> None:
        self.directory = self.temporary()
        self.enter(mock.patch.object(tempfile, "tempdir", str(self.directory)))

    def use(self, registry: Registry) -> None:
        client = Client(registry.netloc, "a")
        client.push_image("latest")
        client.expect(202, "PATCH", client.open_upload(), unique())
        client.get("manifests/unheard-of")

    def assert_only_threads(self, known: set[threading.Thread]) -> None:
        """Those that served connections are told to end, and not waited for."""
        wait_until(lambda: set(threading.enumerate()) <= known, "for threads to end")

    def test_no_directory_is_left(self) -> None:
        with Registry() as registry:
            self.use(registry)
            self.assertEqual(len(list(self.directory.iterdir())), 1)
        self.assertEqual(list(self.directory.iterdir()), [])

    def test_no_thread_is_left(self) -> None:
        before = set(threading.enumerate())
        with Registry() as registry, contextlib.ExitStack() as stack:
            self.use(registry)
            for connection in [stack.enter_context(RawConnection(registry.netloc)) for _ in range(5)]:
                connection.request("GET", "/v2/").read()
            self.assertNotEqual(set(threading.enumerate()), before)
        self.assert_only_threads(before)

    def test_no_thread_is_left_of_a_connection_made_at_the_last_moment(self) -> None:
        before = set(threading.enumerate())
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                with Registry() as registry:
                    last = stack.enter_context(RawConnection(registry.netloc)).request("GET", "/v2/")
                self.assert_only_threads(before)
                last.drain()

    @unittest.skipUnless(sys.platform == "linux", "counts the entries of /proc/self/fd")
    def test_no_file_is_left_open(self) -> None:
        def count() -> int:
            return len(os.listdir("/proc/self/fd"))

        for sync in (False, True):  # the directories that are synced are opened for that
            with Registry(sync=sync) as registry:
                self.use(registry)
            before = count()
            for _ in range(5):
                with Registry(sync=sync) as registry:
                    self.use(registry)
            self.assertLessEqual(count(), before)

    def test_no_port_is_left(self) -> None:
        with Registry() as registry:
            self.use(registry)
            name, _, port = registry.netloc.partition(":")
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection((name, int(port)))
        with Registry(port=int(port)) as registry:
            self.use(registry)

    def test_no_connection_is_left(self) -> None:
        self.enter(mock.patch.object(Registry.close, "__defaults__", (0.1,)))  # seconds for what is under way
        before = set(threading.enumerate())
        with contextlib.ExitStack() as stack:
            with Registry() as registry:
                self.use(registry)
                _silent, idle, cut, busy, reading = connections = [
                    stack.enter_context(RawConnection(registry.netloc)) for _ in range(5)
                ]
                big = Client(registry.netloc, "a").push_blob(os.urandom(16_000_000))
                idle.request("GET", "/v2/").read()
                cut.send(b"GET /v2/ HTTP/1.1\r\nHos")
                location = Client(registry.netloc, "a").open_upload()
                busy.request("PATCH", location, "Content-Length: 10", "Expect: 100-continue")
                self.assert_status(busy.read(), 100)
                busy.send(b"abc")
                reading.request("GET", f"/v2/a/blobs/{big}")
                self.assertEqual(reading.read_head().status, 200)
            self.assert_only_threads(before)
            for connection in connections:
                connection.drain()
        self.assertEqual(list(self.directory.iterdir()), [])

    def test_clients_in_mid_request_do_not_hold_it_up(self) -> None:
        self.enter(mock.patch.object(Registry.close, "__defaults__", (0.1,)))

        def end() -> None:
            with Registry() as registry:
                connection = stack.enter_context(RawConnection(registry.netloc))
                location = Client(registry.netloc, "a").open_upload()
                connection.request("PATCH", location, "Content-Length: 10", "Expect: 100-continue")
                self.assert_status(connection.read(), 100)

        with contextlib.ExitStack() as stack:
            self.assertLess(elapsed(end), 5)

    def test_garbage_collection_that_waits_does_not_hold_it_up(self) -> None:
        begun, end = threading.Event(), threading.Event()
        self.addCleanup(end.set)
        threads: list[threading.Thread] = []

        def collect(*_: object) -> None:
            threads.append(threading.current_thread())
            begun.set()
            end.wait(TIMEOUT)

        with mock.patch.object(Registry, "_collect_garbage", collect):
            running = Registry(gc_interval=0.01).start()
            self.assertTrue(begun.wait(TIMEOUT))
            self.assertLess(elapsed(lambda: running.close(timeout=0.1)), TIMEOUT / 2)
        end.set()
        threads[0].join(TIMEOUT)  # or the next test would see it


class StartedTwice(HTTPTestCase):
    def test_started_twice_it_says_so_and_serves_on(self) -> None:
        with Registry() as registry:
            url, threads = registry.url, set(threading.enumerate())
            for again in (registry.start, registry.open, registry.__enter__):
                with self.assertRaisesRegex(RuntimeError, "running already"):
                    again()
            self.assertEqual(registry.url, url)
            self.assertLessEqual(set(threading.enumerate()), threads)
            self.assert_status(Client(registry.netloc).get("/v2/"), 200)
        with self.assertRaises(OSError):
            RawConnection(url.partition("//")[2])

    def test_it_can_be_closed_twice_and_started_again(self) -> None:
        registry = Registry()
        registry.close()
        for _ in range(3):
            registry.start()
            Client(registry.netloc, "a").push_image("latest")
            self.assertEqual(Client(registry.netloc).get("/v2/_catalog").json["repositories"], ["a"])
            registry.close()
            registry.close()

    @unittest.skipUnless(sys.platform == "linux", "counts the entries of /proc/self/fd")
    def test_many_starts_leave_nothing(self) -> None:
        def count() -> dict[str, int]:
            return {"files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}

        with Registry():
            pass
        before = count()
        registry = Registry()
        for _ in range(25):
            registry.start()
            registry.close()
            with Registry():
                pass
        wait_until(
            lambda: all(number <= before[what] for what, number in count().items()), "for what is left"
        )

    def test_two_of_the_same_options_are_two(self) -> None:
        with Registry() as one, Registry() as two:
            self.assertNotEqual(one, two)
            self.assertEqual(len({one, two}), 2)


@unittest.skipUnless(hasattr(os, "fork"), "this system cannot fork")
class ForksDoNoHarm(HTTPTestCase):
    """A process that is forked beside a registry does it no harm."""

    SCRIPT = """
import multiprocessing, os, sys, warnings
from tests.support import (Client)
from registry import Registry
warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
with Registry() as registry:
    client = Client(registry.netloc, "a")
    image = client.push_image("latest")
    {child}
    assert client.get("manifests/latest").body == image.body
    assert client.push_image("other")
    assert os.path.exists(registry.store.files.root)
assert not os.path.exists(registry.store.files.root)
print("done")
"""

    @contextlib.contextmanager
    def child(self, work: Callable[[], object] = lambda: None) -> Iterator[None]:
        """A forked process that has begun and lives as long as the block, then does some work and ends."""
        waiting, told = os.pipe()
        begun, begin = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
        if not process:
            status = 1
            with contextlib.suppress(BaseException):
                os.close(told)
                os.close(begin)  # by then, it has let go of what is the parent's
                os.read(waiting, 1)
                work()
                status = 0
            os._exit(status)
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        try:
            yield
        finally:
            os.close(told)
            os.close(waiting)
            self.assertEqual(os.waitpid(process, 0)[1], 0)

    def test_its_end_removes_nothing(self) -> None:
        for child in (
            "if not os.fork(): sys.exit()\n    assert os.wait()[1] == 0",
            "if not os.fork(): registry.close(); os._exit(0)\n    assert os.wait()[1] == 0",
            "process = multiprocessing.get_context('fork').Process(target=registry.close)\n"
            "    process.start(); process.join(); assert process.exitcode == 0",
        ):
            with self.subTest(child):
                done = python("-c", self.SCRIPT.format(child=child))
                self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "done\n", ""))

    def test_it_keeps_no_port_open(self) -> None:
        registry = Registry().start()
        with self.child():
            host, port = registry.netloc.split(":")
            registry.close()
            with self.assertRaises(ConnectionRefusedError):
                socket.create_connection((host, int(port)))
            with Registry(port=int(port)):
                self.assert_status(Client(registry.netloc).get("/v2/"), 200)

    def test_it_has_no_copies_of_connections(self) -> None:
        with Registry() as registry, RawConnection(registry.netloc) as connection:
            connection.request("GET", "/v2/").read()
            server = registry.server
            sockets = [
                server.socket,
                server.waker,
                *(each.reader.socket for each in list(server.connections)),
            ]

            def check() -> None:
                assert len(sockets) == 3
                assert [each.fileno() for each in sockets] == [-1] * 3

            with self.child(check):
                pass
            self.assert_status(connection.request("GET", "/v2/").read(), 200)

    def test_it_locks_no_upload(self) -> None:
        with Registry() as registry, RawConnection(registry.netloc) as connection:
            client = Client(registry.netloc, "a")
            location = client.open_upload()
            connection.request("PATCH", location, "Content-Length: 6", "Expect: 100-continue")
            self.assert_status(connection.read(), 100)
            with self.child():
                self.assert_status(connection.send(b"abcdef").read(), 202)
                client.expect(201, "PUT", with_digest(location, digest_of(b"abcdef")))

    def test_it_can_have_its_own(self) -> None:
        with Registry() as registry:
            client = Client(registry.netloc, "a")
            image = client.push_image("latest")

            def serve() -> None:
                with Registry() as other:
                    Client(other.netloc, "a").push_image("other")
                registry.start()  # as good as any other, here
                assert Client(registry.netloc).get("/v2/_catalog").json["repositories"] == []
                registry.close()

            with self.child(serve):
                pass
            self.assertEqual(client.get("manifests/latest").body, image.body)

    def test_it_cannot_have_the_same_data_directory(self) -> None:
        """Its SQLite would hold for its own the locks that only the parent has, and lose what it commits."""
        with tempfile.TemporaryDirectory() as data, Registry(data=data):

            def open_again() -> None:
                try:
                    Registry(data=Path(data, "..", Path(data).name)).start()
                except StartupError as error:
                    assert "forked" in str(error)
                    return
                raise AssertionError

            with self.child(open_again):
                pass

    def test_its_end_loses_nothing_that_others_pushed_since(self) -> None:
        pushing = (
            "import os, signal, sys; from registry import Registry; from tests.support import Client\n"
            "registry = Registry(data=sys.argv[1]).start()\n"
            "Client(registry.netloc, 'a').push_image('latest')\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        with tempfile.TemporaryDirectory() as data:
            registry = Registry(data=data).start()
            with self.child(registry.close):
                registry.close()
                python("-c", pushing, data)
                self.assertTrue(Path(data, "registry.db-wal").exists())
            with registry:
                self.assert_status(Client(registry.netloc, "a").get("manifests/latest"), 200)


class NothingIsSaid(unittest.TestCase):
    def test_python_has_nothing_to_warn_of(self) -> None:
        for options in (("-W", "error"), ("-X", "dev", "-W", "error"), ("-bb", "-W", "error"), ("-O",)):
            with self.subTest(options):
                result = python(*options, "-c", SCRIPT)
                self.assertEqual((result.returncode, result.stdout, result.stderr), (0, "", ""))

    def test_importing_it_does_nothing(self) -> None:
        check = "import registry, threading; assert threading.active_count() == 1"
        result = python("-W", "error", "-c", check)
        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, "", ""))

    def test_leaving_without_ending_it_does_not_hang(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            script = "from registry import Registry\nregistry = Registry().__enter__()\nprint(registry.url)"
            result = python("-c", script, env={**ENVIRONMENT, "TMPDIR": directory})
            self.assertRegex(result.stdout, r"\Ahttp://127\.0\.0\.1:\d+\n\Z")
            self.assertNotIn("Traceback", result.stderr)
