"""ORAS: artifacts, referrers (by the API and by the fallback tag), blobs, copies."""

from __future__ import annotations

import json
import random
from typing import Any

from support import ClientTest, Layout, image_layout

from tests.support import OCI_INDEX, digest_of

LETTER = "application/vnd.example.letter"
REVIEW = "application/vnd.example.review+json"
SEAL = "application/vnd.example.seal"


class OrasTest(ClientTest):
    programs = ("oras",)

    def oras(self, *argv: str) -> str:
        return self.ok("oras", *argv, "--plain-http")

    def push(self) -> str:
        """A file as an artifact at v1; the manifest's digest."""
        (self.directory / "letter.txt").write_text(f"dear {self.name}\n", "utf-8")
        options = ("--format=json", "--artifact-type", LETTER)
        shown = self.oras("push", *options, f"{self.repository}:v1", "letter.txt:text/plain")
        digest: str = json.loads(shown)["digest"]
        return digest

    def attach(self, subject: str, kind: str, *options: str) -> str:
        """A file referring to a manifest; the digest of the referrer."""
        (self.directory / "attached.json").write_text(f'{{"to":"{subject}","kind":"{kind}"}}', "utf-8")
        options = ("--format=json", "--artifact-type", kind, *options)
        shown = self.oras("attach", *options, f"{self.repository}@{subject}", "attached.json")
        digest: str = json.loads(shown)["digest"]
        return digest

    def discover(self, reference: str, *options: str) -> Any:
        """The referrers as `oras discover` tells them."""
        return json.loads(self.oras("discover", "--format=json", *options, reference)).get("referrers") or []

    def test_pushed_artifact_comes_back_identical(self) -> None:
        digest = self.push()
        self.assertEqual(self.registry.digest(self.name, "v1"), digest)
        self.assertEqual(self.registry.manifest(self.name, "v1")["artifactType"], LETTER)
        self.oras("pull", "--output", "back", f"{self.repository}:v1")
        want = (self.directory / "letter.txt").read_bytes()
        self.assertEqual((self.directory / "back" / "letter.txt").read_bytes(), want)

    def test_large_file_comes_back_identical(self) -> None:
        content = random.Random(1).randbytes(24 << 20)
        (self.directory / "large.bin").write_bytes(content)
        self.oras("push", f"{self.repository}:v1", "large.bin")
        self.oras("pull", "--output", "back", f"{self.repository}:v1")
        self.assertEqual(digest_of((self.directory / "back" / "large.bin").read_bytes()), digest_of(content))

    def test_attached_artifacts_are_discovered(self) -> None:
        subject = self.push()
        review, seal = self.attach(subject, REVIEW), self.attach(subject, SEAL)
        found = {entry["digest"]: entry["artifactType"] for entry in self.discover(f"{self.repository}:v1")}
        self.assertEqual(found, {review: REVIEW, seal: SEAL})
        filtered = self.discover(f"{self.repository}:v1", "--artifact-type", REVIEW)
        self.assertEqual([entry["digest"] for entry in filtered], [review])

    def test_attached_to_an_attached_artifact(self) -> None:
        subject = self.push()
        review = self.attach(subject, REVIEW)
        seal = self.attach(review, SEAL)
        (found,) = self.discover(f"{self.repository}:v1")
        self.assertEqual([entry["digest"] for entry in found["referrers"]], [seal])

    def test_no_fallback_tag_is_pushed_when_the_api_is_there(self) -> None:
        self.attach(self.push(), REVIEW)
        self.assertEqual(self.registry.tags(self.name), ["v1"])

    def test_fallback_tag_works_and_shows_up_in_the_api(self) -> None:
        subject = self.push()
        review = self.attach(subject, REVIEW, "--distribution-spec", "v1.1-referrers-tag")
        self.assertEqual(self.registry.tags(self.name), [subject.replace(":", "-"), "v1"])
        for scheme in ("v1.1-referrers-tag", "v1.1-referrers-api"):
            with self.subTest(scheme):
                found = self.discover(f"{self.repository}:v1", "--distribution-spec", scheme)
                self.assertEqual([entry["digest"] for entry in found], [review])

    def test_detached_artifact_is_no_longer_discovered(self) -> None:
        subject = self.push()
        review = self.attach(subject, REVIEW)
        self.oras("manifest", "delete", "--force", f"{self.repository}@{review}")
        self.assertEqual(self.discover(f"{self.repository}:v1"), [])

    def test_repository_tags(self) -> None:
        self.push()
        self.oras("tag", f"{self.repository}:v1", "v2", "stable")
        self.assertEqual(self.oras("repo", "tags", self.repository).split(), ["stable", "v1", "v2"])
        self.assertIn(self.name, self.oras("repo", "ls", self.registry.address).split())

    def test_recursive_copy_takes_the_referrers_along(self) -> None:
        subject = self.push()
        review = self.attach(subject, REVIEW)
        target = f"{self.repository}/copy:v1"
        self.ok("oras", "cp", "-r", "--from-plain-http", "--to-plain-http", f"{self.repository}:v1", target)
        self.assertEqual(self.registry.digest(f"{self.name}/copy", "v1"), subject)
        self.assertEqual([entry["digest"] for entry in self.discover(target)], [review])

    def test_copy_of_an_index_from_and_to_a_layout(self) -> None:
        layout = image_layout(self.directory / "source", self.name, "amd64", "arm64")
        image = f"{self.repository}:v1"
        self.ok("oras", "cp", "--from-oci-layout", "--to-plain-http", f"{layout.path}:v1", image)
        self.assert_served(layout, self.name, "v1")
        reply = self.registry.get(f"/v2/{self.name}/manifests/v1")
        self.assertEqual(reply.headers["Content-Type"], OCI_INDEX)
        self.ok("oras", "cp", "--to-oci-layout", "--from-plain-http", image, "back:v1")
        back = Layout(self.directory / "back").blobs()
        self.assertEqual(back, layout.blobs())

    def test_blob_push_fetch_and_delete(self) -> None:
        content = f"a blob of {self.name}".encode()
        (self.directory / "blob").write_bytes(content)
        blob = f"{self.repository}@{digest_of(content)}"
        self.oras("blob", "push", self.repository, "blob")
        self.oras("blob", "fetch", "--output", "back", blob)
        self.assertEqual((self.directory / "back").read_bytes(), content)
        self.assertEqual(json.loads(self.oras("blob", "fetch", "--descriptor", blob))["size"], len(content))
        self.oras("blob", "delete", "--force", blob)
        said = self.fails("oras", "blob", "fetch", "--plain-http", "--output", "gone", blob)
        self.assertIn("not found", said)

    def test_manifest_push_fetch_and_delete(self) -> None:
        digest = self.push()
        manifest = self.oras("manifest", "fetch", f"{self.repository}:v1").encode()
        self.assertEqual(digest_of(manifest), digest)
        (self.directory / "manifest.json").write_bytes(manifest)
        self.oras("manifest", "push", f"{self.repository}:v2,v3", "manifest.json")
        self.assertEqual(self.registry.tags(self.name), ["v1", "v2", "v3"])
        self.oras("manifest", "delete", "--force", f"{self.repository}@{digest}")
        said = self.fails("oras", "manifest", "fetch", "--plain-http", f"{self.repository}:v2")
        self.assertIn("not found", said)
