"""Uploading blobs: in one request, in a session, in pieces, by mounting; and all the ways to fail."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import os
import shutil
import sqlite3
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests import upkeep
from tests.support import (
    MALFORMED_DIGESTS,
    MEBIBYTE,
    TIMEOUT,
    Client,
    HTTPTestCase,
    RegistryTestCase,
    Response,
    digest_of,
    run_at_once,
    unique,
    with_digest,
)

EMPTY_SHA256 = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
MALFORMED_QUERIES = (*MALFORMED_DIGESTS, "", "%00", "sha256:..%2F..%2Fregistry.db")


class UploadTestCase(RegistryTestCase):
    """Upload sessions seen from a client that is resuming them."""

    def received(self, location: str) -> str:
        """The Range of an upload session."""
        return self.client.expect(204, "GET", location).headers["Range"]

    def append(self, location: str, content: bytes, content_range: str = "") -> Response:
        headers = {"Content-Range": content_range} if content_range else {}
        return self.client.patch(location, content, headers)

    def finish(self, location: str, content: bytes, rest: bytes = b"", algorithm: str = "sha256") -> None:
        """Finish a session that must amount to `content`, sending `rest` of it."""
        self.client.expect(201, "PUT", with_digest(location, digest_of(content, algorithm)), rest)
        self.assert_blob(self.client, content, algorithm)

    def assert_session(self, response: Response, status: int, received: str) -> None:
        self.assert_status(response, status)
        self.assertEqual(response.headers["Range"], received)
        prefix = f"/v2/{self.client.repository}/blobs/uploads/"
        self.assertTrue(response.headers["Location"].startswith(prefix), response)

    def assert_pushed(self, response: Response, client: Client, digest: str) -> None:
        self.assert_status(response, 201)
        self.assertEqual(response.headers["Location"], f"/v2/{client.repository}/blobs/{digest}")
        self.assertEqual(response.headers["Docker-Content-Digest"], digest)


class SinglePostTest(UploadTestCase):
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


class SessionTest(UploadTestCase):
    """POST, then PUT, then whatever else."""

    def test_a_session_opens_empty(self) -> None:
        response = self.client.post("blobs/uploads/")
        self.assert_session(response, 202, "0-0")
        self.assertIn(response.headers["Docker-Upload-UUID"], response.headers["Location"])
        self.assertEqual(self.received(response.headers["Location"]), "0-0")

    def test_a_session_opens_without_a_content_length(self) -> None:
        connection = self.connect().request("POST", self.client.path("blobs/uploads/"))
        self.assert_session(connection.read(), 202, "0-0")
        self.assert_clean_afterwards(connection)

    def test_a_body_that_comes_with_no_digest_is_no_blob(self) -> None:
        content = unique()
        with self.client.keep_alive() as client:
            self.assert_status(client.post("blobs/uploads/", content), 202)
            self.assert_error(client.get(f"blobs/{digest_of(content)}"), 404)

    def test_every_session_is_another(self) -> None:
        self.assertEqual(len({self.client.open_upload() for _ in range(20)}), 20)

    def test_one_put_takes_the_whole_body(self) -> None:
        for algorithm in ("sha256", "sha512"):
            for kind in ("application/octet-stream", "text/plain"):
                with self.subTest(algorithm, kind=kind):
                    content = unique()
                    digest = digest_of(content, algorithm)
                    location = self.client.open_upload()
                    response = self.client.put(with_digest(location, digest), content, {"Content-Type": kind})
                    self.assert_pushed(response, self.client, digest)
                    self.assert_blob(self.client, content, algorithm)
                    self.assert_no_session(location)
        self.assert_nothing_unfinished()

    def test_the_put_may_be_chunked(self) -> None:
        pieces = [unique(), os.urandom(100_000), unique()]
        content = b"".join(pieces)
        self.client.expect(
            201, "PUT", with_digest(self.client.open_upload(), digest_of(content)), iter(pieces)
        )
        self.assert_blob(self.client, content)
        self.assertEqual(self.data.recorded()[digest_of(content)], len(content))

    def test_the_put_may_hold_nothing(self) -> None:
        self.finish(self.client.open_upload(), b"")

    def test_the_digest_of_a_put_may_be_percent_encoded(self) -> None:
        content = unique()
        location = with_digest(self.client.open_upload(), digest_of(content).replace(":", "%3A"))
        self.assert_pushed(self.client.put(location, content), self.client, digest_of(content))

    def test_a_put_with_another_digest_makes_no_blob(self) -> None:
        content = unique()
        for claimed in (digest_of(b"claimed"), digest_of(b"claimed", "sha512"), digest_of(b"")):
            with self.subTest(claimed):
                location = self.client.open_upload()
                response = self.client.put(with_digest(location, claimed), content)
                self.assert_error(response, 400, "DIGEST_INVALID")
                self.assert_error(self.client.get(f"blobs/{claimed}"), 404)
                self.assert_no_blob(self.client, digest_of(content))
                self.client.delete(location)
        self.assert_nothing_unfinished()

    def test_a_put_with_a_malformed_digest_makes_no_blob(self) -> None:
        content = unique()
        for digest in MALFORMED_QUERIES:
            with self.subTest(digest):
                location = self.client.open_upload()
                response = self.client.put(with_digest(location, digest), content)
                self.assert_error(response, 400, "DIGEST_INVALID")
                self.assert_no_blob(self.client, digest_of(content))
                self.client.delete(location)
        self.assert_nothing_unfinished()

    def test_a_put_without_a_digest_is_400(self) -> None:
        content = unique()
        response = self.client.put(self.client.open_upload(), content)
        self.assert_error(response, 400, "DIGEST_INVALID")
        self.assert_no_blob(self.client, digest_of(content))

    def test_a_session_can_be_cancelled(self) -> None:
        location = self.client.open_upload()
        self.append(location, unique())
        self.assert_status(self.client.delete(location), 204)
        self.assert_no_session(location)
        self.assert_nothing_unfinished()

    def test_an_ended_session_is_404_to_everything(self) -> None:
        content = unique()
        cancelled, finished = self.client.open_upload(), self.client.open_upload()
        self.client.expect(204, "DELETE", cancelled)
        self.finish(finished, content, content)
        for location in (cancelled, finished, self.client.path("blobs/uploads/unheard-of")):
            for method in ("GET", "PATCH", "DELETE"):
                with self.subTest(location, method=method):
                    response = self.client.request(method, location)
                    self.assert_error(response, 404, "BLOB_UPLOAD_UNKNOWN")
            with self.subTest(location, method="PUT"):
                response = self.client.put(with_digest(location, digest_of(content)), content)
                self.assert_error(response, 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_blob(self.client, content)

    def test_a_session_belongs_to_its_repository(self) -> None:
        location = self.client.open_upload()
        theirs = location.replace(self.client.repository, self.other.repository)
        self.other.push_blob(unique())
        for method in ("GET", "PATCH", "DELETE"):
            with self.subTest(method):
                response = self.client.request(method, theirs)
                self.assert_error(response, 404, "BLOB_UPLOAD_UNKNOWN")
        response = self.client.put(with_digest(theirs, digest_of(b"")), b"")
        self.assert_error(response, 404, "BLOB_UPLOAD_UNKNOWN")
        self.assertEqual(self.received(location), "0-0")

    def test_a_session_id_is_never_a_path(self) -> None:
        before = sorted(path.name for path in self.data.path.iterdir())
        for session in (
            "..",
            "%2E%2E",
            "..%2F..%2Fregistry.db",
            "%2E%2E%2Fregistry.db",
            ".",
            "a%00b",
            "%FF",
        ):
            for method in ("GET", "PATCH", "PUT", "DELETE"):
                with self.subTest(session, method=method):
                    path = f"blobs/uploads/{session}?digest={EMPTY_SHA256}"
                    self.assert_status(self.client.request(method, path), 400, 404, 405)
        self.assertEqual(sorted(path.name for path in self.data.path.iterdir()), before)

    def test_a_session_can_be_finished_once(self) -> None:
        content = unique()
        location = self.client.open_upload()
        self.append(location, content)
        finish = functools.partial(self.client.put, with_digest(location, digest_of(content)))
        statuses = sorted(response.status for response in run_at_once(*[finish] * 8))
        self.assertEqual(statuses[0], 201)
        self.assertLessEqual(set(statuses[1:]), {404, 416})
        self.assert_error(finish(), 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_blob(self.client, content)
        self.assert_nothing_unfinished()

    def test_no_append_reaches_a_blob_that_was_finished(self) -> None:
        for _ in range(15):
            content = unique()
            location = self.client.open_upload()
            self.append(location, content)
            finish = functools.partial(self.client.put, with_digest(location, digest_of(content)))
            append = functools.partial(self.append, location, b"more")
            finished, *appended = run_at_once(finish, *[append] * 4)
            self.assertLessEqual({response.status for response in appended}, {202, 404, 416})
            self.assert_status(finished, 201, 400, 416)
            if finished.status == 201:
                self.assert_blob(self.client, content)
                self.assertEqual(self.data.files()[digest_of(content)], len(content))
            self.client.delete(location)

    def test_sessions_with_one_content_finish_at_once(self) -> None:
        content = os.urandom(200_000)
        clients = [self.client] * 8 + [self.other] * 8
        locations = [with_digest(client.open_upload(), digest_of(content)) for client in clients]
        puts = [functools.partial(self.client.put, location, content) for location in locations]
        self.assertEqual({response.status for response in run_at_once(*puts)}, {201})
        self.assertEqual(self.data.links(digest_of(content)), [self.client.repository, self.other.repository])
        self.assert_consistent()

    def test_cancelling_and_finishing_at_once_leaves_one_outcome(self) -> None:
        for _ in range(10):
            content = unique()
            location = self.client.open_upload()
            self.append(location, content)
            finished, cancelled = run_at_once(
                functools.partial(self.client.put, with_digest(location, digest_of(content))),
                functools.partial(self.client.delete, location),
            )
            self.assertIn(
                (finished.status, cancelled.status), ((201, 404), (201, 416), (404, 204), (416, 204))
            )
            expected = 200 if finished.status == 201 else 404
            self.assert_status(self.client.get(f"blobs/{digest_of(content)}"), expected)
        self.assert_nothing_unfinished()


class PatchTest(UploadTestCase):
    """A session filled in pieces."""

    def test_a_stream_of_chunks_is_appended(self) -> None:
        pieces = [os.urandom(n) for n in (1, 65536, 7, 30000)]
        content = b"".join(pieces)
        location = self.client.open_upload()
        response = self.client.patch(location, iter(pieces))
        self.assert_session(response, 202, f"0-{len(content) - 1}")
        self.finish(response.headers["Location"], content)
        self.assertEqual(self.data.recorded()[digest_of(content)], len(content))
        self.assert_nothing_unfinished()

    def test_pieces_without_a_range_are_appended(self) -> None:
        location = self.client.open_upload()
        for end, piece in ((1, b"ab"), (2, b"c"), (5, b"def")):
            response = self.append(location, piece)
            self.assert_session(response, 202, f"0-{end}")
            location = response.headers["Location"]
        self.finish(location, b"abcdef")

    def test_pieces_with_a_range_are_appended(self) -> None:
        for algorithm in ("sha256", "sha512"):
            with self.subTest(algorithm):
                location = self.client.open_upload()
                for piece, content_range in ((b"ab", "0-1"), (b"c", "2-2"), (b"def", "3-5")):
                    response = self.append(location, piece, content_range)
                    self.assert_session(response, 202, f"0-{content_range.partition('-')[2]}")
                self.finish(location, b"abcdefg", b"g", algorithm)

    def test_an_earlier_location_stays_valid(self) -> None:
        location = self.client.open_upload()
        for piece in (b"ab", b"cd", b"ef"):
            self.assert_status(self.append(location, piece), 202)
        self.finish(location, b"abcdef")

    def test_an_empty_piece_appends_nothing(self) -> None:
        location = self.client.open_upload()
        self.assert_session(self.append(location, b"abc"), 202, "0-2")
        self.assert_session(self.append(location, b""), 202, "0-2")
        self.assert_session(self.client.patch(location, iter(())), 202, "0-2")
        self.finish(location, b"abc")

    def test_the_status_tells_where_to_go_on(self) -> None:
        location = self.client.open_upload()
        self.assert_session(self.client.get(location), 204, "0-0")
        for size in (1, 2, 3):
            self.append(location, b"x")
            self.assert_session(self.client.get(location), 204, f"0-{size - 1}")

    def test_the_status_is_told_on_a_url_with_a_digest(self) -> None:
        location = self.client.open_upload()
        self.append(location, b"abc")
        response = self.client.get(with_digest(location, digest_of(b"abcdef")))
        self.assert_session(response, 204, "0-2")

    def test_a_piece_that_does_not_continue_is_416(self) -> None:
        location = self.client.open_upload()
        self.append(location, b"abcde")
        for content_range in ("6-10", "4-8", "0-4", "100-104"):
            with self.subTest(content_range):
                response = self.append(location, b"fghij", content_range)
                self.assert_error(response, 416)
                self.assert_session(response, 416, "0-4")
                self.assertEqual(self.received(location), "0-4")
        self.assert_status(self.append(location, b"fghij", "5-9"), 202)
        self.finish(location, b"abcdefghij")

    def test_a_first_piece_begins_at_the_beginning(self) -> None:
        location = self.client.open_upload()
        for content_range in ("1-5", "5-9"):
            response = self.append(location, b"fghij", content_range)
            self.assert_error(response, 416)
            self.assert_session(response, 416, "0-0")
        self.assert_status(self.append(location, b"fghij", "0-4"), 202)
        self.finish(location, b"fghij")

    def test_a_chunked_piece_that_does_not_continue_is_416(self) -> None:
        location = self.client.open_upload()
        self.append(location, b"abcde")
        response = self.client.patch(location, iter([b"fg", b"hij"]), {"Content-Range": "6-10"})
        self.assert_session(response, 416, "0-4")
        self.finish(location, b"abcde")

    def test_a_malformed_content_range_appends_nothing(self) -> None:
        location = self.client.open_upload()
        self.append(location, b"abcde")
        malformed = "abc", "5", "5-", "-9", "9-5", "5-9-10", "5 9", "5.0-9", "\xb2-\xb3", "5-" + "9" * 5000
        for content_range in malformed:
            with self.subTest(content_range[:20]):
                response = self.append(location, b"fghij", content_range)
                self.assert_status(response, 400, 416)
                self.assertEqual(self.received(location), "0-4")
        self.finish(location, b"abcde")

    def test_a_range_of_another_length_than_the_body_is_never_taken_whole(self) -> None:
        for content_range in ("5-6", "5-20"):
            with self.subTest(content_range):
                location = self.client.open_upload()
                self.append(location, b"abcde")
                for body in (b"fghij", iter([b"fg", b"hij"])):
                    response = self.client.patch(location, body, {"Content-Range": content_range})
                    self.assert_status(response, 400, 416)
                    self.assertEqual(self.received(location), "0-4")
                self.finish(location, b"abcdefghij", b"fghij")

    def test_a_piece_repeated_by_a_client_that_missed_the_reply_is_not_taken_twice(self) -> None:
        location = self.client.open_upload()
        self.assert_status(self.append(location, b"abc", "0-2"), 202)
        self.assert_session(self.append(location, b"abc", "0-2"), 416, "0-2")
        self.assert_status(self.append(location, b"def", "3-5"), 202)
        self.finish(location, b"abcdef")

    def test_the_last_piece_may_come_with_the_put(self) -> None:
        for headers in ({}, {"Content-Range": "3-5"}):
            with self.subTest(headers):
                location = self.client.open_upload()
                self.append(location, b"abc")
                location = with_digest(location, digest_of(b"abcdef"))
                self.assert_status(self.client.put(location, b"def", headers), 201)
                self.assert_blob(self.client, b"abcdef")

    def test_a_put_that_does_not_continue_is_416_whatever_its_digest(self) -> None:
        location = self.client.open_upload()
        self.append(location, b"abc")
        for content_range in ("4-6", "2-4", "0-2"):
            for digest in (digest_of(b"abcdef"), digest_of(b"other"), "sha256:abc", ""):
                with self.subTest(content_range, digest=digest):
                    headers = {"Content-Range": content_range}
                    response = self.client.put(with_digest(location, digest), b"def", headers)
                    self.assert_error(response, 416)
                    self.assert_session(response, 416, "0-2")
        self.finish(location, b"abcdef", b"def")

    def test_a_session_is_hashed_with_any_algorithm(self) -> None:
        for hint in ("", "?digest-algorithm=sha256", "?digest-algorithm=sha512"):
            for algorithm in ("sha256", "sha512"):
                with self.subTest(hint, algorithm=algorithm):
                    pieces = unique(), unique()
                    location = self.client.open_upload(hint)
                    self.append(location, pieces[0])
                    self.finish(location, b"".join(pieces), pieces[1], algorithm)

    def test_an_unknown_algorithm_is_400(self) -> None:
        for algorithm in ("md5", "sha1", "SHA512", "sha512%0A", "shake_128", "%FF"):
            with self.subTest(algorithm):
                response = self.client.post(f"blobs/uploads/?digest-algorithm={algorithm}")
                self.assert_error(response, 400)
        self.assert_nothing_unfinished()

    def test_two_clients_at_the_same_offset_are_told_apart(self) -> None:
        for _ in range(5):
            location = self.client.open_upload()
            contents = [os.urandom(100_000) for _ in range(2)]
            appends = [functools.partial(self.append, location, content, "0-99999") for content in contents]
            responses = run_at_once(*appends)
            self.assertEqual(sorted(response.status for response in responses), [202, 416])
            winner = next(c for c, response in zip(contents, responses) if response.status == 202)
            self.assertEqual(self.received(location), "0-99999")
            self.finish(location, winner)

    def test_two_streams_into_one_session_do_not_mix(self) -> None:
        location = self.client.open_upload()
        contents = b"a" * 300_000, b"b" * 300_000
        appends = [functools.partial(self.append, location, content) for content in contents]
        taken = {}
        for response, content in zip(run_at_once(*appends), contents):
            self.assert_status(response, 202, 416)
            if response.status == 202:
                taken[len(response.headers["Range"]), response.headers["Range"]] = content
        self.assertGreater(len(taken), 0)
        self.finish(location, b"".join(content for _, content in sorted(taken.items())))

    def test_the_status_is_told_while_a_client_hangs(self) -> None:
        location = self.client.open_upload()
        connection = self.connect()
        connection.request("PATCH", location, "Content-Length: 10", "Expect: 100-continue")
        self.assert_status(connection.read(), 100)
        connection.send(b"abc")
        self.assert_status(self.client.get(location), 204)


class ClientGoneTest(UploadTestCase):
    """A client goes away in the middle of a body, and comes back."""

    CUT = 123_457

    def setUp(self) -> None:
        super().setUp()
        self.content = os.urandom(300_000)

    def test_a_session_is_resumed_where_the_client_was_cut_off(self) -> None:
        length = len(self.content)
        cut = self.content[5 : self.CUT]
        for method, framing, sent in (
            ("PATCH", f"Content-Length: {length}", cut),
            ("PATCH", "Transfer-Encoding: chunked", b"%x\r\n" % length + cut),
            ("PATCH", "Transfer-Encoding: chunked", b"%x\r\n" % len(cut) + cut + b"\r\n"),
            ("PUT", f"Content-Length: {length}", cut),
            ("PUT", "Transfer-Encoding: chunked", b"%x\r\n" % length + cut),
        ):
            for algorithm in ("sha256", "sha512"):
                with self.subTest(method, framing=framing, algorithm=algorithm):
                    self.cut_off_and_resume(method, framing, sent, algorithm)
        self.assert_nothing_unfinished()

    def cut_off_and_resume(self, method: str, framing: str, sent: bytes, algorithm: str) -> None:
        location = self.client.open_upload()
        self.append(location, self.content[:5])
        digest = digest_of(self.content, algorithm)
        path = with_digest(location, digest) if method == "PUT" else location
        self.break_off(method, path, framing, sent)
        self.assert_no_blob(self.client, digest)
        offset = int(self.received(location).partition("-")[2]) + 1
        self.assertIn(offset, range(5, self.CUT + 1))
        rest, last = self.content[offset:-7], self.content[-7:]
        content_range = f"{offset}-{len(self.content) - 8}"
        self.assert_status(self.append(location, rest, content_range), 202)
        self.finish(location, self.content, last, algorithm)
        self.client.expect(202, "DELETE", f"blobs/{digest}")

    def break_off(self, method: str, path: str, framing: str, sent: bytes) -> None:
        connection = self.connect().request(method, path, framing, body=sent)
        connection.stop_sending()
        response = connection.read_unless_closed()
        self.assertNotIn(response and response.status, (201, 202))
        self.assertTrue(connection.is_closed())

    def test_a_put_cut_off_can_be_tried_again_from_the_start_of_a_new_session(self) -> None:
        digest = digest_of(self.content)
        location = self.client.open_upload()
        self.break_off(
            "PUT", with_digest(location, digest), "Content-Length: 300000", self.content[: self.CUT]
        )
        self.client.expect(204, "DELETE", location)
        self.client.expect(201, "PUT", with_digest(self.client.open_upload(), digest), self.content)
        self.assert_blob(self.client, self.content)
        self.assert_nothing_unfinished()

    def test_malformed_chunks_append_nothing_after_them(self) -> None:
        location = self.client.open_upload()
        body = b"3\r\nabc\r\n3;\r\ndef\r\nx\r\nghi\r\n0\r\n\r\n"
        connection = self.connect().request("PATCH", location, "Transfer-Encoding: chunked", body=body)
        self.assert_error(connection.read(), 400)
        self.assertTrue(connection.is_closed())
        self.assertIn(self.received(location), ("0-0", "0-2", "0-5"))
        self.client.expect(204, "DELETE", location)

    def test_a_reader_gone_in_mid_download_disturbs_nobody(self) -> None:
        content = os.urandom(8 * MEBIBYTE)
        digest = self.client.push_blob(content)
        for _ in range(3):
            connection = self.connect().request("GET", self.client.path(f"blobs/{digest}"))
            connection.reset()
        self.assert_blob(self.client, content)


class FailedCommitTest(UploadTestCase):
    """The bytes have been renamed into place, and then something comes in between."""

    def finish_and_fail(self, location: str, content: bytes, *, for_long: bool = False) -> None:
        """A PUT whose transaction fails, the database being locked; for_long: and the one after it too."""
        locked, transaction = sqlite3.OperationalError("database is locked"), self.registry.store.transaction
        outcomes = itertools.chain([locked], itertools.repeat(locked if for_long else None))

        def fail(**options: Any) -> Any:
            if error := next(outcomes):
                raise error
            return transaction(**options)

        failing = mock.patch.object(self.registry.store, "transaction", fail)
        with failing, contextlib.redirect_stderr(io.StringIO()):
            response = self.client.put(with_digest(location, digest_of(content)), content)
        self.assert_error(response, 503)

    def test_a_put_that_is_tried_again_does_not_write_to_a_blob(self) -> None:
        content = unique()
        digest = self.other.push_blob(content)
        location = self.client.open_upload()
        self.finish_and_fail(location, content)
        again = self.client.put(with_digest(location, digest), content)
        self.assert_error(again, 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_blob(self.other, content)
        self.finish(self.client.open_upload(), content, content)
        self.assert_consistent()

    def test_where_the_database_stays_locked_the_push_fails_and_the_next_one_is_whole(self) -> None:
        content = unique()
        self.finish_and_fail(self.client.open_upload(), content, for_long=True)
        self.assertNotIn(digest_of(content), self.data.recorded())
        self.finish(self.client.open_upload(), content, content)
        self.assert_consistent()

    def test_a_push_that_found_the_database_locked_does_not_wait_for_as_long_again(self) -> None:
        waits = []

        def wait(*, timeout: float = registry.DATABASE_TIMEOUT, **_options: Any) -> Any:
            waits.append(timeout)
            raise sqlite3.OperationalError("database is locked")

        content = unique()
        with mock.patch.object(self.registry.store, "transaction", wait):
            self.assert_error(
                self.client.put(with_digest(self.client.open_upload(), digest_of(content)), content), 503
            )
        self.assertLess(sum(waits), registry.DATABASE_TIMEOUT + 10)
        self.finish(self.client.open_upload(), content, content)

    def test_bytes_that_got_no_row_are_gone(self) -> None:
        content = unique()
        self.finish_and_fail(self.client.open_upload(), content)
        self.assert_no_blob(self.client, digest_of(content))
        self.assert_nothing_unfinished()

    def test_a_blob_collected_before_it_has_its_row_is_put_there_again(self) -> None:
        store, events, content = self.registry.store, [], os.urandom(300_000)
        place, transaction = store.files.place, store.transaction

        def note_place(upload: Any, digest: str) -> None:
            place(upload, digest)
            events.append("placed")

        @contextlib.contextmanager
        def collect_first(**options: Any) -> Iterator[Any]:
            if events.count("placed") < 3:
                store.files.remove(digest_of(content))
            with transaction(**options) as db:
                events.append("locked")
                yield db
            events.append("unlocked")

        pushes = {
            "post": lambda: self.client.push_blob(content),
            "put": lambda: self.finish(self.client.open_upload(), content, content),
        }
        for way, push in pushes.items():
            with self.subTest(way), contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.object(store.files, "place", note_place))
                stack.enter_context(mock.patch.object(store, "transaction", collect_first))
                events.clear()
                push()
                self.assertEqual(events, ["placed", "locked", "unlocked"] * 3)
        self.assert_blob(self.client, content)
        self.assert_consistent()


class BuffersTest(UploadTestCase):
    """What uploads hold in memory while their clients send nothing."""

    def held_by(self, uploads: int, size: int) -> int:
        """The bytes of memory that so many uploads hold, each stalled after so many bytes."""
        arrived, go_on = threading.Semaphore(0), threading.Event()

        def upload() -> int:
            left = [size]

            def readinto(view: memoryview) -> int:
                if not left[0]:
                    arrived.release()
                    go_on.wait()
                    return 0
                count = min(len(view), left[0])
                left[0] -= count
                return count

            with self.registry.store.files.new_upload("sha256") as file:
                return file.append(readinto)

        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with ThreadPoolExecutor(uploads) as pool:
            results = [pool.submit(upload) for _ in range(uploads)]
            for _ in range(uploads):
                self.assertTrue(arrived.acquire(timeout=TIMEOUT))
            held = tracemalloc.get_traced_memory()[0]
            go_on.set()
            self.assertEqual({result.result() for result in results}, {size})
        tracemalloc.stop()
        return held

    def test_uploads_of_which_little_has_come_hold_little(self) -> None:
        self.assertLess(self.held_by(100, 1), 10 * MEBIBYTE)

    def test_uploads_hold_no_more_than_so_much_all_together(self) -> None:
        self.assertLess(self.held_by(100, 3 * MEBIBYTE), 80 * MEBIBYTE)

    def test_small_and_large_buffers_take_every_byte_in_order(self) -> None:
        for lanes in (0, 1):
            for size in (65_535, 65_536, 65_537, 5 * MEBIBYTE + 1):
                with (
                    self.subTest(lanes=lanes, size=size),
                    mock.patch.object(registry.UploadFile, "LARGE", threading.Semaphore(lanes)),
                ):
                    content = os.urandom(size)
                    self.client.push_blob(content)
                    self.assert_blob(self.client, content)
                    location = self.client.open_upload()
                    self.assert_status(self.client.patch(location, iter([content])), 202)
                    self.finish(location, content)

    def test_a_write_that_fails_is_followed_by_no_other(self) -> None:
        for lanes in (0, 1):
            for failing in (1, 2, 3):
                with (
                    self.subTest(lanes=lanes, failing=failing),
                    mock.patch.object(registry.UploadFile, "LARGE", threading.Semaphore(lanes)),
                ):
                    self.fail_write(failing)

    def test_what_was_taken_back_is_no_part_of_the_digest(self) -> None:
        with self.registry.store.files.new_upload("sha256") as file:
            file.append(io.BytesIO(b"taken back").readinto)
            file.truncate(5)
            self.assertEqual(file.digest("sha256"), digest_of(b"taken"))
            file.append(io.BytesIO(b" again").readinto)
            self.assertEqual((file.size, file.digest("sha256")), (11, digest_of(b"taken again")))

    def fail_write(self, failing: int) -> None:
        """Let one of an upload's writes fail; nothing comes after it."""
        sizes: list[int] = []

        def check_space(size: int, more: int) -> None:
            sizes.append(size)
            if len(sizes) == failing + 1:  # the first is before anything has come
                raise OSError(errno.EIO, "broken")

        file = self.registry.store.files.new_upload("sha256")
        checked = mock.patch.object(file._files, "check_space", check_space)
        try:
            with checked, self.assertRaisesRegex(OSError, "broken"):
                file.append(io.BytesIO(os.urandom(5 * MEBIBYTE)).readinto)
            self.assertEqual(os.path.getsize(file.path), sizes[-1])
            self.assertEqual(len(sizes), failing + 1)
            self.assertEqual(file.digest("sha256"), digest_of(Path(file.path).read_bytes()))
        finally:
            file.unlink()
            file.close()


