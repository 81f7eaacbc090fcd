"""Paths: none leads out of the data directory, by its name or by a link that somebody planted."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests.credentials import AuthorizedClient, basic, users_line
from tests.support import RegistryTestCase, descriptor, digest_of, encode, image_manifest, unique, with_digest

TRAVERSALS = (
    *".. ../.. ../../../../../../etc/passwd ..%2f..%2fsecret %2e%2e%2f%2e%2e%2fsecret /etc/passwd .".split(),
    *"a/../.. %252e%252e%252fsecret ..%5c..%5csecret ..;/secret %c0%ae%c0%ae%c0%afsecret".split(),
    *"%uff0e%uff0e/secret %2fetc%2fpasswd file:%2f%2f%2fetc%2fpasswd a%00 %00".split(),
    *"sha256:..%2f..%2f..%2fsecret sha256:%2e%2e registry.db ~root C:%5csecret con %5c..%5c".split(),
    "sha256:" + "a" * 60 + "/../",
    "a" * 300,
)


def _fill_in(path: str, values: dict[str, str]) -> str:
    """A route's path with values for its parts."""
    return re.sub(r"<(\w+)>", lambda part: values[part[1]], path)


class NoPathLeadsOut(RegistryTestCase):
    """No segment of any path, and no parameter, is ever taken for a file's name."""

    SECRET = b"the secret beside the data directory"

    def setUp(self) -> None:
        super().setUp()
        self.client.push_image("latest")
        parent = self.data.path.parent
        for name in ("secret", "sha256:secret"):
            file = parent / name
            file.write_bytes(self.SECRET)
            self.addCleanup(file.unlink)
        self.before = self.snapshot()

    def snapshot(self) -> list[str]:
        """Every file of the data directory but SQLite's, which come and go."""
        paths = (str(path.relative_to(self.data.path)) for path in self.data.path.rglob("*"))
        return sorted(path for path in paths if not path.startswith("registry.db"))

    def paths(self) -> Iterator[tuple[str, str]]:
        """Every route with every traversal in each of its places."""
        good = {
            "name": self.client.repository,
            "reference": "latest",
            "digest": digest_of(b"x"),
            "session": "0" * 32,
        }
        for route in registry.ROUTES:
            places = re.findall(r"<(\w+)>", route.path)
            for place, bad in itertools.product(places, TRAVERSALS):
                yield route.method, _fill_in(route.path, {**good, place: bad})
        upload = self.client.path("blobs/uploads/")
        for bad in TRAVERSALS:
            for query in (f"?mount={digest_of(b'x')}&from={bad}", f"?mount={bad}", f"?digest={bad}"):
                yield "POST", upload + query
            yield "GET", self.client.path(f"tags/list?last={bad}")
            yield "GET", f"/{bad}"
            yield "GET", f"/{bad}/registry.db"
            yield "GET", self.client.path(f"blobs/uploads/{bad}/registry.db")
            yield "GET", self.client.path(f"blobs/sha256:{bad}/registry.db")
            yield "GET", f"/v2/{bad}"

    def test_every_segment_of_every_route(self) -> None:
        with self.client.keep_alive() as client:
            for method, path in self.paths():
                with self.subTest(method, path=path):
                    response = client.request(method, path)
                    self.assertLess(response.status, 500, response)
                    self.assertNotIn(self.SECRET, response.body)
                    self.assertNotIn(b"root:", response.body)
                    if response.status == 202 and "Docker-Upload-UUID" in response.headers:
                        client.expect(204, "DELETE", response.headers["Location"])
        self.assertEqual(self.snapshot(), self.before)


