"""What every test shares: a running registry, clients for it, images to push, threads."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import socket
import sqlite3
import struct
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union
from unittest import mock
from urllib.parse import urljoin

import registry
from registry import Registry

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 10.0
MEBIBYTE = 1024 * 1024

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"

HELLO = b"hello"
SESSION_ID = re.compile(r"[0-9a-f]{32}-sha(256|512)-[0-9a-f]{16}")
ERROR_CODES = frozenset(
    """BLOB_UNKNOWN BLOB_UPLOAD_INVALID BLOB_UPLOAD_UNKNOWN DIGEST_INVALID MANIFEST_BLOB_UNKNOWN
    MANIFEST_INVALID MANIFEST_UNKNOWN NAME_INVALID NAME_UNKNOWN SIZE_INVALID UNAUTHORIZED DENIED
    UNSUPPORTED TOOMANYREQUESTS""".split()
)

HEX = "a" * 64
MALFORMED_DIGESTS = (
    *f"sha256: sha256 latest sha256:abc sha256:{HEX[1:]} sha256:{HEX}a sha256:{HEX.upper()}".split(),
    *f"SHA256:{HEX} sha256:{'g' * 64} sha256:{HEX}%0A sha256:{HEX}%00 %20sha256:{HEX} sha256-{HEX}".split(),
    *f"sha256::{HEX} sha256:{'%D9%A1' * 64} sha512:{HEX} sha512:{'a' * 127} sha512:{'a' * 129}".split(),
    *f"md5:{'a' * 32} sha1:{'a' * 40} sha384:{'a' * 96} sha3_256:{HEX} sha256+b64:{HEX} :{HEX}".split(),
)
MALFORMED_QUERIES = (*MALFORMED_DIGESTS, "", "%00", "sha256:..%2F..%2Fregistry.db")
EMPTY_SHA256 = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

_numbers = itertools.count(1)
# Where files cost least, if there is enough of it: most tests would not tell it from a disk.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 2**31 else None
Entered = TypeVar("Entered")


# === Content: bytes, digests, descriptors, manifests ===


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


def unique(label: str = "content") -> bytes:
    """Bytes no other call returns."""
    return f"{label} {os.getpid()} {next(_numbers)}".encode()


def descriptor(content: bytes, media_type: str = OCI_LAYER, algorithm: str = "sha256", **more: Any) -> dict:
    return {"mediaType": media_type, "digest": digest_of(content, algorithm), "size": len(content), **more}


def image_manifest(config: dict, layers: Iterable[dict] = (), **more: Any) -> dict:
    return {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": list(layers), **more}


def image_index(children: Iterable[dict], **more: Any) -> dict:
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(children), **more}


def encode(document: Any) -> bytes:
    return document if isinstance(document, bytes) else json.dumps(document).encode()


def with_digest(location: str, digest: str) -> str:
    """An upload's Location with the digest that finishes it."""
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"


@dataclass(frozen=True)
class Image:
    """An image as pushed."""

    body: bytes
    config: bytes
    layers: tuple[bytes, ...]

    @property
    def digest(self) -> str:
        return digest_of(self.body)

    @property
    def descriptor(self) -> dict:
        return descriptor(self.body, json.loads(self.body)["mediaType"])

    @property
    def blobs(self) -> tuple[bytes, ...]:
        return (self.config, *self.layers)


HELLO_DIGEST = digest_of(HELLO)


# === HTTP: responses, a client, a raw connection ===


