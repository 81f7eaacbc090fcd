"""A registry that is killed at any durable step loses nothing it acknowledged and shows nothing half done.

Every scenario is run once to count its steps, and then for each k against a registry that ends itself at the
k-th. By default only some k are tried; REGISTRY_CRASH_SWEEP=full tries every one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple

import registry
from tests import scenarios, upkeep
from tests.scenarios import Actor, Died, Ledger, Session
from tests.support import ROOT, TIMEOUT, Client, DataDirectory, HTTPTestCase, digest_of, with_digest

FULL = os.environ.get("REGISTRY_CRASH_SWEEP") == "full"
SAMPLE = 160  # crash points tried when not all are
WORKERS = 2
SESSION_ID = re.compile(r"[0-9a-f]{32}-sha(256|512)-[0-9a-f]{16}")


class Outcome(NamedTuple):
    """How a registry's process ended."""

    steps: list[str]  # the kinds of the steps it came to
    died: bool  # by its own hand
    status: int


class Launcher:
    """Starts registries that end themselves; one at a time."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "tests/crashing.py")]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self._outcome: Outcome | None = None

    def start(
        self, data: Path, step: int = 0, *, whole: bool = False, command: list[str] | None = None
    ) -> Client | None:
        """Start one; None if it ended before it served."""
        self._outcome = None
        job = {"data": str(data), "step": step, "whole": whole, "command": command}
        self._tell(json.dumps(job))
        reply = json.loads(self._process.stdout.readline())
        if "host" in reply:
            return Client(reply["host"], scenarios.REPOSITORY)
        self._outcome = Outcome(**reply)
        return None

    def end(self) -> Outcome:
        """Kill the registry unless it is dead, and say how it ended."""
        if self._outcome is None:
            self._tell("")
            self._outcome = Outcome(**json.loads(self._process.stdout.readline()))
        return self._outcome

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(TIMEOUT)
        self._process.stdout.close()

    def _tell(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


class Case(NamedTuple):
    """What is killed in the middle."""

    name: str
    scenario: scenarios.Scenario | None = None
    whole: bool = False  # starting is part of it
    empty: bool = False  # nothing was there before
    command: tuple[str, ...] = ()  # run instead of a daemon
    alter: Callable[[Path], None] | None = None  # done to the data directory first
    racing: bool = False  # its steps come in any order and number
    forsaken: tuple[bytes, ...] = ()  # contents that may be gone afterwards, and must be once it is done

    def arguments(self, data: Path) -> dict[str, Any]:
        command = [*self.command, "--data", str(data)] if self.command else None
        return {"whole": self.whole, "command": command}

    def facts(self, known: scenarios.Facts) -> scenarios.Facts:
        """What the registry promises before and after."""
        lost = [digest_of(content) for content in self.forsaken]
        kept = {path: content for path, content in known.items() if path.rpartition("/")[2] not in lost}
        return {} if self.empty else kept

    def complete(self, store: registry.Store) -> None:
        """Do again what a command was killed in the middle of."""
        if "gc" in self.command:
            upkeep.collect(store, untagged_after=7 * upkeep.DAY)
        if "verify" in self.command:
            upkeep.verify(store, repair=True)


def age_uploads(data: Path) -> None:
    """Make every upload one that its client has given up."""
    long_ago = time.time() - 30 * upkeep.DAY
    for path in (data / "uploads").iterdir():
        os.utime(path, (long_ago, long_ago))


def age_everything(data: Path) -> None:
    """Let garbage be old enough to be collected."""
    upkeep.everything(data, 30 * upkeep.DAY)


def damage(data: Path) -> None:
    """Cut one file short and change a bit of another."""
    for content, changed in ((scenarios.LOOSE, b"short"), (scenarios.FOREIGN, scenarios.FOREIGN[:-1] + b"?")):
        (data / "blobs" / digest_of(content).replace(":", "/")).write_bytes(changed)


UNNEEDED = (scenarios.LOOSE, scenarios.FOREIGN)
UNTAGGED = (scenarios.UNTAGGED.body, *scenarios.UNTAGGED.blobs)

CASES = (
    *(Case(scenario.__name__, scenario) for scenario in scenarios.SCENARIOS),
    Case("pushes at once", scenarios.pushes_at_once, racing=True),
    Case("first start", whole=True, empty=True),
    Case("first push", scenarios.single_post, whole=True, empty=True),
    Case("start with given-up uploads", whole=True, alter=age_uploads),
    Case(
        "gc",
        command=("gc", "--untagged-after", "7d"),
        alter=age_everything,
        forsaken=(*UNNEEDED, *UNTAGGED, scenarios.SHARED),
    ),
    Case("verify --repair", command=("verify", "--repair"), alter=damage, forsaken=UNNEEDED),
)


Point = tuple[Case, int]  # and the step before which it is killed


def memory_directory() -> str | None:
    """Where files cost least: a killed process loses nothing that is in memory."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class CrashTestCase(HTTPTestCase):
    """Kills registries and looks at what they leave behind."""

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory_directory())))
        cls.launchers: queue.SimpleQueue[Launcher] = queue.SimpleQueue()
        for _ in range(WORKERS):
            launcher = Launcher()
            stack.callback(launcher.close)
            cls.launchers.put(launcher)
        cls.base = cls.directory / "base"
        with registry.Registry(cls.base, sync=False) as prepared:
            ledger = Ledger({})
            actor = Actor(Client(prepared.netloc, scenarios.REPOSITORY), ledger)
            scenarios.prepare(actor)
            actor.append(actor.open_session(scenarios.content("given up")), 1000)
        upkeep.everything(cls.base, upkeep.HOUR)  # so that each HEAD renews a lease, which is a step
        (cls.base / "reserve").touch()  # spares each registry writing one
        cls.facts = ledger.known
        cls.failures: list[str] = []

    @contextlib.contextmanager
    def launcher(self) -> Iterator[Launcher]:
        launcher = self.launchers.get(timeout=60 * TIMEOUT)
        try:
            yield launcher
        finally:
            launcher.end()
            self.launchers.put(launcher)

    def run_case(self, case: Case, step: int) -> Outcome:
        """Run a case until its k-th step, or to its end for 0, and check what is there afterwards."""
        with tempfile.TemporaryDirectory(dir=self.directory) as name, self.launcher() as launcher:
            data, ledger = Path(name) / "data", Ledger(case.facts(self.facts))
            if not case.empty:
                shutil.copytree(self.base, data)
            if case.alter:
                case.alter(data)
            client = launcher.start(data, step, **case.arguments(data))
            if client and case.scenario:
                with client.keep_alive() as kept, contextlib.suppress(Died):
                    case.scenario(Actor(kept, ledger))
            outcome = launcher.end()
            try:
                self.assert_recovery(case, launcher, data, ledger)
            except Exception as error:
                reason = str(error).partition("\n")[0] or repr(error)
                self.failures.append(f"{case.name}, step {step} of {' '.join(outcome.steps)}: {reason}")
            return outcome

    # --- What must hold after any crash

    def assert_recovery(self, case: Case, launcher: Launcher, data: Path, ledger: Ledger) -> None:
        client = launcher.start(data)
        if client is None:
            self.fail(f"did not start again: {launcher.end()}")
        with client.keep_alive() as kept, upkeep.opened(data) as store:
            case.complete(store)
            self.assert_sound(DataDirectory(str(data)))
            self.assert_verified(store)
            self.assert_acknowledged(kept, ledger)
            self.assert_all_or_nothing(kept, ledger)
            self.assert_whole_images(kept)
            for session in list(ledger.sessions):
                self.assert_resumable(kept, session, ledger)
            if case.scenario:
                self.assert_works(case, kept, ledger)
            upkeep.everything(data, upkeep.DAY)
            upkeep.collect(store)
            self.assert_verified(store)
            self.assert_sound(DataDirectory(str(data)))
            self.assert_whole_images(kept)

    def assert_sound(self, data: DataDirectory) -> None:
        """Database and disk agree, and nothing is left of requests that came to nothing."""
        self.assertEqual(data.rows("PRAGMA integrity_check"), [("ok",)])
        self.assertEqual(data.rows("PRAGMA foreign_key_check"), [])
        files, recorded = data.files(), data.recorded()
        self.assertEqual({digest: files.get(digest) for digest in recorded}, recorded)
        self.assertEqual([name for name in data.unfinished() if not SESSION_ID.fullmatch(name)], [])

    def assert_verified(self, store: registry.Store) -> None:
        """Nothing is wrong. A file that was named when the crash came and has no row yet takes up room."""
        self.assertEqual([found for found in upkeep.verify(store) if found[0] != "unreferenced"], [])

    def assert_acknowledged(self, client: Client, ledger: Ledger) -> None:
        for path, content in ledger.known.items():
            if path not in ledger.pending:
                self.assertEqual(observe(client, path), content, path)
        for fork in ledger.forks:
            self.assert_acknowledged(client, fork)

    def assert_all_or_nothing(self, client: Client, ledger: Ledger) -> None:
        """What the last request would have changed is as it was, or all as it would have become."""
        seen = {path: observe(client, path) for path in ledger.pending}
        before = {path: ledger.known.get(path) for path in ledger.pending}
        self.assertIn(seen, (before, ledger.pending))
        for fork in ledger.forks:
            self.assert_all_or_nothing(client, fork)

    def assert_whole_images(self, client: Client) -> None:
        """Whatever a tag points at can be pulled."""
        for name in client.expect(200, "GET", "/v2/_catalog").json["repositories"]:
            for tag in client.expect(200, "GET", f"/v2/{name}/tags/list").json["tags"]:
                manifest = client.expect(200, "GET", f"/v2/{name}/manifests/{tag}").json
                children = [manifest.get("config"), *manifest.get("layers", manifest.get("manifests"))]
                for child in filter(None, children):
                    client.expect(200, "HEAD", f"/v2/{name}/blobs/{child['digest']}")

    def assert_resumable(self, client: Client, session: Session, ledger: Ledger) -> None:
        """The upload goes on from where the registry says that it is."""
        if not session.open:
            return
        status = client.get(session.location)
        if session.closing and status.status == 404:
            return
        self.assertEqual(status.status, 204, status)
        last = int(status.headers["Range"].partition("-")[2])
        size = last + 1 if last else 0
        self.assertGreaterEqual(size, session.acknowledged)
        self.assertLessEqual(size, session.sent)
        if size < len(session.content):
            where = {"Content-Range": f"{size}-{len(session.content) - 1}"}
            client.expect(202, "PATCH", session.location, session.content[size:], where)
        client.expect(201, "PUT", with_digest(session.location, session.digest))
        path = client.path(f"blobs/{session.digest}")
        self.assertEqual(observe(client, path), session.content)
        ledger.known[path] = session.content

    def assert_works(self, case: Case, client: Client, ledger: Ledger) -> None:
        """The client that was cut short tries once more and gets what it wants."""
        retried = Ledger({})
        case.scenario(Actor(client, retried, again=True))
        self.assert_acknowledged(client, retried)


