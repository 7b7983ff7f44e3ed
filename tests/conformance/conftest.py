"""One suite over every driver: its cases, the guest that each of them runs, and a check that nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest

from tests.conformance import echo, pvh
from tests.fake_driver.driver import FakeDriver
from tests.fake_driver.tree import is_stopped
from vm_runtime.drivers.base import Driver, DriverSettings, MachinePlace
from vm_runtime.drivers.gvisor import program as runsc
from vm_runtime.drivers.gvisor.driver import GvisorDriver
from vm_runtime.drivers.qemu.arguments import Accelerator
from vm_runtime.drivers.qemu.driver import QemuDriver
from vm_runtime.drivers.qemu.machine import QemuMachine
from vm_runtime.drivers.qemu.program import PROGRAM
from vm_runtime.machine import Machine
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.saver import Saver
from vm_runtime.saving.values import Description, Then
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec
from vm_runtime.states import RunState

MEMORY_MIB = 64
DISK_MIB = 64
BOOT_TIMEOUT_S = 60.0


class Subject(ABC):
    """A driver under test, and how to see from outside what its guest does."""

    name: str

    def problem(self) -> str | None:
        """Why it cannot be tested here."""
        return None

    @abstractmethod
    async def start(self, directory: Path) -> Driver: ...

    def write_image(self, image: ImageFiles) -> None:
        """The files of the image that it runs."""
        image.vmlinux.write_bytes(pvh.elf())
        image.rootfs.write_bytes(bytes(65536))

    @abstractmethod
    async def works(self, machine: Machine) -> None:
        """Wait until the guest has done something since it was started, restored or resumed."""

    @abstractmethod
    async def stands(self, machine: Machine) -> bool:
        """Whether the guest does nothing at all."""


class Qemu(Subject):
    """Runs the guest of pvh.py, which counts in memory, writes pages and prints beats."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.name = f"qemu-{accelerator}"
        self.accelerator = accelerator

    def problem(self) -> str | None:
        if shutil.which(PROGRAM) is None:
            return f"{PROGRAM} is not installed"
        return kvm_problem() if self.accelerator is Accelerator.KVM else None

    async def start(self, directory: Path) -> Driver:
        return await QemuDriver.on(self.accelerator)

    async def works(self, machine: Machine) -> None:
        await counted_on(cast(QemuMachine, machine), read_word(machine, pvh.COUNTER_ADDRESS))

    async def stands(self, machine: Machine) -> bool:
        before = read_word(machine, pvh.COUNTER_ADDRESS)
        await asyncio.sleep(0.05)  # 50,000 rounds of its loop
        return read_word(machine, pvh.COUNTER_ADDRESS) == before


class Fake(Subject):
    """Runs a real agent."""

    name = "fake"

    async def start(self, directory: Path) -> Driver:
        return await FakeDriver.start(DriverSettings(state_dir=directory), say=lambda text: None)

    async def works(self, machine: Machine) -> None:
        assert not await self.stands(machine)
        (await machine.open_wire()).close()

    async def stands(self, machine: Machine) -> bool:
        return is_stopped(machine.pid)


class Gvisor(Subject):
    """Runs the program of echo.py in the place of the image's Python."""

    name = "gvisor"

    def problem(self) -> str | None:
        if shutil.which(runsc.PROGRAM) is None:
            return f"{runsc.PROGRAM} is not installed"
        return None if os.geteuid() == 0 else "gVisor's machines need a gateway that is root"

    async def start(self, directory: Path) -> Driver:
        return await GvisorDriver.start(DriverSettings(state_dir=directory), say=lambda text: None)

    def write_image(self, image: ImageFiles) -> None:
        tree = image.rootfs.with_name("tree")
        (tree / "usr/bin").mkdir(parents=True)
        program = tree / "usr/bin/python3"
        program.write_bytes(echo.elf())
        program.chmod(0o755)
        subprocess.run(["mkfs.erofs", "--quiet", image.rootfs, tree], check=True)

    async def works(self, machine: Machine) -> None:
        wire = await machine.open_wire()
        try:
            sent, received = secrets.token_bytes(16), b""
            await wire.write([sent])
            while sent not in received:
                data = await wire.read(4096)
                assert data, machine.serial_tail()
                received += data
        finally:
            wire.close()

    async def stands(self, machine: Machine) -> bool:
        return is_stopped(machine.pid)


SUBJECTS = {subject.name: subject for subject in (Qemu(Accelerator.TCG), Qemu(Accelerator.KVM), Gvisor(), Fake())}


def kvm_problem() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        return f"/dev/kvm does not open: {error.strerror}"
    return None


