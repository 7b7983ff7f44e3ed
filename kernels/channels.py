"""The channels of one kernel for all its clients, which stay while machines come and go: messages in, messages out.

A client is a WebSocket of the gateway or a connection to an `ipc://` endpoint. Knows nothing of what messages mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Self, TypeVar

from kernels.channel_socket import (
    REQUEST_CHANNELS,
    SOCKET_TYPES,
    SUBSCRIBE_ALL,
    ChannelSocket,
    Connect,
    Inbox,
    KernelEnd,
)
from kernels.errors import LimitError
from kernels.zmtp import Event, Parts, Pong, Ready, ZmtpConnection, ZmtpError
from vm_runtime.wire.stream import Stream

# The wire carries at most 256 streams; others need some too.
MAX_SOCKETS = 200
# What every client has, in the order in which they connect (a cell may ask for input at once). Heart beats are for
# those that watch a process of their own.
CLIENT_CHANNELS = ("iopub", "stdin", "control", "shell")
# Requests wait until the kernel knows who listens, and whom to ask for input. One whose threads get no turn (a C
# extension holds the interpreter lock) does nothing else either.
KNOWN_LIMIT_S = 5.0
# A kernel that nobody has asked anything greets its subscriber, and that is all.
MAX_RECEIVED = 16
# What all sockets do at the same time takes milliseconds, on a busy host more. A guest may hang.
STEP_LIMIT_S = 2.0
# Clients open their WebSocket right after they have made a kernel; others never do, and it must not keep back its
# output for them.
UNCLAIMED_S = 10.0

OpenChannel = Callable[[str], Awaitable[Stream]]
T = TypeVar("T")


async def greet_ahead(open_channel: OpenChannel) -> dict[str, KernelEnd]:
    """A connection for each channel of a first client, by name, for `KernelClients.attach`: greetings are exchanged,
    and iopub is subscribed to. Errors: WireError, ZmtpError."""
    ends = {}
    for name in CLIENT_CHANNELS:
        stream, received = await open_channel(name), list[Event]()
        zmtp = ZmtpConnection(SOCKET_TYPES[name], b"" if name == "iopub" else None)
        await _receive_until(stream, zmtp, received, Ready)
        topics: Sequence[bytes] = ()
        if name == "iopub":
            topics = [SUBSCRIBE_ALL]
            zmtp.send_message(topics)
            zmtp.ping(b"0")
            await _receive_until(stream, zmtp, received, Pong)
        ends[name] = KernelEnd(stream=stream, zmtp=zmtp, received=received, topics=topics)
    return ends


async def _receive_until(stream: Stream, zmtp: ZmtpConnection, received: list[Event], last: type[Event]) -> None:
    await stream.write(zmtp.data_to_send())
    while not any(isinstance(event, last) for event in received):
        data = await stream.read()
        if not data:
            raise ZmtpError("the kernel's socket hung up")
        received += zmtp.receive_data(data)
        if len(received) > MAX_RECEIVED:
            raise ZmtpError("the kernel's socket sends more than a greeting")
        if data := zmtp.data_to_send():
            await stream.write(data)


class KernelClients:
    """All clients of one kernel, for as long as its sandbox exists, with or without a machine.

    `attach(open_channel)` when there is a machine, `detach()` when it goes. While there is none a message on shell or
    control calls `on_request`, which should see to it that a machine is attached soon. on_traffic: called when a client
    sends something and when the kernel has output. asked_at: when a client last sent a request (event loop time).

    A first client's handshakes take an emulated guest longer than its first cell does, so a machine may bring
    connections with them behind it (`greet_ahead`): who comes first is given them.
    """

    def __init__(self, on_request: Callable[[], None], on_traffic: Callable[[], None] = lambda: None) -> None:
        self.asked_at = float("-inf")
        self._on_request = on_request
        self._on_traffic = on_traffic
        self._open_channel: OpenChannel | None = None
        self._greeted: dict[str, KernelEnd] = {}
        self._sockets: dict[ChannelSocket, None] = {}

    @property
    def is_attached(self) -> bool:
        """Whether there is a machine, which is not about to be left."""
        return self._open_channel is not None

    @property
    def has_request(self) -> bool:
        """Whether a client has sent something that has not been passed on to a kernel."""
        return any(socket.has_request for socket in self._sockets)

    def channels(self, identity: bytes, names: Sequence[str] = CLIENT_CHANNELS) -> KernelChannels:
        """A new client. identity: by which the kernel knows it again. Errors: LimitError."""
        if len(self._sockets) + len(names) > MAX_SOCKETS:
            raise LimitError(f"This kernel's clients have {len(self._sockets)} channels; {MAX_SOCKETS} are the most.")
        return KernelChannels(self, identity, names)

    def open_socket(self, channel: str, identity: bytes, inbox: Inbox) -> ChannelSocket:
        """For `KernelChannels`."""
        socket = ChannelSocket(
            channel, identity, inbox, on_traffic=self._note_traffic, may_send=self._all_known, on_over=self._forget
        )
        self._sockets[socket] = None
        if self._open_channel is not None:
            socket.join(self._connector(self._open_channel))
        return socket

    def attach(self, open_channel: OpenChannel, greeted: Mapping[str, KernelEnd] | None = None) -> None:
        """There is a machine: clients reach its kernel. greeted: from `greet_ahead`, owned by this from now on."""
        self._open_channel = open_channel
        self._greeted = dict(greeted or {})
        if greeted:
            asyncio.get_running_loop().call_later(UNCLAIMED_S, self._drop_unclaimed, greeted.get("iopub"))
        for socket in self._sockets:
            socket.join(self._connector(open_channel))

    async def rejoined(self) -> None:
        """After `attach`: until the kernel's iopub socket has the subscriptions of all that were connected before."""
        await self._all(lambda socket: self._known(socket, "iopub"))

    async def quiesce(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Before `detach` from a machine that runs on later: what is under way between clients and kernel arrives, and
        what clients send from now on waits here.

        ask: awaited when the kernel's sockets have all that clients have sent; its answer. It must have the kernel keep
        what it has for clients from then on. Errors: what `ask` raises.
        """
        self._hide_machine()
        for socket in self._sockets:
            socket.stand()
        await self._all(ChannelSocket.finish)
        await self._all(ChannelSocket.settle)
        answer = await ask()
        # Twice: a socket answers the first before it sends what it was given at the same moment.
        await self._all(ChannelSocket.settle)
        await self._all(ChannelSocket.settle)
        await self._all(ChannelSocket.part)
        return answer

    async def unsubscribe(self) -> None:
        """The kernel keeps its output from some moment on, since it believes that nobody listens."""
        await self._all(ChannelSocket.unsubscribe)

    async def _all(self, step: Callable[[ChannelSocket], Awaitable[None]]) -> None:
        """Does something with each socket; with one that is lost meanwhile, or hangs, it is not done."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STEP_LIMIT_S):
                await asyncio.gather(*(step(each) for each in list(self._sockets)), return_exceptions=True)

    async def detach(self) -> None:
        """The machine has ended, or is about to. Twice is harmless."""
        self._hide_machine()
        await asyncio.gather(*(socket.leave() for socket in list(self._sockets)))

    def _hide_machine(self) -> None:
        self._open_channel = None
        self._drop_greeted()

    async def reconnect(self) -> None:
        """Another kernel has taken the place of the one that was here."""
        open_channel = self._open_channel
        if open_channel is not None:
            await self.detach()
            self.attach(open_channel)

    def _forget(self, socket: ChannelSocket) -> None:
        self._sockets.pop(socket, None)

    def _drop_greeted(self) -> None:
        while self._greeted:
            self._greeted.popitem()[1].stream.reset()

    def _drop_unclaimed(self, iopub: KernelEnd | None) -> None:
        if iopub is not None and self._greeted.get("iopub") is iopub:
            del self._greeted["iopub"]
            iopub.stream.reset()

    def _connector(self, open_channel: OpenChannel) -> Connect:
        async def connect(channel: str) -> KernelEnd:
            greeted = self._greeted.pop(channel, None)
            if greeted is not None:
                return greeted
            return KernelEnd(stream=await open_channel(channel), zmtp=ZmtpConnection(SOCKET_TYPES[channel], None))

        return connect

    def _note_traffic(self, socket: ChannelSocket) -> None:
        self._on_traffic()
        if socket.channel in REQUEST_CHANNELS:
            self.asked_at = asyncio.get_running_loop().time()
            if not self.is_attached:
                self._on_request()

    async def _all_known(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_LIMIT_S):
                for socket in list(self._sockets):
                    await self._known(socket, "iopub", "stdin")

    async def _known(self, socket: ChannelSocket, *channels: str) -> None:
        if socket.channel in channels:
            await socket.wait_known(lambda: self.is_attached)


class KernelChannels:
    """One client's channels, made by `KernelClients.channels`; they are the client's until `close`.

    `await send(channel, parts)`; `async for channel, parts in channels`, until it is closed: what the kernel sends, in
    the order in which it came. Not taking is what makes the kernel wait. Messages are those of ZMQ: a Jupyter message
    begins with its delimiter, on iopub with its topic.
    """

    def __init__(self, clients: KernelClients, identity: bytes, names: Sequence[str]) -> None:
        self._clients = clients
        self._inbox = Inbox()
        self._sockets = {name: clients.open_socket(name, identity, self._inbox) for name in names}

    async def send(self, channel: str, parts: Parts) -> None:
        """To the kernel, now or when there is one; waits while it takes no more. Dropped once it is closed."""
        await self._sockets[channel].send(parts)

    def subscribe(self, message: bytes = SUBSCRIBE_ALL) -> None:
        """To what iopub sends: to all of it, or as a SUB socket asks its XPUB socket."""
        self._sockets["iopub"].subscribe(message)

    async def wait_subscribed(self) -> None:
        """Until nothing that the kernel sends from then on is missed, or there is no machine, or one about to go."""
        await self._sockets["iopub"].wait_known(lambda: self._clients.is_attached)

    def become(self, identity: bytes) -> None:
        """Continues as another client, who misses nothing of iopub."""
        for name, socket in self._sockets.items():
            if name != "iopub":
                socket.close()
                self._sockets[name] = self._clients.open_socket(name, identity, self._inbox)

    def forget_requests(self) -> None:
        """What was sent on shell and control and has not been passed on is dropped."""
        for socket in self._sockets.values():
            socket.forget_requests()

    @property
    def has_unread(self) -> bool:
        """Whether something has come that was not taken."""
        return bool(self._inbox)

    def receive_nowait(self) -> tuple[str, list[bytes]] | None:
        """What has come next, None if nothing has."""
        return self._inbox.pop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, list[bytes]]:
        """Cancelled, it has taken nothing."""
        while not self._inbox and not self._inbox.closed:
            await self._inbox.change()
        message = self._inbox.pop()
        if message is None:
            raise StopAsyncIteration
        return message

    def close(self) -> None:
        """The client has disconnected. What it has asked still reaches the kernel. Twice is harmless."""
        self._inbox.close()
        for socket in self._sockets.values():
            socket.close()
