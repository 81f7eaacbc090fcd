"""Reading blobs: bytes, headers, ranges."""

from __future__ import annotations

import os

from tests.support import MALFORMED_DIGESTS, MEBIBYTE, RegistryTestCase, Response, digest_of, unique


class BlobsAreServedAsPushed(RegistryTestCase):
    def test_a_blob_is_served_as_pushed(self) -> None:
        for algorithm in ("sha256", "sha512"):
            with self.subTest(algorithm):
                content = unique()
                digest = self.client.push_blob(content, algorithm)
                response = self.client.get(f"blobs/{digest}")
                self.assert_status(response, 200)
                self.assertEqual(response.body, content)
                self.assert_blob_headers(response, digest, len(content))

    def test_head_tells_what_get_would(self) -> None:
        for content in (unique(), b"{}", b""):
            with self.subTest(content):
                digest = self.client.push_blob(content)
                head, get = self.client.head(f"blobs/{digest}"), self.client.get(f"blobs/{digest}")
                self.assert_status(head, 200)
                self.assertEqual(head.body, b"")
                self.assert_blob_headers(head, digest, len(content))
                self.assertEqual(head.headers["ETag"], get.headers["ETag"])
                self.assertEqual(head.headers.get("Content-Type"), get.headers.get("Content-Type"))

    def assert_blob_headers(self, response: Response, digest: str, size: int) -> None:
        self.assertEqual(response.headers["Docker-Content-Digest"], digest)
        self.assertEqual(response.headers["Content-Length"], str(size))
        self.assertEqual(response.headers["Accept-Ranges"], "bytes")
        self.assertTrue(response.headers["ETag"])

    def test_an_empty_blob_is_a_blob(self) -> None:
        for algorithm in ("sha256", "sha512"):
            with self.subTest(algorithm):
                digest = self.client.push_blob(b"", algorithm)
                response = self.client.get(f"blobs/{digest}")
                self.assert_status(response, 200)
                self.assertEqual((response.headers["Content-Length"], response.body), ("0", b""))

    def test_a_large_blob_comes_whole_and_in_parts(self) -> None:
        content = os.urandom(6 * MEBIBYTE + 13)
        digest = self.client.push_blob(content)
        self.assert_blob(self.client, content)
        start, end = 3 * MEBIBYTE - 1, 5 * MEBIBYTE + 1
        part = self.client.get(f"blobs/{digest}", {"Range": f"bytes={start}-{end}"})
        self.assert_status(part, 206)
        self.assertEqual(part.body, content[start : end + 1])

    def test_an_unknown_blob_is_404(self) -> None:
        self.client.push_blob(unique())
        for digest in (digest_of(b"unknown"), digest_of(b"unknown", "sha512")):
            with self.subTest(digest):
                self.assert_error(self.client.get(f"blobs/{digest}"), 404, "BLOB_UNKNOWN")
                self.assert_error(self.client.delete(f"blobs/{digest}"), 404, "BLOB_UNKNOWN")
                self.assertEqual(self.client.head(f"blobs/{digest}").status, 404)

    def test_a_blob_of_another_repository_is_404(self) -> None:
        digest = self.other.push_blob(unique())
        self.client.push_blob(unique())
        self.assert_error(self.client.get(f"blobs/{digest}"), 404, "BLOB_UNKNOWN")
        self.assert_error(self.client.delete(f"blobs/{digest}"), 404, "BLOB_UNKNOWN")
        self.assert_status(self.other.get(f"blobs/{digest}"), 200)

    def test_the_same_bytes_under_another_algorithm_are_another_blob(self) -> None:
        content = unique()
        self.client.push_blob(content)
        self.assert_error(self.client.get(f"blobs/{digest_of(content, 'sha512')}"), 404, "BLOB_UNKNOWN")

    def test_a_malformed_digest_is_400(self) -> None:
        self.client.push_blob(unique())
        for digest in MALFORMED_DIGESTS:
            with self.subTest(digest):
                self.assert_error(self.client.get(f"blobs/{digest}"), 400, "DIGEST_INVALID")
                self.assert_error(self.client.delete(f"blobs/{digest}"), 400, "DIGEST_INVALID")
                self.assertEqual(self.client.head(f"blobs/{digest}").status, 400)

    def test_a_percent_encoded_digest_is_the_digest(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        for encoded in (digest.replace(":", "%3A"), digest.replace(":", "%3a"), digest.replace("s", "%73")):
            with self.subTest(encoded):
                self.assertEqual(self.client.get(f"blobs/{encoded}").body, content)

    def test_a_blob_is_a_file_named_by_its_digest(self) -> None:
        content = unique()
        for algorithm in ("sha256", "sha512"):
            name, _, hexadecimal = self.client.push_blob(content, algorithm).partition(":")
            self.assertEqual((self.data.path / "blobs" / name / hexadecimal).read_bytes(), content)


class RangesAreExact(RegistryTestCase):
    CONTENT = b"0123456789"

    def setUp(self) -> None:
        super().setUp()
        self.digest = self.client.push_blob(self.CONTENT)

    def get(self, requested: str) -> Response:
        return self.client.get(f"blobs/{self.digest}", {"Range": requested})

    def test_a_range_is_served_exactly(self) -> None:
        for requested, start, end in (
            ("bytes=0-0", 0, 0),
            ("bytes=9-9", 9, 9),
            ("bytes=0-9", 0, 9),
            ("bytes=2-5", 2, 5),
            ("bytes=5-", 5, 9),
            ("bytes=0-", 0, 9),
            ("bytes=9-", 9, 9),
            ("bytes=5-9999", 5, 9),
            ("bytes=0-99999999999999999999999999", 0, 9),
            ("bytes=0000000000000000000005-", 5, 9),
            ("bytes=5-0000000000000000000007", 5, 7),
            ("bytes=-0000000000000000000003", 7, 9),
            ("bytes=000-000", 0, 0),
            ("bytes=-1", 9, 9),
            ("bytes=-3", 7, 9),
            ("bytes=-10", 0, 9),
            ("bytes=-9999", 0, 9),
            ("Bytes=1-1", 1, 1),
        ):
            with self.subTest(requested):
                response = self.get(requested)
                self.assert_status(response, 206)
                self.assertEqual(response.headers["Content-Range"], f"bytes {start}-{end}/10")
                self.assertEqual(response.headers["Content-Length"], str(end - start + 1))
                self.assertEqual(response.headers["Docker-Content-Digest"], self.digest)
                self.assertEqual(response.body, self.CONTENT[start : end + 1])

    def test_a_range_outside_the_blob_is_416(self) -> None:
        for requested in (
            "bytes=10-",
            "bytes=10-20",
            "bytes=9999-",
            "bytes=500-0",
            "bytes=5-2",
            "bytes=-0",
            "bytes=" + "9" * 6000 + "-",
        ):
            with self.subTest(requested):
                response = self.get(requested)
                self.assert_error(response, 416)
                self.assertEqual(response.headers["Content-Range"], "bytes */10")

    def test_any_range_of_an_empty_blob_is_416(self) -> None:
        digest = self.client.push_blob(b"")
        for requested in ("bytes=0-", "bytes=0-0", "bytes=1-", "bytes=-1"):
            with self.subTest(requested):
                response = self.client.get(f"blobs/{digest}", {"Range": requested})
                self.assert_error(response, 416)
                self.assertEqual(response.headers["Content-Range"], "bytes */0")

    def test_what_is_no_range_is_ignored(self) -> None:
        """RFC 9110, 14.2; so are several ranges, which nobody has to serve."""
        for requested in (
            "", "bytes", "bytes=", "bytes=-", "bytes=--3", "bytes=a-b", "bytes=1", "bytes=1-2-3",
            "bytes=+1-2", "bytes=0x1-2", "bytes=1_0-", "bytes=\xb2-\xb3", "bytes=1.5-2", "bytes= 1 - 2 ",
            "bytes:1-2", "items=1-2", "bytes=1-2,4-5", "bytes=1-2, 100-200", "bytes=-1,-2",
            "bytes=" + ",".join(["0-"] * 200),
        ):  # fmt: skip
            with self.subTest(requested[:40]):
                response = self.get(requested)
                self.assert_status(response, 200)
                self.assertEqual(response.body, self.CONTENT)

    def test_a_range_counts_for_get_alone(self) -> None:
        for requested in ("bytes=2-5", "bytes=99-"):
            response = self.client.head(f"blobs/{self.digest}", {"Range": requested})
            self.assert_status(response, 200)
            self.assertEqual(response.headers["Content-Length"], "10")
            self.assertNotIn("Content-Range", response.headers)
