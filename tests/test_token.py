"""Tokens: what the endpoint issues to whom, what they are good for, and how clients find it."""

from __future__ import annotations

import datetime
import re
import time
from unittest import mock
from urllib.parse import quote

import registry
from tests.access import GRANTS, AccessTestCase, user
from tests.credentials import AuthorizedClient, claims_of, users_line
from tests.support import RawConnection, digest_of, run_at_once


class TokensCarryRights(AccessTestCase):
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

    def test_whose_token_is_good_for_too_little_is_told_so(self) -> None:
        """Or docker would try the same again, for nearly a minute."""
        client = self.serve(GRANTS)
        token = client.as_caller(user("pusher")).bearer("repository:team/app:pull")
        for authorization, error in (("", None), (token, "insufficient_scope")):
            response = client.as_caller(authorization).post("blobs/uploads/")
            self.assertEqual(self.assert_challenge(response, client.host).get("error"), error)

    def test_what_the_endpoint_answers(self) -> None:
        client = self.serve().as_caller(user("puller"))
        before = int(time.time())
        response = client.get("/token?scope=repository:team/app:pull")
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

    def test_odd_scopes_are_ignored(self) -> None:
        client = self.serve(GRANTS).as_caller(user("deleter"))
        for scope in (
            "", "x", "repository", "repository:", "repository::pull", "repository:team/app:fly",
            "repository:../x:pull", "repository(plugin):team/app:pull", "registry:catalog:delete", ":::",
            "a:b:c:d:e", "registry:x:*", "repository:team/app:" + "pull," * 500, "repository:%00:pull",
        ):  # fmt: skip
            with self.subTest(scope[:40]):
                response = client.get(f"/token?scope={scope}")
                self.assert_status(response, 200)
                caller = client.as_caller(f"Bearer {response.json['token']}")
                self.assert_status(caller.post("blobs/uploads/"), 401)

    def test_a_form_is_answered_with_405_so_that_clients_go_on_with_get(self) -> None:
        for options in ({}, {"users": None}):
            response = self.serve(**options).post("/token", b"grant_type=password&username=puller&password=x")
            self.assert_error(response, 405, "UNSUPPORTED")
            self.assertEqual(response.headers["Allow"], "GET, HEAD")
            self.registry.close()

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
        self.assert_error(response, 401, "UNAUTHORIZED")

    def test_a_token_expires(self) -> None:
        client = self.serve().as_caller(user("puller"))
        mine = client.as_caller(client.bearer("repository:team/app:pull"))
        self.assert_error(mine.get("tags/list"), 404)
        for later, status in ((299, 404), (301, 401)):
            moment = time.time() + later
            with mock.patch.object(time, "time", return_value=moment):
                self.assert_status(mine.get("tags/list"), status)

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
            self.addCleanup(one.close)
        first, *others = (AuthorizedClient(one.netloc, "a", user("puller")) for one in running)
        token = first.bearer("repository:a:pull")
        for client in others:
            self.assert_error(client.as_caller(token).get("tags/list"), 404)

    def test_without_users_there_are_no_tokens(self) -> None:
        client = self.serve(users=None)
        self.assert_error(client.get("/token"), 404)
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
                    self.assert_status(response, 400 if name == "Host" else 401)
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
