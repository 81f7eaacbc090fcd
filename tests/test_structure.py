"""How the product is put together: two files, layers that point one way, documents that match the code."""

from __future__ import annotations

import ast
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path

import registry
from tests.support import wait_until

TOP = Path(__file__).resolve().parent.parent
SOURCE = (TOP / "registry.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
STANDARD_LIBRARY = set(
    "argparse base64 bisect collections concurrent contextlib ctypes dataclasses email enum errno fcntl"
    " functools getpass hashlib heapq hmac http io ipaddress itertools json math mmap os pathlib"
    " queue re resource secrets selectors shutil signal socket socketserver sqlite3 ssl stat struct"
    " sys tempfile threading time traceback typing urllib __future__".split()
)


def sections() -> dict[str, tuple[int, int]]:
    """First and last line of each section, by its name."""
    banners = [
        (match[1], number)
        for number, line in enumerate(SOURCE.splitlines(), 1)
        if (match := re.fullmatch(r"# === (.+?): .+ =+", line))
    ]
    ends = [number - 1 for _, number in banners[1:]] + [len(SOURCE.splitlines())]
    return {name: (start, end) for (name, start), end in zip(banners, ends)}


def names_used(first: int, last: int) -> set[str]:
    """Every name that the code between two lines uses, annotations included."""
    return {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name) and first <= node.lineno <= last}


def defined_names() -> dict[str, int]:
    """The lines on which the module's own functions, classes and constants are defined."""
    names: dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            names.update({target.id: node.lineno for target in node.targets if isinstance(target, ast.Name)})
    return names


class StructureTest(unittest.TestCase):
    def test_module_docstring_lists_the_sections_in_their_order(self) -> None:
        listed = registry.__doc__.split("above it: ")[1]  # type: ignore[union-attr]
        self.assertEqual(" ".join(listed.split()), ", ".join(sections()) + ".")

    def test_banners_are_full_width(self) -> None:
        for line in re.findall(r"^# === .*", SOURCE, re.MULTILINE):
            self.assertEqual(len(line), 104, line)

    def test_only_the_standard_library_is_imported(self) -> None:
        imported = {
            alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {node.module or "" for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
        roots = {name.partition(".")[0] for name in imported}
        self.assertEqual(roots - getattr(sys, "stdlib_module_names", STANDARD_LIBRARY), set())

    def test_functions_use_only_what_stands_above_them(self) -> None:
        lines = defined_names()
        for node in TREE.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and lines.get(inner.id, 0) > node.lineno:
                    below = lines[inner.id]
                    section = [
                        name for name, (first, last) in sections().items() if first <= node.lineno <= last
                    ]
                    first, last = sections()[section[0]]
                    self.assertTrue(
                        first <= below <= last, f"{node.name} uses {inner.id} from a later section"
                    )

    def test_storage_has_never_heard_of_requests(self) -> None:
        forbidden = {
            "Request",
            "Reply",
            "SocketReader",
            "Body",
            "Route",
            "Server",
            "Connection",
            "socket",
            "http",
        }
        for name in ("Digests", "Manifests", "Files", "Store"):
            self.assertEqual(names_used(*sections()[name]) & forbidden, set(), name)

    def test_files_and_manifests_know_no_sql(self) -> None:
        for name in ("Digests", "Manifests", "Files"):
            self.assertNotIn("sqlite3", names_used(*sections()[name]), name)

    def test_only_link_rows_are_inserted_with_or_ignore(self) -> None:
        tables = set(re.findall(r"INSERT OR IGNORE INTO (\w+)", SOURCE))
        self.assertEqual(tables, {"repository_blobs"})

    def test_data_definition_is_in_the_schema_alone(self) -> None:
        self.assertEqual(re.findall(r"\b(?:CREATE|ALTER|DROP) (?:TABLE|INDEX|TRIGGER|VIEW)", SOURCE), [])

    def test_schema_version_is_the_one_that_the_code_knows(self) -> None:
        schema = (TOP / "schema.sql").read_text(encoding="utf-8")
        self.assertIn(f"PRAGMA user_version = {registry.FORMAT_VERSION};", schema)

    def test_every_error_is_one_of_the_specifications_codes(self) -> None:
        codes = [code.code for code in registry.ErrorCode]
        self.assertEqual(len(set(codes)), 14)
        self.assertEqual([code.name for code in registry.ErrorCode][:14], codes[:14])


class ReadmeTest(unittest.TestCase):
    README = (TOP / "README.md").read_text(encoding="utf-8")

    def test_the_table_of_endpoints_has_those_that_are_not_the_specifications(self) -> None:
        rows = re.findall(r"^\| `(\w+) (/[^`]*)` \|", self.README, re.MULTILINE)
        others = [route for route in registry.ROUTES if not re.match("/v2/(<name>/|$)", route.path)]
        self.assertEqual(rows, [(route.method, route.path) for route in others])

    def test_all_that_a_data_directory_has_is_described_here_and_in_the_module(self) -> None:
        described = re.search(r"    blobs/<(?:.+\n)+", self.README)[0]  # type: ignore[index]
        self.assertIn(f"\n{described}\n", registry.__doc__)
        with tempfile.TemporaryDirectory() as directory:
            users, data = Path(directory, "users"), Path(directory, "data")
            users.write_text("")
            with registry.Registry(data, users=str(users), gc_interval=3600):
                # the first collection runs beside the requests
                wait_until(Path(data, "last-gc").exists)
                names = {*os.listdir(data), "corrupt"}
        listed = re.findall(r"^    ([\w.-]+)(?:, (-\w+))?", described, re.MULTILINE)
        shared = [name.partition("-")[0] + suffix for name, suffix in listed if suffix]
        self.assertEqual(names, {*(name for name, _ in listed), *shared})

    def test_every_option_is_one_that_the_command_line_has(self) -> None:
        known = set(re.findall(r" (--[a-z-]+)", registry.OPTIONS))
        commands = re.findall(r"^python registry\.py .*$", self.README, re.MULTILINE)
        self.assertTrue(commands)
        for command in commands:
            with self.subTest(command):
                self.assertLessEqual(set(re.findall(r"(?<= )--[a-z-]+", command)), known)

    def test_the_limits_are_those_of_the_code(self) -> None:
        """Tests change them, so that none would notice what they are otherwise."""
        limits = " ".join(self.README.partition("\n## Limits\n")[2].partition("\n\n")[0].split())
        slowest, lists = registry.SLOWEST_BODY // registry.KIB, registry.REFERRER_PAGE_LIMIT
        for text in (
            f"{registry.REQUEST_LINE_LIMIT // registry.KIB} KiB of request line",
            f"{registry.HEAD_LIMIT // registry.KIB} KiB and {registry.HEADER_COUNT_LIMIT} lines of headers",
            f"{registry.MANIFEST_LIMIT // registry.MIB} MiB of manifest",
            f"A blob may stall for {registry.STALL_TIMEOUT:.0f} seconds",
            f"a head take {registry.HEADER_TIMEOUT:.0f}, a manifest that and a second for each {slowest} KiB",
            f"of a request after its reply {registry.LINGER_TIMEOUT:.0f}",
            f"a connection idle for {registry.IDLE_TIMEOUT:.0f}.",
            f"({registry.MAX_CONNECTIONS:,}) are served at once",
            f"for {registry.HEADER_TIMEOUT:.0f} seconds has moved its blob at less than {slowest} KiB a",
            f"or of {lists:,} referrers",
        ):
            self.assertIn(text, limits)


if __name__ == "__main__":
    unittest.main()
