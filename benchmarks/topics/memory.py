"""Memory of an idle kernel after one cell: what it alone has, and what it shares with others."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from benchmarks.messages import BenchmarkError
from benchmarks.peers import Peer
from benchmarks.processes import Memory, memory_of
from benchmarks.results import Row
from benchmarks.setup import Setup

# After the cell, late work (a history thread, the guest's page cache) comes to rest.
REST_S = 3.0


async def measure(setup: Setup) -> list[Row]:
    count = setup.times(10, quick=4)
    theirs = await _idle_kernels(setup.baseline, count)
    ours = await _idle_kernels(setup.pooled, count) if setup.pooled.machines_dir is not None else []
    return [
        Row(
            topic="memory",
            title=f"memory of an idle kernel after one cell, {title}",
            unit="MiB",
            ours=tuple(getattr(memory, name) for memory in ours),
            theirs=tuple(getattr(memory, name) for memory in theirs),
        )
        for title, name in (("its own", "unique_mib"), ("shared with others", "shared_mib"))
    ]


async def _idle_kernels(peer: Peer, count: int) -> list[Memory]:
    """Of `count` kernels that live at the same time: pages count as shared only when others have them too."""
    kernels: list[set[int]] = []
    async with AsyncExitStack() as stack:
        for _ in range(count):
            kernels.append(await _start(peer, stack, set().union(*kernels)))
        await asyncio.sleep(REST_S)
        return [_sum([memory_of(pid) for pid in pids]) for pids in kernels]


async def _start(peer: Peer, stack: AsyncExitStack, known: set[int]) -> set[int]:
    """Starts a kernel, runs a cell in it; answers its processes. The connection is closed again."""
    await peer.settle()
    spares = peer.kernel_pids() - known
    kernel_id = await stack.enter_async_context(peer.client.kernel())
    async with peer.client.connection(kernel_id) as connection:
        await connection.execute("1+1")
    # A pool gives the machine that waited longest; without one the kernel's processes are new.
    pids = {peer.oldest(spares)} if peer.pool_size else peer.kernel_pids() - known - spares
    if not pids:
        raise BenchmarkError(f"The processes of {peer.name}'s kernel were not found.")
    return pids


def _sum(parts: list[Memory]) -> Memory:
    return Memory(unique_mib=sum(part.unique_mib for part in parts), shared_mib=sum(part.shared_mib for part in parts))
