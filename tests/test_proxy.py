"""Behind a trusted proxy: whose requests they are, and where clients are sent for tokens."""

from __future__ import annotations

import registry
from tests.access import AccessTestCase
from tests.support import RawConnection


class TrustedProxiesAreBelieved(AccessTestCase):
    """Whose requests they are that come from a proxy."""

    def logged(self, forwarded: str, *proxies: str) -> str:
        """The address in the access log for a request from 127.0.0.1 with this X-Forwarded-For."""
        client = self.serve(users=None, trusted_proxies=proxies)
        with RawConnection(client.host) as connection:
            parts = forwarded.split("|")
            connection.request("GET", "/v2/", *(f"X-Forwarded-For: {part}" for part in parts)).read()
        self.registry.close()
        return self.log[-1].split(" ")[1]

    def test_the_log_names_the_client_behind_it(self) -> None:
        here = "127.0.0.1"
        for forwarded, proxies, address in (
            ("203.0.113.7", [here], "203.0.113.7"),
            ("203.0.113.7", ["127.0.0.0/8"], "203.0.113.7"),
            ("2001:db8::7", ["::/0", here], "2001:db8::7"),
            ("2001:0DB8:0::7", [here], "2001:db8::7"),
            ("::ffff:203.0.113.7", [here], "203.0.113.7"),
            ("198.51.100.1, 203.0.113.7", [here], "203.0.113.7"),
            ("198.51.100.1,203.0.113.7, 10.0.0.9", [here, "10.0.0.0/8"], "203.0.113.7"),
            ("198.51.100.1|203.0.113.7|10.0.0.9", [here, "10.0.0.0/8"], "203.0.113.7"),
            ("10.0.0.8, 10.0.0.9", [here, "10.0.0.0/8"], "10.0.0.8"),
        ):
            with self.subTest(forwarded, proxies=proxies):
                self.assertEqual(self.logged(forwarded, *proxies), address)

    def test_what_is_no_address_ends_the_search(self) -> None:
        for forwarded in (
            "", "unknown", "203.0.113.7,", "203.0.113.7, x", "203.0.113.7:80", "256.1.1.1", "fe80::1%a b",
            "203.0.113.7, fe80::1%\x1b[31m", "1" * 5000, "," * 5000,
        ):  # fmt: skip
            with self.subTest(forwarded[:20]):
                self.assertEqual(self.logged(forwarded, "127.0.0.1", "fe80::/10"), "127.0.0.1")

    def test_others_are_not_believed(self) -> None:
        for proxies in ([], ["127.0.0.2"], ["::/0"], ["203.0.113.7"]):
            with self.subTest(proxies):
                self.assertEqual(self.logged("203.0.113.7", *proxies), "127.0.0.1")

    def test_what_is_no_network_keeps_it_from_starting(self) -> None:
        for text in ("", "proxy.example", "10.0.0.1/8", "10.0.0.0/33", "::1/129"):
            with self.subTest(text), self.assertRaises(registry.StartupError):
                self.serve(trusted_proxies=[text])

    def test_the_command_line_takes_several(self) -> None:
        options = registry.build_parser().parse_args(
            ["--trusted-proxy", "::1", "--trusted-proxy", "10.0.0.0/8"]
        )
        self.assertEqual(options.trusted_proxies, ["::1", "10.0.0.0/8"])
        self.assertNotIn("trusted_proxies", registry.build_parser().parse_args([]))
