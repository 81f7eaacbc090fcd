"""containerd, by its own client ctr: push, pull, run."""

from __future__ import annotations

from typing import ClassVar

from support import ClientTest, Layout, image_layout


class ContainerdTest(ClientTest):
    programs = ("containerd", "ctr", "runc", "containerd-shim-runc-v2")
    needs_root = True
    socket: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.socket = cls.start_containerd()

    def setUp(self) -> None:
        super().setUp()
        # A namespace of its own, so that one test's images are not there for the next.
        self.flags = ("--address", self.socket, "--namespace", self._testMethodName)

    def ctr(self, *argv: str) -> str:
        return self.ok("ctr", *self.flags, *argv)

    def push(self, *architectures: str) -> Layout:
        """An image or an index, imported and pushed to v1."""
        layout = image_layout(self.directory / "source", self.name, *architectures)
        self.ok("tar", "-C", str(layout.path), "-cf", "image.tar", ".")
        options = ("--all-platforms", "--no-unpack", "--base-name", self.repository)
        self.ctr("images", "import", *options, "image.tar")
        self.ctr("images", "push", "--plain-http", f"{self.repository}:v1")
        return layout

    def forget(self) -> None:
        """Remove every image and, by waiting for the garbage collector, every blob."""
        for image in self.ctr("images", "ls", "--quiet").split():
            self.ctr("images", "rm", "--sync", image)
        self.assertEqual(self.ctr("content", "ls", "--quiet"), "")

    def pull(self, *options: str) -> None:
        self.ctr("images", "pull", "--plain-http", *options, f"{self.repository}:v1")

    def test_pushed_image_is_served_as_it_was(self) -> None:
        self.assert_served(self.push(), self.name, "v1")

    def test_same_image_pushed_twice(self) -> None:
        layout = self.push()
        self.ctr("images", "push", "--plain-http", f"{self.repository}:v1")
        self.assert_served(layout, self.name, "v1")

    def test_pulled_image_runs(self) -> None:
        self.push()
        self.forget()
        self.pull()
        # The last argument names the container; without a cgroup it runs on every kind of host.
        printed = self.ctr("run", "--rm", "--cgroup", "", f"{self.repository}:v1", "container")
        self.assertEqual(printed.strip(), self.name)

    def test_pulled_index_is_identical(self) -> None:
        layout = self.push("amd64", "arm64")
        self.assert_served(layout, self.name, "v1")
        self.forget()
        self.pull("--all-platforms")
        pulled = set(self.ctr("content", "ls", "--quiet").split())
        self.assertEqual(pulled, set(layout.blobs()))
        for digest, content in layout.blobs().items():
            with self.subTest(digest):
                self.assertEqual(self.ok_bytes("ctr", *self.flags, "content", "get", digest), content)

    def test_pull_of_a_missing_tag_is_not_found(self) -> None:
        self.push()
        said = self.fails("ctr", *self.flags, "images", "pull", "--plain-http", f"{self.repository}:none")
        self.assertIn("not found", said)

    def test_pull_through_a_hosts_directory(self) -> None:
        # A mirror is asked for /v2/... with ?ns=, the registry that it stands for.
        self.push()
        self.forget()
        hosts = self.directory / "hosts" / "registry.example"
        hosts.mkdir(parents=True)
        text = f'server = "http://{self.registry.address}"\n[host."http://{self.registry.address}"]\n'
        (hosts / "hosts.toml").write_text(text + '  capabilities = ["pull", "resolve"]\n', "utf-8")
        image = f"registry.example/{self.name}:v1"
        self.ctr("images", "pull", "--hosts-dir", str(hosts.parent), image)
        self.assertEqual(self.ctr("run", "--rm", "--cgroup", "", image, "mirrored").strip(), self.name)
