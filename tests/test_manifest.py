"""Manifests: what is accepted, how it is served, under which type, and which kinds there are."""

from __future__ import annotations

import json

from tests.manifests import ManifestTestCase
from tests.support import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MEBIBYTE,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
    Response,
    descriptor,
    digest_of,
    encode,
    image_index,
    image_manifest,
    unique,
)


class ManifestsAreServedAsPushed(ManifestTestCase):
    """What is accepted, and what comes back."""

    def test_every_kind_of_manifest_is_served_as_pushed(self) -> None:
        child = descriptor(encode(self.manifest()), OCI_MANIFEST)
        self.client.push_manifest(self.manifest())
        unknown = "application/vnd.example.thing.v7+json"
        for name, manifest in {
            "image": self.manifest(),
            "docker image": self.manifest(mediaType=DOCKER_MANIFEST),
            "unheard-of image": self.manifest(mediaType=unknown),
            "artifact": self.manifest(artifactType="application/vnd.example.sbom"),
            "no layers": self.manifest(layers=[]),
            "repeated layer": self.manifest(layers=[descriptor(self.layer)] * 3),
            "config that is a layer": self.manifest(layers=[descriptor(self.CONFIG)]),
            "unknown members": self.manifest(x=[1, {"y": None}], extra="\u00fc\u4e16\U0001f600"),
            "annotations": self.manifest(annotations={"org.example": "\u00fc", "": ""}),
            "data": self.manifest(config=descriptor(b"{}", OCI_EMPTY, data="e30=")),
            "index": image_index([child]),
            "docker list": image_index([child], mediaType=DOCKER_LIST),
            "unheard-of index": image_index([child], mediaType=unknown),
            "empty index": image_index([]),
            "repeated child": image_index([child, {**child, "platform": {"os": "linux"}}]),
            "attestation": image_index([{**child, "platform": {"os": "unknown", "architecture": "unknown"}}]),
        }.items():
            with self.subTest(name):
                body = encode(manifest)
                response = self.put(body, "tag", manifest["mediaType"])
                self.assert_created(response, digest_of(body))
                for reference in ("tag", digest_of(body)):
                    self.assert_served(reference, body, manifest["mediaType"])

    def assert_created(self, response: Response, digest: str) -> None:
        self.assert_status(response, 201)
        location = f"/v2/{self.client.repository}/manifests/{digest}"
        self.assertEqual(response.headers["Location"], location)
        self.assertEqual(response.headers["Docker-Content-Digest"], digest)
        self.assert_status(self.client.get(response.headers["Location"]), 200)

    def test_an_index_of_indexes_is_an_index(self) -> None:
        child = self.manifest()
        self.client.push_manifest(child)
        inner = image_index([descriptor(encode(child), OCI_MANIFEST)])
        self.client.push_manifest(inner)
        outer = image_index([descriptor(encode(inner), OCI_INDEX)])
        self.client.push_manifest(outer, "tag")
        self.assert_served("tag", encode(outer), OCI_INDEX)

    def test_not_a_byte_is_changed(self) -> None:
        text = json.dumps(self.manifest(annotations={"a": "\u00fc"}), indent=5, ensure_ascii=False)
        for body in (f"\n\t {text} \r\n\n".encode(), text.replace("\n", "\r\n").encode()):
            with self.subTest(body):
                self.assert_status(self.put(body), 201)
                self.assert_served("tag", body, OCI_MANIFEST)

    def test_the_last_of_two_members_of_one_name_counts(self) -> None:
        body = encode(self.manifest()).replace(b'"layers"', b'"layers": [], "layers"')
        self.assert_status(self.put(body), 201)
        self.assert_served("tag", body, OCI_MANIFEST)
        self.assert_error(self.client.delete(f"blobs/{digest_of(self.layer)}"), 405, "DENIED")

    def test_the_body_may_be_chunked(self) -> None:
        body = encode(self.manifest())
        pieces = iter([body[:1], body[1:50], body[50:]])
        response = self.client.put("manifests/tag", pieces, {"Content-Type": OCI_MANIFEST})
        self.assert_created(response, digest_of(body))
        self.assert_served("tag", body, OCI_MANIFEST)

    def test_a_manifest_may_be_pushed_by_digest(self) -> None:
        for algorithm in ("sha256", "sha512"):
            body = encode(self.manifest(annotations={"algorithm": algorithm}))
            digest = digest_of(body, algorithm)
            for reference in (digest, digest.replace(":", "%3A")):
                with self.subTest(reference):
                    self.assert_created(self.put(body, reference), digest)
                    self.assert_served(digest, body, OCI_MANIFEST, digest)

    def test_one_manifest_may_have_a_digest_of_each_algorithm(self) -> None:
        body = encode(self.manifest())
        for algorithm in ("sha256", "sha512"):
            self.assert_created(self.put(body, digest_of(body, algorithm)), digest_of(body, algorithm))
        for algorithm in ("sha256", "sha512"):
            digest = digest_of(body, algorithm)
            self.assert_served(digest, body, OCI_MANIFEST, digest)

    def test_descriptors_may_use_sha512(self) -> None:
        config, layer = unique("config"), unique("layer")
        for content in (config, layer):
            self.client.push_blob(content, "sha512")
        manifest = image_manifest(
            descriptor(config, OCI_CONFIG, "sha512"), [descriptor(layer, algorithm="sha512")]
        )
        child = encode(manifest)
        self.client.expect(
            201, "PUT", f"manifests/{digest_of(child, 'sha512')}", child, {"Content-Type": OCI_MANIFEST}
        )
        index = image_index([descriptor(child, OCI_MANIFEST, "sha512")])
        self.assert_status(self.put(index, "tag", OCI_INDEX), 201)
        self.assert_served("tag", encode(index), OCI_INDEX)

    def test_the_same_manifest_again_changes_nothing(self) -> None:
        body = encode(self.manifest())
        for _ in range(3):
            self.assert_created(self.put(body), digest_of(body))
        self.assertEqual(self.client.get("tags/list").json["tags"], ["tag"])

    def test_a_manifest_is_served_whatever_is_accepted(self) -> None:
        body = encode(self.manifest())
        self.put(body)
        for accept in (
            [],
            [("Accept", "*/*")],
            [("Accept", OCI_INDEX)],
            [("Accept", "text/html;q=0.9, image/png")],
            [("Accept", DOCKER_LIST), ("Accept", DOCKER_MANIFEST), ("Accept", OCI_MANIFEST)],
            [("Accept", "")],
        ):
            with self.subTest(accept):
                response = self.client.get("manifests/tag", accept)
                self.assertEqual((response.status, response.body), (200, body))
                self.assertEqual(response.headers["Content-Type"], OCI_MANIFEST)

    def test_a_subject_is_acknowledged_by_its_digest(self) -> None:
        for algorithm in ("sha256", "sha512"):
            subject = descriptor(b"never pushed", OCI_MANIFEST, algorithm)
            for manifest in (self.manifest(subject=subject), image_index([], subject=subject)):
                for reference in ("tag", ""):
                    with self.subTest(manifest["mediaType"], algorithm=algorithm, reference=reference):
                        response = self.client.put_manifest(manifest, reference)
                        self.assert_status(response, 201)
                        self.assertEqual(response.headers["OCI-Subject"], subject["digest"])

    def test_no_subject_is_acknowledged_when_there_is_none(self) -> None:
        self.assertNotIn("OCI-Subject", self.put(self.manifest()).headers)


