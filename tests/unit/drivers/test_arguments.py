"""QEMU's command line, every word of it, against golden files. `UPDATE_GOLDEN=1 pytest ...` rewrites them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from vm_runtime.drivers.qemu.arguments import (
    Accelerator,
    DiskFile,
    Kernel,
    Launch,
    Sockets,
    arguments,
    kernel_command_line,
    overlay_node,
)
from vm_runtime.spec import MachineShape

GOLDEN = Path(__file__).parent / "golden"

BOOT = Launch(
    version=(7, 2),
    accelerator=Accelerator.TCG,
    cpu="max",
    shape=MachineShape(memory_mib=512, vcpus=2, disk_mib=1024),
    memory="/proc/self/fd/4",
    memory_shared=True,
    memory_read_only=False,
    rootfs=DiskFile(fdset=1, format="raw"),
    disk=(DiskFile(fdset=2, format="raw"),),
    sockets=Sockets(qmp=5, wire=6, serial=7),
    fdsets=((1, 8), (2, 9), (2, 10)),
    kernel=Kernel(vmlinux="/proc/self/fd/11", initramfs="/proc/self/fd/12", tsc_khz=2_596_098),
)
CLONE = replace(
    BOOT,
    memory_shared=False,
    disk=(DiskFile(fdset=2, format="raw"), DiskFile(fdset=3, format="qcow2"), DiskFile(fdset=4, format="qcow2")),
    kernel=None,
)
CASES = {
    "boot-tcg": BOOT,
    "boot-kvm": replace(
        BOOT,
        accelerator=Accelerator.KVM,
        cpu="EPYC",
        kernel=Kernel(vmlinux="/proc/self/fd/11", initramfs="/proc/self/fd/12"),
    ),
    "clone-tcg-7.2": CLONE,
    "clone-kvm-10.0": replace(CLONE, version=(10, 0), accelerator=Accelerator.KVM, cpu="EPYC", memory_read_only=True),
}


@pytest.mark.parametrize("name", CASES)
def test_command_line(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    found = "".join(f"{word}\n" for word in arguments(CASES[name]))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text()


def test_a_file_that_may_only_be_read_needs_qemu_9() -> None:
    with pytest.raises(ValueError, match="sealed memfd"):
        arguments(replace(CLONE, version=(8, 2), memory_read_only=True))


def test_linux_is_helped_over_its_clock_calibration_under_tcg_only() -> None:
    assert "tsc_early_khz=2596098" in kernel_command_line(Kernel(vmlinux="v", initramfs=None, tsc_khz=2_596_098))
    assert "tsc" not in kernel_command_line(Kernel(vmlinux="v", initramfs=None))
    assert "quiet" not in kernel_command_line(Kernel(vmlinux="v", initramfs=None, quiet=False)).split()


def test_a_new_overlay_has_no_backing_file_until_the_snapshot_gives_it_one() -> None:
    node = overlay_node("disk7", DiskFile(fdset=107, format="qcow2"))
    assert node["node-name"] == "disk7"
    assert node["backing"] is None
    assert not node["read-only"]
