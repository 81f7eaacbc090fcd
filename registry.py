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
A crash can therefore leave a file that no row names, and a row without its file only if that was damaged.

The sections, each of which uses only those above it: Constants, Errors, Digests, Manifests, Files, Store,
Maintenance, Access, Messages, Handlers, Routes, Server, Embedding, Command line.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import dataclasses
import enum
import errno
import fcntl
import functools
import getpass
import hashlib
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
from typing import Any, BinaryIO, Callable, NamedTuple
from urllib.parse import parse_qs, quote, unquote

try:
    import ssl
except ImportError:  # a Python built without it serves plain HTTP
    ssl = None  # type: ignore[assignment]

if (python := sys.version_info) < (3, 9):  # a SyntaxError here? registry.py needs Python 3.9 or newer
    error = SystemExit if __name__ == "__main__" else ImportError
    raise error(f"registry.py needs Python 3.9 or newer; this is {python[0]}.{python[1]}")

__version__ = "1.0"
__all__ = ["Limits", "Policy", "Registry"]

# === Constants: media types, limits, the patterns of names ============================================

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"

KIB, MIB = 1 << 10, 1 << 20

REQUEST_LINE_LIMIT = 8 * KIB
HEAD_LIMIT = 64 * KIB
HEADER_COUNT_LIMIT = 100
MANIFEST_LIMIT = 4 * MIB
REFERRER_PAGE_LIMIT = 1_000
TAG_PARAMETER_LIMIT = 50
DETAIL_LIMIT = 1_000  # entries of one error

PIECE_SIZE = 64 * KIB  # received, or sent of a file, at a time
COPY_SIZE = 256 * KIB  # hashed, or encrypted on its way out, at a time
BUFFER_SIZE = 1 * MIB  # each of a large upload's two; and sent of a document at a time

IDLE_TIMEOUT = 75.0  # seconds a kept-alive connection may wait for its next request
HEADER_TIMEOUT = 30.0  # from a head's first byte to its last
STALL_TIMEOUT = 60.0  # without one byte of a body moving, either way
SLOWEST_BODY = 16 * KIB  # bytes a second of a body, after the time a head may take; a slower one makes room
LINGER_TIMEOUT = 5.0  # for the rest of a request after its reply, and for the client to read that
EVICTION_DELAY = 1.0  # for which whoever is being answered need not make room
EVICTION_TIMEOUT = 0.1  # for a connection that makes room for another
STOP_TIMEOUT = 10.0  # for requests in flight when the daemon is told to stop
DATABASE_TIMEOUT = 60.0  # for the database's write lock, whoever holds it
DAY = 24 * 3600
OPTIONAL_WRITE_TIMEOUT = 1.0  # for the write lock, by what can do without or be tried again later
LEASE_SLACK = 5.0  # seconds by which leased_at may be behind
GRACE = 3600.0  # how long a client can rely on what it was told, by default

MAX_CONNECTIONS = 1024  # by default
IDLE_THREADS = 8  # that wait for the next connection
TOKEN_PATH = "/token"
TOKEN_LIFETIME = 300  # seconds
PASSWORD_LIFETIME = 3600.0  # since its last use, for which a password that was right is not hashed again
FAILURE_LIMIT = 5  # wrong passwords from one address before it is slowed down
FAILURE_INTERVAL = 60.0  # seconds without one, after which they are forgotten
FAILURE_DELAY, FAILURE_DELAY_LIMIT = 0.2, 2.0  # seconds for each further one, and at most
USER_LIMIT, PASSWORD_LIMIT = 255, 4096  # characters; what is longer is not looked at
SCRYPT_MEMORY = 64 * MIB
RESERVE_SIZE = 4 * MIB
CACHE_ENTRY_SIZE = 500  # bytes that Python needs for remembering anything, roughly
BATCH = 100  # rows that maintenance changes under one write lock
CHOICE = 1_000  # rows that it reads at a time
DROP_LIMIT = 1_000  # manifests that go with one that kept them
PUSH_PAUSE = 60  # seconds that may pass in a push between one layer and the next
CLOCK_SLACK = 60.0  # seconds by which a time may be ahead
LISTING_STEP = 1_000  # names read at once when the caller may not pull all of them
FORMAT_VERSION = 2  # PRAGMA user_version of the schema.sql beside this file

