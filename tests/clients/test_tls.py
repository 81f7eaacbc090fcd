"""TLS: clients that know the certificate authority, and clients with a certificate of their own."""

from __future__ import annotations

import shutil
import subprocess
import unittest
from pathlib import Path
from typing import ClassVar

from support import ClientTest, build_context, image_layout, program

UNTRUSTED = "(?i)x509|certificate"
REFUSED = "(?i)unauthorized|authentication required"

# CA, then the registry's certificate and a client's, whose common name is the user.
OPENSSL = """\
req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.crt -subj /CN=authority
req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=registry
x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt
req -newkey rsa:2048 -nodes -keyout client.key -out client.csr -subj /CN=alice
x509 -req -in client.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out client.cert
"""


def make_certificates(directory: Path) -> None:
    """All the keys and certificates that the tests here need."""
    directory.mkdir()
    (directory / "names").write_text("subjectAltName = IP:127.0.0.1\n", "utf-8")
    for line in OPENSSL.splitlines():
        argv = [program("openssl"), *line.split()]
        subprocess.run(argv, cwd=directory, check=True, capture_output=True)


class TlsTest(ClientTest):
    """Two directories as skopeo wants them: `trust` has the authority, `identity` a certificate as well."""

    trust: ClassVar[Path]
    identity: ClassVar[Path]

    @classmethod
    def registry_options(cls) -> list[str]:
        certs, cls.trust, cls.identity = (cls.temp / name for name in ("certs", "trust", "identity"))
        make_certificates(certs)
        for directory, names in (
            (cls.trust, ["ca.crt"]),
            (cls.identity, ["ca.crt", "client.cert", "client.key"]),
        ):
            directory.mkdir()
            for name in names:
                shutil.copy(certs / name, directory)
        return ["--tls-cert", f"{certs}/server.crt", "--tls-key", f"{certs}/server.key"]

    def setUp(self) -> None:
        super().setUp()
        self.layout = image_layout(self.directory / "source", self.name, "amd64", "arm64")
        self.image = f"{self.repository}:v1"


class AuthorityTest(TlsTest):
    programs = ("openssl", "crane", "ctr", "containerd", "docker", "dockerd", "oras", "runc", "skopeo")
    needs_root = True

    def test_skopeo(self) -> None:
        push = ("skopeo", "copy", "--all", f"oci:{self.layout.path}:v1", f"docker://{self.image}")
        self.assertRegex(self.fails(*push), UNTRUSTED)
        self.ok(*push, f"--dest-cert-dir={self.trust}")
        pull = ("skopeo", "copy", "--all", f"docker://{self.image}", f"oci:{self.directory}/back:v1")
        self.ok(*pull, f"--src-cert-dir={self.trust}")
        self.assert_same_layout(self.directory / "back", self.layout)

    def test_oras(self) -> None:
        push = ("oras", "cp", "--from-oci-layout", f"{self.layout.path}:v1", self.image)
        self.assertRegex(self.fails(*push), UNTRUSTED)
        self.ok(*push, f"--to-ca-file={self.trust}/ca.crt")
        self.ok("oras", "cp", "--to-oci-layout", self.image, "back:v1", f"--from-ca-file={self.trust}/ca.crt")
        self.assert_same_layout(self.directory / "back", self.layout)

    def test_crane_with_the_authority_in_the_environment(self) -> None:
        # Without it, crane falls back to plain HTTP on a loopback address, which nobody answers here.
        image = image_layout(self.directory / "single", self.name)
        push = ("crane", "push", str(image.path), self.image)
        trusted = {"SSL_CERT_FILE": f"{self.trust}/ca.crt"}
        self.fails(*push)
        self.ok(*push, **trusted)
        self.ok("crane", "pull", "--format=oci", self.image, "back", **trusted)
        self.assert_same_layout(self.directory / "back", image)

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


class ClientCertificateTest(TlsTest):
    programs = ("openssl", "oras", "skopeo")

    @classmethod
    def registry_options(cls) -> list[str]:
        users = cls.temp / "users.txt"
        users.touch()
        options = ["--users", str(users), "--tls-client-ca", f"{cls.temp}/trust/ca.crt"]
        return [*super().registry_options(), *options]

    def test_skopeo(self) -> None:
        push = ("skopeo", "copy", "--all", f"oci:{self.layout.path}:v1", f"docker://{self.image}")
        self.assertRegex(self.fails(*push, f"--dest-cert-dir={self.trust}"), REFUSED)
        self.ok(*push, f"--dest-cert-dir={self.identity}")
        pull = ("skopeo", "copy", "--all", f"docker://{self.image}", f"oci:{self.directory}/back:v1")
        self.assertRegex(self.fails(*pull, f"--src-cert-dir={self.trust}"), REFUSED)
        self.ok(*pull, f"--src-cert-dir={self.identity}")
        self.assert_same_layout(self.directory / "back", self.layout)

    def test_oras(self) -> None:
        push = ("oras", "cp", "--from-oci-layout", f"{self.layout.path}:v1", self.image)
        self.assertRegex(self.fails(*push, f"--to-ca-file={self.identity}/ca.crt"), REFUSED)
        options = ("ca-file={}/ca.crt", "cert-file={}/client.cert", "key-file={}/client.key")
        self.ok(*push, *(f"--to-{option.format(self.identity)}" for option in options))
        shown = (f"--from-{option.format(self.identity)}" for option in options)
        self.ok("oras", "cp", "--to-oci-layout", self.image, "back:v1", *shown)
        self.assert_same_layout(self.directory / "back", self.layout)


if __name__ == "__main__":
    unittest.main()
