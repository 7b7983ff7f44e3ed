"""What a gateway does with what it finds when it starts: machines that run, records that name them, and neither's rest.

Knows nothing of how the earlier gateway ended: every state in which it can have been killed is met here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from kernels.core import Core
from kernels.errors import KernelsError
from kernels.index import SandboxRecord
from kernels.models import SandboxState
from kernels.naps import Naps
from kernels.session import Greeting
from kernels.warm import place_of
from vm_runtime.errors import MachineGoneError, VmRuntimeError
from vm_runtime.snapshots.errors import SnapshotError

log = logging.getLogger(__name__)

# Guests that are greeted at the same time: more would only make each of them late on a small host.
PARALLEL_GREETINGS = 8


async def find_again(core: Core, naps: Naps) -> list[str]:
    """Takes over what runs, opens the endpoints of what sleeps, ends what is no one's. The ids of sandboxes that were
    put to sleep in the middle of something because the gateway stopped."""
    settings = core.settings
    records = core.registry.records()
    for record in records:
        if record.sandbox.state is SandboxState.CREATING:
            await core.forget(record.sandbox.id)  # nobody was told of it
    records = core.registry.records()
    known = {record.machine_id for record in records if record.machine_id}
    found = {path.name for path in (settings.run_dir / "m").glob("*")}
    await asyncio.gather(*(_end_stray(core, machine_id) for machine_id in found - known))
    gate = asyncio.Semaphore(PARALLEL_GREETINGS)
    await asyncio.gather(*(_find_one(core, naps, record, gate) for record in records))
    alive = {live.saved.machine.id for live in core.live.values()}
    await core.launcher.saver.remove_leftovers(settings.state_dir / "machines", keep=alive)
    await core.drop_snapshots_of_strangers()
    records = core.registry.records()
    return [each.sandbox.id for each in records if each.resumes and each.sandbox.state is SandboxState.ASLEEP]


async def _end_stray(core: Core, machine_id: str) -> None:
    try:
        await core.launcher.end(place_of(machine_id, core.settings.state_dir, core.settings.run_dir))
    except MachineGoneError:
        pass
    except VmRuntimeError as error:
        log.warning("The stray machine %s could not be ended: %s", machine_id, error)


async def _find_one(core: Core, naps: Naps, record: SandboxRecord, gate: asyncio.Semaphore) -> None:
    """One that cannot be found again must not keep the gateway from serving the others."""
    try:
        async with gate:
            await _find(core, naps, record)
    except Exception as error:
        log.exception("Sandbox %s could not be found again", record.sandbox.id)
        with contextlib.suppress(KernelsError):
            core.registry.fail(record.sandbox.id, f"It could not be found again when the gateway started: {error}")


async def _find(core: Core, naps: Naps, record: SandboxRecord) -> None:
    sandbox = record.sandbox
    if sandbox.state is SandboxState.FAILED:
        return
    await core.open_endpoints(sandbox.id)
    if not record.machine_id:
        if sandbox.state in (SandboxState.RUNNING, SandboxState.PAUSED):
            naps.on_machine_lost(sandbox.id, "Its machine had ended when the gateway was killed.")
        return
    place = place_of(record.machine_id, core.settings.state_dir, core.settings.run_dir)
    if sandbox.state is SandboxState.ASLEEP:
        # Killed between falling asleep and the machine's end.
        await _end_stray(core, record.machine_id)
        core.registry.update(sandbox.id, machine_id="")
        return
    greeting = Greeting(marker=record.marker, identity=core.identity(record), key=record.key, restored=False)
    try:
        warm = await core.launcher.adopt(place, greeting)
        await core.go_live(sandbox.id, warm)
    except (KernelsError, VmRuntimeError, SnapshotError) as error:
        naps.on_machine_lost(sandbox.id, str(error))
        return
    if sandbox.state is SandboxState.PAUSED:
        try:
            await naps.pause(sandbox.id)
        except KernelsError as error:
            # It is found again all the same. One that has just died is its supervisor's business.
            log.warning("Sandbox %s was paused and runs now: %s", sandbox.id, error)
