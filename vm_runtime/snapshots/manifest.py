"""The manifest of a snapshot: what it consists of and what it needs, as one small immutable document.

Pure data: knows no files. Its id is derived from its content, so a changed manifest is no longer the one with that id:

    id = first 32 hex digits of sha256( canonical JSON without "id" )

Canonical JSON: keys sorted, no spaces, ASCII, UTC times with "Z". docs/snapshots.md has the format page.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.memory import PAGE_SIZE

FORMAT_VERSION: Final = 1

# A manifest of the longest chain has some 40 KiB; a foreign file that claims to be one is not read beyond this.
MAX_MANIFEST_BYTES = 1 << 20

# Chains are flattened long before this; it bounds the work that a foreign manifest can ask for.
MAX_LAYERS = 256

# The largest guest anybody runs today has some TiB; it bounds sparse files made for a foreign manifest.
MAX_MEMORY_BYTES = 16 << 40

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SnapshotId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Text = Annotated[str, StringConstraints(max_length=1024)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class PartKind(StrEnum):
    """The kinds of files a snapshot has; also the names of their directories in the store."""

    BASE = "base"
    LAYER = "layer"
    DEVICE = "device"
    DISK = "disk"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Model):
    """One immutable file. digest: SHA-256 of the file (of a base: see memory.py). size_bytes: its length."""

    digest: Digest
    size_bytes: int = Field(ge=0)


class DiskPart(Part):
    """One file of the disk's chain, lowest first; each but the first is a qcow2 overlay over the one before it."""

    format: Literal["raw", "qcow2"]
    backing: Digest | None = None


class MemoryParts(_Model):
    """Guest memory: a base, and layers over it, lowest first."""

    size_bytes: int = Field(gt=0, le=MAX_MEMORY_BYTES, multiple_of=PAGE_SIZE)
    base: Part
    layers: tuple[Part, ...] = Field(default=(), max_length=MAX_LAYERS)


class Shape(_Model):
    """The machine's size, as of `MachineShape`."""

    memory_mib: int = Field(gt=0)
    vcpus: int = Field(gt=0)
    disk_mib: int = Field(ge=0)


class Vmm(_Model):
    """Who can load the device state: the driver, its VMM and version, machine type, CPU model and accelerator."""

    driver: Name
    version: Name
    machine: Name
    cpu_model: Name
    accelerator: Name


class KernelInformation(_Model):
    """What is known of the kernel at the moment of the snapshot, for people and lists. `execution_count`: cells run."""

    name: Name
    language: Name
    state: Name
    execution_count: int | None = None


class SnapshotContents(_Model):
    """All of a manifest but its id; give it to `Draft.publish`.

    wire_marker: hex, the marker after which the guest expects its next session. parents: the snapshots this state came
    from, for the tree; their files are not needed. flattened_from: the snapshot of which this is the same state.
    """

    format_version: Literal[1] = FORMAT_VERSION
    created_at: AwareDatetime
    owner: Name
    name: Name | None = None
    sandbox_id: Name | None = None
    template: Name
    image_digest: Digest
    parents: tuple[SnapshotId, ...] = Field(default=(), max_length=16)
    flattened_from: SnapshotId | None = None
    shape: Shape
    vmm: Vmm
    memory: MemoryParts
    device: Part
    disks: tuple[DiskPart, ...] = Field(default=(), max_length=MAX_LAYERS)
    kernel: KernelInformation | None = None
    wire_marker: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]

    @model_validator(mode="after")
    def _consistent(self) -> SnapshotContents:
        if self.memory.base.size_bytes != self.memory.size_bytes:
            raise ValueError("the base has another size than guest memory")
        below: str | None = None
        for disk in self.disks:
            if disk.backing != below:
                raise ValueError("the disks are not a chain")
            below = disk.digest
        return self

    def parts(self) -> list[tuple[PartKind, Part]]:
        """Every file this snapshot needs, in a fixed order, each once."""
        ordered = [
            (PartKind.BASE, self.memory.base),
            *((PartKind.LAYER, layer) for layer in self.memory.layers),
            (PartKind.DEVICE, self.device),
            *((PartKind.DISK, disk) for disk in self.disks),
        ]
        return list({(kind, part.digest): (kind, part) for kind, part in ordered}.values())


class Manifest(SnapshotContents):
    """A complete manifest: the contents and the id derived from them."""

    id: SnapshotId

    @classmethod
    def of(cls, contents: SnapshotContents) -> Manifest:
        return cls.model_validate(contents.model_dump() | {"id": content_id(contents)})

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Read a manifest that may be anything. Raises BrokenSnapshotError with the reason."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise BrokenSnapshotError(f"The manifest is larger than {MAX_MANIFEST_BYTES} bytes.")
        try:
            raw = json.loads(text)
            if isinstance(raw, dict) and raw.get("format_version") != FORMAT_VERSION:
                raise BrokenSnapshotError(
                    f"The snapshot has format version {raw.get('format_version')!r:.20}; this is {FORMAT_VERSION}."
                )
            manifest = cls.model_validate_json(text)
        except (ValueError, RecursionError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise BrokenSnapshotError(f"The manifest cannot be read: {reason}.") from error
        if manifest.id != content_id(manifest):
            raise BrokenSnapshotError(f"The manifest of snapshot {manifest.id} was changed: its id does not fit.")
        return manifest

    def to_json(self) -> bytes:
        """The canonical JSON, which is also the form in the store."""
        return canonical_json(self)

    @property
    def total_bytes(self) -> int:
        """The lengths of all parts together; parts shared with other snapshots count in full."""
        return sum(part.size_bytes for _, part in self.parts())


def canonical_json(model: SnapshotContents) -> bytes:
    return json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def content_id(contents: SnapshotContents) -> str:
    values = contents.model_dump(mode="json", exclude={"id"})
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