class Headers:
    """Header lines in order, looked up without regard to case."""

    def __init__(self, lines: Iterable[tuple[str, str]]) -> None:
        self.lines = list(lines)

    def getall(self, name: str) -> list[str]:
        return [value for key, value in self.lines if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        return next(iter(self.getall(name)), None)

    def __getitem__(self, name: str) -> str:
        values = self.getall(name)
        if len(values) != 1:
            raise AssertionError(f"{len(values)} lines of {name} in {self.lines}")
        return values[0]

    def __contains__(self, name: str) -> bool:
        return bool(self.getall(name))


@dataclass
class Response:
    """One reply, and the request it answers for messages."""

    request: str
    status: int
    headers: Headers
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"{self.request[:300]} -> {self.status} {self.headers.lines} {self.body[:600]!r}"


Body = Union[bytes, Iterable[bytes], None]


class Client:
    """Requests to one registry. A path that does not begin with a slash is inside `repository`."""

    def __init__(self, host: str, repository: str = "") -> None:
        self.host = host
        self.repository = repository
        self._connection: http.client.HTTPConnection | None = None

    def at(self, repository: str) -> Client:
        return Client(self.host, repository)

    @contextlib.contextmanager
    def keep_alive(self) -> Iterator[Client]:
        """The same client with all requests on one connection."""
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=TIMEOUT)) as connection:
            client = self.at(self.repository)
            client._connection = connection
            yield client

    def path(self, path: str) -> str:
        return path if path.startswith("/") else f"/v2/{self.repository}/{path}"

    def request(self, method: str, path: str, body: Body = None, headers: Any = ()) -> Response:
        """Bytes are sent with a Content-Length, any other iterable of bytes is sent chunked."""
        connection = self._connection or http.client.HTTPConnection(self.host, timeout=TIMEOUT)
        try:
            _send(connection, method, self.path(path), body, headers)
            with connection.getresponse() as reply:
                lines = Headers(reply.getheaders())
                return Response(f"{method} {self.path(path)}", reply.status, lines, reply.read())
        finally:
            if connection is not self._connection:
                connection.close()

    def get(self, path: str, headers: Any = ()) -> Response:
        return self.request("GET", path, headers=headers)

    def head(self, path: str, headers: Any = ()) -> Response:
        return self.request("HEAD", path, headers=headers)

    def delete(self, path: str) -> Response:
        return self.request("DELETE", path)

    def post(self, path: str, body: Body = None, headers: Any = ()) -> Response:
        return self.request("POST", path, body, headers)

    def patch(self, path: str, body: Body = None, headers: Any = ()) -> Response:
        return self.request("PATCH", path, body, headers)

    def put(self, path: str, body: Body = None, headers: Any = ()) -> Response:
        return self.request("PUT", path, body, headers)

    def expect(self, status: int, method: str, path: str, body: Body = None, headers: Any = ()) -> Response:
        response = self.request(method, path, body, headers)
        if response.status != status:
            raise AssertionError(f"expected {status}: {response}")
        return response

    def push_blob(self, content: bytes, algorithm: str = "sha256") -> str:
        digest = digest_of(content, algorithm)
        self.expect(201, "POST", f"blobs/uploads/?digest={digest}", content)
        return digest

    def open_upload(self, query: str = "") -> str:
        """Open an upload session and return its Location."""
        return self.expect(202, "POST", f"blobs/uploads/{query}").headers["Location"]

    def put_manifest(self, manifest: Any, reference: str = "", media_type: str = "") -> Response:
        """PUT a manifest, by its digest unless told otherwise, and return whatever the registry says."""
        body = encode(manifest)
        kind = media_type or json.loads(body)["mediaType"]
        return self.put(f"manifests/{reference or digest_of(body)}", body, {"Content-Type": kind})

    def push_manifest(self, manifest: Any, reference: str = "", media_type: str = "") -> str:
        """PUT a manifest that must be accepted and return its sha256 digest."""
        response = self.put_manifest(manifest, reference, media_type)
        if response.status != 201:
            raise AssertionError(f"expected 201: {response}")
        return digest_of(encode(manifest))

    def push_image(self, tag: str = "", layers: int = 1, **more: Any) -> Image:
        """Push an image that differs from all others, with `more` in its manifest."""
        contents = [unique("layer") for _ in range(layers)]
        config = encode({"os": "linux", "architecture": "amd64", "id": unique("config").decode()})
        for content in (config, *contents):
            self.push_blob(content)
        manifest = image_manifest(descriptor(config, OCI_CONFIG), map(descriptor, contents), **more)
        self.push_manifest(manifest, tag)
        return Image(encode(manifest), config, tuple(contents))


