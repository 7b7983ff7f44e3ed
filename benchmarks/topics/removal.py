"""What removing snapshots costs in a large store, alone and beside sandboxes that take some. Needs no machine.

The store is a real one with small parts: chains as sandboxes have them, flattened now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter

from benchmarks.results import Cell, Line
from benchmarks.setup import Bench
from vm_runtime.paged.backing import BackingChain
from vm_runtime.snapshots.layers import encode_index
from vm_runtime.snapshots.manifest import Part, PartKind, Shape, SnapshotContents
from vm_runtime.snapshots.memory import PAGE_SIZE
from vm_runtime.snapshots.store import Draft, Pin, SnapshotStore

TOPIC = "removal"
STORED = 5000
LARGE = 1000
SMALL = 100
BUSY = 10
# A busy sandbox's draft is open for so long before it is published; the next one is begun at once.
DRAFT_S = 0.1
# A chain of so many layers and disks is flattened: a new base, and one disk.
LONGEST_CHAIN = 16
_MEMORY_BYTES = 16 * PAGE_SIZE


async def measure(bench: Bench) -> AsyncGenerator[list[Line], None]:
    yield await asyncio.to_thread(_measure, bench)


def _measure(bench: Bench) -> list[Line]:
    bench.cache_dir.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="removal-", dir=bench.cache_dir) as name,
        SnapshotStore(Path(name)) as store,
    ):
        small = [_Chain(store, f"small-{number}") for number in range((STORED - LARGE) // SMALL)]
        with ThreadPoolExecutor(BUSY) as pool:  # one waits for the disk while another computes
            list(pool.map(lambda chain: chain.grow(SMALL), small))
        busy, rest = small[:BUSY], small[BUSY:]
        alone_ms = [busy[0].take(draft_s=0) for _ in range(20)]
        one_ms: list[float] = []
        large_ms: list[float] = []
        small_ms: list[float] = []
        beside_ms: list[float] = []
        listing_ms: list[float] = []
        counting_ms: list[float] = []
        for number in range(bench.times(3, quick=1)):
            large = _Chain(store, f"large-{number}")
            large.grow(LARGE)
            listing_ms += _times_ms(partial(store.ls, sandbox_id=large.sandbox_id), 5)
            ids = [entry.id for entry in store.ls(sandbox_id=large.sandbox_id)]
            counting_ms += _times_ms(partial(store.index.freed_bytes, ids[:200]), 5)
            one_ms += [_ms(partial(store.rm, ids.pop(0))) for _ in range(20)]
            store.unpin(large.sandbox_id)
            large_ms.append(_ms(partial(store.rm_many, ids)))
        for number in range(bench.times(3, quick=1)):
            large = _Chain(store, f"other-{number}")
            large.grow(LARGE)
            ids = [entry.id for entry in store.ls(sandbox_id=large.sandbox_id)]
            with _taking(busy) as beside:
                store.rm_many(ids)
            beside_ms += beside
        for chain in rest[: bench.times(10, quick=3)]:
            ids = [entry.id for entry in store.ls(sandbox_id=chain.sandbox_id)]
            with _taking(busy):
                small_ms.append(_ms(partial(store.rm_many, ids)))
    return [
        _line("one snapshot", "ms", one_ms, target=20),
        _line(f"a sandbox with {LARGE:,} checkpoints", "ms", large_ms, target=500),
        _line(f"a sandbox with {SMALL}, beside {BUSY} that take snapshots in a row", "ms", small_ms, target=1000),
        _line("a snapshot is published, nothing else goes on", "ms", alone_ms),
        _line(f"the same beside {BUSY - 1} other sandboxes and the removal of {LARGE:,}", "ms", beside_ms),
        _line(f"{LARGE:,} checkpoints are listed", "ms", listing_ms),
        _line("what the removal of 200 would free is counted", "ms", counting_ms),
    ]


def _line(title: str, unit: str, samples: Sequence[float], *, target: float | None = None) -> Line:
    cells = {"Hypercell": Cell(samples=tuple(samples))}
    heading = f"removing snapshots, {STORED:,} stored"
    return Line(topic=TOPIC, heading=heading, title=title, unit=unit, cells=cells, target=target)


def _ms(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return 1000 * (perf_counter() - began)


def _times_ms(work: Callable[[], object], times: int) -> list[float]:
    return [_ms(work) for _ in range(times)]


class _Chain:
    """The snapshots of one sandbox, each over the one before; the last is pinned."""

    def __init__(self, store: SnapshotStore, sandbox_id: str) -> None:
        self.sandbox_id = sandbox_id
        self._store = store
        with store.begin() as draft:
            self._backing = BackingChain(base=_base(draft))
            self._publish(draft, None)

    def grow(self, count: int) -> None:
        for _ in range(count):
            self.take(draft_s=0)

    def take(self, *, draft_s: float) -> float:
        """One more snapshot. How many milliseconds its publishing took."""
        with self._store.begin() as draft:
            layer = draft.add_bytes(PartKind.LAYER, encode_index(_MEMORY_BYTES, [(0, 1)], []) + os.urandom(PAGE_SIZE))
            self._backing = self._backing.over(layer=layer, disks=(_disk(draft),))
            threading.Event().wait(draft_s)
            began = perf_counter()
            snapshot_id = self._publish(draft, None)
            publish_ms = 1000 * (perf_counter() - began)
        self._store.pin(self.sandbox_id, Pin(snapshots=(snapshot_id,)))
        if len(self._backing.layers) == LONGEST_CHAIN:
            with self._store.begin() as draft:
                self._backing = BackingChain(base=_base(draft), disks=(*self._backing.disks[:1], _disk(draft)))
                self._publish(draft, snapshot_id)
        return publish_ms

    def _publish(self, draft: Draft, flattened_from: str | None) -> str:
        contents = SnapshotContents(
            created_at=datetime.now(UTC),
            owner="benchmark",
            sandbox_id=self.sandbox_id,
            template="python3",
            image_digest="0" * 64,
            flattened_from=flattened_from,
            shape=Shape(memory_mib=1, vcpus=1, disk_mib=1),
            state=self._backing.state(
                driver="none",
                format="none",
                needs={},
                device=draft.add_bytes(PartKind.DEVICE, os.urandom(PAGE_SIZE)),
            ),
            wire_marker="0" * 32,
        )
        return draft.publish(contents).id


def _base(draft: Draft) -> Part:
    return draft.add_bytes(PartKind.BASE, os.urandom(_MEMORY_BYTES))


def _disk(draft: Draft) -> Part:
    return draft.add_bytes(PartKind.DISK, os.urandom(PAGE_SIZE))


@contextlib.contextmanager
def _taking(chains: Sequence[_Chain]) -> Iterator[list[float]]:
    """Within it each of these sandboxes takes snapshots, one after the other; how long each publishing took."""
    ended = threading.Event()
    begun = threading.Barrier(len(chains) + 1)
    publish_ms: list[float] = []

    def take(chain: _Chain) -> None:
        begun.wait()
        while not ended.is_set():
            publish_ms.append(chain.take(draft_s=DRAFT_S))

    with ThreadPoolExecutor(len(chains)) as pool:
        taking = [pool.submit(take, chain) for chain in chains]
        try:
            begun.wait()
            yield publish_ms
        finally:
            ended.set()
    for done in taking:
        done.result()
