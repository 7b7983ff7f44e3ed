"""Who may do what."""

from __future__ import annotations

import os
import socket

import pytest

from gateway.auth import host_allowed, is_loopback, origin_allowed, token_from, token_matches
from gateway.local_peer import peer_uid


@pytest.mark.parametrize(
    ("authorization", "query", "token"),
    [
        ("token abc", None, "abc"),
        ("Bearer abc", None, "abc"),
        ("bearer  abc ", "other", "abc"),
        (None, "abc", "abc"),
        ("Basic dTpw", "abc", "abc"),
        ("Basic dTpw", None, None),
        ("abc", None, None),
        ("", "", None),
    ],
)
def test_the_three_forms_of_a_token(authorization: str | None, query: str | None, token: str | None) -> None:
    assert token_from(authorization=authorization, query=query) == token


def test_only_the_token_matches() -> None:
    assert token_matches("abc", "abc")
    assert not token_matches("abd", "abc")
    assert not token_matches("ä\udcff", "abc")
    assert not token_matches("", "abc")
    assert not token_matches(None, "abc")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.1", "example.org", "", "localhost.example.org"])
def test_not_loopback(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost:8870", True),
        ("127.0.0.1", True),
        ("[::1]:8870", True),
        ("lab.example.org", True),
        ("evil.example.org:8870", False),
        ("localhost.evil.org", False),
        ("[", False),
        ("", False),
        (None, False),
    ],
)
def test_a_gateway_on_loopback_knows_its_names(host: str | None, allowed: bool) -> None:
    assert host_allowed(host, listen_host="127.0.0.1", allowed_hosts=["lab.example.org"]) == allowed


def test_beyond_loopback_any_name_will_do() -> None:
    assert host_allowed("anything", listen_host="0.0.0.0", allowed_hosts=[])


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://localhost:8870", True),
        ("https://LOCALHOST:8870", True),
        ("https://lab.example.org", True),
        ("http://localhost:9999", False),
        ("https://evil.example.org", False),
        ("null", False),
        ("http://[", False),
    ],
)
def test_origins(origin: str | None, allowed: bool) -> None:
    assert origin_allowed(origin, host="localhost:8870", cors_origins=["https://lab.example.org/"]) == allowed


def test_a_star_allows_all_origins() -> None:
    assert origin_allowed("https://evil.example.org", host="localhost", cors_origins=["*"])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_user_at_the_other_end(family: socket.AddressFamily) -> None:
    with socket.socket(family) as listener:
        try:
            listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as client:
            peer, local = client.getsockname()[:2], listener.getsockname()[:2]
            assert peer_uid(peer, local) == os.geteuid()
            assert peer_uid((peer[0], 1), local) is None
