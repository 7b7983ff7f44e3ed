"""A gateway that serves: its parts put together over a running service, and taken apart again.

Knows neither command line nor signals; tests use it as `serve` does.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tornado.netutil import bind_sockets

from gateway.app import make_server
from gateway.errors import StartError
from gateway.hub import KernelHub
from gateway.metrics import Metrics
from gateway.sessions import SessionStore
from gateway.settings import GatewaySettings
from gateway.state import Gateway
from kernels.events import EventQueue
from kernels.models import EventKind
from kernels.service import SandboxService

# 32 random bytes: nobody guesses them, and they fit into a URL.
TOKEN_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Serving:
    """url: where it listens, without a slash at the end."""

    url: str
    token: str
    gateway: Gateway


@asynccontextmanager
async def serving(settings: GatewaySettings, service: SandboxService) -> AsyncIterator[Serving]:
    """Listens until the context ends, then closes every connection. The caller runs and ends `service`.

    Errors: StartError when the address cannot be listened at.
    """
    metrics = Metrics(states=lambda: [sandbox.state for sandbox in service.list()], pool_ready=service.pool_ready)
    async with AsyncExitStack() as stack:
        sessions = SessionStore(settings.state_dir / "gateway.sqlite")
        stack.callback(sessions.close)
        hub = await stack.enter_async_context(KernelHub(service, settings, metrics).running())
        token = settings.token or secrets.token_urlsafe(TOKEN_BYTES)
        gateway = Gateway(settings=settings, token=token, service=service, sessions=sessions, hub=hub, metrics=metrics)
        for follow in (hub.follow, lambda events: _follow_sessions(sessions, events)):
            events = await stack.enter_async_context(service.subscribe())
            task = asyncio.create_task(follow(events))
            stack.push_async_callback(_cancelled, task)
        server = make_server(gateway)
        try:
            sockets = bind_sockets(settings.port, settings.host)
        except OSError as error:
            raise StartError(
                f"Cannot listen at {settings.host}:{settings.port}: {error.strerror}. --port chooses another port "
                "(0 takes any free one)."
            ) from error
        server.add_sockets(sockets)
        stack.push_async_callback(server.close_all_connections)
        stack.callback(server.stop)
        yield Serving(url=_url(settings.host, sockets[0].getsockname()[1]), token=token, gateway=gateway)


def _url(host: str, port: int) -> str:
    # What listens everywhere is reached on this machine through loopback.
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


async def _follow_sessions(sessions: SessionStore, events: EventQueue) -> None:
    async for event in events:
        if event.kind is EventKind.DELETED:
            sessions.remove_kernel(event.sandbox_id)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
