"""VMMs that wait for a state: started on its base and its disks, then filled with its pages, then loaded.

Where the pages come from (the store, or a capture in memory) is their maker's business. Knows no VMM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.drivers.base import UnloadedMachine
from vm_runtime.paged.machine import MemoryMapping, PagedMachine, PreparedMachine
from vm_runtime.snapshots.layers import MemoryImage
from vm_runtime.snapshots.memory import BaseMemory
from vm_runtime.snapshots.tracking import DirtyTracker, start_tracker


@dataclass(frozen=True, kw_only=True)
class Content:
    """What an unloaded machine is loaded with. device: file with the state of CPUs and devices. files: what pages can
    be mapped from, by any key. write(pid, address, passed): puts all pages over the base into a VMM; passed: the
    descriptors there."""

    device: Path
    files: Mapping[int, int]
    write: Callable[[int, int, Mapping[int, int]], None]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A machine that runs, what it maps, and the tracker of what it writes: its owner closes both."""

    machine: PagedMachine
    base: BaseMemory
    tracker: DirtyTracker


class UnloadedPagedMachine(UnloadedMachine):
    """prepared, base: owned from now on.
    content: asked for when it is loaded.
    on_loaded: takes over what runs.
    """

    def __init__(
        self,
        prepared: PreparedMachine,
        base: BaseMemory,
        *,
        content: Callable[[UnloadedPagedMachine], Awaitable[Content]],
        on_loaded: Callable[[Loaded], None],
    ) -> None:
        self.prepared = prepared
        self.base = base
        self._content = content
        self._on_loaded = on_loaded

    async def load(self) -> PagedMachine:
        trackers: list[DirtyTracker] = []
        try:
            content = await self._content(self)
            prepared = self.prepared
            async with prepared.pass_files(content.files) as passed:

                def fill(mapping: MemoryMapping) -> None:
                    content.write(prepared.pid, mapping.address, passed)
                    # Now it costs a millisecond; at the first snapshot all that was just written would be copied again.
                    address, length = mapping.address, mapping.length
                    trackers.append(start_tracker(prepared.pid, address=address, size_bytes=length, clean=True))

                machine = await prepared.load(content.device, fill=fill)
        except BaseException:
            for tracker in trackers:
                tracker.close()
            await self.discard()
            raise
        self._on_loaded(Loaded(machine=machine, base=self.base, tracker=trackers[0]))
        return machine

    async def discard(self) -> None:
        await self.prepared.discard()
        self.base.close()


async def fill_ahead(prepared: PreparedMachine, image: MemoryImage) -> None:
    """Put the layers of an image into a VMM that is to get more pages later. Errors end it."""
    async with prepared.pass_files(image.files()) as passed:
        await asyncio.to_thread(
            lambda: image.restore_into(prepared.pid, prepared.memory_mapping().address, passed=passed)
        )
