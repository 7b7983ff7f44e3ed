"""Finds the gateway: arguments, then HYPERCELL_URL and HYPERCELL_TOKEN, then the local gateway's own file.

Reads environment and file system only; whether the gateway answers is seen by the first request (hypercell/client.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from hypercell.errors import NoGatewayError

URL_VARIABLE = "HYPERCELL_URL"
TOKEN_VARIABLE = "HYPERCELL_TOKEN"

# Where `hypercelld serve` leaves its address and token (docs/architecture.md, "The gateway's HTTP").
GATEWAY_FILE = Path("hypercell") / "gateway.json"

HOW_TO_START = (
    "Start one with `hypercelld serve`, or say where it is with "
    f"{URL_VARIABLE} and {TOKEN_VARIABLE} (or the options --url and --token)."
)


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """The address of a gateway. `url` has no slash at its end; `token` is kept out of `repr`, so out of logs."""

    url: str
    token: str = field(repr=False, default="")


def locate(*, url: str | None = None, token: str | None = None, environ: Mapping[str, str] | None = None) -> Gateway:
    """The gateway to use. The first place that names a URL decides, and so does the first that names a token.

    Raises NoGatewayError, with what was looked at and how to start a gateway.
    """
    variables = os.environ if environ is None else environ
    token = token or variables.get(TOKEN_VARIABLE, "")
    if url:
        return Gateway(url=_checked_url(url, source="The argument"), token=token)
    if variables.get(URL_VARIABLE):
        return Gateway(url=_checked_url(variables[URL_VARIABLE], source=URL_VARIABLE), token=token)
    local = local_gateway(environ=variables)
    return replace(local, token=token) if token else local


def local_gateway(*, environ: Mapping[str, str] | None = None) -> Gateway:
    """The gateway that this user runs on this machine, from the file it wrote. Raises NoGatewayError."""
    variables = os.environ if environ is None else environ
    path = next((path for path in _gateway_files(variables) if path.exists()), None)
    if path is None:
        raise NoGatewayError(f"No Hypercell gateway is running here. {HOW_TO_START}")
    return _read_gateway_file(path)


def _gateway_files(variables: Mapping[str, str]) -> list[Path]:
    """The well-known places, best first; the same order in which the gateway chooses one."""
    uid = os.geteuid()
    places = []
    if variables.get("XDG_RUNTIME_DIR"):
        places.append(Path(variables["XDG_RUNTIME_DIR"]))
    if uid == 0:
        places.append(Path("/run"))
    return [*(place / GATEWAY_FILE for place in places), Path(f"/tmp/hypercell-{uid}") / GATEWAY_FILE.name]


def _read_gateway_file(path: Path) -> Gateway:
    try:
        # The directory may be /tmp, where anyone could leave a file that sends a user's code to a stranger's gateway.
        if path.stat().st_uid not in {os.geteuid(), 0}:
            raise NoGatewayError(f"{path} belongs to another user, so it is not used. {HOW_TO_START}")
        content = json.loads(path.read_text(encoding="utf-8"))
        gateway = Gateway(url=_checked_url(str(content["url"]), source=str(path)), token=str(content["token"]))
        pid = int(content["pid"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoGatewayError(f"{path} cannot be read as a gateway's file ({error}). {HOW_TO_START}") from error
    if not _is_alive(pid):
        raise NoGatewayError(
            f"The Hypercell gateway that ran here (process {pid}) has ended and left {path} behind. {HOW_TO_START}"
        )
    return gateway


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _checked_url(url: str, *, source: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise NoGatewayError(f"{source} says the gateway is at {url!r}, which is not a URL like http://127.0.0.1:8888.")
    return url.rstrip("/")
