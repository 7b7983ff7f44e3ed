"""The event bus: every change of a sandbox reaches every subscriber, in order.

Knows nothing of who listens. A subscriber that does not read is cut off at a limit instead of growing without end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kernels.models import SandboxEvent

# Events are small (under 1 KiB); a subscriber this far behind is stuck, not slow.
MAX_QUEUED_EVENTS = 10_000


class EventQueue:
    """One subscriber's events: `async for event in queue`. Ends when the bus closes or the subscriber fell behind."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[SandboxEvent | None] = asyncio.Queue()
        self.overflowed = False

    def put(self, event: SandboxEvent) -> None:
        if self.overflowed:
            return
        if self._queue.qsize() >= MAX_QUEUED_EVENTS:
            self.overflowed = True
            self._queue.put_nowait(None)
            return
        self._queue.put_nowait(event)

    def close(self) -> None:
        self._queue.put_nowait(None)

    def __aiter__(self) -> AsyncIterator[SandboxEvent]:
        return self

    async def __anext__(self) -> SandboxEvent:
        event = await self._queue.get()
        if event is None:
            raise StopAsyncIteration
        return event


class EventBus:
    """`publish` never blocks; subscribers come and go."""

    def __init__(self) -> None:
        self._queues: set[EventQueue] = set()

    def publish(self, event: SandboxEvent) -> None:
        for queue in self._queues:
            queue.put(event)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[EventQueue]:
        """A queue of all events from now on, until the context ends."""
        queue = EventQueue()
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """Ends every subscriber's iteration."""
        for queue in self._queues:
            queue.close()
