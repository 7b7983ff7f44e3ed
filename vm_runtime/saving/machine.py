"""A running machine together with what lies under it, of which snapshots are taken.

Knows no VMM and does not start machines (saver.py does). A snapshot goes through these steps; only those between the
lines stop the guest:

    room        a chain that has become long is shortened, or the snapshot refused
    prepare     the tracker reserves memory, and copies what was written so far       hooks: prepare, before_pause
    ---------   pause
    capture     device state; the disk's overlay is frozen, if anything was written
                to it; the pages written since                                        hooks: before_resume
    ---------   resume                                                                hooks: captured
    publish     the layer is compared with what lies under it, hashed, written;
                then parts and manifest are visible                                   hooks: described
    commit      the next snapshot lies on this one
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from vm_runtime.drivers.base import MachinePlace
from vm_runtime.machine import Death, Machine
from vm_runtime.saving.chains import check_room, is_crowded
from vm_runtime.saving.hooks import AllHooks, Captured, SnapshotHooks
from vm_runtime.saving.record import SavedRecord, remove_record
from vm_runtime.saving.threads import gather_all, open_draft, succeeded, uncancelled
from vm_runtime.saving.values import Description, Ground, Taken, Then, contents_of
from vm_runtime.snapshots.layers import CapturedPages, Layer, MemoryImage
from vm_runtime.snapshots.manifest import DiskPart, Manifest, MemoryParts, PartKind, Vmm
from vm_runtime.snapshots.memory import BaseMemory
from vm_runtime.snapshots.store import Draft, SnapshotStore
from vm_runtime.snapshots.tracking import DirtyTracker, start_tracker
from vm_runtime.states import RunState

_log = logging.getLogger(__name__)

_PIN_PREFIX = "machine-"


class Surroundings(Protocol):
    """What a machine tells whoever made it."""

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Within it, nothing works in the background."""

    async def make_room(self) -> None:
        """Before a snapshot over a chain that has become long: shorten what waits for that, within a limit."""

    def published(self, machine: SavedMachine, *, stopped: bool) -> None:
        """A snapshot of this machine is in the store. stopped: the machine is not to run on."""

    def ended(self, machine: SavedMachine) -> None:
        """It was killed or detached."""


