"""A machine as the layers above see it, whatever runs it.

Knows no driver. Every method says in which run states it may be called (vm_runtime/states.py has the table).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from vm_runtime.spec import MachineSpec
from vm_runtime.states import RunState
from vm_runtime.wire.carriers import Carrier


@dataclass(frozen=True, kw_only=True)
class Death:
    """How a machine ended.

    reason: a sentence.
    exit_status or signal: of the VMM process, both None if nobody could see them (an adopted VMM is not our child).
    requested: by `kill()`.
    serial_tail: the end of the guest's console.
    """

    reason: str
    exit_status: int | None
    signal: int | None
    requested: bool
    serial_tail: str


@dataclass(frozen=True, kw_only=True)
class MemoryUsage:
    """unique_bytes: memory (in RAM or swap) that would be free if this machine ended: what VMM and guest have
    written. shared_bytes: mapped pages of files and of bases, which the host has once for all machines."""

    unique_bytes: int
    shared_bytes: int


class Machine(ABC):
    """A guest and the process that runs it. Its owner must end it with `kill()` or let go of it with `detach()`.

    How it is saved is the driver's business: `Driver.states`.
    """

    id: str
    spec: MachineSpec
    pid: int

    @property
    @abstractmethod
    def state(self) -> RunState: ...

    @property
    def is_dead(self) -> bool:
        """Whether it has ended."""
        return self.state is RunState.DEAD

    @abstractmethod
    async def open_wire(self) -> Carrier:
        """A connection to the guest's agent, one at a time. Any state but DEAD; OSError if it has just ended."""

    @abstractmethod
    async def pause(self) -> None:
        """Stop the guest. RUNNING -> PAUSED; harmless if already PAUSED."""

    @abstractmethod
    async def resume(self) -> None:
        """Let the guest run. PAUSED -> RUNNING; harmless if already RUNNING."""

    @abstractmethod
    def set_background(self, background: bool) -> None:
        """Whether it yields the CPUs to other machines where they are short; a new one does not. No effect where the
        host does not let CPU be limited. Any state."""

    @abstractmethod
    def memory_usage(self) -> MemoryUsage:
        """Of all processes of the machine. Walks page tables (up to some 10 ms): call it from a thread."""

    @abstractmethod
    def serial_tail(self) -> str:
        """The last bytes that the guest printed on its console, hostile text with control characters removed."""

    @abstractmethod
    async def wait_dead(self) -> Death:
        """Wait until it has ended, however it came to that. Call `kill()` afterwards to remove its files."""

    @abstractmethod
    async def kill(self) -> Death:
        """End it and remove its sockets, record, cgroups and files. Any state; twice is harmless."""

    @abstractmethod
    async def detach(self) -> None:
        """Let go of a machine that runs on, to be adopted later by another process. Twice is harmless."""
