"""A machine as the layers above see it, whatever VMM runs it.

Knows no driver. Every method says in which run states it may be called (vm_runtime/states.py has the table).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.spec import MachineSpec
from vm_runtime.states import RunState


@dataclass(frozen=True, kw_only=True)
class Death:
    """How a machine ended. reason: a sentence. exit_status or signal: of the VMM process, both None if nobody could
    see them (an adopted VMM is not our child). requested: by `kill()`. serial_tail: the end of the guest's console."""

    reason: str
    exit_status: int | None
    signal: int | None
    requested: bool
    serial_tail: str


@dataclass(frozen=True, kw_only=True)
class MemoryUsage:
    """unique_bytes: memory (in RAM or swap) that would be free if this machine ended: what VMM and guest have
    written. shared_bytes: mapped pages of files and of the base, which the host has once for all machines."""

    unique_bytes: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryMapping:
    """Where guest RAM lies in the VMM's address space. `private`: a copy-on-write view of a base."""

    address: int
    length: int
    private: bool


class Machine(ABC):
    """One VMM process with its guest. Its owner must end it with `kill()` or let go of it with `detach()`.

    A snapshot is composed of its parts by vm_runtime/snapshots: `pause`, `device_state`, the pages of `dirty_ranges`
    read through `memory_mapping`, `freeze_disk`, `resume`.
    """

    id: str
    spec: MachineSpec
    pid: int

    @property
    @abstractmethod
    def state(self) -> RunState: ...

    @property
    def is_dead(self) -> bool:
        """Whether the VMM has ended."""
        return self.state is RunState.DEAD

    @property
    @abstractmethod
    def wire_path(self) -> Path:
        """UNIX socket of the wire; one connection at a time. Called by the wire's link."""

    @property
    @abstractmethod
    def memory_fd(self) -> int | None:
        """The memfd that is the RAM of a booted machine (valid until it is killed), None for a clone."""

    @property
    @abstractmethod
    def disk_chain(self) -> tuple[Path, ...]:
        """The disk's files, oldest first; the last one is being written."""

    @property
    @abstractmethod
    def disk_written(self) -> bool:
        """Whether anything was written to the last file of a clone's chain since it was made. Exact when PAUSED; what
        runs may have more in its caches."""

    @abstractmethod
    async def pause(self) -> None:
        """Stop the vCPUs. RUNNING -> PAUSED; harmless if already PAUSED."""

    @abstractmethod
    async def resume(self) -> None:
        """Let the vCPUs run. PAUSED -> RUNNING; harmless if already RUNNING."""

    @abstractmethod
    def set_background(self, background: bool) -> None:
        """Whether it yields the CPUs to other machines where they are short; a new one does not. No effect where the
        host does not let CPU be limited (`Driver.confinement`). Any state."""

    @abstractmethod
    async def device_state(self, path: Path) -> None:
        """Write the state of CPUs and devices, without RAM, to a new file. PAUSED only."""

    @abstractmethod
    def memory_mapping(self) -> MemoryMapping:
        """Where guest RAM is mapped in the process `pid`. Any state but DEAD."""

    @abstractmethod
    async def dirty_ranges(self) -> Sequence[tuple[int, int]]:
        """(first page, pages) of the RAM that this machine does not share with its base, ascending. PAUSED only."""

    @abstractmethod
    async def freeze_disk(self, new_overlay: Path) -> Path:
        """Go on writing to `new_overlay`, a file that must not exist yet; answers the file that will not change any
        more. O(1). RUNNING or PAUSED; pause first to have it agree with a memory snapshot."""

    @abstractmethod
    async def rebase_disk(self, lower: Sequence[Path], *, keep: int) -> None:
        """Put other files, which show the same, under the last `keep` of the disk's chain: a shorter form of what lies
        there, lowest first. Copies nothing; the guest runs on. RUNNING or PAUSED. MachineError: the chain is as it was.
        """

    @abstractmethod
    def memory_usage(self) -> MemoryUsage:
        """Resident memory of the VMM. Walks its page tables (up to some 10 ms): call it from a thread."""

    @abstractmethod
    def serial_tail(self) -> str:
        """The last bytes that the guest printed on its serial console, hostile text with control characters removed."""

    @abstractmethod
    async def wait_dead(self) -> Death:
        """Wait until the VMM has ended, however it came to that. Call `kill()` afterwards to remove its overlay."""

    @abstractmethod
    async def kill(self) -> Death:
        """End the VMM and remove its sockets, record, cgroups and overlay. Any state; twice is harmless."""

    @abstractmethod
    async def detach(self) -> None:
        """Let go of a machine that goes on running, to be adopted later by another process. Twice is harmless."""
