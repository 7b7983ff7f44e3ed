"""A running machine together with what lies under it, of which snapshots are taken.

Knows no VMM and does not start machines (saver.py does). A snapshot goes through these steps, whatever it is for; only
those between the lines stop the guest:

    step        the driver (`Capture`)                              who takes part (`SnapshotHooks`)
    prepare     does what makes the pause shorter                   prepare, before_pause
    ---------   pause
    take        captures the state                                  before_resume
    ---------   resume, unless it is to stop                        captured
    store       puts the state into a draft                         described
    publish     parts are pinned, the manifest becomes visible, saved.json names it
    commit      the next snapshot lies on this one                  stored

Snapshots of one machine are captured one after the other, and stored one after the other; the next one may be captured
while one is being stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from vm_runtime.drivers.base import Capture, MachinePaths, States
from vm_runtime.machine import Death, Machine
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.record import SavedRecord, remove_record
from vm_runtime.saving.threads import gather_all, open_draft, succeeded, uncancelled
from vm_runtime.saving.values import AfterCapture, Description, Taken
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.manifest import Manifest, Shape, SnapshotContents, State
from vm_runtime.snapshots.store import Draft, Pin, SnapshotStore
from vm_runtime.states import RunState

_log = logging.getLogger(__name__)

_PIN_PREFIX = "machine-"
# Of one machine: what is captured and not stored yet is in memory. One that is stored, and one that waits for that.
_MOST_CAPTURED = 2


class SavedMachine:
    """Made by `Saver`. Its owner ends it with `kill()`, or lets go of it with `detach()`.

    machine: the machine itself. snapshot: the one it was restored from, or the last one taken; None of a machine that
    was booted. state: what the next snapshot lies on, the snapshot's or a shorter form of it. All methods may be called
    from several tasks; snapshots of one machine are taken one after the other.
    """

    def __init__(
        self,
        *,
        store: SnapshotStore,
        states: States,
        machine: Machine,
        paths: MachinePaths,
        snapshot: Manifest | None,
        state: State | None,
        on_ended: Callable[[SavedMachine], None],
    ) -> None:
        self.machine = machine
        self.paths = paths
        self.snapshot = snapshot
        self.state = state
        self._store = store
        self._states = states
        self._on_ended = on_ended
        self._captured = asyncio.Semaphore(_MOST_CAPTURED)
        self._capturing = asyncio.Lock()
        self._storing = asyncio.Lock()
        self._store_failed = False

    async def take(self, description: Description, *, then: AfterCapture, hooks: Sequence[SnapshotHooks] = ()) -> Taken:
        """Take a snapshot. RUNNING or PAUSED. hooks: who takes part in it.

        Raises ChainTooLongError (before the pause), StoreFullError, SnapshotError, MachineError, and what the hooks
        raise: then nothing is stored, and the machine runs on if it ran. When cancelled the snapshot is finished first,
        and a machine that it stopped runs on.
        """
        taking = asyncio.ensure_future(self._take(description, then, hooks))
        try:
            return await uncancelled(taking)
        except BaseException:
            if succeeded(taking) and taking.result().stopped and not self.machine.is_dead:
                await self.machine.resume()
            await gather_all(*(hook.abandoned() for hook in hooks))
            raise

    async def _take(self, description: Description, then: AfterCapture, hooks: Sequence[SnapshotHooks]) -> Taken:
        await self._states.make_room(self.machine)  # not within the lock: it changes the machine's backing chain
        with self._states.quiet():
            taken = await self._save(description, then, hooks)
        self._states.shorten(taken.manifest, taken.manifest.state, stopped=then is AfterCapture.STOP)
        return taken

    async def _save(self, description: Description, then: AfterCapture, hooks: Sequence[SnapshotHooks]) -> Taken:
        """The steps of a snapshot, in their order. Must not be cancelled."""
        started = time.perf_counter()
        children = sum(hook.children for hook in hooks)
        async with self._captured, AsyncExitStack() as stack:
            async with self._capturing:
                was_running = self.machine.state is RunState.RUNNING
                # Children lie on what is stored. And what cannot be stored goes to the snapshot captured after it: if
                # that one fails, too, nothing more is to pile up in memory.
                if children or self._store_failed:
                    async with self._storing:
                        pass
                capture = await stack.enter_async_context(
                    self._states.capturing(self.machine, children=children, last=then is AfterCapture.STOP)
                )
                try:
                    pause_ms = await self._capture(capture, then, hooks)
                except BaseException:
                    if was_running:
                        await self._run_again()
                    raise
            stopped = was_running and then is AfterCapture.STOP
            # Nothing is waited for between the two locks, so they are stored in the order in which they were captured.
            async with self._storing:
                try:
                    manifest = await self._put_away(capture, description, hooks)
                    self._store_failed = False
                except BaseException:
                    self._store_failed = True
                    if stopped:
                        await self._run_again()
                    raise
        total_ms = (time.perf_counter() - started) * 1000
        return Taken(manifest=manifest, pause_ms=pause_ms, total_ms=total_ms, stopped=stopped)

    async def _capture(self, capture: Capture, then: AfterCapture, hooks: Sequence[SnapshotHooks]) -> float:
        machine = self.machine
        was_running = machine.state is RunState.RUNNING
        preparing = [capture.prepare(), *(hook.prepare(capture) for hook in hooks)]
        if any(hook.children for hook in hooks):  # starting them takes longer than the next cell is to wait
            await gather_all(*preparing)
            preparing = []
        await gather_all(*preparing, *(hook.before_pause() for hook in hooks))
        if any(hook.asks_guest for hook in hooks):
            await capture.catch_up()

        started = time.perf_counter()
        await machine.pause()
        await capture.take()
        for hook in hooks:
            await hook.before_resume()
        if was_running and then is AfterCapture.RESUME:
            await machine.resume()
        pause_ms = (time.perf_counter() - started) * 1000

        await gather_all(*(hook.captured() for hook in hooks))
        return pause_ms

    async def _put_away(self, capture: Capture, description: Description, hooks: Sequence[SnapshotHooks]) -> Manifest:
        for hook in hooks:
            description = hook.described(description)
        async with open_draft(self._store) as draft:
            state = await capture.store(draft)
            manifest = await asyncio.to_thread(self._publish, draft, state, description)
        self.snapshot, self.state = manifest, state
        await asyncio.to_thread(self.write_record)
        await capture.commit(state)
        for hook in hooks:
            await hook.stored(manifest)
        return manifest

    async def _run_again(self) -> None:
        if self.machine.state is RunState.PAUSED:
            await self.machine.resume()

    async def stored(self) -> None:
        """Wait until the snapshots that were begun before are stored, or have failed."""
        async with self.standing():
            pass

    def _publish(self, draft: Draft, state: State, description: Description) -> Manifest:
        contents = SnapshotContents(
            created_at=datetime.datetime.now(datetime.UTC),
            parents=(self.snapshot.id,) if self.snapshot is not None else (),
            shape=Shape(**vars(self.machine.spec.shape)),
            state=state,
            **vars(description),
        )
        # Before there is a manifest that somebody could remove. What it lay on before is part of it.
        pin_machine(self._store, self.paths, state)
        return draft.publish(contents)

    @asynccontextmanager
    async def standing(self) -> AsyncIterator[None]:
        """Within it no snapshot of this machine is taken, so that `set_backing` can give it another form of the same
        state."""
        async with self._capturing, self._storing:
            yield

    async def set_backing(self, state: State) -> None:
        """Let the machine and its next snapshot lie on another form of the same state, or on the same again. Within
        `standing`. Raises MachineError, DriverError, OSError: it stays on a longer chain."""
        try:
            if state != self.state:
                await asyncio.to_thread(pin_machine, self._store, self.paths, state)
                await self._states.set_backing(self.machine, state)
                self.state = state
                await asyncio.to_thread(self.write_record)
            await self._states.reopen(self.machine)
        except SnapshotError as error:
            # Removed meanwhile, with the snapshot it came from: the machine stays on what it has.
            _log.info("Machine %s stays on its long chain: %s", self.paths.id, error)
            if self.state is not None:
                await asyncio.to_thread(pin_machine, self._store, self.paths, self.state)

    async def kill(self) -> Death:
        """End the machine, and let go of what it needs; finished first when cancelled. Twice is harmless. Not from
        within a hook of a snapshot."""
        return await uncancelled(self._kill())

    async def _kill(self) -> Death:
        try:
            return await self.machine.kill()
        finally:
            # A snapshot that was being taken, or a shortening, ends now and must not leave anything behind.
            async with self.standing():
                self._release()
                await asyncio.to_thread(forget_machine, self._store, self.paths)

    async def detach(self) -> None:
        """Let go of a machine that runs on, to be adopted later. Twice is harmless. Not from within a hook."""
        async with self.standing():
            await self.machine.detach()
            self._release()

    def write_record(self) -> None:
        """For a later `adopt`. Blocking."""
        if self.snapshot is not None and self.state is not None:
            record = SavedRecord(snapshot=self.snapshot, state=self.state)
            with contextlib.suppress(FileNotFoundError):  # its directory was removed with a machine that has just died
                record.write(self.paths.run_dir)

    def _release(self) -> None:
        self._states.release(self.machine)
        self._on_ended(self)


def pin_machine(store: SnapshotStore, paths: MachinePaths, state: State) -> None:
    """Keep what lies under a machine in the store. Blocking."""
    store.pin(_PIN_PREFIX + paths.id, Pin.of_parts(state.parts), durable=False)


def pinned_machines(store: SnapshotStore) -> set[str]:
    """The ids of all machines that anything is kept for."""
    return {user.removeprefix(_PIN_PREFIX) for user in store.pin_users() if user.startswith(_PIN_PREFIX)}


def unpin_machine(store: SnapshotStore, machine_id: str) -> None:
    store.unpin(_PIN_PREFIX + machine_id)


def forget_machine(store: SnapshotStore, paths: MachinePaths) -> None:
    """What is left of a dead machine, beside what its driver removes. Twice is harmless. Blocking."""
    unpin_machine(store, paths.id)
    remove_record(paths.run_dir)
