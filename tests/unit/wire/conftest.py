"""A host and a guest joined by a socket pair, for the tests of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from vm_runtime.wire.carriers import SocketCarrier
from vm_runtime.wire.greeting import Hello, Welcome
from vm_runtime.wire.link import Link
from vm_runtime.wire.protocol import BOOT_MARKER
from vm_runtime.wire.serving import serve


async def make_carrier(sock: socket.socket) -> SocketCarrier:
    return SocketCarrier(*await asyncio.open_connection(sock=sock))


async def welcome(_: Hello) -> Welcome:
    return Welcome(agent_version="test")


@contextlib.asynccontextmanager
async def join() -> AsyncIterator[tuple[Link, Link]]:
    """(host, guest) links of one session over a real socket pair."""
    left, right = socket.socketpair()
    guest: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

    async def on_session(link: Link) -> None:
        guest.set_result(link)

    serving = asyncio.create_task(serve(await make_carrier(right), on_session, make_welcome=welcome))
    host = await Link.connect(await make_carrier(left), Hello(), marker=BOOT_MARKER, timeout_s=60)
    try:
        yield host, await guest
    finally:
        await host.close()
        await serving


Joined = Callable[[], contextlib.AbstractAsyncContextManager[tuple[Link, Link]]]


@pytest.fixture
def joined() -> Joined:
    """Call it for an async context manager of (host, guest) links."""
    return join
