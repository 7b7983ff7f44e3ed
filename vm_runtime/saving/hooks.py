"""Who takes part in a snapshot, besides the machine: the children of a fork, the barrier between two cells.

The steps are those of `SavedMachine.take` (machine.py). Knows no VMM and no kernels.
"""

from __future__ import annotations

from vm_runtime.drivers.base import Capture
from vm_runtime.saving.values import Description
from vm_runtime.snapshots.manifest import Manifest


class SnapshotHooks:
    """One participant of a snapshot; each step does nothing here.

    What a step up to `captured` raises ends the attempt: nothing is stored, and the machine runs on if it ran.

    children: so many machines are made of the capture. asks_guest: `before_pause` has the guest do something, which
    writes to its memory.
    """

    children = 0
    asks_guest = False

    async def prepare(self, capture: Capture) -> None:
        """Beside the preparation; the pause comes after both."""

    async def before_pause(self) -> None:
        """Beside the preparation; after it, if there are children. The pause comes right after both."""

    async def before_resume(self) -> None:
        """The state is captured and the machine still stands: short, it lengthens the pause."""

    async def captured(self) -> None:
        """The machine runs again, unless it is to stop. Storing begins after this, so that it does not slow it down;
        the next snapshot may be captured from now on."""

    async def stored(self, manifest: Manifest) -> None:
        """It is stored, and the next one of this machine is not yet."""

    def described(self, description: Description) -> Description:
        """How the snapshot is described, by what is known of it now."""
        return description

    async def abandoned(self) -> None:
        """There is no snapshot, or its caller was cancelled; the machine runs on if it ran before. Always called then,
        whichever step failed."""
