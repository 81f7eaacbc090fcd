"""A private certification authority, made with the openssl program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HAS_OPENSSL = shutil.which("openssl") is not None

EXTENSIONS = """\
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
authorityKeyIdentifier=keyid
subjectKeyIdentifier=hash
subjectAltName={}
"""


class Authority:
    """A CA in a directory of its own: `certificate` is what clients trust."""

    def __init__(self, directory: Path, name: str = "Test CA") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.certificate, self._key = directory / "ca.crt", directory / "ca.key"
        use = ("-addext", "keyUsage=critical,keyCertSign,cRLSign", "-days", "2")
        self._openssl("req", "-x509", *self._new_key(self._key, name), *use, "-out", self.certificate)

    def issue(self, name: str, *, days: int = 2, addresses: str = "IP:127.0.0.1,DNS:localhost") -> Path:
        """A certificate for this name; its key is beside it, with the suffix .key."""
        path = self.directory / f"{name.replace('/', '-')}.crt"
        request, extensions = path.with_suffix(".csr"), path.with_suffix(".ext")
        extensions.write_text(EXTENSIONS.format(addresses), "utf-8")
        self._openssl("req", "-new", *self._new_key(path.with_suffix(".key"), name), "-out", request)
        signing = ["-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"]
        valid = ["-days", str(days), "-extfile", extensions]
        self._openssl("x509", "-req", "-in", request, *signing, *valid, "-out", path)
        return path

    def _new_key(self, path: Path, name: str) -> list[str | Path]:
        curve = "ec_paramgen_curve:prime256v1"
        return ["-newkey", "ec", "-pkeyopt", curve, "-nodes", "-keyout", path, "-subj", f"/O=Test/CN={name}"]

    def _openssl(self, *arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"openssl {arguments}\n{done.stderr}")
