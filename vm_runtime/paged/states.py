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

from vm_runtime.drivers.base import Capture, Failure, FlatteningStatus, MachinePaths, OpenState, Shorter, States
from vm_runtime.errors import MachineGoneError
from vm_runtime.machine import Machine
from vm_runtime.paged.backing import BackingChain
from vm_runtime.paged.bases import Bases
from vm_runtime.paged.capture import BootedCapture, OpenBacking, PageCapture, Tools
from vm_runtime.paged.chains import is_crowded, may_need
from vm_runtime.paged.flattening import Flattener
from vm_runtime.paged.machine import PagedMachine, PagedVmm
from vm_runtime.paged.unloaded import Content, Loaded, UnloadedPagedMachine
from vm_runtime.snapshots.layers import Layer, MemoryImage
from vm_runtime.snapshots.manifest import Manifest, PartKind, State
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.snapshots.tracking import start_tracker
from vm_runtime.spec import MachineSpec

# A snapshot over a chain that has become long waits for the flattening at most so long; a cell may wait for it.
ROOM_LIMIT_S = 20.0


class PagedStates(States):
    """See `States`. Holds what each machine that runs lies on, until `release`."""

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
        self._open_backing: dict[str, OpenBacking] = {}

    @asynccontextmanager
    async def opened(self, state: State) -> AsyncIterator[OpenState]:
        backing = BackingChain.of(state)
        opening = asyncio.create_task(asyncio.to_thread(self._open, backing, state))
        try:
            yield StoredPages(self._tools, backing, opening)
        finally:
            (parts,) = await asyncio.gather(opening, return_exceptions=True)
            if isinstance(parts, _OpenParts):
                parts.close()

    def _open(self, backing: BackingChain, state: State) -> _OpenParts:
        (device,) = state.of_kind(PartKind.DEVICE)
        self._check(backing)
        path = self._store.checked_path(PartKind.DEVICE, device)
        layers = self._store.open_layers(backing.layers, memory_bytes=backing.memory_bytes)
        return _OpenParts(layers=layers, device=path)

    def _check(self, backing: BackingChain) -> None:
        for kind, parts in ((PartKind.DISK, backing.disks), (PartKind.LAYER, backing.layers)):
            for part in parts:
                self._store.checked_path(kind, part)

    async def make_room(self, machine: Machine) -> None:
        assert isinstance(machine, PagedMachine)
        open_backing = self._open_backing.get(machine.id)
        if open_backing is not None and is_crowded(open_backing.backing, open_disks=len(machine.disk_chain)):
            await self._flattener.hurried(limit_s=ROOM_LIMIT_S)

    def capturing(self, machine: Machine, *, children: int, last: bool) -> AbstractAsyncContextManager[Capture]:
        assert isinstance(machine, PagedMachine)
        if machine.memory_fd is not None:
            return BootedCapture(self._tools, machine).opened()
        open_backing = self._open_backing.get(machine.id)
        if open_backing is None:
            raise MachineGoneError(f"Machine {machine.id} has ended or was let go.")
        return PageCapture(self._tools, machine, open_backing, children=children, last=last).opened()

    def _loaded(self, backing: BackingChain, loaded: Loaded) -> None:
        self._open_backing[loaded.machine.id] = OpenBacking(backing=backing, base=loaded.base, tracker=loaded.tracker)

    async def set_backing(self, machine: Machine, state: State) -> None:
        assert isinstance(machine, PagedMachine)
        backing = BackingChain.of(state)
        open_backing = self._open_backing.get(machine.id)
        if open_backing is None:
            self._open_backing[machine.id] = await self._found(machine, backing)
            return
        if backing == open_backing.backing:
            return
        await asyncio.to_thread(self._check, backing)
        open_backing.close_image()
        if backing.base != open_backing.backing.base:
            base, open_backing.base = open_backing.base, await self._bases.acquire(backing.base)
            base.close()
        open_backing.backing = backing

    async def reopen(self, machine: Machine) -> None:
        assert isinstance(machine, PagedMachine)
        open_backing = self._open_backing[machine.id]
        kept = 1 + len(await asyncio.to_thread(self._tools.frozen_disks, machine, open_backing.backing))
        if len(machine.disk_chain) - kept > len(open_backing.backing.disks):
            lower = [self._store.part_path(PartKind.DISK, disk.digest) for disk in open_backing.backing.disks]
            await machine.rebase_disk(lower, keep=kept)

    async def _found(self, machine: PagedMachine, backing: BackingChain) -> OpenBacking:
        """Of an adopted machine, of which is not known what it has written since."""
        base = await self._bases.adopt(machine.pid, backing.base)
        try:
            mapping = await asyncio.to_thread(machine.memory_mapping)
            tracker = await asyncio.to_thread(
                start_tracker, machine.pid, address=mapping.address, size_bytes=mapping.length, clean=False
            )
        except BaseException:
            base.close()
            raise
        return OpenBacking(backing=backing, base=base, tracker=tracker)

    def release(self, machine: Machine) -> None:
        assert isinstance(machine, PagedMachine)
        open_backing = self._open_backing.pop(machine.id, None)
        if open_backing is not None:
            open_backing.close()
        if machine.is_dead:
            remove_frozen_disks(machine.paths)

    def shorten(self, manifest: Manifest, state: State, *, stopped: bool) -> None:
        if may_need(BackingChain.of(state)):
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

    def __init__(self, tools: Tools, backing: BackingChain, opening: asyncio.Task[_OpenParts]) -> None:
        self._tools = tools
        self._backing = backing
        self._opening = opening

    async def start_unloaded(self, spec: MachineSpec, *, paths: MachinePaths) -> UnloadedPagedMachine:
        tools, backing = self._tools, self._backing
        base = await tools.bases.acquire(backing.base)
        try:
            chain = [tools.store.part_path(PartKind.DISK, disk.digest) for disk in backing.disks]
            prepared = await tools.vmm.prepare_restore(spec, base, chain, paths=paths)
        except BaseException as error:
            base.close()
            if isinstance(error, Exception):
                await asyncio.shield(self._opening)  # a part that is missing or broken is the better reason
            raise
        return UnloadedPagedMachine(
            prepared, base, content=self._content, on_loaded=lambda loaded: tools.on_loaded(backing, loaded)
        )

    async def _content(self, unloaded: UnloadedPagedMachine) -> Content:
        parts = await asyncio.shield(self._opening)
        image = MemoryImage(unloaded.base, parts.layers)

        def write(pid: int, address: int, passed: Mapping[int, int]) -> None:
            image.restore_into(pid, address, passed=passed)

        return Content(device=parts.device, files=image.files(), write=write)


def remove_frozen_disks(paths: MachinePaths) -> None:
    """What a dead machine's captures have left beside its own disk file. Twice is harmless. Blocking."""
    if paths.disk_dir.is_dir():
        for path in paths.disk_dir.glob("disk-*.qcow2"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files may lie there
            paths.disk_dir.rmdir()