def _send(connection: http.client.HTTPConnection, method: str, path: str, body: Body, headers: Any) -> None:
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items() if isinstance(headers, dict) else headers:
        connection.putheader(name, value)
    if isinstance(body, bytes) or (body is None and method in ("POST", "PUT", "PATCH")):
        connection.putheader("Content-Length", str(len(body or b"")))
    elif body is not None:
        connection.putheader("Transfer-Encoding", "chunked")
    chunked = body is not None and not isinstance(body, bytes)
    # A registry may refuse a body without reading all of it: the reply is what counts.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.endheaders(body, encode_chunked=chunked)
    if connection.sock is None:
        raise ConnectionResetError("there was nobody to send it to")


class RawConnection:
    """A TCP connection that sends the bytes it is told to and parses replies strictly."""

    _STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) [\x20-\x7e]*")
    _HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e]*)")

    def __init__(self, host: str) -> None:
        name, _, port = host.rpartition(":")
        self.host = host
        self._socket = socket.create_connection((name.strip("[]"), int(port)), TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._sent = b""

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> RawConnection:
        self._sent = data
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)
        return self

    def request(self, method: str, path: str, *lines: str, body: bytes = b"") -> RawConnection:
        """Send a request with exactly these header lines after Host."""
        head = "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {self.host}", *lines, "", ""])
        return self.send(head.encode("latin-1") + body)

    def read(self, method: str = "GET") -> Response:
        """The next reply; the connection closed instead of one is an error."""
        response = self.read_unless_closed(method)
        if response is None:
            raise AssertionError(f"closed without a reply to {self._sent[:300]!r}")
        return response

    def read_unless_closed(self, method: str = "GET") -> Response | None:
        response = self.read_head()
        if response and method != "HEAD" and response.status not in (100, 204, 304):
            response.body = self._take(int(response.headers["Content-Length"]))
        return response

    def read_head(self) -> Response | None:
        """A reply up to its body, which stays to be read."""
        head = self._take_head()
        if head is None:
            return None
        status_line, *lines = head.split(b"\r\n")
        status = self._match(self._STATUS, status_line)
        matches = [self._match(self._HEADER, line) for line in lines]
        headers = Headers((m[1].decode(), m[2].decode().rstrip()) for m in matches)
        return Response(repr(self._sent[:300]), int(status[1]), headers, b"")

    def drain(self) -> None:
        """Read until the registry closes the connection."""
        self._buffer = b""
        while self._receive():
            pass

    def is_closed(self) -> bool:
        """Whether the registry closes the connection without another byte, waiting for it to."""
        return not self._buffer and not self._receive()

    def is_open(self) -> bool:
        """Whether nothing has come on a connection that waits for nothing; its end would have."""
        self._socket.settimeout(0)
        try:
            return bool(self._socket.recv(1))
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False

    def stop_sending(self) -> None:
        """Close our direction only, as seen when a client goes away."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Drop the connection with a TCP reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def _match(self, pattern: re.Pattern, line: bytes) -> re.Match:
        match = pattern.fullmatch(line)
        if match is None:
            raise AssertionError(f"malformed line {line!r} in the reply to {self._sent[:300]!r}")
        return match

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(65536)
        except ConnectionResetError:
            return b""

    def _take_head(self) -> bytes | None:
        while b"\r\n\r\n" not in self._buffer:
            received = self._receive()
            if not received and not self._buffer:
                return None
            if not received:
                raise AssertionError(f"cut off in the head of a reply: {self._buffer!r}")
            self._buffer += received
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return head

    def _take(self, length: int) -> bytes:
        while len(self._buffer) < length:
            received = self._receive()
            if not received:
                raise AssertionError(f"{len(self._buffer)} bytes of a body of {length}")
            self._buffer += received
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken


# === The data directory ===


class DataDirectory:
    """A look at what the registry keeps, from outside."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def blob(self, digest: str) -> Path:
        """Where the bytes with a digest are."""
        return self.path / "blobs" / digest.replace(":", "/")

    def upload(self, location: str) -> Path:
        """Where the bytes of an upload session are."""
        return self.path / "uploads" / location.rpartition("/")[2]

    def files(self) -> dict[str, int]:
        """Digest to size of every file in blobs/."""
        found = (path for path in (self.path / "blobs").rglob("*") if path.is_file())
        return {f"{path.parent.name}:{path.name}": path.stat().st_size for path in found}

    def unfinished(self) -> list[str]:
        """The names of the files in uploads/."""
        return sorted(path.name for path in (self.path / "uploads").iterdir())

    def rows(self, query: str, *values: Any) -> list[tuple]:
        with contextlib.closing(sqlite3.connect(self.path / "registry.db", timeout=TIMEOUT)) as database:
            return database.execute(query, values).fetchall()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everybody from writing to the database."""
        path = self.path / "registry.db"
        with contextlib.closing(sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            yield
            database.execute("ROLLBACK")

    def recorded(self) -> dict[str, int]:
        """Digest to size of every row of blobs."""
        return dict(self.rows("SELECT digest, size FROM blobs"))

    def links(self, digest: str) -> list[str]:
        """The repositories a blob is linked to, one entry for each row."""
        query = """SELECT name FROM repository_blobs JOIN repositories ON repositories.id = repository_id
                   WHERE digest = ? ORDER BY name"""
        return [name for (name,) in self.rows(query, digest)]

    def disagreements(self, strays: Container[str] = ()) -> list[str]:
        """What is wrong with the database, and files that are not as it says; strays may lack a row."""
        checks = {name: self.rows(f"PRAGMA {name}") for name in ("integrity_check", "foreign_key_check")}
        found = [f"{name}: {rows}" for name, rows in checks.items() if rows not in ([], [("ok",)])]
        files, recorded = self.files(), self.recorded()
        for digest in sorted({*files, *recorded}):
            if files.get(digest) != recorded.get(digest) and not (
                digest in strays and digest not in recorded
            ):
                found.append(
                    f"{digest}: {files.get(digest)} bytes on disk, {recorded.get(digest)} in its row"
                )
            elif digest in files and digest_of(self.blob(digest).read_bytes(), digest[:6]) != digest:
                found.append(f"{digest}: other bytes")
        return found


# === Threads and time ===


def run_at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Call every function in a thread of its own, all released together, and return what they return."""
    barrier = threading.Barrier(len(functions), timeout=TIMEOUT)
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def run(position: int) -> None:
        try:
            barrier.wait()
            results[position] = functions[position]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * TIMEOUT)
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise AssertionError("a thread did not finish")
    return results


