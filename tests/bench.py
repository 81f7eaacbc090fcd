#!/usr/bin/env python3
"""Measure this registry against the others that are installed, all on this machine in one run.

    python tests/bench.py [--quick]

Each server starts on an empty data directory, is loaded with the same content, and then does the same work
in turn: every round of a row goes through all the servers before the next round begins, and the medians of
the rounds are printed as Markdown tables. A server that is not installed is left out and named. Nothing
here passes or fails; a row short of its target says by how much.

Small requests come from wrk, whole downloads from curl, pushes from forked processes that write prepared
bytes to raw sockets. HEAD requests come from such a process as well, because wrk waits for their bodies.
`.ci/peers` installs the servers and wrk. Linux only; all traffic stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.daemon import free_port
from tests.support import OCI_CONFIG, OCI_MANIFEST, ROOT, descriptor, digest_of, image_manifest
from tests.tools import PATH, program

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CHUNK = 32 * KIB  # what docker's uploads are chunked into
ACCEPT = "Accept: application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
TIMEOUT = 120.0  # seconds for one reply
STARTUP = 30.0  # seconds for a server to answer

HASHING, WRITING = "SHA-256 of {big} in memory", "writing {big} with fsync"
IMAGES, TAGS, BIG, PUSHED = "bench/images", "bench/tags", "bench/big", "bench/pushed"


class BenchError(Exception):
    """A server or a load program that did not do what was asked of it."""


def say(text: str) -> None:
    """Progress, beside the tables on standard output."""
    print(text, file=sys.stderr, flush=True)


def output_of(*command: str) -> str:
    """What a program prints, on either stream."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


# === Content ===


class Image(NamedTuple):
    """What one push brings."""

    blobs: tuple[bytes, ...]  # the config, then the layers
    manifest: bytes


def make_image(layers: int, size: int, **more: Any) -> Image:
    """A small image like no other."""
    config = json.dumps({"architecture": "amd64", "os": "linux", "author": os.urandom(16).hex()}).encode()
    blobs = [os.urandom(16) * (size // 16) for _ in range(layers)]
    manifest = image_manifest(descriptor(config, OCI_CONFIG), map(descriptor, blobs), **more)
    return Image((config, *blobs), json.dumps(manifest).encode())


class BigBlob:
    """Many megabytes, plain and in docker's chunks; each process that sends them makes them its own first."""

    def __init__(self, size: int) -> None:
        self.plain = bytearray(os.urandom(size))
        view = memoryview(self.plain)
        pieces = (view[start : start + CHUNK] for start in range(0, size, CHUNK))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), bytes(piece)) for piece in pieces)
        self.chunked = bytearray(chunks + b"0\r\n\r\n")
        self._first = self.chunked.index(b"\n") + 1

    def renew(self) -> str:
        """Become a blob that no server has seen, and return its digest."""
        mark = os.urandom(16)
        self.plain[:16] = self.chunked[self._first : self._first + 16] = mark
        return digest_of(self.plain)


# === Clients ===


class Reply(NamedTuple):
    status: int
    head: str
    body: bytes

    def header(self, name: str) -> str:
        """A header's value, or nothing."""
        match = re.search(rf"^{name}: *(.*?)\r?$", self.head, re.IGNORECASE | re.MULTILINE)
        return match[1] if match else ""


