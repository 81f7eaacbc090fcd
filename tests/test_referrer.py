"""Referrers: what is listed, how it is described, filtered and cut into pages."""

from __future__ import annotations

from typing import Any
from unittest import mock
from urllib.parse import quote

import registry
from tests.support import (
    MALFORMED_DIGESTS,
    MEBIBYTE,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
    RegistryTestCase,
    Response,
    descriptor,
    digest_of,
    encode,
    image_index,
    image_manifest,
    next_page,
)

SBOM = "application/vnd.example.sbom+json"
SIGNATURE = "application/vnd.example.signature.v1+json"
EMPTY = descriptor(b"{}", OCI_EMPTY)


class ReferrerTestCase(RegistryTestCase):
    """A repository with an image to refer to."""

    def setUp(self) -> None:
        super().setUp()
        self.client.push_blob(b"{}")
        self.subject = self.client.push_image("subject")

    def push(self, manifest: dict, reference: str = "", subject: dict | None = None) -> dict:
        """Push a referrer and return the descriptor of its bytes."""
        manifest = {**manifest, "subject": subject or self.subject.descriptor}
        self.client.push_manifest(manifest, reference)
        return descriptor(encode(manifest), manifest["mediaType"])

    def listing(self, digest: str = "", query: str = "") -> Response:
        """A listing in the only form there is."""
        response = self.client.get(f"referrers/{digest or self.subject.digest}{query}")
        self.assert_status(response, 200)
        self.assertEqual(response.headers["Content-Type"], OCI_INDEX)
        self.assertEqual(response.json["schemaVersion"], 2)
        self.assertEqual(response.json["mediaType"], OCI_INDEX)
        return response

    def referrers(self, digest: str = "", query: str = "") -> list[dict]:
        return self.listing(digest, query).json["manifests"]

    def digests(self, digest: str = "", query: str = "") -> list[str]:
        return sorted(entry["digest"] for entry in self.referrers(digest, query))


class ReferrersAreListed(ReferrerTestCase):
    def test_no_referrers_are_an_empty_index(self) -> None:
        for digest in (self.subject.digest, digest_of(b"unknown"), digest_of(b"unknown", "sha512")):
            with self.subTest(digest):
                self.assertEqual(self.referrers(digest), [])

    def test_an_unknown_repository_has_no_referrers(self) -> None:
        response = self.client.at("unheard/of").get(f"referrers/{digest_of(b'unknown')}")
        self.assert_status(response, 200)
        self.assertEqual(response.headers["Content-Type"], OCI_INDEX)
        self.assertEqual(response.json["manifests"], [])

    def test_a_malformed_digest_is_400(self) -> None:
        for digest in (*MALFORMED_DIGESTS, "subject"):
            with self.subTest(digest):
                self.assert_error(self.client.get(f"referrers/{digest}"), 400, "DIGEST_INVALID")

    def test_a_referrer_is_described_by_its_manifest(self) -> None:
        config = descriptor(b"{}", OCI_CONFIG)
        annotations = {"org.example.key": "value \u00fc", "a": ""}
        for name, manifest, artifact_type in (
            ("typed image", image_manifest(EMPTY, artifactType=SBOM), SBOM),
            ("untyped image", image_manifest(config), OCI_CONFIG),
            ("empty type", image_manifest(config, artifactType=""), OCI_CONFIG),
            ("annotated image", image_manifest(config, annotations=annotations), OCI_CONFIG),
            ("typed index", image_index([], artifactType=SIGNATURE, annotations=annotations), SIGNATURE),
            ("untyped index", image_index([]), None),
        ):
            with self.subTest(name):
                expected: dict[str, Any] = self.push(manifest)
                if artifact_type is not None:
                    expected["artifactType"] = artifact_type
                if "annotations" in manifest:
                    expected["annotations"] = manifest["annotations"]
                self.assertEqual(self.referrers(), [expected])
                self.client.expect(202, "DELETE", f"manifests/{expected['digest']}")

    def test_a_subject_need_not_be_there(self) -> None:
        for algorithm in ("sha256", "sha512"):
            with self.subTest(algorithm):
                absent = descriptor(b"absent", OCI_MANIFEST, algorithm)
                pushed = self.push(image_manifest(EMPTY), subject=absent)
                self.assertEqual(self.digests(absent["digest"]), [pushed["digest"]])

    def test_referrers_outlive_their_subject(self) -> None:
        pushed = self.push(image_manifest(EMPTY))
        self.client.expect(202, "DELETE", f"manifests/{self.subject.digest}")
        self.assertEqual(self.digests(), [pushed["digest"]])

    def test_a_referrer_pushed_several_ways_is_listed_once(self) -> None:
        manifest = image_manifest(EMPTY)
        for reference in ("", "one", "two", ""):
            pushed = self.push(manifest, reference)
        self.assertEqual(self.digests(), [pushed["digest"]])

    def test_a_referrer_with_sha512_is_listed_under_it(self) -> None:
        body = encode(image_manifest(EMPTY, subject=self.subject.descriptor))
        digest = digest_of(body, "sha512")
        self.client.expect(201, "PUT", f"manifests/{digest}", body, {"Content-Type": OCI_MANIFEST})
        self.assertEqual(self.digests(), [digest])

    def test_a_deleted_referrer_is_not_listed(self) -> None:
        kept, deleted = (self.push(image_manifest(EMPTY, artifactType=kind)) for kind in (SBOM, SIGNATURE))
        self.client.expect(202, "DELETE", f"manifests/{deleted['digest']}")
        self.assertEqual(self.digests(), [kept["digest"]])

    def test_a_referrer_that_loses_its_tag_stays_listed(self) -> None:
        pushed = self.push(image_manifest(EMPTY), "tag")
        self.client.expect(202, "DELETE", "manifests/tag")
        self.assertEqual(self.digests(), [pushed["digest"]])

    def test_referrers_belong_to_their_repository(self) -> None:
        self.other.push_blob(b"{}")
        self.other.push_manifest(image_manifest(EMPTY, subject=self.subject.descriptor))
        self.assertEqual(self.referrers(), [])

    def test_a_refused_referrer_is_not_listed(self) -> None:
        missing = descriptor(b"missing", OCI_CONFIG)
        response = self.client.put_manifest(image_manifest(missing, subject=self.subject.descriptor))
        self.assert_error(response, 400, "MANIFEST_BLOB_UNKNOWN")
        self.assertEqual(self.referrers(), [])

    def test_a_referrer_may_have_referrers(self) -> None:
        first = self.push(image_manifest(EMPTY))
        second = self.push(image_manifest(EMPTY), subject=first)
        self.assertEqual(self.digests(), [first["digest"]])
        self.assertEqual(self.digests(first["digest"]), [second["digest"]])


