"""Machines for sandboxes: from the pool, restored from a snapshot, or adopted from an earlier gateway.

Knows nothing of records, states or HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from weakref import WeakSet

from kernels.capacity import Capacity
from kernels.exercise import exercise
from kernels.pool import Pool
from kernels.session import Greeting
from kernels.settings import ServiceSettings
from kernels.templates import Template, TemplateStore
from kernels.warm import WarmMachine, new_place
from vm_runtime.drivers.base import Driver, Failure, MachinePlace
from vm_runtime.machine import Machine
from vm_runtime.saving.saver import Saver
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.spec import ImageFiles
from vm_runtime.states import RunState

# What is found again holds work that is saved nowhere; it is given up only when it surely hangs.
ADOPTION_TIMEOUT_S = 120.0
# Identity of a machine that waits in the pool; it gets its own when a sandbox takes it.
SPARE_IDENTITY = {"sandbox_id": "", "hostname": "sandbox"}


def identity_of(
    sandbox_id: str, *, parent_id: str | None = None, index: int = 0, name: str | None = None
) -> dict[str, str]:
    """What the guest is told of who it is. The host name is the id's first group: short enough for a shell prompt.

    index: counts only for a child; a sandbox that no fork made has none.
    """
    identity = {"sandbox_id": sandbox_id, "hostname": f"sandbox-{sandbox_id.partition('-')[0]}"}
    if parent_id is not None:
        identity |= {"parent_id": parent_id, "index": str(index)}
    return identity if name is None else {**identity, "name": name}


def new_key() -> str:
    """An HMAC key for a kernel."""
    return secrets.token_hex(32)


class Launcher:
    """`async with launcher.running():` keeps the pool filled; on exit the pool's machines end."""

    def __init__(
        self,
        settings: ServiceSettings,
        driver: Driver,
        store: SnapshotStore,
        *,
        image_files: Callable[[str], ImageFiles],
        on_flattening_failed: Callable[[Failure], None],
        capacity: Capacity,
    ) -> None:
        self._settings = settings
        self.saver = Saver(
            store=store, driver=driver, image_files=image_files, on_flattening_failed=on_flattening_failed
        )
        self.templates = TemplateStore(settings.state_dir / "templates", settings.run_dir, driver, store, self.saver)
        self._capacity = capacity
        self._making: WeakSet[Machine] = WeakSet()
        self.pool = Pool(
            size=settings.pool_size,
            limit=settings.pool_limit,
            make=self._make_spare,
            has_room=capacity.has_room_for_spare,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        filler = asyncio.create_task(self.pool.run())
        try:
            yield
        finally:
            filler.cancel()
            await asyncio.gather(filler, return_exceptions=True)
            await self.pool.close()
            await self.templates.close()
            await self.saver.close()

    async def launch(self, template: Template, identity: Mapping[str, str]) -> WarmMachine:
        """A machine of the template, from the pool if one is ready. Errors: CapacityError, VmRuntimeError,
        SnapshotError, MachineFailedError."""
        warm = self.pool.take(template)
        if self.pool.ready_count(template) == 0:
            for machine in self._making:
                machine.set_background(False)
        if warm is None:
            return await self.restore(template.snapshot, _first_greeting(template, identity))
        warm.saved.machine.set_background(False)
        return warm

    async def restore(
        self, snapshot: Manifest, greeting: Greeting, *, on_running: Callable[[Machine], None] = lambda machine: None
    ) -> WarmMachine:
        """A machine in the state of a snapshot. on_running: called when its guest runs, before it is greeted.
        Errors: as `launch`."""
        with self._capacity.room(snapshot.shape.memory_mib):
            saved = await self.saver.restore(
                snapshot, place=new_place(self._settings.state_dir, self._settings.run_dir)
            )
            on_running(saved.machine)
            return await WarmMachine.greet(saved, greeting)

    async def adopt(self, place: MachinePlace, greeting: Greeting) -> WarmMachine:
        """Takes over a machine that an earlier gateway left; it runs afterwards. Errors: as `launch`."""
        saved = await self.saver.adopt(place)
        if saved.machine.state is RunState.PAUSED:
            # That gateway was killed in the pause of a snapshot, or a user had paused it; a guest that stands still
            # answers no greeting.
            try:
                await saved.machine.resume()
            except BaseException:
                await saved.kill()
                raise
        return await WarmMachine.greet(saved, greeting, timeout_s=ADOPTION_TIMEOUT_S)

    async def end(self, place: MachinePlace) -> None:
        """Ends a machine that belongs to no sandbox, and removes what it left. Errors: VmRuntimeError."""
        await self.saver.end(place)

    async def _make_spare(self, template: Template) -> WarmMachine:
        """It yields to others, but not while the pool is empty: the next start would then wait for as much work."""

        def yielding(machine: Machine) -> None:
            self._making.add(machine)
            machine.set_background(self.pool.ready_count(template) > 0)

        greeting = _first_greeting(template, SPARE_IDENTITY)
        warm = await self.restore(template.snapshot, greeting, on_running=yielding)
        try:
            await exercise(warm, self._settings.run_dir, SPARE_IDENTITY)
        except BaseException:
            await warm.close()
            raise
        self._making.discard(warm.saved.machine)
        warm.saved.machine.set_background(True)
        return warm


def _first_greeting(template: Template, identity: Mapping[str, str]) -> Greeting:
    return Greeting(marker=template.snapshot.wire_marker, identity=identity, key=new_key(), restored=True)
