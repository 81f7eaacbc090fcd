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
from typing import Any, ClassVar

from tests.daemon import Daemon
from tests.manifests import ManifestTestCase
from tests.support import (
    MEBIBYTE,
    OCI_INDEX,
    OCI_MANIFEST,
    TIMEOUT,
    HTTPTestCase,
    RegistryTestCase,
    descriptor,
    digest_of,
    elapsed,
    encode,
    image_index,
    image_manifest,
    unique,
)

SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
LIMIT = 4 * MEBIBYTE


class RefusalTest(ManifestTestCase):
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
        }.items():
            with self.subTest(name):
                self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_a_schema_version_other_than_2_is_refused(self) -> None:
        for version in (0, 1, 3, -2, 22, "2", [2], {"2": 2}, False, 2.5, 10**30):
            with self.subTest(version):
                body = encode(self.manifest(schemaVersion=version))
                self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_a_missing_schema_version_is_refused(self) -> None:
        for body in (
            encode(self.manifest(schemaVersion=None)),
            encode({**self.manifest(), "schemaVersion": None}),
        ):
            self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
            self.assert_nothing_stored(body)

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
            with self.subTest(kind):
                self.assert_error(self.put(manifest, "tag", kind), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(encode(manifest))

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
            {"mediaType": 7},
            {"mediaType": [OCI_MANIFEST]},
        ):
            with self.subTest(change):
                body = encode(self.manifest(**change))
                self.assert_error(self.put(body), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_children_of_the_wrong_kind_are_refused(self) -> None:
        for children in ("text", 7, {"a": 1}, [None], [[]], ["sha256:" + "a" * 64]):
            with self.subTest(children):
                body = encode({**image_index([]), "manifests": children})
                self.assert_error(self.put(body, "tag", OCI_INDEX), 400, "MANIFEST_INVALID")
                self.assert_nothing_stored(body)

    def test_odd_values_in_known_members_do_no_harm(self) -> None:
        subject = descriptor(b"odd subject", OCI_MANIFEST)
        for change in (
            {"artifactType": 7},
            {"artifactType": ["a"]},
            {"artifactType": ""},
            {"artifactType": "\ud800"},
            {"artifactType": "a\u0000b"},
            {"annotations": "text"},
            {"annotations": ["a"]},
            {"annotations": {"a": 7, "b": {"c": []}}},
            {"annotations": {"\ud800": "\udfff"}},
            {"annotations": {"a\u0000b": "c\u0000d"}},
            {"config": {**descriptor(b"{}"), "mediaType": 7}},
            {"config": {**descriptor(b"{}"), "mediaType": None}},
            {"config": {**descriptor(b"{}"), "urls": 7, "annotations": [], "platform": "x"}},
            {"layers": [{**descriptor(b"{}"), "urls": 7}]},
            {"layers": [{**descriptor(b"{}"), "urls": None, "mediaType": []}]},
        ):
            with self.subTest(change):
                self.assert_status(self.put(self.manifest(subject=subject, **change)), 201, 400)
                response = self.client.get(f"referrers/{subject['digest']}")
                self.assert_status(response, 200)
                self.assertIsInstance(response.json["manifests"], list)

    def test_a_huge_number_does_no_harm(self) -> None:
        text = encode(self.manifest(x=0)).decode()
        size = json.dumps(len(self.layer))
        for number in (
            "9" * 19,
            "9" * 30,
            "9" * 400,
            "9" * 5000,
            "1e999",
            "-1e999",
            "NaN",
            "Infinity",
            "1e-999",
        ):
            for body in (
                text.replace('"x": 0', f'"x": {number}'),
                text.replace(f'"size": {size}', f'"size": {number}'),
                text.replace('"schemaVersion": 2', f'"schemaVersion": {number}'),
            ):
                with self.subTest(number[:20], body=body.index(number)):
                    self.assertIn(number, body)
                    self.assert_status(self.put(body.encode()), 201, 400)
                    self.assert_status(self.client.get("manifests/tag"), 200, 404)

    def test_a_number_of_a_megabyte_takes_no_time(self) -> None:
        body = encode(self.manifest(x=0)).replace(b'"x": 0', b'"x": ' + b"9" * MEBIBYTE)
        self.assertLess(elapsed(lambda: self.assert_status(self.put(body), 201, 400)), 5)

    def test_deep_nesting_does_no_harm(self) -> None:
        text = encode(self.manifest(x=0))
        for depth in (900, 5_000, 100_000, 1_900_000):
            for before, after in ((b"[", b"]"), (b'{"":', b"}"), (b"[", b"")):
                if depth * len(before + after) < LIMIT - 1000:
                    with self.subTest(depth, before=before, after=after):
                        nested = before * depth + b"0" + after * depth
                        response = self.put(text.replace(b'"x": 0', b'"x": ' + nested))
                        self.assert_status(response, 201, 400)
                        self.assert_status(self.client.get("/v2/"), 200)

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
                self.assert_status(self.put(body, reference), 400, 404 if "%2F" in reference else 400)
                self.assert_nothing_stored(body)
                for method in ("GET", "HEAD"):
                    self.assertEqual(self.client.request(method, f"manifests/{reference}").status, 404)

    def test_a_malformed_digest_is_no_reference(self) -> None:
        body = encode(self.manifest())
        for reference in ("sha256:abc", "sha256:" + "A" * 64, "md5:" + "a" * 32, f"{digest_of(body)}%0A"):
            with self.subTest(reference):
                self.assert_error(self.put(body, reference), 400)
                self.assert_nothing_stored(body)
                for method in ("GET", "DELETE"):
                    self.assert_status(self.client.request(method, f"manifests/{reference}"), 400, 404)


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


class BombTest(RegistryTestCase):
    """Manifests made to cost more than they weigh."""

    options: ClassVar = {"sync": False}

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
        self.assert_status(push.result(), 201, 400)
        self.assertLess(max(times), 5)

    def test_a_larger_one_is_refused_unread(self) -> None:
        for headers in (f"Content-Length: {BOMB + 1}", f"Content-Length: {2**50}"):
            connection = self.connect().request("PUT", self.client.path("manifests/bomb"), headers)
            self.assert_error(connection.read(), 413, "SIZE_INVALID")

    def test_a_larger_one_in_chunks_is_refused(self) -> None:
        pieces = iter([b"[" * MEBIBYTE] * 6)
        response = self.client.put("manifests/bomb", pieces, {"Content-Type": OCI_MANIFEST})
        self.assert_error(response, 413, "SIZE_INVALID")

    def test_a_name_given_twice_is_what_the_reader_of_the_bytes_sees(self) -> None:
        """Whatever is made of it, the bytes served are the bytes pushed."""
        for blob in (b"{}", b"layer"):
            self.client.push_blob(blob)
        manifest = encode(image_manifest(descriptor(b"{}"), [descriptor(b"layer")]))
        twice = manifest.replace(b'"layers"', b'"layers": [], "layers"')
        response = self.client.put_manifest(twice, "twice", OCI_MANIFEST)
        self.assert_status(response, 201, 400)
        if response.status == 201:
            self.assertEqual(self.client.get("manifests/twice").body, twice)


@unittest.skipUnless(LINUX, "reads /proc/PID/status")
class MemoryTest(HTTPTestCase):
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
