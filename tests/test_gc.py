"""Garbage collection: what is reachable lives, what clients were told of can be relied on, the rest goes."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import registry
from tests import upkeep
from tests.support import (
    MEBIBYTE,
    OCI_CONFIG,
    OCI_MANIFEST,
    ROOT,
    TIMEOUT,
    Client,
    Daemon,
    DataDirectory,
    Image,
    RegistryTestCase,
    descriptor,
    digest_of,
    encode,
    image_index,
    image_manifest,
    python,
    run_at_once,
    unique,
    with_digest,
)
from tests.upkeep import DAY, HOUR, MINUTE

BUILDKIT_CACHE = "application/vnd.buildkit.cacheconfig.v0"


def add_garbage(data: Path, count: int) -> None:
    """Rows of so many blobs of the first repository that nothing needs, for long, whose files are gone."""
    numbers = f"WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT {count})"
    digest = "printf('sha256:%064d', n)"
    upkeep.change(data, f"INSERT INTO blobs {numbers} SELECT {digest}, 1 FROM n")
    columns = "repository_id, digest, leased_at, needed_by"
    links = f"{numbers} SELECT 1, {digest}, 0, 0 FROM n"
    upkeep.change(data, f"INSERT INTO repository_blobs ({columns}) {links}")


class CollectionTestCase(RegistryTestCase):
    """Collects in process, on contents that have grown old."""

    options: ClassVar[dict[str, Any]] = {"sync": False}

    @classmethod
    def setUpClass(cls) -> None:
        """Each test has a registry of its own, since a collection sees all repositories."""

    def setUp(self) -> None:
        super().setUpClass()
        self.addCleanup(self.doClassCleanups)
        super().setUp()

    def collect(self, *, age: float = DAY, **policy: Any) -> list[str]:
        """Let everything be this old, collect, and return the digests of what went."""
        upkeep.everything(self.data.path, age)
        removed = upkeep.collect(self.registry.store, **policy)
        self.assert_consistent()
        return [digest for _, digest in removed]

    def assert_lives(self, image: Image, reference: str = "", client: Client | None = None) -> None:
        client = client or self.client
        manifest = client.expect(200, "GET", f"manifests/{reference or image.digest}")
        self.assertEqual(manifest.body, image.body)
        for content in image.blobs:
            self.assert_blob(client, content)

    def assert_gone(self, *contents: bytes) -> None:
        for content in contents:
            self.assert_no_blob(self.client, digest_of(content))

    def push_index(self, *children: dict, tag: str = "", **more: Any) -> bytes:
        body = encode(image_index(children, **more))
        self.client.push_manifest(body, tag)
        return body


class Liveness(CollectionTestCase):
    def test_everything_of_a_tagged_image_lives(self) -> None:
        image = self.client.push_image("v1", layers=3)
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        self.assert_lives(image, "v1")

    def test_what_nested_indexes_reach_lives(self) -> None:
        image = self.client.push_image()
        index = self.push_index(image.descriptor)
        self.push_index(descriptor(index, "application/vnd.oci.image.index.v1+json"), tag="outer")
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        self.assert_lives(image)

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
            self.assert_lives(referrer)
        self.client.expect(200, "GET", f"manifests/{digest_of(listing)}")

    def test_referrers_of_a_child_of_a_tagged_index_live(self) -> None:
        child = self.client.push_image()
        signature = self.client.push_image(subject=child.descriptor)
        self.push_index(child.descriptor, tag="multi")
        self.assertEqual(self.collect(untagged_after=HOUR), [])
        self.assert_lives(signature)

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
        self.assert_lives(signature, "signature")

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
        self.assert_lives(alive, "alive")

    def test_a_blob_that_two_repositories_have_lives_while_one_needs_it(self) -> None:
        image = self.client.push_image("v1")
        layer = image.layers[0]
        path = f"blobs/uploads/?mount={digest_of(layer)}&from={self.client.repository}"
        self.other.expect(201, "POST", path)
        self.assertEqual(self.collect(), [digest_of(layer)])
        self.assertEqual(self.data.links(digest_of(layer)), [self.client.repository])
        self.assert_lives(image, "v1")

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
        self.assert_lives(image, "v1")

    def test_more_garbage_than_one_batch_goes_in_one_run(self) -> None:
        with self.client.keep_alive() as client:
            pushed = {client.push_blob(unique()) for _ in range(230)}
        self.assertEqual(set(self.collect()), pushed)
        self.assertEqual(self.data.files(), {})

    def test_untagged_manifests_stay_unless_told_otherwise(self) -> None:
        image = self.client.push_image()
        self.assertEqual(self.collect(age=900 * DAY), [])
        self.assert_lives(image)

    def test_untagged_manifests_go_after_the_time_given(self) -> None:
        old, young = self.client.push_image(), self.client.push_image()
        upkeep.everything(self.data.path, 6 * DAY, old.digest)
        self.collect(age=2 * DAY, untagged_after=7 * DAY)
        self.assert_gone(old.body, *old.blobs)
        self.assert_lives(young)

    def test_what_a_tag_was_moved_from_goes_some_time_after_that(self) -> None:
        old, new = self.client.push_image("v1"), self.client.push_image()
        upkeep.everything(self.data.path, 30 * DAY)
        self.client.push_manifest(new.body, "v1")
        self.assertEqual(self.collect(age=HOUR * 2, untagged_after=DAY), [])
        self.assert_lives(old)
        self.collect(age=2 * DAY, untagged_after=DAY)
        self.assert_gone(old.body, *old.blobs)
        self.assert_lives(new, "v1")

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
        self.assert_lives(images[self.other, 3], client=self.other)

    def test_tagged_manifests_do_not_count_among_the_newest_untagged(self) -> None:
        image = self.client.push_image()
        for number in range(3):
            self.client.push_image(f"v{number}")
        self.assertEqual(self.collect(untagged_after=HOUR, keep_last=1), [])
        self.assert_lives(image)


class Retention(CollectionTestCase):
    """Which untagged manifests stay: images count, and what belongs to something goes or stays with it."""

    def age(self, days: float, *bodies: bytes) -> None:
        for body in bodies:
            upkeep.manifests_pushed(self.data.path, days * DAY, digest_of(body))

    def assert_manifests(self, *bodies: bytes) -> None:
        """These are there, and no others."""
        rows = self.data.rows("SELECT digest FROM manifests")
        self.assertEqual({digest for (digest,) in rows}, set(map(digest_of, bodies)))
        self.assert_consistent()

    def test_which_images_stay_is_asked_once_for_each_repository(self) -> None:
        images = [self.client.push_image() for _ in range(7)]
        for number, image in enumerate(images):
            self.age(7 - number, image.body)
        store = self.registry.store
        asked = mock.patch.object(store, "query", wraps=store.query)
        with mock.patch.object(registry, "CHOICE", 2), asked as query:
            self.collect(untagged_after=HOUR, keep_last=2)
        self.assertEqual(sum("ORDER BY pushed_at DESC" in call.args[0] for call in query.mock_calls), 1)
        self.assert_manifests(images[5].body, images[6].body)

    def test_an_orphaned_referrer_takes_no_place_of_an_image_and_goes(self) -> None:
        image = self.client.push_image()
        orphan = self.client.push_image(subject=descriptor(unique(), OCI_MANIFEST))
        self.age(1, image.body)
        self.collect(untagged_after=HOUR, keep_last=1)
        self.assert_manifests(image.body)
        self.assert_gone(*orphan.blobs)

    def test_an_orphaned_referrer_stays_for_its_time_and_goes_with_its_children(self) -> None:
        child = self.client.push_image()
        self.push_index(child.descriptor, subject=descriptor(unique(), OCI_MANIFEST))
        self.assertEqual(self.collect(untagged_after=7 * DAY, keep_last=1), [])
        self.collect(age=7 * DAY, untagged_after=7 * DAY, keep_last=1)
        self.assert_manifests()

    def test_a_referrer_whose_subject_was_deleted_is_orphaned(self) -> None:
        image, newer = self.client.push_image(), self.client.push_image()
        self.client.push_image(subject=image.descriptor)
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        self.age(1, newer.body)
        self.collect(untagged_after=HOUR, keep_last=1)
        self.assert_manifests(newer.body)

    def test_what_refers_to_a_kept_image_stays_with_it(self) -> None:
        images = [self.client.push_image() for _ in range(2)]
        referrers = [self.client.push_image(subject=image.descriptor) for image in images]
        self.age(2, images[0].body)
        self.age(1, images[1].body)
        self.collect(untagged_after=HOUR, keep_last=1)
        self.assert_manifests(images[1].body, referrers[1].body)

    def test_a_referrer_goes_with_its_subject_though_it_is_younger(self) -> None:
        image = self.client.push_image()
        self.client.push_image(subject=image.descriptor)
        upkeep.everything(self.data.path, 7 * DAY, image.digest)
        self.collect(untagged_after=7 * DAY)
        self.assert_manifests()

    def test_children_displace_no_image_and_go_with_their_index_in_the_same_run(self) -> None:
        children = [self.client.push_image() for _ in range(2)]
        index = self.push_index(*(child.descriptor for child in children))
        images = [self.client.push_image() for _ in range(2)]
        self.age(3, index)
        self.age(2, images[0].body)
        self.age(1, images[1].body)
        self.collect(untagged_after=HOUR, keep_last=2)
        self.assert_manifests(*(image.body for image in images))
        self.assert_gone(*children[0].blobs)

    def test_a_child_of_two_indexes_goes_with_the_second(self) -> None:
        shared, own = self.client.push_image(), self.client.push_image()
        old = self.push_index(shared.descriptor, own.descriptor)
        new = self.push_index(shared.descriptor)
        self.age(1, old)
        self.collect(untagged_after=HOUR, keep_last=1)
        self.assert_manifests(shared.body, new)
        self.collect(untagged_after=HOUR)
        self.assert_manifests()

    def push_circle(self, tag: str = "") -> list[bytes]:
        """An index that lists an image and refers to what refers to that image."""
        image = self.client.push_image(tag)
        signature = self.client.push_image(subject=image.descriptor)
        index = self.push_index(image.descriptor, subject=signature.descriptor)
        listing = self.push_index(image.descriptor, subject=image.descriptor)
        return [image.body, signature.body, index, listing]

    def test_what_keeps_itself_in_a_circle_goes_once_no_tag_reaches_it(self) -> None:
        circle = self.push_circle("v1")
        self.collect(untagged_after=HOUR, max_size=10)
        self.assert_manifests(*circle)
        self.client.expect(202, "DELETE", "manifests/v1")
        self.collect(age=2 * DAY, untagged_after=7 * DAY)
        self.assert_manifests(*circle)
        self.collect(age=6 * DAY, untagged_after=7 * DAY)
        self.assert_manifests()

    def test_what_keeps_itself_in_a_circle_goes_when_the_store_is_too_large(self) -> None:
        self.push_circle()
        self.collect(max_size=10)
        self.assert_manifests()

    def test_what_is_kept_again_between_choosing_and_dropping_stays(self) -> None:
        base = self.client.push_image("base")
        layers = map(descriptor, base.layers)
        subject = image_manifest(descriptor(base.config, OCI_CONFIG), layers, annotations={"not": "pushed"})

        def push_subject(_orphan: Image) -> None:
            self.client.push_manifest(subject)

        def push_tag(orphan: Image) -> None:
            self.client.push_manifest(orphan.body, "again")

        def push_index(orphan: Image) -> None:
            self.push_index(orphan.descriptor, tag="multi")

        def ask(orphan: Image) -> None:
            self.client.expect(200, "HEAD", f"manifests/{orphan.digest}")

        for policy in ({"untagged_after": HOUR}, {"max_size": 1}):
            for arrive in (push_subject, push_tag, push_index, ask):
                with self.subTest(arrive.__name__, policy=policy):
                    orphan = self.client.push_image(subject=descriptor(encode(subject), OCI_MANIFEST))
                    upkeep.everything(self.data.path, 30 * DAY)
                    upkeep.leases_told(self.data.path, -30 * DAY, base.digest)  # stays, and its blobs with it
                    with upkeep.before_removing(lambda: arrive(orphan)):  # noqa: B023 - done at once
                        upkeep.collect(self.registry.store, **policy)
                    self.assert_lives(orphan)
                    for digest in self.data.rows(
                        "SELECT digest FROM manifests WHERE digest <> ?", base.digest
                    ):
                        self.client.delete(f"manifests/{digest[0]}")
                    for digest in self.data.rows(
                        "SELECT digest FROM manifests WHERE digest <> ?", base.digest
                    ):
                        self.client.delete(f"manifests/{digest[0]}")


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
        self.assert_lives(image, "v1")

    def test_a_manifest_that_a_head_found_stays_for_the_grace(self) -> None:
        image = self.client.push_image()
        upkeep.everything(self.data.path, DAY)
        self.client.expect(200, "HEAD", f"manifests/{image.digest}")
        upkeep.collect(self.registry.store, untagged_after=HOUR)
        self.push_index(image.descriptor, tag="multi")
        self.assert_lives(image)

    def test_a_manifest_pushed_again_is_as_young_as_a_new_one(self) -> None:
        image = self.client.push_image()
        upkeep.everything(self.data.path, DAY)
        self.client.push_manifest(image.body)
        upkeep.collect(self.registry.store, untagged_after=HOUR)
        self.assert_lives(image)

    def test_an_untagged_manifest_is_not_younger_than_the_grace_when_it_goes(self) -> None:
        image = self.client.push_image()
        self.assertEqual(self.collect(age=50 * MINUTE, untagged_after=0, grace=100 * MINUTE), [])
        self.assert_lives(image)

    def test_the_layers_of_an_image_deleted_just_now_obey_the_grace_too(self) -> None:
        image = self.client.push_image("v1")
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        self.assertEqual(self.collect(age=30 * MINUTE), [])


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
        self.assert_lives(pushed[0], "v1", self.other)
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


class MaximumSize(CollectionTestCase):
    def push_sized(self, tag: str) -> Image:
        layer = unique(tag).ljust(100_000, b".")
        config = encode({"tag": tag})
        for content in (layer, config):
            self.client.push_blob(content)
        manifest = image_manifest(descriptor(config, OCI_CONFIG), [descriptor(layer)])
        self.client.push_manifest(manifest, tag)
        return Image(encode(manifest), config, (layer,))

    def tags(self) -> list[str]:
        return self.client.expect(200, "GET", "tags/list").json["tags"]

    def test_the_least_recently_pulled_go_first_until_the_rest_fits(self) -> None:
        images = {tag: self.push_sized(tag) for tag in "abcde"}
        for days, tag in enumerate("abcde"):
            upkeep.manifests_pushed(self.data.path, (9 - days) * DAY, images[tag].digest)
        for tag in "ac":
            self.client.expect(200, "GET", f"manifests/{tag}")
        self.registry.store.flush_pulls()
        upkeep.leases_told(self.data.path, DAY)
        upkeep.collect(self.registry.store, max_size=350_000)
        self.assertEqual(self.tags(), ["a", "c", "e"])
        self.assertLessEqual(sum(self.data.files().values()), 350_000)
        for tag in "ace":
            self.assert_lives(images[tag], tag)
        self.assert_consistent()

    def test_layers_still_within_their_grace_do_not_cost_more_images(self) -> None:
        images = {tag: self.push_sized(tag) for tag in "abcde"}
        upkeep.everything(self.data.path, DAY)
        for days, tag in enumerate("abcde"):
            upkeep.manifests_pushed(self.data.path, (9 - days) * DAY, images[tag].digest)
        for image in images.values():
            upkeep.leases_told(self.data.path, -DAY, digest_of(image.layers[0]))
        for _ in range(2):  # what an earlier run has let go counts as well
            self.collect(age=0, max_size=450_000)
            self.assertEqual(self.tags(), ["b", "c", "d", "e"])

    def test_what_an_index_has_let_go_takes_its_turn_among_the_others(self) -> None:
        images = {tag: self.push_sized(tag) for tag in ("first", "second", "third", "fourth")}
        indexes = {f"index-{tag}": self.push_index(image.descriptor) for tag, image in images.items()}
        for tag, body in indexes.items():
            self.client.push_manifest(body, tag)
        for days, tag in enumerate(images):
            upkeep.manifests_pushed(self.data.path, (9 - 2 * days) * DAY, images[tag].digest)
            upkeep.manifests_pushed(self.data.path, (8 - 2 * days) * DAY, digest_of(indexes[f"index-{tag}"]))
        self.collect(max_size=350_000)
        self.assertEqual(self.tags(), sorted([*list(images)[1:], *list(indexes)[1:]]))

    def test_what_images_share_counts_once_the_last_of_them_is_gone(self) -> None:
        shared = unique().ljust(100_000, b".")
        for number, client in enumerate((self.client, self.other, self.client, self.other)):
            client.push_blob(shared)
            config = encode({"number": number})
            client.push_blob(config)
            body = encode(image_manifest(descriptor(config, OCI_CONFIG), [descriptor(shared)]))
            client.push_manifest(body, f"v{number}")
            upkeep.manifests_pushed(self.data.path, (9 - number) * DAY, digest_of(body))
        self.collect(max_size=100_500)
        self.assertEqual(self.data.rows("SELECT name FROM tags"), [("v3",)])
        self.assertEqual(self.data.links(digest_of(shared)), [self.other.repository])
        self.collect(max_size=100_000)
        self.assertEqual(self.data.files(), {})

    def test_the_write_lock_is_never_held_to_choose(self) -> None:
        """To look for each one among all others took most of a collection's time."""
        image = self.push_sized("a")
        copy = "INSERT INTO manifests SELECT repository_id, ?, media_type, NULL, NULL, 0, 0 FROM manifests"
        for number in range(250):
            digest = f"sha256:{number:064}"
            upkeep.change(self.data.path, "INSERT INTO blobs VALUES (?, 1000)", digest)
            upkeep.change(self.data.path, "INSERT INTO repository_blobs VALUES (1, ?, 0, 0)", digest)
            upkeep.change(self.data.path, f"{copy} LIMIT 1", digest)
            upkeep.change(
                self.data.path, "INSERT INTO manifest_references VALUES (1, ?, ?, 1)", digest, digest
            )
        seen: list[str] = []
        store = self.registry.store
        store._writer.set_trace_callback(seen.append)
        with mock.patch.object(store, "query", wraps=store.query) as query:
            upkeep.collect(store, max_size=150_000)
        store._writer.set_trace_callback(None)
        asked = sum("ORDER BY pulled_at" in call.args[0] for call in query.mock_calls)
        self.assertIn(asked, range(1, 5))
        self.assertEqual(len(self.data.rows("SELECT 1 FROM manifests WHERE pulled_at = 0")), 49)
        self.assertEqual([sql for sql in seen if "ORDER BY" in sql or "sum(" in sql], [])
        self.assert_lives(image, "a")

    def test_a_store_that_fits_loses_nothing(self) -> None:
        self.push_sized("a")
        self.assertEqual(self.collect(max_size=MEBIBYTE), [])

    def test_pulls_are_recorded_without_a_write_for_each(self) -> None:
        image = self.push_sized("a")
        upkeep.everything(self.data.path, DAY)
        pulled = "SELECT pulled_at FROM manifests WHERE digest = ?"
        before = self.data.rows(pulled, image.digest)
        self.client.expect(200, "GET", "manifests/a")
        self.assertEqual(self.data.rows(pulled, image.digest), before)
        self.registry.store.flush_pulls()
        self.assertGreater(self.data.rows(pulled, image.digest), before)

    def test_what_was_pushed_within_the_grace_stays(self) -> None:
        image = self.push_sized("a")
        self.assertEqual(self.collect(age=30 * MINUTE, max_size=1000), [])
        self.assert_lives(image, "a")

    def test_an_index_goes_with_its_children_and_not_one_of_them_alone(self) -> None:
        child = self.push_sized("child")
        index = self.push_index(child.descriptor, tag="multi")
        self.client.expect(202, "DELETE", "manifests/child")
        young = self.push_sized("young")
        for digest, days in ((child.digest, 9), (digest_of(index), 8)):
            upkeep.manifests_pushed(self.data.path, days * DAY, digest)
        self.collect(max_size=150_000)
        self.assertEqual(self.tags(), ["young"])
        self.assert_lives(young, "young")
        self.assertEqual(self.client.head(f"manifests/{digest_of(index)}").status, 404)
        self.assert_gone(child.body, *child.blobs)


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
        self.assert_lives(child)


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
        self.assert_lives(tagged)
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
        self.assert_lives(newer)
        self.assert_gone(ahead.body)


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
        self.assert_lives(image)
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
        ages = iter([DAY])  # at the first look; after that the file is as young as it is
        look = os.lstat

        def aged(name: str) -> os.stat_result:
            status = look(name)
            age = next(ages, 0) if str(name) == str(path) else 0
            return os.stat_result([*status[:8], status.st_mtime - age, status.st_ctime - age])

        with mock.patch("os.lstat", aged):
            self.assertEqual(upkeep.collect(self.registry.store, walk=True), [])
        self.assertEqual(next(ages, None), None)
        self.assertTrue(path.exists())


