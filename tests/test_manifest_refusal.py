"""Manifests that are refused, however much they cost, and that nothing of them stays."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import re
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

from tests.daemon import Daemon
from tests.manifests import ManifestTestCase
from tests.support import (
    MEBIBYTE,
    OCI_INDEX,
    OCI_MANIFEST,
    TIMEOUT,
    HTTPTestCase,
    RegistryTestCase,
    Response,
    descriptor,
    digest_of,
    elapsed,
    encode,
    image_index,
    unique,
)

SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
LIMIT = 4 * MEBIBYTE


class MalformedIsRefused(ManifestTestCase):
    """What is refused, and that nothing of it stays."""

    def test_what_is_not_a_manifest_is_refused(self) -> None:
        for name, body in {
            "nothing": b"",
            "not JSON": b"not JSON",
            "half of it": encode(self.manifest())[:-1],
            "something after it": encode(self.manifest()) + b"x",
            "two of it": encode(self.manifest()) * 2,
            "not UTF-8": encode(self.manifest()).replace(b'"layers"', b'"\xff": 0, "layers"'),
            "array": b"[]",
            "array of it": encode([self.manifest()]),
            "string": b'"text"',
            "number": b"2",
            "null": b"null",
            "true": b"true",
            "single quotes": encode(self.manifest()).replace(b'"', b"'"),
            "UTF-16": encode(self.manifest()).decode().encode("utf-16"),
            "with a byte order mark": b"\xef\xbb\xbf" + encode(self.manifest()),
        }.items():
            with self.subTest(name):
                self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_a_schema_version_other_than_2_is_refused(self) -> None:
        for version in (0, 1, 3, -2, 22, "2", [2], {"2": 2}, False, 2.5, 10**30):
            self.assert_refused(self.manifest(schemaVersion=version))

    def test_a_missing_schema_version_is_refused(self) -> None:
        self.assert_refused(self.manifest(schemaVersion=None))
        self.assert_refused({**self.manifest(), "schemaVersion": None})

    def test_docker_schema_1_is_refused(self) -> None:
        manifest = {
            "schemaVersion": 1,
            "name": "a",
            "tag": "b",
            "architecture": "c",
            "fsLayers": [],
            "history": [],
        }
        for kind in (SCHEMA_1, "application/vnd.docker.distribution.manifest.v1+json", "application/json"):
            self.assert_refused(manifest, kind)

    def test_a_descriptor_with_a_bad_digest_is_refused(self) -> None:
        for digest in (
            "",
            "latest",
            "sha256:abc",
            "sha256:" + "A" * 64,
            "sha256:" + "a" * 64 + "\n",
            "sha512:" + "a" * 64,
            "md5:" + "a" * 32,
            "sha256:../../registry.db",
            "\ud800",
            None,
            7,
            [],
            {},
        ):
            self.assert_descriptor_refused(digest=digest)

    def test_a_descriptor_with_a_bad_size_is_refused(self) -> None:
        for size in (-1, -(10**30), "5", 1.5, [], {}, True):
            self.assert_descriptor_refused(size=size)

    def assert_descriptor_refused(self, **change: Any) -> None:
        bad = {**descriptor(self.layer), **change}
        for name, manifest in {
            "config": self.manifest(config=bad),
            "layer": self.manifest(layers=[descriptor(self.layer), bad]),
            "subject": self.manifest(subject=bad),
            "child": image_index([bad]),
            "index subject": image_index([], subject=bad),
        }.items():
            with self.subTest(name, **change):
                response = self.client.put_manifest(manifest, "tag")
                self.assert_error(response, 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(encode(manifest))

    def test_members_of_the_wrong_kind_are_refused(self) -> None:
        for change in (
            {"config": "text"},
            {"config": [descriptor(b"{}")]},
            {"layers": "text"},
            {"layers": {"a": 1}},
            {"layers": descriptor(b"{}")},
            {"layers": [None]},
            {"layers": ["sha256:" + "a" * 64]},
            {"layers": [[descriptor(b"{}")]]},
            {"subject": "sha256:" + "a" * 64},
            {"subject": [descriptor(b"{}")]},
            {"manifests": []},
            {"subject": {}},
            {"mediaType": 7},
            {"mediaType": [OCI_MANIFEST]},
            {"mediaType": OCI_INDEX},
            {"artifactType": 7},
            {"artifactType": ["a"]},
            {"artifactType": "\ud800"},
            {"artifactType": "a\u0000b"},
            {"annotations": "text"},
            {"annotations": ["a"]},
            {"annotations": {"a": 7, "b": {"c": []}}},
            {"config": {**descriptor(b"{}"), "mediaType": 7}},
            {"layers": [{**descriptor(b"{}"), "mediaType": []}]},
        ):
            self.assert_refused({**self.manifest(), **change})

    def test_an_image_that_is_an_index_as_well_is_refused(self) -> None:
        both = {**self.manifest(), "manifests": []}
        for media_type in (OCI_MANIFEST, OCI_INDEX, "application/vnd.example+json"):
            self.assert_refused({**both, "mediaType": media_type}, media_type)

    def test_neither_image_nor_index_is_refused(self) -> None:
        without = {**self.manifest(), "config": None}
        for manifest in ({"a": 1}, {"schemaVersion": 2}, without, image_index([], mediaType=OCI_MANIFEST)):
            self.assert_refused(manifest)

    def assert_refused(self, manifest: Any, media_type: str = OCI_MANIFEST) -> None:
        body = encode(manifest)
        with self.subTest(body[:200]):
            self.assert_error(self.put(body, "tag", media_type), 400, "MANIFEST_INVALID")
            self.assert_nothing_stored(body)

    def test_children_of_the_wrong_kind_are_refused(self) -> None:
        for children in ("text", 7, {"a": 1}, [None], [[]], ["sha256:" + "a" * 64]):
            self.assert_refused({**image_index([]), "manifests": children}, OCI_INDEX)

    def test_odd_values_do_no_harm(self) -> None:
        subject = descriptor(b"odd subject", OCI_MANIFEST)
        for change in (
            {"artifactType": ""},
            {"annotations": {"\ud800": "\udfff"}},
            {"annotations": {"a\u0000b": "c\u0000d"}},
            {"config": {**descriptor(b"{}"), "mediaType": None}},
            {"config": {**descriptor(b"{}"), "urls": 7, "annotations": [], "platform": "x"}},
            {"layers": [{**descriptor(b"{}"), "urls": 7}]},
            {"layers": [{**descriptor(b"{}"), "urls": None}]},
        ):
            with self.subTest(change):
                body = encode(self.manifest(subject=subject, **change))
                self.assert_status(self.put(body), 201)
                listed = self.client.expect(200, "GET", f"referrers/{subject['digest']}").json["manifests"]
                self.assertIn(digest_of(body), [each["digest"] for each in listed])

    def test_numbers_have_twenty_digits_at_most_and_are_finite(self) -> None:
        text = encode(self.manifest(x=0)).decode()
        size = f'"size": {len(self.layer)}'
        for number, anywhere, as_size in (
            ("9" * 20, 201, 201),
            ("9" * 21, 400, 400),
            ("-" + "9" * 21, 400, 400),
            ("9" * 5000, 400, 400),
            ("9" * MEBIBYTE, 400, 400),
            ("1e999", 201, 400),
            ("-1e999", 201, 400),
            ("1e-999", 201, 400),
            ("NaN", 400, 400),
            ("Infinity", 400, 400),
        ):
            for old, new, status in (
                ('"x": 0', '"x": ', anywhere),
                (size, '"size": ', as_size),
                ('"schemaVersion": 2', '"schemaVersion": ', 400),
            ):
                with self.subTest(number[:25], place=new):
                    body = text.replace(old, new + number)
                    self.assertIn(number, body)
                    response: list[Response] = []
                    self.assertLess(elapsed(lambda: response.append(self.put(body.encode()))), 5)  # noqa: B023
                    self.assert_status(response[0], status)

    def test_deep_nesting_does_no_harm(self) -> None:
        text = encode(self.manifest(x=0))
        for before, after in ((b"[", b"]"), (b'{"":', b"}"), (b"[", b"")):
            for depth, status in ((900, 201 if after else 400), (100_000, 400), (600_000, 400)):
                with self.subTest(depth, before=before, after=after):
                    nested = before * depth + b"0" + after * depth
                    self.assert_status(self.put(text.replace(b'"x": 0', b'"x": ' + nested)), status)

    def test_ordinary_nesting_is_accepted(self) -> None:
        text = encode(self.manifest(x=0))
        body = text.replace(b'"x": 0', b'"x": ' + b'[{"y":' * 30 + b"0" + b"}]" * 30)
        self.assert_status(self.put(body), 201)

    def test_four_mebibytes_are_the_limit(self) -> None:
        body = encode(self.manifest())
        padding = b" " * (LIMIT - len(body))
        headers = {"Content-Type": OCI_MANIFEST}
        self.assert_status(self.client.put("manifests/tag", body + padding, headers), 201)
        self.assert_served("tag", body + padding, OCI_MANIFEST)
        self.client.expect(202, "DELETE", f"manifests/{digest_of(body + padding)}")
        for over in (body + padding + b" ", iter([body, padding, b" "])):
            with self.subTest(type(over).__name__):
                self.assert_error(self.client.put("manifests/tag", over, headers), 413)
                self.assert_nothing_stored(body + padding + b" ")

    def test_a_digest_that_does_not_match_stores_nothing(self) -> None:
        body = encode(self.manifest())
        for algorithm in ("sha256", "sha512"):
            for claimed in (digest_of(b"other", algorithm), digest_of(self.layer, algorithm)):
                for query in ("", "?tag=tag"):
                    with self.subTest(claimed, query=query):
                        self.assert_error(self.put(body, claimed + query), 400, "DIGEST_INVALID")
                        self.assert_nothing_stored(body)
                        self.assert_status(self.client.get(f"manifests/{claimed}"), 404)

    def test_a_reference_that_is_neither_tag_nor_digest_is_refused(self) -> None:
        body = encode(self.manifest())
        for reference in (
            ".INVALID_MANIFEST_NAME",
            "-tag",
            "t" * 129,
            "tag%0A",
            "tag%00",
            "tag%20",
            "t%C3%A4g",
            "a+b",
            "a@b",
            "..",
            "%2E%2E",
            "..%2F..%2Fregistry.db",
        ):
            with self.subTest(reference):
                self.assert_status(self.put(body, reference), 404 if "%2F" in reference else 400)
                self.assert_nothing_stored(body)
                for method in ("GET", "HEAD"):
                    self.assertEqual(self.client.request(method, f"manifests/{reference}").status, 404)

    def test_a_malformed_digest_is_no_reference(self) -> None:
        body = encode(self.manifest())
        for reference in ("sha256:abc", "sha256:" + "A" * 64, "md5:" + "a" * 32, f"{digest_of(body)}%0A"):
            with self.subTest(reference):
                self.assert_error(self.put(body, reference), 400, "DIGEST_INVALID")
                self.assert_nothing_stored(body)
                for method in ("GET", "DELETE"):
                    response = self.client.request(method, f"manifests/{reference}")
                    self.assert_error(response, 400, "DIGEST_INVALID")


LINUX = os.path.isdir("/proc/self/fd")
BOMB = 4 * MEBIBYTE


def _filled(head: bytes, piece: bytes, tail: bytes) -> bytes:
    """As many pieces between head and tail as a manifest may have."""
    return head + piece * ((BOMB - len(head) - len(tail)) // len(piece)) + tail


def _descriptors(begin: str, end: str) -> bytes:
    """A manifest of as many layers as fit in, each another one."""
    text, numbers = [begin], itertools.count()
    size = len(begin) + len(end)
    while size < BOMB - 100:
        text.append(f'{{"digest":"sha256:{next(numbers):064x}"}},')
        size += len(text[-1])
    return ("".join(text)[:-1] + end).encode()


CONFIG = json.dumps(descriptor(b"{}"))
HEAD = f'{{"schemaVersion":2,"config":{CONFIG},"layers":['
BOMBS = {
    "brackets": b"[" * BOMB,
    "nested arrays": b"[" * (BOMB // 2) + b"]" * (BOMB // 2),
    "nested objects": _filled(b"", b'{"a":', b""),
    "nested in a manifest": _filled(HEAD.encode(), b"[", b""),
    "nested just deep enough to parse": HEAD.encode() + b'],"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "one huge number": _filled(b'{"schemaVersion":', b"2", b"}"),
    "one huge fraction": _filled(b'{"schemaVersion":2.', b"0", b"}"),
    "a huge exponent": b'{"schemaVersion":2e999999999999999999}',
    "a huge negative exponent": b'{"schemaVersion":2e-999999999999999999}',
    "many numbers": _filled(b'{"schemaVersion":2,"a":[', b"1e9,", b"1]}"),
    "many empty objects": _filled(b'{"schemaVersion":2,"a":[', b"{},", b"1]}"),
    "many empty arrays": _filled(b'{"schemaVersion":2,"a":[', b"[],", b"1]}"),
    "one name over and over": _filled(b"{", b'"a":1,', b'"a":1}'),
    "layers over and over": _filled(b'{"schemaVersion":2,', b'"layers":[],', b'"a":1}'),
    "one long string": _filled(b'{"schemaVersion":2,"a":"', b"x", b'"}'),
    "one string of escapes": _filled(b'{"schemaVersion":2,"a":"', b"\\ud800", b'"}'),
    "white space": _filled(b"", b" ", b"{}"),
    "absent layers": _descriptors(HEAD, "]}"),
}


class BombsAreRefused(RegistryTestCase):
    """Manifests made to cost more than they weigh."""

    def test_none_takes_long_or_is_stored(self) -> None:
        before = self.data.files()
        for name, body in BOMBS.items():
            with self.subTest(name):
                self.assertLessEqual(len(body), BOMB)
                started = time.perf_counter()
                response = self.client.put_manifest(body, "bomb", OCI_MANIFEST)
                self.assertLess(time.perf_counter() - started, 5)
                self.assert_error(response, 400, "MANIFEST_INVALID", "MANIFEST_BLOB_UNKNOWN")
                self.assertLess(len(response.body), MEBIBYTE)
        self.assertEqual(self.data.files(), before)
        self.assert_nothing_unfinished()

    def test_many_foreign_layers_hold_nobody_up(self) -> None:
        """They may be absent, so that all of them are recorded."""
        self.client.push_blob(b"{}")
        body = _descriptors(HEAD, "]}").replace(b'"}', b'","urls":["a"]}')[:BOMB]
        body = body[: body.rindex(b"},") + 1] + b"]}"
        times: list[float] = []
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            push = pool.submit(self.client.put_manifest, body, "many", OCI_MANIFEST)
            while not push.done():
                times.append(elapsed(lambda: self.other.push_blob(unique())))
        self.assert_status(push.result(), 201)
        self.assertLess(max(times), 5)

    def test_a_larger_one_is_refused_unread(self) -> None:
        for headers in (f"Content-Length: {BOMB + 1}", f"Content-Length: {2**50}"):
            connection = self.connect().request("PUT", self.client.path("manifests/bomb"), headers)
            self.assert_error(connection.read(), 413, "SIZE_INVALID")


@unittest.skipUnless(LINUX, "reads /proc/PID/status")
class BombsTakeLittleMemory(HTTPTestCase):
    LIMIT = 512  # MiB, for the whole process

    def test_bombs_at_once_cost_bounded_memory(self) -> None:
        with tempfile.TemporaryDirectory() as data, Daemon(data, "--no-sync", "--quiet") as daemon:
            client = daemon.client
            bodies = [
                BOMBS[name] for name in ("many empty objects", "many empty arrays", "absent layers")
            ] * 2
            with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
                pushes = [pool.submit(client.put_manifest, body, "bomb", OCI_MANIFEST) for body in bodies]
                for push in pushes:
                    self.assert_error(push.result(6 * TIMEOUT), 400)
            self.assert_status(client.get("/v2/"), 200)
            status = Path(f"/proc/{daemon.process.pid}/status").read_text("ascii")
            peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) // 1024
            self.assertLess(peak, self.LIMIT, "MiB")
