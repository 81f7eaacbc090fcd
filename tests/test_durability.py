"""A file is durable before its row exists and a row goes before its file; damaged files are not served."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import unittest
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests import scenarios, upkeep
from tests.credentials import users_line
from tests.scenarios import Actor, Ledger
from tests.steps import Step, observed
from tests.support import Client, HTTPTestCase, RegistryTestCase, digest_of, unique, with_digest


class Disk:
    """What a power cut would take: bytes and names that were not synced. Sees every step coming."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.database = root / "registry.db"
        self.kinds: Counter[str] = Counter()
        self.violations: list[str] = []
        self.removed: list[str] = []
        self._loose_bytes: set[int] = set()  # inodes with bytes or a length that were not synced
        self._loose_names: set[str] = set()  # directories with names that were not synced
        self._placed: dict[str, int] = {}  # the inodes of what came to blobs/, by path
        self._loose_log = False  # whether rows were committed and not synced
        self._rows: dict[str, int] = {}
        self._links: list[tuple[Any, ...]] = []
        if self.database.exists():
            with contextlib.closing(sqlite3.connect(self.database)) as database:
                self._rows, self._links = self._read(database)

    def __call__(self, step: Step) -> None:
        self.kinds[step.kind] += 1
        check = getattr(self, "_before_" + step.kind.replace("-", "_"), None)
        if check:
            check(step)

    def _before_write(self, step: Step) -> None:
        inode = os.stat(step.target).st_ino
        self._loose_bytes.add(inode)
        if inode in self._placed.values():
            self.violations.append(f"{step.kind} to what is a blob already")

    _before_half_write = _before_truncate = _before_write

    def _before_sync(self, step: Step) -> None:
        inode = os.stat(step.target).st_ino
        self._loose_bytes.discard(inode)
        log = Path(f"{self.database}-wal")
        if log.exists() and log.stat().st_ino == inode:
            self._loose_log = False
        self._loose_names = {name for name in self._loose_names if os.stat(name).st_ino != inode}

    def _before_rename(self, step: Step) -> None:
        if os.stat(step.source).st_ino in self._loose_bytes:
            self.violations.append(f"renamed to {step.target} before its bytes were synced")
        self._loose_names.add(os.path.dirname(step.target))
        if Path(step.target).parent.parent == self.blobs:
            self._placed[str(step.target)] = os.stat(step.source).st_ino
        if self._is_open_for_writing(os.stat(step.source).st_ino):
            self.violations.append(f"renamed to {step.target} while it is open for writing")

    def _before_link(self, step: Step) -> None:
        if self.blobs in Path(step.target).parents:
            self.violations.append(f"{step.target} is given a second name")

    @staticmethod
    def _is_open_for_writing(inode: int) -> bool:
        """Whether this process could still write to a file (Linux only)."""
        for link in Path("/proc/self/fd").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if link.stat().st_ino == inode:
                    text = Path("/proc/self/fdinfo", link.name).read_text(encoding="ascii")
                    flags = int(text.partition("flags:")[2].split()[0], 8)
                    if flags & os.O_ACCMODE != os.O_RDONLY:
                        return True
        return False

    def _before_mkdir(self, step: Step) -> None:
        if not os.path.isdir(step.target):
            self._loose_names.add(os.path.dirname(step.target))

    def _before_unlink(self, step: Step) -> None:
        path = Path(step.target)
        self._placed.pop(str(path), None)
        if path.parent.parent == self.blobs and path.name != ".probe":
            digest = f"{path.parent.name}:{path.name}"
            self.removed.append(digest)
            if digest in self._committed_rows():
                self.violations.append(f"removed {digest} before its row was gone")
            if self._loose_log:
                self.violations.append(f"removed {digest} before its row was gone for good")

    def _before_reply(self, step: Step) -> None:
        if self._loose_log:
            self.violations.append("acknowledged before the rows were synced")

    def _before_commit(self, step: Step) -> None:
        """New rows, seen from within the transaction, need files that are durable by now."""
        try:
            rows, links = self._read(step.database)
        except sqlite3.OperationalError:  # not there before the schema is
            return
        self._loose_log |= (rows, links) != (self._rows, self._links)
        for digest, size in rows.items():
            if self._rows.get(digest) != size:
                self._check_durable(digest, size)
        self._rows, self._links = rows, links

    def _check_durable(self, digest: str, size: int) -> None:
        path = self.blobs / digest.replace(":", "/")
        if not path.exists() or path.stat().st_size != size:
            self.violations.append(f"a row without its file: {digest}")
        elif path.stat().st_ino in self._loose_bytes:
            self.violations.append(f"a row before its bytes were synced: {digest}")
        elif self._loose_names & {str(path.parent), str(self.blobs)}:
            self.violations.append(f"a row before its name was synced: {digest}")

    def _committed_rows(self) -> dict[str, int]:
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            return self._read(database)[0]

    @staticmethod
    def _read(database: sqlite3.Connection) -> tuple[dict[str, int], list[tuple[Any, ...]]]:
        """Each blob's size, and what clients are told is there."""
        sql = "SELECT repository_id, digest FROM repository_blobs UNION ALL SELECT name, digest FROM tags"
        return dict(database.execute("SELECT digest, size FROM blobs")), database.execute(sql).fetchall()


