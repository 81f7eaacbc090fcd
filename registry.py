#!/usr/bin/env python3
"""A container registry in two files: this one and schema.sql.

    python registry.py --data ./data

serves the OCI distribution specification to docker, podman, containerd, Helm, ORAS and the rest,
and ``with Registry() as registry:`` does the same inside a test suite.

The data directory:

    blobs/<algorithm>/<hex>     every blob and manifest, named by its digest, as in an OCI image layout
    uploads/<session id>        the bytes of uploads under way
    registry.db                 SQLite: repositories, links, manifests, tags, upload sessions
    generation                  changes with every commit, for the processes that share the directory
    reserve                     4 MiB to give up when the disk is full, so that deleting still works
    last-gc                     its time is when the daemon last collected garbage
    token.key                   what tokens are signed with, where there are users
    corrupt/                    damaged files that verify --repair moved out of the way

The one invariant: **a file is durable before its row exists, and a row goes before its file does.**
A crash can therefore leave a file that no row names, and never a row whose file is missing.

The sections, each of which uses only those above it:

    Constants       media types, limits, the patterns of names
    Errors          one table of what can go wrong, and the exception that carries its rows
    Digests         parsing and computing them
    Manifests       what a manifest says, checked
    Files           the content-addressed directory and the files under upload; knows no SQL
    Store           files and SQLite together; knows no HTTP
    Maintenance     garbage collection, and verifying what is stored
    Access          users, grants, tokens and certificates; knows no HTTP either
    Messages        requests and replies: heads, bodies, ranges, pages
    Handlers        one function per operation
    Routes          one table: method, path, handler
    Server          connections and their threads
    Embedding       Registry, a server and its store as one object
    Command line    main, and one function per command
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import enum
import errno
import functools
import getpass
import hashlib
import heapq
import hmac
import http
import io
import itertools
import json
import mmap
import os
import queue
import re
import secrets
import selectors
import shutil
import signal
import socket
import socketserver
import sqlite3
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, BinaryIO, Callable, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote, unquote

try:
    import fcntl
except ImportError:  # Windows: sessions are then guarded within one process only
    fcntl = None  # type: ignore[assignment]
try:
    import ssl
except ImportError:  # a Python built without it serves plain HTTP
    ssl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

__version__ = "1.0"
__all__ = ["Registry"]

# === Constants ========================================================================================

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1"  # and +json, +prettyjws
OCTET_STREAM = "application/octet-stream"
JSON = "application/json"

KIB, MIB = 1 << 10, 1 << 20

REQUEST_LINE_LIMIT = 8 * KIB
HEAD_LIMIT = 64 * KIB
HEADER_COUNT_LIMIT = 100
CHUNK_LINE_LIMIT = 1 * KIB
MANIFEST_LIMIT = 4 * MIB
DRAIN_LIMIT = 256 * KIB  # of an unread body; past that, closing is cheaper than reading on
PAGE_LIMIT = 10_000  # entries of a tag list or catalog in one reply
REFERRER_PAGE_LIMIT = 1_000
REFERRER_BATCH = 16
REFERRER_PAGE_BYTES = 3 * MIB  # clients stop reading an index at 4 MiB
TAG_PARAMETER_LIMIT = 50
DETAIL_LIMIT = 1_000  # entries of one error

RECEIVE_SIZE = 64 * KIB
COPY_SIZE = 256 * KIB  # what is encrypted at a time on its way out
BUFFER_SIZE = 1 * MIB  # each of an upload's two buffers
FLUSH_SIZE = 8 * MIB  # after which the disk may begin to write an upload
SMALL_CONTENT = 64 * KIB  # up to here, contents are kept in memory and leave in one write
CACHE_SIZE = 8 * MIB

IDLE_TIMEOUT = 75.0  # seconds a kept-alive connection may wait for its next request
HEADER_TIMEOUT = 30.0  # from a head's first byte to its last
STALL_TIMEOUT = 60.0  # without one byte of a body moving, either way
LINGER_TIMEOUT = 2.0  # for a client to read why it is being hung up on
EVICTION_TIMEOUT = 0.1  # for a connection that makes room for another
RESTART_DELAY = 0.5  # before a worker that died is replaced
STOP_TIMEOUT = 10.0  # for requests in flight when the daemon is told to stop
DATABASE_TIMEOUT = 60.0  # for another process that holds the database's write lock
UPLOAD_LOCK_TIMEOUT = 0.2  # for another that writes to the same upload session
UPLOAD_LIFETIME = 24 * 3600.0  # of an idle upload session
DAY = 24 * 3600
EXPIRY_INTERVAL = 3600.0  # between looks for such sessions
FLUSH_INTERVAL = 60.0  # between records of what was pulled
LEASE_SLACK = 5.0  # seconds by which leased_at may be behind
GRACE = 3600.0  # how long a client can rely on what it was told, by default
SHORTEST_GRACE = 10.0  # twice the slack

MAX_CONNECTIONS = 1024  # by default
LISTEN_BACKLOG = 1024
TOKEN_LIFETIME = 300  # seconds
PASSWORD_LIFETIME = 300.0  # for which a password that was right is not hashed again
FAILURE_LIMIT, ADDRESS_FAILURE_LIMIT = 10, 100  # wrong passwords for one user, and in all, from one address
FAILURE_INTERVAL = 60.0  # seconds after which failures are forgotten
SCRYPT_LN, SCRYPT_MEMORY = 14, 64 * MIB
FORM_LIMIT = 64 * KIB
COUNT_LIMIT = 10**18
RESERVE_SIZE = 4 * MIB
GENERATION_SIZE = 16
LOOKUP_LIMIT, LOOKUP_SIZE, LOOKUP_LIFETIME = 1_024, 8 * KIB, 1.0  # queries remembered, characters, seconds
BATCH = 100  # rows that maintenance changes under one write lock
CHOICE = 1_000  # rows that it reads at a time
DROP_LIMIT = 1_000  # manifests that go with one that kept them
PUSH_PAUSE = 60.0  # seconds between two layers of one push
CLOCK_SLACK = 60.0  # seconds by which a time may be ahead
FORMAT_VERSION = 1  # PRAGMA user_version of the schema.sql beside this file

ALGORITHMS = ("sha256", "sha512")
NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
NAME_LIMIT = 255
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
LEADING_LINES = re.compile(rb"\A(?:\r\n)+")  # some clients end a body with one too many (RFC 9112, 2.2)
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
BYTE_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.IGNORECASE)
CREDENTIALS = re.compile(r"//[^/?]*@")  # in front of a URL's host
HOST = re.compile(r"[A-Za-z0-9._-]+(?::[0-9]+)?|\[[0-9A-Fa-f:.]+\](?::[0-9]+)?")

# === Errors ===========================================================================================


class ErrorCode(enum.Enum):
    """What can go wrong: HTTP status, code on the wire, message.

    The first fourteen are the specification's codes. The others say one of the fourteen with a
    status or a message of their own, so that no client meets a code it has never heard of.
    """

    BLOB_UNKNOWN = 404, "BLOB_UNKNOWN", "blob unknown to the repository"
    BLOB_UPLOAD_INVALID = 400, "BLOB_UPLOAD_INVALID", "blob upload invalid"
    BLOB_UPLOAD_UNKNOWN = 404, "BLOB_UPLOAD_UNKNOWN", "upload session unknown; start a new one"
    DIGEST_INVALID = 400, "DIGEST_INVALID", "digest invalid or not that of the content"
    MANIFEST_BLOB_UNKNOWN = 400, "MANIFEST_BLOB_UNKNOWN", "manifest names content the repository lacks"
    MANIFEST_INVALID = 400, "MANIFEST_INVALID", "manifest invalid"
    MANIFEST_UNKNOWN = 404, "MANIFEST_UNKNOWN", "manifest unknown to the repository"
    NAME_INVALID = 400, "NAME_INVALID", "repository name invalid"
    NAME_UNKNOWN = 404, "NAME_UNKNOWN", "repository unknown to the registry"
    SIZE_INVALID = 400, "SIZE_INVALID", "length of the body is not the one declared"
    UNAUTHORIZED = 401, "UNAUTHORIZED", "authentication required"
    DENIED = 403, "DENIED", "access denied"
    UNSUPPORTED = 400, "UNSUPPORTED", "operation unsupported"
    TOOMANYREQUESTS = 429, "TOOMANYREQUESTS", "too many requests"

    BAD_REQUEST = 400, "UNSUPPORTED", "malformed HTTP request"
    PAGE_INVALID = 400, "UNSUPPORTED", "n must be a non-negative integer"
    NOT_FOUND = 404, "UNSUPPORTED", "no such endpoint"
    METHOD_NOT_ALLOWED = 405, "UNSUPPORTED", "the endpoint does not know this method"
    STILL_NEEDED = 405, "DENIED", "still needed by a manifest of the repository; delete that first"
    UPLOAD_BUSY = 416, "BLOB_UPLOAD_INVALID", "another request is writing to this upload session"
    UPLOAD_RANGE = 416, "BLOB_UPLOAD_INVALID", "the range does not continue the upload"
    RANGE_NOT_SATISFIABLE = 416, "SIZE_INVALID", "the range lies outside the content"
    MANIFEST_TOO_LARGE = 413, "SIZE_INVALID", f"manifest larger than {MANIFEST_LIMIT // MIB} MiB"
    TOO_MANY_TAGS = 414, "UNSUPPORTED", f"more than {TAG_PARAMETER_LIMIT} tags in one request"
    URI_TOO_LONG = 414, "UNSUPPORTED", f"request line longer than {REQUEST_LINE_LIMIT // KIB} KiB"
    EXPECTATION_FAILED = 417, "UNSUPPORTED", "the only expectation served is 100-continue"
    REQUEST_HEADER_FIELDS_TOO_LARGE = (
        431,
        "UNSUPPORTED",
        f"more than {HEADER_COUNT_LIMIT} headers, or {HEAD_LIMIT // KIB} KiB",
    )
    INTERNAL = 500, "UNSUPPORTED", "internal error; the registry's log says more"
    OVERLOADED = 503, "TOOMANYREQUESTS", "too many connections; try again"
    HTTP_VERSION = 505, "UNSUPPORTED", "only HTTP/1.1 and HTTP/1.0 are spoken here"
    READ_ONLY = 405, "UNSUPPORTED", "this registry is read-only"
    FORM_TOO_LARGE = 413, "SIZE_INVALID", f"form larger than {FORM_LIMIT // KIB} KiB"
    BLOB_TOO_LARGE = 413, "SIZE_INVALID", "blob larger than this registry accepts"
    STORAGE_FULL = 507, "DENIED", "the registry's disk is full; delete something or make room"

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.code = code
        self.message = message


Headers = Sequence[tuple[str, str]]


class RegistryError(Exception):
    """An ErrorCode on its way to the client: one entry for each detail, or one without."""

    def __init__(self, code: ErrorCode, *details: str, headers: Headers = ()) -> None:
        super().__init__(code.message, *details)
        self.code = code
        self.details = details
        self.headers = headers

    def document(self) -> bytes:
        """The specification's error document (section "Error Codes") as JSON."""
        code, message = self.code.code, self.code.message
        entries: list[dict[str, str | None]] = [
            {"code": code, "message": f"{message}: {detail}", "detail": detail} for detail in self.details
        ]
        return encode_json({"errors": entries or [{"code": code, "message": message, "detail": None}]})


def encode_json(value: object) -> bytes:
    """The JSON that every reply uses: compact, ASCII, ending in a newline."""
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def is_out_of_space(error: BaseException) -> bool:
    """Whether an upload failed because there is no room for it."""
    if isinstance(error, RegistryError):
        return error.code in (ErrorCode.STORAGE_FULL, ErrorCode.BLOB_TOO_LARGE)
    if isinstance(error, sqlite3.OperationalError):
        return "is full" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))


class StartupError(Exception):
    """Why the registry cannot run here, in one line that says what to do about it."""


class ClientGone(Exception):
    """The client hung up or stalled in the middle of a request or reply."""


# === Digests ==========================================================================================


def is_digest(text: str) -> bool:
    """Whether this is a well-formed digest of an algorithm that is served."""
    return DIGEST.fullmatch(text) is not None


def parse_digest(text: str) -> str:
    """The digest itself; DIGEST_INVALID for bad syntax or an algorithm that is not served."""
    if not is_digest(text):
        raise RegistryError(ErrorCode.DIGEST_INVALID, text)
    return text


def parse_algorithm(text: str) -> str:
    """A digest algorithm by its name; DIGEST_INVALID for one that is not served."""
    if text not in ALGORITHMS:
        raise RegistryError(ErrorCode.DIGEST_INVALID, text)
    return text


def algorithm_of(digest: str) -> str:
    """The algorithm that a well-formed digest names."""
    return digest.partition(":")[0]


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    """The digest of some bytes."""
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


# === Manifests ========================================================================================


class Manifest(NamedTuple):
    """What the registry needs to know of a manifest or index (image-spec manifest.md, image-index.md)."""

    media_type: str
    artifact_type: str | None  # its own; a manifest's falls back to its config's media type
    subject: str | None  # the digest of the manifest that this one refers to
    annotations: dict[str, str]
    required: tuple[str, ...]  # digests that the repository must hold already
    optional: tuple[str, ...]  # digests that it may lack: foreign layers


def invalid_manifest(reason: str) -> RegistryError:
    """The error for content that is no acceptable manifest."""
    return RegistryError(ErrorCode.MANIFEST_INVALID, reason)


def parse_manifest(content: bytes, content_type: str) -> Manifest:
    """Check a manifest or index of any media type, pushed with this Content-Type ("" for none).

    Raises MANIFEST_INVALID for anything that is neither.
    """
    document = _parse_json_object(content)
    media_type = _media_type(document, content_type)
    if document.get("schemaVersion") != 2 or media_type.startswith(DOCKER_SCHEMA1):
        raise invalid_manifest("schemaVersion must be 2; Docker's schema 1 is not supported")
    parse = _parse_index if _is_index(document, media_type) else _parse_image
    return parse(document, media_type)


