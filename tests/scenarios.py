"""What clients do to a registry, request by request, with a ledger of what they may rely on afterwards."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
from collections.abc import Iterable, Iterator
from typing import Any, Callable, Optional

from tests.support import (
    OCI_CONFIG,
    Client,
    Image,
    Response,
    descriptor,
    digest_of,
    encode,
    image_index,
    image_manifest,
    run_at_once,
    with_digest,
)

Facts = dict[str, Optional[bytes]]  # path -> what GET must answer; None: 404


class Interrupted(Exception):
    """The registry ended before it replied, or replied that it cannot."""


class Session:
    """An upload session as its client knows it: what is acknowledged, and what may be there besides."""

    def __init__(self, content: bytes, algorithm: str = "sha256") -> None:
        self.content = content
        self.algorithm = algorithm
        self.digest = digest_of(content, algorithm)
        self.location = ""
        self.acknowledged = 0
        self.sent = 0
        self.closing = False  # a request that ends it is on its way

    @property
    def open(self) -> bool:
        return bool(self.location)


class Ledger:
    """What was acknowledged, and what the request in flight would change."""

    def __init__(self, facts: Facts) -> None:
        self.known = dict(facts)
        self._before = facts
        self.pending: Facts = {}
        self.sessions: list[Session] = []
        self.forks: list[Ledger] = []  # of clients that act at the same time
        self.replies: list[Response] = []
        self._interrupted: Ledger | None = None
        self._check: Callable[[], None] = lambda: None

    def fork(self) -> Ledger:
        number = len(self.forks)
        fork = self._interrupted.forks[number].again(self._check) if self._interrupted else Ledger({})
        self.forks.append(fork)
        return fork

    def again(self, check: Callable[[], None]) -> Ledger:
        """For the same client when it had no answer in the end, and makes the same requests once more.

        Those that were answered are not made again: they get the same answers. check is called once the
        first of the others has been answered, before the client goes on.
        """
        ledger = Ledger(self._before)
        ledger._interrupted, ledger._check = self, check
        return ledger

    @contextlib.contextmanager
    def change(self, facts: Facts) -> Iterator[None]:
        """A request whose reply makes these facts; without a reply, each may be old or new."""
        self.pending = facts
        yield
        self.known.update(facts)
        self.pending = {}

    def answered(self, reply: Response) -> None:
        repeated = self.repeating
        self.replies.append(reply)
        if repeated:
            self._check()

    @property
    def earlier_reply(self) -> Response | None:
        """To the next request, when it was made before it came to the interruption."""
        earlier = self._interrupted.replies if self._interrupted else []
        return earlier[len(self.replies)] if len(self.replies) < len(earlier) else None

    @property
    def repeating(self) -> bool:
        """Whether the next request is the one that was interrupted: it may have been done already."""
        return self._interrupted is not None and len(self.replies) == len(self._interrupted.replies)

    @property
    def touched(self) -> set[str]:
        """The digests of all that the requests were about."""
        paths = {path for path in (*self.known, *self.pending) if "/blobs/" in path}
        digests = {path.rpartition("/")[2] for path in paths} | {each.digest for each in self.sessions}
        return digests.union(*(fork.touched for fork in self.forks))

    @property
    def unsettled(self) -> set[str]:
        """The digests of what requests without an answer were about."""
        digests = {path.rpartition("/")[2] for path in self.pending if "/blobs/" in path}
        return digests.union(*(fork.unsettled for fork in self.forks))


class Actor:
    """One client in one repository. Every request must be answered as expected, or not at all."""

    def __init__(self, client: Client, ledger: Ledger) -> None:
        self.client = client
        self.ledger = ledger

    def at(self, repository: str) -> Actor:
        return Actor(self.client.at(repository), self.ledger)

    def request(
        self,
        status: int,
        method: str,
        path: str,
        body: Any = None,
        headers: Any = (),
        *,
        also: Iterable[int] = (),
        repeated: Iterable[int] = (),
    ) -> Response:
        """also: other statuses that will do. repeated: those that will if it may have been done already."""
        reply = self.ledger.earlier_reply
        if reply is None:
            statuses = (status, *also, *(repeated if self.ledger.repeating else ()))
            reply = self._ask(method, path, body, headers)
            if reply.status not in statuses:
                raise AssertionError(f"expected {statuses}: {reply}")
        self.ledger.answered(reply)
        return reply

    def _ask(self, method: str, path: str, body: Any, headers: Any) -> Response:
        try:
            reply = self.client.request(method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted from error
        if reply.status >= 500:
            raise Interrupted(str(reply))
        return reply

    def path(self, kind: str, reference: str) -> str:
        return self.client.path(f"{kind}/{reference}")

    # --- Blobs

    def post_blob(self, content: bytes, algorithm: str = "sha256", *, chunked: bool = False) -> None:
        digest = digest_of(content, algorithm)
        body = _pieces(content) if chunked else content
        with self.ledger.change({self.path("blobs", digest): content}):
            self.request(201, "POST", f"blobs/uploads/?digest={digest}", body)

    def post_wrong_blob(self, content: bytes) -> None:
        absent = digest_of(b"not " + content)
        nothing: Facts = {self.path("blobs", digest): None for digest in (absent, digest_of(content))}
        self.ledger.known.update(nothing)
        self.request(400, "POST", f"blobs/uploads/?digest={absent}", content)

    def open_session(self, content: bytes, algorithm: str = "sha256") -> Session:
        session = Session(content, algorithm)
        self.ledger.sessions.append(session)
        self._start(session)
        return session

    def _start(self, session: Session) -> None:
        hint = "" if session.algorithm == "sha256" else f"?digest-algorithm={session.algorithm}"
        session.location = self.request(202, "POST", f"blobs/uploads/{hint}").headers["Location"]
        session.acknowledged = 0

    def append(self, session: Session, size: int, *, ranged: bool = False, chunked: bool = False) -> None:
        """Without a range, a client that had no answer asks first how much has arrived."""
        end = min(session.acknowledged + size, len(session.content))
        session.sent = end
        if self.ledger.repeating and not ranged:
            session.acknowledged = offset(self.request(204, "GET", session.location))
        while session.acknowledged < end:
            start = session.acknowledged
            piece = session.content[start:end]
            headers = {"Content-Range": f"{start}-{end - 1}"} if ranged else {}
            body = _pieces(piece) if chunked else piece
            reply = self.request(202, "PATCH", session.location, body, headers, repeated=(416,))
            session.acknowledged = offset(reply)
            if reply.status == 202 and session.acknowledged != end:
                raise AssertionError(f"expected {end} bytes: {reply}")

    def finish(self, session: Session, *, ranged: bool = False) -> None:
        """Send the rest with the digest."""
        with self.ledger.change({self.path("blobs", session.digest): session.content}):
            self._close(session, session.digest, 201, ranged=ranged)

    def finish_wrong(self, session: Session) -> None:
        """Finish with the digest of something else, which ends the session and makes no blob."""
        absent = digest_of(b"not " + session.content)
        for digest in (absent, session.digest):
            self.ledger.known[self.path("blobs", digest)] = None
        self._close(session, absent, 400)

    def _close(self, session: Session, digest: str, status: int, *, ranged: bool = False) -> None:
        """Made again, this may find the session over, or add its bytes twice: clients then start anew."""
        start, size = session.acknowledged, len(session.content)
        session.sent, session.closing = size, True
        path, rest = with_digest(session.location, digest), session.content[start:]
        headers = {"Content-Range": f"{start}-{size - 1}"} if ranged and rest else {}
        repeated = (404, 416 if headers else 400) if rest else (404,)
        reply = self.request(status, "PUT", path, rest, headers, repeated=repeated)
        if reply.status == status:
            self.ledger.sessions.remove(session)
        elif reply.status == 416:
            session.acknowledged = offset(reply)
            self._close(session, digest, status)
        else:
            self._start(session)
            self._close(session, digest, status)

    def cancel(self, session: Session) -> None:
        session.closing = True
        self.request(204, "DELETE", session.location, repeated=(404,))
        self.ledger.sessions.remove(session)

    def mount(self, content: bytes, source: str) -> None:
        digest = digest_of(content)
        with self.ledger.change({self.path("blobs", digest): content}):
            self.request(201, "POST", f"blobs/uploads/?mount={digest}&from={source}")

    def delete_blob(self, content: bytes) -> None:
        with self.ledger.change({self.path("blobs", digest_of(content)): None}):
            self.request(202, "DELETE", f"blobs/{digest_of(content)}", repeated=(404,))

    # --- Manifests

    def put(
        self, manifest: bytes, tag: str = "", tags: Iterable[str] = (), algorithm: str = "sha256"
    ) -> None:
        """PUT by tag, or by digest with `tags` as parameters."""
        digest = digest_of(manifest, algorithm)
        names = [digest, *tags, *([tag] if tag else [])]
        query = "&".join(f"tag={name}" for name in tags)
        target = f"manifests/{tag or digest}" + (f"?{query}" if query else "")
        media_type = json.loads(manifest)["mediaType"]
        facts: Facts = {self.path("manifests", name): manifest for name in names}
        with self.ledger.change({**facts, self.path("blobs", digest): manifest}):
            self.request(201, "PUT", target, manifest, {"Content-Type": media_type})

    def push(self, image: Image, tag: str = "", tags: Iterable[str] = ()) -> None:
        """As clients do: ask for each blob, send it if it is not there, then the manifest."""
        for content in image.blobs:
            if self.request(200, "HEAD", f"blobs/{digest_of(content)}", also=(404,)).status == 404:
                self.post_blob(content)
        self.put(image.body, tag, tags)

    def delete_tag(self, tag: str) -> None:
        with self.ledger.change({self.path("manifests", tag): None}):
            self.request(202, "DELETE", f"manifests/{tag}", repeated=(404,))

    def delete_manifest(self, manifest: bytes, tags: Iterable[str] = ()) -> None:
        """`tags`: those that point at it and go with it."""
        digest = digest_of(manifest)
        gone: Facts = {self.path("manifests", name): None for name in (digest, *tags)}
        with self.ledger.change({**gone, self.path("blobs", digest): None}):
            self.request(202, "DELETE", f"manifests/{digest}", repeated=(404,))


def offset(reply: Response) -> int:
    """How many bytes an upload session has, as its Range says: 0-0 is taken for none."""
    last = int(reply.headers["Range"].partition("-")[2])
    return last + 1 if last else 0


def _pieces(content: bytes) -> Iterator[bytes]:
    half = len(content) // 2
    return iter([content[:half], content[half:]])


# === What is there before, and what is pushed ===


def content(label: str, size: int = 3000) -> bytes:
    """Bytes that the label determines."""
    return (label.encode() * (size // len(label) + 1))[:size]


def image(label: str, *layers: bytes, **more: Any) -> Image:
    """An image that the label and the layers determine; with a layer of its own if there are none."""
    layers = layers or (content(f"layer of {label}"),)
    config = encode({"os": "linux", "architecture": "amd64", "id": label})
    manifest = image_manifest(descriptor(config, OCI_CONFIG), map(descriptor, layers), **more)
    return Image(encode(manifest), config, layers)


REPOSITORY = "base/app"
SHARED = content("a layer that two images share")
FIRST, SECOND = image("first", SHARED), image("second", SHARED, content("a layer of the second"))
UNTAGGED = image("untagged")
LOOSE = content("a blob that no manifest names")
PLATFORM = image("platform")
INDEX = encode(image_index([PLATFORM.descriptor]))
SIGNATURE = image("signature", content("signature"), subject=FIRST.descriptor)
FOREIGN = content("a blob of another repository")


def prepare(actor: Actor) -> None:
    """Push what the scenarios begin with."""
    actor.push(FIRST, "v1")
    actor.push(SECOND, "v2")
    actor.push(UNTAGGED)
    actor.post_blob(LOOSE)
    actor.push(PLATFORM)
    actor.put(INDEX, "multi")
    actor.push(SIGNATURE)
    actor.at("other/library").post_blob(FOREIGN)
    actor.at("other/library").post_blob(SHARED)


# === The scenarios ===

Scenario = Callable[[Actor], None]


def single_post(actor: Actor) -> None:
    actor.post_blob(content("new"))


def single_post_chunked(actor: Actor) -> None:
    actor.post_blob(content("new"), chunked=True)


def single_post_of_nothing(actor: Actor) -> None:
    actor.post_blob(b"", "sha512")


def single_post_wrong_digest(actor: Actor) -> None:
    actor.post_wrong_blob(content("new"))


def single_post_again(actor: Actor) -> None:
    actor.post_blob(LOOSE)


def post_put(actor: Actor) -> None:
    actor.finish(actor.open_session(content("new")))


def post_patch_put(actor: Actor) -> None:
    session = actor.open_session(content("new"))
    actor.append(session, len(session.content))
    actor.finish(session)


def streamed_patch(actor: Actor) -> None:
    session = actor.open_session(content("new"))
    actor.append(session, len(session.content), chunked=True)
    actor.finish(session)


def ranged_patches(actor: Actor) -> None:
    session = actor.open_session(content("new"))
    for _ in range(3):
        actor.append(session, 800, ranged=True)
    actor.finish(session)


def last_bytes_with_range(actor: Actor) -> None:
    session = actor.open_session(content("new"))
    actor.append(session, 1500, ranged=True)
    actor.finish(session, ranged=True)


def sha512_session(actor: Actor) -> None:
    session = actor.open_session(content("new"), "sha512")
    actor.append(session, 1500)
    actor.finish(session)


def session_wrong_digest(actor: Actor) -> None:
    session = actor.open_session(content("new"))
    actor.append(session, 1500)
    actor.finish_wrong(session)


def cancelled_session(actor: Actor) -> None:
    session = actor.open_session(content("new"))
    actor.append(session, 1500)
    actor.cancel(session)


def session_of_a_known_blob(actor: Actor) -> None:
    session = actor.open_session(SHARED)
    actor.append(session, 1500)
    actor.finish(session)


def mount(actor: Actor) -> None:
    actor.mount(FOREIGN, "other/library")


def mount_into_new_repository(actor: Actor) -> None:
    actor.at("brand/new").mount(SHARED, REPOSITORY)


def manifest_by_tag(actor: Actor) -> None:
    actor.push(image("new", SHARED, content("new layer")), "new")


def manifest_by_digest_with_tags(actor: Actor) -> None:
    actor.push(image("new"), tags=("a", "b", "v1"))


def manifest_by_sha512(actor: Actor) -> None:
    new = image("new", SHARED)
    actor.post_blob(new.config)
    actor.put(new.body, tags=("a",), algorithm="sha512")


def index(actor: Actor) -> None:
    arm = image("arm")
    actor.push(arm)
    actor.put(encode(image_index([FIRST.descriptor, arm.descriptor])), "multi")


def referrer(actor: Actor) -> None:
    actor.push(image("new signature", content("signed"), subject=SECOND.descriptor))


def push_again(actor: Actor) -> None:
    actor.push(FIRST, "v1")


def push_into_new_repository(actor: Actor) -> None:
    actor.at("brand/new").push(SECOND, "v2")


def retag(actor: Actor) -> None:
    actor.put(SECOND.body, "v1")


def tag_deleted(actor: Actor) -> None:
    actor.delete_tag("v1")


def manifest_deleted(actor: Actor) -> None:
    actor.delete_manifest(SECOND.body, ("v2",))


def manifest_deleted_and_pushed(actor: Actor) -> None:
    actor.delete_manifest(SECOND.body, ("v2",))
    actor.push(SECOND, "v2")


def index_deleted(actor: Actor) -> None:
    actor.delete_manifest(INDEX, ("multi",))
    actor.delete_manifest(PLATFORM.body)


def blob_deleted(actor: Actor) -> None:
    actor.delete_blob(LOOSE)


def blob_deleted_and_pushed(actor: Actor) -> None:
    actor.delete_blob(LOOSE)
    actor.post_blob(LOOSE)


def last_blob_of_repository_deleted(actor: Actor) -> None:
    actor.at("other/library").delete_blob(SHARED)
    actor.at("other/library").delete_blob(FOREIGN)


def pushes_at_once(actor: Actor) -> None:
    """Four clients, each in a repository of its own, whose requests may share what they wait for."""
    actors = [Actor(actor.client.at(f"team/{number}"), actor.ledger.fork()) for number in range(4)]

    def push(number: int) -> Exception | None:
        try:
            actors[number].push(image(f"of client {number}", SHARED), "v1")
        except Interrupted as error:
            return error
        return None

    deaths = run_at_once(*(functools.partial(push, number) for number in range(4)))
    if any(deaths):
        raise Interrupted


UPLOADS: tuple[Scenario, ...] = (
    single_post,
    single_post_chunked,
    single_post_of_nothing,
    single_post_wrong_digest,
    single_post_again,
    post_put,
    post_patch_put,
    streamed_patch,
    ranged_patches,
    last_bytes_with_range,
    sha512_session,
    session_wrong_digest,
    cancelled_session,
    session_of_a_known_blob,
    mount,
    mount_into_new_repository,
)
MANIFESTS: tuple[Scenario, ...] = (
    manifest_by_tag,
    manifest_by_digest_with_tags,
    manifest_by_sha512,
    index,
    referrer,
    push_again,
    push_into_new_repository,
    retag,
)
DELETES: tuple[Scenario, ...] = (
    tag_deleted,
    manifest_deleted,
    manifest_deleted_and_pushed,
    index_deleted,
    blob_deleted,
    blob_deleted_and_pushed,
    last_blob_of_repository_deleted,
)
SCENARIOS = UPLOADS + MANIFESTS + DELETES
