"""Work that nobody awaits: what it raises is logged, and it ends with its service. Knows nothing of what it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

log = logging.getLogger(__name__)


async def all_logged(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all of them to their ends, at the same time; what they raise is logged."""
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            log.error("What had to be done could not be", exc_info=result)


class Background:
    """`spawn(work)` begins some; `await end()` cancels what is not done (twice is harmless)."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that was cancelled before its first step never came to `work`.
        task.add_done_callback(lambda _: work.close())

    @staticmethod
    async def _logged(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("Work in the background failed")

    async def end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
