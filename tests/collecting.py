"""What the tests of garbage collection share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import upkeep
from tests.support import OwnRegistryTestCase, digest_of, encode, image_index
from tests.upkeep import DAY


def add_garbage(data: Path, count: int) -> None:
    """Rows of so many blobs of the first repository that nothing needs, for long, whose files are gone."""
    numbers = f"WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT {count})"
    digest = "printf('sha256:%064d', n)"
    upkeep.change(data, f"INSERT INTO blobs {numbers} SELECT {digest}, 1 FROM n")
    columns = "repository_id, digest, leased_at, needed_by"
    links = f"{numbers} SELECT 1, {digest}, 0, 0 FROM n"
    upkeep.change(data, f"INSERT INTO repository_blobs ({columns}) {links}")


class CollectionTestCase(OwnRegistryTestCase):
    """Collects in process, on contents that have grown old."""

    def collect(self, *, age: float = DAY, **policy: Any) -> list[str]:
        """Let everything be this old, collect, and return the digests of what went."""
        upkeep.everything(self.data.path, age)
        removed = upkeep.collect(self.registry.store, **policy)
        self.assert_consistent()
        return [digest for _, digest in removed]

    def assert_gone(self, *contents: bytes) -> None:
        for content in contents:
            self.assert_no_blob(self.client, digest_of(content))

    def push_index(self, *children: dict, tag: str = "", **more: Any) -> bytes:
        body = encode(image_index(children, **more))
        self.client.push_manifest(body, tag)
        return body
