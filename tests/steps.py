"""The durable steps of the registry, seen from outside: every change of a file, a name or the database.

So are the beginnings of transactions, and replies: what came before one is done and not acknowledged.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple
from unittest import mock

import registry

KINDS = (
    "create write half-write truncate sync rename link unlink mkdir rmdir copy utime"
    " begin commit autocommit reply"
).split()
DATABASE = ("begin", "commit", "autocommit")  # steps at which SQLite may say that another has its lock


class Step(NamedTuple):
    """A step about to be taken. `target` is a descriptor for files that are open, else a path."""

    kind: str  # one of KINDS
    target: Any = None
    source: Any = None  # of a rename or link: the path that is there already
    database: sqlite3.Connection | None = None  # of a begin or commit; the transaction is still open


Observer = Callable[[Step], None]


@contextlib.contextmanager
def observed(observer: Observer, *, real_sync: bool = True) -> Iterator[None]:
    """Call the observer before each durable step; real_sync: whether fsync is more than such a call."""
    with contextlib.ExitStack() as stack:
        for name, kind in _ONE_PATH.items():
            _patch(stack, name, _before_path(observer, kind, getattr(os, name, None)))
        for name, kind in _TWO_PATHS.items():
            _patch(stack, name, _before_rename(observer, kind, getattr(os, name, None)))
        for name in ("fsync", "fdatasync"):
            sync = getattr(os, name, None) if real_sync else _do_nothing
            _patch(stack, name, _before_path(observer, "sync", sync))
        _patch(stack, "open", _before_os_open(observer))
        stack.enter_context(mock.patch.object(registry, "open", _before_open(observer), create=True))
        stack.enter_context(mock.patch.object(sqlite3, "connect", _before_commit(observer)))
        send = _before_path(observer, "reply", socket.socket.sendall)
        stack.enter_context(mock.patch.object(socket.socket, "sendall", send))
        yield


_ONE_PATH = {
    "unlink": "unlink",
    "remove": "unlink",
    "mkdir": "mkdir",
    "rmdir": "rmdir",
    "truncate": "truncate",
    "ftruncate": "truncate",
    "utime": "utime",
    "write": "write",
    "pwrite": "write",
    "writev": "write",
}
_TWO_PATHS = {"rename": "rename", "replace": "rename", "link": "link"}


def _patch(stack: contextlib.ExitStack, name: str, function: Any) -> None:
    if hasattr(os, name):
        stack.enter_context(mock.patch.object(os, name, function))


def _do_nothing(*_arguments: Any) -> None:
    pass


def _before_path(observer: Observer, kind: str, function: Any) -> Any:
    def step(target: Any, *arguments: Any, **options: Any) -> Any:
        observer(Step(kind, target))
        return function(target, *arguments, **options)

    return step


def _before_rename(observer: Observer, kind: str, function: Any) -> Any:
    def step(source: Any, target: Any, **options: Any) -> Any:
        observer(Step(kind, target, source))
        return function(source, target, **options)

    return step


def _before_os_open(observer: Observer) -> Any:
    original = os.open

    def step(path: Any, flags: int, *arguments: Any, **options: Any) -> Any:
        if flags & os.O_CREAT:
            observer(Step("create", path))
        return original(path, flags, *arguments, **options)

    return step


def _before_open(observer: Observer) -> Any:
    """An open() whose unbuffered files for writing are observed."""

    class ObservedFile(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            half = len(view) // 2
            observer(Step("write", self.fileno()))
            written = super().write(view[:half]) if half else 0
            observer(Step("half-write", self.fileno()))
            return written + (super().write(view[half:]) if written == half else 0)

        def truncate(self, size: int | None = None) -> int:
            observer(Step("truncate", self.fileno()))
            return super().truncate(size)

    def step(path: Any, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if mode.strip("bt") == "r":
            return builtins.open(path, mode, buffering, **options)
        if "b" not in mode or buffering != 0:
            raise AssertionError(f"{path} is written through a buffer, which hides its writes")
        if mode[0] in "wxa":
            observer(Step("create", path))
        return ObservedFile(path, mode.replace("b", ""))

    return step


_WRITING = re.compile(
    r"\s*(INSERT|UPDATE|DELETE|REPLACE|CREATE|DROP|ALTER|VACUUM|WITH|PRAGMA\s+(journal_mode|user_version)\s*=)",
    re.IGNORECASE,
)


def _before_commit(observer: Observer) -> Any:
    """A sqlite3.connect whose connections are observed when they begin to write, and commit."""
    connect = sqlite3.connect

    class ObservedConnection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> Any:
            self._observe(sql)
            return super().execute(sql, *parameters)

        def executemany(self, sql: str, *parameters: Any) -> Any:
            self._observe(sql)
            return super().executemany(sql, *parameters)

        def executescript(self, sql: str) -> Any:
            observer(Step("autocommit", database=self))
            return super().executescript(sql)

        def commit(self) -> None:
            observer(Step("commit", database=self))
            super().commit()

        def _observe(self, sql: str) -> None:
            if sql.strip().upper().startswith(("COMMIT", "END")):
                observer(Step("commit", database=self))
            elif re.match(r"\s*BEGIN\s+(IMMEDIATE|EXCLUSIVE)", sql, re.IGNORECASE):
                observer(Step("begin", database=self))
            elif not self.in_transaction and _WRITING.match(sql):
                observer(Step("autocommit", database=self))

    def step(*arguments: Any, **options: Any) -> Any:
        return connect(*arguments, **{"factory": ObservedConnection, **options})

    return step
