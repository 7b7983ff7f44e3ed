"""Admission: whether the host has room for one more sandbox. Reads /proc/meminfo; knows nothing of machines."""

from __future__ import annotations

from pathlib import Path

from kernels.errors import CapacityError
from kernels.models import Sandbox
from vm_runtime.spec import MachineShape

# What a restored sandbox takes of its own before it has done much (40 to 64 MiB after one cell), with head room.
START_COST_MIB = 128
# Never given to sandboxes: the gateway, the host's own services, and the page cache that all clones share.
RESERVE_MIB = 512
# A spare machine is a luxury: it is made only while this much more is free.
SPARE_RESERVE_MIB = 2048


def shape_of(sandbox: Sandbox) -> MachineShape:
    """The shape of the sandbox's machines."""
    return MachineShape(memory_mib=sandbox.memory_mib, vcpus=sandbox.vcpus, disk_mib=sandbox.disk_mib)


def available_mib(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that new processes can have without swapping (MemAvailable, see proc(5)), in MiB."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise CapacityError(f"{meminfo} has no MemAvailable; Linux 3.14 or newer is needed.")


class Capacity:
    """`admit` before a sandbox is made, `check_memory` before one is woken, `has_room_for_spare` before a spare one."""

    def __init__(self, max_sandboxes: int) -> None:
        self._max_sandboxes = max_sandboxes

    def admit(self, existing: int, shape: MachineShape, *, count: int = 1) -> None:
        """Whether `count` more may be made. Errors: CapacityError with the number that is short."""
        if existing + count > self._max_sandboxes:
            raise CapacityError(
                f"There are {existing} sandboxes, the limit (max_sandboxes). Delete one or raise the limit."
            )
        self.check_memory(shape, count=count)

    def check_memory(self, shape: MachineShape, *, count: int = 1) -> None:
        """Whether `count` sandboxes may get machines. Errors: CapacityError with the number that is short."""
        need = RESERVE_MIB + count * min(START_COST_MIB, shape.memory_mib)
        free = available_mib()
        if free < need:
            what = f"{free} MiB of memory are available, {count} more machines need {need}"
            raise CapacityError(f"{what}. Try again later.")

    def has_room_for_spare(self) -> bool:
        return available_mib() >= SPARE_RESERVE_MIB + START_COST_MIB
