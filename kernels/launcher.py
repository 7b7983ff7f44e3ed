"""Machines for sandboxes: from the pool, restored from a template, or adopted from an earlier gateway.

Knows nothing of records, states or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from kernels.pool import Pool
from kernels.session import Greeting
from kernels.settings import ServiceSettings
from kernels.templates import Template, TemplateStore
from kernels.warm import WarmMachine, new_place
from vm_runtime.drivers.base import Driver, MachinePlace
from vm_runtime.snapshots.memory import BaseCache

# Identity of a machine that waits in the pool; it gets its own when a sandbox takes it.
SPARE_IDENTITY = {"sandbox_id": "", "hostname": "sandbox"}


def identity_of(sandbox_id: str) -> dict[str, str]:
    """What the guest is told of who it is. The host name is the id's first group: short enough for a shell prompt."""
    return {"sandbox_id": sandbox_id, "hostname": f"sandbox-{sandbox_id.partition('-')[0]}"}


class Launcher:
    """`async with launcher.running():` keeps the pool filled; on exit the pool's machines end."""

    def __init__(
        self, settings: ServiceSettings, driver: Driver, bases: BaseCache, has_room_for_spare: Callable[[], bool]
    ) -> None:
        self._settings = settings
        self._driver = driver
        self._bases = bases
        self.templates = TemplateStore(settings.state_dir / "templates", settings.run_dir, driver)
        self.pool = Pool(size=settings.pool_size, make=self._make_spare, has_room=has_room_for_spare)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        filler = asyncio.create_task(self.pool.run())
        try:
            yield
        finally:
            filler.cancel()
            await asyncio.gather(filler, return_exceptions=True)
            await self.pool.close()

    async def launch(self, template: Template, identity: Mapping[str, str]) -> WarmMachine:
        """A machine of the template, from the pool if one is ready. Errors: VmRuntimeError, MachineFailedError."""
        warm = self.pool.take(template)
        if warm is not None:
            return warm
        with self.pool.demand():
            return await self._restore(template, identity)

    async def adopt(self, place: MachinePlace, greeting: Greeting) -> WarmMachine:
        """Takes over a machine that an earlier gateway left running. Errors: VmRuntimeError, MachineFailedError."""
        return await WarmMachine.greet(await self._driver.adopt(place), greeting)

    async def end(self, place: MachinePlace) -> None:
        """Ends a machine that belongs to no sandbox, and removes what it left."""
        machine = await self._driver.adopt(place)
        await machine.kill()

    async def _restore(self, template: Template, identity: Mapping[str, str]) -> WarmMachine:
        place = new_place(self._settings.state_dir, self._settings.run_dir)
        return await WarmMachine.restore(self._driver, self._bases, template, place, identity=identity)

    async def _make_spare(self, template: Template) -> WarmMachine:
        warm = await self._restore(template, SPARE_IDENTITY)
        try:
            # Runs the paths that a first cell takes, so that the emulator has them translated when a user comes.
            await warm.session.call("kernel.exercise")
        except BaseException:
            await warm.close()
            raise
        return warm