class Client:
    """A keep-alive connection to a server, with as little of its own as will do."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._socket: socket.socket | None = None
        self._pending = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._pending = None, b""

    def connect(self) -> socket.socket:
        """The connection, made at need."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def ask(
        self, method: str, path: str, body: bytes | bytearray | memoryview = b"", *, headers: str = ""
    ) -> Reply:
        """One request with its reply. Headers are whole lines, and tell of a chunked body."""
        if "chunked" not in headers and method in ("PUT", "POST", "PATCH"):
            headers += f"Content-Length: {len(body)}\r\n"
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n{headers}\r\n".encode()
        connection = self.connect()
        if len(body) > MIB:
            connection.sendall(head)
            connection.sendall(body)
        else:
            connection.sendall(head + body)
        return self._reply(method)

    def _reply(self, method: str) -> Reply:
        while b"\r\n\r\n" not in self._pending:
            self._receive()
        head, _, self._pending = self._pending.partition(b"\r\n\r\n")
        reply = Reply(int(head[9:12]), head.decode("latin-1"), b"")
        if reply.status == 100:
            return self._reply(method)
        if method != "HEAD" and reply.status not in (204, 304):
            reply = reply._replace(body=self._body(reply))
        if "close" in reply.header("Connection").lower():
            self.close()
        return reply

    def _body(self, reply: Reply) -> bytes:
        if "chunked" not in reply.header("Transfer-Encoding"):
            return self._take(int(reply.header("Content-Length") or 0))
        body = b""
        while True:
            while b"\r\n" not in self._pending:
                self._receive()
            line, _, self._pending = self._pending.partition(b"\r\n")
            piece = self._take(int(line, 16) + 2)[:-2]
            if not piece:
                return body
            body += piece

    def _take(self, count: int) -> bytes:
        while len(self._pending) < count:
            self._receive()
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken

    def _receive(self) -> None:
        more = self.connect().recv(256 * KIB)
        if not more:
            raise BenchError("the server hung up")
        self._pending += more

    def require(self, *arguments: Any, expect: int, **options: Any) -> Reply:
        """Ask, and insist on a status."""
        reply = self.ask(*arguments, **options)
        if reply.status != expect:
            raise BenchError(f"{arguments[:2]} → {reply.status}, not {expect}: {reply.body[:300]!r}")
        return reply

    # --- What a pusher does

    def start_upload(self, repository: str) -> str:
        """Open an upload session; returns its path with its query, ready for more."""
        location = self.require("POST", f"/v2/{repository}/blobs/uploads/", expect=202).header("Location")
        return re.sub(r"^https?://[^/]*", "", location)

    def finish_upload(self, location: str, digest: str, body: bytes | bytearray | memoryview = b"") -> None:
        """Give a session its last bytes and its digest."""
        mark = "&" if "?" in location else "?"
        headers = "Content-Type: application/octet-stream\r\n"
        self.require("PUT", f"{location}{mark}digest={digest}", body, headers=headers, expect=201)

    def push_blob(self, repository: str, body: bytes | bytearray | memoryview, digest: str) -> None:
        """POST and PUT, as containerd does."""
        self.finish_upload(self.start_upload(repository), digest, body)

    def stream_blob(self, repository: str, chunked: bytes | bytearray, digest: str) -> None:
        """POST, PATCH and PUT, as docker does; the body has its chunks' sizes in it."""
        headers = "Transfer-Encoding: chunked\r\n"
        patched = self.require(
            "PATCH", self.start_upload(repository), chunked, headers=headers, expect=202
        ).header("Location")
        self.finish_upload(re.sub(r"^https?://[^/]*", "", patched), digest)

    def push_manifest(self, repository: str, reference: str, manifest: bytes) -> None:
        path = f"/v2/{repository}/manifests/{reference}"
        self.require("PUT", path, manifest, headers=f"Content-Type: {OCI_MANIFEST}\r\n", expect=201)

    def push_image(self, repository: str, tag: str, image: Image) -> None:
        """All of an image as docker pushes it, looking for each blob first."""
        for blob in image.blobs:
            digest = digest_of(blob)
            if self.ask("HEAD", f"/v2/{repository}/blobs/{digest}").status != 200:
                self.stream_blob(repository, b"%x\r\n%b\r\n0\r\n\r\n" % (len(blob), blob), digest)
        self.push_manifest(repository, tag, image.manifest)


def together(count: int, prepare: Callable[[], Callable[[], float]]) -> tuple[float, float]:
    """Fork processes that all prepare and then begin at once: the sum of their results, and the seconds."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count + 1), context.SimpleQueue()

    def run() -> None:
        try:
            work = prepare()
            barrier.wait(TIMEOUT)
            results.put(work())
        except Exception as error:
            barrier.abort()
            results.put(repr(error))

    processes = [context.Process(target=run, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    with contextlib.suppress(Exception):  # a broken barrier: the reason is among the results
        barrier.wait(TIMEOUT)
    started = time.perf_counter()
    collected = [results.get() for _ in processes]
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    for result in collected:
        if isinstance(result, str):
            raise BenchError(f"a client failed: {result}")
    return sum(collected), seconds


# === Servers ===


@dataclass
class Server:
    """A program under measurement.

    commands gets a directory, a port and a port for TLS, and gives the program to run, and if need be another
    one for TLS. groups says which rows the server has a part in.
    """

    title: str
    version: str
    commands: Callable[[Path, int, int], list[list[str]]]
    groups: frozenset[str]
    environment: dict[str, str] = field(default_factory=dict)
    has_tls: bool = False
    ours: bool = False
    durable: bool = False  # found out by restarting it
    root: Path = Path()
    port: int = 0
    tls_port: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def copy(self, root: Path) -> Server:
        """The same program on another directory."""
        return Server(self.title, self.version, self.commands, self.groups, self.environment, root=root)

    def start(self) -> float:
        """Run it until it answers; returns the seconds that took."""
        (self.root / "data").mkdir(parents=True, exist_ok=True)
        self.port, self.tls_port = free_port(), free_port()
        commands = self.commands(self.root, self.port, self.tls_port)[: 1 + self.has_tls]
        environment = {**os.environ, "PATH": PATH, **self.environment}
        started = time.perf_counter()
        with open(self.root / "log", "ab") as log:
            for command in commands:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,
                    )
                )
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        deadline = time.monotonic() + STARTUP
        while time.monotonic() < deadline:
            try:
                with Client(self.port) as client:
                    client.ask("GET", "/v2/")
                return
            except (OSError, BenchError):
                time.sleep(0.001)
            if self.processes[0].poll() is not None:
                break
        self.stop()
        log = (self.root / "log").read_text(errors="replace")[-2000:]
        raise BenchError(f"{self.title} does not answer:\n{log}")

    def stop(self) -> None:
        """End it, in good order where that takes less than 20 seconds."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()

    def resident(self) -> float:
        """Its resident memory in MiB."""
        status = Path(f"/proc/{self.processes[0].pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s*(\d+) kB", status)[0]) / 1024


