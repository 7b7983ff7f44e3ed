"""The warm pool: machines restored ahead of time, so that a new kernel is there when it is asked for.

Each machine is given out once. Refilling happens in the background, one machine at a time, only while no one waits for
a machine of their own and the host has memory to spare.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable

from kernels.errors import KernelsError
from kernels.templates import Template
from kernels.warm import WarmMachine
from vm_runtime.errors import VmRuntimeError

log = logging.getLogger(__name__)

# After a refill failed: long enough not to burn the host, short enough to recover by itself.
RETRY_DELAY_S = 10.0
# After a machine was given out: its user's first cells come first. Under emulation a refill costs a CPU for a second.
REFILL_DELAY_S = 2.0


class Pool:
    """`take` gives a ready machine or None. Run `run()` as a task for as long as the pool is in use.

    size: machines kept per template. make: restores one. has_room: whether the host can afford one more.
    """

    def __init__(
        self, *, size: int, make: Callable[[Template], Awaitable[WarmMachine]], has_room: Callable[[], bool]
    ) -> None:
        self._size = size
        self._make = make
        self._has_room = has_room
        self._ready: dict[str, deque[WarmMachine]] = defaultdict(deque)
        self._templates: dict[str, Template] = {}
        self._wanted = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._demand = 0
        self._last_taken = float("-inf")

    def keep(self, template: Template) -> None:
        """From now on, machines of this template are kept ready."""
        self._templates[template.digest] = template
        self._wanted.set()

    def take(self, template: Template) -> WarmMachine | None:
        """A ready machine, never given to anyone before, or None if there is none."""
        ready = self._ready[template.digest]
        while ready:
            warm = ready.popleft()
            self._last_taken = time.monotonic()
            self._wanted.set()
            if not warm.dead:
                return warm
        return None

    def ready_count(self) -> int:
        """Machines ready now, over all templates."""
        return sum(len(ready) for ready in self._ready.values())

    def demand(self) -> _Demand:
        """A context in which someone waits for a machine of their own: refilling pauses until it ends."""
        return _Demand(self)

    async def run(self) -> None:
        """Keeps the pool filled until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            for template in list(self._templates.values()):
                while len(self._ready[template.digest]) < self._size and self._has_room():
                    await self._wait_quiet()
                    try:
                        self._ready[template.digest].append(await self._make(template))
                    except (KernelsError, VmRuntimeError) as error:
                        log.warning("The warm pool could not be refilled: %s", error)
                        await asyncio.sleep(RETRY_DELAY_S)
                        self._wanted.set()
                        break

    async def _wait_quiet(self) -> None:
        """Until no one waits for a machine and no one has just been given one."""
        while (left_s := self._last_taken + REFILL_DELAY_S - time.monotonic()) > 0 or not self._quiet.is_set():
            await self._quiet.wait()
            await asyncio.sleep(max(0.0, left_s))

    async def close(self) -> None:
        """Ends every machine that was not given out. Cancel `run()` first."""
        machines = [warm for ready in self._ready.values() for warm in ready]
        self._ready.clear()
        await asyncio.gather(*(warm.close() for warm in machines), return_exceptions=True)


class _Demand:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __enter__(self) -> None:
        self._pool._demand += 1
        self._pool._quiet.clear()

    def __exit__(self, *exc: object) -> None:
        self._pool._demand -= 1
        self._pool._last_taken = time.monotonic()
        if self._pool._demand == 0:
            self._pool._quiet.set()
