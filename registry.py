#!/usr/bin/env python3
"""A container registry in two files: this one and schema.sql.

    python registry.py --data ./data

serves the OCI distribution specification to docker, podman, containerd, Helm, ORAS and the rest,
and ``with Registry() as registry:`` does the same inside a test suite.

The data directory:

    blobs/<algorithm>/<hex>     every blob and manifest, named by its digest, as in an OCI image layout
    uploads/<session id>        the bytes of uploads under way; on the same volume as blobs/
    registry.db                 SQLite: repositories, links, manifests, tags
    registry.db-wal, -shm       its log, and the index of that, while it is open
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
    Access          users, grants, tokens and the certificate; knows no HTTP either
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
import collections
import contextlib
import dataclasses
import enum
import errno
import functools
import getpass
import hashlib
import heapq
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import math
import mmap
import os
import queue
import re
import resource
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from email.utils import formatdate
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Callable, ClassVar, Generic, NamedTuple, NoReturn, TypeVar, Union
from urllib.parse import parse_qs, quote, unquote

try:
    import fcntl
except ImportError:  # Windows: sessions are then guarded within one process only
    fcntl = None  # type: ignore[assignment]
try:
    import ssl
except ImportError:  # a Python built without it serves plain HTTP
    ssl = None  # type: ignore[assignment]

if (python := sys.version_info) < (3, 9):  # a SyntaxError here? registry.py needs Python 3.9 or newer
    raise (SystemExit if __name__ == "__main__" else ImportError)(
        f"registry.py needs Python 3.9 or newer; this is {python[0]}.{python[1]}"
    )

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
REFERRER_PAGE_BYTES = 3 * MIB  # clients stop reading an index at 4 MiB
TAG_PARAMETER_LIMIT = 50
PARAMETER_LIMIT = 1_000  # of a query or form
DETAIL_LIMIT, DETAIL_LENGTH = 1_000, 300  # entries of one error, and characters of each one's detail

RECEIVE_SIZE = 64 * KIB
COPY_SIZE = 256 * KIB  # what is encrypted at a time on its way out
BUFFER_SIZE = 1 * MIB  # each of a large upload's two buffers
LARGE_UPLOADS = 32  # at once with such buffers; any others do with one of RECEIVE_SIZE
FLUSH_SIZE = 8 * MIB  # after which the disk may begin to write an upload
SMALL_CONTENT = 64 * KIB  # up to here, contents are kept in memory and leave in one write
CACHE_SIZE = 8 * MIB

IDLE_TIMEOUT = 75.0  # seconds a kept-alive connection may wait for its next request
HEADER_TIMEOUT = 30.0  # from a head's first byte to its last
STALL_TIMEOUT = 60.0  # without one byte of a body moving, either way
SLOWEST_BODY = 16 * KIB  # bytes a second of a body, after the time a head may take; a slower one makes room
LINGER_TIMEOUT = 5.0  # for the rest of a request after its reply, and for the client to read that
EVICTION_DELAY = 1.0  # for which whoever is being answered need not make room
EVICTION_TIMEOUT = 0.1  # for a connection that makes room for another
STOP_TIMEOUT = 10.0  # for requests in flight when the daemon is told to stop
DATABASE_TIMEOUT = 60.0  # for the database's write lock, whoever holds it
UPLOAD_LOCK_TIMEOUT = 0.2  # for another that writes to the same upload session
UPLOAD_LIFETIME = 24 * 3600.0  # of an idle upload session
DAY = 24 * 3600
EXPIRY_INTERVAL = 3600.0  # between looks for such sessions
FLUSH_INTERVAL = 60.0  # between records of what was pulled
OPTIONAL_WRITE_TIMEOUT = 1.0  # for the write lock, by what can do without or be tried again later
LEASE_SLACK = 5.0  # seconds by which leased_at may be behind
GRACE = 3600.0  # how long a client can rely on what it was told, by default
SHORTEST_GRACE = 10.0  # twice the slack

MAX_CONNECTIONS = 1024  # by default
IDLE_THREADS = 8  # that wait for the next connection
TOKEN_PATH = "/token"
TOKEN_LIFETIME = 300  # seconds
PASSWORD_LIFETIME = 3600.0  # since its last use, for which a password that was right is not hashed again
FAILURE_LIMIT = 5  # wrong passwords from one address before it is slowed down
FAILURE_INTERVAL = 60.0  # seconds without one, after which they are forgotten
FAILURE_DELAY, FAILURE_DELAY_LIMIT = 0.2, 2.0  # seconds for each further one, and at most
USER_LIMIT, PASSWORD_LIMIT = 255, 4096  # characters; what is longer is not looked at
SCRYPT_LN, SCRYPT_MEMORY = 14, 64 * MIB
FORM_LIMIT = 64 * KIB
COUNT_LIMIT = 10**18
RESERVE_SIZE = 4 * MIB
LOG_INDEX_HEAD = 96  # bytes: two copies of the head of registry.db-shm
IDLE_READERS = 8  # connections to the database that are kept for the next queries
HASH_LIMIT = 1_000  # running hashes remembered between the requests of upload sessions
LOOKUP_CACHE_SIZE, LOOKUP_SIZE = 4 * MIB, 32 * KIB  # of all query results remembered, and of one
CACHE_ENTRY_SIZE = 500  # bytes that Python needs for remembering anything, roughly
BATCH = 100  # rows that maintenance changes under one write lock
CHOICE = 1_000  # rows that it reads at a time
DROP_LIMIT = 1_000  # manifests that go with one that kept them
PUSH_PAUSE = 60  # seconds that may pass in a push between one layer and the next
CLOCK_SLACK = 60.0  # seconds by which a time may be ahead
REFERENCE_STEP = 400  # rows of one INSERT: SQLite before 3.32 takes 999 parameters
LISTING_STEP = 1_000  # names read at once when the caller may not pull all of them
MOUNT_LIMIT = 1_000  # repositories tried as the source of a mount
FORMAT_VERSION = 2  # PRAGMA user_version of the schema.sql beside this file

ALGORITHMS = ("sha256", "sha512")
NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
NAME_LIMIT = 255
AFTER_NAMES = "\x7f"  # no name begins with this or anything after it in byte order
MEDIA_TYPE_LIMIT = 255  # RFC 6838, 4.2: 127 characters on either side of the slash
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
# A file under uploads/. A session's id says when it began, what its bytes are hashed with and, hashed, whose
# it is.
UPLOAD = re.compile(r"[0-9a-f]{32}(?:-(sha256|sha512)-([0-9a-f]{16}))?")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
LEADING_LINES = re.compile(rb"\A(?:\r\n)+")  # some clients end a body with one too many (RFC 9112, 2.2)
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
BYTE_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.IGNORECASE)
ENTITY_TAG = re.compile(r'(W/)?"([^"]*)"')
HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
ABSOLUTE_FORM = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)  # of a request target

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
    PRECONDITION_FAILED = 412, "DENIED", "If-Match or If-None-Match does not hold; this is there now"
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
    DATABASE_BUSY = 503, "TOOMANYREQUESTS", "the registry's database is busy; try again"
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
        details = tuple(detail[:DETAIL_LENGTH] for detail in details[:DETAIL_LIMIT])
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


def is_busy(error: BaseException) -> bool:
    """Whether the database could not be had because another process held it for too long."""
    return isinstance(error, sqlite3.OperationalError) and "is locked" in str(error)


def write_log(text: str, end: str = "\n") -> None:
    """Write to standard error. If there is none, or nobody reads it any more, go on without."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text + end)
        sys.stderr.flush()


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

    def descriptor(self, digest: str, size: int) -> bytes:
        """How the list of referrers describes it, as JSON (specification, "Listing Referrers")."""
        descriptor: dict[str, Any] = {"mediaType": self.media_type, "digest": digest, "size": size}
        if self.artifact_type:
            descriptor["artifactType"] = self.artifact_type
        if self.annotations:
            descriptor["annotations"] = self.annotations
        return encode_json(descriptor)


def invalid_manifest(reason: str) -> RegistryError:
    """The error for content that is no acceptable manifest."""
    return RegistryError(ErrorCode.MANIFEST_INVALID, reason)


def parse_manifest(content: bytes, content_type: str) -> Manifest:
    """Check a manifest or index of any media type, pushed with this Content-Type ("" for none).

    Raises MANIFEST_INVALID for anything that is neither.
    """
    document = _parse_json_object(content)
    media_type = _media_type(document, content_type)
    artifact_type = _optional(document, "artifactType", str)
    optional: list[dict[str, Any]] = []
    if "manifests" in document:
        required = _descriptors(document["manifests"], "manifests")
    else:
        required = _descriptors([document.get("config")], "config")
        artifact_type = artifact_type or _optional(required[0], "mediaType", str)
        for layer in _descriptors(document.get("layers"), "layers"):
            kind = _optional(layer, "mediaType", str) or ""
            foreign = layer.get("urls") or "nondistributable" in kind or "foreign" in kind
            (optional if foreign else required).append(layer)  # clients fetch foreign layers elsewhere
    subject = document.get("subject")
    annotations = _optional(document, "annotations", dict) or {}
    if not all(isinstance(value, str) for value in annotations.values()):
        raise invalid_manifest("annotations are not all strings")
    return Manifest(
        media_type,
        artifact_type or None,
        None if subject is None else _descriptors([subject], "subject")[0]["digest"],
        annotations,
        tuple(sorted({descriptor["digest"] for descriptor in required})),
        tuple(sorted({descriptor["digest"] for descriptor in optional})),
    )


