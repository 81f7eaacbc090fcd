"""What clients were told of can be relied on for the grace period, and for as long as a push takes."""

from __future__ import annotations

import os
import time
from unittest import mock

import registry
from tests import upkeep
from tests.collecting import CollectionTestCase
from tests.support import (
    OCI_CONFIG,
    Client,
    descriptor,
    digest_of,
    encode,
    image_manifest,
    unique,
    with_digest,
)
from tests.upkeep import DAY, HOUR, MINUTE


class Grace(CollectionTestCase):
    """Garbage that a client was told of stays for the grace period, here 100 minutes."""

    def garbage(self) -> bytes:
        """A blob that nothing needs and nobody was told of for long."""
        content = unique("garbage")
        self.client.push_blob(content)
        upkeep.leases_told(self.data.path, DAY)
        return content

    def survives(self, content: bytes, minutes: float, client: Client | None = None) -> bool:
        """Whether it is still there when so much time has passed."""
        upkeep.leases_told(self.data.path, minutes * MINUTE)
        upkeep.collect(self.registry.store, grace=100 * MINUTE)
        repository = (client or self.client).repository
        there = repository in self.data.links(digest_of(content))
        self.assertEqual(digest_of(content) in self.data.files(), there)
        return there

    def assert_leased(self, content: bytes, client: Client | None = None) -> None:
        self.assertTrue(self.survives(content, 90, client), "collected within the grace")
        self.assertFalse(self.survives(content, 20, client), "not collected after the grace")

    def test_an_upload_in_any_form_starts_the_grace(self) -> None:
        def post() -> bytes:
            content = unique()
            self.client.push_blob(content)
            return content

        def session() -> bytes:
            content = unique()
            self.client.expect(
                201, "PUT", with_digest(self.client.open_upload(), digest_of(content)), content
            )
            return content

        for upload in (post, session):
            with self.subTest(upload.__name__):
                self.assert_leased(upload())

    def test_uploading_what_is_there_already_renews_the_grace(self) -> None:
        content = self.garbage()
        self.client.push_blob(content)
        self.assert_leased(content)

    def test_a_head_that_says_yes_renews_the_grace(self) -> None:
        content = self.garbage()
        self.client.expect(200, "HEAD", f"blobs/{digest_of(content)}")
        self.assert_leased(content)

    def test_every_head_counts_however_soon_after_another(self) -> None:
        content = self.garbage()
        path = f"blobs/{digest_of(content)}"
        self.client.expect(200, "HEAD", path)
        upkeep.leases_told(self.data.path, 4)  # seconds
        self.client.expect(200, "HEAD", path)
        upkeep.leases_told(self.data.path, 100 * MINUTE - 3)
        upkeep.collect(self.registry.store, grace=100 * MINUTE)
        self.assert_blob(self.client, content)

    def test_a_mount_starts_the_grace_where_it_leads(self) -> None:
        content = self.garbage()
        self.other.expect(
            201, "POST", f"blobs/uploads/?mount={digest_of(content)}&from={self.client.repository}"
        )
        self.assert_leased(content, self.other)

    def test_a_mount_of_garbage_by_another_repository_is_safe_though_the_source_goes(self) -> None:
        content = self.garbage()
        self.other.expect(
            201, "POST", f"blobs/uploads/?mount={digest_of(content)}&from={self.client.repository}"
        )
        upkeep.collect(self.registry.store)
        self.assert_blob(self.other, content)
        self.assertEqual(self.client.head(f"blobs/{digest_of(content)}").status, 404)

    def test_a_head_of_one_repository_does_not_keep_the_blob_in_another(self) -> None:
        content = self.garbage()
        self.other.push_blob(content)
        self.other.expect(200, "HEAD", f"blobs/{digest_of(content)}")
        upkeep.collect(self.registry.store)
        self.assertEqual(self.data.links(digest_of(content)), [self.other.repository])

    def test_an_image_can_be_pushed_on_the_word_of_a_head(self) -> None:
        image = self.client.push_image("v1", layers=2)
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        upkeep.everything(self.data.path, DAY)
        for content in image.blobs:
            self.client.expect(200, "HEAD", f"blobs/{digest_of(content)}")
        upkeep.collect(self.registry.store, grace=10)
        self.client.push_manifest(image.body, "v1")
        self.assert_image(self.client, image, "v1")

    def test_a_manifest_that_a_head_found_stays_for_the_grace(self) -> None:
        image = self.client.push_image()
        upkeep.everything(self.data.path, DAY)
        self.client.expect(200, "HEAD", f"manifests/{image.digest}")
        upkeep.collect(self.registry.store, untagged_after=HOUR)
        self.push_index(image.descriptor, tag="multi")
        self.assert_image(self.client, image)

    def test_a_manifest_pushed_again_is_as_young_as_a_new_one(self) -> None:
        image = self.client.push_image()
        upkeep.everything(self.data.path, DAY)
        self.client.push_manifest(image.body)
        upkeep.collect(self.registry.store, untagged_after=HOUR)
        self.assert_image(self.client, image)

    def test_an_untagged_manifest_is_not_younger_than_the_grace_when_it_goes(self) -> None:
        image = self.client.push_image()
        self.assertEqual(self.collect(age=50 * MINUTE, untagged_after=0, grace=100 * MINUTE), [])
        self.assert_image(self.client, image)

    def test_the_layers_of_an_image_deleted_just_now_obey_the_grace_too(self) -> None:
        image = self.client.push_image("v1")
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        self.assertEqual(self.collect(age=30 * MINUTE), [])


