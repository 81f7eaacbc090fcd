#!/usr/bin/env python3
"""A container registry in two files: this one and schema.sql.

    python registry.py --data ./data

serves the OCI distribution specification to docker, podman, containerd, Helm, ORAS and the rest,
and ``with Registry() as registry:`` does the same inside a test suite.

The data directory:

    blobs/<algorithm>/<hex>     every blob and manifest, named by its digest, as in an OCI image layout
    uploads/<session id>        the bytes of uploads under way
    registry.db                 SQLite: repositories, links, manifests, tags, upload sessions

The one invariant: **a file is durable before its row exists, and a row goes before its file does.**
A crash can therefore leave a file that no row names, and never a row whose file is missing.

The sections, each of which uses only those above it:

    Constants       media types, limits, the patterns of names
    Errors          one table of what can go wrong, and the exception that carries its rows
    Digests         parsing and computing them
    Manifests       what a manifest says, checked
    Files           the content-addressed directory and the files under upload; knows no SQL
    Store           files and SQLite together; knows no HTTP
    Messages        requests and replies: heads, bodies, ranges, pages
    Handlers        one function per operation
    Routes          one table: method, path, handler
    Server          connections and their threads
    Embedding       Registry, a server and its store as one object
    Command line    main, and one function per command
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import errno
import functools
import hashlib
import http
import io
import json
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import socketserver
import sqlite3
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple
from urllib.parse import quote, unquote

try:
    import fcntl
except ImportError:  # Windows: sessions are then guarded within one process only
    fcntl = None  # type: ignore[assignment]
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
REFERRER_PAGE_BYTES = 3 * MIB  # clients stop reading an index at 4 MiB
TAG_PARAMETER_LIMIT = 50

RECEIVE_SIZE = 64 * KIB
BUFFER_SIZE = 1 * MIB  # one upload's reused buffer
SMALL_CONTENT = 64 * KIB  # up to here, contents are kept in memory and leave in one write
CACHE_SIZE = 8 * MIB

IDLE_TIMEOUT = 75.0  # seconds a kept-alive connection may wait for its next request
HEADER_TIMEOUT = 30.0  # from a head's first byte to its last
STALL_TIMEOUT = 60.0  # without one byte of a body moving, either way
LINGER_TIMEOUT = 2.0  # for a client to read why it is being hung up on
STOP_TIMEOUT = 10.0  # for requests in flight when the daemon is told to stop
DATABASE_TIMEOUT = 60.0  # for another process that holds the database's write lock
UPLOAD_LIFETIME = 24 * 3600.0  # of an idle upload session
HOUSEKEEPING_INTERVAL = 3600.0

MAX_CONNECTIONS = 1024
COUNT_LIMIT = 10**18
FORMAT_VERSION = 1  # PRAGMA user_version of the schema.sql beside this file

NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
NAME_LIMIT = 255
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
BYTE_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.IGNORECASE)
CONTENT_RANGE = re.compile(r"([0-9]+)-([0-9]+)")

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
    ROUTE_UNKNOWN = 404, "UNSUPPORTED", "no such endpoint"
    METHOD_UNKNOWN = 405, "UNSUPPORTED", "the endpoint does not know this method"
    STILL_NEEDED = 405, "DENIED", "still needed by a manifest of the repository; delete that first"
    UPLOAD_BUSY = 416, "BLOB_UPLOAD_INVALID", "another request is writing to this upload session"
    UPLOAD_RANGE = 416, "BLOB_UPLOAD_INVALID", "the range does not continue the upload"
    CONTENT_RANGE = 416, "SIZE_INVALID", "the range lies outside the content"
    MANIFEST_TOO_LARGE = 413, "SIZE_INVALID", f"manifest larger than {MANIFEST_LIMIT // MIB} MiB"
    TOO_MANY_TAGS = 414, "UNSUPPORTED", f"more than {TAG_PARAMETER_LIMIT} tags in one request"
    URI_TOO_LONG = 414, "UNSUPPORTED", f"request line longer than {REQUEST_LINE_LIMIT // KIB} KiB"
    EXPECTATION_FAILED = 417, "UNSUPPORTED", "the only expectation served is 100-continue"
    HEAD_TOO_LARGE = 431, "UNSUPPORTED", f"more than {HEADER_COUNT_LIMIT} headers, or {HEAD_LIMIT // KIB} KiB"
    INTERNAL = 500, "UNSUPPORTED", "internal error; the registry's log says more"
    OVERLOADED = 503, "TOOMANYREQUESTS", "too many connections; try again"
    HTTP_VERSION = 505, "UNSUPPORTED", "only HTTP/1.1 and HTTP/1.0 are spoken here"
    STORAGE_FULL = 507, "DENIED", "the registry's disk is full"

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
    if text not in ("sha256", "sha512"):
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

    @property
    def references(self) -> tuple[str, ...]:
        """Every digest that this manifest keeps alive, each once."""
        return tuple(dict.fromkeys(self.required + self.optional))


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


def sync_directory(path: str) -> None:
    """Make the names in a directory durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class UploadFile:
    """A file under uploads/ that this thread alone may write to, hashed as it grows.

    The lock is the file's own (flock), so it holds between processes and ends with them.
    """

    def __init__(self, path: str, algorithm: str, *, create: bool) -> None:
        """Raises FileNotFoundError when there is none to open, UPLOAD_BUSY when another has it."""
        self.path = path
        self.id = os.path.basename(path)
        self._file: BinaryIO = open(path, "xb+" if create else "rb+", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            self.size = self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise
        self._hash = hashlib.new(algorithm)
        self._hashed = 0

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RegistryError(ErrorCode.UPLOAD_BUSY) from None
        if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
            raise FileNotFoundError(self.path)  # what was opened became a blob before it was locked

    def append(self, readinto: Callable[[memoryview], int], size_hint: int = BUFFER_SIZE) -> int:
        """Append all that readinto gives until it gives nothing, and return how many bytes that was.

        What was received before an exception stays in the file.
        """
        self._catch_up()
        start = self.size
        buffer = memoryview(bytearray(max(1, min(size_hint, BUFFER_SIZE))))
        while count := readinto(buffer):
            self._write(buffer[:count])
        return self.size - start

    def _write(self, data: memoryview) -> None:
        self._hash.update(data)
        self._hashed += len(data)
        while data:
            written = self._file.write(data) or 0
            self.size += written
            data = data[written:]

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

    def close(self) -> None:
        """Release the lock; the file stays where it is."""
        self._file.close()


class Files:
    """The content-addressed files of one data directory, and those under upload beside them."""

    def __init__(self, root: str, *, durable: bool) -> None:
        """durable: whether bytes and names are forced to the disk before they count."""
        self.root = root
        self.durable = durable
        for directory in ("blobs/sha256", "blobs/sha512", "uploads"):
            os.makedirs(os.path.join(root, directory), exist_ok=True)

    def path(self, digest: str) -> str:
        """Where the content with this digest is, or would be."""
        algorithm, _, value = digest.partition(":")
        return f"{self.root}/blobs/{algorithm}/{value}"

    def open(self, digest: str, size: int) -> BinaryIO | None:
        """The content, open for reading; None when it is missing or not of this size."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(self.path(digest), flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return None
            raise
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            return None
        return open(descriptor, "rb", buffering=0)

    def place(self, upload: UploadFile, digest: str) -> None:
        """Move an upload whose bytes are durable to its digest's name, and make that durable.

        A file that is there already is replaced by its equal, which mends a damaged one.
        """
        target = self.path(digest)
        os.replace(upload.path, target)
        if self.durable:
            sync_directory(os.path.dirname(target))

    def remove(self, digest: str) -> None:
        """Remove the content; no error if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(digest))

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