def _parse_json_object(content: bytes) -> dict[str, Any]:
    """The JSON object in some bytes. Neither depth nor a number's length costs more than it should."""

    def parse_int(digits: str) -> int:
        if len(digits) > 20:  # int() takes quadratic time
            raise ValueError("number too long")
        return int(digits)

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        document = json.loads(content.decode("utf-8"), parse_int=parse_int, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise invalid_manifest(f"not JSON: {type(error).__name__}") from None
    if not isinstance(document, dict):
        raise invalid_manifest("not a JSON object")
    return document


def _media_type(document: dict[str, Any], content_type: str) -> str:
    """The one media type that body, header and the body's members agree on."""
    declared = _optional(document, "mediaType", str)
    if declared and content_type and declared != content_type:
        raise invalid_manifest(f"mediaType {declared} was sent as Content-Type {content_type}")
    index, image = "manifests" in document, "layers" in document or "config" in document
    media_type = declared or content_type or (OCI_INDEX if index else OCI_MANIFEST)
    if not MEDIA_TYPE.fullmatch(media_type) or len(media_type) > MEDIA_TYPE_LIMIT:
        raise invalid_manifest("malformed media type")
    if document.get("schemaVersion") != 2 or media_type.startswith(DOCKER_SCHEMA1):
        raise invalid_manifest("schemaVersion must be 2; Docker's schema 1 is not supported")
    if index == image:
        raise invalid_manifest("needs either manifests, or config and layers")
    if media_type in ((OCI_MANIFEST, DOCKER_MANIFEST) if index else (OCI_INDEX, DOCKER_LIST)):
        raise invalid_manifest(f"its members are not those of {media_type}")
    return media_type


def _optional(document: dict[str, Any], member: str, kind: type) -> Any:
    """A member that may be absent or null, but is otherwise of this kind; text is a media type, so short."""
    value = document.get(member)
    if value is not None and not isinstance(value, kind):
        raise invalid_manifest(f"{member} is of the wrong type")
    if isinstance(value, str) and (len(value) > MEDIA_TYPE_LIMIT or not value.isprintable()):
        raise invalid_manifest(f"{member} is too long, or has characters that cannot be printed")
    return value


def _descriptors(values: object, member: str) -> list[dict[str, Any]]:
    """A list of content descriptors (image-spec descriptor.md), their digests and sizes checked."""
    if not isinstance(values, list):
        raise invalid_manifest(f"{member} is not a list")
    for value in values:
        if not isinstance(value, dict):
            raise invalid_manifest(f"{member} is not a descriptor")
        digest, size = value.get("digest"), value.get("size", 0)
        if not isinstance(digest, str) or not is_digest(digest):
            raise invalid_manifest(f"{member} has a bad digest")
        if type(size) is not int or size < 0:
            raise invalid_manifest(f"{member} has a bad size")
    return values


# === Files ============================================================================================


def no_follow(path: str, flags: int) -> int:
    """An opener for open() that follows no link which somebody may have put into the data directory."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)


def is_read_only(path: str) -> bool:
    """Whether a path is on a file system that nobody can write to, as far as this system tells."""
    return hasattr(os, "statvfs") and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


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
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may have a copy of the descriptor
        os.close(descriptor)


@contextlib.contextmanager
def write_behind(write: Callable[[memoryview], None]) -> Iterator[Callable[[memoryview], None]]:
    """A write that returns at once: the next call, and the end, wait for it and raise what it raised."""
    from concurrent.futures import Future, ThreadPoolExecutor  # noqa: PLC0415 - it would slow every start

    last: Future[None] = Future()
    last.set_result(None)

    def write_later(data: memoryview) -> None:
        nonlocal last
        last.result()
        last = thread.submit(write, data)

    with ThreadPoolExecutor(1) as thread:
        try:
            yield write_later
        finally:
            last.result()


def began_at(session: str) -> int:
    """The second in which an upload session began, as its id says."""
    return int(session[:8], 16)


def hashed_name(name: str) -> str:
    """What stands for a repository in the names of its upload sessions."""
    return hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]


class UploadFile:
    """A file under uploads/ that this thread alone may write to, hashed as it grows.

    The lock is the file's own (flock), so it holds between processes and ends with them. It is on a
    descriptor that can only read; one that writes is open within append and truncate and nowhere else, so
    that a file is never open for writing once it is under blobs/. But NFS takes no exclusive lock on one
    that cannot write (flock(2)): there it can, and is not used for that.
    """

    _large = threading.BoundedSemaphore(LARGE_UPLOADS)

    def __init__(
        self,
        path: str,
        algorithm: str,
        check_space: Callable[[int, int], None],
        *,
        create: bool = False,
        patience: float = UPLOAD_LOCK_TIMEOUT,
    ) -> None:
        """Raises FileNotFoundError when there is none to open, UPLOAD_BUSY when another has it for longer.

        check_space is asked before the file grows, with its size and by how much, and raises what forbids it.
        """
        self.path = path
        self.id = os.path.basename(path)
        self._check_space = check_space
        more = os.O_CREAT | os.O_EXCL if create else 0
        self._file = open(  # noqa: SIM115
            path, "rb", buffering=0, opener=lambda path, flags: no_follow(path, flags | more)
        )
        try:
            self._lock(time.monotonic() + patience)
        except BaseException:
            self._file.close()
            raise
        self.size = self._flushed = self.status().st_size
        # Of exactly the bytes that the file has; None when they came in a request that is not remembered.
        self._hash: Any = None if self.size else hashlib.new(algorithm)

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
            except OSError as error:
                if error.errno != errno.EBADF or self._file.writable():
                    raise
                self._file.close()
                self._file = open(self.path, "rb+", buffering=0, opener=no_follow)  # noqa: SIM115
        if not os.path.samestat(self.status(), os.lstat(self.path)):
            raise FileNotFoundError(self.path)  # what was opened became a blob before it was locked

    def append(self, readinto: Callable[[memoryview], int], expected: int | None = None) -> int:
        """Append all that readinto gives until it gives nothing, and return how many bytes that was.

        expected: how many bytes that will be, if it is known. What was received before an exception stays
        in the file. Once much has come, and not too many others have such, two large buffers take turns:
        one is hashed and written while the other is filled.
        """
        self._check_space(self.size, expected or 0)
        start, filled = self.size, 0
        size = RECEIVE_SIZE if expected is None else min(expected + 1, RECEIVE_SIZE)  # one more: never full
        buffers = [memoryview(bytearray(size))]
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(self.path, "rb+", buffering=0, opener=no_follow))
            file.seek(start)
            write: Callable[[memoryview], None] = functools.partial(self._write, file)
            try:
                while count := readinto(buffers[0][filled:]):
                    filled += count
                    if filled == len(buffers[0]):
                        filled = 0  # before the write: one that fails is not repeated below
                        write(buffers[0])
                        buffers.reverse()
                        if len(buffers) == 1 and self._large.acquire(blocking=False):
                            stack.callback(self._large.release)
                            write = stack.enter_context(write_behind(write))
                            buffers = [memoryview(bytearray(BUFFER_SIZE)) for _ in range(2)]
            finally:
                if filled:
                    write(buffers[0][:filled])
        return self.size - start

    def _write(self, file: io.FileIO, data: memoryview) -> None:
        self._check_space(self.size, len(data))
        while data:
            written = file.write(data) or 0
            if self._hash:
                self._hash.update(data[:written])
            self.size += written
            data = data[written:]
        if self.size - self._flushed >= FLUSH_SIZE and hasattr(os, "posix_fadvise"):
            # Have the disk begin with what sync would else wait for all at once: that is what Linux does on
            # this advice, which is about pages that are no longer dirty.
            os.posix_fadvise(file.fileno(), self._flushed, self.size - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.size

    def truncate(self, size: int) -> None:
        """Take back what was appended past this size."""
        self._hash = None
        with open(self.path, "rb+", buffering=0, opener=no_follow) as file:
            self.size = file.truncate(size)

    def digest(self, algorithm: str) -> str:
        """The digest of what the file has, which is read unless it was hashed as it came."""
        running = self._hash
        if running is None or running.name != algorithm:
            running = hashlib.new(algorithm)
            buffer = memoryview(bytearray(RECEIVE_SIZE))
            self._file.seek(0)
            while count := self._file.readinto(buffer):
                running.update(buffer[:count])
        return f"{algorithm}:{running.hexdigest()}"

    def copy_to(self, other: UploadFile) -> None:
        """Append the bytes to another upload, also when this one has lost its name."""
        self._file.seek(0)
        other.append(self._file.readinto, self.size)

    def _version(self) -> tuple[int, int, int]:
        status = self.status()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def hash_state(self) -> tuple[Any, tuple[int, int, int]] | None:
        """The running hash, and how to tell that the file still has no other bytes than those in it.

        Other processes write to it too, and what they write may be as long. So it is given a time of change
        that no write and nobody else gives it. None where the file system does not keep that.
        """
        moment = int(time.time()) * 10**9 + secrets.randbelow(10**7) * 100
        with contextlib.suppress(OSError):
            os.utime(self._file.fileno(), ns=(moment, moment))
        version = self._version()
        return (self._hash, version) if self._hash and version[1:] == (self.size, moment) else None

    def resume_hash(self, state: tuple[Any, tuple[int, int, int]] | None) -> None:
        """Take over the running hash that hash_state gave, unless somebody has written since."""
        if state and state[1] == self._version():
            self._hash = state[0]

    def status(self) -> os.stat_result:
        """The file's size and times."""
        return os.fstat(self._file.fileno())

    def sync(self) -> None:
        """Make the bytes durable."""
        os.fsync(self._file.fileno())

    def unlink(self) -> None:
        """Remove the file from uploads/; no error if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Release the lock, also if a forked child has inherited it; the file stays where it is."""
        if fcntl:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


class Limits(NamedTuple):
    """How much may be stored, in bytes."""

    max_blob_size: int | None = None
    min_free: int = 0  # of the disk's space


class Files:
    """The content-addressed files of one data directory, and those under upload beside them."""

    def __init__(self, root: str, *, durable: bool, limits: Limits) -> None:
        """durable: whether bytes and names are forced to the disk before they count."""
        self.root = os.path.abspath(root)
        self.durable = durable
        self._limits = limits

    def make_directories(self) -> None:
        """Make the directories that are missing, durably. Raises StartupError when uploads could not move."""
        for directory in ("", "blobs", "blobs/sha256", "blobs/sha512", "uploads"):
            path = os.path.join(self.root, directory)
            if not os.path.isdir(path):
                os.makedirs(
                    path, 0o777 if directory else 0o700, exist_ok=True
                )  # the data is its owner's alone
                if self.durable:
                    sync_directory(os.path.dirname(path))
        for algorithm in ALGORITHMS:
            self._check_rename(f"{self.root}/uploads", f"{self.root}/blobs/{algorithm}")

    @staticmethod
    def _check_rename(source: str, target: str) -> None:
        """Try what place does. Only that tells: a device has one number, however often it is mounted."""
        paths = f"{source}/.probe", f"{target}/.probe"
        try:
            os.close(no_follow(paths[0], os.O_WRONLY | os.O_CREAT))
            os.replace(*paths)
        except OSError as error:  # a disk that is full, say, is no reason
            if error.errno == errno.EXDEV:
                raise StartupError(
                    f"{source} and {target} are different volumes, and files are renamed from one to the"
                    " other; put the whole data directory on one volume"
                ) from None
        finally:
            for path in paths:
                with contextlib.suppress(OSError):
                    os.unlink(path)

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
        """Make an upload the content with this digest, durably: the only way into blobs/.

        Raises DIGEST_INVALID, and drops the upload, when its bytes have another digest. A file that is there
        already is replaced by its equal, which mends a damaged one.
        """
        actual = upload.digest(algorithm_of(digest))
        if actual != digest:
            upload.unlink()
            raise RegistryError(ErrorCode.DIGEST_INVALID, f"content is {actual}, not {digest}")
        if self.durable:
            try:
                upload.sync()
            except OSError:
                upload.unlink()  # tried again, what the system dropped might count as written (see _sync_log)
                raise
        target = self.path(digest)
        os.replace(upload.path, target)
        if self.durable:
            sync_directory(os.path.dirname(target))

    def is_being_placed(self, digest: str) -> bool:
        """Whether a content has just been placed, and its upload waits for the row that will name it."""
        path = self.path(digest)
        if fcntl is None or not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        try:
            with open(path, "rb", buffering=0, opener=no_follow) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return False

    def quarantine(self, digest: str) -> None:
        """Move what is in the place of a damaged content to corrupt/, beside what is there already."""
        os.makedirs(f"{self.root}/corrupt", exist_ok=True)
        target = f"{self.root}/corrupt/{digest.replace(':', '-')}"
        if os.path.lexists(target):
            target = f"{target}.{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path(digest), target)

    def remove(self, digest: str) -> None:
        """Remove the content; no error if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(digest))

    def contents(self) -> Iterator[str]:
        """The digests that files under blobs/ are named by, in no order; other names are not ours."""
        for algorithm in ALGORITHMS:
            path = f"{self.root}/blobs/{algorithm}"  # a copy on other media may lack an empty one
            with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
                yield from filter(is_digest, (f"{algorithm}:{entry.name}" for entry in entries))

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
        try:
            if not self.durable or os.path.lexists(path) or self.free_space() <= 2 * RESERVE_SIZE:
                return
            with open(path, "wb", buffering=0, opener=no_follow) as file:
                file.write(bytes(RESERVE_SIZE))
        except OSError:  # a quota, say: then there is none
            self._remove_reserve()

    def release_reserve(self) -> None:
        """Give up the space set aside if the disk is full, so that the database can record deletions."""
        if self.free_space() < RESERVE_SIZE:
            self._remove_reserve()

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

    def _remove_reserve(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(f"{self.root}/reserve")

    def new_upload(self, algorithm: str, repository: str | None = None) -> UploadFile:
        """A new upload, locked: a session of a repository, or one that ends with this request."""
        owner = f"-{algorithm}-{hashed_name(repository)}" if repository else ""
        for _ in range(10):
            path = f"{self.root}/uploads/{int(time.time()):08x}{secrets.token_hex(12)}{owner}"
            with contextlib.suppress(FileNotFoundError):
                return UploadFile(path, algorithm, self.check_space, create=True)
            with contextlib.suppress(FileExistsError):  # expire_uploads was there before the lock
                os.mkdir(f"{self.root}/uploads")  # else somebody has removed the directory
        raise FileNotFoundError(errno.ENOENT, "it is removed as soon as it is made", path)

    def open_upload(self, session: str, patience: float = UPLOAD_LOCK_TIMEOUT) -> UploadFile:
        """The upload with this id, locked. Raises FileNotFoundError, UPLOAD_BUSY."""
        algorithm = session.split("-")[1] if "-" in session else "sha256"
        return UploadFile(f"{self.root}/uploads/{session}", algorithm, self.check_space, patience=patience)

    def session_size(self, repository: str, session: str) -> int:
        """How many bytes an upload session of this repository has. Raises BLOB_UPLOAD_UNKNOWN."""
        match = UPLOAD.fullmatch(session)
        if match and match[2] == hashed_name(repository):
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(f"{self.root}/uploads/{session}")
                if stat.S_ISREG(status.st_mode):
                    return status.st_size
        raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session)

    def uploads(self) -> list[os.DirEntry[str]]:
        """All uploads under way or left behind; what else is in the directory is not ours."""
        with contextlib.suppress(FileNotFoundError), os.scandir(f"{self.root}/uploads") as entries:
            found = [entry for entry in entries if UPLOAD.fullmatch(entry.name)]
            return [entry for entry in found if entry.is_file(follow_symlinks=False)]
        return []  # somebody has removed the directory


class Cache:
    """Remembers things up to a limit of all their sizes, for as long as each other; the oldest go first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._things: dict[Any, tuple[float, int, Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """What was put there, or None."""
        expires, _, thing = self._things.get(key, (0.0, 0, None))
        return thing if expires > time.monotonic() else None

    def put(self, key: Any, thing: Any, seconds: float = float("inf"), size: int = 1) -> None:
        """Remember a thing; the size is of the key as well, in the unit of the limit."""
        now = time.monotonic()
        with self._lock:
            self._remove(key)
            self._things[key] = now + seconds, size, thing
            self._size += size
            while self._things:
                oldest, (expires, _, _) = next(iter(self._things.items()))
                if self._size <= self._limit and expires > now:
                    break
                self._remove(oldest)

    def forget(self, key: Any) -> None:
        """Drop what was put there."""
        with self._lock:
            self._remove(key)

    def _remove(self, key: Any) -> None:
        self._size -= self._things.pop(key, (0.0, 0, None))[1]


def file_state(path: str) -> tuple[int, int, int] | None:
    """What tells whether a file is still the same: time, size and inode; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


# === Store ============================================================================================


class Descriptor(NamedTuple):
    """A content of a repository: image-spec's descriptor, as far as a reply needs it."""

    media_type: str
    digest: str
    size: int  # bytes


class LogIndex:
    """The head of registry.db-shm, the index of SQLite's log, which changes with every commit of any process.

    SQLite writes both its copies anew before anybody can see what was committed (walformat.html, 2.1), and
    looking at them here costs next to nothing. PRAGMA data_version tells the same, but halves the rate of
    GETs, since each query lets other threads run.

    A process that closes any descriptor of a file loses all its locks on it (POSIX), and SQLite's are on this
    one: another process could then empty it. So all stores of this process share one descriptor and mapping
    of a file, and those stay until SQLite has removed the file: when nobody has the database open any more.
    """

    _lock = threading.Lock()
    _open: ClassVar[dict[tuple[int, int], tuple[int, mmap.mmap]]] = {}  # by device and inode

    @classmethod
    def map(cls, path: str) -> mmap.mmap | None:
        """The mapping; None where SQLite cannot write to the file, and may hold no lock on its size."""
        if fcntl is None:  # Windows, which would not let SQLite remove it
            return None
        with cls._lock, contextlib.suppress(OSError):
            status = os.stat(path)
            key = status.st_dev, status.st_ino
            if key not in cls._open:
                descriptor = os.open(path, os.O_RDWR)
                index = mmap.mmap(descriptor, LOG_INDEX_HEAD, access=mmap.ACCESS_READ)
                cls._open[key] = descriptor, index
            return cls._open[key][1]
        return None

    @classmethod
    def unmap_removed(cls) -> None:
        """Let go of the files that are gone."""
        with cls._lock:
            for key, (descriptor, index) in list(cls._open.items()):
                if not os.fstat(descriptor).st_nlink:
                    del cls._open[key]
                    index.close()
                    os.close(descriptor)


def connect(path: str, mode: str) -> sqlite3.Connection:
    """A connection to a database that any thread may use; mode: that of SQLite's URIs."""
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode={mode}",
        uri=True,
        timeout=DATABASE_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


class Database:
    """registry.db, for queries: pooled connections, and what tells whether anything was committed.

    Where SQLite's locks cannot be had, which are files beside the database, it is read without, or, if its
    log lies there, a copy of both. That holds only for as long as the files stay as they are.
    """

    def __init__(self, path: str, *, read_only: bool) -> None:
        """Raises sqlite3.Error, OSError."""
        self._path = path
        self._readers: list[sqlite3.Connection] = []  # idle; a stack, so that few stay warm
        self._states: object = None  # of the files, where they are read without locks
        self._copy: str | None = None  # the directory of a copy
        self.connect = functools.partial(connect, path, "ro" if read_only else "rw")
        try:
            self.query("PRAGMA user_version")
        except sqlite3.OperationalError as error:
            self.close()
            if not read_only or is_busy(error):
                raise
            self._do_without_locks()
        self._index = None if self._states else LogIndex.map(f"{path}-shm")

    def _do_without_locks(self) -> None:
        self._states = self._look()
        log = f"{self._path}-wal"
        if not os.path.exists(log) or not os.path.getsize(log):
            self.connect = functools.partial(connect, self._path, "ro&immutable=1")
            return
        self._copy = tempfile.mkdtemp(prefix="registry-")
        copy = os.path.join(self._copy, "registry.db")
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{self._path}{suffix}", f"{copy}{suffix}")
        self.connect = functools.partial(connect, copy, "rw")

    def _look(self) -> object:
        return file_state(self._path), file_state(f"{self._path}-wal")

    def is_outdated(self) -> bool:
        """Whether somebody has changed files that were to be read without locks."""
        return self._states is not None and self._states != self._look()

    def generation(self) -> object:
        """What changes with every commit of whatever process; None where that cannot be told."""
        if self._index is not None:
            return self._index[:]
        return self._states and self._look()

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """The rows of one query."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self.connect()
        try:
            return connection.execute(sql, parameters).fetchall()
        finally:
            if len(self._readers) < IDLE_READERS:
                self._readers.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close the idle connections, and remove the copy."""
        while self._readers:
            self._readers.pop().close()
        if self._copy:
            shutil.rmtree(self._copy, ignore_errors=True)


def read_schema() -> list[str]:
    """The sections of schema.sql: before, while and after the tables are made. Raises StartupError."""
    try:
        schema = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StartupError("schema.sql is missing; it has to lie beside registry.py") from None
    return re.split(r"^-- ===.*", schema, flags=re.MULTILINE)[1:]


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
        self._cache = Cache(CACHE_SIZE)
        self._lookups = Cache(LOOKUP_CACHE_SIZE)
        self._hashes: dict[str, Any] = {}  # UploadFile.hash_state of sessions between requests
        self._pulled: dict[tuple[str, str], int] = {}  # when manifests were pulled, not yet recorded
        self._unremovable: set[str] = set()  # digests of files that could not be removed, and that was said
        self._write_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._commits = self._synced = 0  # how many there were, and how many of them are durable
        self._unsyncable = False
        with contextlib.ExitStack() as resources:
            resources.callback(LogIndex.unmap_removed)
            if not read_only:
                self._open_for_writing(resources)
            else:
                try:
                    os.stat(self._path)  # SQLite says no more than that it cannot open it
                except FileNotFoundError:
                    raise StartupError(f"there is no {self._path}, so nothing to serve read-only") from None
            self._database = Database(self._path, read_only=read_only)
            resources.push(lambda *_: self._database.close())
            self._check_format(*self.query("PRAGMA user_version")[0])
            self._resources = resources.pop_all()

    def _open_for_writing(self, resources: contextlib.ExitStack) -> None:
        self.files.make_directories()
        self.files.release_reserve()
        self._writer = connect(self._path, "rwc")
        resources.callback(self._writer.close)
        with locked_directory(self.files.root):  # nobody waits for a database that is being made
            self._make_database()
        if self.files.durable:
            self._log = os.open(f"{self._path}-wal", os.O_RDWR)
            resources.callback(os.close, self._log)
        self.files.keep_reserve()

    def _make_database(self) -> None:
        """Make the tables, or bring those of format 1 up to date, in one transaction (schema.sql)."""
        self._writer.execute(f"PRAGMA synchronous = {'NORMAL' if self.files.durable else 'OFF'}")
        self._writer.execute("PRAGMA journal_mode = WAL")
        ((version,),) = self._writer.execute("PRAGMA user_version")
        if version >= FORMAT_VERSION:
            return
        parts = read_schema()
        script = "".join(parts) if version else parts[1]
        self._writer.execute("PRAGMA foreign_keys = OFF")  # has no effect within a transaction
        self._writer.executescript(f"BEGIN IMMEDIATE;\n{script}\nCOMMIT;")
        self._writer.execute("PRAGMA foreign_keys = ON")
        if version:
            with contextlib.suppress(OSError):
                os.unlink(f"{self.files.root}/generation")  # which format 1 told commits by

    def _check_format(self, version: int) -> None:
        if version > FORMAT_VERSION:
            raise StartupError(
                f"{self._path} has format {version}, and this registry.py knows {FORMAT_VERSION}: "
                "run the newer registry.py that made it"
            )
        if not version:
            raise StartupError(f"{self._path} is empty, and so there is nothing to serve read-only")
        if version < FORMAT_VERSION:
            raise StartupError(f"{self._path} has format {version}: start without --read-only once")

    def close(self) -> None:
        """Close the database. No other method may be called again.

        Does nothing while one is still running that waits for the write lock or has it, such as for a
        request that did not end in time: SQLite does not survive what it works with being closed.
        """
        self.flush_pulls()
        if self._write_lock.acquire(timeout=OPTIONAL_WRITE_TIMEOUT):
            self._resources.close()
            self._write_lock.release()

    # --- SQL

    def query(self, sql: str, *parameters: object) -> list[Any]:
        """The rows of one query."""
        database = self._database
        try:
            rows = database.query(sql, parameters)
        except sqlite3.DatabaseError:
            if not database.is_outdated():
                raise
        else:
            if not database.is_outdated():
                return rows
        with self._write_lock:
            if self._database is database:
                self._database = Database(self._path, read_only=True)
                database.close()
        return self.query(sql, *parameters)

    def query_cached(self, sql: str, *parameters: object) -> list[Any]:
        """The rows of one query, remembered until something is committed by whatever process."""
        key = (sql, *parameters)
        generation = self._database.generation()
        rows: list[Any]
        known, rows = self._lookups.get(key) or (None, [])
        if rows and known == generation:
            return rows
        rows = self.query(sql, *parameters)
        if rows and generation is not None:
            size = sum(sys.getsizeof(cell) for cells in (parameters, *rows) for cell in cells)
            if size <= LOOKUP_SIZE:
                self._lookups.put(key, (generation, rows), size=size + CACHE_ENTRY_SIZE)
        return rows

    def backup(self, path: str) -> None:
        """Copy the database to a file, beside whoever writes to it."""
        source = self._database.connect()
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(path)) as copy:
            source.backup(copy)

    @contextlib.contextmanager
    def transaction(
        self, *, durable: bool = True, frees: bool = False, timeout: float = DATABASE_TIMEOUT
    ) -> Iterator[sqlite3.Connection]:
        """SQLite's write lock, held against other threads and processes alike; committed when this returns.

        durable: only when it is on the disk. frees: it is to make room, and may use the reserve for that.
        Raises sqlite3.OperationalError, for which is_busy holds, when it waits for the lock for too long.
        """
        if self.read_only:  # nothing is going to be written, and nobody can be kept from writing
            with contextlib.closing(self._database.connect()) as db:
                yield db
            return
        deadline = time.monotonic() + timeout
        if frees:
            self.files.release_reserve()
        if not self._write_lock.acquire(timeout=timeout):
            raise sqlite3.OperationalError("database is locked")
        try:
            left = max(0.0, deadline - time.monotonic())  # one deadline for both locks
            self._writer.execute(f"PRAGMA busy_timeout = {int(left * 1000)}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # for want of space, SQLite has undone it itself
                    self._writer.execute("ROLLBACK")
                raise
            self._commits += 1
            commit = self._commits
        finally:
            self._write_lock.release()
        if durable:
            self._sync_log(commit)

    def _sync_log(self, commit: int | None = None) -> None:
        """Wait until a commit of this store, or else all that anybody has committed by now, is on the disk.

        Commits only append to SQLite's log (PRAGMA synchronous = NORMAL): so the write lock is not held while
        the disk takes its time, and one sync serves all who committed before it began, the more the slower
        the disk is. What a commit builds on lies before it in the log. Should the log be begun anew before
        the sync, by whatever process, then SQLite has synced it, and the database with all it said, before
        (wal.html, 3); it syncs the log's new head, and a new log's name, too. While this store has the
        database open, nobody removes the log, so the descriptor is always that of the right file.

        A sync that failed is not tried again: the system may have dropped what it could not write, and would
        report success. Nothing is acknowledged then until a restart, which reads the log up to what is bad.
        """
        if not self.files.durable:
            return
        with self._sync_lock:
            if self._unsyncable:
                raise OSError(errno.EIO, "the database's log could not be synced; restart the registry")
            if commit is None or commit > self._synced:
                commits = self._commits
                try:
                    getattr(os, "fdatasync", os.fsync)(self._log)
                except OSError:
                    self._unsyncable = True
                    raise
                self._synced = commits

    @contextlib.contextmanager
    def _placed(self, upload: UploadFile, digest: str) -> Iterator[sqlite3.Connection]:
        """A transaction for the rows of a content that is on disk under its digest by then.

        It is put there before, so that others need not wait for that. Should it have been collected until
        the transaction begins, the bytes, which are still open, are put there again. If the transaction
        fails, the file goes unless it has a row: others who are about to give it one look first.
        """
        self.files.place(upload, digest)
        try:
            with contextlib.ExitStack() as copies:
                while True:
                    with self.transaction() as db:
                        if os.path.lexists(self.files.path(digest)):
                            yield db
                            return
                    copy = copies.enter_context(self.new_upload(algorithm_of(digest)))
                    upload.copy_to(copy)
                    self.files.place(copy, digest)
        except BaseException:
            suppress, timeout = contextlib.suppress(OSError, sqlite3.Error), OPTIONAL_WRITE_TIMEOUT
            with suppress, self.transaction(durable=False, timeout=timeout) as db:
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

        On a full disk, or while the database is busy, that cannot be recorded. The answer stands all the
        same: it serves pulls, and a push that follows is likely to fail as well.
        """
        if self.read_only or time.time() - leased_at < LEASE_SLACK:
            return True
        try:
            with self.transaction(durable=False, timeout=OPTIONAL_WRITE_TIMEOUT) as db:
                return self._renew_lease(db, repository, digest)
        except (OSError, sqlite3.OperationalError) as error:
            if is_out_of_space(error) or is_busy(error):
                return True
            raise

    # --- Contents

    def open_content(self, descriptor: Descriptor) -> bytes | BinaryIO | None:
        """A content: bytes when it is small, else an open file; None when the disk has lost it."""
        content: bytes | None = self._cache.get(descriptor.digest)
        if content is not None:
            return content
        file = self.files.open(descriptor.digest, descriptor.size)
        if file is None or descriptor.size > SMALL_CONTENT:
            return file
        with file:
            content = file.read()
        if digest_of(content, algorithm_of(descriptor.digest)) != descriptor.digest:
            return None  # what is remembered must be right, since nobody looks at the file again
        self._cache.put(descriptor.digest, content, size=len(content) + CACHE_ENTRY_SIZE)
        return content

    def blob(self, name: str, digest: str, *, lease: bool = False) -> Descriptor:
        """A blob that the repository is linked to. Raises BLOB_UNKNOWN.

        lease: garbage collection shall leave it alone for the grace period.
        """
        rows = self.query_cached(
            "SELECT size, repository_id, leased_at FROM contents WHERE repository = ? AND digest = ?",
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
        with self.transaction(frees=True) as db:
            sql = "SELECT repository_id, needed_by FROM contents WHERE repository = ? AND digest = ?"
            rows = db.execute(sql, (name, digest)).fetchall()
            if not rows:
                raise RegistryError(ErrorCode.BLOB_UNKNOWN, digest)
            ((repository, needed_by),) = rows
            if needed_by:
                raise RegistryError(ErrorCode.STILL_NEEDED, digest)
            self.unlink(db, repository, digest)
        self.remove_files([digest])

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
        """Try to remove all the files whose rows are gone."""
        sql, last = "SELECT digest FROM pending_deletes WHERE digest > ? ORDER BY digest LIMIT ?", ""
        while rows := self.query(sql, last, BATCH):
            self.remove_files([digest for (digest,) in rows])
            ((last,),) = rows[-1:]

    def remove_files(self, digests: Iterable[str]) -> None:
        """Remove those of these files whose rows are gone; under the write lock, so that no push needs one.

        One that cannot be removed stays among the pending deletes, and is tried again by remove_pending.
        """
        sql = "SELECT 1 FROM pending_deletes WHERE digest = ?"
        with self.transaction(durable=False, frees=True) as db:
            pending = [digest for digest in digests if db.execute(sql, (digest,)).fetchall()]
            if pending:
                self._sync_log()  # the rows have to be gone for good, whoever has deleted them
            for digest in pending:
                self._cache.forget(digest)
                try:
                    self.files.remove(digest)
                except OSError as error:
                    if digest not in self._unremovable:
                        self._unremovable.add(digest)
                        report = f"cannot remove {self.files.path(digest)}, will try again: {error.strerror}"
                        write_log(f"registry.py: {report}")
                    continue
                self._unremovable.discard(digest)
                db.execute("DELETE FROM pending_deletes WHERE digest = ?", (digest,))

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
            sql = "SELECT 1 FROM contents WHERE repository = ? AND digest = ?"
            if not db.execute(sql, (source, digest)).fetchall():
                return False
            self._link(db, name, digest, blob.size)
        return True

    def repositories_with(self, digest: str, limit: int) -> list[str]:
        """The names of up to so many repositories that are linked to a blob, in no order."""
        rows = self.query(
            "SELECT r.name FROM repository_blobs l JOIN repositories r ON r.id = l.repository_id"
            " WHERE l.digest = ? LIMIT ?",
            digest,
            limit,
        )
        return [name for (name,) in rows]

    # --- Uploads

    @contextlib.contextmanager
    def new_upload(self, algorithm: str) -> Iterator[UploadFile]:
        """A file to receive one content at once; gone afterwards unless it was made a blob."""
        upload = self.files.new_upload(algorithm)
        try:
            yield upload
        finally:
            upload.unlink()
            upload.close()

    def start_session(self, name: str, algorithm: str) -> str:
        """Open an upload session of a repository, empty, and return its id."""
        self.files.check_space(0, 0)
        upload = self.files.new_upload(algorithm, name)
        upload.close()
        return upload.id

    @contextlib.contextmanager
    def session(self, name: str, session: str) -> Iterator[UploadFile]:
        """An upload session to write to; one that there is no room for is dropped.

        Raises BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY.
        """
        self.session_size(name, session)
        try:
            upload = self.files.open_upload(session)
        except FileNotFoundError:
            raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session) from None
        try:
            upload.resume_hash(self._hashes.pop(session, None))
            yield upload
            if os.path.lexists(upload.path) and (state := upload.hash_state()):
                if len(self._hashes) >= HASH_LIMIT:
                    self._hashes.clear()  # those sessions are hashed at their end
                self._hashes[session] = state
        except Exception as error:
            if is_out_of_space(error):
                upload.unlink()
            raise
        finally:
            upload.close()

    def session_size(self, name: str, session: str) -> int:
        """How many bytes an upload session has, also while they are coming. Raises BLOB_UPLOAD_UNKNOWN."""
        return self.files.session_size(name, session)

    def cancel_session(self, name: str, session: str) -> None:
        """End an upload session and drop its bytes. Raises BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY."""
        with self.session(name, session) as upload:
            upload.unlink()

    def finish_upload(self, name: str, upload: UploadFile, digest: str) -> None:
        """Make an upload the repository's blob of this digest, durably.

        Raises DIGEST_INVALID, and drops the upload, when its bytes have another digest.
        """
        with self._placed(upload, digest) as db:
            repository = self._link(db, name, digest, upload.size)
            now, began = int(time.time()), began_at(upload.id)
            if now - began >= LEASE_SLACK:  # the rest of a push that takes its time is needed as long
                db.execute(
                    "UPDATE repository_blobs SET leased_at = ?"
                    " WHERE needed_by = 0 AND leased_at >= ? AND +repository_id = ?",  # + lets leased_at lead
                    (now, began - PUSH_PAUSE, repository),
                )

    def expire_uploads(self, lifetime: float = UPLOAD_LIFETIME) -> None:
        """Drop upload sessions idle for so many seconds, and what a crash left of uploads in one request.

        An upload that is being written to is left alone.
        """
        uploads = self.files.uploads()
        for session in self._hashes.keys() - {entry.name for entry in uploads}:
            self._hashes.pop(session, None)  # another process has finished it
        for entry in uploads:
            try:
                if self._is_left_behind(entry.name, entry.stat(follow_symlinks=False), lifetime):
                    with contextlib.closing(self.files.open_upload(entry.name, patience=0.0)) as upload:
                        if self._is_left_behind(entry.name, upload.status(), lifetime):
                            upload.unlink()
            except (RegistryError, FileNotFoundError):
                pass  # it is being written to, or was finished just now
            except OSError as error:
                write_log(f"registry.py: cannot remove an upload: {error}")

    @staticmethod
    def _is_left_behind(session: str, status: os.stat_result, lifetime: float) -> bool:
        """Whether nobody comes back to an upload that is not locked. Its time may be a wrong clock's."""
        return "-" not in session or abs(time.time() - status.st_mtime) > lifetime

    def pushes_since(self, since: float) -> dict[str, int]:
        """When the oldest upload written to since then began, by the hashed name of its repository."""
        began: dict[str, int] = {}
        for entry in self.files.uploads():
            with contextlib.suppress(FileNotFoundError):
                if "-" in entry.name and entry.stat(follow_symlinks=False).st_mtime >= since:
                    owner = entry.name.rpartition("-")[2]
                    began[owner] = min(began_at(entry.name), began.get(owner, sys.maxsize))
        return began

    # --- Manifests

    MANIFEST = (  # by the repository's name, and a tag or digest: they differ by a colon
        "SELECT m.media_type, digest, c.size, repository_id, c.leased_at, c.needed_by"
        " FROM contents c JOIN manifests m USING (repository_id, digest) WHERE c.repository = ?"
        " AND c.digest = ifnull((SELECT t.digest FROM tags t WHERE t.repository_id = c.repository_id"
        "  AND t.name = ?), ?)"
    )

    def manifest(self, name: str, reference: str, *, lease: bool = False) -> Descriptor:
        """A manifest by tag or digest. Raises MANIFEST_UNKNOWN, NAME_UNKNOWN.

        lease: garbage collection shall leave it alone for the grace period.
        """
        rows = self.query_cached(self.MANIFEST, name, reference, reference)
        if not rows:
            self._require_repository(name)
            raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {reference}")
        ((media_type, digest, size, repository, leased_at, _),) = rows
        if lease and not self._lease(repository, digest, leased_at):
            raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {reference}")
        return Descriptor(media_type, digest, size)

    def note_pull(self, name: str, digest: str) -> None:
        """Remember, until flush_pulls, that a manifest was pulled now."""
        if not self.read_only:
            self._pulled[name, digest] = int(time.time())

    def flush_pulls(self) -> None:
        """Record what was pulled since the last time. On a full disk, or a busy database, that waits."""
        pulled, self._pulled = self._pulled, {}
        if not pulled:
            return
        rows = [(moment, name, digest) for (name, digest), moment in pulled.items()]
        try:
            with self.transaction(durable=False, timeout=OPTIONAL_WRITE_TIMEOUT) as db:
                db.executemany(
                    "UPDATE manifests SET pulled_at = ?"
                    " WHERE repository_id = (SELECT id FROM repositories WHERE name = ?) AND digest = ?",
                    rows,
                )
        except (OSError, sqlite3.OperationalError) as error:
            if not is_out_of_space(error) and not is_busy(error):
                raise
            self._pulled = {**pulled, **self._pulled}

    def put_manifest(
        self,
        name: str,
        reference: str,
        manifest: Manifest,
        content: bytes,
        *,
        tags: Iterable[str] = (),
        check: Callable[[str | None], object] = lambda digest: None,
    ) -> str:
        """Store a parsed manifest under a tag or its digest, durably, with more tags, and return its digest.

        check is called with the digest of what the reference names till then, and raises what forbids it.
        Raises DIGEST_INVALID, and MANIFEST_BLOB_UNKNOWN with each digest that is required and absent.
        """
        digest = reference if is_digest(reference) else digest_of(content)
        descriptor = manifest.descriptor(digest, len(content)) if manifest.subject else None
        with self.new_upload(algorithm_of(digest)) as upload:
            upload.append(io.BytesIO(content).readinto, len(content))
            with self._placed(upload, digest) as db:
                before = db.execute(self.MANIFEST, (name, reference, reference)).fetchall()
                repository = self._link(db, name, digest, len(content))
                self._record_manifest(db, repository, digest, manifest, descriptor)
                self._record_references(db, repository, digest, manifest)
                db.executemany(
                    "INSERT INTO tags VALUES (?, ?, ?)"
                    " ON CONFLICT (repository_id, name) DO UPDATE SET digest = excluded.digest",
                    [(repository, tag, digest) for tag in (reference, *tags) if tag != digest],
                )
                check(before[0][1] if before else None)
        return digest

    @staticmethod
    def _record_manifest(
        db: sqlite3.Connection, repository: int, digest: str, manifest: Manifest, descriptor: bytes | None
    ) -> None:
        """Pushed again, a manifest whose body names no media type may bring another one."""
        now = int(time.time())
        db.execute(
            "INSERT INTO manifests VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (repository_id, digest) DO UPDATE SET media_type = excluded.media_type,"
            " pushed_at = excluded.pushed_at, pulled_at = excluded.pulled_at",
            (repository, digest, manifest.media_type, manifest.artifact_type, manifest.subject, now, now),
        )
        if descriptor:
            db.execute(
                "INSERT INTO referrers VALUES (?, ?, ?)"
                " ON CONFLICT (repository_id, digest) DO UPDATE SET descriptor = excluded.descriptor",
                (repository, digest, descriptor),
            )

    def _record_references(
        self, db: sqlite3.Connection, repository: int, digest: str, manifest: Manifest
    ) -> None:
        """Raises MANIFEST_BLOB_UNKNOWN. Sorted rows, and many in one statement, take a tenth of the time."""
        needs = dict.fromkeys(manifest.optional, False)
        needs.update(dict.fromkeys(manifest.required, not self.sparse))
        needs[digest] = True
        rows = sorted(needs.items())
        for start in range(0, len(rows), REFERENCE_STEP):
            some = rows[start : start + REFERENCE_STEP]
            values = ", ".join(["(?, ?)"] * len(some))
            db.execute(
                "INSERT INTO manifest_references SELECT ?, ?, column1, column2"
                f" FROM (VALUES {values}) WHERE 1 ON CONFLICT (repository_id, manifest, child)"
                " DO UPDATE SET required = 1 WHERE excluded.required AND NOT required",
                (repository, digest, *(value for row in some for value in row)),
            )
        missing = db.execute(
            "SELECT child FROM manifest_references c WHERE repository_id = ? AND manifest = ? AND required"
            " AND NOT EXISTS (SELECT 1 FROM repository_blobs l"
            "  WHERE l.repository_id = c.repository_id AND l.digest = c.child) LIMIT ?",
            (repository, digest, DETAIL_LIMIT),
        ).fetchall()
        if missing and not self.sparse:
            raise RegistryError(ErrorCode.MANIFEST_BLOB_UNKNOWN, *(child for (child,) in missing))

    def delete_manifest(
        self, name: str, reference: str, check: Callable[[str], object] = lambda digest: None
    ) -> None:
        """Remove a tag and nothing else, or by its digest a manifest and its tags.

        check is called with the digest of what is there, and raises what forbids it.
        Raises MANIFEST_UNKNOWN, NAME_UNKNOWN, STILL_NEEDED.
        """
        self._require_repository(name)
        with self.transaction(frees=True) as db:
            rows = db.execute(self.MANIFEST, (name, reference, reference)).fetchall()
            if not rows:
                raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {reference}")
            ((_, digest, _, repository, _, needed_by),) = rows
            if reference == digest and needed_by > 1:  # by an index, and not just by itself
                raise RegistryError(ErrorCode.STILL_NEEDED, digest)
            check(digest)
            if reference == digest:
                self.unlink(db, repository, digest)
            else:
                db.execute("DELETE FROM tags WHERE repository_id = ? AND name = ?", (repository, reference))
        if reference == digest:
            self.remove_files([digest])

    # --- Listings

    def tags(self, name: str, last: str, limit: int) -> list[str]:
        """Up to so many tags after one, in byte order. Raises NAME_UNKNOWN."""
        repository = self._require_repository(name)
        sql = "SELECT name FROM tags WHERE repository_id = ? AND name > ? ORDER BY name LIMIT ?"
        return [tag for (tag,) in self.query_cached(sql, repository, last, limit)]

    def repositories(self, first: str, end: str, limit: int) -> list[str]:
        """Up to so many repositories from one name on and before another, in byte order."""
        sql = "SELECT name FROM repositories WHERE name >= ? AND name < ? ORDER BY name LIMIT ?"
        return [name for (name,) in self.query_cached(sql, first, end, limit)]

    def referrers(
        self, name: str, subject: str, artifact_type: str | None, last: str
    ) -> tuple[list[tuple[str, bytes]], bool]:
        """The manifests that refer to a subject, after one, by digest; the subject may be absent.

        Digests and descriptors in JSON, as many as fit on a page, at least one; and whether there are more.
        """
        about = (name, subject, last, artifact_type) if artifact_type else (name, subject, last)
        rows = self.query_cached(
            f"SELECT repository_id, digest, length(d.descriptor),"
            f" CASE WHEN length(d.descriptor) <= {4 * KIB} THEN d.descriptor END"
            " FROM manifests m JOIN referrers d USING (repository_id, digest)"
            " WHERE m.repository_id = (SELECT id FROM repositories WHERE name = ?) AND m.subject = ?"
            f" AND m.digest > ?{' AND m.artifact_type = ?' if artifact_type else ''}"
            " ORDER BY m.digest LIMIT ?",
            *about,
            REFERRER_PAGE_LIMIT + 1,
        )
        page: list[tuple[str, bytes]] = []
        room = REFERRER_PAGE_BYTES
        for repository, digest, length, descriptor in rows[:REFERRER_PAGE_LIMIT]:
            room -= length
            if page and room < 0:
                return page, True
            sql = "SELECT descriptor FROM referrers WHERE repository_id = ? AND digest = ?"
            found = [(descriptor,)] if descriptor else self.query(sql, repository, digest)  # it is long
            page += [(digest, each) for (each,) in found]
        return page, bool(page) and len(rows) > REFERRER_PAGE_LIMIT


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
        self._pushes = store.pushes_since(now - policy.grace)
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
            with self._store.transaction(frees=True) as db:
                for _ in range(BATCH):
                    act(db, item)
                    item = next(items, None)
                    if item is None or len(self._removed) >= BATCH:
                        break
            self._store.remove_files([removal.digest for removal in self._removed])
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

    def _relied_on(self, _repository: int, _digest: str, name: str) -> int:
        """The second since when clients may rely on what they were told of a repository.

        A push may take longer than the grace: what came since its upload began, or shortly before, it needs.
        """
        return min(self._leased_before, self._pushes.get(hashed_name(name), sys.maxsize) - PUSH_PAUSE)

    def _drop_untagged(self, age: float) -> None:
        """Drop untagged manifests that nothing keeps, but the newest images."""
        old = min(self._leased_before, int(time.time() - age))

        def drop(db: sqlite3.Connection, row: Link) -> None:
            relied_on = self._relied_on(*row)
            self._drop(db, row, min(old, relied_on), relied_on)

        untagged = (
            f"{self._TOPMOST} AND NOT EXISTS (SELECT 1 FROM tags t"
            " WHERE t.repository_id = m.repository_id AND t.digest = m.digest)"
        )
        page = (
            "SELECT m.repository_id, m.digest, (SELECT name FROM repositories WHERE id = m.repository_id),"
            f" m.subject IS NULL, -m.pushed_at {untagged} AND l.leased_at < ?"
            " AND (m.repository_id, m.digest) > (?, ?) ORDER BY m.repository_id, m.digest"
        )
        newest = (
            f"SELECT -m.pushed_at, m.digest {untagged} AND m.repository_id = ? AND m.subject IS NULL"
            f" ORDER BY m.pushed_at DESC, m.digest LIMIT {self._policy.keep_last}"
        )
        last, kept = (0, ""), [(0, "")]
        while rows := self._choose(page, old, *last):
            chosen = []
            for repository, digest, name, is_image, age_rank in rows:
                if repository != last[0]:  # what is kept is fixed before anything of it goes
                    kept = self._store.query(newest, repository)[-1:]
                last = repository, digest
                if not (is_image and kept and (age_rank, digest) <= kept[0]):
                    chosen.append((repository, digest, name))
            self._each(iter(chosen), drop)

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
            for kept in self._drop(db, row[2:], before, self._relied_on(*row[2:]), tagged=True):
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

    # Rows that no transaction leaves behind, unless a trigger or a foreign key was out of force. Those of the
    # first kind would have the file of a blob removed that repositories serve.
    _STRAY_ROWS = (
        ("pending_deletes", "digest IN (SELECT digest FROM blobs)"),
        (
            "repository_blobs",
            "repository_id NOT IN (SELECT id FROM repositories) OR digest NOT IN (SELECT digest FROM blobs)",
        ),
        ("manifests", "(repository_id, digest) NOT IN (SELECT repository_id, digest FROM repository_blobs)"),
        (
            "manifest_references",
            "(repository_id, manifest) NOT IN (SELECT repository_id, digest FROM manifests)",
        ),
        ("referrers", "(repository_id, digest) NOT IN (SELECT repository_id, digest FROM manifests)"),
        ("tags", "(repository_id, digest) NOT IN (SELECT repository_id, digest FROM manifests)"),
        ("blobs", "digest NOT IN (SELECT digest FROM repository_blobs)"),
        ("repositories", "id NOT IN (SELECT repository_id FROM repository_blobs)"),
    )

    def __init__(self, store: Store, advance: Callable[[int], None]) -> None:
        """advance is called with the number of bytes of each file that was dealt with."""
        self._store = store
        self._advance = advance

    def total(self) -> int:
        """How many bytes there are to verify."""
        return int(self._store.query("SELECT coalesce(sum(size), 0) FROM blobs")[0][0])

    def run(self, *, repair: bool = False, force: bool = False) -> Iterator[Finding]:
        """Yield what is wrong. Raises OSError for a file that cannot be read, which is no damage.

        repair: move damaged and stray files aside, and drop the rows of damaged and missing files, so that
        clients push them again. What is whole and served stays. Raises StartupError when the database is
        too damaged for that, or, without force, when most files are missing.
        """
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - it would slow every start

        if repair and not force:
            self._require_files()
        yield from self._check_schema(repair)
        yield from self._check_rows(repair)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for rows in self._pages():
                for (digest, size), damage in zip(rows, pool.map(self._examine, rows)):
                    if damage:
                        yield from self._confirm(digest, repair)
                    self._advance(size)
        for digest in self._store.files.contents():
            if not self._store.query("SELECT 1 FROM blobs WHERE digest = ?", digest):
                yield from self._confirm(digest, repair)
        for name, manifest, child in self._store.query(
            "SELECT r.name, c.manifest, c.child FROM manifest_references c"
            " JOIN repositories r ON r.id = c.repository_id WHERE c.required AND NOT EXISTS ("
            "  SELECT 1 FROM repository_blobs l"
            "  WHERE l.repository_id = c.repository_id AND l.digest = c.child)"
        ):
            yield Finding("dangling", f"{name}@{manifest} needs {child}")

    def _require_files(self) -> None:
        """Refuse to give up most of the files: it is rather their volume that is not mounted."""
        missing = total = 0
        for rows in self._pages():
            total += len(rows)
            missing += sum(not os.path.lexists(self._store.files.path(digest)) for digest, _ in rows)
        if missing * 2 > total:
            place = f"{self._store.files.root}/blobs"
            raise StartupError(
                f"{missing} of {total} files are missing; see whether {place} is mounted, or add --force"
            )

    def _pages(self) -> Iterator[list[Any]]:
        sql, last = "SELECT digest, size FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?", ""
        while rows := self._store.query(sql, last, BATCH):
            yield rows
            last = rows[-1][0]

    def _check_schema(self, repair: bool) -> Iterator[Finding]:
        """Compare tables, indexes and triggers with schema.sql. What holds no data can be made again."""
        broken = [result for (result,) in self._store.query("PRAGMA integrity_check") if result != "ok"]
        yield from (Finding("database", result) for result in broken)
        sql = "SELECT name, type, sql FROM sqlite_master WHERE sql IS NOT NULL"
        actual = {name: _tokens(text) for name, _, text in self._store.query(sql)}
        with contextlib.closing(sqlite3.connect(":memory:")) as model:
            model.executescript(read_schema()[1])
            differing = [row for row in model.execute(sql) if actual.get(row[0]) != _tokens(row[2])]
        broken += [name for name, kind, _ in differing if kind == "table" and name not in actual]
        for name, kind, text in differing:
            repaired = repair and kind != "table" and not broken
            if repaired:
                with self._store.transaction(frees=True) as db:
                    db.execute(f"DROP {kind} IF EXISTS {name}")
                    db.execute(text)
            yield Finding("database", f"{kind} {name} is not that of schema.sql", repaired)
        if broken and repair:
            raise StartupError(
                "the database itself is damaged; restore registry.db from a backup, then repair"
            )

    def _check_rows(self, repair: bool) -> Iterator[Finding]:
        """A manifest's needs are counted as well: what none needs is garbage."""
        for table, condition in self._STRAY_ROWS:
            ((count,),) = self._store.query(f"SELECT count(*) FROM {table} WHERE {condition}")
            if count and repair:
                with self._store.transaction(frees=True) as db:
                    db.execute(f"DELETE FROM {table} WHERE {condition}")
            if count:
                yield Finding("database", f"{count} rows of {table} with {condition}", repair)
        needed = (
            "(SELECT count(*) FROM manifest_references c"
            " WHERE c.repository_id = repository_blobs.repository_id AND c.child = repository_blobs.digest)"
        )
        wrong = self._store.query(
            f"SELECT r.name, digest, needed_by, {needed} FROM repository_blobs"
            f" JOIN repositories r ON r.id = repository_id WHERE needed_by <> {needed}"
        )
        if wrong and repair:
            with self._store.transaction(frees=True) as db:
                db.execute(f"UPDATE repository_blobs SET needed_by = {needed} WHERE needed_by <> {needed}")
        for name, digest, count, actual in wrong:
            yield Finding("database", f"{name}@{digest} is needed by {actual} manifests, not {count}", repair)

    def _examine(self, row: tuple[str, int]) -> str:
        """What is wrong with a content: a kind of finding, or nothing. Hashing lets other threads run."""
        digest, size = row
        path = self._store.files.path(digest)
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return "corrupt"
            with open(path, "rb", buffering=0, opener=no_follow) as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    return "truncated" if actual < size else "corrupt"
                running = hashlib.new(algorithm_of(digest))
                buffer = memoryview(bytearray(min(BUFFER_SIZE, max(size, 1))))
                while count := file.readinto(buffer):
                    running.update(buffer[:count])
        except FileNotFoundError:
            return "missing"
        except OSError as error:  # reading does not say which file
            raise OSError(error.errno, error.strerror, path) from error
        return "" if digest.endswith(f":{running.hexdigest()}") else "corrupt"

    def _confirm(self, digest: str, repair: bool) -> Iterator[Finding]:
        """Look again, and see that it is still so while nobody pushes or deletes, who need not wait for more.

        On a read-only medium nobody can anyway.
        """
        files, sql = self._store.files, "SELECT digest, size FROM blobs WHERE digest = ?"
        path = files.path(digest)
        state = file_state(path)
        damage = "".join(map(self._examine, self._store.query(sql, digest)))
        with self._store.transaction(frees=True) as db:
            row = self._store.query(sql, digest)
            if not row or file_state(path) != state:  # pushed or deleted meanwhile
                damage = ""
            if not row and os.path.lexists(path) and not files.is_being_placed(digest):
                pending = self._store.query("SELECT 1 FROM pending_deletes WHERE digest = ?", digest)
                damage = "" if pending else "unreferenced"
            if damage and repair:
                files.quarantine(digest)
                if row:
                    self._store.drop_content(db, digest)
        if damage:
            yield Finding(damage, digest, repair)


def _tokens(sql: str) -> list[str]:
    """An SQL statement without its spaces and comments, and the quotes around names that were changed."""
    return re.findall(r"\w+|[^\w\s\"]", re.sub(r"--.*", "", sql))


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
                self._seen = self._signature()
                self._value = self._load()
            except (OSError, ValueError) as error:
                report = f"keeping what was read before from {', '.join(self._paths)}: {error}"
                write_log(f"registry.py: {report}")
            finally:
                self._lock.release()
        return self._value

    def _signature(self) -> list[tuple[int, int, int] | None]:
        return [file_state(path) for path in self._paths]


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


@functools.lru_cache(maxsize=1)
def system_crypt() -> Callable[[str, str], str] | None:
    """The system's crypt(3) where there is one that knows bcrypt."""
    import ctypes  # noqa: PLC0415 - rarely needed, and missing from some builds of Python

    lock = threading.Lock()  # what crypt returns is in static memory

    def crypt(password: str, setting: str) -> str:
        with lock:
            return str((compute(password.encode(), setting.encode()) or b"*").decode("latin-1"))

    for library in ("libcrypt.so.1", "libcrypt.so.2", "libcrypt.dylib"):
        try:
            compute: Any = ctypes.CDLL(library).crypt
        except (OSError, AttributeError):
            continue
        compute.restype, compute.argtypes = ctypes.c_char_p, (ctypes.c_char_p, ctypes.c_char_p)
        return crypt if crypt("", "$2b$04$" + "." * 22).startswith("$2b$04$") else None
    return None


SCRYPT_HASH = re.compile(r"\$scrypt\$ln=(\d\d?),r=(\d\d?),p=(\d\d?)\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")
BCRYPT_HASH = re.compile(r"\$2[aby]\$(?:0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")  # more would take 8 seconds


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
    if BCRYPT_HASH.fullmatch(hashed) and (crypt := system_crypt()):
        return lambda password: hmac.compare_digest(crypt(password, hashed), hashed)
    raise ValueError("a hash of a kind that cannot be checked here; set it with passwd")


Users = dict[str, tuple[str, Callable[[str], bool]]]  # their hashes, and what checks them


def load_users(path: str) -> Users:
    """The users of an htpasswd file: their hashes, and what checks them. Raises OSError, ValueError."""
    users = {}
    for number, line in _lines(path):
        name, colon, hashed = line.partition(":")
        if not colon or not name or not hashed:
            raise ValueError(f"line {number} is not name:hash")
        if name in users:
            raise ValueError(f"line {number} is another one for {name}")
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
    names: tuple[str, str]  # all that match come from the first on and before the second, in byte order


def load_grants(path: str) -> list[Grant]:
    """The lines of a grants file: who, repositories, actions. Raises OSError, ValueError."""
    grants = []
    for number, line in _lines(path):
        fields = line.split()
        actions = frozenset(fields[2].split(",")) if len(fields) == 3 else frozenset()
        if not actions or not actions <= ACTIONS:
            raise ValueError(f"line {number} is not: who repositories pull,push,delete")
        prefix, star, _ = fields[1].partition("*")
        names = prefix, prefix + (AFTER_NAMES if star else "\0")
        grants.append(Grant(fields[0], compile_glob(fields[1]), actions, names))
    return grants


def compile_glob(pattern: str) -> re.Pattern[str]:
    """A pattern of repositories: * stands for anything within a path segment, ** for anything."""
    parts = re.split(r"(\*\*?)", pattern)
    return re.compile("".join({"*": "[^/]*", "**": ".*"}.get(part, re.escape(part)) for part in parts))


def _lines(path: str) -> list[tuple[int, str]]:
    """The lines of a text file that say something, numbered."""
    text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors begin with a byte-order mark
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


def client_network(address: str) -> str:
    """What of an address tells clients apart: of IPv6 the first 64 bits, since one client has all within."""
    parsed = ipaddress.ip_address(address)
    return address if parsed.version == 4 else f"{int(parsed) >> 64:x}"


class Turn(threading.Event):
    """What an attempt to log in waits for: set when its turn has come, and when it never will."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.refused = False

    def refuse(self) -> None:
        """It will not come."""
        self.refused = True
        self.set()


class LoginQueue:
    """Has the attempts to log in from each address take turns, since each hashes a password.

    That takes a core for 50 ms, and 16 MiB. With one turn at a time for an address, whoever logs in from
    elsewhere waits for one hash of each other address at most, and for one of all that failed lately. Since
    failures make turns longer, those who guess are slowed down, also when they do it at once. Of an address,
    the attempt goes first for whose name fewest wait, and of these the newest: so whoever shares it with
    those who guess comes before them.
    When too many wait in all, the address that has most of them loses the one that would go last (429).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit  # of attempts in all
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Turn]] = {}  # by address, newest first; there while one has its turn
        self._failures = Cache(1000)

    @contextlib.contextmanager
    def turn(self, address: str, name: str) -> Iterator[None]:
        """Wait for a turn, and have it. Raises TOOMANYREQUESTS."""
        turn = Turn(name)
        too_many = RegistryError(ErrorCode.TOOMANYREQUESTS, headers=(("Retry-After", "1"),))
        with self._lock:
            waiting = list(self._waiting.values())
            if sum(map(len, waiting)) + len(waiting) >= self._limit:
                longest = max(waiting, key=len)
                if not longest:
                    raise too_many
                self._pop(longest, -1).refuse()
            if address in self._waiting:
                self._waiting[address].insert(0, turn)
            else:
                self._waiting[address] = []
                turn.set()
        turn.wait()
        if turn.refused:
            raise too_many
        try:
            yield
        finally:
            with self._lock:
                if self._waiting[address]:
                    self._pop(self._waiting[address], 0).set()
                else:
                    del self._waiting[address]

    @staticmethod
    def _pop(turns: list[Turn], position: int) -> Turn:
        """Take a turn from the line of one address: 0 is who goes first, -1 who goes last."""
        counts = collections.Counter(turn.name for turn in turns)
        turn = sorted(turns, key=lambda turn: counts[turn.name])[position]
        turns.remove(turn)
        return turn

    def has_failed(self, address: str) -> bool:
        """Whether a password from an address was wrong lately."""
        return self._failures.get(address) is not None

    def fail(self, address: str) -> None:
        """Have a turn last longer after a failure: the more of them there were lately, the longer."""
        failures = (self._failures.get(address) or 0) + 1
        self._failures.put(address, failures, FAILURE_INTERVAL)
        if len(self._waiting) <= self._limit // 2:  # or other addresses would find no room
            time.sleep(min(max(failures - FAILURE_LIMIT, 0) * FAILURE_DELAY, FAILURE_DELAY_LIMIT))


class Access:
    """Who may do what: users, grants and tokens. Without users, everybody may do everything."""

    def __init__(
        self,
        users: str | None = None,
        grants: str | None = None,
        *,
        anonymous_pull: bool = False,
        key: bytes = b"",
        max_logins: int = MAX_CONNECTIONS // 2,
    ) -> None:
        """users, grants: paths of files. key signs tokens. max_logins may wait. Raises StartupError."""
        self.enabled = users is not None
        if grants is not None and not self.enabled:
            raise StartupError("grants without users would let nobody in; give --users as well")
        self._users = WatchedFiles([users], functools.partial(load_users, users)) if users else None
        self._grants = WatchedFiles([grants], functools.partial(load_grants, grants)) if grants else None
        self._anonymous_pull = anonymous_pull
        self._key = key or secrets.token_bytes(32)
        self.service = f"registry-{hashlib.sha256(self._key).hexdigest()[:8]}"
        self._secret = secrets.token_bytes(32)  # keys what is remembered of passwords
        self._verified = Cache(1000)
        self._queue = LoginQueue(max_logins)
        self._hashing, self._guessing = threading.Lock(), threading.Lock()

    def permits(self, user: str | None, scope: Scope) -> bool:
        """Whether a user, or anybody for None, may do something."""
        if not self.enabled:
            return True
        if scope == CATALOG:
            return user is not None or self.admits_anonymous()
        if scope.kind != "repository" or scope.action not in ACTIONS or len(scope.name) > NAME_LIMIT:
            return False  # a pattern with several stars takes long for long names
        if self._anonymous_pull and scope.action == "pull":
            return True
        if self._grants is None:
            return user is not None
        return any(grant.repositories.fullmatch(scope.name) for grant in self._granted(user, scope.action))

    def _granted(self, user: str | None, action: str) -> Iterator[Grant]:
        who = ("anonymous",) if user is None else ("anonymous", "*", user)
        grants = self._grants.get() if self._grants else []
        return (grant for grant in grants if grant.who in who and action in grant.actions)

    def readable_ranges(self, user: str | None) -> list[tuple[str, str]]:
        """Where the names of all that a user may pull are: from the first name on and before the second."""
        if not self.enabled or self._anonymous_pull or self._grants is None:
            return [("", AFTER_NAMES)]
        return [grant.names for grant in self._granted(user, "pull")]

    def admits_anonymous(self) -> bool:
        """Whether there is anything at all that anybody may do."""
        grants = self._grants.get() if self._grants else []
        return not self.enabled or self._anonymous_pull or any(grant.who == "anonymous" for grant in grants)

    def allows(self, caller: Caller, scope: Scope) -> bool:
        """Whether a caller may do something: a token must say so, and what it says must still hold."""
        return (caller.scopes is None or scope in caller.scopes) and self.permits(caller.user, scope)

    def identify(self, authorization: str, address: str) -> Caller:
        """Who an Authorization header says a request is from. Raises UNAUTHORIZED, TOOMANYREQUESTS."""
        method, _, credentials = authorization.partition(" ")
        if not self.enabled or not authorization:
            return Caller(None)
        if method.lower() == "bearer":
            return self._check_token(credentials.strip())
        if method.lower() == "basic":
            return Caller(self.log_in(*_parse_basic(credentials.strip()), address))
        raise RegistryError(ErrorCode.UNAUTHORIZED, "only Basic and Bearer are known here")

    def log_in(self, name: str, password: str, address: str) -> str:
        """A user's name, if this is the password. Raises UNAUTHORIZED, TOOMANYREQUESTS.

        What was right is remembered for a while, as a keyed hash, so that a user who comes back never waits.
        """
        wrong = RegistryError(ErrorCode.UNAUTHORIZED, "wrong user name or password")
        if len(name) > USER_LIMIT or len(password) > PASSWORD_LIMIT or "\0" in password:
            raise wrong
        users = self._users.get() if self._users else {}
        hashed, check = users.get(name, ("", None))
        proof = hmac.digest(self._secret, f"{name}\n{password}\n{hashed}".encode(), "sha256")
        if not self._verified.get(proof):
            stand_in, network = self._stand_in(users, name), client_network(address)
            with self._queue.turn(network, name):
                if not self._verified.get(proof):  # nor was while this one waited
                    guess = self._queue.has_failed(network)  # such ones wait for each other before
                    with self._guessing if guess else contextlib.nullcontext(), self._hashing:
                        right = (check or stand_in)(password) and check is not None
                    if not right:
                        self._queue.fail(network)
                        raise wrong
        self._verified.put(proof, True, PASSWORD_LIFETIME)
        return name

    def _stand_in(self, users: Users, name: str) -> Callable[[str], bool]:
        """What to check passwords with for a name that is nobody's: a user's, so that time tells nothing.

        It is always the same for the same name, since users need not all have hashes that take equally long.
        """
        checks = [check for _, check in users.values()] or [lambda _: False]
        return checks[int.from_bytes(hmac.digest(self._key, name.encode(), "sha256"), "big") % len(checks)]

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
        payload = content.partition(".")[2]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        if claims["aud"] != self.service or claims["exp"] <= time.time():
            raise RegistryError(ErrorCode.UNAUTHORIZED, "the token has expired or is for another service")
        user = claims["sub"]
        if self._users and user is not None and user not in self._users.get():
            raise RegistryError(ErrorCode.UNAUTHORIZED, "there is no such user any more")
        return Caller(user, frozenset(Scope(*scope) for scope in claims["access"]))

    def _sign(self, content: str) -> str:
        signature = hmac.digest(self._key, content.encode("utf-8", "surrogateescape"), "sha256")
        return base64.urlsafe_b64encode(signature).decode("ascii").rstrip("=")


def _encode_part(value: object) -> str:
    return base64.urlsafe_b64encode(encode_json(value)).decode("ascii").rstrip("=")


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
    """The key that signs tokens, made if there is none: tokens outlive a restart. Raises StartupError."""
    try:
        if create:
            with locked_directory(os.path.dirname(path)):
                if not os.path.lexists(path):
                    replace_file(path, secrets.token_bytes(32))
        with open(path, "rb", opener=no_follow) as file:
            key = file.read()
    except FileNotFoundError:
        return secrets.token_bytes(32)
    except OSError as error:
        raise StartupError(f"cannot use {path}: {error.strerror}; remove it if it is no file") from error
    if len(key) < 32:
        raise StartupError(f"{path} has fewer than 32 bytes, which can be guessed; remove it for a new one")
    return key


def replace_file(path: str, content: bytes) -> None:
    """Write a private file in one step, durably."""
    temporary = f"{path}.{secrets.token_hex(8)}"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(os.path.dirname(os.path.abspath(path)))


def watch_certificate(certificate: str, key: str | None = None) -> WatchedFiles[ssl.SSLContext]:
    """What TLS is spoken with, from PEM files that are read again when they change. Raises StartupError."""

    def load() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        context.load_cert_chain(certificate, key)
        return context

    return WatchedFiles([path for path in (certificate, key) if path], load)


# === Messages =========================================================================================


class FileRange(NamedTuple):
    """Some bytes of an open file; whoever has sent the reply closes it."""

    file: BinaryIO
    start: int
    length: int


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
        # When it was last given what it asked for, and from when on it may be given up for another:
        # whoever is refused again and again gains no time by that.
        self.served_at = self.evictable_at = time.monotonic()
        self.deadline = 0.0  # by which all has to be received, no matter how it trickles in; 0.0: none
        self._tls = False
        self._pending = b""  # received, from _start on not yet consumed
        self._start = 0
        self._timeout: float | None = None
        self._set_timeout("SND", STALL_TIMEOUT)
        with contextlib.suppress(OSError):  # some systems refuse it once the client is gone
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _set_timeout(self, direction: str, seconds: float) -> None:
        """Bound how long one receive ("RCV") or send ("SND") may wait.

        In the kernel where that works: settimeout, which bounds both, costs a poll for each call.
        """
        if os.name == "posix" and not self._tls:
            value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) + (seconds < 1e-6))
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, f"SO_{direction}TIMEO"), value)
                return
        self.socket.settimeout(seconds)

    def _wait_at_most(self, seconds: float) -> None:
        """Bound the next receive, or what TLS does next, sparing the system call when it is bounded so."""
        if seconds != self._timeout:
            self._set_timeout("RCV", seconds)
            self._timeout = seconds

    def _receive_within(self, seconds: float) -> None:
        """Bound the next receive, by the deadline as well."""
        if self.deadline:
            seconds = min(seconds, self.deadline - time.monotonic())
            if seconds <= 0:
                raise ClientGone
        self._wait_at_most(seconds)

    def _receive(self, seconds: float) -> bytes:
        self._receive_within(seconds)
        try:
            return self.socket.recv(RECEIVE_SIZE)
        except OSError as error:
            raise ClientGone from error

    def begin_tls(self, context: ssl.SSLContext) -> None:
        """Shake hands; everything from there on is encrypted."""
        try:
            self.socket.getpeername()  # raises if it was reset: wrap_socket would too, and leave it unclosed
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
            self._tls = True
            self._wait_at_most(HEADER_TIMEOUT)
            self.socket.do_handshake()
        except (OSError, ValueError) as error:
            raise ClientGone from error

    def read_head(self) -> bytes:
        """The next request's head, its last line unterminated; empty if the client is done with us.

        What is too large or malformed already comes as far as it was read, for parse_head to refuse.
        """
        head = self._pending[self._start :]
        self._pending, self._start = b"", 0
        self.deadline = 0.0
        while True:
            head = LEADING_LINES.sub(b"", head, count=1)
            end = head.find(b"\r\n\r\n")
            if end >= 0:
                break
            if _is_hopeless(head):
                return head
            if head and not self.deadline:
                self.deadline = time.monotonic() + HEADER_TIMEOUT
            more = self._receive(IDLE_TIMEOUT)
            if not more:
                return b""
            head += more
        self._pending, self._start, self.deadline = head, end + 4, 0.0
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
        self._receive_within(STALL_TIMEOUT)
        try:
            count = self.socket.recv_into(view)
        except OSError as error:
            raise ClientGone from error
        if not count:
            raise ClientGone
        return count

    def send(self, data: bytes | memoryview, *, more: bool = False) -> None:
        """Send all of this; more: something follows at once and may go into the same packet."""
        flags = getattr(socket, "MSG_MORE", 0) if more and not self._tls else 0
        if self._tls:
            self._wait_at_most(STALL_TIMEOUT)
        try:
            for start in range(0, len(data), BUFFER_SIZE):  # each piece gets a timeout of its own
                self.socket.sendall(data[start : start + BUFFER_SIZE], flags)
        except OSError as error:
            raise ClientGone from error

    def send_file(self, part: FileRange) -> None:
        """Send some bytes of a file, from kernel to kernel where that works."""
        start, stop = part.start, part.start + part.length
        self.evictable_at = time.monotonic() + HEADER_TIMEOUT
        if self._tls or not hasattr(os, "sendfile"):
            self._copy_file(part)
            return
        try:
            while start < stop:
                size = min(stop - start, BUFFER_SIZE)  # it returns only once all of that is sent
                sent = os.sendfile(self.socket.fileno(), part.file.fileno(), start, size)
                if not sent:
                    raise ClientGone("the file is shorter than it was")
                start += sent
                self.evictable_at += sent / SLOWEST_BODY
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
            self.evictable_at += count / SLOWEST_BODY
            left -= count

    def stop_sending(self) -> None:
        """Tell the client that nothing more will come, without waiting for it to say the same."""
        with contextlib.suppress(OSError, ValueError):
            if self._tls:
                self._wait_at_most(0)
                self.socket.unwrap()  # type: ignore[attr-defined]  # close_notify (RFC 8446, 6.1)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def linger(self) -> NoReturn:
        """Let the client read the last reply: closing on unread bytes would reset it (RFC 9112, 9.6).

        Ends, as everything here, when the client is gone or the deadline comes.
        """
        self.stop_sending()
        buffer = memoryview(bytearray(RECEIVE_SIZE))
        while True:
            self.readinto(buffer)

    def close(self) -> None:
        """Hang up in good order."""
        self.stop_sending()
        self.socket.close()


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
    if (version == "HTTP/1.1" or "host" in headers) and not HOST.fullmatch(headers.get("host", "")):
        raise RegistryError(ErrorCode.BAD_REQUEST, "no Host, or none that is one")
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
    """A header's name in lower case; white space in or around it is BAD_REQUEST, and so is obs-fold.

    Only names that are well-formed, and so of bounded length, are remembered.
    """
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
        self.done = length == 0

    @property
    def drainable(self) -> bool:
        """Whether what was not read is known to be so little that the next request can follow it."""
        return self.done or bool(self.length and not self._expected and self._remaining <= DRAIN_LIMIT)

    def drain(self) -> None:
        """Skip what was not read."""
        buffer = memoryview(bytearray(min(RECEIVE_SIZE, self._remaining)))
        while self.readinto(buffer):
            pass

    def readinto(self, view: memoryview) -> int:
        """Fill some of a buffer; 0 at the body's end. Raises ClientGone, and BAD_REQUEST for bad chunks."""
        if self._expected:
            self._expected = False
            self._reader.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._remaining and not self.done:
            self._next_chunk()
        if self.done:
            return 0
        if self._reader.evictable_at == math.inf:
            self._reader.evictable_at = time.monotonic() + HEADER_TIMEOUT
        count = self._reader.readinto(view[: self._remaining])
        self._reader.evictable_at += count / SLOWEST_BODY
        self._remaining -= count
        if not self._remaining:
            self._end_of_part()
        return count

    def _end_of_part(self) -> None:
        if self.length is not None:
            self._end()
        elif self._read_line():
            raise RegistryError(ErrorCode.BAD_REQUEST, "a chunk is longer than its size says")

    def _next_chunk(self) -> None:
        size = CHUNK_SIZE.fullmatch(self._read_line())
        if not size:
            raise RegistryError(ErrorCode.BAD_REQUEST, "bad chunk size")
        self._remaining = int(size[1], 16)
        if not self._remaining:
            self._skip_trailers()
            self._end()

    def _end(self) -> None:
        self.done, self._reader.evictable_at = True, math.inf

    def _read_line(self) -> bytes:
        line = self._reader.read_line(CHUNK_LINE_LIMIT)
        if line is None:
            raise RegistryError(ErrorCode.BAD_REQUEST, "bad line between chunks")
        return line

    def _skip_trailers(self) -> None:
        for _ in range(HEADER_COUNT_LIMIT):
            line = self._read_line()
            if not line:
                return
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or not HEADER_NAME.fullmatch(name) or "\r" in value or "\0" in value:
                break
        raise RegistryError(ErrorCode.BAD_REQUEST, "bad trailer")

    def read(self, limit: int, too_large: ErrorCode) -> bytes:
        """The whole body. Raises too_large past the limit, before reading it when its length is known.

        It has to arrive within a time that its length sets: no client holds a connection with so little.
        """
        if self.length is not None and self.length > limit:
            raise RegistryError(too_large)
        size = limit if self.length is None else self.length
        self._reader.deadline = time.monotonic() + HEADER_TIMEOUT + size / SLOWEST_BODY
        self._reader.evictable_at = self._reader.served_at + EVICTION_DELAY
        content, buffer = bytearray(), memoryview(bytearray(min(size, RECEIVE_SIZE)))
        while count := self.readinto(buffer):
            content += buffer[:count]
            if len(content) > limit:
                raise RegistryError(too_large)
        self._reader.deadline = 0.0
        return bytes(content)


Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Context(NamedTuple):
    """What requests are served from."""

    store: Store
    access: Access
    public_url: str | None = None  # how clients reach it, if they do not say
    secure: bool = False  # whether it speaks TLS itself
    proxies: Sequence[Network] = ()  # those whose X-Forwarded headers are believed


