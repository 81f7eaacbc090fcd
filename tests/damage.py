"""What the tests of verifying share: ways to damage a data directory."""

from __future__ import annotations

from pathlib import Path

from tests import upkeep
from tests.support import DataDirectory, OwnRegistryTestCase, digest_of


class Damage:
    """Does things to a data directory that no registry does."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.path = DataDirectory(data).blob

    def flip_bit(self, digest: str) -> None:
        content = bytearray(self.path(digest).read_bytes())
        content[len(content) // 2] ^= 1
        self.path(digest).write_bytes(content)

    def truncate(self, digest: str, size: int = 0) -> None:
        self.path(digest).write_bytes(self.path(digest).read_bytes()[:size])

    def extend(self, digest: str) -> None:
        with open(self.path(digest), "ab") as file:
            file.write(b"and more")

    def remove(self, digest: str) -> None:
        self.path(digest).unlink()

    def add(self, content: bytes) -> str:
        digest = digest_of(content)
        self.path(digest).write_bytes(content)
        return digest

    def unlink(self, digest: str) -> None:
        """Lose a repository's link and the row, but neither the file nor who needs it."""
        for table in ("repository_blobs", "blobs"):
            upkeep.change(self.data, f"DELETE FROM {table} WHERE digest = ?", digest)


class VerifyTestCase(OwnRegistryTestCase):
    """An image to damage."""

    def setUp(self) -> None:
        super().setUp()
        self.damage = Damage(self.data.path)
        self.image = self.client.push_image("v1", layers=2)
        self.layer = digest_of(self.image.layers[0])

    def verify(self, *, repair: bool = False) -> list[tuple[str, str]]:
        return upkeep.verify(self.registry.store, repair=repair)

    def push_again(self) -> None:
        """As clients do: send what a HEAD does not find."""
        for content in self.image.blobs:
            if self.client.head(f"blobs/{digest_of(content)}").status == 404:
                self.client.push_blob(content)
        if self.client.head("manifests/v1").status == 404:
            self.client.push_manifest(self.image.body, "v1")
