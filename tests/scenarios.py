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


class Died(Exception):
    """The registry ended before it replied."""


class Session:
    """An upload session as its client knows it: what is acknowledged, and what may be there besides."""

    def __init__(self, content: bytes, algorithm: str = "sha256") -> None:
        self.content = content
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
        self.pending: Facts = {}
        self.sessions: list[Session] = []
        self.forks: list[Ledger] = []  # of clients that act at the same time

    def fork(self) -> Ledger:
        self.forks.append(Ledger({}))
        return self.forks[-1]

    @contextlib.contextmanager
    def change(self, facts: Facts) -> Iterator[None]:
        """A request whose reply makes these facts; without a reply, each may be old or new."""
        self.pending = facts
        yield
        self.known.update(facts)
        self.pending = {}


class Actor:
    """One client in one repository. Every request must be answered as expected, or not at all."""

    def __init__(self, client: Client, ledger: Ledger, *, again: bool = False) -> None:
        """again: this was tried before and cut short, so that a thing to delete may be gone already."""
        self.client = client
        self.ledger = ledger
        self.again = again

    def at(self, repository: str) -> Actor:
        other = Actor(self.client, self.ledger, again=self.again)
        other.client = self.client.at(repository)
        return other

    def request(self, status: int, method: str, path: str, body: Any = None, headers: Any = ()) -> Response:
        statuses = (status, 404) if self.again and method == "DELETE" else (status,)
        try:
            response = self.client.request(method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            raise Died from error
        if response.status not in statuses:
            raise AssertionError(f"expected {status}: {response}")
        return response

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
        hint = "" if algorithm == "sha256" else f"?digest-algorithm={algorithm}"
        session.location = self.request(202, "POST", f"blobs/uploads/{hint}").headers["Location"]
        return session

    def append(self, session: Session, size: int, *, ranged: bool = False, chunked: bool = False) -> None:
        start = session.acknowledged
        piece = session.content[start : start + size]
        session.sent = start + len(piece)
        headers = {"Content-Range": f"{start}-{session.sent - 1}"} if ranged else {}
        self.request(202, "PATCH", session.location, _pieces(piece) if chunked else piece, headers)
        session.acknowledged = session.sent

    def finish(self, session: Session) -> None:
        """Send the rest with the digest."""
        rest = session.content[session.acknowledged :]
        session.sent, session.closing = len(session.content), True
        with self.ledger.change({self.path("blobs", session.digest): session.content}):
            self.request(201, "PUT", with_digest(session.location, session.digest), rest)
        self.ledger.sessions.remove(session)

    def finish_wrong(self, session: Session) -> None:
        """Finish with the digest of something else, which ends the session and makes no blob."""
        session.sent, session.closing = len(session.content), True
        absent = digest_of(b"not " + session.content)
        for digest in [absent] if self.again else [absent, session.digest]:
            self.ledger.known[self.path("blobs", digest)] = None
        rest = session.content[session.acknowledged :]
        self.request(400, "PUT", with_digest(session.location, absent), rest)
        self.ledger.sessions.remove(session)

    def cancel(self, session: Session) -> None:
        session.closing = True
        self.request(204, "DELETE", session.location)
        self.ledger.sessions.remove(session)

    def mount(self, content: bytes, source: str) -> None:
        digest = digest_of(content)
        with self.ledger.change({self.path("blobs", digest): content}):
            self.request(201, "POST", f"blobs/uploads/?mount={digest}&from={source}")

    def delete_blob(self, content: bytes) -> None:
        with self.ledger.change({self.path("blobs", digest_of(content)): None}):
            self.request(202, "DELETE", f"blobs/{digest_of(content)}")

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
            try:
                present = self.client.head(f"blobs/{digest_of(content)}").status == 200
            except (OSError, http.client.HTTPException) as error:
                raise Died from error
            if not present:
                self.post_blob(content)
        self.put(image.body, tag, tags)

    def delete_tag(self, tag: str) -> None:
        with self.ledger.change({self.path("manifests", tag): None}):
            self.request(202, "DELETE", f"manifests/{tag}")

    def delete_manifest(self, manifest: bytes, tags: Iterable[str] = ()) -> None:
        """`tags`: those that point at it and go with it."""
        digest = digest_of(manifest)
        gone: Facts = {self.path("manifests", name): None for name in (digest, *tags)}
        with self.ledger.change({**gone, self.path("blobs", digest): None}):
            self.request(202, "DELETE", f"manifests/{digest}")


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
    actors = [
        Actor(actor.client.at(f"team/{number}"), actor.ledger.fork(), again=actor.again)
        for number in range(4)
    ]

    def push(number: int) -> Exception | None:
        try:
            actors[number].push(image(f"of client {number}", SHARED), "v1")
        except Died as error:
            return error
        return None

    deaths = run_at_once(*(functools.partial(push, number) for number in range(4)))
    if any(deaths):
        raise Died


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
