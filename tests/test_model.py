"""Two processes that take turns on the same upload sessions do what a model of a registry in memory does.

Good bytes and evil ones of the same size, ranges that are wrong, bodies that are cut short, right and wrong
digests, by one process or the other. REGISTRY_MODEL_STEPS says how many requests are tried, and
REGISTRY_MODEL_SEED which; without them they are always the same ones.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import unittest
from collections import deque
from pathlib import Path
from typing import Any, Callable

from tests import upkeep
from tests.daemon import Daemon
from tests.scenarios import offset
from tests.support import (
    OCI_CONFIG,
    Client,
    DataDirectory,
    HTTPTestCase,
    RawConnection,
    Response,
    descriptor,
    digest_of,
    encode,
    image_manifest,
    with_digest,
)

STEPS = int(os.environ.get("REGISTRY_MODEL_STEPS", "3000"))
SEED = int(os.environ.get("REGISTRY_MODEL_SEED", "3"))

REPOSITORIES = ("one", "two/three")
TAGS = ("v1", "v2")
SESSIONS = 4  # open at the same time
GOOD = tuple(f"{size} {letter} ".encode() * (size // 5) for size in (10, 3000, 150_000) for letter in "ab")


def evil(content: bytes) -> bytes:
    """Other bytes, as many."""
    return content[::-1]


class Upload:
    """An upload session: what it is to become, and what it has."""

    def __init__(self, repository: str, location: str, target: bytes) -> None:
        self.repository = repository
        self.location = location
        self.target = target
        self.content = b""

    @property
    def end(self) -> int:
        return len(self.content)


class Model:
    """What a registry has, in memory."""

    def __init__(self) -> None:
        self.blobs: dict[str, dict[str, bytes]] = {name: {} for name in REPOSITORIES}
        self.manifests: dict[str, dict[str, tuple[bytes, str]]] = {name: {} for name in REPOSITORIES}
        self.tags: dict[str, dict[str, str]] = {name: {} for name in REPOSITORIES}
        self.uploads: list[Upload] = []
        self.ended: deque[Upload] = deque(maxlen=10)

    def end(self, upload: Upload) -> None:
        self.uploads.remove(upload)
        self.ended.append(upload)

    def is_needed(self, repository: str, digest: str) -> bool:
        return any(child == digest for _, child in self.manifests[repository].values())


class Player:
    """Makes requests at random, each of whichever process, and compares what it is told with the model."""

    def __init__(self, clients: list[Client], seed: int) -> None:
        self.clients = clients
        self.random = random.Random(seed)
        self.model = Model()
        self.log: deque[str] = deque(maxlen=25)
        turns: list[tuple[int, Callable[[], object]]] = [
            (10, self.start),
            (40, self.append),
            (30, self.finish),
            (3, self.tear),
            (3, self.ask),
            (2, self.cancel),
            (2, self.use_ended),
            (4, self.post),
            (4, self.mount),
            (4, self.delete_blob),
            (6, self.get_blob),
            (4, self.put_manifest),
            (3, self.get_tag),
            (2, self.delete_tag),
            (2, self.delete_manifest),
        ]
        self.turns = [function for weight, function in turns for _ in range(weight)]

    def turn(self) -> None:
        self.random.choice(self.turns)()

    # --- Requests

    def expect(self, status: int, method: str, path: str, body: Any = None, headers: Any = ()) -> Response:
        number = self.random.randrange(len(self.clients))
        response = self.clients[number].request(method, path, self.in_pieces(body), headers)
        size = f" {len(body)} bytes" if body is not None else ""
        self.log.append(f"{number}: {response.request}{size} {headers or ''} -> {response.status}")
        if response.status != status:
            raise AssertionError("\n".join((*self.log, f"expected {status}: {response}")))
        return response

    def in_pieces(self, body: bytes | None) -> Any:
        """The body as it is, or for one sent in chunks."""
        if not body or self.random.random() < 0.5:
            return body
        cut = self.random.randrange(len(body))
        return iter([piece for piece in (body[:cut], body[cut:]) if piece])

    def expect_offset(self, upload: Upload, response: Response) -> None:
        if response.headers["Range"] != f"0-{max(upload.end - 1, 0)}":
            raise AssertionError("\n".join((*self.log, f"expected {upload.end} bytes: {response}")))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def some_digest(self, content: bytes) -> str:
        return digest_of(content, "sha512" if self.chance(0.15) else "sha256")

    def some_blob(self) -> tuple[str, bytes, str]:
        """One of those that are there, mostly."""
        repository = self.random.choice(REPOSITORIES)
        there = self.model.blobs[repository]
        if there and self.chance(0.8):
            digest = self.random.choice(sorted(there))
            return repository, there[digest], digest
        content = self.random.choice(GOOD)
        return repository, content, self.some_digest(content)

    # --- Upload sessions

    def some_upload(self) -> Upload:
        return self.random.choice(self.model.uploads) if self.model.uploads else self.start()

    def start(self) -> Upload:
        if len(self.model.uploads) >= SESSIONS:
            return self.random.choice(self.model.uploads)
        repository, target = self.random.choice(REPOSITORIES), self.random.choice(GOOD)
        hint = "?digest-algorithm=sha512" if self.chance(0.15) else ""
        response = self.expect(202, "POST", f"/v2/{repository}/blobs/uploads/{hint}")
        return self.begin(repository, response, target)

    def begin(self, repository: str, response: Response, target: bytes) -> Upload:
        upload = Upload(repository, response.headers["Location"], target)
        self.model.uploads.append(upload)
        return upload

    def some_rest(self, upload: Upload) -> bytes:
        """What is missing, good or evil, or a part of it; or a few bytes too many."""
        rest = self.random.choice((upload.target, evil(upload.target)))[upload.end :]
        if self.chance(0.25):
            rest = rest[: len(rest) // 2]
        return rest or b"more"

    def some_range(self, upload: Upload, size: int) -> tuple[int, dict[str, str]]:
        """A range for a body of this size, and 0 when it is right, or the status that refuses it."""
        first = last = upload.end
        status = self.random.choice((0, 0, 400, 400, 416))
        if status == 416:
            first = self.random.choice((first + 1, max(first - size, 0), first + size))
            status = 416 if first != upload.end else 0
        last = first + size - 1
        if status == 400:
            last += self.random.choice((-1, 1)) if size > 1 else 1
        return status, {"Content-Range": f"{first}-{last}"}

    def append(self) -> None:
        upload = self.some_upload()
        if upload.end >= len(upload.target) and self.chance(0.9):
            return
        piece = self.some_rest(upload)
        status, headers = self.some_range(upload, len(piece)) if self.chance(0.7) else (0, {})
        response = self.expect(status or 202, "PATCH", upload.location, piece, headers)
        if not status:
            upload.content += piece
        if status != 400:
            self.expect_offset(upload, response)

    def finish(self) -> None:
        upload = self.some_upload()
        if upload.end < len(upload.target) and self.chance(0.7):
            return
        rest = b"" if upload.end >= len(upload.target) or self.chance(0.3) else self.some_rest(upload)
        status, headers = self.some_range(upload, len(rest)) if rest and self.chance(0.3) else (0, {})
        content = upload.content + rest
        digest = self.some_digest(upload.target if self.chance(0.6) else content)
        path = with_digest(upload.location, digest)
        if status:
            self.expect(status, "PUT", path, rest, headers)
            return
        right = digest == digest_of(content, digest.partition(":")[0])
        self.expect(201 if right else 400, "PUT", path, rest, headers)
        self.model.end(upload)
        if right:
            self.model.blobs[upload.repository][digest] = content
        self.expect_blob(upload.repository, digest)

    def tear(self) -> None:
        """Hang up in the middle of a body: what has arrived may stay."""
        upload = self.some_upload()
        piece, method = self.some_rest(upload), self.random.choice(("PATCH", "PUT"))
        path = (
            upload.location if method == "PATCH" else with_digest(upload.location, digest_of(upload.target))
        )
        with RawConnection(self.random.choice(self.clients).host) as connection:
            connection.request(method, path, f"Content-Length: {len(piece) + 1}", body=piece).stop_sending()
            connection.drain()
        self.log.append(f"{method} {path} with {len(piece)} bytes of {len(piece) + 1}")
        response = self.expect(204, "GET", upload.location)
        upload.content += piece[: max(offset(response) - upload.end, 0)]
        self.expect_offset(upload, response)

    def ask(self) -> None:
        upload = self.some_upload()
        self.expect_offset(upload, self.expect(204, "GET", upload.location))

    def cancel(self) -> None:
        upload = self.some_upload()
        self.expect(204, "DELETE", upload.location)
        self.model.end(upload)

    def use_ended(self) -> None:
        """A session that is over, or of another repository, is unknown."""
        if self.model.ended and self.chance(0.7):
            location = self.random.choice(self.model.ended).location
        else:
            upload = self.some_upload()
            other = REPOSITORIES[1 - REPOSITORIES.index(upload.repository)]
            location = upload.location.replace(f"/v2/{upload.repository}/", f"/v2/{other}/")
        method = self.random.choice(("GET", "PATCH", "PUT", "DELETE"))
        content = self.random.choice(GOOD)
        path = with_digest(location, digest_of(content)) if method == "PUT" else location
        self.expect(404, method, path, content if method in ("PATCH", "PUT") else None)

    # --- Blobs

    def post(self) -> None:
        repository, content = self.random.choice(REPOSITORIES), self.random.choice(GOOD)
        sent, digest = self.random.choice((content, evil(content))), self.some_digest(content)
        status = 201 if sent == content else 400
        self.expect(status, "POST", f"/v2/{repository}/blobs/uploads/?digest={digest}", sent)
        if status == 201:
            self.model.blobs[repository][digest] = content
        self.expect_blob(repository, digest)

    def mount(self) -> None:
        source, content, digest = self.some_blob()
        repository = self.random.choice(REPOSITORIES)
        path = f"/v2/{repository}/blobs/uploads/?mount={digest}&from={source}"
        if digest in self.model.blobs[source]:
            self.expect(201, "POST", path)
            self.model.blobs[repository][digest] = content
        elif len(self.model.uploads) < SESSIONS:
            self.begin(repository, self.expect(202, "POST", path), content)

    def delete_blob(self) -> None:
        repository, _, digest = self.some_blob()
        there = digest in self.model.blobs[repository]
        needed = self.model.is_needed(repository, digest)
        status = 404 if not there else 405 if needed else 202
        self.expect(status, "DELETE", f"/v2/{repository}/blobs/{digest}")
        if status == 202:
            del self.model.blobs[repository][digest]
        self.expect_blob(repository, digest)

    def get_blob(self) -> None:
        repository, _, digest = self.some_blob()
        self.expect_blob(repository, digest)

    def expect_blob(self, repository: str, digest: str) -> None:
        content = self.model.blobs[repository].get(digest)
        status = 404 if content is None else 200
        response = self.expect(status, "GET", f"/v2/{repository}/blobs/{digest}")
        if status == 200 and response.body != content:
            raise AssertionError("\n".join((*self.log, f"{digest} is served with other bytes")))

    # --- Manifests

    def put_manifest(self) -> None:
        repository, tag = self.random.choice(REPOSITORIES), self.random.choice(TAGS)
        config = self.random.choice(GOOD)
        body, child = encode(image_manifest(descriptor(config, OCI_CONFIG))), digest_of(config)
        there = child in self.model.blobs[repository]
        headers = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
        self.expect(201 if there else 400, "PUT", f"/v2/{repository}/manifests/{tag}", body, headers)
        if there:
            self.model.manifests[repository][digest_of(body)] = body, child
            self.model.tags[repository][tag] = digest_of(body)

    def get_tag(self) -> None:
        repository, tag = self.random.choice(REPOSITORIES), self.random.choice(TAGS)
        digest = self.model.tags[repository].get(tag)
        response = self.expect(200 if digest else 404, "GET", f"/v2/{repository}/manifests/{tag}")
        if digest and response.body != self.model.manifests[repository][digest][0]:
            raise AssertionError("\n".join((*self.log, f"{tag} is not {digest}")))

    def delete_tag(self) -> None:
        repository, tag = self.random.choice(REPOSITORIES), self.random.choice(TAGS)
        known = self.model.tags[repository].pop(tag, None)
        self.expect(202 if known else 404, "DELETE", f"/v2/{repository}/manifests/{tag}")

    def delete_manifest(self) -> None:
        repository = self.random.choice(REPOSITORIES)
        if self.model.manifests[repository]:
            digest = self.random.choice(sorted(self.model.manifests[repository]))
            self.expect(202, "DELETE", f"/v2/{repository}/manifests/{digest}")
            del self.model.manifests[repository][digest]
            tags = self.model.tags[repository]
            self.model.tags[repository] = {tag: each for tag, each in tags.items() if each != digest}


class TwoProcesses(HTTPTestCase):
    def test_processes_that_take_turns_on_upload_sessions_agree_with_a_model(self) -> None:
        with tempfile.TemporaryDirectory() as data, contextlib.ExitStack() as stack:
            daemons = [stack.enter_context(Daemon(data, "--quiet", "--no-sync")) for _ in range(2)]
            clients = [stack.enter_context(daemon.client.keep_alive()) for daemon in daemons]
            player = Player(clients, SEED)
            for _ in range(STEPS):
                player.turn()
            for repository, blobs in player.model.blobs.items():
                for digest in blobs:
                    player.expect_blob(repository, digest)
            self.assertEqual(DataDirectory(data).disagreements(), [])
            with upkeep.opened(Path(data)) as store:
                self.assertEqual(upkeep.verify(store), [])
            for upload in list(player.model.uploads):
                player.expect(204, "DELETE", upload.location)
            self.assertEqual(DataDirectory(data).unfinished(), [])


if __name__ == "__main__":
    unittest.main()
