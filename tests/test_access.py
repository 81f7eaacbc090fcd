"""Who may do what: the table of access, users, grants, tokens, and what is kept from whom."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hmac
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock
from urllib.parse import quote

import registry
from tests.credentials import (
    AuthorizedClient,
    basic,
    claims_of,
    signed,
    unsigned,
    users_line,
)
from tests.support import (
    OCI_MANIFEST,
    ROOT,
    TIMEOUT,
    Client,
    DataDirectory,
    HTTPTestCase,
    RawConnection,
    Response,
    descriptor,
    digest_of,
    encode,
    free_port,
    image_manifest,
    python,
    run_at_once,
    unique,
    with_digest,
)

NOTHING: frozenset[str] = frozenset()
EVERYTHING = frozenset(("pull", "push", "delete"))
USERS = ("puller", "pusher", "deleter", "stranger")
GRANTS = "puller ** pull\npusher ** pull,push\ndeleter ** pull,push,delete\n"


class AccessTestCase(HTTPTestCase):
    """Registries with users, on data and files of the test's own."""

    def setUp(self) -> None:
        self.resources = contextlib.ExitStack()
        self.addCleanup(self.resources.close)
        self.directory = Path(self.resources.enter_context(tempfile.TemporaryDirectory()))
        self.users, self.grants = self.directory / "users.txt", self.directory / "grants.txt"
        self.users.write_text("".join(users_line(name, f"{name}'s") for name in USERS), "utf-8")
        self.data = DataDirectory(str(self.directory / "data"))
        self.log: list[str] = []

    def serve(self, grants: str = "", **options: Any) -> AuthorizedClient:
        """Start a registry with users, and with grants if there are any; an anonymous client of it."""
        if grants:
            self.grants.write_text(grants, "utf-8")
            options["grants"] = str(self.grants)
        options = {"data": str(self.data.path), "users": str(self.users), "sync": False, **options}
        self.registry = self.resources.enter_context(registry.Registry(log=self.log.append, **options))
        return AuthorizedClient(self.registry.netloc, "team/app")

    def serve_anybody(self) -> Client:
        """A second registry on the same data that asks nobody who they are: a client of it."""
        running = registry.Registry(data=str(self.data.path), sync=False)
        return Client(self.resources.enter_context(running).netloc, "team/app")

    def patch(self, **constants: Any) -> None:
        self.resources.enter_context(mock.patch.multiple(registry, **constants))

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


# === The table ===


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


class TableTest(AccessTestCase):
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
        if row.method == "POST" and row.action == "token":
            return 400  # it takes its credentials from its body, and there is none
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


# === Rules ===


class GrantsTest(AccessTestCase):
    def may_pull(self, client: AuthorizedClient, *repositories: str) -> list[str]:
        """Those of the repositories that a client may pull: what is not there is 404 for those who may."""
        return [name for name in repositories if client.at(name).get("tags/list").status in (200, 404)]

    def test_patterns_of_repositories(self) -> None:
        names = "app team team/app team/a.p team/app/sub team/application my/team/app a/team".split()
        for pattern, matched in (
            ("team/app", ["team/app"]),
            ("team/*", ["team/app", "team/a.p", "team/application"]),
            ("team/app*", ["team/app", "team/application"]),
            ("team/**", ["team/app", "team/a.p", "team/app/sub", "team/application"]),
            ("*", ["app", "team"]),
            ("**", names),
            ("*/app", ["team/app"]),
            ("**/app", ["team/app", "my/team/app"]),
            ("team/a.p", ["team/a.p"]),
            ("*/*", ["team/app", "team/a.p", "team/application", "a/team"]),
            ("te?m/app", []),
            ("team/[a]pp", []),
            ("TEAM/APP", []),
            ("team/app$", []),
        ):
            with self.subTest(pattern):
                client = self.serve(f"puller {pattern} pull\n").as_caller(user("puller"))
                self.assertEqual(self.may_pull(client, *names), matched)
                self.registry.close()

    def test_lines_add_up(self) -> None:
        client = self.serve(
            "# comment\n\n  puller  team/a   pull \nputter x push\n* shared/* pull\n"
            "puller team/b pull,push,delete\nanonymous open/** pull\n"
        )
        names = ("team/a", "team/b", "shared/x", "open/x/y", "closed")
        self.assertEqual(self.may_pull(client.as_caller(user("puller")), *names), list(names[:4]))
        self.assertEqual(self.may_pull(client.as_caller(user("stranger")), *names), ["shared/x", "open/x/y"])
        self.assertEqual(self.may_pull(client, *names), ["open/x/y"])
        puller = client.as_caller(user("puller"))
        self.assert_error(puller.at("team/a").post("blobs/uploads/"), 403, "DENIED")
        self.assert_status(puller.at("team/b").post("blobs/uploads/"), 202)

    def test_one_action_is_not_another(self) -> None:
        client = self.serve("pusher ** push\ndeleter ** delete\n")
        for name, statuses in (("pusher", (403, 202, 403)), ("deleter", (403, 403, 404))):
            mine = client.as_caller(user(name))
            digest = digest_of(b"absent")
            replies = (mine.get("tags/list"), mine.post("blobs/uploads/"), mine.delete(f"blobs/{digest}"))
            self.assertEqual(tuple(reply.status for reply in replies), statuses, name)

    def test_names_that_mean_something_in_grants_give_users_no_more(self) -> None:
        self.users.write_text(users_line("*", "x") + users_line("anonymous", "x") + users_line("puller", "x"))
        client = self.serve("* a pull\nanonymous b pull\npuller c pull\n")
        for name in ("*", "anonymous"):
            self.assertEqual(self.may_pull(client.as_caller(basic(name, "x")), "a", "b", "c"), ["a", "b"])

    def test_changed_grants_count_at_once_for_tokens_too(self) -> None:
        client = self.serve("puller ** pull\n").as_caller(user("puller"))
        by_token = client.as_caller(client.bearer("repository:team/app:pull"))
        for mine in (client, by_token):
            self.assert_error(mine.get("tags/list"), 404)
        self.change(self.grants, "pusher ** pull\n")
        for mine in (client, by_token):
            self.assert_error(mine.get("tags/list"), 403, "DENIED")

    def test_nothing_is_granted_of_names_too_long_to_be_repositories(self) -> None:
        """However many stars there are in a pattern: matching it takes long for them."""
        self.grants.write_text("puller **a**b pull\n* ** pull\n")
        access = registry.Access(str(self.users), str(self.grants))
        for name, allowed in (("a" * 255, True), ("a" * 256, False), ("a" * 60_000, False)):
            self.assertEqual(access.permits("stranger", registry.Scope("repository", name, "pull")), allowed)
            token = access.issue_token("stranger", registry.parse_scope(f"repository:{name}:pull"))["token"]
            self.assertEqual(len(claims_of(token)["access"]), int(allowed))

    def test_a_byte_order_mark_is_skipped(self) -> None:
        self.users.write_text("\ufeff" + users_line("bob", "x") + users_line("puller", "puller's"), "utf-8")
        client = self.serve("\ufeffbob ** pull\n")
        self.assertEqual(self.may_pull(client.as_caller(basic("bob", "x")), "a"), ["a"])
        self.assertEqual(self.may_pull(client.as_caller(user("puller")), "a"), [])

    def test_malformed_grants_keep_it_from_starting(self) -> None:
        for rest in ("", " **", " ** pull push", " ** fly", " ** pull,", " ** *"):
            with self.subTest(rest), self.assertRaisesRegex(registry.StartupError, "line 2"):
                self.serve(f"# first\npuller{rest}\n")

    def test_a_broken_edit_keeps_the_last_good_grants(self) -> None:
        client = self.serve("puller ** pull\n").as_caller(user("puller"))
        with contextlib.redirect_stderr(_Discard()) as errors:
            self.change(self.grants, "puller ** fly\n")
            self.assert_error(client.get("tags/list"), 404)
            self.grants.unlink()
            self.assert_error(client.get("tags/list"), 404)
        self.assertIn("grants.txt", errors.text)

    def test_the_catalog_lists_what_the_caller_may_pull(self) -> None:
        self.data.path.mkdir()
        backdoor = self.serve_anybody()
        names = [f"{team}/{number}" for team in ("closed", "open", "team") for number in range(4)]
        for name in names:
            backdoor.at(name).push_blob(unique())
        client = self.serve("puller team/* pull\npusher team/* push\n* open/1 pull\nanonymous open/2 pull\n")
        mine = ["open/1", "open/2", "team/0", "team/1", "team/2", "team/3"]
        for authorization, listed in (
            (user("puller"), mine),
            (user("pusher"), mine[:2]),
            (user("stranger"), mine[:2]),
            ("", mine[1:2]),
        ):
            caller = client.as_caller(authorization)
            self.assertEqual(caller.expect(200, "GET", "/v2/_catalog").json["repositories"], listed)
            for size in (1, 2, 3):
                self.assertEqual(self.pages(caller, size), listed)
            self.assertEqual(caller.get("/v2/_catalog?n=0").json["repositories"], [])

    def pages(self, client: Client, size: int) -> list[str]:
        """The catalog, a page at a time."""
        found: list[str] = []
        path = f"/v2/_catalog?n={size}"
        while path:
            reply = client.expect(200, "GET", path)
            self.assertLessEqual(len(reply.json["repositories"]), size)
            found += reply.json["repositories"]
            link = reply.headers.get("Link")
            path = link[1 : link.index(">")] if link else ""
        return found

    def test_a_mount_needs_to_be_able_to_pull_the_source(self) -> None:
        """Without it the answer is the same as for a blob that does not exist."""
        self.data.path.mkdir()
        digest = self.serve_anybody().at("closed/x").push_blob(b"mounted")
        client = self.serve("pusher team/* pull,push\npusher open/* pull\n")
        pusher = client.as_caller(user("pusher"))
        for query in (f"mount={digest}&from=closed/x", f"mount={digest}", f"mount={digest_of(b'absent')}"):
            with self.subTest(query):
                self.assert_status(pusher.post(f"blobs/uploads/?{query}"), 202)
                self.assert_error(pusher.get(f"blobs/{digest}"), 404)

    def test_a_mount_from_anywhere_needs_the_source_in_the_token(self) -> None:
        self.data.path.mkdir()
        digest = self.serve_anybody().at("shared/x").push_blob(b"mounted")
        client = self.serve("pusher team/* pull,push\npusher shared/* pull\n").as_caller(user("pusher"))
        target, source = "repository:team/app:pull,push", "repository:shared/x:pull"
        path = f"blobs/uploads/?mount={digest}"
        for scopes, status in (
            ([target], 202),
            ([target, "repository:shared/y:pull"], 202),
            ([target, "repository:shared/x:push"], 202),
            ([target, source], 201),
        ):
            with self.subTest(scopes):
                self.assert_status(client.as_caller(client.bearer(*scopes)).post(path), status)
        client.delete(f"blobs/{digest}")
        self.assert_status(client.post(path), 201)

    def test_a_mount_from_a_named_source_by_token(self) -> None:
        """A token for the target is enough, since it says whose it is; somebody else's is not."""
        self.data.path.mkdir()
        digest = self.serve_anybody().at("shared/x").push_blob(b"mounted")
        client = self.serve("pusher team/* pull,push\npusher shared/* pull\n").as_caller(user("pusher"))
        target, source = "repository:team/app:pull,push", "repository:shared/x:pull"
        path = f"blobs/uploads/?mount={digest}&from=shared/x"
        response = client.as_caller(client.bearer(target)).post(path)
        self.assert_status(response, 201)
        self.assert_status(client.as_caller(client.bearer(target, source)).post(path), 201)

    def test_grants_without_users_are_refused(self) -> None:
        self.grants.write_text("* ** pull\n")
        with self.assertRaises(registry.StartupError):
            registry.Registry(grants=str(self.grants)).open()