ALGORITHMS = ("sha256", "sha512")
NAME = re.compile(r"(?!.{256})[a-z0-9]+(?:(?:[./]|__?|-+)[a-z0-9]+)*")  # the specification's, shorter
NAME_LIMIT = 255
AFTER_NAMES = "\x7f"  # no name begins with this or anything after it in byte order
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
MEDIA_TYPE = re.compile(r"(?!.{256})[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
# A file under uploads/. A session's id says when it began, what its bytes are hashed with and, hashed, whose
# it is; an upload that ends with its request has a name without dashes.
UPLOAD = re.compile(r"[0-9a-f]{32}(?:-(sha256|sha512)-([0-9a-f]{16}))?")
LEADING_LINES = re.compile(rb"\A(?:\r\n)+")  # some clients end a body with one too many (RFC 9112, 2.2)
HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")

# === Errors: what can go wrong, in one table, and the exceptions ======================================


class ErrorCode(enum.Enum):
    """What can go wrong: HTTP status, code on the wire (one of the specification's fourteen), message."""

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
    READ_ONLY = 405, "UNSUPPORTED", "this registry is read-only"
    STILL_NEEDED = 405, "DENIED", "still needed by a manifest of the repository; delete that first"
    PRECONDITION_FAILED = 412, "DENIED", "If-Match or If-None-Match does not hold; this is there now"
    MANIFEST_TOO_LARGE = 413, "SIZE_INVALID", f"manifest larger than {MANIFEST_LIMIT // MIB} MiB"
    BLOB_TOO_LARGE = 413, "SIZE_INVALID", "blob larger than this registry accepts"
    TOO_MANY_TAGS = 414, "UNSUPPORTED", f"more than {TAG_PARAMETER_LIMIT} tags in one request"
    URI_TOO_LONG = 414, "UNSUPPORTED", f"request line longer than {REQUEST_LINE_LIMIT // KIB} KiB"
    UPLOAD_BUSY = 416, "BLOB_UPLOAD_INVALID", "another request is writing to this upload session"
    UPLOAD_RANGE = 416, "BLOB_UPLOAD_INVALID", "the range does not continue the upload"
    RANGE_NOT_SATISFIABLE = 416, "SIZE_INVALID", "the range lies outside the content"
    EXPECTATION_FAILED = 417, "UNSUPPORTED", "the only expectation served is 100-continue"
    REQUEST_HEADER_FIELDS_TOO_LARGE = 431, "UNSUPPORTED", f"over {HEADER_COUNT_LIMIT} headers, or 64 KiB"
    INTERNAL = 500, "UNSUPPORTED", "internal error; the registry's log says more"
    OVERLOADED = 503, "TOOMANYREQUESTS", "too many connections; try again"
    DATABASE_BUSY = 503, "TOOMANYREQUESTS", "the registry's database is busy; try again"
    HTTP_VERSION = 505, "UNSUPPORTED", "only HTTP/1.1 and HTTP/1.0 are spoken here"
    STORAGE_FULL = 507, "DENIED", "the registry's disk is full; delete something or make room"

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


Headers = Sequence[tuple[str, str]]


class RegistryError(Exception):
    """An ErrorCode on its way to the client: one entry for each detail, or one without."""

    def __init__(self, code: ErrorCode, *details: str, headers: Headers = ()) -> None:
        details = tuple(detail[:300] for detail in details[:DETAIL_LIMIT])  # what a client sent may be long
        super().__init__(code.message, *details)
        self.code, self.details, self.headers = code, details, headers

    def document(self) -> dict[str, Any]:
        """The specification's error document (section "Error Codes")."""
        code, message = self.code.code, self.code.message
        errors = [{"code": code, "message": f"{message}: {each}", "detail": each} for each in self.details]
        return {"errors": errors or [{"code": code, "message": message, "detail": None}]}


class StartupError(Exception):
    """Why the registry cannot run here, in one line that says what to do about it."""


@contextlib.contextmanager
def explain_failure(failure: str, advice: str = "") -> Iterator[None]:
    """Have what goes wrong come out as a StartupError: what failed, why, and what to do about it."""
    try:
        yield
    except (OSError, OverflowError, ValueError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartupError(f"{failure}: {reason}{advice and '; '}{advice}") from error


class ClientGone(Exception):
    """The client hung up or stalled in the middle of a request or reply."""


def encode_json(value: object) -> bytes:
    """The JSON that every reply uses: compact, ASCII, ending in a newline."""
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def is_out_of_space(error: BaseException) -> bool:
    """Whether something failed for want of room: on the disk, or under the limit of a blob's size."""
    if isinstance(error, RegistryError):
        return error.code in (ErrorCode.STORAGE_FULL, ErrorCode.BLOB_TOO_LARGE)
    if isinstance(error, sqlite3.OperationalError):
        return "is full" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_busy(error: BaseException) -> bool:
    """Whether the database could not be had because another thread or process held it for too long."""
    return isinstance(error, sqlite3.OperationalError) and "is locked" in str(error)


def write_log(text: str, end: str = "\n") -> None:
    """Write to standard error. If there is none, or nobody reads it any more, go on without."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text + end)
        sys.stderr.flush()


# === Digests: parsing and computing them ==============================================================


def parse_digest(text: str) -> str:
    """The digest itself; DIGEST_INVALID for bad syntax or an algorithm that is not served."""
    if not DIGEST.fullmatch(text):
        raise RegistryError(ErrorCode.DIGEST_INVALID, text)
    return text


def algorithm_of(digest: str) -> str:
    """The algorithm that a well-formed digest names."""
    return digest.partition(":")[0]


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    """The digest of some bytes."""
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


# === Manifests: what a manifest says, checked =========================================================


class Manifest(NamedTuple):
    """What the registry needs to know of a manifest or index (image-spec manifest.md, image-index.md)."""

    media_type: str
    artifact_type: str | None  # its own; a manifest's falls back to its config's media type
    subject: str | None  # the digest of the manifest that this one refers to
    annotations: dict[str, str]
    required: list[str]  # digests that the repository must hold already
    optional: list[str]  # digests that it may lack: foreign layers

    def descriptor(self, digest: str, size: int) -> bytes:
        """How the list of referrers describes it, as JSON (specification, "Listing Referrers")."""
        optional = {"artifactType": self.artifact_type, "annotations": self.annotations}
        present = {name: value for name, value in optional.items() if value}
        return encode_json({"mediaType": self.media_type, "digest": digest, "size": size, **present})


def parse_manifest(content: bytes, content_type: str) -> Manifest:
    """A manifest or index of any media type, pushed with this Content-Type or "". Raises MANIFEST_INVALID."""
    try:  # int refuses NaN and Infinity, which are not JSON
        document = json.loads(content.decode("utf-8"), parse_int=_parse_int, parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise RegistryError(ErrorCode.MANIFEST_INVALID, f"not JSON: {type(error).__name__}") from None
    _check(isinstance(document, dict), "not a JSON object")
    media_type = _media_type(document, content_type)
    required, optional = (sorted({each["digest"] for each in some}) for some in _needs(document))
    artifact_type = _member(document, "artifactType", str)
    artifact_type = artifact_type or _member(document.get("config", {}), "mediaType", str) or None
    subject = document.get("subject")
    subject = None if subject is None else _descriptors([subject], "subject")[0]["digest"]
    annotations = _member(document, "annotations", dict) or {}
    _check(all(isinstance(value, str) for value in annotations.values()), "annotations are not all strings")
    return Manifest(media_type, artifact_type, subject, annotations, required, optional)


def _needs(document: dict[str, Any]) -> tuple[Iterable[Any], Iterable[Any]]:
    """The descriptors of what must be there, and of layers that clients fetch elsewhere."""
    if "manifests" in document:
        return _descriptors(document["manifests"], "manifests"), ()
    foreign: list[Any] = []
    required = _descriptors([document.get("config")], "config")
    for layer in _descriptors(document.get("layers"), "layers"):
        kind = _member(layer, "mediaType", str) or ""
        elsewhere = layer.get("urls") or "nondistributable" in kind or "foreign" in kind
        (foreign if elsewhere else required).append(layer)
    return required, foreign


def _check(holds: object, reason: str) -> None:
    if not holds:
        raise RegistryError(ErrorCode.MANIFEST_INVALID, reason)


def _parse_int(digits: str) -> int:
    if len(digits) > 20:  # int() takes quadratic time
        raise ValueError("number too long")
    return int(digits)


def _media_type(document: dict[str, Any], content_type: str) -> str:
    """The one media type that body, header and the body's members agree on."""
    declared = _member(document, "mediaType", str) or content_type
    _check(
        not content_type or declared == content_type, f"sent as {content_type}, but mediaType is {declared}"
    )
    index, image = "manifests" in document, "layers" in document or "config" in document
    media_type = str(declared or (OCI_INDEX if index else OCI_MANIFEST))
    _check(MEDIA_TYPE.fullmatch(media_type), "malformed media type")
    schema1 = media_type.startswith("application/vnd.docker.distribution.manifest.v1")  # +json, +prettyjws
    known = document.get("schemaVersion") == 2 and not schema1
    _check(known, "schemaVersion must be 2; Docker's schema 1 is not supported")
    _check(index != image, "needs either manifests, or config and layers")
    others = (OCI_MANIFEST, DOCKER_MANIFEST) if index else (OCI_INDEX, DOCKER_LIST)
    _check(media_type not in others, f"its members are not those of {media_type}")
    return media_type


def _member(document: dict[str, Any], name: str, kind: type) -> Any:
    """A member of this kind, or None; a str is a media type, so short and printable (RFC 6838)."""
    value = document.get(name)
    _check(value is None or isinstance(value, kind), f"{name} is of the wrong type")
    plain = not isinstance(value, str) or (len(value) <= 255 and value.isprintable())
    _check(plain, f"{name} is too long, or has characters that cannot be printed")
    return value


def _descriptors(values: object, member: str) -> list[Any]:
    """A list of content descriptors (image-spec descriptor.md), their digests and sizes checked."""
    descriptors = values if isinstance(values, list) else [None]  # which has no digest either
    for each in descriptors:
        digest, size = (each.get("digest"), each.get("size", 0)) if isinstance(each, dict) else (None, 0)
        _check(isinstance(digest, str) and DIGEST.fullmatch(digest), f"{member} has no digest, or a bad one")
        _check(type(size) is int and size >= 0, f"{member} has a bad size")
    return descriptors


# === Files: the content-addressed directory, uploads, and a cache; knows no SQL =======================


def no_follow(path: str, flags: int) -> int:
    """An opener for open() that follows no symlink which somebody may have put into the data directory."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_directory(path: str) -> Iterator[None]:
    """Keep other processes, and other threads that ask, from what a directory's lock stands for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may have a copy of the descriptor
        os.close(descriptor)


def remove_file(path: str) -> None:
    """Remove a file; no error if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def file_state(file: str | int) -> tuple[int, int, int] | None:
    """What tells whether a file, by path or descriptor, is still the same: when modified, size, inode."""
    with contextlib.suppress(OSError):
        status = os.stat(file)
        return status.st_mtime_ns, status.st_size, status.st_ino
    return None


def hash_file(file: io.FileIO, algorithm: str) -> str:
    """The digest of what is left to read of a file. Hashing lets other threads run."""
    running, buffer = hashlib.new(algorithm), memoryview(bytearray(COPY_SIZE))
    while count := file.readinto(buffer):
        running.update(buffer[:count])
    return f"{algorithm}:{running.hexdigest()}"


class UploadFile(io.FileIO):
    """A file under uploads/ that this thread alone may write to (flock), hashed as it grows.

    It is open for reading; for writing only within append and take_back, so never once it is under blobs/.
    A session's file stays when this is closed; any other is gone then, unless it was made a blob.
    """

    LARGE = threading.BoundedSemaphore(32)  # uploads at once with large buffers

    def __init__(
        self, files: Files, session: str, algorithm: str = "", *, create: bool = False, patience: float = 0.2
    ) -> None:
        """Raises FileNotFoundError when there is none to open, UPLOAD_BUSY when another has it for longer."""
        self.id = session
        self.path = f"{files.root}/uploads/{session}"
        self._files = files
        more = os.O_CREAT | os.O_EXCL if create else 0
        super().__init__(self.path, opener=lambda path, flags: no_follow(path, flags | more))
        try:
            self._lock(time.monotonic() + patience)
        except BaseException:
            super().close()
            raise
        self.size = self._flushed = os.fstat(self.fileno()).st_size
        # Of exactly the bytes that the file has; None when it has to be read for that.
        algorithm = algorithm or (session.split("-")[1] if "-" in session else "sha256")
        self._hash: Any = None if self.size else hashlib.new(algorithm)

    def _lock(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RegistryError(ErrorCode.UPLOAD_BUSY) from None
                time.sleep(0.005)  # expire_uploads has it for a moment, or another writer for long
        if not os.path.samestat(os.fstat(self.fileno()), os.lstat(self.path)):
            raise FileNotFoundError(self.path)  # what was opened became a blob before it was locked

    def append(self, readinto: Callable[[memoryview], int], expected: int | None = None) -> int:
        """Append all that readinto gives until it gives nothing, and return how many bytes that was.

        expected: how many, if known. What came before an exception stays. Once much has come, unless too many
        others have such, two large buffers take turns: one is hashed and written while the other is filled.
        """
        self._files.check_space(self.size, expected or 0)
        start, filled = self.size, 0
        thread: Any = None  # what writes large buffers
        writing: Any = None  # the last of these writes
        size = PIECE_SIZE if expected is None else min(expected + 1, PIECE_SIZE)  # one more: never full
        buffer = spare = memoryview(bytearray(size))
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(self.path, "rb+", buffering=0, opener=no_follow))
            file.seek(start)
            try:
                while count := readinto(buffer[filled:]):
                    filled += count
                    if filled == len(buffer):
                        filled = 0  # before the write: one that fails is not repeated below
                        if writing:
                            writing.result()
                            writing = thread.submit(self._write, file, buffer)
                        else:
                            self._write(file, buffer)
                        buffer, spare = spare, buffer
                        if buffer is spare and self.LARGE.acquire(blocking=False):  # both are the small one
                            from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - slow to load

                            stack.callback(self.LARGE.release)
                            thread = stack.enter_context(ThreadPoolExecutor(1))
                            writing = thread.submit(int)  # which has nothing to do
                            buffer = memoryview(bytearray(BUFFER_SIZE))
                            spare = memoryview(bytearray(BUFFER_SIZE))
            finally:
                if writing:
                    writing.result()
                if filled:
                    self._write(file, buffer[:filled])
        return self.size - start

    def _write(self, file: io.FileIO, data: memoryview) -> None:
        self._files.check_space(self.size, len(data))
        while data:
            written = file.write(data) or 0
            if self._hash:
                self._hash.update(data[:written])
            self.size += written
            data = data[written:]
        if self.size - self._flushed >= 8 * MIB and hasattr(os, "posix_fadvise"):
            # On this advice, Linux begins to write what sync would else wait for all at once.
            os.posix_fadvise(file.fileno(), self._flushed, self.size - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.size

    def take_back(self, size: int) -> None:
        """Drop what was appended past this size."""
        self._hash = None
        with open(self.path, "rb+", buffering=0, opener=no_follow) as file:
            self.size = file.truncate(size)

    def digest(self, algorithm: str) -> str:
        """The digest of what the file has, which is read unless it was hashed as it came."""
        if self._hash and self._hash.name == algorithm:
            return f"{algorithm}:{self._hash.hexdigest()}"
        self.seek(0)
        return hash_file(self, algorithm)

    def hash_state(self) -> tuple[Any, object] | None:
        """The running hash, and how to tell that the file still has no other bytes than those in it.

        Other processes may write as many bytes as they took back, so a random time of modification marks the
        file, which any later write changes. None where the file system does not keep that.
        """
        moment = int(time.time()) * 10**9 + secrets.randbelow(10**7) * 100
        with contextlib.suppress(OSError):
            os.utime(self.fileno(), ns=(moment, moment))
        state = file_state(self.fileno())
        return (self._hash, state) if self._hash and state and state[:2] == (moment, self.size) else None

    def resume_hash(self, state: tuple[Any, object] | None) -> None:
        """Take over the running hash that hash_state gave, unless somebody has written since."""
        if state and state[1] == file_state(self.fileno()):
            self._hash = state[0]

    def close(self) -> None:
        """Release the lock, also if a forked child has inherited it."""
        if not self.closed:
            if "-" not in self.id:
                remove_file(self.path)
            fcntl.flock(self, fcntl.LOCK_UN)
            super().close()


def hashed_name(name: str) -> str:
    """What stands for a repository in the names of its upload sessions."""
    return hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]


class Limits(NamedTuple):
    """How much may be stored, in bytes."""

    max_blob_size: int | None = None
    min_free: int = 0  # of the disk, which pushes must leave


class Files:
    """The content-addressed files of one data directory, and those under upload beside them."""

    def __init__(self, root: str, *, durable: bool, limits: Limits) -> None:
        """durable: whether bytes and names are forced to the disk before they count."""
        self.root = os.path.abspath(root)
        self.durable = durable
        self._limits = limits

    def make_directories(self) -> None:
        """Make the directories that are missing, durably. Raises StartupError when uploads could not move."""

        def make(path: str, mode: int = 0o777) -> None:
            if not os.path.isdir(path):  # or a parent would be opened that need not be readable
                make(os.path.dirname(path))
                os.makedirs(path, mode, exist_ok=True)
                if self.durable:
                    sync_directory(os.path.dirname(path))

        make(self.root, 0o700)  # the data is its owner's alone
        for directory in ("blobs/sha256", "blobs/sha512", "uploads"):
            make(f"{self.root}/{directory}")
        for algorithm in ALGORITHMS:  # a device has one number however often it is mounted: only a try tells
            paths = f"{self.root}/uploads/.probe", f"{self.root}/blobs/{algorithm}/.probe"
            try:
                os.close(no_follow(paths[0], os.O_WRONLY | os.O_CREAT))
                os.replace(*paths)
            except OSError as error:  # a disk that is full, say, is no reason
                if error.errno == errno.EXDEV:
                    reason = f"uploads and blobs/{algorithm} are on different volumes; put both on one"
                    raise StartupError(f"cannot use {self.root} as data directory: {reason}") from None
            finally:
                for path in paths:
                    with contextlib.suppress(OSError):
                        os.unlink(path)

    def path(self, digest: str) -> str:
        """Where the content with this digest is, or would be."""
        return f"{self.root}/blobs/{digest.replace(':', '/')}"

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
        """Make an upload the content of a digest, durably; the one way into blobs/. Raises DIGEST_INVALID."""
        actual = upload.digest(algorithm_of(digest))
        if actual != digest:
            remove_file(upload.path)
            raise RegistryError(ErrorCode.DIGEST_INVALID, f"content is {actual}, not {digest}")
        if self.durable:
            try:
                os.fsync(upload.fileno())
            except OSError:
                remove_file(upload.path)  # a second try might succeed without what the system has dropped
                raise
        target = self.path(digest)
        os.replace(upload.path, target)  # which mends what is damaged there
        if self.durable:
            sync_directory(os.path.dirname(target))

    def is_being_placed(self, digest: str) -> bool:
        """Whether a content has just been placed, and its upload waits for the row that will name it."""
        path = self.path(digest)
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "rb", buffering=0, opener=no_follow) as file:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return False

    def quarantine(self, digest: str) -> None:
        """Move what is in the place of a damaged content to corrupt/, beside what is there already."""
        os.makedirs(f"{self.root}/corrupt", exist_ok=True)
        target = f"{self.root}/corrupt/{digest.replace(':', '-')}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path(digest), target)

    def contents(self) -> Iterator[str]:
        """The digests that files under blobs/ are named by, in no order; other names are not ours."""
        for algorithm in ALGORITHMS:  # a copy on other media may lack the directory, if it was empty
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path(f"{algorithm}:")) as entries:
                yield from filter(DIGEST.fullmatch, (f"{algorithm}:{entry.name}" for entry in entries))

    def check_space(self, size: int, more: int) -> None:
        """Raise BLOB_TOO_LARGE or STORAGE_FULL unless an upload of this size may grow by so many bytes."""
        largest, min_free = self._limits
        if largest is not None and size + more > largest:
            raise RegistryError(ErrorCode.BLOB_TOO_LARGE, f"more than {largest} bytes")
        if min_free and shutil.disk_usage(self.root).free - more < min_free:
            raise RegistryError(ErrorCode.STORAGE_FULL)

    def keep_reserve(self) -> None:
        """Set some space aside while there is plenty, to give up when the disk is full: for deletions."""
        path, free = f"{self.root}/reserve", shutil.disk_usage(self.root).free
        try:
            if free < RESERVE_SIZE:
                remove_file(path)
            elif self.durable and free > 2 * RESERVE_SIZE and not os.path.lexists(path):
                with open(path, "wb", buffering=0, opener=no_follow) as file:
                    file.write(bytes(RESERVE_SIZE))
        except OSError:  # a quota, say: then there is none
            with contextlib.suppress(OSError):
                os.unlink(path)

    def collected_at(self, *, now: bool = False) -> float:
        """When a daemon last collected garbage; with now, or if none ever did, that is now, and noted."""
        try:
            with open(f"{self.root}/last-gc", "ab", opener=no_follow) as file:
                if now:
                    os.utime(file.fileno())
                return os.fstat(file.fileno()).st_mtime
        except OSError:  # the disk may be full
            return time.time()

    def new_upload(self, algorithm: str, repository: str | None = None) -> UploadFile:
        """A new upload, locked: a session of a repository, or one that ends with this request."""
        owner = f"-{algorithm}-{hashed_name(repository)}" if repository else ""
        for _ in range(10):
            name = f"{int(time.time()):08x}{secrets.token_hex(12)}{owner}"
            with contextlib.suppress(FileNotFoundError):
                return UploadFile(self, name, algorithm, create=True)
            with contextlib.suppress(FileExistsError):  # expire_uploads was there before the lock
                os.mkdir(f"{self.root}/uploads")  # else somebody has removed the directory
        raise FileNotFoundError(errno.ENOENT, "it is removed as soon as it is made", f"{self.root}/uploads")

    def uploads(self) -> Iterator[tuple[str, os.stat_result]]:
        """The names and states of all uploads, under way or left behind; what else is there is not ours."""
        with contextlib.suppress(FileNotFoundError), os.scandir(f"{self.root}/uploads") as entries:
            for entry in entries:
                if UPLOAD.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.name, entry.stat(follow_symlinks=False)


class Cache:
    """Remembers things up to a limit of all their sizes; those of one cache live equally long."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._things: dict[Any, tuple[float, int, Any]] = {}
        self._lock = threading.RLock()

    def get(self, key: Any) -> Any:
        """What was put there, or None."""
        expires, _, thing = self._things.get(key, (0.0, 0, None))
        return thing if expires > time.monotonic() else None

    def put(self, key: Any, thing: Any, seconds: float = float("inf"), size: int = 1) -> None:
        """Remember a thing; the size is of the key as well, in the unit of the limit."""
        now = time.monotonic()
        with self._lock:
            self.forget(key)
            self._things[key] = now + seconds, size, thing
            self._size += size
            while self._things:
                oldest, (expires, _, _) = next(iter(self._things.items()))
                if self._size <= self._limit and expires > now:
                    break
                self.forget(oldest)

    def forget(self, key: Any) -> None:
        """Drop what was put there."""
        with self._lock:
            self._size -= self._things.pop(key, (0.0, 0, None))[1]


# === Store: files and SQLite together; knows no HTTP ==================================================


class Descriptor(NamedTuple):
    """A content of a repository: image-spec's descriptor, as far as a reply needs it."""

    media_type: str
    digest: str
    size: int  # bytes


Check = Callable[["str | None"], object]  # takes the digest that a reference names, raises what forbids it

_log_indexes: dict[tuple[int, int], tuple[int, mmap.mmap]] = {}  # those mapped, by device and inode
_log_indexes_lock = threading.Lock()


def map_log_index(path: str) -> mmap.mmap | None:
    """The head of registry.db-shm, which changes with every commit of any process; None if it cannot be had.

    It is the index of SQLite's log, written before anybody can see what was committed (walformat.html, 2.1).
    PRAGMA data_version halves the rate of GETs, since each query lets other threads run. Who closes any
    descriptor of a file loses all locks on it (POSIX), and SQLite's are on this one: so all stores of a
    process share one, until SQLite has removed the file.
    """
    with _log_indexes_lock:
        for key, (descriptor, index) in list(_log_indexes.items()):
            if not os.fstat(descriptor).st_nlink:
                del _log_indexes[key]
                index.close()
                os.close(descriptor)
        with contextlib.suppress(OSError):
            status = os.stat(path)
            key = status.st_dev, status.st_ino
            if key not in _log_indexes:
                descriptor = os.open(path, os.O_RDWR)  # as SQLite does; who may not, caches no queries
                index = mmap.mmap(descriptor, 96, access=mmap.ACCESS_READ)  # both copies of the head
                _log_indexes[key] = descriptor, index
            return _log_indexes[key][1]
    return None


def connect(path: str, mode: str) -> sqlite3.Connection:
    """A connection to a database that any thread may use; mode: that of SQLite's URIs."""
    uri = f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode={mode}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=DATABASE_TIMEOUT, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA foreign_keys = ON")
    if "unix-none" in mode:  # which has no locks, and so no index of the log that others see
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    return connection


class Database:
    """registry.db, for queries: pooled connections, and what tells whether anything was committed.

    Where SQLite cannot have its locks, it is read without them, for as long as the files stay as they are.
    """

    def __init__(self, path: str, *, read_only: bool) -> None:
        """Raises sqlite3.Error, OSError."""
        self._path = path
        self._idle: list[sqlite3.Connection] = []  # a stack, so that few stay warm
        self._states: tuple[Any, Any] | None = None  # of the files, where they are read without locks
        self.connect = functools.partial(connect, path, "ro" if read_only else "rw")
        try:
            self.query("PRAGMA user_version")
        except sqlite3.OperationalError as error:
            self.close()
            if not read_only or is_busy(error):
                raise
            self._states = self._look()
            log_size = (self._states[1] or (0, 0))[1]
            mode = "ro&vfs=unix-none" if log_size else "ro&immutable=1"  # which reads no log
            self.connect = functools.partial(connect, path, mode)
        self._index = None if self._states else map_log_index(f"{path}-shm")

    def _look(self) -> tuple[Any, Any]:
        return file_state(self._path), file_state(f"{self._path}-wal")

    def is_outdated(self) -> bool:
        """Whether somebody has changed files that were to be read without locks."""
        return self._states is not None and self._states != self._look()

    def generation(self) -> object:
        """What changes with every commit of whatever process; None where that cannot be told."""
        if self._index is not None and not self._index.closed:  # the file may be gone (see map_log_index)
            return self._index[:]
        return self._look() if self._states else None

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """The rows of one query."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self.connect()
        try:
            return connection.execute(sql, parameters).fetchall()
        finally:
            if len(self._idle) < 8:
                self._idle.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()


def read_schema() -> list[str]:
    """Sections of schema.sql: strays; before, while and after the tables are made. Raises StartupError."""
    with explain_failure("cannot read schema.sql", "it has to lie beside registry.py"):
        schema = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
    return re.split(r"^-- ===.*", schema, flags=re.MULTILINE)[1:]


class Store:
    """Repositories on disk: for any thread, beside other processes that have the same data directory.

    Errors of the caller's making are RegistryErrors; the rest are OSError and sqlite3.Error.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        sparse: bool = False,  # accept manifests whose layers, and indexes whose children, are absent
        durable: bool = True,  # what was acknowledged survives a power cut
        read_only: bool = False,  # change nothing, not even what is kept of pulls
        limits: Limits | None = None,
    ) -> None:
        """Open a data directory, made if missing. Raises StartupError when that cannot be."""
        self.sparse = sparse
        self.read_only = read_only
        self.files = Files(os.fspath(root), durable=durable, limits=limits or Limits())
        self._path = os.path.join(self.files.root, "registry.db")
        self._cache = Cache(8 * MIB)  # of small contents
        self._lookups = Cache(4 * MIB)  # of query results
        self._hashes = Cache(1_000)  # UploadFile.hash_state of sessions between requests
        self._pulled: dict[tuple[str, str], int] = {}  # when manifests were pulled, not yet recorded
        self._write_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._commits = self._synced = 0  # how many there were, and how many of them are durable
        self._unsyncable = False
        failing = explain_failure(f"cannot use {root} as data directory", "name one that you can write to")
        with failing, contextlib.ExitStack() as resources:
            if sqlite3.sqlite_version_info < (3, 26):  # upserts are of 3.24, renaming a column is of 3.25
                raise StartupError(f"SQLite 3.26 or newer is needed; this is {sqlite3.sqlite_version}")
            if not read_only:
                self._open_for_writing(resources)
            elif not os.path.exists(self._path):  # SQLite says no more than that it cannot open it
                raise StartupError(f"there is no {self._path}, so nothing to serve read-only")
            self._database = Database(self._path, read_only=read_only)
            resources.push(lambda *_: self._database.close())  # the one that query may have put there
            ((version,),) = self.query("PRAGMA user_version")
            if version != FORMAT_VERSION:
                older = version < FORMAT_VERSION
                advice = "start without --read-only once" if older else "run the newer registry.py"
                raise StartupError(f"{self._path} has format {version}, not {FORMAT_VERSION}: {advice}")
            self._resources = resources.pop_all()

    def _open_for_writing(self, resources: contextlib.ExitStack) -> None:
        self.files.make_directories()
        self.files.keep_reserve()
        self._writer = connect(self._path, "rwc")
        resources.callback(self._writer.close)
        self._writer.execute(f"PRAGMA synchronous = {'NORMAL' if self.files.durable else 'OFF'}")
        with locked_directory(self.files.root):  # nobody waits for a database that is being made
            self._writer.execute("PRAGMA journal_mode = WAL")
            ((version,),) = self._writer.execute("PRAGMA user_version")
            if version < FORMAT_VERSION:  # make the tables, or bring those of format 1 up to date
                _, before, tables, after = read_schema()
                script = before + tables + after if version else tables
                self._writer.executescript(f"PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE; {script} COMMIT;")
                self._writer.execute("PRAGMA foreign_keys = ON")
                remove_file(f"{self.files.root}/generation")  # by which format 1 told commits
        if self.files.durable:
            self._log = os.open(f"{self._path}-wal", os.O_RDWR)
            resources.callback(os.close, self._log)

    def close(self) -> None:
        """Close the database. No other method may be called again."""
        self.flush_pulls()
        # A request that did not end in time may have the lock: SQLite does not survive being closed then.
        if self._write_lock.acquire(timeout=OPTIONAL_WRITE_TIMEOUT):
            self._resources.close()
            self._write_lock.release()

    def query(self, sql: str, *parameters: object) -> list[Any]:
        """The rows of one query; asked again if files that are read without locks have changed."""
        while True:
            database = self._database
            try:
                rows = database.query(sql, parameters)
                if not database.is_outdated():
                    return rows
            except sqlite3.DatabaseError:
                if not database.is_outdated():
                    raise
            with self._write_lock:
                if self._database is database:
                    self._database = Database(self._path, read_only=True)
                    database.close()

    def pages(self, columns: str, source: str, *values: Any, after: Sequence[Any]) -> Iterator[list[Any]]:
        """Rows of a source that ends in a condition, some at a time: those whose first columns come after."""
        key, marks = ", ".join(columns.split(", ")[: len(after)]), ", ".join("?" * len(after))
        sql = f"SELECT {columns} FROM {source} AND ({key}) > ({marks}) ORDER BY {key} LIMIT {CHOICE}"
        while rows := self.query(sql, *values, *after):
            after = rows[-1][: len(after)]
            yield rows

    def query_cached(self, sql: str, *parameters: object) -> list[Any]:
        """The rows of one query; if any and short, remembered until whatever process commits something."""
        key, generation = (sql, *parameters), self._database.generation()
        known: tuple[object, list[Any]] | None = self._lookups.get(key)
        if known and known[0] == generation:
            return known[1]
        rows = self.query(sql, *parameters)
        size = sum(sys.getsizeof(cell) for cells in (parameters, *rows) for cell in cells)
        if rows and generation is not None and size <= 32 * KIB:  # what is not there would push out what is
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

        durable: only when it is on the disk. frees: it makes room; on a full disk, the reserve goes before.
        """
        deadline = time.monotonic() + timeout
        if frees:
            self.files.keep_reserve()
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
            commit = self._commits = self._commits + 1
        finally:
            self._write_lock.release()
        if durable:
            self._sync_log(commit)

    def _sync_log(self, commit: int | None = None) -> None:
        """Wait until a commit of this store, or else all that anybody has committed by now, is on the disk.

        Commits only append to SQLite's log (PRAGMA synchronous = NORMAL): so the write lock is not held while
        the disk takes its time, and one sync serves all who committed before it began. Before the log is
        begun anew, SQLite syncs it, and the database with all it says (wal.html, 3). After one that failed,
        the next might succeed without what the system has dropped: so there is none.
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
        """A transaction for the rows of a content that is put on disk before, so that nobody waits for that.

        Should it have been collected before the transaction begins, the bytes, which are still open, are put
        there again. The copies stay locked, which tells verify that they wait for their row. If the
        transaction fails, the file goes unless it has a row.
        """
        self.files.place(upload, digest)
        try:
            with contextlib.ExitStack() as copies:
                while True:
                    with self.transaction() as db:
                        if os.path.lexists(self.files.path(digest)):
                            yield db
                            return
                    copy = copies.enter_context(self.files.new_upload(algorithm_of(digest)))
                    upload.seek(0)
                    copy.append(upload.readinto, upload.size)
                    self.files.place(copy, digest)
        except BaseException:
            suppress, timeout = contextlib.suppress(OSError, sqlite3.Error), OPTIONAL_WRITE_TIMEOUT
            with suppress, self.transaction(durable=False, timeout=timeout) as db:
                if not db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchall():
                    remove_file(self.files.path(digest))
            raise

    def _change_if_possible(self, sql: str, rows: list[tuple[Any, ...]]) -> int | None:
        """Run a statement for each row; how many changed, None if the disk is full or the database busy."""
        try:
            with self.transaction(durable=False, timeout=OPTIONAL_WRITE_TIMEOUT) as db:
                return db.executemany(sql, rows).rowcount
        except (OSError, sqlite3.OperationalError) as error:
            if not is_out_of_space(error) and not is_busy(error):
                raise
            return None

    LINK = "INSERT OR IGNORE INTO repository_blobs (repository_id, digest, leased_at) VALUES (?, ?, 0)"
    RENEW_LEASE = "UPDATE repository_blobs SET leased_at = ? WHERE repository_id = ? AND digest = ?"

    def _link(self, db: sqlite3.Connection, name: str, digest: str, size: int) -> int:
        """Record a content that is on disk, and that a repository serves it. Returns the repository's id."""
        db.execute("INSERT INTO repositories (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
        update = "UPDATE SET size = excluded.size WHERE size <> excluded.size"
        db.execute(f"INSERT INTO blobs VALUES (?, ?) ON CONFLICT (digest) DO {update}", (digest, size))
        ((repository,),) = db.execute("SELECT id FROM repositories WHERE name = ?", (name,))
        db.execute(self.LINK, (repository, digest))
        db.execute(self.RENEW_LEASE, (int(time.time()), repository, digest))
        return int(repository)

    def _lease(self, repository: int, digest: str, leased_at: int) -> bool:
        """Let a client rely on a content that it is being told of; whether the content is still here."""
        now = time.time()  # where this cannot be recorded now, the answer stands: a push would fail as well
        if self.read_only or now - leased_at < LEASE_SLACK:
            return True
        return self._change_if_possible(self.RENEW_LEASE, [(int(now), repository, digest)]) != 0  # or is None

    def open_content(self, descriptor: Descriptor) -> bytes | BinaryIO | None:
        """A content: bytes when it is small, else an open file; None when the disk has lost it."""
        content: bytes | None = self._cache.get(descriptor.digest)
        if content is not None:
            return content
        file = self.files.open(descriptor.digest, descriptor.size)
        if file is None or descriptor.size > 64 * KIB:
            return file
        with file:
            content = file.read()
        if digest_of(content, algorithm_of(descriptor.digest)) != descriptor.digest:
            return None  # what is remembered must be right, since nobody looks at the file again
        self._cache.put(descriptor.digest, content, size=len(content) + CACHE_ENTRY_SIZE)
        return content

    BLOB = (
        "SELECT repository_id, size, leased_at, needed_by FROM contents WHERE repository = ? AND digest = ?"
    )
    # All that hangs on a link goes with it, and a blob's row with its last link (schema.sql).
    UNLINK = "DELETE FROM repository_blobs WHERE repository_id = ? AND digest = ?"

    def blob(self, name: str, digest: str, *, lease: bool = False) -> Descriptor:
        """A blob of the repository; if leased, gc leaves it alone for the grace. Raises BLOB_UNKNOWN."""
        for repository, size, leased_at, _ in self.query_cached(self.BLOB, name, digest):
            if not lease or self._lease(repository, digest, leased_at):
                return Descriptor("application/octet-stream", digest, size)
        raise RegistryError(ErrorCode.BLOB_UNKNOWN, digest)

    def delete_blob(self, name: str, digest: str) -> None:
        """Unlink a blob; its file goes with its last link. Raises BLOB_UNKNOWN, STILL_NEEDED."""
        with self.transaction(frees=True) as db:
            row = db.execute(self.BLOB, (name, digest)).fetchone()
            if row is None:
                raise RegistryError(ErrorCode.BLOB_UNKNOWN, digest)
            repository, _, _, needed_by = row
            if needed_by:
                raise RegistryError(ErrorCode.STILL_NEEDED, digest)
            db.execute(self.UNLINK, (repository, digest))
        self.remove_files([digest])

    def drop_content(self, db: sqlite3.Connection, digest: str) -> None:
        """Within a transaction: forget a content in every repository, so that clients push it again."""
        # What a manifest needed is left alone for the grace period, to be found by that push.
        needed = "SELECT repository_id, child FROM manifest_references WHERE manifest = ?"
        sql = f"UPDATE repository_blobs SET leased_at = ? WHERE (repository_id, digest) IN ({needed})"
        db.execute(sql, (int(time.time()), digest))
        db.execute("DELETE FROM repository_blobs WHERE digest = ?", (digest,))
        self._cache.forget(digest)

    def remove_pending(self) -> None:
        """Try to remove all the files whose rows are gone."""
        for rows in self.pages("digest", "pending_deletes WHERE 1", after=("",)):
            for start in range(0, len(rows), BATCH):
                self.remove_files([digest for (digest,) in rows[start : start + BATCH]])

    def remove_files(self, digests: Iterable[str]) -> None:
        """Remove those of these files whose rows are gone; under the write lock, or a push might need one."""
        sql = "SELECT 1 FROM pending_deletes WHERE digest = ?"
        with self.transaction(durable=False, frees=True) as db:
            pending = [digest for digest in digests if db.execute(sql, (digest,)).fetchall()]
            if pending:
                self._sync_log()  # the rows have to be gone for good, whoever has deleted them
            for digest in pending:
                self._cache.forget(digest)
                try:
                    remove_file(self.files.path(digest))
                    db.execute("DELETE FROM pending_deletes WHERE digest = ?", (digest,))
                except OSError as error:  # which has the path
                    write_log(f"registry.py: cannot remove a file, will try again: {error}")

    def mount(self, name: str, digest: str, source: str) -> bool:
        """Link a blob of another repository to this one; False when the source does not have it."""
        for _, size, _, _ in self.query_cached(self.BLOB, source, digest):
            file = self.files.open(digest, size)
            if file is not None:
                file.close()
                with self.transaction() as db:
                    if db.execute(self.BLOB, (source, digest)).fetchall():
                        self._link(db, name, digest, size)
                        return True
        return False

    def repositories_with(self, digest: str, limit: int) -> list[str]:
        """The names of up to so many repositories that are linked to a blob, in no order."""
        sql = "SELECT repository FROM contents WHERE digest = ? LIMIT ?"
        return [name for (name,) in self.query(sql, digest, limit)]

    def start_session(self, name: str, algorithm: str) -> str:
        """Open an upload session of a repository, empty, and return its id."""
        self.files.check_space(0, 0)
        with self.files.new_upload(algorithm, name) as upload:
            return upload.id

    @contextlib.contextmanager
    def session(self, name: str, session: str) -> Iterator[UploadFile]:
        """An upload session to write, dropped for want of room. Raises BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY."""
        self.session_size(name, session)
        try:
            upload = UploadFile(self.files, session)
        except FileNotFoundError:
            raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session) from None
        with upload:
            upload.resume_hash(self._hashes.get(session))
            self._hashes.forget(session)
            try:
                yield upload
            except Exception as error:
                if is_out_of_space(error):
                    remove_file(upload.path)
                raise
            if os.path.lexists(upload.path):
                self._hashes.put(session, upload.hash_state(), DAY)

    def session_size(self, name: str, session: str) -> int:
        """How many bytes an upload session has, also while they are coming. Raises BLOB_UPLOAD_UNKNOWN."""
        match = UPLOAD.fullmatch(session)
        if match and match[2] == hashed_name(name):
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(f"{self.files.root}/uploads/{session}")
                if stat.S_ISREG(status.st_mode):
                    return status.st_size
        raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session)

    def finish_upload(self, name: str, upload: UploadFile, digest: str) -> None:
        """Make an upload the repository's blob of this digest, durably. Raises what Files.place does."""
        with self._placed(upload, digest) as db:
            repository = self._link(db, name, digest, upload.size)
            now, began = int(time.time()), int(upload.id[:8], 16)
            if now - began >= LEASE_SLACK:  # the rest of a push that takes its time is needed as long
                sql = "UPDATE repository_blobs SET leased_at = ? WHERE needed_by = 0 AND leased_at >= ?"
                # The plus sign keeps SQLite from an index that is longer here.
                db.execute(f"{sql} AND +repository_id = ?", (now, began - PUSH_PAUSE, repository))

    def expire_uploads(self) -> None:
        """Drop upload sessions idle for a day, and what a crash left of uploads in one request."""
        for name, _ in self.files.uploads():
            try:
                with UploadFile(self.files, name, patience=0.0) as upload:  # close drops all but sessions
                    idle = abs(time.time() - os.fstat(upload.fileno()).st_mtime)  # by a wrong clock, maybe
                    if idle > DAY:
                        remove_file(upload.path)
            except (RegistryError, FileNotFoundError):
                pass  # it is being written to, or was finished just now
            except OSError as error:
                write_log(f"registry.py: cannot remove an upload: {error}")

    def pushes_since(self, since: float) -> dict[str, int]:
        """When the oldest upload written to since then began, by the hashed name of its repository."""
        began: dict[str, int] = {}
        for name, status in self.files.uploads():
            if "-" in name and status.st_mtime >= since:
                owner = name.rpartition("-")[2]
                began[owner] = min(int(name[:8], 16), began.get(owner, sys.maxsize))
        return began

    MANIFEST = (  # by the repository's name, and a tag or digest, given twice: no tag has a digest's colon
        "SELECT m.media_type, digest, c.size, repository_id, c.leased_at, c.needed_by"
        " FROM contents c JOIN manifests m USING (repository_id, digest) WHERE c.repository = ?"
        " AND c.digest = ifnull((SELECT t.digest FROM tags t WHERE t.repository_id = c.repository_id"
        "  AND t.name = ?), ?)"
    )

    def manifest(self, name: str, reference: str, *, lease: bool = False) -> Descriptor:
        """A manifest by tag or digest; lease as for a blob. Raises MANIFEST_UNKNOWN, NAME_UNKNOWN."""
        for row in self.query_cached(self.MANIFEST, name, reference, reference):
            media_type, digest, size, repository, leased_at, _ = row
            if not lease or self._lease(repository, digest, leased_at):
                return Descriptor(media_type, digest, size)
        self._require_repository(name)
        raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {reference}")

    def _require_repository(self, name: str) -> int:
        """A repository's id. Raises NAME_UNKNOWN."""
        for (repository,) in self.query_cached("SELECT id FROM repositories WHERE name = ?", name):
            return int(repository)
        raise RegistryError(ErrorCode.NAME_UNKNOWN, name)

    def note_pull(self, name: str, digest: str) -> None:
        """Remember, until flush_pulls, that a manifest was pulled now."""
        if not self.read_only:
            self._pulled[name, digest] = int(time.time())

    def flush_pulls(self) -> None:
        """Record what was pulled since the last time. On a full disk, or a busy database, that waits."""
        pulled, self._pulled = self._pulled, {}
        repository = "(SELECT id FROM repositories WHERE name = ?)"
        sql = f"UPDATE manifests SET pulled_at = ? WHERE repository_id = {repository} AND digest = ?"
        # In one step, since who has begun to note a pull may still do so there.
        rows = [(moment, name, digest) for (name, digest), moment in list(pulled.items())]
        if rows and self._change_if_possible(sql, rows) is None:
            self._pulled = {**pulled, **self._pulled}

    def put_manifest(
        self, name: str, reference: str, manifest: Manifest, content: bytes, *, tags: list[str], check: Check
    ) -> str:
        """Store a manifest durably; its digest. Raises DIGEST_INVALID, MANIFEST_BLOB_UNKNOWN, and check's."""
        digest = reference if DIGEST.fullmatch(reference) else digest_of(content)
        with self.files.new_upload(algorithm_of(digest)) as upload:
            upload.append(io.BytesIO(content).readinto, len(content))
            with self._placed(upload, digest) as db:
                before = db.execute(self.MANIFEST, (name, reference, reference)).fetchone()
                repository = self._link(db, name, digest, len(content))
                kind, now = manifest.media_type, int(time.time())
                db.execute(  # pushed again, one whose body names no media type may bring another
                    "INSERT INTO manifests VALUES (?, ?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT (repository_id, digest) DO UPDATE SET media_type = excluded.media_type,"
                    " pushed_at = excluded.pushed_at, pulled_at = excluded.pulled_at",
                    (repository, digest, kind, manifest.artifact_type, manifest.subject, now, now),
                )
                if manifest.subject:
                    described = manifest.descriptor(digest, len(content))
                    db.execute("REPLACE INTO referrers VALUES (?, ?, ?)", (repository, digest, described))
                self._add_needs(db, repository, digest, manifest)
                move = "ON CONFLICT (repository_id, name) DO UPDATE SET digest = excluded.digest"
                rows = [(repository, tag, digest) for tag in (reference, *tags) if tag != digest]
                db.executemany(f"INSERT INTO tags VALUES (?, ?, ?) {move}", rows)
                check(before[1] if before else None)
        return digest

    def _add_needs(self, db: sqlite3.Connection, repository: int, digest: str, manifest: Manifest) -> None:
        """Record what a manifest needs, sorted and many at once, for speed. Raises MANIFEST_BLOB_UNKNOWN."""
        needs = dict.fromkeys(manifest.optional, False)
        needs.update(dict.fromkeys(manifest.required, not self.sparse))
        needs[digest] = True
        rows = sorted(needs.items())
        for start in range(0, len(rows), 400):  # SQLite before 3.32 takes 999 parameters
            some = rows[start : start + 400]
            values = ", ".join(["(?, ?)"] * len(some))
            db.execute(
                "INSERT INTO manifest_references SELECT ?, ?, column1, column2"
                f" FROM (VALUES {values}) WHERE 1 ON CONFLICT (repository_id, manifest, child)"
                " DO UPDATE SET required = 1 WHERE excluded.required AND NOT required",
                (repository, digest, *itertools.chain.from_iterable(some)),
            )
        sql = "SELECT child FROM missing_children WHERE repository_id = ? AND manifest = ? LIMIT ?"
        missing = db.execute(sql, (repository, digest, DETAIL_LIMIT)).fetchall()
        if missing and not self.sparse:
            raise RegistryError(ErrorCode.MANIFEST_BLOB_UNKNOWN, *(child for (child,) in missing))

    def delete_manifest(self, name: str, reference: str, check: Check) -> None:
        """Remove a tag alone, or by digest a manifest and its tags. Raises MANIFEST_UNKNOWN, STILL_NEEDED."""
        self._require_repository(name)
        with self.transaction(frees=True) as db:
            row = db.execute(self.MANIFEST, (name, reference, reference)).fetchone()
            if row is None:
                raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {reference}")
            _, digest, _, repository, _, needed_by = row
            if reference == digest and needed_by > 1:  # by an index, and not just by itself
                raise RegistryError(ErrorCode.STILL_NEEDED, digest)
            check(digest)
            if reference == digest:
                db.execute(self.UNLINK, (repository, digest))
            else:
                db.execute("DELETE FROM tags WHERE repository_id = ? AND name = ?", (repository, reference))
        if reference == digest:
            self.remove_files([digest])

    def tags(self, name: str, last: str, limit: int) -> list[str]:
        """Up to so many tags after one, in byte order. Raises NAME_UNKNOWN."""
        repository = self._require_repository(name)
        sql = "SELECT name FROM tags WHERE repository_id = ? AND name > ? ORDER BY name LIMIT ?"
        return [tag for (tag,) in self.query_cached(sql, repository, last, limit)]

    def repositories(self, first: str, end: str, limit: int) -> list[str]:
        """Up to so many repositories from one name on and before another, in byte order."""
        sql = "SELECT name FROM repositories WHERE name >= ? AND name < ? ORDER BY name LIMIT ?"
        return [name for (name,) in self.query_cached(sql, first, end, limit)]

    def referrers(self, name: str, subject: str, kind: str | None, last: str) -> tuple[list[Any], bool]:
        """A page of referrers after one, by digest: digests and descriptors (JSON); and if there are more."""
        about = (name, subject, last, kind) if kind else (name, subject, last)
        rows = self.query_cached(
            "SELECT repository_id, digest, size, short FROM referrer_descriptors"
            " WHERE repository = ? AND subject = ? AND digest > ?"
            f"{' AND artifact_type = ?' if kind else ''} ORDER BY digest LIMIT ?",
            *about,
            REFERRER_PAGE_LIMIT + 1,
        )
        page: list[tuple[str, bytes]] = []
        room = 3 * MIB  # clients stop reading an index at 4 MiB
        for repository, digest, length, descriptor in rows[:REFERRER_PAGE_LIMIT]:
            room -= length
            if page and room < 0:
                return page, True
            sql = "SELECT descriptor FROM referrers WHERE repository_id = ? AND digest = ?"
            found = [(descriptor,)] if descriptor else self.query(sql, repository, digest)  # it is long
            page += [(digest, each) for (each,) in found]
        return page, bool(page) and len(rows) > REFERRER_PAGE_LIMIT


