"""Verifying: each kind of damage is found and named, and repaired so that clients push again."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import registry
from registry import Registry
from tests import upkeep
from tests.support import (
    MEBIBYTE,
    ROOT,
    Client,
    Daemon,
    DataDirectory,
    HTTPTestCase,
    Image,
    RegistryTestCase,
    descriptor,
    digest_of,
    encode,
    image_index,
    python,
    run_at_once,
    unique,
    with_digest,
)
from tests.test_access import can_remount


class Damage:
    """Does things to a data directory that no registry does."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def path(self, digest: str) -> Path:
        return self.data / "blobs" / digest.replace(":", "/")

    def flip_bit(self, digest: str) -> None:
        content = bytearray(self.path(digest).read_bytes())
        content[len(content) // 2] ^= 1
        self.path(digest).write_bytes(content)

    def truncate(self, digest: str, size: int = 0) -> None:
        self.path(digest).write_bytes(self.path(digest).read_bytes()[:size])

    def extend(self, digest: str) -> None:
        with open(self.path(digest), "ab") as file:
            file.write(b"and more")

    def remove(self, digest: str) -> None:
        self.path(digest).unlink()

    def add(self, content: bytes) -> str:
        digest = digest_of(content)
        self.path(digest).write_bytes(content)
        return digest

    def unlink(self, digest: str) -> None:
        """Lose a repository's link and the row, but neither the file nor who needs it."""
        for table in ("repository_blobs", "blobs"):
            upkeep.change(self.data, f"DELETE FROM {table} WHERE digest = ?", digest)


class VerifyTestCase(RegistryTestCase):
    """An image to damage, and a registry of its own for each test."""

    options: ClassVar[dict[str, Any]] = {"sync": False}

    @classmethod
    def setUpClass(cls) -> None:
        """Each test has a registry of its own, since a verification sees everything."""

    def setUp(self) -> None:
        super().setUpClass()
        self.addCleanup(self.doClassCleanups)
        super().setUp()
        self.damage = Damage(self.data.path)
        self.image = self.client.push_image("v1", layers=2)
        self.layer = digest_of(self.image.layers[0])

    def verify(self, *, repair: bool = False) -> list[tuple[str, str]]:
        return upkeep.verify(self.registry.store, repair=repair)

    def push_again(self) -> None:
        """As clients do: send what a HEAD does not find."""
        for content in self.image.blobs:
            if self.client.head(f"blobs/{digest_of(content)}").status == 404:
                self.client.push_blob(content)
        if self.client.head("manifests/v1").status == 404:
            self.client.push_manifest(self.image.body, "v1")


class WhatIsFound(VerifyTestCase):
    def test_a_healthy_store_is_clean(self) -> None:
        self.client.push_blob(b"")
        self.client.push_blob(unique(), "sha512")
        self.client.push_blob(bytes(3 * MEBIBYTE))
        self.other.push_image()
        self.client.expect(202, "POST", "blobs/uploads/")
        self.assertEqual(self.verify(), [])

    def test_an_empty_store_is_clean(self) -> None:
        with tempfile.TemporaryDirectory() as data, upkeep.opened(Path(data)) as store:
            self.assertEqual(upkeep.verify(store), [])

    def test_every_kind_of_damage_has_its_name(self) -> None:
        cases = {
            "corrupt": self.damage.flip_bit,
            "truncated": self.damage.truncate,
            "missing": self.damage.remove,
        }
        for kind, cause in cases.items():
            for label, digest in (("layer", self.layer), ("manifest", self.image.digest)):
                with self.subTest(kind, of=label):
                    content = self.damage.path(digest).read_bytes()
                    cause(digest)
                    self.assertEqual(self.verify(), [(kind, digest)])
                    self.damage.path(digest).write_bytes(content)
                    self.assertEqual(self.verify(), [])

    def test_a_file_cut_short_by_one_byte_is_truncated(self) -> None:
        self.damage.truncate(self.layer, len(self.image.layers[0]) - 1)
        self.assertEqual(self.verify(), [("truncated", self.layer)])

    def test_a_file_with_bytes_too_many_is_corrupt(self) -> None:
        self.damage.extend(self.layer)
        self.assertEqual(self.verify(), [("corrupt", self.layer)])

    def test_a_bit_flipped_in_a_large_file_is_found(self) -> None:
        digest = self.client.push_blob(bytes(5 * MEBIBYTE))
        self.damage.flip_bit(digest)
        self.assertEqual(self.verify(), [("corrupt", digest)])

    def test_sha512_is_verified_too(self) -> None:
        digest = self.client.push_blob(unique(), "sha512")
        self.damage.flip_bit(digest)
        self.assertEqual(self.verify(), [("corrupt", digest)])

    def test_a_file_that_a_push_is_about_to_give_a_row_is_no_stray(self) -> None:
        store, content, found = self.registry.store, unique(), []
        place = store.files.place

        def place_and_look(*arguments: Any) -> None:
            place(*arguments)
            found.append(self.verify(repair=True))
            self.assertIn(digest_of(content), self.data.files())

        with mock.patch.object(store.files, "place", place_and_look):
            self.client.push_blob(content)
            self.client.expect(201, "PUT", with_digest(self.client.open_upload(), digest_of(b"x")), b"x")
        self.assertEqual(found, [[], []])

    def test_what_the_start_tries_out_is_no_stray(self) -> None:
        (self.data.path / "blobs/sha256/.probe").touch()  # killed right then
        self.assertEqual(self.verify(), [])
        with Registry(self.data.path):
            self.assertFalse((self.data.path / "blobs/sha256/.probe").exists())

    def test_a_file_without_a_row_is_unreferenced(self) -> None:
        digest = self.damage.add(unique())
        self.assertEqual(self.verify(), [("unreferenced", digest)])

    def test_what_has_a_name_that_no_blob_has_is_left_alone(self) -> None:
        (self.data.path / "blobs/sha256/notes.txt").write_text("mine")
        (self.data.path / "blobs/sha512/lost+found").mkdir()
        self.assertEqual(self.verify(repair=True), [])
        self.assertTrue((self.data.path / "blobs/sha256/notes.txt").exists())

    def test_an_index_that_points_nowhere_is_dangling(self) -> None:
        index = encode(image_index([self.image.descriptor]))
        self.client.push_manifest(index, "multi")
        self.damage.unlink(self.image.digest)
        findings = self.verify()
        dangling = [subject for kind, subject in findings if kind == "dangling"]
        self.assertTrue(any(self.image.digest in subject for subject in dangling), findings)

    def test_an_image_whose_layer_is_not_linked_is_dangling(self) -> None:
        self.damage.unlink(self.layer)
        self.assertIn("dangling", [kind for kind, subject in self.verify() if self.layer in subject])

    def test_a_tag_that_points_nowhere_is_found(self) -> None:
        upkeep.change(self.data.path, "UPDATE tags SET digest = ?", digest_of(b"nothing"))
        self.assertNotEqual(self.verify(), [])

    def test_layers_that_may_be_absent_are_not_missed(self) -> None:
        foreign = descriptor(unique(), urls=["https://127.0.0.1/layer"])
        manifest = {**self.client.get("manifests/v1").json, "layers": [foreign]}
        self.client.push_manifest(manifest, "foreign")
        self.assertEqual(self.verify(), [])

    def test_all_damage_is_reported_and_not_just_the_first(self) -> None:
        self.damage.flip_bit(self.layer)
        self.damage.remove(digest_of(self.image.config))
        stray = self.damage.add(unique())
        expected = {
            ("corrupt", self.layer),
            ("missing", digest_of(self.image.config)),
            ("unreferenced", stray),
        }
        self.assertLessEqual(expected, set(self.verify()))

    def test_looking_changes_nothing(self) -> None:
        self.damage.flip_bit(self.layer)
        self.damage.remove(self.image.digest)
        self.damage.add(unique())
        before = self.data.files(), self.data.recorded()
        self.assertEqual(self.verify(), self.verify())
        self.assertEqual((self.data.files(), self.data.recorded()), before)


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


class Unreadable(VerifyTestCase):
    """A file that cannot be read is not given up."""

    def assert_it_stops(self, failing: Callable[..., Any], number: int) -> None:
        self.damage.flip_bit(digest_of(self.image.config))
        before = self.data.files(), self.data.recorded()
        with mock.patch.object(registry, "open", failing, create=True):
            for repair in (False, True):
                with self.assertRaises(OSError) as caught:
                    self.verify(repair=repair)
                self.assertEqual(caught.exception.errno, number)
                self.assertRegex(str(caught.exception), "/blobs/sha256/[0-9a-f]{64}")
        self.assertEqual((self.data.files(), self.data.recorded()), before)

    def test_opening_fails(self) -> None:
        for number in (errno.ESTALE, errno.EIO, errno.EACCES, errno.ENOTCONN):
            with self.subTest(errno.errorcode[number]):
                self.assert_it_stops(mock.Mock(side_effect=OSError(number, os.strerror(number))), number)

    def test_reading_fails(self) -> None:
        class Failing(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        self.assert_it_stops(lambda path, *_args, **_options: Failing(path), errno.EIO)


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


class Command(HTTPTestCase):
    """`python registry.py verify`, beside a running daemon."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.data = DataDirectory(directory.name)
        self.damage = Damage(self.data.path)
        self.daemon = Daemon(directory.name, "--quiet")
        self.addCleanup(self.daemon.kill)
        self.daemon.start()
        self.client = self.daemon.client

    def verify(self, *options: str) -> tuple[int, list[str]]:
        done = python("registry.py", "verify", "--data", str(self.data.path), *options)
        self.assertNotIn("Traceback", done.stderr)
        return done.returncode, done.stdout.splitlines()

    def test_it_exits_0_on_a_clean_store_and_1_on_damage(self) -> None:
        digest = self.client.push_blob(unique())
        self.assertEqual(self.verify()[0], 0)
        self.damage.flip_bit(digest)
        self.assertEqual(self.verify()[0], 1)

    def test_each_finding_is_a_line_with_its_kind_and_digest(self) -> None:
        kinds = {
            "corrupt": self.damage.flip_bit,
            "truncated": self.damage.truncate,
            "missing": self.damage.remove,
        }
        found = {}
        for kind, cause in kinds.items():
            found[kind] = self.client.push_blob(unique())
            cause(found[kind])
        found["unreferenced"] = self.damage.add(unique())
        status, lines = self.verify()
        self.assertEqual(status, 1)
        for kind, digest in found.items():
            with self.subTest(kind):
                self.assertEqual(len([line for line in lines if kind in line and digest in line]), 1, lines)

    def test_after_a_repair_the_store_is_clean(self) -> None:
        for cause in (self.damage.flip_bit, self.damage.truncate, self.damage.remove):
            cause(self.client.push_blob(unique()))
        self.assertEqual(self.verify("--repair")[0], 1)
        self.assertEqual(self.verify()[0], 0)

    def test_the_daemon_sees_a_repair_at_once(self) -> None:
        image = self.client.push_image("v1")
        self.client.expect(200, "GET", "manifests/v1")
        self.damage.flip_bit(image.digest)
        self.verify("--repair")
        self.assertEqual(self.client.get("manifests/v1").status, 404)
        self.client.push_manifest(image.body, "v1")
        self.assertEqual(self.client.expect(200, "GET", "manifests/v1").body, image.body)

    def test_pushes_and_deletes_meanwhile_are_no_damage(self) -> None:
        results: list[tuple[int, list[str]]] = []

        def push_and_delete() -> list[Image]:
            kept = []
            while not results:
                image = self.client.push_image("v1")
                self.client.expect(202, "DELETE", f"manifests/{image.digest}")
                for content in image.blobs:
                    self.client.expect(202, "DELETE", f"blobs/{digest_of(content)}")
                kept = [self.client.push_image("kept")]
            return kept

        def verify() -> None:
            found = [self.verify("--repair") for _ in range(3)]
            results.extend(found)

        (kept,), _ = run_at_once(push_and_delete, verify)
        for status, lines in results:
            self.assertEqual(status, 0, lines)
        self.assert_pullable(self.client, kept)

    def assert_pullable(self, client: Client, image: Image) -> None:
        self.assertEqual(client.expect(200, "GET", f"manifests/{image.digest}").body, image.body)
        for content in image.blobs:
            self.assertEqual(client.expect(200, "GET", f"blobs/{digest_of(content)}").body, content)

    def test_most_files_missing_is_one_line_until_it_is_forced(self) -> None:
        self.damage.remove(self.client.push_blob(unique()))
        arguments = ("registry.py", "verify", "--repair", "--data", str(self.data.path))
        done = python(*arguments)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Aregistry\.py: 1 of 1 files are missing; [^\n]*--force\n\Z")
        self.assertEqual(len(self.data.recorded()), 1)
        self.assertEqual(python(*arguments, "--force").returncode, 1)
        self.assertEqual(self.verify(), (0, ["no problems found"]))

    @unittest.skipUnless(can_remount(), "needs root's rights and unshare")
    def test_it_looks_at_a_read_only_disk_and_repairs_nothing_there(self) -> None:
        digest = self.client.push_blob(unique())
        self.assertEqual(self.daemon.stop(), 0)
        (self.data.path / "blobs" / "sha512").rmdir()  # as a copy may lack an empty directory
        script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
        data = str(self.data.path)
        command = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
            data,
            sys.executable,
            "registry.py",
            "verify",
        ]
        for change, options, status, output, errors in (
            (lambda: None, (), 0, r"no problems found\n", r""),
            (lambda: self.damage.flip_bit(digest), (), 1, rf"corrupt {digest}\n1 problems found\n", r""),
            (lambda: None, ("--repair",), 1, r"", r"registry\.py: cannot use [^\n]+\n"),
        ):
            change()
            with self.subTest(output):
                done = subprocess.run(
                    [*command, "--data", data, *options],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                self.assertEqual(done.returncode, status, done)
                self.assertRegex(done.stdout, rf"\A{output}\Z")
                self.assertRegex(done.stderr, rf"\A{errors}\Z")

    def test_a_data_directory_that_is_none_is_an_error_and_is_not_made(self) -> None:
        with tempfile.TemporaryDirectory() as parent:
            done = python("registry.py", "verify", "--data", f"{parent}/nothing")
            self.assertNotEqual(done.returncode, 0)
            self.assertNotIn("Traceback", done.stderr)
            self.assertEqual(list(Path(parent).iterdir()), [])


if __name__ == "__main__":
    unittest.main()
