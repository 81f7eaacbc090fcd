"""The pure parts: digests, heads, ranges, names and manifests, without a server."""

from __future__ import annotations

import json
import time
import unittest
from typing import Any, ClassVar

import registry
from registry import ErrorCode, RegistryError

SHA256 = "sha256:" + "ab" * 32
SHA512 = "sha512:" + "cd" * 64


class ParsingTest(unittest.TestCase):
    def assert_raises(self, code: ErrorCode, function: object, *arguments: object) -> RegistryError:
        with self.assertRaises(RegistryError) as caught:
            function(*arguments)  # type: ignore[operator]
        self.assertIs(caught.exception.code, code)
        return caught.exception


class ErrorTest(ParsingTest):
    def test_what_a_client_sent_comes_back_cut(self) -> None:
        for character in ("x", "\U0001f600"):
            error = RegistryError(ErrorCode.BAD_REQUEST, *[character * registry.MIB] * 2000)
            entries = json.loads(error.document())["errors"]
            self.assertEqual(len(entries), 1000)
            self.assertTrue(all(0 < len(entry["detail"]) <= 300 for entry in entries))


class DigestTest(ParsingTest):
    def test_well_formed_digests_are_taken_as_they_are(self) -> None:
        for digest in (SHA256, SHA512):
            self.assertEqual(registry.parse_digest(digest), digest)

    def test_anything_else_is_refused(self) -> None:
        bad = [
            "",
            "sha256",
            "sha256:",
            SHA256[:-1],
            SHA256 + "0",
            SHA256.upper(),
            SHA256 + "\n",
            " " + SHA256,
            "md5:" + "a" * 32,
            "sha512:" + "a" * 64,
            "sha256:" + "g" * 64,
            "sha256:" + "٣" * 64,
        ]
        for digest in bad:
            with self.subTest(digest=digest):
                self.assert_raises(ErrorCode.DIGEST_INVALID, registry.parse_digest, digest)

    def test_digest_of_nothing(self) -> None:
        self.assertEqual(
            registry.digest_of(b""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        )


class NameTest(ParsingTest):
    def test_legal_names(self) -> None:
        for name in ("a", "a/b", "a.b", "a_b", "a__b", "a-b", "a---b", "0/1/2", "blobs/uploads", "a" * 255):
            with self.subTest(name=name):
                self.assertTrue(registry.is_name(name))

    def test_illegal_names(self) -> None:
        bad = (
            "",
            "A",
            "a/",
            "/a",
            "a//b",
            "a..b",
            "a___b",
            "_a",
            "a-",
            "a.",
            "..",
            "a/../b",
            "a b",
            "a\n",
            "ä",
            "a" * 256,
        )
        for name in bad:
            with self.subTest(name=name):
                self.assertFalse(registry.is_name(name))

    def test_a_hostile_name_costs_no_time(self) -> None:
        started = time.perf_counter()
        registry.is_name("a-" * 127 + "!")
        self.assertLess(time.perf_counter() - started, 0.1)


class RangeTest(ParsingTest):
    def test_ranges(self) -> None:
        table = {
            "bytes=0-0": (0, 1),
            "bytes=2-5": (2, 4),
            "bytes=2-": (2, 8),
            "bytes=-3": (7, 3),
            "bytes=-30": (0, 10),
            "bytes=5-99": (5, 5),
            "Bytes=1-1": (1, 1),
            "bytes=-": None,
            "bytes=a-b": None,
            "items=0-1": None,
            "bytes=0-1,3-4": None,
            "": None,
        }
        for text, expected in table.items():
            with self.subTest(text=text):
                self.assertEqual(registry.parse_range(text, 10), expected)

    def test_ranges_outside_the_content(self) -> None:
        for text, size in (
            ("bytes=10-", 10),
            ("bytes=500-0", 10),
            ("bytes=-0", 10),
            ("bytes=0-", 0),
            ("bytes=-1", 0),
            ("bytes=3-2", 10),
        ):
            with self.subTest(text=text, size=size):
                error = self.assert_raises(ErrorCode.RANGE_NOT_SATISFIABLE, registry.parse_range, text, size)
                self.assertEqual(error.headers, (("Content-Range", f"bytes */{size}"),))


class HeadTest(ParsingTest):
    def test_names_are_lowered_and_repeated_headers_joined(self) -> None:
        head = registry.parse_head(b"GET /v2/ HTTP/1.1\r\nHOST: x\r\nAccept: a, b\r\nACCEPT:\t c ")
        self.assertEqual(head, ("GET", "/v2/", "HTTP/1.1", {"host": "x", "accept": "a, b, c"}))

    def test_malformed_heads(self) -> None:
        bad = [
            b"",
            b"GET",
            b"GET /",
            b"GET  / HTTP/1.1",
            b"GET / HTTP/1.1 ",
            b"G ET / HTTP/1.1",
            b"GET /\x01 HTTP/1.1",
            b"GET / http/1.1",
            b"GET / HTTP/1.10",
        ]
        bad += [
            b"GET / HTTP/1.1\r\nHost: x\r\n" + line
            for line in (
                b"a",
                b" a: b",
                b"a : b",
                b": b",
                b"a: b\nc: d",
                b"a: b\rc",
                b"a: \0",
                b"a: b\r\n c",
                b"Content-Length: 1\r\nContent-Length: 1",
                b"Host: y",
                b"\xe4: b",
            )
        ]
        for data in bad:
            with self.subTest(data=data):
                self.assert_raises(ErrorCode.BAD_REQUEST, registry.parse_head, data)

    def test_other_versions_and_missing_host(self) -> None:
        self.assert_raises(ErrorCode.HTTP_VERSION, registry.parse_head, b"GET / HTTP/2.0\r\nHost: x")
        self.assert_raises(ErrorCode.BAD_REQUEST, registry.parse_head, b"GET / HTTP/1.1")
        self.assertEqual(registry.parse_head(b"GET / HTTP/1.0").headers, {})

    def test_body_length(self) -> None:
        def length(headers: dict[str, str], version: str = "HTTP/1.1") -> int | None:
            return registry.body_length(registry.RequestHead("PUT", "/", version, headers))

        self.assertEqual(length({}), 0)
        self.assertEqual(length({"content-length": "12"}), 12)
        self.assertIsNone(length({"transfer-encoding": "Chunked"}))
        for headers in (
            {"content-length": "+5"},
            {"content-length": "0x5"},
            {"content-length": "5, 5"},
            {"content-length": ""},
            {"content-length": "-1"},
            {"content-length": "²"},
            {"content-length": "1" * 30},
            {"transfer-encoding": "gzip, chunked"},
            {"transfer-encoding": "identity"},
            {"transfer-encoding": "chunked", "content-length": "5"},
        ):
            with self.subTest(headers=headers):
                self.assert_raises(ErrorCode.BAD_REQUEST, length, headers)
        self.assert_raises(ErrorCode.BAD_REQUEST, length, {"transfer-encoding": "chunked"}, "HTTP/1.0")

    def test_the_date_is_the_standards(self) -> None:
        self.assertEqual(registry.format_date(784111777), "Sun, 06 Nov 1994 08:49:37 GMT")


class RouteTest(ParsingTest):
    def test_paths_are_matched_from_the_right(self) -> None:
        table = {
            "/v2/a/blobs/uploads/blobs/uploads/": ("POST", {"name": "a/blobs/uploads"}),
            "/v2/a/blobs/uploads/manifests/x": ("PUT", {"name": "a/blobs/uploads", "reference": "x"}),
            "/v2/manifests/tags/tags/list": ("GET", {"name": "manifests/tags"}),
            "/v2/a/manifests/tags/list": ("GET", {"name": "a/manifests"}),
            "/v2/a/blobs/uploads": ("POST", {"name": "a"}),
            "/v2/a/blobs/uploads/1": ("PATCH", {"name": "a", "session": "1"}),
            "/v2": ("GET", {}),
        }
        for path, (method, arguments) in table.items():
            with self.subTest(path=path):
                methods, found = registry.find_path(path)
                self.assertEqual(found, arguments)
                self.assertIn(method, methods)

    def test_unknown_paths(self) -> None:
        for path in ("", "/", "/v1/", "/v2/a", "/v2/a/tags", "/v2//tags/list", "/v2/manifests/x"):
            with self.subTest(path=path):
                self.assert_raises(ErrorCode.NOT_FOUND, registry.find_path, path)


class ManifestTest(ParsingTest):
    IMAGE: ClassVar[dict[str, Any]] = {
        "schemaVersion": 2,
        "config": {"mediaType": "c/t", "digest": SHA256, "size": 2},
        "layers": [{"mediaType": "l/t", "digest": SHA512, "size": 3}],
    }

    def parse(self, document: object, content_type: str = "") -> registry.Manifest:
        return registry.parse_manifest(json.dumps(document).encode(), content_type)

    def test_an_image(self) -> None:
        manifest = self.parse({**self.IMAGE, "annotations": {"a": "b"}, "unknown": [1]}, "x/y")
        self.assertEqual(manifest, ("x/y", "c/t", None, {"a": "b"}, (SHA256, SHA512), ()))

    def test_an_index(self) -> None:
        child = {"digest": SHA256, "size": 1}
        manifest = self.parse({"schemaVersion": 2, "manifests": [child, child], "subject": child})
        self.assertEqual(manifest, (registry.OCI_INDEX, None, SHA256, {}, (SHA256,), ()))

    def test_layers_kept_elsewhere_may_be_absent(self) -> None:
        for extra in (
            {"urls": ["http://x"]},
            {"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar"},
            {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"},
        ):
            manifest = self.parse({**self.IMAGE, "layers": [{"digest": SHA512, "size": 3, **extra}]})
            self.assertEqual((manifest.required, manifest.optional), ((SHA256,), (SHA512,)))

    def test_what_is_no_manifest(self) -> None:
        index = {"schemaVersion": 2, "manifests": []}
        bad = [
            [],
            1,
            {},
            {"schemaVersion": 2},
            {**self.IMAGE, "schemaVersion": 1},
            {**self.IMAGE, "schemaVersion": "2"},
            {**self.IMAGE, "config": None},
            {**self.IMAGE, "config": []},
            {**self.IMAGE, "layers": {}},
            {**self.IMAGE, "layers": [1]},
            {**self.IMAGE, "manifests": []},
            {**self.IMAGE, "mediaType": 1},
            {**self.IMAGE, "mediaType": registry.OCI_INDEX},
            {**index, "mediaType": registry.OCI_MANIFEST},
            {**self.IMAGE, "annotations": {"a": 1}},
            {**self.IMAGE, "annotations": []},
            {**self.IMAGE, "subject": {}},
            {**self.IMAGE, "artifactType": 1},
            {**index, "manifests": [{"digest": "sha256:xyz", "size": 1}]},
            {**index, "manifests": [{"digest": SHA256, "size": -1}]},
            {**index, "manifests": [{"digest": SHA256, "size": True}]},
            {**index, "manifests": [{"digest": SHA256, "size": 1.5}]},
            {**index, "manifests": [{"digest": 5, "size": 1}]},
        ]
        for document in bad:
            with self.subTest(document=document):
                self.assert_raises(ErrorCode.MANIFEST_INVALID, self.parse, document)

    def test_a_whole_number_has_twenty_digits_at_most(self) -> None:
        content = json.dumps({**self.IMAGE, "x": [0]}).encode()
        self.assertEqual(self.parse({**self.IMAGE, "x": int("9" * 20)}), self.parse(self.IMAGE))
        for number in (b"9" * 21, b"-" + b"9" * 21, b"9" * 4000):
            longer = content.replace(b"[0]", number)
            self.assert_raises(ErrorCode.MANIFEST_INVALID, registry.parse_manifest, longer, "")

    def test_media_types_must_agree(self) -> None:
        self.assert_raises(ErrorCode.MANIFEST_INVALID, self.parse, {**self.IMAGE, "mediaType": "a/b"}, "c/d")

    def test_hostile_json_costs_no_time(self) -> None:
        started = time.perf_counter()
        for content in (
            b"[" * 4_000_000,
            b'{"a":' * 700_000,
            b"9" * 4_000_000,
            b'{"schemaVersion":' + b"1" * 4_000_000,
            b"\xff\xfe",
            b"\xef\xbb\xbf{}",
            b'{"a":NaN}',
            b'{"a":"\xff"}',
            b"{}x",
            b"",
        ):
            with self.subTest(content=content[:20]):
                self.assert_raises(ErrorCode.MANIFEST_INVALID, registry.parse_manifest, content, "")
        self.assertLess(time.perf_counter() - started, 5)


if __name__ == "__main__":
    unittest.main()
