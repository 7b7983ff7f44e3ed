"""Which cells of a kernel run, and the moment between two of them in which a checkpoint is taken.

When the last cell that ran has ended, the next one waits until the host reports that its checkpoint is taken, or that
it takes none. A host that sends nothing is waited for a moment only. Knows nothing of ipykernel and of the wire.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# From a cell's end until the host must have asked for more (`hold`): emulated, it has prepared a snapshot after 50 ms,
# and one that has not after this long is too busy, or stores the one before; the user's cells are not to wait for that.
UNASKED_S = 0.3

# The most that a host may ask for. A state that is captured while cells are held must hold them in its copies until
# they are greeted, which takes seconds where many start at once.
HOLD_MAX_S = 60.0


class CellGate:
    """For all threads. Call `begin` before a cell's code and `end` after it; `on_change(busy, waits)` is called, in
    order, when the first begins and when the last has ended. waits: whether the next one waits for the host."""

    def __init__(self, on_change: Callable[[bool, bool], None]) -> None:
        self._on_change = on_change
        self._changed = threading.Condition()
        self._running: set[object] = set()
        self._waits = True
        self._until_s = 0.0
        self._restores = 0

    def begin(self, cell: object) -> bool:
        """Wait until this cell may run. False: it must not, since this state was gone back to while it waited."""
        with self._changed:
            restores = self._restores
            while not self._running and (left_s := self._until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            if restores != self._restores:
                return False
            first = not self._running
            self._running.add(cell)
            if first:
                self._on_change(True, self._waits)
            return True

    def end(self, cell: object) -> None:
        """It has ended; for one that never ran (interrupted while it waited, or ended twice) nothing happens."""
        with self._changed:
            if cell not in self._running:
                return
            self._running.remove(cell)
            if not self._running:
                if self._waits:
                    self._until_s = max(self._until_s, time.monotonic() + UNASKED_S)
                self._on_change(False, self._waits)

    def hold(self, limit_s: float) -> bool:
        """Let no further cell begin until `release`, at least as long as before and at most for `limit_s` if that is
        longer. False if one runs; it runs on."""
        with self._changed:
            self._until_s = max(self._until_s, time.monotonic() + min(limit_s, HOLD_MAX_S))
            return not self._running

    def release(self, *, waits: bool) -> None:
        """Let cells begin. waits: whether, after the next, the one after it waits again."""
        with self._changed:
            self._waits = waits
            self._until_s = 0.0
            self._changed.notify_all()

    def greeted(self, *, drop: bool) -> None:
        """Another host, or another state: nobody takes a checkpoint of it now. drop: cells that wait must not run."""
        with self._changed:
            self._restores += drop
            self._until_s = 0.0
            self._changed.notify_all()