class _Discard:
    """A standard error for code under test, remembered."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


# === Tokens ===


class TokenTest(AccessTestCase):
    def form(self, client: Client, **values: str) -> Response:
        """An OAuth 2.0 token request."""
        body = "&".join(f"{name}={quote(value, safe='')}" for name, value in values.items())
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return client.post("/token", body.encode(), headers)

    def actions(self, client: AuthorizedClient, token: str, repository: str = "team/app") -> set[str]:
        """What a token lets its holder do to a repository."""
        mine, absent = client.at(repository).as_caller(f"Bearer {token}"), digest_of(b"absent")
        tries = {"pull": mine.get("tags/list"), "push": mine.post("blobs/uploads/")}
        tries["delete"] = mine.delete(f"blobs/{absent}")
        return {action for action, reply in tries.items() if reply.status in (202, 404)}

    def test_a_client_that_follows_the_challenge_gets_in(self) -> None:
        client = self.serve(GRANTS).as_caller("")
        for name, action, method, path, status in (
            ("puller", "pull", "GET", "tags/list", 404),
            ("pusher", "push", "POST", "blobs/uploads/", 202),
            ("deleter", "delete", "DELETE", f"blobs/{digest_of(b'absent')}", 404),
            ("puller", "*", "GET", "/v2/_catalog", 200),
            ("stranger", "", "GET", "/v2/", 200),
        ):
            with self.subTest(action):
                challenge = self.assert_challenge(client.request(method, path), client.host)
                query = f"?service={quote(challenge['service'])}&account={name}&client_id=docker"
                query += f"&scope={quote(challenge['scope'])}" if "scope" in challenge else ""
                token = client.as_caller(user(name)).expect(200, "GET", f"/token{query}").json["token"]
                mine = client.as_caller(f"Bearer {token}")
                self.assert_status(mine.request(method, path), status)

    def test_what_the_endpoint_answers(self) -> None:
        client = self.serve().as_caller(user("puller"))
        before = int(time.time())
        for response in (
            client.get("/token?scope=repository:team/app:pull"),
            self.form(client.as_caller(""), grant_type="password", username="puller", password="puller's"),
        ):
            answer = response.json
            self.assert_status(response, 200)
            self.assertEqual(response.headers["Content-Type"], "application/json")
            self.assertEqual(response.headers["Cache-Control"], "no-store")
            self.assertEqual(answer["token"], answer["access_token"])
            self.assertEqual(answer["expires_in"], 300)
            issued = datetime.datetime.strptime(answer["issued_at"], "%Y-%m-%dT%H:%M:%SZ")
            moment = issued.replace(tzinfo=datetime.timezone.utc).timestamp()
            self.assertTrue(before <= moment <= time.time(), answer)
            self.assertEqual(claims_of(answer["token"])["exp"] - moment, 300)

    def test_several_scopes_and_several_actions_in_one_token(self) -> None:
        client = self.serve().as_caller(user("puller"))
        first, second = "repository:team/app:pull,push", "repository:other:delete"
        for path in (
            f"/token?scope={first}&scope={second}",
            f"/token?scope={quote(f'{first} {second}')}",
            f"/token?scope={quote(first, safe='')}&scope={quote(second, safe='')}&scope=repository:third:",
        ):
            token = client.expect(200, "GET", path).json["token"]
            self.assertEqual(self.actions(client, token), {"pull", "push"})
            self.assertEqual(self.actions(client, token, "other"), {"delete"})
            self.assertEqual(self.actions(client, token, "third"), set())

    def test_a_token_ends_with_its_user(self) -> None:
        for grants in ("", GRANTS):
            client = self.serve(grants)
            mine = client.as_caller(client.as_caller(user("puller")).bearer("repository:team/app:pull"))
            self.assert_status(mine.get("tags/list"), 404)
            before = self.users.read_text("utf-8")
            self.change(self.users, users_line("pusher", "pusher's"))
            self.assert_challenge(mine.get("tags/list"), client.host)
            self.change(self.users, before)
            self.registry.close()

    def test_a_token_holds_no_more_than_its_user_may(self) -> None:
        client = self.serve(GRANTS)
        for name, actions in (("puller", {"pull"}), ("pusher", {"pull", "push"}), ("stranger", set())):
            for wanted in ("pull,push,delete", "*"):
                token = client.as_caller(user(name)).token(f"repository:team/app:{wanted}")
                self.assertEqual(self.actions(client, token), actions)

    def test_odd_scopes_are_ignored_or_refused(self) -> None:
        client = self.serve(GRANTS).as_caller(user("deleter"))
        for scope in (
            "", "x", "repository", "repository:", "repository::pull", "repository:team/app:fly",
            "repository:../x:pull", "repository(plugin):team/app:pull", "registry:catalog:delete", ":::",
            "a:b:c:d:e", "registry:x:*", "repository:team/app:" + "pull," * 500, "repository:%00:pull",
        ):  # fmt: skip
            with self.subTest(scope[:40]):
                response = client.get(f"/token?scope={scope}")
                self.assert_status(response, 200, 400)
                if response.status == 200:
                    caller = client.as_caller(f"Bearer {response.json['token']}")
                    self.assert_status(caller.post("blobs/uploads/"), 401)

    def test_the_password_form(self) -> None:
        name, password = "j\xf6rg k+m", "p&=%+ \xe9\u20ac'\""
        self.users.write_text(users_line(name, password) + users_line("puller", "puller's"), "utf-8")
        client = self.serve()
        service = self.assert_challenge(client.get("/v2/"), client.host)["service"]
        good = {"grant_type": "password", "username": name, "password": password}
        scope = "repository:team/app:pull repository:other:push"
        more = {"service": service, "client_id": "docker", "access_type": "offline", "scope": scope}
        response = self.form(client, **good, **more)
        self.assert_status(response, 200)
        self.assertEqual(self.actions(client, response.json["access_token"]), {"pull"})
        self.assertEqual(self.actions(client, response.json["access_token"], "other"), {"push"})
        spaced = b"grant_type=password&username=puller&password=puller%27s"
        spaced += b"&scope=repository:a:pull+repository:b:pull"
        response = client.expect(200, "POST", "/token", spaced)
        self.assertEqual(self.actions(client, response.json["token"], "b"), {"pull"})
        self.assert_status(client.post("/token", iter([spaced])), 200)

    def test_other_forms_are_refused(self) -> None:
        client = self.serve(anonymous_pull=True)
        good = {"grant_type": "password", "username": "puller", "password": "puller's"}
        for wrong, status in (
            ({"password": "wrong"}, 401),
            ({"username": "nobody"}, 401),
            ({"username": ""}, 401),
            ({"password": ""}, 401),
            ({"grant_type": "refresh_token"}, 400),
            ({"grant_type": ""}, 400),
            ({"service": "other"}, 400),
        ):
            with self.subTest(wrong):
                self.assert_error(self.form(client, **{**good, **wrong}), status)
        for body in (b"", b"\xff", b"%ff=%ff", b"&&&", b"=", b"{}", b"grant_type=password", b"%"):
            with self.subTest(body):
                self.assert_error(client.post("/token", body), 401 if body == b"grant_type=password" else 400)
        self.assert_status(client.post("/token", b"grant_type=password&x=" + b"x" * 100_000), 413)

    def test_anonymous_tokens_where_anybody_may_do_something(self) -> None:
        client = self.serve(anonymous_pull=True)
        token = client.token("repository:team/app:pull,push,delete", "registry:catalog:*")
        self.assertEqual(self.actions(client, token), {"pull"})
        anonymous = client.as_caller(f"Bearer {token}")
        self.assert_status(anonymous.get("/v2/"), 200)
        self.assert_challenge(anonymous.post("blobs/uploads/"), client.host, "repository:team/app:")

    def test_no_anonymous_tokens_where_nobody_may_do_anything(self) -> None:
        for grants in ("", GRANTS):
            response = self.serve(grants).get("/token?scope=repository:team/app:pull")
            self.assert_error(response, 401, "UNAUTHORIZED")
            self.assertTrue(response.headers["WWW-Authenticate"].startswith("Basic "))
            self.registry.close()

    def test_a_token_for_another_service_is_not_issued(self) -> None:
        client = self.serve().as_caller(user("puller"))
        self.assert_error(client.get("/token?service=registry.docker.io"), 400)

    def test_a_token_is_no_password_for_another(self) -> None:
        """Or else it would never expire, and its scope would be no limit."""
        client = self.serve().as_caller(user("deleter"))
        token = client.bearer("repository:team/app:pull")
        response = client.as_caller(token).get("/token?scope=repository:other:pull,push,delete")
        if response.status == 200:
            self.assertEqual(self.actions(client, response.json["token"], "other"), set())
        else:
            self.assert_error(response, 401, "UNAUTHORIZED")

    def test_a_token_expires(self) -> None:
        self.patch(TOKEN_LIFETIME=1)
        client = self.serve().as_caller(user("puller"))
        mine = client.as_caller(client.bearer("repository:team/app:pull"))
        self.assert_error(mine.get("tags/list"), 404)
        deadline = time.monotonic() + TIMEOUT
        while mine.get("tags/list").status == 404 and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assert_challenge(mine.get("tags/list"), client.host, "repository:team/app:")

    def test_tokens_survive_a_restart_and_serve_a_second_daemon(self) -> None:
        client = self.serve().as_caller(user("puller"))
        token = client.bearer("repository:team/app:pull")
        second = self.serve()
        for mine in (client, second):
            self.assert_error(mine.as_caller(token).get("tags/list"), 404)
        self.registry.close()
        self.assert_error(self.serve().as_caller(token).get("tags/list"), 404)

    def test_tokens_of_another_registry_are_worth_nothing(self) -> None:
        token = self.serve().as_caller(user("puller")).bearer("repository:team/app:pull")
        other = self.serve(data=str(self.directory / "other"))
        self.assert_challenge(other.as_caller(token).get("tags/list"), other.host)

    def test_the_key_is_its_owners_alone(self) -> None:
        self.serve()
        path = self.data.path / "token.key"
        self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        self.assertGreaterEqual(len(path.read_bytes()), 32)
        self.assertNotIn(path.read_bytes()[:8].hex(), "".join(self.log))

    def test_a_key_that_can_be_guessed_keeps_it_from_starting(self) -> None:
        self.data.path.mkdir()
        for content in (b"", b"x" * 31):
            for read_only in (False, True):
                with self.subTest(content, read_only=read_only):
                    if read_only:
                        self.serve_anybody()
                    (self.data.path / "token.key").write_bytes(content)
                    with self.assertRaisesRegex(registry.StartupError, r"\A[^\n]*token\.key[^\n]*\Z"):
                        self.serve(read_only=read_only)
        (self.data.path / "token.key").write_bytes(b"x" * 32)
        self.serve()
        self.assertEqual(self.key(), b"x" * 32)

    def test_daemons_that_start_at_once_agree_on_the_key(self) -> None:
        self.data.path.mkdir()
        running = [
            registry.Registry(str(self.data.path), users=str(self.users), sync=False) for _ in range(4)
        ]
        for one in run_at_once(*(one.start for one in running)):
            self.resources.callback(one.close)
        first, *others = (AuthorizedClient(one.netloc, "a", user("puller")) for one in running)
        token = first.bearer("repository:a:pull")
        for client in others:
            self.assert_error(client.as_caller(token).get("tags/list"), 404)

    def test_without_users_there_are_no_tokens(self) -> None:
        client = self.serve(users=None)
        for method in ("GET", "POST"):
            self.assert_error(client.request(method, "/token"), 404)
        self.assertFalse((self.data.path / "token.key").exists())

    def test_where_the_realm_is_behind_a_trusted_proxy(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        for headers, realm in (
            ({}, f"http://{client.host}/token"),
            ({"X-Forwarded-Proto": "https"}, f"https://{client.host}/token"),
            ({"X-Forwarded-Host": "hub.example:8443"}, "http://hub.example:8443/token"),
            ({"X-Forwarded-Proto": "https", "X-Forwarded-Host": "hub.example"}, "https://hub.example/token"),
            (
                {"X-Forwarded-Proto": "https, http", "X-Forwarded-Host": "a.example, b"},
                "https://a.example/token",
            ),
        ):
            with self.subTest(headers):
                challenge = client.get("/v2/", headers).headers["WWW-Authenticate"]
                self.assertIn(f'realm="{realm}"', challenge)

    def test_where_the_realm_is_is_nothing_for_others_to_say(self) -> None:
        for proxies in ([], ["127.0.0.2", "10.0.0.0/8", "::1"]):
            client = self.serve(trusted_proxies=proxies)
            response = client.get("/v2/", {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example"})
            self.assert_challenge(response, client.host)

    def test_the_public_url_goes_before_what_a_proxy_says(self) -> None:
        client = self.serve(public_url="https://hub.example/", trusted_proxies=["127.0.0.1"])
        challenge = client.get("/v2/", {"X-Forwarded-Host": "evil.example"}).headers["WWW-Authenticate"]
        self.assertIn('realm="https://hub.example/token"', challenge)

    def test_nothing_can_be_added_to_a_challenge(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        challenge = re.compile(
            r'Bearer realm="https?://[\w.:\[\]-]+/token",service="[\w-]+"|Basic realm="registry"'
        )
        for value in (
            'a"',
            'a",scope="x',
            "a\\",
            "a b",
            "a/b",
            "a@b",
            "a?b",
            "a#b",
            "\xe9",
            "a,b",
            "",
            "a;b",
        ):
            for name in ("Host", "X-Forwarded-Host", "X-Forwarded-Proto"):
                with self.subTest(name, value=value), RawConnection(client.host) as connection:
                    host = "" if name == "Host" else "Host: a\r\n"
                    request = f"GET /v2/ HTTP/1.1\r\n{host}{name}: {value}\r\n\r\n"
                    response = connection.send(request.encode("latin-1")).read()
                    self.assert_status(response, 400, 401)
                    for given in response.headers.getall("WWW-Authenticate"):
                        self.assertIsNotNone(challenge.fullmatch(given), given)

    def test_a_request_that_may_pass_needs_no_realm(self) -> None:
        client = self.serve()
        with RawConnection(client.host) as connection:
            connection.send(f"GET /v2/ HTTP/1.0\r\nAuthorization: {user('puller')}\r\n\r\n".encode())
            self.assert_status(connection.read(), 200)
        response = client.as_caller(user("puller")).get("/v2/", {"X-Forwarded-Proto": "wss"})
        self.assert_status(response, 200)

    def test_a_target_in_absolute_form_goes_before_the_host(self) -> None:
        with RawConnection(self.serve().host) as connection:
            for scheme in ("http", "HTTP"):
                target = f"{scheme}://hub.example:5000/v2/"
                challenge = connection.request("GET", target).read().headers["WWW-Authenticate"]
                self.assertIn('realm="http://hub.example:5000/token"', challenge)

    def test_whoever_says_no_host_is_asked_for_a_password(self) -> None:
        with RawConnection(self.serve().host) as connection:
            response = connection.send(b"GET /v2/ HTTP/1.0\r\n\r\n").read()
            self.assert_error(response, 401, "UNAUTHORIZED")
            self.assertEqual(response.headers["WWW-Authenticate"], 'Basic realm="registry"')


# === Users ===

SCRYPT = (  # a published test vector
    "pleaseletmein",
    "$scrypt$ln=14,r=8,p=1$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf046/2o+7qQT44+qbVD9lRdofI",
)
BCRYPT = ("U*U", "$2y$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW")


def has_bcrypt() -> bool:
    """Whether this machine's crypt(3) knows bcrypt."""
    crypt = registry.system_crypt()
    return crypt is not None and crypt(*BCRYPT) == BCRYPT[1]


