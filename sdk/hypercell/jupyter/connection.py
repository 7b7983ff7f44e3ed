"""Relays a browser's kernel WebSocket to the gateway, byte for byte: a drop-in for jupyter_server's own relay.

Set as `ServerApp.kernel_websocket_connection_class` (`hypercell lab` does). jupyter_server creates one per browser
WebSocket and calls `prepare` before the handshake, `connect` once it is open, `handle_incoming_message` for each
message and `disconnect` when the browser has gone. Its own class speaks only the old subprotocol, ends at messages of
10 MiB and at any binary one, and waits 40 ms for each answer (Nagle's algorithm). This one speaks upstream whatever
the browser chose, so nothing is parsed or copied, and lets a slow browser slow down the kernel instead of buffering.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Any

from jupyter_server.gateway.connections import GatewayWebSocketConnection
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.utils import url_path_join
from tornado.escape import url_escape
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, WebSocketError, websocket_connect
from traitlets import Int, Unicode

# RFC 6455, section 7.4.1: the status codes with which a WebSocket is closed.
CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_TOO_BIG = 1009
CLOSE_INTERNAL_ERROR = 1011

# Trying again cannot help: the kernel is gone, or the token is wrong.
FINAL_STATUSES = frozenset({400, 401, 403, 404, 410})


class HypercellWebSocketConnection(GatewayWebSocketConnection):
    """One browser's WebSocket and its counterpart to the gateway."""

    # None: the browser chooses, as in jupyter_server without a gateway.
    kernel_ws_protocol = Unicode(None, allow_none=True, config=True)

    max_message_bytes = Int(
        256 * 1024 * 1024,
        config=True,
        help="Largest message in either direction, and most that is kept while the gateway cannot be reached. "
        "One data frame, image or widget buffer is one message; a browser tab rarely survives larger ones.",
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._relay: asyncio.Task[None] | None = None
        # Messages of the browser stay here until the gateway has confirmed them: what was only written to a connection
        # that then breaks is lost with it. The first one is number `_first`; those below `_sent` were written.
        self._pending: deque[str | bytes] = deque()
        self._pending_bytes = 0
        self._pending_changed = asyncio.Event()
        self._first = 0
        self._sent = 0

    async def prepare(self) -> None:
        """Before the handshake, since tornado reads the largest message size when it switches protocols."""
        self.websocket_handler.settings["websocket_max_message_size"] = self.max_message_bytes

    async def connect(self) -> None:
        """Starts the relay. It lives until `disconnect`."""
        self.websocket_handler.set_nodelay(True)
        self._relay = asyncio.create_task(self._run())

    def disconnect(self) -> None:  # type: ignore[override] # a plain function in GatewayWebSocketConnection, too
        """The browser has gone: ends the relay and closes the gateway's side."""
        self.disconnected = True
        if self._relay is not None:
            self._relay.cancel()

    def handle_incoming_message(self, message: str | bytes) -> None:
        """Takes a message from the browser; it is sent when the gateway is connected, again if that breaks."""
        if self._pending_bytes + len(message) > self.max_message_bytes:
            self.log.error("Kernel %s takes no messages and %d bytes wait", self.kernel_id, self._pending_bytes)
            self._close_browser(CLOSE_TOO_BIG, "Too much data waits for the kernel")
            return
        self._pending.append(message)
        self._pending_bytes += len(message)
        self._pending_changed.set()

    async def _run(self) -> None:
        """Connects to the gateway, and again when the connection is lost, until there is no point any more."""
        client = GatewayClient.instance()
        retry = 0
        while True:
            try:
                upstream = await self._open()
            except HTTPClientError as error:
                if error.code in FINAL_STATUSES:
                    self.log.error("The gateway refuses kernel %s: %s", self.kernel_id, error)
                    self._close_browser(CLOSE_GOING_AWAY, "The gateway refuses this kernel")
                    return
                self.log.warning("The gateway does not take the connection to %s: %s", self.kernel_id, error)
            except (OSError, WebSocketError) as error:
                self.log.warning("The gateway does not answer for kernel %s: %s", self.kernel_id, error)
            else:
                retry = 0
                await self._relay_until_closed(upstream)
                if upstream.close_code == CLOSE_NORMAL:
                    # On purpose: the kernel was deleted, or the browser has a newer connection. This one is over.
                    self._close_browser(CLOSE_GOING_AWAY, upstream.close_reason or "The gateway ended the connection")
                    return
                self.log.warning("Lost the gateway's connection to kernel %s", self.kernel_id)
            if retry >= client.gateway_retry_max:
                # The browser then shows that the kernel is disconnected, and tries again by itself.
                self._close_browser(CLOSE_INTERNAL_ERROR, "The gateway cannot be reached")
                return
            interval_s = min(client.gateway_retry_interval * 2**retry, client.gateway_retry_interval_max)
            # Jitter, so that a restarted gateway is not hit by all notebooks at the same moment.
            await asyncio.sleep(interval_s * random.uniform(0.5, 1.0))
            retry += 1

    async def _open(self) -> WebSocketClientConnection:
        client = GatewayClient.instance()
        url = url_path_join(client.ws_url or "", client.kernels_endpoint, url_escape(self.kernel_id), "channels")
        if self.session_id:
            # The same session id as before: the gateway replays what was missed in between.
            url += f"?session_id={url_escape(self.session_id)}"
        # The headers among these arguments carry the token.
        arguments: dict[str, Any] = client.load_connection_args()  # type: ignore[no-untyped-call]
        subprotocol = self.websocket_handler.selected_subprotocol
        upstream = await websocket_connect(
            HTTPRequest(url, **arguments),
            max_message_size=self.max_message_bytes,
            subprotocols=[subprotocol] if subprotocol else None,
        )
        if upstream.protocol is not None and upstream.selected_subprotocol != subprotocol:
            spoken = upstream.selected_subprotocol
            upstream.close()
            raise WebSocketError(f"it speaks the subprotocol {spoken!r}, the browser {subprotocol!r}")
        if upstream.protocol is not None:
            upstream.protocol.set_nodelay(True)
        return upstream

    async def _relay_until_closed(self, upstream: WebSocketClientConnection) -> None:
        """Relays in both directions until one side is closed; then both are done with this `upstream`."""
        directions = [
            asyncio.create_task(self._to_browser(upstream)),
            asyncio.create_task(self._to_gateway(upstream)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            upstream.close()

    async def _to_browser(self, upstream: WebSocketClientConnection) -> None:
        while (message := await upstream.read_message()) is not None:
            try:
                # Waits until the browser has taken it: meanwhile nothing more is read from the gateway.
                await self.websocket_handler.write_message(message, binary=isinstance(message, bytes))
            except WebSocketClosedError:
                return

    async def _to_gateway(self, upstream: WebSocketClientConnection) -> None:
        # The gateway answers a ping when it has passed on all that came before it. What it had passed on already when
        # an earlier connection broke runs once: kernels refuse a signature that they have seen (jupyter_client).
        upstream.on_pong = self._confirm  # type: ignore[method-assign] # tornado has no other way to learn of pongs
        self._sent = self._first
        while True:
            try:
                while self._sent < self._first + len(self._pending):
                    message = self._pending[self._sent - self._first]
                    self._sent += 1
                    await upstream.write_message(message, binary=isinstance(message, bytes))
                if self._pending:
                    upstream.ping(str(self._sent).encode())
            except (WebSocketClosedError, StreamClosedError):
                return
            self._pending_changed.clear()
            await self._pending_changed.wait()

    def _confirm(self, data: bytes) -> None:
        """The gateway has passed on all messages before the one with this number."""
        while data.isdigit() and self._pending and self._first < min(int(data), self._sent):
            self._pending_bytes -= len(self._pending.popleft())
            self._first += 1

    def _close_browser(self, code: int, reason: str) -> None:
        if not self.disconnected:
            self.websocket_handler.close(code, reason)