class Request:
    """One request as the handlers see it."""

    def __init__(self, context: Context, reader: SocketReader, address: str) -> None:
        """A request of which nothing is known yet but the address that it comes from."""
        self.context = context
        self.store = context.store
        self.address = address
        self.proxied = False  # whether it came from a trusted proxy
        self.caller = Caller(None)
        self.wanted: Scope | None = None  # what a token must be good for
        self._reader = reader
        self.method = self.target = "-"
        self.path = ""
        self._parameters: dict[str, list[str]] = {}
        self.headers: dict[str, str] = {}
        self.body = Body(reader, 0, expected=False)
        self.persistent = False  # whether the client may send another after this one

    def parse(self, data: bytes) -> None:
        """Take in a head. Raises parse_head's errors and more, keeping what was understood till then."""
        if data.startswith(b"HEAD "):
            self.method = "HEAD"  # no reply to it has a body, not even one that says how bad it is
        self.method, self.target, version, self.headers = head = parse_head(data)
        self._look_behind_proxies()
        self._parse_target(self.target)
        length = body_length(head)
        expectation = self.headers.get("expect", "").lower()
        if expectation not in ("", "100-continue"):
            raise RegistryError(ErrorCode.EXPECTATION_FAILED)
        modern = version == "HTTP/1.1"
        self.body = Body(self._reader, length, expected=bool(expectation) and modern)
        self.persistent = modern and "close" not in self.headers.get("connection", "").lower()

    def _parse_target(self, target: str) -> None:
        absolute = None if target.startswith("/") else ABSOLUTE_FORM.fullmatch(target)
        if absolute:
            self.headers["host"], target = absolute.groups()  # as RFC 9112, 3.2.2 demands
            if not HOST.fullmatch(self.headers["host"]):
                raise RegistryError(ErrorCode.BAD_REQUEST, "the target names no host")
        path, _, query = target.partition("?")
        try:
            self.path = unquote(path, errors="strict") if "%" in path else path
        except UnicodeDecodeError:
            raise RegistryError(ErrorCode.BAD_REQUEST, "the target is not UTF-8") from None
        if query:
            self._parameters = parse_parameters(query.replace("+", "%2B"))

    def parameters(self, name: str) -> list[str]:
        """Every value that the query gives a parameter. A plus sign is itself, as in media types."""
        return self._parameters.get(name, [])

    def parameter(self, name: str) -> str | None:
        """A parameter's first value, or None."""
        return next(iter(self.parameters(name)), None)

    def identify(self) -> Caller:
        """Who makes the request. Raises UNAUTHORIZED, TOOMANYREQUESTS."""
        return self.context.access.identify(self.headers.get("authorization", ""), self.address)

    def may_pull(self, repository: str) -> bool:
        """Whether whoever makes the request has the right to pull a repository."""
        return self.context.access.permits(self.caller.user, Scope("repository", repository, "pull"))

    def base_url(self) -> str:
        """How the client reaches this registry, as far as it or a trusted proxy says; empty if not at all."""
        if self.context.public_url:
            return self.context.public_url.rstrip("/")
        scheme, host = "https" if self.context.secure else "http", self.headers.get("host", "")
        if self.proxied:
            scheme = self._forwarded("x-forwarded-proto") or scheme
            host = self._forwarded("x-forwarded-host") or host
        return f"{scheme}://{host}" if scheme in ("http", "https") and HOST.fullmatch(host) else ""

    def _forwarded(self, name: str) -> str:
        """What the proxy nearest to the client says, if there is one."""
        return self.headers.get(name, "").partition(",")[0].strip()

    def _look_behind_proxies(self) -> None:
        """Take the client's address from X-Forwarded-For, to whose right end each trusted proxy added one."""
        hops = self.headers.get("x-forwarded-for", "").split(",")
        while any(ipaddress.ip_address(self.address) in network for network in self.context.proxies):
            self.proxied = True
            try:
                address = ipaddress.ip_address(hops.pop().strip())
            except (IndexError, ValueError):
                break
            if getattr(address, "scope_id", None):  # could hold anything
                break
            self.address = str(getattr(address, "ipv4_mapped", None) or address)


