"""BuildKit by itself: attestations, and the build cache kept in the registry."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from support import ClientTest, Engine, build_context

from tests.support import OCI_INDEX, OCI_MANIFEST

# Every run of this step makes another file, so the same file again means that the step was not run again.
RANDOM_STEP = 'RUN ["/bin/busybox", "cp", "/proc/sys/kernel/random/uuid", "/uuid"]'
PROVENANCE = "https://slsa.dev/provenance/"


class Builder:
    """A buildkitd with an empty cache."""

    def __init__(self, test: BuildkitTest) -> None:
        self.test = test
        root = Path(tempfile.mkdtemp(dir=test.temp))
        self.address = f"unix://{root}/s"
        (root / "config.toml").write_text(f'[registry."{test.registry.address}"]\n  http = true\n', "utf-8")
        options = ["--root", str(root), "--addr", self.address, "--config", f"{root}/config.toml"]
        options += ["--containerd-worker=false", "--oci-worker=true", "--oci-worker-binary=runc"]
        options += ["--oci-worker-net=host", "--oci-worker-gc=false"]
        probe = ["buildctl", "--addr", self.address, "debug", "workers"]
        engine = Engine(["buildkitd", *options], probe, root / "log", test.env)
        test.addCleanup(engine.close)

    def build(self, context: Path, *options: str) -> str:
        """Build; the progress."""
        build = ("build", "--progress=plain", "--frontend=dockerfile.v0")
        local = (f"--local=context={context}", f"--local=dockerfile={context}")
        return self.test.ok_both("buildctl", "--addr", self.address, *build, *local, *options)


class BuildkitTest(ClientTest):
    programs = ("buildkitd", "buildctl", "runc")
    needs_root = True

    def context(self) -> Path:
        return build_context(self.directory / "context", f"hello from {self.name}", RANDOM_STEP)

    def pushed(self, tag: str, *more: str) -> str:
        """The output option that pushes an image."""
        return "--output=" + ",".join(["type=image", f"name={self.repository}:{tag}", "push=true", *more])

    def uuid(self, builder: Builder, image: str) -> str:
        """What the random step wrote into a pushed image, read by building upon it."""
        context = self.directory / "reader"
        context.mkdir(exist_ok=True)
        text = f"FROM {image} AS image\nFROM scratch\nCOPY --from=image /uuid /uuid\n"
        (context / "Dockerfile").write_text(text, "utf-8")
        builder.build(context, f"--output=type=local,dest={context}/out")
        return (context / "out" / "uuid").read_text("utf-8")

    def test_pushed_image_is_complete(self) -> None:
        builder = Builder(self)
        builder.build(self.context(), self.pushed("v1"))
        manifest = self.registry.manifest(self.name, "v1")
        for entry in [manifest["config"], *manifest["layers"]]:
            self.assertEqual(len(self.registry.blob(self.name, entry["digest"])), entry["size"])
        # Another builder has to pull what this one may still have.
        self.assertRegex(self.uuid(Builder(self), f"{self.repository}:v1"), r"^[0-9a-f-]{36}\n$")

    def test_same_image_pushed_twice(self) -> None:
        builder, context = Builder(self), self.context()
        builder.build(context, self.pushed("v1"))
        first = self.registry.digest(self.name, "v1")
        builder.build(context, self.pushed("v1"))
        self.assertEqual(self.registry.digest(self.name, "v1"), first)
        builder.build(context, f"--output=type=image,name={self.repository}/other:v1,push=true")
        self.assertEqual(self.registry.digest(f"{self.name}/other", "v1"), first)

    def test_provenance_attestation(self) -> None:
        builder = Builder(self)
        builder.build(self.context(), self.pushed("v1"), "--opt=attest:provenance=mode=max")
        index = self.registry.manifest(self.name, "v1")
        self.assertEqual(index["mediaType"], OCI_INDEX)
        image, attestation = index["manifests"]
        self.assertEqual(attestation["platform"], {"architecture": "unknown", "os": "unknown"})
        self.assertEqual(attestation["annotations"]["vnd.docker.reference.digest"], image["digest"])
        (layer,) = self.registry.manifest(self.name, attestation["digest"])["layers"]
        statement = json.loads(self.registry.blob(self.name, layer["digest"]))
        self.assertTrue(statement["predicateType"].startswith(PROVENANCE), statement["predicateType"])
        self.assertTrue(self.uuid(Builder(self), f"{self.repository}:v1"))

    def test_platforms_and_attestations_in_one_index(self) -> None:
        context = self.directory / "context"
        context.mkdir()
        text = "FROM scratch\nARG TARGETARCH\nCOPY Dockerfile /for-$TARGETARCH\n"
        (context / "Dockerfile").write_text(text, "utf-8")
        platforms = "--opt=platform=linux/amd64,linux/arm64"
        Builder(self).build(context, self.pushed("v1"), platforms, "--opt=attest:provenance=mode=min")
        kinds = [
            (entry["platform"]["architecture"], entry.get("annotations", {}).get("vnd.docker.reference.type"))
            for entry in self.registry.manifest(self.name, "v1")["manifests"]
        ]
        attached = ("unknown", "attestation-manifest")
        self.assertEqual(kinds, [("amd64", None), ("arm64", None), attached, attached])

    def cache_round_trip(self, *options: str) -> Any:
        """Build, export the cache, build on an empty builder that imports it; the cache's manifest."""
        context, cache = self.context(), f"type=registry,ref={self.repository}:cache"
        first = Builder(self)
        export = ",".join([cache, "mode=max", *options])
        self.assertNotIn("CACHED", first.build(context, self.pushed("v1"), f"--export-cache={export}"))

        second = Builder(self)
        said = second.build(context, self.pushed("v2"), f"--import-cache={cache}")
        self.assertEqual(self.cached_steps(said), ["COPY", "RUN"], said)
        uuids = [self.uuid(second, f"{self.repository}:{tag}") for tag in ("v1", "v2")]
        self.assertEqual(uuids[0], uuids[1])
        return self.registry.manifest(self.name, "cache")

    def cached_steps(self, progress: str) -> list[str]:
        """The instructions that were taken from the cache."""
        names: dict[str, str | None] = {}
        cached = []
        for line in progress.splitlines():
            number, _, text = line.partition(" ")
            if text.startswith("[") and number not in names:
                names[number] = text.partition("] ")[2].split()[0]
            elif text == "CACHED":
                cached.append(names[number])
        return sorted(str(name) for name in cached)

    def test_builder_without_the_cache_runs_every_step(self) -> None:
        context = self.context()
        uuids = []
        for tag in ("v1", "v2"):
            builder = Builder(self)
            self.assertEqual(self.cached_steps(builder.build(context, self.pushed(tag))), [])
            uuids.append(self.uuid(builder, f"{self.repository}:{tag}"))
        self.assertNotEqual(uuids[0], uuids[1])

    def test_cache_as_an_index_of_layer_blobs(self) -> None:
        cache = self.cache_round_trip("image-manifest=false", "oci-mediatypes=true")
        self.assertEqual(cache["mediaType"], OCI_INDEX)
        kinds = {entry["mediaType"] for entry in cache["manifests"]}
        self.assertIn("application/vnd.buildkit.cacheconfig.v0", kinds)
        self.assertTrue(any(".layer." in kind for kind in kinds), kinds)

    def test_cache_as_an_image_manifest(self) -> None:
        cache = self.cache_round_trip("image-manifest=true", "oci-mediatypes=true")
        self.assertEqual(cache["mediaType"], OCI_MANIFEST)

    def test_cache_inlined_into_the_image(self) -> None:
        context, cache = self.context(), f"type=registry,ref={self.repository}:v1"
        Builder(self).build(context, self.pushed("v1"), "--export-cache=type=inline")
        said = Builder(self).build(context, self.pushed("v2"), f"--import-cache={cache}")
        self.assertEqual(self.cached_steps(said), ["COPY", "RUN"], said)
