"""QEMU's command line as a function of values.

Touches no files and starts nothing; golden tests hold every line of it. Descriptors are numbers that the VMM inherits;
no path of the host's state appears here. Sources: qemu(1) and docs/system/i386/microvm.rst of QEMU 7.2 to 10.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vm_runtime.spec import MachineShape

# Part of the driver's identity: change it when a device is added, removed or moved, since device states depend on it,
# or when what a template was booted with would be wrong now.
ARGUMENTS_VERSION = 2

WIRE_PORT = "hypercell.wire"
MEMORY_BACKEND = "ram"
FIRST_DISK_NODE = "disk0"

# Cache of translated code under TCG. QEMU's default (up to 1 GiB) fills with use, and each sandbox has its own.
# Measured, five cells of pandas after a restore, unique memory and seconds of the fifth: 16 MiB 50 MiB 0.45 s,
# 24 MiB 58 MiB 0.23 s, 32 MiB 65 MiB 0.10 s. All is dropped when it is full, and a start with its first cell needs 25
# MiB: with 24 that cell took 200 ms longer. A template's boot happens once and may have more.
TCG_CACHE_MIB = 32
TCG_BOOT_CACHE_MIB = 256

# QEMU 9.0 can map a file that it may only read as writable private guest RAM (rom=off).
READ_ONLY_PRIVATE_RAM_SINCE = (9, 0)


_MACHINE_OPTIONS = "acpi=on,x-option-roms=off,auto-kernel-cmdline=off,suppress-vmdesc=on"


class Accelerator(StrEnum):
    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a booted machine runs. vmlinux and initramfs: paths as the VMM sees them. quiet: without boot messages.
    tsc_khz: the rate of the host's time stamp counter; needed under TCG."""

    vmlinux: str
    initramfs: str | None
    quiet: bool = True
    tsc_khz: int | None = None


@dataclass(frozen=True, kw_only=True)
class DiskFile:
    """One file of a disk's chain. fdset: number of the descriptor set that opens it."""

    fdset: int
    format: str


# Requests that a guest has under way at the host's disk: enough to keep it busy, few enough that their buffers and the
# pages that they dirty stay a small part of the machine's memory limit (64, QEMU's default, had VMMs killed for it).
DISK_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class Sockets:
    """Listening UNIX sockets, as descriptors."""

    qmp: int
    wire: int
    serial: int


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A VMM to start.

    memory: path of guest RAM as the VMM sees it; memory_shared: the machine's own file, else mapped copy-on-write;
        memory_read_only: the file may only be opened for reading.
    disk: oldest first, the last is written.
    kernel: None for a clone.
    fdsets: (set, descriptor) pairs for -add-fd.
    """

    version: tuple[int, int]
    accelerator: Accelerator
    cpu: str
    shape: MachineShape
    memory: str
    memory_shared: bool
    memory_read_only: bool
    rootfs: DiskFile
    disk: Sequence[DiskFile]
    sockets: Sockets
    fdsets: Sequence[tuple[int, int]]
    kernel: Kernel | None


def arguments(launch: Launch) -> tuple[str, ...]:
    """Everything after the program's name. The VMM starts stopped; `cont` boots it, `migrate-incoming` a clone."""
    tcg = launch.accelerator is Accelerator.TCG
    cache_mib = TCG_CACHE_MIB if launch.kernel is None else TCG_BOOT_CACHE_MIB
    shape = launch.shape
    result = [
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-M", f"microvm,{_MACHINE_OPTIONS},memory-backend={MEMORY_BACKEND}",
        "-object", f"main-loop,id=main-loop,thread-pool-max={DISK_WORKERS}",
        "-accel", f"tcg,thread=multi,tb-size={cache_mib}" if tcg else "kvm",
        "-cpu", launch.cpu,
        "-smp", str(shape.vcpus),
        "-m", f"{shape.memory_mib}M",
        "-object", _memory_backend(launch),
        "-global", "migration.send-configuration=off",
        "-global", "virtio-mmio.force-legacy=off",
        "-chardev", f"socket,id=qmp,fd={launch.sockets.qmp},server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
        # A socket and not a file: a guest that prints for ever must not fill the host's disk.
        "-chardev", f"socket,id=serial,fd={launch.sockets.serial},server=on,wait=off",
        "-serial", "chardev:serial",
        "-chardev", f"socket,id=wire,fd={launch.sockets.wire},server=on,wait=off",
    ]  # fmt: skip
    for fdset, descriptor in launch.fdsets:
        result += ["-add-fd", f"fd={descriptor},set={fdset}"]
    result += [
        "-object", "rng-builtin,id=entropy",
        "-device", "virtio-rng-device,rng=entropy",
        "-device", "virtio-serial-device,max_ports=2",
        "-device", f"virtserialport,chardev=wire,nr=1,name={WIRE_PORT}",
    ]  # fmt: skip
    for name, block in (("rootfs", _chain("rootfs", [launch.rootfs], writable=False)), _disk_node(launch.disk)):
        result += ["-blockdev", json.dumps(block, separators=(",", ":"))]
        # A full or broken disk of the host is an I/O error for the guest; QEMU's default would stop the machine.
        errors = "" if name == "rootfs" else ",werror=report"
        result += ["-device", f"virtio-blk-device,drive={block['node-name']},serial={name},rerror=report{errors}"]
    if launch.kernel is None:
        return (*result, "-incoming", "defer")
    result += ["-S", "-kernel", launch.kernel.vmlinux]
    if launch.kernel.initramfs is not None:
        result += ["-initrd", launch.kernel.initramfs]
    return (*result, "-append", kernel_command_line(launch.kernel))