def _parse_json_object(content: bytes) -> dict[str, Any]:
    """The JSON object in some bytes. Neither depth nor a number's length costs more than it should."""
    try:
        document = json.loads(content.decode("utf-8"), parse_int=_parse_int, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise invalid_manifest(f"not JSON: {type(error).__name__}") from None
    if not isinstance(document, dict):
        raise invalid_manifest("not a JSON object")
    return document


def _parse_int(digits: str) -> int:
    """An integer of at most 20 characters: int() takes quadratic time for longer ones."""
    if len(digits) > 20:
        raise ValueError("number too long")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _media_type(document: dict[str, Any], content_type: str) -> str:
    """The one media type that body and header agree on, or that follows from the body's members."""
    declared = _optional(document, "mediaType", str) or ""
    if declared and content_type and declared != content_type:
        raise invalid_manifest(f"mediaType {declared} was sent as Content-Type {content_type}")
    media_type = declared or content_type or (OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    if not MEDIA_TYPE.fullmatch(media_type):
        raise invalid_manifest("malformed media type")
    return media_type


def _is_index(document: dict[str, Any], media_type: str) -> bool:
    """Whether this is an index rather than an image manifest; something that could be both is neither."""
    index, image = "manifests" in document, "layers" in document or "config" in document
    if index == image:
        raise invalid_manifest("needs either manifests, or config and layers")
    expected = {OCI_INDEX: True, DOCKER_LIST: True, OCI_MANIFEST: False, DOCKER_MANIFEST: False}
    if expected.get(media_type, index) != index:
        raise invalid_manifest(f"its members are not those of {media_type}")
    return index


def _parse_index(document: dict[str, Any], media_type: str) -> Manifest:
    children = _descriptors(document, "manifests")
    artifact_type = _optional(document, "artifactType", str)
    return _manifest(document, media_type, artifact_type, children, [])


def _parse_image(document: dict[str, Any], media_type: str) -> Manifest:
    config = _descriptor(document.get("config"), "config")
    layers = _descriptors(document, "layers")
    artifact_type = _optional(document, "artifactType", str) or _optional(config, "mediaType", str)
    foreign = [layer for layer in layers if _is_foreign(layer)]
    local = [config, *(layer for layer in layers if not _is_foreign(layer))]
    return _manifest(document, media_type, artifact_type, local, foreign)


def _manifest(
    document: dict[str, Any],
    media_type: str,
    artifact_type: str | None,
    required: list[dict[str, Any]],
    optional: list[dict[str, Any]],
) -> Manifest:
    subject = document.get("subject")
    annotations = _optional(document, "annotations", dict) or {}
    if not all(isinstance(value, str) for value in annotations.values()):
        raise invalid_manifest("annotations are not all strings")
    return Manifest(
        media_type,
        artifact_type or None,
        None if subject is None else _descriptor(subject, "subject")["digest"],
        annotations,
        tuple(dict.fromkeys(descriptor["digest"] for descriptor in required)),
        tuple(dict.fromkeys(descriptor["digest"] for descriptor in optional)),
    )


def _optional(document: dict[str, Any], member: str, kind: type) -> Any:
    """A member that may be absent or null, but is otherwise of this kind."""
    value = document.get(member)
    if value is not None and not isinstance(value, kind):
        raise invalid_manifest(f"{member} is of the wrong type")
    if isinstance(value, str) and not value.isprintable():
        raise invalid_manifest(f"{member} has characters that cannot be printed")
    return value


def _descriptors(document: dict[str, Any], member: str) -> list[dict[str, Any]]:
    values = document.get(member)
    if not isinstance(values, list):
        raise invalid_manifest(f"{member} is not a list")
    return [_descriptor(value, member) for value in values]


def _descriptor(value: object, member: str) -> dict[str, Any]:
    """A content descriptor (image-spec descriptor.md), its digest and size checked."""
    if not isinstance(value, dict):
        raise invalid_manifest(f"{member} is not a descriptor")
    digest, size = value.get("digest"), value.get("size", 0)
    if not isinstance(digest, str) or not is_digest(digest):
        raise invalid_manifest(f"{member} has a bad digest")
    if type(size) is not int or size < 0:
        raise invalid_manifest(f"{member} has a bad size")
    return value


def _is_foreign(layer: dict[str, Any]) -> bool:
    """Whether clients fetch this layer elsewhere, so that it need not be pushed here."""
    media_type = _optional(layer, "mediaType", str) or ""
    return bool(layer.get("urls")) or "nondistributable" in media_type or "foreign" in media_type


# === Files ============================================================================================


def no_follow(path: str, flags: int) -> int:
    """An opener for open() that follows no link which somebody may have put into the data directory."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_directory(path: str) -> Iterator[None]:
    """Keep other processes, and other threads that ask, from what a directory's lock stands for."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class WriteBehind:
    """Two buffers: while one is filled, the other is written in a thread of its own.

    Hashing and writing on one core, receiving on another: all three let other threads run. The thread is
    started when there is more than one buffer to write; what is in a buffer at the end, also after an
    exception, is written on the way out.
    """

    def __init__(self, write: Callable[[memoryview], None], size: int) -> None:
        """write is called with one buffer of this size after another, and once with what the last one has."""
        self._write = write
        self._size = size
        self._buffer = memoryview(bytearray(size))
        self._other: memoryview | None = None
        self._filled = 0
        self._full: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def free(self) -> memoryview:
        """The part of the buffer to fill next, never empty."""
        return self._buffer[self._filled :]

    def fill(self, count: int) -> None:
        """So many bytes of it are filled. Raises what an earlier write raised."""
        self._filled += count
        if self._filled == self._size:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._thread is None:
            self._other = memoryview(bytearray(self._size))
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()
            self._thread = thread
        else:
            self._wait()
        self._full.put(self._buffer)
        assert self._other is not None
        self._buffer, self._other, self._filled = self._other, self._buffer, 0

    def _run(self) -> None:
        while (data := self._full.get()) is not None:
            try:
                self._write(data)
                self._written.put(None)
            except BaseException as error:
                self._written.put(error)

    def _wait(self) -> None:
        error = self._written.get()
        if error:
            self._written.put(error)
            raise error

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self._thread:
                self._wait()
            if self._filled:
                self._write(self._buffer[: self._filled])
        finally:
            if self._thread:
                self._full.put(None)
                self._thread.join()


class UploadFile:
    """A file under uploads/ that this thread alone may write to, hashed as it grows.

    The lock is the file's own (flock), so it holds between processes and ends with them.
    """

    def __init__(
        self,
        path: str,
        algorithm: str,
        check_space: Callable[[int, int], None],
        *,
        create: bool,
        patience: float = UPLOAD_LOCK_TIMEOUT,
    ) -> None:
        """Raises FileNotFoundError when there is none to open, UPLOAD_BUSY when another has it for longer.

        check_space is asked before the file grows, with its size and by how much, and raises what forbids it.
        """
        self.path = path
        self._check_space = check_space
        self.id = os.path.basename(path)
        mode = "xb+" if create else "rb+"
        self._file: IO[Any] = open(path, mode, buffering=0, opener=no_follow)  # noqa: SIM115
        try:
            self._lock(time.monotonic() + patience)
            self.size = self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise
        self._hash = hashlib.new(algorithm)
        self._hashed = 0
        self._flushed = self.size

    def _lock(self, deadline: float) -> None:
        if fcntl is None:
            return
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RegistryError(ErrorCode.UPLOAD_BUSY) from None
                time.sleep(0.005)  # expire_uploads has it for a moment, or another writer for long
        if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
            raise FileNotFoundError(self.path)  # what was opened became a blob before it was locked

    def append(self, readinto: Callable[[memoryview], int], expected: int | None = None) -> int:
        """Append all that readinto gives until it gives nothing, and return how many bytes that was.

        expected: how many bytes that will be, if it is known. What was received before an exception
        stays in the file.
        """
        self._check_space(self.size, expected or 0)
        self._catch_up()
        start = self.size
        size = BUFFER_SIZE if expected is None else min(expected + 1, BUFFER_SIZE)  # one more: never full
        with WriteBehind(self._write, size) as behind:
            while count := readinto(behind.free):
                behind.fill(count)
        return self.size - start

    def _write(self, data: memoryview) -> None:
        self._check_space(self.size, len(data))
        self._hash.update(data)
        self._hashed += len(data)
        while data:
            written = self._file.write(data) or 0
            self.size += written
            data = data[written:]
        if self.size - self._flushed >= FLUSH_SIZE:
            self._start_flushing()

    def _start_flushing(self) -> None:
        """Have the system begin to write to the disk what sync would else wait for all at once.

        That is what Linux does on this advice, which is about pages that are no longer dirty.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self._file.fileno(), self._flushed, self.size - self._flushed, os.POSIX_FADV_DONTNEED
            )
        self._flushed = self.size

    def _catch_up(self) -> None:
        """Hash what the file has and the running hash has not seen: an earlier process wrote it."""
        if self._hashed == self.size:
            return
        self._hash, self._hashed = hashlib.new(self._hash.name), 0
        self._file.seek(0)
        buffer = memoryview(bytearray(BUFFER_SIZE))
        while count := self._file.readinto(buffer):  # type: ignore[attr-defined]
            self._hash.update(buffer[:count])
            self._hashed += count

    def truncate(self, size: int) -> None:
        """Take back what was appended past this size."""
        self._file.truncate(size)
        self.size = self._file.seek(size)

    def digest(self, algorithm: str) -> str:
        """The digest of all that was written."""
        if self._hash.name != algorithm:
            self._hash, self._hashed = hashlib.new(algorithm), -1
        self._catch_up()
        return f"{algorithm}:{self._hash.hexdigest()}"

    def resume_hash(self, state: tuple[Any, int] | None) -> None:
        """Take over the running hash that hash_state gave for this file earlier."""
        if state and state[0].name == self._hash.name and state[1] == self.size:
            self._hash, self._hashed = state

    def hash_state(self) -> tuple[Any, int]:
        """The running hash and how many bytes it has seen."""
        return self._hash, self._hashed

    def sync(self) -> None:
        """Make the bytes durable."""
        os.fsync(self._file.fileno())

    def is_placed(self) -> bool:
        """Whether these bytes are under blobs/ as well: a crash came before the upload was forgotten."""
        return os.fstat(self._file.fileno()).st_nlink > 1

    def close(self) -> None:
        """Release the lock; the file stays where it is."""
        self._file.close()


class Limits(NamedTuple):
    """How much may be stored, in bytes."""

    max_blob_size: int | None = None
    min_free: int = 0  # of the disk's space


class Files:
    """The content-addressed files of one data directory, and those under upload beside them."""

    def __init__(self, root: str, *, durable: bool, limits: Limits) -> None:
        """durable: whether bytes and names are forced to the disk before they count."""
        self.root = root
        self.durable = durable
        self._limits = limits

    def make_directories(self) -> None:
        """Make the directories that are missing, durably."""
        for directory in ("", "blobs", "blobs/sha256", "blobs/sha512", "uploads"):
            path = os.path.abspath(os.path.join(self.root, directory))
            if not os.path.isdir(path):
                os.makedirs(path, exist_ok=True)
                if self.durable:
                    sync_directory(os.path.dirname(path))

    def path(self, digest: str) -> str:
        """Where the content with this digest is, or would be."""
        algorithm, _, value = digest.partition(":")
        return f"{self.root}/blobs/{algorithm}/{value}"

    def open(self, digest: str, size: int) -> BinaryIO | None:
        """The content, open for reading; None when it is missing or not of this size."""
        try:
            file = open(self.path(digest), "rb", buffering=0, opener=no_follow)  # noqa: SIM115
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR):
                return None
            raise
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        return file

    def place(self, upload: UploadFile, digest: str) -> None:
        """Give an upload whose bytes are durable its digest's name too, durably.

        The upload's own name stays until the upload is forgotten, so that a crash leaves a trace of both.
        A file that is there already is replaced by its equal, which mends a damaged one.
        """
        target = self.path(digest)
        try:
            os.link(upload.path, target)
        except FileExistsError:
            spare = f"{upload.path}.new"
            try:
                os.link(upload.path, spare)
            except OSError:
                spare = upload.path
            os.replace(spare, target)
            with contextlib.suppress(FileNotFoundError):  # it stays if both were the same file already
                os.unlink(f"{upload.path}.new")
        except OSError:  # this file system has no hard links
            os.replace(upload.path, target)
        if self.durable:
            sync_directory(os.path.dirname(target))

    def quarantine(self, digest: str) -> None:
        """Move a damaged content's file to corrupt/."""
        os.makedirs(f"{self.root}/corrupt", exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path(digest), f"{self.root}/corrupt/{digest.replace(':', '-')}")

    def remove(self, digest: str) -> None:
        """Remove the content; no error if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(digest))

    def contents(self) -> Iterator[str]:
        """The digests that all files under blobs/ are named by, in no order."""
        for algorithm in ALGORITHMS:
            with os.scandir(f"{self.root}/blobs/{algorithm}") as entries:
                yield from (f"{algorithm}:{entry.name}" for entry in entries)

    def check_space(self, size: int, more: int) -> None:
        """Raise BLOB_TOO_LARGE or STORAGE_FULL unless an upload of this size may grow by so many bytes."""
        largest = self._limits.max_blob_size
        if largest is not None and size + more > largest:
            raise RegistryError(ErrorCode.BLOB_TOO_LARGE, f"more than {largest} bytes")
        if self._limits.min_free and self.free_space() - more < self._limits.min_free:
            raise RegistryError(ErrorCode.STORAGE_FULL)

    def free_space(self) -> int:
        """How many bytes of the disk are left."""
        return shutil.disk_usage(self.root).free

    def keep_reserve(self) -> None:
        """Have some space set aside, if there is plenty, for release_reserve to give up one day."""
        path = f"{self.root}/reserve"
        if self.durable and not os.path.lexists(path) and self.free_space() > 2 * RESERVE_SIZE:
            with open(path, "wb", buffering=0, opener=no_follow) as file:
                file.write(bytes(RESERVE_SIZE))

    def release_reserve(self) -> None:
        """Give up the space set aside if the disk is full, so that the database can record deletions."""
        if self.free_space() < RESERVE_SIZE:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.root}/reserve")

    def collected_at(self) -> float:
        """When a daemon last collected garbage; now, and noted, if none did."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(f"{self.root}/last-gc").st_mtime
        with contextlib.suppress(OSError):  # the disk may be full
            self.note_collection()
        return time.time()

    def note_collection(self) -> None:
        """Have collected_at say now, whoever asks and when."""
        with open(f"{self.root}/last-gc", "ab", opener=no_follow) as file:
            os.utime(file.fileno())

    def upload_path(self, session: str) -> str:
        """Where an upload session's bytes are; the id is one that new_session_id gave."""
        return f"{self.root}/uploads/{session}"

    def uploads(self) -> list[os.DirEntry[str]]:
        """The files of all uploads under way or left behind."""
        with os.scandir(f"{self.root}/uploads") as entries:
            return list(entries)


class ContentCache:
    """Small immutable contents by digest, up to a number of bytes in all; the oldest go first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._contents: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.get = self._contents.get

    def put(self, digest: str, content: bytes) -> None:
        """Remember a content, forgetting older ones for it."""
        with self._lock:
            if digest in self._contents:
                return
            self._contents[digest] = content
            self._size += len(content)
            while self._size > self._limit:
                self._size -= len(self._contents.pop(next(iter(self._contents))))

    def forget(self, digest: str) -> None:
        """Drop a content that was removed."""
        with self._lock:
            self._size -= len(self._contents.pop(digest, b""))


# === Store ============================================================================================


class Descriptor(NamedTuple):
    """A content of a repository: image-spec's descriptor, as far as a reply needs it."""

    media_type: str
    digest: str
    size: int  # bytes


class Referrer(NamedTuple):
    """A manifest that names another as its subject, as the referrers list shows it."""

    descriptor: Descriptor
    artifact_type: str | None
    annotations: str  # a JSON object


def hashed_name(name: str) -> str:
    """What stands for a repository in the names of its upload sessions."""
    return hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]


class Generation:
    """A value that changes with every commit of any process on a data directory.

    It is in a file that all of them map, so that looking at it costs next to nothing.
    """

    def __init__(self, path: str, *, read_only: bool) -> None:
        self._map: mmap.mmap | None = None
        self._read_only = read_only
        if read_only and not os.path.exists(path):
            return  # nothing changes, then, or nobody says so: lookups are kept for LOOKUP_LIFETIME
        with open(path, "rb" if read_only else "ab+", buffering=0, opener=no_follow) as file:
            if os.fstat(file.fileno()).st_size < GENERATION_SIZE:
                file.write(bytes(GENERATION_SIZE))
            access = mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE
            self._map = mmap.mmap(file.fileno(), GENERATION_SIZE, access=access)

    def get(self) -> bytes:
        """The current value."""
        return self._map[:] if self._map else b""

    def change(self) -> None:
        """Something was committed: after that, and before anybody is told."""
        if self._map and not self._read_only:
            self._map[:] = secrets.token_bytes(GENERATION_SIZE)

    def close(self) -> None:
        """Unmap the file."""
        if self._map:
            self._map.close()


class Batch:
    """Transactions that share one commit."""

    def __init__(self, durable: bool) -> None:
        self.durable = durable
        self.parts = 0  # how many are complete
        self.ended = False
        self.error: BaseException | None = None  # why none of them counts


class Store:
    """Repositories on disk: what clients push, and what they may pull.

    All methods may be called from any thread, and several processes may have stores on one data
    directory. Errors of the caller's making are RegistryErrors; the rest are OSError and sqlite3.Error.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        sparse: bool = False,
        durable: bool = True,
        read_only: bool = False,
        limits: Limits | None = None,
    ) -> None:
        """Open a data directory, made if missing. Raises StartupError when that cannot be.

        sparse: accept manifests whose layers, and indexes whose children, are absent.
        durable: what was acknowledged survives a power cut.
        read_only: change nothing, not even what is kept of pulls; the medium may be read-only too.
        """
        self.sparse = sparse
        self.read_only = read_only
        self.files = Files(os.fspath(root), durable=durable, limits=limits or Limits())
        self._path = os.path.join(self.files.root, "registry.db")
        self._cache = ContentCache(CACHE_SIZE)
        self._hashes: dict[str, tuple[Any, int]] = {}  # running hashes of sessions between requests
        self._pulled: dict[tuple[str, str], int] = {}  # when manifests were pulled, not yet recorded
        self._readers: list[sqlite3.Connection] = []  # idle connections; a stack, so that few stay warm
        self._lookups: dict[tuple[object, ...], tuple[bytes, float, list[Any]]] = {}
        self._write_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._batch: Batch | None = None  # the transaction under way; guarded by the write lock
        self._synchronous = ""
        if not read_only:
            self.files.make_directories()
            self.files.release_reserve()
        self._writer = self._connect()
        try:
            self._prepare()
            self._generation = Generation(f"{self.files.root}/generation", read_only=read_only)
        except BaseException:
            self._writer.close()
            raise
        self._generation.change()  # a process that was killed may have owed this

    def _connect(self) -> sqlite3.Connection:
        """A connection. On a medium that nobody can write to, it takes no locks, which would be files."""
        mode = "ro" if self.read_only else "rwc"
        if (
            self.read_only
            and not os.access(self.files.root, os.W_OK)
            and not os.path.exists(f"{self._path}-wal")
        ):
            mode = "ro&immutable=1"
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(os.path.abspath(self._path)))}?mode={mode}",
            uri=True,
            timeout=DATABASE_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _prepare(self) -> None:
        """Bring the database to the format of schema.sql, or refuse one from a newer registry."""
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version > FORMAT_VERSION:
            raise StartupError(
                f"{self._path} has format {version}, and this registry.py knows {FORMAT_VERSION}: "
                "run the newer registry.py that made it"
            )
        if self.read_only:
            return
        with locked_directory(self.files.root):  # nobody waits for a database that is being made
            self._make_database(version)
        self.files.keep_reserve()

    def _make_database(self, version: int) -> None:
        self._set_synchronous(durable=True)
        self._writer.execute("PRAGMA journal_mode = WAL")
        if version < FORMAT_VERSION:
            try:
                schema = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
            except FileNotFoundError:
                raise StartupError("schema.sql is missing; it has to lie beside registry.py") from None
            self._writer.executescript(f"BEGIN IMMEDIATE;\n{schema}\nCOMMIT;")

    def close(self) -> None:
        """Close the database. No other method may be running or be called again."""
        self.flush_pulls()
        for connection in (*self._readers, self._writer):
            connection.close()
        self._generation.close()

    # --- SQL

    def query(self, sql: str, *parameters: object) -> list[Any]:
        """The rows of one query, from a pooled connection."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self._connect()
        try:
            return connection.execute(sql, parameters).fetchall()
        finally:
            self._readers.append(connection)

    def query_cached(self, sql: str, *parameters: object) -> list[Any]:
        """The rows of one query, remembered until something is committed by whatever process."""
        key = (sql, *parameters)
        generation, now = self._generation.get(), time.monotonic()
        known = self._lookups.get(key)
        if known and known[0] == generation and known[1] > now:
            return known[2]
        rows = self.query(sql, *parameters)
        if len(self._lookups) >= LOOKUP_LIMIT:
            self._lookups.clear()
        if rows and sum(len(cell) for row in rows for cell in row if isinstance(cell, str)) <= LOOKUP_SIZE:
            self._lookups[key] = generation, now + LOOKUP_LIFETIME, rows
        return rows

    def backup(self, path: str) -> None:
        """Copy the database to a file, beside whoever writes to it."""
        with contextlib.closing(sqlite3.connect(path)) as copy, contextlib.closing(self._connect()) as source:
            source.backup(copy)

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """SQLite's write lock, held against other threads and processes alike; committed when this returns.

        Threads that come while another one's commit waits for the disk share the next one. durable: whether
        this one is to wait for the disk.
        """
        with self._write_lock:
            batch = self._join_batch(durable)
            self._writer.execute("SAVEPOINT part")
            try:
                yield self._writer
                self._writer.execute("RELEASE part")
                batch.parts += 1
            except BaseException as error:
                self._abandon_part(batch, error)
                raise
        with self._commit_lock:
            if not batch.ended:
                with self._write_lock:
                    self._end_batch("COMMIT")
        if batch.error:
            raise type(batch.error)(*batch.error.args) from batch.error

    @contextlib.contextmanager
    def exclusive(self, *, durable: bool = True, dry_run: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction that nothing else is part of, for what removes things.

        It may use the reserve, so that a full disk can be emptied. dry_run: undo it instead of committing it.
        """
        with self._write_lock:
            self.files.release_reserve()
            self._end_batch("COMMIT")
            self._set_synchronous(durable=durable)
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("ROLLBACK" if dry_run else "COMMIT")
                self._generation.change()
            except BaseException:
                self._roll_back()
                raise

    def _join_batch(self, durable: bool) -> Batch:
        """The transaction that is under way, or a new one."""
        if self._batch and durable and not self._batch.durable:
            self._end_batch("COMMIT")
        if self._batch is None:
            self._set_synchronous(durable=durable)
            self._writer.execute("BEGIN IMMEDIATE")
            self._batch = Batch(durable)
        return self._batch

    def _abandon_part(self, batch: Batch, error: BaseException) -> None:
        if not self._writer.in_transaction:  # for want of space, SQLite has undone the other parts too
            self._batch, batch.ended, batch.error = None, True, error
            return
        self._writer.execute("ROLLBACK TO part")
        self._writer.execute("RELEASE part")
        if not batch.parts:
            self._end_batch("ROLLBACK")

    def _end_batch(self, how: str) -> None:
        """Commit or roll back the transaction under way, if any; its threads find out what came of it."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        batch.ended = True
        try:
            self._writer.execute(how)
            self._generation.change()
        except sqlite3.Error as error:
            batch.error = error
            self._roll_back()

    def _roll_back(self) -> None:
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK")

    def _set_synchronous(self, *, durable: bool) -> None:
        """Whether commits wait for the disk: FULL does, NORMAL leaves it to the next checkpoint."""
        level = ("FULL" if durable else "NORMAL") if self.files.durable else "OFF"
        if level != self._synchronous:
            self._writer.execute(f"PRAGMA synchronous = {level}")
            self._synchronous = level

    @contextlib.contextmanager
    def _placed(self, upload: UploadFile, digest: str) -> Iterator[sqlite3.Connection]:
        """A transaction for the rows of a content that is on disk under its digest by then.

        It is put there before, so that others need not wait for that; should it have been collected until
        the transaction begins, that is done again. If the transaction fails, the file goes unless it has a
        row: others who are about to give it one look first.
        """
        self.files.place(upload, digest)
        try:
            with self.transaction() as db:
                if not os.path.exists(self.files.path(digest)):
                    self.files.place(upload, digest)
                yield db
        except BaseException:
            with self.exclusive(dry_run=True) as db:
                if not db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchall():
                    self.files.remove(digest)
            raise

    def _require_repository(self, name: str) -> int:
        """A repository's id. Raises NAME_UNKNOWN."""
        rows = self.query_cached("SELECT id FROM repositories WHERE name = ?", name)
        if not rows:
            raise RegistryError(ErrorCode.NAME_UNKNOWN, name)
        return int(rows[0][0])

    @staticmethod
    def _link(db: sqlite3.Connection, name: str, digest: str, size: int) -> int:
        """Record a content that is on disk, and that a repository serves it. Returns the repository's id."""
        db.execute("INSERT INTO repositories (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
        db.execute(
            "INSERT INTO blobs (digest, size) VALUES (?, ?)"
            " ON CONFLICT (digest) DO UPDATE SET size = excluded.size WHERE size <> excluded.size",
            (digest, size),
        )
        ((repository,),) = db.execute("SELECT id FROM repositories WHERE name = ?", (name,))
        db.execute(
            "INSERT OR IGNORE INTO repository_blobs (repository_id, digest, leased_at) VALUES (?, ?, 0)",
            (repository, digest),
        )
        Store._renew_lease(db, repository, digest)
        return int(repository)

    @staticmethod
    def _renew_lease(db: sqlite3.Connection, repository: int, digest: str) -> bool:
        """Note that a client now knows that a content is here; whether it is."""
        sql = "UPDATE repository_blobs SET leased_at = ? WHERE repository_id = ? AND digest = ?"
        return db.execute(sql, (int(time.time()), repository, digest)).rowcount > 0

    def _lease(self, repository: int, digest: str, leased_at: int) -> bool:
        """Let a client rely on a content that it is being told of; whether the content is still here.

        On a full disk that cannot be recorded. The answer stands all the same: it serves pulls, and
        nothing can be pushed anyway.
        """
        if self.read_only or time.time() - leased_at < LEASE_SLACK:
            return True
        try:
            with self.transaction(durable=False) as db:
                return self._renew_lease(db, repository, digest)
        except (OSError, sqlite3.OperationalError) as error:
            if is_out_of_space(error):
                return True
            raise

    # --- Contents

    def open_content(self, descriptor: Descriptor) -> bytes | BinaryIO | None:
        """A content: bytes when it is small, else an open file; None when the disk has lost it."""
        content = self._cache.get(descriptor.digest)
        if content is not None:
            return content
        file = self.files.open(descriptor.digest, descriptor.size)
        if file is None or descriptor.size > SMALL_CONTENT:
            return file
        with file:
            content = file.read()
        if digest_of(content, algorithm_of(descriptor.digest)) != descriptor.digest:
            return None  # what is remembered must be right, since nobody looks at the file again
        self._cache.put(descriptor.digest, content)
        return content

    def blob(self, name: str, digest: str, *, lease: bool = False) -> Descriptor:
        """A blob that the repository is linked to. Raises BLOB_UNKNOWN.

        lease: garbage collection shall leave it alone for the grace period.
        """
        rows = self.query_cached(
            "SELECT b.size, l.repository_id, l.leased_at FROM repositories r"
            " JOIN repository_blobs l ON l.repository_id = r.id JOIN blobs b ON b.digest = l.digest"
            " WHERE r.name = ? AND l.digest = ?",
            name,
            digest,
        )
        if not rows or (lease and not self._lease(rows[0][1], digest, rows[0][2])):
            raise RegistryError(ErrorCode.BLOB_UNKNOWN, digest)
        return Descriptor(OCTET_STREAM, digest, rows[0][0])

    def delete_blob(self, name: str, digest: str) -> None:
        """Unlink a blob from a repository; its file goes with its last link.

        Raises BLOB_UNKNOWN, or STILL_NEEDED while a manifest of the repository needs it or is it.
        """
        with self.exclusive() as db:
            rows = db.execute(
                "SELECT l.repository_id, l.needed_by FROM repositories r"
                " JOIN repository_blobs l ON l.repository_id = r.id WHERE r.name = ? AND l.digest = ?",
                (name, digest),
            ).fetchall()
            if not rows:
                raise RegistryError(ErrorCode.BLOB_UNKNOWN, digest)
            ((repository, needed_by),) = rows
            if needed_by:
                raise RegistryError(ErrorCode.STILL_NEEDED, digest)
            self.unlink(db, repository, digest)
        self.remove_pending()

    @staticmethod
    def unlink(db: sqlite3.Connection, repository: int, digest: str) -> None:
        """Drop a link and all that hangs on it; a blob's row goes with its last link (schema.sql)."""
        db.execute(
            "DELETE FROM repository_blobs WHERE repository_id = ? AND digest = ?", (repository, digest)
        )

    def drop_content(self, db: sqlite3.Connection, digest: str) -> None:
        """Within a transaction: forget a content in every repository, so that clients push it again.

        What a manifest among them needed is left alone for the grace period, to be found by that push.
        """
        db.execute(
            "UPDATE repository_blobs SET leased_at = ? WHERE (repository_id, digest) IN"
            " (SELECT repository_id, child FROM manifest_references WHERE manifest = ?)",
            (int(time.time()), digest),
        )
        db.execute("DELETE FROM repository_blobs WHERE digest = ?", (digest,))
        self._cache.forget(digest)

    def remove_pending(self) -> None:
        """Remove the files whose rows are gone: under the write lock, so that no push brings one back."""
        while self._remove_some_pending() == BATCH:
            pass

    def _remove_some_pending(self) -> int:
        with self.exclusive(durable=False) as db:
            rows = db.execute("SELECT digest FROM pending_deletes LIMIT ?", (BATCH,)).fetchall()
            for (digest,) in rows:
                self._cache.forget(digest)
                self.files.remove(digest)
            db.executemany("DELETE FROM pending_deletes WHERE digest = ?", rows)
        return len(rows)

    def mount(self, name: str, digest: str, source: str) -> bool:
        """Link a blob of another repository to this one; False when the source does not have it."""
        try:
            blob = self.blob(source, digest)
        except RegistryError:
            return False
        file = self.files.open(digest, blob.size)
        if file is None:
            return False
        file.close()
        with self.transaction() as db:
            if not self._is_linked(db, source, digest):
                return False
            self._link(db, name, digest, blob.size)
        return True

    @staticmethod
    def _is_linked(db: sqlite3.Connection, name: str, digest: str) -> bool:
        sql = (
            "SELECT 1 FROM repositories r JOIN repository_blobs l ON l.repository_id = r.id"
            " WHERE r.name = ? AND l.digest = ?"
        )
        return bool(db.execute(sql, (name, digest)).fetchall())

    def repositories_with(self, digest: str) -> list[str]:
        """The names of the repositories that are linked to a blob."""
        rows = self.query(
            "SELECT r.name FROM repository_blobs l JOIN repositories r ON r.id = l.repository_id"
            " WHERE l.digest = ? ORDER BY r.name",
            digest,
        )
        return [name for (name,) in rows]

    # --- Uploads

    @contextlib.contextmanager
    def new_upload(self, algorithm: str) -> Iterator[UploadFile]:
        """A file to receive one content at once; gone afterwards unless it was made a blob."""
        upload = self._create_upload(algorithm)
        try:
            yield upload
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(upload.path)
            upload.close()

    def _create_upload(self, algorithm: str) -> UploadFile:
        """A new upload file. One that expire_uploads finds before it is locked may be gone: try again."""
        while True:
            path = self.files.upload_path(secrets.token_hex(16))
            with contextlib.suppress(FileNotFoundError, RegistryError):
                return UploadFile(path, algorithm, self.files.check_space, create=True)

    def start_session(self, name: str, algorithm: str) -> str:
        """Open an upload session of a repository, empty, and return its id."""
        self.files.check_space(0, 0)
        upload = self._create_upload(algorithm)
        try:
            with self.transaction(durable=False) as db:
                db.execute("INSERT INTO uploads VALUES (?, ?, ?)", (upload.id, name, algorithm))
        except BaseException:
            os.unlink(upload.path)
            raise
        finally:
            upload.close()
        return upload.id

    @contextlib.contextmanager
    def session(self, name: str, session: str) -> Iterator[UploadFile]:
        """An upload session to write to; one that there is no room for is dropped.

        Raises BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY.
        """
        upload = self._open_session(session, self._session_algorithm(name, session))
        upload.resume_hash(self._hashes.pop(session, None))
        try:
            yield upload
        except Exception as error:
            if is_out_of_space(error):
                self._delete_upload(upload)
            raise
        finally:
            if os.path.exists(upload.path):
                self._hashes[session] = upload.hash_state()
            upload.close()

    def _open_session(
        self, session: str, algorithm: str, patience: float = UPLOAD_LOCK_TIMEOUT
    ) -> UploadFile:
        path = self.files.upload_path(session)
        try:
            return UploadFile(path, algorithm, self.files.check_space, create=False, patience=patience)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session) from None
            raise

    def _session_algorithm(self, name: str, session: str) -> str:
        rows = self.query("SELECT algorithm FROM uploads WHERE id = ? AND repository = ?", session, name)
        if not rows:
            raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session)
        return str(rows[0][0])

    def session_size(self, name: str, session: str) -> int:
        """How many bytes an upload session has, also while they are coming. Raises BLOB_UPLOAD_UNKNOWN."""
        self._session_algorithm(name, session)
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(self.files.upload_path(session))
            if stat.S_ISREG(status.st_mode):
                return status.st_size
        raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session)

    def cancel_session(self, name: str, session: str) -> None:
        """End an upload session and drop its bytes. Raises BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY."""
        with self.session(name, session) as upload:
            self._delete_upload(upload)

    def _delete_upload(self, upload: UploadFile) -> None:
        """Drop an upload, and what a crash may have left of it under blobs/.

        Its file goes first, which frees the room that recording it may need: a session without one is none.
        """
        self._unplace(upload)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(upload.path)
        with self.exclusive(durable=False) as db:
            db.execute("DELETE FROM uploads WHERE id = ?", (upload.id,))

    def _unplace(self, upload: UploadFile) -> None:
        """Take back a name under blobs/ that a crash left before it was recorded."""
        if not upload.is_placed():
            return
        with self.exclusive(durable=False) as db:
            for algorithm in ALGORITHMS:
                db.execute(
                    "INSERT INTO pending_deletes SELECT :digest WHERE NOT EXISTS"
                    " (SELECT 1 FROM blobs WHERE digest = :digest) ON CONFLICT DO NOTHING",
                    {"digest": upload.digest(algorithm)},
                )
        self.remove_pending()

    def finish_upload(self, name: str, upload: UploadFile, digest: str) -> None:
        """Make an upload the repository's blob of this digest, durably.

        Raises DIGEST_INVALID, and drops the upload, when its bytes have another digest.
        """
        self._check_and_sync(upload, digest)
        with self._placed(upload, digest) as db:
            self._link(db, name, digest, upload.size)
            db.execute("DELETE FROM uploads WHERE id = ?", (upload.id,))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(upload.path)

    def _check_and_sync(self, upload: UploadFile, digest: str) -> None:
        """Check an upload's bytes against their digest and make them durable."""
        actual = upload.digest(algorithm_of(digest))
        if actual != digest:
            self._delete_upload(upload)
            raise RegistryError(ErrorCode.DIGEST_INVALID, f"content is {actual}, not {digest}")
        if self.files.durable:
            upload.sync()

    def expire_uploads(self, lifetime: float = UPLOAD_LIFETIME) -> None:
        """Drop upload sessions idle for so many seconds, and what a crash left behind of any upload.

        An upload that is being written to is left alone.
        """
        oldest = time.time() - lifetime
        entries = self.files.uploads()  # before the rows: so each has one that will ever have
        sessions = {session for (session,) in self.query("SELECT id FROM uploads")}
        present = [entry.name for entry in entries if _may_be_stale(entry, sessions, oldest)]
        absent = [session for session in sessions if not os.path.exists(self.files.upload_path(session))]
        if absent:
            with self.exclusive(durable=False) as db:
                db.executemany("DELETE FROM uploads WHERE id = ?", [(session,) for session in absent])
        for session in [session for session in list(self._hashes) if session not in sessions]:
            self._hashes.pop(session, None)  # another process has finished it
        for session in present:
            with contextlib.suppress(RegistryError):  # it is being written to, or was finished just now
                self._expire(session, oldest)

    def _expire(self, session: str, oldest: float) -> None:
        upload = self._open_session(session, "sha256", patience=0.0)
        try:  # only now that it is locked can it be told whether it is abandoned
            known = self.query("SELECT 1 FROM uploads WHERE id = ?", session)
            if known and os.stat(upload.path).st_mtime >= oldest:
                self._unplace(upload)
            else:
                self._hashes.pop(session, None)
                self._delete_upload(upload)
        finally:
            upload.close()

    def pushed_to(self, since: float) -> set[str]:
        """The repositories with upload sessions that were written to since then, as hashed_name has them."""
        names = dict(self.query("SELECT id, repository FROM uploads"))
        recent = set()
        for entry in self.files.uploads():
            with contextlib.suppress(FileNotFoundError):
                if entry.name in names and entry.stat(follow_symlinks=False).st_mtime >= since:
                    recent.add(hashed_name(names[entry.name]))
        return recent

    # --- Manifests

    def manifest(self, name: str, reference: str, *, lease: bool = False) -> Descriptor:
        """A manifest by tag or digest. Raises MANIFEST_UNKNOWN, NAME_UNKNOWN.

        lease: garbage collection shall leave it alone for the grace period.
        """
        if is_digest(reference):
            source, column = "manifests m", "m.digest"
        else:
            source = "tags t JOIN manifests m ON m.repository_id = t.repository_id AND m.digest = t.digest"
            column = "t.name"
        alias = column[0]
        rows = self.query_cached(
            f"SELECT m.media_type, m.digest, b.size, l.repository_id, l.leased_at FROM {source}"
            " JOIN blobs b ON b.digest = m.digest"
            " JOIN repository_blobs l ON l.repository_id = m.repository_id AND l.digest = m.digest"
            f" WHERE {alias}.repository_id = (SELECT id FROM repositories WHERE name = ?) AND {column} = ?",
            name,
            reference,
        )
        if not rows:
            self._require_repository(name)
            raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {reference}")
        media_type, digest, size, repository, leased_at = rows[0]
        if lease and not self._lease(repository, digest, leased_at):
            raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {reference}")
        return Descriptor(media_type, digest, size)

    def note_pull(self, name: str, digest: str) -> None:
        """Remember, until flush_pulls, that a manifest was pulled now."""
        if not self.read_only:
            self._pulled[name, digest] = int(time.time())

    def flush_pulls(self) -> None:
        """Record what was pulled since the last time. On a full disk that waits."""
        pulled, self._pulled = self._pulled, {}
        if not pulled:
            return
        rows = [(moment, name, digest) for (name, digest), moment in pulled.items()]
        try:
            with self.transaction(durable=False) as db:
                db.executemany(
                    "UPDATE manifests SET pulled_at = ?"
                    " WHERE repository_id = (SELECT id FROM repositories WHERE name = ?) AND digest = ?",
                    rows,
                )
        except (OSError, sqlite3.OperationalError) as error:
            if not is_out_of_space(error):
                raise
            self._pulled = {**pulled, **self._pulled}

    def put_manifest(
        self, name: str, manifest: Manifest, content: bytes, digest: str, tags: Iterable[str]
    ) -> None:
        """Store a parsed manifest under its digest, durably, and point tags at it.

        Raises DIGEST_INVALID, and MANIFEST_BLOB_UNKNOWN with each digest that is required and absent.
        """
        with self.new_upload(algorithm_of(digest)) as upload:
            upload.append(io.BytesIO(content).readinto, len(content))
            self._check_and_sync(upload, digest)
            with self._placed(upload, digest) as db:
                self._require_references(db, name, manifest)
                repository = self._link(db, name, digest, len(content))
                self._record_manifest(db, repository, digest, manifest)
                db.executemany(
                    "INSERT INTO tags VALUES (?, ?, ?)"
                    " ON CONFLICT (repository_id, name) DO UPDATE SET digest = excluded.digest",
                    [(repository, tag, digest) for tag in tags],
                )

    def _require_references(self, db: sqlite3.Connection, name: str, manifest: Manifest) -> None:
        if self.sparse:
            return
        missing = [digest for digest in manifest.required if not self._is_linked(db, name, digest)]
        if missing:
            raise RegistryError(ErrorCode.MANIFEST_BLOB_UNKNOWN, *missing[:DETAIL_LIMIT])

    def _record_manifest(
        self, db: sqlite3.Connection, repository: int, digest: str, manifest: Manifest
    ) -> None:
        """Pushed again, a manifest whose body names no media type may bring another one."""
        annotations = json.dumps(manifest.annotations) if manifest.annotations else None
        about = (manifest.media_type, manifest.artifact_type, manifest.subject, annotations)
        now = int(time.time())
        db.execute(
            "INSERT INTO manifests VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (repository_id, digest) DO UPDATE SET media_type = excluded.media_type,"
            " pushed_at = excluded.pushed_at, pulled_at = excluded.pulled_at",
            (repository, digest, *about, now, now),
        )
        needs = dict.fromkeys(manifest.optional, False)
        needs.update(dict.fromkeys(manifest.required, not self.sparse))
        needs[digest] = True
        db.executemany(
            "INSERT OR IGNORE INTO manifest_references VALUES (?, ?, ?, ?)",
            [(repository, digest, child, required) for child, required in needs.items()],
        )

    def delete_tag(self, name: str, tag: str) -> None:
        """Remove a tag and nothing else. Raises MANIFEST_UNKNOWN, NAME_UNKNOWN."""
        repository = self._require_repository(name)
        with self.exclusive() as db:
            deleted = db.execute("DELETE FROM tags WHERE repository_id = ? AND name = ?", (repository, tag))
            if not deleted.rowcount:
                raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {tag}")

    def delete_manifest(self, name: str, digest: str) -> None:
        """Remove a manifest and its tags. Raises MANIFEST_UNKNOWN, NAME_UNKNOWN, STILL_NEEDED."""
        repository = self._require_repository(name)
        with self.exclusive() as db:
            rows = db.execute(
                "SELECT l.needed_by FROM manifests m JOIN repository_blobs l USING (repository_id, digest)"
                " WHERE m.repository_id = ? AND m.digest = ?",
                (repository, digest),
            ).fetchall()
            if not rows:
                raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {digest}")
            if rows[0][0] > 1:  # by an index, and not just by itself
                raise RegistryError(ErrorCode.STILL_NEEDED, digest)
            self.unlink(db, repository, digest)
        self.remove_pending()

    # --- Listings

    def tags(self, name: str, last: str, limit: int) -> list[str]:
        """Up to so many tags after one, in byte order. Raises NAME_UNKNOWN."""
        repository = self._require_repository(name)
        sql = "SELECT name FROM tags WHERE repository_id = ? AND name > ? ORDER BY name LIMIT ?"
        return [tag for (tag,) in self.query_cached(sql, repository, last, limit)]

    def repositories(self, last: str, limit: int) -> list[str]:
        """Up to so many repositories after one, in byte order."""
        sql = "SELECT name FROM repositories WHERE name > ? ORDER BY name LIMIT ?"
        return [name for (name,) in self.query_cached(sql, last, limit)]

    def referrers(
        self, name: str, subject: str, artifact_type: str | None, last: str, limit: int
    ) -> list[Referrer]:
        """Up to so many manifests that refer to a subject, after one, by digest; the subject may be absent.

        What clients without the referrers API listed in the index tagged <algorithm>-<hex> counts too.
        """
        rows = self.query_cached(
            "WITH repository (id) AS (SELECT id FROM repositories WHERE name = ?), referrers (digest) AS ("
            " SELECT m.digest FROM repository r JOIN manifests m ON m.repository_id = r.id AND m.subject = ?"
            " UNION SELECT c.child FROM repository r"
            " JOIN tags t ON t.repository_id = r.id AND t.name = ?"
            " JOIN manifest_references c ON c.repository_id = r.id AND c.manifest = t.digest"
            "  AND c.child <> c.manifest)"
            " SELECT m.media_type, m.digest, b.size, m.artifact_type, m.annotations FROM repository r"
            " JOIN referrers JOIN manifests m ON m.repository_id = r.id AND m.digest = referrers.digest"
            " JOIN blobs b ON b.digest = m.digest"
            " WHERE m.digest > ? AND (? IS NULL OR m.artifact_type = ?) ORDER BY m.digest LIMIT ?",
            name,
            subject,
            subject.replace(":", "-"),
            last,
            artifact_type,
            artifact_type,
            limit,
        )
        return [Referrer(Descriptor(*row[:3]), row[3], row[4] or "{}") for row in rows]


