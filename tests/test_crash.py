"""A registry that is killed, or cannot commit, loses nothing it acknowledged and shows nothing half done.

Every scenario is run once to count its steps, and then for each k against a registry that ends itself at the
k-th, or that goes on living after a commit that failed there. Then the client makes the same requests again.
All that twice: once with a second repository that holds the same contents. By default only some k are tried;
REGISTRY_CRASH_SWEEP=full tries every one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
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
from tests.crashing import KILLED, LOCKED
from tests.scenarios import Actor, Interrupted, Ledger, Session
from tests.steps import DATABASE
from tests.support import MEMORY, ROOT, TIMEOUT, Client, DataDirectory, HTTPTestCase, digest_of

FULL = os.environ.get("REGISTRY_CRASH_SWEEP") == "full"
TELLING, OTHERS = 90, 25  # crash points tried when not all are
WORKERS = 2


class Outcome(NamedTuple):
    """How a registry's process ended."""

    steps: list[str]  # the kinds of the steps it came to
    struck: bool  # whether the fault came
    status: int


class Launcher:
    """Starts registries that end themselves; one at a time."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "tests/crashing.py")]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self._outcome: Outcome | None = None

    def start(
        self,
        data: Path,
        step: int = 0,
        fault: str = KILLED,
        *,
        whole: bool = False,
        command: list[str] | None = None,
    ) -> Client | None:
        """Start one; None if it ended before it served."""
        self._outcome = None
        job = {"data": str(data), "step": step, "fault": fault, "whole": whole, "command": command}
        self._tell(json.dumps(job))
        reply = json.loads(self._process.stdout.readline())
        if "host" in reply:
            return Client(reply["host"], scenarios.REPOSITORY)
        self._outcome = Outcome(**reply)
        return None

    def disarm(self) -> None:
        """Count no more steps of the registry that serves, and let no fault come."""
        self._tell("disarm")
        self._process.stdout.readline()

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
    """What is struck in the middle."""

    name: str
    scenario: scenarios.Scenario | None = None
    whole: bool = False  # starting is part of it
    empty: bool = False  # nothing was there before
    command: tuple[str, ...] = ()  # run instead of a daemon
    alter: Callable[[Path], None] | None = None  # done to the data directory first
    racing: bool = False  # its steps come in any order and number
    mirrored: bool = False  # another repository holds the same contents
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
        """Do again what a command was struck in the middle of."""
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

ALONE = (
    *(Case(scenario.__name__, scenario) for scenario in scenarios.SCENARIOS),
    Case("pushes at once", scenarios.pushes_at_once, racing=True),
)
CASES = (
    *ALONE,
    *(case._replace(name=f"{case.name}, mirrored", mirrored=True) for case in ALONE),
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


class Point(NamedTuple):
    """What is struck, at which step, and by what."""

    case: Case
    step: int = 0
    kind: str = ""  # of the step
    fault: str = KILLED


MIRROR = "mirror/app"


class CrashTestCase(HTTPTestCase):
    """Kills registries and looks at what they leave behind."""

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)))
        cls.launchers: queue.SimpleQueue[Launcher] = queue.SimpleQueue()
        for _ in range(WORKERS):
            launcher = Launcher()
            stack.callback(launcher.close)
            cls.launchers.put(launcher)
        cls.base, cls.mirrored = cls.directory / "base", cls.directory / "mirrored"
        ledger = Ledger({})
        with registry.Registry(cls.base, sync=False) as prepared:
            actor = Actor(Client(prepared.netloc, scenarios.REPOSITORY), ledger)
            scenarios.prepare(actor)
            actor.append(actor.open_session(scenarios.content("given up")), 1000)
        cls.facts, cls.given_up = ledger.known, DataDirectory(str(cls.base)).unfinished()
        cls.prepare_mirror(blobs(ledger))
        for data in (cls.base, cls.mirrored):
            upkeep.everything(data, upkeep.HOUR)  # so that each HEAD renews a lease, which is a step
            (data / "reserve").touch()  # spares each registry writing one
        cls.failures: list[str] = []

    @classmethod
    def prepare_mirror(cls, contents: dict[str, bytes]) -> None:
        """A copy in which another repository holds all these, and whatever the scenarios push."""
        touched = {}
        for case in ALONE:
            with tempfile.TemporaryDirectory(dir=cls.directory) as name:
                data = shutil.copytree(cls.base, Path(name) / "data")
                with registry.Registry(data, sync=False) as running:
                    ledger = play(case, Client(running.netloc, scenarios.REPOSITORY), {})
                contents.update(blobs(ledger))
                touched[case.scenario] = ledger.touched & set(contents)
        shutil.copytree(cls.base, cls.mirrored)
        with registry.Registry(cls.mirrored, sync=False) as running:
            client = Client(running.netloc, MIRROR)
            for digest, content in contents.items():
                client.push_blob(content, digest.partition(":")[0])
        cls.mirror = {
            scenario: {f"/v2/{MIRROR}/blobs/{digest}": contents[digest] for digest in digests}
            for scenario, digests in touched.items()
        }

    @contextlib.contextmanager
    def launcher(self) -> Iterator[Launcher]:
        launcher = self.launchers.get(timeout=60 * TIMEOUT)
        try:
            yield launcher
        finally:
            launcher.end()
            self.launchers.put(launcher)

    def run_point(self, point: Point) -> Outcome:
        """Run a case until the fault comes at a step, or to its end for 0, and check what is there then."""
        with tempfile.TemporaryDirectory(dir=self.directory) as name, self.launcher() as launcher:
            try:
                return self.strike(point, launcher, Path(name) / "data")
            except Exception as error:
                reason = str(error).partition("\n")[0] or repr(error)
                self.failures.append(
                    f"{point.case.name}: {point.fault} before step {point.step}, {point.kind}: {reason}"
                )
                return Outcome([], True, 0)

    def strike(self, point: Point, launcher: Launcher, data: Path) -> Outcome:
        case = point.case
        if not case.empty:
            shutil.copytree(self.mirrored if case.mirrored else self.base, data)
        if case.alter:
            case.alter(data)
        mirror = self.mirror[case.scenario] if case.mirrored else {}
        client = launcher.start(data, point.step, point.fault, **case.arguments(data))
        ledger = play(case, client, case.facts({**self.facts, **mirror}))
        if client and point.fault == LOCKED:
            launcher.disarm()
            self.assert_recovery(case, client, data, ledger)
            return launcher.end()
        outcome = launcher.end()
        client = launcher.start(data)
        if client is None:
            self.fail(f"did not start again: {launcher.end()}")
        self.assert_recovery(case, client, data, ledger)
        return outcome

    # --- What must hold after any fault

    def assert_recovery(self, case: Case, client: Client, data: Path, ledger: Ledger) -> None:
        with client.keep_alive() as kept, upkeep.opened(data) as store:
            case.complete(store)
            self.assert_sound(data, ledger)
            self.assert_undamaged(store, ledger)
            self.assert_acknowledged(kept, ledger)
            self.assert_all_or_nothing(kept, ledger)
            self.assert_whole_images(kept)
            for session in ledger.sessions:
                self.assert_kept(kept, session)
            if case.scenario:  # the client makes the request that had no answer again, and goes on to the end
                ledger = ledger.again(functools.partial(self.assert_undamaged, store, ledger))
                case.scenario(Actor(kept, ledger))
            self.assertEqual(upkeep.verify(store), [])
            self.assert_acknowledged(kept, ledger)
            upkeep.everything(data, upkeep.DAY)
            upkeep.collect(store)
            self.assertEqual(upkeep.verify(store), [])
            self.assert_sound(data, ledger)
            self.assert_whole_images(kept)

    def assert_sound(self, data: Path, ledger: Ledger) -> None:
        """Database and disk agree, but for what requests without an answer may have left to be cleared up."""
        self.assertEqual(DataDirectory(data).disagreements(strays=ledger.unsettled), [])
        sessions = {session.location.rpartition("/")[2] for session in ledger.sessions}
        strangers = set(DataDirectory(data).unfinished()) - set(self.given_up) - sessions
        self.assertLessEqual(len(strangers), max(len(ledger.forks), 1))

    def assert_undamaged(self, store: registry.Store, ledger: Ledger) -> None:
        """Every row has its file, with the right bytes, also while others push."""
        leftover = [("unreferenced", digest) for digest in ledger.unsettled]
        self.assertEqual([finding for finding in upkeep.verify(store) if finding not in leftover], [])

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

    def assert_kept(self, client: Client, session: Session) -> None:
        """An upload has what was acknowledged, and no more than was sent, unless it was being closed."""
        if not session.open:
            return
        status = client.get(session.location)
        if session.closing and status.status == 404:
            return
        self.assertEqual(status.status, 204, status)
        self.assertGreaterEqual(scenarios.offset(status), session.acknowledged)
        self.assertLessEqual(scenarios.offset(status), session.sent)


def play(case: Case, client: Client | None, facts: scenarios.Facts) -> Ledger:
    """Play a case's scenario until it is interrupted, if it has one, and the registry serves."""
    ledger = Ledger(facts)
    if client and case.scenario:
        with client.keep_alive() as kept, contextlib.suppress(Interrupted):
            case.scenario(Actor(kept, ledger))
    return ledger


