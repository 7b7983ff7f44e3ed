"""Joins a driver's machines with the snapshot store: templates, sleep and wake, checkpoints and forks are all this.

    template    boot(spec), SavedMachine.take(STOP)    a snapshot of a machine that was started from its image
    restore     restore(manifest)                      a clone of any snapshot
    checkpoint  SavedMachine.take(RESUME)
    sleep       SavedMachine.take(STOP), kill()        wake: restore
    fork        fork(machine, places)                  take and restores, overlapping

Knows no VMM and no Jupyter. docs/saving.md has the order of steps and what was measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Set
from contextlib import AsyncExitStack
from pathlib import Path

from vm_runtime.drivers.base import Driver, Failure, FlatteningStatus, MachinePaths, Shorter
from vm_runtime.errors import MachineGoneError, VmRuntimeError
from vm_runtime.machine import Machine
from vm_runtime.saving.forking import Children, Forked
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.machine import (
    SavedMachine,
    forget_machine,
    pin_machine,
    pinned_machines,
    unpin_machine,
)
from vm_runtime.saving.record import SavedRecord
from vm_runtime.saving.threads import succeeded, uncancelled
from vm_runtime.saving.values import AfterCapture, Description
from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.manifest import Manifest, State
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec


class Saver:
    """Makes `SavedMachine`s. `await close()` at the end; machines run on.

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
        self._states = driver.states(store, on_shortened=self._shortened, on_failed=on_flattening_failed)
        self._image_files = image_files
        self._live: set[SavedMachine] = set()

    async def boot(self, spec: MachineSpec, *, paths: MachinePaths, guest: bytes, timeout_s: float) -> SavedMachine:
        """A machine from its image, with an empty disk; its first snapshot needs Then.STOP. Errors: as `restore`."""
        machine = await self._driver.boot(spec, paths=paths, guest=guest, timeout_s=timeout_s)
        return self._saved(machine, paths=paths, snapshot=None, state=None)

    async def restore(self, manifest: Manifest, *, paths: MachinePaths) -> SavedMachine:
        """A running clone of a snapshot, also of a template's.

        Raises BrokenSnapshotError (missing, tampered or foreign parts), MachineStartError, DriverError, and what
        `image_files` raises; nothing is left behind then, also when cancelled.
        """
        if (why_not := self._driver.can_load(manifest.state)) is not None:
            raise BrokenSnapshotError(why_not)
        state = (await asyncio.to_thread(self._store.flattened, manifest.id) or manifest).state
        spec = MachineSpec(
            shape=MachineShape(**manifest.shape.model_dump()), image=self._image_files(manifest.image_digest)
        )
        async with AsyncExitStack() as on_error:
            on_error.push_async_callback(asyncio.to_thread, unpin_machine, self._store, paths.id)
            # In this order: what is found to be in the store then, stays.
            await uncancelled(asyncio.to_thread(pin_machine, self._store, paths, state))
            async with self._states.opened(state) as opened:
                unloaded = await opened.start_unloaded(spec, paths=paths)
                saved = self._saved(await unloaded.load(), paths=paths, snapshot=manifest, state=state)
                on_error.push_async_callback(saved.kill)
            await asyncio.to_thread(saved.write_record)
            on_error.pop_all()
            self._states.shorten(manifest, state, stopped=False)
            return saved

    async def fork(
        self,
        parent: SavedMachine,
        description: Description,
        *,
        child_paths: Sequence[MachinePaths],
        hooks: Sequence[SnapshotHooks] = (),
    ) -> Forked:
        """Take a snapshot of a running machine and restore it at every place, faster than one after the other.

        hooks: who else takes part in the snapshot. One failed child does not fail the others. Raises what
        `SavedMachine.take` raises; there is no child then, and the parent runs on. When cancelled it is finished first,
        and the children are ended.
        """
        forking = asyncio.ensure_future(self._fork(parent, description, child_paths, hooks))
        try:
            return await uncancelled(forking)
        except asyncio.CancelledError:
            if succeeded(forking):
                await asyncio.gather(
                    *(child.kill() for child in forking.result().children if isinstance(child, SavedMachine))
                )
            raise

    async def adopt(self, paths: MachinePaths) -> SavedMachine:
        """The machine that an earlier process left at this place, as it is: running, or paused in a snapshot.

        Raises MachineGoneError if it is dead, or has no record of what lies under it; its leftovers are then removed.
        """
        record = await asyncio.to_thread(SavedRecord.read, paths.run_dir)
        try:
            machine = await self._driver.adopt(paths)
            if record is None:
                await machine.kill()
                raise MachineGoneError(f"Nothing says what lies under machine {paths.id}; it was ended.")
        except MachineGoneError:
            await asyncio.to_thread(forget_machine, self._store, paths)
            raise
        try:
            await self._states.set_backing(machine, record.state)
        except BaseException:
            await machine.detach()
            raise
        return self._saved(machine, paths=paths, snapshot=record.snapshot, state=record.state)

    async def end(self, paths: MachinePaths) -> None:
        """End a machine that an earlier process left at this place and nobody needs, and remove what is left of it.

        Raises MachineGoneError if it was dead already; its leftovers are removed then, too.
        """
        try:
            machine = await self._driver.adopt(paths)
            await machine.kill()
            self._states.release(machine)
        finally:
            await asyncio.to_thread(forget_machine, self._store, paths)

    def flattening(self) -> FlatteningStatus:
        """How far the chains are from being short."""
        return self._states.flattening()

    async def settled(self) -> None:
        """Wait until no chain waits to be shortened: a restore of any snapshot taken so far is as quick as it gets."""
        await self._states.settled()

    async def remove_leftovers(self, machines_dir: Path, *, keep: Set[str]) -> None:
        """Forget the machines that are not in `keep`: disks (`machines_dir/<machine id>`) and what the store keeps."""
        await asyncio.to_thread(self._driver.remove_leftovers, machines_dir, keep=keep)
        for machine_id in await asyncio.to_thread(pinned_machines, self._store) - keep:
            await asyncio.to_thread(unpin_machine, self._store, machine_id)

    async def close(self) -> None:
        """Let go of everything but the machines, and give up what is done in the background. Twice is harmless."""
        await self._states.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _shortened(self, shorter: Shorter) -> None:
        """Let the running machines that lie on that state use the shorter form. Raises the last error of a machine that
        stays on its long chain, after all have been tried."""
        failed: Exception | None = None
        for saved in list(self._live):
            async with saved.standing():
                if saved.state is None or saved not in self._live:
                    continue
                try:
                    await saved.set_backing(shorter(saved.state) or saved.state)
                except (VmRuntimeError, OSError) as error:
                    if not saved.machine.is_dead:  # else its owner is about to see that
                        failed = error
        if failed is not None:
            raise failed

    async def _fork(
        self,
        parent: SavedMachine,
        description: Description,
        child_paths: Sequence[MachinePaths],
        hooks: Sequence[SnapshotHooks],
    ) -> Forked:
        children = Children(parent.machine.spec, child_paths)
        try:
            taken = await parent.take(description, then=AfterCapture.RESUME, hooks=[*hooks, children])
        except BaseException:
            for machine in children.machines:
                if isinstance(machine, Machine):  # `Children` has ended it
                    self._states.release(machine)
            raise
        handing_out = (
            self._hand_out(machine, paths, taken.manifest)
            for machine, paths in zip(children.machines, child_paths, strict=True)
        )
        return Forked(taken=taken, children=tuple(await asyncio.gather(*handing_out)))

    async def _hand_out(
        self, machine: Machine | Exception, paths: MachinePaths, manifest: Manifest
    ) -> SavedMachine | Exception:
        """Make a child that runs one of our machines, on a snapshot that is stored."""
        if isinstance(machine, Exception):
            return machine
        saved = self._saved(machine, paths=paths, snapshot=manifest, state=manifest.state)
        try:
            await asyncio.to_thread(pin_machine, self._store, paths, manifest.state)
            await self._states.set_backing(machine, manifest.state)
            await asyncio.to_thread(saved.write_record)
        except Exception as error:
            await saved.kill()
            return error
        return saved

    def _saved(
        self, machine: Machine, *, paths: MachinePaths, snapshot: Manifest | None, state: State | None
    ) -> SavedMachine:
        saved = SavedMachine(
            store=self._store,
            states=self._states,
            machine=machine,
            paths=paths,
            snapshot=snapshot,
            state=state,
            on_ended=self._live.discard,
        )
        self._live.add(saved)
        return saved
