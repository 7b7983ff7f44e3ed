"""`1+1` over and over on a warm kernel: through the gateway, and over raw ZMQ to the same kernel without it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from benchmarks.messages import BenchmarkError, Execution
from benchmarks.peers import Peer
from benchmarks.raw_zmq import raw_kernel
from benchmarks.results import Row, percentile
from benchmarks.setup import Setup

Execute = Callable[[str], Awaitable[Execution]]

# One sample is the p50 or p95 of this many trips; enough for a p95 of its own.
TRIPS = 100
# Fills the caches, and under emulation the translated code, of the paths that are timed.
WARM_UP_TRIPS = 20


async def measure(setup: Setup) -> list[Row]:
    rounds = setup.times(7, quick=2)
    peers = (setup.baseline, setup.pooled)
    trips: dict[tuple[str, str], list[list[float]]] = {}
    async with AsyncExitStack() as stack:
        ways: dict[tuple[str, str], Execute] = {}
        for peer in peers:
            kernel_id = await stack.enter_async_context(peer.client.kernel())
            websocket = await stack.enter_async_context(peer.client.connection(kernel_id))
            raw = await stack.enter_async_context(raw_kernel(await _connection_info(peer, kernel_id)))
            ways[peer.name, "WebSocket"] = websocket.execute
            ways[peer.name, "raw ZMQ"] = raw.execute
        for execute in ways.values():
            await _batch(execute, WARM_UP_TRIPS)
        for peer in peers:
            await peer.settle()
        for _ in range(rounds):
            for way, execute in ways.items():
                trips.setdefault(way, []).append(await _batch(execute, TRIPS))
    return _rows(trips, theirs=setup.baseline.name, ours=setup.pooled.name)


async def _batch(execute: Execute, count: int) -> list[float]:
    """Milliseconds of each trip."""
    milliseconds = []
    for _ in range(count):
        execution = await execute("1+1")
        if execution.results != ["2"]:
            raise BenchmarkError(f"1+1 gave {execution.results}.")
        milliseconds.append(1000 * execution.cell_s)
    return milliseconds


async def _connection_info(peer: Peer, kernel_id: str) -> dict[str, Any]:
    if peer.runtime_dir is None:
        return await peer.client.connection_info(kernel_id)
    info: dict[str, Any] = json.loads((peer.runtime_dir / f"kernel-{kernel_id}.json").read_text())
    return info


def _rows(trips: dict[tuple[str, str], list[list[float]]], *, theirs: str, ours: str) -> list[Row]:
    def points(peer: str, way: str, percent: float) -> tuple[float, ...]:
        return tuple(percentile(batch, percent) for batch in trips[peer, way])

    def own_part(peer: str) -> tuple[float, ...]:
        pairs = zip(points(peer, "WebSocket", 50), points(peer, "raw ZMQ", 50), strict=True)
        return tuple(through - direct for through, direct in pairs)

    rows = [
        Row(
            topic="round_trip",
            title=f"`1+1` over {way}, p{percent}",
            unit="ms",
            ours=points(ours, way, percent),
            theirs=points(theirs, way, percent),
        )
        for way in ("WebSocket", "raw ZMQ")
        for percent in (50, 95)
    ]
    part = Row(
        topic="round_trip",
        title="the gateway's own part of it, p50",
        unit="ms",
        ours=own_part(ours),
        theirs=own_part(theirs),
    )
    return [*rows, part]
