"""Machines for sandboxes: from the pool, or restored from a snapshot.

Knows nothing of records, states or HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from weakref import WeakSet

from kernels.capacity import Capacity
from kernels.connected import ConnectedMachine, new_paths
from kernels.pool import Pool
from kernels.prewarm import prewarm
from kernels.session import Greeting
from kernels.settings import ServiceSettings
from kernels.templates import Template
from vm_runtime.machine import Machine
from vm_runtime.saving.saver import Saver
from vm_runtime.snapshots.manifest import Manifest

# Identity of a machine that waits in the pool; it gets its own when a sandbox takes it.
SPARE_IDENTITY = {"sandbox_id": "", "hostname": "sandbox"}


def new_key() -> str:
    """An HMAC key for a kernel."""
    return secrets.token_hex(32)


class Launcher:
    """pool: of spare machines; run `pool.run()` as a task while this is in use, then `pool.close()`."""

    def __init__(self, settings: ServiceSettings, saver: Saver, capacity: Capacity) -> None:
        self._settings = settings
        self._saver = saver
        self._capacity = capacity
        self._making: WeakSet[Machine] = WeakSet()
        self.pool = Pool(
            size=settings.pool_size,
            limit=settings.pool_limit,
            make=self._make_spare,
            has_room=capacity.has_room_for_spare,
        )

    async def launch(self, template: Template, identity: Mapping[str, str]) -> ConnectedMachine:
        """A machine of the template, from the pool if one is ready. Errors: CapacityError, VmRuntimeError,
        SnapshotError, MachineFailedError."""
        connected = self.pool.take(template)
        if self.pool.ready_count(template) == 0:
            for machine in self._making:
                machine.set_background(False)
        if connected is None:
            return await self.restore(template.snapshot, _first_greeting(template, identity))
        connected.saved.machine.set_background(False)
        return connected

    async def restore(
        self, snapshot: Manifest, greeting: Greeting, *, on_running: Callable[[Machine], None] = lambda machine: None
    ) -> ConnectedMachine:
        """A machine in the state of a snapshot. on_running: called when its guest runs, before it is greeted.
        Errors: as `launch`."""
        with self._capacity.room(snapshot.shape.memory_mib):
            paths = new_paths(self._settings.state_dir, self._settings.run_dir)
            saved = await self._saver.restore(snapshot, paths=paths)
            on_running(saved.machine)
            return await ConnectedMachine.greet(saved, greeting)

    async def _make_spare(self, template: Template) -> ConnectedMachine:
        """It yields to others, but not while the pool is empty: the next start would then wait for as much work."""

        def yielding(machine: Machine) -> None:
            self._making.add(machine)
            machine.set_background(self.pool.ready_count(template) > 0)

        greeting = _first_greeting(template, SPARE_IDENTITY)
        connected = await self.restore(template.snapshot, greeting, on_running=yielding)
        try:
            await prewarm(connected, SPARE_IDENTITY)
        except BaseException:
            await connected.close()
            raise
        self._making.discard(connected.saved.machine)
        connected.saved.machine.set_background(True)
        return connected


def _first_greeting(template: Template, identity: Mapping[str, str]) -> Greeting:
    return Greeting(marker=template.snapshot.wire_marker, identity=identity, key=new_key(), restored=True)
