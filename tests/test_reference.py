"""What a manifest refers to: what must be there, what may be absent, and what is taken in parts."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from registry import Registry
from tests.manifests import ManifestTestCase
from tests.support import (
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Client,
    descriptor,
    digest_of,
    encode,
    image_index,
    unique,
)


class MissingBlobsAreNamed(ManifestTestCase):
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

    def test_a_thousand_are_named_at_most(self) -> None:
        layers = [{"digest": f"sha256:{number:064}", "size": 1} for number in range(2000)]
        response = self.client.put_manifest(self.manifest(layers=layers), "tag")
        self.assert_error(response, 400, "MANIFEST_BLOB_UNKNOWN")
        self.assertEqual(len(response.json["errors"]), 1000)

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


class SparseTakesParts(ManifestTestCase):
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
