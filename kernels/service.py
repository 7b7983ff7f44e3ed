"""Sandboxes: create, find, interrupt, restart, delete, and find again after the gateway was killed.

The one class that the gateway talks to. Knows nothing of HTTP; what a machine is, is the driver's business.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Self

from kernels.capacity import Capacity
from kernels.errors import (
    KernelsError,
    LimitError,
    MachineFailedError,
    RequestError,
    SandboxExistsError,
    SandboxStateError,
    UnknownTemplateError,
)
from kernels.events import EventBus, EventQueue
from kernels.index import Index, SandboxRecord
from kernels.kernelspecs import kernelspec_of
from kernels.launcher import Launcher, identity_of
from kernels.live import LiveSandbox
from kernels.models import CreateSandbox, EventKind, Kernelspec, Sandbox, SandboxState
from kernels.registry import Registry
from kernels.session import Greeting
from kernels.settings import ServiceSettings
from kernels.templates import Progress
from kernels.warm import WarmMachine, place_of
from vm_runtime.drivers.base import Driver
from vm_runtime.errors import MachineGoneError, VmRuntimeError
from vm_runtime.images.store import Image, ImageStore
from vm_runtime.snapshots.memory import BaseCache
from vm_runtime.spec import MachineShape

log = logging.getLogger(__name__)

# Linux, the agent and a kernel with nothing imported need 150 MiB; below this a template would not come up.
MIN_MEMORY_MIB = 256


class SandboxService:
    """`async with SandboxService(settings, driver) as service:`. All methods belong to one event loop.

    On entry the machines that a killed gateway left running are found again. On exit every machine ends; a sandbox
    exists as long as its gateway does.
    """

    def __init__(self, settings: ServiceSettings, driver: Driver) -> None:
        self._settings = settings
        self._driver = driver
        self._images = ImageStore(settings.state_dir / "images")
        self._capacity = Capacity(settings.max_sandboxes)
        bases = BaseCache(seal=driver.capabilities.sealed_base)
        self._launcher = Launcher(settings, driver, bases, self._capacity.has_room_for_spare)
        self._bus = EventBus()
        self._live: dict[str, LiveSandbox] = {}
        self._supervisors: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            index = Index(self._settings.state_dir / "index.sqlite")
            stack.callback(index.close)
            self._registry = Registry(index, self._bus)
            self._registry.load()
            await stack.enter_async_context(self._launcher.running())
            stack.push_async_callback(self._end_all)
            await self._find_again()
            stack.callback(self._bus.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    # Templates

    def kernelspecs(self) -> dict[str, Kernelspec]:
        """One per image, by name."""
        return {name: kernelspec_of(image) for name, image in self._images.current().items()}

    async def prepare(self, *, progress: Progress) -> None:
        """Builds the templates that new kernels of the default shape need, and starts to keep warm machines of them.

        Errors: TemplateError.
        """
        for name, image in self._images.current().items():
            shape = self._shape(image, CreateSandbox(template=name))
            template = await self._launcher.templates.ensure(image, shape, progress=progress)
            self._launcher.pool.keep(template)

    def pool_ready(self) -> int:
        """Warm machines ready to be given out."""
        return self._launcher.pool.ready_count()

    # Sandboxes

    def get(self, sandbox_id: str) -> Sandbox:
        """Errors: UnknownSandboxError."""
        return self._registry.record(sandbox_id).sandbox

    def list(self) -> list[Sandbox]:
        """All sandboxes, oldest first."""
        return [record.sandbox for record in self._registry.records()]

    async def create(self, request: CreateSandbox) -> Sandbox:
        """A new sandbox with a kernel that can be talked to.

        Errors: RequestError (unknown template, id taken, beyond a maximum), CapacityError, TemplateError,
        MachineFailedError; nothing is left behind then.
        """
        image = self._image(request.template)
        shape = self._shape(image, request)
        sandbox_id = _checked_id(request.kernel_id)
        if sandbox_id in self._registry:
            raise SandboxExistsError(f"There is a sandbox with the id {sandbox_id} already.")
        self._capacity.admit(len(self._registry), shape)
        now = datetime.now(UTC)
        sandbox = Sandbox(
            id=sandbox_id, state=SandboxState.CREATING, driver=self._driver.name, template=request.template,
            parent_id=None, name=request.name, owner=request.owner, created_at=now, last_activity=now,
            execution_state="starting", reason=None,
            memory_mib=shape.memory_mib, vcpus=shape.vcpus, disk_mib=shape.disk_mib,
        )  # fmt: skip
        env = {**image.manifest.recipe.environment, **request.env}
        self._registry.add(
            SandboxRecord(
                sandbox=sandbox, template_digest="", machine_id="", key="", marker="", env=env, cwd=request.cwd
            )
        )
        try:
            async with self._lock(sandbox_id):
                await self._bring_up(image, shape, self._registry.record(sandbox_id))
        except BaseException as error:
            await self._forget(sandbox_id)
            if isinstance(error, VmRuntimeError):
                raise MachineFailedError(str(error)) from error
            raise
        return self.get(sandbox_id)

    async def _bring_up(self, image: Image, shape: MachineShape, record: SandboxRecord) -> None:
        sandbox_id = record.sandbox.id
        identity = identity_of(sandbox_id)
        template = await self._launcher.templates.ensure(image, shape, progress=log.info)
        warm = await self._launcher.launch(template, identity)
        async with AsyncExitStack() as stack:
            live = self._make_live(sandbox_id, warm)
            stack.push_async_callback(live.close)
            await live.configure(env=record.env, cwd=record.cwd, identity=identity)
            await live.start()
            stack.pop_all()
        self._registry.update(
            sandbox_id,
            template_digest=template.digest,
            machine_id=warm.machine.id,
            key=warm.key,
            marker=warm.session.next_marker,
        )
        self._went_live(sandbox_id, live, execution_state="idle")

    async def delete(self, sandbox_id: str) -> None:
        """Ends a sandbox for good. Errors: UnknownSandboxError."""
        self._registry.record(sandbox_id)
        async with self._lock(sandbox_id):
            await self._forget(sandbox_id)

    async def interrupt(self, sandbox_id: str) -> None:
        """Interrupts the cell that runs. Errors: UnknownSandboxError, SandboxStateError, MachineFailedError."""
        self._registry.touch(sandbox_id)
        await self._running(sandbox_id).interrupt()

    async def restart(self, sandbox_id: str) -> None:
        """A new kernel in the same machine. Errors: as `interrupt`."""
        self._registry.touch(sandbox_id)
        async with self._lock(sandbox_id):
            await self._running(sandbox_id).restart()

    async def ready(self, sandbox_id: str) -> None:
        """Waits until the kernel can be talked to. Errors: as `interrupt`."""
        self._registry.record(sandbox_id)
        async with self._lock(sandbox_id):
            self._running(sandbox_id)

    def connection_info(self, sandbox_id: str) -> Mapping[str, Any]:
        """Jupyter's connection file, `transport: ipc`. Errors: UnknownSandboxError, SandboxStateError."""
        return self._running(sandbox_id).connection_info()

    def touch(self, sandbox_id: str) -> None:
        """A client did something; unknown ids are fine."""
        self._registry.touch(sandbox_id)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[EventQueue]:
        """A queue of all `SandboxEvent`s from now on."""
        async with self._bus.subscribe() as queue:
            yield queue

    # How it is done

    def _running(self, sandbox_id: str) -> LiveSandbox:
        sandbox = self.get(sandbox_id)
        live = self._live.get(sandbox_id)
        if live is not None:
            return live
        if sandbox.state is SandboxState.FAILED:
            raise MachineFailedError(f"Sandbox {sandbox_id} has failed: {sandbox.reason}")
        raise SandboxStateError(sandbox_id, found=sandbox.state, wanted=SandboxState.RUNNING)

    def _lock(self, sandbox_id: str) -> asyncio.Lock:
        return self._locks.setdefault(sandbox_id, asyncio.Lock())

    def _image(self, name: str) -> Image:
        images = self._images.current()
        if name in images:
            return images[name]
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
        return MachineShape(
            memory_mib=memory,
            vcpus=size("vcpus", request.vcpus, settings.vcpus, recipe.vcpus, settings.max_vcpus),
            disk_mib=size("disk_mib", request.disk_mib, settings.disk_mib, recipe.disk_mib, settings.max_disk_mib),
        ).rounded()

    def _make_live(self, sandbox_id: str, warm: WarmMachine) -> LiveSandbox:
        live = LiveSandbox(
            machine=warm.machine,
            session=warm.session,
            key=warm.key,
            endpoints_dir=self._settings.run_dir / "k" / sandbox_id.replace("-", "")[:12],
            notices=_Notices(self, sandbox_id),
            restart_limit=self._settings.restart_limit,
            restart_window_s=self._settings.restart_window_s,
        )
        warm.take(live.on_event)
        return live

    def _went_live(self, sandbox_id: str, live: LiveSandbox, *, execution_state: str) -> None:
        self._live[sandbox_id] = live
        self._registry.move(sandbox_id, SandboxState.RUNNING, execution_state=execution_state)
        self._supervisors[sandbox_id] = asyncio.create_task(live.run())

    async def _forget(self, sandbox_id: str) -> None:
        await self._take_down(sandbox_id)
        self._registry.remove(sandbox_id)
        self._locks.pop(sandbox_id, None)

    async def _take_down(self, sandbox_id: str) -> None:
        supervisor = self._supervisors.pop(sandbox_id, None)
        if supervisor is not None and supervisor is not asyncio.current_task():
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        live = self._live.pop(sandbox_id, None)
        if live is not None:
            await live.close()

    async def _fail(self, sandbox_id: str, reason: str) -> None:
        """The machine is gone: the sandbox stays listed, failed, until it is deleted."""
        async with self._lock(sandbox_id):
            if sandbox_id not in self._live:
                return
            await self._take_down(sandbox_id)
            self._registry.move(sandbox_id, SandboxState.FAILED, reason=reason, execution_state="dead")
            self._registry.notify(sandbox_id, EventKind.KERNEL_DEAD, reason)

    async def _end_all(self) -> None:
        ids = [record.sandbox.id for record in self._registry.records()]
        await asyncio.gather(*(self._forget(sandbox_id) for sandbox_id in ids), return_exceptions=True)

    async def _find_again(self) -> None:
        """Takes over the machines that a killed gateway left running, and ends those that are no one's."""
        records = {record.machine_id: record for record in self._registry.records()}
        machine_ids = {path.name for path in (self._settings.run_dir / "m").glob("*")}
        await asyncio.gather(*(self._end_stray(machine_id) for machine_id in machine_ids - records.keys()))
        await asyncio.gather(*(self._find_one(record) for record in records.values()))

    async def _end_stray(self, machine_id: str) -> None:
        try:
            await self._launcher.end(place_of(machine_id, self._settings.state_dir, self._settings.run_dir))
        except MachineGoneError:
            pass
        except VmRuntimeError as error:
            log.warning("The stray machine %s could not be ended: %s", machine_id, error)

    async def _find_one(self, record: SandboxRecord) -> None:
        sandbox = record.sandbox
        if sandbox.state is SandboxState.CREATING:
            self._registry.remove(sandbox.id)  # nobody was told of it
            return
        if sandbox.state is not SandboxState.RUNNING:
            return
        place = place_of(record.machine_id, self._settings.state_dir, self._settings.run_dir)
        greeting = Greeting(marker=record.marker, identity=identity_of(sandbox.id), key=record.key, restored=False)
        try:
            warm = await self._launcher.adopt(place, greeting)
            live = self._make_live(sandbox.id, warm)
            await live.start()
        except (KernelsError, VmRuntimeError) as error:
            self._registry.move(sandbox.id, SandboxState.FAILED, reason=str(error), execution_state="dead")
            return
        self._registry.update(sandbox.id, marker=warm.session.next_marker)
        self._went_live(sandbox.id, live, execution_state="busy" if warm.session.kernel_busy else "idle")


