"""Many at once: twenty live sandboxes on a small host, each answering, none with more memory of its own than it may."""

from __future__ import annotations

import asyncio

from tests.state.sandboxes import Api, Notebook

LIVE = 20
# What an idle sandbox may have of its own after one cell; everything else is shared with its siblings.
MAX_UNIQUE_BYTES = 64 << 20


async def test_twenty_live_sandboxes_answer_and_share_their_memory(api: Api) -> None:
    ids = await asyncio.gather(*(api.create() for _ in range(LIVE)))
    try:

        async def square(sandbox_id: str, number: int) -> int:
            async with Notebook.open(api.gateway, sandbox_id) as notebook:
                return int(await notebook.value(f"{number} ** 2"))

        squares = await asyncio.gather(*(square(sandbox_id, number) for number, sandbox_id in enumerate(ids)))
        assert squares == [number**2 for number in range(LIVE)]
        states = [(await api.sandbox(sandbox_id))["state"] for sandbox_id in ids]
        assert states == ["running"] * LIVE
        usages = [await api.call("GET", f"/api/sandboxes/{sandbox_id}/metrics") for sandbox_id in ids]
        # They have done the same; on a busy host some are still at it.
        unique = sorted(usage["memory_unique_bytes"] for usage in usages)
        assert unique[0] <= MAX_UNIQUE_BYTES, unique
        assert sum(unique) <= 1.25 * LIVE * MAX_UNIQUE_BYTES, unique
    finally:
        await asyncio.gather(*(api.delete(sandbox_id) for sandbox_id in ids))
    left = {sandbox["id"] for sandbox in await api.call("GET", "/api/sandboxes")}
    assert not left & set(ids)
