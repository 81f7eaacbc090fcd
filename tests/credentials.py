"""What the tests of access share: users files, credentials, tokens, and clients that send them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

from tests.support import Body, Client, Response


def users_line(name: str, password: str) -> str:
    """A line of a users file, with the hash that takes least time to check."""
    value = hashlib.scrypt(password.encode(), salt=b"salt", n=2, r=8, p=1, dklen=32)
    return f"{name}:$scrypt$ln=1,r=8,p=1$c2FsdA${base64.b64encode(value).decode().rstrip('=')}\n"


def basic(name: str, password: str) -> str:
    """An Authorization header's value."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


class AuthorizedClient(Client):
    """A client that sends an Authorization header with every request, unless it is empty."""

    def __init__(self, host: str, repository: str = "", authorization: str = "") -> None:
        super().__init__(host, repository)
        self.authorization = authorization

    def at(self, repository: str) -> AuthorizedClient:
        return AuthorizedClient(self.host, repository, self.authorization)

    def as_caller(self, authorization: str) -> AuthorizedClient:
        """The same client as somebody else."""
        return AuthorizedClient(self.host, self.repository, authorization)

    def request(self, method: str, path: str, body: Body = None, headers: Any = ()) -> Response:
        lines = list(headers.items() if isinstance(headers, dict) else headers)
        if self.authorization:
            lines.append(("Authorization", self.authorization))
        return super().request(method, path, body, lines)

    def token(self, *scopes: str) -> str:
        """A token of the token endpoint's, for all these scopes at once."""
        query = "&".join(f"scope={scope}" for scope in scopes)
        return self.expect(200, "GET", f"/token?{query}").json["token"]

    def bearer(self, *scopes: str) -> str:
        """An Authorization header's value with such a token."""
        return f"Bearer {self.token(*scopes)}"


# === JSON Web Tokens ===


def claims_of(token: str) -> dict[str, Any]:
    """What a token says."""
    return json.loads(_decode(token.split(".")[1]))


def signed(claims: dict[str, Any], key: bytes) -> str:
    """A token that says this, in the name of whoever has the key."""
    header = _encode(b'{"typ":"JWT","alg":"HS256"}')
    content = f"{header}.{_encode(json.dumps(claims).encode())}"
    return f"{content}.{_encode(hmac.digest(key, content.encode(), 'sha256'))}"


def unsigned(claims: dict[str, Any]) -> str:
    """A token that says this and that it needs no signature."""
    header = _encode(b'{"typ":"JWT","alg":"none"}')
    return f"{header}.{_encode(json.dumps(claims).encode())}."


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