class Store:
    """Repositories on disk: what clients push, and what they may pull.

    All methods may be called from any thread, and several processes may have stores on one data
    directory. Errors of the caller's making are RegistryErrors; the rest are OSError and sqlite3.Error.
    """

    def __init__(self, root: str | os.PathLike[str], *, sparse: bool = False, durable: bool = True) -> None:
        """Open a data directory, made if missing. Raises StartupError when that cannot be.

        sparse: accept manifests whose layers, and indexes whose children, are absent.
        durable: what was acknowledged survives a power cut.
        """
        self.sparse = sparse
        self.files = Files(os.fspath(root), durable=durable)
        self._path = os.path.join(self.files.root, "registry.db")
        self._cache = ContentCache(CACHE_SIZE)
        self._hashes: dict[str, tuple[Any, int]] = {}  # running hashes of sessions between requests
        self._readers: list[sqlite3.Connection] = []  # idle connections; a stack, so that few stay warm
        self._write_lock = threading.Lock()
        self._writer = self._connect()
        try:
            self._prepare()
        except BaseException:
            self._writer.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=DATABASE_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA synchronous = {'FULL' if self.files.durable else 'OFF'}")
        return connection

    def _prepare(self) -> None:
        """Bring the database to the format of schema.sql, or refuse one from a newer registry."""
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version > FORMAT_VERSION:
            raise StartupError(
                f"{self._path} has format {version}, and this registry.py knows {FORMAT_VERSION}: "
                "run the newer registry.py that made it"
            )
        self._writer.execute("PRAGMA journal_mode = WAL")
        if version < FORMAT_VERSION:
            schema = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
            self._writer.executescript(f"BEGIN IMMEDIATE;\n{schema}\nCOMMIT;")

    def close(self) -> None:
        """Close the database. No other method may be running or be called again."""
        for connection in (*self._readers, self._writer):
            connection.close()

    # --- SQL

    def _read(self, sql: str, *parameters: object) -> list[Any]:
        """The rows of one query, from a pooled connection."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self._connect()
        try:
            return connection.execute(sql, parameters).fetchall()
        finally:
            self._readers.append(connection)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """SQLite's write lock, held against other threads and processes alike; commits on the way out."""
        with self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def _require_repository(self, name: str) -> int:
        """A repository's id. Raises NAME_UNKNOWN."""
        rows = self._read("SELECT id FROM repositories WHERE name = ?", name)
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
            "INSERT OR IGNORE INTO repository_blobs (repository_id, digest) VALUES (?, ?)",
            (repository, digest),
        )
        return int(repository)

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
        self._cache.put(descriptor.digest, content)
        return content

    def blob(self, name: str, digest: str) -> Descriptor:
        """A blob that the repository is linked to. Raises BLOB_UNKNOWN."""
        rows = self._read(
            "SELECT b.size FROM repositories r"
            " JOIN repository_blobs l ON l.repository_id = r.id JOIN blobs b ON b.digest = l.digest"
            " WHERE r.name = ? AND l.digest = ?",
            name,
            digest,
        )
        if not rows:
            raise RegistryError(ErrorCode.BLOB_UNKNOWN, digest)
        return Descriptor(OCTET_STREAM, digest, rows[0][0])

    def delete_blob(self, name: str, digest: str) -> None:
        """Unlink a blob from a repository; its file goes with its last link.

        Raises BLOB_UNKNOWN, or STILL_NEEDED while a manifest of the repository needs it or is it.
        """
        with self._transaction() as db:
            rows = db.execute(
                "SELECT l.repository_id, l.needed_by OR EXISTS (SELECT 1 FROM manifests m"
                "   WHERE m.repository_id = l.repository_id AND m.digest = l.digest)"
                " FROM repositories r JOIN repository_blobs l ON l.repository_id = r.id"
                " WHERE r.name = ? AND l.digest = ?",
                (name, digest),
            ).fetchall()
            if not rows:
                raise RegistryError(ErrorCode.BLOB_UNKNOWN, digest)
            ((repository, needed),) = rows
            if needed:
                raise RegistryError(ErrorCode.STILL_NEEDED, digest)
            self._unlink(db, repository, digest)
        self._remove_unlinked(digest)

    @staticmethod
    def _unlink(db: sqlite3.Connection, repository: int, digest: str) -> None:
        """Drop a link and all that hangs on it, a blob's row with its last link, and an empty repository."""
        db.execute(
            "DELETE FROM repository_blobs WHERE repository_id = ? AND digest = ?", (repository, digest)
        )
        db.execute(
            "DELETE FROM blobs WHERE digest = ?1"
            " AND NOT EXISTS (SELECT 1 FROM repository_blobs WHERE digest = ?1)",
            (digest,),
        )
        db.execute(
            "DELETE FROM repositories WHERE id = ?1"
            " AND NOT EXISTS (SELECT 1 FROM repository_blobs WHERE repository_id = ?1)",
            (repository,),
        )

    def _remove_unlinked(self, digest: str) -> None:
        """Remove a content's file unless it has a row: a push may have brought it back meanwhile."""
        with self._transaction() as db:
            if not db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchall():
                self._cache.forget(digest)
                self.files.remove(digest)

    def mount(self, name: str, digest: str, source: str) -> bool:
        """Link a blob of another repository to this one; False when the source does not have it."""
        try:
            descriptor = self.blob(source, digest)
        except RegistryError:
            return False
        with self._transaction() as db:
            if not self._is_linked(db, source, digest):
                return False
            self._link(db, name, digest, descriptor.size)
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
        rows = self._read(
            "SELECT r.name FROM repository_blobs l JOIN repositories r ON r.id = l.repository_id"
            " WHERE l.digest = ? ORDER BY r.name",
            digest,
        )
        return [name for (name,) in rows]

    # --- Uploads

    @contextlib.contextmanager
    def new_upload(self, algorithm: str) -> Iterator[UploadFile]:
        """A file to receive one content at once; gone afterwards unless it was made a blob."""
        path = self.files.upload_path(secrets.token_hex(16))
        upload = UploadFile(path, algorithm, create=True)
        try:
            yield upload
        finally:
            upload.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def start_session(self, name: str, algorithm: str) -> str:
        """Open an upload session of a repository, empty, and return its id."""
        session = secrets.token_hex(16)
        upload = UploadFile(self.files.upload_path(session), algorithm, create=True)
        try:
            with self._transaction() as db:
                db.execute("INSERT INTO uploads VALUES (?, ?, ?)", (session, name, algorithm))
        finally:
            upload.close()
        return session

    @contextlib.contextmanager
    def session(self, name: str, session: str) -> Iterator[UploadFile]:
        """An upload session to write to. Raises BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY."""
        upload = self._open_session(session, self._session_algorithm(name, session))
        upload.resume_hash(self._hashes.pop(session, None))
        try:
            yield upload
        finally:
            if os.path.exists(upload.path):
                self._hashes[session] = upload.hash_state()
            upload.close()

    def _open_session(self, session: str, algorithm: str) -> UploadFile:
        try:
            return UploadFile(self.files.upload_path(session), algorithm, create=False)
        except FileNotFoundError:
            raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session) from None

    def _session_algorithm(self, name: str, session: str) -> str:
        rows = self._read("SELECT algorithm FROM uploads WHERE id = ? AND repository = ?", session, name)
        if not rows:
            raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session)
        return str(rows[0][0])

    def session_size(self, name: str, session: str) -> int:
        """How many bytes an upload session has, also while they are coming. Raises BLOB_UPLOAD_UNKNOWN."""
        self._session_algorithm(name, session)
        try:
            return os.stat(self.files.upload_path(session)).st_size
        except FileNotFoundError:
            raise RegistryError(ErrorCode.BLOB_UPLOAD_UNKNOWN, session) from None

    def cancel_session(self, name: str, session: str) -> None:
        """End an upload session and drop its bytes. Raises BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY."""
        with self.session(name, session) as upload:
            self._discard(upload)

    def _discard(self, upload: UploadFile) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM uploads WHERE id = ?", (upload.id,))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(upload.path)

    def finish_upload(self, name: str, upload: UploadFile, digest: str) -> None:
        """Make an upload the repository's blob of this digest, durably.

        Raises DIGEST_INVALID, and drops the upload, when its bytes have another digest.
        """
        self._seal(upload, digest)
        with self._transaction() as db:
            self.files.place(upload, digest)
            self._link(db, name, digest, upload.size)
            db.execute("DELETE FROM uploads WHERE id = ?", (upload.id,))

    def _seal(self, upload: UploadFile, digest: str) -> None:
        """Check an upload's bytes against their digest and make them durable."""
        actual = upload.digest(algorithm_of(digest))
        if actual != digest:
            self._discard(upload)
            raise RegistryError(ErrorCode.DIGEST_INVALID, f"content is {actual}, not {digest}")
        if self.files.durable:
            upload.sync()

    def expire_uploads(self, lifetime: float = UPLOAD_LIFETIME) -> int:
        """Drop upload sessions idle for so many seconds, and files that a crash left without a session.

        Returns how many there were. An upload that is being written to is left alone.
        """
        oldest = time.time() - lifetime
        sessions = {session for (session,) in self._read("SELECT id FROM uploads")}
        entries = {entry.name: entry for entry in self.files.uploads()}
        stale = [name for name in sessions if name not in entries or _is_older(entries[name], oldest)]
        stale += [name for name in entries if name not in sessions]
        return sum(self._expire(name) for name in stale)

    def _expire(self, session: str) -> bool:
        try:
            upload = self._open_session(session, "sha256")
        except RegistryError as error:
            if error.code is ErrorCode.UPLOAD_BUSY:
                return False
            with self._transaction() as db:
                db.execute("DELETE FROM uploads WHERE id = ?", (session,))
            return True
        self._hashes.pop(session, None)
        self._discard(upload)
        upload.close()
        return True

    # --- Manifests

    def manifest(self, name: str, reference: str) -> Descriptor:
        """A manifest by tag or digest. Raises MANIFEST_UNKNOWN, NAME_UNKNOWN."""
        if is_digest(reference):
            source, column = "manifests m", "m.digest"
        else:
            source = "tags t JOIN manifests m ON m.repository_id = t.repository_id AND m.digest = t.digest"
            column = "t.name"
        alias = column[0]
        rows = self._read(
            f"SELECT m.media_type, m.digest, b.size FROM {source} JOIN blobs b ON b.digest = m.digest"
            f" WHERE {alias}.repository_id = (SELECT id FROM repositories WHERE name = ?) AND {column} = ?",
            name,
            reference,
        )
        if not rows:
            self._require_repository(name)
            raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {reference}")
        return Descriptor(*rows[0])

    def put_manifest(
        self, name: str, manifest: Manifest, content: bytes, digest: str, tags: Iterable[str]
    ) -> None:
        """Store a parsed manifest under its digest, durably, and point tags at it.

        Raises DIGEST_INVALID, and MANIFEST_BLOB_UNKNOWN with each digest that is required and absent.
        """
        with self.new_upload(algorithm_of(digest)) as upload:
            upload.append(io.BytesIO(content).readinto, len(content))
            self._seal(upload, digest)
            with self._transaction() as db:
                self._require_references(db, name, manifest)
                self.files.place(upload, digest)
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
            raise RegistryError(ErrorCode.MANIFEST_BLOB_UNKNOWN, *missing)

    @staticmethod
    def _record_manifest(db: sqlite3.Connection, repository: int, digest: str, manifest: Manifest) -> None:
        """Pushed again, a manifest whose body names no media type may bring another one."""
        annotations = json.dumps(manifest.annotations) if manifest.annotations else None
        db.execute(
            "INSERT INTO manifests VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (repository_id, digest) DO UPDATE SET media_type = excluded.media_type",
            (
                repository,
                digest,
                manifest.media_type,
                manifest.artifact_type,
                manifest.subject,
                annotations,
            ),
        )
        db.executemany(
            "INSERT OR IGNORE INTO manifest_references VALUES (?, ?, ?)",
            [(repository, digest, child) for child in manifest.references],
        )

    def delete_tag(self, name: str, tag: str) -> None:
        """Remove a tag and nothing else. Raises MANIFEST_UNKNOWN, NAME_UNKNOWN."""
        repository = self._require_repository(name)
        with self._transaction() as db:
            deleted = db.execute("DELETE FROM tags WHERE repository_id = ? AND name = ?", (repository, tag))
            if not deleted.rowcount:
                raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {tag}")

    def delete_manifest(self, name: str, digest: str) -> None:
        """Remove a manifest and its tags. Raises MANIFEST_UNKNOWN, NAME_UNKNOWN, STILL_NEEDED."""
        repository = self._require_repository(name)
        with self._transaction() as db:
            rows = db.execute(
                "SELECT l.needed_by FROM manifests m JOIN repository_blobs l USING (repository_id, digest)"
                " WHERE m.repository_id = ? AND m.digest = ?",
                (repository, digest),
            ).fetchall()
            if not rows:
                raise RegistryError(ErrorCode.MANIFEST_UNKNOWN, f"{name} {digest}")
            if rows[0][0]:
                raise RegistryError(ErrorCode.STILL_NEEDED, digest)
            self._unlink(db, repository, digest)
        self._remove_unlinked(digest)

    # --- Listings

    def tags(self, name: str, last: str, limit: int) -> list[str]:
        """Up to so many tags after one, in byte order. Raises NAME_UNKNOWN."""
        repository = self._require_repository(name)
        sql = "SELECT name FROM tags WHERE repository_id = ? AND name > ? ORDER BY name LIMIT ?"
        return [tag for (tag,) in self._read(sql, repository, last, limit)]

    def repositories(self, last: str, limit: int) -> list[str]:
        """Up to so many repositories after one, in byte order."""
        sql = "SELECT name FROM repositories WHERE name > ? ORDER BY name LIMIT ?"
        return [name for (name,) in self._read(sql, last, limit)]

    def referrers(
        self, name: str, subject: str, artifact_type: str | None, last: str, limit: int
    ) -> list[Referrer]:
        """Up to so many manifests that refer to a subject, after one, by digest; the subject may be absent.

        What clients without the referrers API listed in the index tagged <algorithm>-<hex> counts too.
        """
        rows = self._read(
            "WITH repository (id) AS (SELECT id FROM repositories WHERE name = ?1), referrers (digest) AS ("
            " SELECT m.digest FROM repository r JOIN manifests m ON m.repository_id = r.id AND m.subject = ?2"
            " UNION SELECT c.child FROM repository r"
            " JOIN tags t ON t.repository_id = r.id AND t.name = ?3"
            " JOIN manifest_references c ON c.repository_id = r.id AND c.manifest = t.digest)"
            " SELECT m.media_type, m.digest, b.size, m.artifact_type, m.annotations FROM repository r"
            " JOIN referrers JOIN manifests m ON m.repository_id = r.id AND m.digest = referrers.digest"
            " JOIN blobs b ON b.digest = m.digest"
            " WHERE m.digest > ?4 AND (?5 IS NULL OR m.artifact_type = ?5) ORDER BY m.digest LIMIT ?6",
            name,
            subject,
            subject.replace(":", "-"),
            last,
            artifact_type,
            limit,
        )
        return [Referrer(Descriptor(*row[:3]), row[3], row[4] or "{}") for row in rows]