def _may_be_stale(entry: os.DirEntry[str], sessions: set[str], oldest: float) -> bool:
    """Whether an upload file looks abandoned, or as if a crash came while it was made a blob."""
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return entry.name not in sessions or status.st_mtime < oldest or status.st_nlink > 1


# === Maintenance ======================================================================================


class Policy(NamedTuple):
    """What garbage collection may remove besides blobs that no manifest needs."""

    grace: float = GRACE  # seconds for which a client can rely on what it was told
    untagged_after: float | None = None  # seconds after which untagged manifests go; None: never
    keep_last: int = 0  # of each repository's untagged images, whatever their age
    max_size: int | None = None  # bytes; above that the least recently pulled manifests go


class Removal(NamedTuple):
    """Something that garbage collection removed, or would remove."""

    kind: str  # "manifest", "blob", or "file": one that a crash left under blobs/ without a row
    repository: str  # empty for a file
    digest: str
    size: int  # bytes that the disk gets back: 0 while another repository has the blob


Link = tuple[int, str, str]  # a repository, a digest, and the repository's name
T = TypeVar("T")


class Collector:
    """One run of garbage collection, beside whoever else uses the store.

    A manifest stays while a tag, a lease, an index that lists it or its subject keeps it. What the policy
    lets go is chosen by queries without a lock, and removed a batch at a time under the write lock, with
    what only it kept, unless something keeps it by then. Blobs that no manifest needs are unlinked once
    nobody was told of them for the grace period.
    """

    _KEEPERS = (  # what keeps a manifest
        "SELECT manifest FROM manifest_references"
        "  WHERE repository_id = :repository AND child = :digest AND manifest <> :digest"
        " UNION ALL SELECT s.digest FROM manifests m"
        "  JOIN manifests s ON s.repository_id = m.repository_id AND s.digest = m.subject"
        "  WHERE m.repository_id = :repository AND m.digest = :digest"
        " UNION ALL SELECT 'a lease' FROM repository_blobs"
        "  WHERE repository_id = :repository AND digest = :digest AND leased_at >= :before"
        " UNION ALL SELECT name FROM tags"
        "  WHERE repository_id = :repository AND digest = :digest AND NOT :tagged LIMIT :limit + 1"
    )
    _KEPT = (  # what a manifest keeps
        "SELECT m.digest FROM manifest_references c"
        " JOIN manifests m ON m.repository_id = c.repository_id AND m.digest = c.child"
        " WHERE c.repository_id = :repository AND c.manifest = :digest"
        " UNION SELECT digest FROM manifests"
        "  WHERE repository_id = :repository AND subject = :digest LIMIT :limit"
    )
    # Manifests that no other one keeps. An index with a subject is among them all the same, since what it
    # lists may be its subject, or what its subject refers to: such a circle goes as one.
    _TOPMOST = (
        " FROM manifests m CROSS JOIN repository_blobs l USING (repository_id, digest)"
        " WHERE l.needed_by = 1 AND (NOT EXISTS (SELECT 1 FROM manifests s"
        "  WHERE s.repository_id = m.repository_id AND s.digest = m.subject)"
        " OR EXISTS (SELECT 1 FROM manifest_references c"
        "  JOIN manifests k ON k.repository_id = c.repository_id AND k.digest = c.child"
        "  WHERE c.repository_id = m.repository_id AND c.manifest = m.digest AND c.child <> c.manifest))"
    )

    def __init__(
        self,
        store: Store,
        policy: Policy,
        report: Callable[[Removal], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """report is called with each removal once it is committed.

        stopped is asked before each batch whether to leave it at that.
        """
        self._store = store
        self._files = store.files  # in a dry run, too
        self._policy = policy
        self._report = report
        self._stopped = stopped
        now = time.time()
        slack = LEASE_SLACK if policy.grace else 0.0  # without grace, nobody relies on anything
        self._leased_before = int(now - policy.grace - slack)
        self._pushing: set[int | str] = set()  # repositories that a push is under way to
        if policy.grace:
            recently = now - min(PUSH_PAUSE, policy.grace)
            sql = (
                "SELECT DISTINCT repository_id FROM repository_blobs"
                " WHERE needed_by = 0 AND leased_at BETWEEN ? AND ?"
            )
            self._pushing.update(*store.query(sql, int(recently), now + CLOCK_SLACK))
            self._pushing |= store.pushed_to(now - policy.grace)
        self._removed: list[Removal] = []  # by the batch under way
        self._needed_size = 0  # bytes that manifests need, in _shrink
        self._counts = {"manifest": 0, "blob": 0, "file": 0}
        self._freed = 0

    def expected(self, *, walk: bool) -> int:
        """About how much there is to look at: the policy may let more go."""
        sql = "SELECT count(*) FROM repository_blobs WHERE needed_by = 0 AND leased_at < ?"
        ((count,),) = self._store.query(sql, self._leased_before)
        return int(count) + (int(self._store.query("SELECT count(*) FROM blobs")[0][0]) if walk else 0)

    def summary(self) -> str:
        """What was removed, in a few words; none if that is nothing."""
        manifests, blobs = self._counts["manifest"], self._counts["blob"] + self._counts["file"]
        return f"{manifests} manifests and {blobs} blobs, {self._freed} bytes" if manifests + blobs else ""

    def run(
        self,
        *,
        walk: bool = False,
        dry_run: bool = False,
        advance: Callable[[int], None] = lambda _count: None,
    ) -> None:
        """Collect; in a dry run only report, from a copy of the database.

        walk: also remove files under blobs/ that a crash left without a row. advance is called with how
        much was looked at.
        """
        self._advance = advance
        self._store.flush_pulls()
        with contextlib.ExitStack() as resources:
            if dry_run:
                directory = resources.enter_context(tempfile.TemporaryDirectory(prefix="registry-gc-"))
                self._store.backup(f"{directory}/registry.db")
                self._store = Store(directory, durable=False)
                resources.callback(self._store.close)
            self._store.remove_pending()
            self._mend_times()
            if self._policy.untagged_after is not None:
                self._drop_untagged(self._policy.untagged_after)
            self._sweep()
            if self._policy.max_size is not None:
                self._shrink(self._policy.max_size)
            if walk:
                self._walk()
            self._store.files.keep_reserve()

    def _choose(self, sql: str, *parameters: object) -> list[Any]:
        """Some rows of what may go; none once this is to stop."""
        return [] if self._stopped() else self._store.query(f"{sql} LIMIT {CHOICE}", *parameters)

    def _each(self, items: Iterator[T], act: Callable[[sqlite3.Connection, T], None]) -> None:
        """Act on each item, a batch at a time under the write lock, and report what that removed."""
        item = next(items, None)
        while item is not None and not self._stopped():
            with self._store.exclusive() as db:
                for _ in range(BATCH):
                    act(db, item)
                    item = next(items, None)
                    if item is None or len(self._removed) >= BATCH:
                        break
            self._store.remove_pending()
            for removal in self._removed:
                self._counts[removal.kind] += 1
                self._freed += removal.size
                self._report(removal)
            self._removed.clear()

    def _mend_times(self) -> None:
        """Have what was stored while the clock was ahead be as old as if that were now."""
        now = int(time.time())

        def mend(db: sqlite3.Connection, row: tuple[int, str]) -> None:
            key = "WHERE repository_id = ? AND digest = ?"
            db.execute(f"UPDATE repository_blobs SET leased_at = min(leased_at, {now}) {key}", row)
            sql = f"UPDATE manifests SET pushed_at = min(pushed_at, {now}), pulled_at = min(pulled_at, {now})"
            db.execute(f"{sql} {key}", row)

        sql = (
            "SELECT repository_id, digest FROM repository_blobs WHERE needed_by = 0 AND leased_at > ?"
            " UNION SELECT repository_id, digest FROM manifests CROSS JOIN repository_blobs"
            " USING (repository_id, digest) WHERE ? AND max(leased_at, pushed_at, pulled_at) > ?"
        )
        manifests = self._policy.untagged_after is not None or self._policy.max_size is not None
        while rows := self._choose(sql, now + CLOCK_SLACK, manifests, now + CLOCK_SLACK):
            self._each(iter(rows), mend)

    def _relied_on(self, repository: int, _digest: str, name: str) -> int:
        """The second since when clients may rely on what they were told of a repository.

        A push may take longer than the grace. As long as one is under way, it may need what came first.
        """
        pushing = repository in self._pushing or hashed_name(name) in self._pushing
        return self._leased_before - int(UPLOAD_LIFETIME if pushing else 0)

    def _drop_untagged(self, age: float) -> None:
        """Drop untagged manifests that nothing keeps, but the newest images."""
        old = min(self._leased_before, int(time.time() - age))

        def drop(db: sqlite3.Connection, row: Link) -> None:
            relied_on = self._relied_on(*row)
            self._drop(db, row, min(old, relied_on), relied_on)

        sql = (
            "WITH untagged AS (SELECT m.repository_id, m.digest, m.subject, l.leased_at, row_number() OVER"
            " (PARTITION BY m.repository_id, m.subject IS NULL"
            "  ORDER BY m.pushed_at DESC, m.digest) AS position"
            f" {self._TOPMOST} AND m.repository_id >= ? AND NOT EXISTS (SELECT 1 FROM tags t"
            "   WHERE t.repository_id = m.repository_id AND t.digest = m.digest))"
            " SELECT repository_id, digest, name FROM untagged JOIN repositories ON id = repository_id"
            " WHERE (repository_id, digest) > (?, ?) AND leased_at < ?"
            " AND (subject IS NOT NULL OR position > ?) ORDER BY repository_id, digest"
        )
        last = (0, "")
        while rows := self._choose(sql, last[0], *last, old, self._policy.keep_last):
            self._each(iter(rows), drop)
            last = rows[-1][:2]

    def _drop(
        self, db: sqlite3.Connection, link: Link, old: int, relied_on: int, *, tagged: bool = False
    ) -> list[str]:
        """Drop a manifest that is old, though it may be tagged if that is said, with what only it kept.

        Returns what it kept and others keep as well. Does nothing if something keeps the manifest itself.
        """
        repository, digest, name = link
        keepers: dict[str, set[str]] = {}
        found = [digest]
        for each in found:
            if each not in keepers and len(keepers) < DROP_LIMIT:
                values = {"repository": repository, "digest": each, "limit": DROP_LIMIT}
                itself = each == digest
                how = {"before": old if itself else relied_on, "tagged": itself and tagged}
                keepers[each] = {keeper for (keeper,) in db.execute(self._KEEPERS, {**values, **how})}
                found += [kept for (kept,) in db.execute(self._KEPT, values)]
        going = set(keepers)
        while staying := {each for each in going if not keepers[each] <= going}:
            going -= staying
        if digest not in going:
            return []
        needed: set[str] = set()
        for each in going:
            sql = "SELECT child FROM manifest_references WHERE repository_id = ? AND manifest = ?"
            needed.update(child for (child,) in db.execute(sql, (repository, each)))
            sql = "DELETE FROM manifests WHERE repository_id = ? AND digest = ?"
            if db.execute(sql, (repository, each)).rowcount:
                self._removed.append(Removal("manifest", name, each, 0))
        for child in needed:
            leased_before = float("inf") if child in going else relied_on  # untagging has leased it just now
            self._unlink(db, (repository, child, name), leased_before)
        return [each for each in keepers if each not in going]

    def _unlink(self, db: sqlite3.Connection, link: Link, leased_before: float) -> None:
        """Unlink a blob unless a manifest of the repository needs it or a client may rely on it."""
        repository, digest, name = link
        rows = db.execute(
            "SELECT size, leased_at, needed_by,"
            " EXISTS (SELECT 1 FROM repository_blobs WHERE digest = l.digest AND needed_by > 0),"
            " EXISTS (SELECT 1 FROM repository_blobs"
            "  WHERE digest = l.digest AND repository_id <> l.repository_id)"
            " FROM repository_blobs l JOIN blobs b USING (digest) WHERE repository_id = ? AND digest = ?",
            (repository, digest),
        ).fetchall()
        for size, leased_at, needed_here, needed, elsewhere in rows:
            self._needed_size -= 0 if needed else size
            if not needed_here and leased_at < leased_before:
                self._store.unlink(db, repository, digest)
                self._removed.append(Removal("blob", name, digest, 0 if elsewhere else size))

    def _sweep(self) -> None:
        """Unlink the blobs that no manifest needs."""

        def unlink(db: sqlite3.Connection, row: tuple[int, int, str, str]) -> None:
            self._unlink(db, row[1:], self._leased_before)

        sql = (
            "SELECT leased_at, repository_id, digest, name FROM repository_blobs"
            " JOIN repositories ON id = repository_id WHERE needed_by = 0 AND leased_at < ?"
            " AND (leased_at, repository_id, digest) > (?, ?, ?) ORDER BY leased_at, repository_id, digest"
        )
        last = (-1, 0, "")
        while rows := self._choose(sql, self._leased_before, *last):
            self._each((row for row in rows if row[0] < self._relied_on(*row[1:])), unlink)
            self._advance(len(rows))
            last = rows[-1][:3]

    def _shrink(self, max_size: int) -> None:
        """Drop the least recently pulled manifests until what is needed fits, or nothing more may go yet."""
        ((self._needed_size,),) = self._store.query(
            "SELECT (SELECT coalesce(sum(size), 0) FROM blobs) - (SELECT coalesce(sum(size), 0) FROM blobs b"
            " WHERE digest IN (SELECT digest FROM repository_blobs WHERE needed_by = 0) AND NOT EXISTS"
            " (SELECT 1 FROM repository_blobs l WHERE l.digest = b.digest AND l.needed_by > 0))"
        )
        order = "m.pulled_at, m.pushed_at, m.repository_id, m.digest"
        sql = (
            f"SELECT {order}, (SELECT name FROM repositories WHERE id = m.repository_id)"
            f" {self._TOPMOST} AND l.leased_at < ?"
        )
        heap: list[tuple[int, int, int, str, str]] = []
        end = (-1, 0, 0, "", "")

        def least_recent() -> Iterator[tuple[int, int, int, str, str]]:
            while heap and self._needed_size > max_size:
                yield heapq.heappop(heap)

        def drop(db: sqlite3.Connection, row: tuple[int, int, int, str, str]) -> None:
            before = self._leased_before
            for kept in self._drop(db, row[2:], before, before, tagged=True):
                freed = db.execute(f"{sql} AND m.repository_id = ? AND m.digest = ?", (before, row[2], kept))
                for each in freed:  # it may have been pulled before what is next
                    if each <= end:
                        heapq.heappush(heap, each)

        page = f"{sql} AND ({order}) > (?, ?, ?, ?) ORDER BY {order}"
        while self._needed_size > max_size and (rows := self._choose(page, self._leased_before, *end[:4])):
            heap, end = rows, rows[-1]
            self._each(least_recent(), drop)

    def _walk(self) -> None:
        """Remove files under blobs/ that have no row, once nobody has touched them for the grace period."""

        def remove(db: sqlite3.Connection, digest: str) -> None:
            size = self._abandoned(digest)
            marked = size is not None and db.execute(
                "INSERT INTO pending_deletes SELECT :digest WHERE NOT EXISTS"
                " (SELECT 1 FROM blobs WHERE digest = :digest) ON CONFLICT DO NOTHING",
                {"digest": digest},
            )
            if marked and marked.rowcount:
                self._removed.append(Removal("file", "", digest, size or 0))

        digests = (digest for digest in self._files.contents() if is_digest(digest))
        while not self._stopped() and (some := list(itertools.islice(digests, 5 * BATCH))):
            sql = f"SELECT digest FROM blobs WHERE digest IN ({', '.join('?' * len(some))})"
            unknown = set(some).difference(digest for (digest,) in self._store.query(sql, *some))
            self._each((digest for digest in unknown if self._abandoned(digest) is not None), remove)
            self._advance(len(some))

    def _abandoned(self, digest: str) -> int | None:
        """The size of a file that nobody is about to give a row: renamed into place, it would be young."""
        path = self._files.path(digest)
        try:
            status = os.lstat(path)
            changed = max(status.st_mtime, status.st_ctime)
            if not stat.S_ISREG(status.st_mode):
                return None
            if changed > time.time() + CLOCK_SLACK and self._files is self._store.files:
                os.utime(path)  # the clock was ahead: as old as if that were now
        except OSError:
            return None
        return status.st_size if changed < self._leased_before else None


class Finding(NamedTuple):
    """Something that verify found wrong."""

    kind: str  # corrupt, truncated, missing, unreferenced, dangling or database
    subject: str  # a digest, or what it is about
    repaired: bool = False


class Verifier:
    """Compares what is on disk with what the database says, beside whoever else uses the store."""

    def __init__(self, store: Store, advance: Callable[[int], None]) -> None:
        """advance is called with the number of bytes of each file that was dealt with."""
        self._store = store
        self._advance = advance

    def run(self, *, repair: bool = False) -> Iterator[Finding]:
        """Yield what is wrong.

        repair: move damaged and stray files aside, and drop the rows of damaged and missing files, so that
        clients push them again. Nothing that is whole and has a row is touched.
        """
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - it would slow every start

        yield from self._check_database()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for rows in self._pages():
                for (digest, size), damage in zip(rows, pool.map(self._check, rows)):
                    if damage:
                        yield from self._confirm(digest, size, repair)
        yield from self._check_files(repair)
        yield from self._check_references()

    def total(self) -> int:
        """How many bytes there are to verify."""
        return int(self._store.query("SELECT coalesce(sum(size), 0) FROM blobs")[0][0])

    def _pages(self) -> Iterator[list[Any]]:
        sql, last = "SELECT digest, size FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?", ""
        while rows := self._store.query(sql, last, BATCH):
            yield rows
            last = rows[-1][0]

    def _check(self, row: tuple[str, int]) -> str:
        """What is wrong with a content: a kind of finding, or nothing. Hashing lets other threads run."""
        digest, size = row
        try:
            with open(self._store.files.path(digest), "rb", buffering=0) as file:
                damage = self._examine(file, digest, size)
        except FileNotFoundError:
            damage = "missing"
        except PermissionError:
            raise  # that is no damage
        except OSError:
            damage = "corrupt"
        self._advance(size)
        return damage

    @staticmethod
    def _examine(file: io.FileIO, digest: str, size: int) -> str:
        actual = os.fstat(file.fileno()).st_size
        if actual != size:
            return "truncated" if actual < size else "corrupt"
        running = hashlib.new(algorithm_of(digest))
        buffer = memoryview(bytearray(min(BUFFER_SIZE, max(size, 1))))
        while count := file.readinto(buffer):
            running.update(buffer[:count])
        return "" if digest.endswith(f":{running.hexdigest()}") else "corrupt"

    def _confirm(self, digest: str, size: int, repair: bool) -> Iterator[Finding]:
        """Look again while nobody can push or delete: the content may have come or gone meanwhile."""
        with self._store.exclusive() as db:
            current = db.execute("SELECT digest, size FROM blobs WHERE digest = ?", (digest,)).fetchall()
            damage = self._check(current[0]) if current else ""
            if damage and repair:
                self._store.files.quarantine(digest)
                self._store.drop_content(db, digest)
        self._advance(-size)
        if damage:
            yield Finding(damage, digest, repair)

    def _check_files(self, repair: bool) -> Iterator[Finding]:
        for digest in self._store.files.contents():
            if not is_digest(digest):
                yield Finding("unreferenced", digest)
            elif not self._is_known(digest) and self._is_stray(digest, repair):
                yield Finding("unreferenced", digest, repair)

    def _is_stray(self, digest: str, repair: bool) -> bool:
        """Whether a file really has no row, while nobody can give it one. repair: move it aside.

        A file with a second name is an upload on its way to its row.
        """
        with self._store.exclusive(dry_run=True):
            try:
                placed = os.lstat(self._store.files.path(digest)).st_nlink > 1
            except FileNotFoundError:
                return False
            stray = not placed and not self._is_known(digest)
            if stray and repair:
                self._store.files.quarantine(digest)
        return stray

    def _is_known(self, digest: str) -> bool:
        sql = "SELECT 1 FROM blobs WHERE digest = ? UNION ALL SELECT 1 FROM pending_deletes WHERE digest = ?"
        return bool(self._store.query(sql, digest, digest))

    def _check_references(self) -> Iterator[Finding]:
        for name, manifest, child in self._store.query(
            "SELECT r.name, c.manifest, c.child FROM manifest_references c"
            " JOIN repositories r ON r.id = c.repository_id WHERE c.required AND NOT EXISTS ("
            "  SELECT 1 FROM repository_blobs l"
            "  WHERE l.repository_id = c.repository_id AND l.digest = c.child)"
        ):
            yield Finding("dangling", f"{name}@{manifest} needs {child}")

    def _check_database(self) -> Iterator[Finding]:
        try:
            results = [result for (result,) in self._store.query("PRAGMA integrity_check") if result != "ok"]
        except sqlite3.DatabaseError as error:
            results = [str(error)]
        yield from (Finding("database", result) for result in results)
        for table, *_ in self._store.query("PRAGMA foreign_key_check"):
            yield Finding("database", f"a row of {table} points nowhere")


# === Access ===========================================================================================


class WatchedFiles(Generic[T]):
    """What some files hold, loaded again when they change.

    A change that breaks them, or removes one, is logged, and what was read before goes on to hold.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], T]) -> None:
        """load raises OSError or ValueError. Raises StartupError if it does so the first time."""
        self._paths, self._load = paths, load
        self._lock = threading.Lock()  # one thread loads; the others go on with what there is
        self._seen = self._signature()
        try:
            self._value = load()
        except (OSError, ValueError) as error:
            raise StartupError(f"cannot use {', '.join(paths)}: {error}") from error

    def get(self) -> T:
        """The current value."""
        if self._signature() != self._seen and self._lock.acquire(blocking=False):
            try:
                self._reload()
            finally:
                self._lock.release()
        return self._value

    def _reload(self) -> None:
        self._seen = self._signature()
        try:
            self._value = self._load()
        except (OSError, ValueError) as error:
            report = f"keeping what was read before from {', '.join(self._paths)}: {error}"
            print(f"registry.py: {report}", file=sys.stderr, flush=True)

    def _signature(self) -> list[tuple[int, int, int] | None]:
        return [self._stat(path) for path in self._paths]

    @staticmethod
    def _stat(path: str) -> tuple[int, int, int] | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class ExpiringCache:
    """Remembers a limited number of things, each for some seconds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._things: dict[Any, tuple[float, Any]] = {}

    def get(self, key: Any) -> Any:
        """What was put there, or None."""
        expires, thing = self._things.get(key, (0.0, None))
        return thing if expires > time.monotonic() else None

    def put(self, key: Any, thing: Any, seconds: float) -> None:
        """Remember a thing; when there are too many, the oldest goes."""
        self._things.pop(key, None)
        self._things[key] = time.monotonic() + seconds, thing
        while len(self._things) > self._limit:
            with contextlib.suppress(KeyError, RuntimeError, StopIteration):  # another thread was quicker
                self._things.pop(next(iter(self._things)))


def hash_password(password: str) -> str:
    """A password's scrypt hash, salted, as a line of the users file holds it."""
    salt = secrets.token_bytes(16)
    value = _scrypt(password, salt, SCRYPT_LN, 8, 1)
    return f"$scrypt$ln={SCRYPT_LN},r=8,p=1${_base64(salt)}${_base64(value)}"


def _scrypt(password: str, salt: bytes, ln: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << ln, r=r, p=p, maxmem=SCRYPT_MEMORY, dklen=32)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii").rstrip("=")


def _unbase64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


SCRYPT_HASH = re.compile(r"\$scrypt\$ln=(\d\d?),r=(\d\d?),p=(\d\d?)\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")


def password_check(hashed: str) -> Callable[[str], bool]:
    """What tells whether a password is the one behind a hash. Raises ValueError if this machine cannot."""
    match = SCRYPT_HASH.fullmatch(hashed)
    if match:
        ln, r, p = int(match[1]), int(match[2]), int(match[3])
        salt, expected = _unbase64(match[4]), _unbase64(match[5])
        if not ln or 128 * r << ln > SCRYPT_MEMORY:
            raise ValueError("a scrypt hash that takes no time, or too much memory")
        _scrypt("", salt, 1, r, p)  # raises ValueError for what it cannot do
        return lambda password: hmac.compare_digest(_scrypt(password, salt, ln, r, p), expected)
    compute = _htpasswd_hash(hashed)
    return lambda password: hmac.compare_digest(compute(password).encode(), hashed.encode())


def check_dummy(password: str) -> bool:
    """The check for a user who does not exist: it takes as long as one for a user who does."""
    return not _scrypt(password, b"", SCRYPT_LN, 8, 1)


def _htpasswd_hash(hashed: str) -> Callable[[str], str]:
    """What hashes a password the way this hash of htpasswd's or crypt's was made."""
    if hashed.startswith("{SHA}"):
        return lambda password: "{SHA}" + _base64(hashlib.sha1(password.encode()).digest()) + "="
    if hashed.startswith("$apr1$"):
        salt = hashed.split("$")[2]
        return lambda password: f"$apr1${salt}${apr1(password.encode(), salt.encode())}"
    crypt = system_crypt()
    if hashed.startswith("$") and crypt and (crypt("", hashed) or "*").startswith(hashed[:4]):
        return lambda password: crypt(password, hashed)
    raise ValueError("a hash of a kind that cannot be checked here; set it with passwd")


def apr1(password: bytes, salt: bytes) -> str:
    """Apache's variant of the MD5 crypt, as htpasswd -m makes it: 1,000 rounds of it."""
    length = len(password)
    first = hashlib.md5(password + salt + password).digest()
    start = password + b"$apr1$" + salt + (first * (length // 16 + 1))[:length]
    start += b"".join(b"\0" if length >> bit & 1 else password[:1] for bit in range(length.bit_length()))
    value = hashlib.md5(start).digest()
    for number in range(1000):
        parts = [value, salt * (number % 3 > 0), password * (number % 7 > 0), password]
        if number % 2:
            parts[0], parts[3] = password, value
        value = hashlib.md5(b"".join(parts)).digest()
    groups = ((0, 6, 12), (1, 7, 13), (2, 8, 14), (3, 9, 15), (4, 10, 5))
    words = [(value[a] << 16 | value[b] << 8 | value[c], 4) for a, b, c in groups] + [(value[11], 2)]
    alphabet = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    return "".join(alphabet[word >> 6 * place & 63] for word, places in words for place in range(places))


@functools.lru_cache(maxsize=1)
def system_crypt() -> Callable[[str, str], str] | None:
    """The system's crypt(3), which knows bcrypt on most systems; None where there is none."""
    import ctypes  # noqa: PLC0415 - rarely needed, and missing from some builds of Python

    for library in ("libcrypt.so.1", "libcrypt.so.2", "libcrypt.dylib"):
        try:
            function = ctypes.CDLL(library).crypt
        except (OSError, AttributeError):
            continue
        function.restype, function.argtypes = ctypes.c_char_p, (ctypes.c_char_p, ctypes.c_char_p)
        return functools.partial(_crypt, function, threading.Lock())
    return None


def _crypt(function: Any, lock: threading.Lock, password: str, setting: str) -> str:
    """What crypt(3) makes of a password, or something that is no hash. Its result is in static memory."""
    with lock:
        return str((function(password.encode(), setting.encode()) or b"*").decode("latin-1"))


def load_users(path: str) -> dict[str, tuple[str, Callable[[str], bool]]]:
    """The users of an htpasswd file: their hashes, and what checks them. Raises OSError, ValueError."""
    users = {}
    for number, line in _lines(path):
        name, colon, hashed = line.partition(":")
        if not colon or not name or not hashed:
            raise ValueError(f"line {number} is not name:hash")
        try:
            users[name] = hashed, password_check(hashed)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return users


ACTIONS = frozenset(("pull", "push", "delete"))


class Grant(NamedTuple):
    """A line of the grants file: who may do what where."""

    who: str  # a user, * for every user, anonymous for everybody
    repositories: re.Pattern[str]
    actions: frozenset[str]


def load_grants(path: str) -> list[Grant]:
    """The lines of a grants file: who, repositories, actions. Raises OSError, ValueError."""
    grants = []
    for number, line in _lines(path):
        fields = line.split()
        actions = frozenset(fields[2].split(",")) if len(fields) == 3 else frozenset()
        if not actions or not actions <= ACTIONS:
            raise ValueError(f"line {number} is not: who repositories pull,push,delete")
        grants.append(Grant(fields[0], compile_glob(fields[1]), actions))
    return grants


def compile_glob(pattern: str) -> re.Pattern[str]:
    """A pattern of repositories: * stands for anything within a path segment, ** for anything."""
    parts = re.split(r"(\*\*?)", pattern)
    return re.compile("".join({"*": "[^/]*", "**": ".*"}.get(part, re.escape(part)) for part in parts))


def _lines(path: str) -> list[tuple[int, str]]:
    """The lines of a text file that say something, numbered."""
    text = Path(path).read_text(encoding="utf-8")
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


class Scope(NamedTuple):
    """One action on one resource, as tokens carry it: ("repository", "team/app", "pull")."""

    kind: str
    name: str
    action: str

    def __str__(self) -> str:
        return ":".join(self)


CATALOG = Scope("registry", "catalog", "*")


class Caller(NamedTuple):
    """Who makes a request."""

    user: str | None  # None: anonymous
    scopes: frozenset[Scope] | None = None  # all that a token is good for; None: it is not by token


class Access:
    """Who may do what: users, grants and tokens. Without users, everybody may do everything."""

    def __init__(
        self,
        users: str | None = None,
        grants: str | None = None,
        *,
        anonymous_pull: bool = False,
        certificates: bool = False,
        key: bytes = b"",
    ) -> None:
        """users, grants: paths of files. certificates: clients may show one. key: signs tokens.

        Raises StartupError.
        """
        self.enabled = users is not None or certificates
        self._certificates = certificates
        if grants is not None and not self.enabled:
            raise StartupError("grants without users would let nobody in; give --users as well")
        self._users = WatchedFiles([users], functools.partial(load_users, users)) if users else None
        self._grants = WatchedFiles([grants], functools.partial(load_grants, grants)) if grants else None
        self._anonymous_pull = anonymous_pull
        self._key = key or secrets.token_bytes(32)
        self.service = f"registry-{hashlib.sha256(self._key).hexdigest()[:8]}"
        self._secret = secrets.token_bytes(32)  # keys what is remembered of passwords
        self._verified = ExpiringCache(1000)
        self._failures = ExpiringCache(10_000)
        self._hashing = threading.Lock()  # scrypt takes 16 MiB and a core: one at a time

    def permits(self, user: str | None, scope: Scope) -> bool:
        """Whether a user, or anybody for None, may do something."""
        if not self.enabled:
            return True
        if scope == CATALOG:
            return user is not None or self.admits_anonymous()
        if scope.kind != "repository" or scope.action not in ACTIONS:
            return False
        if self._anonymous_pull and scope.action == "pull":
            return True
        if self._grants is None:
            return user is not None
        return self._is_granted({"anonymous"} if user is None else {"anonymous", "*", user}, scope)

    def _is_granted(self, who: set[str], scope: Scope) -> bool:
        assert self._grants is not None
        return any(
            grant.who in who and scope.action in grant.actions and grant.repositories.fullmatch(scope.name)
            for grant in self._grants.get()
        )

    def admits_anonymous(self) -> bool:
        """Whether there is anything at all that anybody may do."""
        grants = self._grants.get() if self._grants else []
        return not self.enabled or self._anonymous_pull or any(grant.who == "anonymous" for grant in grants)

    def allows(self, caller: Caller, scope: Scope) -> bool:
        """Whether a caller may do something: a token must say so, and what it says must still hold."""
        return (caller.scopes is None or scope in caller.scopes) and self.permits(caller.user, scope)

    def identify(self, authorization: str, address: str, certified: str | None) -> Caller:
        """Who a request is from: its Authorization header, or its connection's client certificate.

        Raises UNAUTHORIZED if the header is no good, TOOMANYREQUESTS after too many failures.
        """
        method, _, credentials = authorization.partition(" ")
        if not self.enabled or not authorization:
            return Caller(certified)
        if method.lower() == "bearer":
            return self._check_token(credentials.strip())
        if method.lower() == "basic":
            return Caller(self.log_in(*_parse_basic(credentials.strip()), address))
        raise RegistryError(ErrorCode.UNAUTHORIZED, "only Basic and Bearer are known here")

    def log_in(self, name: str, password: str, address: str) -> str:
        """A user's name, if this is the password. Raises UNAUTHORIZED, TOOMANYREQUESTS.

        What was right is remembered for a while, as a keyed hash, since checking takes its time.
        """
        users = self._users.get() if self._users else {}
        hashed, check = users.get(name, ("", check_dummy))
        proof = hmac.digest(self._secret, f"{name}\n{password}\n{hashed}".encode(), "sha256")
        if self._verified.get(proof):
            return name
        with self._hashing:
            self._check_failures(address, name)
            if not check(password):
                self._count_failure(address, name)
                raise RegistryError(ErrorCode.UNAUTHORIZED, "wrong user name or password")
        self._verified.put(proof, True, PASSWORD_LIFETIME)
        return name

    def _check_failures(self, address: str, name: str) -> None:
        for key, limit in ((address, ADDRESS_FAILURE_LIMIT), ((address, name), FAILURE_LIMIT)):
            if (self._failures.get(key) or 0) >= limit:
                seconds = str(int(FAILURE_INTERVAL))
                raise RegistryError(ErrorCode.TOOMANYREQUESTS, headers=(("Retry-After", seconds),))

    def _count_failure(self, address: str, name: str) -> None:
        for key in (address, (address, name)):
            self._failures.put(key, (self._failures.get(key) or 0) + 1, FAILURE_INTERVAL)

    def issue_token(self, user: str | None, requested: Iterable[Scope]) -> dict[str, Any]:
        """A token for as much of what is requested as the user may do, as the token endpoint answers it.

        It is a JSON Web Token, signed with HMAC-SHA256.
        """
        now = int(time.time())
        granted = [scope for scope in dict.fromkeys(requested) if self.permits(user, scope)]
        claims = {
            "iss": self.service, "aud": self.service, "sub": user, "iat": now, "exp": now + TOKEN_LIFETIME,
            "access": granted,
        }  # fmt: skip
        content = f"{_encode_part({'typ': 'JWT', 'alg': 'HS256'})}.{_encode_part(claims)}"
        token = f"{content}.{self._sign(content)}"
        issued = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        return {"token": token, "access_token": token, "expires_in": TOKEN_LIFETIME, "issued_at": issued}

    def _check_token(self, token: str) -> Caller:
        """Whose token this is, and for what. Raises UNAUTHORIZED."""
        content, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(content).encode()):
            raise RegistryError(ErrorCode.UNAUTHORIZED, "the token is not one of this registry")
        claims = json.loads(_unbase64_url(content.partition(".")[2]))
        if claims["aud"] != self.service or claims["exp"] <= time.time():
            raise RegistryError(ErrorCode.UNAUTHORIZED, "the token has expired or is for another service")
        user = claims["sub"]
        if self._users and not self._certificates and user is not None and user not in self._users.get():
            raise RegistryError(ErrorCode.UNAUTHORIZED, "there is no such user any more")
        return Caller(user, frozenset(Scope(*scope) for scope in claims["access"]))

    def _sign(self, content: str) -> str:
        signature = hmac.digest(self._key, content.encode("utf-8", "surrogateescape"), "sha256")
        return base64.urlsafe_b64encode(signature).decode("ascii").rstrip("=")


def _encode_part(value: object) -> str:
    return base64.urlsafe_b64encode(encode_json(value)).decode("ascii").rstrip("=")


def _unbase64_url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _parse_basic(credentials: str) -> tuple[str, str]:
    """User name and password (RFC 7617). Raises UNAUTHORIZED."""
    try:
        name, colon, password = _unbase64(credentials.rstrip("=")).decode("utf-8").partition(":")
    except ValueError:
        colon = ""
    if not colon:
        raise RegistryError(ErrorCode.UNAUTHORIZED, "malformed credentials")
    return name, password


def parse_scope(text: str) -> list[Scope]:
    """The scopes that a token request names, such as "repository:team/app:pull,push"; * is every action."""
    kind, _, rest = text.partition(":")
    name, _, actions = rest.rpartition(":")
    if kind == "repository":
        actions = actions.replace("*", "pull,push,delete")
    return [Scope(kind.partition("(")[0], name, action) for action in actions.split(",") if action]


def load_key(path: str, *, create: bool) -> bytes:
    """The key that signs tokens, made if there is none: tokens outlive a restart."""
    if create and not os.path.lexists(path):
        replace_file(f"{path}.{secrets.token_hex(8)}", path, secrets.token_bytes(32), exclusive=True)
    try:
        with open(path, "rb", opener=no_follow) as file:
            return file.read()
    except FileNotFoundError:
        if create:
            raise
        return b""


def replace_file(temporary: str, path: str, content: bytes, *, exclusive: bool = False) -> None:
    """Write a private file in one step, durably; exclusive: unless there is one already."""
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        if exclusive:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_directory(os.path.dirname(os.path.abspath(path)))


class TLS:
    """Certificates, read again when they change."""

    def __init__(self, certificate: str, key: str | None = None, client_ca: str | None = None) -> None:
        """Paths of PEM files. Raises StartupError."""
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        paths = [path for path in (certificate, key, client_ca) if path]
        self._context = WatchedFiles(paths, self._load)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._certificate, self._key)
        if self._client_ca:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        """A connection that speaks TLS once the handshake is done. Takes the socket over."""
        return self._context.get().wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
        )


def certified_user(connection: socket.socket) -> str | None:
    """The common name of the client's certificate, if it showed one that is trusted."""
    certificate = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
    subject: Any = (certificate or {}).get("subject", ())
    return next((value for part in subject for name, value in part if name == "commonName"), None)


# === Messages =========================================================================================


def is_tls(connection: socket.socket) -> bool:
    """Whether what goes over a connection is encrypted on the way."""
    return ssl is not None and isinstance(connection, ssl.SSLSocket)


class FileRange(NamedTuple):
    """Some bytes of an open file; whoever has sent the reply closes it."""

    file: BinaryIO
    start: int
    length: int


def set_timeout(connection: socket.socket, direction: str, seconds: float) -> None:
    """Bound how long one receive ("RCV") or send ("SND") may wait.

    In the kernel where that works: settimeout, which bounds both, costs a poll for each call.
    """
    if os.name == "posix" and not is_tls(connection):
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) + (seconds < 1e-6))
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, f"SO_{direction}TIMEO"), value)
            return
    connection.settimeout(seconds)