class SavedMachine:
    """Made by `Saver`. Its owner ends it with `kill()`, or lets go of it with `detach()`.

    machine: the machine itself. snapshot: the one it was restored from, or the last one taken. All methods may be
    called from several tasks; snapshots of one machine are taken one after the other.
    """

    def __init__(
        self,
        *,
        store: SnapshotStore,
        vmm: Vmm,
        surroundings: Surroundings,
        machine: Machine,
        place: MachinePlace,
        snapshot: Manifest,
        ground: Ground,
        base: BaseMemory,
        tracker: DirtyTracker | None,
    ) -> None:
        self.machine = machine
        self.place = place
        self.snapshot = snapshot
        self.ground = ground
        self._store = store
        self._vmm = vmm
        self._surroundings = surroundings
        self._base = base
        self._tracker = tracker
        self._lock = asyncio.Lock()

    async def take(self, description: Description, *, then: Then, hooks: Sequence[SnapshotHooks] = ()) -> Taken:
        """Take a snapshot. RUNNING or PAUSED. hooks: who takes part in it.

        Raises ChainTooLongError (before the pause), StoreFullError, SnapshotError, MachineError, and what the hooks
        raise: then nothing is stored, and the machine runs on if it ran. When cancelled the snapshot is finished first,
        and a machine that it stopped runs on.
        """
        every = AllHooks(hooks)
        taking = asyncio.ensure_future(self._take(description, then, every))
        try:
            return await uncancelled(taking)
        except BaseException:
            if succeeded(taking) and taking.result().stopped and not self.machine.is_dead:
                await self.machine.resume()
            await every.abandoned()
            raise

    async def _take(self, description: Description, then: Then, hooks: AllHooks) -> Taken:
        if is_crowded(self.ground, open_disks=len(self.machine.disk_chain)):
            await self._surroundings.make_room()  # not within the lock: it changes the ground
        async with self._lock:
            await asyncio.to_thread(self._check_room, last=then is Then.STOP)
            started = time.perf_counter()
            was_running = self.machine.state is RunState.RUNNING
            with self._surroundings.quiet():
                try:
                    manifest, ground, layer_bytes, pause_ms = await self._save(description, then, hooks)
                except BaseException:
                    if was_running and self.machine.state is RunState.PAUSED:
                        await self.machine.resume()
                    raise
                self.snapshot, self.ground = manifest, ground
                await asyncio.to_thread(self._settle)
            self._surroundings.published(self, stopped=then is Then.STOP)
            return Taken(
                manifest=manifest,
                pause_ms=pause_ms,
                total_ms=(time.perf_counter() - started) * 1000,
                layer_bytes=layer_bytes,
                stopped=was_running and then is Then.STOP,
            )

    async def _save(self, description: Description, then: Then, hooks: AllHooks) -> tuple[Manifest, Ground, int, float]:
        """The steps of a snapshot, in their order. The machine's lock is held; must not be cancelled."""
        machine = self.machine
        was_running = machine.state is RunState.RUNNING
        tracker = await self._running_tracker()
        async with open_draft(self._store) as draft, _Opening(self._open_ground) as under:
            preparing = asyncio.to_thread(tracker.prepare, share_from_pages=hooks.share_from_pages)
            await gather_all(preparing, hooks.prepare(under), *([under] if hooks.needs_ground else []))
            await hooks.before_pause()
            if hooks.asks_guest:
                await asyncio.to_thread(tracker.catch_up)

            started = time.perf_counter()
            await machine.pause()
            device = draft.path("device")
            # None of the three writes to guest memory, so they need not wait for each other.
            _, frozen_disk, pages = await gather_all(
                machine.device_state(device), self._freeze_disk(), asyncio.to_thread(tracker.capture)
            )
            await hooks.before_resume()
            if was_running and then is Then.RESUME:
                await machine.resume()
            pause_ms = (time.perf_counter() - started) * 1000

            with _kept_readable(Captured(pages=pages, device=device, frozen_disk=frozen_disk)) as captured:
                await hooks.captured(captured)
                description = hooks.described(description)
                manifest, ground, layer_bytes = await asyncio.to_thread(
                    self._publish, draft, device, pages, await under, description
                )
        tracker.commit()
        return manifest, ground, layer_bytes, pause_ms

    @asynccontextmanager
    async def standing(self) -> AsyncIterator[None]:
        """Within it no snapshot of this machine is taken, so that its ground can be changed for the same state."""
        async with self._lock:
            yield

    async def rebase(self, ground: Ground, base: BaseMemory) -> None:
        """Let the next snapshot lie on another form of the same state, which the store keeps for this machine already.
        Within `standing`. Takes the base over."""
        old, self._base, self.ground = self._base, base, ground
        old.close()
        await asyncio.to_thread(self._settle)

    async def shorten_open_disk(self) -> None:
        """Let the VMM, too, open the disks of the ground instead of the longer chain that it has. Within `standing`.
        Raises MachineError, DriverError, BrokenSnapshotError: it keeps what it has."""
        kept = 1 + len(await asyncio.to_thread(self._frozen_disks))
        if len(self.machine.disk_chain) - kept > len(self.ground.disks):
            lower = [self._store.part_path(PartKind.DISK, disk.digest) for disk in self.ground.disks]
            await self.machine.rebase_disk(lower, keep=kept)

    def unsaved_disks(self) -> tuple[Path, ...]:
        """Disk files with what was written since the last snapshot, oldest first. Blocking."""
        return (*self._frozen_disks(), *(self.machine.disk_chain[-1:] if self.machine.disk_written else ()))

    async def kill(self) -> Death:
        """End the machine, and let go of what it needs. Twice is harmless. Not from within a hook of a snapshot."""
        try:
            return await self.machine.kill()
        finally:
            # A snapshot that was being taken, or a shortening, ends now and must not leave anything behind.
            async with self._lock:
                self._release()
                await asyncio.to_thread(forget_machine, self._store, self.place)

    async def detach(self) -> None:
        """Let go of a machine that goes on running, to be adopted later. Twice is harmless. Not from within a hook."""
        async with self._lock:
            await self.machine.detach()
            self._release()

    def write_record(self) -> None:
        """For a later `adopt`. Blocking."""
        record = SavedRecord(snapshot=self.snapshot, memory=self.ground.memory, disks=self.ground.disks)
        with contextlib.suppress(FileNotFoundError):  # its directory has gone with a machine that has just died
            record.write(self.place.run_dir)

    # -- the steps ------------------------------------------------------------------------------------------------

    async def _running_tracker(self) -> DirtyTracker:
        if self._tracker is None:
            mapping = self.machine.memory_mapping()
            self._tracker = await asyncio.to_thread(
                start_tracker, self.machine.pid, address=mapping.address, size_bytes=mapping.length, clean=False
            )
        return self._tracker

    async def _freeze_disk(self) -> Path | None:
        if not self.machine.disk_written:
            return None
        return await self.machine.freeze_disk(self.place.disk_dir / f"disk-{secrets.token_hex(4)}.qcow2")

    def _open_ground(self) -> MemoryImage:
        return MemoryImage(self._base, self._store.open_layers(self.ground.memory))

    def _publish(
        self, draft: Draft, device_path: Path, pages: CapturedPages, under: MemoryImage, description: Description
    ) -> tuple[Manifest, Ground, int]:
        memory, layer_bytes = self._store_layer(draft, pages, under)
        disks = self._store_disks(draft)
        _sync(device_path)
        device = draft.add(PartKind.DEVICE, device_path)
        ground = Ground(memory=memory, disks=disks)
        contents = contents_of(
            description,
            shape=self.machine.spec.shape,
            vmm=self._vmm,
            parents=(self.snapshot.id,),
            ground=ground,
            device=device,
            created_at=datetime.datetime.now(datetime.UTC),
        )
        # Before there is a manifest that somebody could remove. It holds all of the old ground too.
        pin_machine(self._store, self.place, ground)
        return draft.publish(contents), ground, layer_bytes

    def _store_layer(self, draft: Draft, pages: CapturedPages, under: MemoryImage) -> tuple[MemoryParts, int]:
        memory = self.ground.memory
        path = draft.path("layer")
        digest, layer_bytes = pages.write(path, under=under)
        with contextlib.closing(Layer.open(path, size_bytes=memory.size_bytes)) as layer:
            if not layer.data_runs and not layer.zero_runs:
                return memory, 0
        part = draft.add(PartKind.LAYER, path, digest=digest)
        return memory.model_copy(update={"layers": (*memory.layers, part)}), layer_bytes

    def _store_disks(self, draft: Draft) -> tuple[DiskPart, ...]:
        disks = list(self.ground.disks)
        for number, path in enumerate(self._frozen_disks()):
            link = draft.path(f"disk-{number}")
            os.link(path, link)
            _sync(link)
            part = draft.add(PartKind.DISK, link)
            disks.append(
                DiskPart(
                    digest=part.digest,
                    size_bytes=part.size_bytes,
                    format="qcow2",
                    backing=disks[-1].digest if disks else None,
                )
            )
        return tuple(disks)

    def _check_room(self, *, last: bool) -> None:
        new_disks = 1 + len(self._frozen_disks())
        check_room(self.ground, new_disks=new_disks, open_disks=len(self.machine.disk_chain), last=last)

    def _frozen_disks(self) -> list[Path]:
        """Frozen files of this machine that no snapshot has yet, oldest first: also those of snapshots that failed, or
        that an earlier gateway did not finish."""
        stored: set[int] = set()
        for disk in self.ground.disks:
            with contextlib.suppress(FileNotFoundError):
                stored.add(self._store.part_path(PartKind.DISK, disk.digest).stat().st_ino)
        own = [path for path in self.machine.disk_chain[:-1] if path.parent == self.place.disk_dir and path.exists()]
        return [path for path in own if path.stat().st_ino not in stored]

    def _settle(self) -> None:
        """Write down what lies under the machine now, and drop the names of disk files that the store has."""
        self.write_record()
        unstored = self._frozen_disks()
        for path in self.machine.disk_chain[:-1]:
            if path.parent == self.place.disk_dir and path not in unstored:
                path.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        self._base.close()
        self._surroundings.ended(self)


