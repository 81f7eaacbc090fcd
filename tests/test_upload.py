"""Uploading a blob in one request or in a session, and all the ways to fail."""

from __future__ import annotations

import functools
import os

from tests.support import (
    EMPTY_SHA256,
    MALFORMED_QUERIES,
    Response,
    UploadTestCase,
    digest_of,
    run_at_once,
    unique,
)


class OnePostIsEnough(UploadTestCase):
    """One POST with the digest and the body."""

    def post(self, digest: str, body: object) -> Response:
        return self.client.post(f"blobs/uploads/?digest={digest}", body)

    def test_a_matching_body_is_a_blob_at_once(self) -> None:
        for algorithm in ("sha256", "sha512"):
            with self.subTest(algorithm):
                content = unique()
                digest = digest_of(content, algorithm)
                response = self.post(digest, content)
                self.assert_pushed(response, self.client, digest)
                self.assertEqual(self.client.get(response.headers["Location"]).body, content)
                head = self.client.head(response.headers["Location"])
                self.assertEqual(head.headers["Content-Length"], str(len(content)))
                self.assertEqual(self.data.recorded()[digest], len(content))
        self.assert_nothing_unfinished()

    def test_the_body_may_be_chunked(self) -> None:
        pieces = [os.urandom(n) for n in (1, 70000, 3, 4096)]
        content = b"".join(pieces)
        digest = digest_of(content)
        self.assert_pushed(self.post(digest, iter(pieces)), self.client, digest)
        self.assert_blob(self.client, content)
        self.assertEqual(self.data.recorded()[digest], len(content))

    def test_an_empty_body_has_the_empty_digest(self) -> None:
        for client, body in ((self.client, b""), (self.other, iter(()))):
            response = client.post(f"blobs/uploads/?digest={EMPTY_SHA256}", body)
            self.assert_pushed(response, client, EMPTY_SHA256)
            self.assertEqual(client.head(f"blobs/{EMPTY_SHA256}").headers["Content-Length"], "0")
        self.assertEqual(self.data.recorded()[EMPTY_SHA256], 0)

    def test_the_digest_may_be_percent_encoded(self) -> None:
        content = unique()
        digest = digest_of(content)
        response = self.post(digest.replace(":", "%3A"), content)
        self.assert_pushed(response, self.client, digest)

    def test_the_content_type_does_not_matter(self) -> None:
        for kind in ("application/octet-stream", "text/plain", "application/x-www-form-urlencoded"):
            with self.subTest(kind):
                content = unique()
                path = f"blobs/uploads/?digest={digest_of(content)}"
                self.assert_status(self.client.post(path, content, {"Content-Type": kind}), 201)
                self.assert_blob(self.client, content)

    def test_the_blob_belongs_to_that_repository_only(self) -> None:
        digest = self.client.push_blob(unique())
        self.other.push_blob(unique())
        self.assert_error(self.other.get(f"blobs/{digest}"), 404, "BLOB_UNKNOWN")
        self.assertEqual(self.data.links(digest), [self.client.repository])

    def test_a_body_with_another_digest_leaves_nothing(self) -> None:
        for algorithm in ("sha256", "sha512"):
            for body in (unique(), iter([unique()]), b""):
                with self.subTest(algorithm, body=body):
                    claimed = digest_of(b"claimed", algorithm)
                    self.assert_error(self.post(claimed, body), 400, "DIGEST_INVALID")
                    self.assert_no_blob(self.client, claimed)
        self.assert_nothing_unfinished()

    def test_a_body_with_another_digest_is_under_neither(self) -> None:
        content, claimed = unique(), digest_of(unique())
        self.assert_error(self.post(claimed, content), 400, "DIGEST_INVALID")
        for digest in (claimed, digest_of(content)):
            self.assert_no_blob(self.client, digest)

    def test_a_malformed_digest_leaves_nothing(self) -> None:
        content = unique()
        for digest in MALFORMED_QUERIES:
            with self.subTest(digest):
                self.assert_error(self.post(digest, content), 400, "DIGEST_INVALID")
                self.assert_no_blob(self.client, digest_of(content))
        self.assert_nothing_unfinished()

    def test_a_failed_push_does_not_make_a_repository(self) -> None:
        self.post(digest_of(b"claimed"), unique())
        self.assert_error(self.client.get("tags/list"), 404, "NAME_UNKNOWN")

    def test_the_same_blob_again_changes_nothing(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        self.assert_pushed(self.post(digest, content), self.client, digest)
        self.assertEqual(self.data.links(digest), [self.client.repository])
        self.assert_blob(self.client, content)
        self.assert_nothing_unfinished()

    def test_the_same_blob_elsewhere_adds_a_link_only(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        self.other.push_blob(content)
        self.assertEqual(self.data.links(digest), [self.client.repository, self.other.repository])
        self.assertEqual(self.data.recorded()[digest], len(content))
        self.assert_blob(self.other, content)
        self.assert_consistent()

    def test_a_known_digest_does_not_vouch_for_another_body(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        for client in (self.client, self.other):
            response = client.post(f"blobs/uploads/?digest={digest}", unique())
            self.assert_error(response, 400, "DIGEST_INVALID")
        self.assert_blob(self.client, content)
        self.assertEqual(self.data.links(digest), [self.client.repository])

    def test_first_pushes_of_one_blob_at_once_all_succeed(self) -> None:
        content = os.urandom(300_000)
        digest = digest_of(content)
        clients = [self.client] * 8 + [self.other] * 8
        path = f"blobs/uploads/?digest={digest}"
        responses = run_at_once(*(functools.partial(client.post, path, content) for client in clients))
        for client, response in zip(clients, responses):
            self.assert_pushed(response, client, digest)
        for client in (self.client, self.other):
            self.assert_blob(client, content)
        self.assertEqual(self.data.links(digest), [self.client.repository, self.other.repository])
        self.assert_consistent()

    def test_a_client_gone_in_mid_body_leaves_nothing(self) -> None:
        content = os.urandom(200_000)
        path = self.client.path(f"blobs/uploads/?digest={digest_of(content)}")
        for framing, sent in (
            (f"Content-Length: {len(content)}", content[:-1]),
            (f"Content-Length: {len(content)}", b""),
            ("Transfer-Encoding: chunked", b"%x\r\n" % len(content) + content[:-1]),
            ("Transfer-Encoding: chunked", b"%x\r\n" % len(content) + content),
            ("Transfer-Encoding: chunked", b"%x\r\n" % len(content) + content + b"\r\n"),
            ("Transfer-Encoding: chunked", b"%x\r\n" % len(content) + content + b"\r\n0\r\n"),
        ):
            with self.subTest(framing, sent=len(sent)):
                connection = self.connect().request("POST", path, framing, body=sent)
                connection.stop_sending()
                response = connection.read_unless_closed()
                self.assertNotEqual(response and response.status, 201)
                self.assertTrue(connection.is_closed())
                self.assert_no_blob(self.client, digest_of(content))
                self.assert_nothing_unfinished()
