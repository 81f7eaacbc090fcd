"""The backup that the README describes, taken of a running registry and restored."""

from __future__ import annotations

import re
import sys
import threading
import unittest

from tests.daemon import Daemon, command, run
from tests.support import ROOT, HTTPTestCase


def readme_commands() -> str:
    """The shell commands of the README's paragraph on backup."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"\*\*Backup\*\*.*?```sh\n(.*?)```", readme, re.DOTALL)
    assert block, "the README has no commands under **Backup**"
    return block[1].replace("python ", f"{sys.executable} ")


@unittest.skipUnless(sys.platform == "linux", "the commands are those of GNU's cp")
class BackupsRestore(HTTPTestCase):
    def setUp(self) -> None:
        self.directory = self.temporary()

    def test_a_backup_taken_during_pushes_restores_all_that_was_there_before(self) -> None:
        with Daemon(self.directory / "data", "--quiet") as daemon:
            before = [daemon.client.push_image(f"before-{number}") for number in range(5)]
            stop = threading.Event()
            pusher = threading.Thread(target=self.push_until, args=(daemon, stop))
            pusher.start()
            try:
                done = run("sh", "-e", "-c", readme_commands(), cwd=self.directory)
            finally:
                stop.set()
                pusher.join()
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        backup = self.directory / "backup"
        verified = command("verify", "--data", str(backup))
        self.assertNotRegex(verified.stdout, "missing|corrupt|truncated|dangling|database")
        with Daemon(backup, "--quiet") as restored:
            for number, image in enumerate(before):
                self.assert_image(restored.client, image, f"before-{number}")
            restored.client.push_image("after")

    def push_until(self, daemon: Daemon, stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            daemon.client.push_image(f"meanwhile-{number}")
            number += 1


if __name__ == "__main__":
    unittest.main()
