"""`python registry.py passwd`: users made, changed and removed."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import subprocess
import sys
import unittest
from unittest import mock

import registry
from tests.access import USERS, AccessTestCase
from tests.credentials import basic, users_line
from tests.support import ROOT, run_at_once


class UsersAreChanged(AccessTestCase):
    def passwd(self, *arguments: str, password: str = "") -> tuple[int, str]:
        """Run the command; its exit status and all that it printed."""
        printed = io.StringIO()
        streams = {"stdin": io.StringIO(password), "stdout": printed, "stderr": printed}
        with mock.patch.multiple(sys, **streams):
            status = registry.main(["passwd", *arguments, "--users", str(self.users)])
        return status, printed.getvalue()

    def lines(self) -> dict[str, str]:
        return dict(line.split(":", 1) for line in self.users.read_text("utf-8").splitlines())

    def assert_refused(self, outcome: tuple[int, str]) -> None:
        status, printed = outcome
        self.assertEqual(status, 1)
        self.assertRegex(printed, r"\Aregistry\.py: .+\n\Z")

    def test_a_user_is_made(self) -> None:
        self.users = new = self.directory / "new.txt"
        self.assertEqual(self.passwd("alice", password="s\xe9cret\nmore\n"), (0, ""))
        self.assertEqual(new.stat().st_mode & 0o777, 0o600)
        name, _, hashed = new.read_text("utf-8").strip().partition(":")
        self.assertEqual(name, "alice")
        self.assertTrue(hashed.startswith("$scrypt$"), hashed)
        self.assertTrue(registry.password_check(hashed)("s\xe9cret"))
        self.assertFalse(registry.password_check(hashed)("s\xe9cret\n"))
        self.assertEqual([path.name for path in self.directory.iterdir() if "new" in path.name], ["new.txt"])

    def test_a_password_is_replaced_and_all_else_stays(self) -> None:
        before = self.lines()
        os.chmod(self.users, 0o644)
        inode = self.users.stat().st_ino
        self.assertEqual(self.passwd("pusher", password="new\n"), (0, ""))
        after = self.lines()
        self.assertEqual(set(after), set(before))
        self.assertEqual({name for name in after if after[name] != before[name]}, {"pusher"})
        self.assertTrue(registry.password_check(after["pusher"])("new"))
        self.assertEqual(self.users.stat().st_mode & 0o777, 0o600)
        self.assertNotEqual(self.users.stat().st_ino, inode, "written in place")

    def test_no_two_hashes_are_the_same(self) -> None:
        for name in ("a", "b"):
            self.passwd(name, password="same")
        self.assertNotEqual(self.lines()["a"], self.lines()["b"])

    def test_a_user_is_removed(self) -> None:
        self.assertEqual(self.passwd("pusher", "--delete"), (0, ""))
        self.assertEqual(set(self.lines()), set(USERS) - {"pusher"})
        self.assert_refused(self.passwd("pusher", "--delete"))

    def test_changes_at_once_lose_none_of_each_other(self) -> None:
        names = [f"user{number}" for number in range(8)]
        run_at_once(
            *(functools.partial(registry.change_user, str(self.users), name, f"{name}:x") for name in names)
        )
        self.assertEqual(set(self.lines()), set(USERS) | set(names))

    def test_one_whose_name_is_no_longer_taken_is_removed(self) -> None:
        self.users.write_text(users_line("a b", "x") + users_line("puller", "x"), "utf-8")
        self.assertEqual(self.passwd("a b", "--delete"), (0, ""))
        self.assertEqual(set(self.lines()), {"puller"})

    def test_a_byte_order_mark_is_no_part_of_a_name(self) -> None:
        self.users.write_text("\ufeff" + users_line("alice", "x"), "utf-8")
        self.assertEqual(self.passwd("alice", password="secret"), (0, ""))
        self.assertEqual(set(self.lines()), {"alice"})
        self.serve()

    def test_a_running_registry_heeds_it(self) -> None:
        client = self.serve()
        self.passwd("alice", password="secret")
        self.assert_status(client.as_caller(basic("alice", "secret")).get("/v2/"), 200)
        self.passwd("alice", "--delete")
        self.assert_status(client.as_caller(basic("alice", "secret")).get("/v2/"), 401)

    def test_where_python_cannot_hash_it_says_so(self) -> None:
        with mock.patch.object(registry, "hashlib", spec=[]), self.assertRaisesRegex(ValueError, "scrypt"):
            registry.hash_password("secret")

    def test_only_a_line_feed_ends_a_line(self) -> None:
        self.users.write_text("# a\x0cb\u2028c\n", "utf-8")
        self.passwd("alice", password="secret")
        self.assertEqual(registry.load_users(str(self.users)).keys(), {"alice"})
        self.assertEqual(self.users.read_text("utf-8").split("\n")[0], "# a\x0cb\u2028c")

    def test_names_and_passwords_that_cannot_be(self) -> None:
        before = self.users.read_bytes()
        for name in (
            "",
            "a:b",
            ":",
            " a",
            "a ",
            "a b",
            "a\tb",
            "a\u00a0b",
            "a\nb",
            "a\x1bb",
            "#a",
            "a" * 256,
        ):
            with self.subTest(name):
                self.assert_refused(self.passwd(name, password="secret"))
        for password in ("", "\n", "a\0b", "\0", "a" * 4097):
            self.assert_refused(self.passwd("alice", password=password))
        self.assertEqual(self.users.read_bytes(), before)
        self.users = self.directory / "none" / "users.txt"
        self.assert_refused(self.passwd("alice", password="x"))

    @unittest.skipUnless(hasattr(os, "openpty"), "needs a pseudo-terminal")
    def test_a_terminal_is_asked_twice_and_shows_nothing(self) -> None:
        for second, status in ((b"secret\n", 0), (b"secreT\n", 1)):
            self.users.unlink(missing_ok=True)
            code, shown = self.on_a_terminal(b"secret\n", second)
            self.assertEqual(code, status, shown)
            self.assertEqual(shown.lower().count(b"secret"), 0, shown)
            self.assertEqual(self.users.exists(), status == 0)

    def on_a_terminal(self, *answers: bytes) -> tuple[int, bytes]:
        """Run passwd with a terminal for its input, answering each prompt; exit status and what was shown."""
        ours, theirs = os.openpty()
        command = [sys.executable, "registry.py", "passwd", "alice", "--users", str(self.users)]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        ) as process:
            os.close(theirs)
            shown, asked = b"", 0
            with contextlib.suppress(OSError):  # the end of a terminal is an error
                while received := os.read(ours, 1000):
                    shown += received
                    while asked < min(len(answers), shown.count(b":")):
                        os.write(ours, answers[asked])
                        asked += 1
            os.close(ours)
        return process.returncode, shown
