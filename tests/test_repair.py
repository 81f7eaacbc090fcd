"""Repairing: what is damaged is moved aside, so that clients push again, and rows agree again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from unittest import mock

import registry
from registry import Store
from tests import upkeep
from tests.damage import VerifyTestCase
from tests.support import digest_of, unique


class Repair(VerifyTestCase):
    def test_a_damaged_blob_is_moved_aside_and_pushed_again(self) -> None:
        for kind, cause in (("corrupt", self.damage.flip_bit), ("truncated", self.damage.truncate)):
            with self.subTest(kind):
                cause(self.layer)
                damaged = self.damage.path(self.layer).read_bytes()
                self.assertIn((kind, self.layer), self.verify(repair=True))
                kept = [path.read_bytes() for path in (self.data.path / "corrupt").iterdir()]
                self.assertIn(damaged, kept)
                self.assertNotIn(self.layer, self.data.files())
                self.assertEqual(self.client.head(f"blobs/{self.layer}").status, 404)
                self.push_again()
                self.assert_blob(self.client, self.image.layers[0])
                self.assertEqual(self.verify(), [])

    def test_a_missing_blob_is_forgotten_and_pushed_again(self) -> None:
        self.damage.remove(self.layer)
        self.verify(repair=True)
        self.assertNotIn(self.layer, self.data.recorded())
        self.push_again()
        self.assert_blob(self.client, self.image.layers[0])
        self.assertEqual(self.verify(), [])

    def test_a_damaged_manifest_is_pushed_again_with_its_tag(self) -> None:
        for cause in (self.damage.flip_bit, self.damage.truncate, self.damage.remove):
            with self.subTest(cause.__name__):
                cause(self.image.digest)
                self.verify(repair=True)
                self.assertEqual(self.client.head("manifests/v1").status, 404)
                self.push_again()
                self.assertEqual(self.client.expect(200, "GET", "manifests/v1").body, self.image.body)
                self.assertEqual(self.verify(), [])

    def test_the_blobs_of_a_forgotten_manifest_are_there_for_the_next_push(self) -> None:
        self.damage.remove(self.image.digest)
        upkeep.everything(self.data.path, upkeep.DAY)
        self.verify(repair=True)
        upkeep.collect(self.registry.store)
        self.push_again()
        for content in self.image.blobs:
            self.assert_blob(self.client, content)

    def test_damage_is_forgotten_in_every_repository(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        self.other.push_blob(content)
        self.damage.flip_bit(digest)
        self.verify(repair=True)
        for client in (self.client, self.other):
            self.assertEqual(client.head(f"blobs/{digest}").status, 404)
        self.assertEqual(self.data.links(digest), [])

    def test_what_is_healthy_stays_byte_for_byte(self) -> None:
        others = [self.other.push_image(f"v{number}") for number in range(3)]
        healthy = {**self.data.files()}
        self.damage.flip_bit(self.layer)
        self.verify(repair=True)
        del healthy[self.layer]
        self.assertEqual(self.data.files(), healthy)
        for number, image in enumerate(others):
            self.assertEqual(self.other.get(f"manifests/v{number}").body, image.body)
            for content in image.blobs:
                self.assert_blob(self.other, content)

    def test_a_healthy_file_without_a_row_can_still_be_pushed(self) -> None:
        content = unique()
        self.damage.add(content)
        self.verify(repair=True)
        self.client.push_blob(content)
        self.assert_blob(self.client, content)
        self.assertEqual(self.verify(), [])

    def test_repairing_what_is_whole_does_nothing(self) -> None:
        before = self.data.files(), self.data.rows("SELECT * FROM repository_blobs")
        self.assertEqual(self.verify(repair=True), [])
        self.assertEqual((self.data.files(), self.data.rows("SELECT * FROM repository_blobs")), before)
        self.assertFalse((self.data.path / "corrupt").exists())


class InTheWay(VerifyTestCase):
    """Something that is no file has the place of one."""

    def occupy(self, digest: str) -> list[Callable[[], object]]:
        path, elsewhere = self.damage.path(digest), self.data.path / "elsewhere"
        elsewhere.write_bytes(self.image.layers[0])
        return [
            lambda: path.symlink_to(elsewhere),
            lambda: (path.mkdir(), (path / "kept").write_bytes(b"kept")),
            lambda: os.mkfifo(path),
        ]

    def test_it_is_damage_of_a_blob_and_is_moved_aside(self) -> None:
        for number, occupy in enumerate(self.occupy(self.layer)):
            with self.subTest(number):
                self.damage.remove(self.layer)
                occupy()
                self.assertEqual(self.verify(), [("corrupt", self.layer)])
                self.assertIn(("corrupt", self.layer), self.verify(repair=True))
                self.push_again()
                self.assert_blob(self.client, self.image.layers[0])
                self.assertEqual(self.verify(), [])
        moved = [path.lstat().st_mode for path in (self.data.path / "corrupt").iterdir()]
        self.assertEqual(len(moved), 3)
        self.assertTrue(list((self.data.path / "corrupt").glob("*/kept")))
        self.assertEqual((self.data.path / "elsewhere").read_bytes(), self.image.layers[0])

    def test_without_a_row_it_is_moved_aside_too(self) -> None:
        stray = digest_of(unique())
        for number, occupy in enumerate(self.occupy(stray)):
            with self.subTest(number):
                occupy()
                self.assertEqual(self.verify(repair=True), [("unreferenced", stray)])
                self.assertEqual(self.verify(), [])


class PushedMeanwhile(VerifyTestCase):
    def test_a_push_need_not_wait_while_a_damaged_file_is_read_and_mends_it(self) -> None:
        self.damage.flip_bit(self.layer)
        examine, found = registry.Verifier._examine, []

        def push_meanwhile(verifier: registry.Verifier, row: tuple[str, int]) -> tuple[str, object]:
            damage, state = examine(verifier, row)
            if damage:
                found.append(damage)
                self.client.push_blob(self.image.layers[0])
            return damage, state

        with mock.patch.object(registry.Verifier, "_examine", push_meanwhile):
            self.assertEqual(self.verify(repair=True), [])
        self.assertEqual(found, ["corrupt"])
        self.assert_blob(self.client, self.image.layers[0])


class MissingFiles(VerifyTestCase):
    """blobs/ is not mounted."""

    def setUp(self) -> None:
        super().setUp()
        self.blobs, self.away = self.data.path / "blobs", self.data.path / "away"

    def unmount(self) -> None:
        self.blobs.rename(self.away)
        for algorithm in ("sha256", "sha512"):
            (self.blobs / algorithm).mkdir(parents=True)

    def mount(self) -> None:
        shutil.rmtree(self.blobs)
        self.away.rename(self.blobs)

    def test_nothing_is_lost_when_they_are_there_again(self) -> None:
        before = self.data.files(), self.data.rows("SELECT * FROM repository_blobs")
        self.unmount()
        self.assertEqual({kind for kind, _ in self.verify()}, {"missing"})
        with self.assertRaisesRegex(registry.StartupError, r"\A4 of 4 files are missing; .* mounted"):
            self.verify(repair=True)
        self.mount()
        self.assertEqual(self.verify(repair=True), [])
        after = self.data.files(), self.data.rows("SELECT * FROM repository_blobs")
        self.assertEqual((after, (self.data.path / "corrupt").exists()), (before, False))

    def test_more_than_half_is_too_many(self) -> None:
        for content in self.image.layers:
            self.damage.remove(digest_of(content))
        self.damage.flip_bit(self.image.digest)
        more = self.client.push_blob(unique())  # a fifth
        self.assertEqual(len(self.verify(repair=True)), 3)
        self.client.push_blob(unique())
        self.damage.remove(more)
        self.damage.remove(digest_of(self.image.config))  # two of three
        with self.assertRaises(registry.StartupError):
            self.verify(repair=True)

    def test_they_are_given_up_by_force(self) -> None:
        self.unmount()
        upkeep.verify(self.registry.store, repair=True, force=True)
        self.assertEqual(self.verify(), [])
        self.assertEqual(self.data.recorded(), {})


class Schema(VerifyTestCase):
    """Triggers, indexes and tables are those of schema.sql."""

    def execute(self, sql: str) -> None:
        upkeep.change(self.data.path, sql)

    def test_a_lost_trigger_or_index_is_made_again(self) -> None:
        sql = "SELECT type, name FROM sqlite_master WHERE type <> 'table' AND sql IS NOT NULL"
        before = self.data.rows("SELECT * FROM sqlite_master ORDER BY name")
        for kind, name in self.data.rows(sql):
            with self.subTest(name):
                self.execute(f"DROP {kind} {name}")
                finding = ("database", f"{kind} {name} is not that of schema.sql")
                self.assertEqual(self.verify(), [finding])
                self.assertEqual(self.verify(repair=True), [finding])
                self.assertEqual(self.verify(), [])
        after = self.data.rows("SELECT * FROM sqlite_master ORDER BY name")
        self.assertEqual([row[:2] + row[4:] for row in after], [row[:2] + row[4:] for row in before])

    def test_a_trigger_that_does_something_else_is_made_anew(self) -> None:
        self.execute("DROP TRIGGER blob_dropped")
        self.execute("CREATE TRIGGER blob_dropped AFTER DELETE ON blobs BEGIN SELECT 1; END")
        self.assertEqual(len(self.verify(repair=True)), 1)
        self.assertEqual(self.verify(), [])
        self.client.expect(202, "DELETE", f"manifests/{self.image.digest}")
        self.client.expect(202, "DELETE", f"blobs/{self.layer}")
        self.assertNotIn(self.layer, self.data.files())

    def test_words_count_and_not_how_they_are_written(self) -> None:
        self.execute("DROP INDEX tags_by_digest")
        self.execute('CREATE INDEX "tags_by_digest" -- as before\n ON tags(repository_id,\n digest)')
        self.assertEqual(self.verify(), [])

    def test_layers_pushed_while_a_trigger_was_lost_are_needed_again(self) -> None:
        self.execute("DROP TRIGGER reference_added")
        self.execute("DROP TRIGGER blob_linked")
        image = self.other.push_image("latest", layers=2)
        upkeep.everything(self.data.path, upkeep.DAY)
        found = self.verify(repair=True)
        for content in (image.body, *image.blobs):
            self.assertTrue(any(digest_of(content) in subject for _, subject in found), found)
        self.assertEqual(self.verify(), [])
        self.assertEqual(upkeep.collect(self.registry.store), [])
        for content in image.blobs:
            self.assert_blob(self.other, content)

    def test_what_was_pushed_while_it_was_to_be_removed_stays(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        self.execute("DROP TRIGGER blob_stored")
        upkeep.change(self.data.path, "INSERT INTO pending_deletes VALUES (?)", digest)
        self.verify(repair=True)
        self.registry.store.remove_pending()
        self.assert_blob(self.client, content)
        self.assertEqual(self.verify(), [])

    def test_blobs_that_lost_their_last_link_without_a_trigger_go(self) -> None:
        self.execute("DROP TRIGGER blob_unlinked")
        digest = self.other.push_blob(unique())
        upkeep.change(self.data.path, "DELETE FROM repository_blobs WHERE digest = ?", digest)
        self.assertNotEqual(self.verify(repair=True), [])
        self.registry.store.remove_pending()
        self.assertEqual(self.verify(), [])
        self.assertNotIn(digest, self.data.files())
        self.assertEqual(self.data.rows("SELECT count(*) FROM repositories"), [(1,)])

    def test_nothing_is_repaired_in_a_damaged_database(self) -> None:
        self.damage.flip_bit(self.layer)
        store, found = self.registry.store, "row 1 missing from index tags_by_digest"

        def query(sql: str, *parameters: object) -> list[object]:
            return [(found,)] if "integrity_check" in sql else Store.query(store, sql, *parameters)

        with mock.patch.object(store, "query", query):
            self.assertIn(("database", found), self.verify())
            with self.assertRaisesRegex(registry.StartupError, "restore registry.db from a backup"):
                self.verify(repair=True)
        self.assertIn(self.layer, self.data.files())

    def test_nothing_is_repaired_without_a_table(self) -> None:
        self.damage.flip_bit(self.layer)
        self.execute("ALTER TABLE manifest_references RENAME TO gone")
        with self.assertRaisesRegex(registry.StartupError, "restore registry.db from a backup"):
            self.verify(repair=True)
        self.assertIn(self.layer, self.data.files())


class Rows(VerifyTestCase):
    """What rows say of each other."""

    def test_a_wrong_count_of_needs_is_found_and_mended(self) -> None:
        upkeep.change(
            self.data.path, "UPDATE repository_blobs SET needed_by = 0 WHERE digest = ?", self.layer
        )
        finding = ("database", f"{self.client.repository}@{self.layer} is needed by 1 manifests, not 0")
        self.assertEqual(self.verify(), [finding])
        self.assertEqual(self.verify(repair=True), [finding])
        self.assertEqual(self.verify(), [])
        upkeep.everything(self.data.path, upkeep.DAY)
        self.assertEqual(upkeep.collect(self.registry.store), [])

    def test_rows_that_point_nowhere_are_dropped(self) -> None:
        nothing = digest_of(b"nothing")
        for table, sql in {
            "tags": "UPDATE tags SET digest = ?",
            "manifest_references": "INSERT INTO manifest_references VALUES (1, ?, 'child', 0)",
            "manifests": "UPDATE manifests SET digest = ?",
            "repository_blobs": "INSERT INTO repository_blobs VALUES (99, ?, 0, 0)",
        }.items():
            with self.subTest(table):
                upkeep.change(self.data.path, sql, nothing)
                self.assertIn(f" rows of {table} ", str(self.verify()))
                self.verify(repair=True)
                self.assertEqual(self.verify(), [])

    def test_a_reference_pushed_sparse_first_is_required_once_it_is_pushed_without(self) -> None:
        store = self.registry.store
        with mock.patch.object(store, "sparse", True):
            self.client.push_manifest({**json.loads(self.image.body), "annotations": {"a": "b"}}, "other")
        self.client.push_manifest({**json.loads(self.image.body), "annotations": {"a": "b"}}, "other")
        sql = "SELECT count(*) FROM manifest_references WHERE NOT required"
        self.assertEqual(self.data.rows(sql), [(0,)])
        with mock.patch.object(store, "sparse", True):  # and it stays so
            self.client.push_manifest(self.image.body, "other")
        self.assertEqual(self.data.rows(sql), [(0,)])


class Everything(VerifyTestCase):
    def test_all_that_was_repaired_is_gone_and_the_rest_is_what_to_push(self) -> None:
        self.damage.flip_bit(self.layer)
        self.damage.remove(digest_of(self.image.layers[1]))
        self.damage.add(unique())
        others = [self.other.push_image(f"v{number}") for number in range(4)]
        upkeep.change(self.data.path, "UPDATE repository_blobs SET needed_by = needed_by + 1")
        upkeep.change(self.data.path, "DROP TRIGGER tag_moved")
        upkeep.change(self.data.path, "UPDATE tags SET digest = 'x' WHERE name = 'v0'")
        self.verify(repair=True)
        lost = sorted(digest_of(content) for content in self.image.layers)
        name = f"{self.client.repository}@{self.image.digest}"
        self.assertEqual(self.verify(), [("dangling", f"{name} needs {digest}") for digest in lost])
        self.push_again()
        self.assertEqual(self.verify(), [])
        for image in others:
            self.assertEqual(self.other.get(f"manifests/{image.digest}").body, image.body)
