"""Manifests: what is accepted, what is refused, how they are served, tagged and deleted."""

from __future__ import annotations

import functools
import json
from typing import Any, ClassVar

from registry import Registry
from tests.support import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MEBIBYTE,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Client,
    RegistryTestCase,
    Response,
    descriptor,
    digest_of,
    elapsed,
    encode,
    image_index,
    image_manifest,
    unique,
)

SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
LIMIT = 4 * MEBIBYTE


class ManifestTestCase(RegistryTestCase):
    """A repository that holds a config and a layer of its own."""

    CONFIG = b"{}"

    def setUp(self) -> None:
        super().setUp()
        self.layer = unique("layer")
        for content in (self.CONFIG, self.layer):
            self.client.push_blob(content)

    def manifest(self, **more: Any) -> dict:
        """A manifest that is accepted; `more` replaces its members, and None removes one."""
        manifest = image_manifest(descriptor(self.CONFIG, OCI_CONFIG), [descriptor(self.layer)])
        return {name: value for name, value in {**manifest, **more}.items() if value is not None}

    def put(self, manifest: Any, reference: str = "tag", media_type: str = OCI_MANIFEST) -> Response:
        return self.client.put_manifest(manifest, reference, media_type)

    def assert_served(self, reference: str, body: bytes, media_type: str, digest: str = "") -> None:
        """GET and HEAD give exactly what was pushed."""
        for method in ("GET", "HEAD"):
            response = self.client.request(method, f"manifests/{reference}")
            self.assert_status(response, 200)
            self.assertEqual(response.headers["Content-Type"], media_type)
            self.assertEqual(response.headers["Content-Length"], str(len(body)))
            self.assertEqual(response.headers["Docker-Content-Digest"], digest or digest_of(body))
            self.assertIn("ETag", response.headers)
            self.assertEqual(response.body, body if method == "GET" else b"")

    def assert_nothing_stored(self, body: bytes) -> None:
        for algorithm in ("sha256", "sha512"):
            digest = digest_of(body, algorithm)
            self.assert_status(self.client.get(f"manifests/{digest}"), 404)
            self.assert_no_blob(self.client, digest)
        self.assert_error(self.client.get("manifests/tag"), 404, "MANIFEST_UNKNOWN")
        self.assertEqual(self.client.get("tags/list").json.get("tags"), [])


class PushTest(ManifestTestCase):
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

    def test_a_known_etag_saves_the_bytes(self) -> None:
        body = encode(self.manifest())
        self.put(body)
        for reference in ("tag", digest_of(body)):
            etag = self.client.get(f"manifests/{reference}").headers["ETag"]
            for method in ("GET", "HEAD"):
                with self.subTest(reference, method=method):
                    path = f"manifests/{reference}"
                    response = self.client.request(method, path, headers={"If-None-Match": etag})
                    self.assert_status(response, 304)
                    self.assertEqual(response.body, b"")

    def test_the_etag_of_a_tag_follows_it(self) -> None:
        self.put(self.manifest())
        etag = self.client.get("manifests/tag").headers["ETag"]
        self.put(self.manifest(annotations={"n": "2"}))
        self.assert_status(self.client.get("manifests/tag", {"If-None-Match": etag}), 200)

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


class MediaTypeTest(ManifestTestCase):
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
        for kind in (
            "application/json\r\nX-Forged: yes",
            "application/json\nX-Forged: yes",
            "application/json\r\n\r\nforged",
            "application/\u4e16",
            "application/\u00fc",
            "application/\ud800",
            "application/\u0000",
            "a" * 70_000,
            "",
            " ",
        ):
            with self.subTest(kind[:40]):
                body = encode(self.manifest(mediaType=kind))
                connection = self.connect().request(
                    "PUT", self.client.path("manifests/forged"), f"Content-Length: {len(body)}", body=body
                )
                self.assert_status(connection.read(), 201, 400)
                reply = self.connect().request("GET", self.client.path("manifests/forged")).read()
                self.assert_status(reply, 200, 404)
                self.assertNotIn("X-Forged", reply.headers)

    def test_a_content_type_without_a_body_type_cannot_break_the_reply(self) -> None:
        for kind in ("\xfc/json", "", ";", "a\tb", "x" * 5000):
            with self.subTest(kind[:40]):
                body = encode(self.manifest(mediaType=None, annotations={"n": kind}))
                response = self.client.put("manifests/odd", body, {"Content-Type": kind})
                self.assert_status(response, 201, 400)
                self.assert_status(self.client.get("manifests/odd"), 200, 404)

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


