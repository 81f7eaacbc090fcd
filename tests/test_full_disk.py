"""A disk that is full: pushes are refused in good order, everything else goes on, and space comes back."""

from __future__ import annotations

import errno
import subprocess
import unittest
from collections.abc import Iterator
from typing import Any

from tests import upkeep
from tests.daemon import Daemon, command
from tests.mounts import SIZE, mounted, no_volume
from tests.steps import Step, observed
from tests.support import (
    MEBIBYTE,
    Client,
    DataDirectory,
    HTTPTestCase,
    Image,
    RegistryTestCase,
    Response,
    descriptor,
    digest_of,
    image_manifest,
    unique,
    with_digest,
)

SLACK = MEBIBYTE  # for the database and the file system's own needs


class FullDiskTestCase(HTTPTestCase):
    """A daemon whose data directory is on a small file system."""

    options: tuple[str, ...] = ("--min-free", "0")

    def setUp(self) -> None:
        if no_volume():
            self.skipTest(no_volume())
        self.volume = self.enter(mounted(self.temporary()))
        self.daemon = self.enter(Daemon(self.volume.data.path, "--quiet", *self.options))
        self.client = self.daemon.client

    def assert_image(self, client: Client, image: Image, reference: str = "") -> None:
        """Also to those who ask with HEAD first, for which a lease would be written."""
        super().assert_image(client, image, reference)
        for content in image.blobs:
            client.expect(200, "HEAD", f"blobs/{digest_of(content)}")

    def assert_refused(self, response: Response) -> None:
        self.assert_error(response, 507, "DENIED")

    def assert_agreement(self) -> None:
        """The database is sound, its rows have their files, and no upload has left bytes."""
        data = self.volume.data
        self.assertEqual(data.disagreements(strays=data.files()), [])
        left = sum((data.path / "uploads" / name).stat().st_size for name in data.unfinished())
        self.assertEqual(left, 0)

    def garbage(self, size: int) -> str:
        """A blob that nothing needs, pushed long ago."""
        digest = self.client.push_blob(unique("garbage").ljust(size, b"."))
        upkeep.leases_told(self.volume.data.path, 3 * upkeep.DAY, digest)
        return digest


