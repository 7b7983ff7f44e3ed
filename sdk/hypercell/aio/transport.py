"""HTTP and WebSocket to one gateway, for all sandboxes of one event loop: connections, retries, errors as exceptions.

Knows no route. httpx and websockets are imported when first used: that takes longer than `import hypercell` may.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from weakref import WeakKeyDictionary, WeakSet

from hypercell.errors import (
    ClosedError,
    ConnectionLostError,
    GatewayRefusedError,
    HypercellError,
    NoGatewayError,
    refused,
)
from hypercell.locate import Gateway

if TYPE_CHECKING:
    import httpx
    from websockets.asyncio.client import ClientConnection

# A start may have to build its template first: a boot of an emulated machine takes about a minute.
START_TIMEOUT_S = 300.0
# All other calls answer at once; this bounds a gateway that hangs.
REQUEST_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
# Long calls (create, fork) hold a connection each; beyond this they wait for one another.
MAX_CONNECTIONS = 256
# Shorter than the gateway keeps idle connections (600 s), so that none is used that it is just closing.
KEEP_ALIVE_S = 60.0
# A gateway that has answered before is waited for so long: a restart takes seconds. One that never has fails at once.
RETRY_WINDOW_S = 30.0
RETRY_FIRST_S = 0.1
RETRY_LONGEST_S = 2.0
# As much as the gateway sends in one message by default (`max_message_mib`).
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
PING_INTERVAL_S = 20.0
# The gateway's words for why it does nothing now (gateway/listener.py).
NOT_SERVING = frozenset({"starting", "stopping"})
# A gateway that does not answer a goodbye in this time is left without.
CLOSE_TIMEOUT_S = 2.0
# RFC 6455, 7.4.1: all was sent.
CLOSE_NORMAL = 1000

IDEMPOTENT = frozenset({"GET", "HEAD", "DELETE", "PUT", "PATCH"})


class _Shared:
    """What all transports of one event loop to one gateway have together."""

    def __init__(self) -> None:
        self.leases = 0
        self.client: httpx.AsyncClient | None = None
        self.has_answered = False


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Gateway, _Shared]] = WeakKeyDictionary()

# What a process that was forked has of its parent's connections. Closing them here, as the garbage collector would,
# takes them from the parent as well: the loops' selectors are the same ones.
_of_parent: list[object] = []


def leave_to_parent(thing: object) -> None:
    """`thing` was made by the process from which this one was forked: it is kept, and never touched again."""
    _of_parent.append(thing)


class Transport:
    """Get one with `Transport.lease`; it must be followed by a `release`. The last release closes all connections.

    In a process that was forked it has connections of its own.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._leased = self._lease()
        self._pid = os.getpid()
        # What is open of this lease alone: WebSockets, and answers that are being read.
        self._open: WeakSet[Any] = WeakSet()
        self.is_released = False

    @classmethod
    def lease(cls, gateway: Gateway) -> Transport:
        """A transport to `gateway` in the running event loop."""
        return cls(gateway)

    def _lease(self) -> _Shared:
        shared = _of_loop.setdefault(asyncio.get_running_loop(), {}).setdefault(self.gateway, _Shared())
        shared.leases += 1
        return shared

    @property
    def _shared(self) -> _Shared:
        if self._pid != os.getpid():
            leave_to_parent((self._leased, list(self._open)))
            self._leased, self._open, self._pid = self._lease(), WeakSet(), os.getpid()
        return self._leased

    async def release(self) -> None:
        """Ends what is open of it. Twice is harmless; any call afterwards raises ClosedError."""
        if self.is_released:
            return
        self.is_released = True
        shared = self._shared
        await asyncio.gather(*(end() for end in [getattr(one, "aclose", None) or one.close for one in self._open]))
        shared.leases -= 1
        if shared.leases == 0:
            _of_loop.get(asyncio.get_running_loop(), {}).pop(self.gateway, None)
            client, shared.client = shared.client, None
            if client is not None:
                await client.aclose()

    @classmethod
    @asynccontextmanager
    async def leased(cls, gateway: Gateway) -> AsyncIterator[Transport]:
        """A lease for one call."""
        transport = cls.lease(gateway)
        try:
            yield transport
        finally:
            await transport.release()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.gateway.token}"} if self.gateway.token else {}

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        timeout_s: float | None = REQUEST_TIMEOUT_S,
    ) -> Any:
        """One request and its answer's JSON, None for an empty one. What is safe to repeat is repeated.

        Raises NoGatewayError, ConnectionLostError, GatewayRefusedError.
        """
        repeated = False
        async for _ in self._attempts():
            try:
                async with self.stream(method, path, body=body, query=query, timeout_s=timeout_s) as answer:
                    content = await answer.aread()
            except ConnectionLostError:
                if method not in IDEMPOTENT:
                    raise
                repeated = True
                continue
            except NoGatewayError:
                if not self._shared.has_answered:
                    raise
                continue
            except GatewayRefusedError as error:
                if repeated and method == "DELETE" and error.status == 404:
                    return None
                raise
            return json.loads(content) if content else None
        raise NoGatewayError(
            f"The Hypercell gateway at {self.gateway.url} has not answered for {RETRY_WINDOW_S:.0f} s. "
            "It did before: see whether `hypercelld serve` still runs."
        )

    async def _attempts(self) -> AsyncIterator[None]:
        deadline = time.monotonic() + RETRY_WINDOW_S
        pause_s = RETRY_FIRST_S
        yield
        while time.monotonic() + pause_s < deadline:
            await asyncio.sleep(pause_s)
            yield
            pause_s = min(2 * pause_s, RETRY_LONGEST_S)

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        content: AsyncIterable[bytes] | None = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = REQUEST_TIMEOUT_S,
    ) -> AsyncIterator[httpx.Response]:
        """One request, sent once; its answer is not read yet. timeout_s: for each read and write. Raises as `call`."""
        import httpx

        self._check_open()
        client = self._shared.client
        if client is None:
            client = self._shared.client = httpx.AsyncClient(
                base_url=self.gateway.url,
                headers=self.headers,
                # The gateway is on this machine or in this network; a web proxy would only get in the way.
                trust_env=False,
                limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=KEEP_ALIVE_S),
            )
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
        sent: dict[str, Any] = {}
        if content is not None:
            sent["content"] = content
        elif body is not None:
            sent["json"] = dict(body)
        parameters = {name: _parameter(value) for name, value in (query or {}).items() if value is not None}
        try:
            async with client.stream(
                method, path, params=parameters, headers=dict(headers or {}), timeout=timeout, **sent
            ) as answer:
                self._shared.has_answered = True
                if answer.status_code >= 400:
                    raise self.refusal(answer.status_code, await answer.aread(), answer.reason_phrase)
                self._open.add(answer)
                yield answer
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from error
        except httpx.HTTPError as error:
            self._check_open()
            raise ConnectionLostError(
                f"The connection to the Hypercell gateway at {self.gateway.url} broke during {method} {path} "
                f"({type(error).__name__}{': ' if str(error) else ''}{error}). It may have been done all the same."
            ) from error

    def _check_open(self) -> None:
        if self.is_released:
            raise ClosedError("This connection was closed. `connect(id)` makes a new one.")

    def _unreachable(self, error: Exception) -> NoGatewayError:
        return NoGatewayError(
            f"The Hypercell gateway at {self.gateway.url} does not answer ({error}). "
            "See whether `hypercelld serve` runs there."
        )

    def refusal(self, status: int, content: bytes, phrase: str = "") -> HypercellError:
        """The exception for an answer of 400 or more: NoGatewayError while the gateway starts or stops."""
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        value = answer if isinstance(answer, dict) else {}
        code = str(value.get("code") or "")
        words = str(value.get("message") or value.get("reason") or phrase or "no reason was given")
        if code in NOT_SERVING:
            return NoGatewayError(words)
        if status == 401:
            words = (
                f"The gateway at {self.gateway.url} does not take this token ({words}). "
                "`hypercelld serve` prints its token; set HYPERCELL_TOKEN."
            )
        return refused(words, status=status, code=code)

    async def connect(
        self,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        subprotocol: str | None = None,
        timeout_s: float = START_TIMEOUT_S,
    ) -> ClientConnection:
        """An open WebSocket; the caller closes it. Not retried. Raises NoGatewayError, GatewayRefusedError."""
        from websockets.asyncio.client import connect
        from websockets.exceptions import InvalidHandshake, InvalidStatus
        from websockets.typing import Subprotocol

        self._check_open()
        parameters = {name: _parameter(value) for name, value in (query or {}).items() if value is not None}
        url = self.gateway.url.replace("http", "ws", 1) + path + ("?" + urlencode(parameters) if parameters else "")
        try:
            websocket = await connect(
                url,
                additional_headers=self.headers,
                subprotocols=[Subprotocol(subprotocol)] if subprotocol else None,
                compression=None,
                proxy=None,
                open_timeout=timeout_s,
                max_size=MAX_MESSAGE_BYTES,
                ping_interval=PING_INTERVAL_S,
                # The answer to a ping stands behind the messages that a slow callback has not taken yet, so a late one
                # says nothing. The pings keep the way open; where nobody is left, TCP finds that out by them.
                ping_timeout=None,
                close_timeout=CLOSE_TIMEOUT_S,
            )
        except InvalidStatus as error:
            answer = error.response
            raise self.refusal(answer.status_code, bytes(answer.body or b""), answer.reason_phrase) from error
        except (OSError, InvalidHandshake, asyncio.TimeoutError, EOFError) as error:
            raise self._unreachable(error) from error
        self._shared.has_answered = True
        self._open.add(websocket)
        return websocket


# HTTP's phrases as the gateway sends them; Python has changed some, and the gateway may run on another version of it.
_STATUS_OF_PHRASE = {status.phrase: status.value for status in HTTPStatus} | {
    "Content Too Large": 413,
    "Request Entity Too Large": 413,
    "Range Not Satisfiable": 416,
    "Requested Range Not Satisfiable": 416,
    "Unprocessable Content": 422,
    "Unprocessable Entity": 422,
}


def refusal_in(frame: Mapping[str, Any]) -> HypercellError:
    """The exception for a WebSocket's `{"type": "error", "reason", "message", "code"}` (docs/exec_and_files.md)."""
    if frame["code"] in NOT_SERVING:
        return ConnectionLostError(str(frame["message"]))
    status = _STATUS_OF_PHRASE.get(str(frame.get("reason")), 500)
    return refused(str(frame["message"]), status=status, code=str(frame["code"]))


def _parameter(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