class DurableOrder(unittest.TestCase):
    """Every scenario on a registry whose steps are watched."""

    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.directory = Path(directory.name)
        cls.base = cls.directory / "base"
        with registry.Registry(cls.base, sync=False) as prepared:
            ledger = Ledger({})
            scenarios.prepare(Actor(Client(prepared.netloc, scenarios.REPOSITORY), ledger))
        cls.facts = ledger.known

    @contextlib.contextmanager
    def watched(self, **options: Any) -> Iterator[tuple[Disk, registry.Registry]]:
        """A registry on a copy of what was prepared."""
        with tempfile.TemporaryDirectory(dir=self.directory) as name:
            data = Path(name) / "data"
            shutil.copytree(self.base, data)
            disk = Disk(data)
            with observed(disk), registry.Registry(data, **options) as running:
                yield disk, running

    def play(self, scenario: scenarios.Scenario, running: registry.Registry) -> None:
        scenario(Actor(Client(running.netloc, scenarios.REPOSITORY), Ledger(self.facts)))

    def test_no_row_before_its_file_is_durable_and_no_file_gone_before_its_row(self) -> None:
        for scenario in scenarios.SCENARIOS:
            with self.subTest(scenario.__name__), self.watched() as (disk, running):
                self.play(scenario, running)
                self.assertEqual(disk.violations, [])
                self.assertGreater(disk.kinds["write"] + disk.kinds["commit"], 0, "nothing was watched")

    def test_a_new_blob_costs_three_syncs_of_file_directory_and_log(self) -> None:
        for scenario in (scenarios.single_post, scenarios.post_patch_put):
            with self.subTest(scenario.__name__), self.watched() as (disk, running):
                before = disk.kinds["sync"]
                self.play(scenario, running)
                self.assertEqual(disk.kinds["sync"] - before, 3)

    def test_opening_a_session_waits_for_no_commit(self) -> None:
        with self.watched() as (disk, running):
            before = disk.kinds["commit"] + disk.kinds["sync"]
            Client(running.netloc, "new").open_upload()
            self.assertEqual(disk.kinds["commit"] + disk.kinds["sync"], before)

    def test_deletes_remove_the_files_that_lost_their_last_row(self) -> None:
        with self.watched() as (disk, running):
            self.play(scenarios.manifest_deleted, running)
            self.play(scenarios.blob_deleted, running)
            removed = {digest_of(content) for content in (scenarios.SECOND.body, scenarios.LOOSE)}
            self.assertLessEqual(removed, set(disk.removed))
            self.assertEqual(disk.violations, [])

    def test_collecting_garbage_removes_rows_before_files(self) -> None:
        with self.watched() as (disk, running):
            upkeep.everything(disk.root, 2 * upkeep.DAY)
            upkeep.collect(running.store, untagged_after=upkeep.DAY)
            removed = {digest_of(content) for content in (scenarios.UNTAGGED.config, scenarios.LOOSE)}
            self.assertLessEqual(removed, set(disk.removed))
            self.assertEqual(disk.violations, [])

    def test_repairing_removes_rows_of_what_it_moves_away(self) -> None:
        with self.watched() as (disk, running):
            lost = digest_of(scenarios.LOOSE)
            os.truncate(disk.blobs / lost.replace(":", "/"), 5)
            self.assertEqual(upkeep.verify(running.store, repair=True), [("truncated", lost)])
            self.assertEqual(upkeep.verify(running.store), [])

    def test_a_new_data_directory_is_durable_too(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.directory) as name:
            disk = Disk(Path(name))
            with observed(disk), registry.Registry(name) as running:
                self.play(scenarios.manifest_by_tag, running)
            self.assertEqual(disk.violations, [])

    def test_without_sync_nothing_waits_for_the_disk(self) -> None:
        with self.watched(sync=False) as (disk, running):
            for scenario in (scenarios.manifest_by_tag, scenarios.post_patch_put, scenarios.blob_deleted):
                self.play(scenario, running)
            self.assertEqual(disk.kinds["sync"], 0)
            self.assertIn("acknowledged before the rows were synced", disk.violations)


