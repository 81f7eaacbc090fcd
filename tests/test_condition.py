"""If-Match and If-None-Match (RFC 9110, 13) on blobs and manifests."""

from __future__ import annotations

from tests.manifests import ManifestTestCase
from tests.support import OCI_MANIFEST, RegistryTestCase, Response, descriptor, digest_of, encode, unique


class ConditionsOnManifests(ManifestTestCase):
    """If-Match and If-None-Match (RFC 9110, 13) on what changes and what reads manifests."""

    def setUp(self) -> None:
        super().setUp()
        self.old, self.new = encode(self.manifest()), encode(self.manifest(annotations={"n": "2"}))
        self.etag, self.new_etag = f'"{digest_of(self.old)}"', f'"{digest_of(self.new)}"'

    def put_if(self, condition: dict, reference: str = "tag", body: bytes = b"", query: str = "") -> Response:
        headers = {"Content-Type": OCI_MANIFEST, **condition}
        return self.client.put(f"manifests/{reference}{query}", body or self.new, headers)

    def assert_failed(self, response: Response) -> None:
        self.assert_error(response, 412, "DENIED")

    def test_a_tag_is_moved_only_from_where_the_client_saw_it(self) -> None:
        self.client.push_manifest(self.old, "tag")
        for condition in (self.new_etag, f"W/{self.etag}", "", '"*"', digest_of(self.old)):
            with self.subTest(condition):
                self.assert_failed(self.put_if({"If-Match": condition}))
                self.assert_served("tag", self.old, OCI_MANIFEST)
                self.assert_no_blob(self.client, digest_of(self.new))
        self.assert_status(self.put_if({"If-Match": f'"other", {self.etag}'}), 201)
        self.assert_served("tag", self.new, OCI_MANIFEST)
        self.assert_failed(self.put_if({"If-Match": self.etag}, body=self.old))
        self.assert_status(self.put_if({"If-Match": "*"}, body=self.old), 201)
        self.assert_served("tag", self.old, OCI_MANIFEST)

    def test_a_tag_that_is_absent_matches_nothing(self) -> None:
        for condition in ("*", self.etag, self.new_etag):
            with self.subTest(condition):
                self.assert_failed(self.put_if({"If-Match": condition}))
        self.assert_nothing_stored(self.new)

    def test_a_tag_is_created_and_not_moved(self) -> None:
        create = {"If-None-Match": "*"}
        self.assert_status(self.put_if(create, body=self.old), 201)
        for body in (self.new, self.old):
            self.assert_failed(self.put_if(create, body=body))
        self.assert_served("tag", self.old, OCI_MANIFEST)
        self.assert_no_blob(self.client, digest_of(self.new))
        self.assert_status(self.put_if(create, "other"), 201)

    def test_a_tag_is_not_moved_from_what_the_client_rules_out(self) -> None:
        self.client.push_manifest(self.old, "tag")
        for condition in (self.etag, f"W/{self.etag}", f'"other" , {self.etag}'):
            with self.subTest(condition):
                self.assert_failed(self.put_if({"If-None-Match": condition}))
        self.assert_status(self.put_if({"If-None-Match": self.new_etag}), 201)

    def test_by_digest_the_conditions_are_about_the_digest_and_no_tag(self) -> None:
        self.client.push_manifest(self.old, "tag")
        digest = digest_of(self.new)
        self.assert_failed(self.put_if({"If-Match": "*"}, digest, query="?tag=tag"))
        self.assert_served("tag", self.old, OCI_MANIFEST)
        self.assert_no_blob(self.client, digest)
        self.assert_status(self.put_if({"If-None-Match": "*"}, digest, query="?tag=tag"), 201)
        self.assert_served("tag", self.new, OCI_MANIFEST)
        self.assert_failed(self.put_if({"If-None-Match": "*"}, digest))
        self.assert_status(self.put_if({"If-Match": self.new_etag}, digest), 201)

    def test_what_is_refused_anyway_is_refused_for_its_own_reason(self) -> None:
        missing = encode(self.manifest(config=descriptor(b"missing")))
        condition = {"If-Match": "*"}
        self.assert_error(self.put_if(condition, body=missing), 400, "MANIFEST_BLOB_UNKNOWN")
        self.assert_error(self.put_if(condition, body=b"{}"), 400, "MANIFEST_INVALID")
        self.assert_error(self.put_if(condition, digest_of(b"other")), 400, "DIGEST_INVALID")
        for reference in ("absent", digest_of(b"absent")):
            for method in ("GET", "DELETE"):
                response = self.client.request(method, f"manifests/{reference}", headers=condition)
                self.assert_error(response, 404, "MANIFEST_UNKNOWN")

    def test_only_what_the_client_saw_is_deleted(self) -> None:
        digest = digest_of(self.old)
        for reference in ("tag", digest):
            self.client.push_manifest(self.old, "tag")
            path = f"manifests/{reference}"
            for condition in (
                {"If-Match": self.new_etag},
                {"If-None-Match": "*"},
                {"If-None-Match": self.etag},
            ):
                with self.subTest(reference, **condition):
                    self.assert_failed(self.client.request("DELETE", path, headers=condition))
                    self.assert_served("tag", self.old, OCI_MANIFEST)
            self.client.expect(202, "DELETE", path, headers={"If-Match": self.etag})
            self.assert_status(self.client.get(path), 404)

    def test_only_what_the_client_saw_is_served(self) -> None:
        self.client.push_manifest(self.old, "tag")
        for reference in ("tag", digest_of(self.old)):
            for method in ("GET", "HEAD"):
                for condition, status in (
                    ({"If-None-Match": self.etag}, 304),
                    ({"If-None-Match": self.new_etag}, 200),
                    ({"If-Match": self.etag}, 200),
                    ({"If-Match": "*"}, 200),
                    ({"If-Match": self.new_etag}, 412),
                    ({"If-Match": f"W/{self.etag}"}, 412),
                    ({"If-Match": self.etag, "If-None-Match": self.etag}, 304),
                    ({"If-Match": self.new_etag, "If-None-Match": self.etag}, 412),
                    ({"If-Match": self.new_etag, "Range": "bytes=0-1"}, 412),
                ):
                    with self.subTest(reference, method=method, **condition):
                        path = f"manifests/{reference}"
                        self.assert_status(self.client.request(method, path, headers=condition), status)


