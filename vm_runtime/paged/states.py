"""How machines of pages are saved and loaded: bases, layers, captures, and short chains behind them.

For any driver whose VMM maps guest RAM from files and lets others write into it (machine.py). Knows no VMM.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.drivers.base import Capture, Failure, FlatteningStatus, MachinePlace, OpenState, Shorter, States
from vm_runtime.errors import MachineGoneError
from vm_runtime.machine import Machine
from vm_runtime.paged.bases import Bases
from vm_runtime.paged.capture import BootedCapture, PageCapture, Resting, Tools
from vm_runtime.paged.chains import is_crowded, may_need
from vm_runtime.paged.flattening import Flattener
from vm_runtime.paged.ground import Ground
from vm_runtime.paged.machine import PagedMachine, PagedVmm
from vm_runtime.paged.shells import Content, Loaded, PagedShell
from vm_runtime.snapshots.layers import Layer, MemoryImage
from vm_runtime.snapshots.manifest import Manifest, PartKind, State
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.snapshots.tracking import start_tracker
from vm_runtime.spec import MachineSpec

# A snapshot over a chain that has become long waits for the flattening at most so long; a cell may wait for it.
ROOM_LIMIT_S = 20.0


class PagedStates(States):
    """See `States`. Holds what lies under each machine that runs, until `release`."""

    def __init__(
        self,
        store: SnapshotStore,
        vmm: PagedVmm,
        *,
        on_shortened: Callable[[Shorter], Awaitable[None]],
        on_failed: Callable[[Failure], None],
    ) -> None:
        self._bases = Bases(store, seal=vmm.sealed_bases)
        self._store = store
        self._tools = Tools(store=store, vmm=vmm, bases=self._bases, on_loaded=self._loaded)
        self._flattener = Flattener(
            store, self._bases, merge_disks=vmm.merge_disks, on_shortened=on_shortened, on_failed=on_failed
        )
        self._resting: dict[str, Resting] = {}

    @asynccontextmanager
    async def opened(self, state: State) -> AsyncIterator[OpenState]:
        ground = Ground.of(state)
        opening = asyncio.create_task(asyncio.to_thread(self._open, ground, state))
        try:
            yield StoredPages(self._tools, ground, opening)
        finally:
            (parts,) = await asyncio.gather(opening, return_exceptions=True)
            if isinstance(parts, _OpenParts):
                parts.close()

    def _open(self, ground: Ground, state: State) -> _OpenParts:
        (device,) = state.of_kind(PartKind.DEVICE)
        self._check(ground)
        path = self._store.checked_path(PartKind.DEVICE, device)
        layers = self._store.open_layers(ground.layers, memory_bytes=ground.memory_bytes)
        return _OpenParts(layers=layers, device=path)

    def _check(self, ground: Ground) -> None:
        for kind, parts in ((PartKind.DISK, ground.disks), (PartKind.LAYER, ground.layers)):
            for part in parts:
                self._store.checked_path(kind, part)

    async def make_room(self, machine: Machine) -> None:
        assert isinstance(machine, PagedMachine)
        resting = self._resting.get(machine.id)
        if resting is not None and is_crowded(resting.ground, open_disks=len(machine.disk_chain)):
            await self._flattener.hurried(limit_s=ROOM_LIMIT_S)

    def capturing(self, machine: Machine, *, children: int, last: bool) -> AbstractAsyncContextManager[Capture]:
        assert isinstance(machine, PagedMachine)
        if machine.memory_fd is not None:
            return BootedCapture(self._tools, machine).opened()
        resting = self._resting.get(machine.id)
        if resting is None:
            raise MachineGoneError(f"Machine {machine.id} has ended or was let go.")
        return PageCapture(self._tools, machine, resting, children=children, last=last).opened()

    def _loaded(self, ground: Ground, loaded: Loaded) -> None:
        self._resting[loaded.machine.id] = Resting(ground=ground, base=loaded.base, tracker=loaded.tracker)

    async def rest_on(self, machine: Machine, state: State) -> None:
        assert isinstance(machine, PagedMachine)
        ground = Ground.of(state)
        resting = self._resting.get(machine.id)
        if resting is None:
            self._resting[machine.id] = await self._found(machine, ground)
            return
        if ground == resting.ground:
            return
        await asyncio.to_thread(self._check, ground)
        resting.close_image()
        if ground.base != resting.ground.base:
            base, resting.base = resting.base, await self._bases.acquire(ground.base)
            base.close()
        resting.ground = ground

    async def reopen(self, machine: Machine) -> None:
        assert isinstance(machine, PagedMachine)
        resting = self._resting[machine.id]
        kept = 1 + len(await asyncio.to_thread(self._tools.frozen_disks, machine, resting.ground))
        if len(machine.disk_chain) - kept > len(resting.ground.disks):
            lower = [self._store.part_path(PartKind.DISK, disk.digest) for disk in resting.ground.disks]
            await machine.rebase_disk(lower, keep=kept)

    async def _found(self, machine: PagedMachine, ground: Ground) -> Resting:
        """Of an adopted machine, of which is not known what it has written since."""
        base = await self._bases.adopt(machine.pid, ground.base)
        try:
            mapping = await asyncio.to_thread(machine.memory_mapping)
            tracker = await asyncio.to_thread(
                start_tracker, machine.pid, address=mapping.address, size_bytes=mapping.length, clean=False
            )
        except BaseException:
            base.close()
            raise
        return Resting(ground=ground, base=base, tracker=tracker)

    def release(self, machine: Machine) -> None:
        assert isinstance(machine, PagedMachine)
        resting = self._resting.pop(machine.id, None)
        if resting is not None:
            resting.close()
        if machine.is_dead:
            remove_frozen_disks(machine.place)

    def shorten(self, manifest: Manifest, state: State, *, stopped: bool) -> None:
        if may_need(Ground.of(state)):
            self._flattener.want(manifest, stopped=stopped)

    def flattening(self) -> FlatteningStatus:
        return self._flattener.status()

    def quiet(self) -> AbstractContextManager[None]:
        return self._flattener.quiet()

    async def settled(self) -> None:
        await self._flattener.settled()

    async def close(self) -> None:
        await self._flattener.close()
        await asyncio.to_thread(self._bases.close)


@dataclass(frozen=True, kw_only=True)
class _OpenParts:
    """The checked parts that machines are about to be loaded from."""

    layers: Sequence[Layer]
    device: Path

    def close(self) -> None:
        for layer in self.layers:
            layer.close()


class StoredPages(OpenState):
    """A state of the store; its parts are checked and opened while the first VMM starts."""

    def __init__(self, tools: Tools, ground: Ground, opening: asyncio.Task[_OpenParts]) -> None:
        self._tools = tools
        self._ground = ground
        self._opening = opening

    async def shell(self, spec: MachineSpec, *, place: MachinePlace) -> PagedShell:
        tools, ground = self._tools, self._ground
        base = await tools.bases.acquire(ground.base)
        try:
            chain = [tools.store.part_path(PartKind.DISK, disk.digest) for disk in ground.disks]
            prepared = await tools.vmm.prepare_restore(spec, base, chain, place=place)
        except BaseException as error:
            base.close()
            if isinstance(error, Exception):
                await asyncio.shield(self._opening)  # a part that is missing or broken is the better reason
            raise
        return PagedShell(
            prepared, base, content=self._content, on_loaded=lambda loaded: tools.on_loaded(ground, loaded)
        )

    async def _content(self, shell: PagedShell) -> Content:
        parts = await asyncio.shield(self._opening)
        image = MemoryImage(shell.base, parts.layers)

        def write(pid: int, address: int, lent: Mapping[int, int]) -> None:
            image.restore_into(pid, address, lent=lent)

        return Content(device=parts.device, files=image.files(), write=write)


def remove_frozen_disks(place: MachinePlace) -> None:
    """What a dead machine's captures have left beside its own disk file. Twice is harmless. Blocking."""
    if place.disk_dir.is_dir():
        for path in place.disk_dir.glob("disk-*.qcow2"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files may lie there
            place.disk_dir.rmdir()