class Stopping(CollectionTestCase):
    """A collection reports as it goes, and can be stopped between two batches."""

    def setUp(self) -> None:
        super().setUp()
        self.client.push_blob(unique())

    def test_what_was_removed_is_not_kept_in_memory(self) -> None:
        add_garbage(self.data.path, 1000)
        reported, kept = 0, []

        def count(_removal: Any) -> None:
            nonlocal reported
            reported += 1
            if reported % 250 == 0:
                kept.append(sum(type(each) is registry.Removal for each in gc.get_objects()))

        registry.Collector(self.registry.store, registry.Policy(), count).run()
        self.assertEqual((reported, len(kept)), (1000, 4))
        self.assertLessEqual(max(kept), registry.BATCH)

    def test_it_stops_between_batches_with_all_reported_that_is_gone(self) -> None:
        add_garbage(self.data.path, 1000)
        reported: list[Any] = []
        collector = registry.Collector(
            self.registry.store, registry.Policy(), reported.append, stopped=lambda: len(reported) > 150
        )
        collector.run()
        ((left,),) = self.data.rows("SELECT count(*) FROM blobs")
        self.assertEqual((len(reported), left), (200, 801))

    def test_closing_does_not_wait_for_the_rest(self) -> None:
        add_garbage(self.data.path, 20_000)
        begun = threading.Event()
        with mock.patch.object(registry.Files, "remove", lambda *_: begun.set()):
            collecting = registry.Registry(data=str(self.data.path), sync=False, gc_interval=0.001)
            collecting.start()
            self.assertTrue(begun.wait(TIMEOUT))
            collecting.close()
        ((left,),) = self.data.rows("SELECT count(*) FROM blobs WHERE size = 1")
        self.assertGreater(left, 0)


