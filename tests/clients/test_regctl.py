"""regctl: copies with referrers and digest tags, multi-platform indexes, artifacts, blobs, tag deletion."""

from __future__ import annotations

from typing import ClassVar

from support import ClientTest, Registry, image_layout

from tests.support import DOCKER_LIST, OCI_INDEX, digest_of

REVIEW = "application/vnd.example.review"


class RegctlTest(ClientTest):
    programs = ("regctl",)
    host: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.host = f"reg={cls.registry.address},tls=disabled"

    def regctl(self, *argv: str) -> str:
        return self.ok("regctl", "--host", self.host, *argv)

    def push(self, *architectures: str) -> None:
        """An image or an index at v1, known as `self.layout` here."""
        self.layout = image_layout(self.directory / "source", self.name, *architectures)
        self.regctl("image", "copy", f"ocidir://{self.layout.path}:v1", f"{self.repository}:v1")

    def test_copied_index_comes_back_identical(self) -> None:
        self.push("amd64", "arm64", "s390x")
        self.assert_served(self.layout, self.name, "v1")
        self.regctl("image", "copy", f"{self.repository}:v1", f"ocidir://{self.directory}/back:v1")
        self.assert_same_layout(self.directory / "back", self.layout)

    def test_copy_within_the_registry(self) -> None:
        self.push("amd64", "arm64")
        self.regctl("image", "copy", f"{self.repository}:v1", f"{self.repository}/copy:v2")
        self.assert_served(self.layout, f"{self.name}/copy", "v2")

    def test_index_created_of_single_images(self) -> None:
        for media_type in (OCI_INDEX, DOCKER_LIST):
            with self.subTest(media_type):
                digests = []
                options = ["--media-type", media_type]
                for architecture in ("amd64", "arm64"):
                    kind = media_type.split(".")[1]
                    layout = image_layout(self.directory / kind / architecture, self.name, architecture)
                    image = f"{self.repository}:{architecture}"
                    self.regctl("image", "copy", f"ocidir://{layout.path}:v1", image)
                    digests.append(layout.top()["digest"])
                    options += ["--ref", image]
                self.regctl("index", "create", f"{self.repository}:all", *options)
                reply = self.registry.get(f"/v2/{self.name}/manifests/all")
                self.assertEqual(reply.headers["Content-Type"], media_type)
                self.assertEqual([entry["digest"] for entry in reply.json["manifests"]], digests)

    def test_one_platform_of_an_index(self) -> None:
        self.push("amd64", "arm64")
        arm = self.registry.manifest(self.name, "v1")["manifests"][1]["digest"]
        shown = self.regctl("image", "digest", "--platform", "linux/arm64", f"{self.repository}:v1")
        self.assertEqual(shown.strip(), arm)
        options = ("--platform", "linux/arm64", f"{self.repository}:v1")
        self.assertEqual(self.regctl("image", "get-file", *options, "architecture"), f"arm64 {self.name}")

    def test_export_and_import(self) -> None:
        self.push("amd64", "arm64")
        self.regctl("image", "export", f"{self.repository}:v1", "image.tar")
        self.regctl("image", "import", f"{self.repository}/imported:v1", "image.tar")
        self.assert_served(self.layout, f"{self.name}/imported", "v1")

    def attach(self, content: str) -> str:
        """A file referring to v1; the digest of the referrer."""
        (self.directory / "review.txt").write_text(content, "utf-8")
        options = ("--artifact-type", REVIEW, "--subject", f"{self.repository}:v1", "--file", "review.txt")
        show = ("--format", "{{ .Manifest.GetDescriptor.Digest }}")
        return self.regctl("artifact", "put", *options, *show).strip()

    def test_artifacts_of_a_subject(self) -> None:
        self.push()
        first, second = self.attach("good"), self.attach("better")
        listing = "{{ range .Descriptors }}{{ println .Digest }}{{ end }}"
        shown = self.regctl("artifact", "list", "--format", listing, f"{self.repository}:v1").split()
        self.assertEqual(sorted(shown), sorted([first, second]))
        self.assertEqual(self.regctl("artifact", "get", f"{self.repository}@{second}"), "better")
        self.assertIn(first, self.regctl("artifact", "tree", f"{self.repository}:v1"))

    def test_copy_takes_referrers_and_digest_tags_along(self) -> None:
        self.push()
        review = self.attach("good")
        signature = self.layout.top()["digest"].replace(":", "-") + ".sig"
        self.regctl("image", "copy", f"{self.repository}:v1", f"{self.repository}:{signature}")
        target = f"{self.repository}/copy:v1"
        self.regctl("image", "copy", "--referrers", "--digest-tags", f"{self.repository}:v1", target)
        self.assertEqual(self.registry.tags(f"{self.name}/copy"), [signature, "v1"])
        self.assertEqual(self.registry.digest(f"{self.name}/copy", review), review)
        listing = "{{ range .Descriptors }}{{ println .Digest }}{{ end }}"
        self.assertEqual(self.regctl("artifact", "list", "--format", listing, target).split(), [review])

    def test_blob_put_head_get_and_delete(self) -> None:
        content = f"a blob of {self.name}"
        (self.directory / "blob").write_text(content, "utf-8")
        digest = digest_of(content.encode())
        self.ok("sh", "-c", f"regctl --host {self.host} blob put --digest {digest} {self.repository} <blob")
        self.assertEqual(self.regctl("blob", "get", self.repository, digest), content)
        self.regctl("blob", "head", self.repository, digest)
        self.regctl("blob", "delete", self.repository, digest)
        said = self.fails("regctl", "--host", self.host, "blob", "head", self.repository, digest)
        self.assertIn("not found", said)

    def test_tag_delete_leaves_the_other_tags(self) -> None:
        self.push()
        self.regctl("image", "copy", f"{self.repository}:v1", f"{self.repository}:v2")
        self.regctl("tag", "delete", f"{self.repository}:v1")
        self.assertEqual(self.regctl("tag", "ls", self.repository).split(), ["v2"])
        self.assert_served(self.layout, self.name, "v2")

    def test_repo_ls_follows_the_pages(self) -> None:
        registry = Registry(self.directory)
        self.addCleanup(registry.close)
        layout = image_layout(self.directory / "source", self.name)
        host = f"reg={registry.address},tls=disabled"
        names = [f"repo/{number}" for number in range(7)]
        for name in names:
            image = f"{registry.address}/{name}:v1"
            self.ok("regctl", "--host", host, "image", "copy", f"ocidir://{layout.path}:v1", image)
        last: tuple[str, ...] = ()
        for wanted in (names[:3], names[3:6], names[6:]):
            page = self.ok("regctl", "--host", host, "repo", "ls", "--limit", "3", *last, registry.address)
            self.assertEqual(page.split(), wanted)
            last = ("--last", wanted[-1])
