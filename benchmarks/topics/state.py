"""State that outlives everything: checkpoints, sleep and wake; beside Kishu and dill on the same notebooks."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.lab import Lab, open_lab
from benchmarks.local_kernels import build_venv
from benchmarks.messages import BenchmarkError, CellError
from benchmarks.notebooks import BUFFER_CELL, FRAME, FRAME_CELL, LIVE, MODEL, WRITE_CELL, Notebook
from benchmarks.peers import hypercell
from benchmarks.processes import rss_mib
from benchmarks.raw_zmq import raw_kernel
from benchmarks.results import Cell, Line
from benchmarks.savers import DillSaver, KishuSaver, Saved, StateSaver, hypercell_saver, local_saver
from benchmarks.setup import Bench
from benchmarks.state_dirs import SCIKIT_LEARN, template_snapshot
from kernels.models import CheckpointPolicy
from vm_runtime.images.recipe import DEFAULT_RECIPE
from vm_runtime.snapshots.manifest import Manifest

TOPIC = "state"
OURS, KISHU, DILL = "Hypercell", "Kishu", "dill"
# Long enough for what runs after a snapshot (the store's own, a thread's tick), short beside the measured times.
REST_S = 0.5
# An exception's text is a hint in a table, not a report.
MAX_REASON_CHARACTERS = 70
# Of a sandbox that sleeps and wakes over and over: rounds of which the times are put together, and how often it does
# something in between.
SPAN = 10
ROUNDS_PER_CELL = 10
CELLS_IN_A_ROW = 15
# Children that run before they are put to sleep; more would only wait for each other.
FORKS_AT_ONCE = 8

OpenSaver = Callable[[Path], AbstractAsyncContextManager[StateSaver]]


@dataclass(kw_only=True)
class Outcome:
    """One notebook with one saver. restored: what became of it, in words."""

    saves: list[Saved] = field(default_factory=list)
    restores_ms: list[float] = field(default_factory=list)
    anew_ms: list[float] = field(default_factory=list)
    save_error: str = ""
    restored: str = ""
    restored_anew: str = ""


async def measure(bench: Bench) -> AsyncGenerator[list[Line], None]:
    python = await build_venv(bench.cache_dir, progress=bench.progress)
    async with open_lab(bench.state_dir, names=(SCIKIT_LEARN,)) as lab:
        savers: dict[str, OpenSaver] = {
            OURS: lambda _: hypercell_saver(lab, SCIKIT_LEARN),
            KISHU: lambda home: local_saver(KishuSaver, python, home),
            DILL: lambda home: local_saver(DillSaver, python, home),
        }
        for notebook in (FRAME, MODEL, *LIVE):
            bench.progress(f"{notebook.title} ...")
            outcomes = {name: await _outcome(bench, notebook, opened) for name, opened in savers.items()}
            yield _comparison(notebook, outcomes)
    async with open_lab(bench.state_dir, names=(DEFAULT_RECIPE,)) as lab:
        bench.progress("pauses ...")
        yield await _pauses(bench, lab)
        bench.progress("cells with a checkpoint after each ...")
        yield await _cells(bench, lab)
        bench.progress("wakes ...")
        yield await _wakes(bench, lab)
        bench.progress("rounds of sleep and wake ...")
        yield await _rounds(bench, lab)
    bench.progress("sleeping sandboxes ...")
    yield [await _many_asleep(bench)]


# -- beside Kishu and dill ----------------------------------------------------------------------------------------


async def _outcome(bench: Bench, notebook: Notebook, opened: OpenSaver) -> Outcome:
    outcome = Outcome()
    # Not in the cache: what Kishu and dill write is of one run.
    with tempfile.TemporaryDirectory(prefix="hcb-", dir="/tmp") as name:
        async with opened(Path(name)) as saver:
            for cell in notebook.setup:
                await saver.run(cell)
                await _save(saver, outcome, keep=False)
            for _ in range(bench.times(5, quick=1)):
                await saver.run(notebook.change)
                await _save(saver, outcome, keep=True)
            wanted = await saver.ask(notebook.probe)
            await saver.run(notebook.damage)
            outcome.restored = await _restored(
                bench, notebook, saver, saver.restore, outcome.restores_ms, wanted=wanted, error=outcome.save_error
            )
            outcome.restored_anew = await _restored(
                bench, notebook, saver, saver.restore_anew, outcome.anew_ms, wanted=wanted, error=outcome.save_error
            )
    return outcome


async def _save(saver: StateSaver, outcome: Outcome, *, keep: bool) -> None:
    try:
        saved = await saver.save()
    except CellError as error:
        outcome.save_error = str(error)
    else:
        if keep:
            outcome.saves.append(saved)


async def _restored(
    bench: Bench,
    notebook: Notebook,
    saver: StateSaver,
    restore: Callable[[], Awaitable[float]],
    times_ms: list[float],
    *,
    wanted: object,
    error: str,
) -> str:
    """Restores some times; what the last state was like."""
    if error:
        return f"not saved: {_short(error)}"
    for _ in range(bench.times(3, quick=1)):
        try:
            times_ms.append(await restore())
        except CellError as failure:
            return f"no: {_short(str(failure))}"
        try:
            found = await saver.ask(notebook.probe)
        except CellError as failure:
            return f"no: {_short(str(failure))}"
        if found != wanted:
            return "no: another state than was saved"
        await asyncio.sleep(REST_S)
    return "yes"


def _short(text: str) -> str:
    line = text.splitlines()[0] if text else text
    return line if len(line) <= MAX_REASON_CHARACTERS else line[: MAX_REASON_CHARACTERS - 3] + "..."


def _comparison(notebook: Notebook, outcomes: dict[str, Outcome]) -> list[Line]:
    def line(title: str, unit: str, cell: Callable[[Outcome], Cell]) -> Line:
        return Line(
            topic=TOPIC,
            heading=notebook.title,
            title=title,
            unit=unit,
            cells={name: cell(outcome) for name, outcome in outcomes.items()},
        )

    def samples(values: Sequence[float]) -> Cell:
        return Cell(samples=tuple(values))

    return [
        line("checkpoint: the kernel stands still", "ms", lambda each: samples([s.standstill_ms for s in each.saves])),
        line("checkpoint: until it is stored", "ms", lambda each: samples([s.total_ms for s in each.saves])),
        line("checkpoint: size", "MB", lambda each: samples([s.size_bytes / 1e6 for s in each.saves])),
        line("restore", "ms", lambda each: samples(each.restores_ms)),
        line("restore where the kernel has gone", "ms", lambda each: samples(each.anew_ms)),
        line("restored?", "", lambda each: Cell(text=each.restored)),
        line("restored where the kernel has gone?", "", lambda each: Cell(text=each.restored_anew)),
    ]


# -- Hypercell's own ----------------------------------------------------------------------------------------------


def _own(title: str, unit: str, samples: Sequence[float], *, target: float | None = None) -> Line:
    return Line(
        topic=TOPIC,
        heading="Hypercell's own",
        title=title,
        unit=unit,
        cells={OURS: Cell(samples=tuple(samples))},
        target=target,
    )


async def _pauses(bench: Bench, lab: Lab) -> list[Line]:
    """Checkpoints after a cell that writes 10 MB, in a kernel with little else and in one with 500 MB, in turns."""
    pauses: dict[str, list[float]] = {"little else": [], "500 MB of unchanged data": []}
    totals: dict[str, list[float]] = {name: [] for name in pauses}
    async with lab.sandbox(DEFAULT_RECIPE) as small, lab.sandbox(DEFAULT_RECIPE) as large:
        kernels = dict(zip(pauses, (small, large), strict=True))
        await large[1].execute(FRAME_CELL)
        for sandbox_id, kernel in kernels.values():
            await kernel.execute(BUFFER_CELL)
            await lab.take(sandbox_id)
        for round_number in range(bench.times(15, quick=4) + 1):
            for name, (sandbox_id, kernel) in kernels.items():
                await kernel.execute(WRITE_CELL)
                await asyncio.sleep(REST_S)
                taken = await lab.take(sandbox_id)
                if round_number > 0:
                    pauses[name].append(taken.pause_ms)
                    totals[name].append(taken.total_ms)
    small_name, large_name = pauses
    return [
        _own(f"pause of a checkpoint, 10 MB written, {small_name}", "ms", pauses[small_name], target=50),
        _own(
            f"pause of a checkpoint, 10 MB written, {large_name}",
            "ms",
            pauses[large_name],
            target=1.2 * median(pauses[small_name]),
        ),
        _own(f"the same until it is stored, {small_name}", "ms", totals[small_name]),
        _own(f"the same until it is stored, {large_name}", "ms", totals[large_name]),
    ]


async def _cells(bench: Bench, lab: Lab) -> list[Line]:
    """What checkpoints after cells cost who runs cells: a program, each right after the one before, and a person. In
    turns with a kernel that has no checkpoints."""
    async with lab.sandbox(DEFAULT_RECIPE) as without, lab.sandbox(DEFAULT_RECIPE) as each:
        kernels = {"no checkpoints": without, "a checkpoint after each": each}
        lab.configure(each[0], checkpoints=CheckpointPolicy.CELL)
        lines = []
        for title, rest_s in (("a cell right after another", 0.0), ("a cell half a second after another", REST_S)):
            times: dict[str, list[float]] = {name: [] for name in kernels}
            for _ in range(bench.times(4, quick=1)):
                for name, (_, kernel) in kernels.items():
                    for _ in range(CELLS_IN_A_ROW):
                        began = perf_counter()
                        await kernel.execute("x = 1")
                        times[name].append(1000 * (perf_counter() - began))
                        await asyncio.sleep(rest_s)
                    await asyncio.sleep(REST_S)
            lines += [_own(f"{title}, {name}", "ms", samples) for name, samples in times.items()]
        return lines


async def _wakes(bench: Bench, lab: Lab) -> list[Line]:
    """Wake of a small and a large state, and a restore of the template, in turns: until the vCPUs run, until the
    kernel can be talked to, until a client that connects then has its first reply."""
    template = template_snapshot(bench.state_dir)
    names = ("of the template (fresh)", "of a small state", "of a state of 500 MB")
    fresh, small, large = names
    running: dict[str, list[float]] = {name: [] for name in names}
    ready: dict[str, list[float]] = {name: [] for name in names}
    replied: dict[str, list[float]] = {name: [] for name in names}
    ids = {small: (await lab.new(DEFAULT_RECIPE)).id, large: (await lab.new(DEFAULT_RECIPE)).id}
    try:
        for name, cell in ((small, "x = 1"), (large, FRAME_CELL)):
            async with lab.connected(ids[name]) as kernel:
                await kernel.execute(cell)
        for round_number in range(bench.times(12, quick=3) + 1):
            for name in names:
                values = await (_fresh(lab) if name == fresh else _wake(lab, ids[name]))
                alone = await lab.restore_ms(template if name == fresh else values.snapshot or template)
                if round_number > 0:
                    running[name].append(alone)
                    ready[name].append(values.ready_ms)
                    replied[name].append(values.replied_ms)
    finally:
        for sandbox_id in ids.values():
            await lab.delete(sandbox_id)
    return [
        *(
            _own(
                f"restore alone {name}, until the vCPUs run", "ms", running[name], target=None if name == fresh else 120
            )
            for name in names
        ),
        *(_own(f"until it can be talked to, {name}", "ms", ready[name]) for name in names),
        *(
            _own(
                f"until the first reply, {name}",
                "ms",
                replied[name],
                target=None if name == fresh else 1.3 * median(replied[fresh]),
            )
            for name in names
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class _Start:
    """ready_ms: of the call. replied_ms: until the reply to a client that connects then. snapshot: what it was from."""

    ready_ms: float
    replied_ms: float
    snapshot: Manifest | None = None


async def _fresh(lab: Lab) -> _Start:
    began = perf_counter()
    sandbox_id = (await lab.new(DEFAULT_RECIPE)).id
    try:
        return await _first_reply(lab, sandbox_id, began, None)
    finally:
        await lab.delete(sandbox_id)


async def _wake(lab: Lab, sandbox_id: str) -> _Start:
    await lab.lifecycle.sleep(sandbox_id)
    await lab.settled()
    snapshot = lab.snapshot_of(sandbox_id)
    began = perf_counter()
    await lab.lifecycle.wake(sandbox_id)
    return await _first_reply(lab, sandbox_id, began, snapshot)


async def _first_reply(lab: Lab, sandbox_id: str, began: float, snapshot: Manifest | None) -> _Start:
    ready = perf_counter()
    async with raw_kernel(dict(await lab.connection_info(sandbox_id)), wait=False) as kernel:
        await kernel.reply("1+1")
        replied = perf_counter()
    return _Start(ready_ms=1000 * (ready - began), replied_ms=1000 * (replied - began), snapshot=snapshot)


async def _rounds(bench: Bench, lab: Lab) -> list[Line]:
    """One sandbox sleeps and wakes over and over; now and then a cell changes something, which must be there later."""
    count = bench.times(200, quick=20)
    sleeps: list[float] = []
    wakes: list[float] = []
    sandbox_id = (await lab.new(DEFAULT_RECIPE)).id
    try:
        async with lab.connected(sandbox_id) as kernel:
            await kernel.execute("value = list(range(1000)); rounds = 0")
        for round_number in range(count):
            began = perf_counter()
            await lab.lifecycle.sleep(sandbox_id)
            asleep = perf_counter()
            await lab.lifecycle.wake(sandbox_id)
            sleeps.append(1000 * (asleep - began))
            wakes.append(1000 * (perf_counter() - asleep))
            if round_number % ROUNDS_PER_CELL == 0:
                async with lab.connected(sandbox_id) as kernel:
                    await kernel.execute("rounds += 1; assert sum(value) == 499500")
        expected = len(range(0, count, ROUNDS_PER_CELL))
        async with lab.connected(sandbox_id) as kernel:
            await kernel.execute(f"assert (rounds, sum(value)) == ({expected}, 499500)")
    finally:
        await lab.delete(sandbox_id)
    last = min(100, count)

    def lines(what: str, times: list[float]) -> list[Line]:
        first = times[:SPAN]
        return [
            _own(f"{what}, rounds 1 to {SPAN}", "ms", first),
            _own(
                f"{what}, rounds {last - SPAN + 1} to {last}",
                "ms",
                times[last - SPAN : last],
                target=1.1 * median(first),
            ),
            _own(f"{what}, the last {SPAN} of {count} rounds", "ms", times[-SPAN:]),
        ]

    return lines("falling asleep", sleeps) + lines("waking until it can be talked to", wakes)


async def _many_asleep(bench: Bench) -> Line:
    """A gateway as `serve` starts it, with many sandboxes asleep that came from one by forks."""
    count = bench.times(200, quick=20)
    async with hypercell(name="hypercell", source_dir=bench.state_dir, pool_size=0) as peer:
        assert peer.pid is not None
        parent = await peer.client.create()
        async with peer.client.connection(parent) as connection:
            await connection.execute("x = 1")
        await peer.client.post(f"/api/sandboxes/{parent}/sleep")
        ids = [parent]
        while len(ids) < count:
            wanted = min(FORKS_AT_ONCE, count - len(ids))
            # A sandbox may have 64 children; the next one's are as good.
            answer = await peer.client.post(f"/api/sandboxes/{ids[len(ids) // 60]}/fork", {"count": wanted})
            children = [child["id"] for child in answer["children"]]
            for child in children:
                await peer.client.post(f"/api/sandboxes/{child}/sleep")
            ids += children
        listed = [each for each in json.loads(await peer.client.get("/api/sandboxes")) if each["state"] == "asleep"]
        if len(listed) != count:
            raise BenchmarkError(f"Of {count} sandboxes {len(listed)} are asleep.")
        memory = rss_mib(peer.pid)
        async with peer.client.connection(ids[count // 2]) as connection:
            execution = await connection.execute("x")
            if execution.results != ["1"]:
                raise BenchmarkError(f"The woken sandbox answered {execution.results}.")
    return _own(f"memory of a gateway with {count} sandboxes asleep", "MiB", [memory], target=200)
