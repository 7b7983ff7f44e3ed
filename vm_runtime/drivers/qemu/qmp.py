"""A client of QEMU's control protocol (QMP) over a UNIX socket.

Knows no commands' meaning: one command at a time, descriptors passed along with it, events to a callback. Reference:
QEMU's docs/interop/qmp-spec.txt. A server serves one client; a second one waits until the first has disconnected.

    CONNECTING -> READY -> CLOSED

It is CLOSED by `close`, or lost when the VMM ends it or sends what is no QMP; `wait_lost` answers then. An answer that
is too long, too late or not waited for any more fails its command alone: commands carry ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from vm_runtime.errors import VmmCommandError, VmmProtocolError

# The limit of qemu.qmp and libvirt. A VMM that a guest broke into could send more.
MAX_LINE_BYTES = 10 << 20
# QEMU answers within milliseconds; on a busy host a main loop under TCG has been seen to take a second.
COMMAND_TIMEOUT_S = 30.0

EventHandler = Callable[[str, Mapping[str, Any]], None]


class QmpState(StrEnum):
    CONNECTING = "connecting"
    READY = "ready"
    CLOSED = "closed"


class Qmp:
    """One connection. Made by `connect()`; whoever made it must `await close()`.

    on_event(name, data) is called in the event loop and must not raise.
    """

    def __init__(self, connection: socket.socket, on_event: EventHandler) -> None:
        self._socket = connection
        self._on_event = on_event
        self._state = QmpState.CONNECTING
        self._lock = asyncio.Lock()
        self._greeting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ids = itertools.count(1)
        self._asked = 0
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._lost: asyncio.Future[VmmProtocolError] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(), name="qmp reader")

    @classmethod
    async def connect(cls, path: Path, on_event: EventHandler, *, timeout_s: float) -> Qmp:
        """Connect and negotiate. Waits for the server's greeting, so for a VMM that is still starting.

        Errors: VmmProtocolError, OSError (nobody listens), TimeoutError.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(connection, str(path))
        except BaseException:
            connection.close()
            raise
        client = cls(connection, on_event)
        try:
            async with asyncio.timeout(timeout_s):
                await client._greeting
            client._state = QmpState.READY
            await client.execute("qmp_capabilities")
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def state(self) -> QmpState:
        return self._state

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, descriptors: Sequence[int] = ()
    ) -> Any:
        """Run a command and answer its `return` value. READY only.

        descriptors: sent along (for `add-fd` and `getfd`); the caller keeps its own copies.
        Errors: VmmCommandError (refused), VmmProtocolError (connection lost, no answer in time, one that is too long).
        """
        async with self._lock:
            if self._state is not QmpState.READY:
                raise VmmProtocolError(f"QMP is {self._state}; {command} needs it to be {QmpState.READY}.")
            self._asked = next(self._ids)
            message = {"execute": command, "arguments": dict(arguments or {}), "id": self._asked}
            self._answer = asyncio.get_running_loop().create_future()
            sent = False
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT_S):
                    await self._send(json.dumps(message).encode() + b"\n", descriptors)
                    sent = True
                    answer = await self._answer
            except (OSError, TimeoutError) as error:
                raise VmmProtocolError(f"QMP gave no answer to {command}: {error!r}") from error
            finally:
                self._answer = None
                if not sent:  # half a line may be on its way
                    self._lose(VmmProtocolError(f"{command} could not be sent to the VMM."))
        if "error" in answer:
            error_value = answer["error"]
            raise VmmCommandError(command, str(error_value.get("class")), str(error_value.get("desc")))
        return answer.get("return")

    async def wait_lost(self) -> VmmProtocolError:
        """Wait until the connection is lost, and answer why. Never, when it is closed from here."""
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        """End the connection; twice is harmless."""
        self._fail(VmmProtocolError("QMP was closed"))
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._socket.close()

    async def _send(self, data: bytes, descriptors: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        if descriptors:
            # The socket is empty between commands and a line is far smaller than its buffer: this does not block.
            data = data[socket.send_fds(self._socket, [data], list(descriptors)) :]
        if data:
            await loop.sock_sendall(self._socket, data)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        skipping = False  # the rest of a line that is too long
        try:
            while True:
                chunk = await loop.sock_recv(self._socket, 65536)
                if not chunk:
                    raise VmmProtocolError("The VMM closed its control socket.")
                buffer += chunk
                while (end := buffer.find(b"\n")) >= 0:
                    line = bytes(buffer[:end])
                    del buffer[: end + 1]
                    if not skipping:
                        self._dispatch(json.loads(line))
                    skipping = False
                if len(buffer) > MAX_LINE_BYTES and not skipping:
                    skipping = True
                    self._refuse(VmmProtocolError(f"The VMM sent a line of more than {MAX_LINE_BYTES} bytes."))
                if skipping:
                    buffer.clear()
        except VmmProtocolError as error:
            self._lose(error)
        except (OSError, ValueError, RecursionError) as error:  # the last one: of JSON that is nested without end
            self._lose(VmmProtocolError(f"The VMM's control socket broke: {error!r}"))

    def _dispatch(self, message: Any) -> None:
        if not isinstance(message, dict) or not isinstance(message.get("error", {}), dict):
            raise VmmProtocolError("The VMM's control socket carried something that is no QMP message.")
        if "event" in message:
            self._on_event(str(message["event"]), data if isinstance(data := message.get("data"), dict) else {})
        elif "QMP" in message:
            if not self._greeting.done():
                self._greeting.set_result(None)
        elif "return" in message or "error" in message:
            # Another id is that of a command which nobody waits for any more. Without one it is an error of the line.
            answer = self._answer if message.get("id", self._asked) == self._asked else None
            if answer is not None and not answer.done():
                answer.set_result(message)

    def _fail(self, error: VmmProtocolError) -> None:
        self._state = QmpState.CLOSED
        self._refuse(error)

    def _lose(self, error: VmmProtocolError) -> None:
        self._fail(error)
        if not self._lost.done():
            self._lost.set_result(error)

    def _refuse(self, error: VmmProtocolError) -> None:
        """Fail what is being waited for."""
        for future in (self._greeting, self._answer):
            if future is not None and not future.done():
                future.set_exception(error)
        if self._greeting.done() and not self._greeting.cancelled():
            self._greeting.exception()  # nobody may be waiting for it any more
