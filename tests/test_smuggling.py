"""Nobody hides a request in another: what is ambiguous is refused, and nothing after it is answered."""

from __future__ import annotations

import unittest

from tests.smuggling import CORPUS, SMUGGLED
from tests.support import RawConnection, RegistryTestCase, digest_of

DIGEST = digest_of(b"hello")


class SmugglingTest(RegistryTestCase):
    def send(self, data: bytes) -> RawConnection:
        upload = self.client.path(f"blobs/uploads/?digest={DIGEST}")
        return self.connect().send(data.replace(b"{upload}", upload.encode()))

    def test_what_is_ambiguous_is_refused_and_ends_the_connection(self) -> None:
        for name, data in CORPUS:
            with self.subTest(name):
                connection = self.send(data + SMUGGLED)
                connection.stop_sending()
                response = connection.read()
                self.assert_error(response, 400)
                self.assertEqual(response.headers["Connection"], "close")
                self.assertTrue(connection.is_closed(), "a second answer")
        self.assert_no_blob(self.client, DIGEST)
        self.assert_nothing_unfinished()

    def test_it_is_refused_wherever_packets_end(self) -> None:
        for name, data in CORPUS[::5]:
            with self.subTest(name):
                connection = self.connect()
                upload = self.client.path(f"blobs/uploads/?digest={DIGEST}").encode()
                for byte in data.replace(b"{upload}", upload)[:2000]:
                    connection.send(bytes([byte]))
                connection.stop_sending()
                self.assert_error(connection.read(), 400)
                self.assertTrue(connection.is_closed(), "a second answer")

    def test_the_smuggled_request_would_be_answered_on_its_own(self) -> None:
        connection = self.send(SMUGGLED * 2)
        for _ in range(2):
            self.assert_error(connection.read(), 404, "NAME_UNKNOWN")


if __name__ == "__main__":
    unittest.main()
