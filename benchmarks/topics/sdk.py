"""What the SDK adds: its import, its part of a round trip, large files, and fifty sandboxes in one program."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.messages import BenchmarkError
from benchmarks.peers import Peer, hypercell
from benchmarks.processes import watched_growth
from benchmarks.results import Cell, Line, percentile
from benchmarks.setup import Bench
from hypercell import AsyncSandbox, Sandbox

TOPIC = "sdk"
# One sample is the p50 of this many trips.
TRIPS = 100
WARM_UP_TRIPS = 20
FILE_BYTES = 200_000_000
# Small beside the file, so that the file that is made is not what grows this process.
PIECE_BYTES = 1 << 20
MANY = 50


async def measure(bench: Bench) -> AsyncGenerator[list[Line], None]:
    yield await _imports(bench)
    async with hypercell(name="hypercell", source_dir=bench.state_dir, pool_size=1) as peer:
        bench.progress("round trips ...")
        yield await _round_trips(bench, peer)
        bench.progress("files of 200 MB ...")
        yield await _files(bench, peer)
        bench.progress("fifty sandboxes ...")
        yield await _many(bench, peer)


def _line(title: str, unit: str, samples: Sequence[float], *, target: float | None = None) -> Line:
    cells = {"Hypercell": Cell(samples=tuple(samples))}
    return Line(topic=TOPIC, heading="the SDK", title=title, unit=unit, cells=cells, target=target)


async def _imports(bench: Bench) -> list[Line]:
    """A process that imports it, less one that does nothing, in turns."""
    samples = []
    for _ in range(bench.times(15, quick=3)):
        nothing_s = await _process_s("pass")
        samples.append(1000 * (await _process_s("import hypercell") - nothing_s))
    return [_line("`import hypercell`", "ms", samples, target=150)]


async def _process_s(code: str) -> float:
    began = perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    if await process.wait():
        raise BenchmarkError(f"{code!r} failed.")
    return perf_counter() - began


async def _round_trips(bench: Bench, peer: Peer) -> list[Line]:
    url, token = peer.client.url, peer.client.token
    points: dict[str, list[float]] = {"bare": [], "AsyncSandbox": [], "Sandbox": []}
    async with await AsyncSandbox.create(url=url, token=token) as sandbox, peer.client.connection(sandbox.id) as bare:
        blocking = await asyncio.to_thread(Sandbox.connect, sandbox.id, url=url, token=token)

        async def by_websocket() -> float:
            return 1000 * (await bare.execute("1+1", store_history=True)).cell_s

        async def by_async() -> float:
            began = perf_counter()
            await sandbox.run_code("1+1")
            return 1000 * (perf_counter() - began)

        ways: dict[str, Callable[[int], Awaitable[list[float]]]] = {
            "bare": lambda count: _repeat(by_websocket, count),
            "AsyncSandbox": lambda count: _repeat(by_async, count),
            "Sandbox": lambda count: asyncio.to_thread(_blocking_trips, blocking, count),
        }
        for trips in ways.values():
            await trips(WARM_UP_TRIPS)
        await peer.settle()
        for _ in range(bench.times(7, quick=2)):
            for way, trips in ways.items():
                points[way].append(percentile(await trips(TRIPS), 50))
        await asyncio.to_thread(blocking.close)
    lines = [_line("`1+1` over a bare WebSocket, p50", "ms", points["bare"])]
    for way in ("AsyncSandbox", "Sandbox"):
        added = [through - bare_p50 for through, bare_p50 in zip(points[way], points["bare"], strict=True)]
        lines.append(_line(f'`{way}.run_code("1+1")` adds, p50', "ms", added, target=2))
    return lines


async def _repeat(trip: Callable[[], Awaitable[float]], count: int) -> list[float]:
    return [await trip() for _ in range(count)]


def _blocking_trips(sandbox: Sandbox, count: int) -> list[float]:
    milliseconds = []
    for _ in range(count):
        began = perf_counter()
        sandbox.run_code("1+1")
        milliseconds.append(1000 * (perf_counter() - began))
    return milliseconds


async def _files(bench: Bench, peer: Peer) -> list[Line]:
    up_s, down_s, gateway_mib, program_mib = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="hypercell-bench-") as name:
        source, back = Path(name, "source"), Path(name, "back")
        await asyncio.to_thread(_make, source)
        for _ in range(bench.times(3, quick=1)):
            sandbox = await AsyncSandbox.create(url=peer.client.url, token=peer.client.token)
            async with sandbox, watched_growth(peer.pid) as gateway, watched_growth(os.getpid()) as program:
                began = perf_counter()
                await sandbox.files.upload(source, "large")
                between = perf_counter()
                await sandbox.files.download("large", back)
                up_s.append(between - began)
                down_s.append(perf_counter() - between)
            gateway_mib.append(gateway.mib or 0.0)
            program_mib.append(program.mib or 0.0)
            if await asyncio.to_thread(_differ, source, back):
                raise BenchmarkError("A file that went up came down as another.")
    return [
        _line("200 MB up (8 MB/s are 25 s)", "s", up_s, target=25),
        _line("200 MB down", "s", down_s, target=25),
        _line("growth of the gateway meanwhile", "MiB", gateway_mib, target=64),
        _line("growth of the program meanwhile", "MiB", program_mib, target=64),
    ]


def _make(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(0, FILE_BYTES, PIECE_BYTES):
            file.write(os.urandom(min(PIECE_BYTES, FILE_BYTES - file.tell())))


def _differ(one: Path, other: Path) -> bool:
    with one.open("rb") as left, other.open("rb") as right:
        while True:
            a, b = left.read(PIECE_BYTES), right.read(PIECE_BYTES)
            if a != b:
                return True
            if not a:
                return False


async def _many(bench: Bench, peer: Peer) -> list[Line]:
    """Fifty sandboxes made, used and deleted by one program."""

    async def one(number: int) -> None:
        sandbox = await AsyncSandbox.create(url=peer.client.url, token=peer.client.token)
        async with sandbox:
            execution = await sandbox.run_code(f"{number} ** 2")
            if execution.text != str(number**2):
                raise BenchmarkError(f"{number} ** 2 gave {execution.text}.")

    samples = []
    for _ in range(bench.times(3, quick=1)):
        began = perf_counter()
        await asyncio.gather(*(one(number) for number in range(MANY)))
        samples.append(perf_counter() - began)
        left = await AsyncSandbox.list(url=peer.client.url, token=peer.client.token)
        if left:
            raise BenchmarkError(f"{len(left)} of {MANY} sandboxes are left.")
    return [_line(f"{MANY} sandboxes made at once, used and deleted", "s", samples)]
