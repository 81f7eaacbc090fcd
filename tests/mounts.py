"""File systems of the tests' own, which only root may mount: small ones and read-only ones; and nobody."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import MEBIBYTE, ROOT, DataDirectory

SIZE = 32 * MEBIBYTE


class Volume:
    """A small file system in memory, with a data directory on it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.data = DataDirectory(self.path / "data")

    @property
    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Take the space that is left but for so much, to the last byte."""
        with open(self.path / "filler", "ab", buffering=0) as filler:
            if leave:
                filler.write(bytes(self.free - leave))
                return
            for size in (MEBIBYTE, 4096, 1):
                with contextlib.suppress(OSError):
                    while filler.write(bytes(size)) == size:
                        pass

    def empty(self) -> None:
        (self.path / "filler").unlink()


@contextlib.contextmanager
def mounted(path: str | Path) -> Iterator[Volume]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", path]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield Volume(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True, capture_output=True)


READ_ONLY_DISK = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
NOBODY = 65534
AS_NOBODY = f"""
import encodings.idna, os, sys
sys.path.insert(0, {str(ROOT)!r})
import registry  # now, and what it imports later: nobody may not be let into Python's directory
registry.build_parser().parse_args(['--port', '0'])
os.setgid({NOBODY})
os.setuid({NOBODY})
sys.argv[1:] = sys.argv[sys.argv.index("-c", 1) + 1 :]
exec(sys.argv.pop(1))
"""


def on_read_only_disk(data: str | Path) -> list[str]:
    """A command that runs another, to which the disk with the data directory is read-only."""
    return ["unshare", "--mount", "sh", "-c", READ_ONLY_DISK, "sh", str(data)]


def as_nobody(_data: str | Path) -> list[str]:
    """A command that runs another, `python -c ...`, as a user who owns nothing."""
    return [sys.executable, "-c", AS_NOBODY]


def _reason_against(try_out: Callable[[str], object]) -> str:
    """Why something cannot be done here, tried on a directory; empty if it can."""
    if os.geteuid() != 0:
        return "only root may mount, and become somebody else"
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        try:
            try_out(path)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"not possible here: {error}"
    return ""


@functools.cache
def no_volume() -> str:
    def mount(path: str) -> None:
        with mounted(path):
            pass

    return _reason_against(mount)


@functools.cache
def no_read_only() -> str:
    def start(path: str) -> None:
        for under in (as_nobody(path), on_read_only_disk(path)):
            subprocess.run([*under, sys.executable, "-c", "pass"], check=True, capture_output=True)

    return _reason_against(start)
