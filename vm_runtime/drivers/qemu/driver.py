"""The QEMU driver: starts VMMs, confined, and finds them again.

Assembles what others do: arguments.py (command line), machine.py, and vm_runtime/confinement.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vm_runtime.confinement.cgroups import Cgroup, CgroupRoot, Limits, find_root
from vm_runtime.confinement.host import HostConfinement, find_confinement
from vm_runtime.confinement.process import Process, Spawner, SpawnRequest, boot_id, start_time_ticks
from vm_runtime.confinement.report import ConfinementStep
from vm_runtime.drivers.base import (
    Capabilities,
    Check,
    Driver,
    DriverSettings,
    Failure,
    MachinePaths,
    Shorter,
)
from vm_runtime.drivers.qemu import qcow2
from vm_runtime.drivers.qemu.accelerator import Wish, choose
from vm_runtime.drivers.qemu.arguments import (
    ARGUMENTS_VERSION,
    FIRST_DISK_NODE,
    READ_ONLY_PRIVATE_RAM_SINCE,
    Accelerator,
    DiskFile,
    Kernel,
    Launch,
    Sockets,
    arguments,
)
from vm_runtime.drivers.qemu.checks import examine
from vm_runtime.drivers.qemu.disk_merge import merge_overlays
from vm_runtime.drivers.qemu.ext4 import format_disk
from vm_runtime.drivers.qemu.host_clock import tsc_khz
from vm_runtime.drivers.qemu.machine import (
    FIRST_OVERLAY_FDSET,
    QMP_SOCKET,
    ROOT_FDSET,
    SERIAL_SOCKET,
    WIRE_SOCKET,
    QemuMachine,
    open_disk,
    remove_leftovers,
    remove_runtime_files,
)
from vm_runtime.drivers.qemu.prepared import RESTORE_TIMEOUT_S, PreparedQemu, ending_on_error
from vm_runtime.drivers.qemu.program import PROGRAM, cpu_model, find_program
from vm_runtime.drivers.qemu.record import MachineRecord
from vm_runtime.errors import MachineGoneError, MachineStartError, SpawnError
from vm_runtime.files import closing
from vm_runtime.paged.states import PagedStates, remove_frozen_disks
from vm_runtime.snapshots.manifest import State
from vm_runtime.snapshots.memory import BaseMemory
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.spec import MachineShape, MachineSpec

# Beyond guest RAM: QEMU itself (40 MiB), translated code, and the host's cache of the disk that it writes, which the
# older cgroups charge to it and reclaim late (at 256 MiB a VMM that wrote 600 MB at once was killed).
VMM_OVERHEAD_MIB = 512
# One CPU per vCPU, and one for disk and console work, which under TCG shares the process.
VMM_EXTRA_CPUS = 1.0
# QEMU: main, RCU, vCPUs, at most 64 disk workers (its own limit), some to spare.
VMM_PROCESSES = 128
# Sockets, disk chain, eventfds; QEMU uses about 40.
VMM_OPEN_FILES = 1024
# qcow2's own tables: one L2 table (64 KiB) for each 512 MiB, and refcounts; far below this.
DISK_METADATA_MIB = 64

_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "G_SLICE": "always-malloc", "MALLOC_ARENA_MAX": "1"}


@dataclass(kw_only=True, eq=False)
class QemuDriver(Driver):
    """Machines on `qemu-system-x86_64 -M microvm`; from `start` or `on`. `close()` it at the end; machines run on."""

    name: ClassVar[str] = "qemu"
    state_format: ClassVar[str] = "qemu-pages-1"

    program: Path
    version: tuple[int, int, int]
    accelerator: Accelerator
    spawner: Spawner
    cgroups: CgroupRoot
    confinement: HostConfinement
    tsc_khz: int | None

    @classmethod
    async def start(cls, settings: DriverSettings, *, progress: Callable[[str], None]) -> Self:
        wish = Wish(settings.options.get("accelerator", Wish.AUTO))
        choice = await choose(wish, state_dir=settings.state_dir, image=settings.image, start=cls.on)
        progress(choice.why)
        return await cls.on(choice.accelerator)

    @classmethod
    async def on(cls, accelerator: Accelerator) -> Self:
        """As `start`, on this accelerator, whether it works or not."""
        path, version = await find_program(PROGRAM)
        spawner = Spawner()
        try:
            cgroups = await asyncio.to_thread(find_root)
            devices = ("/dev/kvm",) if accelerator is Accelerator.KVM else ()
            confinement = await find_confinement(spawner, devices=devices)
            khz = await asyncio.to_thread(tsc_khz) if accelerator is Accelerator.TCG else None
        except BaseException:
            await spawner.close()
            raise
        return cls(
            program=path,
            version=version,
            accelerator=accelerator,
            spawner=spawner,
            cgroups=cgroups,
            confinement=confinement,
            tsc_khz=khz,
        )

    @classmethod
    async def checks(cls, settings: DriverSettings) -> Sequence[Check]:
        return await examine(settings, start=cls.on)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    def identity(self) -> str:
        version = ".".join(map(str, self.version))
        return (
            f"qemu {version} microvm {self.accelerator} cpu={cpu_model(self.accelerator)} arguments={ARGUMENTS_VERSION}"
        )

    @property
    def needs(self) -> Mapping[str, str]:
        return {
            "version": ".".join(map(str, self.version)),
            "machine": f"microvm arguments={ARGUMENTS_VERSION}",
            "cpu_model": cpu_model(self.accelerator),
            "accelerator": self.accelerator,
        }

    def can_load(self, state: State) -> str | None:
        here = {"driver": self.name, "format": self.state_format, **self.needs}
        there = {"driver": state.driver, "format": state.format, **state.needs}
        if _comparable(here) == _comparable(there):
            return None
        return f"The snapshot needs {_sentence(there)}; this host has {_sentence(here)}."

    @property
    def sealed_bases(self) -> bool:
        return self.version[:2] < READ_ONLY_PRIVATE_RAM_SINCE

    def states(
        self,
        store: SnapshotStore,
        *,
        on_shortened: Callable[[Shorter], Awaitable[None]],
        on_failed: Callable[[Failure], None],
    ) -> PagedStates:
        return PagedStates(store, self, on_shortened=on_shortened, on_failed=on_failed)

    def confinement_steps(self) -> tuple[ConfinementStep, ...]:
        """How far this host allows machines to be confined."""
        # QEMU has a seccomp filter of its own (-sandbox), which every host allows.
        seccomp = ConfinementStep(name="seccomp")
        return (*self.confinement.steps(), seccomp, *self.cgroups.steps())

    async def boot(self, spec: MachineSpec, *, paths: MachinePaths, guest: bytes, timeout_s: float) -> QemuMachine:
        return await self.boot_kernel(spec, paths=paths, guest=guest, timeout_s=timeout_s, quiet=True)

    async def boot_kernel(
        self, spec: MachineSpec, *, paths: MachinePaths, guest: bytes, timeout_s: float, quiet: bool
    ) -> QemuMachine:
        """As `boot`, with boot messages if not quiet. An image without an initramfs gets none if guest is empty."""
        paths.disk_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        disk = paths.disk_dir / "disk.raw"
        try:
            await format_disk(disk, spec.shape.disk_mib)
            with ExitStack() as stack:
                memory_fd = os.memfd_create(f"hypercell-ram-{paths.id}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                own_memory_fd = stack.enter_context(closing(memory_fd))
                os.ftruncate(memory_fd, spec.shape.memory_mib << 20)
                files = [(spec.image.vmlinux, b"")]
                if guest or spec.image.initramfs.exists():
                    files.append((spec.image.initramfs, guest))
                copies = [
                    stack.enter_context(closing(await asyncio.to_thread(_copy_to_memfd, path, more)))
                    for path, more in files
                ]
                machine = await self._launch(
                    spec, paths, memory_fd=own_memory_fd, own_memory=True, disk=[disk], kernel_files=copies, quiet=quiet
                )
        except BaseException:
            _remove_disk(disk)
            raise
        async with ending_on_error(machine):
            qmp = await machine.connect(timeout_s=timeout_s)
            await qmp.execute("cont")
            machine.become_running_if_starting()
        return machine

    async def prepare_restore(
        self, spec: MachineSpec, base: BaseMemory, disk_chain: Sequence[Path], *, paths: MachinePaths
    ) -> PreparedQemu:
        paths.disk_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        overlay = paths.disk_dir / "disk.qcow2"
        qcow2.create_overlay(overlay, virtual_bytes=spec.shape.disk_mib << 20)
        try:
            machine = await self._launch(
                spec,
                paths,
                memory_fd=base.fd,
                own_memory=False,
                memory_read_only=not base.sealed and not self.sealed_bases,
                disk=[*disk_chain, overlay],
            )
        except BaseException:
            _remove_disk(overlay)
            raise
        async with ending_on_error(machine), asyncio.timeout(RESTORE_TIMEOUT_S):
            await machine.connect()
        return PreparedQemu(machine)

    async def adopt(self, paths: MachinePaths) -> QemuMachine:
        record = await asyncio.to_thread(MachineRecord.read, paths.run_dir)
        if record is None:
            await asyncio.to_thread(self._remove_unknown, paths)
            raise MachineGoneError(f"There is no machine at {paths.run_dir}.")
        process = Process.find(record.pid, record.start_time) if record.boot_id == boot_id() else None
        if process is None:
            await asyncio.to_thread(remove_leftovers, paths, record)
            await asyncio.to_thread(remove_frozen_disks, paths)
            raise MachineGoneError(f"The VMM of machine {paths.id} has ended while no gateway watched it.")
        memory_fd = None
        if record.memory_fd is not None:
            memory_fd = os.open(f"/proc/{record.pid}/fd/{record.memory_fd}", os.O_RDWR | os.O_CLOEXEC)
        machine = QemuMachine(
            paths=paths,
            record=record,
            process=process,
            cgroup=Cgroup(directories=record.cgroups),
            memory_fd=memory_fd,
        )
        machine.watch(stderr=None)
        async with ending_on_error(machine, gone=True):
            qmp = await machine.connect()
            status: dict[str, Any] = await qmp.execute("query-status")
            if status["status"] in ("inmigrate", "prelaunch"):
                raise MachineStartError(f"Machine {paths.id} had not been started completely; it was ended.")
            machine.adopted(running=bool(status["running"]))
            await machine.settle_disk()
        return machine

    async def merge_disks(self, overlays: Sequence[Path], target: Path) -> None:
        await merge_overlays(overlays, target, spawner=self.spawner, host=self.confinement)

    def remove_leftovers(self, machines_dir: Path, *, keep: Set[str]) -> None:
        if machines_dir.is_dir():
            for directory in machines_dir.iterdir():
                if directory.name not in keep:
                    shutil.rmtree(directory, ignore_errors=True)

    async def close(self) -> None:
        await self.spawner.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _launch(
        self,
        spec: MachineSpec,
        paths: MachinePaths,
        *,
        memory_fd: int,
        own_memory: bool,
        disk: Sequence[Path],
        memory_read_only: bool = False,
        kernel_files: Sequence[int] = (),
        quiet: bool = True,
    ) -> QemuMachine:
        """Start the process and make its Machine, which watches it already."""
        paths.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        cgroup = Cgroup(directories=())
        process: Process | None = None
        try:
            with ExitStack() as stack:
                ours, theirs = socket.socketpair()
                stack.callback(theirs.close)
                on_error = stack.enter_context(ExitStack())
                on_error.callback(ours.close)
                # Numbers in the VMM: see SpawnRequest.
                passed: list[int] = [theirs.fileno()]

                def give(fd: int) -> int:
                    passed.append(fd)
                    return len(passed) + 1

                memory_number = give(memory_fd)
                sockets = Sockets(
                    qmp=give(stack.enter_context(_listen(paths.run_dir / QMP_SOCKET)).fileno()),
                    wire=give(stack.enter_context(_listen(paths.run_dir / WIRE_SOCKET)).fileno()),
                    serial=give(stack.enter_context(_listen(paths.run_dir / SERIAL_SOCKET)).fileno()),
                )
                fdsets: list[tuple[int, int]] = []

                def disk_file(path: Path, *, writable: bool = False) -> DiskFile:
                    format = "qcow2" if path in disk[1:] else "raw"
                    fdset = FIRST_OVERLAY_FDSET if writable else ROOT_FDSET + len(fdsets)
                    for flags in (os.O_RDONLY, os.O_RDWR) if writable else (os.O_RDONLY,):
                        fd = stack.enter_context(closing(open_disk(path, flags, format=format)))
                        fdsets.append((fdset, give(fd)))
                    return DiskFile(fdset=fdset, format=format)

                kernel = None
                if kernel_files:
                    files = [f"/proc/self/fd/{give(fd)}" for fd in kernel_files]
                    kernel = Kernel(
                        vmlinux=files[0],
                        initramfs=files[1] if len(files) > 1 else None,
                        quiet=quiet,
                        tsc_khz=self.tsc_khz,
                    )
                launch = Launch(
                    version=self.version[:2],
                    accelerator=self.accelerator,
                    cpu=cpu_model(self.accelerator),
                    shape=spec.shape,
                    memory=f"/proc/self/fd/{memory_number}",
                    memory_shared=own_memory,
                    memory_read_only=memory_read_only,
                    rootfs=disk_file(spec.image.rootfs),
                    disk=[disk_file(path, writable=path is disk[-1]) for path in disk],
                    sockets=sockets,
                    fdsets=fdsets,
                    kernel=kernel,
                )
                cgroup = self.cgroups.create(paths.id, _limits(spec.shape))
                request = SpawnRequest(
                    argv=[str(self.program), *arguments(launch)],
                    env=_ENVIRONMENT,
                    descriptors=passed,
                    confinement=self.confinement.of(
                        paths.id, read_only=self._shown_directories(), rlimits=_rlimits(spec.shape)
                    ),
                    namespaces=self.confinement.namespaces,
                    cgroups=cgroup.process_files,
                )
                process, _ = await self.spawner.spawn(request)
                record = MachineRecord(
                    id=paths.id,
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
                    memory_inode=os.fstat(memory_fd).st_ino,
                    memory_fd=memory_number if own_memory else None,
                    disk_chain=tuple(disk),
                    disk_node=FIRST_DISK_NODE,
                    overlay=disk[-1],
                    cgroups=cgroup.directories,
                )
                record.write(paths.run_dir)
                await self.spawner.keep(process)
                machine = QemuMachine(
                    paths=paths,
                    record=record,
                    process=process,
                    cgroup=cgroup,
                    memory_fd=os.dup(memory_fd) if own_memory else None,
                )
                machine.watch(stderr=ours)
                on_error.pop_all()
                return machine
        except BaseException as error:
            if process is not None:
                process.send_signal(signal.SIGKILL)
                await asyncio.shield(process.wait())
                process.close()
            await asyncio.shield(asyncio.to_thread(remove_runtime_files, paths, cgroup))
            if isinstance(error, OSError):
                raise SpawnError(f"Machine {paths.id} could not be prepared: {error}") from error
            raise

    def _shown_directories(self) -> tuple[str, ...]:
        """Where QEMU and its files are, if not with the system's."""
        return () if self.program.is_relative_to("/usr") else (str(self.program.parent.parent),)

    def _remove_unknown(self, paths: MachinePaths) -> None:
        """A start that was interrupted before its record was written leaves sockets and perhaps empty cgroups."""
        remove_frozen_disks(paths)
        directories = tuple(dict.fromkeys(parent / paths.id for parent in self.cgroups.parents.values()))
        remove_runtime_files(paths, Cgroup(directories=directories))


