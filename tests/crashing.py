"""A launcher of registries that kill themselves, or find the database locked, at the k-th step they take.

It prepares one process and forks a registry from it for each job. A job is a line of JSON on standard
input: {"data": directory, "step": k or 0 for never, "fault": what happens at the k-th, "whole": whether
starting counts too, "command": the arguments of a command to run instead of a daemon, or null}. Lines of
JSON come back: {"host"} when a daemon serves, and when its process has ended, {"steps": the kinds of those
it reached, "struck": whether the fault came, "status"}. An empty line ends the process; "disarm", answered
with an empty line, has no more steps counted.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import registry
from tests.steps import DATABASE, KINDS, Step, observed

KILLED, LOCKED = "killed", "database is locked"
ROOM = 64 * 1024
STRUCK = ROOM - 1  # where the log says whether the fault came
FAILED = 70

_say = os.write  # as it was before it was observed


class Countdown:
    """Writes down each step where the launcher can read it, and has the fault come at one of them."""

    def __init__(self, log: mmap.mmap, step: int, fault: str) -> None:
        self.armed = False
        self._log = log
        self._step = step
        self._fault = fault
        self._lock = threading.Lock()
        self._count = 0

    def __call__(self, step: Step) -> None:
        if not self.armed:
            return
        with self._lock:
            self._log[self._count] = 1 + KINDS.index(step.kind)
            self._count += 1
            if self._log[STRUCK] or not 0 < self._step <= self._count:
                return
            if self._fault == KILLED:
                self._log[STRUCK] = 1
                os.kill(os.getpid(), signal.SIGKILL)
            if step.kind in DATABASE:
                self._log[STRUCK] = 1
                raise sqlite3.OperationalError(LOCKED)


def serve(data: str, countdown: Countdown, *, whole: bool) -> None:
    """A daemon, but for its signals and command line: it ends by being killed."""
    countdown.armed = whole
    daemon = registry.Registry(data)
    daemon.open()
    _say(1, json.dumps({"host": daemon.netloc}).encode() + b"\n")
    countdown.armed = True
    daemon.server.serve_forever()


def obey(countdown: Countdown) -> None:
    """Die as soon as the next line of input, or its end, says that the test is done with this process."""
    while os.read(0, 64).strip() == b"disarm":
        countdown.armed = False
        _say(1, b"\n")
    os.kill(os.getpid(), signal.SIGKILL)


def run_job(job: dict[str, Any], log: mmap.mmap) -> int:
    """The life of a forked process; its exit status if it is not killed."""
    countdown = Countdown(log, job["step"], job["fault"])
    threading.Thread(target=obey, args=(countdown,), daemon=True).start()
    with contextlib.ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        if job["fault"] == LOCKED:  # which is logged
            stack.enter_context(contextlib.redirect_stderr(nothing))
        # A killed process loses nothing that it wrote, synced or not, so the time for syncing can be saved.
        stack.enter_context(observed(countdown, real_sync=False))
        if job["command"] is None:
            serve(job["data"], countdown, whole=job["whole"])
            return 0
        countdown.armed = True
        with contextlib.redirect_stdout(nothing):
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
        steps = [KINDS[code - 1] for code in log[: log.find(b"\0")]]
        outcome = {"steps": steps, "struck": bool(log[STRUCK]), "status": status}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
