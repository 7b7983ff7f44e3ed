"""A fork: one snapshot of a running machine and clones of it, at the same time.

The children's VMMs are started, and what the parent's last snapshot has is written into them, while the parent still
runs; when it has been captured, they are loaded from the captured pages in memory, and run. Then the snapshot is
stored; a child is only handed out when that has succeeded. Knows no VMM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.drivers.base import MachinePlace, PreparedMachine
from vm_runtime.machine import Machine, MemoryMapping
from vm_runtime.saving.machine import Beside, Captured, SavedMachine
from vm_runtime.saving.values import Taken
from vm_runtime.snapshots.layers import MemoryImage
from vm_runtime.snapshots.memory import BaseMemory
from vm_runtime.snapshots.tracking import DirtyTracker, start_tracker

# Starts a VMM on a base, with these disk files over those of the parent's ground.
Prepare = Callable[[BaseMemory, MachinePlace, Sequence[Path]], Awaitable[PreparedMachine]]


@dataclass(frozen=True, kw_only=True)
class Forked:
    """The snapshot of the parent, and for each place the child that runs there, or why there is none."""

    taken: Taken
    children: tuple[SavedMachine | Exception, ...]


# Called when the child at a place runs, while the snapshot is being stored: a greeting, say. Its error is the child's.
OnRunning = Callable[[MachinePlace, Machine], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class LoadedChild:
    """A child that runs, before its snapshot is stored."""

    machine: Machine
    base: BaseMemory
    tracker: DirtyTracker


class Child:
    """One child on its way: `prepare`, then `load`, then `take_over`; or `discard` at any point.

    An error of one step is kept, and the child takes no further step: its siblings go on.
    """

    def __init__(self, place: MachinePlace, prepare: Prepare) -> None:
        self.place = place
        self.error: Exception | None = None
        self._prepare = prepare
        self._base: BaseMemory | None = None
        self._disks: tuple[Path, ...] = ()
        self._prepared: PreparedMachine | None = None
        self._tracker: DirtyTracker | None = None
        self._machine: Machine | None = None

    async def prepare(
        self, acquiring: Awaitable[BaseMemory], ground: Awaitable[MemoryImage], disks: tuple[Path, ...]
    ) -> None:
        """Start the VMM and write what lies under the capture into it."""
        self._disks = disks
        try:
            self._base = await acquiring
            self._prepared = await self._start(self._base, ground, disks)
        except Exception as error:
            self.error = error

    async def load(self, captured: Captured, ground: Awaitable[MemoryImage], disks: tuple[Path, ...]) -> None:
        """Bring it to the captured state and let it run. disks: as they turned out to be, which is nearly always as
        they were expected to be; else its VMM is started anew."""
        if self.error is not None:
            return
        assert self._prepared is not None and self._base is not None
        try:
            if disks != self._disks:
                await self._prepared.discard()
                self._prepared = await self._start(self._base, ground, disks)
            prepared = self._prepared

            def fill(mapping: MemoryMapping) -> None:
                captured.pages.restore_into(prepared.pid, mapping.address)
                self._tracker = start_tracker(
                    prepared.pid, address=mapping.address, size_bytes=mapping.length, clean=True
                )

            self._machine = await prepared.load(captured.device, fill=fill)
        except Exception as error:
            self.error = error

    async def announce(self, on_running: OnRunning) -> None:
        """Tell that it runs."""
        if self._machine is not None and self.error is None:
            try:
                await on_running(self.place, self._machine)
            except Exception as error:
                self.error = error

    def take_over(self) -> LoadedChild | None:
        """Hand over what runs; None if it does not."""
        if self.error is not None:
            return None
        assert self._machine is not None and self._base is not None and self._tracker is not None
        return LoadedChild(machine=self._machine, base=self._base, tracker=self._tracker)

    async def discard(self) -> None:
        """End it and let go of everything. Twice is harmless."""
        if self._tracker is not None:
            self._tracker.close()
        if self._prepared is not None:
            await self._prepared.discard()
        if self._base is not None:
            self._base.close()

    async def _start(self, base: BaseMemory, ground: Awaitable[MemoryImage], disks: Sequence[Path]) -> PreparedMachine:
        prepared = await self._prepare(base, self.place, disks)
        try:
            image = await ground
            if image.layers:
                await asyncio.to_thread(lambda: image.restore_into(prepared.pid, prepared.memory_mapping().address))
        except BaseException:
            await prepared.discard()
            raise
        return prepared


class Children(Beside):
    """The children of one fork, on their way beside the parent's snapshot."""

    def __init__(
        self,
        parent: SavedMachine,
        children: Sequence[Child],
        *,
        acquire_base: Callable[[], Awaitable[BaseMemory]],
        on_running: OnRunning | None,
    ) -> None:
        self._parent = parent
        self._children = children
        self._acquire_base = acquire_base
        self._on_running = on_running
        self._disks: tuple[Path, ...] = ()
        self._ground: Awaitable[MemoryImage] | None = None

    async def before_capture(self, ground: Awaitable[MemoryImage]) -> None:
        self._ground = ground
        # A disk that was written already will be frozen at the pause, so the children may be started on it: they look
        # at it again when they are loaded.
        self._disks = await asyncio.to_thread(self._parent.unsaved_disks)
        await asyncio.gather(*(child.prepare(self._acquire_base(), ground, self._disks) for child in self._children))

    async def when_captured(self, captured: Captured) -> None:
        assert self._ground is not None
        disks = self._disks
        if captured.frozen_disk is not None and captured.frozen_disk not in disks:
            disks = (*disks, captured.frozen_disk)
        await asyncio.gather(*(child.load(captured, self._ground, disks) for child in self._children))

    async def while_stored(self) -> None:
        if self._on_running is not None:
            await asyncio.gather(*(child.announce(self._on_running) for child in self._children))
