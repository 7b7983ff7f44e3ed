"""Captures of machines whose memory is pages: what was written since the last snapshot, or all of a booted machine.

    prepare     a chain that is too long is refused; the tracker reserves memory, and copies what was written so far;
                what lies below is opened
    take        device state, the disk's overlay if anything was written to it, and the pages written since
    store       the pages are compared with what lies below, hashed, written as a layer
    commit      the next capture lies on this one

A fork loads its children from the capture, before it is stored. Their VMMs are started, and what the parent's last
snapshot has is written into them, while the parent still runs. Knows no VMM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from vm_runtime.drivers.base import Capture, MachinePaths, UnloadedMachine
from vm_runtime.errors import MachineStateError
from vm_runtime.files import sync
from vm_runtime.paged.backing import BackingChain
from vm_runtime.paged.bases import Bases
from vm_runtime.paged.chains import check_room
from vm_runtime.paged.machine import PagedMachine, PagedVmm
from vm_runtime.paged.unloaded import Content, Loaded, UnloadedPagedMachine, fill_ahead
from vm_runtime.saving.threads import gather_all
from vm_runtime.snapshots.family import open_family
from vm_runtime.snapshots.injection import can_inject
from vm_runtime.snapshots.layers import CapturedPages, CapturedPart, Layer, MemoryImage, copy_sparse
from vm_runtime.snapshots.manifest import Part, PartKind, State
from vm_runtime.snapshots.memory import BaseMemory, freeze_memfd, removed_on_error
from vm_runtime.snapshots.sharing import SharedPages, place_pages
from vm_runtime.snapshots.store import Draft, SnapshotStore
from vm_runtime.snapshots.tracking import DirtyTracker
from vm_runtime.spec import MachineSpec
from vm_runtime.states import RunState

# So many children map what a family shares. That saves each 10 MiB and more, and takes time: 50 ms to lay out.
FAMILY = 4
# Fewer children get copies of a capture that is smaller (32 MiB): that takes no longer.
SHARED_CAPTURE_PAGES = 8192


# Machines of which what they lie on is kept open for their next capture. Opening it takes 30 ms with ten layers, which
# cells in a row would wait for; kept open it costs some MB and descriptors.
KEPT_OPEN = 8


@dataclass(kw_only=True, eq=False)
class OpenBacking:
    """What a clone that runs lies on, and the tracker of what it has written since.

    image: the memory of `backing`, if it is kept open. captures: those that are taken and not stored yet, oldest first.
    """

    backing: BackingChain
    base: BaseMemory
    tracker: DirtyTracker
    image: MemoryImage | None = None
    captures: list[PageCapture] = field(default_factory=list)

    def close(self) -> None:
        self.close_image()
        self.tracker.close()
        self.base.close()

    def close_image(self) -> None:
        """Twice is harmless."""
        image, self.image = self.image, None
        if image is not None:
            image.close_layers()


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What captures of one store share."""

    store: SnapshotStore
    vmm: PagedVmm
    bases: Bases
    on_loaded: Callable[[BackingChain, Loaded], None]
    open_last: list[OpenBacking] = field(default_factory=list)

    def keep_open(self, open_backing: OpenBacking, image: MemoryImage) -> None:
        """Keep what a machine lies on open, instead of that of another which was captured longer ago."""
        open_backing.image = image
        self.open_last[:] = [each for each in self.open_last if each is not open_backing and each.image is not None]
        self.open_last.append(open_backing)
        if len(self.open_last) > KEPT_OPEN:
            self.open_last.pop(0).close_image()

    def frozen_disks(self, machine: PagedMachine, backing: BackingChain) -> list[Path]:
        """Frozen files of a machine that no snapshot has yet, oldest first: also those of snapshots that failed, or
        that an earlier gateway did not finish. Blocking."""
        stored = set(_inodes(self.store.part_path(PartKind.DISK, disk.digest) for disk in backing.disks).values())
        own = _inodes(path for path in machine.disk_chain[:-1] if path.parent == machine.paths.disk_dir)
        return [path for path, inode in own.items() if inode not in stored]

    def state(self, backing: BackingChain, device: Part | None) -> State:
        return backing.state(driver=self.vmm.name, format=self.vmm.state_format, needs=self.vmm.needs, device=device)