class FilteredByType(ReferrerTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.by_type: dict[str, dict] = {
            kind: self.push(image_manifest(EMPTY, artifactType=kind)) for kind in (SBOM, SIGNATURE)
        }
        self.by_type[OCI_CONFIG] = self.push(image_manifest(descriptor(b"{}", OCI_CONFIG)))
        self.untyped = self.push(image_index([]))

    def test_a_filter_leaves_one_type(self) -> None:
        for kind, pushed in self.by_type.items():
            for value in (quote(kind, safe=""), quote(kind, safe="/")):
                with self.subTest(value):
                    response = self.listing(query=f"?artifactType={value}")
                    self.assertEqual([m["digest"] for m in response.json["manifests"]], [pushed["digest"]])
                    self.assertEqual(response.headers["OCI-Filters-Applied"], "artifactType")

    def test_a_filter_that_fits_nothing_leaves_nothing(self) -> None:
        for value in ("application/unheard-of", quote(SBOM.upper(), safe=""), quote(SBOM, safe="")[:-1]):
            with self.subTest(value):
                response = self.listing(query=f"?artifactType={value}")
                self.assertEqual(response.json["manifests"], [])
                self.assertEqual(response.headers["OCI-Filters-Applied"], "artifactType")

    def test_without_a_filter_none_is_said_to_be_applied(self) -> None:
        response = self.listing()
        self.assertNotIn("OCI-Filters-Applied", response.headers)
        expected = [self.untyped["digest"], *(pushed["digest"] for pushed in self.by_type.values())]
        self.assertEqual(self.digests(), sorted(expected))

    def test_a_filter_on_no_referrers_is_an_empty_index(self) -> None:
        query = f"?artifactType={quote(SBOM, safe='')}"
        self.assertEqual(self.referrers(digest_of(b"unknown"), query), [])


class FallbackTags(ReferrerTestCase):
    """Clients that kept the list themselves, in an index tagged after the subject."""

    def tag_index(self, entries: list[dict]) -> None:
        self.client.push_manifest(image_index(entries), self.subject.digest.replace(":", "-"))

    def test_such_an_index_adds_nothing_that_has_no_subject(self) -> None:
        pushed = self.push(image_manifest(EMPTY, annotations={"pushed by": "an old client"}))
        stray = image_manifest(EMPTY, annotations={"refers to": "nothing"})
        self.client.push_manifest(stray)
        self.tag_index([pushed, descriptor(encode(stray), OCI_MANIFEST, artifactType=SBOM)])
        self.assertEqual(self.digests(), [pushed["digest"]])

    def test_what_is_listed_both_ways_is_listed_once(self) -> None:
        both = self.push(image_manifest(EMPTY, artifactType=SBOM))
        own = self.push(image_manifest(EMPTY, artifactType=SIGNATURE))
        self.tag_index([{**both, "artifactType": SBOM}])
        self.assertEqual(self.digests(), sorted([both["digest"], own["digest"]]))
        query = f"?artifactType={quote(SBOM, safe='')}"
        self.assertEqual(self.digests(query=query), [both["digest"]])

    def test_a_tag_like_that_need_not_be_such_an_index(self) -> None:
        tag = self.subject.digest.replace(":", "-")
        pushed = self.push(image_manifest(EMPTY))
        self.client.push_manifest(self.subject.body, tag)
        self.assertEqual(self.digests(), [pushed["digest"]])
        self.client.expect(202, "DELETE", f"manifests/{tag}")
        self.assertEqual(self.digests(), [pushed["digest"]])


class ReferrersComeInPages(ReferrerTestCase):
    """More referrers than fit on a page."""

    COUNT, FEW = 460, 300

    def push_many(self, numbers: range) -> dict[str, list[str]]:
        pushed: dict[str, list[str]] = {SBOM: [], SIGNATURE: []}
        with self.client.keep_alive() as client:
            for number in numbers:
                kind = SBOM if number % 12 else SIGNATURE
                manifest = image_manifest(
                    EMPTY,
                    artifactType=kind,
                    annotations={"n": str(number)},
                    subject=self.subject.descriptor,
                )
                pushed[kind].append(client.push_manifest(manifest))
        return pushed

    def all_pages(self, query: str = "") -> list[str]:
        """The digests on all pages, in the order they come."""
        response = self.listing(query=query)
        digests = [entry["digest"] for entry in response.json["manifests"]]
        while next_page(response):
            response = self.client.expect(200, "GET", next_page(response) or "")
            self.assertEqual(response.headers["Content-Type"], OCI_INDEX)
            self.assertEqual("OCI-Filters-Applied" in response.headers, bool(query))
            self.assertGreater(len(response.json["manifests"]), 0)
            digests += [entry["digest"] for entry in response.json["manifests"]]
        return digests

    def test_several_hundred_fit_on_a_page_and_more_are_linked(self) -> None:
        pushed = self.push_many(range(self.FEW))
        response = self.listing()
        self.assertNotIn("Link", response.headers)
        self.assertEqual(len(response.json["manifests"]), self.FEW)
        for kind, more in self.push_many(range(self.FEW, self.COUNT)).items():
            pushed[kind] += more
        self.patch(REFERRER_PAGE_LIMIT=200)
        self.assertEqual(sorted(self.all_pages()), sorted(pushed[SBOM] + pushed[SIGNATURE]))
        for kind, expected in pushed.items():
            digests = self.all_pages(f"?artifactType={quote(kind, safe='')}")
            self.assertEqual(sorted(digests), sorted(expected))

    def test_a_page_that_is_just_full_links_to_no_other(self) -> None:
        with mock.patch.object(registry, "REFERRER_PAGE_LIMIT", 3):
            self.push_many(range(3))
            response = self.listing()
            self.assertEqual(len(response.json["manifests"]), 3)
            self.assertNotIn("Link", response.headers)
            self.push_many(range(3, 4))
            self.assertIn("Link", self.listing().headers)
            self.assertEqual(len(self.all_pages()), 4)

    def test_a_page_is_bounded_by_its_whole_length(self) -> None:
        """Three mebibytes, or one descriptor that is longer."""
        for name, count, length, artifact_type in (
            ("long annotations", 8, 1_000_000, SBOM),
            ("one on each page", 2, 3_500_000, SBOM),
            ("long types", 160, 17_000, "\U0001f600" * 255),
        ):
            with self.subTest(name):
                subject = descriptor(name.encode(), OCI_MANIFEST)
                for number in range(count):
                    annotations = {"a": "x" * length, "n": str(number)}
                    manifest = image_manifest(EMPTY, annotations=annotations, artifactType=artifact_type)
                    self.push(manifest, subject=subject)
                path, found = f"referrers/{subject['digest']}", 0
                while path:
                    response = self.client.expect(200, "GET", path)
                    listed = response.json["manifests"]
                    self.assertTrue(len(response.body) < 3 * MEBIBYTE + 500 or len(listed) == 1)
                    self.assertGreater(len(listed), 0)
                    found += len(listed)
                    path = next_page(response) or ""
                self.assertEqual(found, count)