def pin_machine(store: SnapshotStore, place: MachinePlace, ground: Ground) -> None:
    """Keep what lies under a machine in the store. Blocking."""
    store.pin(_PIN_PREFIX + place.id, ground.pin, durable=False)


def pinned_machines(store: SnapshotStore) -> set[str]:
    """The ids of all machines that anything is kept for."""
    return {user.removeprefix(_PIN_PREFIX) for user in store.pin_users() if user.startswith(_PIN_PREFIX)}


def unpin_machine(store: SnapshotStore, machine_id: str) -> None:
    store.unpin(_PIN_PREFIX + machine_id)


def forget_machine(store: SnapshotStore, place: MachinePlace) -> None:
    """What is left of a dead machine, beside what its driver removes. Twice is harmless. Blocking."""
    unpin_machine(store, place.id)
    remove_record(place.run_dir)
    if place.disk_dir.is_dir():
        for path in place.disk_dir.glob("disk-*.qcow2"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files may lie there
            place.disk_dir.rmdir()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Opening:
    """A memory image that is opened in a thread when it is first awaited, and closed with the context."""

    def __init__(self, open_image: Callable[[], MemoryImage]) -> None:
        self._open_image = open_image
        self._opening: asyncio.Future[MemoryImage] | None = None

    def __await__(self) -> Generator[Any, None, MemoryImage]:
        if self._opening is None:
            self._opening = asyncio.ensure_future(asyncio.to_thread(self._open_image))
        return self._opening.__await__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._opening is not None:
            (image,) = await asyncio.gather(self._opening, return_exceptions=True)
            if isinstance(image, MemoryImage):
                for layer in image.layers:
                    layer.close()


@contextmanager
def _kept_readable(captured: Captured) -> Iterator[Captured]:
    """The same with paths that lead to the files also when they are renamed."""
    fd = os.open(captured.device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Captured(pages=captured.pages, device=Path(f"/proc/self/fd/{fd}"), frozen_disk=captured.frozen_disk)
    finally:
        os.close(fd)