class UsersTest(AccessTestCase):
    def log_in(self, client: AuthorizedClient, name: str, password: str) -> int:
        return client.as_caller(basic(name, password)).get("/v2/").status

    def test_hashes_that_people_have(self) -> None:
        hashes = (SCRYPT, BCRYPT) if has_bcrypt() else (SCRYPT,)
        for password, hashed in hashes:
            with self.subTest(hashed):
                check = registry.password_check(hashed)
                self.assertTrue(check(password))
                for wrong in (password + "x", password[:-1] + "y", hashed, "\0", password.upper() + "\xe9"):
                    self.assertFalse(check(wrong), wrong)
        self.users.write_text("".join(f"u{n}:{hashed}\n" for n, (_, hashed) in enumerate(hashes)), "utf-8")
        client = self.serve()
        for number, (password, _) in enumerate(hashes):
            self.assertEqual(self.log_in(client, f"u{number}", password), 200)
            self.assertEqual(self.log_in(client, f"u{number}", password + "x"), 401)

    def test_a_password_ends_where_it_ends(self) -> None:
        """crypt(3) looks no further than a NUL, and HMAC, which is in scrypt, ignores some at the end."""
        hashes = [SCRYPT, BCRYPT] if has_bcrypt() else [SCRYPT]
        for password, hashed in hashes:
            self.users.write_text(f"bob:{hashed}\n")
            client = self.serve()
            for end in ("\0", "\0\0", "\0more"):
                self.assertEqual(self.log_in(client, "bob", password + end), 401)
            self.assertEqual(self.log_in(client, "bob", password), 200)

    def test_long_names_and_passwords_are_refused_unread(self) -> None:
        name, password = "n" * 256, "p" * 4097
        self.users.write_text(users_line(name, "x") + users_line("bob", password) + users_line("fits", "x"))
        client = self.serve()
        with mock.patch.object(registry.hashlib, "scrypt", wraps=registry.hashlib.scrypt) as scrypt:
            self.assertEqual(self.log_in(client, name, "x"), 401)
            self.assertEqual(self.log_in(client, "bob", password), 401)
            self.assertEqual(scrypt.call_count, 0)
        self.assertEqual(self.log_in(client, "fits", "x"), 200)

    @unittest.skipUnless(has_bcrypt(), "no crypt(3) that knows bcrypt")
    def test_bcrypt_is_checked_by_many_threads_at_once(self) -> None:
        check = registry.password_check(BCRYPT[1])
        tries = [lambda password=password: check(password) for password in (BCRYPT[0], "wrong") * 8]
        self.assertEqual(run_at_once(*tries), [True, False] * 8)

    def test_a_hash_that_cannot_be_checked_keeps_it_from_starting(self) -> None:
        bad = (
            "hunter2", "", "{SSHA}bm90aGluZw==", "{PLAIN}hunter2", "abJnggxhB/yWI", "$2y$", "*", "$unknown$x",
            "{SHA}wBFJYYjnh5eS5Eft5JORpd7Gkko=", "$apr1$0123abcd$W7om0TbLhldTqkociSB1Q.",
            "$2y$31$" + "a" * 53, "$2y$05$" + "a" * 52,
            "$argon2id$v=19$m=1,t=1,p=1$aa$bb", "$scrypt$ln=14,r=8,p=1$AA", "$scrypt$ln=99,r=8,p=1$AAAA$AAAA",
            "$scrypt$ln=0,r=8,p=1$AAAA$AAAA", "$scrypt$ln=30,r=8,p=1$AAAA$AAAA",
        )  # fmt: skip
        for hashed in bad:
            with self.subTest(hashed):
                self.users.write_text(users_line("puller", "x") + f"bob:{hashed}\n", "utf-8")
                with self.assertRaisesRegex(registry.StartupError, "line 2") as caught:
                    self.serve()
                self.assertNotIn("hunt", str(caught.exception))

    def test_a_line_that_is_none_keeps_it_from_starting(self) -> None:
        for line in (b"bob", b":" + BCRYPT[1].encode(), b"\xff:x", b"bob hash"):
            with self.subTest(line):
                self.users.write_bytes(line + b"\n")
                with self.assertRaises(registry.StartupError):
                    self.serve()

    def test_a_user_who_is_there_twice_keeps_it_from_starting(self) -> None:
        self.users.write_text(users_line("bob", "x") + "#\n" + users_line("al", "x") + users_line("bob", "y"))
        with self.assertRaisesRegex(registry.StartupError, "line 4.* bob"):
            self.serve()

    def test_an_absent_file_keeps_it_from_starting(self) -> None:
        options = ("--port", "0", "--data", str(self.data.path), "--users", str(self.directory / "none"))
        done = python("registry.py", *options)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("none", done.stderr)
        self.assertNotIn("Traceback", done.stderr)

    def test_comments_and_empty_lines_are_nothing(self) -> None:
        self.users.write_text("# who may\n\n" + users_line("puller", "x") + "  \n#bob:x\n", "utf-8")
        client = self.serve()
        self.assertEqual(self.log_in(client, "puller", "x"), 200)
        self.assertEqual(self.log_in(client, "#bob", "x"), 401)

    def test_a_changed_file_counts_at_once(self) -> None:
        client = self.serve()
        self.assertEqual(self.log_in(client, "puller", "puller's"), 200)
        self.change(self.users, users_line("puller", "new") + users_line("fresh", "x"))
        self.assertEqual(self.log_in(client, "puller", "puller's"), 401)
        self.assertEqual(self.log_in(client, "puller", "new"), 200)
        self.assertEqual(self.log_in(client, "fresh", "x"), 200)
        self.assertEqual(self.log_in(client, "pusher", "pusher's"), 401)

    def test_a_broken_edit_keeps_the_last_good_users(self) -> None:
        client = self.serve()
        for broken in ("puller\n", users_line("x", "y") + "puller:hunter2\n"):
            with contextlib.redirect_stderr(_Discard()) as errors:
                self.change(self.users, broken)
                self.assertEqual(self.log_in(client, "puller", "puller's"), 200)
                self.assertEqual(self.log_in(client, "x", "y"), 401)
            self.assertIn("users.txt", errors.text)
            self.assertNotIn("hunt", errors.text)
        with contextlib.redirect_stderr(_Discard()):
            self.users.unlink()
            self.assertEqual(self.log_in(client, "puller", "puller's"), 200)
        self.change(self.users, users_line("puller", "again"))
        self.assertEqual(self.log_in(client, "puller", "again"), 200)
        self.assertEqual(self.log_in(client, "puller", "puller's"), 401)

    def test_a_password_is_hashed_once_and_then_remembered(self) -> None:
        check = mock.Mock(wraps=lambda password: password == "right")
        self.resources.enter_context(mock.patch.object(registry, "password_check", lambda _hashed: check))
        client = self.serve()
        for _ in range(5):
            self.assertEqual(self.log_in(client, "puller", "right"), 200)
        self.assertEqual(check.call_count, 1)
        self.assertEqual(self.log_in(client, "puller", "wrong"), 401)
        self.assertEqual(self.log_in(client, "pusher", "right"), 200)
        self.assertEqual(check.call_count, 3)

    def test_what_is_remembered_is_forgotten_in_time(self) -> None:
        self.patch(PASSWORD_LIFETIME=0.0)
        check = mock.Mock(return_value=True)
        self.resources.enter_context(mock.patch.object(registry, "password_check", lambda _hashed: check))
        client = self.serve()
        for _ in range(2):
            self.assertEqual(self.log_in(client, "puller", "right"), 200)
        self.assertEqual(check.call_count, 2)

    def test_a_password_in_use_stays_remembered(self) -> None:
        check = mock.Mock(return_value=True)
        self.resources.enter_context(mock.patch.object(registry, "password_check", lambda _hashed: check))
        access = registry.Access(str(self.users))
        for moment in range(0, 20_000, 3_000):
            with mock.patch.object(registry.time, "monotonic", return_value=float(moment)):
                self.assertEqual(access.log_in("puller", "x", "127.0.0.1"), "puller")
        self.assertEqual(check.call_count, 1)

    def test_a_name_that_does_not_exist_takes_as_long_as_one_that_does(self) -> None:
        """Whatever the users' hashes cost, and always the same for the same name."""
        self.patch(FAILURE_DELAY=0.0)
        salted = "r=8,p=1$c2FsdA$" + "A" * 43
        self.users.write_text("".join(f"u{n}:$scrypt$ln={n % 3 + 2},{salted}\n" for n in range(12)))
        access = registry.Access(str(self.users), key=b"k" * 32)
        costs: dict[str, set[int]] = {}
        with mock.patch.object(registry.hashlib, "scrypt", wraps=registry.hashlib.scrypt) as scrypt:
            for name in [f"{kind}{n}" for kind in ("u", "nobody") for n in range(12)] * 2:
                before = scrypt.call_count
                with self.assertRaises(registry.RegistryError):
                    access.log_in(name, "wrong", "127.0.0.1")
                self.assertEqual(scrypt.call_count, before + 1)
                costs.setdefault(name, set()).add(scrypt.call_args[1]["n"])
        self.assertEqual({len(cost) for cost in costs.values()}, {1}, "not the same at every try")
        strangers = set().union(*(cost for name, cost in costs.items() if name.startswith("nobody")))
        self.assertEqual(strangers, {4, 8, 16})

    def test_a_name_that_does_not_exist_has_no_password(self) -> None:
        """Not even that of the user with whose hash it is compared for the time it takes."""
        self.users.write_text(users_line("puller", "x"))
        client = self.serve()
        for name in ("nobody", "", "Puller"):
            self.assertEqual(self.log_in(client, name, "x"), 401)
        self.change(self.users, "# nobody at all\n")
        self.assertEqual(self.log_in(client, "puller", "x"), 401)

    def test_secrets_are_compared_in_constant_time(self) -> None:
        """What hmac says of a password, or of a token's signature, is what counts, and nothing else."""
        self.users.write_text(users_line("alice", "right") + (f"bob:{BCRYPT[1]}\n" if has_bcrypt() else ""))
        for verdict in (True, False):
            access = registry.Access(str(self.users))
            content, _, signature = access.issue_token("alice", [])["token"].rpartition(".")
            forged = f"Bearer {content}.{'A' * len(signature)}"
            attempts = [*(basic(name, "wrong") for name in access._users.get()), forged]
            attempts += [basic("alice", "right"), f"Bearer {content}.{signature}"]
            with mock.patch.object(hmac, "compare_digest", return_value=verdict):
                for attempt in attempts:
                    with self.subTest(attempt, verdict=verdict):
                        try:
                            access.identify(attempt, "127.0.0.1")
                        except registry.RegistryError:
                            self.assertFalse(verdict)
                        else:
                            self.assertTrue(verdict)


