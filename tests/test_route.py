"""Routes and names: which paths there are, with which methods, and what a repository may be called."""

from __future__ import annotations

from tests.support import (
    HELLO,
    HELLO_DIGEST,
    Client,
    HTTPConnectionTestCase,
    digest_of,
    elapsed,
    encode,
    image_index,
    unique,
    with_digest,
)


class RoutesAndMethods(HTTPConnectionTestCase):
    """Paths and methods."""

    def test_the_root_answers(self) -> None:
        response = self.client.get("/v2/")
        self.assertEqual((response.status, response.json), (200, {}))
        self.assertEqual(self.client.get("/v2").json, {})
        self.assert_status(self.client.get("/v2/?ns=docker.io"), 200)

    def test_an_unknown_route_is_404(self) -> None:
        digest = self.client.push_blob(HELLO)
        for path in (
            "/",
            "/v1/",
            "/v2x/",
            "/V2/",
            "/favicon.ico",
            "/v2/unknown",
            "/v2/_catalog/",
            "/v2/_catalog/x",
            "/v2/blobs",
            "/v2/a",
            "/v2//tags/list",
            "/v2/manifests/x",
            self.client.path("unknown/x"),
            self.client.path("tags"),
            self.client.path("tags/x"),
            self.client.path("tags/list/"),
            self.client.path("manifests"),
            self.client.path(f"blobs/{digest}/"),
            self.client.path(f"blobs/{digest}/x"),
            self.client.path("Blobs/") + digest,
        ):
            for method in ("GET", "HEAD", "DELETE", "POST"):
                with self.subTest(path, method=method):
                    self.assertEqual(self.client.request(method, path).status, 404)

    def test_a_known_route_tells_its_methods(self) -> None:
        digest = self.client.push_blob(HELLO)
        session = self.client.open_upload()
        for path, methods in (
            ("/v2/", "POST PUT PATCH DELETE"),
            ("/v2/_catalog", "POST PUT PATCH DELETE"),
            (self.client.path("tags/list"), "POST PUT PATCH DELETE"),
            (self.client.path(f"referrers/{digest}"), "POST PUT PATCH DELETE"),
            (self.client.path("manifests/latest"), "POST PATCH"),
            (self.client.path(f"manifests/{digest}"), "POST PATCH"),
            (self.client.path(f"blobs/{digest}"), "POST PUT PATCH"),
            (self.client.path("blobs/uploads/"), "GET PUT PATCH DELETE"),
            (session, "POST"),
        ):
            for method in [*methods.split(), "BREW"]:
                with self.subTest(path, method=method):
                    response = self.client.request(method, path)
                    self.assert_error(response, 405)
                    allowed = [each.strip() for each in response.headers["Allow"].split(",")]
                    self.assertGreater(len(allowed), 0)
                    self.assertEqual(set(allowed) & set(methods.split()), set())
                    for each in set(allowed) - {"DELETE"}:
                        self.assertNotEqual(self.client.request(each, path).status, 405)

    def test_what_is_still_needed_tells_the_other_methods(self) -> None:
        image = self.client.push_image("latest")
        index = self.client.push_manifest(image_index([image.descriptor]))
        for path, methods in (
            (f"blobs/{digest_of(image.config)}", "GET, HEAD"),
            (f"manifests/{image.digest}", "GET, HEAD, PUT"),
        ):
            response = self.client.delete(path)
            self.assert_error(response, 405, "DENIED")
            self.assertEqual(response.headers["Allow"], methods)
        self.client.expect(202, "DELETE", f"manifests/{index}")

    def test_uploads_begin_without_a_slash_at_the_end_too(self) -> None:
        self.client.expect(202, "POST", "blobs/uploads")

    def test_an_encoded_slash_is_a_slash(self) -> None:
        encoded = self.client.repository.replace("/", "%2F")
        digest = self.client.push_blob(HELLO)
        for path in (
            f"/v2/{encoded}/blobs/{digest}",
            f"/v2%2F{encoded}/tags/list",
            f"/v2/{encoded}%2Ftags%2Flist",
        ):
            with self.subTest(path):
                self.assert_status(self.client.get(path), 200)