def _is_hopeless(head: bytes) -> bool:
    """Whether a head is refused whatever may follow, so that there is no use in waiting for its end."""
    line = head.find(b"\r\n")
    too_long = line > REQUEST_LINE_LIMIT or (line < 0 and len(head) > REQUEST_LINE_LIMIT)
    return too_long or len(head) > HEAD_LIMIT or head.count(b"\n") != head.count(b"\r\n")


class SocketReader:
    """A connection's bytes: heads, lines and bodies, each bounded in size and time.

    Every method raises ClientGone when the client hangs up or stalls.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._pending = b""  # received, from _start on not yet consumed
        self._start = 0
        self._timeout: float | None = None
        set_timeout(connection, "SND", STALL_TIMEOUT)

    def read_head(self) -> bytes:
        """The next request's head, its last line unterminated; empty if the client is done with us.

        What is too large or malformed already comes as far as it was read, for parse_head to refuse.
        """
        head = self._pending[self._start :]
        self._pending, self._start = b"", 0
        deadline = 0.0
        while True:
            if head and not deadline:
                deadline = time.monotonic() + HEADER_TIMEOUT
            head = LEADING_LINES.sub(b"", head, count=1)
            end = head.find(b"\r\n\r\n")
            if end >= 0:
                break
            if _is_hopeless(head):
                return head
            more = self._receive(deadline - time.monotonic() if deadline else IDLE_TIMEOUT)
            if not more:
                return b""
            head += more
        self._pending, self._start = head, end + 4
        return head[:end]

    def read_line(self, limit: int) -> bytes | None:
        """The next line without its CRLF; None if it is longer than the limit or ends in a bare LF."""
        while True:
            end = self._pending.find(b"\n", self._start)
            if end >= 0 or len(self._pending) - self._start > limit:
                break
            more = self._receive(STALL_TIMEOUT)
            if not more:
                raise ClientGone
            self._pending, self._start = self._pending[self._start :] + more, 0
        line = self._pending[self._start : end + 1]
        if not line.endswith(b"\r\n") or len(line) > limit:
            return None
        self._start = end + 1
        return line[:-2]

    def readinto(self, view: memoryview) -> int:
        """Fill some of a buffer with what comes next, at least one byte."""
        pending = len(self._pending) - self._start
        if pending:
            count = min(pending, len(view))
            view[:count] = memoryview(self._pending)[self._start : self._start + count]
            self._start += count
            return count
        self.wait_at_most(STALL_TIMEOUT)
        try:
            count = self.socket.recv_into(view)
        except OSError as error:
            raise ClientGone from error
        if not count:
            raise ClientGone
        return count

    def send(self, data: bytes | memoryview, *, more: bool = False) -> None:
        """Send all of this; more: something follows at once and may go into the same packet."""
        flags = getattr(socket, "MSG_MORE", 0) if more and not is_tls(self.socket) else 0
        if is_tls(self.socket):
            self.wait_at_most(STALL_TIMEOUT)
        try:
            for start in range(0, len(data), BUFFER_SIZE):  # each piece gets a timeout of its own
                self.socket.sendall(data[start : start + BUFFER_SIZE], flags)
        except OSError as error:
            raise ClientGone from error

    def send_file(self, part: FileRange) -> None:
        """Send some bytes of a file, from kernel to kernel where that works."""
        start, stop = part.start, part.start + part.length
        if is_tls(self.socket) or not hasattr(os, "sendfile"):
            self._copy_file(part)
            return
        try:
            while start < stop:
                sent = os.sendfile(self.socket.fileno(), part.file.fileno(), start, stop - start)
                if not sent:
                    raise ClientGone("the file is shorter than it was")
                start += sent
        except OSError as error:
            raise ClientGone from error

    def _copy_file(self, part: FileRange) -> None:
        part.file.seek(part.start)
        left, buffer = part.length, memoryview(bytearray(min(COPY_SIZE, part.length)))
        while left:
            count = part.file.readinto(buffer[:left])  # type: ignore[attr-defined]
            if not count:
                raise ClientGone("the file is shorter than it was")
            self.send(buffer[:count])
            left -= count

    def wait_at_most(self, seconds: float) -> None:
        """Bound the next receives, sparing the system call when the bound is that already."""
        if seconds != self._timeout:
            set_timeout(self.socket, "RCV", seconds)
            self._timeout = seconds

    def _receive(self, timeout: float) -> bytes:
        if timeout <= 0:
            raise ClientGone
        self.wait_at_most(timeout)
        try:
            return self.socket.recv(RECEIVE_SIZE)
        except OSError as error:
            raise ClientGone from error


class RequestHead(NamedTuple):
    """A request's head (RFC 9112), checked. Header names are in lower case, repeated ones comma-joined."""

    method: str
    target: str
    version: str  # "HTTP/1.1" or "HTTP/1.0"
    headers: dict[str, str]


