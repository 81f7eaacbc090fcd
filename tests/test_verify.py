"""Verifying: each kind of damage is found and named, also beside a running daemon."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from registry import Registry
from tests import upkeep
from tests.daemon import Daemon, DaemonTestCase, command, run
from tests.damage import Damage, VerifyTestCase
from tests.mounts import no_read_only, on_read_only_disk
from tests.support import (
    MEBIBYTE,
    Image,
    OwnRegistryTestCase,
    descriptor,
    digest_of,
    encode,
    image_index,
    run_at_once,
    unique,
    with_digest,
)


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

    def test_a_file_that_waits_for_its_removal_is_no_stray(self) -> None:
        digest = self.damage.add(unique())
        upkeep.change(self.data.path, "INSERT INTO pending_deletes VALUES (?)", digest)
        self.assertEqual(self.verify(repair=True), [])
        self.registry.store.remove_pending()
        self.assertNotIn(digest, self.data.files())

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


class Command(OwnRegistryTestCase):
    """`python registry.py verify`, beside a registry that serves."""

    def setUp(self) -> None:
        super().setUp()
        self.damage = Damage(self.data.path)

    def verify(self, *options: str) -> tuple[int, list[str]]:
        done = command("verify", "--data", str(self.data.path), *options)
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

    def test_most_files_missing_is_one_line_until_it_is_forced(self) -> None:
        self.damage.remove(self.client.push_blob(unique()))
        arguments = ("verify", "--repair", "--data", str(self.data.path))
        done = command(*arguments)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Aregistry\.py: 1 of 1 files are missing; [^\n]*--force\n\Z")
        self.assertEqual(len(self.data.recorded()), 1)
        self.assertEqual(command(*arguments, "--force").returncode, 1)
        self.assertEqual(self.verify(), (0, ["no problems found"]))

    def test_it_looks_at_a_read_only_disk_and_repairs_nothing_there(self) -> None:
        if no_read_only():
            self.skipTest(no_read_only())
        digest = self.client.push_blob(unique())
        self.registry.close()
        (self.data.path / "blobs" / "sha512").rmdir()  # as a copy may lack an empty directory
        verify = (*on_read_only_disk(self.data.path), sys.executable, *Daemon.PROGRAM, "verify")
        for change, options, status, output, errors in (
            (lambda: None, (), 0, r"no problems found\n", r""),
            (lambda: self.damage.flip_bit(digest), (), 1, rf"corrupt {digest}\n1 problems found\n", r""),
            (lambda: None, ("--repair",), 1, r"", r"registry\.py: cannot use [^\n]+\n"),
        ):
            change()
            with self.subTest(output):
                done = run(*verify, "--data", self.data.path, *options)
                self.assertEqual(done.returncode, status, done)
                self.assertRegex(done.stdout, rf"\A{output}\Z")
                self.assertRegex(done.stderr, rf"\A{errors}\Z")


class BesideADaemon(DaemonTestCase):
    """Verifying while another process serves."""

    def setUp(self) -> None:
        super().setUp()
        self.client = self.start("--quiet").client

    def test_the_daemon_sees_a_repair_at_once(self) -> None:
        image = self.client.push_image("v1")
        self.client.expect(200, "GET", "manifests/v1")
        Damage(self.path).flip_bit(image.digest)
        command("verify", "--data", str(self.path), "--repair")
        self.assertEqual(self.client.get("manifests/v1").status, 404)
        self.client.push_manifest(image.body, "v1")
        self.assert_image(self.client, image, "v1")

    def test_pushes_and_deletes_meanwhile_are_no_damage(self) -> None:
        verified: list[int] = []

        def push_and_delete() -> Image:
            kept = self.client.push_image("kept")
            while not verified:
                image = self.client.push_image("v1")
                self.client.expect(202, "DELETE", f"manifests/{image.digest}")
                for content in image.blobs:
                    self.client.expect(202, "DELETE", f"blobs/{digest_of(content)}")
                kept = self.client.push_image("kept")
            return kept

        def verify() -> None:
            program = (sys.executable, *Daemon.PROGRAM, "verify", "--repair", "--data", self.path)
            found = [run(*program) for _ in range(3)]
            verified.append(len(found))
            for done in found:
                self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)

        kept, _ = run_at_once(push_and_delete, verify)
        self.assert_image(self.client, kept, "kept")
