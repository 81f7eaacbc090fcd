"""The database that threads and processes share: its write lock, its log, and what is remembered of it."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import shutil
import tempfile
import threading
import tracemalloc
import unittest
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import registry
from registry import Registry, Store
from tests import upkeep
from tests.daemon import LINUX, Daemon, python
from tests.steps import Step, observed
from tests.support import (
    Client,
    HTTPTestCase,
    RegistryTestCase,
    digest_of,
    elapsed,
    run_at_once,
    unique,
    wait_until,
)


class BusyDatabase(RegistryTestCase):
    """Another process holds the write lock for longer than anybody waits."""

    def setUp(self) -> None:
        super().setUp()
        limits = Store.transaction.__wrapped__.__kwdefaults__  # type: ignore[attr-defined]
        self.enter(mock.patch.dict(limits, {"timeout": 0.3}))
        self.enter(mock.patch.object(registry, "OPTIONAL_WRITE_TIMEOUT", 0.1, create=True))

    def test_all_who_wait_give_up_together_and_are_told_to_try_again(self) -> None:
        contents = [unique() for _ in range(8)]
        post = [
            functools.partial(self.client.post, f"blobs/uploads/?digest={digest_of(content)}", content)
            for content in contents
        ]
        responses: list[object] = []
        with self.data.locked():
            seconds = elapsed(lambda: responses.extend(run_at_once(*post)))
        for response in responses:
            self.assert_error(response, 503, "TOOMANYREQUESTS")
            self.assertGreater(int(response.headers["Retry-After"]), 0)
        self.assertLess(seconds, 3.0)  # each waited for the lock again, in the transaction that cleans up

    def test_a_thread_of_this_process_that_has_it_is_not_waited_for_any_longer(self) -> None:
        content = unique()
        with self.registry.store.transaction():
            response = self.client.post(f"blobs/uploads/?digest={digest_of(content)}", content)
        self.assert_error(response, 503, "TOOMANYREQUESTS")

    def test_head_is_answered_without_a_lease(self) -> None:
        image = self.client.push_image("v1")
        upkeep.leases_told(self.data.path, upkeep.HOUR)
        with self.data.locked():
            for path in ("manifests/v1", f"manifests/{image.digest}", f"blobs/{digest_of(image.config)}"):
                self.assertEqual(self.client.head(path).status, 200)
        self.client.expect(200, "HEAD", "manifests/v1")
        ((leased_at,),) = self.data.rows(
            "SELECT max(leased_at) - strftime('%s', 'now') FROM repository_blobs WHERE digest = ?",
            image.digest,
        )
        self.assertGreater(leased_at, -upkeep.MINUTE)

    def test_what_was_waited_for_this_process_is_not_waited_for_another(self) -> None:
        moments = itertools.chain([100.0], itertools.repeat(107.0))
        clock = mock.patch.object(registry.time, "monotonic", lambda: next(moments))
        with contextlib.closing(Store(self.data.path)) as store, clock, store.transaction(timeout=10) as db:
            self.assertEqual(db.execute("PRAGMA busy_timeout").fetchall(), [(3000,)])

    def test_a_command_says_to_try_again(self) -> None:
        self.client.push_blob(unique())
        upkeep.everything(self.data.path, upkeep.DAY)
        with self.data.locked(), contextlib.redirect_stderr(io.StringIO()) as errors:
            self.assertEqual(registry.main(["gc", "--data", str(self.data.path)]), 1)
        self.assertRegex(errors.getvalue(), r"\Aregistry\.py: database is locked; try again later\n\Z")

    def test_pulls_are_recorded_once_it_is_free(self) -> None:
        image = self.client.push_image("v1")
        upkeep.everything(self.data.path, upkeep.DAY)
        self.client.expect(200, "GET", "manifests/v1")
        with self.data.locked():
            self.registry.store.flush_pulls()
        self.registry.store.flush_pulls()
        ((ago,),) = self.data.rows(
            "SELECT strftime('%s', 'now') - pulled_at FROM manifests WHERE digest = ?", image.digest
        )
        self.assertLess(ago, upkeep.MINUTE)


class CommitsReachTheDisk(HTTPTestCase):
    """Commits are acknowledged once SQLite's log is on the disk."""

    def setUp(self) -> None:
        self.data = self.temporary()

    def is_log(self, step: Step) -> bool:
        log = self.data / "registry.db-wal"
        return step.kind == "sync" and log.exists() and os.path.samestat(os.stat(step.target), log.stat())

    def test_nothing_is_acknowledged_after_its_sync_failed(self) -> None:
        failing = False

        def observe(step: Step) -> None:
            nonlocal failing
            if failing and self.is_log(step):
                failing = False  # Linux reports what it could not write once, and then success
                raise OSError(errno.EIO, "input/output error")

        stderr = io.StringIO()
        with observed(observe), Registry(self.data) as running, contextlib.redirect_stderr(stderr):
            client = Client(running.netloc, "log")
            image = client.push_image("v1")
            failing = True
            for content in (unique(), unique()):
                path = f"blobs/uploads/?digest={digest_of(content)}"
                self.assertEqual(client.post(path, content).status, 500)
            self.assertEqual(client.delete("manifests/v1").status, 500)
            self.assertEqual(client.expect(200, "GET", f"manifests/{image.digest}").body, image.body)
        with Registry(self.data) as running:
            Client(running.netloc, "log").push_image("v1")

    def test_no_file_goes_before_the_deletion_that_another_process_committed_is_on_the_disk(self) -> None:
        steps: list[str] = []

        def observe(step: Step) -> None:
            if self.is_log(step):
                steps.append("sync")
            elif step.kind == "unlink" and "blobs" in str(step.target):
                steps.append("unlink")

        with observed(observe), Registry(self.data) as running, contextlib.closing(Store(self.data)) as other:
            digest = Client(running.netloc, "log").push_blob(unique())
            with other.transaction(durable=False) as db:
                ((repository,),) = db.execute("SELECT repository_id FROM repository_blobs").fetchall()
                db.execute(other.UNLINK, (repository, digest))
            steps.clear()
            running.store.remove_pending()
        self.assertEqual(steps[:2], ["sync", "unlink"])

    def test_one_sync_serves_all_who_committed_before_it(self) -> None:
        first, others, syncs = threading.Event(), threading.Event(), 0

        def observe(step: Step) -> None:
            nonlocal syncs
            if step.kind == "sync":
                syncs += 1
                first.set()
                others.wait(10)

        def commit(name: str) -> None:
            with store.transaction() as db:
                db.execute("INSERT INTO repositories (name) VALUES (?)", (name,))

        with contextlib.closing(Store(self.data)) as store, observed(observe):
            threads = [threading.Thread(target=commit, args=(f"r{n}",)) for n in range(8)]
            threads[0].start()
            self.assertTrue(first.wait(10))
            for thread in threads[1:]:
                thread.start()
            # they commit while the first one's sync takes its time
            wait_until(lambda: len(store.query("SELECT id FROM repositories")) == len(threads))
            others.set()
            for thread in threads:
                thread.join(10)
        self.assertEqual(syncs, 2)