def parse_parameters(text: str) -> dict[str, list[str]]:
    """The values of each parameter of a query or form. Raises BAD_REQUEST."""
    try:
        return parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=PARAMETER_LIMIT)
    except ValueError:
        reason = f"the parameters are not UTF-8, or more than {PARAMETER_LIMIT}"
        raise RegistryError(ErrorCode.BAD_REQUEST, reason) from None


class Reply(NamedTuple):
    """What a handler answers. Content-Length, HEAD and the connection are not its business."""

    status: int
    headers: Headers = ()
    body: bytes | FileRange = b""

    @property
    def length(self) -> int:
        """The body's length in bytes."""
        return self.body.length if isinstance(self.body, FileRange) else len(self.body)


def json_reply(document: object, *headers: tuple[str, str]) -> Reply:
    """A 200 with a JSON document."""
    return Reply(200, (("Content-Type", JSON), *headers), encode_json(document))


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


def matches_etag(condition: str, digest: str | None, *, weakly: bool) -> bool:
    """Whether an If-Match or If-None-Match header names a content's entity tag; * names any but None.

    weakly: whether a weak tag counts too (RFC 9110, 8.8.3.2).
    """
    if condition.strip() == "*" or digest is None:
        return digest is not None
    return any(tag == digest and (weakly or not weak) for weak, tag in ENTITY_TAG.findall(condition))