class DataDirectory(unittest.TestCase):
    """Its own name, and those of directories above it that are made for it, have to last as well."""

    def test_every_directory_that_is_made_is_synced_in_the_one_above(self) -> None:
        with tempfile.TemporaryDirectory() as parent:
            synced: list[str] = []
            with mock.patch.object(registry, "sync_directory", synced.append):
                registry.Store(os.path.join(parent, "a", "b", "data")).close()
            expected = ["", "a", "a/b", "a/b/data", "a/b/data/blobs", "a/b/data/blobs", "a/b/data"]
            self.assertEqual(synced, [os.path.join(parent, name).rstrip("/") for name in expected])

    def test_one_that_is_there_needs_no_look_at_what_is_above_it(self) -> None:
        """As in a service's private directory: it may go through, and list nothing."""
        with tempfile.TemporaryDirectory() as parent:
            data, synced = os.path.join(parent, "data"), mock.Mock()
            registry.Store(data).close()
            with mock.patch.object(registry, "sync_directory", synced):
                registry.Store(data).close()
            synced.assert_not_called()


class PrivateFiles(unittest.TestCase):
    """The users file and the key of tokens, whose old content must not be lost to half of the new one."""

    def test_each_is_on_the_disk_before_it_has_its_name_and_its_name_after(self) -> None:
        synced: set[int] = set()
        loose: set[int] = set()  # directories
        renamed: list[str] = []
        sync, rename = os.fsync, os.replace

        def observe_sync(descriptor: int) -> None:
            sync(descriptor)
            inode = os.stat(descriptor).st_ino
            synced.add(inode)
            loose.discard(inode)

        def observe_rename(source: str, target: str) -> None:
            if not target.endswith(".probe"):
                self.assertIn(os.stat(source).st_ino, synced)
                loose.add(os.stat(os.path.dirname(target)).st_ino)
                renamed.append(os.path.basename(target))
            rename(source, target)

        with contextlib.ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(mock.patch.multiple(os, fsync=observe_sync, replace=observe_rename))
            users = os.path.join(name, "users")
            for line in ("a:x", "b:x", None):
                registry.change_user(users, line[0] if line else "b", line)
                self.assertEqual(loose, set())
            Path(users).unlink()
            with registry.Registry(os.path.join(name, "data"), users=self.users_file(users)):
                self.assertEqual(loose, set())
        self.assertEqual(renamed, ["users"] * 3 + ["token.key"])

    @staticmethod
    def users_file(path: str) -> str:
        Path(path).write_text(users_line("alice", "secret"), "utf-8")
        return path