def _limits(shape: MachineShape) -> Limits:
    return Limits(
        memory_bytes=(shape.memory_mib + VMM_OVERHEAD_MIB) << 20,
        cpus=shape.vcpus + VMM_EXTRA_CPUS,
        processes=VMM_PROCESSES + shape.vcpus,
    )


def _rlimits(shape: MachineShape) -> tuple[tuple[int, int], ...]:
    return (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, VMM_OPEN_FILES),
        (resource.RLIMIT_FSIZE, max(shape.disk_mib + DISK_METADATA_MIB, shape.memory_mib) << 20),
    )


@contextlib.contextmanager
def _listen(path: Path) -> Iterator[socket.socket]:
    """A listening socket to hand to the VMM. Clients can connect from now on; nobody waits for the VMM to make it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(4)
        yield listener


def _remove_disk(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files may lie there
        path.parent.rmdir()


def _comparable(needs: Mapping[str, str]) -> dict[str, str]:
    """Without the last number of the version: QEMU keeps the device state as it is within a stable branch, and a host
    that installs a security update must not lose what sleeps on it."""
    return {**needs, "version": ".".join(needs.get("version", "").split(".")[:2])}


def _sentence(needs: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in needs.items())


def _copy_to_memfd(path: Path, more: bytes) -> int:
    """A copy of a file, and more behind it, that any user may read, for a VMM whose user has no rights on the original.
    Gone when closed."""
    fd = os.memfd_create(path.name, os.MFD_CLOEXEC)
    try:
        with path.open("rb") as source, os.fdopen(os.dup(fd), "wb") as target:
            shutil.copyfileobj(source, target)
            target.write(more)
    except BaseException:
        os.close(fd)
        raise
    return fd
