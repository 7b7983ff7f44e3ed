"""Changes of files in a sandbox, as they happen. Frames: docs/exec_and_files.md."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from hypercell.aio.transport import CLOSE_NORMAL, Transport, leave_to_parent, refusal_in
from hypercell.errors import ClosedError, ConnectionLostError
from hypercell.values import FileChange

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection


class AsyncWatch:
    """The changes below a path, from its making on. Iterate over it: the iteration ends when the path is gone, or the
    watch is stopped, here or from another task or thread. `async with` stops it."""

    def __init__(self, transport: Transport, websocket: ClientConnection, watched: str) -> None:
        self._transport = transport
        self._websocket = websocket
        self._watched = watched
        self._pid = os.getpid()
        self._stopped = False

    @classmethod
    async def _begun(cls, transport: Transport, websocket: ClientConnection, watched: str) -> AsyncWatch:
        """Waits for the gateway's word that every later change is told. Raises GatewayRefusedError."""
        watch = cls(transport, websocket, watched)
        try:
            await watch._next()
        except BaseException:
            await watch.stop()
            raise
        return watch

    def __aiter__(self) -> AsyncWatch:
        return self

    async def __anext__(self) -> FileChange:
        """The next change. Raises ConnectionLostError; changes may have been missed then."""
        while (frame := await self._next()) is not None:
            if frame["type"] == "change":
                return FileChange.parse(frame)
        raise StopAsyncIteration

    async def _next(self) -> dict[str, Any] | None:
        """None at the end."""
        from websockets.exceptions import ConnectionClosed

        if self._pid != os.getpid():
            raise ClosedError("This watch belongs to the process from which this one was forked.")
        try:
            frame: dict[str, Any] = json.loads(await self._websocket.recv())
        except ConnectionClosed as error:
            has_ended = error.rcvd is not None and error.rcvd.code == CLOSE_NORMAL
            if has_ended or self._stopped or self._transport.is_released:
                return None
            raise ConnectionLostError(
                f"The connection that watched {self._watched} broke; changes may be missed."
            ) from error
        if frame["type"] == "error":
            raise refusal_in(frame)
        return frame

    async def stop(self) -> None:
        """Ends it, and an iteration that waits for a change. Twice is harmless."""
        self._stopped = True
        if self._pid == os.getpid():
            await self._websocket.close()
        else:
            leave_to_parent(self._websocket)

    async def __aenter__(self) -> AsyncWatch:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()
