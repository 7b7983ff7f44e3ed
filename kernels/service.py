"""Sandboxes: all that the gateway can do with them, each operation delegated to the module that knows it.

The one class that the gateway talks to. Knows nothing of HTTP; what a machine is, is the driver's business.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Self

from kernels.core import Core, store_errors, utc_now
from kernels.errors import (
    KernelsError,
    LimitError,
    MachineFailedError,
    MachineUnresponsiveError,
    RequestError,
    SandboxExistsError,
    SandboxStateError,
    UnknownTemplateError,
)
from kernels.events import EventQueue
from kernels.exec import SandboxCommands
from kernels.files import SandboxFiles
from kernels.forks import Forks
from kernels.guest_calls import GuestCalls
from kernels.index import Index, SandboxRecord
from kernels.kernelspecs import kernelspec_of
from kernels.launcher import new_key
from kernels.models import (
    Checkpoint,
    CheckpointPolicy,
    CreateSandbox,
    Kernelspec,
    Sandbox,
    SandboxState,
    SandboxUsage,
    Snapshot,
)
from kernels.naps import Naps
from kernels.outcomes import Outcomes
from kernels.recovery import find_again
from kernels.session import GuestSession
from kernels.settings import ServiceSettings
from kernels.templates import Progress
from kernels.time_line import TimeLine, snapshot_of, timer_minutes
from kernels.warm import new_sandbox_id
from vm_runtime.drivers.base import Driver, FlatteningStatus
from vm_runtime.errors import VmRuntimeError
from vm_runtime.images.store import Image
from vm_runtime.snapshots.errors import BrokenSnapshotError, SnapshotError
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.spec import MachineShape

log = logging.getLogger(__name__)

# Linux, the agent and a kernel with nothing imported need 150 MiB; below this a template would not come up.
MIN_MEMORY_MIB = 256


class SandboxService:
    """`async with SandboxService(settings, driver) as service:`. All methods belong to one event loop.

    On entry everything that an earlier gateway left is found again. On exit everything sleeps, or ends, as
    `ServiceSettings.stop_means_sleep` says; `say` is told how far that is.
    """

    def __init__(self, settings: ServiceSettings, driver: Driver, *, say: Progress = log.info) -> None:
        self._settings = settings
        self._driver = driver
        self._say = say
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            index = Index(self._settings.state_dir / "index.sqlite")
            stack.callback(index.close)
            with store_errors():
                store = await asyncio.to_thread(SnapshotStore, self._settings.state_dir / "snapshots")
                stack.callback(store.close)
                try:
                    await asyncio.to_thread(store.gc)
                except BrokenSnapshotError as error:
                    log.error("What an earlier gateway left in the store is not removed: %s", error)
            core = self._core = Core(self._settings, self._driver, index, store)
            naps = self._naps = Naps(core)
            time_line = self._time_line = TimeLine(core)
            core.on_idle = time_line.on_idle
            core.on_request = naps.on_request
            core.on_machine_lost = naps.on_machine_lost
            outcomes = Outcomes(self._settings.state_dir / "outcomes")
            await asyncio.to_thread(outcomes.load)
            forks = self._forks = Forks(core, outcomes)
            core.on_call = GuestCalls(core, naps, time_line, forks).handler_for
            stack.callback(core.close)
            core.registry.load()
            await stack.enter_async_context(core.launcher.running())
            stack.push_async_callback(core.close_endpoints)
            stack.push_async_callback(self.stop)
            resuming = await find_again(core, naps)
            core.spawn(naps.resume_all(resuming))
            for watch in (naps.watch(), time_line.watch(), forks.watch()):
                core.spawn(watch)
            stack.callback(core.bus.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def stop(self) -> None:
        """Puts everything to sleep, or ends it; what could not sleep in time runs on. When this returns, clients of
        endpoints have all that their kernels had sent. Called by who serves such clients, before `__aexit__`, which
        otherwise does it. Twice is harmless."""
        core = self._core
        core.is_stopping = True
        await core.end_background()
        if self._settings.stop_means_sleep:
            awake = await self._naps.sleep_all(limit_s=self._settings.stop_limit_s, progress=self._say)
            for sandbox_id in awake:
                self._say(f"Sandbox {sandbox_id} could not be put to sleep; it runs on, and the next start finds it.")
            await asyncio.gather(*(core.detach(sandbox_id) for sandbox_id in awake))
            core.registry.flush()
            await core.until_clients_have_all()
        else:
            ids = [record.sandbox.id for record in core.registry.records()]
            await asyncio.gather(*(core.forget(sandbox_id) for sandbox_id in ids), return_exceptions=True)

    async def until_clients_have_all(self) -> None:
        """Until the clients of endpoints have read what their kernels have sent, those that read at all."""
        await self._core.until_clients_have_all()

    # Templates

    def kernelspecs(self) -> dict[str, Kernelspec]:
        """One per image, by name."""
        return {name: kernelspec_of(image, self._driver) for name, image in self._core.images.current().items()}

    async def prepare(self, *, progress: Progress) -> None:
        """Builds the templates that new kernels of the default shape need, and starts to keep warm machines of them.

        Errors: TemplateError.
        """
        launcher = self._core.launcher
        for name, image in self._core.images.current().items():
            shape = self._shape(image, CreateSandbox(template=name))
            launcher.pool.keep(await launcher.templates.ensure(image, shape, progress=progress))
        await launcher.templates.remove_stale(self._core.images.current().values())

    def pool_ready(self) -> int:
        """Warm machines ready to be given out."""
        return self._core.launcher.pool.ready_count()

    # Sandboxes

    def get(self, sandbox_id: str) -> Sandbox:
        """Errors: UnknownSandboxError."""
        return self._core.get(sandbox_id)

    def list(self) -> list[Sandbox]:
        """All sandboxes, oldest first."""
        return [record.sandbox for record in self._core.registry.records()]

    async def create(self, request: CreateSandbox) -> Sandbox:
        """A new sandbox with a kernel that can be talked to, or the one that was left behind with this notebook or id.

        Errors: RequestError (unknown template, id taken, beyond a maximum), CapacityError, TemplateError,
        MachineFailedError; nothing is left behind then.
        """
        snapshot = await asyncio.to_thread(self._resolve, request.snapshot) if request.snapshot is not None else None
        if snapshot is None:
            image = self._image(request.template)
            request = replace(request, template=image.manifest.recipe.name)
            shape = self._shape(image, request)
        else:
            image, request, shape = None, replace(request, template=snapshot.template), _shape_of(snapshot, request)
        sandbox_id = _checked_id(request.kernel_id)
        left = self._left_behind(request, sandbox_id)
        if left is not None:
            try:
                return await self._naps.wake(left.id)
            except MachineFailedError as error:
                if left.id == sandbox_id:
                    raise
                # It stays for its owner to look at; the notebook gets a new one.
                log.warning("The kernel that was left with %s cannot be woken: %s", request.notebook, error)
                self._core.registry.change(left.id, notebook=None)
        core, settings = self._core, self._settings
        if sandbox_id in core.registry:
            raise SandboxExistsError(f"There is a sandbox with the id {sandbox_id} already.")
        checkpoints = request.checkpoints if request.checkpoints is not None else self._default_checkpoints()
        timer_minutes(checkpoints)
        core.capacity.admit(len(core.registry))
        idle_s = request.idle_timeout_s
        if idle_s is None:
            idle_s = settings.idle_timeouts_s.get(request.template, settings.idle_timeout_s)
        now = utc_now()
        sandbox = Sandbox(
            id=sandbox_id, state=SandboxState.CREATING, driver=self._driver.name, template=request.template,
            parent_id=None, name=request.name, owner=request.owner, created_at=now, last_activity=now,
            execution_state="starting", reason=None,
            memory_mib=shape.memory_mib, vcpus=shape.vcpus, disk_mib=shape.disk_mib, notebook=request.notebook,
            idle_timeout_s=idle_s, max_lifetime_s=request.max_lifetime_s, checkpoints=checkpoints,
            on_timeout=request.on_timeout, tags=request.tags,
        )  # fmt: skip
        env = {**(image.manifest.recipe.environment if image is not None else {}), **request.env}
        core.registry.add(
            SandboxRecord(sandbox=sandbox, machine_id="", key=new_key(), marker="", env=env, cwd=request.cwd)
        )
        try:
            async with core.lock(sandbox_id):
                if snapshot is not None:
                    await self._bring_back(sandbox_id, snapshot)
                else:
                    assert image is not None
                    await self._bring_up(sandbox_id, image, shape)
        except BaseException as error:
            await core.forget(sandbox_id)
            if isinstance(error, VmRuntimeError | SnapshotError):
                raise MachineFailedError(str(error)) from error
            raise
        return self.get(sandbox_id)

    def _default_checkpoints(self) -> str:
        policy, capabilities = self._settings.checkpoints, self._driver.capabilities
        can = capabilities.snapshot.ok and (policy != CheckpointPolicy.CELL or capabilities.checkpoint_each_cell.ok)
        return policy if can else CheckpointPolicy.OFF

    async def _bring_back(self, sandbox_id: str, snapshot: Manifest) -> None:
        live = await self._core.restore(sandbox_id, snapshot, keep_random=False, drop_requests=True)
        record = self._core.registry.record(sandbox_id)
        # It falls back on it until it has a checkpoint of its own.
        await self._core.keep(sandbox_id, snapshot)
        if record.env or record.cwd is not None:
            await live.configure(env=record.env, cwd=record.cwd, identity=self._core.identity(record))

    async def _bring_up(self, sandbox_id: str, image: Image, shape: MachineShape) -> None:
        core = self._core
        template = await core.launcher.templates.ensure(image, shape, progress=log.info)
        warm = await core.launcher.launch(template, core.identity(core.registry.record(sandbox_id)))
        await core.go_live(sandbox_id, warm, configure=True)

    def _resolve(self, snapshot: str) -> Manifest:
        store = self._core.store
        with store_errors():
            return store.get(store.resolve(snapshot))

    def _left_behind(self, request: CreateSandbox, sandbox_id: str) -> Sandbox | None:
        """The sleeping sandbox that a Jupyter client deleted and now asks for again, by its id or its notebook."""
        for record in self._core.registry.records():
            sandbox = record.sandbox
            same = sandbox.id == sandbox_id or (request.notebook is not None and sandbox.notebook == request.notebook)
            left = sandbox.released or sandbox.state is SandboxState.ASLEEP
            if left and same and (sandbox.owner, sandbox.template) == (request.owner, request.template):
                return sandbox
        return None

    async def release(self, sandbox_id: str) -> None:
        """A Jupyter client deletes its kernel: the sandbox is kept asleep for the next who asks for it, or ended, as
        `ServiceSettings.delete_means_sleep` says. One that cannot sleep runs on. Errors: UnknownSandboxError."""
        sandbox = self.get(sandbox_id)
        keep = self._settings.delete_means_sleep and sandbox.notebook is not None
        if not keep or sandbox.state not in (SandboxState.RUNNING, SandboxState.PAUSED, SandboxState.ASLEEP):
            await self.delete(sandbox_id)
            return
        try:
            if sandbox.state is SandboxState.PAUSED:
                await self._naps.resume(sandbox_id)
            await self._naps.sleep(sandbox_id)
        except MachineFailedError as error:
            log.warning("Sandbox %s was left by its client: %s", sandbox_id, error)
        self._core.registry.change(sandbox_id, released=True)

    async def delete(self, sandbox_id: str, *, descendants: bool = False) -> None:
        """Ends a sandbox for good. descendants: and all that came from it by forks, those that are being made
        included. Errors: UnknownSandboxError."""
        self.get(sandbox_id)
        await self._core.end(sandbox_id)
        while descendants and (left := self._core.registry.lineage.descendants(sandbox_id)):
            await asyncio.gather(*(self._core.end(each) for each in left))

    async def interrupt(self, sandbox_id: str) -> None:
        """Interrupts the cell that runs; where none does, also for want of a machine, nothing happens. Errors:
        UnknownSandboxError, SandboxStateError, MachineFailedError."""
        sandbox = self.get(sandbox_id)
        if sandbox.state is SandboxState.ASLEEP and sandbox.execution_state != "busy":
            return
        await self._ready_to_answer(sandbox_id)
        await self._core.running(sandbox_id).interrupt()

    async def restart(self, sandbox_id: str) -> None:
        """A new kernel in the same machine; in a new one, with the files of the last checkpoint, where this one does
        not answer. Errors: as `interrupt`."""
        await self._ready_to_answer(sandbox_id)
        async with self._core.lock(sandbox_id):
            try:
                await self._core.running(sandbox_id).restart()
                return
            except MachineUnresponsiveError as error:
                await self._core.take_down(sandbox_id, "died")
                self._naps.on_machine_lost(sandbox_id, f"Its machine was ended for a restart. {error}")
        await self._naps.wake(sandbox_id)
        async with self._core.lock(sandbox_id):
            await self._core.running(sandbox_id).restart()

    async def ready(self, sandbox_id: str) -> None:
        """Waits until the kernel can be talked to; wakes it if it sleeps. Errors: as `interrupt`."""
        self._core.registry.touch(sandbox_id)
        await self._naps.wake(sandbox_id)

    def connection_info(self, sandbox_id: str) -> Mapping[str, Any]:
        """Jupyter's connection file, `transport: ipc`; the same for the sandbox's whole life, asleep or not.

        Errors: UnknownSandboxError, SandboxStateError.
        """
        return self._core.connection_info(sandbox_id)

    async def commands(self, sandbox_id: str) -> SandboxCommands:
        """The sandbox's commands, as long as its machine runs. Errors: as `ready`."""
        return SandboxCommands(await self._session(sandbox_id))

    async def files(self, sandbox_id: str) -> SandboxFiles:
        """The sandbox's files, as long as its machine runs. Errors: as `ready`."""
        return SandboxFiles(await self._session(sandbox_id))

    async def _session(self, sandbox_id: str) -> GuestSession:
        await self._ready_to_answer(sandbox_id)
        return self._core.running(sandbox_id).session

    async def _ready_to_answer(self, sandbox_id: str) -> None:
        """As `ready`; but a paused machine would answer only when someone has resumed it: SandboxStateError."""
        await self.ready(sandbox_id)
        if self.get(sandbox_id).state is SandboxState.PAUSED:
            raise SandboxStateError(sandbox_id, found=SandboxState.PAUSED, wanted="running (resume it first)")

    def touch(self, sandbox_id: str) -> None:
        """A client did something; unknown ids are fine."""
        self._core.registry.touch(sandbox_id)

    async def sleep(self, sandbox_id: str) -> Sandbox:
        """See `Naps.sleep`."""
        return await self._naps.sleep(sandbox_id)

    async def wake(self, sandbox_id: str) -> Sandbox:
        """See `Naps.wake`."""
        return await self._naps.wake(sandbox_id)

    async def checkpoints(self, sandbox_id: str) -> Sequence[Checkpoint]:
        """See `TimeLine.checkpoints`."""
        return await asyncio.to_thread(self._time_line.checkpoints, sandbox_id)

    async def checkpoint(self, sandbox_id: str, *, name: str | None = None) -> Checkpoint:
        """See `TimeLine.checkpoint`. A sleeping sandbox is woken first."""
        await self.ready(sandbox_id)
        return await self._time_line.checkpoint(sandbox_id, name=name)

    async def goto(self, sandbox_id: str, target: str) -> Sandbox:
        """See `TimeLine.goto`."""
        return await self._time_line.goto(sandbox_id, target)

    async def undo(self, sandbox_id: str) -> Sandbox:
        """See `TimeLine.undo`."""
        return await self._time_line.undo(sandbox_id)

    async def fork(
        self, sandbox_id: str, *, count: int, name: str | None = None, same_random: bool = False, mid_cell: bool = False
    ) -> Sequence[Sandbox | KernelsError]:
        """See `Forks.fork`: one entry per child."""
        self.touch(sandbox_id)
        return await self._forks.fork(sandbox_id, count=count, name=name, same_random=same_random, mid_cell=mid_cell)

    def tree(self, sandbox_id: str) -> Sequence[Sandbox]:
        """See `Forks.tree`."""
        return self._forks.tree(sandbox_id)

    async def pause(self, sandbox_id: str) -> Sandbox:
        """Stops the machine's CPUs; everything stays in memory. Errors: as `interrupt`."""
        return await self._naps.pause(sandbox_id)

    async def resume(self, sandbox_id: str) -> Sandbox:
        """Lets a paused machine go on. Errors: as `interrupt`."""
        return await self._naps.resume(sandbox_id)

    async def snapshots(self, *, owner: str | None = None) -> Sequence[Snapshot]:
        """All snapshots in the store, oldest first."""
        with store_errors():
            return [snapshot_of(entry) for entry in await asyncio.to_thread(self._core.store.ls, owner=owner)]

    def flattening(self) -> FlatteningStatus:
        """How far the sandboxes' chains of layers and disks are from being short, and what failed."""
        return self._core.launcher.saver.flattening()

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Errors: UnknownSnapshotError, SnapshotInUseError, StorageError."""
        with store_errors():
            await self._core.removing(self._core.store.rm, snapshot_id)

    async def usage(self, sandbox_id: str) -> SandboxUsage:
        """What the sandbox takes; nothing if it sleeps. Errors: as `interrupt`."""
        state = self.get(sandbox_id).state
        if state is SandboxState.ASLEEP:
            return SandboxUsage()
        live = self._core.running(sandbox_id)
        try:
            memory = await asyncio.to_thread(live.saved.machine.memory_usage)
        except VmRuntimeError as error:
            raise MachineFailedError(str(error)) from error
        return SandboxUsage(
            memory_unique_bytes=memory.unique_bytes,
            memory_shared_bytes=memory.shared_bytes,
            guest=await live.session.usage() if state is SandboxState.RUNNING else None,
        )

    def age_s(self, sandbox_id: str) -> float:
        """Of which `max_lifetime_s` is the most. Errors: UnknownSandboxError."""
        return self._core.registry.age_s(sandbox_id)

    def configure(self, sandbox_id: str, **changes: Any) -> Sandbox:
        """Changes name, notebook, idle_timeout_s, max_lifetime_s, on_timeout, tags or checkpoints.

        Errors: UnknownSandboxError, RequestError.
        """
        if "checkpoints" in changes:
            timer_minutes(changes["checkpoints"])
        return self._core.registry.change(sandbox_id, **changes)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[EventQueue]:
        """A queue of all `SandboxEvent`s from now on."""
        async with self._core.bus.subscribe() as queue:
            yield queue

    # How it is done

    def _image(self, name: str) -> Image:
        images = self._core.images.current()
        # As jupyter_client.kernelspec has it: case does not count, and "python" is the Python of this host.
        for alias in (name, name.lower(), "python3" if name.lower() == "python" else name):
            if alias in images:
                return images[alias]
        known = ", ".join(sorted(images)) or "none"
        raise UnknownTemplateError(
            f"There is no kernelspec named {name!r} (there is: {known}). `hypercelld image build` makes one."
        )

    def _shape(self, image: Image, request: CreateSandbox) -> MachineShape:
        recipe, settings = image.manifest.recipe, self._settings

        def size(what: str, asked: int | None, configured: int | None, usual: int, maximum: int) -> int:
            value = asked if asked is not None else configured if configured is not None else usual
            if not 0 < value <= maximum:
                raise LimitError(f"{what} must be between 1 and {maximum}; {value} was asked for.")
            return value

        memory = size("memory_mib", request.memory_mib, settings.memory_mib, recipe.memory_mib, settings.max_memory_mib)
        if memory < MIN_MEMORY_MIB:
            raise LimitError(f"memory_mib must be at least {MIN_MEMORY_MIB}; {memory} was asked for.")
        shape = MachineShape(
            memory_mib=memory,
            vcpus=size("vcpus", request.vcpus, settings.vcpus, recipe.vcpus, settings.max_vcpus),
            disk_mib=size("disk_mib", request.disk_mib, settings.disk_mib, recipe.disk_mib, settings.max_disk_mib),
        ).rounded()
        for what in ("memory_mib", "disk_mib"):
            asked, following = getattr(request, what), getattr(shape, what)
            if asked not in (None, following):
                raise RequestError(f"There is no machine with a {what} of {asked}; {following} is the next size.")
        return shape


def _shape_of(snapshot: Manifest, request: CreateSandbox) -> MachineShape:
    """Errors: RequestError where another one is asked for."""
    shape = MachineShape(**snapshot.shape.model_dump())
    for what in ("memory_mib", "vcpus", "disk_mib"):
        asked = getattr(request, what)
        if asked is not None and asked != getattr(shape, what):
            raise RequestError(
                f"A sandbox from a snapshot has the snapshot's size: {what} is {getattr(shape, what)}, not {asked}."
            )
    return shape


def _checked_id(kernel_id: str | None) -> str:
    if kernel_id is None:
        return new_sandbox_id()
    try:
        return str(uuid.UUID(kernel_id))
    except ValueError as error:
        raise RequestError(f"kernel_id must be a UUID, not {kernel_id!r}.") from error
