"""A QEMU that was started ahead of time: it maps its base and waits for the state it is to run.

Does not start QEMU (driver.py does); also says what becomes of a machine whose start fails.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from vm_runtime.drivers.qemu.machine import QemuMachine
from vm_runtime.errors import MachineError, MachineGoneError, MachineStartError, VmmProtocolError
from vm_runtime.paged.machine import MemoryMapping, PreparedMachine
from vm_runtime.snapshots.errors import SnapshotError

# A clone runs 50 ms after its spawn on an idle host; twenty at once under TCG on two busy CPUs take seconds.
RESTORE_TIMEOUT_S = 60.0


class PreparedQemu(PreparedMachine):
    """See `PreparedMachine`; made by the driver."""

    def __init__(self, machine: QemuMachine) -> None:
        self.pid = machine.pid
        self._machine = machine

    def memory_mapping(self) -> MemoryMapping:
        return self._machine.memory_mapping()

    @contextlib.asynccontextmanager
    async def pass_files(self, files: Mapping[int, int]) -> AsyncIterator[Mapping[int, int]]:
        async with ending_on_error(self._machine), self._machine.pass_files(files) as passed:
            yield passed

    async def load(self, device: Path, *, fill: Callable[[MemoryMapping], None]) -> QemuMachine:
        machine = self._machine
        async with ending_on_error(machine), asyncio.timeout(RESTORE_TIMEOUT_S):
            await asyncio.to_thread(lambda: fill(machine.memory_mapping()))
            await machine.load_state(device)
        return machine

    async def discard(self) -> None:
        await self._machine.kill()


@contextlib.asynccontextmanager
async def ending_on_error(machine: QemuMachine, *, gone: bool = False) -> AsyncIterator[None]:
    """Until the block has succeeded, any failure ends the machine and becomes a MachineStartError.

    gone: it is to be found and not to be started, so that its death is a MachineGoneError.
    """
    try:
        yield
    except BaseException as error:
        death = await asyncio.shield(machine.kill())
        if isinstance(error, (MachineError, VmmProtocolError, SnapshotError, TimeoutError)):
            if gone and not death.requested:
                raise MachineGoneError(death.reason) from error
            why = str(error) or repr(error) if death.requested else death.reason
            raise MachineStartError(
                f"Machine {machine.id} did not start: {why}", serial_tail=death.serial_tail
            ) from error
        raise