SINGLE_HEADERS = frozenset(("content-length", "transfer-encoding", "host", "content-range", "authorization"))


def parse_head(data: bytes) -> RequestHead:
    """Parse what SocketReader.read_head gave.

    Raises BAD_REQUEST, URI_TOO_LONG, REQUEST_HEADER_FIELDS_TOO_LARGE, HTTP_VERSION.
    """
    lines = data.decode("latin-1").split("\r\n")
    if len(lines[0]) > REQUEST_LINE_LIMIT:
        raise RegistryError(ErrorCode.URI_TOO_LONG)
    if len(lines) > HEADER_COUNT_LIMIT + 1 or len(data) > HEAD_LIMIT:
        raise RegistryError(ErrorCode.REQUEST_HEADER_FIELDS_TOO_LARGE)
    if data.count(b"\n") != len(lines) - 1 or data.count(b"\r") != len(lines) - 1 or b"\0" in data:
        raise RegistryError(ErrorCode.BAD_REQUEST, "bare CR, bare LF or NUL")
    method, target, version = _parse_request_line(lines[0])
    headers = _parse_headers(lines[1:])
    if version == "HTTP/1.1" and "host" not in headers:
        raise RegistryError(ErrorCode.BAD_REQUEST, "no Host")
    return RequestHead(method, target, version, headers)


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise RegistryError(ErrorCode.BAD_REQUEST, "header without a colon")
        name, value = _header_name(name), value.strip(" \t")
        if name in headers:
            if name in SINGLE_HEADERS:
                raise RegistryError(ErrorCode.BAD_REQUEST, f"more than one {name}")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _parse_request_line(line: str) -> tuple[str, str, str]:
    parts = line.split(" ")
    if len(parts) != 3 or not HEADER_NAME.fullmatch(parts[0]) or not parts[1].isprintable():
        raise RegistryError(ErrorCode.BAD_REQUEST, "bad request line")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        known = re.fullmatch(r"HTTP/[0-9]\.[0-9]", version)
        raise RegistryError(ErrorCode.HTTP_VERSION if known else ErrorCode.BAD_REQUEST, version)
    return method, target, version


