"""The guest's events on their way to the host: one `events` stream of JSON lines per session, with a bounded queue."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any

from vm_runtime.wire.link import Link

# A host that does not read for long learns the last states, not every change between them.
EVENTS_MAX = 256


class GuestEvents:
    """`post` from anywhere in the event loop; `run` sends for as long as one session lasts."""

    def __init__(self) -> None:
        self._queue: deque[dict[str, Any]] = deque()
        self._posted = asyncio.Event()

    def post(self, event: dict[str, Any]) -> None:
        """Queue an event. If too many wait, the oldest change of state goes, or else the oldest of all."""
        if len(self._queue) >= EVENTS_MAX:
            stale = next((old for old in self._queue if old["event"] == "kernel.status"), self._queue[0])
            self._queue.remove(stale)
        self._queue.append(event)
        self._posted.set()

    def forget(self) -> None:
        """A new session's WELCOME has the present state; what was queued before it is old."""
        self._queue.clear()

    async def run(self, link: Link) -> None:
        """Send events until the session ends. Raises LinkClosedError then, StreamResetError if unwanted."""
        async with await link.open("events") as stream:
            while True:
                await self._posted.wait()
                self._posted.clear()
                while self._queue:
                    await stream.write(json.dumps(self._queue.popleft()).encode() + b"\n")
