"""What the tests of access share: a registry with users, and with grants if need be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from registry import Access, Registry
from tests.credentials import AuthorizedClient, basic, users_line
from tests.support import Client, DataDirectory, HTTPTestCase, Response

NOTHING: frozenset[str] = frozenset()
EVERYTHING = frozenset(("pull", "push", "delete"))
USERS = ("puller", "pusher", "deleter", "stranger")
GRANTS = "puller ** pull\npusher ** pull,push\ndeleter ** pull,push,delete\n"


class AccessTestCase(HTTPTestCase):
    """Registries with users, on data and files of the test's own."""

    def setUp(self) -> None:
        self.directory = self.temporary()
        self.users, self.grants = self.directory / "users.txt", self.directory / "grants.txt"
        self.users.write_text("".join(users_line(name, f"{name}'s") for name in USERS), "utf-8")
        self.data = DataDirectory(self.directory / "data")
        self.log: list[str] = []

    def serve(self, grants: str = "", **options: Any) -> AuthorizedClient:
        """Start a registry with users, and with grants if there are any; an anonymous client of it."""
        if grants:
            self.grants.write_text(grants, "utf-8")
            options["grants"] = str(self.grants)
        options = {"data": str(self.data.path), "users": str(self.users), "sync": False, **options}
        self.registry = self.enter(Registry(log=self.log.append, **options))
        return AuthorizedClient(self.registry.netloc, "team/app")

    def serve_anybody(self) -> Client:
        """A second registry on the same data that asks nobody who they are: a client of it."""
        return Client(self.enter(Registry(self.data.path, sync=False)).netloc, "team/app")

    def access(self, grants: str | None = None) -> Access:
        """Who may do what, without a registry."""
        return Access(str(self.users), grants, False, b"k" * 32, 100)

    def change(self, path: Path, text: str) -> None:
        """Write a file as an editor does, so that every change is seen as one."""
        new = path.with_suffix(".new")
        new.write_text(text, "utf-8")
        new.replace(path)

    def key(self) -> bytes:
        return (self.data.path / "token.key").read_bytes()

    def assert_challenge(self, response: Response, host: str, scope: str = "") -> dict[str, str]:
        """A refusal that tells where to get a token, and for what; its parameters."""
        self.assert_error(response, 401, "UNAUTHORIZED")
        challenge = response.headers["WWW-Authenticate"]
        self.assertRegex(challenge, r'\ABearer (\w+="[^"\\]*"(,|\Z))+\Z')
        parameters = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        self.assertEqual(parameters["realm"], f"http://{host}/token")
        self.assertTrue(parameters["service"])
        self.assertTrue(parameters.get("scope", "").startswith(scope), parameters)
        return parameters


def user(name: str) -> str:
    """The Authorization header's value of one of USERS."""
    return basic(name, f"{name}'s")
