"""The files of uploads: what comes between them and their rows, in their buffers, and in uploads/."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import os
import shutil
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests import upkeep
from tests.support import (
    EMPTY_SHA256,
    MEBIBYTE,
    TIMEOUT,
    Client,
    HTTPTestCase,
    UploadTestCase,
    digest_of,
    unique,
    with_digest,
)


class CommitsMayFail(UploadTestCase):
    """The bytes have been renamed into place, and then something comes in between."""

    def finish_and_fail(self, location: str, content: bytes, *, for_long: bool = False) -> None:
        """A PUT whose transaction fails, the database being locked; for_long: and the one after it too."""
        locked, transaction = sqlite3.OperationalError("database is locked"), self.registry.store.transaction
        outcomes = itertools.chain([locked], itertools.repeat(locked if for_long else None))

        def fail(**options: Any) -> Any:
            if error := next(outcomes):
                raise error
            return transaction(**options)

        failing = mock.patch.object(self.registry.store, "transaction", fail)
        with failing, contextlib.redirect_stderr(io.StringIO()):
            response = self.client.put(with_digest(location, digest_of(content)), content)
        self.assert_error(response, 503)

    def test_a_put_that_is_tried_again_does_not_write_to_a_blob(self) -> None:
        content = unique()
        digest = self.other.push_blob(content)
        location = self.client.open_upload()
        self.finish_and_fail(location, content)
        again = self.client.put(with_digest(location, digest), content)
        self.assert_error(again, 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_blob(self.other, content)
        self.finish(self.client.open_upload(), content, content)
        self.assert_consistent()

    def test_where_the_database_stays_locked_the_push_fails_and_the_next_one_is_whole(self) -> None:
        content = unique()
        self.finish_and_fail(self.client.open_upload(), content, for_long=True)
        self.assertNotIn(digest_of(content), self.data.recorded())
        self.finish(self.client.open_upload(), content, content)
        self.assert_consistent()

    def test_a_push_that_found_the_database_locked_does_not_wait_for_as_long_again(self) -> None:
        waits = []

        def wait(*, timeout: float = registry.DATABASE_TIMEOUT, **_options: Any) -> Any:
            waits.append(timeout)
            raise sqlite3.OperationalError("database is locked")

        content = unique()
        with mock.patch.object(self.registry.store, "transaction", wait):
            self.assert_error(
                self.client.put(with_digest(self.client.open_upload(), digest_of(content)), content), 503
            )
        self.assertLess(sum(waits), registry.DATABASE_TIMEOUT + 10)
        self.finish(self.client.open_upload(), content, content)

    def test_bytes_that_got_no_row_are_gone(self) -> None:
        content = unique()
        self.finish_and_fail(self.client.open_upload(), content)
        self.assert_no_blob(self.client, digest_of(content))
        self.assert_nothing_unfinished()

    def test_a_blob_collected_before_it_has_its_row_is_put_there_again(self) -> None:
        store, events, content = self.registry.store, [], os.urandom(300_000)
        place, transaction = store.files.place, store.transaction

        def note_place(upload: Any, digest: str) -> None:
            place(upload, digest)
            events.append("placed")

        @contextlib.contextmanager
        def collect_first(**options: Any) -> Iterator[Any]:
            if events.count("placed") < 3:
                os.unlink(store.files.path(digest_of(content)))
            with transaction(**options) as db:
                events.append("locked")
                yield db
            events.append("unlocked")

        pushes = {
            "post": lambda: self.client.push_blob(content),
            "put": lambda: self.finish(self.client.open_upload(), content, content),
        }
        for way, push in pushes.items():
            with self.subTest(way), contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.object(store.files, "place", note_place))
                stack.enter_context(mock.patch.object(store, "transaction", collect_first))
                events.clear()
                push()
                self.assertEqual(events, ["placed", "locked", "unlocked"] * 3)
        self.assert_blob(self.client, content)
        self.assert_consistent()


class BuffersAreBounded(UploadTestCase):
    """What uploads hold in memory while their clients send nothing."""

    def held_by(self, uploads: int, size: int, expected: int | None = None) -> int:
        """The bytes of memory that so many uploads hold, each stalled after so many of the expected bytes."""
        arrived, go_on = threading.Semaphore(0), threading.Event()

        def upload() -> int:
            left = [size]

            def readinto(view: memoryview) -> int:
                if not left[0]:
                    arrived.release()
                    go_on.wait()
                    return 0
                count = min(len(view), left[0])
                left[0] -= count
                return count

            with self.registry.store.files.new_upload("sha256") as file:
                return file.append(readinto, expected)

        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with ThreadPoolExecutor(uploads) as pool:
            results = [pool.submit(upload) for _ in range(uploads)]
            for _ in range(uploads):
                self.assertTrue(arrived.acquire(timeout=TIMEOUT))
            held = tracemalloc.get_traced_memory()[0]
            go_on.set()
            self.assertEqual({result.result() for result in results}, {size})
        tracemalloc.stop()
        return held

    def test_uploads_of_which_little_has_come_hold_little(self) -> None:
        for expected in (None, 100 * MEBIBYTE):
            self.assertLess(self.held_by(100, 1, expected), 10 * MEBIBYTE)

    def test_uploads_hold_no_more_than_so_much_all_together(self) -> None:
        self.assertLess(self.held_by(100, 3 * MEBIBYTE), 80 * MEBIBYTE)

    def test_those_that_are_done_leave_large_buffers_to_others(self) -> None:
        with mock.patch.object(registry.UploadFile, "LARGE", threading.Semaphore(1)):
            for content in (os.urandom(3 * MEBIBYTE), os.urandom(3 * MEBIBYTE)):
                self.client.push_blob(content)
                self.assertTrue(registry.UploadFile.LARGE.acquire(timeout=TIMEOUT))
                registry.UploadFile.LARGE.release()

    def test_small_and_large_buffers_take_every_byte_in_order(self) -> None:
        for lanes in (0, 1):
            for size in (65_535, 65_536, 65_537, 5 * MEBIBYTE + 1):
                with (
                    self.subTest(lanes=lanes, size=size),
                    mock.patch.object(registry.UploadFile, "LARGE", threading.Semaphore(lanes)),
                ):
                    content = os.urandom(size)
                    self.client.push_blob(content)
                    self.assert_blob(self.client, content)
                    location = self.client.open_upload()
                    self.assert_status(self.client.patch(location, iter([content])), 202)
                    self.finish(location, content)

    def test_a_write_that_fails_is_followed_by_no_other(self) -> None:
        for lanes in (0, 1):
            for failing in (1, 2, 3):
                with (
                    self.subTest(lanes=lanes, failing=failing),
                    mock.patch.object(registry.UploadFile, "LARGE", threading.Semaphore(lanes)),
                ):
                    self.fail_write(failing)

    def test_what_a_write_did_not_take_is_no_part_of_the_digest(self) -> None:
        for breaks in (False, True):
            with self.subTest(breaks=breaks):
                self.write_in_part(os.urandom(200_000), breaks=breaks)

    def write_in_part(self, content: bytes, *, breaks: bool) -> None:
        """Let each write take only some of an upload; or let the second fail."""
        written: list[int] = []

        class Narrow(io.FileIO):
            def write(self, data: Any) -> int:
                if breaks and written:
                    raise OSError(errno.EIO, "broken")
                written.append(super().write(data[:50_000]))
                return written[-1]

        def narrow(path: str, _mode: str, **options: Any) -> io.FileIO:
            return Narrow(path, "rb+", opener=options["opener"])

        with self.registry.store.files.new_upload("sha256") as file, contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(registry, "open", narrow, create=True))
            if breaks:
                stack.enter_context(self.assertRaisesRegex(OSError, "broken"))
            try:
                file.append(io.BytesIO(content).readinto)
            finally:
                taken = content[: sum(written)]
                self.assertEqual(Path(file.path).read_bytes(), taken)
                self.assertEqual((file.size, file.digest("sha256")), (len(taken), digest_of(taken)))
        self.assertEqual(len(taken), 50_000 if breaks else len(content))

    def test_what_was_taken_back_is_no_part_of_the_digest(self) -> None:
        with self.registry.store.files.new_upload("sha256") as file:
            file.append(io.BytesIO(b"taken back").readinto)
            file.take_back(5)
            self.assertEqual(file.digest("sha256"), digest_of(b"taken"))
            file.append(io.BytesIO(b" again").readinto)
            self.assertEqual((file.size, file.digest("sha256")), (11, digest_of(b"taken again")))

    def fail_write(self, failing: int) -> None:
        """Let one of an upload's writes fail; nothing comes after it."""
        sizes: list[int] = []

        def check_space(size: int, more: int) -> None:
            sizes.append(size)
            if len(sizes) == failing + 1:  # the first is before anything has come
                raise OSError(errno.EIO, "broken")

        file = self.registry.store.files.new_upload("sha256")
        checked = mock.patch.object(file._files, "check_space", check_space)
        try:
            with checked, self.assertRaisesRegex(OSError, "broken"):
                file.append(io.BytesIO(os.urandom(5 * MEBIBYTE)).readinto)
            self.assertEqual(os.path.getsize(file.path), sizes[-1])
            self.assertEqual(len(sizes), failing + 1)
            self.assertEqual(file.digest("sha256"), digest_of(Path(file.path).read_bytes()))
        finally:
            os.unlink(file.path)
            file.close()


