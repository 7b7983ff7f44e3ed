"""What a VMM must offer for its machines to be saved page by page (states.py): guest RAM that is mapped in its process.

Knows no VMM; a driver whose machines are saved as wholes needs none of this.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from vm_runtime.drivers.base import MachinePaths
from vm_runtime.machine import Machine
from vm_runtime.snapshots.memory import BaseMemory
from vm_runtime.spec import MachineSpec


@dataclass(frozen=True, kw_only=True)
class MemoryMapping:
    """Where guest RAM lies in the VMM's address space. `private`: a copy-on-write view of a base."""

    address: int
    length: int
    private: bool


class PagedMachine(Machine):
    """A machine whose memory, device state and disk can be taken one by one while it is paused."""

    paths: MachinePaths

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
    async def device_state(self) -> int:
        """A new memfd with the state of CPUs and devices, without RAM, for the caller to close. PAUSED only."""

    @abstractmethod
    def memory_mapping(self) -> MemoryMapping:
        """Where guest RAM is mapped in the process `pid`. Any state but DEAD. Blocking."""

    @abstractmethod
    async def freeze_disk(self, new_overlay: Path) -> Path:
        """Continue writing to `new_overlay`, a file that must not exist yet; answers the file that will not change any
        more. O(1). RUNNING or PAUSED; pause first to have it agree with a memory snapshot."""

    @abstractmethod
    async def rebase_disk(self, lower: Sequence[Path], *, keep: int) -> None:
        """Put other files, which show the same, under the last `keep` of the disk's chain: a shorter form of what lies
        there, lowest first. Copies nothing; the guest runs on. RUNNING or PAUSED. MachineError: the chain is as it was.
        """


class PreparedMachine(Protocol):
    """A VMM that was started ahead of time, maps its base and waits for its state. End it with `load` or `discard`."""

    pid: int

    def memory_mapping(self) -> MemoryMapping:
        """Where its RAM is, into which may be written already. Blocking."""

    def pass_files(self, files: Mapping[int, int]) -> AbstractAsyncContextManager[Mapping[int, int]]:
        """Within it the VMM has these files open, too: our descriptors by any key in, its descriptors out; without
        files that it could write to. Any failure within ends it, as of `load`."""

    async def load(self, device: Path, *, fill: Callable[[MemoryMapping], None]) -> PagedMachine:
        """Bring it to the state in `device` and answer when it runs; any failure ends it (MachineStartError).

        fill: writes what the memory has over the base, in a thread, before anything reads it.
        """

    async def discard(self) -> None:
        """End it; harmless after `load` has failed."""


class PagedVmm(Protocol):
    """The part of a driver that `PagedStates` uses.

    state_format: of its states. needs: what a host must have to load one of its states.
    sealed_bases: it insists on opening bases for writing.
    """

    name: ClassVar[str]
    state_format: ClassVar[str]

    @property
    def needs(self) -> Mapping[str, str]: ...

    @property
    def sealed_bases(self) -> bool: ...

    async def prepare_restore(
        self, spec: MachineSpec, base: BaseMemory, disk_chain: Sequence[Path], *, paths: MachinePaths
    ) -> PreparedMachine:
        """Start the VMM of a clone whose state comes later; answers when it has mapped the base.

        The disk chain must not change any more when it is loaded; until then another machine may write its last file.
        """

    async def merge_disks(self, overlays: Sequence[Path], target: Path) -> None:
        """Write one new, synced file that shows the same as these parts of a disk's chain over each other, lowest
        first; the chain's first file is never among them. Called by the flattening of snapshots.

        Raises BrokenSnapshotError, StoreFullError, DriverError; no file is left then, nor when cancelled.
        """
