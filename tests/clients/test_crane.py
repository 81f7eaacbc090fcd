"""crane: pushing, copying, listing, validating, deleting."""

from __future__ import annotations

import tarfile

from support import ClientTest, Registry, image_layout, tar_of

from tests.support import digest_of


class CraneTest(ClientTest):
    programs = ("crane",)

    def push(self, *architectures: str) -> None:
        """An image or an index at v1, known as `self.layout` here."""
        self.layout = image_layout(self.directory / "source", self.name, *architectures)
        index = ("--index",) if len(architectures) > 1 else ()
        self.ok("crane", "push", *index, str(self.layout.path), f"{self.repository}:v1")

    def test_push_and_pull_of_an_image(self) -> None:
        self.push()
        self.assert_served(self.layout, self.name, "v1")
        self.ok("crane", "pull", "--format=oci", f"{self.repository}:v1", "back")
        self.assert_same_layout(self.directory / "back", self.layout)

    def test_pushed_index_validates(self) -> None:
        layout = image_layout(self.directory / "source", self.name, "amd64", "arm64")
        # crane makes an index of the layout's index.json, which has our index as its one entry.
        self.ok("crane", "push", "--index", str(layout.path), f"{self.repository}:v1")
        self.assert_served(layout, self.name, layout.top()["digest"])
        self.assertIn("PASS", self.ok_both("crane", "validate", "--remote", f"{self.repository}:v1"))
        self.ok("crane", "pull", "--format=oci", f"{self.repository}@{layout.top()['digest']}", "back")
        self.assert_same_layout(self.directory / "back", layout)

    def test_copy_keeps_the_digest(self) -> None:
        self.push()
        self.ok("crane", "copy", f"{self.repository}:v1", f"{self.repository}/copy:v2")
        self.assert_served(self.layout, f"{self.name}/copy", "v2")

    def test_copy_of_all_tags(self) -> None:
        self.push()
        self.ok("crane", "tag", f"{self.repository}:v1", "v2")
        self.ok("crane", "copy", "--all-tags", self.repository, f"{self.repository}/copy")
        self.assertEqual(self.registry.tags(f"{self.name}/copy"), ["v1", "v2"])

    def test_digest(self) -> None:
        self.push()
        printed = self.ok("crane", "digest", f"{self.repository}:v1")
        self.assertEqual(printed.strip(), self.layout.top()["digest"])

    def test_manifest_config_and_blob_are_the_pushed_bytes(self) -> None:
        self.push()
        manifest = self.ok_bytes("crane", "manifest", f"{self.repository}:v1")
        self.assertEqual(digest_of(manifest), self.layout.top()["digest"])
        config = self.ok_bytes("crane", "config", f"{self.repository}:v1")
        self.assertEqual(self.layout.blobs()[digest_of(config)], config)
        for layer in self.registry.manifest(self.name, "v1")["layers"]:
            blob = self.ok_bytes("crane", "blob", f"{self.repository}@{layer['digest']}")
            self.assertEqual(blob, self.layout.blobs()[layer["digest"]])

    def test_catalog_lists_every_repository(self) -> None:
        registry = Registry(self.directory)
        self.addCleanup(registry.close)
        layout = image_layout(self.directory / "source", self.name)
        for repository in ("b", "a/nested", "a"):
            self.ok("crane", "push", str(layout.path), f"{registry.address}/{repository}:v1")
        self.assertEqual(self.ok("crane", "catalog", registry.address).split(), ["a", "a/nested", "b"])

    def test_ls_lists_every_tag(self) -> None:
        self.push()
        for tag in ("v10", "v2", "latest"):
            self.ok("crane", "tag", f"{self.repository}:v1", tag)
        self.assertEqual(self.ok("crane", "ls", self.repository).split(), ["latest", "v1", "v10", "v2"])

    def test_append_adds_a_layer(self) -> None:
        self.push()
        (self.directory / "layer.tar").write_bytes(tar_of({"added": b"by crane"}))
        base, new = f"{self.repository}:v1", f"{self.repository}:v2"
        self.ok("crane", "append", "--base", base, "--new_layer", "layer.tar", "--new_tag", new)
        self.ok("crane", "export", new, "root.tar")
        with tarfile.open(self.directory / "root.tar") as root:
            names = root.getnames()
            added = root.extractfile("added")
            assert added is not None
            self.assertEqual(added.read(), b"by crane")
        self.assertIn("bin/busybox", names)

    def test_deleted_image_is_gone(self) -> None:
        self.push()
        self.ok("crane", "tag", f"{self.repository}:v1", "kept")
        self.ok("crane", "delete", f"{self.repository}:v1")
        self.assertIn("MANIFEST_UNKNOWN", self.fails("crane", "manifest", f"{self.repository}:v1"))
        self.assertEqual(self.registry.tags(self.name), ["kept"])
        self.ok("crane", "delete", f"{self.repository}@{self.layout.top()['digest']}")
        self.assertIn("MANIFEST_UNKNOWN", self.fails("crane", "manifest", f"{self.repository}:kept"))
