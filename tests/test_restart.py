"""Being killed and coming back, and sharing a data directory with another daemon."""

from __future__ import annotations

import contextlib
import os
import tempfile

from tests.daemon import Daemon, DaemonTestCase
from tests.support import DataDirectory, HTTPTestCase, descriptor, digest_of, image_manifest, with_digest


class KillsLoseNothing(DaemonTestCase):
    def test_everything_pushed_survives_a_kill(self) -> None:
        daemon = self.start()
        image = daemon.client.push_image("latest")
        daemon.client.push_manifest(image.body, "other")
        daemon.client.push_blob(b"{}")
        referrer = image_manifest(descriptor(b"{}"), subject=image.descriptor)
        digest = daemon.client.push_manifest(referrer)
        big = os.urandom(3_000_000)
        daemon.client.at("another").push_blob(big, "sha512")
        daemon.client.push_image("deleted")
        daemon.client.expect(202, "DELETE", "manifests/deleted")
        daemon.kill()
        client = self.start().client
        for reference in ("latest", "other", image.digest):
            self.assert_image(client, image, reference)
        self.assertEqual(client.get("tags/list").json["tags"], ["latest", "other"])
        referrers = client.get(f"referrers/{image.digest}").json["manifests"]
        self.assertEqual([each["digest"] for each in referrers], [digest])
        self.assertEqual(client.at("another").get(f"blobs/{digest_of(big, 'sha512')}").body, big)
        self.assertEqual(client.get("/v2/_catalog").json["repositories"], ["another", "daemon/image"])

    def test_an_upload_goes_on_after_a_kill(self) -> None:
        content = os.urandom(1_000_000)
        daemon = self.start()
        for algorithm, hint in (("sha256", ""), ("sha512", ""), ("sha512", "?digest-algorithm=sha512")):
            with self.subTest(algorithm, hint=hint):
                location = daemon.client.open_upload(hint)
                daemon.client.expect(202, "PATCH", location, content[:400_000])
                daemon.kill()
                daemon = self.start()
                client = daemon.client
                self.assertEqual(client.expect(204, "GET", location).headers["Range"], "0-399999")
                headers = {"Content-Range": "400000-899999"}
                client.expect(202, "PATCH", location, content[400_000:900_000], headers)
                digest = digest_of(content, algorithm)
                client.expect(201, "PUT", with_digest(location, digest), content[900_000:])
                self.assertEqual(client.get(f"blobs/{digest}").body, content)
                client.expect(202, "DELETE", f"blobs/{digest}")

    def test_an_upload_killed_in_mid_body_goes_on_from_what_arrived(self) -> None:
        content = os.urandom(1_000_000)
        daemon = self.start()
        location = daemon.client.open_upload()
        daemon.client.expect(202, "PATCH", location, content[:1000])
        connection = self.request_in_flight(daemon, "PATCH", location, 999_000)
        connection.send(content[1000:700_000])
        daemon.kill()
        client = self.start().client
        offset = int(client.expect(204, "GET", location).headers["Range"].partition("-")[2]) + 1
        self.assertIn(offset, range(1000, 700_001))
        client.expect(202, "PATCH", location, content[offset:], {"Content-Range": f"{offset}-999999"})
        client.expect(201, "PUT", with_digest(location, digest_of(content)))
        self.assertEqual(client.get(f"blobs/{digest_of(content)}").body, content)

    def test_a_single_post_killed_in_mid_body_leaves_nothing_to_see(self) -> None:
        content = os.urandom(100_000)
        digest = digest_of(content)
        daemon = self.start()
        connection = self.request_in_flight(daemon, "POST", f"blobs/uploads/?digest={digest}", 100_000)
        connection.send(content[:60_000])
        daemon.kill()
        client = self.start().client
        self.assert_error(client.get(f"blobs/{digest}"), 404)
        self.assertNotIn(digest, DataDirectory(self.path).recorded())
        client.push_blob(content)
        self.assertEqual(client.get(f"blobs/{digest}").body, content)

    def test_a_cancelled_upload_stays_cancelled(self) -> None:
        daemon = self.start()
        location = daemon.client.open_upload()
        daemon.client.expect(204, "DELETE", location)
        daemon.kill()
        self.assert_error(self.start().client.get(location), 404, "BLOB_UPLOAD_UNKNOWN")


class DaemonsShareADirectory(HTTPTestCase):
    """Two daemons on one data directory."""

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        data = stack.enter_context(tempfile.TemporaryDirectory())
        cls.daemons = [stack.enter_context(Daemon(data)) for _ in range(2)]

    def setUp(self) -> None:
        self.one, self.two = (daemon.client.at(self._testMethodName.lower()) for daemon in self.daemons)

    def test_each_sees_what_is_pushed_to_the_other(self) -> None:
        for here, there in ((self.one, self.two), (self.two, self.one)):
            image = here.push_image("latest")
            self.assert_image(there, image, "latest")
            self.assert_image(there, image, image.digest)

    def test_each_sees_what_is_deleted_from_the_other(self) -> None:
        image = self.one.push_image("latest")
        self.assert_image(self.two, image, "latest")
        self.one.expect(202, "DELETE", f"manifests/{image.digest}")
        self.one.expect(202, "DELETE", f"blobs/{digest_of(image.config)}")
        for client in (self.two, self.one):
            for path in (
                "manifests/latest",
                f"manifests/{image.digest}",
                f"blobs/{digest_of(image.config)}",
            ):
                self.assert_error(client.get(path), 404)

    def test_an_upload_may_change_daemons_between_pieces(self) -> None:
        content = os.urandom(500_000)
        for algorithm in ("sha256", "sha512"):
            with self.subTest(algorithm):
                location = self.one.open_upload()
                for start, client in (
                    (0, self.one),
                    (100_000, self.two),
                    (200_000, self.one),
                    (300_000, self.one),
                ):
                    piece = content[start : start + 100_000]
                    headers = {"Content-Range": f"{start}-{start + 99_999}"}
                    client.expect(202, "PATCH", location, piece, headers)
                digest = digest_of(content, algorithm)
                self.two.expect(201, "PUT", with_digest(location, digest), content[400_000:])
                self.assertEqual(self.one.get(f"blobs/{digest}").body, content)
                self.assert_error(self.one.get(location), 404, "BLOB_UPLOAD_UNKNOWN")

    def test_a_tag_moved_by_one_is_moved_for_the_other(self) -> None:
        for here in (self.one, self.two, self.one):
            image = here.push_image("latest")
            for client in (self.one, self.two):
                self.assertEqual(client.get("manifests/latest").body, image.body)
                self.assertEqual(
                    client.head("manifests/latest").headers["Docker-Content-Digest"], image.digest
                )
