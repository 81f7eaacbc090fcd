"""`python registry.py gc` and the daemon's own collections, and how they are stopped."""

from __future__ import annotations

import gc
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests import upkeep
from tests.collecting import CollectionTestCase, add_garbage
from tests.daemon import ENVIRONMENT, Daemon, DaemonTestCase, command, unread
from tests.support import TIMEOUT, Client, HTTPTestCase, OwnRegistryTestCase, digest_of, run_at_once, unique
from tests.upkeep import DAY, HOUR, MINUTE


class Stopping(CollectionTestCase):
    """A collection reports as it goes, and can be stopped between two batches."""

    def setUp(self) -> None:
        super().setUp()
        self.client.push_blob(unique())

    def test_what_was_removed_is_not_kept_in_memory(self) -> None:
        add_garbage(self.data.path, 1000)
        reported, kept = 0, []

        def count(_removal: Any) -> None:
            nonlocal reported
            reported += 1
            if reported % 250 == 0:
                kept.append(sum(type(each) is registry.Removal for each in gc.get_objects()))

        registry.Collector(self.registry.store, registry.Policy(), count).run()
        self.assertEqual((reported, len(kept)), (1000, 4))
        self.assertLessEqual(max(kept), registry.BATCH)

    def test_it_stops_between_batches_with_all_reported_that_is_gone(self) -> None:
        add_garbage(self.data.path, 1000)
        reported: list[Any] = []
        collector = registry.Collector(
            self.registry.store, registry.Policy(), reported.append, stopped=lambda: len(reported) > 150
        )
        collector.run()
        ((left,),) = self.data.rows("SELECT count(*) FROM blobs")
        self.assertEqual((len(reported), left), (200, 801))

    def test_it_stops_while_it_mends_times_too(self) -> None:
        add_garbage(self.data.path, 10)
        upkeep.change(
            self.data.path, "UPDATE repository_blobs SET leased_at = ?", int(time.time() + 900 * DAY)
        )
        stops, ahead = iter((False, True)), "SELECT count(*) FROM repository_blobs WHERE leased_at > ?"
        collector = registry.Collector(
            self.registry.store, registry.Policy(), lambda _: None, stopped=lambda: next(stops, True)
        )
        with mock.patch.object(registry, "CHOICE", 4):
            collector.run()
        self.assertEqual(self.data.rows(ahead, time.time() + DAY), [(7,)])

    def test_one_that_was_stopped_is_not_noted_so_that_the_next_start_goes_on(self) -> None:
        noted = self.data.path / "last-gc"
        collecting = registry.Registry(data=str(self.data.path), sync=False, gc_interval=HOUR).start()
        self.addCleanup(collecting.close)
        for stopped in (True, False):
            os.utime(noted, (0, 0))
            with mock.patch.object(collecting._stopped, "is_set", lambda: stopped):  # noqa: B023 - used at once
                collecting._collect_garbage()
            self.assertEqual(noted.stat().st_mtime == 0, stopped)

    def test_closing_does_not_wait_for_the_rest(self) -> None:
        add_garbage(self.data.path, 20_000)
        begun = threading.Event()
        with mock.patch.object(registry.Store, "remove_files", lambda *_: begun.set()):
            collecting = registry.Registry(data=str(self.data.path), sync=False, gc_interval=0.001)
            collecting.start()
            self.assertTrue(begun.wait(TIMEOUT))
            collecting.close()
        ((left,),) = self.data.rows("SELECT count(*) FROM blobs WHERE size = 1")
        self.assertGreater(left, 0)