def kernel_command_line(kernel: Kernel) -> str:
    """For vmlinux. A panic or reboot ends the machine (triple fault under -no-reboot)."""
    words = ["console=ttyS0", "panic=-1", "reboot=t"]
    if kernel.quiet:
        words.append("quiet")
    if kernel.tsc_khz is not None:
        # Without them Linux 6.1 and 6.12 hang under TCG while they calibrate their clock. Reliable: else it is checked
        # against timer ticks, of which a busy host loses some, and given up.
        words += [f"tsc_early_khz={kernel.tsc_khz}", "tsc=reliable", "no_timer_check"]
    return " ".join(words)


def overlay_node(name: str, overlay: DiskFile, *, writable: bool = True, backing: str | None = None) -> dict[str, Any]:
    """The options of one overlay: for `blockdev-add` of a fresh one that is about to be put on top of a running
    machine's disk, and for `blockdev-reopen` of one that gets another node under it."""
    return _chain(name, [overlay], writable=writable) | {"backing": backing}


def lower_node(name: str, files: Sequence[DiskFile]) -> dict[str, Any]:
    """The `blockdev-add` options of files that are about to be put under an overlay, lowest first."""
    return _chain(name, files, writable=False)


def _disk_node(disk: Sequence[DiskFile]) -> tuple[str, dict[str, Any]]:
    return "disk", _chain(FIRST_DISK_NODE, disk, writable=True)


def _chain(name: str, files: Sequence[DiskFile], *, writable: bool) -> dict[str, Any]:
    """Nested block nodes, every backing file given explicitly: headers are not believed, formats not guessed."""
    node: Mapping[str, Any] | None = None
    for position, file in enumerate(files):
        on_top = position == len(files) - 1
        writes = writable and on_top
        next_node: dict[str, Any] = {
            "driver": file.format,
            "read-only": not writes,
            "file": {
                "driver": "file",
                "filename": f"/dev/fdset/{file.fdset}",
                "locking": "off",
                "read-only": not writes,
                # Guest flushes need not reach the platter: a disk outlives a host crash only as part of a snapshot,
                # which is synced when it is taken.
                "cache": {"direct": False, "no-flush": True},
                **({"discard": "unmap"} if writes else {}),
            },
            "cache": {"direct": False, "no-flush": True},
        }
        if on_top:
            next_node = {"node-name": name, **next_node}
        if writes:
            next_node["discard"] = "unmap"
        if file.format == "qcow2":
            next_node["backing"] = node
        node = next_node
    assert isinstance(node, dict)
    return node


def _memory_backend(launch: Launch) -> str:
    backend = (
        f"memory-backend-file,id={MEMORY_BACKEND},size={launch.shape.memory_mib}M,mem-path={launch.memory},"
        f"share={'on' if launch.memory_shared else 'off'}"
    )
    if launch.memory_read_only:
        if launch.version < READ_ONLY_PRIVATE_RAM_SINCE:
            raise ValueError("QEMU before 9.0 opens guest RAM for writing; give it a sealed memfd.")
        backend += ",readonly=on,rom=off"
    return backend
