"""Forks: a running sandbox becomes many, and the family tree.

A fork is one snapshot of the parent and a restore for each child; the parent stands still only for the capture. What
children must not share (identity, keys, random numbers, connections) is renewed by their own greeting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from kernels.capacity import Capacity
from kernels.child_results import ChildResult, ChildResults
from kernels.connected import ConnectedMachine, new_paths, new_sandbox_id
from kernels.errors import CellRunsError, KernelsError, LimitError, MachineFailedError, SandboxStateError
from kernels.events import EventQueue
from kernels.index import SandboxRecord
from kernels.launcher import new_key
from kernels.lifecycle import Lifecycle
from kernels.machines import Machines, identity_of
from kernels.models import EventKind, Sandbox, SandboxEvent, SandboxState
from kernels.registry import Registry
from kernels.session import Greeting
from kernels.settings import ServiceSettings
from kernels.snapshots import Snapshots
from vm_runtime.errors import VmRuntimeError
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.threads import gather_all, uncancelled
from vm_runtime.saving.values import AfterCapture
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.states import RunState

log = logging.getLogger(__name__)

# A fork from outside happens between cells; a cell that takes longer than this is not waited for.
IDLE_WAIT_S = 30.0


@dataclass(eq=False)
class Forks:
    """Forks of one service's sandboxes. `child_results`: how their children ended. Run `watch()` as a task."""

    _settings: ServiceSettings
    _registry: Registry
    _machines: Machines
    _snapshots: Snapshots
    _lifecycle: Lifecycle
    _capacity: Capacity
    child_results: ChildResults

    def tree(self, sandbox_id: str) -> list[Sandbox]:
        """A sandbox's whole family as far as it exists, parents before children, each with the nearest ancestor that
        exists as its parent. Errors: UnknownSandboxError."""
        self._registry.get(sandbox_id)
        registry, lineage = self._registry, self._registry.lineage
        family = lineage.family(sandbox_id)
        # Oldest first: parents come before their children.
        members = [sandbox for sandbox in registry.sandboxes() if sandbox.id in family]
        return [replace(member, parent_id=lineage.parent(member.id)) for member in members]

    async def fork(
        self,
        sandbox_id: str,
        *,
        count: int,
        name: str | None = None,
        same_random: bool = False,
        mid_cell: bool = False,
        call_id: str | None = None,
    ) -> list[Sandbox | KernelsError]:
        """`count` children in the sandbox's state; for each that failed its error. A sleeping sandbox stays asleep.

        mid_cell: do not wait for the running cell's end. call_id: of `sandbox.fork()` inside, which then returns in
        each child, too. Errors: UnknownSandboxError, LimitError and CapacityError (before the first child is made),
        SandboxStateError, MachineFailedError (no snapshot could be taken; the parent runs on).
        """
        parent = self._registry.record(sandbox_id)
        self._check_limits(parent, count)
        if not mid_cell:
            await self._wait_idle(sandbox_id)
            self._check_limits(parent, count)  # others may have forked meanwhile
        children = [self._child_record(parent, index, name) for index in range(count)]
        try:
            for child in children:
                self._registry.add(child)
            snapshot, machines = await self._split(sandbox_id, len(children), mid_cell=mid_cell)
            async with asyncio.TaskGroup() as group:
                made = [
                    group.create_task(
                        self._bring_up(child, snapshot, machine, same_random=same_random, call_id=call_id)
                    )
                    for child, machine in zip(children, machines, strict=True)
                ]
            return [each.result() for each in made]
        except BaseException as error:  # nobody knows of them
            await uncancelled(gather_all(*(self._lifecycle.forget(child.sandbox.id) for child in children)))
            if isinstance(error, SnapshotError | VmRuntimeError):
                raise MachineFailedError(f"The sandbox could not be forked and runs on: {error}") from error
            raise

    def _check_limits(self, parent: SandboxRecord, count: int) -> None:
        settings = self._settings
        if count < 1:
            raise LimitError(f"A fork makes 1 child or more, not {count}.")
        alive = len(self._registry.lineage.children(parent.sandbox.id))
        if alive + count > settings.max_children:
            raise LimitError(
                f"A sandbox has at most {settings.max_children} children at a time (max_children); this one has "
                f"{alive} and {count} more were asked for."
            )
        if parent.depth + 1 > settings.max_depth:
            raise LimitError(f"Forks of forks go at most {settings.max_depth} deep (max_depth).")
        self._capacity.admit(len(self._registry), count=count)

    async def _wait_idle(self, sandbox_id: str) -> None:
        async with self._registry.bus.subscribe() as events:
            if self._registry.get(sandbox_id).execution_state == "busy":
                await self._next_idle(sandbox_id, events, asyncio.get_running_loop().time() + IDLE_WAIT_S)

    async def _next_idle(self, sandbox_id: str, events: EventQueue, deadline: float) -> None:
        """Waits until a cell has ended since `events` were looked at last. Errors: SandboxStateError."""
        try:
            async with asyncio.timeout_at(deadline):
                async for event in events:
                    if event.sandbox_id == sandbox_id and self._registry.get(sandbox_id).execution_state != "busy":
                        return
        except TimeoutError:
            pass
        raise SandboxStateError(
            sandbox_id, found=f"busy for {IDLE_WAIT_S:.0f} s", wanted="idle (or ask for a fork in mid cell)"
        )

    def _child_record(self, parent: SandboxRecord, index: int, name: str | None) -> SandboxRecord:
        now = datetime.now(UTC)
        lifetime_s = parent.sandbox.max_lifetime_s
        if lifetime_s:  # counted from the child's own birth, ends when the parent's does
            lifetime_s = max(1.0, lifetime_s - self._registry.age_s(parent.sandbox.id))
        sandbox = replace(
            parent.sandbox,
            id=new_sandbox_id(),
            state=SandboxState.CREATING,
            parent_id=parent.sandbox.id,
            index=index,
            name=name if name is not None else parent.sandbox.name,
            created_at=now,
            last_activity=now,
            execution_state="starting",
            reason=None,
            snapshot_id=None,
            notebook=None,
            released=False,
            max_lifetime_s=lifetime_s,
        )
        return parent.model_copy(
            update={"sandbox": sandbox, "machine_id": "", "key": new_key(), "marker": "", "depth": parent.depth + 1}
        )

    async def _split(
        self, sandbox_id: str, count: int, *, mid_cell: bool
    ) -> tuple[Manifest, Sequence[SavedMachine | Exception]]:
        """The snapshot and a machine for each child. A cell that has just begun is waited for, unless mid_cell."""
        child_paths = [new_paths(self._settings.state_dir, self._settings.run_dir) for _ in range(count)]
        deadline = asyncio.get_running_loop().time() + IDLE_WAIT_S
        async with self._registry.bus.subscribe() as events:
            while True:
                async with self._machines.lock(sandbox_id):
                    try:
                        with self._capacity.room(self._registry.get(sandbox_id).memory_mib, count=count):
                            return await self._snapshots.fork(sandbox_id, child_paths, strict=not mid_cell)
                    except CellRunsError as error:
                        log.info("Sandbox %s is forked after the cell that runs: %s", sandbox_id, error)
                await self._next_idle(sandbox_id, events, deadline)

    async def _bring_up(
        self,
        child: SandboxRecord,
        snapshot: Manifest,
        machine: SavedMachine | Exception,
        *,
        same_random: bool,
        call_id: str | None,
    ) -> Sandbox | KernelsError:
        sandbox = child.sandbox
        me = {"index": sandbox.index, "id": sandbox.id, "parent_id": sandbox.parent_id}
        # What waits to be run was asked of the parent. But a child that forked itself may become its parent again.
        extra: dict[str, Any] = {"drop_requests": True}
        if call_id is not None:
            extra = {"calls": {call_id: {"result": {"child": me}}}}
        try:
            if isinstance(machine, Exception):
                raise machine
            greeting = Greeting(
                marker=snapshot.wire_marker, identity=identity_of(sandbox), key=child.key, restored=True,
                keep_random=same_random, extra=extra,
            )  # fmt: skip
            connected = await ConnectedMachine.greet(machine, greeting)
            async with connected, self._machines.lock(sandbox.id):
                await self._machines.go_live(sandbox.id, connected, snapshot=snapshot)
                await self._snapshots.keep(sandbox.id, snapshot)
            return self._registry.get(sandbox.id)
        except Exception as error:
            # Also what nobody expected: its siblings run.
            if not isinstance(error, (KernelsError, VmRuntimeError, SnapshotError)):
                log.exception("Child %s of sandbox %s could not be made", sandbox.id, sandbox.parent_id)
            await self._lifecycle.forget(sandbox.id)
            return error if isinstance(error, KernelsError) else MachineFailedError(str(error))

    async def become(self, parent_id: str, child_id: str) -> Sandbox:
        """The parent continues in the state of its child, which waits in an offer; the child's sandbox is then removed.

        Finished first when cancelled. Errors: SandboxStateError (no such offer), MachineFailedError.
        """
        offer = self.child_results.get(child_id)
        if offer is None or offer.state != "offered" or offer.parent_id != parent_id:
            raise SandboxStateError(child_id, found="not waiting", wanted="a child that offers its state")
        async with self._machines.lock(parent_id), self._machines.lock(child_id):
            await uncancelled(self._become(parent_id, child_id, offer.call_id))
        return self._registry.get(parent_id)

    async def _become(self, parent_id: str, child_id: str, call_id: str) -> None:
        parent, live = self._machines.live.get(parent_id), self._machines.running(child_id)
        run = [each for each in (parent, live) if each and each.saved.machine.state is RunState.RUNNING]
        snapshot = None
        try:
            for each in run:
                await each.hold_clients()
            extra = {
                "calls": {call_id: {"result": {"became": parent_id}}},
                # What the child knows nothing of was asked of the state that its parent leaves.
                "aborted": parent.pending_requests.cells_but(live.pending_requests.cells) if parent is not None else [],
            }
            snapshot = (await self._snapshots.take(child_id, then=AfterCapture.STOP, heir_id=parent_id)).manifest
            connected = await self._machines.restore(
                parent_id, snapshot, keep_random=True, drop_requests=False, extra=extra
            )
            await self._snapshots.exchange(parent_id, connected, snapshot)
        except Exception as error:
            # The child has given up nothing, and the parent runs on, too, or sleeps on the child's state by now.
            await gather_all(*(each.resume() for each in run))
            if snapshot is not None and self._registry.get(parent_id).snapshot_id != snapshot.id:
                await self._snapshots.remove(snapshot.id)
            if isinstance(error, SnapshotError | VmRuntimeError | KernelsError):
                raise MachineFailedError(f"The child's state cannot be taken over; both go on: {error}") from error
            raise
        self._registry.adopt(child_id, parent_id)
        await self.child_results.adopt(child_id, parent_id)
        await self._lifecycle.forget(child_id)
        await self.child_results.forget(child_id=child_id)

    async def watch(self) -> None:
        """Records children that end without a result as crashed, and drops the results of parents that no longer
        exist."""
        while True:
            async with self._registry.bus.subscribe() as events:
                async for event in events:
                    try:
                        await self._on_event(event)
                    except (OSError, KernelsError):
                        log.exception("How %s ended could not be recorded", event.sandbox_id)
                if not events.overflowed:
                    return
            log.warning("Events came faster than they could be taken; some were missed")

    async def _on_event(self, event: SandboxEvent) -> None:
        failed = event.kind is EventKind.STATE and event.data.get("state") == SandboxState.FAILED
        if failed or event.kind is EventKind.KERNEL_DEAD:
            if event.sandbox_id in self._registry:
                sandbox = self._registry.get(event.sandbox_id)
                await self._crashed(sandbox, str(event.data.get("reason") or "The kernel died."))
        elif event.kind is EventKind.EXECUTION_STATE:
            self.child_results.notify(event.sandbox_id)
        elif event.kind is EventKind.DELETED:
            parent_id = event.data.get("parent_id")
            if isinstance(parent_id, str) and parent_id in self._registry:
                await self.child_results.record(
                    ChildResult(
                        child_id=event.sandbox_id, parent_id=parent_id, state="crashed",
                        message="The child was deleted before it ended.",
                    )
                )  # fmt: skip
            await self.child_results.forget(parent_id=event.sandbox_id)

    async def _crashed(self, sandbox: Sandbox, message: str) -> None:
        if sandbox.parent_id is not None:
            await self.child_results.record(
                ChildResult(child_id=sandbox.id, parent_id=sandbox.parent_id, state="crashed", message=message[:4000])
            )