def version_of(*command: str, pattern: str = r"v?(\d+\.\d+\.\d+\S*)") -> str:
    match = re.search(pattern, output_of(*command))
    return match[1] if match else "?"


EVERYTHING = frozenset(("small", "download", "upload", "images", "process", "growth"))


def our_servers(source: Path, title: str = "registry.py") -> Iterator[Server]:
    """This registry, from a copy of it, with one process and with two; another version only with one."""
    usage = output_of(sys.executable, str(source / "registry.py"), "--help")
    version = version_of(sys.executable, str(source / "registry.py"), "--version", pattern=r"(\d\S*)")
    has_tls = "--tls-cert" in usage

    def commands(more: Sequence[str]) -> Callable[[Path, int, int], list[list[str]]]:
        def give(root: Path, port: int, tls_port: int) -> list[list[str]]:
            base = [sys.executable, str(source / "registry.py"), "--data", str(root / "data"), *more]
            tls = ["--tls-cert", str(source / "cert.pem"), "--tls-key", str(source / "key.pem")]
            plain = [*base, "--port", str(port)]
            return [plain, [*base, "--port", str(tls_port), *tls]] if has_tls and not more else [plain]

        return give

    groups = EVERYTHING | {"embed"} if title == "registry.py" else EVERYTHING
    yield Server(title, version, commands(()), groups, has_tls=has_tls, ours=True)
    if "--workers" in usage and title == "registry.py":
        groups = frozenset(("small", "upload", "images"))
        yield Server("registry.py, 2 workers", version, commands(("--workers", "2")), groups, ours=True)


def distribution_server(name: str, title: str) -> Iterator[Server]:
    path = program(name)
    if not path:
        return

    def commands(root: Path, port: int, _tls_port: int) -> list[list[str]]:
        configuration = {
            "version": 0.1,
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {
                "cache": {"blobdescriptor": "inmemory"},
                "filesystem": {"rootdirectory": str(root / "data")},
                "delete": {"enabled": True},
            },
            "http": {"addr": f"127.0.0.1:{port}", "secret": "bench"},
        }
        (root / "config.yml").write_text(json.dumps(configuration))  # YAML is a superset of JSON
        return [[path, "serve", str(root / "config.yml")]]

    environment = {"OTEL_TRACES_EXPORTER": "none"}
    yield Server(title, version_of(path, "--version"), commands, EVERYTHING, environment)


def crane_server(title: str, *, disk: bool) -> Iterator[Server]:
    path = program("crane")
    if not path:
        return

    def commands(root: Path, port: int, _tls_port: int) -> list[list[str]]:
        more = ["--disk", str(root / "data")] if disk else []
        return [[path, "registry", "serve", "--address", f"127.0.0.1:{port}", *more]]

    yield Server(title, version_of(path, "version"), commands, EVERYTHING - {"growth"})


def olareg_server() -> Iterator[Server]:
    path = program("olareg")
    if not path:
        return

    def commands(root: Path, port: int, _tls_port: int) -> list[list[str]]:
        data = str(root / "data")
        return [[path, "serve", "--addr", "127.0.0.1", "--port", str(port), "--dir", data]]

    yield Server("olareg", version_of(path, "version"), commands, EVERYTHING)


def zot_server() -> Iterator[Server]:
    path = program("zot") or program("zot-minimal")
    if not path:
        return

    def commands(root: Path, port: int, _tls_port: int) -> list[list[str]]:
        configuration = {
            "storage": {"rootDirectory": str(root / "data")},
            "http": {"address": "127.0.0.1", "port": str(port)},
            "log": {"level": "info"},
        }
        (root / "config.json").write_text(json.dumps(configuration))
        return [[path, "serve", str(root / "config.json")]]

    version = version_of(path, "--version", pattern=r'"commit":"(v[^"]+)"')  # "?" if built from bare sources
    yield Server("zot", version, commands, EVERYTHING)


NGINX = """
daemon off; pid {root}/pid; error_log {root}/log; worker_processes auto; {user}
events {{ worker_connections 1024; }}
http {{
    access_log off; sendfile on; tcp_nopush on; default_type application/octet-stream; root {root}/data;
    client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
    uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
    server {{
        listen 127.0.0.1:{port}; listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {source}/cert.pem; ssl_certificate_key {source}/key.pem;
        ssl_protocols TLSv1.2 TLSv1.3;
        location = /v2/ {{ return 200 "{{}}"; }}
    }}
}}
"""


