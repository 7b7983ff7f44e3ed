"""What the WebSockets of a sandbox share: who may open them, how they end, and one task that serves each.

Knows Tornado; what is sent is up to `command_socket.py` and `watch_socket.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from pydantic import BaseModel
from tornado.routing import PathMatches
from tornado.websocket import WebSocketClosedError

from gateway.auth import origin_allowed
from gateway.endpoint import JsonHandler
from gateway.errors import ApiError, api_error
from gateway.liveness import WatchedSocket
from gateway.state import Gateway
from kernels.errors import KernelsError

log = logging.getLogger(__name__)

# What a client may send in one message: standard input in pieces, or a command with its environment.
MAX_MESSAGE_BYTES = 1024 * 1024
CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_FAILED = 1011


class WebSocketMatches(PathMatches):
    """A path, for requests that want a WebSocket: others are passed on to the endpoint of the same path."""

    def match(self, request: Any) -> dict[str, Any] | None:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return None
        return super().match(request)


class SandboxSocket(JsonHandler, WatchedSocket):
    """A subclass does its work in `serve`, which is cancelled when the client disconnects. Errors are sent as a last
    message {"type": "error", "reason", "message", "code"}."""

    def initialize(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.sandbox_id = ""
        self._serving: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        self.check_host()
        self.check_token()
        host, origin = self.request.headers.get("Host"), self.request.headers.get("Origin")
        if not origin_allowed(origin, host=host, cors_origins=self.gateway.settings.cors_origins):
            raise ApiError(
                403,
                "origin_not_allowed",
                f"Pages of {str(origin)[:80]} may not connect. --cors-origins allows them to.",
            )

    def check_origin(self, origin: str) -> bool:
        """`prepare` has done it."""
        return True

    def get_compression_options(self) -> None:
        """None: it costs more than the network it is meant for."""

    @property
    def max_message_size(self) -> int:
        return MAX_MESSAGE_BYTES

    async def get(self, sandbox_id: str, **path: str) -> None:
        self.sandbox_id = sandbox_id
        await self.begin(**path)
        await super().get(sandbox_id, **path)

    async def begin(self, **path: str) -> None:
        """Before the WebSocket is open: what fails here is answered in HTTP."""

    async def serve(self) -> None:
        """All that is done on the open WebSocket; it is closed afterwards."""
        raise NotImplementedError

    def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)
        self.begin_watching()
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        try:
            await self.serve()
            self.close(CLOSE_NORMAL)
        except WebSocketClosedError:
            pass
        except (KernelsError, ApiError) as error:
            await self._fail(api_error(error))
        except Exception:
            log.exception("A WebSocket of sandbox %s failed", self.sandbox_id)
            await self._fail(ApiError(500, "internal_error", "The gateway failed; its log says how."))

    async def _fail(self, error: ApiError) -> None:
        value = {"type": "error", "reason": error.reason, "message": error.message, "code": error.code}
        try:
            await self.send(value)
        except WebSocketClosedError:
            return
        self.close(CLOSE_GOING_AWAY if error.code == "stopping" else CLOSE_FAILED, error.code)

    async def send(self, message: bytes | BaseModel | dict[str, Any]) -> None:
        """Binary for bytes, JSON text for the rest. Waits until it has left this process, so that a slow client holds
        the sender. Errors: WebSocketClosedError."""
        self.gateway.service.registry.touch(self.sandbox_id)
        if isinstance(message, bytes):
            await self.write_message(message, binary=True)
        else:
            text = message.model_dump_json() if isinstance(message, BaseModel) else json.dumps(message)
            await self.write_message(text)

    def on_close(self) -> None:
        self.end_watching()
        if self._serving is not None:
            self._serving.cancel()
