"""Logging in: what each program does with passwords, tokens, rights, and a certificate of a private CA.

Two daemons share a data directory: one that asks who is there, and an open one to look at the outcome with.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

import test_conformance
from support import (
    ClientTest,
    Layout,
    Registry,
    build_context,
    image_layout,
)
from test_helm import CHART
from test_podman import ContainersTest

from tests.certificates import Authority
from tests.credentials import users_line

PASSWORD = "correct horse"
GRANTS = "pusher ** pull,push,delete\npuller ** pull\nanonymous public/** pull\n"


class Guarded(Registry):
    """A daemon that asks who is there, on the data of another."""

    def __init__(self, directory: Path, data: Path, *options: str) -> None:
        directory.mkdir()
        data.mkdir(exist_ok=True)
        (directory / "registry-data").symlink_to(data)
        users, grants = directory / "users.txt", directory / "grants.txt"
        names = ("pusher", "puller", "stranger")
        users.write_text("".join(users_line(name, PASSWORD) for name in names), "utf-8")
        grants.write_text(GRANTS, "utf-8")
        super().__init__(directory, "--users", str(users), "--grants", str(grants), *options)


def certified(directory: Path) -> tuple[list[str], Path]:
    """A daemon's options for a certificate, and the certificate of the authority that issued it."""
    authority = Authority(directory)
    certificate = authority.issue("registry")
    options = ["--tls-cert", str(certificate), "--tls-key", str(certificate.with_suffix(".key"))]
    return options, authority.certificate


class AuthTest(ClientTest):
    """`self.guarded` is the name of this test's repository at the daemon that asks who is there."""

    secure: ClassVar[bool] = True
    daemon: ClassVar[Guarded]
    trusted: ClassVar[Path]
    programs: ClassVar[tuple[str, ...]] = ("openssl",)

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        options = cls.certify() if cls.secure else []
        cls.daemon = Guarded(cls.temp / "guarded", Path(cls.registry.data), *options)
        cls.addClassCleanup(cls.daemon.close)

    @classmethod
    def certify(cls) -> list[str]:
        """Make an authority, which clients find alone in a directory; the daemon's options for its part."""
        options, certificate = certified(cls.temp / "authority")
        cls.trusted = cls.temp / "trusted" / "ca.crt"
        cls.trusted.parent.mkdir()
        shutil.copy(certificate, cls.trusted)
        return options

    def setUp(self) -> None:
        super().setUp()
        self.guarded = f"{self.daemon.address}/{self.name}"
        self.env = {**self.env, "DOCKER_CONFIG": str(self.directory / "docker")}
        logins = self.directory / "auth.json"
        logins.write_text("{}", "utf-8")
        self.env["REGISTRY_AUTH_FILE"] = str(logins)

    def layout(self) -> Layout:
        return image_layout(self.directory / "source", self.name)

    def assert_absent(self, name: str) -> None:
        """Nothing was pushed there."""
        self.assertEqual(self.registry.request("GET", f"/v2/{name}/tags/list").status, 404)


REFUSED = (
    r"(?i)unauthorized|authentication required|401|denied|invalid username/password|requested access"
    r"|authorization failed"
)
UNTRUSTED = "(?i)x509|certificate"


