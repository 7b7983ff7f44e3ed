"""All clients of all kernels: who is connected, what is kept for those who left, and who is told when a kernel dies.

Follows jupyter_server's rules: one connection per session, the last one out leaves its sockets behind. Knows nothing of
HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import zmq

from gateway.connection import Client, Connection
from gateway.errors import ApiError
from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink, status_message
from gateway.metrics import Metrics
from gateway.parking import BufferBudget, Parked
from gateway.settings import GatewaySettings
from kernels.errors import KernelsError
from kernels.events import EventQueue
from kernels.models import EventKind, SandboxEvent
from kernels.service import SandboxService

log = logging.getLogger(__name__)

# WebSocket close codes (RFC 6455, section 7.4.1).
CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001


@dataclass
class _Clients:
    """The clients of one kernel, by session, and what the last one left behind."""

    connections: dict[str, Connection] = field(default_factory=dict)
    parked: Parked | None = None


class KernelHub:
    """`async with hub.running(): ...` while it serves; `attach` and `detach` pair up."""

    def __init__(self, service: SandboxService, settings: GatewaySettings, metrics: Metrics) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # Four sockets per connection; zmq's own default of 1023 is reached with 255 of them.
        self._context.set(zmq.MAX_SOCKETS, 8 * settings.max_connections + 64)
        self._budget = BufferBudget(settings.buffer_total_mib * 1024 * 1024)
        self._kernels: dict[str, _Clients] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[KernelHub]:
        """Ends every connection and socket at the end."""
        try:
            yield self
        finally:
            for kernel_id in list(self._kernels):
                self._drop(kernel_id, CLOSE_GOING_AWAY, "the gateway is shutting down")
            self._context.term()

    async def follow(self, events: EventQueue) -> None:
        """Acts on the service's events until they end."""
        async with asyncio.TaskGroup() as reconnecting:
            async for event in events:
                self._on_event(event, reconnecting)

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

    async def attach(self, kernel_id: str, session_id: str, client: Client) -> Connection:
        """Connects a client; what was kept for it is sent first. Errors: those of `connection_info`."""
        info = self._service.connection_info(kernel_id)
        clients = self._kernels.setdefault(kernel_id, _Clients())
        connection = Connection(client, session_id, self._metrics)
        backlog: list[KernelMessage] = []
        stale = clients.connections.pop(session_id, None)
        link: KernelLink | None = None
        if stale is not None:
            # A client that lost its network comes back before its old connection has timed out here.
            link, backlog = stale.release()
            self._metrics.connections.dec()
            stale.client.close(CLOSE_NORMAL, "replaced by a newer connection of the same session")
        elif clients.parked is not None:
            parked, clients.parked = clients.parked, None
            backlog = parked.release(for_session=session_id)
            if parked.session_id == session_id:
                link = parked.link
            else:
                link = KernelLink(self._context, info, session_id, iopub=parked.link.take_iopub())
        clients.connections[session_id] = connection
        self._metrics.connections.inc()
        if link is not None:
            connection.use(link, backlog)
            connection.admit(link)
            link.resume()
            return connection
        try:
            await self._connect(kernel_id, connection)
        except BaseException:
            self.detach(kernel_id, connection)
            raise
        return connection

    async def _connect(self, kernel_id: str, connection: Connection) -> None:
        info = self._service.connection_info(kernel_id)
        busy = self._service.get(kernel_id).execution_state == "busy"
        link = KernelLink(self._context, info, connection.session_id)
        if not self._is_attached(kernel_id, connection):
            link.close()
            return
        connection.use(link)
        await link.wait_subscribed(busy=busy)
        connection.admit(link)

    def _is_attached(self, kernel_id: str, connection: Connection) -> bool:
        clients = self._kernels.get(kernel_id)
        return clients is not None and clients.connections.get(connection.session_id) is connection

    def detach(self, kernel_id: str, connection: Connection) -> None:
        """The client is gone. The last one's link is kept, with what it was not sent; twice is harmless."""
        clients = self._kernels.get(kernel_id)
        if clients is None or not self._is_attached(kernel_id, connection):
            return
        del clients.connections[connection.session_id]
        self._metrics.connections.dec()
        link, unsent = connection.release()
        if link is None:
            return
        if clients.connections:
            link.close()
            return
        parked = Parked(link, max_bytes=self._settings.buffer_mib * 1024 * 1024, budget=self._budget)
        clients.parked = parked
        for message in unsent:
            parked.keep(message)
        parked.start()

    def _on_event(self, event: SandboxEvent, reconnecting: asyncio.TaskGroup) -> None:
        kernel_id, reason = event.sandbox_id, event.data.get("reason")
        match event.kind:
            case EventKind.KERNEL_RESTARTING:
                self._announce(kernel_id, "restarting", reason)
                for connection in self._connections(kernel_id):
                    connection.unlink()
            case EventKind.KERNEL_RESTARTED:
                for connection in self._connections(kernel_id):
                    connection.unlink()
                    # Not awaited: one kernel that does not answer must not keep the others' clients waiting.
                    reconnecting.create_task(self._reconnect(kernel_id, connection))
                self._relink_parked(kernel_id)
            case EventKind.KERNEL_DEAD:
                self._announce(kernel_id, "dead", reason)
            case EventKind.STATE if event.data.get("state") == "failed":
                self._announce(kernel_id, "dead", reason)
            case EventKind.DELETED:
                self._drop(kernel_id, CLOSE_NORMAL, "the kernel was deleted")

    def _announce(self, kernel_id: str, state: str, reason: str | None) -> None:
        for connection in self._connections(kernel_id):
            connection.announce(state, reason)
        clients = self._kernels.get(kernel_id)
        if clients is not None and clients.parked is not None:
            clients.parked.keep(status_message(state, reason))

    async def _reconnect(self, kernel_id: str, connection: Connection) -> None:
        try:
            await self._connect(kernel_id, connection)
        except KernelsError as error:
            # It died again; the event that says so is on its way to the client.
            log.info("A client of kernel %s was not connected again: %s", kernel_id, error)

    def _relink_parked(self, kernel_id: str) -> None:
        clients = self._kernels.get(kernel_id)
        if clients is None or clients.parked is None:
            return
        try:
            info = self._service.connection_info(kernel_id)
        except KernelsError:
            self._forget_parked(kernel_id)
            return
        clients.parked.relink(KernelLink(self._context, info, clients.parked.session_id))

    def _connections(self, kernel_id: str) -> list[Connection]:
        clients = self._kernels.get(kernel_id)
        return list(clients.connections.values()) if clients else []

    def _forget_parked(self, kernel_id: str) -> None:
        clients = self._kernels.get(kernel_id)
        if clients is not None and clients.parked is not None:
            clients.parked.close()
            clients.parked = None

    def _drop(self, kernel_id: str, code: int, reason: str) -> None:
        self._forget_parked(kernel_id)
        clients = self._kernels.pop(kernel_id, None)
        if clients is None:
            return
        for connection in clients.connections.values():
            self._metrics.connections.dec()
            link, _ = connection.release()
            if link is not None:
                link.close()
            connection.client.close(code, reason)
