"""Collecting and verifying in process, and making what is in a data directory look old instead of waiting."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests.support import TIMEOUT

MINUTE, HOUR, DAY = 60, 3600, 24 * 3600


@contextlib.contextmanager
def opened(data: Path) -> Iterator[registry.Store]:
    """A store of this process on a data directory, whoever else has one. Does not wait for the disk."""
    with contextlib.closing(registry.Store(data, durable=False)) as store:
        yield store


def collect(
    store: registry.Store,
    *,
    dry_run: bool = False,
    walk: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    **policy: Any,
) -> list[tuple[str, str]]:
    """Collect garbage; the kind and digest of each thing that went, or would go."""
    removed: list[Any] = []
    collector = registry.Collector(store, registry.Policy(**policy), removed.append, stopped=stopped)
    collector.run(walk=walk, dry_run=dry_run)
    return sorted((removal.kind, removal.digest) for removal in removed)


@contextlib.contextmanager
def before_removing(arrive: Callable[[], Any]) -> Iterator[None]:
    """When a collection has chosen first what to remove, something happens before it does."""
    remove, arrived = registry.Collector._each, []

    def arrive_first(*arguments: Any) -> None:
        if not arrived:
            arrived.append(True)
            arrive()
        remove(*arguments)

    with mock.patch.object(registry.Collector, "_each", arrive_first):
        yield
    if not arrived:
        raise AssertionError("there was nothing to remove")


def verify(store: registry.Store, *, repair: bool = False, force: bool = False) -> list[tuple[str, str]]:
    """The kind and subject of each finding."""
    verifier = registry.Verifier(store, lambda *_: None)
    return sorted((finding.kind, finding.subject) for finding in verifier.run(repair=repair, force=force))


def change(data: Path, sql: str, *values: Any) -> None:
    """Change the registry's database behind its back, unheeding its triggers' and keys' wishes."""
    with contextlib.closing(sqlite3.connect(data / "registry.db", timeout=TIMEOUT)) as database, database:
        database.execute(sql, values)


def change_many(data: Path, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """The same for many rows."""
    with contextlib.closing(sqlite3.connect(data / "registry.db", timeout=TIMEOUT)) as database, database:
        database.executemany(sql, rows)


def leases_told(data: Path, ago: float, digest: str = "%") -> None:
    """Clients were told of all blobs, or of one, so many seconds earlier than they were."""
    change(data, "UPDATE repository_blobs SET leased_at = leased_at - ? WHERE digest LIKE ?", ago, digest)


def manifests_pushed(data: Path, ago: float, digest: str = "%") -> None:
    """All manifests, or one, were pushed and pulled so many seconds earlier than they were."""
    sql = "UPDATE manifests SET pushed_at = pushed_at - ?, pulled_at = pulled_at - ? WHERE digest LIKE ?"
    change(data, sql, ago, ago, digest)


def everything(data: Path, ago: float, digest: str = "%") -> None:
    """Everything, or all about one digest, happened so many seconds earlier."""
    leases_told(data, ago, digest)
    manifests_pushed(data, ago, digest)
