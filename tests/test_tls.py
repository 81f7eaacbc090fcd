"""TLS: what it takes to connect, and clients that never finish a handshake."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import tempfile
import threading
import unittest
import warnings
from pathlib import Path
from typing import Any, ClassVar

import registry
from tests.certificates import HAS_OPENSSL, Authority
from tests.credentials import AuthorizedClient, basic, users_line
from tests.support import (
    MEBIBYTE,
    TIMEOUT,
    Body,
    HTTPTestCase,
    RawConnection,
    Response,
    digest_of,
    elapsed,
    wait_until,
    with_digest,
)


class SecureClient(AuthorizedClient):
    """A client that speaks TLS, each request on a connection of its own."""

    def __init__(self, host: str, context: ssl.SSLContext, authorization: str = "") -> None:
        super().__init__(host, "team/app", authorization)
        self.context = context

    def as_caller(self, authorization: str) -> SecureClient:
        return SecureClient(self.host, self.context, authorization)

    def request(self, method: str, path: str, body: Body = None, headers: Any = ()) -> Response:
        secure = http.client.HTTPSConnection(self.host, timeout=TIMEOUT, context=self.context)
        with contextlib.closing(secure) as self._connection:
            return super().request(method, path, body, headers)


@unittest.skipUnless(HAS_OPENSSL, "needs the openssl program")
class TLSTestCase(HTTPTestCase):
    """An authority for the class, and a registry with a certificate of its."""

    authority: ClassVar[Authority]
    server: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.authority = Authority(Path(directory.name) / "ca")
        cls.server = cls.authority.issue("server")

    def setUp(self) -> None:
        self.directory = self.temporary()
        self.certificate, self.key = self.directory / "tls.crt", self.directory / "tls.key"
        self.install(self.server)

    def install(self, certificate: Path) -> None:
        """Put a certificate and its key where the registry finds them, each in one step."""
        for source, target in ((certificate, self.certificate), (certificate.with_suffix(".key"), self.key)):
            new = target.with_name("new")
            new.write_bytes(source.read_bytes())
            new.replace(target)

    def serve(self, **options: Any) -> SecureClient:
        """Start a registry; a client that trusts it."""
        files = {"tls_cert": str(self.certificate), "tls_key": str(self.key)}
        self.registry = self.enter(registry.Registry(**{**files, **options}))
        return SecureClient(self.registry.netloc, self.trusting())

    def trusting(self, certificate: Path | None = None) -> ssl.SSLContext:
        """A client's settings: it trusts the authority, and may have a certificate to show."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        if certificate:
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        return context

    def connect(self) -> RawConnection:
        """A connection on which nobody has spoken TLS yet."""
        return self.enter(RawConnection(self.registry.netloc))

    def common_name(self) -> str:
        """Whose certificate the registry shows to a new client."""
        host, _, port = self.registry.netloc.partition(":")
        plain = socket.create_connection((host, int(port)), TIMEOUT)
        with self.trusting().wrap_socket(plain, server_hostname=host) as secure:
            return dict(part[0] for part in secure.getpeercert()["subject"])["commonName"]


