"""Tags: setting several with a push, moving them, listing them page by page."""

from __future__ import annotations

from urllib.parse import unquote

from tests.manifests import ManifestTestCase
from tests.support import (
    BAD_COUNTS,
    HUGE_COUNTS,
    OCI_MANIFEST,
    RegistryTestCase,
    Response,
    digest_of,
    encode,
    pages,
)


class TagsAreSet(ManifestTestCase):
    """PUT by digest with ?tag=, and what may be a tag."""

    def push_with(self, body: bytes, tags: list[str], algorithm: str = "sha256") -> Response:
        query = "&".join(f"tag={tag}" for tag in tags)
        return self.put(body, f"{digest_of(body, algorithm)}?{query}")

    def test_every_tag_is_set_and_acknowledged(self) -> None:
        for algorithm in ("sha256", "sha512"):
            for count in (1, 2, 10):
                with self.subTest(algorithm, count=count):
                    body = encode(self.manifest(annotations={"n": f"{algorithm} {count}"}))
                    tags = [f"{algorithm}-{count}.{n}" for n in range(count)]
                    response = self.push_with(body, tags, algorithm)
                    self.assert_status(response, 201)
                    self.assertEqual(self.acknowledged(response), sorted(tags))
                    for tag in tags:
                        self.assert_served(tag, body, OCI_MANIFEST, digest_of(body, algorithm))

    def acknowledged(self, response: Response) -> list[str]:
        lines = ", ".join(response.headers.getall("OCI-Tag"))
        return sorted(tag.strip() for tag in lines.split(","))

    def test_a_tag_moves_here_from_another_manifest(self) -> None:
        first, second = encode(self.manifest()), encode(self.manifest(annotations={"n": "2"}))
        self.client.push_manifest(first, "tag")
        self.assert_status(self.push_with(second, ["tag"]), 201)
        self.assert_served("tag", second, OCI_MANIFEST)
        self.assert_served(digest_of(first), first, OCI_MANIFEST)

    def test_a_bad_tag_among_good_ones_stores_nothing(self) -> None:
        body = encode(self.manifest())
        for bad in ("-bad", "t" * 129, "a%2Fb", "a%0A", "sha256:abc"):
            with self.subTest(bad):
                self.assert_error(self.push_with(body, ["good", bad]), 400)
                self.assert_nothing_stored(body)
                self.assert_error(self.client.get("manifests/good"), 404)

    def test_more_tags_than_a_request_line_holds_are_414(self) -> None:
        body = encode(self.manifest())
        self.assert_status(self.push_with(body, ["t" * 120 + str(n) for n in range(100)]), 414)
        self.assert_nothing_stored(body)

    def test_legal_tags_are_accepted(self) -> None:
        body = encode(self.manifest())
        for tag in (
            "a",
            "_",
            "0",
            "A.b-c_D",
            "_-.",
            "t" * 128,
            f"sha256-{'a' * 64}",
            f"sha512-{'a' * 128}"[:128],
        ):
            with self.subTest(tag):
                self.assert_status(self.put(body, tag), 201)
                self.assert_served(tag, body, OCI_MANIFEST)

    def test_tags_are_told_apart_by_case(self) -> None:
        lower, upper = encode(self.manifest()), encode(self.manifest(annotations={"n": "2"}))
        self.client.push_manifest(lower, "tag")
        self.client.push_manifest(upper, "TAG")
        self.assert_served("tag", lower, OCI_MANIFEST)
        self.assert_served("TAG", upper, OCI_MANIFEST)

    def test_a_tag_moves_and_the_old_manifest_stays(self) -> None:
        bodies = [encode(self.manifest(annotations={"n": n})) for n in "1231"]
        for body in bodies:
            self.client.push_manifest(body, "tag")
            self.assert_served("tag", body, OCI_MANIFEST)
        for body in bodies:
            self.assert_served(digest_of(body), body, OCI_MANIFEST)


class TagsAreListed(RegistryTestCase):
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
            self.assertEqual(self.tags(f"?n={'0' * 30}{count}"), ordered[:count])

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
        for last in ("%00", "%C3%BC", "%20", "a%2Fb", "'%3B--", "%25", "x" * 5000):
            with self.subTest(last[:20]):
                listed = [tag for tag in self.TAGS if tag > unquote(last)]
                self.assertEqual(self.tags(f"?last={last}"), listed)
        for last in ("%FF", "%ED%A0%80"):  # not UTF-8
            with self.subTest(last):
                self.assert_error(self.client.get(f"tags/list?last={last}"), 400)

    def test_no_tags_are_listed_when_none_are_wanted(self) -> None:
        for query in ("?n=0", "?n=0&last=a"):
            with self.subTest(query):
                response = self.client.get(f"tags/list{query}")
                self.assertEqual(response.json, {"name": self.client.repository, "tags": []})
                self.assertNotIn("Link", response.headers)

    def test_more_than_there_are_gives_all(self) -> None:
        for count in (*HUGE_COUNTS, "9" * 6000):
            with self.subTest(count[:40]):
                self.assertEqual(len(self.tags(f"?n={count}")), len(self.TAGS))

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
