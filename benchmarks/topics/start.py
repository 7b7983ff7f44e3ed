"""One kernel at a time: POST to 201, POST to the first reply, DELETE; with a warm machine waiting and without."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from benchmarks.peers import Peer
from benchmarks.results import Row
from benchmarks.setup import Setup, in_turns


@dataclass(frozen=True, kw_only=True)
class Life:
    """One kernel's start and end, in ms. created and replied count from the POST."""

    created_ms: float
    replied_ms: float
    deleted_ms: float


async def measure(setup: Setup) -> list[Row]:
    lives = await in_turns(setup.peers, setup.times(10, quick=3), live)
    rows = []
    for label, peer in (("warm pool", setup.pooled), ("no pool", setup.unpooled)):
        if peer is not None:
            for title, field in (("POST to 201", "created_ms"), ("POST to first reply", "replied_ms")):
                rows.append(_row(f"{title}, {label}", field, lives[peer.name], lives[setup.baseline.name]))
    rows.append(_row("DELETE", "deleted_ms", lives[setup.pooled.name], lives[setup.baseline.name]))
    return rows


async def live(peer: Peer) -> Life:
    began = perf_counter()
    kernel_id = await peer.client.create()
    created = perf_counter()
    try:
        async with peer.client.connection(kernel_id) as connection:
            execution = await connection.execute("1+1")
    except BaseException:
        await peer.client.delete(kernel_id)
        raise
    deleting = perf_counter()
    await peer.client.delete(kernel_id)
    deleted = perf_counter()
    return Life(
        created_ms=1000 * (created - began),
        replied_ms=1000 * (execution.sent_at + execution.reply_s - began),
        deleted_ms=1000 * (deleted - deleting),
    )


def _row(title: str, field: str, ours: list[Life], theirs: list[Life]) -> Row:
    return Row(
        topic="start",
        title=title,
        unit="ms",
        ours=tuple(getattr(life, field) for life in ours),
        theirs=tuple(getattr(life, field) for life in theirs),
    )
