"""What a gateway does with what it finds when it starts: machines that run, records of sandboxes, and what belongs to
neither.

Knows nothing of how the earlier gateway ended: every state in which it can have been killed is met here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from kernels.connected import ConnectedMachine, paths_of
from kernels.errors import KernelsError
from kernels.index import SandboxRecord
from kernels.lifecycle import Lifecycle
from kernels.machines import Machines, identity_of
from kernels.models import SandboxState
from kernels.registry import Registry
from kernels.session import Greeting
from kernels.settings import ServiceSettings
from kernels.snapshots import Snapshots
from vm_runtime.drivers.base import MachinePaths
from vm_runtime.errors import MachineGoneError, VmRuntimeError
from vm_runtime.saving.saver import Saver
from vm_runtime.saving.threads import gather_all
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.states import RunState

log = logging.getLogger(__name__)

# Guests that are greeted at the same time: more would only make each of them late on a small host.
PARALLEL_GREETINGS = 8
# What is found again holds work that is saved nowhere; it is given up only when it surely hangs.
ADOPTION_TIMEOUT_S = 120.0


@dataclass(eq=False)
class Recovery:
    """`await recover()` once, before anything else is done with sandboxes."""

    _settings: ServiceSettings
    _registry: Registry
    _machines: Machines
    _saver: Saver
    _snapshots: Snapshots
    _lifecycle: Lifecycle

    async def recover(self) -> list[str]:
        """Takes over what runs, opens endpoints that were there, ends what is no one's. The ids of sandboxes that were
        put to sleep in the middle of something because the gateway stopped."""
        for record in self._registry.records():
            if record.sandbox.state is SandboxState.CREATING:
                await self._lifecycle.forget(record.sandbox.id)  # nobody knows of it
        records = self._registry.records()
        known = {record.machine_id for record in records if record.machine_id}
        found = {path.name for path in (self._settings.run_dir / "m").glob("*")}
        gate = asyncio.Semaphore(PARALLEL_GREETINGS)
        await gather_all(*(self._end_stray(machine_id) for machine_id in found - known))
        await gather_all(*(self._find_one(record, gate) for record in records))
        alive = {live.saved.machine.id for live in self._machines.live.values()}
        await self._saver.remove_leftovers(self._settings.state_dir / "machines", keep=alive)
        await self._snapshots.drop_orphans()
        records = self._registry.records()
        return [each.sandbox.id for each in records if each.resumes and each.sandbox.state is SandboxState.ASLEEP]

    def _paths(self, machine_id: str) -> MachinePaths:
        return paths_of(machine_id, self._settings.state_dir, self._settings.run_dir)

    async def _end_stray(self, machine_id: str) -> None:
        try:
            await self._saver.end(self._paths(machine_id))
        except MachineGoneError:
            pass
        except VmRuntimeError as error:
            log.warning("The stray machine %s could not be ended: %s", machine_id, error)

    async def _find_one(self, record: SandboxRecord, gate: asyncio.Semaphore) -> None:
        """One that cannot be found again must not keep the gateway from serving the others."""
        try:
            async with gate:
                await self._find(record)
        except Exception as error:
            log.exception("Sandbox %s could not be found again", record.sandbox.id)
            with contextlib.suppress(KernelsError):
                reason = f"It could not be found again when the gateway started: {error}"
                self._registry.fail(record.sandbox.id, reason)

    async def _find(self, record: SandboxRecord) -> None:
        sandbox = record.sandbox
        if sandbox.state is SandboxState.FAILED:
            return
        if self._machines.had_endpoints(sandbox.id):
            await self._machines.endpoints(sandbox.id)
        if not record.machine_id:
            if sandbox.state in (SandboxState.RUNNING, SandboxState.PAUSED):
                self._lifecycle.machine_lost(sandbox.id, "Its machine had ended when the gateway was killed.")
            return
        if sandbox.state is SandboxState.ASLEEP:
            # Killed between falling asleep and the machine's end.
            await self._end_stray(record.machine_id)
            self._registry.update(sandbox.id, machine_id="")
            return
        try:
            await self._machines.go_live(sandbox.id, await self._adopt(record))
        except (KernelsError, VmRuntimeError, SnapshotError) as error:
            self._lifecycle.machine_lost(sandbox.id, str(error))
            return
        if sandbox.state is SandboxState.PAUSED:
            try:
                await self._lifecycle.pause(sandbox.id)
            except KernelsError as error:
                # It is found again all the same. One that has just died is its supervisor's business.
                log.warning("Sandbox %s was paused and runs now: %s", sandbox.id, error)

    async def _adopt(self, record: SandboxRecord) -> ConnectedMachine:
        """Its machine, which runs afterwards. Errors: MachineFailedError, VmRuntimeError."""
        saved = await self._saver.adopt(self._paths(record.machine_id))
        if saved.machine.state is RunState.PAUSED:
            # That gateway was killed in the pause of a snapshot, or a user had paused it; a guest that stands still
            # answers no greeting.
            try:
                await saved.machine.resume()
            except BaseException:
                await saved.kill()
                raise
        identity = identity_of(record.sandbox)
        greeting = Greeting(marker=record.marker, identity=identity, key=record.key, restored=False)
        return await ConnectedMachine.greet(saved, greeting, timeout_s=ADOPTION_TIMEOUT_S)