class UnremovableFiles(RegistryTestCase):
    """Something lies where a file is to be removed, and cannot be."""

    def setUp(self) -> None:
        super().setUp()
        self.stderr = io.StringIO()
        self.enter(contextlib.redirect_stderr(self.stderr))
        self.path = self.data.blob

    @contextlib.contextmanager
    def stuck(self, *digests: str) -> Iterator[None]:
        for digest in digests:
            self.path(digest).unlink(missing_ok=True)
            self.path(digest).mkdir()
        yield
        for digest in digests:
            self.path(digest).rmdir()
            self.path(digest).write_bytes(b"")

    def assert_gone(self, *digests: str) -> None:
        self.assertEqual(set(digests) & set(self.data.files()), set())

    def test_one_hinders_no_later_deletion_collection_or_start(self) -> None:
        stuck, *others = [self.client.push_blob(unique()) for _ in range(4)]
        with self.stuck(stuck):
            for digest in (stuck, others[0]):
                self.client.expect(202, "DELETE", f"blobs/{digest}")
            upkeep.leases_told(self.data.path, 3 * upkeep.DAY, others[1])
            upkeep.collect(self.registry.store)
            with Registry(self.data.path) as restarted:
                here = Client(restarted.netloc, self.client.repository)
                here.expect(202, "DELETE", f"blobs/{others[2]}")
            self.assert_gone(*others)
            upkeep.collect(self.registry.store)
        self.assertEqual(self.stderr.getvalue().count(str(self.path(stuck))), 4)  # each time it is tried
        upkeep.collect(self.registry.store)
        self.assert_gone(stuck)

    def test_what_is_pushed_again_before_its_turn_stays(self) -> None:
        content = unique()
        sql = "INSERT INTO pending_deletes VALUES (?)"
        upkeep.change(self.data.path, sql, digest_of(content))
        self.client.push_blob(content)
        self.registry.store.remove_pending()
        self.assert_blob(self.client, content)

    def test_many_keep_nothing_from_its_turn(self) -> None:
        stuck = [f"sha256:{number:064x}" for number in range(2 * registry.BATCH)]
        last = f"sha256:{'f' * 64}"
        self.path(last).write_bytes(b"")
        with self.stuck(*stuck):
            rows = [(digest,) for digest in (*stuck, last)]
            upkeep.change_many(self.data.path, "INSERT INTO pending_deletes VALUES (?)", rows)
            self.registry.store.remove_pending()
            self.assert_gone(last)
        self.registry.store.remove_pending()
        self.assert_gone(*stuck)

    def test_a_deletion_tries_no_file_but_its_own(self) -> None:
        stuck, digest = self.client.push_blob(unique()), self.client.push_blob(unique())
        with self.stuck(stuck):
            self.client.expect(202, "DELETE", f"blobs/{stuck}")
            removed: list[str] = []
            with mock.patch("registry.remove_file", removed.append):
                self.client.expect(202, "DELETE", f"blobs/{digest}")
            self.assertEqual(removed, [str(self.path(digest))])
        upkeep.collect(self.registry.store)
        self.path(digest).unlink()


