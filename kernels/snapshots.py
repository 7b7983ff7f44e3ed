"""Snapshots of sandboxes: taken between two cells, kept while a sandbox needs them, removed with it.

The only place that takes them of live sandboxes. Knows nothing of why: lifecycle.py, checkpoints.py and forks.py do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from kernels import errors
from kernels.cell_barrier import CellBarrier
from kernels.connected import ConnectedMachine
from kernels.live import LiveSandbox
from kernels.machines import Machines
from kernels.models import Checkpoint, CheckpointPolicy, SandboxState, Snapshot
from kernels.registry import Registry
from vm_runtime.drivers.base import Capability, MachinePaths
from vm_runtime.errors import VmRuntimeError
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.saver import Saver
from vm_runtime.saving.threads import gather_all, succeeded, uncancelled
from vm_runtime.saving.values import AfterCapture, Description, Taken
from vm_runtime.snapshots.errors import ChainTooLongError, SnapshotError, SnapshotInUseError, SnapshotRequestError
from vm_runtime.snapshots.index import SnapshotEntry
from vm_runtime.snapshots.manifest import KernelInformation, Manifest
from vm_runtime.snapshots.store import Pin, SnapshotStore

log = logging.getLogger(__name__)

T = TypeVar("T")

# Of an error that is shown with a sandbox; some quote what a guest printed.
MAX_PROBLEM_CHARACTERS = 500
# The name of the checkpoint of a state that `goto` left.
LEFT_AT = "left at "


@contextmanager
def store_errors() -> Iterator[None]:
    """What the snapshot store raises within, as errors of this package."""
    try:
        yield
    except SnapshotInUseError as error:
        raise errors.SnapshotInUseError(str(error)) from error
    except SnapshotRequestError as error:
        raise errors.UnknownSnapshotError(str(error)) from error
    except SnapshotError as error:
        raise errors.StorageError(str(error)) from error


def is_automatic(snapshot: Manifest | SnapshotEntry) -> bool:
    """Whether nobody asked for this checkpoint by name: it goes when there are too many, or with its sandbox."""
    return snapshot.name is None or snapshot.name.startswith(LEFT_AT)


def pin_name(sandbox_id: str) -> str:
    """Under which name the snapshot store keeps what a sandbox needs."""
    return f"sandbox-{sandbox_id}"


def cell_of(entry: SnapshotEntry) -> int | None:
    """The cell after which it was taken; None if one was running."""
    return entry.execution_count if entry.kernel_state == "idle" else None


def checkpoint_of(entry: SnapshotEntry) -> Checkpoint:
    return Checkpoint(
        id=entry.id, name=entry.name, cell=cell_of(entry), created_at=entry.created_at, bytes=entry.added_bytes
    )


def snapshot_of(entry: SnapshotEntry) -> Snapshot:
    """What users see of a snapshot."""
    return Snapshot(
        **asdict(checkpoint_of(entry)), owner=entry.owner, sandbox_id=entry.sandbox_id, template=entry.template
    )


@dataclass(eq=False)
class Snapshots:
    """Of one service. can_snapshot: the driver's capability. `close()` at the end."""

    _store: SnapshotStore
    _saver: Saver
    _registry: Registry
    _machines: Machines
    _can_snapshot: Capability
    _remover: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="remove"), init=False
    )

    def close(self) -> None:
        """Ends the thread of `removing`."""
        self._remover.shutdown(wait=False)

    # Taking

    async def take(
        self,
        sandbox_id: str,
        *,
        then: AfterCapture,
        name: str | None = None,
        strict: bool = False,
        before_resume: Callable[[], Awaitable[object]] | None = None,
        captured: Callable[[], Awaitable[object]] | None = None,
        heir_id: str | None = None,
    ) -> Taken:
        """A snapshot of a running sandbox, kept for it from now on. strict, before_resume, captured: as of
        `CellBarrier`. heir_id: the sandbox whose snapshot it is to be, if not its own; the caller keeps it then.

        Errors: UnsupportedError, CheckpointLimitError, SnapshotError, VmRuntimeError, CellRunsError (if strict); the
        machine runs on.
        """
        with self._taking(sandbox_id) as live:
            description = replace(self.description(live, name=name), sandbox_id=heir_id or sandbox_id)
            barrier = CellBarrier(
                live,
                then=then,
                strict=strict,
                waits=self._waits(sandbox_id),
                before_resume=before_resume,
                captured=captured,
            )
            kept = [_Kept(self, sandbox_id)] if heir_id is None else []
            return await live.saved.take(description, then=then, hooks=[barrier, *kept])

    async def fork(
        self, sandbox_id: str, child_paths: Sequence[MachinePaths], *, strict: bool
    ) -> tuple[Manifest, Sequence[SavedMachine | Exception]]:
        """The state of a sandbox, asleep or not, and at each place a machine in it, for `ConnectedMachine.greet`, or
        why there is none. Errors: as `take`."""
        sandbox = self._registry.get(sandbox_id)
        if sandbox.state is SandboxState.ASLEEP:
            snapshot = await asyncio.to_thread(self._store.get, sandbox.snapshot_id or "")
            return snapshot, await self._restored(snapshot, child_paths)
        async with AsyncExitStack() as on_error:
            with self._taking(sandbox_id) as live:
                barrier = CellBarrier(live, then=AfterCapture.RESUME, strict=strict, waits=self._waits(sandbox_id))
                description = self.description(live, name=None)
                hooks = [barrier, _Kept(self, sandbox_id)]
                forked = await self._saver.fork(live.saved, description, child_paths=child_paths, hooks=hooks)
                for child in forked.children:
                    if isinstance(child, SavedMachine):
                        on_error.push_async_callback(child.kill)
            on_error.pop_all()
        return forked.taken.manifest, forked.children

    async def _restored(
        self, snapshot: Manifest, child_paths: Sequence[MachinePaths]
    ) -> Sequence[SavedMachine | Exception]:
        restoring = [asyncio.ensure_future(self._saver.restore(snapshot, paths=paths)) for paths in child_paths]
        try:
            machines = await asyncio.gather(*restoring, return_exceptions=True)
            return [_no_cancel(machine) for machine in machines]
        except BaseException:
            # Cancelled, when all of them have ended.
            await gather_all(*(each.result().kill() for each in restoring if succeeded(each)))
            raise

    def description(self, live: LiveSandbox, *, name: str | None) -> Description:
        """What a snapshot of this sandbox records of it."""
        sandbox = self._registry.get(live.id)
        return Description(
            owner=sandbox.owner,
            name=name,
            sandbox_id=live.id,
            template=sandbox.template,
            image_digest=live.saved.machine.spec.image.digest,
            kernel=KernelInformation(
                name=sandbox.template,
                language="python",
                state=sandbox.execution_state,
                execution_count=live.cell,
            ),
            wire_marker=live.session.next_marker,
        )

    def _waits(self, sandbox_id: str) -> bool:
        return self._registry.get(sandbox_id).checkpoints == CheckpointPolicy.CELL

    @contextmanager
    def _taking(self, sandbox_id: str) -> Iterator[LiveSandbox]:
        """Shows users why a snapshot of a sandbox could not be taken, until one could."""
        if not self._can_snapshot.ok:
            raise errors.UnsupportedError(self._can_snapshot.why_not, fix=self._can_snapshot.fix)
        live = self._machines.running(sandbox_id)
        try:
            yield live
        except (SnapshotError, VmRuntimeError) as error:
            self._registry.checkpoint_problem(sandbox_id, str(error)[:MAX_PROBLEM_CHARACTERS])
            if isinstance(error, ChainTooLongError):
                raise errors.CheckpointLimitError(str(error)) from error
            raise
        self._registry.checkpoint_problem(sandbox_id, None)

    # Keeping and removing

    async def stored(self, *, owner: str | None) -> list[Snapshot]:
        """All in the store, oldest first. Errors: StorageError."""
        with store_errors():
            return [snapshot_of(entry) for entry in await asyncio.to_thread(self._store.ls, owner=owner)]

    async def keep(self, sandbox_id: str, snapshot: Manifest) -> None:
        """From now on the sandbox wakes from this snapshot, so it must stay. Finished first when cancelled."""
        await uncancelled(self._keep(sandbox_id, snapshot))

    async def _keep(self, sandbox_id: str, snapshot: Manifest) -> None:
        await asyncio.to_thread(self._store.pin, pin_name(sandbox_id), Pin(snapshots=(snapshot.id,)))
        self._registry.change(sandbox_id, snapshot_id=snapshot.id)

    async def exchange(self, sandbox_id: str, connected: ConnectedMachine, snapshot: Manifest) -> None:
        """`Machines.exchange`; the sandbox wakes from the snapshot from now on. Where it cannot be kept, nothing is
        given up."""
        await uncancelled(self._exchange(sandbox_id, connected, snapshot))

    async def _exchange(self, sandbox_id: str, connected: ConnectedMachine, snapshot: Manifest) -> None:
        async with connected:
            await self.keep(sandbox_id, snapshot)
            await self._machines.exchange(sandbox_id, connected, snapshot)

    async def removing(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what removes from the store, in a thread of its own: snapshots that are being taken need the others."""
        return await asyncio.get_running_loop().run_in_executor(self._remover, function, *arguments)

    async def remove(self, snapshot_id: str) -> None:
        """Errors: UnknownSnapshotError, SnapshotInUseError, StorageError."""
        with store_errors():
            await self.removing(self._store.rm, snapshot_id)

    async def drop(self, sandbox_id: str, *, stood_on: str | None) -> None:
        """Removes all that only this sandbox needed, which no longer exists; what a child still stands on goes with the
        child (`stood_on`)."""
        await self.removing(self._drop, sandbox_id, stood_on)

    def _drop(self, sandbox_id: str, stood_on: str | None) -> None:
        self._store.unpin(pin_name(sandbox_id))
        doomed = [entry.id for entry in self._store.ls(sandbox_id=sandbox_id) if is_automatic(entry)]
        if stood_on is not None:
            with suppress(SnapshotError):
                manifest = self._store.get(stood_on)
                if is_automatic(manifest) and manifest.sandbox_id not in (None, sandbox_id, *self._registry.ids()):
                    doomed.append(manifest.id)
        try:
            self._store.rm_many(doomed)
        except SnapshotError as error:  # the sandbox has ended all the same
            log.error("The checkpoints of sandbox %s could not be removed: %s", sandbox_id, error)

    async def drop_orphans(self) -> None:
        """Removes what is kept for sandboxes that do not exist: their gateway was killed while it forgot them."""
        for user in await asyncio.to_thread(self._store.pin_users):
            sandbox_id = user.removeprefix("sandbox-")
            if sandbox_id != user and sandbox_id not in self._registry:
                await self.drop(sandbox_id, stood_on=None)


class _Kept(SnapshotHooks):
    """The sandbox wakes from its last snapshot."""

    def __init__(self, snapshots: Snapshots, sandbox_id: str) -> None:
        self._snapshots = snapshots
        self._sandbox_id = sandbox_id

    async def stored(self, manifest: Manifest) -> None:
        await self._snapshots.keep(self._sandbox_id, manifest)


def _no_cancel(machine: SavedMachine | BaseException) -> SavedMachine | Exception:
    if isinstance(machine, BaseException) and not isinstance(machine, Exception):
        raise machine
    return machine
