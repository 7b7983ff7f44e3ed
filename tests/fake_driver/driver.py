"""The fake driver: no virtual machine, but a real agent as a process of this host, behind a UNIX socket.

For tests of what lies above a driver. What it does: boot, wire, kernels, commands, files, pause and resume, death with
a reason, adoption by a later process.

What it does not do:

* It isolates nothing. Cells are processes of this host with the rights of whoever started the gateway.
* A snapshot holds the files of the home directory and the agent's place on the wire. It does not hold memory: a
  restored machine has a new kernel, without variables, without the environment that its sandbox had asked for, and with
  a first cell 1; a cell that ran does not run on.
* Clock, host name, random pool, limits of memory, CPUs and disk are the host's. Nothing is shared between clones.
* Of an image nothing is used but its name and recipe; kernels are those of the Python that runs the gateway.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, Self

import vm_runtime
from tests.fake_driver.guest import MARKER_FILE, GuestSettings
from tests.fake_driver.machine import (
    CONSOLE_FILE,
    GUEST_DIRECTORY,
    HOME_DIRECTORY,
    WIRE_SOCKET,
    FakeMachine,
    FakeRecord,
    remove_files,
)
from tests.fake_driver.states import STATE_FORMAT, FakeContent, FakeStates, unpack_home
from tests.fake_driver.tree import is_stopped
from vm_runtime.confinement.host import HostConfinement, find_confinement
from vm_runtime.confinement.namespaces import CLONE_NEWPID, CLONE_NEWUSER, Confinement
from vm_runtime.confinement.process import Process, Spawner, SpawnRequest, boot_id, start_time_ticks
from vm_runtime.drivers.base import (
    Capabilities,
    Capability,
    Check,
    Driver,
    DriverSettings,
    Failure,
    MachinePaths,
    Shorter,
)
from vm_runtime.errors import MachineGoneError, SpawnError
from vm_runtime.snapshots.manifest import State
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.spec import MachineSpec
from vm_runtime.states import RunState
from vm_runtime.wire.protocol import BOOT_MARKER

_CODE = str(Path(vm_runtime.__path__[0]).parent)
_NO_ISOLATION = "The fake driver isolates nothing: cells run as processes of this host."
_NO_MEMORY = "The fake driver keeps files only: after a restore the kernel is a new one."


class FakeDriver(Driver):
    """`close()` it at the end; machines run on. without: capabilities that it is to deny, for tests."""

    name: ClassVar[str] = "fake"
    # Python code of the process that is a machine.
    program: ClassVar[str] = (
        f"import sys; sys.path.insert(0, {_CODE!r}); from tests.fake_driver.guest import main; main()"
    )

    def __init__(self, spawner: Spawner, confinement: HostConfinement, *, without: Set[str] = frozenset()) -> None:
        self._spawner = spawner
        self._namespaces = confinement.namespaces & (CLONE_NEWPID | CLONE_NEWUSER)
        self._without = without

    @classmethod
    async def start(cls, settings: DriverSettings, *, progress: Callable[[str], None]) -> Self:
        spawner = Spawner()
        try:
            confinement = await find_confinement(spawner, devices=())
        except BaseException:
            await spawner.close()
            raise
        return cls(spawner, confinement, without=frozenset(settings.options.get("fake_without", "").split()))

    @classmethod
    async def checks(cls, settings: DriverSettings) -> Sequence[Check]:
        return [Check(name="isolation", found="none", problem=_NO_ISOLATION, fix="hypercelld serve --driver qemu")]

    @property
    def capabilities(self) -> Capabilities:
        yes = Capability()
        denied = Capability(ok=False, why_not="This fake driver was told to do without it.")
        return Capabilities(
            isolation=Capability(ok=False, why_not=_NO_ISOLATION, fix="hypercelld serve --driver qemu"),
            snapshot=denied if "snapshot" in self._without else yes,
            keeps_memory=Capability(ok=False, why_not=_NO_MEMORY),
            clones_share_memory=Capability(ok=False, why_not="Each fake machine is a Python of its own."),
            checkpoint_each_cell=denied if "checkpoint_each_cell" in self._without else yes,
        )

    def identity(self) -> str:
        return f"fake {STATE_FORMAT} python {platform.python_version()} {_CODE}"

    def can_load(self, state: State) -> str | None:
        if (state.driver, state.format) == (self.name, STATE_FORMAT):
            return None
        return f"The snapshot is of the driver {state.driver} ({state.format}); this is {self.name} ({STATE_FORMAT})."

    async def boot(self, spec: MachineSpec, *, paths: MachinePaths, guest: bytes, timeout_s: float) -> FakeMachine:
        content = FakeContent(home=b"", marker=BOOT_MARKER.hex())
        return await self._start(spec, paths, content, kernel=False)

    def states(
        self,
        store: SnapshotStore,
        *,
        on_shortened: Callable[[Shorter], Awaitable[None]],
        on_failed: Callable[[Failure], None],
    ) -> FakeStates:
        return FakeStates(
            store,
            driver=self.name,
            start=lambda spec, paths, content: self._start(spec, paths, content, kernel=True),
        )

    async def adopt(self, paths: MachinePaths) -> FakeMachine:
        record = await asyncio.to_thread(FakeRecord.read, paths.run_dir)
        process = None
        if record is not None and record.boot_id == boot_id():
            process = Process.find(record.pid, record.start_time)
        if record is None or process is None:
            await asyncio.to_thread(remove_files, paths)
            raise MachineGoneError(f"There is no machine at {paths.run_dir} that runs.")
        state = RunState.PAUSED if await asyncio.to_thread(is_stopped, record.pid) else RunState.RUNNING
        return FakeMachine(paths=paths, spec=record.spec, process=process, state=state)

    def remove_leftovers(self, machines_dir: Path, *, keep: Set[str]) -> None:
        if machines_dir.is_dir():
            for directory in machines_dir.iterdir():
                if directory.name not in keep:
                    shutil.rmtree(directory, ignore_errors=True)

    async def close(self) -> None:
        await self._spawner.close()

    async def _start(
        self, spec: MachineSpec, paths: MachinePaths, content: FakeContent, *, kernel: bool
    ) -> FakeMachine:
        process: Process | None = None
        try:
            with ExitStack() as stack:
                # Not in a thread, which would go on making files when this is cancelled.
                listener, console = _prepare(stack, paths, content)
                settings = GuestSettings(
                    run=str(paths.run_dir / GUEST_DIRECTORY),
                    home=str(paths.disk_dir / HOME_DIRECTORY),
                    marker=content.marker,
                    kernel=kernel,
                )
                request = SpawnRequest(
                    argv=[sys.executable, "-I", "-c", self.program, settings.to_json()],
                    env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"},
                    descriptors=[console, listener.fileno()],
                    confinement=Confinement(
                        uid=None, new_root=False, new_proc=False, read_only=(), devices=(), rlimits=()
                    ),
                    namespaces=self._namespaces,
                    cgroups=(),
                )
                process, _ = await self._spawner.spawn(request)
            record = FakeRecord(
                pid=process.pid,
                start_time=start_time_ticks(process.pid) or 0,
                boot_id=boot_id(),
                memory_mib=spec.shape.memory_mib,
                vcpus=spec.shape.vcpus,
                disk_mib=spec.shape.disk_mib,
                image_digest=spec.image.digest,
                vmlinux=spec.image.vmlinux,
                initramfs=spec.image.initramfs,
                rootfs=spec.image.rootfs,
            )
            record.write(paths.run_dir)
            await self._spawner.keep(process)
        except BaseException as error:
            if process is not None:
                process.send_signal(signal.SIGKILL)
                await asyncio.shield(process.wait())
                process.close()
            await asyncio.shield(asyncio.to_thread(remove_files, paths))
            if isinstance(error, OSError):
                raise SpawnError(f"Machine {paths.id} could not be prepared: {error}") from error
            raise
        return FakeMachine(paths=paths, spec=spec, process=process, state=RunState.RUNNING)


def _prepare(stack: ExitStack, paths: MachinePaths, content: FakeContent) -> tuple[socket.socket, int]:
    """The directories and files of a machine; its listening socket and its console."""
    for directory in (paths.run_dir, paths.run_dir / GUEST_DIRECTORY):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    (paths.run_dir / GUEST_DIRECTORY / MARKER_FILE).write_text(content.marker)
    unpack_home(content.home, paths)
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    listener.bind(str(paths.run_dir / WIRE_SOCKET))
    listener.listen(4)
    console = os.open(paths.run_dir / CONSOLE_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, console)
    return listener, console
