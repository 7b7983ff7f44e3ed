"""What all operations on sandboxes share: records, live machines, endpoints, locks, going live and going down.

Knows nothing of HTTP, and nothing of why an operation happens: service.py, naps.py, time_line.py, forks.py do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from kernels.boundary import CellBoundary
from kernels.capacity import Capacity
from kernels.endpoints import Endpoints
from kernels.errors import (
    CheckpointLimitError,
    MachineFailedError,
    SandboxStateError,
    SnapshotInUseError,
    StorageError,
    UnknownSnapshotError,
    UnsupportedError,
)
from kernels.events import EventBus
from kernels.index import Index, SandboxRecord
from kernels.launcher import Launcher, identity_of
from kernels.live import LiveSandbox
from kernels.models import CheckpointPolicy, EventKind, Sandbox, SandboxState
from kernels.registry import Registry
from kernels.session import CallHandler, Greeting
from kernels.settings import ServiceSettings
from kernels.warm import WarmMachine
from vm_runtime.drivers.base import Capability, Driver, Failure, MachinePlace
from vm_runtime.errors import VmRuntimeError
from vm_runtime.images.store import ImageStore
from vm_runtime.machine import Machine
from vm_runtime.saving.forking import Forked
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.threads import uncancelled
from vm_runtime.saving.values import Description, Taken, Then
from vm_runtime.snapshots import errors as snapshot_errors
from vm_runtime.snapshots.errors import ChainTooLongError, SnapshotError
from vm_runtime.snapshots.index import SnapshotEntry
from vm_runtime.snapshots.manifest import KernelInformation, Manifest
from vm_runtime.snapshots.store import Pin, SnapshotStore
from vm_runtime.spec import ImageFiles

log = logging.getLogger(__name__)

T = TypeVar("T")

# Of an error that is shown with a sandbox; some quote what a guest printed.
MAX_PROBLEM_CHARACTERS = 500

# The name of the checkpoint of a state that `goto` left.
LEFT_AT = "left at "


class Core:
    """One per service. `live`: the sandboxes that have a machine. `lock(id)` serialises what changes a sandbox.

    Hooks, set by the service: `on_idle(id)` after each cell, `on_request(id)` when a client of a sandbox that has
    no machine asks something, `on_machine_lost(id, reason)`, `on_call(id)` gives the handler of the guest's own calls.
    """

    def __init__(self, settings: ServiceSettings, driver: Driver, index: Index, store: SnapshotStore) -> None:
        self.settings = settings
        self.driver = driver
        self.store = store
        self.images = ImageStore(settings.state_dir / "images")
        self.capacity = Capacity(settings.max_sandboxes, clones_share_memory=driver.capabilities.clones_share_memory.ok)
        self.bus = EventBus()
        self.registry = Registry(index, self.bus)
        self.launcher = Launcher(
            settings,
            driver,
            store,
            image_files=self._image_files,
            on_flattening_failed=self.flattening_failed,
            capacity=self.capacity,
        )
        self.live: dict[str, LiveSandbox] = {}
        self.on_idle: Callable[[str], None] = lambda sandbox_id: None
        self.on_request: Callable[[str], None] = lambda sandbox_id: None
        self.on_machine_lost: Callable[[str, str], None] = lambda sandbox_id, reason: None
        self.on_call: Callable[[str], CallHandler | None] = lambda sandbox_id: None
        self.is_stopping = False
        self._endpoints: dict[str, Endpoints] = {}
        self._supervisors: dict[str, asyncio.Task[None]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._background: set[asyncio.Task[None]] = set()
        self._remover = ThreadPoolExecutor(max_workers=1, thread_name_prefix="remove")

    @asynccontextmanager
    async def lock(self, sandbox_id: str) -> AsyncIterator[None]:
        """For any id, known or not. Within it no snapshot of the sandbox is being stored, either."""
        async with self.cell_lock(sandbox_id):
            if (live := self.live.get(sandbox_id)) is not None:
                await live.saved.stored()
            yield

    def cell_lock(self, sandbox_id: str) -> asyncio.Lock:
        """The same for a checkpoint after a cell, which may be captured while the one before is being stored. It exists
        for as long as someone holds it or waits for it."""
        return self._locks.setdefault(sandbox_id, asyncio.Lock())

    @staticmethod
    def require(capability: Capability) -> None:
        """Errors: UnsupportedError, if the driver cannot do this."""
        if not capability.ok:
            raise UnsupportedError(capability.why_not, fix=capability.fix)

    def get(self, sandbox_id: str) -> Sandbox:
        """Errors: UnknownSandboxError."""
        return self.registry.record(sandbox_id).sandbox

    def running(self, sandbox_id: str) -> LiveSandbox:
        """The machine of a sandbox that has one. Errors: UnknownSandboxError, MachineFailedError, SandboxStateError."""
        sandbox = self.get(sandbox_id)
        live = self.live.get(sandbox_id)
        if live is not None:
            return live
        if sandbox.state is SandboxState.FAILED:
            raise MachineFailedError(f"Sandbox {sandbox_id} has failed: {sandbox.reason}")
        raise SandboxStateError(sandbox_id, found=sandbox.state, wanted=SandboxState.RUNNING)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something in the background until it is done or the service ends; what it raises is logged."""
        task = asyncio.create_task(self._logged(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        # A task that was cancelled before its first step never came to `work`.
        task.add_done_callback(lambda _: work.close())

    @staticmethod
    async def _logged(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("Work in the background failed")

    async def end_background(self) -> None:
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Endpoints

    async def open_endpoints(self, sandbox_id: str) -> Endpoints:
        """The sandbox's endpoints, opened on first need; they stay until `forget`."""
        endpoints = self._endpoints.get(sandbox_id)
        if endpoints is None:
            directory = self.settings.run_dir / "k" / sandbox_id.replace("-", "")[:12]
            endpoints = Endpoints(
                directory, lambda: self.on_request(sandbox_id), lambda: self.registry.touch(sandbox_id)
            )
            await endpoints.start()
            self._endpoints[sandbox_id] = endpoints
        return endpoints

    def has_request(self, sandbox_id: str) -> bool:
        """Whether a client has asked something that no kernel has been told of."""
        endpoints = self._endpoints.get(sandbox_id)
        return endpoints is not None and endpoints.has_request

    def connection_info(self, sandbox_id: str) -> dict[str, Any]:
        """Jupyter's connection file. Errors: UnknownSandboxError, SandboxStateError (it has no endpoints yet)."""
        record = self.registry.record(sandbox_id)
        endpoints = self._endpoints.get(sandbox_id)
        if endpoints is None:
            raise SandboxStateError(sandbox_id, found=record.sandbox.state, wanted=SandboxState.RUNNING)
        return endpoints.connection_info(record.key)

    # Going live and down

    async def go_live(
        self,
        sandbox_id: str,
        warm: WarmMachine,
        *,
        configure: bool = False,
        quiet: bool = False,
        snapshot: Manifest | None = None,
    ) -> LiveSandbox:
        """Makes a machine the sandbox's own. Owns it from the call on: it ends if anything fails.

        configure: tell the guest environment, directory and identity (a machine that was made for no one yet).
        quiet: its kernel keeps what it has for clients until those that are here have reached it (`restore_beside`).
        snapshot: the machine has just been restored from it.
        Errors: MachineFailedError, VmRuntimeError.
        """
        try:
            live = LiveSandbox(
                warm,
                endpoints=await self.open_endpoints(sandbox_id),
                notices=_Notices(self, sandbox_id),
                restart_limit=self.settings.restart_limit,
                restart_window_s=self.settings.restart_window_s,
                is_dead=self.get(sandbox_id).execution_state == "dead",
            )
            if snapshot is not None and snapshot.kernel is not None:
                live.cell = snapshot.kernel.execution_count
            live.session.serve_calls(self.on_call(sandbox_id))
            record = self.registry.record(sandbox_id)
            if configure:
                await live.configure(env=record.env, cwd=record.cwd, identity=self.identity(record))
            self.registry.update(
                sandbox_id,
                machine_id=live.saved.machine.id,
                key=live.key,
                marker=live.session.next_marker,
                resumes=False,
            )
            self.registry.move(sandbox_id, SandboxState.RUNNING, execution_state=live.execution_state)
        except BaseException:
            await warm.close()
            raise
        self.live[sandbox_id] = live
        self._supervisors[sandbox_id] = asyncio.create_task(live.run())
        if quiet:
            await uncancelled(live.take_back())
        else:
            live.start()
        return live

    def identity(self, record: SandboxRecord) -> dict[str, str]:
        sandbox = record.sandbox
        return identity_of(sandbox.id, parent_id=sandbox.parent_id, index=sandbox.index, name=sandbox.name)

    async def restore(
        self,
        sandbox_id: str,
        snapshot: Manifest,
        *,
        keep_random: bool,
        drop_requests: bool,
        extra: dict[str, Any] | None = None,
    ) -> LiveSandbox:
        """The sandbox, which has no machine, in the state of a snapshot. drop_requests, errors: as `restore_beside`."""
        warm = await self.restore_beside(
            sandbox_id, snapshot, keep_random=keep_random, drop_requests=drop_requests, extra=extra
        )
        return await self.go_live(sandbox_id, warm, quiet=True, snapshot=snapshot)

    async def restore_beside(
        self,
        sandbox_id: str,
        snapshot: Manifest,
        *,
        keep_random: bool,
        drop_requests: bool,
        extra: dict[str, Any] | None = None,
        on_running: Callable[[Machine], None] = lambda machine: None,
    ) -> WarmMachine:
        """A machine in the state of a snapshot that knows itself as this sandbox, for `go_live`, quiet; the one that
        the sandbox has stays what it is.

        drop_requests: cells that waited in the kernel to be run are not, since they ran after the snapshot, or were
        asked of the state that is left; else they run now, as they would have. on_running, errors: as
        `Launcher.restore`.
        """
        record = self.registry.record(sandbox_id)
        greeting = Greeting(
            marker=snapshot.wire_marker,
            identity=self.identity(record),
            key=record.key,
            restored=True,
            keep_random=keep_random,
            extra={**(extra or {}), "drop_requests": drop_requests, "quiet": True},
        )
        return await self.launcher.restore(snapshot, greeting, on_running=on_running)

    async def take_down(self, sandbox_id: str, why: str) -> None:
        """Ends the machine, if there is one. The record stays as it is. why: a word of `kernels.errors.LEFT`."""
        await self._stop_supervising(sandbox_id)
        live = self.live.pop(sandbox_id, None)
        if live is not None:
            await live.close("stopping" if self.is_stopping else why)

    async def detach(self, sandbox_id: str) -> None:
        """Lets go of the machine, which runs on; a later gateway finds it again."""
        await self._stop_supervising(sandbox_id)
        live = self.live.pop(sandbox_id, None)
        if live is not None:
            await live.detach()

    async def _stop_supervising(self, sandbox_id: str) -> None:
        supervisor = self._supervisors.pop(sandbox_id, None)
        if supervisor is not None and supervisor is not asyncio.current_task():
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)

    async def end(self, sandbox_id: str) -> None:
        """Ends a sandbox for good, when nobody else changes it. Unknown ids are fine."""
        async with self.lock(sandbox_id):
            await self.forget(sandbox_id)

    async def forget(self, sandbox_id: str) -> None:
        """The same within its lock: machine, endpoints, record, and its claim on snapshots."""
        await self.take_down(sandbox_id, "deleted")
        endpoints = self._endpoints.pop(sandbox_id, None)
        if endpoints is not None:
            await endpoints.close()
        if sandbox_id in self.registry:
            stood_on = self.get(sandbox_id).snapshot_id
            self.registry.remove(sandbox_id)
            await self.removing(self._drop_snapshots, sandbox_id, stood_on)

    async def removing(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what removes from the store, in a thread of its own: snapshots that are being taken need the others."""
        return await asyncio.get_running_loop().run_in_executor(self._remover, function, *arguments)

    def _drop_snapshots(self, sandbox_id: str, stood_on: str | None) -> None:
        """All that only this sandbox needed; what a child still stands on goes with the child (`stood_on`)."""
        self.store.unpin(pin_name(sandbox_id))
        doomed = [entry.id for entry in self.store.ls(sandbox_id=sandbox_id) if is_automatic(entry)]
        if stood_on is not None:
            with contextlib.suppress(SnapshotError):
                manifest = self.store.get(stood_on)
                if is_automatic(manifest) and manifest.sandbox_id not in (None, sandbox_id, *self.registry.ids()):
                    doomed.append(manifest.id)
        try:
            self.store.rm_many(doomed)
        except SnapshotError as error:  # the sandbox has ended all the same
            log.error("The checkpoints of sandbox %s could not be removed: %s", sandbox_id, error)

    async def drop_snapshots_of_strangers(self) -> None:
        """What is kept for sandboxes that are not there: their gateway was killed while it forgot them."""
        for user in await asyncio.to_thread(self.store.pin_users):
            sandbox_id = user.removeprefix("sandbox-")
            if sandbox_id != user and sandbox_id not in self.registry:
                await self.removing(self._drop_snapshots, sandbox_id, None)

    def close(self) -> None:
        """Ends the thread of `removing`."""
        self._remover.shutdown(wait=False)

    async def until_clients_have_all(self) -> None:
        """Until the clients of all endpoints have read what their kernels have sent, those that read at all."""
        await asyncio.gather(*(each.until_read() for each in self._endpoints.values()))

    async def close_endpoints(self) -> None:
        endpoints = list(self._endpoints.values())
        self._endpoints.clear()
        await asyncio.gather(*(each.close() for each in endpoints), return_exceptions=True)

    # Snapshots

    def description(self, sandbox_id: str, *, name: str | None) -> Description:
        """What a snapshot of this sandbox says of itself."""
        record = self.registry.record(sandbox_id)
        sandbox = record.sandbox
        live = self.running(sandbox_id)
        return Description(
            owner=sandbox.owner,
            name=name,
            sandbox_id=sandbox_id,
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

    async def take(
        self,
        sandbox_id: str,
        *,
        then: Then,
        name: str | None = None,
        strict: bool = False,
        before_resume: Callable[[], Awaitable[object]] | None = None,
        captured: Callable[[], Awaitable[object]] | None = None,
        heir_id: str | None = None,
    ) -> Taken:
        """A snapshot of a running sandbox, kept for it from now on. strict, before_resume, captured: as of
        `CellBoundary`. heir_id: the sandbox whose snapshot it is to be, if not its own; the caller keeps it then.

        Errors: CheckpointLimitError, SnapshotError, VmRuntimeError, CellRunsError (if strict); the machine runs on.
        """
        self.require(self.driver.capabilities.snapshot)
        live = self.running(sandbox_id)
        description = replace(self.description(sandbox_id, name=name), sandbox_id=heir_id or sandbox_id)
        boundary = self._boundary(
            live, sandbox_id, then=then, strict=strict, before_resume=before_resume, captured=captured
        )
        with self._noted(sandbox_id):
            return await live.saved.take(
                description, then=then, hooks=[boundary, *([_Kept(self, sandbox_id)] if heir_id is None else ())]
            )

    async def fork(self, sandbox_id: str, places: Sequence[MachinePlace], *, strict: bool) -> Forked:
        """The same with a machine in its state at each place, for `WarmMachine.greet`. Errors: as `take`."""
        self.require(self.driver.capabilities.snapshot)
        live = self.running(sandbox_id)
        description = self.description(sandbox_id, name=None)
        hooks = [self._boundary(live, sandbox_id, then=Then.RESUME, strict=strict), _Kept(self, sandbox_id)]
        with self._noted(sandbox_id):
            return await self.launcher.saver.fork(live.saved, description, places=places, hooks=hooks)

    @contextlib.contextmanager
    def _noted(self, sandbox_id: str) -> Iterator[None]:
        """Shows users why a snapshot of a sandbox could not be taken, until one could."""
        try:
            yield
        except (SnapshotError, VmRuntimeError) as error:
            self.registry.checkpoint_problem(sandbox_id, str(error)[:MAX_PROBLEM_CHARACTERS])
            if isinstance(error, ChainTooLongError):
                raise CheckpointLimitError(str(error)) from error
            raise
        self.registry.checkpoint_problem(sandbox_id, None)

    def flattening_failed(self, failure: Failure) -> None:
        """Called by the saver for each attempt."""
        if failure.sandbox_id is not None and failure.sandbox_id in self.registry:
            self.registry.notify(failure.sandbox_id, EventKind.FLATTENING_FAILED, failure.reason)

    def _boundary(
        self,
        live: LiveSandbox,
        sandbox_id: str,
        *,
        then: Then,
        strict: bool,
        before_resume: Callable[[], Awaitable[object]] | None = None,
        captured: Callable[[], Awaitable[object]] | None = None,
    ) -> CellBoundary:
        """No snapshot of a sandbox is taken without one: this is the only place that makes them."""
        waits = self.get(sandbox_id).checkpoints == CheckpointPolicy.CELL
        return CellBoundary(live, then=then, strict=strict, waits=waits, before_resume=before_resume, captured=captured)

    async def keep(self, sandbox_id: str, snapshot: Manifest) -> None:
        """From now on the sandbox wakes from this snapshot, so it must stay."""
        await asyncio.to_thread(self.store.pin, pin_name(sandbox_id), Pin(snapshots=(snapshot.id,)))
        self.registry.change(sandbox_id, snapshot_id=snapshot.id)

    def _image_files(self, digest: str) -> ImageFiles:
        return self.images.get(digest).files


def is_automatic(snapshot: Manifest | SnapshotEntry) -> bool:
    """Whether nobody asked for this checkpoint by name: it goes when there are too many, or with its sandbox."""
    return snapshot.name is None or snapshot.name.startswith(LEFT_AT)


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """What the snapshot store raises within, as errors of this package."""
    try:
        yield
    except snapshot_errors.SnapshotInUseError as error:
        raise SnapshotInUseError(str(error)) from error
    except snapshot_errors.SnapshotRequestError as error:
        raise UnknownSnapshotError(str(error)) from error
    except SnapshotError as error:
        raise StorageError(str(error)) from error


def pin_name(sandbox_id: str) -> str:
    """Under which name the snapshot store keeps what a sandbox needs."""
    return f"sandbox-{sandbox_id}"


class _Kept(SnapshotHooks):
    """The sandbox wakes from its last snapshot."""

    def __init__(self, core: Core, sandbox_id: str) -> None:
        self._core = core
        self._sandbox_id = sandbox_id

    async def stored(self, manifest: Manifest) -> None:
        await self._core.keep(self._sandbox_id, manifest)


class _Notices:
    """Turns what a live sandbox reports into changes of the registry."""

    def __init__(self, core: Core, sandbox_id: str) -> None:
        self._core = core
        self._registry = core.registry
        self._sandbox_id = sandbox_id

    def execution_state(self, state: str) -> None:
        was_busy = self._sandbox_id in self._registry and self._core.get(self._sandbox_id).execution_state == "busy"
        self._registry.execution_state(self._sandbox_id, state)
        if was_busy and state == "idle":
            self._core.on_idle(self._sandbox_id)

    def kernel_restarting(self, reason: str) -> None:
        self._registry.execution_state(self._sandbox_id, "restarting")
        self._registry.crash(self._sandbox_id, reason)

    def kernel_restarted(self) -> None:
        self._registry.notify(self._sandbox_id, EventKind.KERNEL_RESTARTED)

    def kernel_dead(self, reason: str) -> None:
        self._registry.execution_state(self._sandbox_id, "dead")
        self._registry.notify(self._sandbox_id, EventKind.KERNEL_DEAD, reason)

    def unresponsive(self, since: datetime | None) -> None:
        self._registry.unresponsive(self._sandbox_id, since)
        live = self._core.live.get(self._sandbox_id)
        if since is None and live is not None:
            self._registry.execution_state(self._sandbox_id, live.execution_state)

    async def machine_dead(self, reason: str) -> None:
        async with self._core.lock(self._sandbox_id):
            if self._sandbox_id in self._core.live:
                await self._core.take_down(self._sandbox_id, "died")
                self._core.on_machine_lost(self._sandbox_id, reason)


def utc_now() -> datetime:
    return datetime.now(UTC)
