"""Grants: which repositories a pattern means, who may do what there, and what a mount needs."""

from __future__ import annotations

import contextlib
import io

import registry
from tests.access import AccessTestCase, user
from tests.credentials import AuthorizedClient, basic, claims_of, users_line
from tests.support import Client, digest_of, unique


class GrantsGiveRights(AccessTestCase):
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
        access = self.access(str(self.grants))
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
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            self.change(self.grants, "puller ** fly\n")
            self.assert_error(client.get("tags/list"), 404)
            self.grants.unlink()
            self.assert_error(client.get("tags/list"), 404)
        self.assertIn("grants.txt", errors.getvalue())

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
