"""Exchanges: what is asked for, what comes next on the same connection, and what every reply has."""

from __future__ import annotations

import email.utils
import json
import time

from tests.smuggling import SMUGGLED
from tests.support import (
    HELLO,
    HELLO_DIGEST,
    MEBIBYTE,
    OCI_MANIFEST,
    HTTPConnectionTestCase,
    RawConnection,
    Response,
    digest_of,
    elapsed,
    encode,
    image_index,
    unique,
    with_digest,
)


class BodiesAreAskedFor(HTTPConnectionTestCase):
    """Expect: 100-continue."""

    def test_a_body_that_will_be_read_is_asked_for(self) -> None:
        location = self.client.open_upload()
        for framing, body in (
            ("Content-Length: 5", HELLO),
            ("Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n"),
        ):
            for expectation in ("100-continue", "100-Continue"):
                for method, path, status in (("POST", self.upload, 201), ("PATCH", location, 202)):
                    with self.subTest(method, framing=framing, expectation=expectation):
                        connection = self.connect().request(method, path, framing, f"Expect: {expectation}")
                        self.assert_status(connection.read(), 100)
                        self.assert_status(connection.send(body).read(), status)
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


class ConnectionsAreReused(HTTPConnectionTestCase):
    """What comes after on the same connection."""

    def early_replies(self) -> list[tuple[int, str, str, tuple[str, ...]]]:
        """Requests that are answered before their body is of interest, and with which status."""
        unheard_of = self.client.path("blobs/uploads/unheard-of")
        return [
            (400, "POST", "/v2/Bad/blobs/uploads/", ()),
            (400, "POST", self.client.path("blobs/uploads/?digest=sha256:abc"), ()),
            (202, "POST", self.client.path(f"blobs/uploads/?mount={HELLO_DIGEST}"), ()),
            (202, "POST", self.client.path("blobs/uploads/"), ()),
            (404, "PATCH", unheard_of, ()),
            (404, "PUT", f"{unheard_of}?digest={HELLO_DIGEST}", ()),
            (416, "PATCH", self.client.open_upload(), ("Content-Range: 7-8",)),
            (400, "PUT", self.client.open_upload(), ()),
            (400, "PUT", self.client.path("manifests/-bad"), ()),
            (400, "PUT", self.client.path("manifests/tag"), ()),
            (404, "PUT", "/v2/unknown/route/here", ()),
            (404, "POST", "/nowhere", ()),
            (405, "POST", "/v2/", ()),
            (405, "PATCH", self.client.path("tags/list"), ()),
            (405, "BREW", "/v2/", ()),
            (404, "DELETE", self.client.path(f"blobs/{HELLO_DIGEST}"), ()),
            (404, "DELETE", unheard_of, ()),
            (404, "GET", self.client.path(f"blobs/{HELLO_DIGEST}"), ()),
            (200, "GET", "/v2/", ()),
            (200, "HEAD", "/v2/", ()),
        ]

    def test_a_body_is_never_taken_for_a_request(self) -> None:
        for framing, body in (
            (f"Content-Length: {len(SMUGGLED)}", SMUGGLED),
            ("Transfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)),
            ("Transfer-Encoding: chunked", b"X\r\n" + SMUGGLED),
        ):
            for status, method, path, lines in self.early_replies():
                with self.subTest(method, path=path, framing=framing, body=body[:5]):
                    connection = self.connect().request(method, path, framing, *lines, body=body)
                    self.assert_status(connection.read(method), status)
                    self.assert_clean_afterwards(connection)

    def test_an_error_is_readable_while_the_body_is_still_being_sent(self) -> None:
        body = b"x" * MEBIBYTE
        for method, path, status in (
            ("POST", "/v2/Bad/blobs/uploads/", 400),
            ("PATCH", self.client.path("blobs/uploads/unheard-of"), 404),
            ("PUT", "/v2/Bad/manifests/tag", 400),
        ):
            for sent in (body, iter([body])):
                with self.subTest(method, sent=type(sent).__name__):
                    self.assert_error(self.client.request(method, path, sent), status)

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
        self.assert_error(connection.read(), 404)
        for status, body in ((200, b"{}\n"), (201, b""), (200, HELLO), (200, b"{}\n")):
            response = connection.read()
            self.assertEqual((response.status, response.body), (status, body))
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


class WhatEveryReplyHas(HTTPConnectionTestCase):
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

    def test_every_reply_says_when_by_which_api_and_that_nothing_is_to_run_in_a_browser(self) -> None:
        for name, path in self.routes().items():
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"):
                with self.subTest(name, method=method):
                    response = self.client.request(method, path)
                    headers = response.headers
                    self.assertEqual(headers["Docker-Distribution-API-Version"], "registry/2.0")
                    self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
                    self.assertEqual(headers["Content-Security-Policy"], "default-src 'none'; sandbox")
                    self.assertRegex(headers["Date"], r"\A\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\Z")
                    said = email.utils.parsedate_to_datetime(headers["Date"]).timestamp()
                    self.assertLess(abs(said - time.time()), 5)
                    if response.status >= 400 and method != "HEAD":
                        self.assert_error(response, response.status)
                        self.assertNotEqual(response.status, 500)

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