def elapsed(function: Callable[[], Any]) -> float:
    """How long a call takes, in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = TIMEOUT) -> None:
    """Ask again and again until the answer is yes."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain {what}")
        time.sleep(0.002)


# === Test cases ===


class HTTPTestCase(unittest.TestCase):
    """Assertions on replies, and what is there for one test."""

    def enter(self, manager: contextlib.AbstractContextManager[Entered]) -> Entered:
        """What `with` gives, until the end of the test (enterContext came with Python 3.11)."""
        entered = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return entered

    def temporary(self) -> Path:
        """A directory that is removed at the end of the test, in memory where that is possible."""
        return Path(self.enter(tempfile.TemporaryDirectory(dir=MEMORY))).resolve()

    def patch(self, **constants: Any) -> None:
        """Give constants of the registry's other values for the test."""
        self.enter(mock.patch.multiple(registry, **constants))

    def assert_status(self, response: Response, status: int) -> None:
        self.assertEqual(response.status, status, response)

    def assert_error(self, response: Response, status: int, *codes: str) -> None:
        """An error reply in the specification's form, every entry with one of `codes` (any when none)."""
        self.assert_status(response, status)
        self.assertEqual(response.headers["Docker-Distribution-API-Version"], "registry/2.0")
        self.assertEqual(response.headers["Content-Type"], "application/json", response)
        self.assertEqual(int(response.headers["Content-Length"]), len(response.body), response)
        self.assertEqual(list(response.json), ["errors"])
        self.assertGreater(len(response.json["errors"]), 0)
        for entry in response.json["errors"]:
            self.assertLessEqual({"code", "message"}, set(entry))
            self.assertLessEqual(set(entry), {"code", "message", "detail"})
            self.assertIsInstance(entry["message"], str)
            self.assertIn(entry["code"], codes or ERROR_CODES, response)
            self.assertIn(entry["code"], ERROR_CODES)

    def assert_image(self, client: Client, image: Image, reference: str = "") -> None:
        """The image is there, whole."""
        manifest = client.expect(200, "GET", f"manifests/{reference or image.digest}")
        self.assertEqual(manifest.body, image.body)
        for content in image.blobs:
            self.assertEqual(client.expect(200, "GET", f"blobs/{digest_of(content)}").body, content)