class SkopeoAuthTest(AuthTest):
    programs = ("skopeo", "openssl")

    def certificates(self, *sides: str) -> list[str]:
        return [f"--{side}cert-dir={self.trusted.parent}" for side in sides]

    def login(self, name: str, password: str = PASSWORD) -> tuple[str, ...]:
        credentials = ("--username", name, "--password", password)
        return ("skopeo", "login", *self.certificates(""), *credentials, self.daemon.address)

    def push(self, layout: Layout) -> tuple[str, ...]:
        source, target = f"oci:{layout.path}:v1", f"docker://{self.guarded}:v1"
        return ("skopeo", "--insecure-policy", "copy", *self.certificates("dest-"), source, target)

    def pull(self) -> tuple[str, ...]:
        source = f"docker://{self.guarded}:v1"
        return ("skopeo", "--insecure-policy", "copy", *self.certificates("src-"), source, "oci:back:v1")

    def test_logged_in_push_and_pull(self) -> None:
        layout = self.layout()
        self.ok(*self.login("pusher"))
        self.ok(*self.push(layout))
        self.assert_served(layout, self.name, "v1")
        self.ok(*self.pull())
        self.assert_same_layout(self.directory / "back", layout)
        self.ok("skopeo", "delete", *self.certificates(""), f"docker://{self.guarded}:v1")

    def test_wrong_password_is_refused(self) -> None:
        self.assertRegex(self.fails(*self.login("pusher", "wrong")), REFUSED)

    def test_push_without_the_right_is_denied(self) -> None:
        layout = self.layout()
        self.assertRegex(self.fails(*self.push(layout)), REFUSED)
        for name in ("puller", "stranger"):
            self.ok(*self.login(name))
            self.assertRegex(self.fails(*self.push(layout)), REFUSED)
        self.assert_absent(self.name)

    def test_copy_between_repositories_mounts_with_one_login(self) -> None:
        layout = self.layout()
        self.ok(*self.login("pusher"))
        self.ok(*self.push(layout))
        copy = ("copy", *self.certificates("src-", "dest-"))
        source, target = f"docker://{self.guarded}:v1", f"docker://{self.guarded}/other:v1"
        self.ok("skopeo", "--insecure-policy", *copy, source, target)
        self.assert_served(layout, f"{self.name}/other", "v1")


class PodmanAuthTest(AuthTest, ContainersTest):
    programs = ("podman", "runc", "conmon", "openssl")

    def podman(self, command: str, *argv: str) -> tuple[str, ...]:
        return ("podman", command, f"--cert-dir={self.trusted.parent}", *argv)

    def login(self, name: str, password: str = PASSWORD) -> tuple[str, ...]:
        return self.podman("login", "--username", name, "--password", password, self.daemon.address)

    def build(self) -> str:
        context = build_context(self.directory / "context", f"hello from {self.name}")
        self.ok("podman", "build", "--network", "none", "--tag", f"{self.guarded}:v1", str(context))
        return f"{self.guarded}:v1"

    def test_logged_in_push_pull_and_run(self) -> None:
        image = self.build()
        self.ok(*self.login("pusher"))
        self.ok(*self.podman("push", image))
        self.ok("podman", "rmi", "--all", "--force")
        self.ok(*self.login("puller"))
        self.ok(*self.podman("pull", image))
        ran = self.ok("podman", "run", "--rm", "--pull=never", "--network", "none", image)
        self.assertEqual(ran.strip(), f"hello from {self.name}")

    def test_wrong_password_is_refused(self) -> None:
        self.assertRegex(self.fails(*self.login("pusher", "wrong")), REFUSED)

    def test_push_without_the_right_is_denied(self) -> None:
        image = self.build()
        self.assertRegex(self.fails(*self.podman("push", image)), REFUSED)
        self.ok(*self.login("puller"))
        self.assertRegex(self.fails(*self.podman("push", image)), REFUSED)
        self.assert_absent(self.name)


class CraneAuthTest(AuthTest):
    programs = ("crane", "openssl")

    def setUp(self) -> None:
        super().setUp()
        self.env["SSL_CERT_FILE"] = str(self.trusted)

    def login(self, name: str, password: str = PASSWORD) -> None:
        self.ok("crane", "auth", "login", self.daemon.address, "--username", name, "--password", password)

    def test_logged_in_push_and_pull(self) -> None:
        layout = self.layout()
        self.login("pusher")
        self.ok("crane", "push", str(layout.path), f"{self.guarded}:v1")
        self.assert_served(layout, self.name, "v1")
        self.login("puller")
        self.assertEqual(self.ok("crane", "digest", f"{self.guarded}:v1").strip(), layout.top()["digest"])
        self.ok("crane", "validate", "--remote", f"{self.guarded}:v1")
        self.assertEqual(self.ok("crane", "ls", self.guarded).split(), ["v1"])
        self.assertIn(self.name, self.ok("crane", "catalog", self.daemon.address).split())

    def test_push_without_the_right_is_denied(self) -> None:
        layout = self.layout()
        push = ("crane", "push", str(layout.path), f"{self.guarded}:v1")
        self.assertRegex(self.fails(*push), REFUSED)
        for name, password in (("puller", PASSWORD), ("stranger", PASSWORD), ("pusher", "wrong")):
            self.login(name, password)
            self.assertRegex(self.fails(*push), REFUSED)
        self.assert_absent(self.name)

    def test_what_is_public_needs_no_login(self) -> None:
        layout = self.layout()
        self.login("pusher")
        public = f"{self.daemon.address}/public/{self.name}:v1"
        self.ok("crane", "push", str(layout.path), public)
        self.ok("crane", "auth", "logout", self.daemon.address)
        self.ok("crane", "validate", "--remote", public)
        other = image_layout(self.directory / "other", "another greeting")
        self.assertRegex(self.fails("crane", "push", str(other.path), public), REFUSED)

    def test_copy_mounts_what_the_user_may_pull(self) -> None:
        layout = self.layout()
        self.login("pusher")
        self.ok("crane", "push", str(layout.path), f"{self.guarded}:v1")
        self.ok("crane", "copy", f"{self.guarded}:v1", f"{self.guarded}/other:v1")
        self.assert_served(layout, f"{self.name}/other", "v1")


