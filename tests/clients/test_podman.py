"""Podman and Buildah: build, push, remove, pull, run; manifest lists of several platforms."""

from __future__ import annotations

import json

from support import ClientTest, build_context

from tests.support import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST

STEP = 'RUN ["/bin/busybox", "touch", "/made"]'


class ContainersTest(ClientTest):
    """Podman and Buildah share their storage; here it is a private one."""

    needs_root = True

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        config = cls.temp / "containers.conf"
        # crun, the usual runtime, refuses hosts with both versions of cgroups; runc takes them. The limits
        # are low ones because raising them takes a right that root may lack inside a sandbox.
        config.write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
            f'tmp_dir = "{cls.temp}/libpod"\n',
            "utf-8",
        )
        storage = cls.temp / "storage.conf"
        paths = f'graphroot = "{cls.temp}/graph"\nrunroot = "{cls.temp}/run"\n'
        storage.write_text(f'[storage]\ndriver = "overlay"\n{paths}', "utf-8")
        policy = cls.temp / "home" / ".config" / "containers" / "policy.json"
        policy.parent.mkdir(parents=True)
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}', "utf-8")
        cls.env["CONTAINERS_CONF"], cls.env["CONTAINERS_STORAGE_CONF"] = str(config), str(storage)


class PodmanTest(ContainersTest):
    programs = ("podman", "runc", "conmon")

    def podman(self, *argv: str) -> str:
        return self.ok("podman", *argv)

    def build(self, tag: str, image_format: str = "oci") -> str:
        """Build an image that prints a greeting; its reference."""
        context = build_context(self.directory / f"context-{tag}", f"hello from {tag}", STEP)
        image = f"{self.repository}:{tag}"
        self.podman("build", "--network", "none", "--format", image_format, "--tag", image, str(context))
        return image

    def push(self, image: str, *options: str) -> None:
        self.podman("push", "--tls-verify=false", *options, image)

    def pull_and_run(self, image: str) -> str:
        """What a freshly pulled image prints."""
        self.podman("rmi", "--all", "--force")
        self.assertEqual(self.podman("images", "--all", "--quiet"), "")
        self.podman("pull", "--tls-verify=false", image)
        return self.podman("run", "--rm", "--pull=never", "--network", "none", image).strip()

    def test_build_push_pull_run(self) -> None:
        for image_format, media_type in (("oci", OCI_MANIFEST), ("docker", DOCKER_MANIFEST)):
            with self.subTest(image_format):
                image = self.build(image_format, image_format)
                self.push(image)
                self.assertEqual(self.registry.manifest(self.name, image_format)["mediaType"], media_type)
                self.assertEqual(self.pull_and_run(image), f"hello from {image_format}")

    def test_same_image_pushed_twice(self) -> None:
        image = self.build("v1")
        self.push(image)
        first = self.registry.digest(self.name, "v1")
        self.push(image)
        self.assertEqual(self.registry.digest(self.name, "v1"), first)
        self.assertEqual(self.pull_and_run(image), "hello from v1")

    def test_layers_compressed_with_zstd(self) -> None:
        # A layer of its own: one that podman built or pulled in another test, or that came out the same
        # because both were built within one second, is taken as it lies in the registry, with gzip.
        context = build_context(self.directory / "context", "hello from zstd")
        with (context / "busybox").open("ab") as program:
            program.write(b"zstd")
        image = f"{self.repository}:zstd"
        self.podman("build", "--network", "none", "--tag", image, str(context))
        self.push(image, "--compression-format", "zstd")
        kinds = [layer["mediaType"] for layer in self.registry.manifest(self.name, "zstd")["layers"]]
        self.assertEqual(kinds, ["application/vnd.oci.image.layer.v1.tar+zstd"])
        self.assertEqual(self.pull_and_run(image), "hello from zstd")

    def test_pull_by_digest(self) -> None:
        self.push(self.build("v1"))
        pinned = f"{self.repository}@{self.registry.digest(self.name, 'v1')}"
        self.assertEqual(self.pull_and_run(pinned), "hello from v1")

    def test_search_lists_tags(self) -> None:
        self.push(self.build("v1"))
        shown = self.podman("search", "--tls-verify=false", "--list-tags", self.repository)
        self.assertEqual(shown.split(), ["NAME", "TAG", self.repository, "v1"])

    def test_missing_image_is_reported_as_unknown(self) -> None:
        self.push(self.build("v1"))
        said = self.fails("podman", "pull", "--tls-verify=false", f"{self.repository}:none")
        self.assertIn("manifest unknown", said)


class BuildahTest(ContainersTest):
    programs = ("buildah", "runc")

    def buildah(self, *argv: str) -> str:
        return self.ok("buildah", *argv)

    def test_manifest_of_several_platforms(self) -> None:
        context = build_context(self.directory / "context", "hello")
        listed = f"{self.repository}:all"
        self.buildah("manifest", "create", listed)
        for architecture in ("amd64", "arm64", "riscv64"):
            self.buildah("build", "--arch", architecture, "--manifest", listed, str(context))
        self.buildah("manifest", "push", "--all", "--tls-verify=false", listed, f"docker://{listed}")

        index = self.registry.manifest(self.name, "all")
        self.assertEqual(index["mediaType"], OCI_INDEX)
        architectures = [entry["platform"]["architecture"] for entry in index["manifests"]]
        self.assertEqual(architectures, ["amd64", "arm64", "riscv64"])
        self.buildah("rmi", "--all", "--force")
        for architecture in architectures:
            with self.subTest(architecture):
                options = ("--quiet", "--tls-verify=false", "--arch", architecture)
                image = self.buildah("pull", *options, listed).strip()
                shown = json.loads(self.buildah("inspect", "--type", "image", image))
                self.assertEqual(shown["OCIv1"]["architecture"], architecture)

    def test_pulled_image_has_the_files(self) -> None:
        context = build_context(self.directory / "context", "hello")
        image = f"{self.repository}:v1"
        self.buildah("build", "--tag", image, str(context))
        self.buildah("push", "--tls-verify=false", image)
        self.buildah("rmi", "--all", "--force")
        container = self.buildah("from", "--quiet", "--tls-verify=false", image).strip()
        mounted = self.buildah("mount", container).strip()
        self.ok("cmp", f"{mounted}/bin/busybox", str(context / "busybox"))
        self.buildah("rm", container)
