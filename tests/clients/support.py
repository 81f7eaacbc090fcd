"""What the tests against real programs share.

`ClientTest` is the base of every one of them: it requires the programs, starts a registry the way a user
does, and gives each test a directory, a repository of its own, and `ok` and `fails` to run programs.
`Engine` starts a client's own daemon (dockerd, buildkitd, containerd) privately; `image_layout` and
`build_context` make images out of nothing but a static busybox, because nothing is ever downloaded.

A missing program skips its tests, or fails them when REGISTRY_REQUIRE_CLIENTS=1.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar

from tests.daemon import Daemon
from tests.support import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Response,
    descriptor,
    digest_of,
    image_index,
    image_manifest,
    wait_until,
)
from tests.tools import PATH, program

TOP = Path(__file__).resolve().parents[2]
TIMEOUT = 180  # seconds one program may take
STARTUP = 60  # seconds a daemon may take until it answers

REF_NAME = "org.opencontainers.image.ref.name"
MANIFEST_TYPES = ", ".join([OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST])


# === Programs =========================================================================================


def require(*programs: str, root: bool = False) -> None:
    """Skip, or fail where every client is required, unless the programs (and root's rights) are there."""
    missing = [name for name in programs if program(name) is None]
    if root and os.geteuid() != 0:
        missing.append("root's rights")
    if not missing:
        return
    message = "missing: " + ", ".join(missing)
    if os.environ.get("REGISTRY_REQUIRE_CLIENTS") == "1":
        raise AssertionError(message)
    raise unittest.SkipTest(message)


def stop(process: subprocess.Popen[Any], seconds: float = 30) -> int:
    """SIGTERM, then after the deadline SIGKILL for the whole process group; the exit code."""
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


# === The registry =====================================================================================


class Registry(Daemon):
    """The daemon, started as users start it; `address` is its HOST:PORT.

    The requests made here are anonymous and plain HTTP, so over TLS it is the clients that have to look.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        super().__init__(directory / "registry-data", "--quiet", *options)
        self.program = [str(TOP / "registry.py")]
        self.start()
        self.address = self.client.host

    def close(self) -> None:
        """Stop the daemon as users do; it has to leave politely and must not have crashed in between."""
        code = self.stop()
        self.kill()
        if code != 0 or "Traceback" in self.printed():
            raise AssertionError(f"the registry ended with {code} on SIGTERM\n{self.printed()}")

    def request(self, method: str, path: str) -> Response:
        """One request without a body, on a connection of its own."""
        return self.client.request(method, path, headers={"Accept": MANIFEST_TYPES})

    def get(self, path: str) -> Response:
        """GET, which has to succeed."""
        return self.client.expect(200, "GET", path, headers={"Accept": MANIFEST_TYPES})

    def manifest(self, repository: str, reference: str) -> Any:
        """A manifest, parsed."""
        return self.get(f"/v2/{repository}/manifests/{reference}").json

    def blob(self, repository: str, digest: str) -> bytes:
        """A blob's bytes, checked against the digest."""
        body = self.get(f"/v2/{repository}/blobs/{digest}").body
        if digest_of(body) != digest:
            raise AssertionError(f"blob {digest} of {repository} has the digest {digest_of(body)}")
        return body

    def digest(self, repository: str, reference: str) -> str:
        """The digest of a manifest, computed from its bytes and compared with the header."""
        reply = self.get(f"/v2/{repository}/manifests/{reference}")
        digest = digest_of(reply.body)
        announced = reply.headers["Docker-Content-Digest"]
        if announced != digest:
            raise AssertionError(f"Docker-Content-Digest {announced} of a manifest that has {digest}")
        return digest

    def tags(self, repository: str) -> list[str]:
        """The tags of a repository."""
        tags: list[str] = self.get(f"/v2/{repository}/tags/list").json["tags"]
        return tags


# === Private engines ==================================================================================


class Engine:
    """A client's own daemon with its own socket and directories; it neither needs nor disturbs the system's.

    It is ready as soon as the probe, a command of its client, succeeds.
    """

    def __init__(self, argv: list[str], probe: list[str], log: Path, env: dict[str, str]) -> None:
        argv, probe = [program(argv[0]), *argv[1:]], [program(probe[0]), *probe[1:]]
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )

        def over() -> bool:
            """Whether it answers, or never will."""
            done = subprocess.run(probe, env=env, capture_output=True, timeout=STARTUP, check=False)
            return done.returncode == 0 or self.process.poll() is not None

        try:
            wait_until(over, f"for {argv[0]} to answer", STARTUP)
            if self.process.poll() is not None:
                raise AssertionError(f"{argv[0]} ended with {self.process.returncode}")
        except Exception as error:
            self.close()
            raise AssertionError(f"{error}\n{log.read_text('utf-8', 'replace')[-4000:]}") from error

    def close(self) -> None:
        """Stop it, and what it started and left behind."""
        stop(self.process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def remove_tree(directory: Path) -> None:
    """Remove a directory, unmounting first whatever an engine left mounted below it."""
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        points = [line.split()[1] for line in mounts]
    for point in reversed(points):
        if point.startswith(f"{directory}/"):
            subprocess.run(["umount", "-l", point], check=False)
    shutil.rmtree(directory, ignore_errors=True)


# === Images out of nothing ============================================================================


def canonical(value: Any) -> bytes:
    """JSON bytes that are the same for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def tar_of(files: dict[str, bytes]) -> bytes:
    """A tar archive of executable files, the same for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@functools.cache
def busybox() -> bytes:
    """The program in every image; it must be a static one, since an image has no C library."""
    return Path(program("busybox")).read_bytes()


def build_context(directory: Path, greeting: str, *steps: str) -> Path:
    """A directory that `docker build` and the like turn into an image printing the greeting."""
    directory.mkdir(parents=True)
    (directory / "busybox").write_bytes(busybox())
    (directory / "busybox").chmod(0o755)
    command = json.dumps(["/bin/busybox", "echo", greeting])
    lines = ["FROM scratch", "COPY busybox /bin/busybox", *steps, f"CMD {command}"]
    (directory / "Dockerfile").write_text("\n".join(lines) + "\n", "utf-8")
    return directory


class Layout:
    """An OCI image layout on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, data: bytes) -> bytes:
        """Store a blob."""
        blobs = self.path / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return data

    def tag(self, top: dict[str, Any], tag: str) -> None:
        """Finish the layout: one manifest or index, known by one tag."""
        entry = {**top, "annotations": {REF_NAME: tag}}
        (self.path / "index.json").write_bytes(canonical({"schemaVersion": 2, "manifests": [entry]}))
        (self.path / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')

    def top(self) -> dict[str, Any]:
        """The descriptor of its one manifest or index; of several, the tagged one."""
        entries: list[dict[str, Any]] = json.loads((self.path / "index.json").read_bytes())["manifests"]
        (entry,) = [entry for entry in entries if REF_NAME in entry.get("annotations", {})] or entries
        return entry

    def blobs(self) -> dict[str, bytes]:
        """Every blob, by the digest its file name claims."""
        files = (self.path / "blobs" / "sha256").iterdir()
        return {"sha256:" + file.name: file.read_bytes() for file in files}


def image_layout(path: Path, greeting: str, *architectures: str, tag: str = "v1") -> Layout:
    """An image that prints the greeting; an index of several when more than one architecture is asked for."""
    layout = Layout(path)
    images = [_add_image(layout, greeting, architecture) for architecture in architectures or ("amd64",)]
    if len(images) == 1:
        layout.tag(images[0], tag)
    else:
        index = layout.add(canonical(image_index(images)))
        layout.tag(descriptor(index, OCI_INDEX), tag)
    return layout


def _add_image(layout: Layout, greeting: str, architecture: str) -> dict[str, Any]:
    """One image of two layers: busybox, which all have in common, and a file naming the architecture."""
    own = f"{architecture} {greeting}".encode()
    tars = [tar_of({"bin/busybox": busybox()}), tar_of({"architecture": own})]
    layers = [layout.add(gzip.compress(tar, mtime=0)) for tar in tars]
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/bin/busybox", "echo", greeting]},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
    }
    manifest = image_manifest(
        descriptor(layout.add(canonical(config)), OCI_CONFIG), (descriptor(layer) for layer in layers)
    )
    platform = {"architecture": architecture, "os": "linux"}
    return descriptor(layout.add(canonical(manifest)), OCI_MANIFEST, platform=platform)


# === The test case ====================================================================================


class ClientTest(unittest.TestCase):
    """A running registry and a temporary directory for the class, a repository of its own for each test."""

    programs: ClassVar[tuple[str, ...]] = ()
    needs_root: ClassVar[bool] = False
    registry: ClassVar[Registry]
    temp: ClassVar[Path]
    env: ClassVar[dict[str, str]]

    @classmethod
    def setUpClass(cls) -> None:
        require("busybox", *cls.programs, root=cls.needs_root)
        cls.temp = Path(tempfile.mkdtemp(prefix="registry-"))  # short: Unix sockets live below it
        cls.addClassCleanup(remove_tree, cls.temp)
        home = cls.temp / "home"
        home.mkdir()
        # Nothing of the caller's: no credentials, no proxies, no settings of the programs.
        cls.env = {"PATH": PATH, "HOME": str(home), "TMPDIR": str(cls.temp), "LANG": "C.UTF-8"}
        cls.registry = Registry(cls.temp, *cls.registry_options())
        cls.addClassCleanup(cls.registry.close)

    @classmethod
    def registry_options(cls) -> list[str]:
        """What the class's registry is started with, if not as it comes."""
        return []

    @classmethod
    def start_dockerd(cls) -> None:
        """A Docker engine for the class, which `docker` finds by itself."""
        # No bridge and no firewall rules: the containers here need no network, and the host's stays as it is.
        options = ["--bridge=none", "--iptables=false", "--ip6tables=false"]
        options += ["--data-root", f"{cls.temp}/docker", "--exec-root", f"{cls.temp}/run"]
        options += ["--pidfile", f"{cls.temp}/docker.pid", "--host", f"unix://{cls.temp}/docker.sock"]
        cls.env["DOCKER_HOST"] = f"unix://{cls.temp}/docker.sock"
        engine = Engine(["dockerd", *options], ["docker", "version"], cls.temp / "dockerd.log", cls.env)
        cls.addClassCleanup(engine.close)

    @classmethod
    def start_containerd(cls) -> str:
        """A containerd for the class; the address of its socket."""
        socket, config = f"{cls.temp}/c.sock", cls.temp / "containerd.toml"
        config.write_text(
            f'version = 2\nroot = "{cls.temp}/root"\nstate = "{cls.temp}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\n  address = "{socket}"\n',
            "utf-8",
        )
        argv, probe = ["containerd", "--config", str(config)], ["ctr", "--address", socket, "version"]
        engine = Engine(argv, probe, cls.temp / "containerd.log", cls.env)
        cls.addClassCleanup(engine.close)
        return socket

    def setUp(self) -> None:
        program = type(self).__module__.rpartition("test_")[2]
        self.name = f"{program}/{self._testMethodName[len('test_') :].replace('_', '-')}"
        self.repository = f"{self.registry.address}/{self.name}"
        self.directory = Path(tempfile.mkdtemp(dir=self.temp))

    def ok(self, *argv: str, **env: str) -> str:
        """Run a program that has to succeed; its standard output."""
        return self._succeeded(argv, env).stdout.decode("utf-8", "replace")

    def ok_bytes(self, *argv: str, **env: str) -> bytes:
        """Like `ok`, for output that is not text."""
        return self._succeeded(argv, env).stdout

    def ok_both(self, *argv: str, **env: str) -> str:
        """Like `ok`, for the programs that report on standard error: both outputs."""
        return _printed(self._succeeded(argv, env))

    def fails(self, *argv: str, **env: str) -> str:
        """Run a program that has to fail; everything it printed."""
        done = self._run(argv, env)
        self.assertNotEqual(done.returncode, 0, f"{' '.join(argv)}\n{_printed(done)}")
        return _printed(done)

    def _succeeded(self, argv: tuple[str, ...], env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        done = self._run(argv, env)
        what = f"{' '.join(argv)}\n{_printed(done)[-8000:]}\n{self.registry.printed()}"
        self.assertEqual(done.returncode, 0, what)
        return done

    def _run(self, argv: tuple[str, ...], env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [program(argv[0]), *argv[1:]],
            cwd=self.directory,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )

    def assert_served(self, layout: Layout, name: str, reference: str) -> None:
        """The registry has this very manifest, and everything below it, byte for byte."""
        top = layout.top()
        self.assertEqual(self.registry.digest(name, reference), top["digest"])
        blobs = layout.blobs()
        for child in _reachable(blobs, top["digest"]):
            kind = "manifests" if _is_manifest(blobs[child]) else "blobs"
            self.assertEqual(self.registry.get(f"/v2/{name}/{kind}/{child}").body, blobs[child], child)

    def assert_same_layout(self, got: Path, want: Layout) -> None:
        """Two layouts hold the same blobs, byte for byte, under the same top."""
        found = Layout(got)
        self.assertEqual(found.top()["digest"], want.top()["digest"])
        self.assertEqual(found.blobs(), want.blobs())


def _printed(done: subprocess.CompletedProcess[bytes]) -> str:
    """All that a program printed."""
    return (done.stdout + done.stderr).decode("utf-8", "replace")


def _is_manifest(data: bytes) -> bool:
    """Whether a blob of a layout is an image manifest or an index."""
    return data.startswith(b"{") and json.loads(data).get("schemaVersion") == 2


def _reachable(blobs: dict[str, bytes], digest: str) -> list[str]:
    """A manifest's digest and the digests of all it names, downwards."""
    if not _is_manifest(blobs[digest]):
        return [digest]
    body = json.loads(blobs[digest])
    entries = body.get("manifests") or [body["config"], *body["layers"]]
    return [digest] + [below for entry in entries for below in _reachable(blobs, entry["digest"])]
