"""What may happen at each step of a snapshot, besides the snapshot itself: the children of a fork, cell boundaries.

The steps are those of `SavedMachine.take` (machine.py). Knows no VMM and no kernels.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.saving.threads import gather_all
from vm_runtime.saving.values import Description
from vm_runtime.snapshots.layers import CapturedPages, MemoryImage


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A machine's state at one pause, not stored yet. pages: over the ground. device: a file that stays readable while
    the snapshot is being taken. frozen_disk: written since the snapshot before, None if nothing was."""

    pages: CapturedPages
    device: Path
    frozen_disk: Path | None


class SnapshotHooks:
    """One participant of a snapshot; each step does nothing here.

    What a step up to `before_resume` raises ends the attempt: nothing is stored, and the machine runs on if it ran.

    share_from_pages: as of `DirtyTracker.prepare`. needs_ground: open what the capture will lie on before the pause,
    and not when the capture is stored: with many layers that takes longer than the rest of the preparation.
    asks_guest: `before_pause` has the guest do something, which writes to its memory.
    """

    share_from_pages: int | None = None
    needs_ground = False
    asks_guest = False

    async def prepare(self, ground: Awaitable[MemoryImage]) -> None:
        """Beside the preparation; the pause comes after both. ground: what the capture will lie on, opened when first
        awaited. It stays open, and the machine's `ground` the same, until the last step has ended."""

    async def before_pause(self) -> None:
        """Everything is prepared; the pause comes right after this."""

    async def before_resume(self) -> None:
        """The state is captured and the machine still stands: short, it lengthens the pause."""

    async def captured(self, captured: Captured) -> None:
        """The machine runs again, unless it is to stop. Storing begins after this, so that it does not slow it down."""

    def described(self, description: Description) -> Description:
        """How the snapshot is described, by what is known of it now."""
        return description

    async def abandoned(self) -> None:
        """There is no snapshot, or its caller was cancelled; the machine runs on if it ran before. Always called then,
        whichever step failed."""


class AllHooks(SnapshotHooks):
    """Several participants as one. Steps before the pause ends are taken in the order given, the others at once."""

    def __init__(self, hooks: Sequence[SnapshotHooks]) -> None:
        self._hooks = hooks
        shares = [hook.share_from_pages for hook in hooks if hook.share_from_pages is not None]
        self.share_from_pages = min(shares, default=None)
        self.needs_ground = any(hook.needs_ground for hook in hooks)
        self.asks_guest = any(hook.asks_guest for hook in hooks)

    async def prepare(self, ground: Awaitable[MemoryImage]) -> None:
        await gather_all(*(hook.prepare(ground) for hook in self._hooks))

    async def before_pause(self) -> None:
        for hook in self._hooks:
            await hook.before_pause()

    async def before_resume(self) -> None:
        for hook in self._hooks:
            await hook.before_resume()

    async def captured(self, captured: Captured) -> None:
        await gather_all(*(hook.captured(captured) for hook in self._hooks))

    def described(self, description: Description) -> Description:
        for hook in self._hooks:
            description = hook.described(description)
        return description

    async def abandoned(self) -> None:
        await gather_all(*(hook.abandoned() for hook in self._hooks))
