"""cosign: signatures as referrers and, in the older form, under the fallback tag `sha256-<hex>.sig`."""

from __future__ import annotations

import base64
import json

from support import ClientTest, image_layout

# No transparency log and no public key infrastructure: nothing may be asked beyond this machine.
OFFLINE_SIGN = ("--tlog-upload=false", "--use-signing-config=false", "--yes")
OFFLINE_VERIFY = ("--insecure-ignore-tlog=true",)
OLD_FORM = "--new-bundle-format=false"


class CosignTest(ClientTest):
    programs = ("cosign", "crane")

    def setUp(self) -> None:
        super().setUp()
        layout = image_layout(self.directory / "source", self.name)
        self.ok("crane", "push", str(layout.path), f"{self.repository}:v1")
        self.digest = layout.top()["digest"]
        self.image = f"{self.repository}@{self.digest}"
        self.ok("cosign", "generate-key-pair", COSIGN_PASSWORD="")

    def sign(self, *options: str) -> None:
        options = (*OFFLINE_SIGN, "--key=cosign.key", "--allow-http-registry", *options)
        self.ok("cosign", "sign", *options, self.image, COSIGN_PASSWORD="")

    def verifying(self, *options: str) -> tuple[str, ...]:
        """The command that verifies the image's signatures."""
        options = (*OFFLINE_VERIFY, "--key=cosign.pub", "--allow-http-registry", *options)
        return ("cosign", "verify", *options, self.image)

    def assert_verified(self, *options: str) -> None:
        payloads = json.loads(self.ok(*self.verifying(*options)))
        signed = {payload["critical"]["image"]["docker-manifest-digest"] for payload in payloads}
        self.assertEqual(signed, {self.digest})

    def test_signature_is_a_referrer(self) -> None:
        self.assertIn("no signatures found", self.fails(*self.verifying()))
        self.sign()
        self.assert_verified()
        self.assertEqual(self.registry.tags(self.name), ["v1"])

    def test_signature_under_the_fallback_tag(self) -> None:
        self.assertIn("no signatures found", self.fails(*self.verifying(OLD_FORM)))
        self.sign(OLD_FORM)
        self.assert_verified(OLD_FORM)
        self.assertEqual(self.registry.tags(self.name), [self.digest.replace(":", "-") + ".sig", "v1"])

    def test_signature_of_another_key_is_refused(self) -> None:
        self.sign()
        (self.directory / "cosign.key").unlink()
        (self.directory / "cosign.pub").unlink()
        self.ok("cosign", "generate-key-pair", COSIGN_PASSWORD="")
        self.fails(*self.verifying())

    def test_attestation_beside_a_signature(self) -> None:
        self.sign()
        (self.directory / "predicate.json").write_text(json.dumps({"checked": self.name}), "utf-8")
        attest = ("cosign", "attest", "--type=custom", "--predicate=predicate.json", "--allow-http-registry")
        self.ok(*attest, *OFFLINE_SIGN, "--key=cosign.key", self.image, COSIGN_PASSWORD="")

        verify = ("cosign", "verify-attestation", "--type=custom", "--allow-http-registry")
        envelope = json.loads(self.ok(*verify, *OFFLINE_VERIFY, "--key=cosign.pub", self.image))
        statement = json.loads(base64.b64decode(envelope["payload"]))
        self.assertEqual(statement["subject"][0]["digest"]["sha256"], self.digest.partition(":")[2])
        self.assertIn(self.name, json.dumps(statement["predicate"]))
        self.assert_verified()