def _is_older(entry: os.DirEntry[str], moment: float) -> bool:
    try:
        return entry.stat(follow_symlinks=False).st_mtime < moment
    except FileNotFoundError:
        return True


# === Messages =========================================================================================


class FileRange(NamedTuple):
    """Some bytes of an open file; whoever has sent the reply closes it."""

    file: BinaryIO
    start: int
    length: int


def set_timeout(connection: socket.socket, direction: str, seconds: float) -> None:
    """Bound how long one receive ("RCV") or send ("SND") may wait.

    In the kernel where that works: settimeout, which bounds both, costs a poll for each call.
    """
    if os.name == "posix" and connection.gettimeout() is None:
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


class Wire:
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
            while head.startswith(b"\r\n"):  # RFC 9112, 2.2: some clients end a body with one too many
                head = head[2:]
            end = head.find(b"\r\n\r\n")
            if end >= 0:
                break
            if _is_hopeless(head):
                return head
            if head and not deadline:
                deadline = time.monotonic() + HEADER_TIMEOUT
            more = self._receive(deadline - time.monotonic() if head else IDLE_TIMEOUT)
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

    def send(self, data: bytes, *, more: bool = False) -> None:
        """Send all of this; more: something follows at once and may go into the same packet."""
        flags = getattr(socket, "MSG_MORE", 0) if more else 0
        try:
            for start in range(0, len(data), BUFFER_SIZE):  # each piece gets a timeout of its own
                self.socket.sendall(data[start : start + BUFFER_SIZE], flags)
        except OSError as error:
            raise ClientGone from error

    def send_file(self, part: FileRange) -> None:
        """Send some bytes of a file, from kernel to kernel where that works."""
        start, stop = part.start, part.start + part.length
        try:
            if not hasattr(os, "sendfile"):
                start += self.socket.sendfile(part.file, start, part.length)
            while start < stop:
                sent = os.sendfile(self.socket.fileno(), part.file.fileno(), start, stop - start)
                if not sent:
                    raise ClientGone("the file is shorter than it was")
                start += sent
        except OSError as error:
            raise ClientGone from error

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