class Sweeping(CollectionTestCase):
    """Upload sessions beside the sweep of those that were given up."""

    def test_a_session_opened_while_the_sweep_looks_around_is_left_alone(self) -> None:
        for name in ("uploads", "open_upload"):
            with self.subTest(name):
                given_up = self.client.open_upload().rpartition("/")[2]
                os.utime(self.data.path / "uploads" / given_up, (0, 0))
                self.assert_survives_sweep(self.registry.store.files, name)

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


class Command(unittest.TestCase):
    """`python registry.py gc`, beside a running daemon."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.data = DataDirectory(directory.name)
        self.daemon = Daemon(directory.name, "--quiet", "--gc-interval", "0")
        self.addCleanup(self.daemon.kill)
        self.daemon.start()
        self.client = self.daemon.client

    def gc(self, *options: str) -> tuple[int, list[str], str]:
        done = python("registry.py", "gc", "--data", str(self.data.path), *options)
        return done.returncode, done.stdout.splitlines(), done.stderr

    def test_it_prints_what_it_removed_and_how_many_bytes_that_freed(self) -> None:
        content = unique().ljust(12_345, b".")
        digest = self.client.push_blob(content)
        kept = self.client.push_image("v1")
        upkeep.everything(self.data.path, DAY)
        for options in (("--dry-run",), ()):
            with self.subTest(options):
                self.assertIn(digest, self.data.files())
                status, lines, errors = self.gc(*options)
                self.assertEqual((status, errors), (0, ""))
                self.assertEqual(len([line for line in lines if digest in line]), 1, lines)
                self.assertNotIn(kept.digest, "\n".join(lines))
                self.assertIn("12345", re.findall(r"\d+", lines[-1]))
        self.assertNotIn(digest, self.data.files())
        self.assertEqual(self.client.head(f"blobs/{digest}").status, 404)
        self.client.push_blob(content)

    def test_the_running_daemon_serves_nothing_of_what_was_removed(self) -> None:
        image = self.client.push_image()
        self.client.expect(200, "GET", f"manifests/{image.digest}")
        upkeep.everything(self.data.path, DAY)
        self.gc("--untagged-after", "1h")
        for path in (f"manifests/{image.digest}", f"blobs/{digest_of(image.config)}"):
            self.assertEqual(self.client.get(path).status, 404)

    def test_with_nothing_to_do_it_succeeds(self) -> None:
        status, lines, _ = self.gc()
        self.assertEqual((status, len(lines)), (0, 1))

    def test_it_goes_on_when_nobody_reads_what_it_prints(self) -> None:
        with self.client.keep_alive() as client:
            for _ in range(120):
                client.push_blob(unique())
        upkeep.everything(self.data.path, DAY)
        reader, writer = os.pipe()
        os.close(reader)
        try:
            command = [sys.executable, "registry.py", "gc", "--data", str(self.data.path)]
            done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
        finally:
            os.close(writer)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual(self.data.files(), {})

    def test_all_walks_over_the_files_too(self) -> None:
        left = self.data.path / "blobs" / "sha256" / ("3" * 64)
        left.write_bytes(b"left by a crash")
        self.assertEqual(self.gc("--all")[1], ["removed nothing"], "it is young")
        tomorrow, printed = time.time() + DAY, io.StringIO()
        with mock.patch("time.time", lambda: tomorrow), contextlib.redirect_stdout(printed):
            for options in ((), ("--all", "--dry-run"), ("--all",)):
                self.assertTrue(left.exists())
                self.assertEqual(registry.main(["gc", "--data", str(self.data.path), *options]), 0)
        self.assertFalse(left.exists())
        self.assertEqual(printed.getvalue().count(left.name), 2)

    def test_a_dry_run_that_is_stopped_leaves_no_copy(self) -> None:
        self.client.push_blob(unique())
        add_garbage(self.data.path, 2000)  # to say so takes more than a pipe holds
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "registry.py", "gc", "--dry-run", "--data", str(self.data.path)]
            environment = {**os.environ, "TMPDIR": temporary}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
            process.stdout.readline()
            self.assertNotEqual(os.listdir(temporary), [])
            process.terminate()
            process.communicate(timeout=TIMEOUT)
            self.assertEqual((process.returncode, os.listdir(temporary)), (128 + signal.SIGTERM, []))

    def test_a_data_directory_that_is_none_is_an_error_and_is_not_made(self) -> None:
        with tempfile.TemporaryDirectory() as parent:
            done = python("registry.py", "gc", "--data", f"{parent}/nothing")
            self.assertNotEqual(done.returncode, 0)
            self.assertNotIn("Traceback", done.stderr)
            self.assertEqual(list(Path(parent).iterdir()), [])

    def test_a_grace_too_short_for_a_push_is_refused(self) -> None:
        for grace, status in (("9s", 2), ("10s", 0), ("0", 2), ("-1h", 2), ("soon", 2)):
            with self.subTest(grace):
                self.assertEqual(self.gc(f"--grace={grace}")[0], status)

    def test_durations_and_sizes_have_units(self) -> None:
        for options in (
            ("--untagged-after", "7d"),
            ("--untagged-after", "90m"),
            ("--max-size", "50G"),
            ("--max-size", "64M"),
            ("--keep-last", "3"),
        ):
            with self.subTest(options):
                self.assertEqual(self.gc(*options)[0], 0)
        for options in (("--untagged-after", "7 weeks"), ("--max-size", "big"), ("--keep-last", "some")):
            with self.subTest(options):
                self.assertEqual(self.gc(*options)[0], 2)

    def test_pushes_from_another_process_never_miss_a_blob_while_collections_run(self) -> None:
        """Each round leaves garbage that the next one relies on after asking for it."""
        image = self.client.push_image("v1", layers=3)
        finished = threading.Event()

        def push_again_and_again() -> None:
            try:
                for _ in range(20):
                    self.client.expect(202, "DELETE", f"manifests/{image.digest}")
                    upkeep.everything(self.data.path, HOUR)
                    for content in image.blobs:
                        if self.client.head(f"blobs/{digest_of(content)}").status == 404:
                            self.client.push_blob(content)
                    self.client.push_manifest(image.body, "v1")
            finally:
                finished.set()

        def collect() -> int:
            runs = 0
            with upkeep.opened(self.data.path) as store:
                while not finished.is_set():
                    upkeep.collect(store, grace=30 * MINUTE)
                    runs += 1
            return runs

        _, runs = run_at_once(push_again_and_again, collect)
        self.assertGreater(runs, 0)
        for content in image.blobs:
            self.assertEqual(self.client.expect(200, "GET", f"blobs/{digest_of(content)}").body, content)


class Housekeeping(unittest.TestCase):
    """The daemon collects by itself."""

    def test_it_collects_at_its_interval(self) -> None:
        with tempfile.TemporaryDirectory() as data:
            options = ("--gc-interval", "1s", "--grace", "10s", "--untagged-after", "10s")
            with Daemon(data, *options) as daemon:
                image = daemon.client.push_image()
                kept = daemon.client.push_image("v1")
                upkeep.everything(Path(data), HOUR)
                line = daemon.read_line()
                while "gc removed" not in line:  # after the lines of the access log
                    line = daemon.read_line()
                self.assertEqual(daemon.client.head(f"manifests/{image.digest}").status, 404)
                daemon.client.expect(200, "GET", f"manifests/{kept.digest}")

    def test_it_collects_though_it_is_restarted_more_often_than_that(self) -> None:
        """An hour after the last collection, whichever process did that; the first start counts as one."""
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        with tempfile.TemporaryDirectory() as data:
            options = {"data": data, "sync": False, "gc_interval": HOUR, "log": lines.put}
            with registry.Registry(**options) as running:
                Client(running.netloc, "daemon/image").push_blob(unique())
            first = os.stat(f"{data}/last-gc").st_mtime
            for last in (first - HOUR - 1, first + 900 * DAY):  # or so says a clock that was ahead
                upkeep.everything(Path(data), DAY)
                os.utime(f"{data}/last-gc", (last, last))
                with registry.Registry(**options) as running:
                    while "gc removed" not in lines.get(timeout=TIMEOUT):
                        pass
                    Client(running.netloc, "daemon/image").push_blob(unique())
                self.assertLess(abs(os.stat(f"{data}/last-gc").st_mtime - first), HOUR)

    def test_it_walks_over_the_files_once_a_day(self) -> None:
        now = time.time()
        with tempfile.TemporaryDirectory() as data, registry.Registry(data=data, sync=False) as running:
            file = Path(data) / "blobs" / "sha256" / ("3" * 64)
            for collected, walks in ((now, True), (now + DAY, False), (now + 3 * DAY, True)):
                file.write_bytes(b"left by a crash")
                running.store.files.collected_at(now=True)
                os.utime(f"{data}/last-gc", (collected, collected))
                with mock.patch("time.time", lambda: now + DAY):
                    running._collect_garbage(threading.Event())
                self.assertEqual(file.exists(), not walks)


if __name__ == "__main__":
    unittest.main()
