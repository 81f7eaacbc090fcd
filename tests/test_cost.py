"""What a request costs the database: never more for what others stored."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock
from urllib.parse import quote

import registry
from tests.support import (
    MEBIBYTE,
    OCI_CONFIG,
    OCI_MANIFEST,
    Client,
    DataDirectory,
    HTTPTestCase,
    descriptor,
    digest_of,
    image_index,
    image_manifest,
    pages,
    unique,
)

SBOM, SIGNATURE = "application/vnd.example.sbom+json", "application/vnd.example.signature.v1+json"
EMPTY = digest_of(b"{}")


class Meter:
    """Counts what SQLite does on all connections that are opened while it is in place."""

    def __init__(self) -> None:
        self.steps = 0  # tens of instructions of SQLite's virtual machine
        self.statements = 0
        meter, connect = self, sqlite3.connect

        class Metered(sqlite3.Connection):
            def execute(self, *arguments: Any) -> sqlite3.Cursor:
                meter.statements += 1
                return super().execute(*arguments)

            def executemany(self, sql: str, rows: Iterable[Any]) -> sqlite3.Cursor:
                rows = list(rows)
                meter.statements += len(rows)
                return super().executemany(sql, rows)

        def metered(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*arguments, factory=Metered, **options)
            connection.set_progress_handler(meter._count_step, 10)
            return connection

        self.connect = metered

    def _count_step(self) -> None:
        self.steps += 1

    def of(self, function: Callable[[], Any]) -> int:
        """The steps that a call takes."""
        before = self.steps
        function()
        return self.steps - before


class CostTestCase(HTTPTestCase):
    """A registry whose database is metered, and where anybody may do everything in mine/ and nothing else."""

    GRANTS = "anonymous mine/** pull,push,delete"

    def setUp(self) -> None:
        directory = self.temporary()
        users, self.grants = directory / "users.txt", directory / "grants.txt"
        users.write_text("")
        self.grants.write_text(self.GRANTS)
        self.meter = Meter()
        self.enter(mock.patch("sqlite3.connect", self.meter.connect))
        self.data = DataDirectory(str(directory / "data"))
        options = {"data": str(self.data.path), "users": str(users), "grants": str(self.grants)}
        running = self.enter(registry.Registry(sync=False, **options))
        self.client = Client(running.netloc, "mine/app")
        self.client.push_blob(b"{}")
        ((self.repository,),) = self.data.rows("SELECT id FROM repositories")

    def insert(self, table: str, columns: str, rows: Iterable[tuple]) -> None:
        """Add rows behind the registry's back."""
        marks = ", ".join("?" * len(columns.split()))
        with contextlib.closing(sqlite3.connect(self.data.path / "registry.db")) as database:
            database.executemany(f"INSERT INTO {table} ({', '.join(columns.split())}) VALUES ({marks})", rows)
            database.commit()

    def forget(self) -> None:
        """Commit something, so that the registry asks its database again."""
        self.client.push_blob(unique())

    def cost(self, method: str, path: str, status: int = 200) -> int:
        """The steps that a request takes."""
        self.forget()
        return self.meter.of(lambda: self.client.expect(status, method, path))

    def add_repositories(self, names: Iterable[tuple[int, str]], digest: str = EMPTY) -> None:
        """Repositories with these ids, all of which have a blob."""
        added = list(names)
        self.insert("repositories", "id name", added)
        links = ((number, digest, 0) for number, _ in added)
        self.insert("repository_blobs", "repository_id digest leased_at", links)

    def assert_bounded(self, few: list[int], many: list[int]) -> None:
        """No cost has doubled while what others stored became many times as much."""
        for before, after in zip(few, many):
            self.assertLessEqual(after, 2 * before + 20, (few, many))


def unreadable(first: int, last: int) -> list[tuple[int, str]]:
    return [(number, f"{'many' if number % 2 else 'no'}/r{number:06}") for number in range(first, last)]


