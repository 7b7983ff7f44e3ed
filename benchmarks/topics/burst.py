"""Ten kernels at once: from the first POST until all ten have answered a cell."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from time import perf_counter

from benchmarks.peers import Peer
from benchmarks.results import Row
from benchmarks.setup import Setup, in_turns

KERNELS = 10


async def measure(setup: Setup) -> list[Row]:
    seconds = await in_turns(setup.peers, setup.times(5, quick=1), _burst)
    return [
        Row(
            topic="burst",
            title=f"{KERNELS} kernels at once until all have answered, {label}",
            unit="s",
            ours=tuple(seconds[peer.name]),
            theirs=tuple(seconds[setup.baseline.name]),
        )
        for label, peer in (("warm pool", setup.pooled), ("no pool", setup.unpooled))
        if peer is not None
    ]


async def _burst(peer: Peer) -> float:
    async def start_one() -> None:
        kernel_id = await stack.enter_async_context(peer.client.kernel())
        async with peer.client.connection(kernel_id) as connection:
            await connection.execute("1+1")

    # The kernels end only after the clock has been read.
    async with AsyncExitStack() as stack:
        began = perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(KERNELS):
                group.create_task(start_one())
        return perf_counter() - began