def check_preconditions(request: Request, digest: str | None) -> bool:
    """Whether the client says that it has already what is there (RFC 9110, 13); None: nothing is.

    That is the content of the resource that the path names: a tag's manifest, or the one with a digest,
    whatever tags a push is to give it. Raises PRECONDITION_FAILED if If-Match does not hold, or
    If-None-Match for a request that would change something.
    """
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    known = none_match is not None and matches_etag(none_match, digest, weakly=True)
    writes = request.method not in ("GET", "HEAD")
    if (known and writes) or (match is not None and not matches_etag(match, digest, weakly=False)):
        raise RegistryError(ErrorCode.PRECONDITION_FAILED, digest or "nothing")
    return known


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
    """A content, whole, in part, or as not modified. Raises unknown when the disk has lost it.

    Raises PRECONDITION_FAILED.
    """
    headers = [("Docker-Content-Digest", content.digest), ("ETag", f'"{content.digest}"')]
    if check_preconditions(request, content.digest):
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
    """The part of a content that a GET asks for, if any. Raises RANGE_NOT_SATISFIABLE."""
    text = request.headers.get("range") if request.method == "GET" else None
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

    For a source that is named it is enough whose token it is: some clients ask for one that is good for the
    target only. One that the registry looks for must be in the token itself.
    """
    access, caller, source = request.context.access, request.caller, request.parameter("from")
    if source is not None:
        caller = Caller(caller.user)
    sources = request.store.repositories_with(digest, MOUNT_LIMIT) if source is None else [source]
    return any(
        access.allows(caller, Scope("repository", candidate, "pull"))
        and request.store.mount(name, digest, candidate)
        for candidate in sources
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
    tags = tag_parameters(request) if is_digest(reference) else []
    check = functools.partial(check_preconditions, request)
    digest = request.store.put_manifest(name, reference, manifest, content, tags=tags, check=check)
    headers = [("Location", f"/v2/{name}/manifests/{digest}"), ("Docker-Content-Digest", digest)]
    headers += [("OCI-Subject", manifest.subject)] if manifest.subject else []
    headers += [("OCI-Tag", tag) for tag in tags]
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
    request.store.delete_manifest(name, reference, functools.partial(check_preconditions, request))
    return Reply(202)


def listing_reply(
    request: Request, document: dict[str, Any], member: str, fetch: Callable[[str, int], list[str]]
) -> Reply:
    """One page of names, and a link to the next. fetch takes a name and how many are wanted after it."""
    size = page_size(request, PAGE_LIMIT)
    names = fetch(request.parameter("last") or "", size + 1 if size else 0)
    more = [page_link(request.path, n=size, last=names[size - 1])] if len(names) > size else []
    return json_reply({**document, member: names[:size]}, *more)


def tag_list(request: Request, name: str) -> Reply:
    """List tags (end-8a, end-8b)."""
    return listing_reply(request, {"name": name}, "tags", functools.partial(request.store.tags, name))


def repository_list(request: Request) -> Reply:
    """List the repositories that the caller may pull; not in the specification, but widely used."""
    return listing_reply(request, {}, "repositories", functools.partial(readable_repositories, request))


def readable_repositories(request: Request, last: str, limit: int) -> list[str]:
    """Up to so many repositories after one that the caller may pull, looked for where grants say they are."""
    readable: list[str] = []
    first, step = f"{last}\0", limit
    for start, end in sorted(request.context.access.readable_ranges(request.caller.user)):
        first = max(first, start)
        while first < end and len(readable) < limit:
            names = request.store.repositories(first, end, step)
            readable += filter(request.may_pull, names)
            first = f"{names[-1]}\0" if len(names) == step else end
            step = max(limit, LISTING_STEP)
    return readable[:limit]


def referrer_list(request: Request, name: str, digest: str) -> Reply:
    """List what refers to a manifest (end-12a, end-12b)."""
    subject, artifact_type = parse_digest(digest), request.parameter("artifactType") or None
    page, more = request.store.referrers(name, subject, artifact_type, request.parameter("last") or "")
    headers = [("Content-Type", OCI_INDEX)]
    headers += [("OCI-Filters-Applied", "artifactType")] if artifact_type else []
    headers += [page_link(request.path, artifactType=artifact_type, last=page[-1][0])] if more else []
    index = b'{"schemaVersion":2,"mediaType":"%b","manifests":[%b]}\n'
    return Reply(200, headers, index % (OCI_INDEX.encode(), b",".join(descriptor for _, descriptor in page)))


def token_get(request: Request) -> Reply:
    """Issue a token to whoever the Authorization header names, or to anybody (Docker's token protocol)."""
    caller = request.identify()
    if caller.scopes is not None:  # or a token would never expire, nor its scope be a limit
        raise RegistryError(ErrorCode.UNAUTHORIZED)
    return token_reply(request, caller.user, request.parameters("scope"), request.parameter("service"))


def token_post(request: Request) -> Reply:
    """Issue a token for a user name and password sent as a form (OAuth 2.0, RFC 6749, 4.3)."""
    try:
        form = parse_parameters(request.body.read(FORM_LIMIT, ErrorCode.FORM_TOO_LARGE).decode("ascii"))
    except UnicodeDecodeError:
        raise RegistryError(ErrorCode.BAD_REQUEST, "the form is not ASCII") from None
    values = {name: form.get(name, [""])[0] for name in ("grant_type", "username", "password", "service")}
    if values["grant_type"] != "password":
        raise RegistryError(ErrorCode.UNSUPPORTED, "the only grant_type here is password")
    user = request.context.access.log_in(values["username"], values["password"], request.address)
    return token_reply(request, user, form.get("scope", []), values["service"])


def token_reply(request: Request, user: str | None, scopes: list[str], service: str | None) -> Reply:
    """A token. Raises UNAUTHORIZED where only users may do anything, UNSUPPORTED for another service."""
    access = request.context.access
    if service and service != access.service:
        raise RegistryError(ErrorCode.UNSUPPORTED, "tokens for other services are not issued here")
    if user is None and not access.admits_anonymous():
        raise RegistryError(ErrorCode.UNAUTHORIZED)
    requested = [scope for text in " ".join(scopes).split() for scope in parse_scope(text)]
    return json_reply(access.issue_token(user, requested), ("Cache-Control", "no-store"))


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
    Route("GET", TOKEN_PATH, token_get, ""),
    Route("POST", TOKEN_PATH, token_post, ""),
)


