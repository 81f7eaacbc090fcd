"""Where a request ends: chunks, lengths, heads and request lines, and nobody who hides one in another."""

from __future__ import annotations

from tests.smuggling import CORPUS, SMUGGLED
from tests.support import (
    HELLO,
    HELLO_DIGEST,
    HTTPConnectionTestCase,
    RawConnection,
    RegistryTestCase,
    digest_of,
)


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


class SmugglingTest(RegistryTestCase):
    def send(self, data: bytes) -> RawConnection:
        upload = self.client.path(f"blobs/uploads/?digest={HELLO_DIGEST}")
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
        self.assert_no_blob(self.client, HELLO_DIGEST)
        self.assert_nothing_unfinished()

    def test_it_is_refused_wherever_packets_end(self) -> None:
        for name, data in CORPUS[::5]:
            with self.subTest(name):
                connection = self.connect()
                upload = self.client.path(f"blobs/uploads/?digest={HELLO_DIGEST}").encode()
                for byte in data.replace(b"{upload}", upload)[:2000]:
                    connection.send(bytes([byte]))
                connection.stop_sending()
                self.assert_error(connection.read(), 400)
                self.assertTrue(connection.is_closed(), "a second answer")

    def test_the_smuggled_request_would_be_answered_on_its_own(self) -> None:
        connection = self.send(SMUGGLED * 2)
        for _ in range(2):
            self.assert_error(connection.read(), 404, "NAME_UNKNOWN")
