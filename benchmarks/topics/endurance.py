"""A sandbox that lives long: many cells that write to memory and disk, with a checkpoint after each.

What must not grow with their number: chains of layers and disks, pauses, the time until a checkpoint is stored, wakes
and forks, and what the store holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from benchmarks.lab import Lab, open_lab
from benchmarks.messages import BenchmarkError
from benchmarks.raw_zmq import raw_kernel
from benchmarks.results import Cell, Line
from benchmarks.setup import Bench
from kernels.models import CheckpointPolicy, EventKind
from vm_runtime.images.recipe import DEFAULT_RECIPE
from vm_runtime.paged.backing import BackingChain
from vm_runtime.paged.machine import PagedMachine
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.values import Taken
from vm_runtime.snapshots.manifest import PartKind

TOPIC = "endurance"
CELLS = 2000
# After so many cells wake and fork are measured for the first time; the chains have been shortened once by then.
EARLY = 10
# Checkpoints at the beginning and at the end that are compared.
SPAN = 100
# How often it is waited until chains are short; in between they are looked at as they are.
SETTLED_EACH = 10
# Memory that cells write to over and over, and files: some are new, some are written again.
SETUP_CELL = "import os, pathlib; kept = {}; place = pathlib.Path.home() / 'endurance'; place.mkdir()"
MEMORY_CELL = "kept[{number} % 64] = os.urandom(200_000)"
FILE_CELL = "(place / str({number} % 400)).write_bytes(os.urandom(100_000))"
MAX_PARTS = 24
# A checkpoint that takes longer than this does not come.
LIMIT_S = 60.0


@dataclass(kw_only=True)
class _Course:
    """What was seen. layers, disks, open_disks: of the newest checkpoint and of the VMM, when chains were settled.
    longest: of any of them at any time. stored_mb: what the store held."""

    taken: list[Taken] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    disks: list[int] = field(default_factory=list)
    open_disks: list[int] = field(default_factory=list)
    longest: int = 0
    stored_mb: list[float] = field(default_factory=list)
    problems: int = 0


@dataclass(kw_only=True)
class _Copies:
    """Of a sandbox at one moment of its life: forks and wakes."""

    pause_ms: list[float] = field(default_factory=list)
    child_ms: list[float] = field(default_factory=list)
    wake_ms: list[float] = field(default_factory=list)
    reply_ms: list[float] = field(default_factory=list)


async def measure(bench: Bench) -> AsyncGenerator[list[Line], None]:
    count = bench.times(CELLS, quick=300)
    course = _Course()
    async with open_lab(bench.state_dir, names=(DEFAULT_RECIPE,)) as lab:
        sandbox_id = (await lab.new(DEFAULT_RECIPE)).id
        lab.configure(sandbox_id, checkpoints=CheckpointPolicy.CELL)
        with lab.noting_taken(course.taken):
            problems = asyncio.create_task(_count_problems(lab, course))
            try:
                await _run_cells(bench, lab, sandbox_id, course, 0, EARLY)
                early = await _copies(bench, lab, sandbox_id)
                await _run_cells(bench, lab, sandbox_id, course, EARLY, count)
                late = await _copies(bench, lab, sandbox_id)
            finally:
                problems.cancel()
        status = lab.saver.flattening()
        new_mb = sum(_added_bytes(taken) for taken in course.taken) / 1e6
        await lab.delete(sandbox_id)
    yield _lines(count, course, early, late, rewritten=status.merged_bytes / 1e6 / new_mb, failures=status.failures)


async def _count_problems(lab: Lab, course: _Course) -> None:
    async with lab.bus.subscribe() as events:
        async for event in events:
            if event.kind is EventKind.CHECKPOINT_PROBLEM and event.data["reason"] is not None:
                course.problems += 1


async def _run_cells(bench: Bench, lab: Lab, sandbox_id: str, course: _Course, first: int, last: int) -> None:
    async with lab.connected(sandbox_id) as kernel:
        if first == 0:
            await kernel.execute(SETUP_CELL)
        for number in range(first, last):
            expected = len(course.taken) + 1
            await kernel.execute(f"{MEMORY_CELL}; {FILE_CELL}".format(number=number))
            try:
                async with asyncio.timeout(LIMIT_S):
                    await lab.wait_taken(expected)
            except TimeoutError as error:
                problem = lab.get(sandbox_id).checkpoint_problem
                raise BenchmarkError(f"No checkpoint came after cell {number}: {problem}") from error
            chains = _chains(lab.saved(sandbox_id))
            course.longest = max(course.longest, *chains)
            if number % SETTLED_EACH == SETTLED_EACH - 1:
                await lab.settled()
                for longest, parts in zip(
                    (course.layers, course.disks, course.open_disks), _chains(lab.saved(sandbox_id)), strict=True
                ):
                    longest.append(parts)
            if number % SPAN == SPAN - 1:
                course.stored_mb.append(await lab.stored_bytes() / 1e6)
                bench.progress(f"{number + 1} cells: {chains}, {course.stored_mb[-1]:.0f} MB stored")


def _chains(saved: SavedMachine) -> tuple[int, int, int]:
    """Memory layers and disks of what a machine lies on, and disks that its VMM has open."""
    assert saved.state is not None and isinstance(saved.machine, PagedMachine)
    backing = BackingChain.of(saved.state)
    return len(backing.layers), len(backing.disks), len(saved.machine.disk_chain)


def _added_bytes(taken: Taken) -> int:
    """What a checkpoint wrote of memory and disk."""
    return sum(
        part.size_bytes for kind in (PartKind.LAYER, PartKind.DISK) for part in taken.manifest.state.of_kind(kind)[-1:]
    )


async def _copies(bench: Bench, lab: Lab, sandbox_id: str) -> _Copies:
    copies = _Copies()
    for _ in range(bench.times(7, quick=3)):
        split = await lab.split(sandbox_id, count=1)
        copies.pause_ms.append(split.pause_ms)
        copies.child_ms += split.running_ms
    for _ in range(bench.times(7, quick=3)):
        await lab.lifecycle.sleep(sandbox_id)
        await lab.settled()
        began = perf_counter()
        await lab.lifecycle.wake(sandbox_id)
        copies.wake_ms.append(1000 * (perf_counter() - began))
        async with raw_kernel(dict(await lab.connection_info(sandbox_id)), wait=False) as kernel:
            await kernel.reply("1+1")
        copies.reply_ms.append(1000 * (perf_counter() - began))
    async with lab.connected(sandbox_id) as kernel:
        execution = await kernel.execute("", expression="len(kept) == min(64, len(list(place.iterdir())))")
        if execution.results[-1] != "True":
            raise BenchmarkError("The woken sandbox has lost something.")
    return copies


def _lines(
    count: int, course: _Course, early: _Copies, late: _Copies, *, rewritten: float, failures: int
) -> list[Line]:
    def line(title: str, unit: str, cells: dict[str, Sequence[float]], target: float | None = None) -> Line:
        columns = {name: Cell(samples=tuple(samples)) for name, samples in cells.items()}
        return Line(topic=TOPIC, heading=heading, title=title, unit=unit, cells=columns, target=target)

    heading = f"{count:,} cells in one sandbox, a checkpoint after each"
    first, last = course.taken[:SPAN], course.taken[-SPAN:]

    def compared(title: str, one: Sequence[float], two: Sequence[float], names: tuple[str, str]) -> Line:
        return line(title, "ms", dict(zip(names, (one, two), strict=True)), target=1.3 * median(one))

    checkpoints = ("first hundred", "last hundred")
    lines = [
        compared("pause", [t.pause_ms for t in first], [t.pause_ms for t in last], checkpoints),
        compared("until stored", [t.total_ms for t in first], [t.total_ms for t in last], checkpoints),
    ]
    heading = "its copies"
    moments = (f"after {EARLY} cells", f"after {count:,}")
    lines += [
        compared("fork: pause of the parent", early.pause_ms, late.pause_ms, moments),
        compared("fork: child runs after", early.child_ms, late.child_ms, moments),
        compared("wake: can be talked to", early.wake_ms, late.wake_ms, moments),
        compared("wake: first reply", early.reply_ms, late.reply_ms, moments),
    ]
    heading = "its chains and its room"
    lines += [
        line("memory layers, settled: at most", "", {"": [max(course.layers)]}, MAX_PARTS),
        line("disks, settled: at most", "", {"": [max(course.disks)]}, MAX_PARTS),
        line("disks open in the VMM, settled: at most", "", {"": [max(course.open_disks)]}, MAX_PARTS),
        line("any of them, at any time", "", {"": [course.longest]}),
        line("stored, each hundred cells", "MB", {"": course.stored_mb}),
        line("written to shorten chains, by what checkpoints added", "", {"": [rewritten]}),
        line("checkpoints refused, shortenings failed", "", {"": [course.problems + failures]}, 0),
    ]
    return lines