class _Notices:
    """Turns what a live sandbox reports into the registry's changes."""

    def __init__(self, service: SandboxService, sandbox_id: str) -> None:
        self._service = service
        self._registry = service._registry
        self._sandbox_id = sandbox_id

    def execution_state(self, state: str) -> None:
        self._registry.execution_state(self._sandbox_id, state)

    def kernel_restarting(self, reason: str) -> None:
        self._registry.execution_state(self._sandbox_id, "restarting")
        self._registry.notify(self._sandbox_id, EventKind.KERNEL_RESTARTING, reason)

    def kernel_restarted(self) -> None:
        self._registry.notify(self._sandbox_id, EventKind.KERNEL_RESTARTED)

    def kernel_dead(self, reason: str) -> None:
        self._registry.execution_state(self._sandbox_id, "dead")
        self._registry.notify(self._sandbox_id, EventKind.KERNEL_DEAD, reason)

    async def machine_dead(self, reason: str) -> None:
        await self._service._fail(self._sandbox_id, reason)


def _checked_id(kernel_id: str | None) -> str:
    if kernel_id is None:
        return str(uuid.uuid4())
    try:
        return str(uuid.UUID(kernel_id))
    except ValueError as error:
        raise RequestError(f"kernel_id must be a UUID, not {kernel_id!r}.") from error