class MediaTypesAreKept(ManifestTestCase):
    """Which type a manifest is stored and served with."""

    def test_a_missing_media_type_is_the_content_type(self) -> None:
        self.client.push_manifest(self.manifest())
        child = descriptor(encode(self.manifest()), OCI_MANIFEST)
        for manifest, kind in (
            (self.manifest(mediaType=None), OCI_MANIFEST),
            (self.manifest(mediaType=None, annotations={"n": "2"}), DOCKER_MANIFEST),
            (self.manifest(mediaType=None, annotations={"n": "3"}), "application/vnd.example+json"),
            ({"schemaVersion": 2, "manifests": [child]}, OCI_INDEX),
            ({"schemaVersion": 2, "manifests": [child], "annotations": {}}, DOCKER_LIST),
        ):
            with self.subTest(kind):
                self.assert_status(self.put(manifest, "tag", kind), 201)
                self.assert_served("tag", encode(manifest), kind)

    def test_parameters_of_the_content_type_are_dropped(self) -> None:
        manifests = self.manifest(), self.manifest(mediaType=None)
        for parameters in ("; charset=utf-8", ";charset=UTF-8", ' ; a="b;c"', ";"):
            for manifest in manifests:
                with self.subTest(parameters, own="mediaType" in manifest):
                    self.assert_status(self.put(manifest, "tag", OCI_MANIFEST + parameters), 201)
                    self.assert_served("tag", encode(manifest), OCI_MANIFEST)

    def test_differing_types_are_refused(self) -> None:
        for own, sent in (
            (OCI_MANIFEST, OCI_INDEX),
            (OCI_MANIFEST, DOCKER_MANIFEST),
            (OCI_MANIFEST, "application/json"),
            (OCI_MANIFEST, OCI_MANIFEST + "x"),
            (DOCKER_MANIFEST, OCI_MANIFEST),
        ):
            with self.subTest(own, sent=sent):
                manifest = self.manifest(mediaType=own)
                self.assert_error(self.put(manifest, "tag", sent), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(encode(manifest))

    def test_each_repository_keeps_the_type_it_was_given(self) -> None:
        body = encode(self.manifest(mediaType=None))
        for content in (self.CONFIG, self.layer):
            self.other.push_blob(content)
        self.client.push_manifest(body, "tag", OCI_MANIFEST)
        self.other.push_manifest(body, "tag", DOCKER_MANIFEST)
        self.assertEqual(self.client.get("manifests/tag").headers["Content-Type"], OCI_MANIFEST)
        self.assertEqual(self.other.get("manifests/tag").headers["Content-Type"], DOCKER_MANIFEST)

    def test_a_media_type_cannot_forge_a_header(self) -> None:
        forged = "application/json\r\nX-Forged: yes"
        for change in (
            {"mediaType": forged},
            {"mediaType": "application/json\nX-Forged: yes"},
            {"mediaType": "application/\u4e16"},
            {"mediaType": "application/\u00fc"},
            {"mediaType": "application/\ud800"},
            {"mediaType": "application/\u0000"},
            {"mediaType": "a" * 70_000},
            {"mediaType": " "},
            {"artifactType": forged},
            {"subject": {**descriptor(b"x"), "digest": digest_of(b"x") + "\r\nX-Forged: yes"}},
        ):
            with self.subTest(change):
                response = self.client.put("manifests/forged", encode(self.manifest(**change)))
                self.assert_error(response, 400, "MANIFEST_INVALID")
                self.assertNotIn("X-Forged", response.headers)

    def test_without_any_type_it_is_what_it_looks_like(self) -> None:
        for kind in ("", ";"):
            for own, manifest, served in (
                (None, self.manifest(mediaType=None), OCI_MANIFEST),
                (None, {"schemaVersion": 2, "manifests": []}, OCI_INDEX),
                ("", self.manifest(mediaType=""), OCI_MANIFEST),
            ):
                with self.subTest(kind, own=own, served=served):
                    response = self.client.put("manifests/odd", encode(manifest), {"Content-Type": kind})
                    self.assert_status(response, 201)
                    self.assert_served("odd", encode(manifest), served)

    def test_a_content_type_that_is_none_is_refused(self) -> None:
        for kind in ("\xfc/json", "a\tb", "x" * 5000):
            with self.subTest(kind[:40]):
                body = encode(self.manifest(mediaType=None))
                response = self.client.put("manifests/odd", body, {"Content-Type": kind})
                self.assert_error(response, 400, "MANIFEST_INVALID")

    def test_types_have_at_most_255_characters(self) -> None:
        for length, status in ((255, 201), (256, 400), (MEBIBYTE, 400)):
            kind = "a/" + "b" * (length - 2)
            for name, manifest in {
                "artifactType": self.manifest(artifactType=kind),
                "artifactType of an index": image_index([], artifactType=kind),
                "mediaType": self.manifest(mediaType=kind),
                "config's mediaType": self.manifest(config=descriptor(self.CONFIG, kind)),
            }.items():
                with self.subTest(name, length=length):
                    response = self.client.put("manifests/tag", encode(manifest))
                    self.assert_status(response, status)
                    if status == 400:
                        self.assert_error(response, 400, "MANIFEST_INVALID")
                        self.assertLess(len(response.body), 2000)
                        self.assert_no_blob(self.client, digest_of(encode(manifest)))
            with self.subTest("Content-Type", length=length):
                if length < 60_000:  # or the head is too large
                    body = encode(self.manifest(mediaType=None))
                    self.assert_status(self.client.put("manifests/tag", body, {"Content-Type": kind}), status)


class ManifestsAndBlobs(ManifestTestCase):
    """Manifests as blobs, blobs as manifests, blobs in indexes."""

    def test_a_manifest_is_a_blob_too(self) -> None:
        for body in (encode(self.manifest()), encode(image_index([]))):
            for algorithm in ("sha256", "sha512"):
                with self.subTest(body[:60], algorithm=algorithm):
                    digest = digest_of(body, algorithm)
                    self.put(body, digest, json.loads(body)["mediaType"])
                    self.assert_blob(self.client, body, algorithm)
                    head = self.client.head(f"blobs/{digest}")
                    self.assertEqual(head.headers["Content-Length"], str(len(body)))

    def test_a_blob_is_no_manifest(self) -> None:
        body = encode(self.manifest(annotations={"n": unique().decode()}))
        for content in (self.layer, self.CONFIG, body):
            digest = self.client.push_blob(content)
            with self.subTest(content):
                self.assert_error(self.client.get(f"manifests/{digest}"), 404, "MANIFEST_UNKNOWN")
                self.assert_error(self.client.delete(f"manifests/{digest}"), 404, "MANIFEST_UNKNOWN")
                self.assertEqual(self.client.head(f"manifests/{digest}").status, 404)
                self.assert_blob(self.client, content)

    def test_a_blob_becomes_a_manifest_when_pushed_as_one(self) -> None:
        body = encode(self.manifest(annotations={"n": unique().decode()}))
        self.client.push_blob(body)
        self.client.push_manifest(body, "tag")
        self.assert_served("tag", body, OCI_MANIFEST)
        self.assert_blob(self.client, body)

    def test_a_manifest_elsewhere_is_no_manifest_here(self) -> None:
        image = self.other.push_image("tag")
        for reference in ("tag", image.digest):
            with self.subTest(reference):
                self.assert_error(self.client.get(f"manifests/{reference}"), 404, "MANIFEST_UNKNOWN")
                self.assert_error(self.client.delete(f"manifests/{reference}"), 404, "MANIFEST_UNKNOWN")

    def test_an_index_may_list_blobs(self) -> None:
        layers = [unique() for _ in range(3)]
        config = unique("config")
        for content in (*layers, config):
            self.client.push_blob(content)
        cache = image_index(
            [*map(descriptor, layers), descriptor(config, "application/vnd.buildkit.cacheconfig.v0")]
        )
        self.client.push_manifest(cache, "cache")
        self.assert_served("cache", encode(cache), OCI_INDEX)
        for content in (*layers, config):
            self.assert_blob(self.client, content)

    def test_a_tag_goes_from_index_to_manifest_and_back(self) -> None:
        manifest = self.manifest()
        self.client.push_manifest(manifest)
        index = image_index([descriptor(encode(manifest), OCI_MANIFEST)])
        for each in (index, manifest, index, manifest):
            self.client.push_manifest(each, "tag")
            self.assert_served("tag", encode(each), each["mediaType"])
        for each in (index, manifest):
            self.assert_served(digest_of(encode(each)), encode(each), each["mediaType"])

    def test_an_unknown_manifest_is_404(self) -> None:
        for reference in ("unheard-of", digest_of(b"unknown"), digest_of(b"unknown", "sha512")):
            with self.subTest(reference):
                self.assert_error(self.client.get(f"manifests/{reference}"), 404, "MANIFEST_UNKNOWN")
                self.assert_error(self.client.delete(f"manifests/{reference}"), 404, "MANIFEST_UNKNOWN")
                self.assertEqual(self.client.head(f"manifests/{reference}").status, 404)
                response = self.client.at("unheard/of").get(f"manifests/{reference}")
                self.assert_error(response, 404, "NAME_UNKNOWN", "MANIFEST_UNKNOWN")