class PreconditionTest(ManifestTestCase):
    """If-Match and If-None-Match (RFC 9110, 13) on what changes and what reads manifests."""

    def setUp(self) -> None:
        super().setUp()
        self.old, self.new = encode(self.manifest()), encode(self.manifest(annotations={"n": "2"}))
        self.etag, self.new_etag = f'"{digest_of(self.old)}"', f'"{digest_of(self.new)}"'

    def put_if(self, condition: dict, reference: str = "tag", body: bytes = b"", query: str = "") -> Response:
        headers = {"Content-Type": OCI_MANIFEST, **condition}
        return self.client.put(f"manifests/{reference}{query}", body or self.new, headers)

    def assert_failed(self, response: Response) -> None:
        self.assert_error(response, 412, "DENIED")

    def test_a_tag_is_moved_only_from_where_the_client_saw_it(self) -> None:
        self.client.push_manifest(self.old, "tag")
        for condition in (self.new_etag, f"W/{self.etag}", "", '"*"', digest_of(self.old)):
            with self.subTest(condition):
                self.assert_failed(self.put_if({"If-Match": condition}))
                self.assert_served("tag", self.old, OCI_MANIFEST)
                self.assert_no_blob(self.client, digest_of(self.new))
        self.assert_status(self.put_if({"If-Match": f'"other", {self.etag}'}), 201)
        self.assert_served("tag", self.new, OCI_MANIFEST)
        self.assert_failed(self.put_if({"If-Match": self.etag}, body=self.old))
        self.assert_status(self.put_if({"If-Match": "*"}, body=self.old), 201)
        self.assert_served("tag", self.old, OCI_MANIFEST)

    def test_a_tag_that_is_absent_matches_nothing(self) -> None:
        for condition in ("*", self.etag, self.new_etag):
            with self.subTest(condition):
                self.assert_failed(self.put_if({"If-Match": condition}))
        self.assert_nothing_stored(self.new)

    def test_a_tag_is_created_and_not_moved(self) -> None:
        create = {"If-None-Match": "*"}
        self.assert_status(self.put_if(create, body=self.old), 201)
        for body in (self.new, self.old):
            self.assert_failed(self.put_if(create, body=body))
        self.assert_served("tag", self.old, OCI_MANIFEST)
        self.assert_no_blob(self.client, digest_of(self.new))
        self.assert_status(self.put_if(create, "other"), 201)

    def test_a_tag_is_not_moved_from_what_the_client_rules_out(self) -> None:
        self.client.push_manifest(self.old, "tag")
        for condition in (self.etag, f"W/{self.etag}", f'"other" , {self.etag}'):
            with self.subTest(condition):
                self.assert_failed(self.put_if({"If-None-Match": condition}))
        self.assert_status(self.put_if({"If-None-Match": self.new_etag}), 201)

    def test_by_digest_the_conditions_are_about_the_digest_and_no_tag(self) -> None:
        self.client.push_manifest(self.old, "tag")
        digest = digest_of(self.new)
        self.assert_failed(self.put_if({"If-Match": "*"}, digest, query="?tag=tag"))
        self.assert_served("tag", self.old, OCI_MANIFEST)
        self.assert_no_blob(self.client, digest)
        self.assert_status(self.put_if({"If-None-Match": "*"}, digest, query="?tag=tag"), 201)
        self.assert_served("tag", self.new, OCI_MANIFEST)
        self.assert_failed(self.put_if({"If-None-Match": "*"}, digest))
        self.assert_status(self.put_if({"If-Match": self.new_etag}, digest), 201)

    def test_what_is_refused_anyway_is_refused_for_its_own_reason(self) -> None:
        missing = encode(self.manifest(config=descriptor(b"missing")))
        condition = {"If-Match": "*"}
        self.assert_error(self.put_if(condition, body=missing), 400, "MANIFEST_BLOB_UNKNOWN")
        self.assert_error(self.put_if(condition, body=b"{}"), 400, "MANIFEST_INVALID")
        self.assert_error(self.put_if(condition, digest_of(b"other")), 400, "DIGEST_INVALID")
        for reference in ("absent", digest_of(b"absent")):
            for method in ("GET", "DELETE"):
                response = self.client.request(method, f"manifests/{reference}", headers=condition)
                self.assert_error(response, 404, "MANIFEST_UNKNOWN")

    def test_only_what_the_client_saw_is_deleted(self) -> None:
        digest = digest_of(self.old)
        for reference in ("tag", digest):
            self.client.push_manifest(self.old, "tag")
            path = f"manifests/{reference}"
            for condition in (
                {"If-Match": self.new_etag},
                {"If-None-Match": "*"},
                {"If-None-Match": self.etag},
            ):
                with self.subTest(reference, **condition):
                    self.assert_failed(self.client.request("DELETE", path, headers=condition))
                    self.assert_served("tag", self.old, OCI_MANIFEST)
            self.client.expect(202, "DELETE", path, headers={"If-Match": self.etag})
            self.assert_status(self.client.get(path), 404)

    def test_only_what_the_client_saw_is_served(self) -> None:
        self.client.push_manifest(self.old, "tag")
        for reference in ("tag", digest_of(self.old)):
            for method in ("GET", "HEAD"):
                for condition, status in (
                    ({"If-Match": self.etag}, 200),
                    ({"If-Match": "*"}, 200),
                    ({"If-Match": self.new_etag}, 412),
                    ({"If-Match": f"W/{self.etag}"}, 412),
                    ({"If-Match": self.etag, "If-None-Match": self.etag}, 304),
                    ({"If-Match": self.new_etag, "If-None-Match": self.etag}, 412),
                    ({"If-Match": self.new_etag, "Range": "bytes=0-1"}, 412),
                ):
                    with self.subTest(reference, method=method, **condition):
                        path = f"manifests/{reference}"
                        self.assert_status(self.client.request(method, path, headers=condition), status)


