"""The interface that every driver implements, and the values that cross it.

Knows no VMM. What a driver cannot do is data (`Capabilities`), never a question of which driver it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.confinement.report import ConfinementReport
from vm_runtime.machine import Machine, MemoryMapping
from vm_runtime.snapshots.layers import Layer
from vm_runtime.snapshots.manifest import Vmm
from vm_runtime.snapshots.memory import BaseMemory
from vm_runtime.spec import MachineSpec


@dataclass(frozen=True, kw_only=True)
class MachinePlace:
    """Where a machine's files lie. id: short and unique among live machines. run_dir: sockets and record (a short path,
    since a UNIX socket's has at most 107 bytes). disk_dir: for the machine's own overlay. Both are made if missing."""

    id: str
    run_dir: Path
    disk_dir: Path


@dataclass(frozen=True, kw_only=True)
class MachineState:
    """What a machine is restored from. base: mapped copy-on-write. layers: written over it, oldest first.
    device: file with the state of CPUs and devices. disk_chain: read-only disk files, oldest first; the first one is
    raw and the others are qcow2 overlays."""

    base: BaseMemory
    layers: Sequence[Layer]
    device: Path
    disk_chain: Sequence[Path]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a driver can do here. Where it cannot, `why_not` has a sentence under the capability's name."""

    snapshot: bool
    restore: bool
    adopt: bool
    sealed_base: bool
    why_not: tuple[tuple[str, str], ...] = ()


class PreparedMachine(ABC):
    """A VMM that was started ahead of time, maps its base and waits for its state. End it with `load` or `discard`."""

    pid: int

    @abstractmethod
    def memory_mapping(self) -> MemoryMapping:
        """Where its RAM is, into which may be written already. Blocking."""

    @abstractmethod
    def lend(self, files: Mapping[int, int]) -> AbstractAsyncContextManager[Mapping[int, int]]:
        """Within it the VMM has these files open, too: our descriptors by any key in, its descriptors out; without
        files that it could write to. Any failure within ends it, as of `load`."""

    @abstractmethod
    async def load(self, device: Path, *, fill: Callable[[MemoryMapping], None]) -> Machine:
        """Bring it to the state in `device` and answer when it runs; any failure ends it (MachineStartError).

        fill: writes what the memory has over the base, in a thread, before anything reads it.
        """

    @abstractmethod
    async def discard(self) -> None:
        """End it; harmless after `load` has failed."""


class Driver(ABC):
    """Makes machines of one kind. Safe to use from many tasks of one event loop at once.

    Errors of all that make machines: MachineStartError (with the serial tail), DriverError. Nothing is left behind
    then, also when the call is cancelled.
    """

    name: str

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def identity(self) -> str:
        """What a device state depends on: VMM, version, machine type, CPU model. Part of a template's digest."""

    @property
    @abstractmethod
    def vmm(self) -> Vmm:
        """The same for a snapshot's manifest: only an equal one can load its device state."""

    @abstractmethod
    def confinement(self) -> ConfinementReport:
        """How far this host allows a VMM to be confined."""

    @abstractmethod
    async def boot(
        self, spec: MachineSpec, *, place: MachinePlace, initramfs: Path, disk: Path, timeout_s: float
    ) -> Machine:
        """Start a machine with fresh RAM (a memfd of its own) on a raw disk, which it writes directly.

        Answers when the vCPUs run, which says nothing about the guest yet; timeout_s bounds the VMM's own start.
        """

    @abstractmethod
    async def restore(self, spec: MachineSpec, state: MachineState, *, place: MachinePlace) -> Machine:
        """Start a clone and answer when it runs. The base must stay open until then, the disk chain while it lives."""

    @abstractmethod
    async def prepare_restore(
        self, spec: MachineSpec, base: BaseMemory, disk_chain: Sequence[Path], *, place: MachinePlace
    ) -> PreparedMachine:
        """Start the VMM of a clone whose state comes later; answers when it has mapped the base.

        The disk chain must not change any more when it is loaded; until then another machine may write its last file.
        """

    @abstractmethod
    async def adopt(self, place: MachinePlace) -> Machine:
        """Find the live machine of an earlier process at this place. MachineGoneError if it is dead: its leftovers are
        then removed."""

    @abstractmethod
    async def merge_disks(self, overlays: Sequence[Path], target: Path) -> None:
        """Write one new, synced file that shows the same as these parts of a disk's chain over each other, lowest
        first; the chain's first file is never among them. Called by the flattening of snapshots.

        Raises BrokenSnapshotError, StoreFullError, DriverError; no file is left then, nor when cancelled.
        """

    @abstractmethod
    def remove_leftovers(self, machines_dir: Path, *, keep: Set[str]) -> None:
        """Remove the disk directories (`machines_dir/<machine id>`) of machines that are not in `keep`. Blocking."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything but the machines. Twice is harmless."""
