"""Which images stay: untagged ones for a time, the newest of them, and as much as may be stored."""

from __future__ import annotations

from unittest import mock

import registry
from tests import upkeep
from tests.collecting import CollectionTestCase
from tests.support import (
    MEBIBYTE,
    OCI_CONFIG,
    OCI_MANIFEST,
    Image,
    descriptor,
    digest_of,
    encode,
    image_manifest,
    unique,
)
from tests.upkeep import DAY, HOUR, MINUTE


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
                    self.assert_image(self.client, orphan)
                    for digest in self.data.rows(
                        "SELECT digest FROM manifests WHERE digest <> ?", base.digest
                    ):
                        self.client.delete(f"manifests/{digest[0]}")
                    for digest in self.data.rows(
                        "SELECT digest FROM manifests WHERE digest <> ?", base.digest
                    ):
                        self.client.delete(f"manifests/{digest[0]}")


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
            self.assert_image(self.client, images[tag], tag)
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

    def test_what_only_one_of_two_repositories_needs_counts(self) -> None:
        image = self.push_sized("a")
        upkeep.everything(self.data.path, DAY)
        for content in image.blobs:  # which it may rely on for the grace
            self.other.push_blob(content)
        removed = upkeep.collect(self.registry.store, max_size=1000)
        self.assertIn(("manifest", image.digest), removed)
        self.assert_consistent()

    def test_the_write_lock_is_never_held_to_choose(self) -> None:
        """To look for each one among all others took most of a collection's time."""
        image = self.push_sized("a")
        copy = "INSERT INTO manifests SELECT repository_id, ?, media_type, NULL, NULL, 0, 0 FROM manifests"
        digests = [(f"sha256:{number:064}",) for number in range(250)]
        for sql in (
            "INSERT INTO blobs VALUES (?, 1000)",
            "INSERT INTO repository_blobs VALUES (1, ?, 0, 0)",
            f"{copy} LIMIT 1",
        ):
            upkeep.change_many(self.data.path, sql, digests)
        references = "INSERT INTO manifest_references VALUES (1, ?, ?, 1)"
        upkeep.change_many(self.data.path, references, [digest * 2 for digest in digests])
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
        self.assert_image(self.client, image, "a")

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
        self.assert_image(self.client, image, "a")

    def test_an_index_goes_with_its_children_and_not_one_of_them_alone(self) -> None:
        child = self.push_sized("child")
        index = self.push_index(child.descriptor, tag="multi")
        self.client.expect(202, "DELETE", "manifests/child")
        young = self.push_sized("young")
        for digest, days in ((child.digest, 9), (digest_of(index), 8)):
            upkeep.manifests_pushed(self.data.path, days * DAY, digest)
        self.collect(max_size=150_000)
        self.assertEqual(self.tags(), ["young"])
        self.assert_image(self.client, young, "young")
        self.assertEqual(self.client.head(f"manifests/{digest_of(index)}").status, 404)
        self.assert_gone(child.body, *child.blobs)
