"""Time limits on what is asked of a guest. They do not run while its machine is paused on purpose.

Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

from kernels.errors import MachineUnresponsiveError

# A remote call answers in milliseconds, and so does a part of a file on its way in or out; an emulated kernel's restart
# takes up to some seconds.
CALL_TIMEOUT_S = 60.0


class Deadlines:
    """Of one session. unresponsive_since: set while the guest answers nothing at all; nothing is asked of it then."""

    def __init__(self) -> None:
        self.unresponsive_since: datetime | None = None
        self._limits: dict[asyncio.Timeout, float] = {}
        self._paused = False

    @asynccontextmanager
    async def within(self, limit_s: float | None, what: str) -> AsyncIterator[None]:
        """Ends the block with MachineUnresponsiveError when it has taken so long, and before it begins while the guest
        is unresponsive. None: no limit."""
        if self.unresponsive_since is not None:
            raise MachineUnresponsiveError(
                f"The sandbox's machine has not answered since {self.unresponsive_since:%X}."
            )
        if limit_s is None:
            yield
            return
        timeout = asyncio.timeout(None if self._paused else limit_s)
        self._limits[timeout] = limit_s
        try:
            async with timeout:
                yield
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise MachineUnresponsiveError(
                f"The sandbox's machine did not answer {what} within {limit_s:.0f} s."
            ) from error
        finally:
            del self._limits[timeout]

    def pause(self) -> None:
        """The machine is paused. Twice is harmless."""
        self._paused = True
        for timeout in self._limits:
            if not timeout.expired():
                timeout.reschedule(None)

    def resume(self) -> None:
        """It runs again: limits begin anew."""
        self._paused = False
        now = asyncio.get_running_loop().time()
        for timeout, limit_s in self._limits.items():
            if not timeout.expired():
                timeout.reschedule(now + limit_s)