@functools.lru_cache(maxsize=256)
def _header_name(name: str) -> str:
    """A header's name in lower case; white space in or around it is BAD_REQUEST, and so is obs-fold."""
    if not HEADER_NAME.fullmatch(name):
        raise RegistryError(ErrorCode.BAD_REQUEST, "bad header name")
    return name.lower()


def body_length(head: RequestHead) -> int | None:
    """How many bytes the request's body has; None if it is chunked. Raises BAD_REQUEST if that is unclear."""
    length, encoding = head.headers.get("content-length"), head.headers.get("transfer-encoding")
    if encoding is not None:
        if length is not None or encoding.lower() != "chunked" or head.version == "HTTP/1.0":
            raise RegistryError(ErrorCode.BAD_REQUEST, "ambiguous length of the body")
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise RegistryError(ErrorCode.BAD_REQUEST, "bad Content-Length")
    return int(length)


class Body:
    """A request's body, decoded as it is read."""

    def __init__(self, reader: SocketReader, length: int | None, *, expected: bool) -> None:
        """length: None for a chunked body. expected: the client waits for 100 Continue before it sends."""
        self.length = length
        self._reader = reader
        self._remaining = length or 0  # of the body, or of the chunk being read
        self._expected = expected and length != 0
        self._broken = False
        self.done = length == 0

    def readinto(self, view: memoryview) -> int:
        """Fill some of a buffer; 0 at the body's end. Raises ClientGone, and BAD_REQUEST for bad chunks."""
        if self._expected:
            self._expected = False
            self._reader.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._remaining and not self.done:
            self._next_chunk()
        if self.done:
            return 0
        count = self._reader.readinto(view[: self._remaining])
        self._remaining -= count
        if not self._remaining:
            self._end_of_part()
        return count

    def _end_of_part(self) -> None:
        if self.length is not None:
            self.done = True
        elif self._read_line():
            raise self._malformed("a chunk is longer than its size says")

    def _next_chunk(self) -> None:
        size = CHUNK_SIZE.fullmatch(self._read_line())
        if not size:
            raise self._malformed("bad chunk size")
        self._remaining = int(size[1], 16)
        if not self._remaining:
            self._skip_trailers()
            self.done = True

    def _read_line(self) -> bytes:
        line = self._reader.read_line(CHUNK_LINE_LIMIT)
        if line is None:
            raise self._malformed("bad line between chunks")
        return line

    def _skip_trailers(self) -> None:
        for _ in range(HEADER_COUNT_LIMIT):
            line = self._read_line()
            if not line:
                return
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or not HEADER_NAME.fullmatch(name) or "\r" in value or "\0" in value:
                break
        raise self._malformed("bad trailer")

    def _malformed(self, reason: str) -> RegistryError:
        """The error for a body whose end can no longer be found: nothing more is read from it."""
        self._broken = True
        return RegistryError(ErrorCode.BAD_REQUEST, reason)

    def read(self, limit: int, too_large: ErrorCode) -> bytes:
        """The whole body. Raises too_large past the limit, before reading it when its length is known."""
        if self.length is not None and self.length > limit:
            raise RegistryError(too_large)
        content = bytearray()
        buffer = memoryview(bytearray(min(self.length or RECEIVE_SIZE, RECEIVE_SIZE)))
        while count := self.readinto(buffer):
            content += buffer[:count]
            if len(content) > limit:
                raise RegistryError(too_large)
        return bytes(content)

    def drain(self) -> bool:
        """Skip what was not read, if that is not much; whether the next request can follow."""
        if self.done:
            return True
        if self._expected or (self.length is not None and self._remaining > DRAIN_LIMIT):
            return False
        buffer = memoryview(bytearray(min(RECEIVE_SIZE, self._remaining or RECEIVE_SIZE)))
        skipped = 0
        with contextlib.suppress(RegistryError):
            while skipped <= DRAIN_LIMIT and not self.done and not self._broken:
                skipped += self.readinto(buffer)
        return self.done


class Context(NamedTuple):
    """What requests are served from."""

    store: Store
    access: Access
    public_url: str | None = None  # how clients reach it, if they do not say
    secure: bool = False  # whether it speaks TLS itself


class Request:
    """One request as the handlers see it."""

    def __init__(
        self, context: Context, reader: SocketReader, address: str, certified: str | None = None
    ) -> None:
        """A request of which nothing is known yet but the client's address and certificate."""
        self.context = context
        self.store = context.store
        self.address, self.certified = address, certified
        self.caller = Caller(None)
        self._reader = reader
        self.method = self.target = "-"
        self.path = self._query = ""
        self.headers: dict[str, str] = {}
        self.body = Body(reader, 0, expected=False)
        self.persistent = False  # whether the client may send another after this one

    def parse(self, data: bytes) -> None:
        """Take in a head. Raises parse_head's errors and more, keeping what was understood till then."""
        if data.startswith(b"HEAD "):
            self.method = "HEAD"  # no reply to it has a body, not even one that says how bad it is
        self.method, self.target, version, self.headers = head = parse_head(data)
        self.path, self._query = split_target(self.target, self.headers.get("host", ""))
        length = body_length(head)
        expectation = self.headers.get("expect", "").lower()
        if expectation not in ("", "100-continue"):
            raise RegistryError(ErrorCode.EXPECTATION_FAILED)
        modern = version == "HTTP/1.1"
        self.body = Body(self._reader, length, expected=bool(expectation) and modern)
        self.persistent = modern and "close" not in self.headers.get("connection", "").lower()

    def parameters(self, name: str) -> list[str]:
        """Every value that the query gives a parameter. A plus sign is itself, as in media types."""
        return parse_parameters(self._query, name) if self._query else []

    def parameter(self, name: str) -> str | None:
        """A parameter's first value, or None."""
        return next(iter(self.parameters(name)), None) if self._query else None

    def may_pull(self, repository: str) -> bool:
        """Whether whoever makes the request has the right to pull a repository."""
        return self.context.access.permits(self.caller.user, Scope("repository", repository, "pull"))

    def base_url(self) -> str:
        """How the client reaches this registry, as far as it or a proxy says."""
        if self.context.public_url:
            return self.context.public_url.rstrip("/")
        scheme = self._forwarded("x-forwarded-proto") or ("https" if self.context.secure else "http")
        host = self._forwarded("x-forwarded-host") or self.headers.get("host", "")
        if scheme not in ("http", "https") or not HOST.fullmatch(host):
            raise RegistryError(ErrorCode.BAD_REQUEST, "no usable Host")
        return f"{scheme}://{host}"

    def _forwarded(self, name: str) -> str:
        """What the proxy nearest to the client says, if there is one."""
        return self.headers.get(name, "").partition(",")[0].strip()


def parse_parameters(query: str, name: str) -> list[str]:
    """Every value that a query or form gives a parameter."""
    pairs = (pair.partition("=") for pair in query.split("&"))
    return [decode_percent(value) for key, _, value in pairs if decode_percent(key) == name]


def split_target(target: str, host: str) -> tuple[str, str]:
    """A request target's path, decoded, and its query, as it is. Raises BAD_REQUEST."""
    if target.startswith(("http://", "https://")):  # absolute-form, RFC 9112, 3.2.2
        authority, _, rest = target.partition("//")[2].partition("/")
        if authority.lower() != host.lower():
            raise RegistryError(ErrorCode.BAD_REQUEST, "the target names another host than Host does")
        target = f"/{rest}"
    path, _, query = target.partition("?")
    return (decode_percent(path) if "%" in path else path), query


def decode_percent(text: str) -> str:
    """Percent-decode a part of a target. Raises BAD_REQUEST for what is not UTF-8."""
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise RegistryError(ErrorCode.BAD_REQUEST, "the target is not UTF-8") from None


class Reply(NamedTuple):
    """What a handler answers. Content-Length, HEAD and the connection are not its business."""

    status: int
    headers: Headers = ()
    body: bytes | FileRange = b""

    @property
    def length(self) -> int:
        """The body's length in bytes."""
        return self.body.length if isinstance(self.body, FileRange) else len(self.body)


def json_reply(document: object, *headers: tuple[str, str], content_type: str = JSON) -> Reply:
    """A 200 with a JSON document."""
    return Reply(200, (("Content-Type", content_type), *headers), encode_json(document))


def parse_count(digits: str) -> int:
    """A decimal number; one that no content could have as its size is as good as the largest."""
    return int(digits) if len(digits) < 19 else COUNT_LIMIT


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """A Range header's start and length within a content of this size; None if it is to be ignored.

    Raises RANGE_NOT_SATISFIABLE for a range that lies outside (RFC 9110, 14). Several ranges are ignored.
    """
    match = BYTE_RANGE.fullmatch(text.strip())
    if not match or match[0].endswith("=-"):
        return None
    first, last = match[1], match[2]
    if first:
        start, stop = parse_count(first), min(parse_count(last) + 1, size) if last else size
    else:
        start, stop = max(size - parse_count(last), 0), size
    if start >= stop:
        raise RegistryError(
            ErrorCode.RANGE_NOT_SATISFIABLE, text, headers=(("Content-Range", f"bytes */{size}"),)
        )
    return start, stop - start


def matches_etag(condition: str, digest: str) -> bool:
    """Whether an If-None-Match header names this content's entity tag."""
    tags = [tag.strip() for tag in condition.split(",")]
    return "*" in tags or any(tag.replace("W/", "", 1).strip('"') == digest for tag in tags)


def page_size(request: Request, limit: int) -> int:
    """The query's n, but not above the limit. Raises PAGE_INVALID."""
    text = request.parameter("n")
    if text is None:
        return limit
    if not (text.isascii() and text.isdigit()):
        raise RegistryError(ErrorCode.PAGE_INVALID, text)
    return min(parse_count(text), limit)


def page_link(path: str, **parameters: str | int | None) -> tuple[str, str]:
    """The Link header (RFC 5988) to a listing's next page."""
    query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in parameters.items() if value)
    return "Link", f'<{path}?{query}>; rel="next"'


# === Handlers =========================================================================================


def version_get(request: Request) -> Reply:
    """Say that this is a registry (end-1)."""
    return json_reply({})


def content_reply(request: Request, content: Descriptor, unknown: ErrorCode) -> Reply:
    """A content, whole, in part, or as not modified. Raises unknown when the disk has lost it."""
    headers = [("Docker-Content-Digest", content.digest), ("ETag", f'"{content.digest}"')]
    if "if-none-match" in request.headers and matches_etag(request.headers["if-none-match"], content.digest):
        return Reply(304, headers)
    headers += [("Content-Type", content.media_type), ("Accept-Ranges", "bytes")]
    part = requested_range(request, content)
    start, length = part or (0, content.size)
    body = request.store.open_content(content)
    if body is None:
        raise RegistryError(unknown, content.digest)
    if part:
        headers.append(("Content-Range", f"bytes {start}-{start + length - 1}/{content.size}"))
        body = body[start : start + length] if isinstance(body, bytes) else body
    return Reply(
        206 if part else 200,
        headers,
        body if isinstance(body, bytes) else FileRange(body, start, length),
    )


def requested_range(request: Request, content: Descriptor) -> tuple[int, int] | None:
    """The part of a content that the client asks for, if any. Raises RANGE_NOT_SATISFIABLE."""
    text = request.headers.get("range")
    if text is None or request.headers.get("if-range", f'"{content.digest}"') != f'"{content.digest}"':
        return None
    return parse_range(text, content.size)


def blob_location(name: str, digest: str) -> Headers:
    """The headers of a reply to a blob that is now there."""
    return ("Location", f"/v2/{name}/blobs/{digest}"), ("Docker-Content-Digest", digest)


def blob_get(request: Request, name: str, digest: str) -> Reply:
    """Pull a blob (end-2)."""
    blob = request.store.blob(name, parse_digest(digest), lease=request.method == "HEAD")
    return content_reply(request, blob, ErrorCode.BLOB_UNKNOWN)


def blob_delete(request: Request, name: str, digest: str) -> Reply:
    """Unlink a blob from the repository (end-10)."""
    request.store.delete_blob(name, parse_digest(digest))
    return Reply(202)


def session_headers(name: str, session: str, size: int) -> Headers:
    """Where an upload session is and how far it has come."""
    return (
        ("Location", f"/v2/{name}/blobs/uploads/{session}"),
        ("Range", f"0-{max(size - 1, 0)}"),
        ("Docker-Upload-UUID", session),
    )


def upload_start(request: Request, name: str) -> Reply:
    """Mount a blob (end-11), take one whole (end-4b), or open an upload session (end-4a)."""
    mount, digest = request.parameter("mount"), request.parameter("digest")
    if mount is not None and mount_blob(request, name, parse_digest(mount)):
        return Reply(201, blob_location(name, mount))
    if digest is not None:
        return upload_whole(request, name, parse_digest(digest))
    algorithm = parse_algorithm(request.parameter("digest-algorithm") or "sha256")
    session = request.store.start_session(name, algorithm)
    return Reply(202, session_headers(name, session, 0))


def mount_blob(request: Request, name: str, digest: str) -> bool:
    """Mount a blob from the repository that the query names, or from any that the caller may pull.

    Whose token it is decides about the source: clients ask for one that is good for the target only.
    """
    source = request.parameter("from")
    sources = request.store.repositories_with(digest) if source is None else [source]
    return any(
        request.may_pull(candidate) and request.store.mount(name, digest, candidate) for candidate in sources
    )


def upload_whole(request: Request, name: str, digest: str) -> Reply:
    """Take a blob from the body of the one POST that announces it."""
    with request.store.new_upload(algorithm_of(digest)) as upload:
        receive(request, upload)
        request.store.finish_upload(name, upload, digest)
    return Reply(201, blob_location(name, digest))


def receive(request: Request, upload: UploadFile) -> None:
    """Append the request's body, which its Content-Range must place exactly at the upload's end."""
    length = check_content_range(request, upload)
    start = upload.size
    if length not in (None, upload.append(request.body.readinto, request.body.length)):
        upload.truncate(start)
        raise RegistryError(ErrorCode.SIZE_INVALID, "the body is not as long as its Content-Range")


def check_content_range(request: Request, upload: UploadFile) -> int | None:
    """The length that Content-Range declares, if there is one. Raises UPLOAD_RANGE, SIZE_INVALID."""
    text = request.headers.get("content-range")
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", text)
    first, last = (parse_count(match[1]), parse_count(match[2])) if match else (-1, -1)
    if first != upload.size or last < first:
        raise RegistryError(ErrorCode.UPLOAD_RANGE, f"{text}, and the upload has {upload.size} bytes")
    length = last - first + 1
    if request.body.length not in (None, length):
        raise RegistryError(ErrorCode.SIZE_INVALID, "the body is not as long as its Content-Range")
    return length


@contextlib.contextmanager
def open_session(request: Request, name: str, session: str) -> Iterator[UploadFile]:
    """An upload session to write to; a 416 says where it stands, so that the client can go on from there."""
    try:
        with request.store.session(name, session) as upload:
            yield upload
    except RegistryError as error:
        if error.code in (ErrorCode.UPLOAD_RANGE, ErrorCode.UPLOAD_BUSY):
            error.headers = session_headers(name, session, request.store.session_size(name, session))
        raise


def upload_append(request: Request, name: str, session: str) -> Reply:
    """Append to an upload session (end-5)."""
    with open_session(request, name, session) as upload:
        receive(request, upload)
        return Reply(202, session_headers(name, session, upload.size))


def upload_finish(request: Request, name: str, session: str) -> Reply:
    """Append to an upload session and make it a blob (end-6)."""
    with open_session(request, name, session) as upload:
        check_content_range(request, upload)
        digest = parse_digest(request.parameter("digest") or "")
        receive(request, upload)
        request.store.finish_upload(name, upload, digest)
    return Reply(201, blob_location(name, digest))


def upload_status(request: Request, name: str, session: str) -> Reply:
    """Say how far an upload session has come (end-13)."""
    return Reply(204, session_headers(name, session, request.store.session_size(name, session)))


def upload_cancel(request: Request, name: str, session: str) -> Reply:
    """Drop an upload session (end-14)."""
    request.store.cancel_session(name, session)
    return Reply(204)


def check_reference(reference: str, code: ErrorCode) -> str:
    """A tag or a digest. Raises DIGEST_INVALID for what was meant as a digest, else the given code."""
    if ":" in reference:
        return parse_digest(reference)
    if not TAG.fullmatch(reference):
        raise RegistryError(code, f"{reference} is neither a tag nor a digest")
    return reference


def manifest_get(request: Request, name: str, reference: str) -> Reply:
    """Pull a manifest (end-3)."""
    reference = check_reference(reference, ErrorCode.MANIFEST_UNKNOWN)
    manifest = request.store.manifest(name, reference, lease=request.method == "HEAD")
    if request.method == "GET":
        request.store.note_pull(name, manifest.digest)
    return content_reply(request, manifest, ErrorCode.MANIFEST_UNKNOWN)


def manifest_put(request: Request, name: str, reference: str) -> Reply:
    """Push a manifest by tag or by digest (end-7)."""
    reference = check_reference(reference, ErrorCode.MANIFEST_INVALID)
    content = request.body.read(MANIFEST_LIMIT, ErrorCode.MANIFEST_TOO_LARGE)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip()
    manifest = parse_manifest(content, content_type)
    by_digest = is_digest(reference)
    digest = reference if by_digest else digest_of(content)
    tags = tag_parameters(request) if by_digest else [reference]
    request.store.put_manifest(name, manifest, content, digest, tags)
    headers = [("Location", f"/v2/{name}/manifests/{digest}"), ("Docker-Content-Digest", digest)]
    headers += [("OCI-Subject", manifest.subject)] if manifest.subject else []
    headers += [("OCI-Tag", tag) for tag in tags if by_digest]
    return Reply(201, headers)


def tag_parameters(request: Request) -> list[str]:
    """The tags that a push by digest asks for. Raises TOO_MANY_TAGS, MANIFEST_INVALID."""
    tags = request.parameters("tag")
    if len(tags) > TAG_PARAMETER_LIMIT:
        raise RegistryError(ErrorCode.TOO_MANY_TAGS)
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise RegistryError(ErrorCode.MANIFEST_INVALID, f"{tag} is not a tag")
    return tags


def manifest_delete(request: Request, name: str, reference: str) -> Reply:
    """Remove a tag, or a manifest with its tags (end-9)."""
    reference = check_reference(reference, ErrorCode.MANIFEST_UNKNOWN)
    if is_digest(reference):
        request.store.delete_manifest(name, reference)
    else:
        request.store.delete_tag(name, reference)
    return Reply(202)


def listing_reply(
    request: Request, document: dict[str, Any], member: str, fetch: Callable[[str, int], list[str]]
) -> Reply:
    """One page of names, and a link to the next. fetch takes a name and how many are wanted after it."""
    size = page_size(request, PAGE_LIMIT)
    names = fetch(request.parameter("last") or "", size + 1)
    more = [page_link(request.path, n=size, last=names[size - 1])] if len(names) > size > 0 else []
    return json_reply({**document, member: names[:size]}, *more)


def tag_list(request: Request, name: str) -> Reply:
    """List tags (end-8a, end-8b)."""
    return listing_reply(request, {"name": name}, "tags", functools.partial(request.store.tags, name))


def repository_list(request: Request) -> Reply:
    """List the repositories that the caller may pull; not in the specification, but widely used."""
    return listing_reply(request, {}, "repositories", functools.partial(readable_repositories, request))


def readable_repositories(request: Request, last: str, limit: int) -> list[str]:
    """Up to so many repositories after one that the caller may pull."""
    readable: list[str] = []
    while len(readable) < limit:
        names = request.store.repositories(last, limit)
        readable += [name for name in names if request.may_pull(name)]
        if len(names) < limit:
            break
        last = names[-1]
    return readable[:limit]


def referrer_list(request: Request, name: str, digest: str) -> Reply:
    """List what refers to a manifest (end-12a, end-12b)."""
    subject, artifact_type = parse_digest(digest), request.parameter("artifactType") or None
    fetch = functools.partial(request.store.referrers, name, subject, artifact_type)
    page, more = referrer_page(fetch, request.parameter("last") or "")
    headers = [("OCI-Filters-Applied", "artifactType")] if artifact_type else []
    if more:
        headers.append(page_link(request.path, artifactType=artifact_type, last=page[-1]["digest"]))
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": page}
    return json_reply(index, *headers, content_type=OCI_INDEX)


