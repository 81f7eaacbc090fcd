"""A fuzz run: valid requests, mutated in meaning or in framing, over raw sockets, many on a connection.

    python tests/fuzz.py [--requests 100000] [--seed N] [--users] [--connections 6] [--batch N]

Every batch follows from the seed and its number alone, so `--seed S --batch N` sends one batch again.
What must hold: no 5xx, no hang, every valid request between the mutants served, nothing stored that was
not acknowledged, no line of the log forged, no thread, socket or file left. Prints totals; exits 1 after a
failure. With --users, the daemon asks who is there, and the run should not take five minutes: by then it
has forgotten that the password was right, and remembers too many wrong ones.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import select
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import smuggling
from tests.credentials import AuthorizedClient, basic, users_line
from tests.daemon import LINUX, Daemon, command, held, held_at_rest, memory
from tests.support import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    SESSION_ID,
    TIMEOUT,
    Client,
    DataDirectory,
    HTTPTestCase,
    RawConnection,
    Response,
    descriptor,
    digest_of,
    encode,
    image_index,
    image_manifest,
    wait_until,
)

FAILURE_LIMIT = 5
LONGEST_BATCH = 8
SESSION = "@%d@"  # stands for the id of a batch's upload session
SESSIONS = 2
NAME = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
KEPT_FILES = re.compile(r"registry\.db(-wal|-shm)?|reserve|last-gc|token\.key|blobs|uploads")


# === Content ===

SMALL, EMPTY, LARGE = b"small content", b"", b"0123456789abcdef" * 20_000
CONFIG = b'{"os":"linux","architecture":"amd64"}'
CONTENTS = (SMALL, EMPTY, LARGE, CONFIG)
IMAGE = image_manifest(descriptor(CONFIG, OCI_CONFIG), [descriptor(SMALL)], annotations={"a": "b"})
INDEX = image_index([descriptor(encode(IMAGE), OCI_MANIFEST)])
REFERRER = image_manifest(
    descriptor(CONFIG, OCI_CONFIG), subject=descriptor(encode(IMAGE), OCI_MANIFEST), artifactType="a/b"
)
MANIFESTS = {encode(IMAGE): OCI_MANIFEST, encode(INDEX): OCI_INDEX, encode(REFERRER): OCI_MANIFEST}
HONEST = "honest/image"  # no mutated request ever names it
USER, PASSWORD = "fuzzer", "secret"
MUTATED = ("fuzz/a", "fuzz/b/blobs/uploads", "fuzz/manifests/tags")


def fill(client: Client) -> None:
    """Give a repository everything that requests ask for."""
    for content in CONTENTS:
        client.push_blob(content)
    client.push_blob(SMALL, "sha512")
    for body in MANIFESTS:
        client.push_manifest(json.loads(body))
    client.push_manifest(IMAGE, "latest")


# === Requests ===


@dataclass
class Message:
    """A request before it becomes bytes; its texts are Latin-1. `expected` is what an honest one gets."""

    method: str
    target: str
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | None = None
    chunked: bool = False
    version: str = "HTTP/1.1"
    expected: tuple[int, bytes | None] | None = None

    def render(self) -> bytes:
        lines = [f"{self.method} {self.target} {self.version}", "Host: registry.test"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        body = self.body or b""
        if self.chunked:
            lines.append("Transfer-Encoding: chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        elif self.body is not None:
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def honest_message(rng: Random) -> Message:
    """A valid request whose answer is known."""
    content = rng.choice((SMALL, SMALL, EMPTY, CONFIG, LARGE))
    manifest, media_type = rng.choice(list(MANIFESTS.items()))
    blob, by_digest = f"/v2/{HONEST}/blobs/{digest_of(content)}", f"/v2/{HONEST}/manifests/"
    fresh = rng.randbytes(rng.choice((1, 100, 3000))).replace(b"@", b"-")  # nothing like a session's stand-in
    upload = f"/v2/{HONEST}/blobs/uploads/?digest={digest_of(fresh)}"
    kind = [("Content-Type", media_type)]
    return rng.choice(
        [
            Message("GET", "/v2/", expected=(200, b"{}\n")),
            Message("GET", blob, expected=(200, content)),
            Message("HEAD", blob, expected=(200, b"")),
            Message("GET", blob, [("Range", "bytes=0-4")], expected=(206, content[:5]) if content else None),
            Message("GET", by_digest + digest_of(manifest), expected=(200, manifest)),
            Message("GET", by_digest + "latest", expected=(200, encode(IMAGE))),
            Message("GET", by_digest + "absent", expected=(404, None)),
            Message("GET", f"/v2/{HONEST}/referrers/{digest_of(encode(IMAGE))}", expected=(200, None)),
            Message("GET", f"/v2/{HONEST}/tags/list", expected=(200, None)),
            Message("POST", upload, body=fresh, chunked=rng.random() < 0.5, expected=(201, b"")),
            Message("PUT", by_digest + digest_of(manifest), kind, manifest, expected=(201, b"")),
        ]
    )


def fuzz_message(rng: Random) -> Message:
    """A request that would be valid, for mutations to begin with."""
    content = rng.choice((SMALL, SMALL, EMPTY, CONFIG, LARGE, *[b"%x" % rng.getrandbits(64)] * 2))
    manifest, media_type = rng.choice(list(MANIFESTS.items()))
    if rng.random() < 0.5:  # one that nobody has pushed yet
        manifest = encode({**json.loads(manifest), "annotations": {"n": str(rng.getrandbits(64))}})
    base, other = f"/v2/{rng.choice(MUTATED)}", rng.choice(MUTATED)
    algorithm = rng.choice(("sha256", "sha256", "sha512"))
    digest = digest_of(content, algorithm)
    session = f"{base}/blobs/uploads/{SESSION % rng.randrange(SESSIONS)}"
    tag, chunked = f"t{rng.randrange(50)}", rng.random() < 0.3
    kind = [("Content-Type", media_type)]
    size = len(content)
    made = rng.choice(
        [
            ("GET", "/v2/", [], None),
            ("GET", "/v2/_catalog?n=3&last=a", [], None),
            (
                "GET",
                f"/token?account=x&scope=repository:{other}:pull,push&scope=registry:catalog:*",
                [],
                None,
            ),
            ("POST", "/token", [], other.encode()),
            ("GET", f"{base}/tags/list?n=2&last=t1", [], None),
            ("GET", f"{base}/blobs/{digest}", [("Range", "bytes=1-5")], None),
            ("GET", f"{base}/blobs/{digest}", [("If-None-Match", f'"{digest}"')], None),
            ("HEAD", f"{base}/blobs/{digest}", [], None),
            ("DELETE", f"{base}/blobs/{digest}", [], None),
            ("GET", f"{base}/manifests/{tag}", [("Accept", media_type)], None),
            ("HEAD", f"{base}/manifests/{digest_of(manifest)}", [], None),
            ("PUT", f"{base}/manifests/{tag}", kind, manifest),
            ("PUT", f"{base}/manifests/{tag}", kind, manifest),
            ("PUT", f"{base}/manifests/{digest_of(manifest, algorithm)}?tag={tag}&tag=b", kind, manifest),
            ("DELETE", f"{base}/manifests/{tag}", [], None),
            ("DELETE", f"{base}/manifests/{digest_of(manifest)}", [], None),
            ("GET", f"{base}/referrers/{digest_of(encode(IMAGE))}?artifactType=a/b", [], None),
            ("POST", f"{base}/blobs/uploads/", [], b""),
            ("POST", f"{base}/blobs/uploads/?digest-algorithm={algorithm}", [], b""),
            ("POST", f"{base}/blobs/uploads/?digest={digest}", [], content),
            ("POST", f"{base}/blobs/uploads/?digest={digest}", [], content),
            ("POST", f"{base}/blobs/uploads/?mount={digest}&from={other}", [], b""),
            ("POST", f"{base}/blobs/uploads/?mount={digest}", [], b""),
            ("GET", session, [], None),
            ("PATCH", session, [("Content-Range", f"0-{max(size - 1, 0)}")], content),
            ("PATCH", session, [], content),
            ("PUT", f"{session}?digest={digest}", [], content),
            ("DELETE", session, [], None),
        ]
    )
    method, target, headers, body = made
    return Message(method, target, list(headers), body, chunked and body is not None)


# === Mutations of the meaning: the message stays well framed ===

TARGET_PIECES = (
    "%00 %0d%0a %0a %ff %c0%af %ed%a0%80 %e2%80%ae %f4%90%80%80 % %2 %zz %u0041 .. /../ /./ // \\ ; # ? & = +"
    " %2f %2F %252f %25 %3f %23 %20 ~ @ : :: * ' \" < | \xff \xc3\xa9 \x85 \xa0 _ - . A __ %41"
    " /blobs/uploads/ /manifests/ /tags/list sha256: sha512:"
).split(" ")
METHODS = (
    "GET HEAD PUT POST PATCH DELETE OPTIONS TRACE CONNECT PROPFIND get X __init__ M-SEARCH ! GETGET".split()
)
NUMBERS = (
    "",
    "9" * 4400,
    *"0 1 -1 +1 00 01 1e3 0x10 1_0 1.0 999999999999999999 18446744073709551616 \xb2 NaN %D9%A1".split(),
)
RANGES = (
    "bytes=0-0 bytes=-1 bytes=-0 bytes=5- bytes=500-0 bytes=99999999999999999999-"
    " bytes=0-99999999999999999999 bytes=0-1,3-4 bytes=- bytes= bytes=a-b BYTES=0-1 items=0-1"
    " bytes=0-0-0 bytes=+0-1 bytes=\xb2-3 0-4 4-0 -1-4 0- 0-4/5 18446744073709551615-18446744073709551616"
).split()
DIGESTS = (
    f"sha256: sha256:{'a' * 63} sha256:{'a' * 64} sha256:{'A' * 64} sha256:{'g' * 64} sha512:{'a' * 64}"
    f" sha512:{'0' * 128} md5:{'a' * 32} sha256-{'a' * 64} sha256:sha256:{'a' * 64} sha384:{'a' * 96}"
    f" SHA256:{'a' * 64} sha256:%61{'a' * 63} sha256:{'a' * 64}%0a sha256:../../registry.db latest :"
).split()
HEADER_NAMES = (
    "Range Content-Range Content-Type Accept If-None-Match If-Range If-Match Connection Expect Authorization"
    " User-Agent Accept-Encoding X-Forwarded-Proto X-Forwarded-Host Referer TE Trailer Upgrade"
    " Content-Encoding Forwarded Cookie X !#$%&'*+-.^_`|~ Content_Length"
).split()
HEADER_VALUES = (
    *RANGES,
    *NUMBERS,
    *DIGESTS,
    "100-continue",
    "200-maybe",
    "close",
    "keep-alive, Upgrade",
    "h2c",
    "*",
    '"',
    'W/"x"',
    "Basic \xff",
    "Basic " + "A" * 3000,
    "Bearer a.b.c",
    "text/plain; charset=utf-8",
    OCI_MANIFEST,
    OCI_INDEX + "; q=1",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "\x1b[31mred\x1b[0m",
    "\x85\x9b31m",
    "%0d%0aX: y",
    "a" * 5000,
    ",".join("a" * 200),
    "\t \t",
    "gzip",
    "\xfe\xff",
)
QUERIES = (
    "",
    *"n last digest mount from tag artifactType digest-algorithm ns _state scope service %6e n[]".split(),
)
JSON_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**63, 2**64, 10**19, "", "a", "\ud800", "\x00", "a" * 70_000, [], {}, [[]], [{}],
    {"": ""}, "sha256:" + "a" * 64, "../../etc", OCI_INDEX, "a/b", "\r\nX: y", {"digest": None}, [None],
    ["a"], [descriptor(SMALL)] * 100, {"a": 1}, {"a" * 300: "b" * 300}, "\u202e\u2028",
)  # fmt: skip
JSON_TEXTS = (
    b"[" * 100_000, b'{"a":' * 50_000, b"9" * 50_000, b"1e999999999", b"-", b"NaN", b"Infinity", b"\xff\xfe",
    b"\xef\xbb\xbf{}", b'"\\ud800"', b'"\x00"', b"{}" * 2, b'{"a":1,"a":2}', b"\xed\xa0\x80", b"",
    b"\x00" * 100, b'{"schemaVersion":2,' * 2, b"[1,]", b"'a'", b'"\\u00"', b"0.0000001e-400", b"tru",
)  # fmt: skip


def insert_piece(rng: Random, message: Message) -> None:
    place = rng.randrange(len(message.target) + 1)
    message.target = message.target[:place] + rng.choice(TARGET_PIECES) + message.target[place:]
    message.target = message.target.replace(" ", "")


def encode_some(rng: Random, message: Message) -> None:
    form = rng.choice(("%%%02x", "%%%02X", "%%25%02x"))
    share = rng.choice((0.05, 0.3, 1.0))
    message.target = "".join(
        form % ord(c) if rng.random() < share and c != "@" else c for c in message.target
    )


def change_segments(rng: Random, message: Message) -> None:
    segments = message.target.split("/")
    place, other = rng.randrange(len(segments)), rng.randrange(len(segments))
    change = rng.randrange(5)
    if change == 0:
        del segments[place]
    elif change == 1:
        segments.insert(place, segments[other])
    elif change == 2:
        segments[place], segments[other] = segments[other], segments[place]
    elif change == 3:
        segments[place] = rng.choice(("", ".", "..", "a" * 256, "A", "_catalog", "tags", "list", "uploads"))
    else:
        segments[place : place + 1] = ["a"] * rng.choice((2, 60, 130))
    message.target = "/".join(segments) or "/"


def change_digest(rng: Random, message: Message) -> None:
    message.target = re.sub(r"sha(256|512):[0-9a-f]+", lambda _: rng.choice(DIGESTS), message.target)


def add_query(rng: Random, message: Message) -> None:
    joint = "&" if "?" in message.target else "?"
    value = rng.choice((*NUMBERS, *DIGESTS, *TARGET_PIECES, *MUTATED, OCI_MANIFEST, "a%2Bb"))
    message.target += f"{joint}{rng.choice(QUERIES)}={value}" * rng.choice((1, 1, 1, 2, 60))


def change_number(rng: Random, message: Message) -> None:
    message.target = re.sub(r"n=\d+", f"n={rng.choice(NUMBERS)}", message.target)


def change_method(rng: Random, message: Message) -> None:
    message.method = rng.choice(METHODS)
    if message.body is None and rng.random() < 0.5:
        message.body = b""


def add_header(rng: Random, message: Message) -> None:
    header = (rng.choice(HEADER_NAMES), rng.choice(HEADER_VALUES))
    message.headers.insert(rng.randrange(len(message.headers) + 1), header)


def change_header(rng: Random, message: Message) -> None:
    if message.headers:
        place = rng.randrange(len(message.headers))
        message.headers[place] = (message.headers[place][0], rng.choice(HEADER_VALUES))


def change_range(rng: Random, message: Message) -> None:
    name = "Content-Range" if message.body is not None else "Range"
    message.headers = [header for header in message.headers if header[0] != name]
    message.headers.append((name, rng.choice(RANGES)))


def change_body(rng: Random, message: Message) -> None:
    body = bytearray(message.body or b"")
    change = rng.randrange(5)
    if change == 0:
        del body[rng.randrange(len(body) + 1) :]
    elif change == 1 and body:
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    elif change == 2:
        body += b"x" * rng.choice((1, 70_000, 300_000))
    elif change == 3:
        body = bytearray(rng.choice(JSON_TEXTS))
    else:
        body[:0] = rng.choice((b"\x00", b" ", b"\r\n", b"GET / HTTP/1.1\r\n\r\n"))
    message.body = bytes(body)


def change_json(rng: Random, message: Message) -> None:
    """Replace, drop or double one node of a JSON body."""
    try:
        document = json.loads(message.body or b"")
    except (ValueError, RecursionError):
        return change_body(rng, message)
    nodes = list(_nodes(document))
    if not nodes:
        return change_body(rng, message)
    holder, key = rng.choice(nodes)
    change = rng.randrange(4)
    if change == 0 and isinstance(holder, dict):
        holder[rng.choice(("mediaType", "subject", "urls", "artifactType", "layers", "data"))] = holder.pop(
            key
        )
    elif change == 1:
        del holder[key]
    else:
        holder[key] = rng.choice(JSON_VALUES)
    text = encode(document)
    if change == 3:
        text = text.replace(
            b'"schemaVersion"', b'"schemaVersion":%s,"schemaVersion"' % rng.choice(JSON_TEXTS), 1
        )
    message.body = text
    return None


def _nodes(document: Any) -> Iterable[tuple[Any, Any]]:
    """Every member and element below a document, as its container and its key there."""
    if isinstance(document, dict):
        pairs: Iterable[tuple[Any, Any]] = list(document.items())
    else:
        pairs = enumerate(document) if isinstance(document, list) else ()
    for key, value in pairs:
        yield document, key
        yield from _nodes(value)


MEANINGS: tuple[Callable[[Random, Message], None], ...] = (
    insert_piece, encode_some, change_segments, change_digest, add_query, change_method, add_header,
    change_header, change_number, change_range, change_range, change_body, change_json, change_json,
)  # fmt: skip


# === Mutations of the framing: nobody can say how many requests these bytes are ===

LENGTHS = (*smuggling.LENGTHS, b"05")
CODINGS = (*smuggling.CODINGS, b"CHUNKED")
VERSIONS = (*smuggling.VERSIONS, b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/1.1\x00")
SIZE_LINES = (
    *smuggling.SIZES, b"5 ", b"5\t", b"0005", b"5;a=b", b"f" * 17, b"0" * 2000 + b"5", b"5;" + b"x" * 2000
)  # fmt: skip
LINE_ENDS = (
    b"\n",
    b"\r",
    b"\r\r\n",
    b"\n\r",
    b"\r\n\n",
    b"",
    b"\r\n ",
    b"\r\n\t",
    b"\x00\r\n",
    b"\v\r\n",
    b"\x85",
)
GARBAGE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00" * 100,
    b"\r\n" * 50, b"GET", b"GET / HTTP/1.1\r\n", b"\n", b"\xff" * 9000, b"A" * 9000, b"SSH-2.0-x\r\n",
    b"a: b\r\n\r\n", b" " * 100,
    b"GET /v2/ HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 150 + b"\r\n",
    b"GET /v2/ HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
    b"GET /v2/?" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
)  # fmt: skip


def wrong_length(rng: Random, message: Message) -> bytes:
    size = len(message.body or b"")
    wrong = rng.choice((*(b"%d" % other for other in (size + 1, max(size - 1, 0), size + 100_000)), *LENGTHS))
    data, line = message.render(), b"Content-Length: " + wrong
    if rng.random() < 0.5 and b"Content-Length" in data:
        return re.sub(rb"Content-Length: \d+", lambda _: line, data, count=1)
    return data.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n", 1)


def wrong_coding(rng: Random, message: Message) -> bytes:
    line = b"Transfer-Encoding: " + rng.choice(CODINGS)
    return message.render().replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n", 1)


TRAILERS = (b"", b"A: b\r\n", b"A: b\r\n" * 150, *(line + b"\r\n" for line in smuggling.TRAILERS))


def wrong_chunks(rng: Random, message: Message) -> bytes:
    message.chunked, message.body = True, b"hello"
    head, end, _ = message.render().partition(b"\r\n\r\n")
    size, last = rng.choice((b"5", *SIZE_LINES)), rng.choice((b"0", b"00", b"-0", b"0;x", b"0x0", b""))
    ends = (b"\r\n", b"\r\n", *LINE_ENDS)
    chunk = size + rng.choice(ends) + b"hello" + rng.choice(ends)
    return head + end + chunk + last + b"\r\n" + rng.choice(TRAILERS) + rng.choice(ends)


def wrong_line_end(rng: Random, message: Message) -> bytes:
    data = message.render()
    places = [match.start() for match in re.finditer(b"\r\n", data[:5000])]
    place = rng.choice(places)
    return data[:place] + rng.choice(LINE_ENDS) + data[place + 2 :]


def wrong_header_line(rng: Random, message: Message) -> bytes:
    line = rng.choice(smuggling.HEADERS)
    return message.render().replace(b"\r\n", b"\r\n" + line + b"\r\n", 1)


def wrong_version(rng: Random, message: Message) -> bytes:
    message.version = rng.choice(VERSIONS).decode("latin-1")
    return message.render()


def wrong_request_line(rng: Random, message: Message) -> bytes:
    line, _, rest = message.render().partition(b"\r\n")
    joint = rng.choice((b"  ", b"\t", b" \t", b"\x0b", b"", b" \x00", b"\xa0", b" x "))
    return (
        rng.choice((b"", b"\r\n", b" ", b"\n", b"\x00"))
        + line.replace(b" ", joint, rng.choice((1, 2)))
        + b"\r\n"
        + rest
    )


def without_host(_rng: Random, message: Message) -> bytes:
    return message.render().replace(b"Host: registry.test\r\n", b"", 1)


def changed_bytes(rng: Random, message: Message) -> bytes:
    data = bytearray(message.render()[:20_000])
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place, end = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        change = rng.randrange(4)
        if change == 0 and place < len(data):
            data[place] = rng.randrange(256)
        elif change == 1:
            data[place:place] = bytes([rng.choice(b"\r\n\x00 :;,/%?\xff0-")])
        elif change == 2:
            del data[place : place + rng.choice((1, 1, 2, 10))]
        else:
            data[place:place] = data[min(place, end) : min(place, end) + rng.choice((1, 20, 200))]
    return bytes(data)


def cut_off(rng: Random, message: Message) -> bytes:
    data = message.render()
    return data[: rng.randrange(len(data))]


def garbage(rng: Random, _message: Message) -> bytes:
    return rng.choice(GARBAGE)


FRAMINGS: tuple[Callable[[Random, Message], bytes], ...] = (
    wrong_length, wrong_coding, wrong_chunks, wrong_chunks, wrong_line_end, wrong_header_line, wrong_version,
    wrong_request_line, without_host, changed_bytes, changed_bytes, cut_off, garbage,
)  # fmt: skip


# === Batches ===


@dataclass
class Batch:
    """What one connection sends: well-framed messages, perhaps one that is not, and a probe at the end."""

    number: int
    messages: list[Message]
    tail: bytes
    probe: Message
    pieces: int  # that it is sent in
    reset: bool  # instead of reading any reply

    @property
    def size(self) -> int:
        """How many requests it counts for."""
        return len(self.messages) + bool(self.tail) + 1

    def render(self, sessions: list[str]) -> bytes:
        data = b"".join(message.render() for message in self.messages) + self.tail + self.probe.render()
        for number, session in enumerate(sessions):
            data = data.replace((SESSION % number).encode(), session.encode())
        return data

    @property
    def needs_sessions(self) -> bool:
        return any("@" in message.target for message in self.messages) or b"@" in self.tail


def make_batch(seed: int, number: int, authorization: str = "") -> Batch:
    """A batch that follows from seed and number alone; authorization: what its valid requests send."""
    rng = Random(f"{seed}/{number}")
    messages = [make_message(rng) for _ in range(rng.randint(1, LONGEST_BATCH))]
    tail = b""
    if rng.random() < 0.5:
        message = fuzz_message(rng)
        if message.method == "HEAD":  # whoever cannot tell requests apart must know that replies have bodies
            message.method = "GET"
        tail = rng.choice(FRAMINGS)(rng, message)
    reset = rng.random() < 0.02
    if reset:  # nobody would learn what was acknowledged: such batches only read
        messages, tail = [message for message in messages if message.method in ("GET", "HEAD")], b""
    probe = Message("GET", "/v2/", [("Connection", "close")], expected=(200, b"{}\n"))
    for message in [*messages, probe] if authorization else ():
        message.headers.append(("Authorization", authorization))
    return Batch(number, messages, tail, probe, rng.choice((1, 1, 1, 2, 7, 40)), reset)


def make_message(rng: Random) -> Message:
    if rng.random() < 0.25:
        return honest_message(rng)
    message = fuzz_message(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        rng.choice(MEANINGS)(rng, message)
    return message


# === Sending them ===


class Hang(AssertionError):
    """The registry neither answered nor closed."""


class Exchange(RawConnection):
    """A connection that reads while it sends, and then says that it has sent all."""

    def send_in_pieces(self, data: bytes, count: int) -> None:
        self._sent = data
        step = max(1, -(-len(data) // count))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for start in range(0, len(data), step):
                self._send_reading(data[start : start + step])
            self.stop_sending()

    def _send_reading(self, data: bytes) -> None:
        while data:
            readable, writable, _ = select.select([self._socket], [self._socket], [], TIMEOUT)
            if not readable and not writable:
                raise Hang("the registry reads no more")
            if readable:
                received = self._receive()
                self._buffer += received
                if not received:
                    return
            if writable:
                data = data[self._socket.send(data[:65536], socket.MSG_DONTWAIT) :]

    def _receive(self) -> bytes:
        try:
            return super()._receive()
        except socket.timeout:
            raise Hang("the registry neither answers nor closes") from None


class Fuzzer:
    """One run against one daemon."""

    def __init__(self, daemon: Daemon, seed: int, authorization: str = "") -> None:
        self.seed = seed
        self.authorization = authorization
        self.requests = 0
        self.replies: Counter[int] = Counter()
        self.failures: list[str] = []
        self.acknowledged: set[str] = set()
        self.latencies: list[float] = []
        self.data = DataDirectory(daemon.data)
        self._daemon = daemon
        self._host = daemon.client.host
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._check = HTTPTestCase()
        self._stop = threading.Event()

    def run(self, requests: int, connections: int) -> None:
        """Send so many requests, and look at what is left."""
        before = held_at_rest(self._daemon.process.pid)
        for name in (HONEST, *MUTATED):
            fill(self._client(name))
        self.acknowledged.update(self.data.recorded())
        bystander = threading.Thread(target=self._stand_by)
        workers = [threading.Thread(target=self._work, args=(requests,)) for _ in range(connections)]
        for thread in (bystander, *workers):
            thread.start()
        for thread in workers:
            thread.join()
        self._stop.set()
        bystander.join()
        self._examine(lambda: self._audit(before))

    def run_batch(self, number: int) -> None:
        """Send one batch of the run that has this seed."""
        for name in (HONEST, *MUTATED):
            fill(self._client(name))
        self._send(make_batch(self.seed, number, self.authorization))

    def _client(self, repository: str) -> Client:
        return AuthorizedClient(self._host, repository, self.authorization)

    def _work(self, requests: int) -> None:
        while self.requests < requests and len(self.failures) < FAILURE_LIMIT:
            batch = make_batch(self.seed, next(self._numbers), self.authorization)
            with self._lock:
                self.requests += batch.size
            self._send(batch)

    def _stand_by(self) -> None:
        """An honest client beside all that; how long it waits for each reply."""
        client = self._client("honest/bystander")

        def visit() -> None:
            with client.keep_alive() as kept:
                content = b"%d" % len(self.latencies)
                self.acknowledged.add(kept.push_blob(content))
                got = kept.expect(200, "GET", f"blobs/{digest_of(content)}")
                self._check.assertEqual(got.body, content)

        while not self._stop.wait(0.02) and len(self.failures) < FAILURE_LIMIT:
            started = time.perf_counter()
            self._examine(visit)
            self.latencies.append(time.perf_counter() - started)

    def _examine(self, look: Callable[[], None], batch: str = "", sent: bytes = b"") -> None:
        """Note what fails, with what was sent."""
        try:
            look()
        except Exception as error:
            reason = "".join(traceback.format_exception(type(error), error, error.__traceback__)[-4:])
            with self._lock:
                self.failures.append(f"{batch}{reason}" + (f"sent: {sent!r}" if sent else ""))

    def _send(self, batch: Batch) -> None:
        sessions = self._open_sessions() if batch.needs_sessions else []
        sent = batch.render(sessions)
        headline = f"--seed {self.seed} --batch {batch.number}: "
        self._examine(lambda: self._exchange(batch, sent), headline, sent)

    def _open_sessions(self) -> list[str]:
        with self._client(MUTATED[0]).keep_alive() as client:
            return [client.open_upload().rpartition("/")[2] for _ in range(SESSIONS)]

    def _exchange(self, batch: Batch, sent: bytes) -> None:
        with Exchange(self._host) as connection:
            connection.send_in_pieces(sent, batch.pieces)
            if batch.reset:
                connection.reset()
                return
            for message in [*batch.messages, *([] if batch.tail else [batch.probe])]:
                reply = self._read(connection, message.method)
                self._check.assertIsNotNone(reply, f"no reply to {message}")
                self._check_reply(reply, message)
                if "Connection" in reply.headers and message is not batch.probe:
                    self._check.assertIsNone(message.expected, f"hung up after {message}")
                    break
            else:
                while reply := self._read(connection, "GET") if batch.tail else None:
                    self._check_reply(reply, None)
            self._check.assertTrue(
                connection.is_closed(), f"more than was asked for: {connection._buffer[:300]!r}"
            )

    def _read(self, connection: Exchange, method: str) -> Response | None:
        """The next reply that is final, counted."""
        reply = connection.read_unless_closed(method)
        while reply is not None and reply.status == 100:
            reply = connection.read_unless_closed(method)
        if reply is not None:
            with self._lock:
                self.replies[reply.status] += 1
        return reply

    def _check_reply(self, reply: Response, message: Message | None) -> None:
        check = self._check
        allowed = 505 if message is None else 0
        check.assertTrue(reply.status < 500 or reply.status == allowed, reply)
        check.assertEqual(reply.headers["Docker-Distribution-API-Version"], "registry/2.0")
        check.assertTrue((reply.headers.get("Location") or "/v2/").startswith("/v2/"), reply)
        if reply.status >= 400 and reply.body:
            check.assert_error(reply, reply.status)
        digest = reply.headers.get("Docker-Content-Digest")
        if digest and reply.status == 200 and reply.body:
            check.assertEqual(digest_of(reply.body, digest.partition(":")[0]), digest)
        if digest and reply.status == 201:
            self.acknowledged.add(digest)
        if message is not None and message.expected is not None:
            status, body = message.expected
            check.assertEqual(reply.status, status, f"{message} got {reply}")
            check.assertIn(body, (None, reply.body), f"{message} got {reply}")

    # --- Afterwards

    def _audit(self, before: tuple[int, Counter[str]]) -> None:
        """What is stored, and what is still held."""
        pid, check = self._daemon.process.pid, self._check
        with contextlib.suppress(AssertionError):
            wait_until(lambda: held(pid) == before)
        check.assertEqual(held(pid), before, "threads, sockets and files held before and after")
        fill(self._client("honest/afterwards"))
        recorded = self.data.recorded()
        check.assertEqual(self.data.disagreements(), [])
        check.assertEqual(set(recorded) - self.acknowledged, set(), "stored, but not acknowledged")
        self._audit_names()
        verified = command("verify", "--data", self._daemon.data)
        check.assertEqual((verified.returncode, verified.stdout), (0, "no problems found\n"), verified.stderr)

    def _audit_names(self) -> None:
        check, rows = self._check, self.data.rows
        for (name,) in rows("SELECT name FROM repositories"):
            check.assertRegex(name, rf"\A{NAME.pattern}\Z")
            check.assertLessEqual(len(name), 255)
        for (tag,) in rows("SELECT name FROM tags"):
            check.assertRegex(tag, rf"\A{TAG.pattern}\Z")
        sessions = self.data.unfinished()
        check.assertTrue(all(map(SESSION_ID.fullmatch, sessions)), sessions)
        strange = [path.name for path in self.data.path.iterdir() if not KEPT_FILES.fullmatch(path.name)]
        check.assertEqual(strange, [], "in the data directory")

    def check_log(self, output: str) -> None:
        """Nothing that a client sent ends up raw in what the daemon wrote."""
        lines = output.split("\n")

        def look() -> None:
            self._check.assertNotIn("Traceback", output)
            self._check.assertEqual([line for line in lines if not line.isprintable()], [])

        self._examine(look)


def fuzz(
    requests: int, seed: int, *, users: bool = False, connections: int = 6, batch: int | None = None
) -> tuple[Fuzzer, str]:
    """Run against a daemon of its own, with users or without; the run, and one line that sums it up."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (directory / "users.txt").write_text(users_line(USER, PASSWORD), "utf-8")
        options = ["--users", str(directory / "users.txt"), "--anonymous-pull"] if users else []
        daemon = stack.enter_context(Daemon(directory / "data", "--no-sync", *options))
        authorization = basic(USER, PASSWORD) if users else ""
        fuzzer, started = Fuzzer(daemon, seed, authorization), time.monotonic()
        if batch is None:
            fuzzer.run(requests, connections)
        else:
            fuzzer.run_batch(batch)
        seconds = time.monotonic() - started
        peak = memory(daemon.process.pid, "VmHWM") if LINUX else 0
        daemon.stop()
        fuzzer.check_log(daemon.remaining_output())
    latencies = sorted(fuzzer.latencies) or [0.0]
    slow = f"{latencies[len(latencies) * 99 // 100] * 1000:.0f} ms"
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(fuzzer.replies.items()))
    answered = sum(fuzzer.replies.values())
    return fuzzer, (
        f"seed {seed}: {fuzzer.requests} requests in {seconds:.0f} s, {answered} answered ({statuses});"
        f" honest visits {len(fuzzer.latencies)}, p99 {slow}; peak memory {peak} MiB;"
        f" {len(fuzzer.failures)} failures"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="(default: a new one each time)")
    parser.add_argument("--users", action="store_true", help="against a daemon that asks who is there")
    parser.add_argument("--connections", type=int, default=6, help="at once")
    parser.add_argument("--batch", type=int, default=None, help="send only this batch of the seed's run")
    options = parser.parse_args()
    seed = Random().randrange(10**9) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    fuzzer, summary = fuzz(
        options.requests, seed, users=options.users, connections=options.connections, batch=options.batch
    )
    for failure in fuzzer.failures:
        print(failure, file=sys.stderr)
    print(summary)
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
