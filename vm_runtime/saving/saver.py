"""Joins a driver's machines with the snapshot store: templates, sleep and wake, checkpoints and forks are all this.

    template    freeze(booted machine)                 a snapshot without layers
    restore     restore(manifest)                      a clone of any snapshot
    checkpoint  SavedMachine.take(RESUME)
    sleep       SavedMachine.take(STOP), kill()        wake: restore
    fork        fork(machine, places)                  take and restores, overlapping

Knows no VMM and no Jupyter. docs/saving.md has the order of steps and what was measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
from collections.abc import Awaitable, Callable, Sequence, Set
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.drivers.base import Driver, MachinePlace, PreparedMachine
from vm_runtime.errors import MachineGoneError, MachineStateError, VmRuntimeError
from vm_runtime.machine import Machine, MemoryMapping
from vm_runtime.saving.bases import Bases
from vm_runtime.saving.chains import Shortened, may_need, rebased
from vm_runtime.saving.flattening import Failure, Flattener, FlatteningStatus
from vm_runtime.saving.forking import Child, Children, Forked
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.machine import (
    SavedMachine,
    forget_machine,
    pin_machine,
    pinned_machines,
    unpin_machine,
)
from vm_runtime.saving.record import SavedRecord
from vm_runtime.saving.threads import open_draft, succeeded, uncancelled
from vm_runtime.saving.values import Description, Ground, Then, contents_of
from vm_runtime.snapshots.errors import BrokenSnapshotError, SnapshotError
from vm_runtime.snapshots.layers import Layer, MemoryImage, copy_sparse
from vm_runtime.snapshots.manifest import DiskPart, Manifest, MemoryParts, PartKind, Shape, Vmm
from vm_runtime.snapshots.memory import BaseMemory, freeze_memfd, removed_on_error
from vm_runtime.snapshots.store import Draft, SnapshotStore
from vm_runtime.snapshots.tracking import DirtyTracker, start_tracker
from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec

_log = logging.getLogger(__name__)

# A snapshot over a chain that has become long waits for the flattening at most so long; a cell may wait for it.
ROOM_LIMIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The checked parts that a machine is about to be loaded from."""

    layers: Sequence[Layer]
    device: Path

    def close(self) -> None:
        for layer in self.layers:
            layer.close()


