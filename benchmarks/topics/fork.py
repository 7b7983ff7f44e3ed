"""Forks of a running kernel; beside starting a kernel and replaying the notebook, os.fork, and pickling over."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.copies import Copy, by_os_fork, by_pickle, by_replay, by_sandbox_fork, by_sandbox_replay
from benchmarks.lab import Lab, Split, open_lab
from benchmarks.local_kernels import build_venv
from benchmarks.notebooks import BUFFER_CELL, FRAME_CELL, WRITE_CELL
from benchmarks.processes import memory_of, shared_files_mib
from benchmarks.results import Cell, Line
from benchmarks.setup import Bench
from vm_runtime.images.recipe import DEFAULT_RECIPE
from vm_runtime.snapshots.pages import PAGES_NAME

TOPIC = "fork"
OURS = "Hypercell"
FRAME_MB = 496
GENERATIONS = 10
FAMILY = 16
# What a machine does after a start or a cell has ended by then.
REST_S = 1.0
# Idle children have settled by then.
IDLE_S = 5.0


async def measure(bench: Bench) -> AsyncGenerator[list[Line], None]:
    python = await build_venv(bench.cache_dir, progress=bench.progress)
    async with open_lab(bench.state_dir, names=(DEFAULT_RECIPE,)) as lab:
        bench.progress("one child, and sixteen ...")
        yield await _of_large_kernels(bench, lab)
        bench.progress("generations ...")
        yield await _generations(bench, lab)
        bench.progress("beside other ways ...")
        yield await _beside(bench, lab, python)


def _own(title: str, unit: str, samples: Sequence[float], *, target: float | None = None) -> Line:
    return Line(
        topic=TOPIC,
        heading="forks of a kernel with 500 MB",
        title=title,
        unit=unit,
        cells={OURS: Cell(samples=tuple(samples))},
        target=target,
    )


async def _of_large_kernels(bench: Bench, lab: Lab) -> list[Line]:
    right_after: list[Split] = []
    later: list[Split] = []
    handed_ms: list[float] = []
    sixteen_ms: list[float] = []
    sixteen_handed_ms: list[float] = []
    memory: list[float] = []
    for _ in range(bench.times(3, quick=1)):
        async with lab.sandbox(DEFAULT_RECIPE) as (sandbox_id, kernel):
            # A checkpoint before, as after every cell: the 500 MB are what was written since.
            await lab.take(sandbox_id)
            await kernel.execute(FRAME_CELL)
            right_after.append(await lab.split(sandbox_id, count=1))
            await kernel.execute(BUFFER_CELL)
            await lab.take(sandbox_id)
            await lab.settled()
            for round_number in range(bench.times(8, quick=3) + 1):
                await kernel.execute(WRITE_CELL)
                await asyncio.sleep(REST_S)
                split = await lab.split(sandbox_id, count=1)
                if round_number > 0:
                    later.append(split)
            for _ in range(bench.times(5, quick=2)):
                await kernel.execute(WRITE_CELL)
                await asyncio.sleep(REST_S)
                began = perf_counter()
                (child,) = await lab.children_of(sandbox_id, count=1)
                handed_ms.append(1000 * (perf_counter() - began))
                await lab.delete(child.id)
            await kernel.execute(WRITE_CELL)
            sixteen_ms.append(max((await lab.split(sandbox_id, count=FAMILY)).running_ms))
            await kernel.execute(WRITE_CELL)
            began = perf_counter()
            children = await lab.children_of(sandbox_id, count=FAMILY)
            sixteen_handed_ms.append(1000 * (perf_counter() - began))
            await asyncio.sleep(IDLE_S)
            pids = [lab.pid(child.id) for child in children]
            own_mib = sum(memory_of(pid).unique_mib for pid in pids)
            memory.append(own_mib + shared_files_mib(pids, PAGES_NAME))
            for child in children:
                await lab.delete(child.id)
    data_mib = FRAME_MB * 1e6 / 2**20
    return [
        _own("fork(1), 10 MB written: pause of the parent", "ms", [each.pause_ms for each in later], target=50),
        _own("fork(1), 10 MB written: child runs after", "ms", [each.running_ms[0] for each in later], target=150),
        _own("fork(1), 10 MB written: snapshot is stored after", "ms", [each.stored_ms for each in later]),
        _own("fork(1), 10 MB written: call returns, child can be talked to", "ms", handed_ms),
        _own(
            "fork(1) right after the 500 MB: pause of the parent", "ms", [each.pause_ms for each in right_after],
            target=50 + 0.5 * FRAME_MB,
        ),
        _own("fork(1) right after the 500 MB: child runs after", "ms", [each.running_ms[0] for each in right_after]),
        _own(f"fork({FAMILY}): all run after", "ms", sixteen_ms, target=2000),
        _own(f"fork({FAMILY}): call returns, all can be talked to", "ms", sixteen_handed_ms),
        _own(f"memory of {FAMILY} idle children together", "MiB", memory, target=1.3 * data_mib),
    ]  # fmt: skip


async def _generations(bench: Bench, lab: Lab) -> list[Line]:
    """A child of a child of a child ..., each having written 10 MB; the line is repeated."""
    first: list[Split] = []
    tenth: list[Split] = []
    for _ in range(bench.times(3, quick=1)):
        async with AsyncExitStack() as stack:
            sandbox_id, kernel = await stack.enter_async_context(lab.sandbox(DEFAULT_RECIPE))
            await kernel.execute(FRAME_CELL)
            await kernel.execute(BUFFER_CELL)
            await lab.take(sandbox_id)
            await lab.settled()
            for generation in range(1, GENERATIONS + 1):
                async with lab.connected(sandbox_id) as kernel:
                    for _ in range(bench.times(3, quick=2)):
                        await kernel.execute(WRITE_CELL)
                        await asyncio.sleep(REST_S)
                        split = await lab.split(sandbox_id, count=1)
                        if generation == 1:
                            first.append(split)
                        elif generation == GENERATIONS:
                            tenth.append(split)
                if generation < GENERATIONS:
                    (child,) = await lab.children_of(sandbox_id, count=1)
                    sandbox_id = child.id
                    stack.push_async_callback(lab.delete, sandbox_id)
    lines = []
    for title, values, usual in (
        ("pause of the parent", [each.pause_ms for each in tenth], [each.pause_ms for each in first]),
        ("child runs after", [each.running_ms[0] for each in tenth], [each.running_ms[0] for each in first]),
    ):
        lines.append(_own(f"first generation: {title}", "ms", usual))
        lines.append(_own(f"generation {GENERATIONS}: {title}", "ms", values, target=1.2 * median(usual)))
    return lines


async def _beside(bench: Bench, lab: Lab, python: Path) -> list[Line]:
    copies: dict[str, list[Copy]] = {}
    for _ in range(bench.times(3, quick=1)):
        with tempfile.TemporaryDirectory(prefix="hcb-", dir="/tmp") as name:
            home = Path(name)
            for way, settle in (("`fork()` of the sandbox", True), ("`fork()` right after its cells", False)):
                copies.setdefault(way, []).append(await by_sandbox_fork(lab, DEFAULT_RECIPE, settle=settle))
            copies.setdefault("new sandbox, replay", []).append(await by_sandbox_replay(lab, DEFAULT_RECIPE))
            copies.setdefault("new local kernel, replay", []).append(await by_replay(python, home))
            copies.setdefault("os.fork in a local kernel", []).append(await by_os_fork(python, home))
            copies.setdefault("pickle to a new local kernel", []).append(await by_pickle(python, home))

    def line(title: str, unit: str, cells: dict[str, Cell]) -> Line:
        return Line(topic=TOPIC, heading="a second kernel in the same state", title=title, unit=unit, cells=cells)

    def numbers(field: str) -> dict[str, Cell]:
        return {way: Cell(samples=tuple(getattr(copy, field) for copy in each)) for way, each in copies.items()}

    def words(key: str) -> dict[str, Cell]:
        return {way: Cell(text=each[-1].survived[key]) for way, each in copies.items()}

    any_copy: Any = next(iter(copies.values()))[-1]
    return [
        line("until its first reply", "ms", numbers("ready_ms")),
        line("the first kernel stands still", "ms", numbers("standstill_ms")),
        line("memory of its own", "MiB", numbers("unique_mib")),
        *(line(f"has {key}", "", words(key)) for key in any_copy.survived),
    ]
