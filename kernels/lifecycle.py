"""Sleep and wake: a snapshot and the machine's end; a machine in the state of that snapshot.

Decides when: on demand, after idle time, on a request to a sleeping kernel, and at a clean stop.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kernels.background import Background, all_logged
from kernels.errors import (
    CapacityError,
    CheckpointLimitError,
    KernelsError,
    MachineFailedError,
    SandboxStateError,
    UnknownSandboxError,
)
from kernels.live import LiveSandbox
from kernels.machines import Machines
from kernels.models import EventKind, Sandbox, SandboxState
from kernels.registry import Registry
from kernels.snapshots import Snapshots
from kernels.templates import Progress
from vm_runtime.errors import VmRuntimeError
from vm_runtime.saving.values import AfterCapture
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.states import RunState

log = logging.getLogger(__name__)

# How often idle times and life times are looked at: limits are minutes, so a second late is on time.
WATCH_INTERVAL_S = 1.0
# Who puts a sandbox to sleep in the moment in which another asks something of it wants the answer to be given first;
# what takes longer sleeps and continues later.
PATIENCE_S = 2.0
LOOK_INTERVAL_S = 0.05
# At a clean stop: snapshots taken at the same time. They are bound by CPU and disk, of which two saturate a small host.
PARALLEL_SLEEPS = 4


@dataclass(eq=False)
class Lifecycle:
    """Sleep, wake and end of one service's sandboxes. Run `watch()` as a task."""

    _registry: Registry
    _machines: Machines
    _store: SnapshotStore
    _snapshots: Snapshots
    _background: Background
    _waking: set[str] = field(default_factory=set, init=False)  # a wake on request waits for its turn

    async def sleep(self, sandbox_id: str) -> Sandbox:
        """Puts a sandbox to sleep; one that sleeps already stays so. A cell that runs continues after the wake.

        Errors: UnknownSandboxError, SandboxStateError, CheckpointLimitError, MachineFailedError (the snapshot failed);
        it runs on.
        """
        self._registry.get(sandbox_id)
        asked_at = asyncio.get_running_loop().time()
        async with self._machines.lock(sandbox_id):
            live = self._machines.live.get(sandbox_id)
            busy = live is not None and await self._let_go(live, patience_s=PATIENCE_S)
            sandbox = await self._sleep(sandbox_id)
            # Else who asks now waits for an answer that nobody brings about.
            if live is not None and busy and live.asked_at >= asked_at:
                self.client_asks(sandbox_id)
            return sandbox

    @staticmethod
    async def _let_go(live: LiveSandbox, *, patience_s: float = 0.0) -> bool:
        """`LiveSandbox.hold_clients`, when what was asked in the last moments is answered, if it is soon. Whether
        something is not, or the kernel does not even report it."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience_s
        while live.saved.machine.state is RunState.RUNNING:  # a paused one was let go before

            def is_patient() -> bool:
                return loop.time() < until and live.asked_at > loop.time() - patience_s

            while is_patient() and await live.has_unanswered():  # noqa: ASYNC110 - a guest reports when it is asked
                await asyncio.sleep(LOOK_INTERVAL_S)
            pending_requests = await live.hold_clients()
            if pending_requests is None or pending_requests.count == 0:
                return pending_requests is None
            if not is_patient():
                return True
            await live.take_back()
        return False

    async def _sleep(self, sandbox_id: str, *, resumes: bool = False) -> Sandbox:
        """resumes: the next gateway wakes it."""
        if self._registry.get(sandbox_id).state is SandboxState.ASLEEP:
            return self._registry.get(sandbox_id)
        live = self._machines.running(sandbox_id)
        was_running = live.saved.machine.state is RunState.RUNNING
        if was_running and not live.holds_clients:
            await live.hold_clients()
        try:
            await self._snapshots.take(sandbox_id, then=AfterCapture.STOP)
        except Exception as error:
            # Also where the snapshot exists but could not be recorded (a full disk): what runs must not be lost.
            if was_running:
                await live.resume()
            if isinstance(error, CheckpointLimitError):
                raise
            raise MachineFailedError(f"The sandbox could not be put to sleep and runs on: {error}") from error
        await self._machines.take_down(sandbox_id, "asleep")
        self._registry.update(sandbox_id, resumes=resumes)
        sandbox = self._registry.move(sandbox_id, SandboxState.ASLEEP)
        if self._machines.has_request(sandbox_id):
            self.client_asks(sandbox_id)
        return sandbox

    async def wake(self, sandbox_id: str) -> Sandbox:
        """Wakes a sandbox; one that runs already runs on.

        Errors: UnknownSandboxError, CapacityError (it sleeps on), MachineFailedError.
        """
        self._registry.get(sandbox_id)
        async with self._machines.lock(sandbox_id):
            return await self._wake(sandbox_id)

    async def _wake(self, sandbox_id: str) -> Sandbox:
        sandbox = self._registry.get(sandbox_id)
        if sandbox.state is not SandboxState.ASLEEP:
            self._machines.running(sandbox_id)
            return self._registry.change(sandbox_id, released=False) if sandbox.released else sandbox
        if sandbox.snapshot_id is None:
            raise SandboxStateError(sandbox_id, found="asleep without a snapshot", wanted=SandboxState.RUNNING)
        try:
            snapshot = await asyncio.to_thread(self._store.get, sandbox.snapshot_id)
            # The same sandbox continues, so its user-level random numbers do, too; the system's are renewed in any
            # case. One that lost its machine went back to a checkpoint; one that was put to sleep does what it was
            # asked.
            drop = sandbox.reason is not None
            connected = await self._machines.restore(sandbox_id, snapshot, keep_random=True, drop_requests=drop)
            await self._machines.exchange(sandbox_id, connected, snapshot)
        except CapacityError:
            raise
        except (SnapshotError, VmRuntimeError, KernelsError) as error:
            raise MachineFailedError(f"The sandbox could not be woken: {error}") from error
        self._registry.touch(sandbox_id)
        return self._registry.change(sandbox_id, released=False)

    async def pause(self, sandbox_id: str) -> Sandbox:
        """Stops the CPUs of a machine; one that stands already stays so.

        Errors: UnknownSandboxError, SandboxStateError, MachineFailedError.
        """
        async with self._machines.lock(sandbox_id):
            live = self._machines.running(sandbox_id)
            if self._registry.get(sandbox_id).state is SandboxState.PAUSED:
                return self._registry.get(sandbox_id)
            # What is under way to a machine that stands still would be lost if it were put to sleep then.
            await live.hold_clients()
            try:
                await live.saved.machine.pause()
            except VmRuntimeError as error:
                await live.take_back()
                raise MachineFailedError(f"The sandbox could not be paused: {error}") from error
            live.session.deadlines.pause()
            return self._registry.move(sandbox_id, SandboxState.PAUSED)

    async def resume(self, sandbox_id: str) -> Sandbox:
        """Lets the CPUs run again; a machine that runs already runs on. Errors: as `pause`."""
        async with self._machines.lock(sandbox_id):
            live = self._machines.running(sandbox_id)
            if self._registry.get(sandbox_id).state is SandboxState.RUNNING:
                return self._registry.get(sandbox_id)
            try:
                await live.saved.machine.resume()
            except VmRuntimeError as error:
                raise MachineFailedError(f"The sandbox could not be resumed: {error}") from error
            live.session.deadlines.resume()
            await live.session.correct_clock(math.inf)  # it stood still with the CPUs
            self._registry.touch(sandbox_id)
            sandbox = self._registry.move(sandbox_id, SandboxState.RUNNING)
            await live.take_back()
            return sandbox

    def client_asks(self, sandbox_id: str) -> None:
        """A client asks something of a sandbox that has no machine, or is losing it just now."""
        known = sandbox_id in self._registry and self._registry.get(sandbox_id).state is not SandboxState.FAILED
        if known and sandbox_id not in self._waking and not self._machines.is_stopping:
            self._waking.add(sandbox_id)
            self._background.spawn(self._wake_on_request(sandbox_id))

    async def _wake_on_request(self, sandbox_id: str) -> None:
        try:
            async with self._machines.lock(sandbox_id):
                self._waking.discard(sandbox_id)
                await self._wake(sandbox_id)
        except KernelsError as error:
            log.warning("Sandbox %s was asked something and cannot wake: %s", sandbox_id, error)
            no_room = isinstance(error, CapacityError)
            self._registry.notify(sandbox_id, EventKind.WAKE_FAILED, str(error), no_room=no_room)

    def machine_lost(self, sandbox_id: str, reason: str) -> None:
        """The machine died. With a checkpoint the sandbox sleeps on it; without one it has failed."""
        sandbox = self._registry.get(sandbox_id)
        if sandbox.snapshot_id is None:
            self._registry.fail(sandbox_id, reason)
            return
        try:
            taken = self._store.get(sandbox.snapshot_id).created_at
        except SnapshotError as error:
            self._registry.fail(sandbox_id, f"{reason} Its checkpoint cannot be used: {error}")
            return
        text = f"The sandbox goes on from its checkpoint of {taken:%Y-%m-%d %H:%M:%S} UTC. {reason}"
        self._registry.fall_back(sandbox_id, text)

    async def end(self, sandbox_id: str) -> None:
        """Ends a sandbox for good, when nobody else changes it. Unknown ids are fine."""
        async with self._machines.lock(sandbox_id):
            await self.forget(sandbox_id)

    async def forget(self, sandbox_id: str) -> None:
        """The same within its lock: machine, record, clients, and its claim on snapshots."""
        await self._machines.take_down(sandbox_id, "deleted")
        known = sandbox_id in self._registry
        stood_on = self._registry.get(sandbox_id).snapshot_id if known else None
        self._registry.remove(sandbox_id)
        await self._machines.drop_clients(sandbox_id)
        if known:
            await self._snapshots.drop(sandbox_id, stood_on=stood_on)

    async def watch(self) -> None:
        """Puts idle sandboxes to sleep and ends those whose life time is over, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            for sandbox in self._registry.sandboxes():
                if self._is_over(sandbox):
                    end = self._sleep_at_end if sandbox.on_timeout == "sleep" else self.end
                    self._background.spawn(end(sandbox.id))
                elif self._is_idle(sandbox) and not self._machines.cell_lock(sandbox.id).locked():
                    self._background.spawn(self._sleep_if_idle(sandbox.id))

    async def _sleep_if_idle(self, sandbox_id: str) -> None:
        async with self._machines.lock(sandbox_id):
            live = self._machines.live.get(sandbox_id)
            if live is None or not self._is_idle(self._registry.get(sandbox_id)):
                return
            if await self._let_go(live) or self._machines.has_request(sandbox_id):
                await live.take_back()
                self._registry.touch(sandbox_id)  # else it would be tried again at once
                return
            try:
                await self._sleep(sandbox_id)
            except KernelsError as error:
                log.warning("Sandbox %s is idle but cannot sleep: %s", sandbox_id, error)
                self._registry.touch(sandbox_id)

    async def _sleep_at_end(self, sandbox_id: str) -> None:
        """Its life time is over with this, whether it could sleep or not: it may be woken."""
        async with self._machines.lock(sandbox_id):
            if sandbox_id not in self._registry or not self._is_over(self._registry.get(sandbox_id)):
                return
            self._registry.change(sandbox_id, max_lifetime_s=None)
            if sandbox_id in self._machines.live:
                try:
                    await self._sleep(sandbox_id)
                except KernelsError as error:
                    log.warning("The time of sandbox %s is up, but it cannot sleep: %s", sandbox_id, error)

    async def sleep_all(self, *, limit_s: float, progress: Progress) -> list[str]:
        """For a stop: puts everything to sleep, several at a time. The ids of those that could not be in time."""
        gate = asyncio.Semaphore(PARALLEL_SLEEPS)
        left = list(self._machines.live)
        total = len(left)
        if left:
            progress(f"Putting {total} sandboxes to sleep, for at most {limit_s:.0f} s.")

        async def one(sandbox_id: str) -> None:
            async with gate:
                try:
                    await self._sleep_for_stop(sandbox_id)
                    left.remove(sandbox_id)
                    progress(f"Asleep: {total - len(left)} of {total}.")
                except KernelsError as error:
                    log.warning("Sandbox %s could not be put to sleep: %s", sandbox_id, error)

        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await all_logged(one(sandbox_id) for sandbox_id in list(left))
        return left

    async def _sleep_for_stop(self, sandbox_id: str) -> None:
        async with self._machines.lock(sandbox_id):
            live = self._machines.live.get(sandbox_id)
            if live is not None:
                busy = await self._let_go(live) or self._registry.get(sandbox_id).execution_state == "busy"
                runs = self._registry.get(sandbox_id).state is SandboxState.RUNNING
                await self._sleep(sandbox_id, resumes=runs and busy)

    async def resume_all(self, sandbox_ids: Sequence[str]) -> None:
        """Wakes what an earlier gateway put to sleep in the middle of something when it stopped."""
        for sandbox_id in sandbox_ids:
            try:
                await self.wake(sandbox_id)
            except UnknownSandboxError:
                continue
            except KernelsError as error:
                log.warning("Sandbox %s does not go on where it was when the gateway stopped: %s", sandbox_id, error)

    def _is_idle(self, sandbox: Sandbox) -> bool:
        may_sleep = sandbox.state is SandboxState.RUNNING and sandbox.execution_state in ("idle", "dead")
        return may_sleep and 0 < sandbox.idle_timeout_s < self._registry.idle_s(sandbox.id)

    def _is_over(self, sandbox: Sandbox) -> bool:
        limit_s = sandbox.max_lifetime_s
        return limit_s is not None and self._registry.age_s(sandbox.id) > limit_s
