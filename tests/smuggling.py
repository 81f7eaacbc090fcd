"""Malformed requests: most of them end in different places for different servers, as attackers send them.

Each entry must be refused; `SMUGGLED` is what it wants to have answered as another request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

SMUGGLED = b"GET /v2/smuggled/tags/list HTTP/1.1\r\nHost: registry.test\r\n\r\n"

_CHUNKED = b"Transfer-Encoding: chunked"
_LAST = b"0\r\n\r\n"
_HELLO = b"5\r\nhello\r\n" + _LAST
_LENGTH = b"Content-Length: %d" % len(SMUGGLED)


class Entry(NamedTuple):
    """A request to refuse; whatever it carries begins or ends with SMUGGLED."""

    name: str
    data: bytes


def _request(*lines: bytes, body: bytes = b"", line: bytes = b"POST {upload} HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: registry.test", *lines, b"", b""]) + body


LENGTHS = (
    b"+0|-0|-5|0x0|00x|0, 5|0 5|0;5|0.0|1e1|0_0|\xb2|\xd9\xa5|five||'0'|\"5\"|\x0b0|0\x0c|" + b"9" * 30
).split(b"|")
CODINGS = (
    b"chunked, chunked|chunked, identity|identity, chunked|gzip, chunked|chunked, gzip|gzip|identity|cow"
    b"|xchunked|chunkedx|chunked;q=1|chunked,|,chunked|'chunked'|\"chunked\"|\x0bchunked|chunked\x0b|\x0cchunked"
    b"|\x01chunked|chunked\x00|\x00chunked|\xa0chunked|chun ked|chunk||[chunked]|chunked\x85"
).split(b"|")
SIZES = (
    b"0x5|0X5|+5|-5| 5|\t5|5h|5_|0_5|5.|5,5||;x|g|\xb5|5 5|5\x00|5\x0b|5\x85|5\xa0|5 x|fffffffffffffffff"
    b'|100000000000000005|5\r|5;a\nb|5;a\rb|5;a\x00b|5;\n|5;a="\r\n"|5\r;|5\n;'
).split(b"|")
VERSIONS = (
    b"HTTP/01.1|HTTP/1.01|HTTP/1.10|http/1.1|HTTP/1,1|HTTP/1.|HTTP/x.y|HTTP/1.1.1|HTTP/+1.1|HTTP/-1.1|FTP/1.1"
    b"|HTTP/9999999999.1"
).split(b"|")
TRAILERS = (
    b"no colon| folded: x|A: b\r\n folded|A : b|: b|A\x00: b|A: b\x00|A: b\rC: d|A: b\nC: d|A: b\r|A: b\n"
    b"|A\xff: b"
).split(b"|")
HEADERS = (
    b" X: y|\tX: y|X: y\r\n folded|X: y\r\n\tfolded|X: y\r\n Transfer-Encoding: chunked"
    b"|Transfer-Encoding:\r\n chunked|Content-Length:\r\n 0|X : y|Content-Length : 0|Content-Length\t: 0"
    b"|Transfer-Encoding : chunked|Transfer-Encoding\x0b: chunked|Transfer-Encoding\x00: chunked"
    b"|\x00Transfer-Encoding: chunked|Transfer-Encoding\xa0: chunked|Transfer Encoding: chunked|no colon|: y"
    b"|X: y\nTransfer-Encoding: chunked|X: y\rTransfer-Encoding: chunked|X: y\r|X: y\n"
    b"|X: y\r\r\nTransfer-Encoding: chunked|X: y\n\r\nTransfer-Encoding: chunked|X: \x00|X\x00: y"
    b"|X: y\x00\r\nZ: y|Host: other.test|(X): y|X(Y): z|X\xff: y"
).split(b"|")


def _lengths() -> Iterator[Entry]:
    """A Content-Length beside a Transfer-Encoding, several lengths, and lengths that are no numbers."""
    yield Entry("CL then TE", _request(b"Content-Length: 15", _CHUNKED, body=_LAST + SMUGGLED))
    yield Entry("TE then CL", _request(_CHUNKED, b"Content-Length: 5", body=_LAST + SMUGGLED))
    yield Entry("CL.0 and TE", _request(b"Content-Length: 0", _CHUNKED, body=_LAST + SMUGGLED))
    pairs = (
        (b"0", _LENGTH[16:]),
        (_LENGTH[16:], b"0"),
        (b"5", b"6"),
        (b"5", b"5"),
        (b"5", b"05"),
        (b"0", b"-0"),
    )
    for pair in pairs:
        lines = [b"Content-Length: " + value for value in pair]
        yield Entry(f"two lengths {pair}", _request(*lines, body=SMUGGLED))
    for value in (*LENGTHS, b"9" * 5000):
        yield Entry(f"length {value[:40]!r}", _request(b"Content-Length: " + value, body=SMUGGLED))


def _codings() -> Iterator[Entry]:
    """Transfer-Encodings that some take for chunked and others do not."""
    for value in CODINGS:
        line = b"Transfer-Encoding: " + value
        yield Entry(f"coding {value!r}", _request(line, body=_LAST + SMUGGLED))
        yield Entry(f"length and coding {value!r}", _request(_LENGTH, line, body=SMUGGLED))
    for second in (b"chunked", b"identity", b"cow", b""):
        lines = (_CHUNKED, b"Transfer-encoding: " + second)
        yield Entry(f"two codings, {second!r} last", _request(*lines, body=_LAST + SMUGGLED))
        yield Entry(f"two codings, {second!r} first", _request(*lines[::-1], body=_LAST + SMUGGLED))
    old = b"POST {upload} HTTP/1.0"
    yield Entry("coding in HTTP/1.0", _request(_CHUNKED, body=_LAST + SMUGGLED, line=old))
    keep = b"Connection: keep-alive"
    yield Entry("kept alive in HTTP/1.0", _request(keep, _CHUNKED, body=_LAST + SMUGGLED, line=old))


def _chunks() -> Iterator[Entry]:
    """Chunked bodies that end in different places for different readers."""
    endless = (
        b"f" * 5000,
        b"0" * 5000 + b"5",
        b"0" * 100_000 + b"5",
        b"5;" + b"x" * 5000,
        b"5;" + b"x" * 100_000,
    )
    for size in (*SIZES, *endless):
        body = size + b"\r\nhello\r\n" + _LAST + SMUGGLED
        yield Entry(f"chunk size {size[:20]!r}", _request(_CHUNKED, body=body))
    for body in (
        b"5\nhello\r\n0\r\n\r\n",
        b"5\rhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello\r0\r\n\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"5\r\nhelloXX0\r\n\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5\r\nhello\n\r\n0\r\n\r\n",
        b"5\r\nhello\r\n\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\n\r\n",
        b"5\r\nhello\r\n0\r\n\n",
        b"5\r\nhello\r\n0\r\r\n",
        b"5\r\nhello\r\n-0\r\n\r\n",
        b"5\r\nhello\r\n0x0\r\n\r\n",
        b"5\r\nhello\r\n00000000000000000000000000000\r\n\r\n",
    ):
        yield Entry(f"chunks {body!r}", _request(_CHUNKED, body=body + SMUGGLED))
    for trailer in TRAILERS:
        body = b"5\r\nhello\r\n0\r\n" + trailer + b"\r\n\r\n"
        yield Entry(f"trailer {trailer!r}", _request(_CHUNKED, body=body + SMUGGLED))


def _heads() -> Iterator[Entry]:
    """Heads whose lines different readers tell apart differently."""
    for line in HEADERS:
        yield Entry(f"header {line!r}", _request(_LENGTH, line, body=SMUGGLED))
    for end in (b"\n\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\r\n\r"):
        yield Entry(f"head ending in {end!r}", _request(_LENGTH)[:-4] + end + SMUGGLED)
    yield Entry("line feeds alone", _request(_LENGTH, b"X: y").replace(b"\r\n", b"\n") + SMUGGLED)


def _request_lines() -> Iterator[Entry]:
    """Request lines that are two things at once."""
    for line in (
        b"POST  {upload} HTTP/1.1",
        b"POST {upload}  HTTP/1.1",
        b"POST\t{upload}\tHTTP/1.1",
        b"POST\x0b{upload} HTTP/1.1",
        b" POST {upload} HTTP/1.1",
        b"POST {upload} HTTP/1.1 ",
        b"POST {upload} x HTTP/1.1",
        b"POST {upload} HTTP/1.1 HTTP/1.1",
        b"POST {upload}",
        b"POST {upload} HTTP/1.1\r",
        b"POST {upload}\x00 HTTP/1.1",
        b"POST {upload}\r HTTP/1.1",
        b"POST {upload}\xa0HTTP/1.1",
        b"POST {upload} HTTP/1.1\x00",
        b"PO\x00ST {upload} HTTP/1.1",
        b"PO:ST {upload} HTTP/1.1",
        b"\x00POST {upload} HTTP/1.1",
        b"\nPOST {upload} HTTP/1.1",
        b"\rPOST {upload} HTTP/1.1",
        b"POST http://user@registry.test{upload} HTTP/1.1",
        b"POST",
        *(b"POST {upload} " + version for version in VERSIONS),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ):
        yield Entry(f"request line {line!r}", _request(_LENGTH, line=line, body=SMUGGLED))


CORPUS = (*_lengths(), *_codings(), *_chunks(), *_heads(), *_request_lines())
