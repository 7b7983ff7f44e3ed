"""Work that must not be torn apart by a cancelled caller: it is finished, and only then is the caller cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from vm_runtime.snapshots.store import Draft, SnapshotStore

Result = TypeVar("Result")


async def uncancelled(work: Coroutine[Any, Any, Result] | asyncio.Future[Result]) -> Result:
    """The result of the work, which continues to its end when the caller is cancelled; the cancellation comes after."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        if not task.cancelled():
            task.exception()  # the caller learns of its cancellation only
        raise


def succeeded(task: asyncio.Future[Any]) -> bool:
    """Whether it has ended with a result."""
    return task.done() and not task.cancelled() and task.exception() is None


async def gather_all(*work: Awaitable[Any]) -> list[Any]:
    """The results of all, when the last has ended; the first error then. (An `asyncio.TaskGroup` would cancel the
    others, whose threads would run on.)"""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@asynccontextmanager
async def open_draft(store: SnapshotStore) -> AsyncIterator[Draft]:
    """`store.begin()` in threads. Only within `uncancelled`."""
    context = store.begin()
    draft = await asyncio.to_thread(context.__enter__)
    try:
        yield draft
    except BaseException as error:
        await asyncio.to_thread(context.__exit__, type(error), error, error.__traceback__)
        raise
    else:
        await asyncio.to_thread(context.__exit__, None, None, None)
