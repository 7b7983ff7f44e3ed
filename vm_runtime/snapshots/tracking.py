"""Which pages of a running machine a snapshot must hold, and copying them: what happens in the pause is all here.

Two ways behind one interface, chosen by what the host can do:

* `CumulativeTracker` works on every Linux: every page the machine wrote since it was started, each time. What did not
  change since the last snapshot is dropped when the layer is written; but the pause follows all that was ever written.
* `WriteProtectTracker` (Linux >= 6.7, x86-64): only what was written since the last snapshot. See writeprotect.py.

Blocking; knows nothing of the store or of VMMs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol, Self

from vm_runtime.snapshots.errors import ProcessMemoryError
from vm_runtime.snapshots.layers import CapturedPages, CapturedPart
from vm_runtime.snapshots.pages import PageBuffer, count_pages, read_pages, written_pages
from vm_runtime.snapshots.writeprotect import WriteProtectTracker

_log = logging.getLogger(__name__)

# A machine keeps writing between `prepare` and its pause: room for a quarter more, and for a few MB in any case.
_SLACK_PAGES = 1024


class DirtyTracker(Protocol):
    """Watches one machine's guest memory, a private mapping of a base. Close it when the machine ends.

    One snapshot: `prepare()`, pause the machine, `capture()`, resume it, `CapturedPages.write()`, publish. What is
    written from then on is the next one's, which may be captured before this one is stored.
    """

    def prepare(self, *, share_from_pages: int | None = None) -> None:
        """Do what can be done while the machine runs, so that the pause is short. May be left out.

        share_from_pages: if so many are copied now, clones will map them; None: they will not."""

    def catch_up(self) -> None:
        """The same for what was written since `prepare`: to be called right before the pause if that was much. May be
        left out."""

    def capture(self) -> CapturedPages:
        """Copy the pages; the machine must be paused, from before this call until after it."""

    def give_up(self) -> None:
        """After `prepare`, where no `capture` follows: let go of the memory."""

    def put_back(self, parts: Iterable[CapturedPart]) -> None:
        """Have the next `capture` that begins hold these pages of an earlier one, too, which was not stored."""

    def close(self) -> None:
        """Stop watching; harmless when the process has ended."""


class CumulativeTracker:
    """Every page written since the machine was started (or since its layers were written into it: those count)."""

    def __init__(self, pid: int, *, address: int, size_bytes: int) -> None:
        self._pid = pid
        self._address = address
        self._size_bytes = size_bytes
        self._buffer: PageBuffer | None = None

    def prepare(self, *, share_from_pages: int | None = None) -> None:
        """Reserve the memory that the copy will need."""
        pages = count_pages(written_pages(self._pid, self._address, self._size_bytes))
        shared = share_from_pages is not None and pages >= share_from_pages
        self._buffer = PageBuffer(pages + pages // 4 + _SLACK_PAGES, shared=shared)

    def catch_up(self) -> None:
        """Nothing to do: every capture is complete, and its memory reserved with some to spare."""

    def capture(self) -> CapturedPages:
        buffer, self._buffer = self._buffer, None
        return capture(self._pid, self._address, self._size_bytes, buffer=buffer)

    def give_up(self) -> None:
        self._buffer = None

    def put_back(self, parts: Iterable[CapturedPart]) -> None:
        """Nothing to note: every capture is complete."""

    def close(self) -> None:
        self.give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def start_tracker(pid: int, *, address: int, size_bytes: int, clean: bool) -> DirtyTracker:
    """The best tracker that this host allows, for guest memory mapped privately at `address`.

    clean: the memory is that of the snapshot under the next one, as right after a restore, and has not run since.
    Raises ProcessMemoryError only if the process is out of reach for both.
    """
    try:
        return WriteProtectTracker.start(pid, address=address, size_bytes=size_bytes, clean=clean)
    except ProcessMemoryError as error:
        _log.info("Snapshots of process %d are cumulative: %s", pid, error)
        return CumulativeTracker(pid, address=address, size_bytes=size_bytes)


def capture(pid: int, address: int, length: int, *, buffer: PageBuffer | None = None) -> CapturedPages:
    """Copy every page that a process has written to a private file mapping; it must be paused.

    buffer: memory reserved before the pause; if it is missing or too small, a new one is made within it.
    Measured: 10 MB in 1,660 runs of pages: see docs/snapshots.md. Raises ProcessMemoryError.
    """
    runs = written_pages(pid, address, length)
    pages = count_pages(runs)
    if buffer is None or buffer.capacity_pages < pages:
        buffer = PageBuffer(pages)
    read_pages(pid, address, runs, buffer)
    return CapturedPages(size_bytes=length, parts=((tuple(runs), buffer),))