class RefusalTest(ManifestTestCase):
    """What is refused, and that nothing of it stays."""

    def test_what_is_not_a_manifest_is_refused(self) -> None:
        for name, body in {
            "nothing": b"",
            "not JSON": b"not JSON",
            "half of it": encode(self.manifest())[:-1],
            "something after it": encode(self.manifest()) + b"x",
            "two of it": encode(self.manifest()) * 2,
            "not UTF-8": encode(self.manifest()).replace(b'"layers"', b'"\xff": 0, "layers"'),
            "array": b"[]",
            "array of it": encode([self.manifest()]),
            "string": b'"text"',
            "number": b"2",
            "null": b"null",
            "true": b"true",
            "single quotes": encode(self.manifest()).replace(b'"', b"'"),
            "UTF-16": encode(self.manifest()).decode().encode("utf-16"),
        }.items():
            with self.subTest(name):
                self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_a_schema_version_other_than_2_is_refused(self) -> None:
        for version in (0, 1, 3, -2, 22, "2", [2], {"2": 2}, False, 2.5, 10**30):
            with self.subTest(version):
                body = encode(self.manifest(schemaVersion=version))
                self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_a_missing_schema_version_is_refused(self) -> None:
        for body in (
            encode(self.manifest(schemaVersion=None)),
            encode({**self.manifest(), "schemaVersion": None}),
        ):
            self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
            self.assert_nothing_stored(body)

    def test_docker_schema_1_is_refused(self) -> None:
        manifest = {
            "schemaVersion": 1,
            "name": "a",
            "tag": "b",
            "architecture": "c",
            "fsLayers": [],
            "history": [],
        }
        for kind in (SCHEMA_1, "application/vnd.docker.distribution.manifest.v1+json", "application/json"):
            with self.subTest(kind):
                self.assert_error(self.put(manifest, "tag", kind), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(encode(manifest))

    def test_a_descriptor_with_a_bad_digest_is_refused(self) -> None:
        for digest in (
            "",
            "latest",
            "sha256:abc",
            "sha256:" + "A" * 64,
            "sha256:" + "a" * 64 + "\n",
            "sha512:" + "a" * 64,
            "md5:" + "a" * 32,
            "sha256:../../registry.db",
            "\ud800",
            None,
            7,
            [],
            {},
        ):
            self.assert_descriptor_refused(digest=digest)

    def test_a_descriptor_with_a_bad_size_is_refused(self) -> None:
        for size in (-1, -(10**30), "5", 1.5, [], {}, True):
            self.assert_descriptor_refused(size=size)

    def assert_descriptor_refused(self, **change: Any) -> None:
        bad = {**descriptor(self.layer), **change}
        for name, manifest in {
            "config": self.manifest(config=bad),
            "layer": self.manifest(layers=[descriptor(self.layer), bad]),
            "subject": self.manifest(subject=bad),
            "child": image_index([bad]),
            "index subject": image_index([], subject=bad),
        }.items():
            with self.subTest(name, **change):
                response = self.client.put_manifest(manifest, "tag")
                self.assert_error(response, 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(encode(manifest))

    def test_members_of_the_wrong_kind_are_refused(self) -> None:
        for change in (
            {"config": "text"},
            {"config": [descriptor(b"{}")]},
            {"layers": "text"},
            {"layers": {"a": 1}},
            {"layers": descriptor(b"{}")},
            {"layers": [None]},
            {"layers": ["sha256:" + "a" * 64]},
            {"layers": [[descriptor(b"{}")]]},
            {"subject": "sha256:" + "a" * 64},
            {"subject": [descriptor(b"{}")]},
            {"mediaType": 7},
            {"mediaType": [OCI_MANIFEST]},
        ):
            with self.subTest(change):
                body = encode(self.manifest(**change))
                self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_children_of_the_wrong_kind_are_refused(self) -> None:
        for children in ("text", 7, {"a": 1}, [None], [[]], ["sha256:" + "a" * 64]):
            with self.subTest(children):
                body = encode({**image_index([]), "manifests": children})
                self.assert_error(self.put(body, "tag", OCI_INDEX), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_odd_values_in_known_members_do_no_harm(self) -> None:
        subject = descriptor(b"odd subject", OCI_MANIFEST)
        for change in (
            {"artifactType": 7},
            {"artifactType": ["a"]},
            {"artifactType": ""},
            {"artifactType": "\ud800"},
            {"artifactType": "a\u0000b"},
            {"annotations": "text"},
            {"annotations": ["a"]},
            {"annotations": {"a": 7, "b": {"c": []}}},
            {"annotations": {"\ud800": "\udfff"}},
            {"annotations": {"a\u0000b": "c\u0000d"}},
            {"config": {**descriptor(b"{}"), "mediaType": 7}},
            {"config": {**descriptor(b"{}"), "mediaType": None}},
            {"config": {**descriptor(b"{}"), "urls": 7, "annotations": [], "platform": "x"}},
            {"layers": [{**descriptor(b"{}"), "urls": 7}]},
            {"layers": [{**descriptor(b"{}"), "urls": None, "mediaType": []}]},
        ):
            with self.subTest(change):
                self.assert_status(self.put(self.manifest(subject=subject, **change)), 201, 400)
                response = self.client.get(f"referrers/{subject['digest']}")
                self.assert_status(response, 200)
                self.assertIsInstance(response.json["manifests"], list)

    def test_a_huge_number_does_no_harm(self) -> None:
        text = encode(self.manifest(x=0)).decode()
        size = json.dumps(len(self.layer))
        for number in (
            "9" * 19,
            "9" * 30,
            "9" * 400,
            "9" * 5000,
            "1e999",
            "-1e999",
            "NaN",
            "Infinity",
            "1e-999",
        ):
            for body in (
                text.replace('"x": 0', f'"x": {number}'),
                text.replace(f'"size": {size}', f'"size": {number}'),
                text.replace('"schemaVersion": 2', f'"schemaVersion": {number}'),
            ):
                with self.subTest(number[:20], body=body.index(number)):
                    self.assertIn(number, body)
                    self.assert_status(self.put(body.encode()), 201, 400)
                    self.assert_status(self.client.get("manifests/tag"), 200, 404)

    def test_a_number_of_a_megabyte_takes_no_time(self) -> None:
        body = encode(self.manifest(x=0)).replace(b'"x": 0', b'"x": ' + b"9" * MEBIBYTE)
        self.assertLess(elapsed(lambda: self.assert_status(self.put(body), 201, 400)), 5)

    def test_deep_nesting_does_no_harm(self) -> None:
        text = encode(self.manifest(x=0))
        for depth in (900, 5_000, 100_000, 1_900_000):
            for before, after in ((b"[", b"]"), (b'{"":', b"}"), (b"[", b"")):
                if depth * len(before + after) < LIMIT - 1000:
                    with self.subTest(depth, before=before, after=after):
                        nested = before * depth + b"0" + after * depth
                        response = self.put(text.replace(b'"x": 0', b'"x": ' + nested))
                        self.assert_status(response, 201, 400)
                        self.assert_status(self.client.get("/v2/"), 200)

    def test_ordinary_nesting_is_accepted(self) -> None:
        text = encode(self.manifest(x=0))
        body = text.replace(b'"x": 0', b'"x": ' + b'[{"y":' * 30 + b"0" + b"}]" * 30)
        self.assert_status(self.put(body), 201)

    def test_four_mebibytes_are_the_limit(self) -> None:
        body = encode(self.manifest())
        padding = b" " * (LIMIT - len(body))
        headers = {"Content-Type": OCI_MANIFEST}
        self.assert_status(self.client.put("manifests/tag", body + padding, headers), 201)
        self.assert_served("tag", body + padding, OCI_MANIFEST)
        self.client.expect(202, "DELETE", f"manifests/{digest_of(body + padding)}")
        for over in (body + padding + b" ", iter([body, padding, b" "])):
            with self.subTest(type(over).__name__):
                self.assert_error(self.client.put("manifests/tag", over, headers), 413)
                self.assert_nothing_stored(body + padding + b" ")

    def test_a_digest_that_does_not_match_stores_nothing(self) -> None:
        body = encode(self.manifest())
        for algorithm in ("sha256", "sha512"):
            for claimed in (digest_of(b"other", algorithm), digest_of(self.layer, algorithm)):
                for query in ("", "?tag=tag"):
                    with self.subTest(claimed, query=query):
                        self.assert_error(self.put(body, claimed + query), 400, "DIGEST_INVALID")
                        self.assert_nothing_stored(body)
                        self.assert_status(self.client.get(f"manifests/{claimed}"), 404)

    def test_a_reference_that_is_neither_tag_nor_digest_is_refused(self) -> None:
        body = encode(self.manifest())
        for reference in (
            ".INVALID_MANIFEST_NAME",
            "-tag",
            "t" * 129,
            "tag%0A",
            "tag%00",
            "tag%20",
            "t%C3%A4g",
            "a+b",
            "a@b",
            "..",
            "%2E%2E",
            "..%2F..%2Fregistry.db",
        ):
            with self.subTest(reference):
                self.assert_status(self.put(body, reference), 400, 404 if "%2F" in reference else 400)
                self.assert_nothing_stored(body)
                for method in ("GET", "HEAD"):
                    self.assertEqual(self.client.request(method, f"manifests/{reference}").status, 404)

    def test_a_malformed_digest_is_no_reference(self) -> None:
        body = encode(self.manifest())
        for reference in ("sha256:abc", "sha256:" + "A" * 64, "md5:" + "a" * 32, f"{digest_of(body)}%0A"):
            with self.subTest(reference):
                self.assert_error(self.put(body, reference), 400)
                self.assert_nothing_stored(body)
                for method in ("GET", "DELETE"):
                    self.assert_status(self.client.request(method, f"manifests/{reference}"), 400, 404)


class MissingBlobTest(ManifestTestCase):
    """References to what is not in the repository."""

    def assert_missing(self, manifest: dict, *missing: dict) -> None:
        response = self.client.put_manifest(manifest, "tag")
        self.assert_error(response, 400, "MANIFEST_BLOB_UNKNOWN")
        entries = [json.dumps(entry) for entry in response.json["errors"]]
        self.assertEqual(len(entries), len(missing), entries)
        for each in missing:
            self.assertEqual(sum(each["digest"] in entry for entry in entries), 1, entries)
        self.assert_nothing_stored(encode(manifest))

    def test_every_missing_blob_is_named(self) -> None:
        config, first, second = descriptor(b"1", OCI_CONFIG), descriptor(b"2"), descriptor(b"3")
        present = descriptor(self.layer)
        self.assert_missing(self.manifest(config=config), config)
        self.assert_missing(self.manifest(layers=[first]), first)
        self.assert_missing(self.manifest(layers=[first, present, second]), first, second)
        self.assert_missing(self.manifest(config=config, layers=[first, second]), config, first, second)

    def test_every_missing_child_is_named(self) -> None:
        self.client.push_manifest(self.manifest())
        present = descriptor(encode(self.manifest()), OCI_MANIFEST)
        first, second = descriptor(b"1", OCI_MANIFEST), descriptor(b"2", OCI_INDEX)
        self.assert_missing(image_index([first]), first)
        self.assert_missing(image_index([first, present, second]), first, second)

    def test_what_another_repository_holds_is_missing_here(self) -> None:
        image = self.other.push_image()
        self.assert_missing(image_index([image.descriptor]), image.descriptor)
        layer = descriptor(image.layers[0])
        self.assert_missing(self.manifest(layers=[layer]), layer)

    def test_a_blob_of_the_other_algorithm_is_missing(self) -> None:
        layer = descriptor(self.layer, algorithm="sha512")
        self.assert_missing(self.manifest(layers=[layer]), layer)

    def test_a_data_field_does_not_stand_for_the_blob(self) -> None:
        config = descriptor(b"[]", OCI_EMPTY, data="W10=")
        self.assert_missing(self.manifest(config=config), config)

    def test_a_deleted_blob_is_missing(self) -> None:
        layer = unique()
        digest = self.client.push_blob(layer)
        self.client.expect(202, "DELETE", f"blobs/{digest}")
        self.assert_missing(self.manifest(layers=[descriptor(layer)]), descriptor(layer))

    def test_foreign_layers_may_be_absent(self) -> None:
        for layer in (
            descriptor(b"absent", OCI_LAYER, urls=["https://example.com/layer"]),
            descriptor(b"absent", "application/vnd.oci.image.layer.nondistributable.v1.tar"),
            descriptor(b"absent", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
            descriptor(b"absent", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        ):
            with self.subTest(layer["mediaType"]):
                manifest = self.manifest(layers=[layer, descriptor(self.layer)])
                self.client.push_manifest(manifest, "tag")
                self.assert_served("tag", encode(manifest), OCI_MANIFEST)

    def test_an_ordinary_layer_beside_a_foreign_one_must_be_there(self) -> None:
        foreign = descriptor(b"1", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
        for urls in ({}, {"urls": []}):
            absent = descriptor(b"2", OCI_LAYER, **urls)
            self.assert_missing(self.manifest(layers=[foreign, absent]), absent)

    def test_a_subject_may_be_absent(self) -> None:
        manifest = self.manifest(subject=descriptor(b"absent", OCI_MANIFEST))
        self.client.push_manifest(manifest, "tag")
        self.assert_served("tag", encode(manifest), OCI_MANIFEST)

    def test_a_manifest_is_refused_until_its_blobs_are_there(self) -> None:
        layer = unique()
        manifest = self.manifest(layers=[descriptor(layer)])
        self.assert_missing(manifest, descriptor(layer))
        self.client.push_blob(layer)
        self.client.push_manifest(manifest, "tag")
        self.assert_error(self.client.delete(f"blobs/{digest_of(layer)}"), 405, "DENIED")


class SparseTest(ManifestTestCase):
    """A registry that takes parts of images."""

    options: ClassVar[dict[str, Any]] = {"sparse": True}

    def test_layers_may_be_absent(self) -> None:
        manifest = self.manifest(layers=[descriptor(self.layer), descriptor(b"absent")])
        self.client.push_manifest(manifest, "tag")
        self.assert_served("tag", encode(manifest), OCI_MANIFEST)

    def test_children_may_be_absent(self) -> None:
        self.client.push_manifest(self.manifest())
        present = descriptor(encode(self.manifest()), OCI_MANIFEST)
        index = image_index([descriptor(b"absent", OCI_MANIFEST), present])
        self.client.push_manifest(index, "tag")
        self.assert_served("tag", encode(index), OCI_INDEX)
        self.assert_error(self.client.get(f"manifests/{digest_of(b'absent')}"), 404, "MANIFEST_UNKNOWN")

    def test_what_comes_later_is_needed_like_the_rest(self) -> None:
        layer, child = unique(), self.manifest(annotations={"late": "yes"})
        self.client.push_manifest(self.manifest(layers=[descriptor(layer)]))
        self.client.push_manifest(image_index([descriptor(encode(child), OCI_MANIFEST)]))
        self.client.push_blob(layer)
        self.client.push_manifest(child)
        self.assert_error(self.client.delete(f"blobs/{digest_of(layer)}"), 405, "DENIED")
        self.assert_error(self.client.delete(f"manifests/{digest_of(encode(child))}"), 405, "DENIED")

    def test_what_was_taken_without_its_parts_is_not_taken_so_by_others(self) -> None:
        layer = unique()
        manifest = self.manifest(layers=[descriptor(layer)])
        self.client.push_manifest(manifest, "tag")
        with Registry(data=str(self.data.path), sync=False) as strict:
            client = Client(strict.netloc, self.client.repository)
            self.assert_error(client.put_manifest(manifest, "other"), 400, "MANIFEST_BLOB_UNKNOWN")
            client.push_blob(layer)
            client.push_manifest(manifest, "other")
        self.client.push_manifest(manifest, "tag")
        row = "SELECT required FROM manifest_references WHERE child = ?"
        self.assertEqual(self.data.rows(row, digest_of(layer)), [(1,)])

    def test_a_malformed_manifest_is_refused_all_the_same(self) -> None:
        manifest = self.manifest(layers=[{**descriptor(b"absent"), "size": -1}])
        self.assert_error(self.put(manifest), 400, "MANIFEST_INVALID")


class KindTest(ManifestTestCase):
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


class TagsOfAPushTest(ManifestTestCase):
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


class DeleteManifestTest(ManifestTestCase):
    def test_deleting_a_tag_deletes_that_tag_only(self) -> None:
        body = encode(self.manifest())
        for tag in ("tag", "kept"):
            self.client.push_manifest(body, tag)
        self.assert_status(self.client.delete("manifests/tag"), 202)
        self.assert_error(self.client.get("manifests/tag"), 404, "MANIFEST_UNKNOWN")
        self.assert_error(self.client.delete("manifests/tag"), 404, "MANIFEST_UNKNOWN")
        for reference in ("kept", digest_of(body)):
            self.assert_served(reference, body, OCI_MANIFEST)

    def test_deleting_a_manifest_deletes_all_its_tags(self) -> None:
        body, other = encode(self.manifest()), encode(self.manifest(annotations={"n": "2"}))
        for tag in ("a", "b", "c"):
            self.client.push_manifest(body, tag)
        self.client.push_manifest(other, "kept")
        self.assert_status(self.client.delete(f"manifests/{digest_of(body)}"), 202)
        for reference in ("a", "b", "c", digest_of(body)):
            self.assert_error(self.client.get(f"manifests/{reference}"), 404, "MANIFEST_UNKNOWN")
        self.assert_error(self.client.delete(f"manifests/{digest_of(body)}"), 404, "MANIFEST_UNKNOWN")
        self.assertEqual(self.client.get("tags/list").json["tags"], ["kept"])
        self.assert_served("kept", other, OCI_MANIFEST)

    def test_a_deleted_manifest_can_be_pushed_again(self) -> None:
        body = encode(self.manifest())
        for _ in range(3):
            self.client.push_manifest(body, "tag")
            self.assert_served("tag", body, OCI_MANIFEST)
            self.client.expect(202, "DELETE", f"manifests/{digest_of(body)}")

    def test_a_manifest_deleted_here_stays_there(self) -> None:
        image = self.client.push_image("tag")
        for content in image.blobs:
            self.other.push_blob(content)
        self.other.push_manifest(image.body, "tag")
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        self.assertEqual(self.other.get("manifests/tag").body, image.body)
        self.assertEqual(self.other.get(f"manifests/{image.digest}").body, image.body)

    def test_a_manifest_in_an_index_is_not_deleted(self) -> None:
        child = encode(self.manifest())
        digest = self.client.push_manifest(child, "child")
        indexes = [
            self.client.push_manifest(image_index([descriptor(child, OCI_MANIFEST)], annotations={"n": n}))
            for n in "12"
        ]
        for index in indexes:
            self.assert_error(self.client.delete(f"manifests/{digest}"), 405, "DENIED")
            self.assert_served("child", child, OCI_MANIFEST)
            self.assert_status(self.client.delete(f"manifests/{index}"), 202)
        self.assert_status(self.client.delete(f"manifests/{digest}"), 202)
        self.assert_error(self.client.get("manifests/child"), 404, "MANIFEST_UNKNOWN")

    def test_the_tag_of_a_manifest_in_an_index_is_deleted(self) -> None:
        child = encode(self.manifest())
        self.client.push_manifest(child, "child")
        self.client.push_manifest(image_index([descriptor(child, OCI_MANIFEST)]), "index")
        self.assert_status(self.client.delete("manifests/child"), 202)
        self.assert_served(digest_of(child), child, OCI_MANIFEST)

    def test_an_index_elsewhere_holds_nothing_here(self) -> None:
        image = self.client.push_image()
        for content in image.blobs:
            self.other.push_blob(content)
        self.other.push_manifest(image.body)
        self.other.push_manifest(image_index([image.descriptor]), "index")
        self.assert_status(self.client.delete(f"manifests/{image.digest}"), 202)
        self.assert_error(self.other.delete(f"manifests/{image.digest}"), 405, "DENIED")

    def test_a_subject_is_deleted_in_spite_of_its_referrers(self) -> None:
        image = self.client.push_image("tag")
        referrer = encode(self.manifest(subject=image.descriptor))
        self.client.push_manifest(referrer)
        self.assert_status(self.client.delete(f"manifests/{image.digest}"), 202)
        self.assert_served(digest_of(referrer), referrer, OCI_MANIFEST)

    def test_a_whole_image_is_deleted_from_the_top(self) -> None:
        images = [self.client.push_image() for _ in range(2)]
        index = self.client.push_manifest(image_index([image.descriptor for image in images]), "tag")
        delete = functools.partial(self.client.expect, 202, "DELETE")
        delete(f"manifests/{index}")
        for image in images:
            delete(f"manifests/{image.digest}")
            for content in image.blobs:
                delete(f"blobs/{digest_of(content)}")
                self.assertEqual(self.data.links(digest_of(content)), [])