def observe(client: Client, path: str) -> bytes | None:
    response = client.get(path)
    if response.status not in (200, 404):
        raise AssertionError(response)
    return response.body if response.status == 200 else None


def crash_points(case: Case, steps: list[str]) -> tuple[list[Point], list[Point]]:
    """Every step of a case: those right after something became visible, and the others."""
    visible = [
        number + 1 for number, kind in enumerate(steps[:-1], 1) if kind in ("commit", "link", "rename")
    ]
    others = [number for number in range(1, len(steps) + 1) if number not in visible]
    return [(case, number) for number in visible], [(case, number) for number in others]


def choose(telling: list[Point], others: list[Point]) -> list[Point]:
    """All that are telling, and of the others as many as there is time for, the same ones in every run."""
    stride = 1 if FULL else -(-len(others) // max(SAMPLE - len(telling), 1))
    return telling + others[::stride]


class Crash(CrashTestCase):
    def test_no_crash_loses_what_was_acknowledged_or_shows_what_is_half_done(self) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            complete = list(pool.map(self.run_case, CASES, [0] * len(CASES)))
            split = [crash_points(case, outcome.steps) for case, outcome in zip(CASES, complete)]
            telling = [point for points, _ in split for point in points]
            others = [point for _, points in split for point in points]
            chosen = choose(telling, others)
            outcomes = list(pool.map(lambda point: self.run_case(*point), chosen))
        tried = [point for point, outcome in zip(chosen, outcomes) if outcome.died]
        kinds = Counter(kind for outcome in complete for kind in outcome.steps)
        print(f"crash points: {len(tried)} tried of {len(telling + others)}: {dict(kinds.most_common())}")
        missed = [(case.name, step) for case, step in chosen if (case, step) not in tried and not case.racing]
        self.assertEqual(missed, [], "were to be killed and were not")
        if self.failures:
            self.fail(f"{len(self.failures)} crash points:\n" + "\n".join(self.failures))
        self.assertGreaterEqual(len(telling + others), 10 * len(CASES))


if __name__ == "__main__":
    unittest.main()
