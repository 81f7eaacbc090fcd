"""Those who guess passwords are slowed down, and nobody else is."""

from __future__ import annotations

import threading
import time
import unittest
from typing import Any
from unittest import mock

import registry
from tests.access import USERS, AccessTestCase
from tests.credentials import AuthorizedClient, basic
from tests.support import TIMEOUT, Response, run_at_once


class FailuresAreSlowedDown(AccessTestCase):
    """Those who guess passwords are slowed down, and nobody else is."""

    def setUp(self) -> None:
        super().setUp()
        self.slept: list[float] = []
        self.enter(mock.patch.object(registry.time, "sleep", self.slept.append))

    def guess(self, client: AuthorizedClient, name: str, password: str, address: str = "") -> Response:
        headers = {"X-Forwarded-For": address} if address else {}
        return client.as_caller(basic(name, password)).get("/v2/", headers)

    def test_who_knows_the_password_gets_in_however_often_others_failed(self) -> None:
        client = self.serve()
        for number in range(120):
            self.assert_status(
                self.guess(client, "puller" if number % 2 else f"nobody{number}", "wrong"), 401
            )
        for name in USERS:
            before = len(self.slept)
            self.assert_status(self.guess(client, name, f"{name}'s"), 200)
            self.assertEqual(len(self.slept), before)

    def test_failures_are_answered_later_and_later(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        for number in range(30):
            self.assert_status(self.guess(client, f"nobody{number}", "x", "203.0.113.7"), 401)
        self.assertEqual(self.slept[:5], [0.0] * 5)
        self.assertEqual(self.slept, sorted(self.slept))
        self.assertEqual((self.slept[5], self.slept[-1]), (0.2, 2.0))
        self.guess(client, "puller", "x", "203.0.113.8")
        self.assertEqual(self.slept.pop(), 0.0)

    def test_failures_are_forgotten(self) -> None:
        self.patch(FAILURE_INTERVAL=0.0)
        client = self.serve()
        for _ in range(20):
            self.guess(client, "puller", "wrong")
        self.assertEqual(set(self.slept), {0.0})

    def test_clients_of_ipv6_are_told_apart_by_64_bits(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        for number in range(20):
            self.guess(client, "puller", "wrong", f"2001:db8:0:1:{number:x}::1")
        self.assertEqual(self.slept[-1], 2.0)
        for address in ("2001:db8:0:2::1", "2001:db8:1:1::1", "::1"):
            self.guess(client, "puller", "wrong", address)
            self.assertEqual(self.slept[-1], 0.0)

    def test_guesses_made_at_once_are_slowed_down_too(self) -> None:
        """One at a time is looked at, from the start of its check until it is answered."""
        client = self.serve()
        busy: list[int] = [0]

        def occupy(*_: Any) -> bool:
            busy.append(busy[-1] + 1)
            threading.Event().wait(0.001)
            busy.append(busy[-1] - 1)
            return False

        with mock.patch.object(registry.time, "sleep", occupy):
            users = {"puller": ("", occupy)}
            with mock.patch.object(self.registry.server.context.access._users, "_value", users):
                run_at_once(*[lambda n=n: self.guess(client, "puller", f"{n}") for n in range(40)])
        self.assertEqual(len(busy), 1 + 40 * 2 * 2)
        self.assertEqual(max(busy), 1)

    def test_one_password_is_hashed_at_a_time(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        busy: list[int] = [0]

        def check(_password: str) -> bool:
            busy.append(busy[-1] + 1)
            threading.Event().wait(0.002)
            busy.append(busy[-1] - 1)
            return False

        users = {"puller": ("", check)}
        with mock.patch.object(self.registry.server.context.access._users, "_value", users):
            run_at_once(*[lambda n=n: self.guess(client, "puller", "x", f"203.0.113.{n}") for n in range(20)])
        self.assertEqual((len(busy), max(busy)), (41, 1))

    def test_guesses_elsewhere_do_not_keep_others_waiting(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        checks: list[str] = []
        begun = threading.Event()

        def check(password: str) -> bool:
            checks.append(password)
            if len(checks) > 5:
                begun.set()
            threading.Event().wait(0.005)
            return password == "right"

        def log_in() -> int:
            begun.wait(TIMEOUT)
            before = len(checks)
            self.assert_status(self.guess(client, "puller", "right", "203.0.113.8"), 200)
            return len(checks) - before

        users = {"puller": ("", check)}
        with mock.patch.object(self.registry.server.context.access._users, "_value", users):
            guesses = [lambda n=n: self.guess(client, "puller", f"{n}", "203.0.113.7") for n in range(80)]
            waited, *replies = run_at_once(log_in, *guesses)
        self.assertLess(waited, 30)
        self.assertEqual({reply.status for reply in replies}, {401})

    def test_guesses_from_many_addresses_do_not_keep_others_waiting(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        access = self.registry.server.context.access
        checks: list[str] = []
        begun = threading.Event()

        def check(password: str) -> bool:
            checks.append(password)
            begun.set()
            threading.Event().wait(0.01)
            return password == "right"

        def log_in() -> int:
            begun.wait(TIMEOUT)
            before = len(checks)
            self.assert_status(self.guess(client, "puller", "right", "203.0.113.8"), 200)
            return checks.index("right") - before

        guesses = []
        for number in range(60):
            access._queue.failures.put(bytes((198, 51, 100, number)), 1, TIMEOUT)
            guesses.append(lambda n=number: self.guess(client, "puller", "x", f"198.51.100.{n}"))
        with mock.patch.object(access._users, "_value", {"puller": ("", check)}):
            waited, *_ = run_at_once(log_in, *guesses)
        self.assertLess(waited, 20)

    def test_those_who_log_in_alike_are_hashed_once(self) -> None:
        check = mock.Mock(side_effect=lambda _password: not threading.Event().wait(0.05))
        client = self.serve()
        users = {"puller": ("hash", check)}
        with mock.patch.object(self.registry.server.context.access._users, "_value", users):
            replies = run_at_once(*[lambda: self.guess(client, "puller", "right")] * 30)
        self.assertEqual({reply.status for reply in replies}, {200})
        self.assertEqual(check.call_count, 1)

    def test_a_worthless_token_is_no_guess(self) -> None:
        client = self.serve()
        for _ in range(20):
            self.assert_status(client.as_caller("Bearer a.b.c").get("/v2/"), 401)
        self.assertEqual(self.slept, [])

    def test_nothing_is_kept_of_the_names_that_failed(self) -> None:
        client = self.serve()
        for number in range(20):
            self.guess(client, f"{number}".ljust(255, "x"), "wrong")
        access = self.registry.server.context.access
        self.assertEqual(list(access._queue.failures._things), [bytes((127, 0, 0, 1))])
        self.assertEqual((access._queue._waiting, access._verified._things), ({}, {}))

    def test_what_has_expired_is_dropped(self) -> None:
        cache = registry.Cache(10)
        for moment, key in enumerate("abcdef"):
            with mock.patch.object(registry.time, "monotonic", return_value=float(moment)):
                cache.put(key, key, 2.5)
                self.assertEqual(list(cache._things), list("abcdef"[max(moment - 2, 0) : moment + 1]))


class LoginsTakeTurns(unittest.TestCase):
    """Whose turn it is."""

    def setUp(self) -> None:
        self.queue = registry.LoginQueue(100)
        self.order: list[str] = []
        self.threads: list[threading.Thread] = []

    def attempt(self, address: str, name: str, label: str) -> None:
        """Begin an attempt in a thread of its own, and see it wait or be over."""

        def run() -> None:
            try:
                with self.queue.turn(address, name):
                    self.order.append(label)
            except registry.RegistryError as error:
                self.assertIs(error.code, registry.ErrorCode.TOOMANYREQUESTS)
                self.assertEqual(error.headers, (("Retry-After", "1"),))
                self.order.append(f"{label} refused")

        waiting = self.waiting()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.threads.append(thread)
        deadline = time.monotonic() + TIMEOUT
        while label not in self.order and self.waiting() <= waiting and time.monotonic() < deadline:
            if any(text.endswith("refused") for text in self.order):
                break
            thread.join(0.001)

    def waiting(self) -> int:
        return sum(map(len, self.queue._waiting.values()))

    def finish(self) -> list[str]:
        for thread in self.threads:
            thread.join(TIMEOUT)
        return self.order

    def test_names_that_fewest_wait_for_and_the_newest_go_first(self) -> None:
        with self.queue.turn("a", "ci"):
            for name, label in (("ci", "1"), ("bob", "2"), ("ci", "3"), ("alice", "4"), ("ci", "5")):
                self.attempt("a", name, label)
            self.assertEqual(self.order, [])
        self.assertEqual(self.finish(), ["4", "2", "5", "3", "1"])
        self.assertEqual(self.queue._waiting, {})

    def test_addresses_do_not_wait_for_one_another(self) -> None:
        with self.queue.turn("a", "ci"):
            self.attempt("a", "ci", "1")
            self.attempt("b", "ci", "2")
            self.assertEqual(self.order, ["2"])
        self.assertEqual(self.finish(), ["2", "1"])

    def test_the_address_with_most_attempts_loses_the_oldest(self) -> None:
        with (
            mock.patch.object(self.queue, "_limit", 6),
            self.queue.turn("b", "x"),
            self.queue.turn("a", "x"),
        ):
            for address, name, label in (
                ("a", "alice", "1"),
                ("a", "ci", "2"),
                ("a", "ci", "3"),
                ("b", "ci", "4"),
            ):
                self.attempt(address, name, label)
            self.attempt("c", "alice", "5")
            self.threads[1].join(TIMEOUT)
            self.threads[-1].join(TIMEOUT)
            self.assertEqual(sorted(self.order), ["2 refused", "5"])
        self.assertEqual(sorted(self.finish()), ["1", "2 refused", "3", "4", "5"])

    def test_there_is_a_limit_for_as_many_addresses_too(self) -> None:
        with (
            mock.patch.object(self.queue, "_limit", 2),
            self.queue.turn("a", "x"),
            self.queue.turn("b", "x"),
        ):
            self.attempt("c", "x", "1")
            self.threads[0].join(TIMEOUT)
            self.assertEqual(self.order, ["1 refused"])
            self.attempt("a", "x", "2")
            self.assertEqual(self.finish(), ["1 refused", "2 refused"])
        self.assertEqual(self.queue._waiting, {})

    def test_only_so_many_addresses_are_remembered(self) -> None:
        with mock.patch.object(registry.time, "sleep"):
            for number in range(3000):
                self.queue.fail(number.to_bytes(8, "big"))
        self.assertLessEqual(len(self.queue.failures._things), 1000)

    def test_addresses_that_are_slowed_down_leave_room(self) -> None:
        with (
            mock.patch.object(self.queue, "_limit", 2),
            mock.patch.object(registry.time, "sleep") as sleep,
        ):
            with self.queue.turn("a", "x"):
                self.queue.fail("a")
                self.assertEqual(sleep.call_count, 1)
                with self.queue.turn("b", "x"):
                    self.queue.fail("b")
            self.assertEqual(sleep.call_count, 1)