class OrasAuthTest(AuthTest):
    programs = ("oras", "openssl")

    def oras(self, *argv: str) -> tuple[str, ...]:
        return ("oras", *argv, "--ca-file", str(self.trusted))

    def login(self, name: str, password: str = PASSWORD) -> tuple[str, ...]:
        return self.oras("login", "--username", name, "--password", password, self.daemon.address)

    def test_logged_in_push_and_pull(self) -> None:
        (self.directory / "letter.txt").write_text(f"dear {self.name}\n", "utf-8")
        self.ok(*self.login("pusher"))
        self.ok(*self.oras("push", f"{self.guarded}:v1", "letter.txt"))
        self.assertEqual(self.registry.tags(self.name), ["v1"])
        self.ok(*self.login("puller"))
        self.ok(*self.oras("pull", "--output", "back", f"{self.guarded}:v1"))
        back = (self.directory / "back" / "letter.txt").read_text("utf-8")
        self.assertEqual(back, f"dear {self.name}\n")
        self.assertRegex(self.fails(*self.oras("push", f"{self.guarded}:v2", "letter.txt")), REFUSED)
        self.assertEqual(self.registry.tags(self.name), ["v1"])

    def test_wrong_password_is_refused(self) -> None:
        self.assertRegex(self.fails(*self.login("pusher", "wrong")), REFUSED)

    def test_whoever_does_not_know_the_authority_is_not_let_down(self) -> None:
        login = ("oras", "login", "--username", "pusher", "--password", PASSWORD, self.daemon.address)
        self.assertRegex(self.fails(*login), UNTRUSTED)


class HelmAuthTest(AuthTest):
    programs = ("helm", "openssl")

    def helm(self, *argv: str) -> tuple[str, ...]:
        return ("helm", *argv, "--ca-file", str(self.trusted))

    def login(self, name: str, password: str = PASSWORD) -> tuple[str, ...]:
        credentials = ("--username", name, "--password", password)
        return self.helm("registry", "login", self.daemon.address, *credentials)

    def test_logged_in_push_and_pull(self) -> None:
        (self.directory / "chart").mkdir()
        chart = CHART.format(name="chart", version="1.0.0")
        (self.directory / "chart" / "Chart.yaml").write_text(chart, "utf-8")
        self.ok("helm", "package", "chart")
        push = self.helm("push", "chart-1.0.0.tgz", f"oci://{self.guarded}")
        self.ok(*self.login("puller"))
        self.assertRegex(self.fails(*push), REFUSED)
        self.ok(*self.login("pusher"))
        self.ok(*push)
        self.assertEqual(self.registry.tags(f"{self.name}/chart"), ["1.0.0"])
        (self.directory / "back").mkdir()
        chart = f"oci://{self.guarded}/chart"
        self.ok(*self.helm("pull", "--version", "1.0.0", "--destination", "back", chart))
        archive = (self.directory / "chart-1.0.0.tgz").read_bytes()
        self.assertEqual((self.directory / "back" / "chart-1.0.0.tgz").read_bytes(), archive)

    def test_wrong_password_is_refused(self) -> None:
        self.assertRegex(self.fails(*self.login("pusher", "wrong")), REFUSED)