class Command(OwnRegistryTestCase):
    """`python registry.py gc`, beside a registry that serves."""

    def gc(self, *options: str) -> tuple[int, list[str], str]:
        done = command("gc", "--data", str(self.data.path), *options)
        return done.returncode, done.stdout.splitlines(), done.stderr

    def test_it_prints_what_it_removed_and_how_many_bytes_that_freed(self) -> None:
        content = unique().ljust(12_345, b".")
        digest = self.client.push_blob(content)
        kept = self.client.push_image("v1")
        upkeep.everything(self.data.path, DAY)
        for options in (("--dry-run",), ()):
            with self.subTest(options):
                self.assertIn(digest, self.data.files())
                status, lines, errors = self.gc(*options)
                self.assertEqual((status, errors), (0, ""))
                self.assertEqual(len([line for line in lines if digest in line]), 1, lines)
                self.assertNotIn(kept.digest, "\n".join(lines))
                self.assertIn("12345", re.findall(r"\d+", lines[-1]))
        self.assertNotIn(digest, self.data.files())
        self.assertEqual(self.client.head(f"blobs/{digest}").status, 404)
        self.client.push_blob(content)

    def test_with_nothing_to_do_it_succeeds(self) -> None:
        status, lines, _ = self.gc()
        self.assertEqual((status, len(lines)), (0, 1))

    def test_it_goes_on_when_nobody_reads_what_it_prints(self) -> None:
        with self.client.keep_alive() as client:
            for _ in range(120):
                client.push_blob(unique())
        upkeep.everything(self.data.path, DAY)
        done = unread("gc", "--data", str(self.data.path))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(self.data.files(), {})

    def test_all_walks_over_the_files_too(self) -> None:
        left = self.data.path / "blobs" / "sha256" / ("3" * 64)
        left.write_bytes(b"left by a crash")
        self.assertEqual(self.gc("--all")[1], ["removed nothing"], "it is young")
        tomorrow, printed = time.time() + DAY, []
        with mock.patch("time.time", lambda: tomorrow):
            for options in ((), ("--all", "--dry-run"), ("--all",)):
                self.assertTrue(left.exists())
                status, lines, _ = self.gc(*options)
                self.assertEqual(status, 0)
                printed += [line for line in lines if left.name in line]
        self.assertFalse(left.exists())
        self.assertEqual(len(printed), 2)

    def test_a_dry_run_that_is_stopped_leaves_no_copy(self) -> None:
        self.client.push_blob(unique())
        add_garbage(self.data.path, 2000)  # to say so takes more than a pipe holds
        temporary = self.temporary()
        program = [sys.executable, *Daemon.PROGRAM, "gc", "--dry-run", "--data", str(self.data.path)]
        environment = {**ENVIRONMENT, "TMPDIR": str(temporary)}
        with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            self.assertNotEqual(os.listdir(temporary), [])
            process.terminate()
            process.stdout.read()
        self.assertEqual((process.returncode, os.listdir(temporary)), (128 + signal.SIGTERM, []))

    def test_a_data_directory_that_is_none_is_an_error_and_is_not_made(self) -> None:
        parent = self.temporary()
        for name in ("gc", "verify"):
            done = command(name, "--data", f"{parent}/nothing")
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done)
        self.assertEqual(os.listdir(parent), [])

    def test_a_grace_too_short_for_a_push_is_refused(self) -> None:
        for grace, status in (("9s", 2), ("10s", 0), ("0", 2), ("-1h", 2), ("soon", 2)):
            with self.subTest(grace):
                self.assertEqual(self.gc(f"--grace={grace}")[0], status)

    def test_durations_and_sizes_have_units(self) -> None:
        for options in (
            ("--untagged-after", "7d"),
            ("--untagged-after", "90m"),
            ("--max-size", "50G"),
            ("--max-size", "64M"),
            ("--keep-last", "3"),
        ):
            with self.subTest(options):
                self.assertEqual(self.gc(*options)[0], 0)
        for options in (("--untagged-after", "7 weeks"), ("--max-size", "big"), ("--keep-last", "some")):
            with self.subTest(options):
                self.assertEqual(self.gc(*options)[0], 2)


