"""The guest's end of the wire: waits for sessions on a carrier, one after the other. Knows no stream kinds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vm_runtime.wire.carriers import Carrier
from vm_runtime.wire.errors import LinkClosedError
from vm_runtime.wire.greeting import Hello, Limits, Welcome
from vm_runtime.wire.link import READ_BYTES, Link
from vm_runtime.wire.marker import MarkerScanner
from vm_runtime.wire.protocol import BOOT_MARKER, WireSession

logger = logging.getLogger(__name__)

MakeWelcome = Callable[[Hello], Awaitable[Welcome]]
OnSession = Callable[[Link], Awaitable[None]]


async def serve(
    carrier: Carrier,
    on_session: OnSession,
    *,
    make_welcome: MakeWelcome,
    limits: Limits | None = None,
    marker: bytes = BOOT_MARKER,
) -> None:
    """Serve sessions until the carrier ends (a DeviceCarrier never does) or the caller cancels. Closes the carrier.

    make_welcome: does all that follows a restore, and describes the guest; only then does the host get its WELCOME.
    on_session: gets the Link of a session that has begun; it sets `link.on_open` first, and may return or stay. Both
    are cancelled, and all streams lost (SessionResetError), when a new session begins. marker: that of the first one.
    """
    scanner = MarkerScanner(marker)
    link: Link | None = None
    task: asyncio.Task[None] | None = None
    try:
        while data := await carrier.read(READ_BYTES):
            found, data = scanner.feed(data)
            if found:
                await _stop(link, task)
                link = Link(WireSession.guest(limits=limits), carrier, reads=False)
                link.start()
                task = asyncio.create_task(_serve_one(link, on_session, make_welcome), name="wire session")
            if link is not None:
                greeted = link.hello
                link.feed(data)
                if greeted is None and link.hello is not None:
                    assert scanner.found is not None
                    scanner.accept(scanner.found, bytes.fromhex(link.hello.next_marker))
    finally:
        await _stop(link, task)
        carrier.close()


async def _stop(link: Link | None, task: asyncio.Task[None] | None) -> None:
    if link is not None:
        await link.abandon()
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


async def _serve_one(link: Link, on_session: OnSession, make_welcome: MakeWelcome) -> None:
    try:
        if not await link.wait_greeted():
            return
        assert link.hello is not None
        welcome = await make_welcome(link.hello)
        if not link.closed:
            link.send_welcome(welcome)
            await on_session(link)
            await link.wait_closed()
    except LinkClosedError:
        pass
    except Exception as error:
        logger.exception("The session failed")
        await link.close("agent_failed", f"{type(error).__name__}: {error}")
