"""The users file: hashes, edits while it runs, and what is remembered of passwords."""

from __future__ import annotations

import contextlib
import hmac
import io
import unittest
from unittest import mock

import registry
from tests.access import AccessTestCase
from tests.credentials import AuthorizedClient, basic, users_line
from tests.daemon import python
from tests.support import run_at_once

SCRYPT = (  # a published test vector
    "pleaseletmein",
    "$scrypt$ln=14,r=8,p=1$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf046/2o+7qQT44+qbVD9lRdofI",
)
BCRYPT = ("U*U", "$2y$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW")


def has_bcrypt() -> bool:
    """Whether this machine's crypt(3) knows bcrypt."""
    crypt = registry.system_crypt()
    return crypt is not None and crypt(*BCRYPT) == BCRYPT[1]


class UsersLogIn(AccessTestCase):
    def log_in(self, client: AuthorizedClient, name: str, password: str) -> int:
        return client.as_caller(basic(name, password)).get("/v2/").status

    def test_hashes_that_people_have(self) -> None:
        hashes = (SCRYPT, BCRYPT) if has_bcrypt() else (SCRYPT,)
        for password, hashed in hashes:
            with self.subTest(hashed):
                check = registry.password_check(hashed)
                self.assertTrue(check(password))
                for wrong in (password + "x", password[:-1] + "y", hashed, "\0", password.upper() + "\xe9"):
                    self.assertFalse(check(wrong), wrong)
        self.users.write_text("".join(f"u{n}:{hashed}\n" for n, (_, hashed) in enumerate(hashes)), "utf-8")
        client = self.serve()
        for number, (password, _) in enumerate(hashes):
            self.assertEqual(self.log_in(client, f"u{number}", password), 200)
            self.assertEqual(self.log_in(client, f"u{number}", password + "x"), 401)

    def test_a_password_ends_where_it_ends(self) -> None:
        """crypt(3) looks no further than a NUL, and HMAC, which is in scrypt, ignores some at the end."""
        hashes = [SCRYPT, BCRYPT] if has_bcrypt() else [SCRYPT]
        for password, hashed in hashes:
            self.users.write_text(f"bob:{hashed}\n")
            client = self.serve()
            for end in ("\0", "\0\0", "\0more"):
                self.assertEqual(self.log_in(client, "bob", password + end), 401)
            self.assertEqual(self.log_in(client, "bob", password), 200)

    def test_long_names_and_passwords_are_refused_unread(self) -> None:
        name, password = "n" * 256, "p" * 4097
        self.users.write_text(users_line(name, "x") + users_line("bob", password) + users_line("fits", "x"))
        client = self.serve()
        with mock.patch.object(registry.hashlib, "scrypt", wraps=registry.hashlib.scrypt) as scrypt:
            self.assertEqual(self.log_in(client, name, "x"), 401)
            self.assertEqual(self.log_in(client, "bob", password), 401)
            self.assertEqual(scrypt.call_count, 0)
        self.assertEqual(self.log_in(client, "fits", "x"), 200)

    @unittest.skipUnless(has_bcrypt(), "no crypt(3) that knows bcrypt")
    def test_bcrypt_is_checked_by_many_threads_at_once(self) -> None:
        check = registry.password_check(BCRYPT[1])
        tries = [lambda password=password: check(password) for password in (BCRYPT[0], "wrong") * 8]
        self.assertEqual(run_at_once(*tries), [True, False] * 8)

    def test_a_hash_that_cannot_be_checked_keeps_it_from_starting(self) -> None:
        bad = (
            "hunter2", "", "{SSHA}bm90aGluZw==", "{PLAIN}hunter2", "abJnggxhB/yWI", "$2y$", "*", "$unknown$x",
            "{SHA}wBFJYYjnh5eS5Eft5JORpd7Gkko=", "$apr1$0123abcd$W7om0TbLhldTqkociSB1Q.",
            "$2y$31$" + "a" * 53, "$2y$05$" + "a" * 52,
            "$argon2id$v=19$m=1,t=1,p=1$aa$bb", "$scrypt$ln=14,r=8,p=1$AA", "$scrypt$ln=99,r=8,p=1$AAAA$AAAA",
            "$scrypt$ln=0,r=8,p=1$AAAA$AAAA", "$scrypt$ln=30,r=8,p=1$AAAA$AAAA",
        )  # fmt: skip
        for hashed in bad:
            with self.subTest(hashed):
                self.users.write_text(users_line("puller", "x") + f"bob:{hashed}\n", "utf-8")
                with self.assertRaisesRegex(registry.StartupError, "line 2") as caught:
                    self.serve()
                self.assertNotIn("hunt", str(caught.exception))

    def test_a_line_that_is_none_keeps_it_from_starting(self) -> None:
        for line in (b"bob", b":" + BCRYPT[1].encode(), b"\xff:x", b"bob hash"):
            with self.subTest(line):
                self.users.write_bytes(line + b"\n")
                with self.assertRaises(registry.StartupError):
                    self.serve()

    def test_a_user_who_is_there_twice_keeps_it_from_starting(self) -> None:
        self.users.write_text(users_line("bob", "x") + "#\n" + users_line("al", "x") + users_line("bob", "y"))
        with self.assertRaisesRegex(registry.StartupError, "line 4.* bob"):
            self.serve()

    def test_an_absent_file_keeps_it_from_starting(self) -> None:
        options = ("--port", "0", "--data", str(self.data.path), "--users", str(self.directory / "none"))
        done = python("registry.py", *options)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("none", done.stderr)
        self.assertNotIn("Traceback", done.stderr)

    def test_comments_and_empty_lines_are_nothing(self) -> None:
        self.users.write_text("# who may\n\n" + users_line("puller", "x") + "  \n#bob:x\n", "utf-8")
        client = self.serve()
        self.assertEqual(self.log_in(client, "puller", "x"), 200)
        self.assertEqual(self.log_in(client, "#bob", "x"), 401)

    def test_a_changed_file_counts_at_once(self) -> None:
        client = self.serve()
        self.assertEqual(self.log_in(client, "puller", "puller's"), 200)
        self.change(self.users, users_line("puller", "new") + users_line("fresh", "x"))
        self.assertEqual(self.log_in(client, "puller", "puller's"), 401)
        self.assertEqual(self.log_in(client, "puller", "new"), 200)
        self.assertEqual(self.log_in(client, "fresh", "x"), 200)
        self.assertEqual(self.log_in(client, "pusher", "pusher's"), 401)

    def test_a_broken_edit_keeps_the_last_good_users(self) -> None:
        client = self.serve()
        for broken in ("puller\n", users_line("x", "y") + "puller:hunter2\n"):
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                self.change(self.users, broken)
                self.assertEqual(self.log_in(client, "puller", "puller's"), 200)
                self.assertEqual(self.log_in(client, "x", "y"), 401)
            self.assertIn("users.txt", errors.getvalue())
            self.assertNotIn("hunt", errors.getvalue())
        with contextlib.redirect_stderr(io.StringIO()):
            self.users.unlink()
            self.assertEqual(self.log_in(client, "puller", "puller's"), 200)
        self.change(self.users, users_line("puller", "again"))
        self.assertEqual(self.log_in(client, "puller", "again"), 200)
        self.assertEqual(self.log_in(client, "puller", "puller's"), 401)

    def test_a_password_is_hashed_once_and_then_remembered(self) -> None:
        check = mock.Mock(wraps=lambda password: password == "right")
        self.enter(mock.patch.object(registry, "password_check", lambda _hashed: check))
        client = self.serve()
        for _ in range(5):
            self.assertEqual(self.log_in(client, "puller", "right"), 200)
        self.assertEqual(check.call_count, 1)
        self.assertEqual(self.log_in(client, "puller", "wrong"), 401)
        self.assertEqual(self.log_in(client, "pusher", "right"), 200)
        self.assertEqual(check.call_count, 3)

    def test_what_is_remembered_is_forgotten_in_time(self) -> None:
        self.patch(PASSWORD_LIFETIME=0.0)
        check = mock.Mock(return_value=True)
        self.enter(mock.patch.object(registry, "password_check", lambda _hashed: check))
        client = self.serve()
        for _ in range(2):
            self.assertEqual(self.log_in(client, "puller", "right"), 200)
        self.assertEqual(check.call_count, 2)

    def test_a_password_in_use_stays_remembered(self) -> None:
        check = mock.Mock(return_value=True)
        self.enter(mock.patch.object(registry, "password_check", lambda _hashed: check))
        access = self.access()
        for moment in range(0, 20_000, 3_000):
            with mock.patch.object(registry.time, "monotonic", return_value=float(moment)):
                self.assertEqual(access.log_in("puller", "x", "127.0.0.1"), "puller")
        self.assertEqual(check.call_count, 1)

    def test_a_name_that_does_not_exist_takes_as_long_as_one_that_does(self) -> None:
        """Whatever the users' hashes cost, and always the same for the same name."""
        self.patch(FAILURE_DELAY=0.0)
        salted = "r=8,p=1$c2FsdA$" + "A" * 43
        self.users.write_text("".join(f"u{n}:$scrypt$ln={n % 3 + 2},{salted}\n" for n in range(12)))
        access = self.access()
        costs: dict[str, set[int]] = {}
        with mock.patch.object(registry.hashlib, "scrypt", wraps=registry.hashlib.scrypt) as scrypt:
            for name in [f"{kind}{n}" for kind in ("u", "nobody") for n in range(12)] * 2:
                before = scrypt.call_count
                with self.assertRaises(registry.RegistryError):
                    access.log_in(name, "wrong", "127.0.0.1")
                self.assertEqual(scrypt.call_count, before + 1)
                costs.setdefault(name, set()).add(scrypt.call_args[1]["n"])
        self.assertEqual({len(cost) for cost in costs.values()}, {1}, "not the same at every try")
        strangers = set().union(*(cost for name, cost in costs.items() if name.startswith("nobody")))
        self.assertEqual(strangers, {4, 8, 16})

    def test_a_name_that_does_not_exist_has_no_password(self) -> None:
        """Not even that of the user with whose hash it is compared for the time it takes."""
        self.users.write_text(users_line("puller", "x"))
        client = self.serve()
        for name in ("nobody", "", "Puller"):
            self.assertEqual(self.log_in(client, name, "x"), 401)
        self.change(self.users, "# nobody at all\n")
        self.assertEqual(self.log_in(client, "puller", "x"), 401)

    def test_secrets_are_compared_in_constant_time(self) -> None:
        """What hmac says of a password, or of a token's signature, is what counts, and nothing else."""
        self.users.write_text(users_line("alice", "right") + (f"bob:{BCRYPT[1]}\n" if has_bcrypt() else ""))
        for verdict in (True, False):
            access = self.access()
            content, _, signature = access.issue_token("alice", [])["token"].rpartition(".")
            forged = f"Bearer {content}.{'A' * len(signature)}"
            attempts = [*(basic(name, "wrong") for name in access._users.get()), forged]
            attempts += [basic("alice", "right"), f"Bearer {content}.{signature}"]
            with mock.patch.object(hmac, "compare_digest", return_value=verdict):
                for attempt in attempts:
                    with self.subTest(attempt, verdict=verdict):
                        try:
                            access.identify(attempt, "127.0.0.1")
                        except registry.RegistryError:
                            self.assertFalse(verdict)
                        else:
                            self.assertTrue(verdict)
