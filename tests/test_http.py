"""HTTP itself: framing, limits, errors, routes and names, as seen from a socket."""

from __future__ import annotations

import json

from tests.support import (
    MEBIBYTE,
    OCI_MANIFEST,
    Client,
    RawConnection,
    RegistryTestCase,
    Response,
    digest_of,
    elapsed,
    encode,
    image_index,
    unique,
    with_digest,
)

HELLO = b"hello"
HELLO_DIGEST = digest_of(HELLO)
EMPTY_DIGEST = digest_of(b"")
SMUGGLED = b"GET /v2/smuggled/tags/list HTTP/1.1\r\nHost: a\r\n\r\n"


class HTTPConnectionTestCase(RegistryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.upload = self.client.path(f"blobs/uploads/?digest={HELLO_DIGEST}")

    def send(self, data: bytes) -> RawConnection:
        return self.connect().send(data)

    def post(self, *lines: bytes, body: bytes = HELLO) -> RawConnection:
        """The single-POST upload of `hello` with exactly these header lines after Host."""
        head = b"\r\n".join([b"POST %s HTTP/1.1" % self.upload.encode(), b"Host: a", *lines, b"", b""])
        return self.send(head + body)

    def assert_refused(self, connection: RawConnection, *statuses: int) -> None:
        """An error in the usual form, nothing stored, and the connection closed."""
        response = connection.read()
        self.assert_error(response, response.status)
        self.assert_status(response, *statuses or (400,))
        self.assertTrue(connection.is_closed(), response)
        self.assert_error(self.client.get(f"blobs/{HELLO_DIGEST}"), 404)

    def assert_hello(self, connection: RawConnection) -> None:
        """The upload is taken, and the connection ready for more."""
        self.assert_status(connection.read(), 201)
        self.assert_clean_afterwards(connection)
        self.assert_blob(self.client, HELLO)
        self.client.expect(202, "DELETE", f"blobs/{HELLO_DIGEST}")


class ChunkedTest(HTTPConnectionTestCase):
    CHUNKED = b"Transfer-Encoding: chunked"

    def test_well_formed_chunks_are_decoded(self) -> None:
        for body in (
            b"5\r\nhello\r\n0\r\n\r\n",
            b"1\r\nh\r\n4\r\nello\r\n0\r\n\r\n",
            b"005\r\nhello\r\n000\r\n\r\n",
            b"5;name=value\r\nhello\r\n0;last\r\n\r\n",
            b'5;name="quoted; value"\r\nhello\r\n0\r\n\r\n',
            b"5\r\nhello\r\n0\r\nTrailer: value\r\nAnother: value\r\n\r\n",
        ):
            with self.subTest(body):
                self.assert_hello(self.post(self.CHUNKED, body=body))

    def test_the_name_of_the_coding_has_no_case(self) -> None:
        for line in (
            b"Transfer-Encoding: Chunked",
            b"transfer-encoding:CHUNKED",
            b"TRANSFER-ENCODING:   chunked  ",
        ):
            with self.subTest(line):
                self.assert_hello(self.post(line, body=b"5\r\nhello\r\n0\r\n\r\n"))

    def test_sizes_are_hexadecimal_in_either_case(self) -> None:
        for size in (b"a", b"A", b"0A"):
            with self.subTest(size):
                content = b"0123456789"
                path = self.client.path(f"blobs/uploads/?digest={digest_of(content)}")
                body = size + b"\r\n" + content + b"\r\n0\r\n\r\n"
                connection = self.connect().request("POST", path, self.CHUNKED.decode(), body=body)
                self.assert_status(connection.read(), 201)

    def test_chunks_may_arrive_byte_by_byte(self) -> None:
        connection = self.post(self.CHUNKED, body=b"")
        for byte in b"3\r\nhel\r\n2;x\r\nlo\r\n0\r\nA: b\r\n\r\n":
            connection.send(bytes([byte]))
        self.assert_hello(connection)

    def test_malformed_chunks_are_refused(self) -> None:
        rest = b"\r\n0\r\n\r\n"
        for body in (
            b"5\nhello\r\n0\r\n\r\n",
            b"5\rhello\r\n0\r\n\r\n",
            b"5\r\nhello\n0\r\n\r\n",
            b"5\r\nhello0\r\n\r\n",
            b"5\r\nhelloXX0\r\n\r\n",
            b"5\r\nhelloXX\r\n0\r\n\r\n",
            b"5\r\nhello\n\r\n0\r\n\r\n",
            b"5\r\nhello\r\n\r\n0\r\n\r\n",
            b"5\r\nhello\r\n0\n\r\n",
            b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
            b"5\r\nhello\r\n0\r\nbare: LF\n\r\n",
            b"5\r\nhello\r\n\r\n",
            b"5\r\nhello\r\n-0\r\n\r\n",
            b"5\r\nhello\r\n0x0\r\n\r\n",
            b"+5\r\nhello" + rest,
            b"-5\r\nhello" + rest,
            b" 5\r\nhello" + rest,
            b"\t5\r\nhello" + rest,
            b"0x5\r\nhello" + rest,
            b"0X5\r\nhello" + rest,
            b"5h\r\nhello" + rest,
            b"0_5\r\nhello" + rest,
            b"5.\r\nhello" + rest,
            b"5,5\r\nhello" + rest,
            b"\r\nhello" + rest,
            b";x\r\nhello" + rest,
            b"\xb5\r\nhello" + rest,
            b"5;a\nb\r\nhello" + rest,
            b"5;a\x00b\r\nhello" + rest,
            b"f" * 17 + b"\r\nhello" + rest,
            b"f" * 5000 + b"\r\nhello" + rest,
            b"0" * 100_000 + b"5\r\nhello" + rest,
            b"5;" + b"x" * 100_000 + b"\r\nhello" + rest,
        ):
            with self.subTest(body[:40]):
                self.assert_refused(self.post(self.CHUNKED, body=body))

    def test_trailers_have_a_limit(self) -> None:
        body = b"5\r\nhello\r\n0\r\n"
        for trailers in (b"A: b\r\n" * 50_000, b"A: " + b"b" * 300_000 + b"\r\n"):
            self.assert_refused(self.post(self.CHUNKED, body=body + trailers + b"\r\n"))

    def test_nothing_of_malformed_chunks_is_left(self) -> None:
        self.post(self.CHUNKED, body=b"5\r\nhello\r\nX\r\n\r\n").read()
        self.assert_nothing_unfinished()
        self.assert_error(self.client.get("tags/list"), 404, "NAME_UNKNOWN")


class FramingTest(HTTPConnectionTestCase):
    def test_an_ambiguous_length_is_refused(self) -> None:
        chunked = b"5\r\nhello\r\n0\r\n\r\n"
        for lines, body in (
            ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], chunked),
            ([b"Transfer-Encoding: chunked", b"Content-Length: 15"], chunked),
            ([b"Content-Length: 5", b"Content-Length: 6"], HELLO),
            ([b"Content-Length: 6", b"Content-Length: 5"], HELLO),
            ([b"Content-Length: 5", b"content-length: 05"], HELLO),
            ([b"Content-Length: 5, 6"], HELLO),
            ([b"Content-Length: +5"], HELLO),
            ([b"Content-Length: -5"], HELLO),
            ([b"Content-Length: 0x5"], HELLO),
            ([b"Content-Length: 5.0"], HELLO),
            ([b"Content-Length: 0_5"], HELLO),
            ([b"Content-Length: 5 5"], HELLO),
            ([b"Content-Length: 5;"], HELLO),
            ([b"Content-Length: five"], HELLO),
            ([b"Content-Length:"], HELLO),
            ([b'Content-Length: "5"'], HELLO),
            ([b"Content-Length: \xb2"], HELLO),
            ([b"Content-Length: \xd9\xa5"], HELLO),
        ):
            with self.subTest(lines):
                self.assert_refused(self.post(*lines, body=body))

    def test_a_length_beyond_all_bounds_is_refused(self) -> None:
        for length in (b"9" * 30, b"9" * 5000):
            with self.subTest(length[:40]):
                self.assert_refused(self.post(b"Content-Length: " + length))

    def test_another_transfer_coding_is_refused(self) -> None:
        chunked = b"5\r\nhello\r\n0\r\n\r\n"
        for lines in (
            [b"Transfer-Encoding: gzip"],
            [b"Transfer-Encoding: gzip, chunked"],
            [b"Transfer-Encoding: chunked, gzip"],
            [b"Transfer-Encoding: chunked, chunked"],
            [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
            [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
            [b"Transfer-Encoding: identity", b"Content-Length: 5"],
            [b"Transfer-Encoding: xchunked"],
            [b"Transfer-Encoding: chunked;x"],
            [b"Transfer-Encoding: \x0bchunked"],
            [b'Transfer-Encoding: "chunked"'],
            [b"Transfer-Encoding:", b"Content-Length: 5"],
        ):
            with self.subTest(lines):
                self.assert_refused(self.post(*lines, body=chunked))

    def test_a_malformed_header_line_is_refused(self) -> None:
        for line in (
            b" folded: onto the line before",
            b"X: folded\r\n onto the next",
            b"X: folded\r\n\tonto the next",
            b"X : space before the colon",
            b"Content-Length : 5",
            b"no colon",
            b": no name",
            b"X Y: space in the name",
            b"X\xfc: not ASCII",
            b"X(Y): not a token",
            b"X\x00: NUL",
            b"X: NUL \x00",
            b"X: bare CR\rY: z",
            b"X: bare CR\r",
        ):
            with self.subTest(line):
                self.assert_refused(self.post(b"Content-Length: 5", line))

    def test_no_control_character_begins_another_header(self) -> None:
        for separator in (b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\x85", b"\xe2\x80\xa8"):
            with self.subTest(separator):
                line = b"X: a" + separator + b"Transfer-Encoding: chunked"
                response = self.post(b"Content-Length: 5", line).read()
                self.assert_status(response, 400 if separator == b"\r" else 201)

    def test_bare_line_feeds_are_refused(self) -> None:
        for data in (
            b"GET /v2/ HTTP/1.1\nHost: a\n\n",
            b"GET /v2/ HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
            b"GET /v2/ HTTP/1.1\nHost: a\r\n\r\n",
        ):
            with self.subTest(data):
                self.assert_refused(self.send(data))

    def test_a_malformed_request_line_is_refused(self) -> None:
        for line in (
            b"GET",
            b"GET /v2/",
            b"GET /v2/ HTTP/1.1 more",
            b"GET  /v2/ HTTP/1.1",
            b"GET /v2/ more HTTP/1.1",
            b" GET /v2/ HTTP/1.1",
            b"GET /v2/ HTTP/1.",
            b"GET /v2/ HTTP/x.y",
            b"GET /v2/ HTTP/1.1.1",
            b"GET /v2/ HTTP/+1.1",
            b"GET /v2/ HTTP/-1.1",
            b"GET /v2/ http/1.1",
            b"GET /v2/ FTP/1.1",
            b"GET /v2/ HTTP/2.0",
            b"GET /v2/ HTTP/9999999999999999999999.1",
            b"GET /v2/\x00 HTTP/1.1",
            b"G\x00T /v2/ HTTP/1.1",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ):
            with self.subTest(line):
                connection = self.send(line + b"\r\nHost: a\r\n\r\n")
                response = connection.read()
                self.assert_status(response, 400, 505)
                self.assertTrue(connection.is_closed())

    def test_an_odd_target_or_method_is_a_client_error(self) -> None:
        for line in (
            b"OPTIONS * HTTP/1.1",
            b"OPTIONS /v2/ HTTP/1.1",
            b"CONNECT a:1 HTTP/1.1",
            b"TRACE /v2/ HTTP/1.1",
            b"get /v2/ HTTP/1.1",
            b"__init__ /v2/ HTTP/1.1",
            b"G" * 1000 + b" /v2/ HTTP/1.1",
            b"GET v2/ HTTP/1.1",
            b"GET ? HTTP/1.1",
            b"GET //v2/ HTTP/1.1",
            b"GET HTTP:/v2/ HTTP/1.1",
            b"GET ftp://a/v2/ HTTP/1.1",
            b"GET /v2/\xff/tags/list HTTP/1.1",
            b"GET /v2/%/tags/list HTTP/1.1",
            b"GET /v2/%zz/tags/list HTTP/1.1",
            b"GET /v2/#fragment HTTP/1.1",
            b"GET /v2/a/tags/list?n=%zz HTTP/1.1",
            b"GET /v2/_catalog?n=1&n=%FF HTTP/1.1",
            b"GET /v2/a/tags/list?" + b"&" * 5000 + b" HTTP/1.1",
        ):
            with self.subTest(line[:60]):
                connection = self.send(line + b"\r\nHost: a\r\n\r\n")
                response = connection.read()
                self.assertTrue(response.status in (200, 204, 501) or 400 <= response.status < 500, response)
                self.assert_clean_afterwards(connection)

    def test_a_missing_repeated_or_malformed_host_is_refused(self) -> None:
        hosts = (
            b"Host:",
            b"Host: a\r\nHost: a",
            b"Host: a b",
            b"Host: a, b",
            b"Host: a/b",
            b"Host: a@b",
            b"Host: http://a",
            b"Host: a:b",
            b"Host: a:1:2",
            b"Host: ::1",
            b"Host: [::1",
            b"Host: [a]b",
            b'Host: a"b',
            b"Host: \xe4",
            b"Host: " + b"a" * 256,
        )
        for line in (b"GET /v2/ HTTP/1.1\r\n", b"GET http://a/v2/ HTTP/1.1\r\n"):
            for host in (b"X: y", *hosts):
                with self.subTest(line, host=host):
                    self.assert_refused(self.send(line + host + b"\r\n\r\n"))
        for host in hosts:
            with self.subTest(host=host):
                self.assert_refused(self.send(b"GET /v2/ HTTP/1.0\r\n" + host + b"\r\n\r\n"))

    def test_what_may_be_said_once_is_refused_when_it_is_said_twice(self) -> None:
        for name, value in (
            ("Authorization", "Basic YTpi"),
            ("Content-Range", "0-4"),
            ("content-range", "0-4"),
        ):
            with self.subTest(name):
                line = f"{name}: {value}".encode()
                self.assert_refused(self.post(b"Content-Length: 5", line, line, body=HELLO))

    def test_hosts_are_names_and_addresses(self) -> None:
        for host in (b"a", b"A.b-c_d:5000", b"127.0.0.1", b"[::1]", b"[::ffff:1.2.3.4]:5000", b"a:"):
            with self.subTest(host):
                self.assert_status(self.send(b"GET /v2/ HTTP/1.1\r\nHost: " + host + b"\r\n\r\n").read(), 200)

    def test_a_target_in_absolute_form_names_the_host(self) -> None:
        for target in ("http://a/v2/", "HTTP://a/v2/", "httpS://B:1/v2/?ns=x"):
            with self.subTest(target):
                connection = self.connect().request("GET", target)
                self.assertEqual(connection.read().json, {})
                self.assert_clean_afterwards(connection)
        for authority in ("", ":80", "[", "a:b:c", "u@a", "u:p@a", "a b", "\xe4"):
            with self.subTest(authority=authority):
                self.assert_refused(self.connect().request("GET", f"http://{authority}/v2/"))

    def test_a_request_may_arrive_byte_by_byte(self) -> None:
        connection = self.connect()
        for byte in b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n":
            connection.send(bytes([byte]))
        self.assert_status(connection.read(), 200)

    def test_a_connection_closed_in_mid_head_is_just_closed(self) -> None:
        for data in (b"", b"GET", b"GET /v2/ HTTP/1.1\r\n", b"GET /v2/ HTTP/1.1\r\nHost: a\r\n", b"\r\n"):
            with self.subTest(data):
                connection = self.send(data)
                connection.stop_sending()
                self.assertTrue(connection.is_closed())


class LimitTest(HTTPConnectionTestCase):
    def test_a_request_line_over_8_kib_is_414(self) -> None:
        for length in (8 * 1024 + 1, 65 * 1024, MEBIBYTE):
            with self.subTest(length):
                connection = self.connect().request("GET", "/v2/?" + "x" * length)
                self.assert_status(connection.read(), 414)
                self.assertTrue(connection.is_closed())

    def test_a_request_line_that_never_ends_is_414(self) -> None:
        self.assert_status(self.send(b"GET /v2/?" + b"x" * MEBIBYTE).read(), 414)

    def test_a_request_line_under_8_kib_is_read(self) -> None:
        self.assert_status(self.client.get("/v2/?" + "x" * 8000), 200)

    def test_headers_over_64_kib_are_431(self) -> None:
        for lines in ([f"X: {'x' * 65 * 1024}"], [f"X-{n}: {'x' * 1000}" for n in range(80)]):
            with self.subTest(len(lines)):
                connection = self.connect().request("GET", "/v2/", *lines)
                self.assert_status(connection.read(), 431)
                self.assertTrue(connection.is_closed())

    def test_headers_that_never_end_are_431(self) -> None:
        for endless in (b"X: " + b"x" * MEBIBYTE, b"X: y\r\n" * 100_000):
            with self.subTest(endless[:10]):
                connection = self.send(b"GET /v2/ HTTP/1.1\r\nHost: a\r\n" + endless)
                self.assert_status(connection.read(), 431)

    def test_more_than_100_header_lines_are_431(self) -> None:
        connection = self.connect().request("GET", "/v2/", *[f"X-{n}: y" for n in range(101)])
        self.assert_status(connection.read(), 431)
        self.assertTrue(connection.is_closed())

    def test_headers_under_the_limits_are_read(self) -> None:
        for lines in ([f"X-{n}: y" for n in range(95)], [f"X-{n}: {'y' * 6000}" for n in range(10)]):
            connection = self.connect().request("GET", "/v2/", *lines)
            self.assert_status(connection.read(), 200)


class ExpectTest(HTTPConnectionTestCase):
    """Expect: 100-continue."""

    def test_a_body_that_will_be_read_is_asked_for(self) -> None:
        location = self.client.open_upload()
        for framing, body in (
            ("Content-Length: 5", HELLO),
            ("Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n"),
        ):
            for expectation in ("100-continue", "100-Continue"):
                for method, path in (("POST", self.upload), ("PATCH", location)):
                    with self.subTest(method, framing=framing, expectation=expectation):
                        connection = self.connect().request(method, path, framing, f"Expect: {expectation}")
                        self.assert_status(connection.read(), 100)
                        self.assert_status(connection.send(body).read(), 201, 202)
                        self.assert_clean_afterwards(connection)
        self.finish(location, HELLO * 4)

    def finish(self, location: str, content: bytes) -> None:
        self.client.expect(201, "PUT", with_digest(location, digest_of(content)))
        self.assert_blob(self.client, content)

    def test_a_manifest_is_asked_for(self) -> None:
        body = encode(image_index([]))
        lines = f"Content-Length: {len(body)}", f"Content-Type: {json.loads(body)['mediaType']}"
        connection = self.connect()
        connection.request("PUT", self.client.path("manifests/tag"), *lines, "Expect: 100-continue")
        self.assert_status(connection.read(), 100)
        self.assert_status(connection.send(body).read(), 201)

    def test_a_body_that_did_not_wait_is_read_all_the_same(self) -> None:
        connection = self.post(b"Content-Length: 5", b"Expect: 100-continue")
        response = connection.read()
        self.assert_status(connection.read() if response.status == 100 else response, 201)
        self.assert_clean_afterwards(connection)

    def test_an_error_comes_instead_of_100(self) -> None:
        session = self.client.open_upload()
        self.client.expect(202, "PATCH", session, HELLO)
        over = f"Content-Length: {4 * MEBIBYTE + 1}"
        for status, method, path, *lines in (
            (400, "POST", self.client.path("blobs/uploads/?digest=sha256:abc")),
            (400, "POST", "/v2/Bad/blobs/uploads/"),
            (400, "PUT", "/v2/Bad/manifests/tag"),
            (400, "PUT", self.client.path("manifests/-bad")),
            (404, "PATCH", self.client.path("blobs/uploads/unheard-of")),
            (404, "PUT", self.client.path(f"blobs/uploads/unheard-of?digest={HELLO_DIGEST}")),
            (404, "PUT", "/v2/unknown/route/here"),
            (405, "POST", "/v2/"),
            (405, "PUT", self.client.path("tags/list")),
            (413, "PUT", self.client.path("manifests/tag"), over, f"Content-Type: {OCI_MANIFEST}"),
            (416, "PATCH", session, "Content-Range: 6-10"),
            (416, "PUT", with_digest(session, HELLO_DIGEST), "Content-Range: 6-10"),
            (400, "PUT", with_digest(session, "sha256:abc")),
        ):
            for framing in ("Content-Length: 5", "Transfer-Encoding: chunked"):
                if framing != "Content-Length: 5" and over in lines:
                    continue
                with self.subTest(method, path=path, framing=framing):
                    framed = lines if over in lines else [framing, *lines]
                    connection = self.connect().request(method, path, *framed, "Expect: 100-continue")
                    self.assert_error(connection.read(), status)
                    self.assert_clean_afterwards(connection)

    def test_nothing_is_asked_for_when_there_is_no_body(self) -> None:
        connection = self.connect().request("GET", "/v2/", "Expect: 100-continue")
        self.assert_status(connection.read(), 200)
        connection.request(
            "POST", self.client.path("blobs/uploads/"), "Content-Length: 0", "Expect: 100-continue"
        )
        self.assert_status(connection.read(), 202)
        self.assert_clean_afterwards(connection)

    def test_an_http_1_0_client_is_never_asked(self) -> None:
        head = f"POST {self.upload} HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        self.assert_status(self.send(head.encode() + HELLO).read(), 201)


class KeepAliveTest(HTTPConnectionTestCase):
    """What comes after on the same connection."""

    def early_errors(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Requests that are answered before their body is of interest."""
        unheard_of = self.client.path("blobs/uploads/unheard-of")
        return [
            ("POST", "/v2/Bad/blobs/uploads/", ()),
            ("POST", self.client.path("blobs/uploads/?digest=sha256:abc"), ()),
            ("POST", self.client.path(f"blobs/uploads/?mount={HELLO_DIGEST}"), ()),
            ("POST", self.client.path("blobs/uploads/"), ()),
            ("PATCH", unheard_of, ()),
            ("PUT", f"{unheard_of}?digest={HELLO_DIGEST}", ()),
            ("PATCH", self.client.open_upload(), ("Content-Range: 7-8",)),
            ("PUT", self.client.open_upload(), ()),
            ("PUT", self.client.path("manifests/-bad"), ()),
            ("PUT", self.client.path("manifests/tag"), ()),
            ("PUT", "/v2/unknown/route/here", ()),
            ("POST", "/nowhere", ()),
            ("POST", "/v2/", ()),
            ("PATCH", self.client.path("tags/list"), ()),
            ("BREW", "/v2/", ()),
            ("DELETE", self.client.path(f"blobs/{HELLO_DIGEST}"), ()),
            ("DELETE", unheard_of, ()),
            ("GET", self.client.path(f"blobs/{HELLO_DIGEST}"), ()),
            ("GET", "/v2/", ()),
            ("HEAD", "/v2/", ()),
        ]

    def test_a_body_is_never_taken_for_a_request(self) -> None:
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
        for framing, body in (
            (f"Content-Length: {len(SMUGGLED)}", SMUGGLED),
            ("Transfer-Encoding: chunked", chunked),
        ):
            for method, path, lines in self.early_errors():
                with self.subTest(method, path=path, framing=framing):
                    connection = self.connect().request(method, path, framing, *lines, body=body)
                    response = connection.read(method)
                    self.assertLess(response.status, 502)
                    self.assertNotEqual(response.status, 500, response)
                    self.assert_clean_afterwards(connection)

    def test_a_malformed_body_after_an_error_is_never_taken_for_a_request(self) -> None:
        for method, path, lines in self.early_errors():
            with self.subTest(method, path=path):
                body = b"X\r\n" + SMUGGLED
                connection = self.connect().request(
                    method, path, "Transfer-Encoding: chunked", *lines, body=body
                )
                self.assertLess(connection.read(method).status, 500)
                self.assert_clean_afterwards(connection)

    def test_an_error_is_readable_while_the_body_is_still_being_sent(self) -> None:
        body = b"x" * MEBIBYTE
        for method, path in (
            ("POST", "/v2/Bad/blobs/uploads/"),
            ("PATCH", self.client.path("blobs/uploads/unheard-of")),
            ("PUT", "/v2/Bad/manifests/tag"),
        ):
            for sent in (body, iter([body])):
                with self.subTest(method, sent=type(sent).__name__):
                    response = self.client.request(method, path, sent)
                    self.assert_error(response, response.status)
                    self.assert_status(response, 400, 404)

    def test_a_body_that_never_ends_is_not_read_for_ever(self) -> None:
        path = "/v2/Bad/blobs/uploads/"
        connection = self.connect().request("POST", path, f"Content-Length: {2**50}")
        self.assert_status(connection.read(), 400)

    def test_many_requests_share_a_connection(self) -> None:
        connection = self.connect()
        for number in range(50):
            content = unique()
            path = self.client.path(f"blobs/uploads/?digest={digest_of(content)}")
            connection.request("POST", path, f"Content-Length: {len(content)}", body=content)
            self.assert_status(connection.read(), 201)
            path = self.client.path(f"blobs/{digest_of(content if number % 2 else b'unknown')}")
            connection.request("GET", path)
            self.assert_status(connection.read(), 200 if number % 2 else 404)

    def test_requests_sent_ahead_are_answered_in_order(self) -> None:
        host = b"Host: a\r\n"
        get = b"GET " + self.client.path(f"blobs/{HELLO_DIGEST}").encode() + b" HTTP/1.1\r\n" + host + b"\r\n"
        post = b"POST " + self.upload.encode() + b" HTTP/1.1\r\n" + host + b"Content-Length: 5\r\n\r\nhello"
        root = b"GET /v2/ HTTP/1.1\r\n" + host + b"\r\n"
        connection = self.send(get + root + post + get + root + get.replace(b"GET", b"HEAD") + get + root)
        for status, body in ((404, None), (200, None), (201, b""), (200, HELLO), (200, None)):
            response = connection.read()
            self.assert_status(response, status)
            self.assertEqual(response.body, response.body if body is None else body)
        head = connection.read("HEAD")
        self.assertEqual((head.status, head.headers["Content-Length"]), (200, "5"))
        self.assertEqual(connection.read().body, HELLO)
        self.assertEqual(connection.read().json, {})

    def test_close_is_honoured(self) -> None:
        for path in ("/v2/", "/v2/unheard/of/tags/list"):
            connection = self.connect().request("GET", path, "Connection: close")
            connection.read()
            self.assertTrue(connection.is_closed())

    def test_http_1_0_is_answered_and_closed(self) -> None:
        for lines in (b"", b"Host: a\r\n"):
            connection = self.send(b"GET /v2/ HTTP/1.0\r\n" + lines + b"\r\n")
            response = connection.read()
            self.assertEqual((response.status, response.json), (200, {}))
            self.assertTrue(connection.is_closed())

    def test_replies_do_not_wait_for_acknowledgements(self) -> None:
        digest = self.client.push_blob(HELLO)
        location = self.client.open_upload()
        paths = (
            ("GET", "/v2/"),
            ("GET", self.client.path(f"blobs/{digest}")),
            ("GET", self.client.path(f"blobs/{self.client.push_blob(bytes(100_001))}")),
            ("GET", self.client.path("manifests/unheard-of")),
            ("GET", location),
        )
        for method, path in paths:
            with self.subTest(path):
                connection = self.connect()

                def exchange(
                    connection: RawConnection = connection, method: str = method, path: str = path
                ) -> None:
                    for _ in range(50):
                        connection.request(method, path).read()

                self.assertLess(elapsed(exchange), 1)

    def test_small_uploads_do_not_wait_for_acknowledgements(self) -> None:
        connection = self.connect()

        def exchange() -> None:
            for _ in range(50):
                connection.request("POST", self.upload, "Content-Length: 5").send(HELLO).read()

        self.assertLess(elapsed(exchange), 1)

    def test_idle_connections_keep_nobody_waiting(self) -> None:
        connections = [self.connect() for _ in range(100)]
        for connection in connections[:50]:
            connection.request("GET", "/v2/").read()
        self.assertLess(elapsed(lambda: self.assert_status(self.client.get("/v2/"), 200)), 2)
        for connection in connections:
            self.assert_clean_afterwards(connection)


class ReplyTest(HTTPConnectionTestCase):
    """What every reply has in common."""

    def routes(self) -> dict[str, str]:
        """A path for everything that can be read, and for much that cannot."""
        digest = self.client.push_blob(HELLO)
        image = self.client.push_image("latest")
        return {
            "root": "/v2/",
            "blob": f"blobs/{digest}",
            "empty blob": f"blobs/{self.client.push_blob(b'')}",
            "unknown blob": f"blobs/{digest_of(b'unknown')}",
            "malformed digest": "blobs/sha256:abc",
            "tag": "manifests/latest",
            "manifest": f"manifests/{image.digest}",
            "unknown manifest": "manifests/unheard-of",
            "bad reference": "manifests/.INVALID_MANIFEST_NAME",
            "tags": "tags/list",
            "no tags": "/v2/unheard/of/tags/list",
            "bad count": "tags/list?n=x",
            "catalog": "/v2/_catalog",
            "referrers": f"referrers/{image.digest}",
            "session": self.client.open_upload(),
            "unknown session": "blobs/uploads/unheard-of",
            "uploads": "blobs/uploads/",
            "bad name": "/v2/Bad/tags/list",
            "unknown route": "/v2/unknown",
        }

    def test_a_reply_to_head_has_no_body(self) -> None:
        for name, path in self.routes().items():
            with self.subTest(name):
                connection = self.connect().request("HEAD", self.client.path(path))
                head = connection.read("HEAD")
                self.assertLess(head.status, 500)
                self.assert_clean_afterwards(connection)
                get = self.client.get(path)
                if head.status != 405:
                    self.assertEqual(head.status, get.status)
                if head.status == 200:
                    self.assertEqual(head.headers["Content-Length"], str(len(get.body)))

    def test_a_reply_without_content_has_no_body(self) -> None:
        digest = self.client.push_blob(HELLO)
        etag = self.client.get(f"blobs/{digest}").headers["ETag"]
        for status, method, path, *lines in (
            (304, "GET", self.client.path(f"blobs/{digest}"), f"If-None-Match: {etag}"),
            (304, "HEAD", self.client.path(f"blobs/{digest}"), f"If-None-Match: {etag}"),
            (204, "GET", self.client.open_upload()),
            (204, "DELETE", self.client.open_upload()),
        ):
            with self.subTest(method, status=status):
                connection = self.connect().request(method, path, *lines)
                self.assert_status(connection.read(method), status)
                self.assert_clean_afterwards(connection)

    def test_every_reply_names_the_api_version(self) -> None:
        for name, path in self.routes().items():
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"):
                with self.subTest(name, method=method):
                    response = self.client.request(method, path)
                    self.assertEqual(response.headers["Docker-Distribution-API-Version"], "registry/2.0")
                    self.assertNotEqual(response.status, 500, response)
                    if response.status >= 400 and method != "HEAD":
                        self.assert_error(response, response.status)

    def test_no_reply_runs_anything_in_a_browser(self) -> None:
        for name, path in self.routes().items():
            for method in ("GET", "HEAD", "BREW"):
                with self.subTest(name, method=method):
                    headers = self.client.request(method, path).headers
                    self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
                    self.assertEqual(headers["Content-Security-Policy"], "default-src 'none'; sandbox")

    def test_a_refused_request_names_the_api_version(self) -> None:
        for data in (
            b"POST /v2/a/blobs/uploads/ HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n",
            b"GET /v2/?" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /v2/ HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        ):
            with self.subTest(data[:60]):
                response = self.send(data).read()
                self.assert_error(response, response.status)

    def test_every_location_is_relative(self) -> None:
        image = self.client.push_image()
        headers = {
            "Host": "evil.example",
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Host": "evil.example",
            "Forwarded": "host=evil.example",
        }
        location = self.client.open_upload()
        for method, path, body in (
            ("POST", "blobs/uploads/", None),
            ("POST", f"blobs/uploads/?digest={HELLO_DIGEST}", HELLO),
            ("POST", f"blobs/uploads/?mount={HELLO_DIGEST}", None),
            ("PATCH", location, HELLO),
            ("GET", location, None),
            ("PUT", with_digest(location, HELLO_DIGEST), b""),
            ("PUT", f"manifests/{image.digest}?tag=a", image.body),
        ):
            with self.subTest(method, path=path):
                lines = [*headers.items(), ("Content-Type", OCI_MANIFEST)]
                response = self.exchange(method, path, body, lines)
                self.assertLess(response.status, 300, response)
                self.assertTrue(response.headers["Location"].startswith(f"/v2/{self.client.repository}/"))

    def exchange(self, method: str, path: str, body: bytes | None, lines: list[tuple[str, str]]) -> Response:
        head = [
            f"{method} {self.client.path(path)} HTTP/1.1",
            *(f"{name}: {value}" for name, value in lines),
        ]
        head.append(f"Content-Length: {len(body or b'')}")
        return self.send("\r\n".join([*head, "", ""]).encode() + (body or b"")).read()

    def test_repeated_headers_are_all_right(self) -> None:
        image = self.client.push_image("latest")
        accept = [f"Accept: application/vnd.example.{n}+json" for n in range(20)]
        connection = self.connect().request("GET", self.client.path("manifests/latest"), *accept)
        self.assertEqual(connection.read().body, image.body)


class RouteTest(HTTPConnectionTestCase):
    def test_the_root_answers(self) -> None:
        response = self.client.get("/v2/")
        self.assertEqual((response.status, response.json), (200, {}))
        self.assertEqual(self.client.get("/v2").json, {})
        self.assert_status(self.client.get("/v2/?ns=docker.io"), 200)

    def test_an_unknown_route_is_404(self) -> None:
        digest = self.client.push_blob(HELLO)
        for path in (
            "/",
            "/v1/",
            "/v2x/",
            "/V2/",
            "/favicon.ico",
            "/v2/unknown",
            "/v2/_catalog/",
            "/v2/_catalog/x",
            "/v2/blobs",
            self.client.path("unknown/x"),
            self.client.path("tags"),
            self.client.path("tags/x"),
            self.client.path("tags/list/"),
            self.client.path("manifests"),
            self.client.path(f"blobs/{digest}/"),
            self.client.path(f"blobs/{digest}/x"),
            self.client.path("Blobs/") + digest,
        ):
            for method in ("GET", "HEAD", "DELETE", "POST"):
                with self.subTest(path, method=method):
                    self.assertEqual(self.client.request(method, path).status, 404)

    def test_a_known_route_tells_its_methods(self) -> None:
        digest = self.client.push_blob(HELLO)
        session = self.client.open_upload()
        for path, methods in (
            ("/v2/", "POST PUT PATCH DELETE"),
            ("/v2/_catalog", "POST PUT PATCH DELETE"),
            (self.client.path("tags/list"), "POST PUT PATCH DELETE"),
            (self.client.path(f"referrers/{digest}"), "POST PUT PATCH DELETE"),
            (self.client.path("manifests/latest"), "POST PATCH"),
            (self.client.path(f"manifests/{digest}"), "POST PATCH"),
            (self.client.path(f"blobs/{digest}"), "POST PUT PATCH"),
            (self.client.path("blobs/uploads/"), "GET PUT PATCH DELETE"),
            (session, "POST"),
        ):
            for method in [*methods.split(), "BREW"]:
                with self.subTest(path, method=method):
                    response = self.client.request(method, path)
                    self.assert_error(response, 405)
                    allowed = [each.strip() for each in response.headers["Allow"].split(",")]
                    self.assertGreater(len(allowed), 0)
                    self.assertEqual(set(allowed) & set(methods.split()), set())
                    for each in set(allowed) - {"DELETE"}:
                        self.assertNotEqual(self.client.request(each, path).status, 405)

    def test_what_is_still_needed_tells_the_other_methods(self) -> None:
        image = self.client.push_image("latest")
        index = self.client.push_manifest(image_index([image.descriptor]))
        for path, methods in (
            (f"blobs/{digest_of(image.config)}", "GET, HEAD"),
            (f"manifests/{image.digest}", "GET, HEAD, PUT"),
        ):
            response = self.client.delete(path)
            self.assert_error(response, 405, "DENIED")
            self.assertEqual(response.headers["Allow"], methods)
        self.client.expect(202, "DELETE", f"manifests/{index}")

    def test_no_path_leads_out_of_the_data_directory(self) -> None:
        before = self.snapshot()
        digest = self.client.push_blob(HELLO)
        self.client.expect(202, "DELETE", f"blobs/{digest}")
        names = (
            "..",
            "../..",
            "%2e%2e",
            "..%2f..",
            "%2e%2e%2f%2e%2e",
            "a/../..",
            ".",
            "%5c..%5c",
            "a%00",
            "/etc",
        )
        for name in names:
            for path in (
                f"/v2/{name}/blobs/uploads/",
                f"/v2/{name}/blobs/uploads/{name}",
                f"/v2/{name}/manifests/latest",
                f"/v2/{name}/manifests/{name}",
                f"/v2/{name}/tags/list",
                f"/v2/{name}/blobs/sha256:{name}",
                f"/v2/{name}",
                f"/{name}/registry.db",
                self.client.path(f"blobs/uploads/{name}/registry.db"),
                self.client.path(f"blobs/sha256:{name}/registry.db"),
                self.client.path(f"blobs/{name}"),
                self.client.path(f"manifests/{name}"),
                self.client.path(f"manifests/sha256:{name}"),
                self.client.path(f"referrers/sha256:{name}"),
            ):
                for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
                    with self.subTest(path, method=method):
                        status = self.client.request(method, path).status
                        self.assertTrue(status in (200, 301, 307, 308) or 400 <= status < 500, status)
                        if status == 200:
                            self.assertEqual((path, method), ("/v2/.", "GET"))
        self.assertEqual(self.snapshot(), before)

    def snapshot(self) -> tuple:
        return (
            sorted(path.name for path in self.data.path.iterdir()),
            self.data.unfinished(),
            self.data.files(),
        )

    def test_an_encoded_slash_never_crashes(self) -> None:
        encoded = self.client.repository.replace("/", "%2F")
        digest = self.client.push_blob(HELLO)
        for path in (
            f"/v2/{encoded}/blobs/{digest}",
            f"/v2%2F{encoded}/tags/list",
            f"/v2/{encoded}%2Ftags%2Flist",
        ):
            with self.subTest(path):
                self.assert_status(self.client.get(path), 200, 400, 404)


class NameTest(HTTPConnectionTestCase):
    GOOD = (
        "a/blobs/uploads",
        "manifests/tags",
        "a/manifests/b",
        "a/tags/list",
        "a/referrers/b",
        "a/blobs/b",
        "blobs",
        "blobs/uploads",
        "uploads",
        "manifests",
        "tags",
        "tags/list",
        "referrers",
        "v2",
        "v2/v2",
        "catalog",
        "0",
        "a.b",
        "a_b",
        "a__b",
        "a-b",
        "a--b",
        "a---b-c.d_e__f",
        "a/b/c/d/e/f/g/h/i/j",
        "library/blobs/uploads/blobs/uploads",
        "n" * 255,
        "n/" * 127 + "n",
    )
    BAD = (
        "A",
        "aB",
        "a/B",
        "-a",
        "a-",
        ".a",
        "a.",
        "_a",
        "a_",
        "a..b",
        "a___b",
        "a.-b",
        "a_.b",
        "a//b",
        "a/-b",
        "a%20b",
        "a%0A",
        "a%00",
        "a:b",
        "a@b",
        "a+b",
        "a~b",
        "%C3%BC",
        "%D9%A3",
        "%EF%BC%91",
        "n" * 256,
        "n/" * 128 + "n",
    )

    def test_a_good_name_is_good_for_everything(self) -> None:
        for name in self.GOOD:
            with self.subTest(name[:60]):
                self.push_and_pull(self.client.at(name))

    def push_and_pull(self, client: Client) -> None:
        image = client.push_image("latest")
        location = client.open_upload()
        self.assertTrue(location.startswith(f"/v2/{client.repository}/blobs/uploads/"))
        content = unique()
        client.expect(202, "PATCH", location, content)
        client.expect(204, "GET", location)
        response = client.expect(201, "PUT", with_digest(location, digest_of(content)))
        self.assertEqual(response.headers["Location"], client.path(f"blobs/{digest_of(content)}"))
        client.expect(204, "DELETE", client.open_upload())
        self.assertEqual(client.get("manifests/latest").body, image.body)
        self.assertEqual(client.get(f"blobs/{digest_of(image.config)}").body, image.config)
        self.assertEqual(client.get("tags/list").json, {"name": client.repository, "tags": ["latest"]})
        self.assertEqual(client.get(f"referrers/{image.digest}").json["manifests"], [])
        client.expect(202, "DELETE", f"manifests/{image.digest}")

    def test_names_that_look_like_routes_are_told_apart(self) -> None:
        names = "x", "x/blobs", "x/blobs/uploads", "x/manifests", "x/tags", "x/tags/list"
        images = {name: self.client.at(name).push_image("latest") for name in names}
        for name, image in images.items():
            with self.subTest(name):
                client = self.client.at(name)
                self.assertEqual(client.get("manifests/latest").body, image.body)
                self.assertEqual(client.get("tags/list").json["name"], name)
                self.assert_blob(client, image.config)

    def test_a_write_to_a_bad_name_is_400(self) -> None:
        for name in self.BAD:
            for method, path, body in (
                ("POST", "blobs/uploads/", None),
                ("POST", f"blobs/uploads/?digest={HELLO_DIGEST}", HELLO),
                ("PATCH", "blobs/uploads/unheard-of", HELLO),
                ("PUT", f"blobs/uploads/unheard-of?digest={HELLO_DIGEST}", HELLO),
                ("PUT", "manifests/latest", encode(image_index([]))),
            ):
                with self.subTest(name[:60], method=method, path=path):
                    response = self.client.at(name).request(method, path, body)
                    self.assert_error(response, 400, "NAME_INVALID")

    def test_a_read_or_delete_with_a_bad_name_is_404(self) -> None:
        for name in self.BAD:
            for path in (
                f"blobs/{HELLO_DIGEST}",
                "manifests/latest",
                "tags/list",
                "blobs/uploads/unheard-of",
            ):
                for method in ("GET", "HEAD", "DELETE"):
                    if (method, path) not in (
                        ("DELETE", "tags/list"),
                        ("HEAD", "blobs/uploads/unheard-of"),
                    ):
                        with self.subTest(name[:60], method=method, path=path):
                            self.assertEqual(self.client.at(name).request(method, path).status, 404)

    def test_a_path_that_is_not_utf_8_is_a_client_error(self) -> None:
        for name in ("%FF", "%C3", "%ED%A0%80", "a%80"):
            for path in (
                f"/v2/{name}/tags/list",
                f"/v2/{name}/blobs/uploads/",
                self.client.path(f"blobs/{name}"),
                self.client.path(f"manifests/{name}"),
                self.client.path(f"referrers/{name}"),
                self.client.path(f"blobs/uploads/?digest={name}"),
                self.client.path(f"tags/list?last={name}"),
                f"/{name}",
            ):
                for method in ("GET", "POST", "PUT", "DELETE"):
                    with self.subTest(path, method=method):
                        status = self.client.request(method, path).status
                        self.assertEqual(status, 400)
