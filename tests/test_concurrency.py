"""Many clients at once: every reply is one of those allowed, and what is left agrees with itself."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from registry import Registry
from tests.daemon import Daemon
from tests.support import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    TIMEOUT,
    Client,
    RegistryTestCase,
    descriptor,
    digest_of,
    encode,
    image_index,
    image_manifest,
    run_at_once,
    unique,
    with_digest,
)

PUSHERS = 8
ROUNDS = 15


class ConcurrencyTestCase(RegistryTestCase):
    def tearDown(self) -> None:
        self.assert_consistent()

    def images(self, client: Client) -> dict[str, dict]:
        """Every manifest that a tag leads to, by tag, each with all that it needs."""
        manifests = {}
        for tag in client.get("tags/list").json.get("tags", []):
            response = client.get(f"manifests/{tag}")
            self.assert_status(response, 200)
            manifests[tag] = response.json
            self.assertEqual(digest_of(response.body), response.headers["Docker-Content-Digest"])
            self.assert_complete(client, response.json)
        return manifests

    def assert_complete(self, client: Client, manifest: dict) -> None:
        needed = [manifest["config"], *manifest["layers"]] if "config" in manifest else []
        for each in needed:
            response = client.get(f"blobs/{each['digest']}")
            self.assert_status(response, 200)
            self.assertEqual(digest_of(response.body), each["digest"])
        for each in manifest.get("manifests", []):
            self.assert_status(client.get(f"manifests/{each['digest']}"), 200)


def push(client: Client, contents: list[bytes], tag: str) -> set[int]:
    """Push an image of a config and layers in four requests or more, and return the statuses."""
    statuses = set()
    for content in contents:
        location = f"blobs/uploads/?digest={digest_of(content)}"
        statuses.add(client.post(location, content).status)
    config, *layers = contents
    manifest = image_manifest(descriptor(config, OCI_CONFIG), map(descriptor, layers))
    statuses.add(client.put_manifest(manifest, tag).status)
    return statuses


def at_once(functions: list[Callable[[], set[int]]]) -> set[int]:
    return set().union(*run_at_once(*functions))


class PushesAtOnce(ConcurrencyTestCase):
    def test_one_image_under_one_tag(self) -> None:
        contents = [b"{}", os.urandom(100_000), unique(), unique()]
        pushes = [functools.partial(push, self.client, contents, "latest") for _ in range(PUSHERS)]
        self.assertEqual(at_once(pushes), {201})
        self.assertEqual(list(self.images(self.client)), ["latest"])
        for content in contents:
            self.assertEqual(self.data.links(digest_of(content)).count(self.client.repository), 1)

    def test_one_image_into_many_repositories(self) -> None:
        contents = [b"{}", os.urandom(100_000), unique()]
        clients = [self.client.at(f"{self.client.repository}/{n}") for n in range(PUSHERS)]
        pushes = [functools.partial(push, client, contents, "latest") for client in clients]
        self.assertEqual(at_once(pushes), {201})
        for client in clients:
            self.assertEqual(list(self.images(client)), ["latest"])
        names = sorted(client.repository for client in clients)
        self.assertEqual(self.data.links(digest_of(contents[1])), names)

    def test_many_images_under_many_tags(self) -> None:
        shared = unique("shared")
        tags = [f"tag-{n}" for n in range(PUSHERS)]
        pushes = [
            functools.partial(push, self.client, [encode({"tag": tag}), shared, unique()], tag)
            for tag in tags
        ]
        self.assertEqual(at_once(pushes), {201})
        self.assertEqual(list(self.images(self.client)), tags)

    def test_many_images_under_one_tag(self) -> None:
        configs = [encode({"n": n}) for n in range(PUSHERS)]
        pushes = [functools.partial(push, self.client, [config, unique()], "latest") for config in configs]
        self.assertEqual(at_once(pushes), {201})
        (manifest,) = self.images(self.client).values()
        self.assertIn(manifest["config"]["digest"], map(digest_of, configs))

    def test_one_manifest_under_many_tags_at_once(self) -> None:
        image = self.client.push_image()
        tags = [f"tag-{n}" for n in range(PUSHERS)]
        puts = [functools.partial(self.client.put_manifest, image.body, tag) for tag in tags]
        self.assertEqual({response.status for response in run_at_once(*puts)}, {201})
        self.client.expect(202, "DELETE", f"manifests/{image.digest}")
        self.assertEqual(self.client.get("tags/list").json["tags"], [])
        for content in image.blobs:
            self.assert_status(self.client.delete(f"blobs/{digest_of(content)}"), 202)

    def test_one_of_many_creates_a_tag(self) -> None:
        with Registry(data=str(self.data.path)) as other:
            clients = [self.client, Client(other.netloc, self.client.repository)] * (PUSHERS // 2)
            for number in range(ROUNDS):
                create = {"Content-Type": OCI_INDEX, "If-None-Match": "*"}
                bodies = [encode(image_index([], annotations={"n": unique().decode()})) for _ in clients]
                path = f"manifests/new-{number}"
                puts = [functools.partial(c.put, path, body, create) for c, body in zip(clients, bodies)]
                responses = run_at_once(*puts)
                statuses = [response.status for response in responses]
                self.assertEqual(sorted(statuses), [201] + [412] * (len(clients) - 1))
                self.assertEqual(self.client.get(path).body, bodies[statuses.index(201)])

    def test_referrers_of_one_subject(self) -> None:
        self.client.push_blob(b"{}")
        subject = descriptor(unique(), OCI_MANIFEST)
        manifests = [
            image_manifest(descriptor(b"{}"), annotations={"n": str(n)}, subject=subject)
            for n in range(PUSHERS)
        ]
        puts = [functools.partial(self.client.push_manifest, manifest) for manifest in manifests]
        digests = run_at_once(*puts)
        listed = self.client.get(f"referrers/{subject['digest']}").json["manifests"]
        self.assertEqual(sorted(each["digest"] for each in listed), sorted(digests))


class DeletesAtOnce(ConcurrencyTestCase):
    def test_one_of_many_deletions_succeeds(self) -> None:
        for _ in range(5):
            image = self.client.push_image("latest")
            blob = self.client.push_blob(unique())
            for path in (f"blobs/{blob}", "manifests/latest", f"manifests/{image.digest}"):
                delete = functools.partial(self.client.delete, path)
                statuses = sorted(response.status for response in run_at_once(*[delete] * PUSHERS))
                self.assertEqual(statuses, [202] + [404] * (PUSHERS - 1))

    def test_a_blob_pushed_here_is_not_lost_with_the_one_deleted_there(self) -> None:
        content = os.urandom(20_000)
        clients = [self.client.at(f"{self.client.repository}/{n}") for n in range(4)]
        run_at_once(*(functools.partial(self.push_read_delete, client, content) for client in clients))
        self.assertNotIn(digest_of(content), self.data.files())

    def push_read_delete(self, client: Client, content: bytes) -> None:
        """What one client does in a repository of its own, where nothing can go wrong."""
        path = f"blobs/{digest_of(content)}"
        for _ in range(ROUNDS):
            client.push_blob(content)
            response = client.expect(200, "GET", path)
            self.assertEqual(response.body, content)
            client.expect(202, "DELETE", path)
            self.assert_status(client.get(path), 404)

    def test_a_mounted_blob_is_not_lost_with_its_source(self) -> None:
        content = unique()
        digest = digest_of(content)
        path = f"blobs/uploads/?mount={digest}&from={self.other.repository}"

        def push_and_delete() -> None:
            for _ in range(ROUNDS):
                self.other.push_blob(content)
                self.other.expect(202, "DELETE", f"blobs/{digest}")

        def mount() -> None:
            for _ in range(ROUNDS):
                response = self.client.post(path)
                self.assertIn(response.status, (201, 202), response)
                if response.status == 201:
                    self.assert_blob(self.client, content)
                    self.client.expect(202, "DELETE", f"blobs/{digest}")
                else:
                    self.client.expect(204, "DELETE", response.headers["Location"])

        run_at_once(push_and_delete, mount)

    def test_a_manifest_has_its_blobs_whoever_deletes_them(self) -> None:
        contents = [encode({"n": unique().decode()}), unique()]
        blobs = [f"blobs/{digest_of(content)}" for content in contents]

        def delete() -> set[int]:
            paths = ["manifests/latest", self.manifest_path(contents), *blobs]
            return {self.client.delete(path).status for _ in range(ROUNDS) for path in paths}

        def pull() -> set[int]:
            paths = ["manifests/latest", *blobs]
            return {self.client.get(path).status for _ in range(ROUNDS) for path in paths}

        def push_again() -> set[int]:
            return set().union(*(push(self.client, contents, "latest") for _ in range(ROUNDS)))

        pushed, deleted, pulled = run_at_once(push_again, delete, pull)
        self.assertLessEqual(pushed, {201, 400})
        self.assertLessEqual(deleted, {202, 404, 405})
        self.assertLessEqual(pulled, {200, 404})
        self.images(self.client)
        self.assertEqual(push(self.client, contents, "latest"), {201})
        self.client.expect(202, "DELETE", self.manifest_path(contents))
        for path in blobs:
            self.client.expect(202, "DELETE", path)

    def manifest_path(self, contents: list[bytes]) -> str:
        config, *layers = contents
        manifest = image_manifest(descriptor(config, OCI_CONFIG), map(descriptor, layers))
        return f"manifests/{digest_of(encode(manifest))}"

    def test_an_index_has_its_children_whoever_deletes_them(self) -> None:
        image = self.client.push_image()
        index = image_index([image.descriptor])

        def delete() -> set[int]:
            paths = [f"manifests/{digest_of(encode(index))}", f"manifests/{image.digest}"]
            return {self.client.delete(path).status for _ in range(ROUNDS) for path in paths}

        def push_again() -> set[int]:
            return {
                self.client.put_manifest(manifest, "" if manifest is image.body else "index").status
                for _ in range(ROUNDS)
                for manifest in (image.body, index)
            }

        pushed, deleted = run_at_once(push_again, delete)
        self.assertLessEqual(pushed, {201, 400})
        self.assertLessEqual(deleted, {202, 404, 405})
        self.images(self.client)

    def test_a_tag_that_moves_always_leads_somewhere(self) -> None:
        images = [self.client.push_image("latest") for _ in range(2)]

        def move() -> set[int]:
            moves = itertools.islice(itertools.cycle(images), 2 * ROUNDS)
            return {self.client.put_manifest(image.body, "latest").status for image in moves}

        def pull() -> set[int]:
            responses = [self.client.get("manifests/latest") for _ in range(2 * ROUNDS)]
            bodies = {response.body for response in responses}
            self.assertLessEqual(bodies, {image.body for image in images})
            return {response.status for response in responses}

        self.assertEqual(run_at_once(move, move, pull, pull), [{201}, {201}, {200}, {200}])


class RegistriesShareADirectory(ConcurrencyTestCase):
    """Two registries on one data directory, as two daemons have it."""

    def test_manifests_refused_at_once_leave_no_file(self) -> None:
        absent = descriptor(b"never pushed")
        with Registry(data=str(self.data.path)) as other:
            clients = [self.client, Client(other.netloc, self.client.repository)] * 4
            for number in range(10):
                manifest = image_manifest(absent, annotations={"number": str(number)})
                puts = [functools.partial(client.put_manifest, manifest, "refused") for client in clients]
                self.assertEqual({response.status for response in run_at_once(*puts)}, {400})

    def test_a_deletion_that_comes_late_touches_no_other_repository(self) -> None:
        with Registry(data=str(self.data.path)) as quick, ThreadPoolExecutor(1) as pool:
            manifest = image_index([], annotations={"n": unique().decode()})
            digest = self.client.push_manifest(manifest, "latest")
            here = Client(quick.netloc, self.client.repository)
            there = here.at(self.other.repository)
            with self.held_up() as (begun, go_on):
                late = pool.submit(self.client.delete, "manifests/latest")
                self.assertTrue(begun.wait(TIMEOUT))
                here.expect(202, "DELETE", f"manifests/{digest}")
                there.push_manifest(manifest, "latest")
                go_on.set()
                self.assert_status(late.result(), 404)
            self.assert_status(there.get("manifests/latest"), 200)

    @contextlib.contextmanager
    def held_up(self) -> Iterator[tuple[threading.Event, threading.Event]]:
        """What the first of the two registries changes waits: set when it does, and until when it does."""
        store, begun, go_on = self.registry.store, threading.Event(), threading.Event()
        transaction = store.transaction

        def wait(**options: Any) -> Any:
            begun.set()
            go_on.wait(TIMEOUT)
            return transaction(**options)

        with mock.patch.object(store, "transaction", wait):
            yield begun, go_on

    def test_a_registry_that_starts_disturbs_no_upload(self) -> None:
        started = threading.Event()

        def start_again_and_again() -> set[int]:
            for _ in range(40):
                with Registry(data=str(self.data.path)):
                    pass
            started.set()
            return set()

        def upload() -> set[int]:
            statuses = set()
            with self.client.keep_alive() as client:
                while not started.is_set():
                    content = unique()
                    location = client.open_upload()
                    statuses.add(client.patch(location, content[:5]).status)
                    statuses.add(client.put(with_digest(location, digest_of(content)), content[5:]).status)
                    client.push_blob(content)
            return statuses

        statuses = at_once([start_again_and_again, *[upload] * 4])
        self.assertEqual(statuses, {201, 202})


class RegistriesTakeTurns(ConcurrencyTestCase):
    """Two registries on one data directory that write to one upload session."""

    def setUp(self) -> None:
        super().setUp()
        second = Registry(data=str(self.data.path))
        second.start()
        self.addCleanup(second.close)
        self.there = Client(second.netloc, self.client.repository)
        self.good, self.evil = os.urandom(20), os.urandom(20)

    def assert_evil_is_refused(self, location: str, client: Client) -> None:
        self.other.push_blob(self.good)
        digest = digest_of(self.good)
        self.assert_error(client.put(with_digest(location, digest)), 400, "DIGEST_INVALID")
        self.assertEqual(self.data.files()[digest], len(self.good))
        self.assert_blob(self.other, self.good)
        self.assert_error(self.client.get(f"blobs/{digest}"), 404)

    def test_bytes_that_were_taken_back_do_not_vouch_for_those_of_another_process(self) -> None:
        location = self.client.open_upload()
        refused = self.client.patch(location, iter([self.good]), {"Content-Range": "0-9"})
        self.assert_error(refused, 400, "SIZE_INVALID")
        self.assert_status(self.there.patch(location, self.evil), 202)
        self.assert_evil_is_refused(location, self.client)

    def test_real_processes_do_not_vouch_for_each_other_either(self) -> None:
        with (
            tempfile.TemporaryDirectory() as data,
            Daemon(data, "--quiet") as one,
            Daemon(data, "--quiet") as two,
        ):
            here, there = (Client(daemon.client.host, "app") for daemon in (one, two))
            here.at("other").push_blob(self.good)
            location = here.open_upload()
            here.patch(location, iter([self.good]), {"Content-Range": "0-9"})
            self.assert_status(there.patch(location, self.evil), 202)
            response = here.put(with_digest(location, digest_of(self.good)))
            self.assert_error(response, 400, "DIGEST_INVALID")
            self.assertEqual(here.at("other").get(f"blobs/{digest_of(self.good)}").body, self.good)

    def overwrite(self, location: str) -> None:
        """Replace a session's bytes by as many others."""
        (self.data.path / "uploads" / location.rpartition("/")[2]).write_bytes(self.evil)

    def test_a_hash_is_not_believed_when_somebody_wrote_as_many_bytes_since(self) -> None:
        location = self.client.open_upload()
        self.assert_status(self.client.patch(location, self.good), 202)
        self.overwrite(location)
        self.assert_evil_is_refused(location, self.client)

    def test_a_hash_is_not_believed_where_times_are_kept_too_coarsely(self) -> None:
        utime = os.utime

        def coarse(file: int, ns: tuple[int, int]) -> None:
            utime(file, ns=(ns[0] // 10**9 * 10**9,) * 2)

        location = self.client.open_upload()
        with mock.patch.object(os, "utime", coarse):
            self.assert_status(self.client.patch(location, self.good), 202)
        path = self.data.path / "uploads" / location.rpartition("/")[2]
        then = path.stat().st_mtime_ns
        self.overwrite(location)
        os.utime(path, ns=(then, then))
        self.assert_evil_is_refused(location, self.client)

    def hashed(self, *clients: Client) -> float:
        """How many times as many bytes are hashed as there are, when clients send pieces in turn."""
        pieces = [os.urandom(10_000) for _ in range(40)]
        content, hashed, new = b"".join(pieces), [0], hashlib.new
        digest = digest_of(content)

        class Counting:
            """A hash that counts what it is given."""

            def __init__(self, name: str, content: bytes = b"") -> None:
                self.name, self._hash = name, new(name)
                self.update(content)
                self.hexdigest = self._hash.hexdigest

            def update(self, data: bytes) -> None:
                hashed[0] += len(data)
                self._hash.update(data)

        location = self.client.open_upload()
        with mock.patch.object(hashlib, "new", Counting):
            for number, piece in enumerate(pieces):
                self.assert_status(clients[number % len(clients)].patch(location, piece), 202)
            self.client.expect(201, "PUT", with_digest(location, digest))
        self.assert_blob(self.other.at(self.client.repository), content)
        return hashed[0] / len(content)

    def test_pieces_that_come_to_one_process_are_hashed_as_they_come(self) -> None:
        self.assertEqual(self.hashed(self.client), 1)

    def test_pieces_that_alternate_are_hashed_once_more_at_most(self) -> None:
        self.assertLess(self.hashed(self.client, self.there), 2.025)

    def test_what_is_remembered_of_sessions_is_bounded(self) -> None:
        store, kept = self.registry.store, []
        with mock.patch.object(store._hashes, "_limit", 4):
            locations = [self.client.open_upload() for _ in range(10)]
            for location in locations:
                self.assert_status(self.client.patch(location, self.good), 202)
                kept.append(len(store._hashes._things))
        self.assertEqual((max(kept), kept[-1]), (4, 4))
        for location in locations:
            self.assert_status(self.there.put(with_digest(location, digest_of(self.good))), 201)