class Head(NamedTuple):
    """A request's head (RFC 9112), checked. Header names are in lower case, repeated ones comma-joined."""

    method: str
    target: str
    version: str  # "HTTP/1.1" or "HTTP/1.0"
    headers: dict[str, str]


SINGLE_HEADERS = frozenset(("content-length", "transfer-encoding", "host", "content-range", "authorization"))


def parse_head(data: bytes) -> Head:
    """Parse what Wire.read_head gave. Raises BAD_REQUEST, URI_TOO_LONG, HEAD_TOO_LARGE, HTTP_VERSION."""
    lines = data.decode("latin-1").split("\r\n")
    if len(lines[0]) > REQUEST_LINE_LIMIT:
        raise RegistryError(ErrorCode.URI_TOO_LONG)
    if len(lines) > HEADER_COUNT_LIMIT + 1 or len(data) > HEAD_LIMIT:
        raise RegistryError(ErrorCode.HEAD_TOO_LARGE)
    if data.count(b"\n") != len(lines) - 1 or data.count(b"\r") != len(lines) - 1 or b"\0" in data:
        raise RegistryError(ErrorCode.BAD_REQUEST, "bare CR, bare LF or NUL")
    method, target, version = _parse_request_line(lines[0])
    headers = _parse_headers(lines[1:])
    if version == "HTTP/1.1" and "host" not in headers:
        raise RegistryError(ErrorCode.BAD_REQUEST, "no Host")
    return Head(method, target, version, headers)


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


