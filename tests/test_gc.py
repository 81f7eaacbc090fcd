"""Garbage collection: what is reachable lives, the rest goes, also what has no row."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests import upkeep
from tests.collecting import CollectionTestCase
from tests.support import (
    MEBIBYTE,
    OCI_CONFIG,
    Image,
    descriptor,
    digest_of,
    encode,
    image_manifest,
    unique,
    with_digest,
)
from tests.upkeep import DAY, HOUR, MINUTE

BUILDKIT_CACHE = "application/vnd.buildkit.cacheconfig.v0"


class Liveness(CollectionTestCase):
    def test_everything_of_a_tagged_image_lives(self) -> None:
        image = self.client.push_image("v1", layers=3)
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        self.assert_image(self.client, image, "v1")

    def test_what_nested_indexes_reach_lives(self) -> None:
        image = self.client.push_image()
        index = self.push_index(image.descriptor)
        self.push_index(descriptor(index, "application/vnd.oci.image.index.v1+json"), tag="outer")
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        self.assert_image(self.client, image)

    def test_the_blobs_of_a_buildkit_cache_live(self) -> None:
        layers = [unique("cached layer") for _ in range(3)]
        config = encode({"cache": unique().decode()})
        for content in (config, *layers):
            self.client.push_blob(content)
        self.push_index(*map(descriptor, layers), descriptor(config, BUILDKIT_CACHE), tag="cache")
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        for content in (config, *layers):
            self.assert_blob(self.client, content)

    def test_referrers_of_what_lives_live_and_so_do_theirs(self) -> None:
        image = self.client.push_image("v1")
        signature = self.client.push_image(subject=image.descriptor)
        attestation = self.client.push_image(subject=signature.descriptor)
        listing = self.push_index(attestation.descriptor, subject=image.descriptor)
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        for referrer in (signature, attestation):
            self.assert_image(self.client, referrer)
        self.client.expect(200, "GET", f"manifests/{digest_of(listing)}")

    def test_referrers_of_a_child_of_a_tagged_index_live(self) -> None:
        child = self.client.push_image()
        signature = self.client.push_image(subject=child.descriptor)
        self.push_index(child.descriptor, tag="multi")
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        self.assert_image(self.client, signature)

    def test_referrers_go_with_their_subject(self) -> None:
        image = self.client.push_image()
        signature = self.client.push_image(subject=image.descriptor)
        attestation = self.client.push_image(subject=signature.descriptor)
        self.collect(untagged_after=HOUR)
        for each in (image, signature, attestation):
            self.assert_gone(each.body, *each.blobs)

    def test_a_tagged_referrer_lives_without_its_subject(self) -> None:
        subject = descriptor(unique(), "application/vnd.oci.image.manifest.v1+json")
        signature = self.client.push_image("signature", subject=subject)
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        self.assert_image(self.client, signature, "signature")

    def test_a_layer_that_a_live_image_shares_with_a_dead_one_lives(self) -> None:
        shared = unique("shared")
        self.client.push_blob(shared)
        images = []
        for tag in ("dead", "alive"):
            config = encode({"tag": tag, "id": unique().decode()})
            self.client.push_blob(config)
            manifest = image_manifest(descriptor(config, OCI_CONFIG), [descriptor(shared)])
            self.client.push_manifest(manifest, tag)
            images.append(Image(encode(manifest), config, (shared,)))
        dead, alive = images
        self.client.expect(202, "DELETE", f"manifests/{dead.digest}")
        self.assertEqual(self.collect(), [digest_of(dead.config)])
        self.assert_image(self.client, alive, "alive")

    def test_a_blob_that_two_repositories_have_lives_while_one_needs_it(self) -> None:
        image = self.client.push_image("v1")
        layer = image.layers[0]
        path = f"blobs/uploads/?mount={digest_of(layer)}&from={self.client.repository}"
        self.other.expect(201, "POST", path)
        self.assertEqual(self.collect(), [digest_of(layer)])
        self.assertEqual(self.data.links(digest_of(layer)), [self.client.repository])
        self.assert_image(self.client, image, "v1")

    def test_an_open_upload_is_left_alone(self) -> None:
        content = unique()
        location = self.client.open_upload()
        self.client.expect(202, "PATCH", location, content)
        upkeep.collect(self.registry.store)
        self.client.expect(201, "PUT", with_digest(location, digest_of(content)))
        self.assert_blob(self.client, content)


class WhatGoes(CollectionTestCase):
    def test_blobs_that_no_manifest_needs_go(self) -> None:
        loose = unique().ljust(3 * MEBIBYTE, b".")
        self.client.push_blob(loose)
        self.assertEqual(self.collect(), [digest_of(loose)])
        self.assert_gone(loose)

    def test_the_bytes_of_a_deleted_image_come_back_and_the_repository_leaves_the_catalog(self) -> None:
        image = self.client.push_image("v1", layers=3)
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        self.collect()
        self.assertEqual(self.data.files(), {})
        self.assertEqual(self.client.expect(200, "GET", "/v2/_catalog").json["repositories"], [])
        self.assert_error(self.client.get("tags/list"), 404, "NAME_UNKNOWN")

    def test_pushing_again_uploads_again(self) -> None:
        image = self.client.push_image("v1")
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        self.collect()
        for content in image.blobs:
            self.assertEqual(self.client.head(f"blobs/{digest_of(content)}").status, 404)
            self.client.push_blob(content)
        self.client.push_manifest(image.body, "v1")
        self.assert_image(self.client, image, "v1")

    def test_more_garbage_than_one_batch_goes_in_one_run(self) -> None:
        with self.client.keep_alive() as client:
            pushed = {client.push_blob(unique()) for _ in range(230)}
        self.assertEqual(set(self.collect()), pushed)
        self.assertEqual(self.data.files(), {})

    def test_untagged_manifests_stay_unless_told_otherwise(self) -> None:
        image = self.client.push_image()
        self.assertEqual(self.collect(age=900 * DAY), [])
        self.assert_image(self.client, image)

    def test_untagged_manifests_go_after_the_time_given(self) -> None:
        old, young = self.client.push_image(), self.client.push_image()
        upkeep.everything(self.data.path, 6 * DAY, old.digest)
        self.collect(age=2 * DAY, untagged_after=7 * DAY)
        self.assert_gone(old.body, *old.blobs)
        self.assert_image(self.client, young)

    def test_what_a_tag_was_moved_from_goes_some_time_after_that(self) -> None:
        old, new = self.client.push_image("v1"), self.client.push_image()
        upkeep.everything(self.data.path, 30 * DAY)
        self.client.push_manifest(new.body, "v1")
        self.assertEqual(self.collect(age=HOUR * 2, untagged_after=DAY), [])
        self.assert_image(self.client, old)
        self.collect(age=2 * DAY, untagged_after=DAY)
        self.assert_gone(old.body, *old.blobs)
        self.assert_image(self.client, new, "v1")

    def test_what_a_tag_was_deleted_from_goes_some_time_after_that(self) -> None:
        image = self.client.push_image("v1")
        upkeep.everything(self.data.path, 30 * DAY)
        self.client.expect(202, "DELETE", "manifests/v1")
        self.assertEqual(self.collect(age=HOUR * 2, untagged_after=DAY), [])
        self.collect(age=2 * DAY, untagged_after=DAY)
        self.assert_gone(image.body, *image.blobs)

    def test_an_untagged_index_goes_with_its_children(self) -> None:
        children = [self.client.push_image() for _ in range(2)]
        index = self.push_index(*(child.descriptor for child in children))
        self.collect(untagged_after=HOUR)
        self.assert_gone(index, *(child.body for child in children))
        self.assertEqual(self.data.files(), {})

    def test_the_newest_untagged_manifests_of_each_repository_can_be_kept(self) -> None:
        images = {}
        for client in (self.client, self.other):
            for number in range(4):
                images[client, number] = image = client.push_image()
                upkeep.everything(self.data.path, (4 - number) * DAY, image.digest)
        self.collect(untagged_after=HOUR, keep_last=2)
        for (client, number), image in images.items():
            with self.subTest(repository=client.repository, number=number):
                status = client.head(f"manifests/{image.digest}").status
                self.assertEqual(status, 200 if number >= 2 else 404)
        self.assert_image(self.other, images[self.other, 3])

    def test_tagged_manifests_do_not_count_among_the_newest_untagged(self) -> None:
        image = self.client.push_image()
        for number in range(3):
            self.client.push_image(f"v{number}")
        self.assertEqual(self.collect(untagged_after=HOUR, keep_last=1), [])
        self.assert_image(self.client, image)


class DryRun(CollectionTestCase):
    def test_it_removes_nothing_and_says_what_a_real_run_removes(self) -> None:
        self.client.push_image("v1")
        index_child = self.client.push_image()
        self.push_index(index_child.descriptor)
        self.client.push_image(subject=index_child.descriptor)
        for _ in range(120):
            self.client.push_blob(unique())
        self.other.push_image()
        upkeep.everything(self.data.path, DAY)
        before = self.data.files(), self.data.rows("SELECT * FROM repository_blobs")
        policy = {"untagged_after": HOUR, "keep_last": 1}
        predicted = upkeep.collect(self.registry.store, dry_run=True, **policy)
        self.assertEqual((self.data.files(), self.data.rows("SELECT * FROM repository_blobs")), before)
        self.assertGreater(len(predicted), 100)
        self.assertEqual(upkeep.collect(self.registry.store, **policy), predicted)

    def test_others_push_and_delete_meanwhile(self) -> None:
        image = self.client.push_image("v1")
        for _ in range(3):
            self.client.push_blob(unique())
        upkeep.everything(self.data.path, DAY)
        pushed = []

        def push(_removal: Any) -> None:
            if not pushed:
                pushed.append(self.other.push_image("v1"))
                self.client.expect(202, "DELETE", f"manifests/{image.digest}")

        collector = registry.Collector(self.registry.store, registry.Policy(), push)
        collector.run(dry_run=True)
        self.assert_image(self.other, pushed[0], "v1")
        self.assertEqual(len(upkeep.collect(self.registry.store)), 5)

    def test_so_does_one_that_looks_at_the_size(self) -> None:
        for number in range(4):
            image = self.client.push_image(f"v{number}")
            upkeep.everything(self.data.path, (4 - number) * DAY, image.digest)
        upkeep.everything(self.data.path, DAY)
        size = sum(self.data.files().values())
        predicted = upkeep.collect(self.registry.store, dry_run=True, max_size=size // 2)
        self.assertEqual(sum(self.data.files().values()), size)
        self.assertEqual(upkeep.collect(self.registry.store, max_size=size // 2), predicted)


class Walk(CollectionTestCase):
    """What a crash left under blobs/ without a row is found by a walk, here a day after it came."""

    def walk(self, **options: Any) -> list[tuple[str, str]]:
        now = time.time()
        with mock.patch("time.time", lambda: now + DAY):
            return upkeep.collect(self.registry.store, walk=True, grace=HOUR, **options)

    def leave(self, content: bytes) -> Path:
        """A file that a crash left."""
        path = self.data.path / "blobs" / digest_of(content).replace(":", "/")
        path.write_bytes(content)
        return path

    def test_it_is_removed(self) -> None:
        image = self.client.push_image("v1")
        content = unique()
        path = self.leave(content)
        self.assertEqual(upkeep.collect(self.registry.store), [], "an ordinary run follows the garbage")
        for dry_run in (True, False):
            self.assertTrue(path.exists())
            self.assertEqual(self.walk(dry_run=dry_run), [("file", digest_of(content))])
        self.assert_consistent()
        self.assert_image(self.client, image)
        self.assertEqual(self.walk(), [])

    def test_a_file_is_young_that_was_written_or_renamed_within_the_grace(self) -> None:
        path = self.leave(unique())
        os.utime(path, (0, 0))
        self.assertEqual(upkeep.collect(self.registry.store, walk=True), [], "just renamed")
        tomorrow = time.time() + DAY - MINUTE
        os.utime(path, (tomorrow, tomorrow))
        self.assertEqual(self.walk(), [], "just written")
        os.utime(path, (0, 0))
        self.assertEqual(len(self.walk()), 1)

    def test_a_time_in_the_future_counts_as_now(self) -> None:
        path = self.leave(unique())
        os.utime(path, (2**32, 2**32))
        self.assertEqual(self.walk(), [])
        self.assertEqual(len(self.walk()), 1)

    def test_only_files_that_a_registry_names_are_looked_at(self) -> None:
        directory = self.data.path / "blobs" / "sha256"
        for name in ("notes.txt", "A" * 64, "0" * 63):
            (directory / name).write_bytes(b"")
        (directory / ("1" * 64)).mkdir()
        (directory / ("2" * 64)).symlink_to(directory / "notes.txt")
        self.assertEqual(self.walk(), [])
        self.assertEqual(len(list(directory.iterdir())), 5)

    def test_a_push_of_just_that_content_wins(self) -> None:
        content = unique()
        path = self.leave(content)
        with upkeep.before_removing(lambda: self.client.push_blob(content)):
            self.assertEqual(self.walk(), [])
        self.assert_blob(self.client, content)
        self.assertTrue(path.exists())

    def test_a_push_that_has_just_renamed_its_file_wins(self) -> None:
        path = self.leave(unique())
        ages = [DAY]  # until then; after that the file is as young as it is
        look = os.lstat

        def aged(name: str) -> os.stat_result:
            status = look(name)
            age = sum(ages) if str(name) == str(path) else 0
            return os.stat_result([*status[:8], status.st_mtime - age, status.st_ctime - age])

        with mock.patch("os.lstat", aged), upkeep.before_removing(ages.clear):
            self.assertEqual(upkeep.collect(self.registry.store, walk=True), [])
        self.assertTrue(path.exists())


class Sweeping(CollectionTestCase):
    """Upload sessions beside the sweep of those that were given up."""

    def test_a_session_opened_while_the_sweep_looks_around_is_left_alone(self) -> None:
        for owner, name in ((self.registry.store.files, "uploads"), (registry, "UploadFile")):
            with self.subTest(name):
                given_up = self.client.open_upload().rpartition("/")[2]
                os.utime(self.data.path / "uploads" / given_up, (0, 0))
                self.assert_survives_sweep(owner, name)

    def assert_survives_sweep(self, owner: Any, name: str) -> None:
        """A session lives that was opened right before the sweep first calls a method."""
        look, opened = getattr(owner, name), []

        def open_and_look(*arguments: Any, **options: Any) -> Any:
            if not opened:
                opened.append("")
                opened[:] = [self.client.open_upload()]
            return look(*arguments, **options)

        with mock.patch.object(owner, name, open_and_look):
            self.registry.store.expire_uploads()
        content = unique()
        self.client.expect(201, "PUT", with_digest(opened[0], digest_of(content)), content)
