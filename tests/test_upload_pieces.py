"""An upload session filled in pieces, and resumed by a client that went away."""

from __future__ import annotations

import functools
import os

from tests.support import MEBIBYTE, UploadTestCase, digest_of, run_at_once, unique, with_digest


class PiecesAreAppended(UploadTestCase):
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
                self.assert_error(response, 416, "BLOB_UPLOAD_INVALID")
                self.assertEqual(self.received(location), "0-4")
        self.finish(location, b"abcde")

    def test_a_range_of_another_length_than_the_body_is_never_taken_whole(self) -> None:
        for content_range in ("5-6", "5-20"):
            with self.subTest(content_range):
                location = self.client.open_upload()
                self.append(location, b"abcde")
                for body in (b"fghij", iter([b"fg", b"hij"])):
                    response = self.client.patch(location, body, {"Content-Range": content_range})
                    self.assert_error(response, 400, "SIZE_INVALID")
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
            self.assertIn(response.status, (202, 416), response)  # the other has the session's lock
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


class InterruptedUploadsGoOn(UploadTestCase):
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

    def test_a_put_cut_off_can_be_made_again_as_it_was(self) -> None:
        digest = digest_of(self.content)
        location = self.client.open_upload()
        self.append(location, self.content[:5])
        path = with_digest(location, digest)
        for sent in (self.content[5 : self.CUT], self.content[5:6], b""):
            self.break_off("PUT", path, f"Content-Length: {len(self.content) - 5}", sent)
            self.assertEqual(self.received(location), "0-4")
        self.client.expect(201, "PUT", path, self.content[5:])
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
