"""Where a request ends: chunks, lengths, heads and request lines, and nobody who hides one in another."""

from __future__ import annotations

from tests.smuggling import CORPUS, SMUGGLED
from tests.support import HELLO, HELLO_DIGEST, HTTPConnectionTestCase, RawConnection, digest_of


class ChunksAreDecoded(HTTPConnectionTestCase):
    """Bodies in chunks."""

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

    def test_trailers_have_a_limit(self) -> None:
        body = b"5\r\nhello\r\n0\r\n"
        for trailers in (b"A: b\r\n" * 50_000, b"A: " + b"b" * 300_000 + b"\r\n"):
            self.assert_refused(self.post(self.CHUNKED, body=body + trailers + b"\r\n"))


class HeadsAreRead(HTTPConnectionTestCase):
    """Request lines, hosts, headers."""

    def test_no_control_character_begins_another_header(self) -> None:
        for separator in (b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\x85", b"\xe2\x80\xa8"):
            with self.subTest(separator):
                line = b"X: a" + separator + b"Transfer-Encoding: chunked"
                response = self.post(b"Content-Length: 5", line).read()
                self.assert_status(response, 400 if separator == b"\r" else 201)

    def test_another_version_is_505(self) -> None:
        self.assert_refused(self.send(b"GET /v2/ HTTP/2.0\r\nHost: a\r\n\r\n"), 505)

    def test_an_odd_target_or_method_is_a_client_error(self) -> None:
        for line, status in {
            b"OPTIONS *": 404,
            b"OPTIONS /v2/": 405,
            b"CONNECT a:1": 404,
            b"TRACE /v2/": 405,
            b"get /v2/": 405,
            b"__init__ /v2/": 405,
            b"G" * 1000 + b" /v2/": 400,
            b"GET v2/": 404,
            b"GET ?": 404,
            b"GET //v2/": 404,
            b"GET HTTP:/v2/": 404,
            b"GET ftp://a/v2/": 404,
            b"GET /v2/\xff/tags/list": 404,
            b"GET /v2/%/tags/list": 404,
            b"GET /v2/%zz/tags/list": 404,
            b"GET /v2/#fragment": 404,
            b"GET /v2/a/tags/list?n=%zz": 400,
            b"GET /v2/_catalog?n=1&n=%FF": 400,
            b"GET /v2/a/tags/list?" + b"&" * 5000: 400,
        }.items():
            with self.subTest(line[:60]):
                connection = self.send(line + b" HTTP/1.1\r\nHost: a\r\n\r\n")
                self.assert_error(connection.read(), status)
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


class MalformedIsRefused(HTTPConnectionTestCase):
    """Nobody hides a request in another."""

    def send(self, data: bytes) -> RawConnection:
        return super().send(data.replace(b"{upload}", self.upload.encode()))

    def test_what_is_malformed_is_refused_and_ends_the_connection(self) -> None:
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
        self.assert_error(self.client.get("tags/list"), 404, "NAME_UNKNOWN")

    def test_it_is_refused_wherever_packets_end(self) -> None:
        for name, data in CORPUS[::5]:
            with self.subTest(name):
                connection = self.connect()
                for byte in data.replace(b"{upload}", self.upload.encode())[:2000]:
                    connection.send(bytes([byte]))
                connection.stop_sending()
                self.assert_error(connection.read(), 400)
                self.assertTrue(connection.is_closed(), "a second answer")

    def test_the_smuggled_request_would_be_answered_on_its_own(self) -> None:
        connection = self.send(SMUGGLED * 2)
        for _ in range(2):
            self.assert_error(connection.read(), 404, "NAME_UNKNOWN")
