"""Much output: 100,000 printed lines, 50 MB of stdout, and the latter through a slow client. Every byte is counted."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.messages import Execution
from benchmarks.peers import Peer
from benchmarks.processes import watched_growth
from benchmarks.results import Row
from benchmarks.setup import Setup, in_turns

LINES = 100_000
LINES_CODE = f"for i in range({LINES}): print(i)"
LINES_BYTES = sum(len(f"{i}\n") for i in range(LINES))

FLOOD_BYTES = 50_000_000
FLOOD_CODE = "import sys\nfor _ in range(500): sys.stdout.write('x' * 99_999 + '\\n')"
# A browser on a home connection; slow enough that output piles up somewhere for several seconds.
SLOW_BYTES_PER_S = 8_000_000.0


@dataclass(kw_only=True)
class Flow:
    """One output cell: how long, how much of it came, and by how much the gateway grew at most (None: pid unknown)."""

    seconds: float = 0.0
    delivered_percent: float = 0.0
    growth_mib: float | None = None


async def measure(setup: Setup) -> list[Row]:
    rounds = setup.times(5, quick=1)
    rows = []
    for title, code, size, slow in (
        (f"{LINES:,} printed lines", LINES_CODE, LINES_BYTES, False),
        ("50 MB of stdout", FLOOD_CODE, FLOOD_BYTES, False),
        (f"50 MB of stdout to a client that takes {SLOW_BYTES_PER_S / 1e6:.0f} MB/s", FLOOD_CODE, FLOOD_BYTES, True),
    ):

        async def sample(peer: Peer, code: str = code, size: int = size, slow: bool = slow) -> Flow:
            return await _flow(peer, code, size, slow=slow)

        flows = await in_turns((setup.baseline, setup.pooled), rounds, sample)
        rows += _rows(title, flows[setup.pooled.name], flows[setup.baseline.name])
        setup.progress(f"{title}: done")
    return rows


async def _flow(peer: Peer, code: str, size: int, *, slow: bool) -> Flow:
    async with peer.client.kernel() as kernel_id, peer.client.connection(kernel_id, slow=slow) as connection:
        await connection.execute("print()")
        await peer.settle()
        async with watched_growth(peer.pid) as growth:
            execution: Execution = await connection.execute(code, bytes_per_s=SLOW_BYTES_PER_S if slow else None)
    return Flow(
        seconds=execution.cell_s,
        delivered_percent=100 * execution.stdout_bytes / size,
        growth_mib=growth.mib,
    )


def _rows(title: str, ours: list[Flow], theirs: list[Flow]) -> list[Row]:
    def row(suffix: str, unit: str, name: str, *, compared: bool) -> Row:
        def samples(flows: list[Flow]) -> tuple[float, ...]:
            return tuple(value for flow in flows if (value := getattr(flow, name)) is not None)

        return Row(
            topic="output",
            title=title + suffix,
            unit=unit,
            ours=samples(ours),
            theirs=samples(theirs),
            compared=compared,
        )

    return [
        row("", "s", "seconds", compared=True),
        row(": arrived", "%", "delivered_percent", compared=False),
        row(": growth of the gateway", "MiB", "growth_mib", compared=False),
    ]