def referrer_page(
    fetch: Callable[[str, int], list[Referrer]], last: str
) -> tuple[list[dict[str, Any]], bool]:
    """Descriptors for as many referrers as fit into one page, at least one, and whether there may be more.

    fetch takes a digest and how many are wanted after it: a few at a time, since annotations may be long.
    """
    page: list[dict[str, Any]] = []
    room = REFERRER_PAGE_BYTES
    while len(page) < REFERRER_PAGE_LIMIT:
        referrers = fetch(last, REFERRER_BATCH)
        for referrer in referrers:
            room -= len(referrer.annotations)
            if room < 0 and page:
                return page, True
            page.append(describe_referrer(referrer))
        if len(referrers) < REFERRER_BATCH:
            return page, False
        last = page[-1]["digest"]
    return page, True


def describe_referrer(referrer: Referrer) -> dict[str, Any]:
    """A referrer's descriptor (specification, "Listing Referrers")."""
    (media_type, digest, size), artifact_type, annotations = referrer
    descriptor: dict[str, Any] = {"mediaType": media_type, "digest": digest, "size": size}
    if artifact_type:
        descriptor["artifactType"] = artifact_type
    if annotations != "{}":
        descriptor["annotations"] = json.loads(annotations)
    return descriptor


def token_get(request: Request) -> Reply:
    """Issue a token to whoever the Authorization header names, or to anybody (Docker's token protocol)."""
    require_access(request)
    caller = identify(request, basic_challenge)
    if caller.scopes is not None:  # or a token would never expire, nor its scope be a limit
        raise with_challenge(RegistryError(ErrorCode.UNAUTHORIZED), basic_challenge)
    return token_reply(request, caller.user, request.parameters("scope"), request.parameter("service"))


def token_post(request: Request) -> Reply:
    """Issue a token for a user name and password sent as a form (OAuth 2.0, RFC 6749, 4.3)."""
    require_access(request)
    try:
        form = request.body.read(FORM_LIMIT, ErrorCode.FORM_TOO_LARGE).decode("ascii").replace("+", "%20")
    except UnicodeDecodeError:
        raise RegistryError(ErrorCode.BAD_REQUEST, "the form is not ASCII") from None
    values = {
        name: next(iter(parse_parameters(form, name)), "")
        for name in ("grant_type", "username", "password", "service")
    }
    if values["grant_type"] != "password":
        raise RegistryError(ErrorCode.UNSUPPORTED, "the only grant_type here is password")
    try:
        user = request.context.access.log_in(values["username"], values["password"], request.address)
    except RegistryError as error:
        raise with_challenge(error, basic_challenge) from None
    return token_reply(request, user, parse_parameters(form, "scope"), values["service"])


def require_access(request: Request) -> None:
    """Where everybody may do everything there are no tokens. Raises NOT_FOUND."""
    if not request.context.access.enabled:
        raise RegistryError(ErrorCode.NOT_FOUND)


def token_reply(request: Request, user: str | None, scopes: list[str], service: str | None) -> Reply:
    """A token. Raises UNAUTHORIZED where only users may do anything, UNSUPPORTED for another service."""
    access = request.context.access
    if service and service != access.service:
        raise RegistryError(ErrorCode.UNSUPPORTED, "tokens for other services are not issued here")
    if user is None and not access.admits_anonymous():
        raise with_challenge(RegistryError(ErrorCode.UNAUTHORIZED), basic_challenge)
    requested = [scope for text in " ".join(scopes).split() for scope in parse_scope(text)]
    return json_reply(access.issue_token(user, requested), ("Cache-Control", "no-store"))


def basic_challenge() -> str:
    """Ask for a user name and password."""
    return 'Basic realm="registry"'


def with_challenge(error: RegistryError, challenge: Callable[[], str]) -> RegistryError:
    """An error that tells the client how to log in, if that is what it is about."""
    if error.code is ErrorCode.UNAUTHORIZED:
        error.headers = (("WWW-Authenticate", challenge()),)
    return error


def identify(request: Request, challenge: Callable[[], str]) -> Caller:
    """Who a request is from. Raises UNAUTHORIZED, TOOMANYREQUESTS."""
    authorization = request.headers.get("authorization", "")
    try:
        return request.context.access.identify(authorization, request.address, request.certified)
    except RegistryError as error:
        raise with_challenge(error, challenge) from None


# === Routes ===========================================================================================


class Route(NamedTuple):
    """An operation: GET serves HEAD too. Each <part> of the path is an argument of the handler.

    access: the action that the caller must be allowed, "login" for none in particular, "" for anybody.
    """

    method: str
    path: str
    handler: Callable[..., Reply]
    access: str


ROUTES = (
    Route("GET", "/v2/", version_get, "login"),
    Route("GET", "/v2/_catalog", repository_list, "catalog"),
    Route("GET", "/v2/<name>/tags/list", tag_list, "pull"),
    Route("GET", "/v2/<name>/manifests/<reference>", manifest_get, "pull"),
    Route("PUT", "/v2/<name>/manifests/<reference>", manifest_put, "push"),
    Route("DELETE", "/v2/<name>/manifests/<reference>", manifest_delete, "delete"),
    Route("GET", "/v2/<name>/referrers/<digest>", referrer_list, "pull"),
    Route("POST", "/v2/<name>/blobs/uploads/", upload_start, "push"),
    Route("GET", "/v2/<name>/blobs/uploads/<session>", upload_status, "push"),
    Route("PATCH", "/v2/<name>/blobs/uploads/<session>", upload_append, "push"),
    Route("PUT", "/v2/<name>/blobs/uploads/<session>", upload_finish, "push"),
    Route("DELETE", "/v2/<name>/blobs/uploads/<session>", upload_cancel, "push"),
    Route("GET", "/v2/<name>/blobs/<digest>", blob_get, "pull"),
    Route("DELETE", "/v2/<name>/blobs/<digest>", blob_delete, "delete"),
    Route("GET", "/token", token_get, ""),
    Route("POST", "/token", token_post, ""),
)


def _compile_routes() -> list[tuple[re.Pattern[str], dict[str, Route]]]:
    """The methods of each path. A name may hold slashes, and takes all that the rest of the path leaves."""
    paths: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        methods = paths.setdefault(route.path, {})
        methods[route.method] = route
        if route.method == "GET":
            methods["HEAD"] = route
    return [(_compile_path(path), methods) for path, methods in paths.items()]


def _compile_path(path: str) -> re.Pattern[str]:
    pattern = path[:-1] + "/?" if path.endswith("/") else path
    pattern = re.sub("<(?!name>)", "(?P<", pattern.replace("<name>", "(?P<name>.+)"))
    return re.compile(re.sub(r"(?<=[a-z])>(?!\.)", ">[^/]+)", pattern), re.DOTALL)


_COMPILED_ROUTES = _compile_routes()


@functools.lru_cache(maxsize=4096)
def find_path(path: str) -> tuple[dict[str, Route], dict[str, str]]:
    """The operations on a path by method, and the parts that it names. Raises NOT_FOUND."""
    for pattern, methods in _COMPILED_ROUTES:
        match = pattern.fullmatch(path)
        if match:
            return methods, match.groupdict()
    raise RegistryError(ErrorCode.NOT_FOUND)


@functools.lru_cache(maxsize=4096)
def is_name(name: str) -> bool:
    """Whether this is a legal repository name (specification, "Pulling manifests")."""
    return len(name) <= NAME_LIMIT and NAME.fullmatch(name) is not None


def dispatch(request: Request) -> Reply:
    """Run the operation that a request asks for. Raises whatever keeps it from being answered."""
    methods, arguments = find_path(request.path)
    route = methods.get(request.method)
    if route is None:
        raise RegistryError(ErrorCode.METHOD_NOT_ALLOWED, headers=(("Allow", ", ".join(sorted(methods))),))
    if "name" in arguments and not is_name(arguments["name"]):
        writes = request.method in ("POST", "PUT", "PATCH")
        raise RegistryError(ErrorCode.NAME_INVALID if writes else ErrorCode.NAME_UNKNOWN, arguments["name"])
    if request.store.read_only and route.access in ("push", "delete"):
        raise RegistryError(ErrorCode.READ_ONLY, headers=(("Allow", "GET, HEAD"),))
    if request.context.access.enabled and route.access:
        authorize(request, route.access, arguments.get("name", ""))
    return route.handler(request, **arguments)


def authorize(request: Request, action: str, name: str) -> None:
    """Find out who makes a request, and whether they may.

    Raises UNAUTHORIZED when other credentials, or a token with more in it, could help; else DENIED.
    """
    access = request.context.access
    scope = CATALOG if action == "catalog" else Scope("repository", name, action)
    challenge = functools.partial(bearer_challenge, request, None if action == "login" else scope)
    request.caller = caller = identify(request, challenge)
    allowed = caller != Caller(None) if action == "login" else access.allows(caller, scope)
    if allowed:
        return
    if caller.user is None or (caller.scopes is not None and access.permits(caller.user, scope)):
        raise with_challenge(RegistryError(ErrorCode.UNAUTHORIZED), challenge)
    raise RegistryError(ErrorCode.DENIED, f"{caller.user} may not {action} {name or 'the catalog'}")


def bearer_challenge(request: Request, scope: Scope | None) -> str:
    """Where to get a token, and for what: whoever pushes will want to look at what is there as well."""
    challenge = f'Bearer realm="{request.base_url()}/token",service="{request.context.access.service}"'
    if scope is not None:
        challenge += f',scope="{scope._replace(action="pull,push") if scope.action == "push" else scope}"'
    if request.caller.scopes is not None:  # or docker tries the same again and again
        challenge += ',error="insufficient_scope"'
    return challenge


def error_reply(error: Exception) -> Reply:
    """The one place that turns an exception into a reply; what is nobody's fault but ours is logged."""
    if not isinstance(error, RegistryError):
        error = _translate(error)
    headers = (("Content-Type", JSON), *error.headers)
    return Reply(error.code.status, headers, error.document())


def _translate(error: Exception) -> RegistryError:
    if is_out_of_space(error):
        return RegistryError(ErrorCode.STORAGE_FULL)
    traceback.print_exception(type(error), error, error.__traceback__)
    return RegistryError(ErrorCode.INTERNAL)


# === Server ===========================================================================================

CLIENT_GONE = 499  # only ever in the log: there was nobody left to tell
REASONS = {status.value: status.phrase for status in http.HTTPStatus}


@functools.lru_cache(maxsize=2)
def http_date(second: int) -> str:
    """A Date header's value (RFC 9110, 5.6.7)."""
    moment = time.gmtime(second)
    day, month = "MonTueWedThuFriSatSun", "JanFebMarAprMayJunJulAugSepOctNovDec"
    return (
        f"{day[moment.tm_wday * 3 :][:3]}, {moment.tm_mday:02} {month[moment.tm_mon * 3 - 3 :][:3]}"
        f" {moment.tm_year} {time.strftime('%H:%M:%S', moment)} GMT"
    )


def encode_head(reply: Reply, *, keep: bool) -> bytes:
    """A reply's status line and headers, with those that every reply has; keep: the connection stays open."""
    lines = [
        f"HTTP/1.1 {reply.status} {REASONS[reply.status]}",
        f"Date: {http_date(int(time.time()))}",
        "Docker-Distribution-API-Version: registry/2.0",
    ]
    if reply.status not in (204, 304):
        lines.append(f"Content-Length: {reply.length}")
    lines += [f"{name}: {value}" for name, value in reply.headers]
    lines.append("\r\n" if keep else "Connection: close\r\n\r\n")
    return "\r\n".join(lines).encode("latin-1")


