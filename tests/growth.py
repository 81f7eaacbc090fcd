#!/usr/bin/env python3
"""Measure how this registry's costs grow with what it holds and with how many ask at once.

    python tests/growth.py [--quick] [DIRECTORY]

A store is filled through SQL, with empty files for its blobs, to one size after another; at each, a server is
started on it and asked. Printed as Markdown tables, and drawn into DIRECTORY/growth.svg (a temporary one
by default). Times in milliseconds are medians as a client sees them, its own share included. What is not
to grow at all fails when it more than doubles. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import bench
from bench import Client, Image, Server, digest_of, output_of, program, report_machine, say, table

PROBES = 300  # requests that a median is taken of
SAMPLES = 200  # blobs that have bytes
MANY, GROWN = "growth/many", "growth/all"


class Series(NamedTuple):
    """One thing that grows: the sizes it takes on, and what was measured at each."""

    title: str
    sizes: list[int]
    figures: dict[str, list[float]]  # by what was measured, in the order of the sizes
    bounded: bool = False  # whether none of them is to grow

    def excess(self) -> list[str]:
        """What grew that was not to."""
        figures = self.figures.items() if self.bounded else ()
        return [f"{self.title}: {name}" for name, values in figures if values[-1] > 2 * values[0]]


def digest_number(number: int) -> str:
    """The digest of the number's blob: as scattered as real ones."""
    return f"sha256:{hashlib.sha256(b'%d' % number).hexdigest()}"


def size_number(number: int) -> int:
    """How many bytes the number's blob has."""
    return 2048 if number < SAMPLES else 0


# === The store ===


class Grower:
    """A data directory that grows while no server has it, and the server on it."""

    def __init__(self, directory: Path, *options: str) -> None:
        """options: more of them for the server."""
        self.source = directory / "source"
        self.server: Server = next(bench.our_servers(self.source))
        self.server.has_tls = False
        commands = self.server.commands
        self.server.commands = lambda *where: [[*commands(*where)[0], *options]]
        self.server.root = Path(tempfile.mkdtemp(dir=directory))
        self.data = self.server.root / "data"
        self.image: Image = bench.make_image(2, 2048)
        with self.running() as client:
            client.push_image(MANY, "latest", self.image)
            client.push_image(GROWN, "latest", self.image)
        self.digest = digest_of(self.image.manifest)

    @contextlib.contextmanager
    def running(self) -> Iterator[Client]:
        """A client of a running server."""
        self.server.start()
        try:
            with Client(self.server.port) as client:
                yield client
        finally:
            self.server.stop()

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """The store's database, in one transaction."""
        db = sqlite3.connect(self.data / "registry.db", isolation_level=None)
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -500000")
        db.execute("BEGIN")
        yield db
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()

    def repository(self, db: sqlite3.Connection, name: str) -> int:
        return int(db.execute("SELECT id FROM repositories WHERE name = ?", (name,)).fetchone()[0])

    def add_tags(self, numbers: range) -> None:
        with self.database() as db:
            repository = self.repository(db, MANY)
            rows = ((repository, f"v{number:07}", self.digest) for number in numbers)
            add_rows(db, "tags", ("repository_id", "name", "digest"), rows)

    def add_repositories(self, numbers: range, digest: str = "") -> None:
        """Each serves the manifest's bytes as a blob, or another blob."""
        with self.database() as db:
            add_rows(db, "repositories", ("id", "name"), ((None, f"many/r{n:07}") for n in numbers))
            added = db.execute(
                "SELECT id FROM repositories WHERE name BETWEEN ? AND ?",
                (f"many/r{numbers[0]:07}", f"many/r{numbers[-1]:07}"),
            ).fetchall()
            rows = ((repository, digest or self.digest) for (repository,) in added)
            add_rows(db, "repository_blobs", LINK, rows)

    def add_referrers(self, numbers: range, artifact_type: str, subject: str) -> None:
        with self.database() as db:
            repository, digests = self.repository(db, MANY), [digest_number(n) for n in numbers]
            add_rows(db, "blobs", ("digest",), ((digest,) for digest in digests))
            add_rows(db, "repository_blobs", LINK, ((repository, digest) for digest in digests))
            columns = ("repository_id", "digest", "artifact_type", "subject")
            rows = ((repository, digest, artifact_type, subject) for digest in digests)
            add_rows(db, "manifests", columns, rows)
            add_rows(db, "referrers", LINK, ((repository, digest) for digest in digests))

    def add_blobs(self, numbers: range) -> None:
        """The first ones have bytes, every hundredth is garbage, and a manifest needs the rest."""
        for number in numbers:
            path = self.data / "blobs" / "sha256" / digest_number(number)[7:]
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, b"x" * size_number(number))
            os.close(descriptor)
        with self.database() as db:
            repository = self.repository(db, GROWN)
            add_rows(db, "blobs", ("digest", "size"), ((digest_number(n), size_number(n)) for n in numbers))
            add_rows(db, "repository_blobs", LINK, ((repository, digest_number(n)) for n in numbers))
            needed = ((repository, self.digest, digest_number(n)) for n in numbers if n % 100)
            add_rows(db, "manifest_references", ("repository_id", "manifest", "child"), needed)


