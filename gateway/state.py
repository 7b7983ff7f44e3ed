"""The gateway as its handlers see it: one value that holds the parts they act on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from weakref import WeakValueDictionary

from gateway.clients import CLOSE_NORMAL, ClientRegistry
from gateway.errors import ApiError, api_error
from gateway.metrics import Metrics
from gateway.models import KernelAnswer
from gateway.sessions import SessionStore
from gateway.settings import GatewaySettings
from kernels.errors import KernelsError, UnknownSandboxError
from kernels.models import CreateSandbox, Sandbox
from kernels.service import SandboxService

# Activity is a time for people and idle timers; once a second is exact enough for both.
TOUCH_INTERVAL_S = 1.0


@dataclass
class Gateway:
    """url: where it listens, without a slash at the end.
    token: what clients must show.
    started: aware UTC time.
    session_locks: by path, while a session is made.
    """

    settings: GatewaySettings
    url: str
    token: str
    service: SandboxService
    sessions: SessionStore
    clients: ClientRegistry
    metrics: Metrics
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    session_locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    async def create(self, request: CreateSandbox) -> Sandbox:
        """`SandboxService.create`, measured."""
        try:
            with self.metrics.start_seconds.time():
                return await self.service.create(request)
        except KernelsError as error:
            self.metrics.failed_starts.labels(api_error(error).code).inc()
            raise

    @asynccontextmanager
    async def in_use(self, sandbox_id: str) -> AsyncIterator[None]:
        """While something runs in a sandbox for a client who waits for it: idle time does not pass."""

        async def touch() -> None:
            while True:
                self.service.registry.touch(sandbox_id)
                await asyncio.sleep(TOUCH_INTERVAL_S)

        touching = asyncio.create_task(touch())
        try:
            yield
        finally:
            touching.cancel()

    def default_template(self) -> str:
        """The kernelspec for requests that name none: python3 where it exists. Errors: ApiError 503 without any."""
        names = sorted(self.service.kernelspecs())
        if not names:
            raise ApiError(503, "no_image", "There is no image yet. `hypercelld image build` makes one.")
        return "python3" if "python3" in names else names[0]

    def kernels(self) -> list[Sandbox]:
        """The sandboxes whose kernels Jupyter's clients see: those that no client has deleted."""
        return [sandbox for sandbox in self.service.registry.sandboxes() if not sandbox.released]

    def kernel_sandbox(self, kernel_id: str) -> Sandbox:
        """The sandbox of a kernel that Jupyter's clients see. Errors: UnknownSandboxError."""
        sandbox = self.service.registry.get(kernel_id)
        if sandbox.released:
            raise UnknownSandboxError(kernel_id)
        return sandbox

    async def release(self, kernel_id: str) -> None:
        """A Jupyter client deletes a kernel: its clients and sessions go. Errors: as `SandboxService.release`."""
        self.clients.close_clients(kernel_id, CLOSE_NORMAL, "the kernel was deleted")
        await self.service.release(kernel_id)
        self.sessions.remove_kernel(kernel_id)

    def kernel(self, sandbox: Sandbox) -> KernelAnswer:
        """Jupyter's model of it."""
        return KernelAnswer.of_sandbox(sandbox, self.clients.connection_count(sandbox.id))