class NamesOfRepositories(HTTPConnectionTestCase):
    """Names of repositories."""

    GOOD = (
        *"a/blobs/uploads manifests/tags a/manifests/b a/tags/list a/referrers/b a/blobs/b blobs".split(),
        *"blobs/uploads uploads manifests tags tags/list referrers v2 v2/v2 catalog 0 a.b a_b a__b".split(),
        *"a-b a--b a---b-c.d_e__f a/b/c/d/e/f/g/h/i/j library/blobs/uploads/blobs/uploads".split(),
        "n" * 255,
        "n/" * 127 + "n",
    )
    BAD = (
        *"A aB a/B -a a- .a a. _a a_ a..b a___b a.-b a_.b a//b a/-b a%20b a%0A a%00 a:b a@b a+b a~b".split(),
        *"%C3%BC %D9%A3 %EF%BC%91".split(),
        "n" * 256,
        "n/" * 128 + "n",
    )

    def test_a_good_name_is_good_for_everything(self) -> None:
        for name in self.GOOD:
            with self.subTest(name[:60]):
                self.push_and_pull(self.client.at(name))

    def push_and_pull(self, client: Client) -> None:
        image = client.push_image("latest")
        location = client.open_upload()
        self.assertTrue(location.startswith(f"/v2/{client.repository}/blobs/uploads/"))
        content = unique()
        client.expect(202, "PATCH", location, content)
        client.expect(204, "GET", location)
        response = client.expect(201, "PUT", with_digest(location, digest_of(content)))
        self.assertEqual(response.headers["Location"], client.path(f"blobs/{digest_of(content)}"))
        client.expect(204, "DELETE", client.open_upload())
        self.assertEqual(client.get("manifests/latest").body, image.body)
        self.assertEqual(client.get(f"blobs/{digest_of(image.config)}").body, image.config)
        self.assertEqual(client.get("tags/list").json, {"name": client.repository, "tags": ["latest"]})
        self.assertEqual(client.get(f"referrers/{image.digest}").json["manifests"], [])
        client.expect(202, "DELETE", f"manifests/{image.digest}")

    def test_names_that_look_like_routes_are_told_apart(self) -> None:
        names = "x", "x/blobs", "x/blobs/uploads", "x/manifests", "x/tags", "x/tags/list"
        images = {name: self.client.at(name).push_image("latest") for name in names}
        for name, image in images.items():
            with self.subTest(name):
                client = self.client.at(name)
                self.assertEqual(client.get("manifests/latest").body, image.body)
                self.assertEqual(client.get("tags/list").json["name"], name)
                self.assert_blob(client, image.config)

    def test_a_write_to_a_bad_name_is_400(self) -> None:
        for name in self.BAD:
            for method, path, body in (
                ("POST", "blobs/uploads/", None),
                ("POST", f"blobs/uploads/?digest={HELLO_DIGEST}", HELLO),
                ("PATCH", "blobs/uploads/unheard-of", HELLO),
                ("PUT", f"blobs/uploads/unheard-of?digest={HELLO_DIGEST}", HELLO),
                ("PUT", "manifests/latest", encode(image_index([]))),
            ):
                with self.subTest(name[:60], method=method, path=path):
                    response = self.client.at(name).request(method, path, body)
                    self.assert_error(response, 400, "NAME_INVALID")

    def test_a_read_or_delete_with_a_bad_name_is_404(self) -> None:
        for name in self.BAD:
            for path in (
                f"blobs/{HELLO_DIGEST}",
                "manifests/latest",
                "tags/list",
                "blobs/uploads/unheard-of",
            ):
                for method in ("GET", "HEAD", "DELETE"):
                    if (method, path) not in (
                        ("DELETE", "tags/list"),
                        ("HEAD", "blobs/uploads/unheard-of"),
                    ):
                        with self.subTest(name[:60], method=method, path=path):
                            self.assertEqual(self.client.at(name).request(method, path).status, 404)

    def test_a_hostile_name_costs_no_time(self) -> None:
        self.assertLess(elapsed(lambda: self.client.get(f"/v2/{'a-' * 127}!/tags/list")), 1)

    def test_a_bad_name_comes_back_cut(self) -> None:
        for name in ("X" * 8000, "%F0%9F%98%80" * 600):
            response = self.client.post(f"/v2/{name}/blobs/uploads/")
            self.assert_error(response, 400, "NAME_INVALID")
            self.assertLess(len(response.json["errors"][0]["detail"]), 301)

    def test_a_path_that_is_not_utf_8_is_a_client_error(self) -> None:
        for name in ("%FF", "%C3", "%ED%A0%80", "a%80"):
            for path in (
                f"/v2/{name}/tags/list",
                f"/v2/{name}/blobs/uploads/",
                self.client.path(f"blobs/{name}"),
                self.client.path(f"manifests/{name}"),
                self.client.path(f"referrers/{name}"),
                self.client.path(f"blobs/uploads/?digest={name}"),
                self.client.path(f"tags/list?last={name}"),
                f"/{name}",
            ):
                for method in ("GET", "POST", "PUT", "DELETE"):
                    with self.subTest(path, method=method):
                        status = self.client.request(method, path).status
                        self.assertEqual(status, 400)
