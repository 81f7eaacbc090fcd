"""Users: logging in and out of a registry that lets everybody pull, and of one that does not."""

from __future__ import annotations

import subprocess
import sys
import unittest
from pathlib import Path
from typing import NamedTuple

from support import TOP, ClientTest, build_context, image_layout

PASSWORD = "correct-horse"
REFUSED = "(?i)unauthorized|denied|authentication required|invalid username"


class Client(NamedTuple):
    """The command lines of one client."""

    login: str
    push: str
    pull: str
    logout: str


CLIENTS = {
    "crane": Client(
        login="crane auth login --username {user} --password {password} {host}",
        push="crane push {layout} {image}",
        pull="crane pull --format=oci {image} {back}",
        logout="crane auth logout {host}",
    ),
    "oras": Client(
        login="oras login --plain-http --username {user} --password {password} {host}",
        push="oras cp --from-oci-layout --to-plain-http {layout}:v1 {image}",
        pull="oras cp --to-oci-layout --from-plain-http {image} {back}:v1",
        logout="oras logout {host}",
    ),
    "regctl": Client(
        login="regctl registry login --user {user} --pass {password} --host reg={host},tls=disabled {host}",
        push="regctl --host reg={host},tls=disabled image copy ocidir://{layout}:v1 {image}",
        pull="regctl --host reg={host},tls=disabled image copy {image} ocidir://{back}:v1",
        logout="regctl registry logout {host}",
    ),
    "skopeo": Client(
        login="skopeo login --tls-verify=false --username {user} --password {password} {host}",
        push="skopeo copy --dest-tls-verify=false oci:{layout}:v1 docker://{image}",
        pull="skopeo copy --src-tls-verify=false docker://{image} oci:{back}:v1",
        logout="skopeo logout {host}",
    ),
}


def make_user(users: Path, name: str) -> None:
    """Put a user into a users file by the registry's own command."""
    argv = [sys.executable, "registry.py", "passwd", name, "--users", str(users)]
    subprocess.run(argv, cwd=TOP, input=f"{PASSWORD}\n", text=True, check=True, capture_output=True)


class LoginTest(ClientTest):
    """One client at a time goes in and out of a registry that knows a user `alice`."""

    @classmethod
    def registry_options(cls) -> list[str]:
        users = cls.temp / "users.txt"
        make_user(users, "alice")
        cls.env["REGISTRY_AUTH_FILE"] = f"{cls.temp}/auth.json"  # where skopeo and podman keep logins
        return ["--users", str(users)]

    def setUp(self) -> None:
        super().setUp()
        self.layout = image_layout(self.directory / "source", self.name)

    def command(self, template: str, **more: str) -> list[str]:
        """A command line of the table."""
        words = {"host": self.registry.address, "user": "alice", "password": PASSWORD, **more}
        words = {"layout": str(self.layout.path), **words}
        return [word.format(**words) for word in template.split()]

    def assert_refused(self, template: str, **more: str) -> None:
        self.assertRegex(self.fails(*self.command(template, **more)), REFUSED)


class AnonymousPullTest(LoginTest):
    programs = tuple(CLIENTS)

    @classmethod
    def registry_options(cls) -> list[str]:
        return [*super().registry_options(), "--anonymous-pull"]

    def test_pushes_after_login_and_pulls_without(self) -> None:
        for name, client in CLIENTS.items():
            with self.subTest(name):
                image, back = f"{self.repository}/{name}:v1", f"{self.directory}/{name}"
                self.assert_refused(client.push, image=image)
                self.ok(*self.command(client.login))
                self.ok(*self.command(client.push, image=image))
                self.ok(*self.command(client.logout))
                self.assert_served(self.layout, f"{self.name}/{name}", "v1")
                self.ok(*self.command(client.pull, image=image, back=back))
                self.assert_same_layout(Path(back), self.layout)
                self.assert_refused(client.push, image=f"{self.repository}/{name}:v2")