class PushesThatDoNotFit(FullDiskTestCase):
    def too_much(self) -> Iterator[bytes]:
        """More than the volume holds, sent chunked."""
        return (bytes(MEBIBYTE) for _ in range(SIZE // MEBIBYTE + 8))

    def test_every_way_to_upload_is_refused_and_gives_its_space_back(self) -> None:
        content = bytes(SIZE + 8 * MEBIBYTE)
        post = f"blobs/uploads/?digest={digest_of(content)}"
        image = self.client.push_image("v1")
        free = self.volume.free

        def session() -> str:
            return self.client.open_upload()

        ways = {
            "post": lambda: self.client.post(post, content),
            "chunked post": lambda: self.client.post(post, self.too_much()),
            "put": lambda: self.client.put(with_digest(session(), digest_of(content)), content),
            "patch": lambda: self.client.patch(session(), content),
            "chunked patch": lambda: self.client.patch(session(), self.too_much()),
        }
        for name, push in ways.items():
            with self.subTest(name):
                self.assert_refused(push())
                self.assertGreater(self.volume.free, free - SLACK)
                self.assertEqual(self.client.head(f"blobs/{digest_of(content)}").status, 404)
                self.client.push_blob(unique())
        self.assert_image(self.client, image, "v1")
        self.assert_agreement()

    def test_pushing_until_it_is_full_loses_nothing_and_deleting_makes_room(self) -> None:
        image = self.client.push_image("v1")
        pushed: dict[str, bytes] = {}
        while True:
            content = unique("layer").ljust(2 * MEBIBYTE, b".")
            response = self.client.post(f"blobs/uploads/?digest={digest_of(content)}", content)
            if response.status != 201:
                break
            pushed[digest_of(content)] = content
        self.assert_refused(response)
        self.assertGreater(len(pushed), 10)
        for digest, expected in pushed.items():
            self.assertEqual(self.client.get(f"blobs/{digest}").body, expected)
        for digest in list(pushed)[:2]:
            self.client.expect(202, "DELETE", f"blobs/{digest}")
        self.assertGreater(self.volume.free, 3 * MEBIBYTE)
        self.client.push_blob(content)
        self.assert_image(self.client, image, "v1")
        self.assert_agreement()


class NotAByteLeft(FullDiskTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.client.push_image("v1")
        self.pending_deletes = self.client.push_image("pending_deletes", layers=2)
        self.loose = unique("loose").ljust(2 * MEBIBYTE, b".")
        self.client.push_blob(self.loose)

    def test_pulls_and_listings_go_on(self) -> None:
        self.volume.fill()
        self.assert_image(self.client, self.image, "v1")
        self.assertEqual(self.client.expect(200, "GET", "tags/list").json["tags"], ["pending_deletes", "v1"])
        self.client.expect(200, "GET", "/v2/_catalog")
        self.client.expect(200, "GET", f"referrers/{self.image.digest}")

    def test_pushes_are_refused_and_leave_nothing(self) -> None:
        manifest = image_manifest(descriptor(self.image.config), [descriptor(self.loose)])
        sessions = [self.client.open_upload() for _ in range(2)]
        content = unique().ljust(8192, b".")
        digest = digest_of(content)
        pushes = {
            "post": lambda: self.client.post(f"blobs/uploads/?digest={digest}", content),
            "patch": lambda: self.client.patch(sessions[0], content),
            "put": lambda: self.client.put(with_digest(sessions[1], digest), content),
            "manifest": lambda: self.client.put_manifest(manifest, "new"),
        }
        for name, push in pushes.items():
            with self.subTest(name):
                self.volume.fill()
                self.assert_refused(push())
        self.assertEqual(self.client.head(f"blobs/{digest}").status, 404)
        self.assertEqual(self.client.head("manifests/new").status, 404)
        self.assert_image(self.client, self.image, "v1")
        self.assert_agreement()

    def test_what_needs_the_database_only_is_done_or_refused(self) -> None:
        self.volume.fill()
        for count in range(40):
            client = self.client.at(f"mounted/{count}")
            mount = f"blobs/uploads/?mount={digest_of(self.loose)}&from={self.client.repository}"
            response = client.post(mount)
            there = client.head(f"blobs/{digest_of(self.loose)}").status == 200
            self.assertIn((response.status, there), [(201, True), (507, False)], response)
        self.assertIn(self.client.post("blobs/uploads/").status, (202, 507))
        self.assert_agreement()

    def test_deletes_work_and_free_the_space(self) -> None:
        self.volume.fill()
        self.client.expect(202, "DELETE", f"blobs/{digest_of(self.loose)}")
        self.assertGreaterEqual(self.volume.free, len(self.loose))
        self.client.expect(202, "DELETE", "manifests/pending_deletes")
        self.client.expect(202, "DELETE", f"manifests/{self.pending_deletes.digest}")
        self.client.push_blob(self.loose)
        self.assert_image(self.client, self.image, "v1")
        self.assert_agreement()

    def test_deleting_a_manifest_works_when_nothing_was_freed_before(self) -> None:
        self.volume.fill()
        self.client.expect(202, "DELETE", f"manifests/{self.pending_deletes.digest}")
        self.assertEqual(self.client.head("manifests/pending_deletes").status, 404)
        self.assert_agreement()

    def test_after_space_was_made_elsewhere_everything_works_again(self) -> None:
        self.volume.fill()
        self.assert_refused(self.client.post("blobs/uploads/?digest=" + digest_of(b"x" * 9000), b"x" * 9000))
        self.volume.empty()
        image = self.client.push_image("after")
        self.assert_image(self.client, image, "after")
        self.assert_agreement()

    def test_a_restarted_daemon_serves_from_a_full_disk(self) -> None:
        for end in (self.daemon.stop, self.daemon.kill):
            with self.subTest(end.__name__):
                self.volume.fill()
                end()
                with Daemon(self.volume.data.path, "--quiet", *self.options) as again:
                    self.assert_image(again.client, self.image, "v1")

    def gc(self) -> subprocess.CompletedProcess:
        return command("gc", "--data", str(self.volume.data.path))

    def collect(self, garbage: str) -> None:
        """Run gc on the full disk."""
        self.volume.fill()
        done = self.gc()
        self.assertEqual(done.returncode, 0, done)
        self.assertGreaterEqual(self.volume.free, 4 * MEBIBYTE)
        self.assertNotIn(garbage, self.volume.data.files())
        self.assert_agreement()

    def test_collecting_garbage_works_beside_the_daemon(self) -> None:
        self.collect(self.garbage(4 * MEBIBYTE))
        image = self.client.push_image("after")
        self.assert_image(self.client, image, "after")

    def test_collecting_garbage_works_without_a_daemon(self) -> None:
        garbage = self.garbage(4 * MEBIBYTE)
        self.daemon.stop()
        self.collect(garbage)

    def test_what_a_collection_set_aside_helps_the_next_time_too(self) -> None:
        for _ in range(3):
            self.volume.fill()
            self.client.expect(202, "DELETE", f"blobs/{digest_of(self.loose)}")
            self.volume.empty()
            self.client.push_blob(self.loose)
            self.assertEqual(self.gc().returncode, 0)
        self.assert_agreement()

    def test_a_refused_push_leaves_what_deleting_needs(self) -> None:
        self.volume.fill()
        for _ in range(20):
            content = unique().ljust(500_000, b".")
            self.client.post(f"blobs/uploads/?digest={digest_of(content)}", content)
            session = self.client.post("blobs/uploads/")
            if session.status == 202:
                self.client.patch(session.headers["Location"], content)
        self.client.expect(202, "DELETE", f"blobs/{digest_of(self.loose)}")


class MinimumFree(FullDiskTestCase):
    options = ("--min-free", "8M")

    def test_pushes_are_refused_before_the_disk_is_full(self) -> None:
        image = self.client.push_image("v1")
        content = bytes(3 * MEBIBYTE)
        ways: dict[str, Any] = {
            "post": lambda body, digest: self.client.post(f"blobs/uploads/?digest={digest}", body),
            "chunked": lambda body, digest: self.client.post(f"blobs/uploads/?digest={digest}", iter([body])),
        }
        for name, push in ways.items():
            with self.subTest(name):
                statuses = []
                while not statuses or statuses[-1] == 201:
                    body = unique(name) + content
                    response = push(body, digest_of(body))
                    statuses.append(response.status)
                self.assert_refused(response)
                self.assertGreater(self.volume.free, 8 * MEBIBYTE - SLACK)
        self.volume.fill(leave=7 * MEBIBYTE)
        self.assert_refused(self.client.post("blobs/uploads/"))
        self.assert_refused(self.client.put_manifest(image.body, "v2"))
        self.assert_image(self.client, image, "v1")
        self.client.expect(202, "DELETE", "manifests/v1")

    def test_by_default_64_mebibytes_are_kept_free(self) -> None:
        with Daemon(self.volume.data.path, "--quiet") as daemon:
            content = unique()
            path = f"blobs/uploads/?digest={digest_of(content)}"
            self.assert_refused(daemon.client.post(path, content))
            daemon.client.expect(200, "GET", "/v2/_catalog")


class ExceededQuota(RegistryTestCase):
    """Of a user or a directory, on a disk that has room."""

    def test_a_push_is_refused_and_leaves_nothing(self) -> None:
        content, location = unique(), self.client.open_upload()

        def observe(step: Step) -> None:
            if step.kind == "write":
                raise OSError(errno.EDQUOT, "quota exceeded")

        with observed(observe):
            self.assert_error(self.client.patch(location, content), 507, "DENIED")
            post = self.client.post(f"blobs/uploads/?digest={digest_of(content)}", content)
            self.assert_error(post, 507, "DENIED")
        self.assertEqual(self.data.unfinished(), [])
        self.client.push_blob(content)


class MaximumBlobSize(HTTPTestCase):
    """Needs no small disk."""

    def setUp(self) -> None:
        self.data = DataDirectory(self.temporary())
        self.client = self.enter(Daemon(self.data.path, "--quiet", "--max-blob-size", "1M")).client

    def test_the_largest_blob_allowed_is_accepted(self) -> None:
        self.client.push_blob(bytes(MEBIBYTE))
        location = self.client.open_upload()
        content = b"x" * MEBIBYTE
        self.client.expect(202, "PATCH", location, iter([content]))
        self.client.expect(201, "PUT", with_digest(location, digest_of(content)))

    def test_one_byte_more_is_refused_in_every_way_to_upload(self) -> None:
        content = bytes(MEBIBYTE + 1)
        half = content[: MEBIBYTE // 2]
        post = f"blobs/uploads/?digest={digest_of(content)}"

        def begun() -> str:
            location = self.client.open_upload()
            self.client.expect(202, "PATCH", location, half)
            return location

        rest = content[len(half) :]
        ways = {
            "post": lambda: self.client.post(post, content),
            "chunked post": lambda: self.client.post(post, iter([half, rest])),
            "put": lambda: self.client.put(
                with_digest(self.client.open_upload(), digest_of(content)), content
            ),
            "patch": lambda: self.client.patch(begun(), rest),
            "chunked patch": lambda: self.client.patch(begun(), iter([rest])),
            "last put": lambda: self.client.put(with_digest(begun(), digest_of(content)), rest),
        }
        for name, push in ways.items():
            with self.subTest(name):
                self.assert_error(push(), 413, "SIZE_INVALID")
                self.assertEqual(self.client.head(f"blobs/{digest_of(content)}").status, 404)
        held = sum((self.data.path / "uploads" / name).stat().st_size for name in self.data.unfinished())
        self.assertLessEqual(held, len(ways) * MEBIBYTE)


if __name__ == "__main__":
    unittest.main()
