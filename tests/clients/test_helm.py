"""Helm: charts as OCI artifacts, pushed without a `mediaType` and with a config type of Helm's own."""

from __future__ import annotations

from support import ClientTest

CHART = """\
apiVersion: v2
name: {name}
version: {version}
description: a chart of a test
"""
TEMPLATE = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ .Release.Name }}
data:
  greeting: {{ .Values.greeting | quote }}
"""


class HelmTest(ClientTest):
    programs = ("helm",)

    def push(self, version: str) -> bytes:
        """A chart called `chart`, packed and pushed below this test's repository; the archive."""
        chart = self.directory / "chart"
        (chart / "templates").mkdir(parents=True, exist_ok=True)
        (chart / "Chart.yaml").write_text(CHART.format(name="chart", version=version), "utf-8")
        (chart / "values.yaml").write_text(f"greeting: hello from {version}\n", "utf-8")
        (chart / "templates" / "map.yaml").write_text(TEMPLATE, "utf-8")
        self.ok("helm", "package", "chart")
        archive = self.directory / f"chart-{version}.tgz"
        self.ok("helm", "push", "--plain-http", archive.name, f"oci://{self.repository}")
        return archive.read_bytes()

    def pull(self, version: str) -> bytes:
        """The archive of a version, as it comes back."""
        (self.directory / "back").mkdir()
        chart = f"oci://{self.repository}/chart"
        self.ok("helm", "pull", "--plain-http", "--version", version, "--destination", "back", chart)
        return (self.directory / "back" / f"chart-{version}.tgz").read_bytes()

    def test_pushed_chart_comes_back_identical(self) -> None:
        archive = self.push("1.2.3")
        self.assertEqual(self.pull("1.2.3"), archive)
        manifest = self.registry.manifest(f"{self.name}/chart", "1.2.3")
        self.assertEqual(manifest["config"]["mediaType"], "application/vnd.cncf.helm.config.v1+json")

    def test_chart_renders_straight_from_the_registry(self) -> None:
        self.push("1.0.0")
        self.push("1.1.0")
        chart = f"oci://{self.repository}/chart"
        newest = self.ok("helm", "template", "--plain-http", "release", chart)
        self.assertIn('greeting: "hello from 1.1.0"', newest)
        pinned = self.ok("helm", "template", "--plain-http", "--version", "1.0.0", "release", chart)
        self.assertIn('greeting: "hello from 1.0.0"', pinned)

    def test_version_with_build_metadata(self) -> None:
        # A tag has no +, so Helm writes it as _ and reads it back.
        archive = self.push("2.0.0+build.7")
        self.assertEqual(self.registry.tags(f"{self.name}/chart"), ["2.0.0_build.7"])
        self.assertEqual(self.pull("2.0.0+build.7"), archive)

    def test_missing_chart_is_reported_as_not_found(self) -> None:
        missing = f"oci://{self.repository}/none"
        self.assertIn("not found", self.fails("helm", "pull", "--plain-http", "--version", "1.0.0", missing))
