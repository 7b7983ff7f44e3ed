"""What a kernel sends while none of its clients is connected: kept within a limit, for the next client.

The same session gets everything. Another one (a reloaded page) gets the output, but not replies to questions it never
asked. Beyond the limit the oldest is dropped and the client is notified: making the kernel wait would stop the work of
someone who closed the laptop on purpose.
"""

from __future__ import annotations

import asyncio
from collections import deque

from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink
from gateway.own_messages import make_message
from gateway.pending import RESTARTED, PendingRequests


class BufferBudget:
    """Bytes that the buffers of all kernels may hold together; `used` counts them."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used = 0


class MessageBuffer:
    """Keeps the messages of one link. Use `release()` or `close()` to end it.

    max_bytes: for this kernel; `budget` bounds all of them together.
    """

    def __init__(self, session_id: str, link: KernelLink | None, *, max_bytes: int, budget: BufferBudget) -> None:
        self.link = link
        self.session_id = session_id
        self._max_bytes = max_bytes
        self._budget = budget
        self._messages: deque[KernelMessage] = deque()
        self._bytes = 0
        self._dropped = 0
        self._dropped_bytes = 0
        self._dropped_parent: bytes = b"{}"
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to keep what the link delivers."""
        if self.link is not None:
            self._keeping = asyncio.create_task(self._keep_all(self.link))

    async def _keep_all(self, link: KernelLink) -> None:
        async for message in link:
            self.keep(message)

    @property
    def has_unread(self) -> bool:
        """Whether the link has something that was not taken yet."""
        return self.link is not None and self.link.has_unread

    def take_link(self) -> KernelLink | None:
        """Keeps what has come, and no more: the link, for someone to take over or close."""
        link, self.link = self.link, None
        if self._keeping is not None:
            self._keeping.cancel()
        if link is not None:
            for message in link.arrived():
                self.keep(message)
        return link

    def unlink(self) -> None:
        """The kernel sleeps or has ended: ends the link. When it wakes it keeps by itself what nobody receives."""
        link = self.take_link()
        if link is not None:
            link.close()

    def lose(self, state: str, reason: str | None) -> None:
        """The kernel has ended, and is `restarting` or `dead`."""
        for message in self._lost().last_words(state, reason):
            self.keep(message)

    def restarted(self) -> None:
        """Another kernel is there. What the one before has not answered is answered here."""
        for message in self._lost().answers(RESTARTED):
            self.keep(message)

    def _lost(self) -> PendingRequests:
        if self.link is None:
            return PendingRequests()
        for message in self.link.arrived():
            self.keep(message)
        return self.link.lose_kernel()

    def keep(self, message: KernelMessage) -> None:
        """Adds one message; drops the oldest ones beyond the limits."""
        self._messages.append(message)
        self._count(message.size)
        while self._messages and (self._bytes > self._max_bytes or self._budget.used > self._budget.total_bytes):
            oldest = self._messages.popleft()
            self._count(-oldest.size)
            self._dropped += 1
            self._dropped_bytes += oldest.size
            self._dropped_parent = bytes(oldest.parent)

    def _count(self, size: int) -> None:
        self._bytes += size
        self._budget.used += size

    def release(self, *, for_session: str) -> list[KernelMessage]:
        """The messages that a client of this session should see, oldest first; nothing is kept any more."""
        messages = [m for m in self._messages if for_session == self.session_id or m.channel == "iopub"]
        if self._dropped:
            text = (
                f"[{self._dropped} messages ({self._dropped_bytes / 1e6:.1f} MB) were dropped here: no client was "
                f"connected and only the last {self._max_bytes / 1e6:.0f} MB are kept]\n"
            )
            content = {"name": "stderr", "text": text}
            messages.insert(0, make_message("iopub", "stream", content, self._dropped_parent))
        self._messages.clear()
        self._count(-self._bytes)
        return messages

    def close(self) -> None:
        """Forgets everything and ends the link."""
        self.unlink()
        self.release(for_session=self.session_id)
