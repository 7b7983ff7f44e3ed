"""All clients of all kernels: who is connected, what is kept for those who left, and what they get when a kernel dies.

Follows jupyter_server's rules: one connection per session, the last one out leaves its link behind. Knows nothing of
HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from gateway import kept_messages
from gateway.buffering import BufferBudget, MessageBuffer
from gateway.connection import Client, Connection
from gateway.errors import ApiError, FrameError
from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink
from gateway.metrics import Metrics
from gateway.settings import GatewaySettings
from kernels.errors import UnknownSandboxError
from kernels.events import EventQueue
from kernels.models import EventKind, SandboxEvent, SandboxState
from kernels.service import SandboxService

log = logging.getLogger(__name__)

# WebSocket close codes (RFC 6455, section 7.4.1).
CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_FAILED = 1011
# At a stop: for a client to take what has arrived for it, and to answer the end of its WebSocket. What a slower one has
# not taken then is kept for it.
LAST_WORDS_S = 5.0
CLOSING_S = 2.0
LOOK_INTERVAL_S = 0.01
# jupyter_server's kernel_info_timeout: after it the client is served anyway and may try for itself.
SUBSCRIBE_TIMEOUT_S = 60.0


@dataclass
class _KernelClients:
    """The clients of one kernel, by session, and what the last one left behind."""

    connections: dict[str, Connection] = field(default_factory=dict)
    buffer: MessageBuffer | None = None


class ClientRegistry:
    """`async with clients.running(): ...` while it serves; `attach` and `detach` pair up."""

    def __init__(self, service: SandboxService, settings: GatewaySettings, metrics: Metrics) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._budget = BufferBudget(settings.buffer_total_mib * 1024 * 1024)
        self._kernels: dict[str, _KernelClients] = {}
        self._kept = settings.state_dir / "kept"
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ClientRegistry]:
        """Ends every connection at the end; what is left for clients is kept for the next gateway."""
        for kept in self._kept.glob("*"):
            with suppress(UnknownSandboxError):
                self._service.get(kept.name)
                continue
            kept.unlink()
        try:
            yield self
        finally:
            await self._end()

    def hold(self) -> None:
        """The gateway stops: from now on clients only receive."""
        self._stopping = True
        for kernel_id in self._kernels:
            for connection in self._connections(kernel_id):
                connection.hold()

    async def _end(self) -> None:
        """Lets clients take what has arrived for them, and go."""
        self.hold()
        await _until(lambda: not any(map(self._has_unsent, self._kernels)), limit_s=LAST_WORDS_S)
        for kernel_id in self._kernels:
            self.close_clients(kernel_id, CLOSE_GOING_AWAY, "the gateway is shutting down")
        await _until(lambda: not self.total_connections(), limit_s=CLOSING_S)
        for kernel_id in self._kernels:
            for connection in self._connections(kernel_id):
                self.detach(kernel_id, connection)
        for kernel_id, clients in self._kernels.items():
            if clients.buffer is not None:
                clients.buffer.unlink()
                self._save(kernel_id, clients.buffer)
            self._forget_buffer(kernel_id)

    def _has_unsent(self, kernel_id: str) -> bool:
        """Whether something has come from a kernel that is neither with its clients nor kept for them."""
        clients = self._kernels[kernel_id]
        waits = any(each.outgoing.unsent_bytes or each.link.has_unread for each in clients.connections.values())
        return waits or (clients.buffer is not None and clients.buffer.has_unread)

    def _save(self, kernel_id: str, buffer: MessageBuffer) -> None:
        messages = buffer.release(for_session=buffer.session_id)
        try:
            if messages:
                kept_messages.save(self._kept / kernel_id, buffer.session_id, messages)
        except OSError as error:
            log.warning("What was kept for a client of kernel %s is lost: %s", kernel_id, error)

    def _load(self, kernel_id: str) -> None:
        """What an earlier gateway kept."""
        try:
            kept = kept_messages.take(self._kept / kernel_id)
        except (OSError, FrameError) as error:
            log.warning("What was kept for a client of kernel %s is lost: %s", kernel_id, error)
            return
        if kept is not None:
            session_id, messages = kept
            buffer = self._kernels[kernel_id].buffer = self._park(session_id, None)
            for message in messages:
                buffer.keep(message)

    def _park(self, session_id: str, link: KernelLink | None) -> MessageBuffer:
        return MessageBuffer(session_id, link, max_bytes=self._settings.buffer_mib * 1024 * 1024, budget=self._budget)

    def _clients(self, kernel_id: str) -> _KernelClients:
        if kernel_id not in self._kernels:
            self._kernels[kernel_id] = _KernelClients()
            self._load(kernel_id)
        return self._kernels[kernel_id]

    async def follow(self, events: EventQueue) -> None:
        """Acts on the service's events until they end."""
        async for event in events:
            self._on_event(event)

    def connection_count(self, kernel_id: str) -> int:
        clients = self._kernels.get(kernel_id)
        return len(clients.connections) if clients else 0

    def total_connections(self) -> int:
        return sum(len(clients.connections) for clients in self._kernels.values())

    def check_room(self, kernel_id: str, session_id: str) -> None:
        """Errors: ApiError 429 beyond the limits; a connection that replaces its own older self is no further one."""
        clients = self._kernels.get(kernel_id)
        if clients is not None and session_id in clients.connections:
            return
        settings = self._settings
        if self.connection_count(kernel_id) >= settings.max_connections_per_kernel:
            raise ApiError(
                429,
                "too_many_connections",
                f"This kernel has {settings.max_connections_per_kernel} connections, the most it may have "
                "(max_connections_per_kernel).",
            )
        if self.total_connections() >= settings.max_connections:
            raise ApiError(
                429,
                "too_many_connections",
                f"The gateway has {settings.max_connections} connections, the most it may have (max_connections).",
            )

    def _link(self, kernel_id: str, session_id: str) -> KernelLink:
        return KernelLink(self._service.channels(kernel_id, session_id), self._service.registry.record(kernel_id).key)

    async def subscribe(self, kernel_id: str, session_id: str) -> KernelLink | None:
        """For a client that is about to connect: a link that misses nothing of what a kernel that is awake sends, for
        `attach`; whoever does not come so far closes it. None for one that will take over another's. Errors:
        UnknownSandboxError, LimitError."""
        clients = self._clients(kernel_id)
        has_link = clients.buffer is not None and clients.buffer.link is not None
        if session_id in clients.connections or has_link:
            return None
        link = self._link(kernel_id, session_id)
        try:
            if self._service.get(kernel_id).execution_state != "dead":
                with suppress(TimeoutError):
                    await asyncio.wait_for(link.wait_subscribed(), SUBSCRIBE_TIMEOUT_S)
        except BaseException:
            link.close()
            raise
        return link

    def attach(self, kernel_id: str, session_id: str, client: Client, link: KernelLink | None = None) -> Connection:
        """Connects a client; what was kept for it is sent first. link: from `subscribe`, owned by this from the call
        on. Errors: as `subscribe`."""
        clients = self._clients(kernel_id)
        backlog: list[KernelMessage] = []
        stale = clients.connections.pop(session_id, None)
        buffer, clients.buffer = clients.buffer, None
        left: KernelLink | None = None
        if stale is not None:
            # A client that lost its network comes back before its old connection has timed out here.
            left, backlog = stale.release()
            self._metrics.connections.dec()
            stale.client.close(CLOSE_NORMAL, "replaced by a newer connection of the same session")
        elif buffer is not None:
            left = buffer.take_link()
            backlog = buffer.release(for_session=session_id)
            if left is not None and buffer.session_id != session_id:
                left.become(session_id)
        if left is not None and link is not None:
            link.close()
        link = left or link or self._link(kernel_id, session_id)
        connection = Connection(client, session_id, link, backlog=backlog, metrics=self._metrics)
        clients.connections[session_id] = connection
        self._metrics.connections.inc()
        if stale is None and buffer is None:
            self._announce_loss(kernel_id, connection)
        sandbox = self._service.get(kernel_id)
        if sandbox.execution_state == "dead":
            connection.die(sandbox.reason)
        elif self._stopping:
            connection.hold()
        return connection

    def _announce_loss(self, kernel_id: str, connection: Connection) -> None:
        """A sandbox that sleeps for a reason has lost its machine: who was not connected then learns it now."""
        sandbox = self._service.get(kernel_id)
        if sandbox.state is SandboxState.ASLEEP and sandbox.reason is not None:
            connection.announce("restarting", sandbox.reason)

    def close_clients(self, kernel_id: str, code: int, reason: str) -> None:
        """Asks all clients of a kernel to go; what is left is as if they had gone by themselves."""
        for connection in self._connections(kernel_id):
            connection.client.close(code, reason)

    def _is_attached(self, kernel_id: str, connection: Connection) -> bool:
        clients = self._kernels.get(kernel_id)
        return clients is not None and clients.connections.get(connection.session_id) is connection

    def detach(self, kernel_id: str, connection: Connection) -> None:
        """The client has disconnected. The last one's link is kept, with what it was not sent; twice is harmless."""
        clients = self._kernels.get(kernel_id)
        if clients is None or not self._is_attached(kernel_id, connection):
            return
        del clients.connections[connection.session_id]
        self._metrics.connections.dec()
        link, unsent = connection.release()
        if clients.connections:
            link.close()
            return
        buffer = clients.buffer = self._park(connection.session_id, link)
        for message in unsent:
            buffer.keep(message)
        buffer.start()

    def _on_event(self, event: SandboxEvent) -> None:
        kernel_id, reason = event.sandbox_id, event.data.get("reason")
        connections = self._connections(kernel_id)
        match event.kind:
            case EventKind.KERNEL_RESTARTING:
                self._lose(kernel_id, "restarting", reason)
            case EventKind.KERNEL_RESTARTED if not self._stopping:
                for connection in connections:
                    connection.restarted()
                if (buffer := self._parked(kernel_id)) is not None:
                    buffer.restarted()
            case EventKind.KERNEL_DEAD:
                self._lose(kernel_id, "dead", reason)
            case EventKind.WAKE_FAILED:
                # Closed, so that clients try again: a host without room may have some then. Else the kernel is lost.
                if not event.data["no_room"]:
                    for connection in connections:
                        connection.announce("dead", reason)
                self.close_clients(kernel_id, CLOSE_FAILED, str(reason))
            case EventKind.STATE:
                clients = self._kernels.get(kernel_id)
                if event.data.get("state") == SandboxState.ASLEEP and clients is not None and clients.buffer:
                    clients.buffer.unlink()
            case EventKind.DELETED:
                self._drop(kernel_id)

    def _lose(self, kernel_id: str, state: str, reason: str | None) -> None:
        for connection in self._connections(kernel_id):
            connection.lose(state, reason)
        if (buffer := self._parked(kernel_id)) is not None:
            buffer.lose(state, reason)

    def _parked(self, kernel_id: str) -> MessageBuffer | None:
        clients = self._kernels.get(kernel_id)
        return clients.buffer if clients is not None else None

    def _connections(self, kernel_id: str) -> list[Connection]:
        clients = self._kernels.get(kernel_id)
        return list(clients.connections.values()) if clients else []

    def _forget_buffer(self, kernel_id: str) -> None:
        clients = self._kernels.get(kernel_id)
        if clients is not None and clients.buffer is not None:
            clients.buffer.close()
            clients.buffer = None

    def _drop(self, kernel_id: str) -> None:
        """The kernel is no more."""
        (self._kept / kernel_id).unlink(missing_ok=True)
        self._forget_buffer(kernel_id)
        for connection in self._connections(kernel_id):
            self._metrics.connections.dec()
            link, _ = connection.release()
            link.close()
            connection.client.close(CLOSE_NORMAL, "the kernel was deleted")
        self._kernels.pop(kernel_id, None)


async def _until(holds: Callable[[], bool], *, limit_s: float) -> None:
    """Until something holds, or the time is up."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not holds():  # noqa: ASYNC110 - nothing signals how far the clients' sockets are
                await asyncio.sleep(LOOK_INTERVAL_S)
