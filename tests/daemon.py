"""The real program in processes of its own: its daemon, its commands, and what a process holds."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import registry
from tests.support import ROOT, TIMEOUT, Client, HTTPTestCase, RawConnection, wait_until


def free_port() -> int:
    """A port that was free a moment ago; where port 0 will do, nobody else can take it meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# === Commands ===

# What all these processes import is compiled once, whatever the environment says, and not into the tree.
_COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
ENVIRONMENT = {**os.environ, "PYTHONPYCACHEPREFIX": _COMPILED.name}
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess:
    """Run a program to its end in the top directory."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = {"cwd": ROOT, "env": ENVIRONMENT, **pipes, "text": True, "timeout": 6 * TIMEOUT, **options}
    return subprocess.run(command, check=False, **options)


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    """Run this interpreter to its end in the top directory."""
    return run(sys.executable, *arguments, **options)


def unread(*arguments: str) -> subprocess.CompletedProcess:
    """Run the program with nobody to read what it prints, as before `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return run(sys.executable, *Daemon.PROGRAM, *arguments, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)


def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """What `python registry.py` does with these arguments, done in this process, a tenth as long."""
    streams = {"stdin": io.StringIO(stdin), "stdout": io.StringIO(), "stderr": io.StringIO()}
    handler = signal.getsignal(signal.SIGTERM)
    serve = mock.patch.object(registry.Server, "serve_forever", lambda _self: None)  # or it would serve
    with mock.patch.multiple(sys, **streams), serve:
        try:
            status = registry.main(arguments)
        except SystemExit as end:
            status = end.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(
        arguments, status, streams["stdout"].getvalue(), streams["stderr"].getvalue()
    )


# === The daemon ===


class Daemon:
    """The program serving in a process of its own, from its serving line to its end."""

    _SERVING = re.compile(r"Serving (.+) at (https?://(.+))")
    # `python registry.py`, but compiled once, and not by each process anew, and without what a machine may
    # have every Python import.
    CODE = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import registry; sys.exit(registry.main())"
    PROGRAM = ("-S", "-c", CODE)

    def __init__(self, data: str | Path, *options: str, under: Sequence[str] = ()) -> None:
        """under: a command that is to run it."""
        self.data = str(data)
        self.options = options
        self.under = under
        self.program: Sequence[str] = self.PROGRAM
        self.output: list[str] = []

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def start(self) -> None:
        port = () if "--port" in self.options else ("--port", "0")
        command = [*self.under, sys.executable, *self.program, "--data", self.data, *port, *self.options]
        pipe, environment = subprocess.PIPE, {**ENVIRONMENT, "TMPDIR": self._make_temporary()}
        self.process = subprocess.Popen(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()
        self.serving = self._SERVING.fullmatch(self.read_line())
        if self.serving is None:
            self.kill()
            raise AssertionError(f"no serving line: {self.output}")
        self.client = Client(self.serving[3], "daemon/image")

    def _make_temporary(self) -> str:
        """Where it puts what it does not live to remove."""
        self._temporary = tempfile.TemporaryDirectory()
        os.chmod(self._temporary.name, 0o777)
        return self._temporary.name

    def _collect(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def read_line(self) -> str:
        """The next line of output; its end is an empty line."""
        line = self._lines.get(timeout=TIMEOUT) or ""
        self.output.append(line)
        return line

    def remaining_output(self) -> str:
        """Everything not read yet, once the process has ended."""
        lines = iter(lambda: self._lines.get(timeout=TIMEOUT), None)
        return "\n".join(lines)

    def printed(self) -> str:
        """Everything so far."""
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get_nowait()) is not None:
                self.output.append(line)
            self._lines.put(None)
        return "\n".join(self.output)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process to end and return its exit code."""
        return self.process.wait(2 * TIMEOUT)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()
        self._reader.join(TIMEOUT)
        self._temporary.cleanup()
        if self._reader.is_alive():  # closing what it reads would wait for it
            raise AssertionError("some process that the daemon started outlives it")
        self.process.stdout.close()


class DaemonTestCase(HTTPTestCase):
    """A data directory for a daemon, or several."""

    def setUp(self) -> None:
        self.path = self.temporary()

    def start(self, *options: str, data: str | Path = "", under: Sequence[str] = ()) -> Daemon:
        return self.enter(Daemon(data or self.path, *options, under=under))

    def connect(self, daemon: Daemon) -> RawConnection:
        return self.enter(RawConnection(daemon.client.host))

    def request_in_flight(self, daemon: Daemon, method: str, path: str, length: int) -> RawConnection:
        """A request whose body the daemon is waiting for."""
        connection = self.connect(daemon)
        path = daemon.client.path(path)
        connection.request(method, path, f"Content-Length: {length}", "Expect: 100-continue")
        self.assert_status(connection.read(), 100)
        return connection


# === What a process holds, as /proc tells on Linux ===

LINUX = sys.platform == "linux"
IDLE = registry.IDLE_THREADS + 2  # threads that a daemon may have while nobody asks


def thread_count(process: int) -> int:
    """How many threads it has, not counting the few that may wait for the next connection."""
    return max(len(os.listdir(f"/proc/{process}/task")), IDLE)


def open_files(process: int | str = "self") -> Counter[str]:
    """What its descriptors are, but for its database, which it keeps open."""
    links: Counter[str] = Counter()
    for entry in os.scandir(f"/proc/{process}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links[re.sub(r":\[\d+\]", "", os.readlink(entry.path))] += 1
    return Counter({link: count for link, count in links.items() if "registry.db" not in link})


def held(process: int) -> tuple[int, Counter[str]]:
    return (thread_count(process), open_files(process)) if LINUX else (0, Counter())


def held_at_rest(process: int) -> tuple[int, Counter[str]]:
    """The same once it does not change any more."""
    seen = [held(process)]

    def settled() -> bool:
        seen.append(held(process))
        return len(seen) > 20 and len({str(each) for each in seen[-20:]}) == 1

    wait_until(settled, "for a process to come to rest")
    return seen[-1]


def memory(process: int, what: str = "VmRSS") -> int:
    """Mebibytes that are resident, or with VmHWM that ever were."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(re.findall(rf"{what}:\s+(\d+)", status)[0]) // 1024


def children(process: int) -> set[int]:
    """The processes that a process has started."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    return {int(word) for word in text.split()}


def is_alive(process: int) -> bool:
    """Whether a process runs, and is not merely waiting to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