def nginx_server(source: Path) -> Iterator[Server]:
    """Blobs as static files: the limit for downloads."""
    path = program("nginx")
    if not path or not (source / "cert.pem").exists():
        return

    def commands(root: Path, port: int, tls_port: int) -> list[list[str]]:
        user = "user root;" if os.geteuid() == 0 else ""
        text = NGINX.format(root=root, port=port, tls_port=tls_port, source=source, user=user)
        (root / "nginx.conf").write_text(text)
        return [[path, "-p", str(root), "-c", str(root / "nginx.conf")]]

    version = version_of(path, "-v")
    yield Server("nginx, static files", version, commands, frozenset(("download",)), has_tls=True)


def installed_servers(source: Path) -> tuple[list[Server], list[str]]:
    """The servers there are, and the names of those that are left out."""
    candidates: dict[str, Iterable[Server]] = {
        "registry.py": our_servers(source),
        "distribution 2 (docker-registry)": distribution_server("docker-registry", "distribution 2"),
        "distribution 3": distribution_server("distribution", "distribution 3"),
        "olareg": olareg_server(),
        "zot": zot_server(),
        "go-containerregistry (crane)": (
            *crane_server("crane, on disk", disk=True),
            *crane_server("crane, in memory", disk=False),
        ),
        "nginx": nginx_server(source),
    }
    found = {name: list(servers) for name, servers in candidates.items()}
    return [server for servers in found.values() for server in servers], [
        n for n, s in found.items() if not s
    ]


# === The bench ===


