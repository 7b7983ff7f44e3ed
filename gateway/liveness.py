"""Whether the client of a WebSocket still lives: pings, and the end of one that reads nothing and sends nothing.

Knows Tornado and TCP, not what is sent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Any

from tornado.websocket import WebSocketClosedError, WebSocketHandler

from gateway.state import Gateway

log = logging.getLogger(__name__)

# A ping without content, unmasked (RFC 6455, section 5.2).
PING_BYTES = 2
# `tcpi_bytes_acked` in linux/tcp.h's struct tcp_info (since Linux 4.1).
_BYTES_ACKED = struct.Struct("@Q")
_BYTES_ACKED_OFFSET = 120


class WatchedSocket(WebSocketHandler):
    """Call `begin_watching` when it is open, `received` for each message, `end_watching` when it is closed."""

    gateway: Gateway
    _has_received = False
    _acked = 0
    _silent_since = 0.0
    _timer: asyncio.TimerHandle | None = None

    @property
    def ping_interval(self) -> None:
        """Tornado's own pings are off: it takes a client that is busy receiving for a dead one."""

    def begin_watching(self) -> None:
        self._silent_since = asyncio.get_running_loop().time()
        self._watch()

    def end_watching(self) -> None:
        """Twice is harmless."""
        if self._timer is not None:
            self._timer.cancel()

    def received(self) -> None:
        """A message of the client has arrived."""
        self._has_received = True

    def on_pong(self, data: bytes) -> None:
        self._has_received = True

    def _watch(self) -> None:
        """Pings, and ends a connection whose client reads nothing and sends nothing for too long."""
        if self.ws_connection is None:
            return
        loop = asyncio.get_running_loop()
        settings = self.gateway.settings
        acked = self._bytes_acked()
        # What arrives there counts, since a pong waits behind it until the client's program reads; but for our pings.
        if self._has_received or acked > self._acked + PING_BYTES:
            self._silent_since = loop.time()
        self._has_received, self._acked = False, acked
        left_s = self._silent_since + settings.client_timeout_s - loop.time()
        if left_s <= 0:
            log.info("A client of %s was disconnected: nothing from it for a while", self.request.path)
            # A close frame would wait behind all that the client does not take.
            self._abort()
            return
        try:
            self.ping(b"")
        except WebSocketClosedError:
            return
        self._timer = loop.call_later(min(settings.ping_interval_s, left_s), self._watch)

    def _bytes_acked(self) -> int:
        stream: Any = getattr(self.ws_connection, "stream", None)
        if stream is None or stream.socket is None:
            return 0
        info = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED_OFFSET + _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack_from(info, _BYTES_ACKED_OFFSET)[0])

    def _abort(self) -> None:
        stream: Any = getattr(self.ws_connection, "stream", None)
        if stream is not None:
            stream.close()