def body_length(head: Head) -> int | None:
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

    def __init__(self, wire: Wire, length: int | None, *, expected: bool) -> None:
        """length: None for a chunked body. expected: the client waits for 100 Continue before it sends."""
        self.length = length
        self._wire = wire
        self._remaining = length or 0  # of the body, or of the chunk being read
        self._expected = expected and length != 0
        self._broken = False
        self.done = length == 0

    def readinto(self, view: memoryview) -> int:
        """Fill some of a buffer; 0 at the body's end. Raises ClientGone, and BAD_REQUEST for bad chunks."""
        if self._expected:
            self._expected = False
            self._wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._remaining and not self.done:
            self._next_chunk()
        if self.done:
            return 0
        count = self._wire.readinto(view[: self._remaining])
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
        line = self._wire.read_line(CHUNK_LINE_LIMIT)
        if line is None:
            raise self._malformed("bad line between chunks")
        return line

    def _skip_trailers(self) -> None:
        for _ in range(HEADER_COUNT_LIMIT):
            line = self._read_line()
            if not line:
                return
            name, colon, _value = line.decode("latin-1").partition(":")
            if not colon or not HEADER_NAME.fullmatch(name):
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


class Request:
    """One request as the handlers see it."""

    def __init__(self, store: Store, wire: Wire) -> None:
        """A request of which nothing is known yet."""
        self.store = store
        self._wire = wire
        self.method = self.target = "-"
        self.path = self._query = ""
        self.headers: dict[str, str] = {}
        self.body = Body(wire, 0, expected=False)
        self.persistent = False  # whether the client may send another after this one

    def parse(self, data: bytes) -> None:
        """Take in a head. Raises parse_head's errors and more, keeping what was understood till then."""
        self.method, self.target, version, self.headers = head = parse_head(data)
        self.path, self._query = split_target(self.target)
        length = body_length(head)
        expectation = self.headers.get("expect", "").lower()
        if expectation not in ("", "100-continue"):
            raise RegistryError(ErrorCode.EXPECTATION_FAILED)
        modern = version == "HTTP/1.1"
        self.body = Body(self._wire, length, expected=bool(expectation) and modern)
        self.persistent = modern and "close" not in self.headers.get("connection", "").lower()

    def parameters(self, name: str) -> list[str]:
        """Every value that the query gives a parameter. A plus sign is itself, as in media types."""
        pairs = (pair.partition("=") for pair in self._query.split("&")) if self._query else ()
        return [decode_percent(value) for key, _, value in pairs if decode_percent(key) == name]

    def parameter(self, name: str) -> str | None:
        """A parameter's first value, or None."""
        return next(iter(self.parameters(name)), None) if self._query else None