class Connection(socketserver.BaseRequestHandler):
    """One client's connection, in a thread of its own: requests and replies in turn until either is done."""

    server: Server
    request: socket.socket

    def setup(self) -> None:
        """Called by socketserver before handle."""
        self.thread = threading.current_thread()
        self.idle_since = time.monotonic()  # 0.0 while it is busy
        self.server.opened(self)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle(self) -> None:
        """Called by socketserver; returns when the connection is to be closed."""
        with contextlib.suppress(ClientGone):
            self._shake_hands()
            self.reader = SocketReader(self.request)
            while self._serve_one():
                pass

    def _shake_hands(self) -> None:
        """Begin TLS, if that is spoken here: in this thread, so that only it waits for a silent client."""
        self.certified = None
        if self.server.tls is None:
            return
        try:
            self.request = self.server.tls.wrap(self.request)
            self.request.settimeout(HEADER_TIMEOUT)
            self.request.do_handshake()
        except (OSError, ValueError) as error:
            raise ClientGone from error
        self.certified = certified_user(self.request)

    def finish(self) -> None:
        """Called by socketserver after handle, also when that failed."""
        if is_tls(self.request):  # it took the socket over that socketserver is going to close
            self.request.close()
        self.server.closed(self)

    def hang_up(self) -> None:
        """Make this connection's thread come to its end; for other threads to call."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_RDWR)  # not TLS's own, which is for its thread

    def _serve_one(self) -> bool:
        """Serve one request; whether another may follow on this connection."""
        data = self.reader.read_head()
        if not data:
            return False
        self.idle_since, started = 0.0, time.perf_counter()
        request = Request(self.server.context, self.reader, self.client_address[0], self.certified)
        reply = Reply(CLIENT_GONE)
        try:
            reply = self._answer(request, data)
            keep = request.persistent and not self.server.stopping and request.body.drain()
            self._send(reply, bodiless=request.method == "HEAD", keep=keep)
        finally:
            if isinstance(reply.body, FileRange):
                reply.body.file.close()
            self._log(request, reply, started)
        if not keep:
            self._linger()
        self.idle_since = time.monotonic()
        return keep and not self.server.stopping

    def _answer(self, request: Request, data: bytes) -> Reply:
        try:
            request.parse(data)
            return dispatch(request)
        except ClientGone:
            raise
        except Exception as error:  # whatever it is, the client gets an answer
            return error_reply(error)

    def _send(self, reply: Reply, *, bodiless: bool, keep: bool) -> None:
        """Send a reply, in one write when its body is small."""
        head = encode_head(reply, keep=keep)
        if bodiless:
            self.reader.send(head)
        elif isinstance(reply.body, bytes):
            self.reader.send(head + reply.body)
        else:
            self.reader.send(head, more=True)
            self.reader.send_file(reply.body)

    def _linger(self) -> None:
        """Let the client read the reply first: closing on unread bytes would reset it (RFC 9112, 9.6)."""
        deadline = time.monotonic() + LINGER_TIMEOUT
        buffer = bytearray(RECEIVE_SIZE)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.reader.wait_at_most(left)
                if not self.request.recv_into(buffer):
                    break

    def _log(self, request: Request, reply: Reply, started: float) -> None:
        if self.server.log is None:
            return
        moment, client = time.strftime("%Y-%m-%dT%H:%M:%S%z"), self.client_address[0]
        milliseconds = (time.perf_counter() - started) * 1000
        agent = json.dumps(request.headers.get("user-agent", "-"))  # quoted, so that it stays one field
        target = CREDENTIALS.sub("//", request.target)
        self.server.log(
            f"{moment} {client} {request.method} {target} {reply.status} {reply.length}"
            f" {milliseconds:.1f}ms {agent}"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, IPv4 or IPv6 as the host demands. Raises OSError, OverflowError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server((str(address[0]), int(address[1])), family=family, backlog=LISTEN_BACKLOG)
    listener.setblocking(False)  # another worker may be quicker to accept what woke this one
    return listener


class Server(ThreadingHTTPServer):
    """Accepts connections, each served by a Connection in a thread, until it is told to stop."""

    def __init__(
        self,
        listener: socket.socket,
        context: Context,
        *,
        tls: TLS | None = None,
        max_connections: int = MAX_CONNECTIONS,
        parent_alive: socket.socket | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Takes over what listen gave.

        parent_alive: when its other end is closed, stop. log takes one access-log line for each request.
        """
        super().__init__(listener.getsockname()[:2], Connection, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_address = listener, listener.getsockname()
        self.context = context
        self.tls = tls
        self.log = log
        self._max_connections = max_connections
        self._parent_alive = parent_alive
        self.stopping = False
        self._connections: dict[Connection, None] = {}  # in the order in which they were opened
        self._serving: set[threading.Thread] = set()
        self.waker, self._wakee = socket.socketpair()  # whatever is sent there has serve_forever look up
        self.waker.setblocking(False)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept connections until stop_accepting; nothing is polled."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._wakee, selectors.EVENT_READ)
            if self._parent_alive:
                selector.register(self._parent_alive, selectors.EVENT_READ)
            while not self.stopping:
                ready = [key.fileobj for key, _ in selector.select()]
                self.stopping = self.stopping or self._parent_alive in ready
                self._accept()

    def _accept(self) -> None:
        try:
            connection, address = self.get_request()
        except (OSError, MemoryError):
            return
        try:
            if self.verify_request(connection, address):
                self.process_request(connection, address)
                return
        except Exception:  # no thread could be started for it
            self.handle_error(connection, address)
        self.shutdown_request(connection)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept one connection. Short of descriptors, waits a moment instead of spinning."""
        try:
            connection, address = self.socket.accept()
        except BlockingIOError:
            raise
        except OSError:
            time.sleep(0.05)
            raise
        connection.setblocking(True)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection; the one that has been idle longest makes some."""
        if len(self._serving) >= self._max_connections:
            idle = [connection for connection in list(self._connections) if connection.idle_since]
            if idle:
                longest = min(idle, key=lambda connection: connection.idle_since)
                longest.hang_up()
                longest.thread.join(EVICTION_TIMEOUT)
        if len(self._serving) < self._max_connections:
            return True
        with contextlib.suppress(OSError):
            reply = error_reply(RegistryError(ErrorCode.OVERLOADED))
            request.send(encode_head(reply, keep=False) + bytes(reply.body))  # type: ignore[arg-type]
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a connection's thread, known before it runs, so that finish_requests misses none."""
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        self._serving.add(thread)
        try:
            thread.start()
        except BaseException:
            self._serving.discard(thread)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._serving.discard(threading.current_thread())

    def opened(self, connection: Connection) -> None:
        """A connection's thread has begun."""
        self._connections[connection] = None

    def closed(self, connection: Connection) -> None:
        """A connection's thread is about to end."""
        self._connections.pop(connection, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An exception that no reply could be made of: log it, and go on serving."""
        traceback.print_exc()

    def stop_accepting(self) -> None:
        """Make serve_forever return; safe in a signal handler."""
        self.stopping = True
        with contextlib.suppress(OSError):
            self.waker.send(b"x")

    def finish_requests(self, timeout: float) -> None:
        """Hang up on idle clients, wait for requests in flight, then hang up on those too."""
        deadline = time.monotonic() + timeout
        while self._serving and time.monotonic() < deadline:
            self._hang_up(lambda connection: connection.idle_since > 0)
            self._join(0.05)
        self._hang_up(lambda connection: True)
        self._join(1.0)

    def _hang_up(self, condition: Callable[[Connection], bool]) -> None:
        for connection in list(self._connections):
            if condition(connection):
                connection.hang_up()

    def _join(self, timeout: float) -> None:
        """Wait until all connections' threads have ended, or for so many seconds."""
        deadline = time.monotonic() + timeout
        for thread in list(self._serving):
            thread.join(max(0.0, deadline - time.monotonic()))

    def server_close(self) -> None:
        """Free the port."""
        super().server_close()
        self.waker.close()
        self._wakee.close()


# === Embedding ========================================================================================


def open_store(data: str | os.PathLike[str], **options: Any) -> Store:
    """A store, or a StartupError that says why there is none; takes what Store takes."""
    try:
        return Store(data, **options)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartupError(
            f"cannot use {os.fspath(data)} as data directory: {reason}; name one that you can write to"
        ) from error


@dataclasses.dataclass
class Registry:
    """A registry in this process.

        with Registry() as registry:
            push_to(registry.url)

    Without a data directory it has a temporary one, removed at the end, and does not wait for the disk.
    """

    data: str | os.PathLike[str] | None = None
    host: str = "127.0.0.1"  # an address or a name of this machine
    port: int = 0  # 0: a free one
    sparse: bool = False  # accept manifests whose layers or children are absent
    sync: bool | None = None  # whether acknowledged means durable; by default, if data is given
    read_only: bool = False
    limits: Limits | None = None
    policy: Policy | None = None  # what garbage collection removes
    gc_interval: float = 0  # seconds between collections; 0: never
    users: str | None = None  # the path of an htpasswd file
    grants: str | None = None  # the path of a file that says what they may do
    anonymous_pull: bool = False
    public_url: str | None = None  # how clients reach it, if they do not say
    tls_cert: str | None = None  # paths of PEM files
    tls_key: str | None = None
    tls_client_ca: str | None = None
    max_connections: int = MAX_CONNECTIONS
    log: Callable[[str], None] | None = None  # takes one line for each request

    def __post_init__(self) -> None:
        self._stop_timeout = 0.0
        self._token_key: bytes | None = None  # once known, that of every worker
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Registry:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> Registry:
        """Begin to serve in the background. Raises StartupError."""
        self.open()
        thread = threading.Thread(target=self.serve, name="registry", daemon=True)
        thread.start()
        self._resources.callback(thread.join)
        self._resources.callback(self.server.stop_accepting)
        return self

    def open(self, listener: socket.socket | None = None, parent_alive: socket.socket | None = None) -> None:
        """Open the data directory and listen, unless a listener is given. Raises StartupError."""
        self._check_options()
        with contextlib.ExitStack() as resources:
            self.store = self._open_store(resources)
            resources.callback(self.store.close)
            self.server = self._open_server(listener or self.bind(), parent_alive)
            resources.callback(self.server.server_close)
            resources.callback(lambda: self.server.finish_requests(self._stop_timeout))
            if not self.read_only:
                self.store.expire_uploads()
                self.store.remove_pending()
                self._start_periodic_jobs(resources)
            self._resources = resources.pop_all()

    def _open_store(self, resources: contextlib.ExitStack) -> Store:
        data, durable = self.data, self.sync
        if data is None:
            data = tempfile.mkdtemp(prefix="registry-")
            resources.callback(shutil.rmtree, data, ignore_errors=True)
        if durable is None:
            durable = self.data is not None
        return open_store(
            data, sparse=self.sparse, durable=durable, read_only=self.read_only, limits=self.limits
        )

    def bind(self) -> socket.socket:
        """A socket that listens where this registry is to. Raises StartupError."""
        try:
            return listen(self.host, self.port)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StartupError(
                f"cannot listen on {self.host} port {self.port}: {reason}; choose another --host or --port"
            ) from error

    def _check_options(self) -> None:
        if (self.tls_key or self.tls_client_ca) and not self.tls_cert:
            raise StartupError("a key or a CA for clients needs a certificate too; give --tls-cert")
        if self.anonymous_pull and not (self.users or self.tls_client_ca):
            raise StartupError(
                "without users everybody may push as well; give --users, or leave anonymous pulls out"
            )
        if self.public_url and not re.fullmatch(r"https?://[!#-~]+", self.public_url):
            raise StartupError(f"{self.public_url!r} is no URL; write one like https://registry.example")

    def _open_server(self, listener: socket.socket, parent_alive: socket.socket | None) -> Server:
        with contextlib.ExitStack() as undo:
            undo.callback(listener.close)
            tls = TLS(self.tls_cert, self.tls_key, self.tls_client_ca) if self.tls_cert else None
            context = Context(self.store, self._open_access(), self.public_url, secure=tls is not None)
            undo.pop_all()
        return Server(
            listener,
            context,
            tls=tls,
            max_connections=self.max_connections,
            parent_alive=parent_alive,
            log=self.log,
        )

    def _open_access(self) -> Access:
        certificates = self.tls_client_ca is not None
        if self._token_key is None and (self.users or certificates):
            path = os.path.join(self.store.files.root, "token.key")
            try:
                self._token_key = load_key(path, create=not self.read_only) or secrets.token_bytes(32)
            except OSError as error:
                raise StartupError(
                    f"cannot use {path}: {error.strerror}; remove it if it is no file"
                ) from error
        return Access(
            self.users,
            self.grants,
            anonymous_pull=self.anonymous_pull,
            certificates=certificates,
            key=self._token_key or b"",
        )

    def _start_periodic_jobs(self, resources: contextlib.ExitStack) -> None:
        stop = threading.Event()
        housekeeper = threading.Thread(target=self._run_periodic_jobs, args=(stop,), daemon=True)
        housekeeper.start()
        resources.callback(housekeeper.join)
        resources.callback(stop.set)

    def _run_periodic_jobs(self, stop: threading.Event) -> None:
        """Do what comes round, each job at its interval, until told to stop."""
        jobs: list[tuple[float, Callable[[], object]]] = [
            (FLUSH_INTERVAL, self.store.flush_pulls),
            (FLUSH_INTERVAL, self.store.files.keep_reserve),
            (EXPIRY_INTERVAL, self.store.expire_uploads),
        ]
        due = [time.monotonic() + interval for interval, _ in jobs]
        if self.gc_interval:
            jobs.append((self.gc_interval, lambda: self._collect_garbage(stop)))
            passed = min(max(0.0, time.time() - self.store.files.collected_at()), self.gc_interval)
            due.append(time.monotonic() + self.gc_interval - passed)
        while not stop.wait(max(0.0, min(due) - time.monotonic())):
            number = due.index(min(due))
            interval, job = jobs[number]
            try:
                job()
            except Exception:  # the disk may be full; it need not stay so
                traceback.print_exc()
            due[number] = time.monotonic() + interval

    def _collect_garbage(self, stop: threading.Event) -> None:
        """Collect, and with the first collection of a day (UTC) walk over blobs/."""
        walk = self.store.files.collected_at() // DAY != time.time() // DAY
        collector = Collector(self.store, self.policy or Policy(), lambda _removal: None, stopped=stop.is_set)
        collector.run(walk=walk)
        if not stop.is_set():
            self.store.files.note_collection()
        if self.log and collector.summary():
            self.log(f"gc removed {collector.summary()}")

    def serve(self) -> None:
        """Accept connections until stop; after open."""
        self.server.serve_forever()

    def close(self, timeout: float = 1.0) -> None:
        """Stop, giving requests in flight so many seconds, and free everything."""
        self._stop_timeout = timeout
        if hasattr(self, "server"):
            self.server.stop_accepting()
        self._resources.close()

    @property
    def netloc(self) -> str:
        """Host and port as an image reference begins with them: 127.0.0.1:5000."""
        host, port = self.server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    @property
    def url(self) -> str:
        """Where the registry answers: http://127.0.0.1:5000."""
        return f"{'https' if self.tls_cert else 'http'}://{self.netloc}"


# === Command line =====================================================================================


def write_log(line: str) -> None:
    """Write one line to standard error. If nobody reads that any more, go on without."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")


def command_serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    raise_descriptor_limit()
    names = {field.name for field in dataclasses.fields(Registry)} & set(vars(options))
    registry = Registry(
        **{name: getattr(options, name) for name in names},
        sync=not options.no_sync,
        limits=Limits(options.max_blob_size, options.min_free),
        policy=policy_of(options),
        log=None if options.quiet else write_log,
    )
    if options.workers > 1:
        Workers(registry, options.workers).run(functools.partial(announce, options, registry))
        return
    registry.open()
    stop_on_signals(registry.server, signal.SIGTERM, signal.SIGINT)
    announce(options, registry)
    serve_until_stopped(registry)


def stop_on_signals(server: Server, *signals: signal.Signals) -> None:
    """Let the first of these signals end the server in good order, and a second one at once.

    Whichever thread the system gives a signal to, the wake-up descriptor has the main one notice.
    """

    def stop(number: int, frame: object) -> None:
        if server.stopping:
            os._exit(128 + number)
        server.stop_accepting()

    signal.set_wakeup_fd(server.waker.fileno(), warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, stop)


def serve_until_stopped(registry: Registry) -> None:
    """Serve in this thread, and close what was opened when it is over."""
    registry.serve()
    signal.set_wakeup_fd(-1)
    registry.close(STOP_TIMEOUT)


def announce(options: argparse.Namespace, registry: Registry) -> None:
    """Say that connections are accepted now, and what somebody on the network could do with them."""
    print(f"Serving {options.data} at {registry.url}", flush=True)
    for warning in exposure_warnings(options):
        print(f"registry.py: warning: {warning}", file=sys.stderr, flush=True)


class Workers:
    """Processes that share one port and one data directory; one that dies is replaced.

    This process only watches over them. The first worker does the housekeeping for all.
    """

    def __init__(self, registry: Registry, count: int) -> None:
        """Raises StartupError where processes cannot be forked."""
        if not hasattr(os, "fork"):
            raise StartupError("this system cannot fork; leave --workers out")
        self._signals = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
        self._registry = registry
        self._count = count
        self._numbers: dict[int, int] = {}  # each process's number
        self._stopping = False

    def run(self, announce: Callable[[], None]) -> None:
        """Serve until SIGTERM or Ctrl-C. Raises StartupError."""
        self._listener = self._registry.bind()
        self._parent_alive, self._end = socket.socketpair()
        self._registry.open(self._listener.dup())  # what is wrong is better said once, and before
        announce()
        self._registry.close()
        signal.signal(signal.SIGCHLD, lambda *_: None)  # ignored signals need not be reported
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        for number in range(self._count):
            self._start(number)
        while self._numbers:
            arrived = signal.sigwait(self._signals)
            if arrived == signal.SIGCHLD:
                self._replace_dead()
            else:
                self._stop(arrived)

    def _replace_dead(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (process := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                number = self._numbers.pop(process, None)  # none of ours: whoever is process 1 inherits some
                if number is not None and not self._stopping:
                    time.sleep(RESTART_DELAY)
                    self._start(number)

    def _start(self, number: int) -> None:
        process = os.fork()
        if not process:
            self._work(number)
        self._numbers[process] = number

    def _work(self, number: int) -> NoReturn:
        """What a worker does: it stops when it is told to, or when the process that watches it is gone."""
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes here too
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
            self._end.close()
            self._registry.gc_interval = 0 if number else self._registry.gc_interval
            self._registry.open(self._listener, self._parent_alive)
            stop_on_signals(self._registry.server, signal.SIGTERM)
            serve_until_stopped(self._registry)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _stop(self, number: int) -> None:
        """The first signal ends the workers in good order, a second one at once."""
        for process in self._numbers:
            os.kill(process, signal.SIGKILL if self._stopping else signal.SIGTERM)
        if self._stopping:
            os._exit(128 + number)
        self._stopping = True


def exposure_warnings(options: argparse.Namespace) -> list[str]:
    """What somebody on the network could do to a registry that listens beyond this machine."""
    if options.host in ("localhost", "::1") or options.host.startswith("127."):
        return []
    warnings = []
    if not (options.users or options.tls_client_ca or options.read_only):
        warnings.append("anybody who reaches this port can push, overwrite and delete images; see --users")
    if not options.tls_cert:
        warnings.append("passwords and images can be read and changed on their way; see --tls-cert")
    return warnings


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system will: each connection takes one, and often a file with it."""
    if resource is None:
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        enough = 10_240 if hard == resource.RLIM_INFINITY else hard  # macOS allows no more than that
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


class Progress:
    """How far a long job has come: a line on standard error, written over and over if that is a terminal."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit = total, unit
        self._done, self._started, self._shown = 0, time.monotonic(), 0.0
        self._lock = threading.Lock()
        self._visible = sys.stderr.isatty()

    def advance(self, amount: int) -> None:
        """So much more is done."""
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if self._visible and now - self._shown > 0.1:
                self._shown = now
                self._show(now)

    def _show(self, now: float) -> None:
        part = min(self._done / self._total, 1.0) if self._total else 1.0
        rate = self._done / max(now - self._started, 1e-3)
        bar = ("#" * int(part * 30)).ljust(30, ".")
        done, rate_text = format_count(self._done, self._unit), format_count(int(rate), self._unit)
        sys.stderr.write(f"\r[{bar}] {part:4.0%}  {done}  {rate_text}/s \x1b[K")
        sys.stderr.flush()

    def finish(self) -> None:
        """Make room for other output."""
        if self._visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def format_count(count: int, unit: str) -> str:
    """A number for people: bytes in binary multiples, other things as they are."""
    if unit != "B":
        return f"{count} {unit}"
    value, prefixes = float(count), iter(("", "Ki", "Mi", "Gi", "Ti", "Pi"))
    prefix = next(prefixes)
    while value >= 1024 and prefix != "Pi":
        value, prefix = value / 1024, next(prefixes)
    return f"{value:.{1 if prefix else 0}f} {prefix}B"


def command_gc(options: argparse.Namespace) -> None:
    """Remove what nothing needs any more, beside a running registry or without one."""
    with contextlib.closing(open_existing_store(options.data)) as store:

        def report(removal: Removal) -> None:
            progress.finish()
            where = f"{removal.repository}@" if removal.repository else ""
            print_line(f"{removal.kind} {where}{removal.digest} {removal.size}")

        collector = Collector(store, policy_of(options), report)
        progress = Progress(collector.expected(walk=options.all), "items")
        collector.run(walk=options.all, dry_run=options.dry_run, advance=progress.advance)
        progress.finish()
    print_line(f"{'would remove' if options.dry_run else 'removed'} {collector.summary() or 'nothing'}")


def print_line(line: str) -> None:
    """Print a line. If nobody reads that any more, or it cannot be written, go on without."""
    try:
        print(line, flush=True)
    except OSError:  # also what is buffered goes nowhere, lest Python complain at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command_verify(options: argparse.Namespace) -> int:
    """Compare every file with its digest and every row with its file; exit status 1 if something is wrong."""
    with contextlib.closing(open_existing_store(options.data)) as store:

        def advance(amount: int) -> None:
            progress.advance(amount)

        verifier = Verifier(store, advance)
        progress = Progress(verifier.total(), "B")
        found = 0
        for finding in verifier.run(repair=options.repair):
            progress.finish()
            print(f"{finding.kind} {finding.subject}{' (repaired)' if finding.repaired else ''}", flush=True)
            found += 1
        store.remove_pending()
        progress.finish()
    print(f"{found} problems found" if found else "no problems found")
    return 1 if found else 0


def command_passwd(options: argparse.Namespace) -> None:
    """Set a user's password, or remove the user."""
    if not re.fullmatch(r"[^\s:#](?:[^:]*[^\s:])?", options.name) or not options.name.isprintable():
        raise StartupError("a user's name has no colon, no space around it, and does not begin with #")
    line = None if options.delete else f"{options.name}:{hash_password(ask_password())}"
    try:
        change_user(os.path.realpath(options.users), options.name, line)
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot change {options.users}: {error}") from error


def change_user(path: str, name: str, line: str | None) -> None:
    """Replace a user's line in a users file, or remove it; another such change waits. Raises StartupError."""
    with locked_directory(os.path.dirname(path)):
        text = Path(path).read_text(encoding="utf-8") if os.path.exists(path) else ""
        lines = [other for other in text.splitlines() if other.partition(":")[0].strip() != name]
        if line is None and len(lines) == len(text.splitlines()):
            raise StartupError(f"there is no {name} in {path}")
        content = "".join(f"{other}\n" for other in (lines if line is None else [*lines, line]))
        replace_file(f"{path}.{secrets.token_hex(8)}", path, content.encode("utf-8"))


def ask_password() -> str:
    """A password: asked for twice on a terminal, else a line of standard input."""
    if sys.stdin.isatty():
        password = getpass.getpass("Password: ")
        if getpass.getpass("Again: ") != password:
            raise StartupError("the two are not the same; try again")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise StartupError("a password must not be empty")
    return password


def open_existing_store(data: str) -> Store:
    """The store of a data directory that there is. Raises StartupError."""
    if not os.path.exists(os.path.join(data, "registry.db")):
        raise StartupError(f"{data} is no registry's data directory; name the one with registry.db in it")
    return open_store(data)


def policy_of(options: argparse.Namespace) -> Policy:
    """The garbage collection that a command line asks for."""
    return Policy(options.grace, options.untagged_after, options.keep_last, options.max_size)


def parse_port(text: str) -> int:
    """A port number, 0 for a free one."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError(text)
    return port


def parse_duration(text: str) -> float:
    """Seconds, from a number with s, m, h or d behind it."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)([smhd]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write one like 30s, 5m, 1h or 7d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def parse_grace(text: str) -> float:
    """A duration that is long enough for a push to end."""
    grace = parse_duration(text)
    if grace < SHORTEST_GRACE:
        raise argparse.ArgumentTypeError(
            f"{text} is too short for a push; take {SHORTEST_GRACE:.0f}s or more"
        )
    return grace


def parse_size(text: str) -> int:
    """Bytes, from a number with K, M, G or T behind it, each 1024 times the one before."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)([KMGT]?)(?:i?B)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write one like 64M or 50G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def parse_count_option(text: str) -> int:
    """A number of things, none being allowed."""
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, or too large")
    return int(text)


def parse_positive(text: str) -> int:
    """A number of things, at least one."""
    number = parse_count_option(text)
    if not number:
        raise argparse.ArgumentTypeError("it takes at least one")
    return number


# Options: flag, what --help says of it, and what argparse makes of it.
# fmt: off
DATA_OPTION = ("--data", "data directory", {"default": "./data", "metavar": "DIR"})
POLICY_OPTIONS = (
    ("--untagged-after", "remove manifests that have been without a tag for so long, such as 7d; else never",
        {"type": parse_duration, "metavar": "AGE"}),
    ("--keep-last", "but keep the newest N untagged images of each repository",
        {"type": parse_count_option, "default": 0, "metavar": "N"}),
    ("--grace", "leave alone what a client pushed or asked for so recently",
        {"type": parse_grace, "default": "1h", "metavar": "AGE"}),
    ("--max-size", "remove the least recently pulled images while the store is larger, such as 50G",
        {"type": parse_size, "metavar": "SIZE"}),
)
SERVE_OPTIONS = (
    DATA_OPTION,
    ("--host", "address to listen on", {"default": "127.0.0.1", "metavar": "HOST"}),
    ("--port", "port to listen on, 0 for a free one",
        {"type": parse_port, "default": 5000, "metavar": "PORT"}),
    ("--workers", "serve with so many processes, for more than one core's worth",
        {"type": parse_positive, "default": 1, "metavar": "N"}),
    ("--max-connections", "serve so many clients at once, for each process",
        {"type": parse_positive, "default": MAX_CONNECTIONS, "metavar": "N"}),
    ("--read-only", "serve pulls only; the disk may be read-only", {"action": "store_true"}),
    ("--sparse", "accept manifests whose layers or children are absent", {"action": "store_true"}),
    ("--no-sync", "do not wait for the disk: faster, and a power cut may lose or damage what was pushed",
        {"action": "store_true"}),
    ("--max-blob-size", "refuse larger blobs", {"type": parse_size, "metavar": "SIZE"}),
    ("--min-free", "refuse pushes that would leave less of the disk free",
        {"type": parse_size, "default": "64M", "metavar": "SIZE"}),
    ("--gc-interval", "collect garbage so often, 0 for never",
        {"type": parse_duration, "default": "1h", "metavar": "AGE"}),
    *POLICY_OPTIONS,
    ("--users", "let only the users of this htpasswd file in; see the command passwd", {"metavar": "FILE"}),
    ("--grants", "what they may do: lines of who, repositories, actions", {"metavar": "FILE"}),
    ("--anonymous-pull", "let everybody pull", {"action": "store_true"}),
    ("--public-url", "how clients reach this registry, if a proxy does not say", {"metavar": "URL"}),
    ("--tls-cert", "serve HTTPS with this certificate chain (PEM)", {"metavar": "FILE"}),
    ("--tls-key", "its private key, if that is in another file", {"metavar": "FILE"}),
    ("--tls-client-ca", "let clients in whose certificate this CA has signed; its name is the user",
        {"metavar": "FILE"}),
    ("--quiet", "no access log on standard error", {"action": "store_true"}),
)
COMMANDS = (
    ("gc", command_gc, "remove what nothing needs any more", (
        DATA_OPTION,
        ("--dry-run", "only say what would be removed, from a copy of the database in a temporary directory",
            {"action": "store_true"}),
        ("--all", "also remove files that a crash left under blobs/, as the daemon does daily",
            {"action": "store_true"}),
        *POLICY_OPTIONS,
    )),
    ("verify", command_verify, "check every file and every row", (
        DATA_OPTION,
        ("--repair", "move damaged files aside so that clients push them again", {"action": "store_true"}),
    )),
    ("passwd", command_passwd, "set a user's password", (
        ("name", "the user", {"metavar": "NAME"}),
        ("--users", "the htpasswd file, made if missing", {"required": True, "metavar": "FILE"}),
        ("--delete", "remove the user instead", {"action": "store_true"}),
    )),
)
# fmt: on


Option = tuple[str, str, dict[str, Any]]


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Give a parser some of the options above."""
    for flag, text, settings in options:
        default = f" (default: {settings['default']})" if settings.get("default") else ""
        parser.add_argument(flag, help=text + default, **settings)


def build_parser() -> argparse.ArgumentParser:
    """The command line: serving, and the other commands as subcommands beside it."""
    parser = argparse.ArgumentParser(
        prog="registry.py",
        description="A container registry. Without a command, it serves.",
        allow_abbrev=False,
    )
    parser.set_defaults(command=command_serve)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_options(parser, SERVE_OPTIONS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command, text, options in COMMANDS:
        subparser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        subparser.set_defaults(command=command)
        add_options(subparser, options)
        shared = {option[0] for option in SERVE_OPTIONS} & {option[0] for option in options}
        for action in subparser._actions:
            if shared & set(action.option_strings) and not action.required:
                action.default = argparse.SUPPRESS  # what stands before the command holds, then
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except StartupError as error:
        print(f"registry.py: {error}", file=sys.stderr)
        return 1
    except (OSError, sqlite3.Error) as error:
        print(f"registry.py: {error}; see whether the disk is full or damaged", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