# === Maintenance: garbage collection, and verifying what is stored ====================================


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
    size: int  # bytes that the disk gets back: 0 for a manifest (its blob has them) or a shared blob


@dataclasses.dataclass
class Collector:
    """One run of garbage collection: what may go is chosen without a lock and removed under it in batches."""

    _THIS = "WHERE repository_id = ? AND digest = ?"  # link, or manifest
    store: Store
    policy: Policy
    report: Callable[[Removal], object]  # called with each removal once it is committed
    stopped: Callable[[], bool] = lambda: False  # asked before each batch whether to leave it at that

    def __post_init__(self) -> None:
        self._files = self.store.files  # in a dry run too, where the store is a copy of the database
        self._now = time.time()
        slack = LEASE_SLACK if self.policy.grace else 0.0  # without grace, nobody relies on anything
        self._leased_before = int(self._now - self.policy.grace - slack)
        self._pushes = self.store.pushes_since(self._now - self.policy.grace)
        self._removed: list[Removal] = []  # by the batch under way
        self._needed_size = 0  # bytes that manifests need; counted in _shrink only
        self._totals: collections.Counter[str] = collections.Counter()  # of removals by kind, and of bytes

    def summary(self) -> str:
        """What was removed, in a few words; none if that is nothing."""
        manifests, blobs, size = (self._totals[kind] for kind in ("manifest", "blob", "bytes"))
        return f"{manifests} manifests and {blobs} blobs, {size} bytes" if self._totals else ""

    def run(self, *, walk: bool = False, dry_run: bool = False) -> None:
        """Collect, with walk also files that a crash left without a row; or only report, from a copy."""
        self.store.flush_pulls()
        with contextlib.suppress(InterruptedError), contextlib.ExitStack() as resources:
            if dry_run:
                directory = resources.enter_context(tempfile.TemporaryDirectory(prefix="registry-gc-"))
                self.store.backup(f"{directory}/registry.db")
                self.store = resources.enter_context(contextlib.closing(Store(directory, durable=False)))
            self.store.remove_pending()
            self._mend_times()
            if self.policy.untagged_after is not None:
                self._drop_untagged(self.policy.untagged_after)
            self._sweep()
            if self.policy.max_size is not None:
                self._shrink(self.policy.max_size)
            if walk:
                self._walk()
            self.store.files.keep_reserve()

    def _each(self, page: list[Any], act: Callable[..., object]) -> None:
        """Act on each row (in self._db, a batch to a transaction), and report; act may change the page."""
        while page:
            if self.stopped():
                raise InterruptedError  # which ends run
            with self.store.transaction(frees=True) as self._db:
                for _ in range(BATCH):
                    if page and len(self._removed) < BATCH:
                        act(*page.pop(0))
            if self._removed:
                self.store.remove_files([removal.digest for removal in self._removed])
            for removal in self._removed:  # a file without a row counts as a blob
                self._totals["manifest" if removal.kind == "manifest" else "blob"] += 1
                self._totals["bytes"] += removal.size
                self.report(removal)
            self._removed.clear()

    def _mend_times(self) -> None:
        """Have what was stored while the clock was ahead be as old as if that were now."""
        now = int(self._now)
        leases = f"UPDATE repository_blobs SET leased_at = min(leased_at, {now}) {self._THIS}"
        times = f"pushed_at = min(pushed_at, {now}), pulled_at = min(pulled_at, {now})"
        by_age = self.policy.untagged_after is not None or self.policy.max_size is not None  # manifests go
        sql = "SELECT repository_id, digest FROM latest_times WHERE latest > ? AND of_manifest <= ? LIMIT ?"
        while not self.stopped() and (rows := self.store.query(sql, now + CLOCK_SLACK, by_age, CHOICE)):
            with self.store.transaction(frees=True) as db:
                db.executemany(leases, rows)
                db.executemany(f"UPDATE manifests SET {times} {self._THIS}", rows)

    def _relied_on(self, name: str) -> int:
        """Since when clients may rely on what a repository told them: pushes may outlast the grace."""
        return min(self._leased_before, self._pushes.get(hashed_name(name), sys.maxsize) - PUSH_PAUSE)

    def _drop_untagged(self, age: float) -> None:
        """Drop untagged manifests that nothing keeps, but the newest images."""
        old = min(self._leased_before, int(self._now - age))
        untagged = "topmost_manifests WHERE NOT tagged"

        @functools.lru_cache(1)  # rows come by repository, and what stays is fixed before any of it goes
        def last_kept(repository: int) -> tuple[float, str]:
            sql = f"SELECT -pushed_at, digest FROM {untagged} AND subject IS NULL AND repository_id = ?"
            order = f"ORDER BY pushed_at DESC, digest LIMIT {self.policy.keep_last}"
            return next(reversed(self.store.query(f"{sql} {order}", repository)), (-math.inf, ""))

        columns = "repository_id, digest, repository, subject, -pushed_at"  # which ranks them as above
        for page in self.store.pages(columns, f"{untagged} AND leased_at < ?", old, after=(0, "")):
            going = [
                (repository, digest, name, min(old, self._relied_on(name)))
                for repository, digest, name, subject, rank in page
                if subject or (rank, digest) > last_kept(repository)
            ]
            self._each(going, self._drop)

    def _drop(self, repository: int, digest: str, name: str, old: int, but: str = "") -> set[str]:
        """Drop a manifest that nothing keeps (see the view keepers) but `but`, with what only it kept.

        old: since when a keeper counts. Returns what it kept that others keep as well.
        """
        keepers = self._keepers(repository, digest, name, old, but)
        going = set(keepers)  # in the end, the most that are kept by each other only
        while staying := {each for each in going if not keepers[each] <= going}:
            going -= staying
        if digest not in going:
            return set()
        sql = "SELECT child FROM manifest_references WHERE repository_id = ? AND manifest = ?"
        needed = {child for each in going for (child,) in self._db.execute(sql, (repository, each))}
        for each in going:
            if self._db.execute(f"DELETE FROM manifests {self._THIS}", (repository, each)).rowcount:
                self._removed.append(Removal("manifest", name, each, 0))
        for child in needed:  # what goes was leased only just now, when it lost its tags
            self._unlink(repository, child, name, math.inf if child in going else self._relied_on(name))
        return keepers.keys() - going

    def _keepers(self, repository: int, digest: str, name: str, old: int, but: str) -> dict[str, set[str]]:
        """What keeps a manifest, and what keeps each that it keeps, directly or not."""
        above = "SELECT keeper FROM keepers WHERE repository_id = ? AND kept = ? AND since >= ?"
        below = f"SELECT kept FROM keepers WHERE repository_id = ? AND keeper = ? LIMIT {DROP_LIMIT}"
        keepers: dict[str, set[str]] = {}
        found = [digest]
        for each in found:
            if each not in keepers and len(keepers) < DROP_LIMIT:
                how = (old, but) if each == digest else (self._relied_on(name), "")
                sql = f"{above} AND keeper <> ? LIMIT {DROP_LIMIT + 1}"  # more than can go: it stays
                keepers[each] = {keeper for (keeper,) in self._db.execute(sql, (repository, each, *how))}
                found += [kept for (kept,) in self._db.execute(below, (repository, each))]
        return keepers

    def _unlink(self, repository: int, digest: str, name: str, leased_before: float) -> None:
        """Unlink a blob unless a manifest of the repository needs it, or a client may rely on it."""
        sql = f"SELECT size, leased_at, needed_by, needed, shared FROM links {self._THIS}"
        for size, leased_at, needed_by, needed, shared in self._db.execute(sql, (repository, digest)):
            if not needed:
                self._needed_size -= size
            if not needed_by and leased_at < leased_before:
                self._db.execute(Store.UNLINK, (repository, digest))
                self._removed.append(Removal("blob", name, digest, 0 if shared else size))

    def _sweep(self) -> None:
        """Unlink the blobs that no manifest needs."""
        columns = "leased_at, repository_id, digest, name"
        source = "repository_blobs, repositories WHERE id = repository_id AND needed_by = 0 AND leased_at < ?"
        for page in self.store.pages(columns, source, self._leased_before, after=(-1, 0, "")):
            self._each([(*link, self._relied_on(link[2])) for _, *link in page], self._unlink)

    def _shrink(self, max_size: int) -> None:
        """Drop the least recently pulled manifests until what is needed fits, or nothing more may go yet."""
        before, source = self._leased_before, "topmost_manifests WHERE leased_at < ?"
        columns = "pulled_at, pushed_at, repository_id, digest, repository"

        def drop(_pulled: int, _pushed: int, repository: int, digest: str, name: str) -> None:
            for kept in self._drop(repository, digest, name, before, but="a tag"):  # what `keepers` calls it
                sql = f"SELECT {columns} FROM {source} AND repository_id = ? AND digest = ?"
                for each in self._db.execute(sql, (before, repository, kept)):
                    if each <= end:  # it was pulled before what is next
                        bisect.insort(page, each)
            if self._needed_size <= max_size:
                page.clear()

        ((self._needed_size,),) = self.store.query("SELECT bytes FROM needed_size")
        pages = self.store.pages(columns, source, before, after=(-1, 0, 0, ""))
        while self._needed_size > max_size and (page := next(pages, [])):
            end = page[-1]
            self._each(page, drop)

    def _walk(self) -> None:
        """Remove files under blobs/ that have no row, once nobody has touched them for the grace period."""
        absent = "SELECT ? WHERE ? NOT IN (SELECT digest FROM blobs)"
        sql = f"INSERT INTO pending_deletes {absent} ON CONFLICT DO NOTHING"

        def remove(digest: str) -> None:
            path = self._files.path(digest)
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                changed = max(status.st_mtime, status.st_ctime)  # what waits for its row was renamed just now
                if not stat.S_ISREG(status.st_mode):
                    return
                if changed > time.time() + CLOCK_SLACK and self._files is self.store.files:
                    os.utime(path)  # the clock was ahead: as old as if that were now
                if changed < self._leased_before and self._db.execute(sql, (digest, digest)).rowcount:
                    self._removed.append(Removal("file", "", digest, status.st_size))

        digests = self._files.contents()
        while some := list(itertools.islice(digests, 5 * BATCH)):
            marks = ", ".join("?" * len(some))
            known = self.store.query(f"SELECT digest FROM blobs WHERE digest IN ({marks})", *some)
            self._each(list({(digest,) for digest in some}.difference(known)), remove)