class RegctlAuthTest(AuthTest):
    secure = False
    programs = ("regctl",)

    def test_pushes_after_login_and_pulls_what_is_public_without(self) -> None:
        layout = image_layout(self.directory / "source", self.name, "amd64", "arm64")
        host, image = self.daemon.address, f"{self.daemon.address}/public/{self.name}"
        regctl = ("regctl", "--host", f"reg={host},tls=disabled")
        push = (*regctl, "image", "copy", f"ocidir://{layout.path}:v1", f"{image}:v1")
        self.assertRegex(self.fails(*push), REFUSED)
        self.ok(*regctl, "registry", "login", "--user", "pusher", "--pass", PASSWORD, host)
        self.ok(*push)
        self.ok(*regctl, "registry", "logout", host)
        self.assert_served(layout, f"public/{self.name}", "v1")
        self.ok(*regctl, "image", "copy", f"{image}:v1", f"ocidir://{self.directory}/back:v1")
        self.assert_same_layout(self.directory / "back", layout)
        self.assertRegex(self.fails(*push[:-1], f"{image}:v2"), REFUSED)


class ContainerdAuthTest(AuthTest):
    programs = ("openssl", "containerd", "ctr")
    needs_root = True

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.ctr = ("ctr", "--address", cls.start_containerd())

    def imported(self, host: str) -> Layout:
        """An index that containerd knows as v1 of this test's repository."""
        layout = image_layout(self.directory / "source", self.name, "amd64", "arm64")
        self.ok("tar", "-C", str(layout.path), "-cf", "image.tar", ".")
        options = ("--all-platforms", "--no-unpack", "--base-name", f"{host}/{self.name}")
        self.ok(*self.ctr, "images", "import", *options, "image.tar")
        return layout

    def test_pushes_and_pulls_as_a_user_over_tls(self) -> None:
        layout, image = self.imported(self.daemon.address), f"{self.guarded}:v1"
        hosts = self.directory / "hosts"
        settings = hosts / self.daemon.address / "hosts.toml"
        settings.parent.mkdir(parents=True)
        server = f"https://{self.daemon.address}"
        settings.write_text(f'server = "{server}"\n[host."{server}"]\n', "utf-8")
        push = (*self.ctr, "images", "push", f"--hosts-dir={hosts}")
        self.assertRegex(self.fails(*push, f"--user=pusher:{PASSWORD}", image), UNTRUSTED)
        with open(settings, "a", encoding="utf-8") as file:
            file.write(f'  ca = "{self.trusted}"\n')
        self.assertRegex(self.fails(*push, image), REFUSED)
        self.ok(*push, f"--user=pusher:{PASSWORD}", image)
        self.ok(*self.ctr, "images", "rm", "--sync", image)
        options = ("--all-platforms", f"--hosts-dir={hosts}", f"--user=puller:{PASSWORD}")
        self.ok(*self.ctr, "images", "pull", *options, image)
        pulled = set(self.ok(*self.ctr, "content", "ls", "--quiet").split())
        self.assertLessEqual(set(layout.blobs()), pulled)

    def test_pushes_as_a_user_in_plain_http(self) -> None:
        plain = Guarded(self.directory / "plain", Path(self.registry.data))
        self.addCleanup(plain.close)
        layout, image = self.imported(plain.address), f"{plain.address}/{self.name}:v1"
        push = (*self.ctr, "images", "push", "--plain-http")
        self.assertRegex(self.fails(*push, image), REFUSED)
        self.assertRegex(self.fails(*push, "--user=pusher:wrong", image), REFUSED)
        self.ok(*push, f"--user=pusher:{PASSWORD}", image)
        self.assert_served(layout, self.name, "v1")


