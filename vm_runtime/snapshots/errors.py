"""Errors of snapshots; the name says whose fault it is.

SnapshotError
+-- SnapshotRequestError      the caller's
|   +-- UnknownSnapshotError      no snapshot has this id
|   +-- SnapshotInUseError        a live sandbox or another snapshot needs it
+-- BrokenSnapshotError       the data's: truncated, tampered, foreign or of another version; it is refused
+-- StoreFullError            the host's: no room left; nothing was stored
+-- ChainTooLongError         the host's: flattening has not kept up; nothing was stored
+-- StoreIndexError           the host's: the store's index cannot be read or written
+-- ProcessMemoryError        the VMM's memory cannot be read or written (it died, or the rights are missing)
"""

from __future__ import annotations


class SnapshotError(Exception):
    """Base of all errors of this package. `str(error)` is a sentence for people: what is wrong and what to do."""


class SnapshotRequestError(SnapshotError):
    """The caller's fault; repeating the same request fails again."""


class UnknownSnapshotError(SnapshotRequestError):
    """No snapshot has this id."""

    def __init__(self, snapshot_id: str) -> None:
        super().__init__(f"There is no snapshot {snapshot_id}. `hypercelld snapshot ls` lists those that exist.")
        self.snapshot_id = snapshot_id


class SnapshotInUseError(SnapshotRequestError):
    """Something that lives needs this snapshot; `users` names them."""

    def __init__(self, snapshot_id: str, *, users: list[str]) -> None:
        super().__init__(f"Snapshot {snapshot_id} is needed by {', '.join(users)}; remove or end them first.")
        self.snapshot_id = snapshot_id
        self.users = users


class BrokenSnapshotError(SnapshotError):
    """A part is not what its digest, size or format version says; it was refused and nothing of it is used."""


class StoreFullError(SnapshotError):
    """There is no room for this; nothing of it was stored, and what ran runs on."""


class ChainTooLongError(SnapshotError):
    """A snapshot would lie on more parts than a manifest can name; what ran was not even paused.

    count: of `what` it would have; most: that there may be.
    """

    def __init__(self, what: str, *, count: int, most: int) -> None:
        super().__init__(
            f"The snapshot would have {count} {what} of at most {most}: those before could not be merged, or not fast "
            "enough. `hypercelld doctor` tells why; try again later, or let the sandbox sleep."
        )
        self.what = what
        self.count = count
        self.most = most


class StoreIndexError(SnapshotError):
    """The store's index is damaged, or another process does not let go of it; snapshots and parts are as they were."""


class ProcessMemoryError(SnapshotError):
    """The memory of a process could not be read or written: it ended, or ptrace rights are missing."""
