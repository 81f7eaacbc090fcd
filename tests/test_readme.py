"""What the README shows besides commands: the fixtures, the fields of Registry, the systemd unit."""

from __future__ import annotations

import configparser
import contextlib
import dataclasses
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import registry
from tests.daemon import python
from tests.support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_block(language: str, part: str) -> str:
    """The code block of a language that has some text in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if part in block)
    return block


class FixtureTest(unittest.TestCase):
    """The fixtures work as they stand there."""

    PYTEST = code_block("python", "import pytest")

    def test_the_first_example_prints_where_it_is(self) -> None:
        done = python("-c", code_block("python", "print(registry.url"))
        self.assertRegex(done.stdout, r"\Ahttp://(127\.0\.0\.1:\d+) \1\n\Z")
        self.assertEqual(done.stderr, "")

    def test_the_fixture_of_unittest(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "test_fixture.py").write_text(code_block("python", "import unittest"))
            done = python("-m", "unittest", "discover", "-v", "-s", directory)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Ran 1 test ", done.stderr)

    def test_the_fixture_of_pytest_serves_as_long_as_it_is_needed(self) -> None:
        """Driven as pytest does it: up to the yield before the test, and on from there after it."""
        names: dict = {}
        pytest = types.SimpleNamespace(fixture=lambda scope: contextlib.contextmanager)
        with mock.patch.dict(sys.modules, pytest=pytest):
            exec(self.PYTEST, names)
        with names["registry"]() as running:
            names["test_reference"](running)
            self.assertIn(running, registry._running)
        self.assertNotIn(running, registry._running)

    @unittest.skipUnless(importlib.util.find_spec("pytest"), "pytest is not installed")
    def test_the_fixture_of_pytest_with_pytest(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "test_fixture.py")
            path.write_text(self.PYTEST)
            done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={directory}", str(path))
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


class FieldsTest(unittest.TestCase):
    def test_every_field_is_there_with_its_default(self) -> None:
        start = README.index("| Field |")
        rows = re.findall(
            r"^\| (`.+?) \| .+ \| (`.+`) \|$", README[start : README.index("\n\n", start)], re.M
        )
        listed = {}
        for names, defaults in rows:
            fields, values = re.findall("`(.+?)`", names), re.findall("`(.+?)`", defaults)
            listed.update(zip(fields, values * len(fields) if len(values) == 1 else values))
        expected = {
            field.name: repr(field.default).replace("'", '"')
            for field in dataclasses.fields(registry.Registry)
        }
        self.assertEqual(listed, expected)

    def test_limits_and_policy_take_what_is_said(self) -> None:
        for kind in (registry.Limits, registry.Policy):
            self.assertIn(f"`registry.{kind.__name__}({', '.join(kind._fields)})`", README)


class UnitTest(unittest.TestCase):
    UNIT = code_block("ini", "ExecStart")

    def test_its_command_line_is_one(self) -> None:
        unit = configparser.ConfigParser()
        unit.read_string(self.UNIT)
        service = unit["Service"]
        interpreter, program, *arguments = service["ExecStart"].split()
        self.assertEqual(Path(interpreter).name, "python3")
        self.assertEqual(Path(program).name, "registry.py")
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            options = registry.build_parser().parse_args(arguments)
        self.assertEqual((options.command, stderr.getvalue()), (registry.command_serve, ""))
        self.assertEqual(options.data, f"/var/lib/{service['StateDirectory']}")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "needs systemd-analyze")
    def test_systemd_has_nothing_to_say_of_it(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "registry.service")
            path.write_text(self.UNIT.replace("/usr/bin/python3", sys.executable))
            command = ["systemd-analyze", "verify", "--man=no", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))


if __name__ == "__main__":
    unittest.main()