class DockerAuthTest(AuthTest):
    """Without TLS, which Docker does not insist on for the loopback address."""

    secure = False
    programs = ("docker", "dockerd", "containerd", "runc")
    needs_root = True

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.start_dockerd()

    def login(self, name: str, password: str = PASSWORD) -> tuple[str, ...]:
        return ("docker", "login", "--username", name, "--password", password, self.daemon.address)

    def build(self, image: str) -> str:
        context = build_context(self.directory / "context", f"hello from {self.name}")
        options = ("--network", "none", "--tag", image)
        self.ok_both("docker", "build", *options, str(context), DOCKER_BUILDKIT="0")
        return image

    def run_image(self, image: str) -> str:
        run = ("docker", "run", "--rm", "--pull", "never", "--network", "none", image)
        return self.ok(*run).strip()

    def test_anonymous_pull_beside_authenticated_push(self) -> None:
        image = self.build(f"{self.daemon.address}/public/{self.name}:v1")
        said = self.fails("docker", "push", image)
        self.assertRegex(said, REFUSED)
        # A challenge that says insufficient_scope keeps docker from trying again for 50 seconds.
        self.assertEqual(said.count("Retrying"), 0)
        self.assert_absent(f"public/{self.name}")
        self.ok(*self.login("pusher"))
        self.ok("docker", "push", image)
        self.ok("docker", "logout", self.daemon.address)
        self.ok("docker", "system", "prune", "--all", "--force")
        self.ok("docker", "pull", image)
        self.assertEqual(self.run_image(image), f"hello from {self.name}")
        self.assertRegex(self.fails("docker", "push", image), REFUSED)

    def test_what_is_not_public_is_pulled_only_by_users(self) -> None:
        image = self.build(f"{self.guarded}:v1")
        self.ok(*self.login("pusher"))
        self.ok("docker", "push", image)
        self.ok("docker", "logout", self.daemon.address)
        self.ok("docker", "system", "prune", "--all", "--force")
        self.assertRegex(self.fails("docker", "pull", image), REFUSED)
        self.ok(*self.login("puller"))
        self.ok("docker", "pull", image)
        self.assertEqual(self.run_image(image), f"hello from {self.name}")

    def test_push_of_somebody_who_may_only_pull_is_denied(self) -> None:
        image = self.build(f"{self.guarded}:v1")
        self.ok(*self.login("puller"))
        self.assertRegex(self.fails("docker", "push", image), REFUSED)
        self.assert_absent(self.name)

    def test_layers_are_mounted_from_another_repository(self) -> None:
        image = self.build(f"{self.guarded}:v1")
        self.ok(*self.login("pusher"))
        self.ok("docker", "push", image)
        other = f"{self.guarded}/other:v1"
        self.ok("docker", "tag", image, other)
        self.assertIn(f"Mounted from {self.name}", self.ok("docker", "push", other))

    def test_over_tls(self) -> None:
        # On a loopback address docker speaks HTTPS first and does not look at the certificate.
        options, _ = certified(self.directory / "authority")
        secure = Guarded(self.directory / "secure", Path(self.registry.data), *options)
        self.addCleanup(secure.close)
        image = self.build(f"{secure.address}/{self.name}:v1")
        login = ("docker", "login", "--username", "pusher", "--password", PASSWORD, secure.address)
        self.ok(*login)
        self.ok("docker", "push", image)
        self.ok("docker", "rmi", "--force", image)
        self.ok("docker", "pull", image)
        self.assertEqual(self.run_image(image), f"hello from {self.name}")


class ConformanceWithUsersTest(test_conformance.ConformanceTest):
    """The suite in all its modes, logged in."""

    # Its tokens are good for the target alone, and so for no source that it does not name.
    skipped = ("anonymous/blob-mount-anonymous",) * 2  # sha256 and sha512
    login: ClassVar[dict[str, str]] = {"OCI_USERNAME": "pusher", "OCI_PASSWORD": PASSWORD}

    def own_registry(self, *options: str) -> Registry:
        registry = Guarded(self.directory / "guarded", self.directory / "data", *options)
        self.addCleanup(registry.close)
        return registry

    def run_suite(self, registry: Registry, **settings: str) -> str:
        return super().run_suite(registry, **self.login, **settings)


class ConformanceOverTLSTest(ConformanceWithUsersTest):
    """The suite in all its modes, logged in over TLS."""

    programs = ("conformance", "openssl")

    def own_registry(self, *options: str) -> Registry:
        certificate, self.trusted = certified(self.directory / "authority")
        return super().own_registry(*options, *certificate)

    def run_suite(self, registry: Registry, **settings: str) -> str:
        return super().run_suite(registry, OCI_TLS="enabled", SSL_CERT_FILE=str(self.trusted), **settings)
