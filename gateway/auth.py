"""Who may do what: tokens, Host and Origin. Pure decisions over header values.

Knows nothing of Tornado and reads nothing: the handlers hand in what came with the request.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

# Names under which a browser on this machine reaches a server on loopback.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def token_from(*, authorization: str | None, query: str | None) -> str | None:
    """The token of a request: `Authorization: token X`, `Authorization: Bearer X` or `?token=X`; None: there is none.

    A header with another scheme (a proxy's Basic) leaves the query to speak.
    """
    if authorization:
        scheme, _, value = authorization.strip().partition(" ")
        if scheme.lower() in ("token", "bearer"):
            return value.strip()
    return query or None


def token_matches(given: str | None, expected: str) -> bool:
    """Compares in constant time. An empty `expected` (no token was wanted) lets everyone in."""
    if not expected:
        return True
    return given is not None and hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


def is_loopback(address: str) -> bool:
    """Whether an IP address, or the name to listen at, is this machine's loopback."""
    if address == "localhost":
        return True
    try:
        parsed = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def host_allowed(host: str | None, *, listen_host: str, allowed_hosts: Sequence[str]) -> bool:
    """Guards a gateway on loopback against DNS rebinding: a web page's own name that was made to point at 127.0.0.1.

    host: the Host header. Beyond loopback the gateway has a token and may be reached under any name.
    """
    if not is_loopback(listen_host):
        return True
    if host is None:
        return False
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name in LOOPBACK_NAMES or is_loopback(name) or name in (listen_host, *allowed_hosts)


def origin_allowed(origin: str | None, *, host: str | None, cors_origins: Sequence[str]) -> bool:
    """Whether a page of `origin` may open a WebSocket or read an answer. Programs send no Origin and may.

    Scheme is not compared: behind a TLS proxy the page has https and the gateway http.
    """
    if origin is None or "*" in cors_origins:
        return True
    if origin.lower().rstrip("/") in [allowed.lower().rstrip("/") for allowed in cors_origins]:
        return True
    try:
        return bool(host) and urlsplit(origin.lower()).netloc == (host or "").lower()
    except ValueError:
        return False