class TrustedProxyTest(AccessTestCase):
    """Whose requests they are that come from a proxy."""

    def logged(self, forwarded: str, *proxies: str) -> str:
        """The address in the access log for a request from 127.0.0.1 with this X-Forwarded-For."""
        client = self.serve(users=None, trusted_proxies=proxies)
        with RawConnection(client.host) as connection:
            parts = forwarded.split("|")
            connection.request("GET", "/v2/", *(f"X-Forwarded-For: {part}" for part in parts)).read()
        self.registry.close()
        return self.log[-1].split(" ")[1]

    def test_the_log_names_the_client_behind_it(self) -> None:
        here = "127.0.0.1"
        for forwarded, proxies, address in (
            ("203.0.113.7", [here], "203.0.113.7"),
            ("203.0.113.7", ["127.0.0.0/8"], "203.0.113.7"),
            ("2001:db8::7", ["::/0", here], "2001:db8::7"),
            ("2001:0DB8:0::7", [here], "2001:db8::7"),
            ("::ffff:203.0.113.7", [here], "203.0.113.7"),
            ("198.51.100.1, 203.0.113.7", [here], "203.0.113.7"),
            ("198.51.100.1,203.0.113.7, 10.0.0.9", [here, "10.0.0.0/8"], "203.0.113.7"),
            ("198.51.100.1|203.0.113.7|10.0.0.9", [here, "10.0.0.0/8"], "203.0.113.7"),
            ("10.0.0.8, 10.0.0.9", [here, "10.0.0.0/8"], "10.0.0.8"),
        ):
            with self.subTest(forwarded, proxies=proxies):
                self.assertEqual(self.logged(forwarded, *proxies), address)

    def test_what_is_no_address_ends_the_search(self) -> None:
        for forwarded in (
            "", "unknown", "203.0.113.7,", "203.0.113.7, x", "203.0.113.7:80", "256.1.1.1", "fe80::1%a b",
            "203.0.113.7, fe80::1%\x1b[31m", "1" * 5000, "," * 5000,
        ):  # fmt: skip
            with self.subTest(forwarded[:20]):
                self.assertEqual(self.logged(forwarded, "127.0.0.1", "fe80::/10"), "127.0.0.1")

    def test_others_are_not_believed(self) -> None:
        for proxies in ([], ["127.0.0.2"], ["::/0"], ["203.0.113.7"]):
            with self.subTest(proxies):
                self.assertEqual(self.logged("203.0.113.7", *proxies), "127.0.0.1")

    def test_what_is_no_network_keeps_it_from_starting(self) -> None:
        for text in ("", "proxy.example", "10.0.0.1/8", "10.0.0.0/33", "::1/129"):
            with self.subTest(text), self.assertRaises(registry.StartupError):
                self.serve(trusted_proxies=[text])

    def test_the_command_line_takes_several(self) -> None:
        options = registry.build_parser().parse_args(
            ["--trusted-proxy", "::1", "--trusted-proxy", "10.0.0.0/8"]
        )
        self.assertEqual(options.trusted_proxies, ["::1", "10.0.0.0/8"])
        self.assertNotIn("trusted_proxies", registry.build_parser().parse_args([]))


