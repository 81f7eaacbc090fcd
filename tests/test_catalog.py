"""The catalog: every repository, page by page."""

from __future__ import annotations

from urllib.parse import quote

from registry import Registry
from tests.support import BAD_COUNTS, HUGE_COUNTS, Client, HTTPTestCase, digest_of, pages, unique


class RepositoriesAreListed(HTTPTestCase):
    NAMES = ("0", "a", "a-b", "a.b", "a/b", "a/b/c", "a1", "a_b", "ab", "b/blobs/uploads", "z")

    def setUp(self) -> None:
        self.client = Client(self.enter(Registry()).netloc)

    def push(self) -> None:
        for name in reversed(self.NAMES):
            self.client.at(name).push_image("latest")

    def catalog(self, query: str = "") -> list[str]:
        return self.client.expect(200, "GET", f"/v2/_catalog{query}").json["repositories"]

    def test_an_empty_registry_has_an_empty_catalog(self) -> None:
        self.assertEqual(self.client.get("/v2/_catalog").json, {"repositories": []})

    def test_repositories_are_listed_in_byte_order_page_by_page(self) -> None:
        self.push()
        ordered = sorted(self.NAMES, key=str.encode)
        self.assertEqual(self.catalog(), ordered)
        for count in (1, 3, 10, 11, 100):
            with self.subTest(count):
                found = pages(self.client, f"/v2/_catalog?n={count}", "repositories")
                self.assertEqual([name for page in found for name in page], ordered)
                self.assertEqual(found[0], ordered[:count])
                self.assertGreater(len(found[-1]), 0)

    def test_last_is_where_the_catalog_goes_on(self) -> None:
        self.push()
        ordered = sorted(self.NAMES, key=str.encode)
        for last in (*ordered, "a/a", "aa", "zz", ""):
            with self.subTest(last):
                expected = [name for name in ordered if name > last]
                for encoded in (last, quote(last, safe="")):
                    self.assertEqual(self.catalog(f"?last={encoded}"), expected)
                    self.assertEqual(self.catalog(f"?n=2&last={encoded}"), expected[:2])

    def test_counts_mean_what_they_mean_for_tags(self) -> None:
        self.push()
        response = self.client.get("/v2/_catalog?n=0")
        self.assertEqual(response.json, {"repositories": []})
        self.assertNotIn("Link", response.headers)
        for count in HUGE_COUNTS:
            self.assertEqual(len(self.catalog(f"?n={count}")), len(self.NAMES))
        for count in BAD_COUNTS:
            with self.subTest(count):
                self.assert_error(self.client.get(f"/v2/_catalog?n={count}"), 400)

    def test_what_was_never_pushed_is_not_listed(self) -> None:
        client = self.client.at("never/pushed")
        client.get("tags/list")
        client.get(f"blobs/{digest_of(b'')}")
        client.get(f"referrers/{digest_of(b'')}")
        client.post(f"blobs/uploads/?digest={digest_of(b'')}", unique())
        client.put_manifest(b"not JSON", "tag", "application/json")
        self.assertEqual(self.catalog(), [])