def _compile_routes() -> list[tuple[re.Pattern[str], dict[str, Route]]]:
    """The methods of each path. A name may hold slashes, and takes all that the rest of the path leaves."""
    paths: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        pattern = re.sub("<(.+?)>", r"(?P<\1>[^/]+)", route.path).replace("<name>[^/]", "<name>.")
        pattern += "?" if pattern.endswith("/") else ""
        methods = paths.setdefault(pattern, {})
        methods[route.method] = route
        if route.method == "GET":
            methods["HEAD"] = route
    return [(re.compile(pattern, re.DOTALL), methods) for pattern, methods in paths.items()]


_COMPILED_ROUTES = _compile_routes()


@functools.lru_cache(maxsize=1024)
def find_path(path: str) -> tuple[dict[str, Route], dict[str, str]]:
    """The operations on a path by method, and the parts that it names. Raises NOT_FOUND."""
    for pattern, methods in _COMPILED_ROUTES:
        match = pattern.fullmatch(path)
        if match:
            return methods, match.groupdict()
    raise RegistryError(ErrorCode.NOT_FOUND)


def is_name(name: str) -> bool:
    """Whether this is a legal repository name (specification, "Pulling manifests")."""
    return len(name) <= NAME_LIMIT and NAME.fullmatch(name) is not None