class ConditionsOnBlobs(RegistryTestCase):
    def test_a_known_etag_saves_the_bytes(self) -> None:
        digest = self.client.push_blob(unique())
        etag = self.client.get(f"blobs/{digest}").headers["ETag"]
        for condition in (etag, "*", f'"other", {etag}', f"W/{etag}"):
            for method in ("GET", "HEAD"):
                with self.subTest(condition, method=method):
                    path, headers = f"blobs/{digest}", {"If-None-Match": condition}
                    response = self.client.request(method, path, headers=headers)
                    self.assert_status(response, 304)
                    self.assertEqual(response.body, b"")
                    self.assertEqual(response.headers["ETag"], etag)

    def test_a_condition_may_come_in_several_lines(self) -> None:
        path = f"blobs/{self.client.push_blob(unique())}"
        lines = [("If-None-Match", '"other"'), ("If-None-Match", self.client.get(path).headers["ETag"])]
        self.assert_status(self.client.get(path, lines), 304)

    def test_an_etag_is_quoted(self) -> None:
        digest = self.client.push_blob(unique())
        self.assertRegex(self.client.get(f"blobs/{digest}").headers["ETag"], r'\A"[!#-~]+"\Z')

    def test_another_etag_gets_the_bytes(self) -> None:
        content = unique()
        digest = self.client.push_blob(content)
        for condition in ('"other"', '"a", "b"', f'"{digest}x"', f'"{digest[:-1]}"', '""', ""):
            with self.subTest(condition):
                response = self.client.get(f"blobs/{digest}", {"If-None-Match": condition})
                self.assert_status(response, 200)
                self.assertEqual(response.body, content)

    def test_the_condition_goes_before_the_range(self) -> None:
        digest = self.client.push_blob(unique())
        etag = self.client.get(f"blobs/{digest}").headers["ETag"]
        both = {"If-None-Match": etag, "Range": "bytes=0-1"}
        self.assert_status(self.client.get(f"blobs/{digest}", both), 304)

    def test_no_condition_makes_an_unknown_blob_known(self) -> None:
        digest = digest_of(b"unknown")
        for condition in ("*", f'"{digest}"'):
            with self.subTest(condition):
                response = self.client.get(f"blobs/{digest}", {"If-None-Match": condition})
                self.assert_error(response, 404)
