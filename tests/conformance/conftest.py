"""One suite over every driver: its cases, the tiny guest they run, and a check that nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance import pvh
from vm_runtime.drivers.base import MachinePlace, MachineState
from vm_runtime.drivers.qemu.arguments import Accelerator
from vm_runtime.drivers.qemu.driver import QemuDriver
from vm_runtime.drivers.qemu.machine import QemuMachine
from vm_runtime.drivers.qemu.program import PROGRAM
from vm_runtime.snapshots.memory import BaseMemory, freeze_memfd
from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec

MEMORY_MIB = 64
DISK_MIB = 64


def kvm_problem() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        return f"/dev/kvm does not open: {error.strerror}"
    return None


@dataclass
class Bench:
    """A driver, a guest for it, and the places of its machines."""

    driver: QemuDriver
    directory: Path
    spec: MachineSpec

    def place(self, name: str) -> MachinePlace:
        return MachinePlace(id=name, run_dir=self.directory / "m" / name, disk_dir=self.directory / "d" / name)

    def new_disk(self, name: str = "disk.raw") -> Path:
        path = self.directory / name
        path.touch()
        os.truncate(path, DISK_MIB << 20)
        return path

    async def boot(self, name: str = "booted") -> QemuMachine:
        return await self.driver.boot_kernel(
            self.spec,
            place=self.place(name),
            initramfs=None,
            disk=self.new_disk(f"{name}.raw"),
            timeout_s=60,
            quiet=True,
        )

    async def freeze(self, machine: QemuMachine, directory: Path) -> MachineState:
        """The state of a booted machine that has run for a while; the machine is ended."""
        assert await machine.wait_serial(pvh.BEAT.decode(), timeout_s=60)
        await machine.pause()
        await machine.device_state(directory / "device")
        assert machine.memory_fd is not None
        digest = await asyncio.to_thread(freeze_memfd, machine.memory_fd, directory / "ram")
        disk = machine.disk_chain
        await machine.kill()
        base = BaseMemory.load_sealed(directory / "ram", digest=digest, size_bytes=MEMORY_MIB << 20)
        return MachineState(base=base, layers=(), device=directory / "device", disk_chain=disk)

    async def template(self) -> MachineState:
        return await self.freeze(await self.boot(), self.directory)


def read_word(machine: QemuMachine, address: int) -> int:
    """Four bytes of guest memory."""
    mapping = machine.memory_mapping()
    with Path(f"/proc/{machine.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(mapping.address + address)
        return int.from_bytes(memory.read(4), "little")


async def beat(machine: QemuMachine, count: int = 1) -> None:
    """Wait until the guest has printed so much since it was started or restored."""
    assert await machine.wait_serial(pvh.BEAT.decode() * count, timeout_s=60), machine.serial_tail()


async def counted_on(machine: QemuMachine, count: int) -> None:
    """Wait until the guest has counted beyond this."""
    async with asyncio.timeout(60):
        while read_word(machine, pvh.COUNTER_ADDRESS) <= count:  # noqa: ASYNC110 - memory has no event
            await asyncio.sleep(0.01)


@pytest.fixture(params=["qemu-tcg", "qemu-kvm"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"{PROGRAM} is not installed")
    accelerator = Accelerator(request.param.removeprefix("qemu-"))
    if accelerator is Accelerator.KVM and (problem := kvm_problem()):
        pytest.skip(problem)
    driver = await QemuDriver.start(accelerator=accelerator)
    # A UNIX socket's path has at most 107 bytes, which pytest's own directories exceed.
    with tempfile.TemporaryDirectory(prefix="hc-") as name:
        directory = Path(name)
        image = ImageFiles(
            digest="0" * 64, vmlinux=directory / "vmlinux", initramfs=directory / "none", rootfs=directory / "rootfs"
        )
        image.vmlinux.write_bytes(pvh.elf())
        image.rootfs.write_bytes(bytes(65536))
        spec = MachineSpec(shape=MachineShape(memory_mib=MEMORY_MIB, vcpus=1, disk_mib=DISK_MIB), image=image)
        try:
            yield Bench(driver=driver, directory=directory, spec=spec)
        finally:
            await driver.close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process, cgroup, mount or shared memory outlives a test."""
    before = leftovers()
    yield
    assert leftovers() - before == set()


def leftovers() -> set[str]:
    found = {f"shm {path.name}" for path in Path("/dev/shm").iterdir()}
    found |= {line for line in Path("/proc/self/mounts").read_text().splitlines() if "/hc-" in line}
    for parent in ("memory/hypercell", "cpu/hypercell", "pids/hypercell", "hypercell"):
        directory = Path("/sys/fs/cgroup", parent)
        if directory.is_dir():
            # Other gateways' machines may come and go while a test runs: only this suite's names count.
            found |= {str(path) for path in directory.iterdir() if path.is_dir() and path.name.startswith(NAMES)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ours:
            found.add(f"process {process.name}")
    return found


# Ids of the machines that the tests make.
NAMES = ("booted", "clone", "first", "second")