class DamagedFiles(RegistryTestCase):
    """A power cut may leave files shorter than their rows say. Each test damages what was never read."""

    def damage(self, digest: str, size: int = 0) -> None:
        os.truncate(self.data.path / "blobs" / digest.replace(":", "/"), size)

    def remove(self, digest: str) -> None:
        (self.data.path / "blobs" / digest.replace(":", "/")).unlink()

    def assert_lost(self, *paths: str) -> None:
        for path in paths:
            code = "MANIFEST_UNKNOWN" if "/manifests/" in path else "BLOB_UNKNOWN"
            self.assert_error(self.client.get(path), 404, code)
            self.assertEqual(self.client.head(path).status, 404)
            self.assertEqual(self.client.get(path, {"Range": "bytes=0-0"}).status, 404)

    def pushed_blob(self, size: int = 0) -> tuple[bytes, str]:
        content = unique("blob").ljust(size, b".")
        return content, self.client.push_blob(content)

    def test_a_short_blob_is_unknown_and_the_next_push_heals_it(self) -> None:
        for size, left in ((0, 0), (0, 3), (200_000, 0), (200_000, 199_999)):
            with self.subTest(size=size, left=left):
                content, digest = self.pushed_blob(size)
                self.damage(digest, left)
                self.assert_lost(self.client.path(f"blobs/{digest}"))
                self.client.push_blob(content)
                self.assert_blob(self.client, content)

    def test_a_short_blob_is_healed_by_a_session_too(self) -> None:
        content, digest = self.pushed_blob()
        self.damage(digest)
        self.client.expect(201, "PUT", with_digest(self.client.open_upload(), digest), content)
        self.assert_blob(self.client, content)

    def test_a_missing_file_is_unknown_and_the_next_push_heals_it(self) -> None:
        content, digest = self.pushed_blob()
        self.remove(digest)
        self.assert_lost(self.client.path(f"blobs/{digest}"))
        self.client.push_blob(content)
        self.assert_blob(self.client, content)

    def test_a_file_with_bytes_too_many_is_unknown(self) -> None:
        _, digest = self.pushed_blob()
        self.damage(digest, 100)
        self.assert_lost(self.client.path(f"blobs/{digest}"))

    def test_small_contents_with_wrong_bytes_are_neither_served_nor_remembered(self) -> None:
        content, digest = self.pushed_blob()
        path = self.data.path / "blobs" / digest.replace(":", "/")
        path.write_bytes(b"x" * len(content))
        self.assert_lost(self.client.path(f"blobs/{digest}"))
        self.client.push_blob(content)
        self.assert_blob(self.client, content)

    def test_a_short_manifest_is_unknown_by_tag_and_digest_and_the_next_push_heals_it(self) -> None:
        image = self.client.push_image("v1")
        self.damage(image.digest)
        paths = [self.client.path(f"manifests/{reference}") for reference in ("v1", image.digest)]
        self.assert_lost(*paths, self.client.path(f"blobs/{image.digest}"))
        self.client.push_manifest(image.body, "v1")
        for path in paths:
            self.assertEqual(self.client.expect(200, "GET", path).body, image.body)

    def test_a_short_blob_is_not_mounted_so_that_the_client_sends_it(self) -> None:
        content, digest = self.pushed_blob()
        self.damage(digest)
        mount = f"blobs/uploads/?mount={digest}&from={self.client.repository}"
        location = self.other.expect(202, "POST", mount).headers["Location"]
        self.other.expect(201, "PUT", with_digest(location, digest), content)
        self.assert_blob(self.other, content)
        self.assert_blob(self.client, content)

    def test_a_short_blob_of_one_repository_is_healed_through_another(self) -> None:
        content, digest = self.pushed_blob()
        self.damage(digest)
        self.other.push_blob(content)
        self.assert_blob(self.client, content)

    def test_a_download_of_a_file_cut_short_meanwhile_ends_early_rather_than_wrong(self) -> None:
        size = 32 * 1024 * 1024
        content = os.urandom(1024) * (size // 1024)
        digest = self.client.push_blob(content)
        connection = self.connect().request("GET", self.client.path(f"blobs/{digest}"))
        connection._take_head()
        self.damage(digest)
        with self.assertRaisesRegex(AssertionError, f"bytes of a body of {size}"):
            connection._take(size)


class DamageSeenByRestartedDaemon(HTTPTestCase):
    """What was read and remembered before does not hide damage from the next process."""

    def test_a_manifest_damaged_while_the_registry_was_down_is_unknown(self) -> None:
        with tempfile.TemporaryDirectory() as data:
            with registry.Registry(data) as running:
                image = Client(running.netloc, "down").push_image("v1")
                Client(running.netloc, "down").expect(200, "GET", "manifests/v1")
            os.truncate(Path(data) / "blobs" / image.digest.replace(":", "/"), 10)
            with registry.Registry(data) as running:
                client = Client(running.netloc, "down")
                self.assert_error(client.get("manifests/v1"), 404, "MANIFEST_UNKNOWN")
                self.assertEqual(client.head("manifests/v1").status, 404)
                client.push_manifest(image.body, "v1")
                client.expect(200, "GET", "manifests/v1")


if __name__ == "__main__":
    unittest.main()
