"""The manifest of a snapshot: what it consists of and what it needs, as one small immutable document.

Pure data: knows no files. Its id is derived from its content, so a changed manifest is no longer the one with that id:

    id = first 32 hex digits of sha256( canonical JSON without "id" )

Canonical JSON: keys sorted, no spaces, ASCII, UTC times with "Z". docs/snapshots.md has the format page. A manifest of
format 1 is read as one of format 2 (format1.py) and keeps its id and its text.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from vm_runtime.snapshots import format1
from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.memory import PAGE_SIZE

FORMAT_VERSION: Final = 2

# A manifest of the longest chain has some 40 KiB; a foreign file that claims to be one is not read beyond this.
MAX_MANIFEST_BYTES = 1 << 20

# Of each kind: chains are flattened long before this; it bounds the work that a foreign manifest can ask for.
MAX_LAYERS = 256
# What a driver may name that its state depends on.
MAX_NEEDS = 16

# The largest guest anybody runs today has some TiB; it bounds sparse files made for a foreign manifest.
MAX_MEMORY_BYTES = 16 << 40

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SnapshotId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Text = Annotated[str, StringConstraints(max_length=1024)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class PartKind(StrEnum):
    """The kinds of files a snapshot has; also the names of their directories in the store.

    BASE, LAYER: guest memory, see memory.py and layers.py. DEVICE: state of CPUs and devices. DISK: one file of a
    disk's chain. FILE: whatever else a driver's state consists of.
    """

    BASE = "base"
    LAYER = "layer"
    DEVICE = "device"
    DISK = "disk"
    FILE = "file"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Model):
    """One immutable file. digest: SHA-256 of the file (of a base: see memory.py). size_bytes: its length."""

    digest: Digest
    size_bytes: int = Field(ge=0)


class StatePart(Part):
    """One file of a machine's state. name: the driver's own for it, where the kind does not say enough."""

    kind: PartKind
    name: Name | None = None


class State(_Model):
    """The state of a machine as its driver stores it. Only a driver of that name reads it, see `Driver.can_load`.

    format: of the driver's states. needs: what a host must have to load it (versions, CPU model, ...), by the driver's
    own names. parts: of one kind that lie over each other lowest first; a base comes before its layers.
    """

    driver: Name
    format: Name
    needs: dict[Name, Text] = Field(default={}, max_length=MAX_NEEDS)
    parts: tuple[StatePart, ...]

    def of_kind(self, kind: PartKind) -> tuple[Part, ...]:
        """The parts of one kind, lowest first."""
        return tuple(Part(digest=part.digest, size_bytes=part.size_bytes) for part in self.parts if part.kind is kind)

    @property
    def memory_bytes(self) -> int:
        """Of guest memory that is stored in pages; 0 if the driver stores it otherwise."""
        return sum(base.size_bytes for base in self.of_kind(PartKind.BASE))

    @model_validator(mode="after")
    def _bounded(self) -> State:
        if any(len(self.of_kind(kind)) > MAX_LAYERS for kind in PartKind):
            raise ValueError(f"there are more than {MAX_LAYERS} parts of one kind")
        bases = self.of_kind(PartKind.BASE)
        if len(bases) > 1 or (self.of_kind(PartKind.LAYER) and not bases):
            raise ValueError("layers need one base")
        if self.memory_bytes % PAGE_SIZE:
            raise ValueError("guest memory is not a multiple of the page size")
        if self.memory_bytes > MAX_MEMORY_BYTES:
            raise ValueError("guest memory is larger than any host's")
        return self


class Shape(_Model):
    """The machine's size, as of `MachineShape`."""

    memory_mib: int = Field(gt=0)
    vcpus: int = Field(gt=0)
    disk_mib: int = Field(ge=0)


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

    format_version: Literal[2] = FORMAT_VERSION
    created_at: AwareDatetime
    owner: Name
    name: Name | None = None
    sandbox_id: Name | None = None
    template: Name
    image_digest: Digest
    parents: tuple[SnapshotId, ...] = Field(default=(), max_length=16)
    flattened_from: SnapshotId | None = None
    shape: Shape
    state: State
    kernel: KernelInformation | None = None
    wire_marker: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]

    def parts(self) -> list[tuple[PartKind, Part]]:
        """Every file this snapshot needs, in a fixed order, each once."""
        parts = self.state.parts
        ordered = ((part.kind, Part(digest=part.digest, size_bytes=part.size_bytes)) for part in parts)
        return list({(kind, part.digest): (kind, part) for kind, part in ordered}.values())


class Manifest(SnapshotContents):
    """A complete manifest: the contents and the id derived from them."""

    id: SnapshotId
    _format1_text: bytes | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _read_format_1(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not (isinstance(values, dict) and values.get("format_version") == 1):
            return handler(values)
        try:
            manifest = handler(format1.contents(values))
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no manifest of format 1 ({error!r:.60})") from error
        manifest._format1_text = format1.text(values)
        return manifest

    @classmethod
    def of(cls, contents: SnapshotContents) -> Manifest:
        """The same with its id; one that has an id keeps it."""
        if isinstance(contents, Manifest):
            return contents
        return cls.model_validate(contents.model_dump() | {"id": content_id(contents)})

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Read a manifest that may be anything. Raises BrokenSnapshotError with the reason."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise BrokenSnapshotError(f"The manifest is larger than {MAX_MANIFEST_BYTES} bytes.")
        try:
            raw = json.loads(text)
            if isinstance(raw, dict) and raw.get("format_version") not in (1, FORMAT_VERSION):
                raise BrokenSnapshotError(
                    f"The snapshot has format version {raw.get('format_version')!r:.20}; this is {FORMAT_VERSION}."
                )
            manifest = cls.model_validate_json(text)
        except (ValueError, RecursionError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise BrokenSnapshotError(f"The manifest cannot be read: {reason}.") from error
        if manifest.id != _id_of(manifest.to_json()):
            raise BrokenSnapshotError(f"The manifest of snapshot {manifest.id} was changed: its id does not fit.")
        return manifest

    def to_json(self) -> bytes:
        """The canonical JSON, which is also the form in the store."""
        return self._format1_text or _canonical(self.model_dump(mode="json"))

    @property
    def total_bytes(self) -> int:
        """The lengths of all parts together; parts shared with other snapshots count in full."""
        return sum(part.size_bytes for _, part in self.parts())


def content_id(contents: SnapshotContents) -> str:
    return _id_of(_canonical(contents.model_dump(mode="json")))


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _id_of(text: bytes) -> str:
    values = json.loads(text)
    values.pop("id", None)
    return hashlib.sha256(_canonical(values)).hexdigest()[:32]
