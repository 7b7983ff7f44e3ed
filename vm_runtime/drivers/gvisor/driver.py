"""The gVisor driver: starts sandboxes, confined, and finds them again.

Assembles what others do: bundle.py (what a machine is), machine.py, states.py, and vm_runtime/confinement.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, Self

from vm_runtime.confinement.cgroups import Cgroup, CgroupRoot, Limits, find_root
from vm_runtime.confinement.host import HostConfinement, find_confinement
from vm_runtime.confinement.namespaces import CLONE_NEWNS
from vm_runtime.confinement.process import Process, Spawner, SpawnRequest, boot_id
from vm_runtime.confinement.report import ConfinementStep
from vm_runtime.drivers.base import (
    Capabilities,
    Capability,
    Check,
    Driver,
    DriverSettings,
    Failure,
    MachinePlace,
    Shorter,
)
from vm_runtime.drivers.gvisor.bundle import (
    BUNDLE_VERSION,
    CONFIG_FILE,
    EMPTY_DIRECTORY,
    PID_FILE,
    arguments,
    config,
)
from vm_runtime.drivers.gvisor.machine import (
    CONSOLE_PIPE,
    IN_PIPE,
    OUT_PIPE,
    PAUSED_FILE,
    RUNSC_DIRECTORY,
    GvisorMachine,
    open_pipe,
    remove_files,
    remove_runtime_files,
)
from vm_runtime.drivers.gvisor.program import INSTALL, PROGRAM, find_program
from vm_runtime.drivers.gvisor.record import MachineRecord
from vm_runtime.drivers.gvisor.rootfs import ROOTFS_VERSION, ensure_plain, plain_path
from vm_runtime.drivers.gvisor.states import STATE_FORMAT, GvisorStates
from vm_runtime.errors import (
    DriverError,
    DriverUnavailableError,
    MachineError,
    MachineGoneError,
    MachineStartError,
    SpawnError,
)
from vm_runtime.snapshots.manifest import State
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.spec import MachineShape, MachineSpec
from vm_runtime.states import RunState
from vm_runtime.wire.carriers import PipeCarrier

PLATFORM = "systrap"
# Beyond the guest's memory: gVisor itself, which keeps an object for each file, page range and process of the guest.
SANDBOX_OVERHEAD_MIB = 256
# For what gVisor does beside the guest's code: timers, output, its own garbage collection.
SANDBOX_EXTRA_CPUS = 1.0
# Each process of the guest has some on the host.
SANDBOX_PROCESSES = 4096
SANDBOX_OPEN_FILES = 65_536
# A sandbox is there after 0.1 s; a host with ten times the work that it has CPUs for takes seconds.
START_TIMEOUT_S = 30.0

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_NEEDS_ROOT = "gVisor's machines are confined by a user of their own each, for which the gateway must be root."
_DEAR = "A checkpoint holds all of a machine, and stops it for a third of a second and more."
_NOT_SHARED = "Each gVisor machine has all of its memory for itself."


class GvisorDriver(Driver):
    """Machines on `runsc`. `close()` it at the end; machines run on."""

    name: ClassVar[str] = "gvisor"

    def __init__(
        self, *, program: Path, version: str, spawner: Spawner, cgroups: CgroupRoot, confinement: HostConfinement
    ) -> None:
        self._program = program
        self._version = version
        self._spawner = spawner
        self._cgroups = cgroups
        self._confinement = confinement

    @classmethod
    async def start(cls, settings: DriverSettings, *, say: Callable[[str], None]) -> Self:
        path, version = await find_program(settings.options.get("runsc", PROGRAM))
        spawner = Spawner()
        try:
            cgroups = await asyncio.to_thread(find_root)
            confinement = await find_confinement(spawner, devices=())
            if not confinement.drop_user or "own root" in confinement.errors:
                problem = next(iter(confinement.errors.values()), "")
                raise DriverUnavailableError(f"{_NEEDS_ROOT} {problem}".rstrip())
        except BaseException:
            await spawner.close()
            raise
        say(f"Machines are gVisor's ({version}, {PLATFORM}): native speed; they share this host's Linux.")
        return cls(program=path, version=version, spawner=spawner, cgroups=cgroups, confinement=confinement)

    @classmethod
    async def checks(cls, settings: DriverSettings) -> Sequence[Check]:
        try:
            path, version = await find_program(settings.options.get("runsc", PROGRAM))
        except DriverError as error:
            return [Check(name="runsc", found="missing", problem=str(error), fix=INSTALL, blocking=True)]
        checks = [Check(name="runsc", found=f"{version} ({path})")]
        checks.append(Check(name="wall", found="gVisor's own kernel in a process: weaker than a virtual machine's"))
        try:
            driver = await cls.start(settings, say=lambda text: None)
        except DriverError as error:
            return [*checks, Check(name="confinement", found="none", problem=str(error), blocking=True)]
        try:
            steps = driver.confinement_steps()
        finally:
            await driver.close()
        works = [step.name for step in steps if step.problem is None]
        checks.append(Check(name="confinement", found=", ".join(works) or "none"))
        for step in steps:
            if step.problem is not None:
                problem = f"{step.name}: {step.problem}"
                checks.append(Check(name=step.name, found="missing", problem=problem, fix=step.fix))
        return checks

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            clones_share_memory=Capability(ok=False, why_not=_NOT_SHARED),
            checkpoint_each_cell=Capability(ok=False, why_not=_DEAR),
        )

    def identity(self) -> str:
        return f"gvisor {self._version} {PLATFORM} bundle={BUNDLE_VERSION} rootfs={ROOTFS_VERSION}"

    @property
    def needs(self) -> Mapping[str, str]:
        return {
            "version": self._version,
            "platform": PLATFORM,
            "machine": f"bundle={BUNDLE_VERSION} rootfs={ROOTFS_VERSION}",
        }

    def can_load(self, state: State) -> str | None:
        here = {"driver": self.name, "format": STATE_FORMAT, **self.needs}
        there = {"driver": state.driver, "format": state.format, **state.needs}
        if here == there:
            return None
        return f"The snapshot needs {_sentence(there)}; this host has {_sentence(here)}."

    def confinement_steps(self) -> tuple[ConfinementStep, ...]:
        """How far this host allows machines to be confined."""
        # What runsc gives each sandbox itself, whatever the host. Its systrap stays in the host's pid namespace.
        own = ("user namespace", "network namespace", "ipc namespace", "uts namespace", "seccomp")
        others = {*own, "pid namespace", "own /proc"}
        found = [step for step in self._confinement.steps() if step.name not in others]
        return (*(ConfinementStep(name=name) for name in own), *found, *self._cgroups.steps())

    async def boot(self, spec: MachineSpec, *, place: MachinePlace, guest: bytes, timeout_s: float) -> GvisorMachine:
        await ensure_plain(spec.image)
        machine = await self.create(spec, place=place)
        try:
            async with asyncio.timeout(timeout_s):
                wire = await machine.open_wire()
                try:
                    await machine.start()
                    await wire.write([len(guest).to_bytes(4, "big"), guest])
                    await self._read_by_guest(machine, wire)
                finally:
                    wire.close()
            await self.keep(machine)
        except BaseException as error:
            death = await asyncio.shield(asyncio.create_task(machine.kill()))
            if isinstance(error, (MachineError, DriverError, TimeoutError, OSError)):
                reason = str(error) or "it took too long"
                raise MachineStartError(
                    f"Machine {place.id} did not start: {reason}", serial_tail=death.serial_tail
                ) from error
            raise
        return machine

    def states(
        self,
        store: SnapshotStore,
        *,
        on_shortened: Callable[[Shorter], Awaitable[None]],
        on_failed: Callable[[Failure], None],
    ) -> GvisorStates:
        return GvisorStates(store, self, driver=self.name)

    async def create(self, spec: MachineSpec, *, place: MachinePlace) -> GvisorMachine:
        """See `Sandboxes.create`."""
        creating = asyncio.create_task(self._create(spec, place))
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            # It is being started; wait for it, so that nothing of it is left when the caller cleans up.
            with contextlib.suppress(MachineError, DriverError):
                await (await creating).kill()
            raise

    async def keep(self, machine: GvisorMachine) -> None:
        """See `Sandboxes.keep`."""
        await asyncio.to_thread(machine.write_record)
        await self._spawner.keep(machine.process)

    async def adopt(self, place: MachinePlace) -> GvisorMachine:
        record = await asyncio.to_thread(MachineRecord.read, place.run_dir)
        if record is None:
            directories = tuple(dict.fromkeys(parent / place.id for parent in self._cgroups.parents.values()))
            await asyncio.to_thread(remove_files, place, Cgroup(directories=directories))
            raise MachineGoneError(f"There is no machine at {place.run_dir}.")
        cgroup = Cgroup(directories=record.cgroups)
        process = Process.find(record.pid, record.start_time) if record.boot_id == boot_id() else None
        if process is None:
            await asyncio.to_thread(remove_files, place, cgroup)
            raise MachineGoneError(f"The sandbox of machine {place.id} has ended while no gateway watched it.")
        paused = (place.run_dir / PAUSED_FILE).exists()
        if paused:
            process.send_signal(signal.SIGSTOP)  # perhaps that was about to be done
        return GvisorMachine(
            place=place,
            spec=record.spec,
            process=process,
            cgroup=cgroup,
            state=RunState.PAUSED if paused else RunState.RUNNING,
            console=open_pipe(place.run_dir / CONSOLE_PIPE, os.O_RDONLY),
        )

    def remove_leftovers(self, machines_dir: Path, *, keep: Set[str]) -> None:
        if machines_dir.is_dir():
            for directory in machines_dir.iterdir():
                if directory.name not in keep:
                    shutil.rmtree(directory, ignore_errors=True)

    async def close(self) -> None:
        await self._spawner.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _create(self, spec: MachineSpec, place: MachinePlace) -> GvisorMachine:
        cgroup = Cgroup(directories=())
        creator: Process | None = None
        process: Process | None = None
        tail = ""
        try:
            with ExitStack() as stack:
                confinement = self._confinement.of(
                    place.id,
                    read_only=(*self._shown_directories(), str(plain_path(spec.image))),
                    rlimits=((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, SANDBOX_OPEN_FILES)),
                    writable=(str(place.run_dir / RUNSC_DIRECTORY),),
                    as_root=True,
                )
                assert confinement.uid is not None
                directory = _prepare(place, spec, uid=confinement.uid)
                console = open_pipe(place.run_dir / CONSOLE_PIPE, os.O_RDONLY)
                on_error = stack.enter_context(ExitStack())
                on_error.callback(os.close, console)
                # The sandbox's ends. Of `out` somebody must have the reading end for a moment, too.
                reader = open_pipe(place.run_dir / OUT_PIPE, os.O_RDONLY)
                stack.callback(os.close, reader)
                ends: list[int] = []
                for name, flags in ((IN_PIPE, os.O_RDONLY), (OUT_PIPE, os.O_WRONLY), (CONSOLE_PIPE, os.O_WRONLY)):
                    ends.append(open_pipe(place.run_dir / name, flags))
                    stack.callback(os.close, ends[-1])
                    os.set_blocking(ends[-1], True)
                cgroup = self._cgroups.create(place.id, _limits(spec.shape))
                request = SpawnRequest(
                    argv=arguments(self._program, platform=PLATFORM, directory=directory),
                    env=_ENVIRONMENT,
                    descriptors=ends,
                    confinement=confinement,
                    namespaces=CLONE_NEWNS,
                    cgroups=cgroup.process_files,
                    stdio=3,
                )
                creator, _ = await self._spawner.spawn(request)
                async with asyncio.timeout(START_TIMEOUT_S):
                    ended = await creator.wait()
                if ended.exit_status != 0:
                    with contextlib.suppress(BlockingIOError):
                        tail = os.read(console, 4096).decode(errors="replace")
                    raise MachineStartError(f"runsc could not make machine {place.id}.", serial_tail=tail)
                process = await self._spawner.watch(int((directory / PID_FILE).read_text()))
                machine = GvisorMachine(
                    place=place,
                    spec=spec,
                    process=process,
                    cgroup=cgroup,
                    state=RunState.STARTING,
                    console=console,
                )
                on_error.pop_all()
                return machine
        except BaseException as error:
            for each in (creator, process):
                if each is not None:
                    each.send_signal(signal.SIGKILL)
                    await each.wait()
            await asyncio.to_thread(remove_runtime_files, place, cgroup)
            if isinstance(error, TimeoutError):
                raise MachineStartError(f"runsc took more than {START_TIMEOUT_S:.0f} s for {place.id}.") from error
            if isinstance(error, OSError | ValueError):
                raise SpawnError(f"Machine {place.id} could not be prepared: {error}") from error
            raise
        finally:
            if creator is not None:
                creator.close()

    async def _read_by_guest(self, machine: GvisorMachine, wire: PipeCarrier) -> None:
        """Wait until the guest has taken the archive: while nobody is at the other end it would see it end too soon."""
        while wire.unread_bytes():
            if machine.is_dead:
                raise MachineGoneError((await machine.wait_dead()).reason)
            await asyncio.sleep(0.005)  # a pipe says when it has room, not when it is empty

    def _shown_directories(self) -> tuple[str, ...]:
        """Where runsc is, if not with the system's."""
        return () if self._program.is_relative_to("/usr") else (str(self._program.parent),)


def _prepare(place: MachinePlace, spec: MachineSpec, *, uid: int) -> Path:
    """The pipes of a machine, and the directory that runsc gets, which is the machine's user's. Blocking, and quick."""
    directory = place.run_dir / RUNSC_DIRECTORY
    place.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in (IN_PIPE, OUT_PIPE, CONSOLE_PIPE):
        os.mkfifo(place.run_dir / name, mode=0o600)
    for each in (directory, directory / EMPTY_DIRECTORY):
        each.mkdir(mode=0o700)
        os.chown(each, uid, uid)
    path = directory / CONFIG_FILE
    path.write_text(config(spec, rootfs=plain_path(spec.image), directory=directory))
    os.chown(path, uid, uid)
    return directory


def _limits(shape: MachineShape) -> Limits:
    return Limits(
        memory_bytes=(shape.memory_mib + SANDBOX_OVERHEAD_MIB) << 20,
        cpus=shape.vcpus + SANDBOX_EXTRA_CPUS,
        processes=SANDBOX_PROCESSES,
    )


def _sentence(needs: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in needs.items())