class PageCapture(Capture):
    """Of a clone; made by `capturing`."""

    def __init__(
        self, tools: Tools, machine: PagedMachine, open_backing: OpenBacking, *, children: int, last: bool
    ) -> None:
        self._tools = tools
        self._machine = machine
        self._open_backing = open_backing
        self._as_family = children >= FAMILY and can_inject()
        self._has_children = children > 0
        self._last = last
        self._opening: asyncio.Future[MemoryImage] | None = None
        self._layer: Layer | None = None
        self._device: int | None = None
        self._frozen_disk: Path | None = None
        self._disks: Sequence[Path] = ()
        self._pages: CapturedPages | None = None
        # Pages of captures before this one that could not be stored.
        self._below: tuple[CapturedPart, ...] = ()
        self._shared: asyncio.Future[SharedPages] | None = None
        self._stack = AsyncExitStack()

    @property
    def _backing(self) -> BackingChain:
        """That of the snapshot before, once it is stored."""
        return self._open_backing.backing

    async def prepare(self) -> None:
        await asyncio.to_thread(self._check_room)
        share_from = None if not self._has_children else 0 if self._as_family else SHARED_CAPTURE_PAGES
        preparing = asyncio.to_thread(self._open_backing.tracker.prepare, share_from_pages=share_from)
        # With many layers opening them takes longer than the rest, and children need them before the pause.
        await gather_all(preparing, *([self._parent_image()] if self._has_children else []))

    def _check_room(self) -> None:
        new_disks = 1 + len(self._frozen_disks())
        open_disks = len(self._machine.disk_chain)
        check_room(self._backing, new_disks=new_disks, open_disks=open_disks, last=self._last)

    async def catch_up(self) -> None:
        await asyncio.to_thread(self._open_backing.tracker.catch_up)

    async def take(self) -> None:
        self._open_backing.captures.append(self)
        # None of the three writes to guest memory, so they need not wait for each other.
        await gather_all(self._take_device(), self._freeze_disk(), self._take_pages())
        self._disks = self._machine.disk_chain[:-1]

    async def _take_device(self) -> None:
        self._device = await self._machine.device_state()

    async def _freeze_disk(self) -> None:
        if self._machine.disk_written:
            target = self._machine.paths.disk_dir / f"disk-{secrets.token_hex(4)}.qcow2"
            self._frozen_disk = await self._machine.freeze_disk(target)

    async def _take_pages(self) -> None:
        self._pages = await asyncio.to_thread(self._open_backing.tracker.capture)

    async def store(self, draft: Draft) -> State:
        assert self._pages is not None and self._device is not None
        pages = replace(self._pages, parts=(*self._below, *self._pages.parts))
        return await asyncio.to_thread(self._store, draft, pages, self._device, await self._parent_image())

    def _store(self, draft: Draft, pages: CapturedPages, device: int, parent: MemoryImage) -> State:
        device_part = draft.add_bytes(PartKind.DEVICE, _content(device))
        layer = self._store_layer(draft, pages, parent)
        disks = tuple(self._store_disk(draft, path) for path in self._frozen_disks() if path in self._disks)
        return self._tools.state(self._backing.over(layer=layer, disks=disks), device_part)

    def _store_layer(self, draft: Draft, pages: CapturedPages, parent: MemoryImage) -> Part | None:
        path = draft.path("layer")
        digest, _ = pages.write(path, parent=parent)
        layer = Layer.open(path, size_bytes=self._backing.memory_bytes)
        if not layer.data_runs and not layer.zero_runs:
            layer.close()
            return None
        self._layer = layer
        return draft.add(PartKind.LAYER, path, digest=digest)

    def _store_disk(self, draft: Draft, path: Path) -> Part:
        link = draft.path(path.name)
        os.link(path, link)
        sync(link)
        return draft.add(PartKind.DISK, link)

    async def commit(self, state: State) -> None:
        image, layer = await self._parent_image(), self._layer
        self._opening = self._layer = None
        self._open_backing.captures.remove(self)
        self._open_backing.backing = BackingChain.of(state)
        if layer is not None:
            image = await asyncio.to_thread(image.over, layer)
        self._tools.keep_open(self._open_backing, image)
        await asyncio.to_thread(self._drop_stored_disks)

    def _drop_stored_disks(self) -> None:
        """Those that were frozen when it was taken: the next capture may be freezing another one just now."""
        for path in self._disks:
            if path.parent == self._machine.paths.disk_dir:
                path.unlink(missing_ok=True)

    def _frozen_disks(self) -> list[Path]:
        return self._tools.frozen_disks(self._machine, self._open_backing.backing)

    async def _parent_image(self) -> MemoryImage:
        """What it lies on: opened when it is first needed, and kept open for the next capture."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(asyncio.to_thread(self._open_parent_image))
        return await asyncio.shield(self._opening)

    def _open_parent_image(self) -> MemoryImage:
        image, self._open_backing.image = self._open_backing.image, None
        if image is not None:
            return image
        store, backing = self._tools.store, self._backing
        return MemoryImage(
            self._open_backing.base, store.open_layers(backing.layers, memory_bytes=backing.memory_bytes)
        )

    # -- children -------------------------------------------------------------------------------------------------

    async def start_unloaded(self, spec: MachineSpec, *, paths: MachinePaths) -> UnloadedMachine:
        # A disk that was written already will be frozen at the pause, so a child may be started on it: it looks at it
        # again when it is loaded.
        expected = await asyncio.to_thread(self._unsaved_disks)
        return await self._start(spec, paths, expected)

    async def _start(self, spec: MachineSpec, paths: MachinePaths, unsaved: Sequence[Path]) -> UnloadedPagedMachine:
        tools = self._tools
        chain = [tools.store.part_path(PartKind.DISK, disk.digest) for disk in self._backing.disks]

        async def content(unloaded: UnloadedPagedMachine) -> Content:
            """Its disks are nearly always what they were expected to be; else its VMM is started anew."""
            if (taken := self._taken_disks(unsaved)) != list(unsaved):
                await unloaded.prepared.discard()
                unloaded.prepared = await tools.vmm.prepare_restore(spec, unloaded.base, [*chain, *taken], paths=paths)
                await self._fill_ahead(unloaded)
            pages = await self._shared_pages()
            return Content(
                device=Path(f"/proc/self/fd/{self._device}"),
                files=pages.files,
                write=lambda pid, address, passed: place_pages(pid, address, pages.pieces, passed=passed),
            )

        base = await tools.bases.acquire(self._backing.base)
        try:
            prepared = await tools.vmm.prepare_restore(spec, base, [*chain, *unsaved], paths=paths)
        except BaseException:
            base.close()
            raise
        # Until it is stored it lies on what its parent lay on; its owner calls `set_backing` when it is.
        unloaded = UnloadedPagedMachine(
            prepared, base, content=content, on_loaded=lambda loaded: tools.on_loaded(self._backing, loaded)
        )
        try:
            await self._fill_ahead(unloaded)
        except BaseException:
            await unloaded.discard()
            raise
        return unloaded

    async def _fill_ahead(self, unloaded: UnloadedPagedMachine) -> None:
        if not self._as_family and (image := await self._parent_image()).layers:
            await fill_ahead(unloaded.prepared, image)

    def _unsaved_disks(self) -> list[Path]:
        """Disk files with what was written since the last snapshot, oldest first."""
        return [*self._frozen_disks(), *(self._machine.disk_chain[-1:] if self._machine.disk_written else ())]

    def _taken_disks(self, expected: Sequence[Path]) -> list[Path]:
        frozen = self._frozen_disk
        return [*expected] if frozen is None or frozen in expected else [*expected, frozen]

    async def _shared_pages(self) -> SharedPages:
        """What children are loaded with, laid out once for all of them."""
        if self._shared is None:
            self._shared = asyncio.ensure_future(self._lay_out())
        return await asyncio.shield(self._shared)

    async def _lay_out(self) -> SharedPages:
        assert self._pages is not None
        if not self._as_family:
            return self._pages.shared()
        parent, stack = await self._parent_image(), ExitStack()
        pages = await asyncio.to_thread(stack.enter_context, open_family(parent, self._pages))
        self._stack.callback(stack.close)
        return pages

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[PageCapture]:
        """Everything that it holds is let go of at the end."""
        try:
            yield self
        finally:
            if self in self._open_backing.captures:  # first: the one after it is stored next
                self._pass_on()
            elif self._pages is None:
                self._open_backing.tracker.give_up()
            if self._shared is not None:
                await asyncio.wait([self._shared])
            await self._stack.aclose()
            if self._opening is not None:
                (image,) = await asyncio.gather(self._opening, return_exceptions=True)
                if isinstance(image, MemoryImage):
                    image.close_layers()
            if self._layer is not None:
                self._layer.close()
            if self._device is not None:
                os.close(self._device)

    def _pass_on(self) -> None:
        """It was not stored: its pages belong to the capture after it, or if there is none, to the next one."""
        captures = self._open_backing.captures
        at = captures.index(self)
        del captures[at]
        parts = (*self._below, *(self._pages.parts if self._pages is not None else ()))
        if at < len(captures):
            captures[at]._below = parts
        else:
            self._open_backing.tracker.put_back(parts)


class BootedCapture(Capture):
    """Of a machine that was booted, whose RAM and disk are its own: all of both, once."""

    def __init__(self, tools: Tools, machine: PagedMachine) -> None:
        self._tools = tools
        self._machine = machine
        self._device: int | None = None

    async def prepare(self) -> None:
        """Nothing: it is stored as a whole, while it stands still."""

    async def catch_up(self) -> None:
        """Nothing."""

    async def take(self) -> None:
        self._device = await self._machine.device_state()

    async def store(self, draft: Draft) -> State:
        if self._machine.state is not RunState.PAUSED:
            raise MachineStateError(found=self._machine.state, wanted="paused until its snapshot is stored")
        return await asyncio.to_thread(self._store, draft)

    def _store(self, draft: Draft) -> State:
        assert self._machine.memory_fd is not None and self._device is not None
        digest = freeze_memfd(self._machine.memory_fd, draft.path("base"))
        draft.path("base").chmod(self._tools.bases.mode(family=False))
        base = draft.add(PartKind.BASE, draft.path("base"), digest=digest)
        (disk_path,) = self._machine.disk_chain
        _copy_disk(disk_path, draft.path("disk"))
        disk = draft.add(PartKind.DISK, draft.path("disk"))
        device = draft.add_bytes(PartKind.DEVICE, _content(self._device))
        return self._tools.state(BackingChain(base=base, disks=(disk,)), device)

    async def commit(self, state: State) -> None:
        """Nothing: its memory does not lie on what was stored."""

    async def start_unloaded(self, spec: MachineSpec, *, paths: MachinePaths) -> UnloadedMachine:
        raise MachineStateError(found="booted", wanted="restored from a snapshot")

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[BootedCapture]:
        try:
            yield self
        finally:
            if self._device is not None:
                os.close(self._device)


def _inodes(paths: Iterable[Path]) -> dict[Path, int]:
    """Of those that exist; a snapshot that is stored meanwhile removes what it has stored."""
    inodes: dict[Path, int] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            inodes[path] = path.stat().st_ino
    return inodes


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _copy_disk(source: Path, target: Path) -> None:
    """A sparse, synced copy: the machine still holds the original open for writing."""
    with removed_on_error(target), source.open("rb") as original, target.open("xb") as copy:
        size_bytes = os.fstat(original.fileno()).st_size
        copy.truncate(size_bytes)
        copy_sparse(original.fileno(), copy.fileno(), size_bytes)
        os.fsync(copy.fileno())