class BesideADaemon(DaemonTestCase):
    """Collections by this process, while another serves."""

    def test_the_running_daemon_serves_nothing_of_what_was_removed(self) -> None:
        client = self.start("--quiet").client
        image = client.push_image()
        client.expect(200, "GET", f"manifests/{image.digest}")
        upkeep.everything(self.path, DAY)
        command("gc", "--data", str(self.path), "--untagged-after", "1h")
        for path in (f"manifests/{image.digest}", f"blobs/{digest_of(image.config)}"):
            self.assertEqual(client.get(path).status, 404)

    def test_pushes_from_another_process_never_miss_a_blob_while_collections_run(self) -> None:
        """Each round leaves garbage that the next one relies on after asking for it."""
        client = self.start("--quiet", "--no-sync").client
        image = client.push_image("v1", layers=3)
        finished = threading.Event()

        def push_again_and_again() -> None:
            try:
                for _ in range(20):
                    client.expect(202, "DELETE", f"manifests/{image.digest}")
                    upkeep.everything(self.path, HOUR)
                    for content in image.blobs:
                        if client.head(f"blobs/{digest_of(content)}").status == 404:
                            client.push_blob(content)
                    client.push_manifest(image.body, "v1")
            finally:
                finished.set()

        def collect() -> int:
            runs = 0
            with upkeep.opened(self.path) as store:
                while not finished.is_set():
                    upkeep.collect(store, grace=30 * MINUTE)
                    runs += 1
            return runs

        _, runs = run_at_once(push_again_and_again, collect)
        self.assertGreater(runs, 0)
        self.assert_image(client, image, "v1")


class Housekeeping(HTTPTestCase):
    """The daemon collects by itself."""

    def test_it_collects_at_its_interval(self) -> None:
        data = self.temporary()
        options = ("--gc-interval", "0.2s", "--grace", "10s", "--untagged-after", "10s")
        with Daemon(data, *options) as daemon:
            image = daemon.client.push_image()
            kept = daemon.client.push_image("v1")
            upkeep.everything(data, HOUR)
            line = daemon.read_line()
            while "gc removed" not in line:  # after the lines of the access log
                line = daemon.read_line()
            self.assertEqual(daemon.client.head(f"manifests/{image.digest}").status, 404)
            daemon.client.expect(200, "GET", f"manifests/{kept.digest}")

    def test_it_collects_though_it_is_restarted_more_often_than_that(self) -> None:
        """An hour after the last collection, whichever process did that; the first start counts as one."""
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        with tempfile.TemporaryDirectory() as data:
            options = {"data": data, "sync": False, "gc_interval": HOUR, "log": lines.put}
            with registry.Registry(**options) as running:
                Client(running.netloc, "daemon/image").push_blob(unique())
            first = os.stat(f"{data}/last-gc").st_mtime
            for last in (first - HOUR - 1, first + 900 * DAY):  # or so says a clock that was ahead
                upkeep.everything(Path(data), DAY)
                os.utime(f"{data}/last-gc", (last, last))
                with registry.Registry(**options) as running:
                    while "gc removed" not in lines.get(timeout=TIMEOUT):
                        pass
                    Client(running.netloc, "daemon/image").push_blob(unique())
                self.assertLess(abs(os.stat(f"{data}/last-gc").st_mtime - first), HOUR)

    def test_it_walks_over_the_files_once_a_day(self) -> None:
        now = time.time()
        with tempfile.TemporaryDirectory() as data, registry.Registry(data=data, sync=False) as running:
            file = Path(data) / "blobs" / "sha256" / ("3" * 64)
            for collected, walks in ((now, True), (now + DAY, False), (now + 3 * DAY, True)):
                file.write_bytes(b"left by a crash")
                running.store.files.collected_at(now=True)
                os.utime(f"{data}/last-gc", (collected, collected))
                with mock.patch("time.time", lambda: now + DAY):
                    running._collect_garbage()
                self.assertEqual(file.exists(), not walks)