@dataclass
class Bench:
    """A driver with a store, a guest for it, and the places of its machines."""

    subject: Subject
    driver: Driver
    directory: Path
    spec: MachineSpec
    store: SnapshotStore
    saver: Saver

    def place(self, name: str) -> MachinePlace:
        directory = self.directory
        return MachinePlace(id=name + OURS, run_dir=directory / "m" / name, disk_dir=directory / "d" / name)

    async def boot(self, name: str = "booted") -> SavedMachine:
        return await self.saver.boot(self.spec, place=self.place(name), guest=b"", timeout_s=BOOT_TIMEOUT_S)

    async def template(self) -> Manifest:
        """A snapshot of a machine that was booted and has run for a while."""
        saved = await self.boot()
        try:
            await self.works(saved)
            return (await saved.take(describe(None), then=Then.STOP)).manifest
        finally:
            await saved.kill()

    async def restore(self, manifest: Manifest, name: str = "clone") -> SavedMachine:
        return await self.saver.restore(manifest, place=self.place(name))

    async def works(self, saved: SavedMachine) -> None:
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            await self.subject.works(saved.machine)

    def use_kernel(self, content: bytes) -> None:
        """Another guest from now on."""
        vmlinux = self.directory / "another"
        vmlinux.write_bytes(content)
        self.spec = replace(self.spec, image=replace(self.spec.image, vmlinux=vmlinux))

    def new_saver(self, driver: Driver | None = None) -> Saver:
        """As after a gateway's restart."""
        return Saver(store=self.store, driver=driver or self.driver, image_files=lambda digest: self.spec.image)


def describe(sandbox_id: str | None = "s1", *, name: str | None = None) -> Description:
    return Description(
        owner="someone",
        name=name,
        sandbox_id=sandbox_id,
        template="tiny",
        image_digest="0" * 64,
        kernel=None,
        wire_marker="0" * 32,
    )


def read_word(machine: Machine, address: int) -> int:
    """Four bytes of guest memory."""
    mapping = cast(QemuMachine, machine).memory_mapping()
    with Path(f"/proc/{machine.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(mapping.address + address)
        return int.from_bytes(memory.read(4), "little")


async def beat(machine: QemuMachine, count: int = 1) -> None:
    """Wait until the guest has printed so much since it was started or restored."""
    assert await machine.wait_serial(pvh.BEAT.decode() * count, timeout_s=BOOT_TIMEOUT_S), machine.serial_tail()


async def counted_on(machine: QemuMachine, count: int) -> None:
    """Wait until the guest has counted beyond this."""
    async with asyncio.timeout(BOOT_TIMEOUT_S):
        while read_word(machine, pvh.COUNTER_ADDRESS) <= count:  # noqa: ASYNC110 - memory has no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def open_bench(subject: Subject) -> AsyncIterator[Bench]:
    if (problem := subject.problem()) is not None:
        pytest.skip(problem)
    # A UNIX socket's path has at most 107 bytes, which pytest's own directories exceed.
    with tempfile.TemporaryDirectory(prefix="hc-") as name:
        directory = Path(name)
        image = ImageFiles(
            digest="0" * 64, vmlinux=directory / "vmlinux", initramfs=directory / "none", rootfs=directory / "rootfs"
        )
        subject.write_image(image)
        spec = MachineSpec(shape=MachineShape(memory_mib=MEMORY_MIB, vcpus=1, disk_mib=DISK_MIB), image=image)
        driver = await subject.start(directory)
        store = SnapshotStore(directory / "snapshots")
        saver = Saver(store=store, driver=driver, image_files=lambda digest: spec.image)
        try:
            yield Bench(subject=subject, driver=driver, directory=directory, spec=spec, store=store, saver=saver)
        finally:
            await saver.close()
            store.close()
            await driver.close()


@pytest.fixture(params=SUBJECTS)
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """Each driver that this host can run."""
    async with open_bench(SUBJECTS[request.param]) as bench:
        yield bench


@pytest.fixture(params=[name for name in SUBJECTS if name.startswith("qemu")])
async def qemu_bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """QEMU, for what only it can be asked."""
    async with open_bench(SUBJECTS[request.param]) as bench:
        yield bench


def qemu(saved: SavedMachine) -> QemuMachine:
    assert isinstance(saved.machine, QemuMachine)
    return saved.machine


def assert_nothing_left(bench: Bench, name: str) -> None:
    """Of a machine that has ended."""
    place = bench.place(name)
    assert not place.run_dir.exists(), list(place.run_dir.iterdir())
    assert not place.disk_dir.exists(), list(place.disk_dir.iterdir())
    assert f"machine-{place.id}" not in bench.store.pins()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process, cgroup, mount or shared memory outlives a test."""
    before = leftovers()
    yield
    assert leftovers() - before == set()


def leftovers() -> set[str]:
    found = {f"shm {path.name}" for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}
    found |= {line for line in Path("/proc/self/mounts").read_text().splitlines() if "/hc-" in line}
    for parent in ("memory/hypercell", "cpu/hypercell", "pids/hypercell", "hypercell"):
        directory = Path("/sys/fs/cgroup", parent)
        if directory.is_dir():
            # Other gateways' machines may come and go while a test runs: only ours count.
            found |= {str(path) for path in directory.iterdir() if path.is_dir() and path.name.endswith(OURS)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ours:
            found.add(f"process {process.name}")
    return found


# The end of the ids of machines that this process makes.
OURS = f"-{os.getpid()}"
RUNNING, PAUSED = RunState.RUNNING, RunState.PAUSED
