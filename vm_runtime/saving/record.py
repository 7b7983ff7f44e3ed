"""`saved.json`, beside the driver's record: what lies under a running machine, for a gateway that finds it again.

Lies in the runtime directory, so it is gone after a reboot, as the machine is. Written after each snapshot, before
the names of its frozen disk files go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vm_runtime.saving.values import Ground
from vm_runtime.snapshots.manifest import DiskPart, Manifest, MemoryParts

FILE_NAME = "saved.json"


class SavedRecord(BaseModel):
    """snapshot: the last one this machine was restored from or that was taken of it, whole, since it may have been
    removed from the store. memory, disks: what the next one lies on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    snapshot: Manifest
    memory: MemoryParts
    disks: tuple[DiskPart, ...]

    @property
    def ground(self) -> Ground:
        return Ground(memory=self.memory, disks=self.disks)

    def write(self, run_dir: Path) -> None:
        """Replace the record in one step. Blocking."""
        temporary = run_dir / f".{FILE_NAME}"
        temporary.write_text(self.model_dump_json())
        temporary.replace(run_dir / FILE_NAME)

    @classmethod
    def read(cls, run_dir: Path) -> SavedRecord | None:
        """The record, or None if there is none that this version understands. Blocking."""
        try:
            return cls.model_validate_json((run_dir / FILE_NAME).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None


def remove_record(run_dir: Path) -> None:
    """Twice is harmless. The directory goes too, if nothing else is in it."""
    for name in (FILE_NAME, f".{FILE_NAME}"):
        (run_dir / name).unlink(missing_ok=True)
    if run_dir.is_dir() and not any(run_dir.iterdir()):
        run_dir.rmdir()