class Bench:
    """The content, and the work that rows consist of."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.directory = directory
        self.rounds: int = options.rounds or (2 if options.quick else 5)
        self.seconds: int = options.seconds or (1 if options.quick else 2)  # of load by wrk and pushers
        self.big = BigBlob((64 if options.quick else 256) * MIB)
        self.part = len(self.big.plain) // 4  # what each of eight uploads at once sends
        self.growth = GIB if options.quick else 10 * GIB
        self.limits: dict[str, list[float]] = {HASHING: [], WRITING: []}
        self.image = make_image(5, 2 * KIB)
        self.subject = digest_of(self.image.manifest)
        more = {"subject": descriptor(self.image.manifest, OCI_MANIFEST), "artifactType": "application/vnd.x"}
        self.referrers = [make_image(1, 2 * KIB, **more) for _ in range(10)]
        self.big_digest = self.big.renew()
        self.paths = {
            "tag": f"/v2/{IMAGES}/manifests/latest",
            "digest": f"/v2/{IMAGES}/manifests/{self.subject}",
            "blob": f"/v2/{IMAGES}/blobs/{digest_of(self.image.blobs[1])}",
            "tags": f"/v2/{TAGS}/tags/list",
            "referrers": f"/v2/{IMAGES}/referrers/{self.subject}",
            "big": f"/v2/{BIG}/blobs/{self.big_digest}",
        }

    def load(self, server: Server) -> None:
        """Give a server the content that is read."""
        if server.groups == {"download"}:
            target = server.root / "data" / self.paths["big"][1:]
            target.parent.mkdir(parents=True)
            target.write_bytes(self.big.plain)
            return
        with Client(server.port) as client:
            client.push_image(IMAGES, "latest", self.image)
            for referrer in self.referrers:
                client.push_image(IMAGES, digest_of(referrer.manifest), referrer)
            client.push_image(TAGS, "tag-000", self.image)
            for number in range(1, 100):
                client.push_manifest(TAGS, f"tag-{number:03}", self.image.manifest)
            client.push_blob(BIG, self.big.plain, self.big_digest)

    def is_loaded(self, server: Server) -> bool:
        """Whether a server has all of that."""
        with Client(server.port) as client:
            manifest = client.ask("GET", self.paths["tag"], headers=f"{ACCEPT}\r\n")
            blob = client.ask("HEAD", self.paths["big"])
            small = client.ask("GET", self.paths["blob"])
            tags = client.ask("GET", self.paths["tags"])
        return (
            manifest.body == self.image.manifest
            and small.body == self.image.blobs[1]
            and (blob.status, blob.header("Content-Length")) == (200, str(len(self.big.plain)))
            and tags.status == 200
            and len(json.loads(tags.body)["tags"]) == 100
        )

    def answers(self, server: Server, path: str) -> bool:
        """Whether a server knows a path: not all have referrers."""
        with Client(server.port) as client:
            return client.ask("GET", path, headers=f"{ACCEPT}\r\n").status == 200

    # --- Small requests

    def wrk(self, server: Server, path: str, *headers: str) -> float | None:
        """GETs per second over eight connections."""
        if not self.answers(server, path):
            return None
        more = [part for header in (ACCEPT, *headers) for part in ("-H", header)]
        url = f"http://127.0.0.1:{server.port}{path}"
        text = output_of(program("wrk") or "wrk", "-t1", "-c8", f"-d{self.seconds}s", *more, url)
        rate = re.search(r"Requests/sec:\s*([\d.]+)", text)
        if not rate or "Non-2xx" in text:
            raise BenchError(f"{server.title} {path}: {text}")
        return float(rate[1])

    def head(self, server: Server, path: str) -> float:
        """HEADs per second over eight connections."""
        request = f"HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{ACCEPT}\r\n\r\n".encode()
        return repeat_request(server.port, request, connections=8, seconds=self.seconds)

    # --- Large blobs

    def download(self, server: Server, streams: int, *, tls: bool = False) -> float | None:
        """MB/s of the large blob over so many connections at once."""
        if tls and not server.has_tls:
            return None
        url = f"https://127.0.0.1:{server.tls_port}" if tls else f"http://127.0.0.1:{server.port}"
        command = ["curl", "-sfk", "-o", "/dev/null", "-w", "%{time_total}", url + self.paths["big"]]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(streams)]
        seconds = [float(process.communicate()[0]) for process in processes]
        if any(process.returncode for process in processes):
            raise BenchError(f"{server.title}: curl failed for {url}")
        return streams * len(self.big.plain) / max(seconds) / 1e6

    def upload(self, server: Server, *, chunked: bool = False, streams: int = 1) -> float:
        """MB/s of new blobs, several at once."""
        big, size = self.big, len(self.big.plain) if streams == 1 else self.part

        def prepare() -> Callable[[], float]:
            digest = big.renew()
            body = memoryview(big.plain)[:size]
            digest = digest if streams == 1 else digest_of(body)

            def push() -> float:
                with Client(server.port) as client:
                    if chunked:
                        client.stream_blob(PUSHED, big.chunked, digest)
                    else:
                        client.push_blob(PUSHED, body, digest)
                    forget.send_bytes(digest.encode())
                return size

            return push

        if server.ours and streams == 1:
            self.sample_limits()
        digests, forget = multiprocessing.Pipe(duplex=False)
        os.sync()  # what the server before left behind is not this one's to wait for
        total, seconds = together(streams, prepare)
        with Client(server.port) as client:  # so that memory and disk do not fill up
            for _ in range(streams):
                client.ask("DELETE", f"/v2/{PUSHED}/blobs/{digests.recv_bytes().decode()}")
        return total / seconds / 1e6

    def images(self, server: Server, clients: int) -> float:
        """Whole images pushed per second."""
        seconds, count = self.seconds, 1500 * self.seconds // clients

        def prepare() -> Callable[[], float]:
            images = [make_image(2, 10 * KIB) for _ in range(count)]
            client = Client(server.port)
            client.ask("GET", "/v2/")

            def push() -> float:
                deadline = time.perf_counter() + seconds
                for pushed, image in enumerate(images):
                    if time.perf_counter() > deadline:
                        return pushed
                    client.push_image(f"bench/p{os.getpid()}", f"v{pushed}", image)
                return count

            return push

        os.sync()
        total, seconds_taken = together(clients, prepare)
        return total / seconds_taken

    # --- Processes

    @contextlib.contextmanager
    def another(self, server: Server) -> Iterator[Server]:
        """The same program once more, on an empty directory."""
        root = Path(tempfile.mkdtemp(dir=self.directory))
        copy = server.copy(root)
        try:
            yield copy
        finally:
            copy.stop()
            shutil.rmtree(root)

    def start(self, server: Server) -> float:
        """Milliseconds from the start of the process to its first answer."""
        with self.another(server) as copy:
            return copy.start() * 1000

    def embed(self, _server: Server) -> float:
        """Milliseconds for `with Registry()`, the first of its process."""
        script = (
            "import time; from registry import Registry; t = time.perf_counter()\n"
            "with Registry(): print((time.perf_counter() - t) * 1000)"
        )
        path = self.directory / "source"
        return float(subprocess.check_output([sys.executable, "-c", script], cwd=path, timeout=60))

    def idle(self, server: Server) -> float:
        """MiB of a server that has answered once."""
        with self.another(server) as copy:
            copy.start()
            time.sleep(0.5)
            return copy.resident()

    def connected(self, server: Server) -> float:
        """MiB of a server with 1,000 idle connections that had an answer each."""
        with self.another(server) as copy, contextlib.ExitStack() as clients:
            copy.start()
            for _ in range(1000):
                clients.enter_context(Client(copy.port)).require("GET", "/v2/", expect=200)
            return copy.resident()

    def grown(self, server: Server) -> float:
        """MiB more after many uploads."""

        def prepare() -> Callable[[], float]:
            return push

        def push() -> float:
            with Client(copy.port) as client:
                for _ in range(self.growth // len(self.big.plain)):
                    digest = self.big.renew()
                    client.push_blob(PUSHED, self.big.plain, digest)
            return 0

        with self.another(server) as copy:
            copy.start()
            with Client(copy.port) as client:
                client.push_blob(PUSHED, self.image.blobs[1], digest_of(self.image.blobs[1]))
            before = copy.resident()
            together(1, prepare)
            return copy.resident() - before

    # --- The machine

    def sample_limits(self) -> None:
        """Note what the machine alone can do now, close to the uploads that are held against it."""
        self.limits[HASHING].append(self.hash_limit())
        self.limits[WRITING].append(self.write_limit())

    def machine(self) -> dict[str, float]:
        """What hashing and writing alone would allow, in MB/s."""
        if not self.limits[HASHING]:
            self.sample_limits()
        return {title: statistics.median(samples) for title, samples in self.limits.items()}

    def hash_limit(self) -> float:
        """MB/s of SHA-256."""
        started = time.perf_counter()
        hashlib.sha256(self.big.plain)
        return len(self.big.plain) / (time.perf_counter() - started) / 1e6

    def write_limit(self) -> float:
        """MB/s of writing a file, with fsync."""
        path, view = self.directory / "raw", memoryview(self.big.plain)
        os.sync()
        started = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(view), MIB):
                file.write(view[start : start + MIB])
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
        return len(view) / seconds / 1e6


def repeat_request(port: int, request: bytes, connections: int, seconds: float) -> float:
    """Requests with bodiless replies per second, over connections kept alive, one at a time on each."""
    pending: dict[int, bytes] = {}
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) for _ in range(connections)]
    with contextlib.ExitStack() as stack, select.epoll() as poll:
        for connection in sockets:
            stack.enter_context(connection)
            poll.register(connection.fileno(), select.EPOLLIN)
            pending[connection.fileno()] = b""
            os.write(connection.fileno(), request)
        started = now = time.perf_counter()
        replies = 0
        while now < started + seconds:
            for number, _events in poll.poll(TIMEOUT):
                data = pending[number] + os.read(number, 65536)
                if data.endswith(b"\r\n\r\n"):
                    if not data.startswith(b"HTTP/1.1 200"):
                        raise BenchError(f"{request[:80]!r} → {data[:80]!r}")
                    replies += 1
                    os.write(number, request)
                    data = b""
                elif not data:
                    raise BenchError("the server hung up")
                pending[number] = data
            now = time.perf_counter()
    return replies / (now - started)


# === Rows and targets ===


class Row(NamedTuple):
    """One kind of work. Fewer is better where the unit is a time or a size."""

    key: str
    title: str
    unit: str
    group: str
    work: Callable[[Bench, Server], float | None]
    once: bool = False

    @property
    def fewer(self) -> bool:
        return self.unit in ("ms", "MiB")


ROWS = (
    Row("tag", "GET manifest by tag", "/s", "small", lambda b, s: b.wrk(s, b.paths["tag"])),
    Row("digest", "GET manifest by digest", "/s", "small", lambda b, s: b.wrk(s, b.paths["digest"])),
    Row("head", "HEAD manifest by tag", "/s", "small", lambda b, s: b.head(s, b.paths["tag"])),
    Row("head-blob", "HEAD blob", "/s", "small", lambda b, s: b.head(s, b.paths["blob"])),
    Row("blob", "GET blob of 2 KiB", "/s", "small", lambda b, s: b.wrk(s, b.paths["blob"])),
    Row("tags", "tags/list of 100", "/s", "small", lambda b, s: b.wrk(s, b.paths["tags"])),
    Row("referrers", "referrers of 10", "/s", "small", lambda b, s: b.wrk(s, b.paths["referrers"])),
    Row(
        "connect",
        "GET manifest, a new connection each",
        "/s",
        "small",
        lambda b, s: b.wrk(s, b.paths["tag"], "Connection: close"),
    ),
    Row("get", "GET {big}, one stream", "MB/s", "download", lambda b, s: b.download(s, 1)),
    Row("get-8", "GET {big}, eight streams", "MB/s", "download", lambda b, s: b.download(s, 8)),
    Row("tls", "GET {big} over TLS, one stream", "MB/s", "download", lambda b, s: b.download(s, 1, tls=True)),
    Row("tls-8", "GET {big} over TLS, eight", "MB/s", "download", lambda b, s: b.download(s, 8, tls=True)),
    Row("put", "upload {big}: POST, PUT", "MB/s", "upload", lambda b, s: b.upload(s)),
    Row("patch", "upload {big}: POST, PATCH, PUT", "MB/s", "upload", lambda b, s: b.upload(s, chunked=True)),
    Row("put-8", "eight uploads of {part} at once", "MB/s", "upload", lambda b, s: b.upload(s, streams=8)),
    Row("images", "small images pushed, 1 client", "/s", "images", lambda b, s: b.images(s, 1)),
    Row("images-16", "small images pushed, 16 clients", "/s", "images", lambda b, s: b.images(s, 16)),
    Row("start", "process start to first answer", "ms", "process", lambda b, s: b.start(s)),
    Row("embed", "in-process start", "ms", "embed", lambda b, s: b.embed(s)),
    Row("idle", "memory, idle", "MiB", "process", lambda b, s: b.idle(s), once=True),
    Row(
        "idle-1000",
        "memory, 1,000 idle connections",
        "MiB",
        "process",
        lambda b, s: b.connected(s),
        once=True,
    ),
    Row("growth", "memory, more after {growth} pushed", "MiB", "growth", lambda b, s: b.grown(s), once=True),
)

D2, D3, DISK, CEILING, NGINX_TITLE, DURABLE, RAW, FIXED = (
    "distribution 2",
    "distribution 3",
    "crane, on disk",
    "crane, in memory",
    "nginx, static files",
    "every durable peer",
    "the slower of hashing and writing",
    "",
)


class Target(NamedTuple):
    """What some rows are to reach: so many times what a peer does, or a figure of its own."""

    rows: tuple[str, ...]
    wanted: tuple[tuple[str, float], ...]


TARGETS = (
    Target(("tag", "digest"), ((D2, 10), (D3, 3), (DURABLE, 1), (CEILING, 0.5))),
    Target(("head", "head-blob", "blob"), ((D2, 10), (D3, 10), (DURABLE, 1))),
    Target(("tags", "referrers"), ((D2, 8), (D3, 1.3), (DURABLE, 1))),
    Target(("connect",), ((D2, 2),)),
    Target(("get", "get-8"), ((NGINX_TITLE, 0.9),)),
    Target(("tls", "tls-8"), ((NGINX_TITLE, 0.8),)),
    Target(("put", "patch"), ((D2, 2), (D3, 1.3), (DISK, 1), (RAW, 0.7))),
    Target(("put-8",), ((D2, 2), (DURABLE, 1))),
    Target(("images", "images-16"), ((D2, 3), (DURABLE, 1))),
    Target(("start",), ((D2, 1), (D3, 1))),
    Target(("embed",), ((FIXED, 15),)),
    Target(("idle",), ((D2, 1), (D3, 1))),
    Target(("idle-1000",), ((FIXED, 100),)),
    Target(("growth",), ((FIXED, 16),)),
)

Figures = dict[str, dict[str, float]]  # by row and by server


def measure(bench: Bench, servers: list[Server], rows: Sequence[Row]) -> Figures:
    """The medians of each row. Servers that cannot do a row's work have none."""
    figures: Figures = {}
    for row in rows:
        taken: dict[str, list[float]] = {}
        for number in range(1 if row.once else bench.rounds):
            for server in servers if number % 2 == 0 else reversed(servers):
                value = row.work(bench, server) if row.group in server.groups else None
                if value is not None:
                    taken.setdefault(server.title, []).append(value)
        figures[row.key] = {title: statistics.median(values) for title, values in taken.items()}
        shown = ", ".join(f"{title} {show(value)}" for title, value in figures[row.key].items())
        say(f"{row.title} [{row.unit}]: {shown}")
    return figures


