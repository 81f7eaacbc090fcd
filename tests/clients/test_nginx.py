"""nginx in front: pushes and pulls pass unharmed, and nothing gets past it to confuse the registry."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path
from typing import ClassVar

from support import ClientTest, program, stop

from registry import Registry
from tests.credentials import users_line
from tests.daemon import free_port
from tests.smuggling import CORPUS, SMUGGLED
from tests.support import Client, RawConnection, digest_of, unique, wait_until, with_digest

# The strict server is as Debian ships it; the lenient one holds back as little as nginx can.
CONFIGURATION = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/error.log;
{user}
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_max_body_size 0;
    lingering_close off;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-Host $http_host;
    proxy_set_header X-Forwarded-Proto https;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    upstream registry {{ server {registry}; keepalive 1; }}
    server {{
        listen 127.0.0.1:{strict};
        location / {{ proxy_pass http://registry; }}
    }}
    server {{
        listen 127.0.0.1:{lenient};
        ignore_invalid_headers off;
        underscores_in_headers on;
        merge_slashes off;
        location / {{
            proxy_pass http://registry;
            proxy_request_buffering off;
            proxy_buffering off;
        }}
    }}
    server {{
        listen 127.0.0.1:{guarded};
        location / {{ proxy_pass http://{behind}; }}
    }}
}}
"""


