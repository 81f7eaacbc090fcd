"""skopeo: copying between registries and layouts, inspecting, listing, deleting."""

from __future__ import annotations

import json

from support import ClientTest, image_layout


class SkopeoTest(ClientTest):
    programs = ("skopeo",)

    def skopeo(self, *argv: str) -> str:
        return self.ok("skopeo", "--insecure-policy", *argv)

    def push(self, *architectures: str) -> None:
        """An image or an index at v1, known as `self.layout` here."""
        self.layout = image_layout(self.directory / "source", self.name, *architectures)
        self.image = f"docker://{self.repository}:v1"
        self.skopeo("copy", "--all", "--dest-tls-verify=false", f"oci:{self.layout.path}:v1", self.image)

    def test_copied_image_comes_back_identical(self) -> None:
        self.push()
        self.assert_served(self.layout, self.name, "v1")
        back = self.directory / "back"
        self.skopeo("copy", "--src-tls-verify=false", self.image, f"oci:{back}:v1")
        self.assert_same_layout(back, self.layout)

    def test_copied_index_comes_back_identical(self) -> None:
        self.push("amd64", "arm64", "riscv64")
        self.assert_served(self.layout, self.name, "v1")
        back = self.directory / "back"
        self.skopeo("copy", "--all", "--src-tls-verify=false", self.image, f"oci:{back}:v1")
        self.assert_same_layout(back, self.layout)

    def test_copy_between_repositories(self) -> None:
        self.push("amd64", "arm64")
        copy = ["copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false"]
        self.skopeo(*copy, self.image, f"docker://{self.repository}/other:v2")
        self.assert_served(self.layout, f"{self.name}/other", "v2")

    def test_copy_as_docker_schema_2(self) -> None:
        self.push()
        copy = ["copy", "--format", "v2s2", "--src-tls-verify=false", "--dest-tls-verify=false"]
        self.skopeo(*copy, self.image, f"docker://{self.repository}:docker")
        manifest = self.registry.manifest(self.name, "docker")
        self.assertEqual(manifest["mediaType"], "application/vnd.docker.distribution.manifest.v2+json")
        copied = self.directory / "dir"
        self.skopeo("copy", "--src-tls-verify=false", f"docker://{self.repository}:docker", f"dir:{copied}")
        self.assertEqual(json.loads((copied / "manifest.json").read_bytes()), manifest)

    def test_inspect(self) -> None:
        self.push()
        shown = json.loads(self.skopeo("inspect", "--tls-verify=false", self.image))
        self.assertEqual(shown["Digest"], self.layout.top()["digest"])
        self.assertEqual(shown["RepoTags"], ["v1"])
        self.assertEqual((shown["Architecture"], shown["Os"]), ("amd64", "linux"))
        raw = self.skopeo("inspect", "--raw", "--tls-verify=false", self.image)
        self.assertEqual(raw.encode(), self.layout.blobs()[self.layout.top()["digest"]])

    def test_list_tags(self) -> None:
        self.push()
        for tag in ("v2", "Latest_1.0-rc", "a"):
            tls = ("--src-tls-verify=false", "--dest-tls-verify=false")
            self.skopeo("copy", *tls, self.image, f"docker://{self.repository}:{tag}")
        listed = json.loads(self.skopeo("list-tags", "--tls-verify=false", f"docker://{self.repository}"))
        self.assertEqual(listed["Tags"], ["Latest_1.0-rc", "a", "v1", "v2"])

    def test_delete(self) -> None:
        self.push()
        self.skopeo("delete", "--tls-verify=false", self.image)
        message = self.fails("skopeo", "inspect", "--tls-verify=false", self.image)
        self.assertIn("manifest unknown", message)
        path = f"/v2/{self.name}/manifests/{self.layout.top()['digest']}"
        self.assertEqual(self.registry.request("GET", path).status, 404)

    def test_sync_of_a_repository(self) -> None:
        self.push()
        target = self.directory / "synced"
        target.mkdir()
        options = ("--src-tls-verify=false", "--src", "docker", "--dest", "dir")
        self.skopeo("sync", *options, self.repository, str(target))
        (manifest,) = target.rglob("manifest.json")
        self.assertEqual(manifest.read_bytes(), self.layout.blobs()[self.layout.top()["digest"]])
