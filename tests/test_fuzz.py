"""A short fuzz run; tests/fuzz.py is the long one."""

from __future__ import annotations

import unittest

from tests.fuzz import fuzz


class FuzzTest(unittest.TestCase):
    def test_mutated_requests_do_no_harm(self) -> None:
        fuzzer, summary = fuzz(requests=2000, seed=4)
        self.assertEqual(fuzzer.failures, [], summary)
        self.assertGreaterEqual(fuzzer.requests, 2000)
        self.assertGreater(fuzzer.replies[201], 100, summary)


if __name__ == "__main__":
    unittest.main()
