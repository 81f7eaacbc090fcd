"""Who may do what: every route for every kind of caller, and what is kept from whom."""

from __future__ import annotations

import contextlib
import io
import os
import time
import unittest
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import registry
from tests.access import EVERYTHING, GRANTS, NOTHING, USERS, AccessTestCase, user
from tests.credentials import basic, claims_of, signed, unsigned, users_line
from tests.support import (
    OCI_MANIFEST,
    Client,
    RawConnection,
    Response,
    descriptor,
    digest_of,
    encode,
    image_manifest,
    unique,
    with_digest,
)


class Caller(NamedTuple):
    """Somebody who makes requests: what they send, who that makes them, and what a token confines them to."""

    name: str
    authorization: str
    user: str | None = None
    valid: bool = True  # otherwise nothing they send is worth anything
    token: frozenset[str] | None = None  # the actions in this repository that theirs is good for


class Row(NamedTuple):
    """A request for one route, the action that it takes, and the status of its success."""

    method: str
    path: str
    action: str  # or login, catalog, token
    success: int
    body: Any = None
    headers: Any = ()


class RightsOnEveryRoute(AccessTestCase):
    """Every route for every kind of caller, by what the rules say and not by what the code does."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(FAILURE_DELAY=0.0)

    def test_with_grants(self) -> None:
        self.check({None: NOTHING, "stranger": NOTHING, "puller": frozenset(("pull",)),
                    "pusher": frozenset(("pull", "push")), "deleter": EVERYTHING}, grants=GRANTS)  # fmt: skip

    def test_without_grants_every_user_may_do_everything(self) -> None:
        self.check({None: NOTHING, **dict.fromkeys(USERS, EVERYTHING)})

    def test_with_anonymous_pull(self) -> None:
        anonymous = {None: frozenset(("pull",)), **dict.fromkeys(USERS, EVERYTHING)}
        self.check(anonymous, anonymous_pull=True)

    def test_with_grants_to_anybody(self) -> None:
        pull, push = frozenset(("pull",)), frozenset(("pull", "push"))
        rights = {None: pull, "stranger": pull, "puller": pull, "pusher": push, "deleter": EVERYTHING}
        self.check(rights, grants=GRANTS + "anonymous ** pull\n")

    def check(self, rights: dict[str | None, frozenset[str]], **options: Any) -> None:
        """Make every request as every caller."""
        self.client, self.backdoor = self.serve(**options), self.serve_anybody()
        self.rights = rights
        callers = list(self.callers())
        self.assertGreater(len(callers), 20)
        with self.client.keep_alive() as kept:
            for route in registry.ROUTES:
                self.check_route(kept, route, callers)

    def check_route(self, client: Client, route: registry.Route, callers: list[Caller]) -> None:
        row, before = self.row(route), self.state()
        for caller in callers:
            with self.subTest(row.method, path=route.path, caller=caller.name):
                client.authorization = caller.authorization
                response = client.request(row.method, row.path, row.body, row.headers)
                self.check_reply(response, caller, row)
                if row.method != "GET" and response.status < 400:
                    row, before = self.row(route), self.state()
                elif row.method != "GET":
                    self.assertEqual(self.state(), before)
                else:
                    head = client.head(row.path, row.headers)
                    self.assertEqual((head.status, head.body), (response.status, b""))

    def check_reply(self, response: Response, caller: Caller, row: Row) -> None:
        expected = self.expected(caller, row)
        self.assert_status(response, expected)
        if expected == 403:
            self.assert_error(response, 403, "DENIED")
            self.assertNotIn("WWW-Authenticate", response.headers)
        elif expected == 401 and row.action == "token":
            self.assertTrue(response.headers["WWW-Authenticate"].startswith("Basic "), response)
        elif expected == 401:
            scope = {"login": "", "catalog": "registry:catalog:"}.get(row.action, "repository:team/app:")
            parameters = self.assert_challenge(response, self.client.host, scope)
            if scope.startswith("repository"):
                self.assertIn(row.action, parameters["scope"].rpartition(":")[2].split(","))

    def expected(self, caller: Caller, row: Row) -> int:
        """What the rules say: 401 when other credentials could help, 403 when they could not."""
        rights = self.rights[caller.user]
        anonymous = caller.user is None
        if not caller.valid or (row.action == "token" and caller.token is not None):
            return 401
        if row.action in ("catalog", "token"):
            refused = anonymous and not self.rights[None]
            confined = caller.token is not None and row.action not in caller.token
            return 401 if refused or confined else row.success
        if row.action == "login":
            return row.success if not anonymous or caller.token is not None else 401
        if row.action in rights and (caller.token is None or row.action in caller.token):
            return row.success
        return 401 if anonymous or row.action in rights else 403

    def callers(self) -> Iterator[Caller]:
        here = "repository:team/app:pull,push,delete"
        catalog = frozenset(("catalog",))
        yield Caller("anonymous", "")
        for name in USERS:
            client = self.client.as_caller(user(name))
            yield Caller(name, user(name), name)
            token = client.bearer(here, "registry:catalog:*")
            yield Caller(f"{name} by token", token, name, token=self.rights[name] | catalog)
        client = self.client.as_caller(user("deleter"))
        token = client.bearer("repository:team/other:pull,push,delete")
        yield Caller("token for another repository", token, "deleter", token=NOTHING)
        token = client.bearer("repository:team/app/sub:pull,push,delete")
        yield Caller("token for a repository below", token, "deleter", token=NOTHING)
        pull = client.bearer("repository:team/app:pull")
        yield Caller("token to pull", pull, "deleter", token=frozenset(("pull",)))
        yield Caller("token for nothing", client.bearer(), "deleter", token=NOTHING)
        if self.rights[None]:
            token = self.client.bearer(here, "registry:catalog:*")
            yield Caller("anonymous by token", token, token=self.rights[None] | catalog)
        for name, authorization in self.worthless(client.token(here, "registry:catalog:*")):
            yield Caller(name, authorization, valid=False)

    def worthless(self, token: str) -> Iterator[tuple[str, str]]:
        """Credentials that name nobody, some of them very nearly those of somebody."""
        claims, key = claims_of(token), self.key()
        self.assertEqual(self.client.as_caller(f"Bearer {signed(claims, key)}").get("/v2/").status, 200)
        head, payload, signature = token.split(".")
        other = "A" if signature[5] != "A" else "B"
        yield "wrong password", basic("deleter", "puller's")
        yield "empty password", basic("deleter", "")
        yield "unknown user", basic("nobody", "nobody's")
        yield "no user", basic("", "")
        yield "the hash as password", basic("deleter", users_line("", "deleter's").strip(":\n"))
        yield "password in other case", basic("deleter", "DELETER'S")
        yield "user in other case", basic("Deleter", "deleter's")
        yield "password and more", basic("deleter", "deleter's\0")
        yield "expired token", "Bearer " + signed({**claims, "exp": int(time.time()) - 1}, key)
        yield "token for another service", "Bearer " + signed({**claims, "aud": "other"}, key)
        yield "token signed by another", "Bearer " + signed(claims, b"x" * 32)
        yield "token signed with nothing", "Bearer " + signed(claims, b"")
        yield "token without signature", "Bearer " + unsigned(claims)
        yield "token with its signature cut off", f"Bearer {head}.{payload}."
        yield "token with another signature", f"Bearer {head}.{payload}.{signature[:5]}{other}{signature[6:]}"
        forged = signed({**claims, "sub": "puller"}, key).split(".")[1]
        yield "token with other claims", f"Bearer {head}.{forged}.{signature}"
        for value in (
            "Basic", "Basic !", "Basic Og", "Basic \xff", "Bearer", "Bearer .", "Bearer ..",
            "Bearer \xe9.a.b", "Bearer a", "Digest username=deleter", "deleter", "Bearer " + "a." * 5000,
        ):  # fmt: skip
            yield f"malformed {value[:10]!r}", value

    def state(self) -> list[tuple]:
        """All that a request that was refused must not have changed."""
        rows = self.data.rows(
            "SELECT 'tag', name, digest FROM tags"
            " UNION ALL SELECT 'blob', repository_id, digest FROM repository_blobs"
        )
        return rows + [("upload", name) for name in self.data.unfinished()]

    def row(self, route: registry.Route) -> Row:
        """A request for a route, with all that it needs in place."""
        client, path = self.backdoor, route.path.replace("<name>", "team/app")
        content, method = unique(), route.method
        if path in ("/v2/", "/v2/_catalog", "/token"):
            return Row(method, path, {"/v2/": "login", "/v2/_catalog": "catalog"}.get(path, "token"), 200)
        if "/blobs/uploads/" in path:
            return self.upload_row(method, path, content)
        if path.endswith("/manifests/<reference>"):
            client.push_blob(b"{}")
            manifest = encode(image_manifest(descriptor(b"{}"), annotations={"n": content.decode()}))
            path = client.path(f"manifests/{digest_of(manifest)}")
            if method == "PUT":
                return Row(method, path, "push", 201, manifest, {"Content-Type": OCI_MANIFEST})
            client.push_manifest(manifest, "latest")
        digest = client.push_blob(content)
        path = path.replace("<digest>", digest)
        return Row(method, path, {"GET": "pull", "DELETE": "delete"}[method], 200 if method == "GET" else 202)

    def upload_row(self, method: str, path: str, content: bytes) -> Row:
        if method == "POST":
            return Row(method, f"{path}?digest={digest_of(content)}", "push", 201, content)
        path = self.backdoor.open_upload()
        if method == "PUT":
            return Row(method, with_digest(path, digest_of(content)), "push", 201, content)
        body = content if method == "PATCH" else None
        return Row(method, path, "push", {"GET": 204, "PATCH": 202, "DELETE": 204}[method], body)


class NothingIsGivenAway(AccessTestCase):
    SECRET: ClassVar = "correct-horse-battery"

    @unittest.skipUnless(os.name == "posix", "needs permissions")
    def test_a_data_directory_that_it_makes_is_its_owners_alone(self) -> None:
        old = os.umask(0o022)
        self.addCleanup(os.umask, old)
        new = self.directory / "parent" / "data"
        self.serve(data=str(new))
        self.assertEqual(new.stat().st_mode & 0o777, 0o700)
        self.assertEqual(new.parent.stat().st_mode & 0o777, 0o755)
        self.data.path.mkdir(mode=0o750)
        self.serve()
        self.assertEqual(self.data.path.stat().st_mode & 0o777, 0o750)
        self.assertEqual((self.data.path / "blobs").stat().st_mode & 0o777, 0o755)

    def test_no_secret_reaches_a_log(self) -> None:
        self.patch(FAILURE_DELAY=0.0)
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            self.users.write_text(users_line("puller", self.SECRET))
            client = self.serve(anonymous_pull=True)
            mine = client.as_caller(basic("puller", self.SECRET))
            token = mine.token("repository:team/app:pull,push,delete")
            mine.push_image("latest")
            for authorization in (
                f"Bearer {token}",
                f"Bearer {token}x",
                basic("puller", f"{self.SECRET}x"),
                basic(self.SECRET, "x"),
                f"Odd {self.SECRET}",
            ):
                for method, path in (("GET", "/v2/"), ("POST", "blobs/uploads/"), ("GET", "/token")):
                    client.as_caller(authorization).request(method, path)
                for end in ("Connection: close", "malformed"):
                    head = f"Authorization: {authorization}\r\nProxy-Authorization: {authorization}\r\n{end}"
                    with RawConnection(client.host) as connection:
                        connection.request("GET", "/v2/", *head.split("\r\n")).drain()
            for end in ("", "%ff", "&service=other"):
                form = f"grant_type=password&username=puller&password={self.SECRET}{end}"
                client.post("/token", form.encode())
        self.assertGreater(len(self.log), 20)
        self.assert_nothing_of(self.SECRET, "\n".join([*self.log, errors.getvalue()]))
        self.assertNotIn(token.rpartition(".")[2], "\n".join(self.log))

    def test_a_password_in_a_url_does_not_reach_the_log(self) -> None:
        client = self.serve()
        for target in (f"http://puller:{self.SECRET}@a/v2/", f"http://puller:{self.SECRET}@a"):
            with RawConnection(client.host) as connection:
                connection.send(
                    f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
                ).read()
        self.assert_nothing_of(self.SECRET, "\n".join(self.log))

    def assert_nothing_of(self, secret: str, written: str) -> None:
        encoded = basic("puller", secret).partition(" ")[2]
        for hidden in (secret, encoded, users_line("", secret).strip(":\n"), "Authorization", "Traceback"):
            self.assertNotIn(hidden, written)

    def test_no_reply_repeats_a_secret(self) -> None:
        client = self.serve()
        for authorization in (basic("puller", self.SECRET), f"Bearer {self.SECRET}", f"Odd {self.SECRET}"):
            response = client.as_caller(authorization).get("/v2/")
            self.assertNotIn(self.SECRET, f"{response.headers.lines} {response.body!r}")

    def test_nothing_tells_users_from_strangers(self) -> None:
        client = self.serve()
        replies = [client.as_caller(basic(name, "wrong")).get("/v2/") for name in ("puller", "nobody")]
        self.assertEqual(replies[0].body, replies[1].body)
        self.assertEqual(replies[0].status, replies[1].status)

    def test_nothing_tells_which_repositories_there_are(self) -> None:
        client = self.serve("puller open pull\ndeleter ** pull,push,delete\n")
        client.at("closed").as_caller(user("deleter")).push_image("latest")
        for caller in (client, client.as_caller(user("puller"))):
            for path in ("tags/list", "manifests/latest", f"referrers/{digest_of(b'x')}"):
                there, absent = (caller.at(name).get(path) for name in ("closed", "absent"))
                self.assertEqual(there.status, absent.status)
                self.assertEqual(there.body.replace(b"closed", b"absent"), absent.body)
