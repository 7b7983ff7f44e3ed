"""Starts at a steady rate, whether the earlier ones are done or not: what a warm pool is worth while it is used."""

from __future__ import annotations

import asyncio
from functools import partial
from time import perf_counter

from benchmarks.peers import Peer
from benchmarks.results import Row, percentile
from benchmarks.setup import Setup
from benchmarks.topics.start import Life, live

STARTS = 50
INTERVALS_S = (1.5, 1.0)


async def measure(setup: Setup) -> list[Row]:
    rows = []
    for interval_s in INTERVALS_S:
        peers = (setup.baseline, setup.pooled)
        lives = {peer.name: await _steadily(setup, peer, interval_s) for peer in peers}
        for title, field in (("POST to 201", "created_ms"), ("POST to first reply", "replied_ms")):
            theirs, ours = ([getattr(life, field) for life in lives[peer.name]] for peer in peers)
            row = partial(Row, topic="arrivals", unit="ms")
            rows.append(row(title=f"{title}, one each {interval_s} s", ours=tuple(ours), theirs=tuple(theirs)))
        p95 = [(percentile(samples, 95),) for samples in (ours, theirs)]
        rows.append(row(title=f"{title}, one each {interval_s} s, p95", ours=p95[0], theirs=p95[1]))
    return rows


async def _steadily(setup: Setup, peer: Peer, interval_s: float) -> list[Life]:
    """The first start is thrown away: caches fill in it."""
    for other in setup.peers:
        await other.settle()
    began = perf_counter()
    async with asyncio.TaskGroup() as group:
        starts = []
        for number in range(setup.times(STARTS, quick=10) + 1):
            await asyncio.sleep(began + number * interval_s - perf_counter())
            starts.append(group.create_task(live(peer)))
    return [start.result() for start in starts[1:]]