class OthersUseTheDirectory(HTTPTestCase):
    """The directory uploads/ when others have their hands in it."""

    def setUp(self) -> None:
        self.data = self.temporary() / "data"

    def start(self, data: str | Path = "") -> Client:
        running = registry.Registry(data or self.data).start()
        self.addCleanup(running.close)
        self.store = running.store
        return Client(running.netloc, "app")

    def assert_takes_uploads(self, client: Client) -> None:
        content = unique()
        location = client.open_upload()
        self.assert_status(client.patch(location, content), 202)
        self.assert_status(client.put(with_digest(location, digest_of(content))), 201)
        digest = client.push_blob(unique())
        self.assertTrue((self.data / "blobs" / digest.replace(":", "/")).is_file())

    def test_what_the_registry_did_not_name_hinders_nothing(self) -> None:
        session = f"{'0' * 32}-sha256-{hashlib.sha256(b'app').hexdigest()[:16]}"
        uploads = self.data / "uploads"
        for name in ("lost+found", ".snapshot/hourly", "@eaDir", session, "1" * 32):
            (uploads / name).mkdir(parents=True)
        (uploads / "README").write_text("here lie uploads", encoding="ascii")
        (uploads / session.replace("0", "2", 32)).symlink_to(uploads / "README")
        os.symlink("nowhere", uploads / ("3" * 32))
        before = sorted(uploads.rglob("*"))
        for path in before:
            os.utime(path, (0, 0), follow_symlinks=False)
        client = self.start()
        self.store.expire_uploads()
        for name in (session, session.replace("0", "2", 32), "1" * 32, "3" * 32, "README", "lost+found"):
            for method in ("GET", "PATCH", "DELETE"):
                response = client.request(method, f"blobs/uploads/{name}")
                self.assert_error(response, 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_takes_uploads(client)
        self.assertEqual(sorted(uploads.rglob("*")), before)

    def test_what_a_crash_left_of_one_request_goes_at_the_next_start(self) -> None:
        uploads = self.data / "uploads"
        uploads.mkdir(parents=True)
        left, used = uploads / ("0" * 32), uploads / ("1" * 32)
        left.touch()
        with open(used, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            client = self.start()
            location = client.open_upload()
            self.assertEqual(left.exists(), False)
            self.assertEqual(used.exists(), True)
        self.store.expire_uploads()
        self.assertEqual(used.exists(), False)
        self.assert_status(client.get(location), 204)

    def test_an_upload_that_cannot_be_removed_hinders_nothing(self) -> None:
        uploads, unlink = self.data / "uploads", os.unlink
        uploads.mkdir(parents=True)
        for digit in "01":
            (uploads / (digit * 32)).touch()

        def refuse_one(path: str) -> None:
            if path.endswith("0" * 32):
                raise PermissionError(errno.EPERM, "immutable", path)
            unlink(path)

        warnings = io.StringIO()
        with mock.patch.object(os, "unlink", refuse_one), contextlib.redirect_stderr(warnings):
            client = self.start()
        self.assertEqual([path.name for path in uploads.iterdir()], ["0" * 32])
        self.assertIn("immutable", warnings.getvalue())
        self.assert_takes_uploads(client)

    def test_a_lock_ends_with_its_request_though_a_forked_child_has_inherited_it(self) -> None:
        client = self.start()
        location = client.open_upload()
        with self.store.session("app", location.rpartition("/")[2]) as upload:
            inherited = os.dup(upload.fileno())  # what fork does
            self.addCleanup(os.close, inherited)
        self.assert_status(client.patch(location, b"x"), 202)

    def test_sessions_are_dropped_by_their_age_also_where_the_clock_was_wrong(self) -> None:
        client = self.start()
        day = 24 * 3600
        for ago, status in ((0, 204), (day / 2, 204), (-day / 2, 204), (2 * day, 404), (-999 * day, 404)):
            with self.subTest(ago=ago):
                location = client.open_upload()
                then = time.time() - ago
                os.utime(self.data / "uploads" / location.rpartition("/")[2], (then, then))
                self.store.expire_uploads()
                self.assert_status(client.get(location), status)

    def test_a_session_that_somebody_writes_to_just_before_it_is_dropped_stays(self) -> None:
        client, content = self.start(), unique()
        location = client.open_upload()
        path = self.data / "uploads" / location.rpartition("/")[2]
        os.utime(path, (0, 0))
        seen = [(path.name, path.stat())]
        client.expect(202, "PATCH", location, content)
        with mock.patch.object(self.store.files, "uploads", return_value=seen):
            self.store.expire_uploads()
        self.assert_status(client.put(with_digest(location, digest_of(content))), 201)

    def test_uploads_go_on_after_the_directory_was_removed(self) -> None:
        client = self.start()
        location = client.open_upload()
        shutil.rmtree(self.data / "uploads")
        self.assert_error(client.get(location), 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_error(client.patch(location, b"x"), 404, "BLOB_UPLOAD_UNKNOWN")
        self.store.expire_uploads()
        upkeep.collect(self.store)
        self.assert_takes_uploads(client)

    def test_bytes_that_could_not_be_synced_are_not_acknowledged_by_another_try(self) -> None:
        client, content = self.start(), unique()
        location = client.open_upload()
        client.expect(202, "PATCH", location, content)
        finish = with_digest(location, digest_of(content))
        failing = mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "bad disk"))
        with failing, contextlib.redirect_stderr(io.StringIO()):
            self.assert_error(client.put(finish), 500)
        self.assert_error(client.put(finish), 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_takes_uploads(client)

    def test_without_a_data_directory_a_push_fails_at_once(self) -> None:
        client = self.start()
        self.data.rename(self.data.with_name("elsewhere"))
        with contextlib.redirect_stderr(io.StringIO()):
            self.assert_error(client.post("blobs/uploads/"), 500)
            self.assert_error(client.post(f"blobs/uploads/?digest={EMPTY_SHA256}", b""), 500)
        self.data.with_name("elsewhere").rename(self.data)
        self.assert_takes_uploads(client)

    def test_a_directory_in_which_nothing_stays_makes_a_push_fail_at_once(self) -> None:
        client = self.start()
        gone = mock.patch.object(os, "lstat", side_effect=FileNotFoundError("gone"))
        with gone, contextlib.redirect_stderr(io.StringIO()):
            self.assert_error(client.post("blobs/uploads/"), 500)
        self.assert_takes_uploads(client)

    def test_the_data_directory_stays_where_it_was_when_the_process_moves(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.data.parent)
        client = self.start("data")
        os.chdir("/")
        self.assert_takes_uploads(client)