class CatalogPages(CostTestCase):
    def test_a_page_costs_nothing_for_repositories_that_the_caller_may_not_pull(self) -> None:
        paths = [f"/v2/_catalog?n={page}" for page in ("0", "1", "10", "10&last=many/r000500")]
        costs = []
        for first, last in ((1000, 1010), (1010, 5000)):
            self.add_repositories(unreadable(first, last))
            costs.append([self.cost("GET", path) for path in paths])
        self.assert_bounded(*costs)
        self.assertEqual(self.client.get(paths[2]).json["repositories"], ["mine/app"])

    def test_no_names_are_read_when_none_are_wanted(self) -> None:
        self.grants.write_text("anonymous ** pull,push")
        self.forget()
        self.assertEqual(self.meter.of(lambda: self.client.expect(200, "GET", "/v2/_catalog?n=0")), 0)

    def test_names_that_may_not_be_pulled_are_read_many_at_a_time(self) -> None:
        self.grants.write_text(f"{self.GRANTS}\nanonymous */x pull")
        self.add_repositories(unreadable(1000, 5000))
        for path in ("/v2/_catalog?n=1&last=n", "/v2/_catalog?n=2"):
            self.forget()
            before = self.meter.statements
            self.assertLessEqual(len(self.client.get(path).json["repositories"]), 1)
            self.assertLess(self.meter.statements - before, 20)

    def test_overlapping_grants_list_each_repository_once_and_in_order(self) -> None:
        self.grants.write_text(
            "anonymous mine/** pull,push\nanonymous b/** pull\nanonymous b/c/* pull\nanonymous b pull\n"
            "anonymous */x pull\nanonymous d pull\nanonymous d* pull\nanonymous e/** push\nother f/** pull\n"
        )
        granted = ["a/x", "b", "b/a", "b/c/a", "b/c/b", "b/d", "c/x", "d", "d1", "e/x"]
        withheld = ["a", "a/x/y", "b1", "c", "d/a", "da/b", "e/a", "f/a", "g"]
        self.add_repositories(enumerate(sorted(granted + withheld), 100))
        for step in (1, 2, 1000):
            for size in (1, 2, 3, 100):
                with self.subTest(step=step, size=size), mock.patch("registry.LISTING_STEP", step):
                    self.forget()
                    found = pages(self.client, f"/v2/_catalog?n={size}", "repositories")
                    self.assertEqual([name for page in found for name in page], [*granted, "mine/app"])


class MountsFromAnywhere(CostTestCase):
    def test_a_mount_from_anywhere_tries_a_bounded_number_of_repositories(self) -> None:
        digest, path = digest_of(b"elsewhere"), f"blobs/uploads/?mount={digest_of(b'elsewhere')}"
        self.insert("blobs", "digest size", [(digest, 9)])
        costs = []
        for first, last in ((1000, 2100), (2100, 6000)):
            self.add_repositories(unreadable(first, last), digest)
            costs.append([self.cost("POST", path, status=202)])
        self.assert_bounded(*costs)