def split_target(target: str) -> tuple[str, str]:
    """A request target's path, decoded, and its query, as it is. Raises BAD_REQUEST."""
    if target.startswith(("http://", "https://")):  # absolute-form, RFC 9112, 3.2.2
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
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

    Raises CONTENT_RANGE for a range that lies outside (RFC 9110, 14). Several ranges are ignored.
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
        raise RegistryError(ErrorCode.CONTENT_RANGE, text, headers=(("Content-Range", f"bytes */{size}"),))
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
    """The part of a content that the client asks for, if any. Raises CONTENT_RANGE."""
    text = request.headers.get("range")
    if text is None or request.headers.get("if-range", f'"{content.digest}"') != f'"{content.digest}"':
        return None
    return parse_range(text, content.size)


def blob_location(name: str, digest: str) -> Headers:
    """The headers of a reply to a blob that is now there."""
    return ("Location", f"/v2/{name}/blobs/{digest}"), ("Docker-Content-Digest", digest)


def blob_get(request: Request, name: str, digest: str) -> Reply:
    """Pull a blob (end-2)."""
    return content_reply(request, request.store.blob(name, parse_digest(digest)), ErrorCode.BLOB_UNKNOWN)


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
    """Mount a blob from the repository that the query names, or from any."""
    source = request.parameter("from")
    sources = request.store.repositories_with(digest) if source is None else [source]
    return any(request.store.mount(name, digest, candidate) for candidate in sources)


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
    hint = BUFFER_SIZE if request.body.length is None else request.body.length
    if upload.append(request.body.readinto, hint) != length is not None:
        upload.truncate(start)
        raise RegistryError(ErrorCode.SIZE_INVALID, "the body is not as long as its Content-Range")


def check_content_range(request: Request, upload: UploadFile) -> int | None:
    """The length that Content-Range declares, if there is one. Raises UPLOAD_RANGE, SIZE_INVALID."""
    text = request.headers.get("content-range")
    if text is None:
        return None
    match = CONTENT_RANGE.fullmatch(text)
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
    return content_reply(request, request.store.manifest(name, reference), ErrorCode.MANIFEST_UNKNOWN)


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
    """List repositories; not in the specification, and every client knows it."""
    return listing_reply(request, {}, "repositories", request.store.repositories)


def referrer_list(request: Request, name: str, digest: str) -> Reply:
    """List what refers to a manifest (end-12a, end-12b)."""
    subject, artifact_type = parse_digest(digest), request.parameter("artifactType") or None
    last = request.parameter("last") or ""
    referrers = request.store.referrers(name, subject, artifact_type, last, REFERRER_PAGE_LIMIT + 1)
    page = referrer_page(referrers)
    headers = [("OCI-Filters-Applied", "artifactType")] if artifact_type else []
    if len(page) < len(referrers):
        headers.append(page_link(request.path, artifactType=artifact_type, last=page[-1]["digest"]))
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": page}
    return json_reply(index, *headers, content_type=OCI_INDEX)


def referrer_page(referrers: list[Referrer]) -> list[dict[str, Any]]:
    """Descriptors for as many referrers as fit into one page, at least one."""
    page: list[dict[str, Any]] = []
    room = REFERRER_PAGE_BYTES
    for (media_type, digest, size), artifact_type, notes in referrers[:REFERRER_PAGE_LIMIT]:
        room -= len(notes)
        if room < 0 and page:
            break
        descriptor: dict[str, Any] = {"mediaType": media_type, "digest": digest, "size": size}
        if artifact_type:
            descriptor["artifactType"] = artifact_type
        if notes != "{}":
            descriptor["annotations"] = json.loads(notes)
        page.append(descriptor)
    return page


# === Routes ===========================================================================================


class Route(NamedTuple):
    """An operation: GET serves HEAD too. Each <part> of the path is an argument of the handler."""

    method: str
    path: str
    handler: Callable[..., Reply]


