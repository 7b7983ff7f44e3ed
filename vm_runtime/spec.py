"""What a machine is made of, as pure data.

Knows nothing of processes, files being open, or which VMM runs the machine: drivers turn these values into one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Sizes are rounded up to these steps so that a client cannot ask for thousands of machine shapes,
# each of which costs a template of its own (see kernels/templates.py).
MEMORY_STEP_MIB = 256
DISK_STEP_MIB = 1024


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The files of one built image (`STATE/images/<digest>/`). `digest` is hex, it names all three files at once."""

    digest: str
    vmlinux: Path
    initramfs: Path
    rootfs: Path


@dataclass(frozen=True, kw_only=True)
class MachineShape:
    """The size of a machine. Part of a template's identity: guest RAM and CPUs are fixed in its snapshot.

    memory_mib: guest RAM; vcpus: virtual CPUs; disk_mib: size of the writable disk (sparse).
    """

    memory_mib: int
    vcpus: int
    disk_mib: int

    def rounded(self) -> MachineShape:
        """This shape with memory and disk rounded up to the steps above."""
        return MachineShape(
            memory_mib=-(-self.memory_mib // MEMORY_STEP_MIB) * MEMORY_STEP_MIB,
            vcpus=self.vcpus,
            disk_mib=-(-self.disk_mib // DISK_STEP_MIB) * DISK_STEP_MIB,
        )


@dataclass(frozen=True, kw_only=True)
class MachineSpec:
    """A machine to boot or restore: its shape and the image it runs."""

    shape: MachineShape
    image: ImageFiles
