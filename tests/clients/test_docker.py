"""Docker: build with and without BuildKit, push, remove locally, pull, run."""

from __future__ import annotations

import json
import os
import re

from support import ClientTest, build_context

from tests.support import DOCKER_LIST, digest_of

BUILDERS = {"classic": "0", "buildkit": "1"}


class DockerTest(ClientTest):
    programs = ("docker", "dockerd", "containerd", "runc")
    needs_root = True

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.start_dockerd()

    def docker(self, *argv: str, **env: str) -> str:
        return self.ok_both("docker", *argv, **env)

    def build(self, builder: str, tag: str = "v1", *steps: str) -> str:
        """Build an image that prints a greeting; its reference."""
        context = build_context(self.directory / f"context-{tag}", f"hello from {tag} by {builder}", *steps)
        image = f"{self.repository}:{tag}"
        options = ("--network", "none", "--tag", image)
        self.docker("build", *options, str(context), DOCKER_BUILDKIT=BUILDERS[builder])
        return image

    def push(self, image: str) -> str:
        """Push; the digest that docker reports, which has to be the registry's too."""
        said = self.docker("push", image)
        match = re.search(r"digest: (sha256:[0-9a-f]{64})", said)
        assert match is not None, said
        name, _, tag = image[len(self.registry.address) + 1 :].partition(":")
        self.assertEqual(self.registry.digest(name, tag), match.group(1))
        return match.group(1)

    def forget(self) -> None:
        """Remove every image and every build cache, so that what runs next was pulled."""
        self.docker("system", "prune", "--all", "--force")
        self.assertEqual(self.ok("docker", "images", "--all", "--quiet"), "")

    def run_image(self, image: str) -> str:
        return self.ok("docker", "run", "--rm", "--pull", "never", "--network", "none", image).strip()

    def test_build_push_pull_run(self) -> None:
        for builder in BUILDERS:
            with self.subTest(builder):
                image = self.build(builder, builder, 'RUN ["/bin/busybox", "touch", "/made"]')
                digest = self.push(image)
                self.forget()
                self.assertIn(f"Digest: {digest}", self.docker("pull", image))
                self.assertEqual(self.run_image(image), f"hello from {builder} by {builder}")

    def test_second_push_of_the_same_image_sends_nothing(self) -> None:
        for builder in BUILDERS:
            with self.subTest(builder):
                image = self.build(builder, builder)
                digest = self.push(image)
                said = self.docker("push", image)
                self.assertIn("Layer already exists", said)
                self.assertNotIn("Pushed", said)
                self.assertIn(digest, said)
                self.forget()
                self.docker("pull", image)
                self.assertEqual(self.run_image(image), f"hello from {builder} by {builder}")

    def test_same_image_pushed_again_after_it_was_pulled(self) -> None:
        image = self.build("classic")
        digest = self.push(image)
        self.forget()
        self.docker("pull", image)
        self.assertEqual(self.push(image), digest)

    def test_layers_are_mounted_from_another_repository(self) -> None:
        image = self.build("classic")
        self.push(image)
        other = f"{self.repository}/other:v1"
        self.docker("tag", image, other)
        self.assertIn(f"Mounted from {self.name}", self.docker("push", other))
        self.forget()
        self.docker("pull", other)
        self.assertEqual(self.run_image(other), "hello from v1 by classic")

    def test_large_layer_comes_back_identical(self) -> None:
        context = build_context(self.directory / "context", "large", "COPY large /large")
        content = os.urandom(32 << 20)
        (context / "large").write_bytes(content)
        image = f"{self.repository}:v1"
        self.docker("build", "--network", "none", "--tag", image, str(context), DOCKER_BUILDKIT="0")
        self.push(image)
        self.forget()
        self.docker("pull", image)
        command = ("/bin/busybox", "sha256sum", "/large")
        printed = self.ok("docker", "run", "--rm", "--pull", "never", "--network", "none", image, *command)
        self.assertEqual("sha256:" + printed.split()[0], digest_of(content))

    def test_all_tags_are_pushed_and_pulled(self) -> None:
        image = self.build("classic")
        self.docker("tag", image, f"{self.repository}:v2")
        self.docker("push", "--all-tags", self.repository)
        self.assertEqual(self.registry.tags(self.name), ["v1", "v2"])
        self.forget()
        self.docker("pull", "--all-tags", self.repository)
        self.assertEqual(self.run_image(f"{self.repository}:v2"), "hello from v1 by classic")

    def test_pull_by_digest(self) -> None:
        image = self.build("classic")
        pinned = f"{self.repository}@{self.push(image)}"
        self.forget()
        self.docker("pull", pinned)
        self.assertEqual(self.run_image(pinned), "hello from v1 by classic")

    def test_built_upon_a_pulled_image(self) -> None:
        for builder, switch in BUILDERS.items():
            with self.subTest(builder):
                base = self.build(builder, f"base-{builder}")
                self.push(base)
                self.forget()
                context = self.directory / f"derived-{builder}"
                context.mkdir()
                command = json.dumps(["/bin/busybox", "echo", f"derived by {builder}"])
                (context / "Dockerfile").write_text(f"FROM {base}\nCMD {command}\n", "utf-8")
                derived = f"{self.repository}:derived-{builder}"
                self.docker("build", "--tag", derived, str(context), DOCKER_BUILDKIT=switch)
                self.push(derived)
                self.forget()
                self.docker("pull", derived)
                self.assertEqual(self.run_image(derived), f"derived by {builder}")

    def test_manifest_list(self) -> None:
        image = self.build("classic")
        digest = self.push(image)
        listed = f"{self.repository}:all"
        self.docker("manifest", "create", "--insecure", listed, image)
        self.docker("manifest", "annotate", "--arch", "amd64", "--os", "linux", listed, image)
        self.docker("manifest", "push", "--insecure", listed)
        reply = self.registry.get(f"/v2/{self.name}/manifests/all")
        self.assertEqual(reply.headers["Content-Type"], DOCKER_LIST)
        self.assertEqual([entry["digest"] for entry in reply.json["manifests"]], [digest])
        self.forget()
        self.docker("pull", "--platform", "linux/amd64", listed)
        self.assertEqual(self.run_image(listed), "hello from v1 by classic")

    def test_missing_image_is_reported_as_unknown(self) -> None:
        self.push(self.build("classic"))
        self.assertIn("manifest unknown", self.fails("docker", "pull", f"{self.repository}:none"))
        self.assertIn("not found", self.fails("docker", "pull", f"{self.registry.address}/no/such:v1"))
