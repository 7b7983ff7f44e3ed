"""The WebSocket of a kernel: `GET /api/kernels/{id}/channels`.

Tornado's side only: who may open it, its frames, whether the client still lives. Messages continue in `connection.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import uuid
from typing import Any

from tornado.websocket import WebSocketClosedError

from gateway.auth import is_loopback, origin_allowed
from gateway.connection import Client, Connection
from gateway.endpoint import JsonHandler
from gateway.errors import ApiError, FrameError
from gateway.frames import V1, decode_legacy, decode_v1
from gateway.handlers.sandboxes import FORWARDING_HEADERS
from gateway.kernel_link import KernelLink
from gateway.liveness import WatchedSocket
from gateway.local_peer import peer_uid
from gateway.state import Gateway
from kernels.errors import KernelsError, UnknownSandboxError
from kernels.models import SandboxState

log = logging.getLogger(__name__)

# A session id is a ZMQ identity: at most 255 bytes, the first not zero. Clients send a UUID.
_SESSION_ID = re.compile(r"[A-Za-z0-9._:@-]{1,200}\Z")
# Close codes (RFC 6455, section 7.4.1) and the most that a reason may have (5.5).
CLOSE_INVALID = 1007
CLOSE_FAILED = 1011
MAX_REASON_BYTES = 123


class ChannelsHandler(JsonHandler, WatchedSocket):
    """One client of one kernel."""

    def initialize(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._connection: Connection | None = None
        self._legacy = True
        self._kernel_id = ""
        self._session_id = ""
        self._link: KernelLink | None = None

    async def prepare(self) -> None:
        self.check_host()
        if not self.has_token() and not await self._is_local_user():
            self.check_token()
        host, origin = self.request.headers.get("Host"), self.request.headers.get("Origin")
        if not origin_allowed(origin, host=host, cors_origins=self.gateway.settings.cors_origins):
            raise ApiError(
                403,
                "origin_not_allowed",
                f"Pages of {str(origin)[:80]} may not connect. --cors-origins allows them to.",
            )

    async def _is_local_user(self) -> bool:
        """Whether a program of the gateway's own user asks from this machine: no proxy, no page of another server.

        websocket-client, which nbclient uses, names the gateway itself as its origin; a browser could only say that of
        a page that the gateway served, and it serves none.
        """
        headers = self.request.headers
        if not self.gateway.settings.trust_local_user or not is_loopback(self.request.remote_ip or ""):
            return False
        if any(name in headers for name in FORWARDING_HEADERS):
            return False
        if not origin_allowed(headers.get("Origin"), host=headers.get("Host"), cors_origins=()):
            return False
        stream: Any = self.request.connection.stream  # type: ignore[union-attr]
        peer, local = stream.socket.getpeername()[:2], stream.socket.getsockname()[:2]
        return await asyncio.to_thread(peer_uid, peer, local) == os.geteuid()

    def check_origin(self, origin: str) -> bool:
        """`prepare` has done it."""
        return True

    def get_compression_options(self) -> None:
        """None: compressing costs more than the network it is meant for (12 MB/s against 1 GB/s on loopback)."""

    @property
    def max_message_size(self) -> int:
        return self.gateway.settings.max_message_mib * 1024 * 1024

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        self._legacy = V1 not in subprotocols
        return None if self._legacy else V1

    async def get(self, kernel_id: str) -> None:
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            raise ApiError(400, "not_a_websocket", "This path is a WebSocket: ask for it with `Upgrade: websocket`.")
        self._kernel_id = kernel_id
        self._session_id = self.get_query_argument("session_id", "") or uuid.uuid4().hex
        if not _SESSION_ID.match(self._session_id):
            raise ApiError(400, "invalid_request", "A session_id has 1 to 200 letters, digits and .-_:@.")
        try:
            # A sleeping kernel is woken by the first message.
            if self.gateway.kernel_sandbox(kernel_id).state is not SandboxState.ASLEEP:
                await self.gateway.service.ready(kernel_id)
        except UnknownSandboxError as error:
            raise ApiError(404, "kernel_not_found", f"Kernel does not exist: {kernel_id}") from error
        self.gateway.clients.check_room(kernel_id, self._session_id)
        # Before it opens: what others cause from then on must not be missed.
        self._link = await self.gateway.clients.subscribe(kernel_id, self._session_id)
        try:
            await super().get(kernel_id)
        finally:
            if self._link is not None:
                self._link.close()

    async def open(self, *args: str, **kwargs: str) -> None:
        # Without this each small answer waits up to 40 ms for the client's delayed ACK.
        self.set_nodelay(True)
        self.begin_watching()
        client = Client(write=self._write, close=self._close_with, legacy=self._legacy)
        link, self._link = self._link, None
        try:
            self._connection = self.gateway.clients.attach(self._kernel_id, self._session_id, client, link)
        except KernelsError as error:
            self._close_with(CLOSE_FAILED, str(error))

    def _write(self, data: bytes, binary: bool) -> asyncio.Future[None]:
        try:
            return self.write_message(data, binary)
        except WebSocketClosedError as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            return future

    def _close_with(self, code: int, reason: str) -> None:
        self.close(code, reason.encode()[:MAX_REASON_BYTES].decode("utf-8", "ignore"))

    async def on_message(self, data: str | bytes) -> None:
        self.received()
        connection = self._connection
        if connection is None:
            return
        try:
            if self._legacy:
                message = decode_legacy(data)
            elif isinstance(data, bytes):
                message = decode_v1(data)
            else:
                raise FrameError("Messages of the v1 form are binary.")
        except FrameError as error:
            self._close_with(CLOSE_INVALID, str(error))
            return
        await connection.from_client(message)

    def on_close(self) -> None:
        self.end_watching()
        if self._connection is not None:
            self.gateway.clients.detach(self._kernel_id, self._connection)
