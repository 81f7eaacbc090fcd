"""Listing tags and repositories, page by page."""

from __future__ import annotations

import re
import tempfile
from urllib.parse import quote, urljoin

from registry import Registry
from tests.support import Client, HTTPTestCase, RegistryTestCase, Response, digest_of, unique

BAD_COUNTS = (
    "-1",
    "-0x1",
    "abc",
    "1.5",
    "1e3",
    "0x1",
    "1_000",
    "%201%20",
    "%D9%A3",
    "%C2%B2",
    "1%00",
    "1,2",
)
HUGE_COUNTS = ("99999", str(2**63), str(10**30))


def next_page(response: Response) -> str | None:
    """Where the Link of a listing leads, seen from the page it came with."""
    if "Link" not in response.headers:
        return None
    link = re.fullmatch(r'<([^<>]+)>; ?rel="?next"?', response.headers["Link"])
    if link is None:
        raise AssertionError(f"malformed Link: {response}")
    return urljoin(response.request.partition(" ")[2], link[1])


def pages(client: Client, path: str, member: str) -> list[list[str]]:
    """Every page of a listing, by following its links."""
    found = []
    following: str | None = client.path(path)
    while following:
        response = client.expect(200, "GET", following)
        found.append(response.json[member])
        following = next_page(response)
        if len(found) > 100:
            raise AssertionError(f"the pages do not end: {found[:5]}")
    return found


class TagListTest(RegistryTestCase):
    TAGS = ("0", "1.0", "A", "B", "Z", "_", "a", "a-b", "a.b", "a1", "a_b", "b")

    def setUp(self) -> None:
        super().setUp()
        self.image = self.client.push_image()
        for tag in reversed(self.TAGS):
            self.client.push_manifest(self.image.body, tag)

    def tags(self, query: str) -> list[str]:
        return self.client.expect(200, "GET", f"tags/list{query}").json["tags"]

    def test_the_tags_are_listed_in_byte_order(self) -> None:
        response = self.client.get("tags/list")
        self.assert_status(response, 200)
        self.assertEqual(response.headers["Content-Type"].partition(";")[0], "application/json")
        ordered = sorted(self.TAGS, key=str.encode)
        self.assertEqual(response.json, {"name": self.client.repository, "tags": ordered})
        self.assertNotIn("Link", response.headers)

    def test_n_gives_exactly_so_many(self) -> None:
        ordered = sorted(self.TAGS, key=str.encode)
        for count in range(1, len(ordered) + 1):
            self.assertEqual(self.tags(f"?n={count}"), ordered[:count])

    def test_a_link_leads_to_the_next_page(self) -> None:
        ordered = sorted(self.TAGS, key=str.encode)
        for count in (1, 2, 5, 11):
            with self.subTest(count):
                found = pages(self.client, f"tags/list?n={count}", "tags")
                self.assertEqual([tag for page in found for tag in page], ordered)
                self.assertEqual({len(page) for page in found[:-1]}, {count})
                self.assertGreater(len(found[-1]), 0)

    def test_a_listing_that_is_not_cut_has_no_link(self) -> None:
        for query in (
            "?n=12",
            "?n=13",
            *(f"?n={count}" for count in HUGE_COUNTS),
            "?n=1&last=a_b",
            "?last=a",
        ):
            with self.subTest(query):
                self.assertNotIn("Link", self.client.get(f"tags/list{query}").headers)

    def test_last_is_where_the_listing_goes_on(self) -> None:
        for last, expected in (
            ("a", ["a-b", "a.b", "a1", "a_b", "b"]),
            ("a_b", ["b"]),
            ("aa", ["b"]),
            ("C", ["Z", "_", "a", "a-b", "a.b", "a1", "a_b", "b"]),
            ("b", []),
            ("zzz", []),
            ("-", list(self.TAGS)),
            ("", list(self.TAGS)),
        ):
            with self.subTest(last):
                self.assertEqual(self.tags(f"?last={last}"), expected)
                self.assertEqual(self.tags(f"?n=2&last={last}"), expected[:2])
                self.assertEqual(self.tags(f"?last={last}&n=1"), expected[:1])

    def test_an_odd_last_does_no_harm(self) -> None:
        for last in ("%00", "%FF", "%C3%BC", "%20", "a%2Fb", "'%3B--", "%25", "x" * 5000, "%ED%A0%80"):
            with self.subTest(last[:20]):
                self.assert_status(self.client.get(f"tags/list?last={last}"), 200, 400)

    def test_no_tags_are_listed_when_none_are_wanted(self) -> None:
        for query in ("?n=0", "?n=0&last=a"):
            with self.subTest(query):
                response = self.client.get(f"tags/list{query}")
                self.assertEqual(response.json, {"name": self.client.repository, "tags": []})
                self.assertNotIn("Link", response.headers)

    def test_more_than_there_are_gives_all(self) -> None:
        for count in HUGE_COUNTS:
            with self.subTest(count):
                self.assertEqual(len(self.tags(f"?n={count}")), len(self.TAGS))
        self.assert_status(self.client.get("tags/list?n=" + "9" * 6000), 200, 400)

    def test_a_count_that_is_none_is_400(self) -> None:
        for count in BAD_COUNTS:
            with self.subTest(count):
                self.assert_error(self.client.get(f"tags/list?n={count}"), 400)

    def test_a_deleted_tag_is_not_listed(self) -> None:
        self.client.expect(202, "DELETE", "manifests/a")
        self.assertNotIn("a", self.tags(""))
        self.assertEqual(self.tags("?n=1&last=_"), ["a-b"])

    def test_a_repository_without_tags_has_an_empty_list(self) -> None:
        self.client.expect(202, "DELETE", f"manifests/{self.image.digest}")
        self.other.push_image()
        for client in (self.client, self.other):
            response = client.get("tags/list")
            self.assert_status(response, 200)
            self.assertEqual(response.json, {"name": client.repository, "tags": []})

    def test_the_tags_of_others_are_not_listed(self) -> None:
        self.other.push_image("theirs")
        self.assertNotIn("theirs", self.tags(""))
        self.assertEqual(self.other.get("tags/list").json["tags"], ["theirs"])

    def test_an_unknown_repository_has_no_list(self) -> None:
        for query in ("", "?n=1", "?n=0", "?last=a"):
            with self.subTest(query):
                response = self.client.at("unheard/of").get(f"tags/list{query}")
                self.assert_error(response, 404, "NAME_UNKNOWN")


class CatalogTest(HTTPTestCase):
    NAMES = ("0", "a", "a-b", "a.b", "a/b", "a/b/c", "a1", "a_b", "ab", "b/blobs/uploads", "z")

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        registry = Registry(data=directory.name)
        self.client = Client(registry.__enter__().netloc)
        self.addCleanup(registry.__exit__, None, None, None)

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