def check_durability(bench: Bench, servers: list[Server]) -> None:
    """Restart each server, and see whether its content is there."""
    for server in servers:
        if "images" in server.groups:
            server.stop()
            server.start()
            server.durable = bench.is_loaded(server)


# === Reports ===


def show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rules = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rules, *lines))


def best(row: Row, values: Iterable[float]) -> float | None:
    return (min if row.fewer else max)(values, default=None)


def figure_table(rows: Sequence[Row], figures: Figures, servers: list[Server], sizes: dict[str, str]) -> str:
    """All the medians, and the ratio of the better of ours to the best durable peer."""
    durable = [server.title for server in servers if server.durable and not server.ours]
    ours = [server.title for server in servers if server.ours]
    lines = []
    for row in rows:
        values = figures[row.key]
        own = best(row, [values[title] for title in ours if title in values])
        peer = best(row, [values[title] for title in durable if title in values])
        ratio = f"{own / peer:.2f}" if own is not None and peer else "-"
        cells = [show(values.get(server.title)) for server in servers]
        lines.append([f"{row.title.format(**sizes)} [{row.unit}]", *cells, ratio])
    heads = ["work", *(server.title for server in servers), "ours ÷ best durable peer"]
    return table(heads, lines)


def target_table(
    rows: Sequence[Row], figures: Figures, servers: list[Server], raw: float, sizes: dict[str, str]
) -> str:
    """What was wanted, what was reached by each of ours, and whether that is enough."""
    known = {row.key: row for row in rows}
    ours = [server.title for server in servers if server.ours]
    lines = []
    for target in TARGETS:
        for key in target.rows:
            for against, wanted in target.wanted if key in known else ():
                row = known[key]
                peer = peer_figure(row, against, figures, servers, raw)
                reached = [compare(figures[key].get(title), peer) for title in ours]
                bound = f"{'≤' if row.fewer else '≥'} {wanted:g}" + (
                    f" x {against}" if against else f" {row.unit}"
                )
                cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in reached]
                lines.append([row.title.format(**sizes), bound, *cells, verdict(row, wanted, reached)])
    return table(["work", "wanted", *ours, "verdict"], lines)


