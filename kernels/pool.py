"""The warm pool: machines restored ahead of time, so that a new kernel exists when it is asked for.

Each machine is given out once. Whatever is missing is made at once, at any rate of starts: no refill waits for a quiet
moment (what is made yields the CPUs to machines in use, see launcher.py). Where starts find the pool empty it grows up
to its limit, and it shrinks when that was not needed. Does not know how a machine is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from kernels.background import all_logged
from kernels.errors import KernelsError
from kernels.templates import Template
from vm_runtime.errors import VmRuntimeError
from vm_runtime.snapshots.errors import SnapshotError

log = logging.getLogger(__name__)

# After a refill failed: long enough not to burn the host, short enough to recover by itself.
RETRY_DELAY_S = 10.0
# Neither the host's memory nor the death of a machine that waits here has an event.
LOOK_INTERVAL_S = 5.0
# What the pool has grown by is ended when it was not needed for so long: programs start kernels seconds apart.
SHRINK_AFTER_S = 60.0


class Spare(Protocol):
    """What the pool keeps (`kernels.connected.ConnectedMachine`)."""

    @property
    def dead(self) -> bool: ...

    async def close(self) -> None: ...


S = TypeVar("S", bound=Spare)


class _Shelf(Generic[S]):
    """The machines of one template. wanted: how many are to be ready. fewest: that were ready since `watched_from`."""

    def __init__(self, template: Template, wanted: int) -> None:
        self.template = template
        self.wanted = wanted
        self.ready: deque[S] = deque()
        self.making = 0
        self.not_before = float("-inf")
        self.fewest = 0
        self.watched_from = time.monotonic()


class Pool(Generic[S]):
    """`take` gives a ready machine or None. Run `run()` as a task for as long as the pool is in use, then `close()`.

    size: machines kept ready per template; 0 keeps none.
    limit: the most that it grows to, per template.
    make: restores one; where it raises, it is tried again later.
    has_room: whether the host has memory for one more.
    """

    def __init__(
        self, *, size: int, limit: int = 0, make: Callable[[Template], Awaitable[S]], has_room: Callable[[], bool]
    ) -> None:
        self._size = size
        self._limit = max(size, limit)
        self._make = make
        self._has_room = has_room
        # The other half is for those who start one of their own meanwhile, and for everybody's cells.
        self._parallel = max(1, len(os.sched_getaffinity(0)) // 2)
        self._shelves: dict[str, _Shelf[S]] = {}
        self._doomed: list[S] = []
        self._changed = asyncio.Event()

    def keep(self, template: Template) -> None:
        """From now on, machines of this template are kept ready."""
        if self._size > 0:
            self._shelves.setdefault(template.digest, _Shelf(template, self._size))
            self._changed.set()

    def take(self, template: Template) -> S | None:
        """A ready machine, never given to anyone before, or None if none is ready."""
        shelf = self._shelves.get(template.digest)
        if shelf is None:
            return None
        self._changed.set()
        while shelf.ready:
            spare = shelf.ready.popleft()
            shelf.fewest = min(shelf.fewest, len(shelf.ready))
            if not spare.dead:
                return spare
            self._doomed.append(spare)
        shelf.wanted = min(self._limit, shelf.wanted + 1)
        return None

    def ready_count(self, template: Template | None = None) -> int:
        """Machines ready now, of this template or over all."""
        shelves = self._shelves.items()
        return sum(len(shelf.ready) for digest, shelf in shelves if template is None or template.digest == digest)

    async def run(self) -> None:
        """Keeps the pool filled until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                for shelf in self._shelves.values():
                    self._sort_out(shelf)
                    while self._may_make(shelf):
                        shelf.making += 1
                        group.create_task(self._add(shelf))
                while self._doomed:
                    group.create_task(_end(self._doomed.pop()))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_INTERVAL_S):
                        await self._changed.wait()

    def _sort_out(self, shelf: _Shelf[S]) -> None:
        """Dooms the dead, and what a shelf that has grown did not need lately."""
        self._doomed += [spare for spare in shelf.ready if spare.dead]
        shelf.ready = deque(spare for spare in shelf.ready if not spare.dead)
        if time.monotonic() - shelf.watched_from >= SHRINK_AFTER_S:
            shelf.wanted = max(self._size, shelf.wanted - shelf.fewest)
            while len(shelf.ready) > shelf.wanted:
                self._doomed.append(shelf.ready.pop())
            shelf.watched_from, shelf.fewest = time.monotonic(), len(shelf.ready)

    def _may_make(self, shelf: _Shelf[S]) -> bool:
        return (
            len(shelf.ready) + shelf.making < shelf.wanted
            and sum(each.making for each in self._shelves.values()) < self._parallel
            and time.monotonic() >= shelf.not_before
            and self._has_room()
        )

    async def _add(self, shelf: _Shelf[S]) -> None:
        try:
            spare = await self._make(shelf.template)
            shelf.ready.append(spare)  # not before: the pool may have sorted out the others meanwhile
        except Exception as error:
            # Also what nobody expected: the pool must outlive it.
            expected = isinstance(error, (KernelsError, VmRuntimeError, SnapshotError, OSError))
            log.warning("The warm pool could not be refilled: %s", error, exc_info=not expected)
            shelf.not_before = time.monotonic() + RETRY_DELAY_S
        finally:
            shelf.making -= 1
            self._changed.set()

    async def close(self) -> None:
        """Ends every machine that was not given out. Cancel `run()` first."""
        machines = [*self._doomed, *(spare for shelf in self._shelves.values() for spare in shelf.ready)]
        self._doomed.clear()
        self._shelves.clear()
        await all_logged(_end(spare) for spare in machines)


async def _end(spare: Spare) -> None:
    try:
        await spare.close()
    except Exception as error:
        expected = isinstance(error, (VmRuntimeError, OSError))
        log.warning("A machine of the warm pool could not be ended: %s", error, exc_info=not expected)