class NginxTest(ClientTest):
    programs = ("nginx",)
    hosts: ClassVar[dict[str, str]]
    guarded: ClassVar[Client]  # of a registry behind nginx that asks who is there
    seen: ClassVar[list[str]]  # its access log

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        directory = cls.temp / "nginx"
        directory.mkdir()
        ports = {"strict": free_port(), "lenient": free_port(), "guarded": free_port()}
        user = "user root;" if os.geteuid() == 0 else ""
        files = {"directory": directory, "registry": cls.registry.address, "behind": cls.start_guarded()}
        text = CONFIGURATION.format(**files, user=user, **ports)
        (directory / "nginx.conf").write_text(text, "utf-8")
        cls.guarded = Client(f"127.0.0.1:{ports.pop('guarded')}")
        cls.hosts = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
        cls.start_nginx(directory)

    @classmethod
    def start_guarded(cls) -> str:
        """A registry with users that trusts nginx, and where it is."""
        users, cls.seen = cls.temp / "users.txt", []
        users.write_text(users_line("alice", "secret"), "utf-8")
        guarded = Registry(users=str(users), trusted_proxies=["127.0.0.1"], log=cls.seen.append)
        cls.addClassCleanup(guarded.start().close)
        return guarded.netloc

    @classmethod
    def start_nginx(cls, directory: Path) -> None:
        argv = [program("nginx"), "-p", str(directory), "-c", str(directory / "nginx.conf")]
        argv += ["-e", str(directory / "error.log")]
        with open(directory / "output", "wb") as output:
            process = subprocess.Popen(argv, stdout=output, stderr=output, start_new_session=True)
        cls.addClassCleanup(stop, process)
        wait_until(lambda: cls.is_serving() or process.poll() is not None, "for nginx to answer")
        if process.poll() is not None:
            raise AssertionError((directory / "output").read_text("utf-8", "replace"))

    @classmethod
    def is_serving(cls) -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            return all(Client(host).get("/v2/").status == 200 for host in cls.hosts.values())
        return False

    def clients(self) -> dict[str, Client]:
        """A client of each server, in a repository of the test's own."""
        return {name: Client(host, f"{self.name}/{name}") for name, host in self.hosts.items()}

    def test_an_image_is_pushed_and_pulled(self) -> None:
        for name, client in self.clients().items():
            with self.subTest(name):
                image = client.push_image("v1", layers=3)
                self.assertEqual(client.get("manifests/v1").body, image.body)
                for blob in image.blobs:
                    self.assertEqual(client.get(f"blobs/{digest_of(blob)}").body, blob)
                self.assertEqual(client.get("tags/list").json["tags"], ["v1"])

    def test_a_large_blob_passes_in_every_form(self) -> None:
        for name, client in self.clients().items():
            content = os.urandom(40 << 20)
            digest = digest_of(content)
            pieces = [content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20)]
            for form, body in (("length", content), ("chunked", iter(pieces))):
                with self.subTest(name, form=form):
                    location = client.open_upload()
                    self.assertTrue(location.startswith("/v2/"), location)
                    location = client.expect(202, "PATCH", location, body).headers["Location"]
                    done = client.expect(201, "PUT", with_digest(location, digest))
                    self.assertEqual(digest_of(client.get(done.headers["Location"]).body), digest)
                    self.assertEqual(client.delete(f"blobs/{digest}").status, 202)

    def test_what_it_says_of_the_client_is_believed(self) -> None:
        self.guarded.get("/v2/", {"X-Forwarded-For": "198.51.100.1, 203.0.113.7", "X-Forwarded-Host": "evil"})
        refused = self.guarded.get("/v2/", {"X-Forwarded-Proto": "gopher"})
        realm = f'realm="https://{self.guarded.host}/token"'
        self.assertIn(realm, refused.headers["WWW-Authenticate"])
        wait_until(
            lambda: any(" 203.0.113.7 GET /v2/ 401 " in line for line in self.seen), "for it to be logged"
        )

    def test_ranges_and_conditions_pass(self) -> None:
        for name, client in self.clients().items():
            with self.subTest(name):
                digest = client.push_blob(b"0123456789")
                part = client.get(f"blobs/{digest}", {"Range": "bytes=2-5"})
                self.assertEqual((part.status, part.body), (206, b"2345"))
                same = client.get(f"blobs/{digest}", {"If-None-Match": f'"{digest}"'})
                self.assertEqual(same.status, 304)
                head = client.head(f"blobs/{digest}")
                self.assertEqual(head.headers["Content-Length"], "10")

    def test_nothing_answers_with_a_redirect(self) -> None:
        for name, client in self.clients().items():
            digest = client.push_image("v1").digest
            for path in ("/v2", "/v2/", "/v2/_catalog", "tags/list", "manifests/v1", f"referrers/{digest}"):
                with self.subTest(name, path=path):
                    self.assertEqual(client.get(path).status, 200)

    def test_an_error_is_the_registrys_own(self) -> None:
        for name, client in self.clients().items():
            with self.subTest(name):
                refused = client.put("manifests/v1", b"{}" * (3 << 20), {"Content-Type": "a/b"})
                self.assertEqual((refused.status, refused.json["errors"][0]["code"]), (413, "SIZE_INVALID"))
                absent = client.get("manifests/absent")
                self.assertEqual((absent.status, absent.json["errors"][0]["code"]), (404, "NAME_UNKNOWN"))

    def test_nothing_is_smuggled_to_the_registry(self) -> None:
        """After each entry, others on the one upstream connection still get their own answers."""
        for name, client in self.clients().items():
            owned = [unique("mine") for _ in range(3)]
            paths = {f"blobs/{client.push_blob(content)}": content for content in owned}
            upload = client.path(f"blobs/uploads/?digest={digest_of(b'hello')}").encode()
            for entry in CORPUS:
                with self.subTest(name, entry=entry.name):
                    self.send_and_hang_up(client.host, entry.data.replace(b"{upload}", upload) + SMUGGLED)
                    for path, content in paths.items():
                        reply = client.get(path)
                        self.assertEqual((reply.status, reply.body), (200, content))

    def send_and_hang_up(self, host: str, data: bytes) -> None:
        """Send what nginx may refuse, forward or wait for more of, and take what comes within a moment."""
        with RawConnection(host) as connection:
            connection.send(data)
            connection._socket.settimeout(0.2)
            with contextlib.suppress(socket.timeout):
                connection.drain()