class DirectoryTest(HTTPTestCase):
    """The directory uploads/ when others have their hands in it."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.data = Path(directory.name) / "data"

    def start(self, data: str | Path = "") -> Client:
        running = registry.Registry(data or self.data).start()
        self.addCleanup(running.close)
        self.store = running.store
        return Client(running.netloc, "app")

    def assert_takes_uploads(self, client: Client) -> None:
        content = unique()
        location = client.open_upload()
        self.assert_status(client.patch(location, content), 202)
        self.assert_status(client.put(with_digest(location, digest_of(content))), 201)
        digest = client.push_blob(unique())
        self.assertTrue((self.data / "blobs" / digest.replace(":", "/")).is_file())

    def test_what_the_registry_did_not_name_hinders_nothing(self) -> None:
        session = f"{'0' * 32}-sha256-{hashlib.sha256(b'app').hexdigest()[:16]}"
        uploads = self.data / "uploads"
        for name in ("lost+found", ".snapshot/hourly", "@eaDir", session, "1" * 32):
            (uploads / name).mkdir(parents=True)
        (uploads / "README").write_text("here lie uploads", encoding="ascii")
        (uploads / session.replace("0", "2", 32)).symlink_to(uploads / "README")
        os.symlink("nowhere", uploads / ("3" * 32))
        before = sorted(uploads.rglob("*"))
        for path in before:
            os.utime(path, (0, 0), follow_symlinks=False)
        client = self.start()
        self.store.expire_uploads()
        for name in (session, session.replace("0", "2", 32), "1" * 32, "3" * 32, "README", "lost+found"):
            for method in ("GET", "PATCH", "DELETE"):
                response = client.request(method, f"blobs/uploads/{name}")
                self.assert_error(response, 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_takes_uploads(client)
        self.assertEqual(sorted(uploads.rglob("*")), before)

    def test_what_a_crash_left_of_one_request_goes_at_the_next_start(self) -> None:
        uploads = self.data / "uploads"
        uploads.mkdir(parents=True)
        left, used = uploads / ("0" * 32), uploads / ("1" * 32)
        left.touch()
        with open(used, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            client = self.start()
            location = client.open_upload()
            self.assertEqual(left.exists(), False)
            self.assertEqual(used.exists(), True)
        self.store.expire_uploads()
        self.assertEqual(used.exists(), False)
        self.assert_status(client.get(location), 204)

    def test_an_upload_that_cannot_be_removed_hinders_nothing(self) -> None:
        uploads, unlink = self.data / "uploads", os.unlink
        uploads.mkdir(parents=True)
        for digit in "01":
            (uploads / (digit * 32)).touch()

        def refuse_one(path: str) -> None:
            if path.endswith("0" * 32):
                raise PermissionError(errno.EPERM, "immutable", path)
            unlink(path)

        warnings = io.StringIO()
        with mock.patch.object(os, "unlink", refuse_one), contextlib.redirect_stderr(warnings):
            client = self.start()
        self.assertEqual([path.name for path in uploads.iterdir()], ["0" * 32])
        self.assertIn("immutable", warnings.getvalue())
        self.assert_takes_uploads(client)

    def test_a_lock_ends_with_its_request_though_a_forked_child_has_inherited_it(self) -> None:
        client = self.start()
        location = client.open_upload()
        with self.store.session("app", location.rpartition("/")[2]) as upload:
            inherited = os.dup(upload.fileno())  # what fork does
            self.addCleanup(os.close, inherited)
        self.assert_status(client.patch(location, b"x"), 202)

    def test_sessions_are_dropped_by_their_age_also_where_the_clock_was_wrong(self) -> None:
        client = self.start()
        day = 24 * 3600
        for ago, status in ((0, 204), (day / 2, 204), (-day / 2, 204), (2 * day, 404), (-999 * day, 404)):
            with self.subTest(ago=ago):
                location = client.open_upload()
                then = time.time() - ago
                os.utime(self.data / "uploads" / location.rpartition("/")[2], (then, then))
                self.store.expire_uploads()
                self.assert_status(client.get(location), status)

    def test_uploads_go_on_after_the_directory_was_removed(self) -> None:
        client = self.start()
        location = client.open_upload()
        shutil.rmtree(self.data / "uploads")
        self.assert_error(client.get(location), 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_error(client.patch(location, b"x"), 404, "BLOB_UPLOAD_UNKNOWN")
        self.store.expire_uploads()
        upkeep.collect(self.store)
        self.assert_takes_uploads(client)

    def test_bytes_that_could_not_be_synced_are_not_acknowledged_by_another_try(self) -> None:
        client, content = self.start(), unique()
        location = client.open_upload()
        client.expect(202, "PATCH", location, content)
        finish = with_digest(location, digest_of(content))
        failing = mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "bad disk"))
        with failing, contextlib.redirect_stderr(io.StringIO()):
            self.assert_error(client.put(finish), 500)
        self.assert_error(client.put(finish), 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_takes_uploads(client)

    def test_without_a_data_directory_a_push_fails_at_once(self) -> None:
        client = self.start()
        self.data.rename(self.data.with_name("elsewhere"))
        with contextlib.redirect_stderr(io.StringIO()):
            self.assert_error(client.post("blobs/uploads/"), 500)
            self.assert_error(client.post(f"blobs/uploads/?digest={EMPTY_SHA256}", b""), 500)
        self.data.with_name("elsewhere").rename(self.data)
        self.assert_takes_uploads(client)

    def test_a_directory_in_which_nothing_stays_makes_a_push_fail_at_once(self) -> None:
        client = self.start()
        gone = mock.patch.object(os, "lstat", side_effect=FileNotFoundError("gone"))
        with gone, contextlib.redirect_stderr(io.StringIO()):
            self.assert_error(client.post("blobs/uploads/"), 500)
        self.assert_takes_uploads(client)

    def test_the_data_directory_stays_where_it_was_when_the_process_moves(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.data.parent)
        client = self.start("data")
        os.chdir("/")
        self.assert_takes_uploads(client)


class MountTest(UploadTestCase):
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

    def test_mounting_a_malformed_digest_is_no_server_error(self) -> None:
        for digest in MALFORMED_QUERIES:
            with self.subTest(digest):
                self.assert_status(self.mount(digest, self.other.repository), 202, 400)