class Finding(NamedTuple):
    """Something that verify found wrong."""

    kind: str  # corrupt, truncated, missing, unreferenced, dangling or database
    subject: str  # a digest, or what it is about
    repaired: bool = False


@dataclasses.dataclass
class Verifier:
    """Compares files and rows, beside whoever else uses the store; not by views, which may be wrong too."""

    store: Store
    progress: Callable[[int, int], object]  # called after each file with how many bytes are done, of how many

    def run(self, *, repair: bool = False, force: bool = False) -> Iterator[Finding]:
        """Yield what is wrong; repair moves files aside and drops rows. Raises StartupError, OSError."""
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - it would slow every start

        if repair and not force:
            self._require_files()
        yield from self._check_schema(repair)
        yield from self._check_rows(repair)
        done, ((total,),) = 0, self.store.query("SELECT coalesce(sum(size), 0) FROM blobs")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for page in self.store.pages("digest, size", "blobs WHERE 1", after=("",)):
                for (digest, size), (damage, state) in zip(page, pool.map(self._examine, page)):
                    if damage:
                        yield from self._confirm(digest, damage, state, repair)
                    done += size
                    self.progress(done, total)
        for digest in self.store.files.contents():
            if not self.store.query("SELECT 1 FROM blobs WHERE digest = ?", digest):
                yield from self._confirm(digest, "unreferenced", None, repair)
        sql = "SELECT name, manifest, child FROM manifest_references JOIN repositories ON id = repository_id"
        absent = "(repository_id, child) NOT IN (SELECT repository_id, digest FROM repository_blobs)"
        for name, manifest, child in self.store.query(f"{sql} WHERE required AND {absent}"):
            yield Finding("dangling", f"{name}@{manifest} needs {child}")

    def _require_files(self) -> None:
        """Refuse to give up most of the files: it is rather their volume that is not mounted."""
        files, pages = self.store.files, self.store.pages("digest", "blobs WHERE 1", after=("",))
        found = [os.path.lexists(files.path(digest)) for page in pages for (digest,) in page]
        if (missing := found.count(False)) * 2 > len(found):
            hint = f"see whether {files.root}/blobs is mounted, or add --force"
            raise StartupError(f"{missing} of {len(found)} files are missing; {hint}")

    def _check_schema(self, repair: bool) -> Iterator[Finding]:
        """Compare the schema with schema.sql. What holds no data can be made again."""
        broken = [result for (result,) in self.store.query("PRAGMA integrity_check") if result != "ok"]
        sql = "SELECT name, type, sql FROM sqlite_master WHERE sql IS NOT NULL"
        actual = {name: _tokens(text) for name, _, text in self.store.query(sql)}
        with contextlib.closing(sqlite3.connect(":memory:")) as model:
            model.executescript(read_schema()[2])
            differing = [row for row in model.execute(sql) if actual.get(row[0]) != _tokens(row[2])]
        yield from (Finding("database", each) for each in broken)
        if repair and (broken or any(kind == "table" for _, kind, _ in differing)):
            raise StartupError("the database is damaged; restore registry.db from a backup, then repair")
        for name, kind, text in differing:
            self._repair(repair, f"DROP {kind} IF EXISTS {name}", text)
            yield Finding("database", f"{kind} {name} is not that of schema.sql", repair)

    def _check_rows(self, repair: bool) -> Iterator[Finding]:
        """Find stray rows, and links whose needed_by is not what it counts: at 0 they are garbage."""
        for stray in re.findall("^DELETE FROM (.+?);", read_schema()[0], re.MULTILINE | re.DOTALL):
            ((count,),) = self.store.query(f"SELECT count(*) FROM {stray}")
            if count:
                self._repair(repair, f"DELETE FROM {stray}")
                yield Finding("database", f"{count} rows of {' '.join(stray.split())}", repair)
        same = "c.repository_id = l.repository_id AND c.child = l.digest"
        actual = f"(SELECT count(*) FROM manifest_references c WHERE {same})"
        links = f"repository_blobs l JOIN repositories ON id = repository_id WHERE needed_by <> {actual}"
        wrong = self.store.query(f"SELECT name, digest, needed_by, {actual} FROM {links}")
        mend = f"UPDATE repository_blobs AS l SET needed_by = {actual} WHERE needed_by <> {actual}"
        self._repair(repair and bool(wrong), mend)
        for name, digest, count, needs in wrong:
            yield Finding("database", f"{name}@{digest} is needed by {needs} manifests, not {count}", repair)

    def _repair(self, repair: bool, *statements: str) -> None:
        if repair:
            with self.store.transaction(frees=True) as db:
                for sql in statements:
                    db.execute(sql)

    def _examine(self, row: tuple[str, int]) -> tuple[str, object]:
        """What is wrong with a content, or "", and the state of its file. Hashing lets other threads run."""
        digest, size = row
        path = self.store.files.path(digest)
        state = file_state(path)
        try:
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_size < size:
                return "truncated", state
            if stat.S_ISREG(status.st_mode) and status.st_size == size:
                with open(path, "rb", buffering=0, opener=no_follow) as file:
                    return "" if hash_file(file, algorithm_of(digest)) == digest else "corrupt", state
            return "corrupt", state
        except FileNotFoundError:
            return "missing", state
        except OSError as error:  # reading does not say which file
            raise OSError(error.errno, error.strerror, path) from error

    def _confirm(self, digest: str, damage: str, state: object, repair: bool) -> Iterator[Finding]:
        """See that it is still so while nobody pushes or deletes: on a read-only medium nobody can anyway."""
        files = self.store.files
        path = files.path(digest)
        unchanging: Any = contextlib.nullcontext()
        with unchanging if self.store.read_only else self.store.transaction(frees=True) as db:
            known = self.store.query("SELECT 1 FROM blobs WHERE digest = ?", digest)
            if damage == "unreferenced":
                pending = known or self.store.query("SELECT 1 FROM pending_deletes WHERE digest = ?", digest)
                is_so = not pending and os.path.lexists(path) and not files.is_being_placed(digest)
            else:
                is_so = bool(known) and file_state(path) == state
            if is_so and repair:
                files.quarantine(digest)
                self.store.drop_content(db, digest)
        if is_so:
            yield Finding(damage, digest, repair)


