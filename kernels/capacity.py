"""Admission: whether the host has room for one more sandbox. Reads /proc/meminfo; knows nothing of machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.errors import CapacityError

# What a restored sandbox takes of its own before it has done much (40 to 64 MiB after one cell), with head room, where
# clones share memory.
START_COST_MIB = 128
# Never given to sandboxes: the gateway, the host's own services, and the page cache that all clones share.
RESERVE_MIB = 512
# A spare machine is a luxury: it is made only while this much more is free.
SPARE_RESERVE_MIB = 2048


def available_mib(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that new processes can have without swapping (MemAvailable, see proc(5)), in MiB."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise CapacityError(f"{meminfo} has no MemAvailable; Linux 3.14 or newer is needed.")


class Capacity:
    """`admit` before a sandbox is made; `with room(...)` around the start of machines; `has_room_for_spare` before that
    of a spare one. clones_share_memory: as of `Capabilities`. available_mib: what the host has now."""

    def __init__(
        self,
        max_sandboxes: int,
        *,
        clones_share_memory: bool = True,
        available_mib: Callable[[], int] = available_mib,
    ) -> None:
        self._max_sandboxes = max_sandboxes
        self._clones_share_memory = clones_share_memory
        self._available_mib = available_mib
        self._reserved_mib = 0

    def admit(self, existing: int, *, count: int = 1) -> None:
        """Whether `count` more sandboxes may exist. Errors: CapacityError."""
        if existing + count > self._max_sandboxes:
            raise CapacityError(
                f"There are {existing} sandboxes, the limit (max_sandboxes). Delete one or raise the limit."
            )

    @contextmanager
    def room(self, memory_mib: int, *, count: int = 1) -> Iterator[None]:
        """Reserves memory for `count` machines of this size until the block ends: what they took is then part of what
        the host has not available. Errors: CapacityError with the number that is short."""
        cost = count * (min(START_COST_MIB, memory_mib) if self._clones_share_memory else memory_mib)
        free = self._free_mib()
        if free < RESERVE_MIB + cost:
            what = f"{free} MiB of memory are available, {count} more machines need {RESERVE_MIB + cost}"
            raise CapacityError(f"{what}. Try again later.")
        self._reserved_mib += cost
        try:
            yield
        finally:
            self._reserved_mib -= cost

    def has_room_for_spare(self) -> bool:
        return self._free_mib() >= SPARE_RESERVE_MIB + START_COST_MIB

    def _free_mib(self) -> int:
        return self._available_mib() - self._reserved_mib
