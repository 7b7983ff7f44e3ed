"""The values that cross the seam of this package; pure data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vm_runtime.snapshots.manifest import KernelInformation, Manifest


class AfterCapture(StrEnum):
    """What a machine does after its snapshot. RESUME: it runs. STOP: it stays paused, to be killed or resumed."""

    RESUME = "resume"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a snapshot is called and whose it is; the fields are those of `SnapshotContents`.

    sandbox_id: None for a template. template: its name. wire_marker: hex, opens the guest's next session.
    """

    owner: str
    name: str | None
    sandbox_id: str | None
    template: str
    image_digest: str
    kernel: KernelInformation | None
    wire_marker: str


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A published snapshot.

    pause_ms: how long the machine stood still.
    total_ms: until it was safely stored.
    stopped: the machine ran before, and stands now.
    """

    manifest: Manifest
    pause_ms: float
    total_ms: float
    stopped: bool