class PushUnderWay(CollectionTestCase):
    """A push that takes longer than the grace finds its first layers when it comes to the manifest."""

    def setUp(self) -> None:
        super().setUp()
        self.layer = unique("layer")
        for client in (self.client, self.other):
            client.push_blob(self.layer)
        upkeep.leases_told(self.data.path, 2 * HOUR)

    def assert_spared(self) -> None:
        upkeep.collect(self.registry.store)
        self.assertEqual(self.data.links(digest_of(self.layer)), [self.client.repository])

    def assert_collected(self) -> None:
        upkeep.collect(self.registry.store)
        self.assertEqual(self.data.links(digest_of(self.layer)), [])

    def open_upload(self, began: float, written: float) -> str:
        """A session that began, and was last written to, so many seconds ago."""
        with mock.patch.object(registry.time, "time", return_value=time.time() - began):
            location = self.client.open_upload()
        path = self.data.path / "uploads" / location.rpartition("/")[2]
        os.utime(path, (time.time() - written,) * 2)
        return location

    def test_while_another_layer_comes(self) -> None:
        self.open_upload(2 * HOUR, written=50 * MINUTE)
        self.assert_spared()

    def test_not_once_nothing_comes_any_more(self) -> None:
        self.open_upload(2 * HOUR, written=61 * MINUTE)
        self.assert_collected()

    def test_what_came_shortly_before_its_upload_began(self) -> None:
        self.open_upload(2 * HOUR - 30, written=0)
        self.assert_spared()

    def test_not_what_was_there_long_before(self) -> None:
        self.open_upload(2 * HOUR - 2 * MINUTE, written=0)
        self.assert_collected()

    def test_nor_once_the_next_layer_has_come(self) -> None:
        location = self.open_upload(2 * HOUR, written=0)
        content = unique("next layer")
        self.client.expect(201, "PUT", with_digest(location, digest_of(content)), content)
        self.assert_spared()
        upkeep.leases_told(self.data.path, 2 * HOUR)
        self.assert_collected()

    def test_what_an_image_dropped_for_its_size_leaves_behind(self) -> None:
        digest = digest_of(self.layer)
        self.client.push_manifest(encode(image_manifest(descriptor(self.layer, OCI_CONFIG))), "v1")
        upkeep.everything(self.data.path, 2 * HOUR)
        self.open_upload(4 * HOUR, written=0)
        upkeep.collect(self.registry.store, max_size=0)
        self.assert_error(self.client.get("manifests/v1"), 404)
        self.assertEqual(self.data.links(digest), [self.client.repository])

    def test_untagged_children_of_an_index_to_come_stay_too(self) -> None:
        child = self.client.push_image()
        upkeep.everything(self.data.path, 2 * HOUR)
        self.open_upload(2 * HOUR, written=0)
        upkeep.collect(self.registry.store, untagged_after=0)
        self.push_index(child.descriptor, tag="multi")
        self.assert_image(self.client, child)


class ClockAhead(CollectionTestCase):
    """What was stored while the clock was years ahead is as old as if it came with the next collection."""

    def test_it_is_collected_in_its_time(self) -> None:
        loose = unique()
        self.client.push_blob(loose)
        untagged, tagged = self.client.push_image(), self.client.push_image("v1")
        self.assertEqual(self.collect(age=-900 * DAY, untagged_after=HOUR), [])
        self.collect(age=2 * HOUR, untagged_after=HOUR)
        self.assert_gone(loose, untagged.body)
        self.collect(age=0)
        self.collect(age=2 * HOUR)
        self.assert_gone(*untagged.blobs)
        self.assert_image(self.client, tagged)
        for age in (0, 0, 2 * HOUR):  # the image goes, and then what was its own
            self.collect(age=age, max_size=10)
        self.assertEqual(self.data.files(), {})

    def test_it_does_not_stay_the_newest_image(self) -> None:
        ahead = self.client.push_image()
        upkeep.everything(self.data.path, -900 * DAY)
        upkeep.collect(self.registry.store, untagged_after=HOUR, keep_last=1)
        upkeep.everything(self.data.path, 1)
        newer = self.client.push_image()
        self.collect(untagged_after=HOUR, keep_last=1)
        self.assert_image(self.client, newer)
        self.assert_gone(ahead.body)
