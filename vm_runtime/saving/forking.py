"""A fork: one snapshot of a running machine and clones of it, at the same time.

The children's VMMs are started, and what the parent's last snapshot has is written into them, while the parent still
runs; when it has been captured, they are loaded from the captured pages in memory, and run. Then the snapshot is
stored; a child is only handed out when that has succeeded. Knows no VMM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.drivers.base import MachinePlace, PreparedMachine
from vm_runtime.machine import Machine, MemoryMapping
from vm_runtime.saving.hooks import Captured, SnapshotHooks
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.threads import gather_all
from vm_runtime.saving.values import Taken
from vm_runtime.snapshots.family import open_family
from vm_runtime.snapshots.injection import can_inject
from vm_runtime.snapshots.layers import MemoryImage
from vm_runtime.snapshots.memory import BaseMemory
from vm_runtime.snapshots.sharing import SharedPages, place_pages
from vm_runtime.snapshots.tracking import DirtyTracker, start_tracker

# So many children map what a family shares. That saves each 10 MiB and more, and takes time: 50 ms to lay out.
_FAMILY = 4
# Fewer children get copies of a capture that is smaller (32 MiB): that takes no longer.
_SHARED_CAPTURE_PAGES = 8192

# Starts a VMM on a base, with these disk files over those of the parent's ground.
Prepare = Callable[[BaseMemory, MachinePlace, Sequence[Path]], Awaitable[PreparedMachine]]


@dataclass(frozen=True, kw_only=True)
class Forked:
    """The snapshot of the parent, and for each place the child that runs there, or why there is none."""

    taken: Taken
    children: tuple[SavedMachine | Exception, ...]


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
        self, acquiring: Awaitable[BaseMemory], under: Awaitable[MemoryImage] | None, disks: tuple[Path, ...]
    ) -> None:
        """Start the VMM and put into it what lies under the pages that `load` gets: None if they lie on the base."""
        self._disks = disks
        try:
            self._base = await acquiring
            self._prepared = await self._start(self._base, under, disks)
        except Exception as error:
            self.error = error

    async def load(
        self,
        device: Path,
        pages: SharedPages,
        under: Awaitable[MemoryImage] | None,
        disks: tuple[Path, ...],
    ) -> None:
        """Bring it to a captured state and let it run. disks: as they turned out to be, which is nearly always as they
        were expected to be; else its VMM is started anew."""
        if self.error is not None:
            return
        assert self._prepared is not None and self._base is not None
        try:
            if disks != self._disks:
                await self._prepared.discard()
                self._prepared = await self._start(self._base, under, disks)
            prepared = self._prepared

            async with prepared.lend(pages.files) as lent:

                def fill(mapping: MemoryMapping) -> None:
                    place_pages(prepared.pid, mapping.address, pages.pieces, lent=lent)
                    self._tracker = start_tracker(
                        prepared.pid, address=mapping.address, size_bytes=mapping.length, clean=True
                    )

                self._machine = await prepared.load(device, fill=fill)
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

    async def _start(
        self, base: BaseMemory, under: Awaitable[MemoryImage] | None, disks: Sequence[Path]
    ) -> PreparedMachine:
        prepared = await self._prepare(base, self.place, disks)
        try:
            image = await under if under is not None else None
            if image is not None and image.layers:
                async with prepared.lend(image.files()) as lent:
                    await asyncio.to_thread(
                        lambda: image.restore_into(prepared.pid, prepared.memory_mapping().address, lent=lent)
                    )
        except BaseException:
            await prepared.discard()
            raise
        return prepared


class Children(SnapshotHooks):
    """The children of one fork, made while the parent's snapshot is taken."""

    needs_ground = True

    def __init__(
        self,
        parent: SavedMachine,
        children: Sequence[Child],
        *,
        acquire_base: Callable[[], Awaitable[BaseMemory]],
    ) -> None:
        self._parent = parent
        self._children = children
        self._acquire_base = acquire_base
        self._disks: tuple[Path, ...] = ()
        self._ground: Awaitable[MemoryImage] | None = None
        self._as_family = len(children) >= _FAMILY and can_inject()
        self.share_from_pages = 0 if self._as_family else _SHARED_CAPTURE_PAGES

    @property
    def _under(self) -> Awaitable[MemoryImage] | None:
        return None if self._as_family else self._ground

    async def prepare(self, ground: Awaitable[MemoryImage]) -> None:
        self._ground = ground
        # A disk that was written already will be frozen at the pause, so the children may be started on it: they look
        # at it again when they are loaded.
        self._disks = await asyncio.to_thread(self._parent.unsaved_disks)
        await gather_all(*(child.prepare(self._acquire_base(), self._under, self._disks) for child in self._children))

    async def captured(self, captured: Captured) -> None:
        assert self._ground is not None
        disks = self._disks
        if captured.frozen_disk is not None and captured.frozen_disk not in disks:
            disks = (*disks, captured.frozen_disk)
        async with AsyncExitStack() as stack:
            if self._as_family:
                opening = open_family(await self._ground, captured.pages)
                pages = await asyncio.to_thread(stack.enter_context, opening)
            else:
                pages = captured.pages.shared()
            loading = (child.load(captured.device, pages, self._under, disks) for child in self._children)
            await gather_all(*loading)
