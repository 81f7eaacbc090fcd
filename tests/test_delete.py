"""Deleting blobs, manifests and tags: what goes, what is still needed, what stays elsewhere."""

from __future__ import annotations

import functools

from tests.manifests import ManifestTestCase
from tests.support import (
    OCI_CONFIG,
    OCI_MANIFEST,
    RegistryTestCase,
    descriptor,
    digest_of,
    encode,
    image_index,
    image_manifest,
    unique,
)


class ManifestsAreDeleted(ManifestTestCase):
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


class BlobsAreDeleted(RegistryTestCase):
    def test_a_deleted_blob_is_gone_for_good(self) -> None:
        for algorithm in ("sha256", "sha512"):
            with self.subTest(algorithm):
                digest = self.client.push_blob(unique(), algorithm)
                self.assert_status(self.client.delete(f"blobs/{digest}"), 202)
                self.assert_error(self.client.get(f"blobs/{digest}"), 404)
                self.assert_error(self.client.delete(f"blobs/{digest}"), 404)
                self.assertEqual(self.data.links(digest), [])

    def test_a_deleted_blob_can_be_pushed_again(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        self.client.expect(202, "DELETE", f"blobs/{digest}")
        self.client.push_blob(content)
        self.assert_blob(self.client, content)

    def test_a_blob_deleted_here_stays_there(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        self.other.push_blob(content)
        self.client.expect(202, "DELETE", f"blobs/{digest}")
        self.assert_error(self.client.get(f"blobs/{digest}"), 404)
        self.assert_blob(self.other, content)
        self.assertEqual(self.data.links(digest), [self.other.repository])

    def test_a_needed_blob_is_not_deleted(self) -> None:
        image = self.client.push_image("latest", layers=2)
        for content in image.blobs:
            with self.subTest(content):
                response = self.client.delete(f"blobs/{digest_of(content)}")
                self.assert_error(response, 405, "DENIED")
                self.assert_blob(self.client, content)

    def test_a_blob_is_needed_until_the_last_manifest_goes(self) -> None:
        config, layer = b"{}", unique()
        self.client.push_blob(config)
        digest = self.client.push_blob(layer)
        manifests = [
            self.client.push_manifest(
                image_manifest(descriptor(config, OCI_CONFIG), [descriptor(layer)], annotations={"n": n})
            )
            for n in "123"
        ]
        for manifest in manifests:
            self.assert_error(self.client.delete(f"blobs/{digest}"), 405, "DENIED")
            self.client.expect(202, "DELETE", f"manifests/{manifest}")
        self.assert_status(self.client.delete(f"blobs/{digest}"), 202)

    def test_a_manifest_pushed_twice_needs_its_blobs_once(self) -> None:
        image = self.client.push_image("one")
        self.client.push_manifest(image.body, "two")
        self.client.push_manifest(image.body)
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        for content in image.blobs:
            self.assert_status(self.client.delete(f"blobs/{digest_of(content)}"), 202)

    def test_only_manifests_of_the_repository_hold_its_blobs(self) -> None:
        image = self.other.push_image("latest")
        for content in image.blobs:
            digest = self.client.push_blob(content)
            self.assert_status(self.client.delete(f"blobs/{digest}"), 202)
            self.assert_blob(self.other, content)

    def test_a_blob_listed_in_an_index_is_not_deleted(self) -> None:
        layer, config = unique(), unique("config")
        for content in (layer, config):
            self.client.push_blob(content)
        cache = image_index(
            [descriptor(layer), descriptor(config, "application/vnd.buildkit.cacheconfig.v0")]
        )
        manifest = self.client.push_manifest(cache, "cache")
        for content in (layer, config):
            self.assert_error(self.client.delete(f"blobs/{digest_of(content)}"), 405, "DENIED")
        self.client.expect(202, "DELETE", f"manifests/{manifest}")
        for content in (layer, config):
            self.assert_status(self.client.delete(f"blobs/{digest_of(content)}"), 202)

    def test_no_delete_leaves_a_tag_without_its_manifest(self) -> None:
        image = self.client.push_image("latest")
        self.assert_error(self.client.delete(f"blobs/{image.digest}"), 405, "DENIED")
        self.assert_image(self.client, image, "latest")
        self.assertEqual(self.client.get("tags/list").json["tags"], ["latest"])