def dispatch(request: Request) -> Reply:
    """Run the operation that a request asks for. Raises whatever keeps it from being answered."""
    find = find_path if len(request.path) <= 2 * NAME_LIMIT else find_path.__wrapped__  # which remembers none
    methods, arguments = find(request.path)
    try:
        return run_route(request, methods.get(request.method), arguments)
    except RegistryError as error:
        if error.code.status == http.HTTPStatus.METHOD_NOT_ALLOWED:
            writable = not request.store.read_only
            others = [name for name in methods if name != request.method]
            allowed = [name for name in others if writable or methods[name].access not in ("push", "delete")]
            error.headers = (("Allow", ", ".join(sorted(allowed))),)
        raise


def run_route(request: Request, route: Route | None, arguments: dict[str, str]) -> Reply:
    """Run an operation on what the path names, if that is well-formed and the caller may."""
    if route is None:
        raise RegistryError(ErrorCode.METHOD_NOT_ALLOWED)
    if "name" in arguments and not is_name(arguments["name"]):
        writes = request.method in ("POST", "PUT", "PATCH")
        raise RegistryError(ErrorCode.NAME_INVALID if writes else ErrorCode.NAME_UNKNOWN, arguments["name"])
    if request.store.read_only and route.access in ("push", "delete"):
        raise RegistryError(ErrorCode.READ_ONLY)
    if not request.context.access.enabled:
        if not route.access:  # where everybody may do everything there are no tokens
            raise RegistryError(ErrorCode.NOT_FOUND)
    elif route.access:
        authorize(request, route.access, arguments.get("name", ""))
    return route.handler(request, **arguments)


def authorize(request: Request, action: str, name: str) -> None:
    """Find out who makes a request, and whether they may.

    Raises UNAUTHORIZED when other credentials, or a token with more in it, could help; else DENIED.
    """
    access = request.context.access
    scope = CATALOG if action == "catalog" else Scope("repository", name, action)
    request.wanted = None if action == "login" else scope
    request.caller = caller = request.identify()
    allowed = caller != Caller(None) if action == "login" else access.allows(caller, scope)
    if allowed:
        return
    if caller.user is None or (caller.scopes is not None and access.permits(caller.user, scope)):
        raise RegistryError(ErrorCode.UNAUTHORIZED)
    raise RegistryError(ErrorCode.DENIED, f"{caller.user} may not {action} {name or 'the catalog'}")


def challenge(request: Request) -> str:
    """How to log in: with a token, where that is to be had and for what, or for a token with a password."""
    url, scope = request.base_url(), request.wanted
    if request.path == TOKEN_PATH or not url:
        return 'Basic realm="registry"'
    value = f'Bearer realm="{url}{TOKEN_PATH}",service="{request.context.access.service}"'
    if scope is not None:  # whoever pushes will want to look at what is there as well
        value += f',scope="{scope._replace(action="pull,push") if scope.action == "push" else scope}"'
    if request.caller.scopes is not None:  # or docker tries the same again and again
        value += ',error="insufficient_scope"'
    return value


def error_reply(error: Exception, request: Request | None = None) -> Reply:
    """The one place that turns an exception into a reply; what is nobody's fault but ours is logged."""
    if not isinstance(error, RegistryError):
        error = _translate(error)
    headers = [("Content-Type", JSON), *error.headers]
    if request and error.code is ErrorCode.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", challenge(request)))
    return Reply(error.code.status, headers, error.document())


def _translate(error: Exception) -> RegistryError:
    if is_out_of_space(error):
        return RegistryError(ErrorCode.STORAGE_FULL)
    if is_busy(error):
        return RegistryError(ErrorCode.DATABASE_BUSY, headers=(("Retry-After", "5"),))
    write_log("".join(traceback.format_exception(type(error), error, error.__traceback__)), end="")
    return RegistryError(ErrorCode.INTERNAL)


# === Server ===========================================================================================

format_date = functools.lru_cache(maxsize=2)(functools.partial(formatdate, usegmt=True))  # once a second


def encode_head(reply: Reply, *, keep: bool) -> bytes:
    """A reply's status line and headers, with those that every reply has; keep: the connection stays open."""
    lines = [
        f"HTTP/1.1 {reply.status} {http.client.responses[reply.status]}\r\n"
        f"Date: {format_date(int(time.time()))}\r\n"
        "Docker-Distribution-API-Version: registry/2.0\r\n"
        "X-Content-Type-Options: nosniff\r\n"  # what was pushed is not to run anything in a browser
        "Content-Security-Policy: default-src 'none'; sandbox"
    ]
    if reply.status not in (204, 304):
        lines.append(f"Content-Length: {reply.length}")
    lines += [f"{name}: {value}" for name, value in reply.headers]
    lines.append("\r\n" if keep else "Connection: close\r\n\r\n")
    return "\r\n".join(lines).encode("latin-1")