def peer_figure(row: Row, against: str, figures: Figures, servers: list[Server], raw: float) -> float | None:
    """What a target is a multiple of."""
    if against == FIXED:
        return 1.0
    if against == RAW:
        return raw
    if against == DURABLE:
        titles = [server.title for server in servers if server.durable and not server.ours]
        return best(row, [figures[row.key][title] for title in titles if title in figures[row.key]])
    return figures[row.key].get(against)


def compare(own: float | None, peer: float | None) -> float | None:
    return own / peer if own is not None and peer else None


def verdict(row: Row, wanted: float, reached: list[float | None]) -> str:
    ratios = [ratio for ratio in reached if ratio is not None]
    if not ratios:
        return "not measured"
    if row.fewer:
        missed = min(ratios) / wanted - 1
        return "pass" if missed <= 0 else f"over by {missed:.0%}"
    short = 1 - max(ratios) / wanted
    if short > 0:
        return f"short by {short:.0%}"
    return "pass" if ratios[0] >= wanted else "pass with 2 workers"


def report_machine(directory: Path) -> str:
    """What the figures were taken on."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    mount = output_of("stat", "-f", "-c", "%T", str(directory)).strip()
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} x {names[0] if names else platform.machine()},"
        f" Linux {platform.release()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version},"
        f" data on {mount}, load average {load}"
    )


def report_servers(servers: list[Server], absent: list[str]) -> str:
    parts = []
    for server in servers:
        kept = (
            ""
            if "images" not in server.groups
            else f", after a restart {'all' if server.durable else 'not all'} there"
        )
        parts.append(f"- {server.title}: {server.version}{kept}")
    return "\n".join(parts + [f"- {name}: left out, not installed" for name in absent])


# === Command line ===


def copy_source(original: Path, source: Path) -> Path:
    """The registry that is measured: a copy, so that one run measures one version. With a certificate."""
    source.mkdir()
    for name in ("registry.py", "schema.sql"):
        shutil.copy(original / name, source)
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=bench"
    )
    if program("openssl"):
        output_of(*command.split(), "-keyout", str(source / "key.pem"), "-out", str(source / "cert.pem"))
    return source


def run(options: argparse.Namespace, directory: Path) -> None:
    """Measure and print."""
    before = report_machine(directory)
    servers, absent = installed_servers(copy_source(ROOT, directory / "source"))
    if options.beside:
        other = copy_source(Path(options.beside), directory / "beside")
        servers[1:1] = our_servers(other, "registry.py, beside")
    wanted = options.servers.split(",") if options.servers else []
    servers = [s for s in servers if not wanted or any(word in s.title for word in wanted)]
    rows = [row for row in ROWS if not options.rows or row.key in options.rows.split(",")]
    bench = Bench(options, directory)
    with contextlib.ExitStack() as stack:
        for number, server in enumerate(servers):
            server.root = directory / f"server{number}"
            server.root.mkdir()
            stack.callback(server.stop)
            server.start()
            bench.load(server)
        figures = measure(bench, servers, rows)
        check_durability(bench, servers)
        machine = bench.machine()
    sizes = {
        "big": f"{len(bench.big.plain) // MIB} MiB",
        "part": f"{bench.part // MIB} MiB",
        "growth": f"{bench.growth // GIB} GiB",
    }
    print(f"Before: {before}\n\nAfter: {report_machine(directory)}\n")
    print(f"Medians of {bench.rounds} rounds; memory measured once.\n")
    print(report_servers(servers, absent) + "\n")
    print(figure_table(rows, figures, servers, sizes) + "\n")
    print(
        table(["the machine alone", "MB/s"], [[k.format(**sizes), show(v)] for k, v in machine.items()])
        + "\n"
    )
    print(target_table(rows, figures, servers, min(machine.values()), sizes))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, smaller blobs")
    parser.add_argument("--rounds", type=int, help="how often each server does each row's work (default: 5)")
    parser.add_argument("--seconds", type=int, help="how long a load of small requests lasts (default: 2)")
    parser.add_argument("--rows", metavar="KEY,…", help="only these: " + " ".join(row.key for row in ROWS))
    parser.add_argument(
        "--servers", metavar="WORD,…", help="only servers whose names have one of these in them"
    )
    parser.add_argument("--beside", metavar="DIR", help="and another version of this registry, from DIR")
    parser.add_argument("--directory", help="where the data goes (default: the system's temporary directory)")
    options = parser.parse_args()
    missing = [name for name in ("wrk", "curl") if not program(name)]
    if missing:
        print(f"not installed: {', '.join(missing)}; .ci/peers installs them")
        return 0
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="registry-bench-", dir=options.directory) as directory:
        run(options, Path(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
