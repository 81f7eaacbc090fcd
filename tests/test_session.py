"""Upload sessions: opened, finished once, cancelled, unknown."""

from __future__ import annotations

import functools
import os

from tests.support import (
    MALFORMED_QUERIES,
    SESSION_ID,
    UploadTestCase,
    digest_of,
    run_at_once,
    unique,
    with_digest,
)


class SessionsAreFinishedOnce(UploadTestCase):
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
            self.assertIn(
                finished.status, (201, 400, 416), finished
            )  # before an append, after one, or during it
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

    def test_ids_cannot_be_guessed(self) -> None:
        """96 random bits: none comes twice, and each bit is set in about half of them."""
        ids = [self.client.open_upload().rpartition("/")[2] for _ in range(256)]
        self.assertEqual(len(set(ids)), 256)
        for bit in range(96):
            ones = sum(int(session[8:32], 16) >> bit & 1 for session in ids)
            self.assertTrue(64 < ones < 192, f"bit {bit}: {ones} of 256")
        for session in ids:
            self.assertTrue(SESSION_ID.fullmatch(session), session)

    def test_an_id_close_to_one_is_none(self) -> None:
        path, slash, session = self.client.open_upload().rpartition("/")
        for near in (
            session[:-1],
            session + "0",
            f"{session}0"[1:],
            session + "%00",
            session + "%20",
            "0" * 32,
        ):
            with self.subTest(near):
                self.assert_error(self.client.patch(path + slash + near, b"x"), 404, "BLOB_UPLOAD_UNKNOWN")
        self.assert_status(self.client.get(path + slash + session), 204)