class RegistryTestCase(HTTPTestCase):
    """One registry in this process for the class; a repository of its own, and another, for each test."""

    options: ClassVar[dict[str, Any]] = {}
    data: ClassVar[DataDirectory]
    registry: ClassVar[Registry]

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.data = DataDirectory(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)), "data"))
        cls.registry = stack.enter_context(Registry(cls.data.path, **{"sync": False, **cls.options}))

    def setUp(self) -> None:
        name = f"{type(self).__name__.lower()}/{next(_numbers)}"
        self.client = Client(self.registry.netloc, name)
        self.other = self.client.at(f"{name}-other")
        self._unfinished_before = self.data.unfinished()

    def connect(self) -> RawConnection:
        connection = RawConnection(self.registry.netloc)
        self.addCleanup(connection.__exit__)
        return connection

    def assert_blob(self, client: Client, content: bytes, algorithm: str = "sha256") -> None:
        """The blob is there, whole."""
        response = client.get(f"blobs/{digest_of(content, algorithm)}")
        self.assert_status(response, 200)
        self.assertEqual(response.body, content)

    def assert_no_blob(self, client: Client, digest: str) -> None:
        """The blob is not there, in the repository nor on disk nor in the database."""
        self.assert_error(client.get(f"blobs/{digest}"), 404, "BLOB_UNKNOWN", "NAME_UNKNOWN")
        self.assertEqual(client.head(f"blobs/{digest}").status, 404)
        self.assertFalse(self.data.blob(digest).exists())
        tables = ("blobs", "repository_blobs")
        query = " UNION ALL ".join(f"SELECT '{table}' FROM {table} WHERE digest = ?" for table in tables)
        self.assertEqual(self.data.rows(query, digest, digest), [])

    def assert_no_session(self, location: str) -> None:
        """Nothing is left of an upload session."""
        self.assert_error(self.client.get(location), 404, "BLOB_UPLOAD_UNKNOWN")

    def assert_nothing_unfinished(self) -> None:
        """No upload of this test has left a file behind."""
        self.assertEqual(self.data.unfinished(), self._unfinished_before)

    def assert_clean_afterwards(self, connection: RawConnection) -> None:
        """The next request on a connection gets its own answer, or the connection is closed."""
        response = connection.request("GET", "/v2/").read_unless_closed()
        if response is not None:
            self.assertEqual((response.status, response.json), (200, {}), response)
            self.assertEqual(connection._buffer, b"")

    def assert_consistent(self) -> None:
        """The database is sound and agrees with the files to the byte."""
        self.assertEqual(self.data.disagreements(), [])
        self.assert_nothing_unfinished()