def _tokens(sql: str) -> list[str]:
    """An SQL statement without spaces, comments, and the quotes that changed names have around them."""
    return re.findall(r"\w+|[^\w\s\"]", re.sub(r"--.*", "", sql))


# === Access: users, grants, tokens and the certificate ================================================


class WatchedFiles:
    """What some files say, loaded again when they change; if that fails, what they said goes on to hold."""

    def __init__(self, load: Callable[..., Any], *paths: str | None) -> None:
        """load takes the paths that are not None. Raises StartupError when it raises OSError, ValueError."""
        self._load, self._paths = load, [path for path in paths if path is not None]
        self._lock = threading.Lock()  # one thread loads; the others go on with what there is
        self._seen = [file_state(path) for path in self._paths]
        with explain_failure(f"cannot use {', '.join(self._paths)}"):
            self._value = load(*self._paths)

    def get(self) -> Any:
        """The current value."""
        seen = [file_state(path) for path in self._paths]
        if seen != self._seen and self._lock.acquire(blocking=False):
            try:
                self._seen = seen
                self._value = self._load(*self._paths)
            except (OSError, ValueError) as error:
                write_log(f"registry.py: going on with the old contents of {', '.join(self._paths)}: {error}")
            finally:
                self._lock.release()
        return self._value


def load_certificate(certificate: str, key: str | None = None) -> ssl.SSLContext:
    """What TLS is spoken with, from PEM files. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    context.load_cert_chain(certificate, key)
    return context


def hash_password(password: str, salt: bytes = b"", ln: int = 14, r: int = 8, p: int = 1) -> str:
    """A password's scrypt hash as a line of the users file holds it; with a new salt, if none is given."""
    if not hasattr(hashlib, "scrypt"):
        raise ValueError("this Python has no scrypt; use one that was built with OpenSSL")
    salt = salt or secrets.token_bytes(16)
    value = hashlib.scrypt(password.encode(), salt=salt, n=1 << ln, r=r, p=p, maxmem=SCRYPT_MEMORY, dklen=32)
    encoded = (base64.b64encode(part).decode("ascii").rstrip("=") for part in (salt, value))
    return "$".join((f"$scrypt$ln={ln},r={r},p={p}", *encoded))


@functools.lru_cache(maxsize=1)
def system_crypt() -> Callable[[str, str], str] | None:
    """The system's crypt(3) where there is one that knows bcrypt."""
    import ctypes  # noqa: PLC0415 - rarely needed, and missing from some builds of Python

    lock = threading.Lock()  # what crypt returns is in static memory

    def crypt(password: str, setting: str) -> str:
        with lock:
            return str((compute(password.encode(), setting.encode()) or b"*").decode("latin-1"))

    for library in ("libcrypt.so.1", "libcrypt.so.2", "libcrypt.dylib"):
        with contextlib.suppress(OSError, AttributeError):
            compute: Any = ctypes.CDLL(library).crypt
            compute.restype, compute.argtypes = ctypes.c_char_p, (ctypes.c_char_p, ctypes.c_char_p)
            return crypt if crypt("", "$2b$04$" + "." * 22).startswith("$2b$04$") else None
    return None


def password_check(hashed: str) -> Callable[[str], bool]:
    """What tells whether a password is the one behind a hash. Raises ValueError if this machine cannot."""
    match = re.fullmatch(r"\$scrypt\$ln=(\d\d?),r=(\d\d?),p=(\d\d?)\$([\w+/]+)\$[\w+/]{43}", hashed, re.ASCII)
    if match:
        ln, r, p = map(int, match.groups()[:3])
        salt = base64.b64decode(match[4] + "==")  # which takes more than it needs
        if not ln or 128 * r * 2**ln > SCRYPT_MEMORY:
            raise ValueError("a scrypt hash that takes no time, or too much memory")
        hash_password("", salt, 1, r, p)  # raises ValueError for what it cannot do
        value = hashed[-43:]  # how the rest is written may differ
        return lambda password: hmac.compare_digest(hash_password(password, salt, ln, r, p)[-43:], value)
    bcrypt = r"\$2[aby]\$(?:0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}"  # a cost above 16 would take 8 seconds
    if re.fullmatch(bcrypt, hashed) and (crypt := system_crypt()):
        return lambda password: hmac.compare_digest(crypt(password, hashed), hashed)
    raise ValueError("a hash of a kind that cannot be checked here; set it with passwd")