class OutsideHands(HTTPTestCase):
    """What happens to the registry's own files from outside, but for SQLite's."""

    def setUp(self) -> None:
        self.data = self.temporary()

    def files(self) -> list[Path]:
        return [path for path in self.data.iterdir() if path.is_file() and "registry.db" not in path.name]

    def test_no_file_that_is_truncated_or_removed_ends_the_daemon_or_makes_another_stale(self) -> None:
        with Daemon(self.data, "--quiet") as daemon:
            daemon.client.push_image("v1")
            for path in self.files():
                os.truncate(path, 0)
            self.assertEqual(daemon.client.get("tags/list").json["tags"], ["v1"])
            for path in self.files():
                path.unlink()
            with Daemon(self.data, "--quiet") as second:
                for number in range(20):
                    tags = [f"v{n}" for n in range(1, number + 2)]
                    self.assertEqual(sorted(daemon.client.get("tags/list").json["tags"]), sorted(tags))
                    second.client.push_image(f"v{number + 2}")
            self.assertIsNone(daemon.process.poll())

    def test_one_whose_directory_another_has_taken_serves_on(self) -> None:
        with Registry(self.data) as lost:
            before = Client(lost.netloc, "lost/image")
            before.push_image("v1")
            shutil.rmtree(self.data)
            with Registry(self.data) as running:
                Client(running.netloc, "found/image").push_image("v1")
                self.assertEqual(before.get("tags/list").json["tags"], ["v1"])

    @unittest.skipUnless(LINUX, "asks for a lock as SQLite takes it there")
    def test_a_store_that_is_closed_leaves_sqlites_locks_to_the_others_of_this_process(self) -> None:
        program = (
            "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)"
        )
        with contextlib.closing(Store(self.data)):
            for read_only in (False, True):
                Store(self.data, read_only=read_only).close()
                done = python("-c", program, str(self.data / "registry.db-shm"))
                self.assertIn("BlockingIOError", done.stderr)


class Remembered(RegistryTestCase):
    def test_what_was_read_before_a_commit_is_not_remembered_as_read_after_it(self) -> None:
        store, query = self.registry.store, self.registry.store.query
        images = [self.client.push_image("moving")]

        def query_and_commit(*arguments: object) -> list[object]:
            rows = query(*arguments)
            with mock.patch.object(store, "query", query):
                images.append(self.client.push_image("moving"))
            return rows

        with mock.patch.object(store, "query", query_and_commit):
            self.assertEqual(store.manifest(self.client.repository, "moving").digest, images[0].digest)
        self.assertEqual(store.manifest(self.client.repository, "moving").digest, images[1].digest)

    def test_long_parameters_of_many_requests_do_not_fill_the_memory(self) -> None:
        self.client.push_image("v1")
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for number in range(1000):
            self.assertEqual(self.registry.store.tags(self.client.repository, f"{number:!>8000}", 1), ["v1"])
        after, _ = tracemalloc.get_traced_memory()
        self.assertLess(after - before, 5 * 1024 * 1024)

    @unittest.skipUnless(LINUX, "counts the entries of /proc/self/fd")
    def test_connections_that_a_burst_opened_are_closed_again(self) -> None:
        numbers = "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 30000)"
        sql = f"{numbers} SELECT max(x), (SELECT count(*) FROM repositories) FROM c"
        run_at_once(*[functools.partial(self.registry.store.query, sql)] * 40)
        descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        logs = [
            path for path in map(os.path.realpath, descriptors) if path == f"{self.data.path}/registry.db-wal"
        ]
        self.assertLessEqual(len(logs), 10)


class TheReserve(unittest.TestCase):
    def test_that_it_cannot_be_kept_is_no_reason_not_to_start(self) -> None:
        def observe(step: Step) -> None:
            if step.kind == "create" and str(step.target).endswith("reserve"):
                raise OSError(errno.EDQUOT, "quota exceeded")

        with tempfile.TemporaryDirectory() as data, observed(observe):
            Store(data).close()
        with tempfile.TemporaryDirectory() as data:
            (Path(data) / "reserve").mkdir()
            with mock.patch.object(registry, "RESERVE_SIZE", 1 << 60):  # as if the disk were full
                Store(data).close()


if __name__ == "__main__":
    unittest.main()
