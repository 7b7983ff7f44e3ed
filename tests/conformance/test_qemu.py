"""What only QEMU's machines can be asked. The guest counts in memory, writes pages and prints beats (pvh.py)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.conformance import pvh
from tests.conformance.conftest import (
    DISK_MIB,
    Bench,
    assert_nothing_left,
    beat,
    counted_on,
    qemu,
    read_word,
)
from vm_runtime.drivers.qemu.driver import QemuDriver
from vm_runtime.errors import MachineStartError
from vm_runtime.snapshots.manifest import PartKind


async def test_a_booted_machine_has_memory_of_its_own_and_a_console(qemu_bench: Bench) -> None:
    saved = await qemu_bench.boot()
    machine = qemu(saved)
    try:
        await beat(machine)
        assert machine.memory_fd is not None
        assert int.from_bytes(os.pread(machine.memory_fd, 4, pvh.COUNTER_ADDRESS), "little") > 0
        assert machine.serial_tail().endswith(".")
    finally:
        await saved.kill()


async def test_two_clones_go_on_from_one_state_with_memory_of_their_own(qemu_bench: Bench) -> None:
    bench = qemu_bench
    template = await bench.template()
    (base,) = template.state.of_kind(PartKind.BASE)

    def counted_in_base() -> int:
        with bench.store.part_path(PartKind.BASE, base.digest).open("rb") as file:
            return int.from_bytes(os.pread(file.fileno(), 4, pvh.COUNTER_ADDRESS), "little")

    counted = counted_in_base()
    first, second = await asyncio.gather(bench.restore(template, "first"), bench.restore(template, "second"))
    try:
        await second.machine.pause()
        held = read_word(second.machine, pvh.COUNTER_ADDRESS)
        assert held >= counted > 0
        await counted_on(qemu(first), read_word(first.machine, pvh.COUNTER_ADDRESS))
        assert read_word(second.machine, pvh.COUNTER_ADDRESS) == held
        assert counted_in_base() == counted
        assert qemu(first).memory_mapping().private
        assert qemu(first).memory_fd is None
    finally:
        await asyncio.gather(first.kill(), second.kill())


async def test_a_guest_that_ends_itself_says_so(qemu_bench: Bench) -> None:
    qemu_bench.use_kernel(pvh.exiting_elf())
    saved = await qemu_bench.boot()
    try:
        async with asyncio.timeout(60):
            death = await saved.machine.wait_dead()
        assert death.reason == "The guest powered itself off."
        assert death.exit_status == 0
    finally:
        await saved.kill()


async def test_a_kernel_that_is_none_is_a_start_error_with_the_reason(qemu_bench: Bench) -> None:
    qemu_bench.spec.image.vmlinux.write_bytes(b"not a kernel")
    with pytest.raises(MachineStartError, match=r"kernel|bzImage|exited"):
        await qemu_bench.boot()
    assert_nothing_left(qemu_bench, "booted")


async def test_a_device_state_that_is_none_is_a_start_error(qemu_bench: Bench) -> None:
    bench = qemu_bench
    template = await bench.template()
    with bench.store.begin() as draft:
        device = draft.add_bytes(PartKind.DEVICE, b"QEVM" + bytes(100))
        parts = tuple(
            part.model_copy(update=device.model_dump()) if part.kind is PartKind.DEVICE else part
            for part in template.state.parts
        )
        state = template.state.model_copy(update={"parts": parts})
        contents = template.model_copy(update={"state": state, "id": "0" * 32})
        broken = draft.publish(contents)
    with pytest.raises(MachineStartError):
        await bench.restore(broken)
    assert_nothing_left(bench, "clone")


async def test_the_vmm_has_no_rights_and_limits(qemu_bench: Bench) -> None:
    saved = await qemu_bench.boot()
    pid = saved.machine.pid
    try:
        status = dict(line.split(":\t", 1) for line in proc(pid, "status").splitlines() if ":\t" in line)
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert int(status["CapEff"], 16) == 0
        assert isinstance(qemu_bench.driver, QemuDriver)
        missing = {step.name for step in qemu_bench.driver.confinement_steps() if step.problem}
        if "unprivileged user" not in missing and os.geteuid() == 0:
            assert int(status["Uid"].split()[0]) >= 1_900_000_000
        for name, kind in (("network namespace", "net"), ("pid namespace", "pid"), ("mount namespace", "mnt")):
            if name not in missing:
                assert namespace(pid, kind) != namespace(os.getpid(), kind)
        if "own root" not in missing:
            visible = entries(pid)
            assert visible <= {"usr", "bin", "sbin", "lib", "lib32", "lib64", "etc", "dev", "proc"}
        if "memory limit" not in missing:
            assert "/hypercell/booted" in proc(pid, "cgroup")
        assert str((DISK_MIB + 64) << 20) in proc(pid, "limits")
    finally:
        await saved.kill()


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def entries(pid: int) -> set[str]:
    """What the VMM sees in its root."""
    return {path.name for path in Path(f"/proc/{pid}/root").iterdir()}


def namespace(pid: int, kind: str) -> int:
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino
