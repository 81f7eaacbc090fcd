"""A soak: pushers that share layers, pullers, deleters and a collector, all at once, and nothing may fail.

    python tests/soak.py [--seconds 60] [--daemons 1|2] [--collector command|daemon|none]

Prints totals; exits 1 after any failure. Clients behave as docker does: a layer the registry has is not sent.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.daemon import Daemon, held, held_at_rest, memory, python
from tests.support import (
    OCI_CONFIG,
    TIMEOUT,
    Client,
    DataDirectory,
    RawConnection,
    Response,
    descriptor,
    digest_of,
    encode,
    image_index,
    image_manifest,
    wait_until,
    with_digest,
)

GRACE = 10.0  # seconds; the shortest that the registry accepts
POLICY = ("--grace", "10s", "--untagged-after", "10s")
REPOSITORIES = ("team/web", "team/api", "shop", "shop/cart")
TAGS_OF_PUSHER = 6
REMEMBERED = 20_000  # images
FAILURE_LIMIT = 20
MARGIN = 1.0  # of the grace, for what the harness itself takes
SLOW_PUSHES = 0.2  # part of all, whose clients rely for some time on what they were told
DAWDLE = 6.0  # seconds at most


class Failure(Exception):
    """The registry did what it must not."""


class Picture:
    """An image or index as pushed to one repository."""

    def __init__(self, repository: str, body: bytes, blobs: tuple[bytes, ...], children: tuple = ()) -> None:
        self.repository = repository
        self.body = body
        self.digest = digest_of(body)
        self.blobs = blobs
        self.children: tuple[Picture, ...] = children
        self.pinned = False
        self.pushed = 0.0  # when the last push of it began
        self.endangered = 0.0  # when something last happened that may take it away
        self.deleting = 0  # requests under way that do

    def may_be_gone(self, since: float) -> bool:
        return not self.pinned and (self.deleting > 0 or self.endangered >= since)


class Holding(NamedTuple):
    """What a tag points at."""

    repository: str
    tag: str
    picture: Picture
    since: float  # when the push began that made it so


class Book:
    """What all clients together know of the registry. Bounded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tags: dict[tuple[str, str], Holding] = {}
        self.deleting: Counter[tuple[str, str]] = Counter()  # tags, by requests under way
        self.deleted: dict[tuple[str, str], float] = {}  # tags, and when that was last answered
        self.pictures: OrderedDict[tuple[str, str], Picture] = OrderedDict()

    def begin_push(self, picture: Picture, tag: str) -> None:
        """Whatever the tag pointed at is no longer held by it."""
        with self.lock:
            for each in (picture, *picture.children):
                each.pushed = time.monotonic()
                self.pictures[each.repository, each.digest] = each
            replaced = self.tags.get((picture.repository, tag))
            if replaced and replaced.picture is not picture:
                self._endanger(replaced.picture)
            while len(self.pictures) > REMEMBERED:
                self.pictures.popitem(last=False)

    def end_push(self, picture: Picture, tag: str) -> None:
        with self.lock:
            key = picture.repository, tag
            self.tags[key] = Holding(picture.repository, tag, picture, picture.pushed)
            if self._tag_may_be_gone(*key, picture.pushed):
                self._endanger(picture)

    @contextlib.contextmanager
    def delete(self, holding: Holding) -> Iterator[None]:
        """A request that may hit what the tag points at by then."""
        key = holding.repository, holding.tag
        with self.lock:
            self._endanger(holding.picture, 1)
            self.deleting[key] += 1
        try:
            yield
        finally:
            with self.lock:
                self._endanger(holding.picture, -1)
                self.deleting[key] -= 1
                self.deleted[key] = time.monotonic()
                if key in self.tags:
                    self._endanger(self.tags[key].picture)

    def may_be_gone(self, holding: Holding) -> bool:
        """Whether somebody may have deleted the tag, or what it pointed at, since it was pushed."""
        with self.lock:
            gone = self._tag_may_be_gone(holding.repository, holding.tag, holding.since)
            return gone or holding.picture.may_be_gone(holding.since)

    def _tag_may_be_gone(self, repository: str, tag: str, since: float) -> bool:
        key = repository, tag
        return self.deleting[key] > 0 or self.deleted.get(key, 0.0) >= since

    def forget(self, holding: Holding) -> None:
        """The tag is gone, unless it was pushed again."""
        with self.lock:
            if self.tags.get((holding.repository, holding.tag)) is holding:
                del self.tags[holding.repository, holding.tag]

    @staticmethod
    def _endanger(picture: Picture, deletes: int = 0) -> None:
        for each in (picture, *picture.children):
            each.endangered = time.monotonic()
            each.deleting += deletes

    def some_tag(self, choice: random.Random) -> Holding | None:
        with self.lock:
            return choice.choice(list(self.tags.values())) if self.tags else None