class ConnectionsAreSecure(TLSTestCase):
    def test_images_are_pushed_and_pulled(self) -> None:
        client = self.serve()
        self.assertEqual(self.registry.url, f"https://{self.registry.netloc}")
        image = client.push_image("latest")
        self.assertEqual(client.get("manifests/latest").body, image.body)
        for blob in image.blobs:
            self.assertEqual(client.get(f"blobs/{digest_of(blob)}").body, blob)

    def test_large_blobs_pass_in_every_form(self) -> None:
        client = self.serve()
        content = os.urandom(12 * MEBIBYTE + 1)
        digest = digest_of(content)
        for body in (content, iter([content[:1], content[1:MEBIBYTE], content[MEBIBYTE:]])):
            location = client.expect(202, "PATCH", client.open_upload(), body).headers["Location"]
            client.expect(201, "PUT", with_digest(location, digest))
            self.assertEqual(digest_of(client.get(f"blobs/{digest}").body), digest)
            part = client.get(f"blobs/{digest}", {"Range": "bytes=70000-9999999"})
            self.assertEqual(digest_of(part.body), digest_of(content[70000:10_000_000]))
            client.expect(202, "DELETE", f"blobs/{digest}")

    def test_tls_before_1_2_is_refused(self) -> None:
        client = self.serve()
        for version, welcome in (("TLSv1", False), ("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)):
            with self.subTest(version), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context = self.trusting()
                context.set_ciphers("ALL:@SECLEVEL=0")  # or it would not even ask for old versions
                context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
                client.context = context
                if welcome:
                    self.assert_status(client.get("/v2/"), 200)
                else:
                    with self.assertRaisesRegex(ssl.SSLError, "(?i)alert.*version|unsupported"):
                        client.get("/v2/")

    def test_whoever_does_not_trust_the_authority_does_not_connect(self) -> None:
        client = self.serve()
        client.context = ssl.create_default_context()
        with self.assertRaises(ssl.SSLCertVerificationError):
            client.get("/v2/")
        client.context = self.trusting()
        self.assert_status(client.get("/v2/"), 200)

    def test_the_realm_is_where_it_speaks_tls(self) -> None:
        users = self.directory / "users.txt"
        users.write_text(users_line("puller", "secret"))
        client = self.serve(users=str(users))
        self.assertIn(f'realm="https://{client.host}/token"', client.get("/v2/").headers["WWW-Authenticate"])
        self.assert_status(client.as_caller(basic("puller", "secret")).get("/v2/"), 200)

    def test_plain_http_is_hung_up_on(self) -> None:
        client = self.serve()
        for data in (b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n", b"\x00" * 100, b"\xff" * 20_000):
            connection = self.connect().send(data)
            self.assertLess(elapsed(connection.drain), TIMEOUT)
        self.assert_status(client.get("/v2/"), 200)

    def test_key_and_certificate_may_be_in_one_file(self) -> None:
        both = self.directory / "both.pem"
        both.write_bytes(self.server.read_bytes() + self.server.with_suffix(".key").read_bytes())
        self.assert_status(self.serve(tls_cert=str(both), tls_key=None).get("/v2/"), 200)

    def test_files_that_do_not_fit_keep_it_from_starting(self) -> None:
        other, empty = self.authority.issue("other").with_suffix(".key"), self.directory / "empty"
        empty.write_bytes(b"")
        for options in (
            {"tls_key": str(other)},
            {"tls_key": str(empty)},
            {"tls_cert": str(empty)},
            {"tls_cert": str(self.directory / "absent")},
        ):
            with self.subTest(options), self.assertRaises(registry.StartupError):
                self.serve(**options)

    def test_a_key_is_refused_without_a_certificate(self) -> None:
        with self.assertRaises(registry.StartupError):
            self.serve(tls_cert=None)

    def test_a_client_is_not_asked_for_a_certificate(self) -> None:
        users = self.directory / "users.txt"
        users.write_text(users_line("bob", "secret"))
        client = self.serve(users=str(users))
        client.context = self.trusting(self.authority.issue("bob"))
        self.assert_status(client.get("/v2/"), 401)


class ConnectionsEndWithANotice(TLSTestCase):
    """How connections end: with TLS's close_notify, or the client could not tell it from an attack."""

    def shake_hands(self) -> ssl.SSLSocket:
        """A connection whose end without a close_notify is an error."""
        context = self.trusting()
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
        host, _, port = self.registry.netloc.partition(":")
        plain = socket.create_connection((host, int(port)), TIMEOUT)
        secure = context.wrap_socket(plain, server_hostname=host, suppress_ragged_eofs=False)
        return self.enter(secure)

    def read_to_the_end(self, secure: ssl.SSLSocket) -> bytes:
        return b"".join(iter(lambda: secure.recv(65536), b""))

    def test_a_reply_that_is_the_last_ends_with_it(self) -> None:
        self.serve()
        secure = self.shake_hands()
        secure.sendall(b"GET /v2/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        self.assertTrue(self.read_to_the_end(secure).endswith(b"\r\n\r\n{}\n"))

    def test_it_is_not_waited_for_the_clients(self) -> None:
        self.patch(LINGER_TIMEOUT=0.1)
        self.serve()
        for last in (b"GET /v2/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"nonsense\r\n\r\n"):
            secure = self.shake_hands()
            secure.sendall(last)
            self.read_to_the_end(secure)  # and says nothing itself
        wait_until(lambda: not self.registry.server.connections, "for both to be over", 5)

    def test_an_idle_connection_ends_with_it(self) -> None:
        self.patch(IDLE_TIMEOUT=0.3)
        self.serve()
        self.assertEqual(self.read_to_the_end(self.shake_hands()), b"")

    def test_a_registry_that_stops_ends_with_it(self) -> None:
        self.serve()
        secure = self.shake_hands()
        secure.sendall(b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertIn(b"200 OK", secure.recv(65536))
        self.registry.close()
        self.assertEqual(self.read_to_the_end(secure), b"")

    def test_a_client_that_ends_first_is_answered_alike(self) -> None:
        self.serve()
        self.shake_hands().unwrap()

    def test_a_body_that_is_not_wanted_does_not_hide_the_reply(self) -> None:
        self.serve()
        body = os.urandom(8 * MEBIBYTE)
        for framing in (b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked"):
            with self.subTest(framing):
                secure = self.shake_hands()
                secure.sendall(b"POST /v2/Bad/blobs/uploads/ HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n")
                secure.sendall(body)
                self.assertIn(b"NAME_INVALID", self.read_to_the_end(secure))

    def test_a_small_rest_may_follow_and_another_request_after_it(self) -> None:
        self.serve()
        secure = self.shake_hands()
        secure.sendall(b"POST /v2/Bad/blobs/uploads/ HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n")
        self.assertIn(b"400 Bad Request", secure.recv(65536))
        secure.sendall(b"0123456789GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertIn(b"200 OK", secure.recv(65536))

    def test_whoever_owes_a_rest_makes_room(self) -> None:
        self.patch(EVICTION_DELAY=0.0, EVICTION_TIMEOUT=TIMEOUT, LINGER_TIMEOUT=10 * TIMEOUT)
        client = self.serve(max_connections=4)
        for framing in (b"Content-Length: 10", b"Content-Length: 1000000", b"Transfer-Encoding: chunked"):
            for _ in range(4):
                secure = self.shake_hands()
                secure.sendall(b"POST /v2/Bad/blobs/uploads/ HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n")
                self.assertIn(b"400 Bad Request", secure.recv(65536))
        self.assert_status(client.get("/v2/"), 200)

    def test_whoever_there_is_no_room_for_is_hung_up_on(self) -> None:
        client = self.serve(max_connections=1)
        secure = self.shake_hands()
        path = client.path(f"blobs/uploads/?digest={digest_of(b'x')}").encode()
        secure.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: a\r\n")
        secure.sendall(b"Content-Length: 1\r\nExpect: 100-continue\r\n\r\n")
        self.assertIn(b"100 Continue", secure.recv(65536))
        self.assertEqual(self.connect()._receive(), b"", "plain text where TLS is spoken")
        secure.sendall(b"x")
        self.assertIn(b"201 Created", secure.recv(65536))

    def test_nothing_is_renegotiated(self) -> None:
        context = registry.load_certificate(str(self.certificate), str(self.key))
        self.assertTrue(context.options & ssl.OP_NO_RENEGOTIATION)


class HandshakesThatDoNotEnd(TLSTestCase):
    """Clients that connect and then leave it at that."""

    def begin(self) -> list[RawConnection]:
        """Connections in every state of a handshake that will not end."""
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"r" * 32
        beginnings = [b"", b"\x16", hello[:5], hello] * 10
        return [self.connect().send(beginning) for beginning in beginnings]

    def test_they_do_not_stop_others(self) -> None:
        client = self.serve()
        self.begin()
        for _ in range(10):
            self.assertLess(elapsed(lambda: self.assert_status(client.get("/v2/"), 200)), 2)

    def test_they_are_hung_up_on(self) -> None:
        self.patch(HEADER_TIMEOUT=0.3, IDLE_TIMEOUT=0.3)
        before = threading.active_count()
        client = self.serve()
        serving = threading.active_count()
        for connection in self.begin():
            self.assertLess(elapsed(connection.drain), TIMEOUT)
        self.assert_status(client.get("/v2/"), 200)
        self.wait_for_threads(serving + registry.IDLE_THREADS)
        self.registry.close()
        self.wait_for_threads(before)

    def test_those_who_vanish_leave_nothing(self) -> None:
        client = self.serve()
        serving = threading.active_count()
        for connection in self.begin():
            connection.reset()
        self.wait_for_threads(serving + registry.IDLE_THREADS)
        self.assert_status(client.get("/v2/"), 200)

    def wait_for_threads(self, threads: int) -> None:
        """Until there are no more than so many."""
        wait_until(lambda: threading.active_count() <= threads, "for threads to end")

    def test_they_make_room_when_there_are_too_many(self) -> None:
        client = self.serve(max_connections=8)
        self.begin()
        self.assert_status(client.get("/v2/"), 200)


class CertificatesAreRenewed(TLSTestCase):
    def test_a_renewed_certificate_is_shown_to_new_clients(self) -> None:
        client = self.serve()
        self.assertEqual(self.common_name(), "server")
        with contextlib.closing(
            http.client.HTTPSConnection(client.host, timeout=TIMEOUT, context=client.context)
        ) as kept:
            for certificate in (None, self.authority.issue("renewed")):
                if certificate:
                    self.install(certificate)
                    self.assertEqual(self.common_name(), "renewed")
                kept.request("GET", "/v2/")
                with kept.getresponse() as reply:
                    self.assertEqual((reply.status, reply.read()), (200, b"{}\n"))

    def test_a_broken_renewal_keeps_the_last_good_certificate(self) -> None:
        self.serve()
        with contextlib.redirect_stderr(open(os.devnull, "w", encoding="utf-8")) as errors:
            self.addCleanup(errors.close)
            self.certificate.write_bytes(b"broken")
            self.assertEqual(self.common_name(), "server")
            self.key.unlink()
            self.assertEqual(self.common_name(), "server")
            self.install(self.authority.issue("mended"))
            self.assertEqual(self.common_name(), "mended")


if __name__ == "__main__":
    unittest.main()