class Connection(socketserver.BaseRequestHandler):
    """One client's connection: requests and replies in turn until either is done."""

    def __init__(self, request: socket.socket, client_address: Any, server: Server) -> None:
        """Take the socket over. Unlike its base class, that does not handle it yet: a thread does."""
        self.client_address = client_address
        self.server: Server = server
        self.idle = True  # between requests, or after the last
        self.reader = SocketReader(request)

    def handle(self) -> None:
        """Serve it to its end."""
        with contextlib.closing(self.reader), contextlib.suppress(ClientGone):
            if self.server.tls is not None:
                self.reader.begin_tls(self.server.tls.get())
            while not self.server.stopping and (data := self.reader.read_head()):
                self._serve(data)

    def hang_up(self, how: int = socket.SHUT_RDWR) -> None:
        """Make this connection's thread come to its end; for other threads to call."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.reader.socket, how)  # not TLS's own, which is for its thread

    def _serve(self, data: bytes) -> None:
        """Serve one request. Raises ClientGone if no other may follow on this connection."""
        reader, started = self.reader, time.perf_counter()
        self.idle, reader.evictable_at = False, math.inf
        request = Request(self.server.context, reader, self.client_address[0])
        reply = Reply(499)  # only ever in the log: there was nobody left to tell
        try:
            try:
                request.parse(data)
                reply = dispatch(request)
            except ClientGone:
                raise
            except Exception as error:  # whatever it is, the client gets an answer
                reply = error_reply(error, request)
            keep = self._send(request, reply)
        finally:
            if isinstance(reply.body, FileRange):
                reply.body.file.close()
            if self.server.log:
                target = re.sub("//[^/?]*@", "//", request.target)[:500]  # a URL may hold a password
                agent = json.dumps(request.headers.get("user-agent", "-")[:200])  # one field, as it is quoted
                self.server.log(
                    f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {request.address} {request.method} {target}"
                    f" {reply.status} {reply.length} {(time.perf_counter() - started) * 1000:.1f}ms {agent}"
                )
        if not keep or not request.body.done:
            reader.evictable_at = reader.served_at + EVICTION_DELAY
            reader.deadline = time.monotonic() + LINGER_TIMEOUT
            if not keep:
                self.idle = request.body.done
                if not (self.idle and self.server.stopping):  # finish_requests may have looked just before
                    reader.linger()
            request.body.drain()
        elif reply.status < 400:
            reader.served_at = time.monotonic()
        self.idle, reader.evictable_at = True, reader.served_at

    def _send(self, request: Request, reply: Reply) -> bool:
        """Send a reply, in one write when its body is small; returns whether another request may follow."""
        if reply.status >= 400:  # or whoever may do nothing could hold a connection by not reading that
            self.reader.evictable_at = self.reader.served_at + EVICTION_DELAY
        keep = request.persistent and not self.server.stopping and request.body.drainable
        head, body = encode_head(reply, keep=keep), b"" if request.method == "HEAD" else reply.body
        if isinstance(body, bytes):
            self.reader.send(head + body)
        else:
            self.reader.send(head, more=True)
            self.reader.send_file(body)
        return keep


class Server(ThreadingHTTPServer):
    """Accepts connections, each served by a Connection in a thread, until it is told to stop.

    Overridden of what socketserver calls: get_request, verify_request, process_request, handle_error.
    """

    tls: WatchedFiles[ssl.SSLContext] | None = None
    max_connections = MAX_CONNECTIONS
    log: Callable[[str], None] | None = None  # takes one access-log line for each request

    def __init__(self, listener: socket.socket, context: Context) -> None:
        """Takes the listener over."""
        socketserver.BaseServer.__init__(self, listener.getsockname(), Connection)
        self.socket = listener
        self.context = context
        self.stopping = False
        self.connections: set[Connection] = set()
        self._closed = threading.Condition()  # notified when a connection has ended
        self._handed_over: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        self._idle_threads = 0  # that wait for what is handed over
        self.waker, self._wakee = socket.socketpair()  # whatever is sent there has serve_forever look up
        self.waker.setblocking(False)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept connections until stop_accepting; nothing is polled."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._wakee, selectors.EVENT_READ)
            while not self.stopping:
                selector.select()
                self._handle_request_noblock()  # type: ignore[attr-defined]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept one connection. Short of descriptors, waits a moment instead of spinning."""
        try:
            connection, address = self.socket.accept()
        except (OSError, MemoryError) as error:
            if not isinstance(error, BlockingIOError):  # that another worker was quicker
                time.sleep(0.05)
            raise OSError from error
        connection.setblocking(True)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection; the one that has been idle longest makes some."""
        with self._closed:
            if len(self.connections) < self.max_connections:
                return True
            longest = min(self.connections, key=lambda other: other.reader.evictable_at)
            if longest.reader.evictable_at <= time.monotonic():
                longest.hang_up()
                if self._closed.wait(EVICTION_TIMEOUT):
                    return True
        if self.tls is None:  # in the middle of a handshake, this would be noise
            with contextlib.suppress(OSError):
                reply = error_reply(RegistryError(ErrorCode.OVERLOADED))
                request.send(encode_head(reply, keep=False) + bytes(reply.body))  # type: ignore[arg-type]
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread serve a connection: one that has served another, since starting one takes longer."""
        connection = Connection(request, client_address, self)
        with self._closed:
            self.connections.add(connection)  # before it is served, so that finish_requests misses none
            if self._idle_threads:
                self._idle_threads -= 1
                return self._handed_over.put(connection)
        try:
            threading.Thread(target=self._serve_connections, args=(connection,), daemon=True).start()
        except BaseException:  # there are no more threads
            self.connections.discard(connection)
            raise

    def _serve_connections(self, connection: Connection | None) -> None:
        """Serve one connection after another; unless enough threads wait for the next one already."""
        while connection:
            try:
                connection.handle()
            except Exception:
                self.handle_error(None, connection.client_address)
            with self._closed:
                self.connections.discard(connection)
                self._closed.notify_all()
                if self.stopping or self._idle_threads == IDLE_THREADS:
                    return
                self._idle_threads += 1
            connection = self._handed_over.get()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An exception that no reply could be made of: log it, and go on serving."""
        write_log(traceback.format_exc(), end="")

    def stop_accepting(self) -> None:
        """Make serve_forever return; safe in a signal handler."""
        self.stopping = True
        with contextlib.suppress(OSError):
            self.waker.send(b"x")

    def finish_requests(self, deadline: float) -> None:
        """Hang up on idle clients, wait for requests in flight, then hang up on those too."""
        with self._closed:
            for connection in self.connections:
                if connection.idle:  # TLS has something to say yet
                    connection.hang_up(socket.SHUT_RD if self.tls else socket.SHUT_RDWR)
            self._closed.wait_for(lambda: not self.connections, deadline - time.monotonic())
            for connection in self.connections:
                connection.hang_up()
            self._closed.wait_for(lambda: not self.connections, 1.0)

    def server_close(self) -> None:
        """Free the port, and let the threads end that wait for another connection."""
        for end in (self.socket, self.waker, self._wakee):
            end.close()
        for _ in range(self._idle_threads):
            self._handed_over.put(None)


# === Embedding ========================================================================================


def open_store(data: str | os.PathLike[str], **options: Any) -> Store:
    """A store, or a StartupError that says why there is none; takes what Store takes."""
    if sqlite3.sqlite_version_info < (3, 26):  # upserts are of 3.24, renaming a column is of 3.25
        raise StartupError(f"SQLite 3.26 or newer is needed; this Python has {sqlite3.sqlite_version}")
    try:
        return Store(data, **options)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartupError(
            f"cannot use {os.fspath(data)} as data directory: {reason}; name one that you can write to"
        ) from error


_running: set[Registry] = set()  # those that are open in this process
_inherited: set[str] = set()  # data directories that were open in another when this one was forked from it


@dataclasses.dataclass(eq=False)
class Registry:
    """A registry in this process.

        with Registry() as registry:
            push_to(registry.url)

    Without a data directory it has a temporary one, removed at the end, and does not wait for the disk.
    It belongs to the process that started it. One that is forked from it can end, or have its own.
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
    trusted_proxies: Sequence[str] = ()  # addresses or networks whose X-Forwarded headers are believed
    tls_cert: str | None = None  # paths of PEM files
    tls_key: str | None = None
    max_connections: int = MAX_CONNECTIONS
    log: Callable[[str], None] | None = None  # takes one line for each request

    def __post_init__(self) -> None:
        self._stop_deadline = 0.0
        self._token_key: bytes | None = None  # once known, that of every worker
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Registry:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> Registry:
        """Begin to serve in the background, for the first time or after close. Raises StartupError."""
        self.open()
        thread = threading.Thread(target=self.serve, name="registry", daemon=True)
        thread.start()
        self._resources.callback(thread.join)
        self._resources.callback(self.server.stop_accepting)
        return self

    def open(self, listener: socket.socket | None = None) -> None:
        """Open the data directory and listen, unless a listener is given. Raises StartupError."""
        if self in _running:
            raise RuntimeError("this registry is running already")
        self._check_options()
        with contextlib.ExitStack() as resources:
            resources.callback(_running.discard, self)
            self.store = self._open_store(resources)
            resources.callback(self.store.close)
            self.server = self._open_server(listener or self.bind())
            resources.callback(self.server.server_close)
            resources.callback(lambda: self.server.finish_requests(self._stop_deadline))
            if not self.read_only:
                self.store.expire_uploads()
                self.store.remove_pending()
                self._start_periodic_jobs(resources)
            self._resources = resources.pop_all()
            _running.add(self)

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
            family, _, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=1024)
            listener.setblocking(False)  # another worker may be quicker to accept what woke this one
            return listener
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StartupError(
                f"cannot listen on {self.host} port {self.port}: {reason}; choose another --host or --port"
            ) from error

    def _check_options(self) -> None:
        if self.data is not None and os.path.realpath(self.data) in _inherited:
            raise StartupError(  # SQLite here would take the locks of the process it is a copy of for its own
                f"{os.fspath(self.data)} was in use when this process was forked; start a process anew for it"
            )
        if self.tls_key and not self.tls_cert:
            raise StartupError("a key needs a certificate too; give --tls-cert")
        if self.anonymous_pull and not self.users:
            raise StartupError(
                "without users everybody may push as well; give --users, or leave anonymous pulls out"
            )
        if self.public_url and not re.fullmatch(r"https?://[!#-~]+", self.public_url):
            raise StartupError(f"{self.public_url!r} is no URL; write one like https://registry.example")

    def _open_server(self, listener: socket.socket) -> Server:
        limit = self.max_connections
        if (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) != resource.RLIM_INFINITY:
            limit = min(limit, max(files // 2 - 32, 1))  # each takes one, and often another to answer from
        with contextlib.ExitStack() as undo:
            undo.callback(listener.close)
            tls = watch_certificate(self.tls_cert, self.tls_key) if self.tls_cert else None
            try:
                proxies = [ipaddress.ip_network(text) for text in self.trusted_proxies]
            except ValueError as error:
                raise StartupError(f"{error}; name a proxy by address or network, like 10.0.0.0/8") from None
            context = Context(self.store, self._open_access(limit), self.public_url, tls is not None, proxies)
            undo.pop_all()
        server = Server(listener, context)
        server.tls, server.max_connections, server.log = tls, limit, self.log
        return server

    def _open_access(self, max_connections: int) -> Access:
        if self._token_key is None and self.users:
            path = os.path.join(self.store.files.root, "token.key")
            self._token_key = load_key(path, create=not self.read_only)
        return Access(
            self.users,
            self.grants,
            anonymous_pull=self.anonymous_pull,
            key=self._token_key or b"",
            max_logins=max(max_connections // 2, 1),
        )

    def _start_periodic_jobs(self, resources: contextlib.ExitStack) -> None:
        stop = threading.Event()
        housekeeper = threading.Thread(target=self._run_periodic_jobs, args=(stop,), daemon=True)
        housekeeper.start()
        resources.callback(lambda: housekeeper.join(max(0.0, self._stop_deadline - time.monotonic())))
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
            passed = abs(time.time() - self.store.files.collected_at())  # its clock may have been ahead
            due.append(time.monotonic() + max(0.0, self.gc_interval - passed))
        while not stop.wait(max(0.0, min(due) - time.monotonic())):
            number = due.index(min(due))
            interval, job = jobs[number]
            try:
                job()
            except Exception:  # the disk may be full; it need not stay so
                write_log(traceback.format_exc(), end="")
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
        self._stop_deadline = time.monotonic() + timeout
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


def _leave_to_parent() -> None:
    """Called in a process just forked: keep no port of the parent open, and remove and close nothing of its.

    Closing a copy of a database connection would remove the write-ahead log, which others may use by then
    (SQLite's "How To Corrupt An SQLite Database File"). The frames of threads that are gone keep them.
    """
    for registry in _running:
        _inherited.add(os.path.realpath(registry.store.files.root))
        for connection in registry.server.connections:
            connection.reader.socket.close()
        registry.server.server_close()
        registry._resources = contextlib.ExitStack()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)

# === Command line =====================================================================================


def open_standard_streams() -> None:
    """Have something behind descriptors 0 to 2, where whoever started this process closed them.

    Else the next file to be opened gets such a number, and what anything prints is written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it gets the lowest number that is free


def print_line(line: str) -> None:
    """Write to standard output. If nobody reads that any more, as after `| head`, go on without."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it is closed when this process ends


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system will: each connection takes one, and often a file with it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        enough = 10_240 if hard == resource.RLIM_INFINITY else hard  # macOS allows no more than that
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def pick(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What a command line says of a class's fields; the class has defaults for the others."""
    return {name: value for name, value in vars(options).items() if name in kind.__annotations__}


def policy_of(options: argparse.Namespace) -> Policy:
    """The garbage collection that a command line asks for."""
    return Policy(**pick(options, Policy))


def announce(registry: Registry) -> None:
    """Say that connections are accepted now, and what somebody on the network could do with them."""
    print_line(f"Serving {registry.data} at {registry.url}")
    if registry.host in ("localhost", "::1") or registry.host.startswith("127."):
        return
    warning = "registry.py: warning: "
    if not (registry.users or registry.read_only):
        write_log(f"{warning}whoever reaches this port can push, overwrite and delete images; see --users")
    if not registry.tls_cert:
        write_log(f"{warning}passwords and images can be read and changed on their way; see --tls-cert")


def command_serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C. The first lets requests in flight finish, a second one ends at once."""
    raise_descriptor_limit()
    registry = Registry(
        sync=not options.no_sync,
        limits=Limits(**pick(options, Limits)),
        policy=policy_of(options),
        log=None if options.quiet else write_log,
        **pick(options, Registry),
    )
    listener = None
    if options.workers > 1:
        listener = registry.bind()
        registry.open(listener.dup())  # what is wrong is better said once, and before
        registry.close()
        if fork_workers(registry, options.workers) > 0:
            registry.gc_interval = 0  # the first collects garbage for all

    def stop(number: int, frame: object) -> None:
        if registry.server.stopping and listener is None:  # a worker may be told by its parent and others too
            os._exit(128 + number)
        registry.server.stop_accepting()

    registry.open(listener)
    # Whichever thread the system gives a signal to, this has the main one notice.
    signal.set_wakeup_fd(registry.server.waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, stop)
    if listener is None:
        signal.signal(signal.SIGINT, stop)
        announce(registry)
    registry.serve()
    signal.set_wakeup_fd(-1)
    registry.close(STOP_TIMEOUT)


def fork_workers(registry: Registry, count: int) -> int:
    """Return in each of so many new processes, with its number; this one watches over them to the end."""
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, lambda *_: None)  # ignored signals need not be reported
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    announce(registry)
    parent_alive, end = os.pipe()
    workers: dict[int, int] = {}  # each process's number

    def stop_without_parent() -> None:
        os.read(parent_alive, 1)  # which never comes
        os.kill(os.getpid(), signal.SIGTERM)

    while True:
        for number in set(range(count)) - set(workers.values()):
            process = os.fork()
            if not process:
                os.close(end)
                threading.Thread(target=stop_without_parent, daemon=True).start()
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes here too
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                return number
            workers[process] = number
        wait_for_end(workers, signals)


def wait_for_end(workers: dict[int, int], signals: set[signal.Signals]) -> None:
    """Forget a worker that has ended. Told to stop, stop them all, and exit; told twice, at once."""
    before, stopping = len(workers), False
    os.kill(os.getpid(), signal.SIGCHLD)  # whoever ended before that was waited for has not told
    while len(workers) == before or stopping:
        arrived = signal.sigwait(signals)
        with contextlib.suppress(ChildProcessError):
            while process := os.waitpid(-1, os.WNOHANG)[0]:
                workers.pop(process, None)  # none of ours: whoever is process 1 inherits some
        if arrived != signal.SIGCHLD:
            for process in workers:
                os.kill(process, signal.SIGKILL if stopping else signal.SIGTERM)
            if stopping:
                os._exit(128 + arrived)
            stopping = True
        if stopping and not workers:
            sys.exit()
    time.sleep(0.5)  # the next one may end as soon


class Progress:
    """How far a long job has come: a line on standard error, written over and over if that is a terminal."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self._unit = total, unit
        self._done, self._started, self._shown = 0, time.monotonic(), 0.0
        self._lock = threading.Lock()
        self._visible = sys.stderr.isatty()

    def advance(self, amount: int) -> None:
        """So much more is done."""
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if not self._visible or now - self._shown <= 0.1:
                return
            self._shown = now
            part = min(self._done / self.total, 1.0) if self.total else 1.0
            rate = format_count(int(self._done / max(now - self._started, 1e-3)), self._unit)
            bar, done = ("#" * int(part * 30)).ljust(30, "."), format_count(self._done, self._unit)
            write_log(f"\r[{bar}] {part:4.0%}  {done}  {rate}/s \x1b[K", end="")

    def finish(self) -> None:
        """Make room for other output."""
        if self._visible:
            write_log("\r\x1b[K", end="")


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


def command_verify(options: argparse.Namespace) -> int:
    """Compare every file with its digest and every row with its file; exit status 1 if something is wrong."""
    with contextlib.closing(open_existing_store(options.data, change=options.repair)) as store:
        progress, found = Progress(0, "B"), 0
        verifier = Verifier(store, progress.advance)
        progress.total = verifier.total()
        try:
            for finding in verifier.run(repair=options.repair, force=options.force):
                progress.finish()
                print_line(f"{finding.kind} {finding.subject}{' (repaired)' if finding.repaired else ''}")
                found += 1
        finally:
            progress.finish()
        if options.repair:
            store.remove_pending()
    print_line(f"{found} problems found" if found else "no problems found")
    return 1 if found else 0


def command_passwd(options: argparse.Namespace) -> None:
    """Set a user's password, or remove the user."""
    name, line = options.name, None
    try:
        if not options.delete:
            if not re.fullmatch(rf"(?!#)[^\s:]{{1,{USER_LIMIT}}}", name) or not name.isprintable():
                raise ValueError(
                    f"a name has no white space, colon, # in front, or over {USER_LIMIT} characters"
                )
            line = f"{name}:{hash_password(ask_password())}"
        change_user(os.path.realpath(options.users), name, line)
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot change {options.users}: {error}") from error


def change_user(path: str, name: str, line: str | None) -> None:
    """Replace a user's line in a users file, or remove it; another such change waits. Raises StartupError."""
    with locked_directory(os.path.dirname(path)):
        text = Path(path).read_text(encoding="utf-8-sig") if os.path.exists(path) else ""
        lines = [other for other in text.splitlines() if other.partition(":")[0].strip() != name]
        if line is None and len(lines) == len(text.splitlines()):
            raise StartupError(f"there is no {name} in {path}")
        content = "".join(f"{other}\n" for other in (lines if line is None else [*lines, line]))
        replace_file(path, content.encode("utf-8"))


def ask_password() -> str:
    """A password: asked for twice on a terminal, else a line of standard input."""
    if sys.stdin.isatty():
        password = getpass.getpass("Password: ")
        if getpass.getpass("Again: ") != password:
            raise StartupError("the two are not the same; try again")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not 0 < len(password) <= PASSWORD_LIMIT or "\0" in password:
        raise StartupError(f"a password has 1 to {PASSWORD_LIMIT} characters, and no NUL")
    return password


def open_existing_store(data: str, *, change: bool = True) -> Store:
    """The store of a data directory that there is, to change it or only look at it. Raises StartupError."""
    if not os.path.exists(os.path.join(data, "registry.db")):
        raise StartupError(f"{data} is no registry's data directory; name the one with registry.db in it")
    return open_store(data, read_only=not change and is_read_only(data))


SECONDS = {"s": 1, "m": 60, "h": 3600, "d": DAY}
BYTES = {f"{prefix}{unit}": KIB**power for power, prefix in enumerate("KMGT", 1) for unit in ("", "B", "iB")}


def number_type(
    what: str, units: Mapping[str, int] = {}, least: float = 0, most: int = COUNT_LIMIT
) -> dict[str, Any]:
    """For add_argument: a whole number within bounds, or any with one of the units behind it."""

    def parse(text: str) -> float:
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+(?=[A-Za-z]))?)([A-Za-z]*)", text)
        value = float(match[1]) * {"": 1, **units}.get(match[2], math.nan) if match else math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value if units is SECONDS else int(value)

    return {"type": parse}


# The commands that have an option, the option, what it takes, and its help with its default.
OPTIONS = """
serve gc verify  --data DIR            data directory (default: ./data)
serve            --host HOST           address to listen on (default: 127.0.0.1)
serve            --port PORT           port to listen on, 0 for a free one (default: 5000)
serve            --workers N           serve with so many processes, to use more than one core (default: 1)
serve            --max-connections N   serve so many clients at once, for each process (default: 1024)
serve            --read-only           serve pulls only; the disk may be read-only
serve            --sparse              accept manifests whose layers or children are absent
serve            --no-sync             faster, but a power cut may lose or damage what was pushed
serve            --max-blob-size SIZE  refuse larger blobs
serve            --min-free SIZE       refuse pushes that would leave less of the disk free (default: 64M)
serve            --users FILE          let only the users of this htpasswd file in; see the command passwd
serve            --grants FILE         what they may do: lines of who, repositories, actions
serve            --anonymous-pull      let everybody pull
serve            --trusted-proxy ADDR  believe the X-Forwarded headers of this address or network; repeatable
serve            --public-url URL      how clients reach this registry, if a proxy does not say
serve            --tls-cert FILE       serve HTTPS with this certificate chain (PEM)
serve            --tls-key FILE        its private key, if that is in another file
serve            --quiet               no access log on standard error
serve            --gc-interval AGE     collect garbage so often, 0 for never (default: 1h)
serve gc         --untagged-after AGE  remove manifests that have had no tag for so long, such as 7d
serve gc         --keep-last COUNT     but keep the newest so many of each repository's untagged images
serve gc         --grace GRACE         leave alone what a client pushed or asked for since (default: 1h)
serve gc         --max-size SIZE       remove the images least recently pulled while the store is larger
gc               --dry-run             only say what would be removed, from a copy in a temporary directory
gc               --all                 also look for what a crash left under blobs/, as the daemon does daily
verify           --repair              move damaged files aside so that clients push them again
verify           --force               repair even when most files are missing
passwd           name NAME             the user
passwd           --users HTPASSWD      the htpasswd file, made if missing
passwd           --delete              remove the user instead
"""
# What argparse is to know of those that take something else than a text.
KINDS: dict[str, dict[str, Any]] = {
    "PORT": number_type("a port number", most=65535),
    "N": number_type("a whole number, 1 or more", least=1),
    "COUNT": number_type("a whole number"),
    "SIZE": number_type("a size like 64M or 50G", units=BYTES),
    "AGE": number_type("a duration like 30s, 5m, 1h or 7d", units=SECONDS),
    "GRACE": number_type("a duration of 10s or more", units=SECONDS, least=SHORTEST_GRACE),
    "ADDR": {"action": "append", "dest": "trusted_proxies"},
    "HTPASSWD": {"required": True},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line: serving, and the other commands as subcommands beside it.

    Only what is given becomes an attribute, so that what stands before a command holds for it too.
    """
    common: dict[str, Any] = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    text = "A container registry. Without a command, it serves."
    parser = argparse.ArgumentParser(prog="registry.py", description=text, **common)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(command=command_serve)
    parsers = {"serve": parser}
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (command_gc, command_verify, command_passwd):
        name, text = command.__name__.replace("command_", ""), command.__doc__ or ""
        parsers[name] = commands.add_parser(name, help=text, description=text, **common)
        parsers[name].set_defaults(command=command)
    flag = {"action": "store_true", "default": False}
    for names, option, metavar, text in re.findall(r"^([a-z ]+?)  +(\S+) ?([A-Z]*)  +(.+)", OPTIONS, re.M):
        kind = {"metavar": metavar, **KINDS.get(metavar, {})} if metavar else flag
        for name in names.split():
            action = parsers[name].add_argument(option, help=text, **kind)
            if name == "serve" and (default := re.search(r"\(default: (.+)\)", text)):
                parser.set_defaults(**{action.dest: default[1]})
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    open_standard_streams()
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # what is temporary goes
    try:
        return options.command(options) or 0
    except StartupError as error:
        write_log(f"registry.py: {error}")
        return 1
    except (OSError, sqlite3.Error) as error:
        advice = "try again later" if is_busy(error) else "see whether the disk is full or damaged"
        write_log(f"registry.py: {error}; {advice}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
