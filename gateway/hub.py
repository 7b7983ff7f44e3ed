"""All clients of all kernels: who is connected, what is kept for those who left, and who is told when a kernel dies.

Follows jupyter_server's rules: one connection per session, the last one out leaves its sockets behind. Knows nothing of
HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import zmq

from gateway.connection import Client, Connection
from gateway.errors import ApiError
from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink, iopub_socket, status_message, stderr_message
from gateway.metrics import Metrics
from gateway.parking import BufferBudget, Parked
from gateway.settings import GatewaySettings
from gateway.zmq_socket import ZmqSocket
from kernels.errors import CapacityError, KernelsError, UnknownSandboxError
from kernels.events import EventQueue
from kernels.models import EventKind, SandboxEvent, SandboxState
from kernels.service import SandboxService

log = logging.getLogger(__name__)

# WebSocket close codes (RFC 6455, section 7.4.1).
CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_FAILED = 1011
# Clients open their WebSocket right after they have made a kernel; others (jupyter_client's) never do.
PREPARED_S = 10.0


@dataclass
class _Clients:
    """The clients of one kernel, by session, and what the last one left behind. iopub: a socket for the first one.
    told: the sessions that know that the machine was lost, until it runs again."""

    connections: dict[str, Connection] = field(default_factory=dict)
    parked: Parked | None = None
    iopub: ZmqSocket | None = None
    told: set[str] = field(default_factory=set)


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
        self._tasks: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[KernelHub]:
        """Ends every connection and socket at the end."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                try:
                    yield self
                finally:
                    for kernel_id in list(self._kernels):
                        self._drop(kernel_id, CLOSE_GOING_AWAY, "the gateway is shutting down")
        finally:
            # Not before the last task has closed its sockets: it would wait for them, and the event loop with it.
            self._context.term()

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

    def attach(self, kernel_id: str, session_id: str, client: Client) -> Connection:
        """Connects a client; what was kept for it is sent first. Errors: those of `connection_info`."""
        info = self._service.connection_info(kernel_id)
        clients = self._kernels.setdefault(kernel_id, _Clients())
        connection = Connection(client, session_id, self._metrics, on_waiting=lambda: self._on_waiting(kernel_id))
        backlog: list[KernelMessage] = []
        stale = clients.connections.pop(session_id, None)
        parked, clients.parked = clients.parked, None
        link: KernelLink | None = None
        if stale is not None:
            # A client that lost its network comes back before its old connection has timed out here.
            link, backlog = stale.release()
            self._metrics.connections.dec()
            stale.client.close(CLOSE_NORMAL, "replaced by a newer connection of the same session")
        elif parked is not None:
            backlog = parked.release(for_session=session_id)
            link = parked.link
            if link is not None and parked.session_id != session_id:
                subscribed = link.subscribed
                link = KernelLink(self._context, info, session_id, iopub=link.take_iopub(), subscribed=subscribed)
        clients.connections[session_id] = connection
        self._metrics.connections.inc()
        if link is None:
            iopub, clients.iopub = clients.iopub, None
            link = KernelLink(self._context, info, session_id, iopub=iopub)
        link.resume()  # the client it was paused for is gone
        connection.use(link, backlog)
        if stale is None and parked is None:
            self._tell_of_loss(kernel_id, connection)
        self._settle(kernel_id, connection)
        return connection

    def prepare(self, kernel_id: str) -> None:
        """Subscribes to a new kernel, whose first client is about to come and must not wait for that. If none comes, it
        is let go. Errors: those of `connection_info`."""
        clients = self._kernels.setdefault(kernel_id, _Clients())
        if clients.connections or clients.parked is not None or clients.iopub is not None:
            return
        iopub = clients.iopub = iopub_socket(self._context, self._service.connection_info(kernel_id))
        asyncio.get_running_loop().call_later(PREPARED_S, self._let_go, kernel_id, iopub)

    def _let_go(self, kernel_id: str, iopub: ZmqSocket) -> None:
        clients = self._kernels.get(kernel_id)
        if clients is not None and clients.iopub is iopub:
            clients.iopub = None
            iopub.close()

    def _tell_of_loss(self, kernel_id: str, connection: Connection) -> None:
        """A sandbox that sleeps for a reason has lost its machine: who was not there then is told when it comes."""
        sandbox, clients = self._service.get(kernel_id), self._kernels[kernel_id]
        lost = sandbox.state is SandboxState.ASLEEP and sandbox.reason is not None
        if lost and connection.session_id not in clients.told:
            clients.told.add(connection.session_id)
            connection.announce("restarting", sandbox.reason)

    def _settle(self, kernel_id: str, connection: Connection) -> None:
        """Sees to it that the client's messages pass, as soon as no answer can be missed."""
        link = connection.link
        if link is None or not self._is_attached(kernel_id, connection):
            return
        sandbox = self._service.get(kernel_id)
        if sandbox.state is SandboxState.FAILED:
            connection.fail(sandbox.reason)
        elif link.subscribed:
            connection.admit()
        elif connection.settling is None or connection.settling.done():
            connection.settling = self._spawn(lambda: self._admit(kernel_id, connection, link))

    async def _admit(self, kernel_id: str, connection: Connection, link: KernelLink) -> None:
        sandbox = self._service.get(kernel_id)
        if sandbox.state is SandboxState.ASLEEP:
            return  # it is left to sleep until the client asks something: `_on_waiting`
        await link.wait_subscribed(busy=sandbox.execution_state == "busy")
        connection.admit()

    def _on_waiting(self, kernel_id: str) -> None:
        with suppress(UnknownSandboxError):
            if self._service.get(kernel_id).state is SandboxState.ASLEEP:
                self._spawn(lambda: self._wake(kernel_id))

    async def _wake(self, kernel_id: str) -> None:
        try:
            await self._service.ready(kernel_id)
        except UnknownSandboxError:
            return
        except KernelsError as error:
            log.warning("Kernel %s was asked something and cannot wake: %s", kernel_id, error)
            # Closed, so that clients try again: a host without room may have some then. Else the kernel is lost.
            if not isinstance(error, CapacityError):
                self._announce(kernel_id, "dead", str(error))
            self.close_clients(kernel_id, CLOSE_FAILED, str(error))

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(_logged(work))

    def close_clients(self, kernel_id: str, code: int, reason: str) -> None:
        """Asks all clients of a kernel to go; what is left is as if they had gone by themselves."""
        for connection in self._connections(kernel_id):
            connection.client.close(code, reason)

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

    def _on_event(self, event: SandboxEvent) -> None:
        kernel_id, reason = event.sandbox_id, event.data.get("reason")
        match event.kind:
            case EventKind.KERNEL_RESTARTING:
                self._announce(kernel_id, "restarting", reason)
                for connection in self._connections(kernel_id):
                    connection.unlink()
            case EventKind.KERNEL_RESTARTED:
                for connection in self._connections(kernel_id):
                    self._reconnect(kernel_id, connection)
                self._relink_parked(kernel_id)
            case EventKind.KERNEL_DEAD:
                self._announce(kernel_id, "dead", reason)
            case EventKind.STATE:
                self._on_state(kernel_id, event.data.get("state"), reason)
            case EventKind.DELETED:
                self._drop(kernel_id, CLOSE_NORMAL, "the kernel was deleted")

    def _on_state(self, kernel_id: str, state: str | None, reason: str | None) -> None:
        clients = self._kernels.get(kernel_id)
        if clients is None:
            return
        match state:
            case SandboxState.FAILED:
                self._announce(kernel_id, "dead", reason)
                for connection in clients.connections.values():
                    connection.fail(reason)
            case SandboxState.ASLEEP:
                for connection in clients.connections.values():
                    connection.hold()
                if clients.parked is not None:
                    clients.parked.unlink()
            case SandboxState.RUNNING:
                clients.told.clear()
                for connection in clients.connections.values():
                    if not connection.admitted:
                        self._settle(kernel_id, connection)

    def _announce(self, kernel_id: str, state: str, reason: str | None) -> None:
        clients = self._kernels.get(kernel_id)
        if clients is None:
            return
        for connection in clients.connections.values():
            connection.announce(state, reason)
            clients.told.add(connection.session_id)
        if clients.parked is not None:
            if reason is not None:
                clients.parked.keep(stderr_message(f"[{reason}]\n"))
            clients.parked.keep(status_message(state, reason))

    def _reconnect(self, kernel_id: str, connection: Connection) -> None:
        connection.unlink()
        try:
            info = self._service.connection_info(kernel_id)
        except KernelsError as error:
            # It died again; the event that says so is on its way to the client.
            log.info("A client of kernel %s was not connected again: %s", kernel_id, error)
            return
        connection.use(KernelLink(self._context, info, connection.session_id))
        self._settle(kernel_id, connection)

    def _relink_parked(self, kernel_id: str) -> None:
        clients = self._kernels.get(kernel_id)
        if clients is None or clients.parked is None:
            return
        with suppress(UnknownSandboxError):
            if self._service.get(kernel_id).state is SandboxState.ASLEEP:
                clients.parked.unlink()
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
        if clients is None:
            return
        if clients.parked is not None:
            clients.parked.close()
            clients.parked = None
        if clients.iopub is not None:
            clients.iopub.close()
            clients.iopub = None

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


async def _logged(work: Callable[[], Awaitable[None]]) -> None:
    """What goes wrong for one client must not end the others'."""
    try:
        await work()
    except Exception:
        log.exception("A client could not be served")
