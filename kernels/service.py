"""All that the gateway can do with sandboxes: the parts that do it, composed, and what takes several of them.

Knows nothing of HTTP; what a machine is, is the driver's business.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

from kernels.background import Background, all_logged
from kernels.capacity import Capacity
from kernels.channels import KernelChannels
from kernels.checkpoints import Checkpoints, timer_minutes
from kernels.child_results import ChildResults
from kernels.connected import new_sandbox_id
from kernels.errors import (
    LimitError,
    MachineFailedError,
    MachineUnresponsiveError,
    RequestError,
    SandboxExistsError,
    SandboxStateError,
    UnknownTemplateError,
)
from kernels.events import EventBus
from kernels.exec import SandboxCommands
from kernels.files import SandboxFiles
from kernels.forks import Forks
from kernels.guest_calls import GuestCalls
from kernels.index import Index, SandboxRecord
from kernels.kernelspecs import kernelspec_of
from kernels.launcher import Launcher, new_key
from kernels.lifecycle import Lifecycle
from kernels.machines import Machines, identity_of
from kernels.models import CheckpointPolicy, CreateSandbox, Kernelspec, Sandbox, SandboxState, SandboxUsage
from kernels.recovery import Recovery
from kernels.registry import Registry
from kernels.session import CallHandler, GuestSession
from kernels.settings import ServiceSettings
from kernels.snapshots import Snapshots, store_errors
from kernels.templates import Progress, TemplateStore
from vm_runtime.drivers.base import Driver
from vm_runtime.errors import VmRuntimeError
from vm_runtime.images.store import Image, ImageStore
from vm_runtime.saving.saver import Saver
from vm_runtime.saving.threads import gather_all
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
    `ServiceSettings.stop_means_sleep` says; `progress` is called with how far that is.

    registry: the records of all sandboxes.
    bus: their events.
    lifecycle, checkpoints, forks, snapshots: what can be done with them.
    machines: those that run.
    pool: spare ones.
    saver: makes and restores machines.
    """

    def __init__(self, settings: ServiceSettings, driver: Driver, *, progress: Progress = log.info) -> None:
        self._settings = settings
        self._driver = driver
        self._progress = progress
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        settings = self._settings
        async with AsyncExitStack() as stack:
            index = Index(settings.state_dir / "index.sqlite")
            stack.callback(index.close)
            with store_errors():
                store = self._store = await asyncio.to_thread(SnapshotStore, settings.state_dir / "snapshots")
                stack.callback(store.close)
                try:
                    await asyncio.to_thread(store.gc)
                except BrokenSnapshotError as error:
                    log.error("What an earlier gateway left in the store is not removed: %s", error)
            child_results = ChildResults(settings.state_dir / "outcomes")
            await asyncio.to_thread(child_results.load)
            self._compose(index, store, child_results)
            stack.callback(self.snapshots.close)
            for close in (self.saver.close, self._templates.close, self.pool.close):
                stack.push_async_callback(close)
            stack.push_async_callback(self.machines.close_endpoints)
            stack.push_async_callback(self.stop)
            self.registry.load()
            self._background.spawn(self.pool.run())
            resuming = await self._recovery.recover()
            for work in (
                self.lifecycle.resume_all(resuming),
                self.lifecycle.watch(),
                self.checkpoints.watch(),
                self.forks.watch(),
            ):
                self._background.spawn(work)
            stack.callback(self.bus.close)
            self._stack = stack.pop_all()
        return self

    def _compose(self, index: Index, store: SnapshotStore, child_results: ChildResults) -> None:
        settings, driver = self._settings, self._driver
        capabilities = driver.capabilities
        background = self._background = Background()
        self._images = ImageStore(settings.state_dir / "images")
        self.bus = EventBus()
        registry = self.registry = Registry(index, self.bus)
        saver = self.saver = Saver(
            store=store,
            driver=driver,
            image_files=lambda digest: self._images.get(digest).files,
            on_flattening_failed=registry.flattening_failed,
        )
        capacity = self._capacity = Capacity(
            settings.max_sandboxes, clones_share_memory=capabilities.clones_share_memory.ok
        )
        self._templates = TemplateStore(settings.state_dir / "templates", settings.run_dir, driver, store, saver)
        self._launcher = Launcher(settings, saver, capacity)
        self.pool = self._launcher.pool
        machines = self.machines = Machines(settings, registry, self._launcher, self)
        snapshots = self.snapshots = Snapshots(store, saver, registry, machines, capabilities.snapshot)
        lifecycle = self.lifecycle = Lifecycle(registry, machines, store, snapshots, background)
        self.checkpoints = Checkpoints(registry, machines, store, snapshots, background, settings.checkpoint_budget_mib)
        self.forks = Forks(settings, registry, machines, snapshots, lifecycle, capacity, child_results)
        self._guest_calls = GuestCalls(registry, lifecycle, self.checkpoints, self.forks, background)
        self._recovery = Recovery(settings, registry, machines, saver, snapshots, lifecycle)

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def stop(self) -> None:
        """Puts everything to sleep, or ends it; what could not sleep in time runs on. When this returns, clients of
        endpoints have all that their kernels had sent. Called by who serves such clients, before `__aexit__`, which
        otherwise does it. Twice is harmless."""
        self.machines.is_stopping = True
        await self._background.end()
        if self._settings.stop_means_sleep:
            awake = await self.lifecycle.sleep_all(limit_s=self._settings.stop_limit_s, progress=self._progress)
            for sandbox_id in awake:
                self._progress(
                    f"Sandbox {sandbox_id} could not be put to sleep; it runs on, and the next start finds it."
                )
            await all_logged(self.machines.detach(sandbox_id) for sandbox_id in awake)
            self.registry.flush()
            await self.machines.until_clients_have_all()
        else:
            await all_logged(self.lifecycle.forget(sandbox_id) for sandbox_id in self.registry.ids())

    # As the observer of sandboxes

    def cell_ended(self, sandbox_id: str) -> None:
        self.checkpoints.cell_ended(sandbox_id)

    def client_asks(self, sandbox_id: str) -> None:
        self.lifecycle.client_asks(sandbox_id)

    def machine_lost(self, sandbox_id: str, reason: str) -> None:
        self.lifecycle.machine_lost(sandbox_id, reason)

    def calls_of(self, sandbox_id: str) -> CallHandler:
        return self._guest_calls.handler_for(sandbox_id)

    # Templates

    def kernelspecs(self) -> dict[str, Kernelspec]:
        """One per image, by name."""
        return {name: kernelspec_of(image, self._driver) for name, image in self._images.current().items()}

    async def prepare(self, *, progress: Progress) -> None:
        """Builds the templates that new kernels of the default shape need, and starts to keep warm machines of them.

        Errors: TemplateError.
        """
        for name, image in self._images.current().items():
            shape = self._shape(image, CreateSandbox(template=name))
            self.pool.keep(await self._templates.ensure(image, shape, progress=progress))
        await self._templates.remove_stale(self._images.current().values())

    # Sandboxes

    def get(self, sandbox_id: str) -> Sandbox:
        """Errors: UnknownSandboxError."""
        return self.registry.get(sandbox_id)

    async def create(self, request: CreateSandbox) -> Sandbox:
        """A new sandbox with a kernel that can be talked to, or the one that was left behind with this notebook or id.

        Errors: RequestError (unknown template, id taken, beyond a maximum), CapacityError, TemplateError,
        MachineFailedError; nothing is left behind then.
        """
        bring_up: Callable[[str], Awaitable[None]]
        if request.snapshot is None:
            image = self._image(request.template)
            recipe, shape = image.manifest.recipe, self._shape(image, request)
            template, env = recipe.name, {**recipe.environment, **request.env}
            bring_up = partial(self._bring_up, image, shape)
        else:
            snapshot = await asyncio.to_thread(self._resolve, request.snapshot)
            template, env, shape = snapshot.template, dict(request.env), _shape_of(snapshot, request)
            bring_up = partial(self._bring_back, snapshot)
        request = replace(request, template=template)
        sandbox_id = _checked_id(request.kernel_id)
        left = self._left_behind(request, sandbox_id)
        if left is not None:
            try:
                return await self.lifecycle.wake(left.id)
            except MachineFailedError as error:
                if left.id == sandbox_id:
                    raise
                # It stays for its owner to look at; the notebook gets a new one.
                log.warning("The kernel that was left with %s cannot be woken: %s", request.notebook, error)
                self.registry.change(left.id, notebook=None)
        settings = self._settings
        if sandbox_id in self.registry:
            raise SandboxExistsError(f"There is a sandbox with the id {sandbox_id} already.")
        checkpoints = request.checkpoints if request.checkpoints is not None else self._default_checkpoints()
        timer_minutes(checkpoints)
        self._capacity.admit(len(self.registry))
        idle_s = request.idle_timeout_s
        if idle_s is None:
            idle_s = settings.idle_timeouts_s.get(request.template, settings.idle_timeout_s)
        now = datetime.now(UTC)
        sandbox = Sandbox(
            id=sandbox_id, state=SandboxState.CREATING, driver=self._driver.name, template=request.template,
            parent_id=None, name=request.name, owner=request.owner, created_at=now, last_activity=now,
            execution_state="starting", reason=None,
            memory_mib=shape.memory_mib, vcpus=shape.vcpus, disk_mib=shape.disk_mib, notebook=request.notebook,
            idle_timeout_s=idle_s, max_lifetime_s=request.max_lifetime_s, checkpoints=checkpoints,
            on_timeout=request.on_timeout, tags=request.tags,
        )  # fmt: skip
        self.registry.add(
            SandboxRecord(sandbox=sandbox, machine_id="", key=new_key(), marker="", env=env, cwd=request.cwd)
        )
        try:
            async with self.machines.lock(sandbox_id):
                await bring_up(sandbox_id)
        except BaseException as error:
            await self.lifecycle.forget(sandbox_id)
            if isinstance(error, VmRuntimeError | SnapshotError):
                raise MachineFailedError(str(error)) from error
            raise
        return self.get(sandbox_id)

    def _default_checkpoints(self) -> str:
        policy, capabilities = self._settings.checkpoints, self._driver.capabilities
        can = capabilities.snapshot.ok and (policy != CheckpointPolicy.CELL or capabilities.checkpoint_each_cell.ok)
        return policy if can else CheckpointPolicy.OFF

    async def _bring_back(self, snapshot: Manifest, sandbox_id: str) -> None:
        connected = await self.machines.restore(sandbox_id, snapshot, keep_random=False, drop_requests=True)
        await self.machines.exchange(sandbox_id, connected, snapshot)
        # It falls back on it until it has a checkpoint of its own.
        await self.snapshots.keep(sandbox_id, snapshot)
        record, live = self.registry.record(sandbox_id), self.machines.running(sandbox_id)
        await live.configure(env=record.env, cwd=record.cwd, identity=identity_of(record.sandbox))

    async def _bring_up(self, image: Image, shape: MachineShape, sandbox_id: str) -> None:
        template = await self._templates.ensure(image, shape, progress=log.info)
        connected = await self._launcher.launch(template, identity_of(self.get(sandbox_id)))
        await self.machines.go_live(sandbox_id, connected, configure=True)

    def _resolve(self, snapshot: str) -> Manifest:
        with store_errors():
            return self._store.get(self._store.resolve(snapshot))

    def _left_behind(self, request: CreateSandbox, sandbox_id: str) -> Sandbox | None:
        """The sleeping sandbox that a Jupyter client deleted and now asks for again, by its id or its notebook."""
        for sandbox in self.registry.sandboxes():
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
                await self.lifecycle.resume(sandbox_id)
            await self.lifecycle.sleep(sandbox_id)
        except MachineFailedError as error:
            log.warning("Sandbox %s was left by its client: %s", sandbox_id, error)
        self.registry.change(sandbox_id, released=True)

    async def delete(self, sandbox_id: str, *, descendants: bool = False) -> None:
        """Ends a sandbox for good. descendants: and all that came from it by forks, those that are being made
        included. Errors: UnknownSandboxError."""
        self.get(sandbox_id)
        await self.lifecycle.end(sandbox_id)
        while descendants and (left := self.registry.lineage.descendants(sandbox_id)):
            await gather_all(*(self.lifecycle.end(each) for each in left))

    async def interrupt(self, sandbox_id: str) -> None:
        """Interrupts the cell that runs; where none does, also for want of a machine, nothing happens. Errors:
        UnknownSandboxError, SandboxStateError, MachineFailedError."""
        sandbox = self.get(sandbox_id)
        if sandbox.state is SandboxState.ASLEEP and sandbox.execution_state != "busy":
            return
        await self._ready_to_answer(sandbox_id)
        await self.machines.running(sandbox_id).session.call("kernel.interrupt")

    async def restart(self, sandbox_id: str) -> None:
        """A new kernel in the same machine; in a new one, with the files of the last checkpoint, where this one does
        not answer. Errors: as `interrupt`."""
        await self._ready_to_answer(sandbox_id)
        async with self.machines.lock(sandbox_id):
            try:
                await self.machines.running(sandbox_id).restart()
                return
            except MachineUnresponsiveError as error:
                await self.machines.take_down(sandbox_id, "died")
                self.lifecycle.machine_lost(sandbox_id, f"Its machine was ended for a restart. {error}")
        await self.lifecycle.wake(sandbox_id)
        async with self.machines.lock(sandbox_id):
            await self.machines.running(sandbox_id).restart()

    async def ready(self, sandbox_id: str) -> None:
        """Waits until the kernel can be talked to; wakes it if it sleeps. Errors: as `interrupt`."""
        self.registry.touch(sandbox_id)
        await self.lifecycle.wake(sandbox_id)

    def channels(self, sandbox_id: str, client_id: str) -> KernelChannels:
        """A new client of the kernel, subscribed to all of iopub; whoever asks closes it. It stays while the sandbox
        sleeps and wakes. client_id: by which the kernel knows it again. Errors: UnknownSandboxError, LimitError."""
        channels = self.machines.clients(sandbox_id).channels(client_id.encode())
        channels.subscribe()
        return channels

    async def connection_info(self, sandbox_id: str) -> Mapping[str, Any]:
        """Jupyter's connection file, `transport: ipc`, whose endpoints are opened with this. The same for the
        sandbox's whole life, asleep or not. Errors: UnknownSandboxError."""
        async with self.machines.lock(sandbox_id):
            endpoints = await self.machines.endpoints(sandbox_id)
        return endpoints.connection_info(self.registry.record(sandbox_id).key)

    async def commands(self, sandbox_id: str) -> SandboxCommands:
        """The sandbox's commands, as long as its machine runs. Errors: as `ready`."""
        return SandboxCommands(await self._session(sandbox_id))

    async def files(self, sandbox_id: str) -> SandboxFiles:
        """The sandbox's files, as long as its machine runs. Errors: as `ready`."""
        return SandboxFiles(await self._session(sandbox_id))

    async def _session(self, sandbox_id: str) -> GuestSession:
        await self._ready_to_answer(sandbox_id)
        return self.machines.running(sandbox_id).session

    async def _ready_to_answer(self, sandbox_id: str) -> None:
        """As `ready`; but a paused machine would answer only when someone has resumed it: SandboxStateError."""
        await self.ready(sandbox_id)
        if self.get(sandbox_id).state is SandboxState.PAUSED:
            raise SandboxStateError(sandbox_id, found=SandboxState.PAUSED, wanted="running (resume it first)")

    async def usage(self, sandbox_id: str) -> SandboxUsage:
        """What the sandbox takes; nothing if it sleeps. Errors: as `interrupt`."""
        state = self.get(sandbox_id).state
        if state is SandboxState.ASLEEP:
            return SandboxUsage()
        live = self.machines.running(sandbox_id)
        try:
            memory = await asyncio.to_thread(live.saved.machine.memory_usage)
        except VmRuntimeError as error:
            raise MachineFailedError(str(error)) from error
        return SandboxUsage(
            memory_unique_bytes=memory.unique_bytes,
            memory_shared_bytes=memory.shared_bytes,
            guest=await live.session.usage() if state is SandboxState.RUNNING else None,
        )

    def configure(self, sandbox_id: str, **changes: Any) -> Sandbox:
        """Changes name, notebook, idle_timeout_s, max_lifetime_s, on_timeout, tags or checkpoints.

        Errors: UnknownSandboxError, RequestError.
        """
        if "checkpoints" in changes:
            timer_minutes(changes["checkpoints"])
        return self.registry.change(sandbox_id, **changes)

    # How it is done

    def _image(self, name: str) -> Image:
        images = self._images.current()
        # As jupyter_client.kernelspec has it: case does not count, and "python" is the Python of this host.
        for alias in (name, name.lower(), "python3" if name.lower() == "python" else name):
            if alias in images:
                return images[alias]
        known = ", ".join(sorted(images)) or "none"
        raise UnknownTemplateError(
            f"There is no kernelspec named {name!r} (there is: {known}). `hypercelld image build` makes one."
        )

    def _shape(self, image: Image, request: CreateSandbox) -> MachineShape:
        sizes = {}
        for what, least in (("memory_mib", MIN_MEMORY_MIB), ("vcpus", 1), ("disk_mib", 1)):
            sources = (request, self._settings, image.manifest.recipe)
            size = next(size for source in sources if (size := getattr(source, what)) is not None)
            most = getattr(self._settings, f"max_{what}")
            if not least <= size <= most:
                raise LimitError(f"{what} must be between {least} and {most}; {size} was asked for.")
            sizes[what] = size
        shape = MachineShape(**sizes).rounded()
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
