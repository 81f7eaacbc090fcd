"""The programs of others, which .ci/run and .ci/peers install."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Those that Debian lacks are built into this directory; elsewhere PATH alone decides.
TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "registry-ci" / "bin"
PATH = os.pathsep.join([str(TOOLS), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def program(name: str) -> str | None:
    """The path of an installed program."""
    return shutil.which(name, path=PATH)
