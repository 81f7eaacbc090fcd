"""A short fuzz run; tests/fuzz.py is the long one."""

from __future__ import annotations

import unittest

from tests.fuzz import fuzz


class FuzzTest(unittest.TestCase):
    def test_mutated_requests_do_no_harm(self) -> None:
        self.run_and_check(1200)

    def test_nor_do_they_where_users_are_asked_for(self) -> None:
        self.run_and_check(600, users=True)

    def run_and_check(self, requests: int, **options: bool) -> None:
        fuzzer, summary = fuzz(requests, seed=4, **options)
        self.assertEqual(fuzzer.failures, [], summary)
        self.assertGreaterEqual(fuzzer.requests, requests)
        self.assertGreater(fuzzer.replies[201], requests / 20, summary)


if __name__ == "__main__":
    unittest.main()