def blobs(ledger: Ledger) -> dict[str, bytes]:
    """The blobs that a client may rely on, by digest."""
    found = {path.rpartition("/")[2]: content for path, content in ledger.known.items() if "/blobs/" in path}
    found = {digest: content for digest, content in found.items() if content is not None}
    for fork in ledger.forks:
        found.update(blobs(fork))
    return found


def observe(client: Client, path: str) -> bytes | None:
    response = client.get(path)
    if response.status not in (200, 404):
        raise AssertionError(response)
    return response.body if response.status == 200 else None


def crash_points(case: Case, steps: list[str]) -> tuple[list[Point], list[Point]]:
    """What may happen at each step of a case: right after something became visible, and elsewhere."""
    telling, others = [], []
    for number, kind in enumerate(steps, 1):
        if kind != "begin":
            visible = number > 1 and steps[number - 2] in ("commit", "link", "rename")
            (telling if visible else others).append(Point(case, number, kind, KILLED))
        if kind in DATABASE:
            (telling if case.mirrored else others).append(Point(case, number, kind, LOCKED))
    return telling, others


def choose(points: list[Point], count: int) -> list[Point]:
    """As many of them as there is time for, the same ones in every run."""
    return points if FULL else points[:: -(-len(points) // count)]


class Crash(CrashTestCase):
    def test_no_crash_loses_what_was_acknowledged_or_shows_what_is_half_done(self) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            complete = list(pool.map(self.run_point, map(Point, CASES)))
            split = [crash_points(case, outcome.steps) for case, outcome in zip(CASES, complete)]
            telling = [point for points, _ in split for point in points]
            others = [point for _, points in split for point in points]
            chosen = choose(telling, TELLING) + choose(others, OTHERS)
            outcomes = list(pool.map(self.run_point, chosen))
        tried = [point for point, outcome in zip(chosen, outcomes) if outcome.struck]
        kinds = Counter(kind for outcome in complete for kind in outcome.steps)
        print(f"crash points: {len(tried)} tried of {len(telling + others)}: {dict(kinds.most_common())}")
        if self.failures:
            self.fail(f"{len(self.failures)} crash points:\n" + "\n".join(self.failures))
        missed = [point for point in chosen if point not in tried and not point.case.racing]
        self.assertEqual(missed, [], "were to be struck and were not")
        self.assertGreaterEqual(len(telling + others), 10 * len(CASES))


if __name__ == "__main__":
    unittest.main()
