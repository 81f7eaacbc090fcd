"""--workers: processes that share one port and one data directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from tests.support import ROOT, TIMEOUT, Daemon, HTTPTestCase, RawConnection, digest_of, unique


def children(process: int) -> set[int]:
    """The processes that a process has started."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    return {int(word) for word in text.split()}


def is_alive(process: int) -> bool:
    """Whether a process runs, and is not merely waiting to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@unittest.skipUnless(Path("/proc/self/task").exists(), "needs /proc to look at processes")
class WorkersTest(HTTPTestCase):
    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.daemon = Daemon(temporary.name, "--quiet", "--workers", "3")
        self.daemon.start()
        self.addCleanup(self.daemon.kill)
        self.wait_for(lambda: len(self.workers()) == 3)

    def workers(self) -> set[int]:
        return children(self.daemon.process.pid)

    def wait_for(self, condition: object) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():  # type: ignore[operator]
            self.assertLess(time.monotonic(), deadline, "waited in vain")
            time.sleep(0.01)

    def test_what_one_worker_acknowledged_all_others_serve(self) -> None:
        client = self.daemon.client
        for _ in range(40):  # each request on a connection of its own, and so by any worker
            content = unique()
            digest = client.push_blob(content)
            self.assertEqual(client.get(f"blobs/{digest}").body, content)
            image = client.push_image("moving")
            for _ in range(4):
                self.assertEqual(
                    client.head("manifests/moving").headers["Docker-Content-Digest"], image.digest
                )
            client.expect(202, "DELETE", f"manifests/{image.digest}")
            self.assert_status(client.get("manifests/moving"), 404)
            self.assert_status(client.get(f"blobs/{digest_of(unique())}"), 404)

    def test_an_upload_goes_on_with_another_worker(self) -> None:
        client = self.daemon.client
        content = [unique() for _ in range(20)]
        location = client.open_upload()
        for part in content:
            self.assert_status(client.patch(location, part), 202)
        digest = digest_of(b"".join(content))
        self.assert_status(client.put(f"{location}?digest={digest}"), 201)
        self.assertEqual(client.get(f"blobs/{digest}").body, b"".join(content))

    def test_a_worker_that_dies_is_replaced(self) -> None:
        before = self.workers()
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        self.wait_for(lambda: len(self.workers()) == 3 and victim not in self.workers())
        self.assertEqual(len(self.workers() & before), 2)
        self.daemon.client.push_image("after")

    def test_a_process_that_it_has_inherited_may_end(self) -> None:
        command = 'sleep 60 & exec "$@"'
        daemon = Daemon(
            Path(self.daemon.data, "other"), "--quiet", "--workers", "2", under=["sh", "-c", command, "sh"]
        )
        with daemon:
            self.wait_for(lambda: len(children(daemon.process.pid)) == 3)
            inherited = min(children(daemon.process.pid))  # the first that was started
            self.assertIn(b"sleep", Path(f"/proc/{inherited}/cmdline").read_bytes())
            os.kill(inherited, signal.SIGKILL)
            self.wait_for(lambda: len(children(daemon.process.pid)) == 2)
            daemon.client.push_image("after")
            self.assertEqual(daemon.stop(), 0)

    def test_one_of_them_collects_garbage(self) -> None:
        script = (
            "import os, sys, registry\n"
            "registry.Collector.run = lambda *_, **__: os.write(1, b'%d\\n' % os.getpid())\n"
            "registry.main(sys.argv[1:])\n"
        )
        data = str(Path(self.daemon.data, "other"))
        options = ("--quiet", "--workers", "3", "--port", "0", "--gc-interval", "0.05s", "--data", data)
        with subprocess.Popen(
            [sys.executable, "-c", script, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            self.assertIn("Serving", process.stdout.readline())
            collectors = {process.stdout.readline() for _ in range(20)}
            process.terminate()
            process.stdout.read()
        self.assertEqual(len(collectors), 1)

    def test_stopping_stops_all(self) -> None:
        workers = self.workers()
        self.assertEqual(self.daemon.stop(), 0)
        self.assertFalse([worker for worker in workers if is_alive(worker)])

    def test_a_worker_that_is_told_twice_to_stop_finishes_what_it_serves(self) -> None:
        """As when a service manager tells every process of a service, and the one that watches does too."""
        content = unique()
        with RawConnection(self.daemon.client.host) as connection:
            path = self.daemon.client.path(f"blobs/uploads/?digest={digest_of(content)}")
            connection.request("POST", path, f"Content-Length: {len(content)}", "Expect: 100-continue")
            self.assert_status(connection.read(), 100)
            self.daemon.signal(signal.SIGTERM)
            self.wait_for(lambda: len(self.workers()) == 1)
            os.kill(min(self.workers()), signal.SIGTERM)
            self.assert_status(connection.send(content).read(), 201)
        self.assertEqual(self.daemon.wait(), 0)

    def test_workers_do_not_outlive_the_process_that_watches_them(self) -> None:
        workers = self.workers()
        self.daemon.kill()
        self.wait_for(lambda: not [worker for worker in workers if is_alive(worker)])


if __name__ == "__main__":
    unittest.main()
