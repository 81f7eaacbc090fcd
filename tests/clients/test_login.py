"""Logging in with what `test_auth` leaves out: regctl, containerd, and docker when it may not push."""

from __future__ import annotations

import unittest

from support import ClientTest, build_context, image_layout

from tests.credentials import users_line

PASSWORD = "correct horse"
REFUSED = "(?i)unauthorized|denied|authorization failed"


class LoginTest(ClientTest):
    """The registry knows a user `alice`, and lets everybody pull."""

    @classmethod
    def registry_options(cls) -> list[str]:
        users = cls.temp / "users.txt"
        users.write_text(users_line("alice", PASSWORD), "utf-8")
        return ["--users", str(users), "--anonymous-pull"]


class RegctlLoginTest(LoginTest):
    programs = ("regctl",)

    def test_pushes_after_login_and_pulls_without(self) -> None:
        layout = image_layout(self.directory / "source", self.name, "amd64", "arm64")
        host = self.registry.address
        regctl = ("regctl", "--host", f"reg={host},tls=disabled")
        push = (*regctl, "image", "copy", f"ocidir://{layout.path}:v1", f"{self.repository}:v1")
        self.assertRegex(self.fails(*push), REFUSED)
        self.ok(*regctl, "registry", "login", "--user", "alice", "--pass", PASSWORD, host)
        self.ok(*push)
        self.ok(*regctl, "registry", "logout", host)
        self.assert_served(layout, self.name, "v1")
        self.ok(*regctl, "image", "copy", f"{self.repository}:v1", f"ocidir://{self.directory}/back:v1")
        self.assert_same_layout(self.directory / "back", layout)
        self.assertRegex(self.fails(*push[:-1], f"{self.repository}:v2"), REFUSED)


class ContainerdLoginTest(LoginTest):
    programs = ("containerd", "ctr")
    needs_root = True

    def test_pushes_as_a_user(self) -> None:
        layout = image_layout(self.directory / "source", self.name)
        ctr = ("ctr", "--address", self.start_containerd(), "images")
        self.ok("tar", "-C", str(layout.path), "-cf", "image.tar", ".")
        self.ok(*ctr, "import", "--no-unpack", "--base-name", self.repository, "image.tar")
        push = (*ctr, "push", "--plain-http", f"{self.repository}:v1")
        self.assertRegex(self.fails(*push), REFUSED)
        self.assertRegex(self.fails(*push[:-1], "--user=alice:wrong", push[-1]), REFUSED)
        self.ok(*push[:-1], f"--user=alice:{PASSWORD}", push[-1])
        self.assert_served(layout, self.name, "v1")


class DockerLoginTest(LoginTest):
    programs = ("docker", "dockerd", "containerd", "runc")
    needs_root = True

    def test_push_without_login_gives_up_at_once(self) -> None:
        self.start_dockerd()
        image = f"{self.repository}:v1"
        context = build_context(self.directory / "context", "hello")
        self.ok("docker", "build", "--tag", image, str(context), DOCKER_BUILDKIT="0")
        said = self.fails("docker", "push", image)
        self.assertRegex(said, REFUSED)
        # A challenge that says insufficient_scope keeps docker from trying again for 50 seconds.
        self.assertEqual(said.count("Retrying"), 0)


if __name__ == "__main__":
    unittest.main()
