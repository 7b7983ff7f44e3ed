"""Changes of sandboxes as Server-Sent Events (the HTML standard, section 9.2), for one sandbox or all.

Knows Tornado. Events that a client has not taken wait in its queue on the event bus; whoever falls behind the limit
there, or takes nothing for `client_timeout_s`, is cut off.
"""

from __future__ import annotations

import asyncio

from tornado.iostream import StreamClosedError

from gateway.endpoint import Endpoint, EndpointHandler, Operation, Routes
from gateway.openapi import EVENT_STREAM
from gateway.sandbox_models import EventAnswer
from gateway.state import Gateway
from kernels.events import EventQueue
from kernels.models import EventKind, SandboxEvent

# Proxies cut silent connections after one minute.
HEARTBEAT_S = 15.0


class EventsHandler(EndpointHandler):
    """GET: a comment at once (from then on nothing is missed), events as they come, comments in between."""

    def initialize(self, gateway: Gateway, endpoint: Endpoint) -> None:
        super().initialize(gateway, endpoint)
        self._following: asyncio.Task[None] | None = None

    async def head(self, **path: str) -> None:
        self._begin(path.get("sandbox_id"))
        await self.finish()

    async def get(self, **path: str) -> None:
        sandbox_id = path.get("sandbox_id")
        self._begin(sandbox_id)
        self._following = asyncio.create_task(self._follow(sandbox_id))
        try:
            await self._following
        except StreamClosedError:
            pass
        except TimeoutError:
            self.request.connection.close()  # type: ignore[union-attr]
        except asyncio.CancelledError:
            if not self._client_gone:
                raise
        if not self._client_gone:
            await self.finish()

    def _begin(self, sandbox_id: str | None) -> None:
        if sandbox_id is not None:
            self.gateway.service.registry.get(sandbox_id)
        self.set_header("Content-Type", EVENT_STREAM)
        # nginx gathers answers otherwise.
        self.set_header("X-Accel-Buffering", "no")

    async def _follow(self, sandbox_id: str | None) -> None:
        async with self.gateway.service.bus.subscribe() as events:
            await self._send(": ready\n\n")
            while not events.overflowed:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        event = await self._next(events, sandbox_id)
                except TimeoutError:
                    await self._send(": still here\n\n")
                    continue
                if event is None:
                    return
                await self._send(f"event: {event.kind}\ndata: {EventAnswer.of(event).model_dump_json()}\n\n")
                if sandbox_id is not None and event.kind is EventKind.DELETED:
                    return

    @staticmethod
    async def _next(events: EventQueue, sandbox_id: str | None) -> SandboxEvent | None:
        """The next event of that sandbox, or of any; None when there will be none."""
        async for event in events:
            if sandbox_id is None or event.sandbox_id == sandbox_id:
                return event
        return None

    async def _send(self, text: str) -> None:
        self.write(text)
        async with asyncio.timeout(self.gateway.settings.client_timeout_s):
            await self.flush()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self._following is not None:
            self._following.cancel()


def _endpoint(path: str, name: str, summary: str, *errors: int) -> Endpoint:
    operation = Operation(name=name, summary=summary, reply=str, media=EVENT_STREAM, errors=errors)
    return Endpoint(path=path, operations={"GET": operation}, handler=EventsHandler)


routes = Routes(
    _endpoint("/api/sandboxes/events", "followSandboxes", "Every change of every sandbox from now on."),
    _endpoint(
        "/api/sandboxes/{sandbox_id}/events",
        "followSandbox",
        "Every change of a sandbox from now on, until it is deleted.",
        404,
    ),
)