class Saver:
    """Makes `SavedMachine`s. `await close()` at the end; machines go on running.

    image_files: the files of an image by its digest; what it raises for one that is missing passes through `restore`.
    on_flattening_failed: called in the event loop for each attempt to shorten a chain that failed.
    """

    def __init__(
        self,
        *,
        store: SnapshotStore,
        driver: Driver,
        image_files: Callable[[str], ImageFiles],
        on_flattening_failed: Callable[[Failure], None] = lambda failure: None,
    ) -> None:
        self._store = store
        self._driver = driver
        self._bases = Bases(store, seal=driver.capabilities.sealed_base)
        self._image_files = image_files
        self._flattener = Flattener(
            store,
            self._bases,
            merge_disks=driver.merge_disks,
            on_shortened=self._rebase,
            on_failed=on_flattening_failed,
        )
        self._live: set[SavedMachine] = set()

    async def restore(self, manifest: Manifest, *, place: MachinePlace) -> SavedMachine:
        """A running clone of a snapshot, also of a template's.

        Raises BrokenSnapshotError (missing, tampered or foreign parts), MachineStartError, DriverError, and what
        `image_files` raises; nothing is left behind then, also when cancelled.
        """
        self._check_vmm(manifest.vmm)
        flattened = await asyncio.to_thread(self._store.flattened, manifest.id)
        ground = Ground.of(flattened or manifest)
        async with AsyncExitStack() as on_error:
            on_error.callback(unpin_machine, self._store, place.id)
            base = await self._bases.acquire(ground.memory.base)
            on_error.callback(base.close)
            opening = asyncio.create_task(asyncio.to_thread(self._open, place, ground, manifest))
            on_error.push_async_callback(_close_opened, opening)
            prepared = await self._prepare(manifest, ground, base, place)
            on_error.push_async_callback(prepared.discard)
            opened = await asyncio.shield(opening)
            image = MemoryImage(base, opened.layers)
            async with prepared.lend(image.files()) as lent:
                saved = await self._load(
                    prepared,
                    opened.device,
                    write=lambda mapping: image.restore_into(prepared.pid, mapping.address, lent=lent),
                    place=place,
                    snapshot=manifest,
                    ground=ground,
                    base=base,
                )
            on_error.pop_all()
            opened.close()
            if may_need(ground):
                self._flattener.want(manifest, stopped=False)
            return saved

    async def fork(
        self,
        parent: SavedMachine,
        description: Description,
        *,
        places: Sequence[MachinePlace],
        hooks: Sequence[SnapshotHooks] = (),
    ) -> Forked:
        """Take a snapshot of a running machine and restore it at every place, faster than one after the other.

        hooks: who else takes part in the snapshot.
        One failed child does not fail the others. Raises what `SavedMachine.take` raises; there is no child then, and
        the parent goes on. When cancelled it is finished first, and the children are ended.
        """
        forking = asyncio.ensure_future(self._fork(parent, description, places, hooks))
        try:
            return await uncancelled(forking)
        except asyncio.CancelledError:
            if succeeded(forking):
                await asyncio.gather(
                    *(child.kill() for child in forking.result().children if isinstance(child, SavedMachine))
                )
            raise

    async def adopt(self, place: MachinePlace) -> SavedMachine:
        """The machine that an earlier process left at this place, as it is: running, or paused in a snapshot.

        Raises MachineGoneError if it is dead, or has no record of what lies under it; its leftovers are then removed.
        """
        record = await asyncio.to_thread(SavedRecord.read, place.run_dir)
        try:
            machine = await self._driver.adopt(place)
            if record is None:
                await machine.kill()
                raise MachineGoneError(f"Nothing says what lies under machine {place.id}; it was ended.")
        except MachineGoneError:
            await asyncio.to_thread(forget_machine, self._store, place)
            raise
        try:
            base = await self._bases.adopt(machine.pid, record.memory.base)
        except BaseException:
            await machine.detach()
            raise
        return self._saved(machine, place=place, snapshot=record.snapshot, ground=record.ground, base=base)

    async def end(self, place: MachinePlace) -> None:
        """End a machine that an earlier process left at this place and nobody needs, and remove what is left of it.

        Raises MachineGoneError if it was dead already; its leftovers are removed then, too.
        """
        try:
            machine = await self._driver.adopt(place)
            await machine.kill()
        finally:
            await asyncio.to_thread(forget_machine, self._store, place)

    def flattening(self) -> FlatteningStatus:
        """How far the chains are from being short."""
        return self._flattener.status()

    async def settled(self) -> None:
        """Wait until no chain waits to be shortened: a restore of any snapshot taken so far is as quick as it gets."""
        await self._flattener.settled()

    async def freeze(self, machine: Machine, description: Description) -> Manifest:
        """The snapshot of a booted machine, whose RAM and disk are its own: a template. It stays paused; kill it.

        Raises StoreFullError, MachineError; nothing is stored then.
        """
        return await uncancelled(self._freeze(machine, description))

    async def remove_leftovers(self, machines_dir: Path, *, keep: Set[str]) -> None:
        """Forget the machines that are not in `keep`: disks (`machines_dir/<machine id>`) and what the store keeps."""
        await asyncio.to_thread(self._driver.remove_leftovers, machines_dir, keep=keep)
        for machine_id in await asyncio.to_thread(pinned_machines, self._store) - keep:
            unpin_machine(self._store, machine_id)

    async def close(self) -> None:
        """Let go of everything but the machines, and give up what is done in the background. Twice is harmless."""
        await self._flattener.close()
        await asyncio.to_thread(self._bases.close)

    # -- surroundings of the machines -----------------------------------------------------------------------------

    def quiet(self) -> AbstractContextManager[None]:
        return self._flattener.quiet()

    def published(self, machine: SavedMachine, *, stopped: bool) -> None:
        self._flattener.want(machine.snapshot, stopped=stopped)

    async def make_room(self) -> None:
        await self._flattener.hurried(limit_s=ROOM_LIMIT_S)

    def ended(self, machine: SavedMachine) -> None:
        self._live.discard(machine)

    async def _rebase(self, shortened: Shortened) -> None:
        """Let the running machines that lie on a flattened state take their next snapshots over the shorter form, and
        their VMMs open it. Raises the last error of a machine that stays on its long chain, after all have been tried.
        """
        failed: Exception | None = None
        for saved in list(self._live):
            async with saved.standing():
                ground = rebased(saved.ground, shortened)
                if saved not in self._live:
                    continue
                try:
                    if ground is not None:
                        await asyncio.to_thread(self._secure, saved.place, ground)
                        await saved.rebase(ground, await self._bases.acquire(ground.memory.base))
                    await saved.shorten_open_disk()
                except SnapshotError as error:
                    # Removed meanwhile, with the snapshot it came from: the machine stays on what it has.
                    _log.info("Machine %s stays on its long chain: %s", saved.place.id, error)
                    await asyncio.to_thread(pin_machine, self._store, saved.place, saved.ground)
                except (VmRuntimeError, OSError) as error:
                    if not saved.machine.is_dead:  # else its owner is about to see that
                        failed = error
        if failed is not None:
            raise failed

    # -- inside ---------------------------------------------------------------------------------------------------

    def _check_vmm(self, vmm: Vmm) -> None:
        here = self._driver.vmm
        if _loadable(vmm) != _loadable(here):
            raise BrokenSnapshotError(f"The snapshot needs {_sentence(vmm)}; this host has {_sentence(here)}.")

    def _open(self, place: MachinePlace, ground: Ground, manifest: Manifest) -> _Opened:
        """Check what a clone needs and keep it in the store, in this order: what is there then, stays."""
        self._secure(place, ground)
        device = self._store.checked_path(PartKind.DEVICE, manifest.device)
        return _Opened(layers=self._store.open_layers(ground.memory), device=device)

    def _secure(self, place: MachinePlace, ground: Ground) -> None:
        """Keep the parts of a ground in the store for a machine, then check that they are there. Blocking."""
        pin_machine(self._store, place, ground)
        for disk in ground.disks:
            self._store.checked_path(PartKind.DISK, disk)
        for layer in ground.memory.layers:
            self._store.checked_path(PartKind.LAYER, layer)

    async def _fork(
        self,
        parent: SavedMachine,
        description: Description,
        places: Sequence[MachinePlace],
        hooks: Sequence[SnapshotHooks],
    ) -> Forked:
        # The image, shape and disks of the children's VMMs are the parent's, as they are under its lock.
        def prepare(base: BaseMemory, place: MachinePlace, disks: Sequence[Path]) -> Awaitable[PreparedMachine]:
            return self._prepare(parent.snapshot, parent.ground, base, place, disks=disks)

        def acquire_base() -> Awaitable[BaseMemory]:
            return self._bases.acquire(parent.ground.memory.base)

        children = [Child(place, prepare) for place in places]
        making = Children(parent, children, acquire_base=acquire_base)
        handed_out: set[Child] = set()
        try:
            taken = await parent.take(description, then=Then.RESUME, hooks=[*hooks, making])
            results = await asyncio.gather(*(self._hand_out(child, taken.manifest) for child in children))
            handed_out = {
                child for child, result in zip(children, results, strict=True) if isinstance(result, SavedMachine)
            }
            return Forked(taken=taken, children=tuple(results))
        finally:
            await asyncio.gather(*(child.discard() for child in children if child not in handed_out))

    async def _hand_out(self, child: Child, manifest: Manifest) -> SavedMachine | Exception:
        """Make a child that runs one of our machines, on a snapshot that is stored."""
        loaded = child.take_over()
        if loaded is None:
            assert child.error is not None
            return child.error
        ground = Ground.of(manifest)
        saved = self._saved(
            loaded.machine,
            place=child.place,
            snapshot=manifest,
            ground=ground,
            base=loaded.base,
            tracker=loaded.tracker,
        )
        try:
            await asyncio.to_thread(pin_machine, self._store, child.place, ground)
            await asyncio.to_thread(saved.write_record)
        except Exception as error:
            await saved.kill()
            return error
        return saved

    async def _prepare(
        self,
        manifest: Manifest,
        ground: Ground,
        base: BaseMemory,
        place: MachinePlace,
        *,
        disks: Sequence[Path] = (),
    ) -> PreparedMachine:
        """Start the VMM of a clone. disks: further files over those of the ground."""
        spec = MachineSpec(shape=_machine_shape(manifest.shape), image=self._image_files(manifest.image_digest))
        chain = [*(self._store.part_path(PartKind.DISK, disk.digest) for disk in ground.disks), *disks]
        return await self._driver.prepare_restore(spec, base, chain, place=place)

    async def _load(
        self,
        prepared: PreparedMachine,
        device: Path,
        *,
        write: Callable[[MemoryMapping], None],
        place: MachinePlace,
        snapshot: Manifest,
        ground: Ground,
        base: BaseMemory,
    ) -> SavedMachine:
        """Fill a prepared VMM and let it run. The base is the caller's until this has succeeded."""
        trackers: list[DirtyTracker] = []

        def fill(mapping: MemoryMapping) -> None:
            write(mapping)
            # Now it costs a millisecond; at the first snapshot all that was just written would be copied again.
            address, length = mapping.address, mapping.length
            trackers.append(start_tracker(prepared.pid, address=address, size_bytes=length, clean=True))

        try:
            machine = await prepared.load(device, fill=fill)
            saved = self._saved(machine, place=place, snapshot=snapshot, ground=ground, base=base, tracker=trackers[0])
            await asyncio.to_thread(saved.write_record)
        except BaseException:
            for tracker in trackers:
                tracker.close()
            raise
        return saved

    def _saved(
        self,
        machine: Machine,
        *,
        place: MachinePlace,
        snapshot: Manifest,
        ground: Ground,
        base: BaseMemory,
        tracker: DirtyTracker | None = None,
    ) -> SavedMachine:
        saved = SavedMachine(
            store=self._store,
            vmm=self._driver.vmm,
            surroundings=self,
            machine=machine,
            place=place,
            snapshot=snapshot,
            ground=ground,
            base=base,
            tracker=tracker,
        )
        self._live.add(saved)
        return saved

    async def _freeze(self, machine: Machine, description: Description) -> Manifest:
        if machine.memory_fd is None:
            raise MachineStateError(found="a clone", wanted="booted")
        async with open_draft(self._store) as draft:
            await machine.pause()
            await machine.device_state(draft.path("device"))
            return await asyncio.to_thread(self._publish_frozen, draft, machine, description)

    def _publish_frozen(self, draft: Draft, machine: Machine, description: Description) -> Manifest:
        assert machine.memory_fd is not None
        digest = freeze_memfd(machine.memory_fd, draft.path("base"))
        draft.path("base").chmod(self._bases.mode(family=False))
        base = draft.add(PartKind.BASE, draft.path("base"), digest=digest)
        (disk_path,) = machine.disk_chain
        _copy_disk(disk_path, draft.path("disk"))
        disk = draft.add(PartKind.DISK, draft.path("disk"))
        device = draft.add_bytes(PartKind.DEVICE, draft.path("device").read_bytes())
        ground = Ground(
            memory=MemoryParts(size_bytes=base.size_bytes, base=base),
            disks=(DiskPart(digest=disk.digest, size_bytes=disk.size_bytes, format="raw"),),
        )
        return draft.publish(
            contents_of(
                description,
                shape=machine.spec.shape,
                vmm=self._driver.vmm,
                parents=(),
                ground=ground,
                device=device,
                created_at=datetime.datetime.now(datetime.UTC),
            )
        )


