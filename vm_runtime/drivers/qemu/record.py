"""`machine.json`: what a later gateway must know to find a running machine again.

Written once the VMM has started, and before and after each change of its disk's chain; removed with the machine. It
lies in the runtime directory, so it does not outlive a reboot. A record of another format version is not read: its
machine is unknown then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vm_runtime.records import Record
from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec


class MachineRecord(Record):
    """pid with start_time (ticks since boot) and boot_id name the process.

    memory_inode: of the file that is mapped as guest RAM.
    memory_fd: its number in a booted VMM, None for a clone.
    overlay: the disk file to remove with it.
    next_overlay: the file of a disk freeze that has begun; whether it has happened, only the VMM knows.
    disk_floor: number of the lowest overlay that still has a block node.
    disk_lower: how often what lies under the overlays was replaced, or was about to be.
    """

    file_name = "machine.json"

    format: Literal[1] = 1
    id: str
    pid: int
    start_time: int
    boot_id: str
    memory_mib: int
    vcpus: int
    disk_mib: int
    image_digest: str
    vmlinux: Path
    initramfs: Path
    rootfs: Path
    memory_inode: int
    memory_fd: int | None
    disk_chain: tuple[Path, ...]
    disk_node: str
    overlay: Path | None
    next_overlay: Path | None = None
    disk_floor: int = 0
    disk_lower: int = 0
    cgroups: tuple[Path, ...]

    @property
    def spec(self) -> MachineSpec:
        return MachineSpec(
            shape=MachineShape(memory_mib=self.memory_mib, vcpus=self.vcpus, disk_mib=self.disk_mib),
            image=ImageFiles(
                digest=self.image_digest, vmlinux=self.vmlinux, initramfs=self.initramfs, rootfs=self.rootfs
            ),
        )