LINK = ("repository_id", "digest")


def add_rows(
    db: sqlite3.Connection, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Add rows to a table; the other columns are as in the row that is there already, and times long ago."""
    cursor = db.execute(f"SELECT * FROM {name} LIMIT 1")
    known = dict(zip((column[0] for column in cursor.description), cursor.fetchone()))
    names = [*columns, *(column for column in known if column not in columns)]
    rest = [0 if column.endswith("_at") else known[column] for column in names[len(columns) :]]
    sql = f"INSERT INTO {name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    db.executemany(sql, ((*row, *rest) for row in rows))


# === Measuring ===


def median_ms(
    client: Client,
    method: str,
    paths: Callable[[], str],
    *,
    bodies: Callable[[], bytes] = bytes,
    expect: int = 200,
    share: float = 0.5,
) -> float:
    """The time, in milliseconds, that so large a share of the requests do not take: the median."""
    taken = []
    for _ in range(PROBES):
        path, body = paths(), bodies()
        started = time.perf_counter()
        client.require(method, path, body, expect=expect)
        taken.append((time.perf_counter() - started) * 1000)
    return sorted(taken)[int(share * PROBES)]


undisturbed_ms = functools.partial(median_ms, share=0.1)  # by other work on the machine


def median_start(grower: Grower) -> float:
    """Milliseconds until a server on the store answers."""
    taken = []
    for _ in range(3):
        taken.append(grower.server.start() * 1000)
        grower.server.stop()
    return statistics.median(taken)


def collect(
    title: str, sizes: list[int], measure: Callable[[int, int], dict[str, float]], *, bounded: bool = False
) -> Series:
    """Grow and measure; the function gets the size before and the size to be."""
    series, before = Series(title, sizes, {}, bounded), 0
    for size in sizes:
        for name, value in measure(before, size).items():
            series.figures.setdefault(name, []).append(value)
        say(f"{title} {size:,}: " + ", ".join(f"{name} {v[-1]:.2f}" for name, v in series.figures.items()))
        before = size
    return series


def tags(grower: Grower, sizes: list[int]) -> Series:
    """Pages and lookups in one repository of many tags."""

    def measure(before: int, size: int) -> dict[str, float]:
        grower.add_tags(range(before, size))
        page = f"/v2/{MANY}/tags/list?n=100"
        with grower.running() as client:
            figures = {
                "first page of 100": median_ms(client, "GET", lambda: page),
                "a middle page": median_ms(client, "GET", lambda: f"{page}&last=v{size // 2:07}"),
                "GET manifest by tag": median_ms(
                    client, "GET", lambda: f"/v2/{MANY}/manifests/v{random.randrange(size):07}"
                ),
            }
        return {**figures, "start": median_start(grower)}

    return collect("tags", sizes, measure)


def repositories(grower: Grower, sizes: list[int]) -> Series:
    """Pages of the catalog, and lookups in any repository."""

    def measure(before: int, size: int) -> dict[str, float]:
        grower.add_repositories(range(before, size))
        page = "/v2/_catalog?n=100"
        with grower.running() as client:
            figures = {
                "first page of 100": median_ms(client, "GET", lambda: page),
                "a middle page": median_ms(client, "GET", lambda: f"{page}&last=many/r{size // 2:07}"),
                "HEAD blob": median_ms(
                    client, "HEAD", lambda: f"/v2/many/r{random.randrange(size):07}/blobs/{grower.digest}"
                ),
            }
        return {**figures, "start": median_start(grower)}

    return collect("repositories", sizes, measure)


def blobs(grower: Grower, sizes: list[int]) -> Series:
    """Lookups among many blobs, and the work that goes through all of them."""
    registry = [sys.executable, str(grower.source / "registry.py")]
    collects = re.search(r"^ +gc\b", output_of(*registry, "--help"), re.MULTILINE)

    def measure(before: int, size: int) -> dict[str, float]:
        grower.add_blobs(range(before, size))
        path = f"/v2/{GROWN}/blobs/"
        with grower.running() as client:
            figures = {
                "HEAD blob": median_ms(client, "HEAD", lambda: path + digest_number(random.randrange(size))),
                "GET blob of 2 KiB": median_ms(
                    client, "GET", lambda: path + digest_number(random.randrange(SAMPLES))
                ),
            }
        figures["start"] = median_start(grower)
        if collects:
            started = time.perf_counter()
            command = [*registry, "gc", "--data", str(grower.data), "--dry-run"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            figures["gc --dry-run"] = (time.perf_counter() - started) * 1000
        return figures

    return collect("blobs", sizes, measure)


def manifests(grower: Grower, sizes: list[int]) -> Series:
    """Work beside forty manifests with so many bytes of annotations."""
    anywhere, empty = bench.descriptor(b"anywhere"), bench.descriptor(b"{}")

    def manifest(**more: Any) -> bytes:
        about = {"schemaVersion": 2, "config": empty, "layers": [], "subject": anywhere}
        return json.dumps({**about, "author": os.urandom(16).hex(), **more}).encode()

    def measure(_before: int, size: int) -> dict[str, float]:
        foreign = [{**anywhere, "digest": digest_number(n), "urls": ["x"]} for n in range(100)]
        path = f"/v2/{GROWN}/manifests/latest"
        with grower.running() as client:
            for repository in (MANY, GROWN):
                client.push_blob(repository, b"{}", empty["digest"])
            for number in range(40):
                large = manifest(annotations={"a": "x" * size})
                client.push_manifest(MANY, f"large-{number}", large)

            def push() -> str:
                client.push_manifest(GROWN, "small", manifest(subject=None))
                return path

            return {
                "GET manifest after a push": undisturbed_ms(client, "GET", push),
                "PUT manifest": undisturbed_ms(
                    client, "PUT", lambda: f"{path}-2", bodies=manifest, expect=201
                ),
                "PUT manifest of 100 foreign layers": undisturbed_ms(
                    client, "PUT", lambda: f"{path}-3", bodies=lambda: manifest(layers=foreign), expect=201
                ),
            }

    return collect("bytes in each of 40 manifests", sizes, measure, bounded=True)


def referrers(grower: Grower, sizes: list[int]) -> Series:
    """Pages among the referrers of one subject: of 1,000, and of the 100 of one type."""
    subject, artifact = bench.descriptor(b"subject"), "application/x-artifact"
    path = f"/v2/{MANY}/referrers/{subject['digest']}"
    with grower.running() as client:
        client.push_blob(MANY, b"{}", digest_of(b"{}"))
        first = {"schemaVersion": 2, "config": bench.descriptor(b"{}"), "layers": [], "subject": subject}
        client.push_manifest(MANY, "referrer", json.dumps(first).encode())
    grower.add_referrers(range(10**7, 10**7 + 100), artifact, subject["digest"])

    def measure(before: int, size: int) -> dict[str, float]:
        grower.add_referrers(range(before, size), "application/x-other", subject["digest"])
        with grower.running() as client:
            return {
                "a page of 1,000": undisturbed_ms(client, "GET", lambda: path),
                "the 100 of one type": undisturbed_ms(
                    client, "GET", lambda: f"{path}?artifactType={artifact}"
                ),
            }

    return collect("referrers", sizes, measure, bounded=True)


def grants(grower: Grower, sizes: list[int]) -> Series:
    """What a caller asks for who may do nothing in so many repositories, and anything in a hundred."""
    blob = os.urandom(16)
    mount = f"/v2/mine/r1/blobs/uploads/?mount={digest_of(blob)}"
    with grower.running() as client:
        for number in range(100):
            client.push_blob(f"mine/r{number}", b"{}", digest_of(b"{}"))

    def measure(before: int, size: int) -> dict[str, float]:
        if not before:
            with grower.database() as db:
                add_rows(db, "blobs", ("digest", "size"), [(digest_of(blob), 16)])
        grower.add_repositories(range(before, size), digest_of(blob))
        with grower.running() as client:
            page = "/v2/_catalog?n="
            return {
                "n=0": undisturbed_ms(client, "GET", lambda: f"{page}0"),
                "first page of 100": undisturbed_ms(
                    client, "GET", lambda: f"{page}100&last={random.random()}"
                ),
                "mount from anywhere": undisturbed_ms(client, "POST", lambda: mount, expect=202),
            }

    return collect("repositories that the caller may not pull", sizes, measure, bounded=True)


def clients(grower: Grower, sizes: list[int], seconds: int) -> Series:
    """One manifest, asked for by many at once."""

    def measure(_before: int, size: int) -> dict[str, float]:
        with grower.running():
            url = f"http://127.0.0.1:{grower.server.port}/v2/{GROWN}/manifests/latest"
            text = output_of("wrk", "-t1", f"-c{size}", f"-d{seconds}s", "--latency", url)
        share = {name: re.search(rf"{name}%\s+([\d.]+)(us|ms|s)", text) for name in ("50", "99")}
        rate = re.search(r"Requests/sec:\s*([\d.]+)", text)
        if not rate:
            raise bench.BenchError(text)
        units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
        waits = {f"{name} %": float(m[1]) * units[m[2]] for name, m in share.items() if m}
        return {"requests/s": float(rate[1]), **waits}

    return collect("clients", sizes, measure)


# === Reports ===


def series_table(series: Series) -> str:
    """A table of what was measured by size, with how much more the largest takes than the smallest."""
    lines = [
        [name, *(f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in values), ratio(values)]
        for name, values in series.figures.items()
    ]
    return table([series.title, *(f"{size:,}" for size in series.sizes), "last ÷ first"], lines)


def ratio(values: Sequence[float]) -> str:
    return f"{values[-1] / values[0]:.2f}" if values[0] else "-"


WIDTH, HEIGHT, MARGIN, LEGEND = 460, 340, 60, 100
COLOURS = ("#1b6ca8", "#c44536", "#3a7d44", "#7b4fa3", "#b07d12")


def draw(series: Series, left: int) -> str:
    """One panel of the picture, both of its axes logarithmic."""
    values = [value for line in series.figures.values() for value in line if value > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = math.log10(series.sizes[0]), math.log10(series.sizes[-1]) or 1

    def place(size: float, value: float) -> tuple[float, float]:
        across = (math.log10(size) - first) / ((last - first) or 1)
        up = (math.log10(max(value, 10**low)) - low) / ((high - low) or 1)
        x = left + MARGIN + across * (WIDTH - 2 * MARGIN)
        return round(x, 1), round(HEIGHT - MARGIN - up * (HEIGHT - MARGIN - LEGEND), 1)

    parts = [f'<text x="{left + WIDTH // 2}" y="20" text-anchor="middle">{series.title}</text>']
    for power in range(low, high + 1):
        x, y = place(series.sizes[0], 10**power)
        parts.append(f'<path d="M{x} {y}H{left + WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for size in series.sizes:
        x, y = place(size, 10**low)
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{size:,}</text>')
    for number, (name, line) in enumerate(series.figures.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join("{},{}".format(*place(*pair)) for pair in zip(series.sizes, line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = 36 + 13 * number
        parts.append(f'<text x="{left + MARGIN + 4}" y="{y}" fill="{colour}">{name}</text>')
    return "\n".join(parts)


def picture(measured: list[Series]) -> str:
    """All of the panels beside one another, as SVG; times in milliseconds."""
    width = WIDTH * len(measured)
    panels = "\n".join(draw(series, WIDTH * number) for number, series in enumerate(measured))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}"'
        f' font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{panels}\n</svg>\n'
    )


# === Command line ===


def powers(first: int, last: int) -> list[int]:
    return [10**power for power in range(first, last + 1)]


def run(directory: Path, *, quick: bool) -> list[Series]:
    """Grow one store for each series."""
    bench.copy_source(directory)
    less = 2 if quick else 0
    measured = []
    for work, sizes in (
        (tags, powers(3, 6 - less)),
        (repositories, powers(2, 5 - less)),
        (blobs, powers(4 - less // 2, 6 - less)),
    ):
        grower = Grower(directory)
        measured.append(work(grower, sizes))
        shutil.rmtree(grower.server.root)
    (directory / "users").write_text("")
    (directory / "grants").write_text("anonymous mine/** pull,push\nanonymous growth/** pull,push\n")
    rights = ("--users", str(directory / "users"), "--grants", str(directory / "grants"))
    for work, sizes, options in (
        (manifests, [4 * 10**3, 4 * 10 ** (6 - less)], ()),
        (referrers, [10**3, 10 ** (6 - less)], ()),
        (grants, [10**3, 10 ** (6 - less)], rights),
    ):
        grower = Grower(directory, "--no-sync", *options)
        measured.append(work(grower, sizes))
        shutil.rmtree(grower.server.root)
    if program("wrk"):
        crowd = [1, 4, 16, 64, 256]
        measured.append(clients(Grower(directory), crowd, 1 if quick else 3))
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="stop at smaller sizes")
    parser.add_argument("directory", nargs="?", metavar="DIRECTORY", help="where the picture goes")
    options = parser.parse_args()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="registry-growth-") as directory:
        print(report_machine(Path(directory)) + "\n")
        measured = run(Path(directory), quick=options.quick)
    print("Times in milliseconds.\n")
    for series in measured:
        print(series_table(series) + "\n")
    target = Path(options.directory or tempfile.mkdtemp(prefix="registry-growth-"))
    target.mkdir(parents=True, exist_ok=True)
    (target / "growth.svg").write_text(picture(measured))
    print(f"Drawn in {target / 'growth.svg'}")
    excess = [line for series in measured for line in series.excess()]
    for line in excess:
        print(f"more than doubled: {line}")
    return bool(excess)


if __name__ == "__main__":
    sys.exit(main())