class ClosedTest(LoginTest):
    programs = tuple(CLIENTS)

    def test_pulls_only_after_login(self) -> None:
        for name, client in CLIENTS.items():
            with self.subTest(name):
                image, back = f"{self.repository}/{name}:v1", f"{self.directory}/{name}"
                self.ok(*self.command(client.login))
                self.ok(*self.command(client.push, image=image))
                self.ok(*self.command(client.logout))
                self.assert_refused(client.pull, image=image, back=back)
                self.ok(*self.command(client.login))
                self.ok(*self.command(client.pull, image=image, back=back))
                self.ok(*self.command(client.logout))
                self.assert_same_layout(Path(back), self.layout)

    def test_wrong_password_is_refused_at_login(self) -> None:
        for name in ("oras", "skopeo"):  # the others only store what they are given
            with self.subTest(name):
                self.assert_refused(CLIENTS[name].login, password="wrong")


class GrantsTest(LoginTest):
    programs = ("crane",)

    @classmethod
    def registry_options(cls) -> list[str]:
        grants = cls.temp / "grants.txt"
        grants.write_text("alice login/** pull,push\n* public/** pull\n", "utf-8")
        return [*super().registry_options(), "--grants", str(grants)]

    def test_pushes_only_where_it_is_granted(self) -> None:
        client = CLIENTS["crane"]
        self.ok(*self.command(client.login))
        self.ok(*self.command(client.push, image=f"{self.repository}:v1"))
        self.assert_refused(client.push, image=f"{self.registry.address}/public/image:v1")
        self.assertRegex(self.fails("crane", "delete", f"{self.repository}:v1"), REFUSED)
        self.ok("crane", "manifest", f"{self.repository}:v1")


class DockerLoginTest(LoginTest):
    programs = ("docker", "dockerd", "containerd", "runc")
    needs_root = True

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.start_dockerd()

    @classmethod
    def registry_options(cls) -> list[str]:
        return [*super().registry_options(), "--anonymous-pull"]

    def login(self, password: str) -> list[str]:
        return ["docker", "login", "--username", "alice", "--password", password, self.registry.address]

    def test_pushes_after_login_and_pulls_without(self) -> None:
        image = f"{self.repository}:v1"
        context = build_context(self.directory / "context", "hello")
        self.ok("docker", "build", "--tag", image, str(context), DOCKER_BUILDKIT="0")
        said = self.fails("docker", "push", image)
        self.assertRegex(said, REFUSED)
        self.assertNotIn("Retrying", said)  # a challenge that says insufficient_scope keeps it from that
        self.assertRegex(self.fails(*self.login("wrong")), REFUSED)
        self.ok(*self.login(PASSWORD))
        self.ok("docker", "push", image)
        self.ok("docker", "logout", self.registry.address)
        self.ok("docker", "rmi", "--force", image)
        self.ok("docker", "pull", image)
        printed = self.ok("docker", "run", "--rm", "--pull", "never", "--network", "none", image)
        self.assertEqual(printed.strip(), "hello")
        self.assertRegex(self.fails("docker", "push", image), REFUSED)


class ContainerdLoginTest(LoginTest):
    programs = ("containerd", "ctr")
    needs_root = True

    def test_pushes_and_pulls_as_a_user(self) -> None:
        ctr = ("ctr", "--address", self.start_containerd())
        image, user = f"{self.repository}:v1", f"--user=alice:{PASSWORD}"
        self.ok("tar", "-C", str(self.layout.path), "-cf", "image.tar", ".")
        self.ok(*ctr, "images", "import", "--no-unpack", "--base-name", self.repository, "image.tar")
        said = self.fails(*ctr, "images", "push", "--plain-http", image)
        self.assertRegex(said, REFUSED + "|authorization failed")
        self.ok(*ctr, "images", "push", "--plain-http", user, image)
        self.ok(*ctr, "images", "rm", "--sync", image)
        self.fails(*ctr, "images", "pull", "--plain-http", image)
        self.ok(*ctr, "images", "pull", "--plain-http", user, image)
        pulled = set(self.ok(*ctr, "content", "ls", "--quiet").split())
        self.assertEqual(pulled, set(self.layout.blobs()))


if __name__ == "__main__":
    unittest.main()