class FailureTest(AccessTestCase):
    """Those who guess passwords are slowed down, and nobody else is."""

    def setUp(self) -> None:
        super().setUp()
        self.slept: list[float] = []
        self.resources.enter_context(mock.patch.object(registry.time, "sleep", self.slept.append))

    def guess(self, client: AuthorizedClient, name: str, password: str, address: str = "") -> Response:
        headers = {"X-Forwarded-For": address} if address else {}
        return client.as_caller(basic(name, password)).get("/v2/", headers)

    def test_who_knows_the_password_gets_in_however_often_others_failed(self) -> None:
        client = self.serve()
        for number in range(120):
            self.assert_status(
                self.guess(client, "puller" if number % 2 else f"nobody{number}", "wrong"), 401
            )
        for name in USERS:
            before = len(self.slept)
            self.assert_status(self.guess(client, name, f"{name}'s"), 200)
            self.assertEqual(len(self.slept), before)

    def test_failures_are_answered_later_and_later(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        for number in range(30):
            self.assert_status(self.guess(client, f"nobody{number}", "x", "203.0.113.7"), 401)
        self.assertEqual(self.slept[:5], [0.0] * 5)
        self.assertEqual(self.slept, sorted(self.slept))
        self.assertEqual((self.slept[5], self.slept[-1]), (0.2, 2.0))
        body = b"grant_type=password&username=puller&password=wrong"
        self.assert_status(client.post("/token", body, {"X-Forwarded-For": "203.0.113.7"}), 401)
        self.assertEqual(self.slept.pop(), 2.0)
        self.guess(client, "puller", "x", "203.0.113.8")
        self.assertEqual(self.slept.pop(), 0.0)

    def test_failures_are_forgotten(self) -> None:
        self.patch(FAILURE_INTERVAL=0.0)
        client = self.serve()
        for _ in range(20):
            self.guess(client, "puller", "wrong")
        self.assertEqual(set(self.slept), {0.0})

    def test_clients_of_ipv6_are_told_apart_by_64_bits(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        for number in range(20):
            self.guess(client, "puller", "wrong", f"2001:db8:0:1:{number:x}::1")
        self.assertEqual(self.slept[-1], 2.0)
        for address in ("2001:db8:0:2::1", "2001:db8:1:1::1", "::1"):
            self.guess(client, "puller", "wrong", address)
            self.assertEqual(self.slept[-1], 0.0)

    def test_guesses_made_at_once_are_slowed_down_too(self) -> None:
        """One at a time is looked at, from the start of its check until it is answered."""
        client = self.serve()
        busy: list[int] = [0]

        def occupy(*_: Any) -> bool:
            busy.append(busy[-1] + 1)
            threading.Event().wait(0.001)
            busy.append(busy[-1] - 1)
            return False

        with mock.patch.object(registry.time, "sleep", occupy):
            users = {"puller": ("", occupy)}
            with mock.patch.object(self.registry.server.context.access._users, "_value", users):
                run_at_once(*[lambda n=n: self.guess(client, "puller", f"{n}") for n in range(40)])
        self.assertEqual(len(busy), 1 + 40 * 2 * 2)
        self.assertEqual(max(busy), 1)

    def test_one_password_is_hashed_at_a_time(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        busy: list[int] = [0]

        def check(_password: str) -> bool:
            busy.append(busy[-1] + 1)
            threading.Event().wait(0.002)
            busy.append(busy[-1] - 1)
            return False

        users = {"puller": ("", check)}
        with mock.patch.object(self.registry.server.context.access._users, "_value", users):
            run_at_once(*[lambda n=n: self.guess(client, "puller", "x", f"203.0.113.{n}") for n in range(20)])
        self.assertEqual((len(busy), max(busy)), (41, 1))

    def test_guesses_elsewhere_do_not_keep_others_waiting(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        checks: list[str] = []
        begun = threading.Event()

        def check(password: str) -> bool:
            checks.append(password)
            if len(checks) > 5:
                begun.set()
            threading.Event().wait(0.005)
            return password == "right"

        def log_in() -> int:
            begun.wait(TIMEOUT)
            before = len(checks)
            self.assert_status(self.guess(client, "puller", "right", "203.0.113.8"), 200)
            return len(checks) - before

        users = {"puller": ("", check)}
        with mock.patch.object(self.registry.server.context.access._users, "_value", users):
            guesses = [lambda n=n: self.guess(client, "puller", f"{n}", "203.0.113.7") for n in range(150)]
            waited, *replies = run_at_once(log_in, *guesses)
        self.assertLess(waited, 50)
        self.assertEqual({reply.status for reply in replies}, {401})

    def test_guesses_from_many_addresses_do_not_keep_others_waiting(self) -> None:
        client = self.serve(trusted_proxies=["127.0.0.1"])
        access = self.registry.server.context.access
        checks: list[str] = []
        begun = threading.Event()

        def check(password: str) -> bool:
            checks.append(password)
            begun.set()
            threading.Event().wait(0.02)
            return password == "right"

        def log_in() -> int:
            begun.wait(TIMEOUT)
            before = len(checks)
            self.assert_status(self.guess(client, "puller", "right", "203.0.113.8"), 200)
            return checks.index("right") - before

        guesses = []
        for number in range(100):
            access._queue._failures.put(f"198.51.100.{number}", 1, TIMEOUT)
            guesses.append(lambda n=number: self.guess(client, "puller", "x", f"198.51.100.{n}"))
        with mock.patch.object(access._users, "_value", {"puller": ("", check)}):
            waited, *_ = run_at_once(log_in, *guesses)
        self.assertLess(waited, 30)

    def test_those_who_log_in_alike_are_hashed_once(self) -> None:
        check = mock.Mock(side_effect=lambda _password: not threading.Event().wait(0.05))
        client = self.serve()
        users = {"puller": ("hash", check)}
        with mock.patch.object(self.registry.server.context.access._users, "_value", users):
            replies = run_at_once(*[lambda: self.guess(client, "puller", "right")] * 30)
        self.assertEqual({reply.status for reply in replies}, {200})
        self.assertEqual(check.call_count, 1)

    def test_a_worthless_token_is_no_guess(self) -> None:
        client = self.serve()
        for _ in range(20):
            self.assert_status(client.as_caller("Bearer a.b.c").get("/v2/"), 401)
        self.assertEqual(self.slept, [])

    def test_nothing_is_kept_of_the_names_that_failed(self) -> None:
        client = self.serve()
        for number in range(20):
            self.guess(client, f"{number}".ljust(255, "x"), "wrong")
        access = self.registry.server.context.access
        self.assertEqual(list(access._queue._failures._things), ["127.0.0.1"])
        self.assertEqual((access._queue._waiting, access._verified._things), ({}, {}))

    def test_what_has_expired_is_dropped(self) -> None:
        cache = registry.Cache(10)
        for moment, key in enumerate("abcdef"):
            with mock.patch.object(registry.time, "monotonic", return_value=float(moment)):
                cache.put(key, key, 2.5)
                self.assertEqual(list(cache._things), list("abcdef"[max(moment - 2, 0) : moment + 1]))


class LoginQueueTest(unittest.TestCase):
    """Whose turn it is."""

    def setUp(self) -> None:
        self.queue = registry.LoginQueue(100)
        self.order: list[str] = []
        self.threads: list[threading.Thread] = []

    def attempt(self, address: str, name: str, label: str) -> None:
        """Begin an attempt in a thread of its own, and see it wait or be over."""

        def run() -> None:
            try:
                with self.queue.turn(address, name):
                    self.order.append(label)
            except registry.RegistryError as error:
                self.assertIs(error.code, registry.ErrorCode.TOOMANYREQUESTS)
                self.order.append(f"{label} refused")

        waiting = self.waiting()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.threads.append(thread)
        deadline = time.monotonic() + TIMEOUT
        while label not in self.order and self.waiting() <= waiting and time.monotonic() < deadline:
            if any(text.endswith("refused") for text in self.order):
                break
            thread.join(0.001)

    def waiting(self) -> int:
        return sum(map(len, self.queue._waiting.values()))

    def finish(self) -> list[str]:
        for thread in self.threads:
            thread.join(TIMEOUT)
        return self.order

    def test_names_that_fewest_wait_for_and_the_newest_go_first(self) -> None:
        with self.queue.turn("a", "ci"):
            for name, label in (("ci", "1"), ("bob", "2"), ("ci", "3"), ("alice", "4"), ("ci", "5")):
                self.attempt("a", name, label)
            self.assertEqual(self.order, [])
        self.assertEqual(self.finish(), ["4", "2", "5", "3", "1"])
        self.assertEqual(self.queue._waiting, {})

    def test_addresses_do_not_wait_for_one_another(self) -> None:
        with self.queue.turn("a", "ci"):
            self.attempt("a", "ci", "1")
            self.attempt("b", "ci", "2")
            self.assertEqual(self.order, ["2"])
        self.assertEqual(self.finish(), ["2", "1"])

    def test_the_address_with_most_attempts_loses_the_oldest(self) -> None:
        with (
            mock.patch.object(self.queue, "_limit", 6),
            self.queue.turn("b", "x"),
            self.queue.turn("a", "x"),
        ):
            for address, name, label in (
                ("a", "alice", "1"),
                ("a", "ci", "2"),
                ("a", "ci", "3"),
                ("b", "ci", "4"),
            ):
                self.attempt(address, name, label)
            self.attempt("c", "alice", "5")
            self.threads[1].join(TIMEOUT)
            self.threads[-1].join(TIMEOUT)
            self.assertEqual(sorted(self.order), ["2 refused", "5"])
        self.assertEqual(sorted(self.finish()), ["1", "2 refused", "3", "4", "5"])

    def test_there_is_a_limit_for_as_many_addresses_too(self) -> None:
        with (
            mock.patch.object(self.queue, "_limit", 2),
            self.queue.turn("a", "x"),
            self.queue.turn("b", "x"),
        ):
            self.attempt("c", "x", "1")
            self.threads[0].join(TIMEOUT)
            self.assertEqual(self.order, ["1 refused"])
            self.attempt("a", "x", "2")
            self.assertEqual(self.finish(), ["1 refused", "2 refused"])
        self.assertEqual(self.queue._waiting, {})

    def test_addresses_that_are_slowed_down_leave_room(self) -> None:
        with (
            mock.patch.object(self.queue, "_limit", 2),
            mock.patch.object(registry.time, "sleep") as sleep,
        ):
            with self.queue.turn("a", "x"):
                self.queue.fail("a")
                self.assertEqual(sleep.call_count, 1)
                with self.queue.turn("b", "x"):
                    self.queue.fail("b")
            self.assertEqual(sleep.call_count, 1)


class SecrecyTest(AccessTestCase):
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
        with contextlib.redirect_stderr(_Discard()) as errors:
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
            for end in ("", "%ff", "&service=other"):
                form = f"grant_type=password&username=puller&password={self.SECRET}{end}"
                client.post("/token", form.encode())
        self.assertGreater(len(self.log), 20)
        self.assert_nothing_of(self.SECRET, "\n".join([*self.log, errors.text]))
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


# === The command line ===


class PasswdTest(AccessTestCase):
    def passwd(self, *arguments: str, password: str = "") -> tuple[int, str]:
        """Run the command; its exit status and all that it printed."""
        printed = _Discard()
        streams = {"stdin": io.StringIO(password), "stdout": printed, "stderr": printed}
        with mock.patch.multiple(sys, **streams):
            status = registry.main(["passwd", *arguments, "--users", str(self.users)])
        return status, printed.text

    def lines(self) -> dict[str, str]:
        return dict(line.split(":", 1) for line in self.users.read_text("utf-8").splitlines())

    def assert_refused(self, outcome: tuple[int, str]) -> None:
        status, printed = outcome
        self.assertEqual(status, 1)
        self.assertRegex(printed, r"\Aregistry\.py: .+\n\Z")

    def test_a_user_is_made(self) -> None:
        self.users = new = self.directory / "new.txt"
        self.assertEqual(self.passwd("alice", password="s\xe9cret\nmore\n"), (0, ""))
        self.assertEqual(new.stat().st_mode & 0o777, 0o600)
        name, _, hashed = new.read_text("utf-8").strip().partition(":")
        self.assertEqual(name, "alice")
        self.assertTrue(hashed.startswith("$scrypt$"), hashed)
        self.assertTrue(registry.password_check(hashed)("s\xe9cret"))
        self.assertFalse(registry.password_check(hashed)("s\xe9cret\n"))
        self.assertEqual([path.name for path in self.directory.iterdir() if "new" in path.name], ["new.txt"])

    def test_a_password_is_replaced_and_all_else_stays(self) -> None:
        before = self.lines()
        os.chmod(self.users, 0o644)
        inode = self.users.stat().st_ino
        self.assertEqual(self.passwd("pusher", password="new\n"), (0, ""))
        after = self.lines()
        self.assertEqual(set(after), set(before))
        self.assertEqual({name for name in after if after[name] != before[name]}, {"pusher"})
        self.assertTrue(registry.password_check(after["pusher"])("new"))
        self.assertEqual(self.users.stat().st_mode & 0o777, 0o600)
        self.assertNotEqual(self.users.stat().st_ino, inode, "written in place")

    def test_no_two_hashes_are_the_same(self) -> None:
        for name in ("a", "b"):
            self.passwd(name, password="same")
        self.assertNotEqual(self.lines()["a"], self.lines()["b"])

    def test_a_user_is_removed(self) -> None:
        self.assertEqual(self.passwd("pusher", "--delete"), (0, ""))
        self.assertEqual(set(self.lines()), set(USERS) - {"pusher"})
        self.assert_refused(self.passwd("pusher", "--delete"))

    def test_changes_at_once_lose_none_of_each_other(self) -> None:
        names = [f"user{number}" for number in range(8)]
        run_at_once(
            *(functools.partial(registry.change_user, str(self.users), name, f"{name}:x") for name in names)
        )
        self.assertEqual(set(self.lines()), set(USERS) | set(names))

    def test_one_whose_name_is_no_longer_taken_is_removed(self) -> None:
        self.users.write_text(users_line("a b", "x") + users_line("puller", "x"), "utf-8")
        self.assertEqual(self.passwd("a b", "--delete"), (0, ""))
        self.assertEqual(set(self.lines()), {"puller"})

    def test_a_byte_order_mark_is_no_part_of_a_name(self) -> None:
        self.users.write_text("\ufeff" + users_line("alice", "x"), "utf-8")
        self.assertEqual(self.passwd("alice", password="secret"), (0, ""))
        self.assertEqual(set(self.lines()), {"alice"})
        self.serve()

    def test_a_running_registry_heeds_it(self) -> None:
        client = self.serve()
        self.passwd("alice", password="secret")
        self.assert_status(client.as_caller(basic("alice", "secret")).get("/v2/"), 200)
        self.passwd("alice", "--delete")
        self.assert_status(client.as_caller(basic("alice", "secret")).get("/v2/"), 401)

    def test_names_and_passwords_that_cannot_be(self) -> None:
        before = self.users.read_bytes()
        for name in (
            "",
            "a:b",
            ":",
            " a",
            "a ",
            "a b",
            "a\tb",
            "a\u00a0b",
            "a\nb",
            "a\x1bb",
            "#a",
            "a" * 256,
        ):
            with self.subTest(name):
                self.assert_refused(self.passwd(name, password="secret"))
        for password in ("", "\n", "a\0b", "\0", "a" * 4097):
            self.assert_refused(self.passwd("alice", password=password))
        self.assertEqual(self.users.read_bytes(), before)
        self.users = self.directory / "none" / "users.txt"
        self.assert_refused(self.passwd("alice", password="x"))

    @unittest.skipUnless(hasattr(os, "openpty"), "needs a pseudo-terminal")
    def test_a_terminal_is_asked_twice_and_shows_nothing(self) -> None:
        for second, status in ((b"secret\n", 0), (b"secreT\n", 1)):
            self.users.unlink(missing_ok=True)
            code, shown = self.on_a_terminal(b"secret\n", second)
            self.assertEqual(code, status, shown)
            self.assertEqual(shown.lower().count(b"secret"), 0, shown)
            self.assertEqual(self.users.exists(), status == 0)

    def on_a_terminal(self, *answers: bytes) -> tuple[int, bytes]:
        """Run passwd with a terminal for its input, answering each prompt; exit status and what was shown."""
        ours, theirs = os.openpty()
        command = [sys.executable, "registry.py", "passwd", "alice", "--users", str(self.users)]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        ) as process:
            os.close(theirs)
            shown, asked = b"", 0
            with contextlib.suppress(OSError):  # the end of a terminal is an error
                while received := os.read(ours, 1000):
                    shown += received
                    while asked < min(len(answers), shown.count(b":")):
                        os.write(ours, answers[asked])
                        asked += 1
            os.close(ours)
        return process.returncode, shown


def can_remount() -> bool:
    """Whether a mount namespace can be made here."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


class ReadOnlyTest(AccessTestCase):
    def fill(self) -> Client:
        self.data.path.mkdir(exist_ok=True)
        client = self.serve_anybody()
        self.image = client.push_image("latest")
        return client

    def writes(self, session: str) -> list[tuple[str, str]]:
        """A request for every route that changes something."""
        digest = digest_of(b"x")
        return [
            ("PUT", "manifests/latest"),
            ("DELETE", "manifests/latest"),
            ("DELETE", f"manifests/{self.image.digest}"),
            ("POST", "blobs/uploads/"),
            ("POST", f"blobs/uploads/?digest={digest}"),
            ("POST", f"blobs/uploads/?mount={digest_of(self.image.config)}&from=team/app"),
            ("PATCH", session),
            ("PUT", with_digest(session, digest)),
            ("DELETE", session),
            ("DELETE", f"blobs/{digest_of(self.image.config)}"),
        ]

    def assert_only_reads(self, client: Client, session: str) -> None:
        for method, path in self.writes(session):
            with self.subTest(method, path=path):
                body = b"x" if method in ("PUT", "POST", "PATCH") else None
                self.assert_error(client.request(method, path, body), 405, "UNSUPPORTED")
        self.assertEqual(client.get("manifests/latest").body, self.image.body)
        for blob in self.image.blobs:
            self.assertEqual(client.get(f"blobs/{digest_of(blob)}").body, blob)
            self.assertEqual(client.head(f"blobs/{digest_of(blob)}").status, 200)
        self.assertEqual(client.get("tags/list").json["tags"], ["latest"])
        self.assertEqual(client.get("/v2/_catalog").json["repositories"], ["team/app"])
        self.assertEqual(client.get(f"referrers/{self.image.digest}").status, 200)

    def test_every_write_is_405_and_every_read_works(self) -> None:
        session = self.fill().open_upload()
        client = self.serve(users=None, read_only=True)
        before = self.data.files(), self.data.unfinished()
        self.assert_only_reads(client, session)
        for path, methods in (("manifests/latest", "GET, HEAD"), ("blobs/uploads/", ""), (session, "")):
            self.assertEqual(client.request("BREW", path).headers["Allow"], methods)
            self.assertEqual(client.put(path, b"x").headers["Allow"], methods)
        self.assertEqual((self.data.files(), self.data.unfinished()), before)

    def test_users_are_asked_for_all_the_same(self) -> None:
        self.fill()
        client = self.serve(GRANTS, read_only=True)
        self.assert_status(client.get("manifests/latest"), 401)
        self.assert_status(client.as_caller(user("puller")).get("manifests/latest"), 200)
        token = client.as_caller(user("puller")).bearer("repository:team/app:pull")
        self.assert_status(client.as_caller(token).get("manifests/latest"), 200)
        self.assert_error(client.as_caller(user("deleter")).post("blobs/uploads/"), 405, "UNSUPPORTED")

    def test_it_needs_data_to_serve(self) -> None:
        options = ("--read-only", "--port", "0", "--data", str(self.directory / "absent"))
        done = python("registry.py", *options)
        self.assertEqual(done.returncode, 1, done)
        self.assertNotIn("Traceback", done.stderr)
        self.assertFalse((self.directory / "absent").exists())

    @unittest.skipUnless(can_remount(), "needs root's rights and unshare")
    def test_the_disk_may_be_read_only(self) -> None:
        session = self.fill().open_upload()
        self.resources.enter_context(self.daemon_on_read_only_disk())
        self.assert_only_reads(Client(self.host, "team/app"), session)

    @contextlib.contextmanager
    def daemon_on_read_only_disk(self) -> Iterator[None]:
        """A daemon to which the data directory is mounted read-only."""
        data, port = str(self.data.path), str(free_port())
        self.host = f"127.0.0.1:{port}"
        script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
        command = [sys.executable, str(ROOT / "registry.py"), "--read-only", "--port", port, "--data", data]
        with subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, "sh", data, *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            try:
                self.assertIn("Serving", process.stdout.readline())
                yield
            finally:
                process.kill()


if __name__ == "__main__":
    unittest.main()
