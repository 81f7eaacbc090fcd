"""What the tests of manifests share: a repository to push them to."""

from __future__ import annotations

from typing import Any

from tests.support import (
    OCI_CONFIG,
    OCI_MANIFEST,
    RegistryTestCase,
    Response,
    descriptor,
    digest_of,
    image_manifest,
    unique,
)


class ManifestTestCase(RegistryTestCase):
    """A repository that holds a config and a layer of its own."""

    CONFIG = b"{}"

    def setUp(self) -> None:
        super().setUp()
        self.layer = unique("layer")
        for content in (self.CONFIG, self.layer):
            self.client.push_blob(content)

    def manifest(self, **more: Any) -> dict:
        """A manifest that is accepted; `more` replaces its members, and None removes one."""
        manifest = image_manifest(descriptor(self.CONFIG, OCI_CONFIG), [descriptor(self.layer)])
        return {name: value for name, value in {**manifest, **more}.items() if value is not None}

    def put(self, manifest: Any, reference: str = "tag", media_type: str = OCI_MANIFEST) -> Response:
        return self.client.put_manifest(manifest, reference, media_type)

    def assert_served(self, reference: str, body: bytes, media_type: str, digest: str = "") -> None:
        """GET and HEAD give exactly what was pushed."""
        for method in ("GET", "HEAD"):
            response = self.client.request(method, f"manifests/{reference}")
            self.assert_status(response, 200)
            self.assertEqual(response.headers["Content-Type"], media_type)
            self.assertEqual(response.headers["Content-Length"], str(len(body)))
            self.assertEqual(response.headers["Docker-Content-Digest"], digest or digest_of(body))
            self.assertIn("ETag", response.headers)
            self.assertEqual(response.body, body if method == "GET" else b"")

    def assert_nothing_stored(self, body: bytes) -> None:
        for algorithm in ("sha256", "sha512"):
            digest = digest_of(body, algorithm)
            self.assert_status(self.client.get(f"manifests/{digest}"), 404)
            self.assert_no_blob(self.client, digest)
        self.assert_error(self.client.get("manifests/tag"), 404, "MANIFEST_UNKNOWN")
        self.assertEqual(self.client.get("tags/list").json.get("tags"), [])
