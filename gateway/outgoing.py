"""Messages on their way to one WebSocket: encoded, cut where too large, and held back when the client is slow.

Nothing is dropped. While more than `HIGH_WATER_BYTES` wait for the client, the kernel's messages are not taken; the
wire and in the end the kernel's print wait. Knows Tornado only as a function that writes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator

from gateway.errors import FrameError
from gateway.frames import KernelMessage, encode_legacy, encode_v1
from gateway.metrics import Metrics
from gateway.stream_split import split_stream
from vm_runtime.saving.threads import succeeded

# Large enough that a fast client never starves (a loopback or LAN connection holds less in flight), small enough that
# fifty slow clients cost 400 MB: each message is held as it came, too, until it has left.
HIGH_WATER_BYTES = 4 * 1024 * 1024
LOW_WATER_BYTES = 1024 * 1024

Write = Callable[[bytes, bool], "asyncio.Future[None]"]


class Outgoing:
    """`put` takes any message at any time; the source awaits `wait_room` before the next.

    write(data, binary): begins to send; its future ends when the data has left this process.
    """

    def __init__(self, write: Write, *, legacy: bool, metrics: Metrics) -> None:
        self._write = write
        self._legacy = legacy
        self._metrics = metrics
        self._room = asyncio.Event()
        self._room.set()
        self._waiting: deque[Iterator[KernelMessage]] = deque()
        self._leaving: dict[asyncio.Future[None], KernelMessage] = {}
        self._unsent_bytes = 0
        self._full_since: float | None = None
        self._closed = False

    @property
    def unsent_bytes(self) -> int:
        """Bytes handed to the WebSocket that have not left this process."""
        return self._unsent_bytes

    async def wait_room(self) -> None:
        """While the client is too far behind."""
        await self._room.wait()

    def put(self, message: KernelMessage) -> None:
        """Sends it, after those before it."""
        if self._closed:
            return
        self._waiting.append(split_stream(message))
        self._pump()

    def close(self) -> list[KernelMessage]:
        """Ends sending; what has not left this process, in order: also what a broken WebSocket has taken."""
        self._closed = True
        self._note_drained()
        leaving = [message for future, message in self._leaving.items() if not succeeded(future)]
        rest = [*leaving, *(message for pieces in self._waiting for message in pieces)]
        self._leaving.clear()
        self._waiting.clear()
        return rest

    def _pump(self) -> None:
        while self._waiting and self._unsent_bytes < HIGH_WATER_BYTES and not self._closed:
            message = next(self._waiting[0], None)
            if message is None:
                self._waiting.popleft()
                continue
            self._send(message)
        if self._waiting or self._unsent_bytes >= HIGH_WATER_BYTES:
            if self._full_since is None:
                self._full_since = asyncio.get_running_loop().time()
                self._room.clear()
        elif self._full_since is not None and self._unsent_bytes <= LOW_WATER_BYTES:
            self._note_drained()

    def _note_drained(self) -> None:
        self._room.set()
        if self._full_since is not None:
            self._metrics.back_pressure_seconds.inc(asyncio.get_running_loop().time() - self._full_since)
            self._full_since = None

    def _send(self, message: KernelMessage) -> None:
        try:
            data, binary = encode_legacy(message) if self._legacy else (encode_v1(message), True)
        except FrameError:
            # The kernel's own fault and its own client's loss: there is no way to write such a message down.
            self._metrics.malformed_messages.inc()
            return
        size = len(data)
        self._unsent_bytes += size
        self._metrics.count_message("to_client", message.channel, size)
        future = self._write(data, binary)
        self._leaving[future] = message

        def sent(future: asyncio.Future[None]) -> None:
            self._unsent_bytes -= size
            # What a broken connection did not take is kept until the handler's on_close.
            if succeeded(future):
                self._leaving.pop(future, None)
                self._pump()

        future.add_done_callback(sent)
