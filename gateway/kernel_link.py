"""Kernel messages over one client's channels: signed on the way to the kernel, read as messages on the way back.

Remembers what has no reply yet. Knows nothing of WebSockets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from gateway.frames import KernelMessage, Signer, from_zmq, to_zmq
from gateway.pending import PendingRequests
from kernels.channels import KernelChannels


class KernelLink:
    """Owns the channels. `async for message in link`; cancelled, it has taken nothing.

    key: with which messages to the kernel are signed.
    """

    def __init__(self, channels: KernelChannels, key: str) -> None:
        self._channels = channels
        self._signer = Signer(key.encode())
        self._pending = PendingRequests()

    async def send(self, message: KernelMessage) -> None:
        """To the kernel; waits while it takes no more."""
        self._pending.sent(message)
        await self._channels.send(message.channel, to_zmq(message, self._signer))

    async def wait_subscribed(self) -> None:
        """As `KernelChannels.wait_subscribed`."""
        await self._channels.wait_subscribed()

    @property
    def has_unread(self) -> bool:
        """Whether something has come that was not taken."""
        return self._channels.has_unread

    def arrived(self) -> Iterator[KernelMessage]:
        """Takes what has come already."""
        while (received := self._channels.receive_nowait()) is not None:
            if (message := self._read(*received)) is not None:
                yield message

    def lose_kernel(self) -> PendingRequests:
        """The kernel is gone: what it has not answered, nor the next one will."""
        self._channels.forget_requests()
        return self._pending

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> KernelMessage:
        while (message := self._read(*await anext(self._channels))) is None:
            pass
        return message

    def become(self, session_id: str) -> None:
        """Continues with another client, who misses no output."""
        self._pending = PendingRequests()
        self._channels.become(session_id.encode())

    def close(self) -> None:
        """What was asked still reaches the kernel. Twice is harmless."""
        self._channels.close()

    def _read(self, channel: str, parts: list[bytes]) -> KernelMessage | None:
        """None for what is no message, and for a greeting: one to any subscriber reaches all, and is for nobody."""
        message = from_zmq(channel, parts)
        if message is None or (channel == "iopub" and b'"iopub_welcome"' in message.header[:1024]):
            return None
        self._pending.received(message)
        return message