ROUTES = (
    Route("GET", "/v2/", version_get),
    Route("GET", "/v2/_catalog", repository_list),
    Route("GET", "/v2/<name>/tags/list", tag_list),
    Route("GET", "/v2/<name>/manifests/<reference>", manifest_get),
    Route("PUT", "/v2/<name>/manifests/<reference>", manifest_put),
    Route("DELETE", "/v2/<name>/manifests/<reference>", manifest_delete),
    Route("GET", "/v2/<name>/referrers/<digest>", referrer_list),
    Route("POST", "/v2/<name>/blobs/uploads/", upload_start),
    Route("GET", "/v2/<name>/blobs/uploads/<session>", upload_status),
    Route("PATCH", "/v2/<name>/blobs/uploads/<session>", upload_append),
    Route("PUT", "/v2/<name>/blobs/uploads/<session>", upload_finish),
    Route("DELETE", "/v2/<name>/blobs/uploads/<session>", upload_cancel),
    Route("GET", "/v2/<name>/blobs/<digest>", blob_get),
    Route("DELETE", "/v2/<name>/blobs/<digest>", blob_delete),
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
    """The operations on a path by method, and the parts that it names. Raises ROUTE_UNKNOWN."""
    for pattern, methods in _COMPILED_ROUTES:
        match = pattern.fullmatch(path)
        if match:
            return methods, match.groupdict()
    raise RegistryError(ErrorCode.ROUTE_UNKNOWN)


@functools.lru_cache(maxsize=4096)
def is_name(name: str) -> bool:
    """Whether this is a legal repository name (specification, "Pulling manifests")."""
    return len(name) <= NAME_LIMIT and NAME.fullmatch(name) is not None


def dispatch(request: Request) -> Reply:
    """Run the operation that a request asks for. Raises whatever keeps it from being answered."""
    methods, arguments = find_path(request.path)
    route = methods.get(request.method)
    if route is None:
        raise RegistryError(ErrorCode.METHOD_UNKNOWN, headers=(("Allow", ", ".join(sorted(methods))),))
    if "name" in arguments and not is_name(arguments["name"]):
        writes = request.method in ("POST", "PUT", "PATCH")
        raise RegistryError(ErrorCode.NAME_INVALID if writes else ErrorCode.NAME_UNKNOWN, arguments["name"])
    return route.handler(request, **arguments)


def error_reply(error: Exception) -> Reply:
    """The one place that turns an exception into a reply; what is nobody's fault but ours is logged."""
    if not isinstance(error, RegistryError):
        error = _translate(error)
    headers = (("Content-Type", JSON), *error.headers)
    return Reply(error.code.status, headers, error.document())


def _translate(error: Exception) -> RegistryError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    if full or (isinstance(error, sqlite3.OperationalError) and "is full" in str(error)):
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
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wire = Wire(self.request)
        self.idle = True
        self.server.opened(self)

    def handle(self) -> None:
        """Called by socketserver; returns when the connection is to be closed."""
        with contextlib.suppress(ClientGone):
            while self._serve_one():
                pass

    def finish(self) -> None:
        """Called by socketserver after handle, also when that failed."""
        self.server.closed(self)

    def hang_up(self) -> None:
        """Make this connection's thread come to its end; for other threads to call."""
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)

    def _serve_one(self) -> bool:
        """Serve one request; whether another may follow on this connection."""
        data = self.wire.read_head()
        if not data:
            return False
        self.idle, started = False, time.perf_counter()
        request, reply = Request(self.server.store, self.wire), Reply(CLIENT_GONE)
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
        self.idle = True
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
            self.wire.send(head)
        elif isinstance(reply.body, bytes):
            self.wire.send(head + reply.body)
        else:
            self.wire.send(head, more=True)
            self.wire.send_file(reply.body)

    def _linger(self) -> None:
        """Let the client read the reply first: closing on unread bytes would reset it (RFC 9112, 9.6)."""
        deadline = time.monotonic() + LINGER_TIMEOUT
        buffer = bytearray(RECEIVE_SIZE)
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.wire.wait_at_most(left)
                if not self.request.recv_into(buffer):
                    break

    def _log(self, request: Request, reply: Reply, started: float) -> None:
        if self.server.log is None:
            return
        moment, client = time.strftime("%Y-%m-%dT%H:%M:%S%z"), self.client_address[0]
        milliseconds = (time.perf_counter() - started) * 1000
        agent = json.dumps(request.headers.get("user-agent", "-"))  # quoted, so that it stays one field
        self.server.log(
            f"{moment} {client} {request.method} {request.target} {reply.status} {reply.length}"
            f" {milliseconds:.1f}ms {agent}"
        )


