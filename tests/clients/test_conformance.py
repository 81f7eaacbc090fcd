"""The conformance suite of the distribution specification, whole: every check it knows has to pass."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

from support import TIMEOUT, ClientTest, Registry, program


class ConformanceTest(ClientTest):
    programs = ("conformance",)
    skipped: ClassVar[tuple[str, ...]] = ()  # the groups of three checks that are skipped, and may be

    def run_suite(self, registry: Registry, **settings: str) -> str:
        """What the suite reports. Its environment is its configuration, so it gets nothing but ours."""
        environment = {
            "OCI_REGISTRY": registry.address,
            "OCI_TLS": "disabled",
            "OCI_REPO1": "conformance/repo1",
            "OCI_REPO2": "conformance/repo2",
            "OCI_RESULTS_DIR": str(self.directory),
            "OCI_LOG": "error",
            **settings,
        }
        suite = program("conformance")
        # An empty directory of its own, so that it finds no configuration file either.
        with tempfile.TemporaryDirectory(dir=self.temp) as empty:
            done = subprocess.run(
                [suite], cwd=empty, env=environment, stdout=subprocess.PIPE, timeout=TIMEOUT, check=False
            )
        return done.stdout.decode("utf-8")

    def assert_all_pass(self, report: str, passes: int) -> None:
        """The suite exits with 0 on a bad configuration too: what counts are its verdict and its figures."""
        figures = dict(re.findall(r"^  (\w+)\.+: +(\d+)$", report, re.MULTILINE))
        passes, skips = passes - 3 * len(self.skipped), str(len(self.skipped))
        wanted = {"Pass": str(passes), "FAIL": "0", "Error": "0", "Skip": skips}
        complaints = [line for line in report.splitlines() if re.search(r": (FAIL|Error|Skip)$|^ +- ", line)]
        message = "\n".join(complaints) or report[-4000:]
        self.assertEqual({name: figures.get(name) for name in wanted}, wanted, message)
        self.assertEqual(tuple(re.findall(r"(\S+/\S+): Skip$", message, re.MULTILINE)), self.skipped)
        self.assertIn("\nOCI Conformance Result: Pass\n", report)

    def test_released_specification(self) -> None:
        self.assert_all_pass(self.run_suite(self.own_registry()), 860)

    def test_coming_specification(self) -> None:
        self.assert_all_pass(self.run_suite(self.own_registry(), OCI_VERSION="dev"), 986)

    def test_coming_specification_with_sparse_content(self) -> None:
        registry = self.own_registry("--sparse")
        self.assert_all_pass(self.run_suite(registry, OCI_VERSION="dev", OCI_DATA_SPARSE="true"), 1032)

    def own_registry(self, *options: str) -> Registry:
        """An empty registry for one run, since the suite uses fixed repositories."""
        registry = Registry(Path(tempfile.mkdtemp(dir=self.temp)), *options)
        self.addCleanup(registry.close)
        return registry
