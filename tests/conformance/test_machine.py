"""What every driver's machines must do. The guest counts in memory, writes pages and prints beats (qemu/pvh.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tests.conformance import pvh
from tests.conformance.conftest import DISK_MIB, MEMORY_MIB, Bench, beat, counted_on, read_word
from vm_runtime.confinement.process import start_time_ticks
from vm_runtime.drivers.base import MachineState
from vm_runtime.drivers.qemu.driver import QemuDriver
from vm_runtime.errors import MachineGoneError, MachineStartError, MachineStateError
from vm_runtime.snapshots.layers import CapturedPages, Layer, MemoryImage
from vm_runtime.snapshots.memory import PAGE_SIZE
from vm_runtime.snapshots.pages import PageBuffer, count_pages, read_pages
from vm_runtime.spec import ImageFiles, MachineSpec
from vm_runtime.states import RunState


async def test_boot_runs_the_guest_and_kill_leaves_nothing(bench: Bench) -> None:
    machine = await bench.boot()
    assert machine.state is RunState.RUNNING
    await beat(machine)
    assert machine.memory_fd is not None
    assert int.from_bytes(os.pread(machine.memory_fd, 4, pvh.COUNTER_ADDRESS), "little") > 0
    usage = machine.memory_usage()
    assert usage.unique_bytes > 1 << 20
    assert usage.shared_bytes > 0

    death = await machine.kill()
    assert death.requested
    assert death == await machine.kill() == await machine.wait_dead()
    assert machine.is_dead
    assert not machine.place.run_dir.exists()
    assert not is_running(machine.pid)
    with pytest.raises(MachineStateError, match="is dead"):
        await machine.pause()


async def test_pause_stops_the_guest_and_resume_lets_it_go_on(bench: Bench) -> None:
    machine = await bench.boot()
    try:
        await beat(machine)
        await machine.pause()
        await machine.pause()
        assert machine.state is RunState.PAUSED
        stopped = read_word(machine, pvh.COUNTER_ADDRESS)
        await asyncio.sleep(0.05)
        assert read_word(machine, pvh.COUNTER_ADDRESS) == stopped
        await machine.resume()
        printed = machine.serial_tail().count(".")
        await beat(machine, printed + 1)
        assert read_word(machine, pvh.COUNTER_ADDRESS) > stopped
    finally:
        await machine.kill()


async def test_two_clones_go_on_from_one_state_with_memory_of_their_own(bench: Bench) -> None:
    state = await bench.template()
    counted = int.from_bytes(os.pread(state.base.fd, 4, pvh.COUNTER_ADDRESS), "little")
    first, second = await asyncio.gather(
        *(bench.driver.restore(bench.spec, state, place=bench.place(name)) for name in ("first", "second"))
    )
    try:
        await second.pause()
        held = read_word(second, pvh.COUNTER_ADDRESS)
        assert held >= counted
        before = read_word(first, pvh.COUNTER_ADDRESS)
        await counted_on(first, before)
        assert read_word(second, pvh.COUNTER_ADDRESS) == held
        assert int.from_bytes(os.pread(state.base.fd, 4, pvh.COUNTER_ADDRESS), "little") == counted
        assert first.memory_mapping().private
        assert first.memory_fd is None
    finally:
        await asyncio.gather(first.kill(), second.kill())
        state.base.close()
    assert not bench.place("first").disk_dir.exists()


async def test_a_clone_knows_the_pages_it_wrote(bench: Bench) -> None:
    state = await bench.template()
    clone = await bench.driver.restore(bench.spec, state, place=bench.place("clone"))
    try:
        await beat(clone, 2)
        with pytest.raises(MachineStateError):
            await clone.dirty_ranges()
        await clone.pause()
        written = {page for first, count in await clone.dirty_ranges() for page in range(first, first + count)}
        assert pvh.COUNTER_ADDRESS // PAGE_SIZE in written
        first_page = pvh.PAGES_ADDRESS // PAGE_SIZE
        assert written & set(range(first_page, first_page + pvh.PAGES_WRITTEN))
        assert len(written) < 2 * pvh.PAGES_WRITTEN
    finally:
        await clone.kill()
        state.base.close()


async def test_a_clone_of_a_clone_goes_on_from_its_layer(bench: Bench) -> None:
    state = await bench.template()
    parent = await bench.driver.restore(bench.spec, state, place=bench.place("first"))
    frozen = None
    try:
        await beat(parent, 2)
        await parent.pause()
        await parent.device_state(bench.directory / "device-2")
        runs = await parent.dirty_ranges()
        buffer = PageBuffer(count_pages(runs))
        read_pages(parent.pid, parent.memory_mapping().address, runs, buffer)
        frozen = await parent.freeze_disk(bench.directory / "first-2.qcow2")
        counted = read_word(parent, pvh.COUNTER_ADDRESS)
        await parent.resume()

        captured = CapturedPages(size_bytes=MEMORY_MIB << 20, parts=((tuple(runs), buffer),))
        path = bench.directory / "layer"
        captured.write(path, under=MemoryImage(state.base, ()))
        layer = Layer.open(path, size_bytes=MEMORY_MIB << 20)
        child_state = MachineState(
            base=state.base,
            layers=(layer,),
            device=bench.directory / "device-2",
            disk_chain=(*state.disk_chain, frozen),
        )
        child = await bench.driver.restore(bench.spec, child_state, place=bench.place("second"))
        try:
            assert read_word(child, pvh.COUNTER_ADDRESS) >= counted
            await beat(child, 1)
            assert not parent.is_dead
        finally:
            await child.kill()
            layer.close()
    finally:
        await parent.kill()
        state.base.close()
    assert parent.disk_chain[-1].name == "first-2.qcow2"
    assert frozen is not None
    assert frozen.exists()
    assert not (bench.directory / "first-2.qcow2").exists()


async def test_a_vmm_killed_from_outside_is_noticed_with_its_signal(bench: Bench) -> None:
    machine = await bench.boot()
    await beat(machine)
    os.kill(machine.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        death = await machine.wait_dead()
    assert death.signal == signal.SIGKILL
    assert not death.requested
    assert "SIGKILL" in death.reason
    assert death.serial_tail.endswith(".")
    with pytest.raises(MachineStateError):
        machine.memory_mapping()
    await machine.kill()


async def test_a_guest_that_ends_itself_says_so(bench: Bench) -> None:
    vmlinux = bench.directory / "exiting"
    vmlinux.write_bytes(pvh.exiting_elf())
    bench.spec = MachineSpec(shape=bench.spec.shape, image=_with_kernel(bench.spec.image, vmlinux))
    machine = await bench.boot()
    try:
        async with asyncio.timeout(20):
            death = await machine.wait_dead()
        assert death.reason == "The guest powered itself off."
        assert death.exit_status == 0
    finally:
        await machine.kill()


async def test_a_kernel_that_is_none_is_a_start_error_with_the_reason(bench: Bench) -> None:
    bench.spec.image.vmlinux.write_bytes(b"not a kernel")
    with pytest.raises(MachineStartError, match=r"kernel|bzImage|exited"):
        await bench.boot()
    assert not bench.place("booted").run_dir.exists()


async def test_a_device_state_that_is_none_is_a_start_error(bench: Bench) -> None:
    state = await bench.template()
    state.device.write_bytes(b"QEVM" + bytes(100))
    with pytest.raises(MachineStartError):
        await bench.driver.restore(bench.spec, state, place=bench.place("clone"))
    assert not bench.place("clone").run_dir.exists()
    assert not bench.place("clone").disk_dir.exists()
    state.base.close()


async def test_a_cancelled_restore_leaves_nothing(bench: Bench) -> None:
    state = await bench.template()
    for delay_s in (0.0, 0.005, 0.02, 0.04):
        task = asyncio.create_task(bench.driver.restore(bench.spec, state, place=bench.place("clone")))
        await asyncio.sleep(delay_s)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(outcome, BaseException):
            await outcome.kill()
        assert not bench.place("clone").run_dir.exists()
        assert not bench.place("clone").disk_dir.exists()
    state.base.close()


async def test_a_later_driver_adopts_what_an_earlier_one_left_running(bench: Bench) -> None:
    state = await bench.template()
    clone = await bench.driver.restore(bench.spec, state, place=bench.place("clone"))
    await beat(clone)
    await clone.detach()
    await clone.detach()
    await bench.driver.close()
    state.base.close()

    later = await QemuDriver.start(accelerator=bench.driver.accelerator)
    try:
        adopted = await later.adopt(bench.place("clone"))
        assert adopted.pid == clone.pid
        assert adopted.state is RunState.RUNNING
        assert adopted.spec == bench.spec
        await beat(adopted)
        await adopted.pause()
        assert await adopted.dirty_ranges()
        await adopted.resume()
        os.kill(adopted.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            assert (await adopted.wait_dead()).exit_status is None
        await adopted.kill()
        assert not bench.place("clone").disk_dir.exists()
        with pytest.raises(MachineGoneError):
            await later.adopt(bench.place("clone"))
    finally:
        await later.close()


async def test_adopting_a_machine_that_died_unwatched_removes_its_leftovers(bench: Bench) -> None:
    state = await bench.template()
    clone = await bench.driver.restore(bench.spec, state, place=bench.place("clone"))
    await clone.detach()
    state.base.close()
    os.kill(clone.pid, signal.SIGKILL)
    await asyncio.to_thread(wait_gone, clone.pid)
    with pytest.raises(MachineGoneError):
        await bench.driver.adopt(bench.place("clone"))
    assert not bench.place("clone").run_dir.exists()
    assert not bench.place("clone").disk_dir.exists()


async def test_the_vmm_has_no_rights_and_limits(bench: Bench) -> None:
    machine = await bench.boot()
    try:
        status = dict(line.split(":\t", 1) for line in proc(machine.pid, "status").splitlines() if ":\t" in line)
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert int(status["CapEff"], 16) == 0
        missing = {step.name for step in bench.driver.confinement().missing}
        if "unprivileged user" not in missing and os.geteuid() == 0:
            assert int(status["Uid"].split()[0]) >= 1_900_000_000
        for name, kind in (("network namespace", "net"), ("pid namespace", "pid"), ("mount namespace", "mnt")):
            if name not in missing:
                assert namespace(machine.pid, kind) != namespace(os.getpid(), kind)
        if "own root" not in missing:
            visible = entries(machine.pid)
            assert visible <= {"usr", "bin", "sbin", "lib", "lib32", "lib64", "etc", "dev", "proc"}
        if "memory limit" not in missing:
            assert "/hypercell/booted" in proc(machine.pid, "cgroup")
        assert str((DISK_MIB + 64) << 20) in proc(machine.pid, "limits")
    finally:
        await machine.kill()


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def entries(pid: int) -> set[str]:
    """What the VMM sees in its root."""
    return {path.name for path in Path(f"/proc/{pid}/root").iterdir()}


def namespace(pid: int, kind: str) -> int:
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino


def is_running(pid: int) -> bool:
    return start_time_ticks(pid) is not None


def wait_gone(pid: int) -> None:
    while is_running(pid):
        time.sleep(0.01)


def _with_kernel(image: ImageFiles, vmlinux: Path) -> ImageFiles:
    return ImageFiles(digest=image.digest, vmlinux=vmlinux, initramfs=image.initramfs, rootfs=image.rootfs)
