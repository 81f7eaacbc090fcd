"""Mounting a blob of one repository in another."""

from __future__ import annotations

from typing import Any
from unittest import mock

from tests.support import MALFORMED_QUERIES, Response, UploadTestCase, digest_of, unique


class BlobsAreMounted(UploadTestCase):
    def mount(self, digest: str, source: str | None = None) -> Response:
        query = f"?mount={digest}" + ("" if source is None else f"&from={source}")
        return self.client.post(f"blobs/uploads/{query}")

    def test_a_blob_is_mounted_from_its_repository(self) -> None:
        for algorithm in ("sha256", "sha512"):
            for source in (self.other.repository, self.other.repository.replace("/", "%2F"), None):
                with self.subTest(algorithm, source=source):
                    content = unique()
                    digest = self.other.push_blob(content, algorithm)
                    self.assert_pushed(self.mount(digest, source), self.client, digest)
                    self.assert_blob(self.client, content, algorithm)
                    links = [self.client.repository, self.other.repository]
                    self.assertEqual(self.data.links(digest), links)
        self.assert_consistent()

    def test_a_mounted_digest_may_be_percent_encoded(self) -> None:
        digest = self.other.push_blob(unique())
        response = self.mount(digest.replace(":", "%3A"), self.other.repository)
        self.assert_pushed(response, self.client, digest)

    def test_a_blob_that_its_source_loses_meanwhile_is_not_mounted(self) -> None:
        digest, files = self.other.push_blob(unique()), self.registry.store.files
        find = files.open

        def find_and_delete(*arguments: Any) -> Any:
            found = find(*arguments)
            self.other.expect(202, "DELETE", f"blobs/{digest}")
            return found

        with mock.patch.object(files, "open", find_and_delete):
            response = self.mount(digest, self.other.repository)
        self.assert_status(response, 202)
        self.assert_no_blob(self.client, digest)
        self.client.expect(204, "DELETE", response.headers["Location"])
        self.assert_consistent()

    def test_a_mounted_blob_outlives_its_source(self) -> None:
        content = unique()
        digest = self.other.push_blob(content)
        self.assert_status(self.mount(digest, self.other.repository), 201)
        self.other.expect(202, "DELETE", f"blobs/{digest}")
        self.assert_blob(self.client, content)

    def test_mounting_what_is_there_already_is_201(self) -> None:
        digest = self.client.push_blob(unique())
        self.other.push_blob(unique())
        for source in (self.client.repository, None):
            with self.subTest(source):
                self.assert_pushed(self.mount(digest, source), self.client, digest)
        self.assertEqual(self.data.links(digest), [self.client.repository])

    def test_a_mount_that_misses_is_an_ordinary_session(self) -> None:
        elsewhere = self.client.at(self.client.repository + "-elsewhere")
        deleted, kept = unique(), unique()
        for content in (deleted, kept):
            self.other.push_blob(content)
        self.other.expect(202, "DELETE", f"blobs/{digest_of(deleted)}")
        elsewhere.push_blob(unique())
        for digest, source in (
            (digest_of(b"unknown"), self.other.repository),
            (digest_of(b"unknown"), "unheard/of"),
            (digest_of(b"unknown"), None),
            (digest_of(b"unknown", "sha512"), self.other.repository),
            (digest_of(deleted), self.other.repository),
            (digest_of(kept), elsewhere.repository),
            (digest_of(kept), "Not%20A%20Name"),
            (digest_of(kept), "..%2F..%2Fetc"),
            (digest_of(kept), "%00"),
        ):
            with self.subTest(digest, source=source):
                response = self.mount(digest, source)
                self.assert_session(response, 202, "0-0")
                self.assert_error(self.client.get(f"blobs/{digest}"), 404)
                content = unique()
                self.finish(response.headers["Location"], content, content)

    def test_mounting_a_malformed_digest_is_400(self) -> None:
        for digest in MALFORMED_QUERIES:
            with self.subTest(digest):
                self.assert_error(self.mount(digest, self.other.repository), 400, "DIGEST_INVALID")
