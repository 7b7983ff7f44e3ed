"""The interface that every driver implements, and the values that cross it.

Knows no VMM. What a driver cannot do is data (`Capabilities`), never a question of which driver it is. Everything that
is common to all of them lies above: locks, hooks, pins, publishing and records in vm_runtime/saving.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from vm_runtime.machine import Machine
from vm_runtime.snapshots.manifest import Manifest, State
from vm_runtime.snapshots.store import Draft, SnapshotStore
from vm_runtime.spec import ImageFiles, MachineSpec


@dataclass(frozen=True, kw_only=True)
class MachinePaths:
    """Where a machine's files lie.

    id: short and unique among live machines.
    run_dir: sockets and record (a short path, since a UNIX socket's has at most 107 bytes).
    disk_dir: what the machine writes.

    Both are made if missing.
    """

    id: str
    run_dir: Path
    disk_dir: Path


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Whether a driver can do something here. why_not: a sentence, where it cannot. fix: a command or setting, where
    there is one."""

    ok: bool = True
    why_not: str = ""
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a driver can do on this host, and how its machines are. Read by the service, the API, `doctor` and
    kernelspecs.

    isolation: what runs in a machine cannot reach the host.
    snapshot: machines can be saved and restored, so sandboxes sleep, fork and go back.
    keeps_memory: a restored machine has its memory, variables and processes, not only files.
    clones_share_memory: many restored machines cost little more memory than what each writes itself.
    checkpoint_each_cell: a snapshot is cheap enough to take one after each cell unless something else is asked for.
    """

    isolation: Capability = Capability()
    snapshot: Capability = Capability()
    keeps_memory: Capability = Capability()
    clones_share_memory: Capability = Capability()
    checkpoint_each_cell: Capability = Capability()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of `hypercelld doctor` about a driver: what was found, and what is wrong with it, if anything.

    blocking: no machine runs without it.
    """

    name: str
    found: str
    problem: str | None = None
    fix: str | None = None
    blocking: bool = False


@dataclass(frozen=True, kw_only=True)
class DriverSettings:
    """What a driver may need to know when it is started.

    state_dir: where it may remember what it finds out about the host. image: one to try the host with, None while
    there is none. options: settings of the drivers, by name; each takes those that it knows.
    """

    state_dir: Path
    image: ImageFiles | None = None
    options: Mapping[str, str] = field(default_factory=dict)


class UnloadedMachine(ABC):
    """A machine's process that has been started and has no state yet. End it with `load` or `discard`."""

    @abstractmethod
    async def load(self) -> Machine:
        """The machine, running, in the state that it was started for. Any failure ends it: MachineStartError,
        SnapshotError, DriverError."""

    @abstractmethod
    async def discard(self) -> None:
        """End it; harmless after `load` has failed."""


class OpenState(ABC):
    """A state whose files stay readable while it is open: from the store, or captured and not stored yet."""

    @abstractmethod
    async def start_unloaded(self, spec: MachineSpec, *, paths: MachinePaths) -> UnloadedMachine:
        """Start a machine that is to have this state; for one that is yet to be captured, `load` comes after `take`.
        Errors: SnapshotError, MachineStartError, DriverError."""


class Capture(OpenState):
    """One machine's state at one pause. The steps are taken in this order, by vm_runtime/saving/machine.py. The next
    one may be captured before this one is stored; without `children` only."""

    @abstractmethod
    async def prepare(self) -> None:
        """Whatever makes the pause shorter. The machine runs, unless it is PAUSED already. Errors: SnapshotError."""

    @abstractmethod
    async def catch_up(self) -> None:
        """The same for what was written since: called right before the pause, if that was much."""

    @abstractmethod
    async def take(self) -> None:
        """Capture it. The machine is PAUSED from before this until after it."""

    @abstractmethod
    async def store(self, draft: Draft) -> State:
        """Put its parts into a draft. The machine may run again. Errors: SnapshotError."""

    @abstractmethod
    async def commit(self, state: State) -> None:
        """The snapshot is published and recorded: the one after it lies on `state`, as `store` answered it. Must not
        fail."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that could not be shortened. sandbox_id: whose, None for a snapshot that is nobody's.
    attempts: how often it was tried; it will be again."""

    snapshot_id: str
    sandbox_id: str | None
    reason: str
    attempts: int


@dataclass(frozen=True, kw_only=True)
class FlatteningStatus:
    """waiting: snapshots whose chains are to be shortened.
    failing: those of them that failed last time.
    failures, merged_bytes: counted since the start; the bytes are those written.
    """

    waiting: int = 0
    failing: tuple[Failure, ...] = ()
    failures: int = 0
    merged_bytes: int = 0


# Of a state that has got a shorter form, which is published (`SnapshotStore.flattened`): what a state that lies on it
# is then; None for one that does not.
Shorter = Callable[[State], State | None]


class States(ABC):
    """How a driver saves and loads its machines. Made by `Driver.states`; close it at the end."""

    @abstractmethod
    def opened(self, state: State) -> AbstractAsyncContextManager[OpenState]:
        """A state that is in the store, where the caller keeps its parts. Errors: BrokenSnapshotError."""

    @abstractmethod
    async def make_room(self, machine: Machine) -> None:
        """Before the next snapshot of a machine, which may be changed by it: do what the background has not kept up
        with, within a limit."""

    @abstractmethod
    def capturing(self, machine: Machine, *, children: int, last: bool) -> AbstractAsyncContextManager[Capture]:
        """The next snapshot of a machine. children: so many machines will be started from it. last: it is to stop."""

    @abstractmethod
    async def set_backing(self, machine: Machine, state: State) -> None:
        """The machine lies on this state: after a load, an adoption, or a shortening. The caller keeps its parts.
        Errors: SnapshotError, OSError; it then lies on what it did before."""

    @abstractmethod
    async def reopen(self, machine: Machine) -> None:
        """Let the machine itself use the files of its backing chain instead of a longer one. Errors:
        MachineError, DriverError, BrokenSnapshotError; it keeps what it has."""

    @abstractmethod
    def release(self, machine: Machine) -> None:
        """The machine was killed or detached. Twice is harmless."""

    @abstractmethod
    def shorten(self, manifest: Manifest, state: State, *, stopped: bool) -> None:
        """Shorten a snapshot in the background, where that makes restoring it quicker. state: its shortest form so far.
        stopped: its machine does not run on, so it will be restored next."""

    @abstractmethod
    def flattening(self) -> FlatteningStatus:
        """What the background has done and has to do."""

    @abstractmethod
    def quiet(self) -> AbstractContextManager[None]:
        """Within it the background stands still."""

    @abstractmethod
    async def settled(self) -> None:
        """Wait until nothing is to be done in the background."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything but the machines, and give up what is done in the background. Twice is harmless."""


class Driver(ABC):
    """Makes machines of one kind. Found by the entry point `hypercell.drivers`. Safe to use from many tasks of one
    event loop at once.

    Errors of all that make machines: MachineStartError (with the serial tail), DriverError. Nothing is left behind
    then, also when the call is cancelled.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    async def start(cls, settings: DriverSettings, *, progress: Callable[[str], None]) -> Self:
        """Find out what this host can do. progress: receives what was found. Errors: DriverUnavailableError,
        SpawnError."""

    @classmethod
    @abstractmethod
    async def checks(cls, settings: DriverSettings) -> Sequence[Check]:
        """What `hypercelld doctor` prints of this driver, also where it cannot be started. Changes nothing."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def identity(self) -> str:
        """All that the state of a machine depends on but its spec. Part of a template's digest."""

    @abstractmethod
    def can_load(self, state: State) -> str | None:
        """None if a machine can be restored from this state here, else a sentence why not."""

    @abstractmethod
    async def boot(self, spec: MachineSpec, *, paths: MachinePaths, guest: bytes, timeout_s: float) -> Machine:
        """Start a machine from its image, with an empty disk. guest: the agent's code (vm_runtime/guest/archive.py).

        Answers when it runs, which says nothing about the guest yet; timeout_s bounds the VMM's own start.
        """

    @abstractmethod
    def states(
        self,
        store: SnapshotStore,
        *,
        on_shortened: Callable[[Shorter], Awaitable[None]],
        on_failed: Callable[[Failure], None],
    ) -> States:
        """How machines are kept in this store. on_shortened: called when a state has got a shorter form; an error that
        it raises counts as a failure. on_failed: called for each failed attempt to shorten one."""

    @abstractmethod
    async def adopt(self, paths: MachinePaths) -> Machine:
        """Find the live machine of an earlier process at this place. MachineGoneError if it is dead: its leftovers are
        then removed."""

    @abstractmethod
    def remove_leftovers(self, machines_dir: Path, *, keep: Set[str]) -> None:
        """Remove the disk directories (`machines_dir/<machine id>`) of machines that are not in `keep`. Blocking."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything but the machines. Twice is harmless."""