@unittest.skipUnless(hasattr(os, "symlink"), "plants symbolic links")
class LinksAreNotFollowed(RegistryTestCase):
    """Somebody has put links into the data directory; none of them leads anywhere."""

    SECRET = b"what a link points at"

    def setUp(self) -> None:
        super().setUp()
        self.victim = self.temporary() / "victim"
        self.victim.write_bytes(self.SECRET)

    def assert_victim_untouched(self) -> None:
        self.assertEqual(self.victim.read_bytes(), self.SECRET)
        self.assertEqual(self.victim.stat().st_nlink, 1)

    def plant(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(self.victim)

    def replaced_blob(self, size: int) -> str:
        """A blob of this size that was replaced by a link; its digest."""
        digest = self.client.push_blob(unique().ljust(size, b"."))
        self.plant(self.data.blob(digest))
        return digest

    def test_a_blob_that_is_a_link_is_not_served(self) -> None:
        for size in (len(self.SECRET), len(self.SECRET) + 5):
            digest = self.replaced_blob(size)
            for headers in ({}, {"Range": "bytes=0-3"}):
                response = self.client.get(f"blobs/{digest}", headers)
                self.assert_error(response, 404, "BLOB_UNKNOWN")
            response = self.other.post(f"blobs/uploads/?mount={digest}&from={self.client.repository}")
            self.assert_status(response, 202)

    def test_a_manifest_that_is_a_link_is_not_served(self) -> None:
        self.client.push_blob(b"{}")
        manifest = encode(image_manifest(descriptor(b"{}")))
        self.victim.write_bytes(b" " * len(manifest))
        self.client.push_manifest(manifest, "latest")
        self.plant(self.data.blob(digest_of(manifest)))
        with mock.patch.object(self.registry.store, "_cache", registry.Cache(0)):
            self.assert_error(self.client.get("manifests/latest"), 404, "MANIFEST_UNKNOWN")

    def test_pushing_over_a_link_replaces_it(self) -> None:
        content = unique()
        path = self.data.blob(digest_of(content))
        self.plant(path)
        self.client.push_blob(content)
        self.assertFalse(path.is_symlink())
        self.assert_blob(self.client, content)
        self.assert_victim_untouched()

    def test_deleting_a_link_deletes_no_more(self) -> None:
        digest = self.replaced_blob(len(self.SECRET))
        self.assert_status(self.client.delete(f"blobs/{digest}"), 202)
        self.assert_victim_untouched()

    def test_an_upload_that_is_a_link_is_not_written_to(self) -> None:
        requests: tuple[tuple[str, str, Any], ...] = (
            ("PATCH", "", b"more"),
            ("PATCH", "", b""),
            ("PUT", digest_of(self.SECRET + b"more"), b"more"),
            ("PUT", digest_of(self.SECRET), b""),
            ("PUT", digest_of(b"other"), b""),
            ("DELETE", "", None),
        )
        for method, digest, body in requests:
            with self.subTest(method, digest=digest):
                self.victim.write_bytes(self.SECRET)
                location = self.client.open_upload()
                self.plant(self.data.upload(location))
                response = self.client.request(
                    method, with_digest(location, digest) if digest else location, body
                )
                self.assertLess(response.status, 500, response)
                self.assertNotEqual(response.status, 201, response)
                self.assert_victim_untouched()
                self.assertEqual(self.data.files().get(digest_of(self.SECRET)), None)

    def test_an_upload_that_is_a_link_tells_nothing(self) -> None:
        location = self.client.open_upload()
        self.plant(self.data.upload(location))
        response = self.client.get(location)
        self.assertNotIn(f"0-{len(self.SECRET) - 1}", response.headers.getall("Range"))

    def test_no_file_of_its_own_is_written_through_a_link(self) -> None:
        users, absent = self.victim.with_name("users"), self.victim.with_name("absent")
        users.write_text(users_line("a", "b"))
        for name, target in itertools.product(("reserve", "token.key"), (self.victim, absent)):
            with self.subTest(name, target=target.name), tempfile.TemporaryDirectory() as data:
                self.victim.write_bytes(self.SECRET)
                absent.unlink(missing_ok=True)
                (Path(data) / name).symlink_to(target)
                with contextlib.suppress(registry.StartupError):
                    self.use(registry.Registry(data, users=str(users)))
                self.assert_victim_untouched()
                self.assertFalse(absent.exists())

    def use(self, running: registry.Registry) -> None:
        """Start a registry and push something to it."""
        with running:
            AuthorizedClient(running.netloc, "a", basic("a", "b")).push_blob(b"x")