async def _close_opened(opening: asyncio.Task[_Opened]) -> None:
    """Let go of parts that are still being opened when they are not needed any more."""
    with contextlib.suppress(Exception):
        (await opening).close()


def _copy_disk(source: Path, target: Path) -> None:
    """A sparse, synced copy: the machine goes on holding the original open for writing."""
    with removed_on_error(target), source.open("rb") as original, target.open("xb") as copy:
        size_bytes = os.fstat(original.fileno()).st_size
        copy.truncate(size_bytes)
        copy_sparse(original.fileno(), copy.fileno(), size_bytes)
        os.fsync(copy.fileno())


def _machine_shape(shape: Shape) -> MachineShape:
    return MachineShape(memory_mib=shape.memory_mib, vcpus=shape.vcpus, disk_mib=shape.disk_mib)


def _loadable(vmm: Vmm) -> Vmm:
    """Without the last number of the version: QEMU keeps the device state as it is within a stable branch, and a host
    that installs a security update must not lose what sleeps on it."""
    return vmm.model_copy(update={"version": ".".join(vmm.version.split(".")[:2])})


def _sentence(vmm: Vmm) -> str:
    return f"{vmm.driver} {vmm.version} with {vmm.machine}, {vmm.cpu_model}, {vmm.accelerator}"
