"""The four ZMQ sockets between one WebSocket client and one kernel.

Shell, control and stdin share an identity, so that the kernel's `input()` finds its way back; iopub belongs to no
identity and may be handed from one link to the next, so that no output falls between two clients. Knows nothing of
WebSockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import zmq

from gateway.frames import KernelMessage, Part, Signer, from_zmq, to_zmq
from gateway.own_messages import SESSION, make_message
from gateway.pending import PendingRequests
from gateway.zmq_socket import ZmqSocket
from kernels.models import Sandbox, SandboxState

# In the order in which they connect: a cell may ask for input at once.
DEALERS = ("stdin", "control", "shell")
# Our kernels greet each new subscriber at once. Others are asked for kernel_info, whose status messages prove the
# subscription: first when a greeting would have come even where ten emulated kernels start at once (to ask is work for
# them, too), then at jupyter_server's interval.
FIRST_NUDGE_S = 2.0
NUDGE_INTERVAL_S = 0.5
# jupyter_server's kernel_info_timeout: after it the client is served anyway and may try for itself.
SUBSCRIBE_TIMEOUT_S = 60.0
# A busy kernel that neither greets from its iopub thread nor answers from its control thread will not do so before its
# cell has ended.
BUSY_SUBSCRIBE_TIMEOUT_S = 1.0

# What the kernel answers to a nudge is of no use to clients, and harmful: a control message that ends is `idle`, also
# where a cell runs on.
_OURS = f'"{SESSION}"'.encode()

Receiver = Callable[[KernelMessage], None]


def iopub_socket(context: zmq.Context[zmq.Socket[bytes]], info: Mapping[str, Any]) -> ZmqSocket:
    """Subscribed to all that the kernel sends; for a link."""
    return ZmqSocket(context, zmq.SUB, _address(info, "iopub"))


async def wait_subscribed(
    context: zmq.Context[zmq.Socket[bytes]],
    info: Mapping[str, Any],
    delivered: Callable[[], Awaitable[object]],
    look: Callable[[], Sandbox],
) -> None:
    """Waits until a socket of `iopub_socket` has `delivered` something: from then on it misses nothing. Gives up after
    a limit, and where the sandbox that `look` gives does not run any more. Errors: those of `look`."""
    signer = signer_of(info)
    busy = look().execution_state == "busy"
    with suppress(TimeoutError):
        async with asyncio.timeout(BUSY_SUBSCRIBE_TIMEOUT_S if busy else SUBSCRIBE_TIMEOUT_S):
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_NUDGE_S):
                    await delivered()
                    return
            # A socket of its own: the reply must not reach the client.
            nudge = ZmqSocket(context, zmq.DEALER, _address(info, "control"))
            try:
                while look().state is SandboxState.RUNNING:
                    await nudge.send(to_zmq(make_message("control", "kernel_info_request", {}), signer))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(NUDGE_INTERVAL_S):
                            await delivered()
                            return
            finally:
                nudge.close()


def signer_of(info: Mapping[str, Any]) -> Signer:
    return Signer(str(info["key"]).encode(), str(info["signature_scheme"]))


def _address(info: Mapping[str, Any], channel: str) -> str:
    return f"ipc://{info['ip']}-{info[f'{channel}_port']}"


class KernelLink:
    """Connects on construction. `start(receive)` begins delivery; `close()` ends it, twice is harmless.

    info: Jupyter's connection file with ipc transport. iopub: a socket that was connected before, taken over.
    subscribed: whether that has delivered something.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        info: Mapping[str, Any],
        session_id: str,
        *,
        iopub: ZmqSocket | None = None,
        subscribed: bool = False,
    ) -> None:
        self.session_id = session_id
        self._context = context
        self._info = info
        self._signer = signer_of(info)
        self._pending = PendingRequests()
        self._subscribed = asyncio.Event()
        if subscribed:
            self._subscribed.set()
        identity = session_id.encode()
        self._iopub = iopub or iopub_socket(context, info)
        self._dealers = {
            name: ZmqSocket(context, zmq.DEALER, _address(info, name), identity=identity) for name in DEALERS
        }

    def start(self, receive: Receiver) -> None:
        """Delivers messages to `receive` from now on, instead of to an earlier receiver."""

        def deliver(channel: str) -> Callable[[Sequence[Part]], None]:
            def on_message(frames: Sequence[Part]) -> None:
                message = from_zmq(channel, frames)
                if message is None:
                    return
                if channel == "iopub":
                    self._subscribed.set()
                    # A greeting to any subscriber reaches all of them; it means nothing to a Jupyter client.
                    if b'"iopub_welcome"' in bytes(message.header[:1024]) or _OURS in bytes(message.parent[:1024]):
                        return
                self._pending.received(message)
                receive(message)

            return on_message

        for channel, socket in self._sockets().items():
            socket.start(deliver(channel))

    def _sockets(self) -> dict[str, ZmqSocket]:
        return {"iopub": self._iopub, **self._dealers}

    @property
    def subscribed(self) -> bool:
        """Whether iopub has delivered something."""
        return self._subscribed.is_set()

    async def send(self, message: KernelMessage) -> None:
        """To the kernel; waits while it takes no more."""
        self._pending.sent(message)
        await self._dealers[message.channel].send(to_zmq(message, self._signer))

    async def wait_subscribed(self, look: Callable[[], Sandbox]) -> None:
        """As the function of this name, once `start` was called."""
        await wait_subscribed(self._context, self._info, self._subscribed.wait, look)

    def pause(self) -> None:
        """No messages until `resume`: the kernel is made to wait."""
        for socket in self._sockets().values():
            socket.pause()

    def resume(self) -> None:
        for socket in self._sockets().values():
            socket.resume()

    @property
    def has_unread(self) -> bool:
        """Whether a message has arrived that was not delivered yet."""
        return any(socket.has_unread for socket in self._sockets().values())

    def end(self) -> PendingRequests:
        """The kernel has ended: delivers what has arrived from it already, and closes. What it has not answered."""
        for socket in self._sockets().values():
            socket.drain()
        self.close()
        return self._pending

    def take_iopub(self) -> ZmqSocket:
        """Ends this link but for its iopub socket, which the caller must hand to the next link or close."""
        for socket in self._dealers.values():
            socket.close()
        self._iopub.resume()
        return self._iopub

    def close(self) -> None:
        # Whoever waits for the first message must not wait on for one that cannot come.
        self._subscribed.set()
        for socket in self._sockets().values():
            socket.close()