def read_lines(parse: Callable[[str], Any], *paths: str) -> list[Any]:
    """What the lines of text files say, except comments. Raises OSError, and parse's ValueError."""
    parsed = []
    for path in paths:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors begin with a byte-order mark
        for number, line in enumerate(map(str.strip, text.split("\n")), 1):
            try:
                if line and not line.startswith("#"):
                    parsed.append(parse(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return parsed


def load_users(*paths: str) -> dict[str, Any]:
    """The users of htpasswd files: their hashes, and what checks them. Raises OSError, ValueError."""
    users: dict[str, tuple[str, Callable[[str], bool]]] = {}

    def add(line: str) -> None:
        name, _, hashed = line.partition(":")
        if not name or name in users:
            raise ValueError(f"there is no name, or {name} is there twice")
        users[name] = hashed, password_check(hashed)

    read_lines(add, *paths)
    return users


class Grant(NamedTuple):
    """A line of the grants file: who may do what where."""

    who: str  # a user, * for every user, anonymous for everybody
    repositories: re.Pattern[str]
    actions: frozenset[str]
    names: tuple[str, str]  # all that match come from the first on and before the second, in byte order

    @classmethod
    def parse(cls, line: str) -> Grant:
        """A grant from who, repositories, actions. Raises ValueError."""
        fields = line.split()
        actions = frozenset(fields[2].split(",")) if len(fields) == 3 else frozenset()
        if not actions or not actions <= {"pull", "push", "delete"}:
            raise ValueError("it is not: who repositories pull,push,delete")
        first, *rest = re.split(r"(\*\*?)", fields[1])
        wild = {"*": "[^/]*", "**": ".*"}  # anything within a segment of the path, and anything
        pattern = "".join(wild.get(part, re.escape(part)) for part in (first, *rest))
        end = AFTER_NAMES if rest else "\0"  # behind all that begins so, or behind just that
        return cls(fields[0], re.compile(pattern), actions, (first, first + end))


class Scope(NamedTuple):
    """One action on one resource, as tokens carry it: ("repository", "team/app", "pull")."""

    kind: str
    name: str
    action: str


CATALOG = Scope("registry", "catalog", "*")


def parse_scope(text: str) -> list[Scope]:
    """The scopes that a token request names, such as "repository:team/app:pull,push"; * is every action."""
    kind, _, rest = text.partition(":")
    name, _, actions = rest.rpartition(":")
    actions = actions.replace("*", "*,pull,push,delete")
    kind = kind.partition("(")[0]  # "repository(plugin)" is a repository, too
    return [Scope(kind, name, action) for action in actions.split(",")]


class Caller(NamedTuple):
    """Who makes a request."""

    user: str | None  # None: anonymous
    scopes: frozenset[Scope] | None = None  # all that a token is good for; None: it is not by token


class LoginQueue:
    """Has attempts to log in wait for their turn, since a hash takes a core 50 ms, and 16 MiB.

    One attempt of each address has its turn, and failures make it longer: that slows guesses down. When too
    many wait, the longest line loses its last. In a line, names with fewer attempts go first, and of these
    the newest: somebody who knows a password goes before those who guess at it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit  # of attempts in all
        self._lock = threading.Lock()
        # Of each address that has a turn, who waits, newest first: a name, and where it is told if it may.
        self._waiting: dict[bytes, list[tuple[str, queue.SimpleQueue[bool]]]] = {}
        self.failures = Cache(1000)  # how many passwords from an address were wrong lately

    @contextlib.contextmanager
    def turn(self, address: bytes, name: str) -> Iterator[None]:
        """Wait for a turn, and have it. Raises TOOMANYREQUESTS."""
        admitted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        too_many = RegistryError(ErrorCode.TOOMANYREQUESTS, headers=(("Retry-After", "1"),))
        with self._lock:
            if len(self._waiting) + sum(map(len, self._waiting.values())) >= self._limit:
                longest = max(self._waiting.values(), key=len)  # its address loses the last
                if not longest:
                    raise too_many
                self._pop(longest, -1).put(False)
            if address in self._waiting:
                self._waiting[address].insert(0, (name, admitted))
            else:
                self._waiting[address] = []
                admitted.put(True)
        if not admitted.get():
            raise too_many
        try:
            yield
        finally:
            with self._lock:
                if self._waiting[address]:
                    self._pop(self._waiting[address], 0).put(True)
                else:
                    del self._waiting[address]

    @staticmethod
    def _pop(attempts: list[tuple[str, queue.SimpleQueue[bool]]], rank: int) -> queue.SimpleQueue[bool]:
        """Take an attempt from those of one address: 0 is who goes first, -1 who goes last."""
        counts = collections.Counter(name for name, _ in attempts)
        places = sorted(range(len(attempts)), key=lambda place: counts[attempts[place][0]])
        return attempts.pop(places[rank])[1]

    def fail(self, address: bytes) -> None:
        """Have a turn last longer after a failure: the more of them there were lately, the longer."""
        failures = (self.failures.get(address) or 0) + 1
        self.failures.put(address, failures, FAILURE_INTERVAL)
        if len(self._waiting) <= self._limit // 2:  # or other addresses would find no room
            time.sleep(min(max(failures - FAILURE_LIMIT, 0) * FAILURE_DELAY, FAILURE_DELAY_LIMIT))


class Access:
    """Who may do what: users, grants and tokens. Without users, everybody may do everything."""

    def __init__(self, users: str | None, grants: str | None, public: bool, key: bytes, limit: int) -> None:
        """users, grants: files. public: anybody may pull. key: signs tokens. Raises StartupError."""
        self.enabled = users is not None
        self._users = WatchedFiles(load_users, users)
        implied = ["anonymous ** pull"] if public else []
        if grants is None:
            implied.append(f"{'*' if self.enabled else 'anonymous'} ** pull,push,delete")
        always = list(map(Grant.parse, implied))
        self._grants = WatchedFiles(lambda *paths: always + read_lines(Grant.parse, *paths), grants)
        self._key = key
        self.service = f"registry-{hashlib.sha256(key).hexdigest()[:8]}"
        self._verified = Cache(1000)
        self._queue = LoginQueue(max(limit // 2, 1))
        self._hashing, self._guessing = threading.Lock(), threading.Lock()

    def _granted(self, user: str | None) -> list[Grant]:
        who = ("anonymous",) if user is None else ("anonymous", "*", user)
        return [grant for grant in self._grants.get() if grant.who in who]

    def permits(self, user: str | None, scope: Scope) -> bool:
        """Whether a user, or anybody for None, may do something. Whoever may do something may list."""
        if not self.enabled:
            return True  # the rest comes to the same, but takes longer for each name of a catalog
        if scope == CATALOG:
            return user is not None or bool(self._granted(None))
        if scope.kind != "repository" or len(scope.name) > NAME_LIMIT:
            return False  # a pattern with several stars takes long for long names
        grants = [grant for grant in self._granted(user) if scope.action in grant.actions]
        return any(grant.repositories.fullmatch(scope.name) for grant in grants)

    def readable_ranges(self, user: str | None) -> list[tuple[str, str]]:
        """Where the names of all that a user may pull are: from the first name on and before the second."""
        return [grant.names for grant in self._granted(user) if "pull" in grant.actions]

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
        if method.lower() != "basic":
            raise RegistryError(ErrorCode.UNAUTHORIZED, "only Basic and Bearer are known here")
        try:  # RFC 7617, but not everybody pads
            name, password = base64.b64decode(credentials + "==").decode("utf-8").split(":", 1)
            if len(name) > USER_LIMIT or len(password) > PASSWORD_LIMIT or "\0" in password:
                raise ValueError
        except ValueError:
            raise RegistryError(ErrorCode.UNAUTHORIZED, "malformed credentials") from None
        return Caller(self.log_in(name, password, address))

    def log_in(self, name: str, password: str, address: str) -> str:
        """A user's name, if this is the password. Raises UNAUTHORIZED, TOOMANYREQUESTS."""
        users = self._users.get()
        hashed, check = users.get(name) or ("", lambda _: False)
        if users and name not in users:  # lest the time taken tell: always the same user's is checked instead
            number = int.from_bytes(hmac.digest(self._key, name.encode(), "sha256"), "big")
            hashed, check = list(users.values())[number % len(users)]
        proof = hmac.digest(self._key, f"{name}\n{password}\n{hashed}".encode(), "sha256")
        if not self._verified.get(proof):
            network = ipaddress.ip_address(address).packed[:8]  # IPv6: one client has all within 64 bits
            with self._queue.turn(network, name):
                if not self._verified.get(proof):  # it may have been while this one waited
                    guess = self._queue.failures.get(network)  # who failed competes one at a time
                    with self._guessing if guess else contextlib.nullcontext(), self._hashing:
                        right = check(password) and name in users
                    if not right:
                        self._queue.fail(network)
                        raise RegistryError(ErrorCode.UNAUTHORIZED, "wrong user name or password")
        self._verified.put(proof, True, PASSWORD_LIFETIME)  # and so for as long after each use
        return name

    def issue_token(self, user: str | None, requested: Iterable[Scope]) -> dict[str, Any]:
        """A token for as much of what is requested as the user may do, as the token endpoint answers it."""
        now = int(time.time())
        granted = [scope for scope in dict.fromkeys(requested) if self.permits(user, scope)]
        claims = {"aud": self.service, "sub": user, "exp": now + TOKEN_LIFETIME, "access": granted}
        token = self._sign(base64.urlsafe_b64encode(encode_json(claims)).decode().rstrip("="))
        issued = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        return {"token": token, "access_token": token, "expires_in": TOKEN_LIFETIME, "issued_at": issued}

    def _check_token(self, token: str) -> Caller:
        """Whose token this is, and for what. Raises UNAUTHORIZED."""
        payload = token.partition(".")[2].partition(".")[0]
        if not hmac.compare_digest(token.encode(), self._sign(payload).encode()):
            raise RegistryError(ErrorCode.UNAUTHORIZED, "the token is not one of this registry")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
        user = claims["sub"]
        current = claims["aud"] == self.service and claims["exp"] > time.time()
        if not current or (user is not None and user not in self._users.get()):
            raise RegistryError(ErrorCode.UNAUTHORIZED, "the token has expired, or its user is gone")
        return Caller(user, frozenset(Scope(*scope) for scope in claims["access"]))

    def _sign(self, payload: str) -> str:
        """The JSON Web Token of a payload, in base64url, signed with HMAC-SHA256."""
        content = f"eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9.{payload}"  # {"typ":"JWT","alg":"HS256"}
        signature = hmac.digest(self._key, content.encode(), "sha256")
        return f"{content}.{base64.urlsafe_b64encode(signature).decode()}".rstrip("=")


def load_key(path: str, *, create: bool) -> bytes:
    """The key that signs tokens, kept so that they outlive a restart; empty if there is none."""
    with explain_failure(f"cannot use {path}", "remove it for a new one"):
        with locked_directory(os.path.dirname(path)) if create else contextlib.nullcontext():
            if not os.path.lexists(path):
                if not create:
                    return b""
                replace_file(path, secrets.token_bytes(32))
        with open(path, "rb", opener=no_follow) as file:
            key = file.read()
        if len(key) < 32:
            raise ValueError("it has fewer than 32 bytes, which can be guessed")
        return key


def replace_file(path: str, content: bytes) -> None:
    """Write a private file in one step, durably."""
    directory = os.path.dirname(os.path.abspath(path))
    with tempfile.TemporaryDirectory(prefix=f"{os.path.basename(path)}.", dir=directory) as temporary:
        descriptor, new = tempfile.mkstemp(dir=temporary)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(new, path)
    sync_directory(directory)


# === Messages: a client's socket, and the requests and replies that pass through it ===================

HTTP_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}"
FIELD_LINE = rf"{HTTP_TOKEN}:[^\r\n\0]*"
HEAD = re.compile(rf"({HTTP_TOKEN}) ([^\x00-\x20\x7f-\xa0\xad]*) (HTTP/[0-9]\.[0-9])((?:\r\n{FIELD_LINE})*)")


@dataclasses.dataclass
class FileRange:
    """Some bytes of an open file; whoever has sent the reply closes it."""

    file: BinaryIO
    start: int
    length: int

    def __len__(self) -> int:
        return self.length


class SocketReader:
    """A connection's bytes, bounded in time. Methods raise ClientGone if the client hangs up or stalls."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        # From when on it may be hung up on for another: idle, since its last good reply; while a body moves,
        # from a time that each byte puts off; never while a handler works; soon after a refusal.
        self.served_at = self.evictable_at = time.monotonic()
        self.deadline = 0.0  # by which all has to be received, no matter how it trickles in; 0.0: none
        self._tls = False
        self._pending: bytes | memoryview = b""  # received and not yet consumed; a view, to be sliced often
        self._set_timeout(STALL_TIMEOUT, socket.SO_SNDTIMEO)
        self._timeout = 0.0  # of receiving; with TLS, of sending as well
        with contextlib.suppress(OSError):  # some systems refuse it once the client is gone
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _set_timeout(self, seconds: float, option: int = socket.SO_RCVTIMEO) -> None:
        """Bound each wait, in the kernel where that works: settimeout costs a poll for each call."""
        self._timeout = seconds
        if not self._tls:
            value = struct.pack("ll", int(seconds), max(int(seconds % 1 * 1e6), seconds < 1))  # 0 is for ever
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, option, value)
                return
        self.socket.settimeout(seconds)

    def _within(self, seconds: float, operation: Callable[..., Any], *arguments: Any) -> Any:
        """What a system call gives that waits so long at most, and not past the deadline."""
        if self.deadline:
            seconds = min(seconds, self.deadline - time.monotonic())
            if seconds <= 0:
                raise ClientGone
        if seconds != self._timeout:
            self._set_timeout(seconds)
        try:
            result = operation(*arguments)
        except (OSError, ValueError) as error:
            raise ClientGone from error
        if result is not None and not result:  # 0 or b"": it has hung up, or a file is shorter than it was
            raise ClientGone
        return result

    def begin_tls(self, context: ssl.SSLContext) -> None:
        """Shake hands; everything from there on is encrypted."""
        self._within(HEADER_TIMEOUT, self.socket.getpeername)  # had it been reset, wrap_socket would leak it
        wrap = functools.partial(context.wrap_socket, server_side=True, do_handshake_on_connect=False)
        self.socket = self._within(HEADER_TIMEOUT, wrap, self.socket)
        self._tls, self._timeout = True, 0.0
        self._within(HEADER_TIMEOUT, self.socket.do_handshake)  # type: ignore[attr-defined]

    def read_head(self) -> bytes:
        """The next request's head, without its end; so far as it was read, if that is bad or too large."""
        head, self._pending, self.deadline = bytes(self._pending), b"", 0.0
        while b"\r\n\r\n" not in (head := LEADING_LINES.sub(b"", head, count=1)):
            too_long = len(head.partition(b"\r\n")[0]) > REQUEST_LINE_LIMIT or len(head) > HEAD_LIMIT
            if too_long or head.count(b"\n") != head.count(b"\r\n"):
                break  # it is refused, whatever may follow
            if head and not self.deadline:
                self.deadline = time.monotonic() + HEADER_TIMEOUT
            head += self._within(IDLE_TIMEOUT, self.socket.recv, PIECE_SIZE)
        head, _, rest = head.partition(b"\r\n\r\n")
        self._pending, self.deadline = rest, 0.0
        return head

    def read_line(self) -> bytes:
        """The next line of a chunked body that is not content, without its CRLF. Raises BAD_REQUEST."""
        while b"\n" not in (head := bytes(self._pending[:KIB])) and len(head) < KIB:
            self._pending = memoryview(head + self._within(STALL_TIMEOUT, self.socket.recv, PIECE_SIZE))
        line, end, _ = head.partition(b"\r\n")
        if not end or b"\n" in line:
            raise RegistryError(ErrorCode.BAD_REQUEST, "bad line between chunks")
        self._pending = self._pending[len(line) + 2 :]
        return line

    def readinto(self, view: memoryview) -> int:
        """Fill some of a buffer with what comes next, at least one byte."""
        if not self._pending:
            return int(self._within(STALL_TIMEOUT, self.socket.recv_into, view))
        count = min(len(self._pending), len(view))
        view[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def send(self, data: bytes | memoryview, *, more: bool = False) -> None:
        """Send all of this; more: something follows at once and may go into the same packet."""
        flags = getattr(socket, "MSG_MORE", 0) if more and not self._tls else 0
        timeout = STALL_TIMEOUT if self._tls else self._timeout  # sending has its own since __init__
        if self.evictable_at == math.inf:  # as in send_file
            self.evictable_at = time.monotonic() + HEADER_TIMEOUT + len(data) / SLOWEST_BODY
        for start in range(0, len(data), BUFFER_SIZE):  # each piece gets a timeout of its own
            self._within(timeout, self.socket.sendall, data[start : start + BUFFER_SIZE], flags)

    def send_file(self, part: FileRange) -> None:
        """Send some bytes of a file. On one machine, sendfile would take half as long again."""
        self.evictable_at = time.monotonic() + HEADER_TIMEOUT
        size, left = COPY_SIZE if self._tls else PIECE_SIZE, part.length
        buffer = memoryview(bytearray(min(size, left)))
        part.file.seek(part.start)
        while left:
            count = self._within(self._timeout, part.file.readinto, buffer[:left])  # type: ignore[attr-defined]
            self.send(buffer[:count])
            left -= count
            self.evictable_at += count / SLOWEST_BODY

    def stop_sending(self) -> None:
        """Tell the client that nothing more will come, without waiting for it to say the same."""
        with contextlib.suppress(OSError, ValueError):
            if self._tls:
                self._set_timeout(0)
                self.socket.unwrap()  # type: ignore[attr-defined]  # close_notify (RFC 8446, 6.1)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Hang up in good order."""
        self.stop_sending()
        self.socket.close()


class Body:
    """A request's body, decoded as it is read."""

    def __init__(self, reader: SocketReader, length: int | None, *, expected: bool) -> None:
        """length: None for a chunked body. expected: the client waits for 100 Continue before it sends."""
        self.length = length
        self._reader = reader
        self._remaining = length  # bytes of the body, or of the chunk being read; None before the first
        self._chunked = length is None  # and its last chunk has not come
        self._expected = expected and length != 0
        self.done = length == 0

    @property
    def drainable(self) -> bool:
        """Whether what was not read is so little that reading on is cheaper than closing the connection."""
        return self.done or not (self._chunked or self._expected or (self._remaining or 0) > 256 * KIB)

    def readinto(self, view: memoryview) -> int:
        """Fill some of a buffer; 0 at the body's end. Raises ClientGone, and BAD_REQUEST for bad chunks."""
        reader, count = self._reader, 0
        if self._expected:
            self._expected = False
            reader.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._chunked and not self._remaining:
            self._begin_chunk()
        if self._remaining:
            if reader.evictable_at == math.inf:
                reader.evictable_at = time.monotonic() + HEADER_TIMEOUT
            count = reader.readinto(view[: self._remaining])
            reader.evictable_at += count / SLOWEST_BODY
            self._remaining -= count
        if not self._remaining and not self._chunked:
            self.done, reader.evictable_at = True, math.inf
        return count

    def _begin_chunk(self) -> None:
        """Read up to the next chunk's content, or past the trailers (RFC 9112, 7.1)."""
        if self._remaining is not None and self._reader.read_line():
            raise RegistryError(ErrorCode.BAD_REQUEST, "a chunk is longer than its size says")
        line = self._reader.read_line()
        size = re.fullmatch(rb"([0-9A-Fa-f]{1,16})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?", line)
        if not size:
            raise RegistryError(ErrorCode.BAD_REQUEST, "bad chunk size")
        self._remaining = int(size[1], 16)
        if not self._remaining:
            for count, line in enumerate(iter(self._reader.read_line, b"")):  # up to an empty line
                if count == HEADER_COUNT_LIMIT or not re.fullmatch(FIELD_LINE.encode(), line):
                    raise RegistryError(ErrorCode.BAD_REQUEST, "bad trailer")
            self._chunked = False  # only now: after a bad trailer, no request can follow

    def read(self) -> bytes:
        """The whole body, a manifest, within a time that its length sets. Raises MANIFEST_TOO_LARGE."""
        expected = MANIFEST_LIMIT if self.length is None else self.length
        self._reader.deadline = time.monotonic() + HEADER_TIMEOUT + expected / SLOWEST_BODY
        self._reader.evictable_at = self._reader.served_at + EVICTION_DELAY
        content, buffer = bytearray(), memoryview(bytearray(min(expected, PIECE_SIZE)))
        while max(expected, len(content)) <= MANIFEST_LIMIT and (count := self.readinto(buffer)):
            content += buffer[:count]
        if max(expected, len(content)) > MANIFEST_LIMIT:
            raise RegistryError(ErrorCode.MANIFEST_TOO_LARGE)
        self._reader.deadline = 0.0
        return bytes(content)


class Context(NamedTuple):
    """What requests are served from."""

    store: Store
    access: Access
    public_url: str | None = None  # how clients reach it, whatever they or a proxy say
    tls: WatchedFiles | None = None  # what it speaks TLS with
    proxies: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()  # whose X-Forwarded are believed
    max_connections: int = MAX_CONNECTIONS
    log: Callable[[str], None] | None = None  # takes one access-log line for each request


class Request:
    """One request as the handlers see it."""

    method = target = path = "-"
    proxied = False  # whether it came from a trusted proxy
    persistent: bool | None = None  # whether the client may send another after this one, once that is known
    caller = Caller(None)
    wanted: Scope | None = None  # what a token must be good for

    def __init__(self, context: Context, reader: SocketReader, address: str) -> None:
        self.context, self.store = context, context.store
        self.address, self._reader = address, reader
        self.parameters: dict[str, list[str]] = {}  # of the query
        self.headers: dict[str, str] = {}  # by names in lower case, repeated ones comma-joined
        self.body = Body(reader, 0, expected=False)

    def parse(self, data: bytes) -> None:
        """Take in a head (RFC 9112); whatever this raises, what was understood until then stays."""
        if data.startswith(b"HEAD "):
            self.method = "HEAD"  # no reply to it has a body, not even one that says how bad it is
        if len(data.partition(b"\r\n")[0]) > REQUEST_LINE_LIMIT:
            raise RegistryError(ErrorCode.URI_TOO_LONG)
        if len(data) > HEAD_LIMIT or data.count(b"\n") > HEADER_COUNT_LIMIT:
            raise RegistryError(ErrorCode.REQUEST_HEADER_FIELDS_TOO_LARGE)
        head = HEAD.fullmatch(data.decode("latin-1"))
        if not head:
            raise RegistryError(ErrorCode.BAD_REQUEST, "malformed request line or header")
        self.method, self.target, version, lines = head.groups()
        if version not in ("HTTP/1.1", "HTTP/1.0"):
            raise RegistryError(ErrorCode.HTTP_VERSION, version)
        modern = version == "HTTP/1.1"
        self._parse_headers(lines.split("\r\n")[1:], host_required=modern)
        if self.context.proxies:
            self._look_behind_proxies()
        self._parse_target()
        self._begin_body(modern)
        self.persistent = modern and "close" not in self.headers.get("connection", "").lower()

    def _parse_headers(self, lines: list[str], *, host_required: bool) -> None:
        headers = self.headers
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            if name in headers:
                if name in ("content-length", "transfer-encoding", "host", "content-range", "authorization"):
                    raise RegistryError(ErrorCode.BAD_REQUEST, f"more than one {name}")
                value = f"{headers[name]}, {value}"
            headers[name] = value
        if (host_required or "host" in headers) and not HOST.fullmatch(headers.get("host", "")):
            raise RegistryError(ErrorCode.BAD_REQUEST, "no Host, or none that is one")

    def _parse_target(self) -> None:
        """Find path and parameters. A plus sign is itself, as in media types."""
        target = self.target
        if target[:1] != "/" and (absolute := re.fullmatch("(?i:https?)://([^/?]*)(.*)", target)):
            self.headers["host"], target = absolute.groups()  # as RFC 9112, 3.2.2 demands
            if not HOST.fullmatch(self.headers["host"]):
                raise RegistryError(ErrorCode.BAD_REQUEST, "the target names no host")
        path, _, query = target.partition("?")
        try:
            self.path = unquote(path, errors="strict") if "%" in path else path
            if query:
                query = query.replace("+", "%2B")
                self.parameters = parse_qs(query, True, errors="strict", max_num_fields=1_000)
        except ValueError:
            raise RegistryError(ErrorCode.BAD_REQUEST, "not UTF-8, or too many parameters") from None

    def _begin_body(self, modern: bool) -> None:
        """Find out how long the body is. Raises BAD_REQUEST if that is unclear, EXPECTATION_FAILED."""
        headers, expectation = self.headers, self.headers.get("expect", "").lower()
        length, encoding = headers.get("content-length", "0"), headers.get("transfer-encoding", "").lower()
        chunked = encoding == "chunked" and modern
        if "transfer-encoding" in headers and (not chunked or "content-length" in headers):
            raise RegistryError(ErrorCode.BAD_REQUEST, "ambiguous length of the body")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise RegistryError(ErrorCode.BAD_REQUEST, "bad Content-Length")
        if expectation not in ("", "100-continue"):
            raise RegistryError(ErrorCode.EXPECTATION_FAILED)
        size = None if chunked else int(length)
        self.body = Body(self._reader, size, expected=modern and expectation != "")

    def _look_behind_proxies(self) -> None:
        """Take the client's address from X-Forwarded-For, to whose right end each trusted proxy added one."""
        hops = self.headers.get("x-forwarded-for", "").replace("%", "?").split(",")  # refuse fe80::1%eth0
        while any(ipaddress.ip_address(self.address) in network for network in self.context.proxies):
            self.proxied = True
            try:
                address = ipaddress.ip_address(hops.pop().strip())
            except (IndexError, ValueError):
                break
            self.address = str(getattr(address, "ipv4_mapped", None) or address)

    def parameter(self, name: str) -> str | None:
        """The first value that the query gives a parameter, or None."""
        return self.parameters[name][0] if name in self.parameters else None

    def base_url(self) -> str:
        """How clients reach this registry: public_url, else what they or a trusted proxy say; or empty."""
        if self.context.public_url:
            return self.context.public_url.rstrip("/")
        scheme, host = "https" if self.context.tls else "http", self.headers.get("host", "")
        if self.proxied:  # what the proxy nearest to the client says comes first
            scheme = (self.headers.get("x-forwarded-proto") or scheme).partition(",")[0].strip()
            host = (self.headers.get("x-forwarded-host") or host).partition(",")[0].strip()
        return f"{scheme}://{host}" if scheme in ("http", "https") and HOST.fullmatch(host) else ""


class Reply(NamedTuple):
    """What a handler answers. Content-Length, HEAD and the connection are not its business."""

    status: int
    headers: Headers = ()
    body: bytes | FileRange = b""


def json_reply(document: object, *headers: tuple[str, str]) -> Reply:
    """A 200 with a JSON document."""
    return Reply(200, (("Content-Type", "application/json"), *headers), encode_json(document))


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """A Range's start and length (RFC 9110, 14); None for several ranges. Raises RANGE_NOT_SATISFIABLE."""
    match = re.fullmatch("bytes=(?!-$)([0-9]*)-([0-9]*)", text, re.IGNORECASE)
    if not match:
        return None
    first, last = (digits and digits.lstrip("0")[:18].zfill(1) for digits in match.groups())
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise RegistryError(ErrorCode.RANGE_NOT_SATISFIABLE, headers=[("Content-Range", f"bytes */{size}")])
    return start, stop - start


def check_preconditions(request: Request, digest: str | None) -> bool:
    """Whether the client has already what is there, or None (RFC 9110, 13). Raises PRECONDITION_FAILED."""
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match", "")
    etag = f'"{digest}"'  # for If-Match, a weak one is not good enough (RFC 9110, 8.8.3.2)
    known = digest is not None and (none_match == "*" or etag in none_match)
    holds = match is None or (digest is not None and (match == "*" or etag in match.replace('W/"', "")))
    if not holds or (known and request.method not in ("GET", "HEAD")):
        raise RegistryError(ErrorCode.PRECONDITION_FAILED, digest or "nothing")
    return known


def page_link(path: str, **parameters: str | int | None) -> tuple[str, str]:
    """The Link header (RFC 8288) to a listing's next page."""
    query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in parameters.items() if value)
    return "Link", f'<{path}?{query}>; rel="next"'


# === Handlers: one function per operation =============================================================


def created(name: str, kind: str, digest: str, *headers: tuple[str, str]) -> Reply:
    """A 201 for a blob or manifest that is now there."""
    location = ("Location", f"/v2/{name}/{kind}/{digest}")
    return Reply(201, (location, ("Docker-Content-Digest", digest), *headers))


def content_reply(request: Request, content: Descriptor, unknown: ErrorCode) -> Reply:
    """A content, whole, in part, or as not modified. Raises unknown when the disk has lost it."""
    etag, part = f'"{content.digest}"', None
    headers = [("Docker-Content-Digest", content.digest), ("ETag", etag)]
    if check_preconditions(request, content.digest):
        return Reply(304, headers)
    headers += [("Content-Type", content.media_type), ("Accept-Ranges", "bytes")]
    same = request.headers.get("if-range", etag) == etag
    if request.method == "GET" and "range" in request.headers and same:
        part = parse_range(request.headers["range"], content.size)
    start, length = part or (0, content.size)
    body = request.store.open_content(content)
    if body is None:
        raise RegistryError(unknown, content.digest)
    if part:
        headers.append(("Content-Range", f"bytes {start}-{start + length - 1}/{content.size}"))
    piece = body[start : start + length] if isinstance(body, bytes) else FileRange(body, start, length)
    return Reply(206 if part else 200, headers, piece)


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
    location = ("Location", f"/v2/{name}/blobs/uploads/{session}")
    return location, ("Range", f"0-{max(size - 1, 0)}"), ("Docker-Upload-UUID", session)


def upload_start(request: Request, name: str) -> Reply:
    """Mount a blob (end-11), take one whole (end-4b), or open an upload session (end-4a)."""
    mount, source, digest = map(request.parameter, ("mount", "from", "digest"))
    if mount is not None:
        mount = parse_digest(mount)
        sources = request.store.repositories_with(mount, 1_000) if source is None else [source]
        # Where a source is named, a token may be good for the target only: some clients ask for no more.
        caller = request.caller if source is None else Caller(request.caller.user)
        allows = request.context.access.allows
        readable = (each for each in sources if allows(caller, Scope("repository", each, "pull")))
        if any(request.store.mount(name, mount, each) for each in readable):
            return created(name, "blobs", mount)
    if digest is None:
        algorithm = request.parameter("digest-algorithm") or "sha256"
        if algorithm not in ALGORITHMS:
            raise RegistryError(ErrorCode.DIGEST_INVALID, algorithm)
        return Reply(202, session_headers(name, request.store.start_session(name, algorithm), 0))
    with request.store.files.new_upload(algorithm_of(parse_digest(digest))) as upload:
        receive(request, upload)
        request.store.finish_upload(name, upload, digest)
    return created(name, "blobs", digest)


def receive(request: Request, upload: UploadFile) -> None:
    """Append the body where its Content-Range says. Raises UPLOAD_RANGE, DIGEST_INVALID, SIZE_INVALID."""
    start, length, text = upload.size, request.body.length, request.headers.get("content-range")
    expected = length  # None: a chunked body may have any length
    if text is not None:
        match = re.fullmatch("([0-9]{1,18})-([0-9]{1,18})", text)
        first, last = map(int, match.groups()) if match else (-1, -1)
        if first != start or last < first:
            raise RegistryError(ErrorCode.UPLOAD_RANGE, f"{text}, and the upload has {start} bytes")
        expected = last - first + 1
    if request.method == "PUT":
        parse_digest(request.parameter("digest") or "")  # before anything of the body is taken
    if length in (None, expected):
        received = upload.append(request.body.readinto, length)
        if expected in (None, received):
            return
        upload.take_back(start)
    raise RegistryError(ErrorCode.SIZE_INVALID, "the body is not as long as its Content-Range")


def upload_append(request: Request, name: str, session: str) -> Reply:
    """Append to an upload session (end-5), which a PUT makes a blob (end-6)."""
    digest = request.parameter("digest") or ""  # which receive checks, once the range is right
    try:
        with request.store.session(name, session) as upload:
            start = upload.size
            try:
                receive(request, upload)
            except ClientGone:
                if request.method == "PUT":  # some clients make the same request again
                    upload.take_back(start)
                raise
            if request.method == "PATCH":
                return Reply(202, session_headers(name, session, upload.size))
            request.store.finish_upload(name, upload, digest)
    except RegistryError as error:
        if error.code in (ErrorCode.UPLOAD_RANGE, ErrorCode.UPLOAD_BUSY):  # the client can go on from there
            error.headers = session_headers(name, session, request.store.session_size(name, session))
        raise
    return created(name, "blobs", digest)


def upload_status(request: Request, name: str, session: str) -> Reply:
    """Say how far an upload session has come (end-13)."""
    return Reply(204, session_headers(name, session, request.store.session_size(name, session)))


def upload_cancel(request: Request, name: str, session: str) -> Reply:
    """Drop an upload session (end-14)."""
    with request.store.session(name, session) as upload:
        remove_file(upload.path)
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
    content = request.body.read()
    content_type = request.headers.get("content-type", "").partition(";")[0].strip()
    manifest = parse_manifest(content, content_type)
    tags = request.parameters.get("tag", []) if DIGEST.fullmatch(reference) else []
    if len(tags) > TAG_PARAMETER_LIMIT:
        raise RegistryError(ErrorCode.TOO_MANY_TAGS)
    if not all(map(TAG.fullmatch, tags)):
        raise RegistryError(ErrorCode.MANIFEST_INVALID, "a tag parameter is not a tag")
    check = functools.partial(check_preconditions, request)
    digest = request.store.put_manifest(name, reference, manifest, content, tags=tags, check=check)
    subject = [("OCI-Subject", manifest.subject)] if manifest.subject else []
    return created(name, "manifests", digest, *subject, *(("OCI-Tag", tag) for tag in tags))


def manifest_delete(request: Request, name: str, reference: str) -> Reply:
    """Remove a tag, or a manifest with its tags (end-9)."""
    reference = check_reference(reference, ErrorCode.MANIFEST_UNKNOWN)
    request.store.delete_manifest(name, reference, functools.partial(check_preconditions, request))
    return Reply(202)


def listing_reply(request: Request, fetch: Callable[[str, int], list[str]], kind: str, **more: str) -> Reply:
    """One page of names, and a link to the next. fetch takes a name and how many are wanted after it."""
    text = request.parameter("n")
    if text is not None and not re.fullmatch("[0-9]+", text):
        raise RegistryError(ErrorCode.PAGE_INVALID, text)
    size = min(int((text or "10000").lstrip("0")[:18] or 0), 10_000)
    names = fetch(request.parameter("last") or "", size + 1 if size else 0)
    links = [page_link(request.path, n=size, last=names[size - 1])] if len(names) > size else []
    return json_reply({**more, kind: names[:size]}, *links)


def tag_list(request: Request, name: str) -> Reply:
    """List tags (end-8a, end-8b)."""
    return listing_reply(request, functools.partial(request.store.tags, name), "tags", name=name)


def readable_repositories(request: Request, last: str, limit: int) -> list[str]:
    """Up to so many repositories after one that the caller may pull, looked for where grants say they are."""
    access, user, readable = request.context.access, request.caller.user, list[str]()
    first, step = f"{last}\0", limit
    for start, end in sorted(access.readable_ranges(user)):
        first = max(first, start)
        while first < end and len(readable) < limit:
            names = request.store.repositories(first, end, step)
            readable += [name for name in names if access.permits(user, Scope("repository", name, "pull"))]
            first = f"{names[-1]}\0" if len(names) == step else end
            step = max(limit, LISTING_STEP)
    return readable[:limit]


def repository_list(request: Request) -> Reply:
    """List the repositories that the caller may pull; not in the specification, but widely used."""
    return listing_reply(request, functools.partial(readable_repositories, request), "repositories")


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
    access, (user, scopes) = request.context.access, request.caller
    if not access.enabled:  # where everybody may do everything there are no tokens
        raise RegistryError(ErrorCode.NOT_FOUND)
    if scopes is not None or not (user or access.permits(None, CATALOG)):
        raise RegistryError(ErrorCode.UNAUTHORIZED)  # a token is neither renewed nor widened for itself
    if request.parameter("service") not in (None, "", access.service):
        raise RegistryError(ErrorCode.UNSUPPORTED, "tokens for other services are not issued here")
    texts = " ".join(request.parameters.get("scope", [])).split()
    token = access.issue_token(user, [scope for text in texts for scope in parse_scope(text)])
    return json_reply(token, ("Cache-Control", "no-store"))


# === Routes: one table, and how a request gets to its handler or an error =============================


class Route(NamedTuple):
    """An operation: GET serves HEAD too. Each <part> of the path is an argument of the handler."""

    method: str
    path: str
    handler: Callable[..., Reply]
    access: str  # what the caller must be allowed: an action, "catalog", "login" (anything), "" (nothing)


ROUTES = (
    Route("GET", "/v2/", lambda request: json_reply({}), "login"),
    Route("GET", "/v2/_catalog", repository_list, "catalog"),
    Route("GET", "/v2/<name>/tags/list", tag_list, "pull"),
    Route("GET", "/v2/<name>/manifests/<reference>", manifest_get, "pull"),
    Route("PUT", "/v2/<name>/manifests/<reference>", manifest_put, "push"),
    Route("DELETE", "/v2/<name>/manifests/<reference>", manifest_delete, "delete"),
    Route("GET", "/v2/<name>/referrers/<digest>", referrer_list, "pull"),
    Route("POST", "/v2/<name>/blobs/uploads/", upload_start, "push"),
    Route("GET", "/v2/<name>/blobs/uploads/<session>", upload_status, "push"),
    Route("PATCH", "/v2/<name>/blobs/uploads/<session>", upload_append, "push"),
    Route("PUT", "/v2/<name>/blobs/uploads/<session>", upload_append, "push"),
    Route("DELETE", "/v2/<name>/blobs/uploads/<session>", upload_cancel, "push"),
    Route("GET", "/v2/<name>/blobs/<digest>", blob_get, "pull"),
    Route("DELETE", "/v2/<name>/blobs/<digest>", blob_delete, "delete"),
    Route("GET", TOKEN_PATH, token_get, ""),
)

_PATHS: dict[re.Pattern[str], dict[str, Route]] = {}
for _route in ROUTES:  # a name may hold slashes, and takes all that the rest of the path leaves
    _pattern = re.sub("<[^n].*?>", r"(?P\g<0>[^/]+)", _route.path).replace("<name>", "(?P<name>.+)")
    _pattern = re.sub("/$", "/?", _pattern)
    _PATHS.setdefault(re.compile(_pattern, re.DOTALL), {})[_route.method] = _route


@functools.lru_cache(maxsize=1024)
def find_path(path: str) -> tuple[dict[str, Route], dict[str, str]]:
    """The operations on a path by method, and the parts that it names. Raises NOT_FOUND."""
    for pattern, methods in _PATHS.items():
        if match := pattern.fullmatch(path):
            return methods, match.groupdict()
    raise RegistryError(ErrorCode.NOT_FOUND)


def dispatch(request: Request) -> Reply:
    """Run the operation that a request asks for. Raises whatever keeps it from being answered."""
    find = find_path if len(request.path) <= 2 * NAME_LIMIT else find_path.__wrapped__  # which remembers none
    methods, arguments = find(request.path)
    route = methods.get("GET" if request.method == "HEAD" else request.method)
    try:
        return run_route(request, route, arguments)
    except RegistryError as error:
        if error.code.status == http.HTTPStatus.METHOD_NOT_ALLOWED:  # whatever the reason (RFC 9110, 15.5.6)
            closed = ("push", "delete") if request.store.read_only else ()
            allowed = [method for method, to in methods.items() if to != route and to.access not in closed]
            error.headers = (("Allow", ", ".join(sorted(allowed)).replace("GET", "GET, HEAD")),)
        raise


def run_route(request: Request, route: Route | None, arguments: dict[str, str]) -> Reply:
    """Run an operation on what the path names, if that is well-formed and the caller may."""
    if route is None:
        raise RegistryError(ErrorCode.METHOD_NOT_ALLOWED)
    name = arguments.get("name")
    if name is not None and not NAME.fullmatch(name):
        writes = request.method in ("POST", "PUT", "PATCH")
        raise RegistryError(ErrorCode.NAME_INVALID if writes else ErrorCode.NAME_UNKNOWN, name)
    if request.store.read_only and route.access in ("push", "delete"):
        raise RegistryError(ErrorCode.READ_ONLY)
    if request.context.access.enabled:
        authorize(request, route.access, name or "")
    return route.handler(request, **arguments)


def authorize(request: Request, action: str, name: str) -> None:
    """Find out who asks. Raises UNAUTHORIZED if other credentials or scopes may help, else DENIED."""
    access, headers = request.context.access, request.headers
    scope = CATALOG if action == "catalog" else Scope("repository", name, action)
    request.wanted = None if action in ("login", "") else scope
    request.caller = caller = access.identify(headers.get("authorization", ""), request.address)
    known = action == "" or caller != Caller(None)  # by name, or by a token, if only an anonymous one
    if not (access.allows(caller, scope) if request.wanted else known):
        if caller.user is None or (caller.scopes is not None and access.permits(caller.user, scope)):
            raise RegistryError(ErrorCode.UNAUTHORIZED)
        raise RegistryError(ErrorCode.DENIED, f"{caller.user} may not {action} {name}")


def challenge(request: Request) -> str:
    """How to log in: with a token, where that is to be had and for what, or for a token with a password."""
    url, scope = request.base_url(), request.wanted
    if request.path == TOKEN_PATH or not url:
        return 'Basic realm="registry"'
    value = f'Bearer realm="{url}{TOKEN_PATH}",service="{request.context.access.service}"'
    if scope is not None:  # whoever pushes will want to look at what is there as well
        value += f',scope="{":".join(scope)}"'.replace(":push", ":pull,push")
    if request.caller.scopes is not None:  # or docker tries the same again and again
        value += ',error="insufficient_scope"'
    return value


def error_reply(error: Exception, request: Request | None = None) -> Reply:
    """The one place that turns an exception into a reply; what is nobody's fault but ours is logged."""
    if not isinstance(error, RegistryError):
        if is_out_of_space(error):
            error = RegistryError(ErrorCode.STORAGE_FULL)
        elif is_busy(error):
            error = RegistryError(ErrorCode.DATABASE_BUSY, headers=(("Retry-After", "5"),))
        else:
            write_log(traceback.format_exc(), end="")
            error = RegistryError(ErrorCode.INTERNAL)
    headers = [("Content-Type", "application/json"), *error.headers]
    if request and error.code is ErrorCode.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", challenge(request)))
    return Reply(error.code.status, headers, encode_json(error.document()))


def answer(request: Request, head: bytes) -> Reply:
    """What to reply to a request with this head. Raises ClientGone."""
    try:
        request.parse(head)
        return dispatch(request)
    except ClientGone:
        raise
    except Exception as error:  # whatever it is, the client gets an answer
        return error_reply(error, request)


# === Server: connections and their threads ============================================================

format_date = functools.lru_cache(maxsize=2)(functools.partial(formatdate, usegmt=True))  # once a second


def log_line(request: Request, reply: Reply, seconds: float) -> str:
    """The line of the access log for a request: a target may hold a password, and an agent is one field."""
    target = re.sub("//[^/?]*@", "//", request.target)[:500]
    agent = json.dumps(request.headers.get("user-agent", "-")[:200])
    who = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {request.address}"
    return f"{who} {request.method} {target} {reply.status} {len(reply.body)} {seconds * 1000:.1f}ms {agent}"


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
        lines.append(f"Content-Length: {len(reply.body)}")
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
            if self.server.context.tls:
                self.reader.begin_tls(self.server.context.tls.get())
            while not self.server.stopping:
                self._serve(self.reader.read_head())

    def hang_up(self, how: int = socket.SHUT_RDWR) -> None:
        """Make this connection's thread come to its end; for other threads to call."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.reader.socket, how)  # not TLS's own, which is for its thread

    def _serve(self, head: bytes) -> None:
        """Serve one request. Raises ClientGone if no other may follow on this connection."""
        reader, started = self.reader, time.perf_counter()
        self.idle, reader.evictable_at = False, math.inf
        request = Request(self.server.context, reader, self.client_address[0])
        reply = Reply(499)  # only ever in the log: there was nobody left to tell
        try:
            reply = answer(request, head)
            keep = self._send(request, reply)
        finally:
            if self.server.context.log:
                self.server.context.log(log_line(request, reply, time.perf_counter() - started))
        if request.persistent is False and request.body.done:
            raise ClientGone  # it has sent its last, so that nothing unread can turn closing into a reset
        if not keep or not request.body.done:
            self._skip(request, keep)
        elif reply.status < 400:
            reader.served_at = time.monotonic()
        self.idle, reader.evictable_at = True, reader.served_at

    def _skip(self, request: Request, keep: bool) -> None:
        """Read the rest of a body, or all that comes until the client has read the reply and hangs up."""
        self.reader.evictable_at = self.reader.served_at + EVICTION_DELAY
        self.reader.deadline = time.monotonic() + LINGER_TIMEOUT
        skip = request.body.readinto
        if not keep:  # or closing on unread bytes would reset the connection (RFC 9112, 9.6)
            self.idle = request.body.done
            if not (self.idle and self.server.stopping):  # finish_requests may have looked just before
                skip = self.reader.readinto
                self.reader.stop_sending()
        while skip(memoryview(bytearray(PIECE_SIZE))):
            pass

    def _send(self, request: Request, reply: Reply) -> bool:
        """Send a reply, in one write when its body is small; returns whether another request may follow."""
        if reply.status >= 400:  # or whoever may do nothing could hold a connection by not reading that
            self.reader.evictable_at = self.reader.served_at + EVICTION_DELAY
        keep = bool(request.persistent) and not self.server.stopping and request.body.drainable
        head, bodiless = encode_head(reply, keep=keep), request.method == "HEAD"
        if isinstance(reply.body, bytes):
            self.reader.send(head if bodiless else head + reply.body)
        else:
            with reply.body.file:
                self.reader.send(head, more=not bodiless)
                if not bodiless:
                    self.reader.send_file(reply.body)
        return keep


class Server(ThreadingHTTPServer):
    """Accepts connections. socketserver calls get_request, verify_request, process_request, handle_error."""

    def __init__(self, listener: socket.socket, context: Context) -> None:
        """Takes the listener over."""
        socketserver.BaseServer.__init__(self, listener.getsockname(), Connection)
        self.socket = listener
        self.context = context
        self.stopping = False
        self.connections: set[Connection] = set()
        self._closed = threading.Condition()  # guards these and _idle_threads; notified when one has ended
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
        """Whether there is room for one more connection; the one that may be evicted longest makes some."""
        with self._closed:
            if len(self.connections) < self.context.max_connections:
                return True
            first = min(self.connections, key=lambda other: other.reader.evictable_at)
            if first.reader.evictable_at <= time.monotonic():
                first.hang_up()
                if self._closed.wait(EVICTION_TIMEOUT):
                    return True
        if not self.context.tls:  # in the middle of a handshake, this would be noise
            with contextlib.suppress(OSError):
                reply = error_reply(RegistryError(ErrorCode.OVERLOADED))
                request.send(encode_head(reply, keep=False) + bytes(reply.body))  # type: ignore[arg-type]
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread serve a connection: one that waits for it, else a new one, which takes longer."""
        with self._closed:
            waits = self._idle_threads > 0
            self._idle_threads -= waits
        if not waits:
            threading.Thread(target=self._serve_connections, daemon=True).start()
        connection = Connection(request, client_address, self)
        with self._closed:
            self.connections.add(connection)  # before it is served, so that finish_requests misses none
        self._handed_over.put(connection)

    def _serve_connections(self) -> None:
        """Serve one connection after another, until enough other threads wait for the next one."""
        while connection := self._handed_over.get():
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
                    connection.hang_up(socket.SHUT_RD if self.context.tls else socket.SHUT_RDWR)
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


# === Embedding: Registry, a server and its store as one object ========================================


_running: set[Registry] = set()  # those that are open in this process
_inherited: set[str] = set()  # data directories that were open in another when this one was forked from it


@dataclasses.dataclass(eq=False)
class Registry:
    """A registry in this process, for as long as a `with` block lasts, or from start to close.

    It belongs to the process that started it. One that is forked from it can end, or have its own.
    """

    data: str | os.PathLike[str] | None = None  # None: a temporary one, removed at the end
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
    public_url: str | None = None  # how clients reach it, whatever they or a proxy say
    trusted_proxies: Sequence[str] = ()  # addresses or networks whose X-Forwarded headers are believed
    tls_cert: str | None = None  # paths of PEM files
    tls_key: str | None = None
    max_connections: int = MAX_CONNECTIONS
    log: Callable[[str], None] | None = None  # takes a line for each request, and what gc removed

    def __post_init__(self) -> None:
        self._stop_deadline = 0.0
        self._spare_key = secrets.token_bytes(32)  # signs tokens where none can be kept; of all workers
        self._resources = contextlib.ExitStack()

    def start(self) -> Registry:
        """Begin to serve in the background, for the first time or after close. Raises StartupError."""
        self.open()
        thread = threading.Thread(target=self.server.serve_forever, name="registry", daemon=True)
        thread.start()
        self._resources.callback(thread.join)
        return self

    __enter__ = start

    def __exit__(self, *exception: object) -> None:
        self.close()

    def bind(self) -> socket.socket:
        """A socket that listens where this registry is to. Raises StartupError."""
        with explain_failure(f"cannot listen on {self.host} port {self.port}", "see --host and --port"):
            family, _, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=1024)
            listener.setblocking(False)  # another worker may be quicker to accept what woke this one
            return listener

    def open(self, listener: socket.socket | None = None) -> None:
        """Open the data directory and listen, unless a listener is given. Raises StartupError."""
        if self in _running:
            raise RuntimeError("this registry is running already")
        self._check_options()
        with contextlib.ExitStack() as resources:
            resources.callback(_running.discard, self)
            data = self.data
            if data is None:
                data = tempfile.mkdtemp(prefix="registry-")
                resources.callback(shutil.rmtree, data, ignore_errors=True)
            sync = self.data is not None if self.sync is None else self.sync
            options: Any = {"sparse": self.sparse, "read_only": self.read_only, "limits": self.limits}
            self.store = Store(data, durable=sync, **options)
            resources.callback(self.store.close)
            listener = listener or self.bind()
            resources.callback(listener.close)
            self.server = self._make_server(listener)
            resources.callback(self.server.server_close)
            resources.callback(lambda: self.server.finish_requests(self._stop_deadline))
            if not self.read_only:
                self.store.expire_uploads()
                self.store.remove_pending()
                self._start_periodic_jobs(resources)
            self._resources = resources.pop_all()
            _running.add(self)

    def _check_options(self) -> None:
        """Raise a StartupError for options that cannot be, or not together."""
        # SQLite would take the locks of the process that this one was forked from for its own.
        forked = self.data is not None and os.path.realpath(self.data) in _inherited
        alone = not self.users and (self.grants or self.anonymous_pull)
        url = not self.public_url or re.fullmatch(r"https?://[!#-~]+", self.public_url)
        for is_so, reason in (
            (forked, f"{self.data} was in use when this process was forked; start one anew for it"),
            (self.max_connections < 1, "with fewer than 1 connection nobody can be served"),
            (self.tls_cert and ssl is None, "this Python has no module ssl, which --tls-cert needs"),
            (self.tls_key and not self.tls_cert, "a key needs a certificate too; give --tls-cert"),
            (alone, "grants and anonymous pulls are nothing without users; give --users as well"),
            (not url, f"{self.public_url!r} is no URL; write one like https://registry.example"),
        ):
            if is_so:
                raise StartupError(reason)

    def _make_server(self, listener: socket.socket) -> Server:
        limit, (files, _) = self.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            limit = min(limit, max(files // 2 - 32, 1))  # each takes one, and often another to answer from
        path = f"{self.store.files.root}/token.key"
        key = load_key(path, create=not self.read_only) if self.users else b""
        access = Access(self.users, self.grants, self.anonymous_pull, key or self._spare_key, limit)
        tls = WatchedFiles(load_certificate, self.tls_cert, self.tls_key) if self.tls_cert else None
        with explain_failure("cannot trust a proxy", "name it by address or network, like 10.0.0.0/8"):
            proxies = [ipaddress.ip_network(text) for text in self.trusted_proxies]
        context = Context(self.store, access, self.public_url, tls, proxies, limit, self.log)
        return Server(listener, context)

    def _start_periodic_jobs(self, resources: contextlib.ExitStack) -> None:
        """Have a thread do what comes round, each job at its interval, until the resources are freed."""
        self._stopped = stopped = threading.Event()
        intervals: dict[Callable[[], object], float] = {
            self.store.flush_pulls: 60.0,  # seconds
            self.store.files.keep_reserve: 60.0,
            self.store.expire_uploads: 3600.0,
            self._collect_garbage: self.gc_interval or math.inf,
        }
        due = {job: time.monotonic() + interval for job, interval in intervals.items()}
        if self.gc_interval:  # since the last time, by a clock that may have been ahead
            due[self._collect_garbage] -= abs(time.time() - self.store.files.collected_at())

        def run() -> None:
            while not stopped.wait(min(due.values()) - time.monotonic()):
                job = min(due, key=due.__getitem__)
                try:
                    job()
                except Exception:  # the disk may be full; it need not stay so
                    write_log(traceback.format_exc(), end="")
                due[job] = time.monotonic() + intervals[job]

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        resources.callback(lambda: thread.join(max(0.0, self._stop_deadline - time.monotonic())))
        resources.callback(stopped.set)

    def _collect_garbage(self) -> None:
        """Collect, and with the first collection of each later day (UTC) walk over blobs/."""
        walk, stopped = self.store.files.collected_at() // DAY != time.time() // DAY, self._stopped.is_set
        collector = Collector(self.store, self.policy or Policy(), lambda _removal: None, stopped=stopped)
        collector.run(walk=walk)
        if not stopped():
            self.store.files.collected_at(now=True)
        if self.log and collector.summary():
            self.log(f"gc removed {collector.summary()}")

    def close(self, timeout: float = 1.0) -> None:
        """Stop, giving requests in flight so many seconds, and free everything."""
        self._stop_deadline = time.monotonic() + timeout
        if self in _running:
            self.server.stop_accepting()
        self._resources.close()

    @property
    def netloc(self) -> str:
        """Host and port as an image reference begins with them: 127.0.0.1:5000."""
        host, port = map(str, self.server.server_address[:2])
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def url(self) -> str:
        """Where the registry answers: http://127.0.0.1:5000."""
        return f"{'https' if self.tls_cert else 'http'}://{self.netloc}"


def _leave_to_parent() -> None:
    """Called in a process just forked: keep no port of the parent open, and remove nothing of its."""
    # Closing a copy of a database connection would remove the write-ahead log, which others may use by then
    # (SQLite's "How To Corrupt An SQLite Database File"). The frames of threads that are gone keep them.
    for registry in _running:
        _inherited.add(os.path.realpath(registry.store.files.root))
        for connection in registry.server.connections:
            connection.reader.socket.close()
        registry.server.server_close()
        registry._resources = contextlib.ExitStack()
    _running.clear()


os.register_at_fork(after_in_child=_leave_to_parent)

# === Command line: main, and one function per command =================================================


def open_standard_streams() -> None:
    """Have something behind closed descriptors 0 to 2: else what is printed goes to the next file opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it gets the lowest number that is free
    with contextlib.suppress(AttributeError):  # in a test, it may be something else than a stream
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for odd file names


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


def announce(registry: Registry) -> None:
    """Say that connections are accepted now, and what somebody on the network could do with them."""
    print_line(f"Serving {registry.data} at {registry.url}")
    local, warning = re.match(r"localhost$|::1$|127\.", registry.host), "registry.py: warning: "
    if not (local or registry.users or registry.read_only):
        write_log(f"{warning}whoever reaches this port can push, overwrite and delete images; see --users")
    if not (local or registry.tls_cert):
        write_log(f"{warning}passwords and images can be read and changed on their way; see --tls-cert")


def command_serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C. The first lets requests in flight finish, a second one ends at once."""
    raise_descriptor_limit()
    registry = Registry(
        sync=not options.no_sync,
        limits=Limits(**pick(options, Limits)),
        policy=Policy(**pick(options, Policy)),
        log=None if options.quiet else write_log,
        **pick(options, Registry),
    )
    listener = None
    if options.workers > 1:
        listener = registry.bind()
        registry.gc_interval = 0  # nothing is to run when it forks
        registry.open(listener.dup())  # what is wrong is better said once, and before forking
        registry.close()
        if fork_workers(registry, options.workers) == 0:  # from here on, this is a worker
            registry.gc_interval = options.gc_interval  # the first collects garbage for all

    def stop(number: int, frame: object) -> None:
        if registry.server.stopping and listener is None:  # a worker may be told by its parent and others too
            os._exit(128 + number)
        registry.server.stop_accepting()

    registry.open(listener)
    signal.set_wakeup_fd(registry.server.waker.fileno(), warn_on_full_buffer=False)  # in whatever thread
    signal.signal(signal.SIGTERM, stop)
    if listener is None:
        signal.signal(signal.SIGINT, stop)
        announce(registry)
    registry.server.serve_forever()
    signal.set_wakeup_fd(-1)
    registry.close(STOP_TIMEOUT)


def fork_workers(registry: Registry, count: int) -> int:
    """Return in each of so many new processes, with its number; this one watches over them to the end."""
    signals = {signal.SIGTERM, signal.SIGINT}
    workers: dict[int, int] = {}  # each process's number
    parent_alive, end = os.pipe()
    stopping = False

    def stop(number: int, frame: object) -> None:  # told twice, it stops them at once
        nonlocal stopping
        for process in workers:
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                os.kill(process, signal.SIGKILL if stopping else signal.SIGTERM)
        if stopping:
            os._exit(128 + number)
        stopping = True

    def stop_without_parent() -> None:
        os.read(parent_alive, 1)  # which never comes
        os.kill(os.getpid(), signal.SIGTERM)

    for each in signals:
        signal.signal(each, stop)
    announce(registry)
    while True:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        if stopping and not workers:
            sys.exit()
        for number in set(range(0 if stopping else count)) - set(workers.values()):
            process = os.fork()
            if not process:
                os.close(end)
                threading.Thread(target=stop_without_parent, daemon=True).start()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes here too
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                return number
            workers[process] = number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        if workers.pop(os.wait()[0], None) is not None and not stopping:  # whoever is process 1 inherits some
            time.sleep(0.5)  # the next one may end as soon


def command_gc(options: argparse.Namespace) -> None:
    """Remove what nothing needs any more, beside a running registry or without one."""

    def report(removal: Removal) -> None:
        where = f"{removal.repository}@" if removal.repository else ""
        print_line(f"{removal.kind} {where}{removal.digest} {removal.size}")

    with contextlib.closing(open_existing_store(options.data)) as store:
        collector = Collector(store, Policy(**pick(options, Policy)), report)
        collector.run(walk=options.all, dry_run=options.dry_run)
    print_line(f"{'would remove' if options.dry_run else 'removed'} {collector.summary() or 'nothing'}")


def command_verify(options: argparse.Namespace) -> int:
    """Compare every file with its digest and every row with its file; exit status 1 if something is wrong."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # what is there of a line that is written over and over
    found, started, shown = 0, time.monotonic(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if clear and (now := time.monotonic()) - shown > 0.1:
            part, rate, shown = min(done / max(total, 1), 1.0), done / MIB / max(now - started, 1e-3), now
            bar = f"[{'#' * int(part * 30):.<30}] {part:4.0%}"
            write_log(f"{clear}{bar}  {done / MIB:,.0f} MiB  {rate:,.0f} MiB/s ", end="")

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(open_existing_store(options.data, options.repair)))
        stack.callback(write_log, clear, end="")
        for finding in Verifier(store, show).run(repair=options.repair, force=options.force):
            write_log(clear, end="")
            print_line(f"{finding.kind} {finding.subject}{' (repaired)' if finding.repaired else ''}")
            found += 1
        if options.repair:
            store.remove_pending()
    print_line(f"{found} problems found" if found else "no problems found")
    return 1 if found else 0


def command_passwd(options: argparse.Namespace) -> None:
    """Set a user's password, or remove the user."""
    name, line = options.name, None
    with explain_failure(f"cannot change {options.users}"):
        if not options.delete:
            if not re.fullmatch(rf"(?!#)[^\s:]{{1,{USER_LIMIT}}}", name) or not name.isprintable():
                raise ValueError(f"names have 1 to {USER_LIMIT} characters, no space or colon, no # in front")
            line = f"{name}:{hash_password(ask_password())}"
        change_user(os.path.realpath(options.users), name, line)


def change_user(path: str, name: str, line: str | None) -> None:
    """Replace a user's line in a users file, or remove it; another such change waits. Raises StartupError."""
    with locked_directory(os.path.dirname(path)):
        text = Path(path).read_text(encoding="utf-8-sig") if os.path.exists(path) else ""
        before = text.rstrip("\n").split("\n") if text else []
        after = [other for other in before if other.partition(":")[0].strip() != name]
        if line is None and after == before:
            raise StartupError(f"there is no {name} in {path}")
        after += [] if line is None else [line]
        replace_file(path, "".join(f"{each}\n" for each in after).encode("utf-8"))


def ask_password() -> str:
    """A password: asked for twice on a terminal, else a line of standard input."""
    ask = getpass.getpass if sys.stdin.isatty() else lambda _prompt: sys.stdin.readline().rstrip("\r\n")
    password = ask("Password: ")
    if sys.stdin.isatty() and ask("Again: ") != password:
        raise StartupError("the two are not the same; try again")
    if not 0 < len(password) <= PASSWORD_LIMIT or "\0" in password:
        raise StartupError(f"a password has 1 to {PASSWORD_LIMIT} characters, and no NUL")
    return password


def open_existing_store(data: str, change: bool = True) -> Store:
    """The store of a data directory that there is, to change it or only look at it. Raises StartupError."""
    if not os.path.exists(os.path.join(data, "registry.db")):
        raise StartupError(f"{data} is no registry's data directory; name the one with registry.db in it")
    read_only = not change and bool(os.statvfs(data).f_flag & os.ST_RDONLY)  # else looking locks, too
    return Store(data, read_only=read_only)


SECONDS = {"s": 1, "m": 60, "h": 3600, "d": DAY}
BYTES = {f"{prefix}{unit}": KIB**power for power, prefix in enumerate("KMGT", 1) for unit in ("", "B", "iB")}


def number_type(what: str, units: Mapping[str, int] = {}, least: float = 0, most: int = 10**18) -> Any:
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
serve            --public-url URL      how clients reach this registry, whatever they or a proxy say
serve            --tls-cert FILE       serve HTTPS with this certificate chain (PEM)
serve            --tls-key FILE        its private key, if that is in another file
serve            --quiet               no access log on standard error
serve            --gc-interval AGE     collect garbage so often, 0 for never (default: 1h)
serve gc         --untagged-after AGE  remove manifests without a tag for so long, such as 7d; else never
serve gc         --keep-last COUNT     but keep the newest so many of each repository's untagged images
serve gc         --grace GRACE         leave alone what was pushed or asked for so recently (default: 1h)
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
    "GRACE": number_type("a duration of 10s or more", units=SECONDS, least=2 * LEASE_SLACK),
    "ADDR": {"action": "append", "dest": "trusted_proxies"},
    "HTPASSWD": {"required": True},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line. Only what is given becomes an attribute: so it may stand before a command, too."""
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
    except (StartupError, OSError, sqlite3.Error) as error:
        advice = "; try again later" if is_busy(error) else "; see whether the disk is full or damaged"
        write_log(f"registry.py: {error}{'' if isinstance(error, StartupError) else advice}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