class OwnRegistryTestCase(RegistryTestCase):
    """A registry of its own for each test, which sees all that is stored."""

    @classmethod
    def setUpClass(cls) -> None:
        pass

    def setUp(self) -> None:
        super().setUpClass()
        self.addCleanup(self.doClassCleanups)
        super().setUp()


class HTTPConnectionTestCase(RegistryTestCase):
    """Requests written byte by byte, most of them uploads of `hello`."""

    def setUp(self) -> None:
        super().setUp()
        self.upload = self.client.path(f"blobs/uploads/?digest={HELLO_DIGEST}")

    def send(self, data: bytes) -> RawConnection:
        return self.connect().send(data)

    def post(self, *lines: bytes, body: bytes = HELLO) -> RawConnection:
        """The single-POST upload of `hello` with exactly these header lines after Host."""
        head = b"\r\n".join([b"POST %s HTTP/1.1" % self.upload.encode(), b"Host: a", *lines, b"", b""])
        return self.send(head + body)

    def assert_refused(self, connection: RawConnection, status: int = 400) -> None:
        """An error in the usual form, nothing stored, and the connection closed."""
        response = connection.read()
        self.assert_error(response, status)
        self.assertTrue(connection.is_closed(), response)
        self.assert_error(self.client.get(f"blobs/{HELLO_DIGEST}"), 404)

    def assert_hello(self, connection: RawConnection) -> None:
        """The upload is taken, and the connection ready for more."""
        self.assert_status(connection.read(), 201)
        self.assert_clean_afterwards(connection)
        self.assert_blob(self.client, HELLO)
        self.client.expect(202, "DELETE", f"blobs/{HELLO_DIGEST}")


class UploadTestCase(RegistryTestCase):
    """Upload sessions seen from a client that is resuming them."""

    def received(self, location: str) -> str:
        """The Range of an upload session."""
        return self.client.expect(204, "GET", location).headers["Range"]

    def append(self, location: str, content: bytes, content_range: str = "") -> Response:
        headers = {"Content-Range": content_range} if content_range else {}
        return self.client.patch(location, content, headers)

    def finish(self, location: str, content: bytes, rest: bytes = b"", algorithm: str = "sha256") -> None:
        """Finish a session that must amount to `content`, sending `rest` of it."""
        self.client.expect(201, "PUT", with_digest(location, digest_of(content, algorithm)), rest)
        self.assert_blob(self.client, content, algorithm)

    def assert_session(self, response: Response, status: int, received: str) -> None:
        self.assert_status(response, status)
        self.assertEqual(response.headers["Range"], received)
        prefix = f"/v2/{self.client.repository}/blobs/uploads/"
        self.assertTrue(response.headers["Location"].startswith(prefix), response)

    def assert_pushed(self, response: Response, client: Client, digest: str) -> None:
        self.assert_status(response, 201)
        self.assertEqual(response.headers["Location"], f"/v2/{client.repository}/blobs/{digest}")
        self.assertEqual(response.headers["Docker-Content-Digest"], digest)


# === Listings, page by page ===

BAD_COUNTS = "-1 -0x1 abc 1.5 1e3 0x1 1_000 %201%20 %D9%A3 %C2%B2 1%00 1,2".split()
HUGE_COUNTS = ("99999", str(2**63), str(10**30))


def next_page(response: Response) -> str | None:
    """Where the Link of a listing leads, seen from the page it came with."""
    if "Link" not in response.headers:
        return None
    link = re.fullmatch(r'<([^<>]+)>; ?rel="?next"?', response.headers["Link"])
    if link is None:
        raise AssertionError(f"malformed Link: {response}")
    return urljoin(response.request.partition(" ")[2], link[1])


def pages(client: Client, path: str, member: str) -> list[list[str]]:
    """Every page of a listing, by following its links."""
    found = []
    following: str | None = client.path(path)
    while following:
        response = client.expect(200, "GET", following)
        found.append(response.json[member])
        following = next_page(response)
        if len(found) > 100:
            raise AssertionError(f"the pages do not end: {found[:5]}")
    return found