class Server(ThreadingHTTPServer):
    """Accepts connections, each served by a Connection in a thread, until it is told to stop."""

    daemon_threads = True
    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two servers share a port

    def __init__(
        self, address: tuple[str, int], store: Store, log: Callable[[str], None] | None = None
    ) -> None:
        """Bind and listen. log takes one access-log line for each request. Raises OSError."""
        self.store = store
        self.log = log
        self.stopping = False
        self._connections: dict[Connection, threading.Thread] = {}
        self._idle = threading.Condition()  # notified when a connection closes
        self._waker, self._wakee = socket.socketpair()
        family, _, _, _, resolved = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        try:
            super().__init__((str(resolved[0]), int(resolved[1])), Connection)
        except BaseException:
            self._waker.close()
            self._wakee.close()
            raise
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse lookup of the name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept connections until stop_accepting; nothing is polled."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._wakee, selectors.EVENT_READ)
            while not self.stopping:
                selector.select()
                self._accept()

    def _accept(self) -> None:
        try:
            connection, address = self.get_request()
        except OSError:
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
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        for connection in list(self._connections):
            if connection.idle:
                connection.hang_up()
                return True
        with contextlib.suppress(OSError):
            reply = error_reply(RegistryError(ErrorCode.OVERLOADED))
            request.send(encode_head(reply, keep=False) + bytes(reply.body))  # type: ignore[arg-type]
        return False

    def opened(self, connection: Connection) -> None:
        """A connection's thread has begun."""
        self._connections[connection] = threading.current_thread()

    def closed(self, connection: Connection) -> None:
        """A connection's thread is about to end."""
        with self._idle:
            self._connections.pop(connection, None)
            self._idle.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An exception that no reply could be made of: log it, and go on serving."""
        traceback.print_exc()

    def stop_accepting(self) -> None:
        """Make serve_forever return; safe in a signal handler."""
        self.stopping = True
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def finish_requests(self, timeout: float) -> None:
        """Hang up on idle clients, wait for requests in flight, then hang up on those too."""
        deadline = time.monotonic() + timeout
        with self._idle:
            while self._connections and (left := deadline - time.monotonic()) > 0:
                for connection in list(self._connections):
                    if connection.idle:
                        connection.hang_up()
                self._idle.wait(min(left, 0.05))
        for connection, thread in list(self._connections.items()):
            connection.hang_up()
            thread.join(1.0)

    def server_close(self) -> None:
        """Free the port."""
        super().server_close()
        self._waker.close()
        self._wakee.close()


# === Embedding ========================================================================================


class Registry:
    """A registry in this process.

        with Registry() as registry:
            push_to(registry.url)

    Without a data directory it has a temporary one, removed at the end, and does not wait for the disk.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        sparse: bool = False,
        sync: bool | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """port: 0 for a free one. sync: whether acknowledged means durable; by default, if data is given.

        log takes one line for each request.
        """
        self._data = data
        self._address = host, port
        self._sparse = sparse
        self._sync = data is not None if sync is None else sync
        self._log = log
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

    def open(self) -> None:
        """Open the data directory and listen. Raises StartupError."""
        with contextlib.ExitStack() as resources:
            self.store = self._open_store(resources)
            resources.callback(self.store.close)
            self.server = self._open_server()
            resources.callback(self.server.server_close)
            self.store.expire_uploads()
            stop = threading.Event()
            housekeeper = threading.Thread(target=self._keep_house, args=(stop,), daemon=True)
            housekeeper.start()
            resources.callback(housekeeper.join)
            resources.callback(stop.set)
            self._resources = resources.pop_all()

    def _open_store(self, resources: contextlib.ExitStack) -> Store:
        data = self._data
        if data is None:
            data = tempfile.mkdtemp(prefix="registry-")
            resources.callback(shutil.rmtree, data, ignore_errors=True)
        try:
            return Store(data, sparse=self._sparse, durable=self._sync)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise StartupError(
                f"cannot use {os.fspath(data)} as data directory: {reason}; name one that you can write to"
            ) from error

    def _open_server(self) -> Server:
        host, port = self._address
        try:
            return Server(self._address, self.store, self._log)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StartupError(
                f"cannot listen on {host} port {port}: {reason}; choose another with --host or --port"
            ) from error

    def _keep_house(self, stop: threading.Event) -> None:
        while not stop.wait(HOUSEKEEPING_INTERVAL):
            try:
                self.store.expire_uploads()
            except (OSError, sqlite3.Error):
                traceback.print_exc()

    def serve(self) -> None:
        """Accept connections until stop; after open."""
        self.server.serve_forever()

    def close(self, timeout: float = 1.0) -> None:
        """Stop, giving requests in flight so many seconds, and free everything."""
        self.server.stop_accepting()
        self.server.finish_requests(timeout)
        self._resources.close()

    @property
    def host(self) -> str:
        """Host and port as an image reference begins with them: 127.0.0.1:5000."""
        host, port = self.server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    @property
    def url(self) -> str:
        """Where the registry answers: http://127.0.0.1:5000."""
        return f"http://{self.host}"


# === Command line =====================================================================================


def write_log(line: str) -> None:
    """Write one line to standard error. If nobody reads that any more, go on without."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")


def command_serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    raise_descriptor_limit()
    registry = Registry(
        options.data,
        host=options.host,
        port=options.port,
        sparse=options.sparse,
        sync=not options.no_sync,
        log=None if options.quiet else write_log,
    )
    registry.open()
    stop_on_signals(registry.server)
    print(f"Serving {options.data} at {registry.url}", flush=True)
    registry.serve()
    registry.close(STOP_TIMEOUT)


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system will: each connection takes one, and often a file with it."""
    if resource is None:
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stop_on_signals(server: Server) -> None:
    """Let the first SIGTERM or Ctrl-C end the server in good order, and a second one at once."""

    def stop(number: int, frame: object) -> None:
        if server.stopping:
            os._exit(128 + number)
        server.stop_accepting()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def parse_port(text: str) -> int:
    """A port number, 0 for a free one."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError(text)
    return port


def build_parser() -> argparse.ArgumentParser:
    """The command line: serving, and the other commands as subcommands beside it."""
    parser = argparse.ArgumentParser(
        prog="registry.py",
        description="A container registry. Without a command, it serves.",
        allow_abbrev=False,
    )
    parser.set_defaults(command=command_serve)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--data", default="./data", metavar="DIR", help="data directory (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=parse_port,
        default=5000,
        help="port to listen on, 0 for a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--sparse", action="store_true", help="accept manifests whose layers or children are absent"
    )
    parser.add_argument(
        "--no-sync",
        action="store_true",
        help="do not wait for the disk: faster, and a power cut may lose or damage what was pushed",
    )
    parser.add_argument("--quiet", action="store_true", help="no access log on standard error")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
    except StartupError as error:
        print(f"registry.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