class PagesOfReferrers(CostTestCase):
    SUBJECT = digest_of(b"subject")

    def add_referrers(self, artifact_type: str, count: int, subject: str = SUBJECT) -> None:
        """Manifests as if they had been pushed."""
        added = [
            f"sha256:{hashlib.sha256(f'{artifact_type} {n}'.encode()).hexdigest()}" for n in range(count)
        ]
        self.insert("blobs", "digest size", ((digest, 2) for digest in added))
        links = ((self.repository, digest, 0) for digest in added)
        self.insert("repository_blobs", "repository_id digest leased_at", links)
        self.insert(
            "manifests",
            "repository_id digest media_type artifact_type subject pushed_at pulled_at",
            ((self.repository, digest, OCI_MANIFEST, artifact_type, subject, 0, 0) for digest in added),
        )
        if self.data.rows("SELECT 1 FROM sqlite_master WHERE name = 'referrers'"):
            rows = ((self.repository, digest, b'{"digest":"%b"}' % digest.encode()) for digest in added)
            self.insert("referrers", "repository_id digest descriptor", rows)

    def test_a_page_costs_nothing_for_the_pages_after_it(self) -> None:
        costs = []
        for artifact_type, count in ((SBOM, 1001), (SIGNATURE, 4000)):
            self.add_referrers(artifact_type, count)
            costs.append([self.cost("GET", f"referrers/{self.SUBJECT}")])
            self.assertEqual(len(self.client.get(f"referrers/{self.SUBJECT}").json["manifests"]), 1000)
        self.assert_bounded(*costs)

    def test_a_referrer_is_read_a_bounded_number_of_times(self) -> None:
        costs = []
        for artifact_type, count in ((SBOM, 50), (SIGNATURE, 950)):
            self.add_referrers(artifact_type, count)
            costs.append(self.cost("GET", f"referrers/{self.SUBJECT}"))
        self.assertLessEqual(costs[1], 25 * costs[0])

    def test_long_descriptors_are_read_only_for_the_page_they_are_on(self) -> None:
        self.add_referrers(SBOM, 100)
        path, long = self.data.path / "registry.db", b'{"annotations":{"a":"%s"}}' % (b"x" * MEBIBYTE)
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("UPDATE referrers SET descriptor = ?", (long,))
            database.commit()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(len(self.client.get(f"referrers/{self.SUBJECT}").json["manifests"]), 2)
        self.assertLess(tracemalloc.get_traced_memory()[1], 50 * MEBIBYTE)

    def test_a_page_costs_nothing_for_what_refers_to_something_else(self) -> None:
        path = f"referrers/{self.SUBJECT}"
        self.add_referrers(SBOM, 20)
        few = self.cost("GET", path)
        self.add_referrers(SIGNATURE, 4000, digest_of(b"another subject"))
        self.assert_bounded([few], [self.cost("GET", path)])
        self.assertEqual(len(self.client.get(path).json["manifests"]), 20)

    def test_a_filter_costs_nothing_for_other_types(self) -> None:
        path = f"referrers/{self.SUBJECT}?artifactType={quote(SBOM, safe='')}"
        self.add_referrers(SBOM, 20)
        few = self.cost("GET", path)
        self.add_referrers(SIGNATURE, 2000)
        self.assert_bounded([few], [self.cost("GET", path)])
        self.assertEqual(len(self.client.get(path).json["manifests"]), 20)


class LargeManifests(CostTestCase):
    def test_rows_that_are_searched_are_short(self) -> None:
        """SQLite reads the whole of a row of an index, or a table without row ids, that it compares."""
        text = "x" * MEBIBYTE
        manifest = image_manifest(
            descriptor(b"{}", OCI_CONFIG), annotations={"a": text}, artifactType="t" * 255
        )
        for subject in (None, descriptor(b"subject")):
            self.client.push_manifest({**manifest, "subject": subject}, "tag")
        for table, sql in self.data.rows("SELECT name, sql FROM sqlite_master WHERE type = 'table'"):
            if "WITHOUT ROWID" in sql:
                columns = [name for _, name, *_ in self.data.rows(f"PRAGMA table_info({table})")]
                length = " + ".join(f"ifnull(length({name}), 0)" for name in columns)
                ((longest,),) = self.data.rows(f"SELECT max({length}) FROM {table}")
                self.assertLess(longest or 0, 1000, table)
        (listed,) = self.client.get(f"referrers/{digest_of(b'subject')}").json["manifests"]
        self.assertEqual(listed["annotations"], {"a": text})

    def test_many_children_take_few_statements(self) -> None:
        children = [descriptor(unique()) for _ in range(3000)]
        self.insert("blobs", "digest size", ((child["digest"], 0) for child in children))
        links = ((self.repository, child["digest"], 0) for child in children)
        self.insert("repository_blobs", "repository_id digest leased_at", links)
        before = self.meter.statements
        digest = self.client.push_manifest(image_index(children), "tag")
        self.assertLess(self.meter.statements - before, 100)
        needed = self.data.rows("SELECT count(*) FROM repository_blobs WHERE needed_by = 1")
        self.assertEqual(needed, [(len(children) + 1,)])
        self.client.expect(202, "DELETE", f"manifests/{digest}")
        self.assertEqual(self.data.rows("SELECT count(*) FROM repository_blobs WHERE needed_by > 0"), [(0,)])
