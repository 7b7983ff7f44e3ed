"""`machine.json`: what a later gateway must know to find a running machine again.

Written once the guest runs, removed with the machine. It lies in the runtime directory, so it is gone after a reboot. A
record of another format version is not read: its machine is unknown then.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec

FORMAT_VERSION = 1
FILE_NAME = "machine.json"


class MachineRecord(BaseModel):
    """pid with start_time (ticks since boot) and boot_id name the sandbox's process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
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
    cgroups: tuple[Path, ...]

    @property
    def spec(self) -> MachineSpec:
        return MachineSpec(
            shape=MachineShape(memory_mib=self.memory_mib, vcpus=self.vcpus, disk_mib=self.disk_mib),
            image=ImageFiles(
                digest=self.image_digest, vmlinux=self.vmlinux, initramfs=self.initramfs, rootfs=self.rootfs
            ),
        )

    def write(self, run_dir: Path) -> None:
        """In one step, so that no reader sees half of it."""
        temporary = run_dir / f".{FILE_NAME}"
        temporary.write_text(self.model_dump_json(indent=1))
        temporary.replace(run_dir / FILE_NAME)

    @classmethod
    def read(cls, run_dir: Path) -> MachineRecord | None:
        """The record, or None if there is none that this version understands."""
        try:
            record = cls.model_validate_json((run_dir / FILE_NAME).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None
        return record if record.format == FORMAT_VERSION else None
