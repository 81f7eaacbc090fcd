"""TLS with what `test_auth` leaves out: containerd and docker."""

from __future__ import annotations

import shutil
import unittest
from pathlib import Path
from typing import ClassVar

from support import ClientTest, build_context, image_layout

from tests.certificates import Authority

UNTRUSTED = "(?i)x509|certificate"


class TlsTest(ClientTest):
    """A directory as skopeo wants it: `trust` has the authority."""

    trust: ClassVar[Path]

    @classmethod
    def registry_options(cls) -> list[str]:
        authority = Authority(cls.temp / "authority")
        cls.trust = cls.temp / "trust"
        cls.trust.mkdir()
        shutil.copy(authority.certificate, cls.trust / "ca.crt")
        server = authority.issue("registry")
        return ["--tls-cert", str(server), "--tls-key", str(server.with_suffix(".key"))]

    def setUp(self) -> None:
        super().setUp()
        self.layout = image_layout(self.directory / "source", self.name, "amd64", "arm64")
        self.image = f"{self.repository}:v1"


class EngineTest(TlsTest):
    programs = ("openssl", "containerd", "ctr", "docker", "dockerd", "runc")
    needs_root = True

    def test_ctr(self) -> None:
        ctr = ("ctr", "--address", self.start_containerd())
        self.ok("tar", "-C", str(self.layout.path), "-cf", "image.tar", ".")
        options = ("--all-platforms", "--no-unpack", "--base-name", self.repository)
        self.ok(*ctr, "images", "import", *options, "image.tar")
        hosts = self.directory / "hosts"
        settings = hosts / self.registry.address / "hosts.toml"
        settings.parent.mkdir(parents=True)
        server = f"https://{self.registry.address}"
        settings.write_text(f'server = "{server}"\n[host."{server}"]\n', "utf-8")
        push = (*ctr, "images", "push", f"--hosts-dir={hosts}", self.image)
        self.assertRegex(self.fails(*push), UNTRUSTED)
        with open(settings, "a", encoding="utf-8") as file:
            file.write(f'  ca = "{self.trust}/ca.crt"\n')
        self.ok(*push)
        self.ok(*ctr, "images", "rm", "--sync", self.image)
        self.ok(*ctr, "images", "pull", "--all-platforms", f"--hosts-dir={hosts}", self.image)
        pulled = set(self.ok(*ctr, "content", "ls", "--quiet").split())
        self.assertEqual(pulled, set(self.layout.blobs()))

    def test_docker(self) -> None:
        # On a loopback address docker speaks HTTPS first and does not look at the certificate.
        self.start_dockerd()
        context = build_context(self.directory / "context", "hello over TLS")
        self.ok("docker", "build", "--tag", self.image, str(context), DOCKER_BUILDKIT="0")
        self.ok("docker", "push", self.image)
        self.ok("docker", "rmi", "--force", self.image)
        self.ok("docker", "pull", self.image)
        printed = self.ok("docker", "run", "--rm", "--pull", "never", "--network", "none", self.image)
        self.assertEqual(printed.strip(), "hello over TLS")


if __name__ == "__main__":
    unittest.main()
