"""A gateway that serves: its parts put together over a running service, and taken apart again.

Knows neither command line nor signals; tests use it as `serve` does.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from gateway.app import make_application
from gateway.clients import ClientRegistry
from gateway.listener import Listener
from gateway.metrics import Metrics
from gateway.sessions import SessionStore
from gateway.settings import GatewaySettings
from gateway.state import Gateway
from kernels.events import EventQueue
from kernels.models import EventKind
from kernels.service import SandboxService

log = logging.getLogger(__name__)

# 32 random bytes: nobody guesses them, and they fit into a URL.
TOKEN_BYTES = 32


@asynccontextmanager
async def serving(settings: GatewaySettings, service: SandboxService, listener: Listener) -> AsyncIterator[Gateway]:
    """Serves at `listener` until the context ends, then ends every WebSocket. The caller runs and ends both.

    Errors: StartError for a foreign file of sessions.
    """
    metrics = Metrics(
        states=lambda: [sandbox.state for sandbox in service.registry.sandboxes()],
        pool_ready=service.pool.ready_count,
        flattening=service.saver.flattening,
    )
    async with AsyncExitStack() as stack:
        sessions = SessionStore(settings.state_dir / "gateway.sqlite")
        stack.callback(sessions.close)
        clients = await stack.enter_async_context(ClientRegistry(service, settings, metrics).running())
        token = settings.token or secrets.token_urlsafe(TOKEN_BYTES)
        gateway = Gateway(
            settings=settings,
            url=listener.url,
            token=token,
            service=service,
            sessions=sessions,
            clients=clients,
            metrics=metrics,
        )
        for follow in (clients.follow, lambda events: _follow_sessions(sessions, events)):
            events = await stack.enter_async_context(service.bus.subscribe())
            task = asyncio.create_task(_keep_following(service, events, follow))
            stack.push_async_callback(_cancelled, task)
        listener.application = make_application(gateway)
        try:
            yield gateway
        finally:
            listener.application, listener.doing = None, "stopping"
            # Kernels sleep while their clients still receive: all that they have sent arrives.
            clients.hold()
            await service.stop()


async def _keep_following(
    service: SandboxService, events: EventQueue, follow: Callable[[EventQueue], Awaitable[None]]
) -> None:
    """As long as there are events, also after more came at once than anyone could take."""
    await follow(events)
    while events.overflowed:
        log.warning("Events came faster than they could be taken; some were missed")
        async with service.bus.subscribe() as events:
            await follow(events)


async def _follow_sessions(sessions: SessionStore, events: EventQueue) -> None:
    async for event in events:
        if event.kind is EventKind.DELETED:
            sessions.remove_kernel(event.sandbox_id)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