class Soak:
    """One run: its daemons, its clients, what they counted and what went wrong."""

    def __init__(self, daemons: list[Daemon], seconds: float) -> None:
        self.daemons = daemons
        self.deadline = time.monotonic() + seconds
        self.book = Book()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = 0.0
        self.layers = [random.Random(n).randbytes(1 << (10 + n % 10)) for n in range(48)]
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def count(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[what] += amount

    def fail(self, reason: str) -> None:
        with self._lock:
            self.failures.append(reason)
            if len(self.failures) >= FAILURE_LIMIT:
                self.stop.set()

    @property
    def over(self) -> bool:
        return self.stop.is_set() or time.monotonic() > self.deadline


class Worker(threading.Thread):
    """One client: takes turns until the run is over."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(name=f"{type(self).__name__} {number}", daemon=True)
        self.soak = soak
        self.book = soak.book
        self.number = number
        self.random = random.Random(f"{self.name}")

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            hosts = [daemon.client.host for daemon in self.soak.daemons]
            self.clients = [stack.enter_context(Client(host).keep_alive()) for host in hosts]
            while not self.soak.over:
                try:
                    self.turn()
                except Failure as failure:
                    self.soak.fail(f"{self.name}: {failure}")
                except Exception:
                    self.soak.fail(f"{self.name}: {traceback.format_exc()}")

    def turn(self) -> None:
        """What the client does over and over."""
        raise NotImplementedError

    def ask(self, method: str, path: str, body: Any = None, headers: Any = ()) -> Response:
        """A request to any of the daemons."""
        started = time.monotonic()
        response = self.random.choice(self.clients).request(method, path, body, headers)
        self.soak.slowest = max(self.soak.slowest, time.monotonic() - started)
        self.soak.count("requests")
        if response.status >= 500:
            raise Failure(str(response))
        return response

    def expect(self, *statuses: int, method: str, path: str, body: Any = None, headers: Any = ()) -> Response:
        response = self.ask(method, path, body, headers)
        if response.status not in statuses:
            raise Failure(f"expected {statuses}: {response}")
        return response


class Pusher(Worker):
    """Pushes new images, indexes, and older images again, to tags of its own."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(soak, number)
        self.numbers = itertools.count()
        self.pushed: deque[Picture] = deque(maxlen=30)

    def run(self) -> None:
        try:
            self.pin()
        except Exception:
            self.soak.fail(f"{self.name}: {traceback.format_exc()}")
        super().run()

    def pin(self) -> None:
        """Push an image that nobody takes away, and a signature that lives because it does."""
        self.clients = [daemon.client for daemon in self.soak.daemons]
        picture = self.new_image(REPOSITORIES[self.number % len(REPOSITORIES)])
        subject = descriptor(picture.body, json.loads(picture.body)["mediaType"])
        signature = self.new_image(picture.repository, subject=subject)
        picture.pinned = signature.pinned = True
        self.push(picture, f"keep-{self.number}")
        self.push(signature, "")
        picture.children = (signature,)

    def turn(self) -> None:
        chance = self.random.random()
        if self.pushed and chance < 0.3:
            picture = self.random.choice(self.pushed)  # which may be gone, or be garbage by now
        else:
            repository = self.random.choice(REPOSITORIES)
            picture = self.new_index(repository) if chance < 0.45 else self.new_image(repository)
        self.push(picture, f"tag-{self.number}-{self.random.randrange(TAGS_OF_PUSHER)}")
        self.pushed.append(picture)

    def new_image(self, repository: str, **more: Any) -> Picture:
        layers = tuple(self.random.sample(self.soak.layers, self.random.randint(1, 4)))
        config = encode({"os": "linux", "pusher": self.number, "number": next(self.numbers)})
        manifest = image_manifest(descriptor(config, OCI_CONFIG), map(descriptor, layers), **more)
        return Picture(repository, encode(manifest), (config, *layers))

    def new_index(self, repository: str) -> Picture:
        children = tuple(self.new_image(repository) for _ in range(2))
        described = [descriptor(each.body, json.loads(each.body)["mediaType"]) for each in children]
        return Picture(repository, encode(image_index(described)), (), children)

    def push(self, picture: Picture, tag: str) -> None:
        self.book.begin_push(picture, tag)
        started = time.monotonic()
        try:
            for child in picture.children if not picture.pinned else ():
                self.push_parts(child, child.digest)
            self.push_parts(picture, tag or picture.digest)
        except Failure:
            if time.monotonic() - started < GRACE - MARGIN:
                raise
            self.soak.count("pushes slower than the grace that failed")
            return
        if tag:
            self.book.end_push(picture, tag)
        self.soak.count("pushes")

    def push_parts(self, picture: Picture, reference: str) -> None:
        for content in picture.blobs:
            self.push_blob(picture.repository, content)
        if self.random.random() < SLOW_PUSHES and not picture.pinned:
            self.soak.stop.wait(self.random.uniform(0.0, DAWDLE))
        kind = {"Content-Type": json.loads(picture.body)["mediaType"]}
        path = f"/v2/{picture.repository}/manifests/{reference}"
        self.expect(201, method="PUT", path=path, body=picture.body, headers=kind)

    def push_blob(self, repository: str, content: bytes) -> None:
        digest = digest_of(content)
        if self.expect(200, 404, method="HEAD", path=f"/v2/{repository}/blobs/{digest}").status == 200:
            self.soak.count("layers that were there")
            return
        uploads = f"/v2/{repository}/blobs/uploads/"
        how = self.random.choice((self.post, self.post_and_put, self.post_and_patch, self.mount))
        how(uploads, content, digest)
        self.soak.count("layers sent")

    def post(self, uploads: str, content: bytes, digest: str) -> None:
        self.expect(201, method="POST", path=f"{uploads}?digest={digest}", body=content)

    def post_and_put(self, uploads: str, content: bytes, digest: str) -> None:
        self.finish(self.expect(202, method="POST", path=uploads), content, digest)

    def post_and_patch(self, uploads: str, content: bytes, digest: str) -> None:
        session = self.expect(202, method="POST", path=uploads)
        half = len(content) // 2
        pieces = iter([content[:half], content[half:]])
        session = self.expect(202, method="PATCH", path=session.headers["Location"], body=pieces)
        self.finish(session, b"", digest)

    def mount(self, uploads: str, content: bytes, digest: str) -> None:
        source = self.random.choice(REPOSITORIES)
        path = f"{uploads}?mount={digest}&from={source}"
        session = self.expect(201, 202, method="POST", path=path)
        if session.status == 202:
            self.finish(session, content, digest)

    def finish(self, session: Response, content: bytes, digest: str) -> None:
        location = with_digest(session.headers["Location"], digest)
        self.expect(201, method="PUT", path=location, body=content)


class Puller(Worker):
    """Pulls what some tag points at. Only what somebody takes away may be missing."""

    def turn(self) -> None:
        chosen = self.book.some_tag(self.random)
        if not chosen:
            time.sleep(0.01)  # until the first push is done
            return
        path = f"/v2/{chosen.repository}/manifests/{chosen.tag}"
        head = self.expect(200, 404, method="HEAD", path=path)
        if head.status == 200:
            self.pull(chosen.repository, head.headers["Docker-Content-Digest"])
        elif not self.book.may_be_gone(chosen):
            raise Failure(f"a tag is gone that nobody deleted: {head}")
        else:
            self.book.forget(chosen)
        self.soak.count("pulls")

    def pull(self, repository: str, digest: str) -> None:
        picture = self.book.pictures.get((repository, digest))
        if picture is None:
            raise Failure(f"{repository} serves {digest}, which nobody pushed there")
        self.pull_picture(picture)
        if picture.pinned:
            children = picture.children  # before the request: what is pushed meanwhile need not be listed
            path = f"/v2/{repository}/referrers/{digest}"
            listed = self.expect(200, method="GET", path=path).json["manifests"]
            if children and [each["digest"] for each in listed] != [children[0].digest]:
                raise Failure(f"referrers of {digest} are {listed}")

    def pull_picture(self, picture: Picture) -> None:
        if not self.get(picture, f"manifests/{picture.digest}", picture.body):
            return
        for content in picture.blobs:
            self.get(picture, f"blobs/{digest_of(content)}", content)
        for child in picture.children:
            self.pull_picture(child)

    def get(self, picture: Picture, path: str, content: bytes) -> bool:
        response = self.expect(200, 404, method="GET", path=f"/v2/{picture.repository}/{path}")
        if response.status == 404:
            if not picture.may_be_gone(picture.pushed):
                raise Failure(f"gone, and nobody took it away: {response}")
            self.soak.count("pulls of what was deleted")
            return False
        if response.body != content:
            raise Failure(f"wrong bytes: {response}")
        self.soak.count("bytes pulled", len(content))
        return True


class Deleter(Worker):
    """Deletes tags and images, and makes blobs that nothing needs."""

    def turn(self) -> None:
        time.sleep(0.05)  # so that pushers stay ahead
        self.litter()
        chosen = self.book.some_tag(self.random)
        if not chosen or chosen.picture.pinned:
            return
        reference = self.random.choice((chosen.tag, chosen.picture.digest))
        path = f"/v2/{chosen.repository}/manifests/{reference}"
        with self.book.delete(chosen):
            deleted = self.expect(202, 404, 405, method="DELETE", path=path)
        self.soak.count("deletes" if deleted.status == 202 else "deletes of what was gone")

    def litter(self) -> None:
        content = self.random.randbytes(20_000)
        path = f"/v2/{self.random.choice(REPOSITORIES)}/blobs"
        digest = digest_of(content)
        self.expect(201, method="POST", path=f"{path}/uploads/?digest={digest}", body=content)
        if self.random.random() < 0.5:
            self.expect(202, method="DELETE", path=f"{path}/{digest}")


class Forger(Worker):
    """Sends good and evil bytes of one size to an upload session, by any daemon; some are refused."""

    def turn(self) -> None:
        time.sleep(0.02)  # so that pushers stay ahead
        good = self.random.randbytes(self.random.choice((10, 1000, 100_000)))
        repository = self.random.choice(REPOSITORIES)
        session = self.expect(202, method="POST", path=f"/v2/{repository}/blobs/uploads/")
        location, digest, content = session.headers["Location"], digest_of(good), b""
        while len(content) < len(good):
            piece = self.random.choice((good, good, good[::-1]))[len(content) :]
            piece = piece[: self.random.choice((len(piece), len(piece) // 2 + 1))]
            refused = self.random.random() < 0.5
            last = len(content) + len(piece) - (0 if refused else 1)
            headers = {"Content-Range": f"{len(content)}-{last}"}
            status = 400 if refused else 202
            self.expect(status, method="PATCH", path=location, body=iter([piece]), headers=headers)
            content += b"" if refused else piece
        right = content == good
        self.expect(201 if right else 400, method="PUT", path=with_digest(location, digest))
        path = f"/v2/{repository}/blobs/{digest}"
        blob = self.expect(200 if right else 404, method="GET", path=path)
        if right and blob.body != good:
            raise Failure(f"wrong bytes: {blob}")
        self.soak.count("forgeries" if not right else "uploads among forgeries")


class Vandal(Worker):
    """Hangs up in the middle of uploads and downloads."""

    def turn(self) -> None:
        time.sleep(0.05)
        host = self.random.choice(self.clients).host
        with RawConnection(host) as connection:
            if self.random.random() < 0.5:
                path = f"/v2/shop/blobs/uploads/?digest={digest_of(b'never sent')}"
                connection.request("POST", path, "Content-Length: 100000", body=bytes(50_000))
            else:
                path = f"/v2/{REPOSITORIES[0]}/blobs/{digest_of(self.soak.layers[9])}"
                connection.request("GET", path)
            connection.reset()
        self.soak.count("requests cut off")


class Collector(Worker):
    """Runs the gc command every second."""

    def turn(self) -> None:
        started = time.monotonic()
        done = python("registry.py", "gc", "--data", self.soak.daemons[0].data, *POLICY)
        if done.returncode or "Traceback" in done.stderr:
            raise Failure(f"gc: {done.returncode} {done.stdout} {done.stderr}")
        self.soak.count("collections")
        self.soak.count("things collected", len(done.stdout.splitlines()) - 1)
        self.soak.stop.wait(max(0.0, 1.0 - (time.monotonic() - started)))


# === Afterwards ===


def leaks(daemon: Daemon, before: tuple[int, Counter[str]]) -> Iterator[str]:
    """What a daemon still holds once its clients have gone, given a moment to notice."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: held(daemon.process.pid) == before)
    threads, files = held(daemon.process.pid)
    if threads > before[0]:
        yield f"{threads} threads, and {before[0]} before"
    if files - before[1]:
        yield f"descriptors left open: {dict(files - before[1])}"


def final_commands(data: str) -> Iterator[str]:
    """Collect once more, and verify."""
    for command in (["gc", "--data", data, *POLICY], ["verify", "--data", data]):
        done = python("registry.py", *command)
        print(f"{command[0]}: {(done.stdout.strip().splitlines() or [''])[-1]}")
        if done.returncode:
            yield f"{command[0]}: {done.returncode} {done.stdout[-2000:]} {done.stderr[-2000:]}"


# === The run ===


def run(options: argparse.Namespace, data: str) -> Soak:
    flags = ["--quiet", *(("--gc-interval", "1s", *POLICY) if options.collector == "daemon" else ())]
    with contextlib.ExitStack() as stack:
        daemons = [stack.enter_context(Daemon(data, *flags)) for _ in range(options.daemons)]
        soak = Soak(daemons, options.seconds)
        for daemon in daemons:
            daemon.client.expect(200, "GET", "/v2/")
        before = [held_at_rest(daemon.process.pid) for daemon in daemons]
        workers: list[Worker] = [kind(soak, n) for kind in (Pusher, Puller) for n in range(8)]
        workers += [Deleter(soak, 0), Deleter(soak, 1), Forger(soak, 0), Forger(soak, 1), Vandal(soak, 0)]
        workers += [Collector(soak, 0)] if options.collector == "command" else []
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(options.seconds + 12 * TIMEOUT)
            if worker.is_alive():
                soak.fail(f"{worker.name} hangs")
        for daemon, resources in zip(daemons, before):
            resident = memory(daemon.process.pid)
            soak.counts["mebibytes of daemon"] = max(soak.counts["mebibytes of daemon"], resident)
            soak.failures += leaks(daemon, resources)
        if options.collector != "none":
            soak.failures += final_commands(data)
        for daemon in daemons:
            if daemon.stop():
                soak.fail(f"exit status {daemon.process.returncode}")
            printed = daemon.remaining_output()
            if printed.strip():
                soak.fail(f"a daemon printed: {printed[-4000:]}")
    directory = DataDirectory(data)
    soak.failures += directory.disagreements()
    if directory.unfinished():
        soak.failures.append(f"left in uploads/: {directory.unfinished()[:10]}")
    return soak


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--daemons", type=int, choices=(1, 2), default=1)
    parser.add_argument("--collector", choices=("command", "daemon", "none"), default="command")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="soak-") as data:
        soak = run(options, data)
    for what, amount in sorted(soak.counts.items()):
        print(f"{amount:>14,}  {what}")
    print(f"{soak.slowest:>14.3f}  seconds for the slowest request")
    for failure in soak.failures:
        print(f"FAILED {failure}")
    print(f"{options.daemons} daemon(s), {options.seconds:.0f} s: {len(soak.failures)} failures")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
