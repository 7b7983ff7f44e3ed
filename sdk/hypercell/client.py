"""One HTTP request to the gateway and its answer as JSON, blocking or awaited. Knows no route and no meaning.

Standard library only, and blocking inside a thread, because a kernel is also shut down from `atexit` callbacks
(nbclient does), when event loops and thread pools of the application are already closed.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from hypercell.errors import GatewayRefusedError, NoGatewayError
from hypercell.locate import Gateway

# A kernel's start may have to build its template first: a boot of an emulated machine takes about a minute.
START_TIMEOUT_S = 300.0
# All other calls answer at once; this bounds a gateway that hangs.
REQUEST_TIMEOUT_S = 30.0

# The gateway is on this machine or in this network: a web proxy from the environment would only get in the way.
_opener = build_opener(ProxyHandler({}))


def request(
    gateway: Gateway,
    method: str,
    path: str,
    *,
    body: dict[str, Any] | None = None,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> Any:
    """Sends one request and returns the answer's JSON, None for an empty one.

    path: from the root, like `/api/kernels`. Raises NoGatewayError if nothing answers, GatewayRefusedError for a
    status of 400 or more.
    """
    headers = {"Authorization": f"token {gateway.token}"} if gateway.token else {}
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    elif method == "POST":
        data = b""
    call = Request(gateway.url + path, data=data, headers=headers, method=method)
    try:
        with _opener.open(call, timeout=timeout_s) as answer:
            content = answer.read()
    except HTTPError as error:
        raise _refused(error, gateway=gateway) from error
    except (OSError, HTTPException) as error:
        # URLError is an OSError, as are time-outs and refused connections.
        cause = getattr(error, "reason", None) or error
        raise NoGatewayError(f"The Hypercell gateway at {gateway.url} does not answer ({cause}).") from error
    return json.loads(content) if content else None


async def request_async(
    gateway: Gateway,
    method: str,
    path: str,
    *,
    body: dict[str, Any] | None = None,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> Any:
    """As `request`, without blocking the event loop."""
    call = partial(request, gateway, method, path, body=body, timeout_s=timeout_s)
    try:
        answer = asyncio.get_running_loop().run_in_executor(None, call)
    except RuntimeError:
        # The interpreter is exiting: `atexit` callbacks run after Python has closed all thread pools.
        return call()
    return await answer


def _refused(error: HTTPError, *, gateway: Gateway) -> GatewayRefusedError:
    with error:
        try:
            content = json.loads(error.read())
        except (OSError, ValueError):
            content = None
    answer = content if isinstance(content, dict) else {}
    if error.code in {401, 403} and not answer.get("message"):
        message = f"The Hypercell gateway at {gateway.url} does not accept this token."
    else:
        words = answer.get("message") or answer.get("reason") or error.reason
        message = f"The Hypercell gateway answered {error.code}: {words}"
    return GatewayRefusedError(message, status=error.code, code=str(answer.get("code") or ""))
