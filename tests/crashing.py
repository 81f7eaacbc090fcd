"""A launcher of registries that kill themselves at the k-th durable step they take.

It prepares one process and forks a registry from it for each job. A job is a line of JSON on standard
input: {"data": directory, "step": k or 0 for never, "whole": whether starting counts too, "command": the
arguments of a command to run instead of a daemon, or null}. Lines of JSON come back: {"host"} when a daemon
serves, and when its process has ended, {"steps": the kinds of those it reached, "died": whether at the k-th,
"status"}. An empty line ends the process.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import registry
from tests.steps import KINDS, Observer, Step, observed

REPLY = "reply"
CODES = [*KINDS, REPLY]
ROOM = 64 * 1024
FAILED = 70

_say = os.write  # as it was before it was observed


class Countdown:
    """Writes down each step where the launcher can read it, and ends the process at the fatal one."""

    def __init__(self, log: mmap.mmap, fatal: int) -> None:
        self.armed = False
        self._log = log
        self._fatal = fatal
        self._lock = threading.Lock()
        self._count = 0

    def __call__(self, step: Step) -> None:
        if self.armed:
            with self._lock:
                self._log[self._count] = 1 + CODES.index(step.kind)
                self._count += 1
                if self._count == self._fatal:
                    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def replies_observed(observer: Observer) -> Iterator[None]:
    """Sending to a client is a step too: what came before it is done and not acknowledged."""
    send = socket.socket.sendall

    def observed_send(connection: socket.socket, *arguments: Any) -> None:
        observer(Step(REPLY, connection))
        send(connection, *arguments)

    with mock.patch.object(socket.socket, "sendall", observed_send):
        yield


def serve(data: str, countdown: Countdown, *, whole: bool) -> None:
    """A daemon, but for its signals and command line: it ends by being killed."""
    countdown.armed = whole
    daemon = registry.Registry(data)
    daemon.open()
    _say(1, json.dumps({"host": daemon.netloc}).encode() + b"\n")
    countdown.armed = True
    daemon.serve()


def end_when_told() -> None:
    """Die as soon as the next line of input, or its end, says that the test is done with this process."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def run_job(job: dict[str, Any], log: mmap.mmap) -> int:
    """The life of a forked process; its exit status if it is not killed."""
    countdown = Countdown(log, job["step"])
    threading.Thread(target=end_when_told, daemon=True).start()
    # A killed process loses nothing that it wrote, synced or not, so the time for syncing can be saved.
    with observed(countdown, real_sync=False), replies_observed(countdown):
        if job["command"] is None:
            serve(job["data"], countdown, whole=job["whole"])
            return 0
        countdown.armed = True
        with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
            return registry.main(job["command"])


def fork_job(job: dict[str, Any], log: mmap.mmap) -> int:
    """Run a job in a process of its own; its exit status, negative for a signal."""
    log[:] = bytes(ROOM)
    pid = os.fork()
    if not pid:
        status = FAILED
        try:
            status = run_job(job, log)
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main() -> None:
    log = mmap.mmap(-1, ROOM)
    for line in sys.stdin:
        if not line.strip():  # meant for a process that had ended already
            continue
        job = json.loads(line)
        status = fork_job(job, log)
        steps = [CODES[code - 1] for code in log[: log.find(b"\0")]]
        outcome = {"steps": steps, "died": len(steps) == job["step"], "status": status}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
