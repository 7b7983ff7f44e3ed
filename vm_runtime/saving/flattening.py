"""Keeps chains short in the background, so that the next restore is quick: memory layers and disk overlays.

A snapshot stays what it is; a flattened form of the same state is published beside it (`SnapshotStore.flattened`),
which restores use from then on. One at a time, in a thread of low priority, and standing still while a snapshot is
being taken. Interrupted, it leaves nothing.

    many layers, little in them together     merged into one layer: costs what is in them
    much in them                             a new base, which all children then share: costs the machine's data
    many disk overlays                       merged into one overlay over the template's disk
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from vm_runtime.saving.bases import Bases
from vm_runtime.saving.values import Ground
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.layers import MemoryImage
from vm_runtime.snapshots.manifest import DiskPart, Manifest, MemoryParts, PartKind, SnapshotContents
from vm_runtime.snapshots.memory import BaseMemory, data_extents
from vm_runtime.snapshots.overlays import merge_overlays
from vm_runtime.snapshots.store import Draft, SnapshotStore

_log = logging.getLogger(__name__)

# A restore opens and indexes every layer, a fork too. Measured, layers of 1,700 runs: four 8 ms, seven 26 ms.
LONG_CHAIN = 5
# A VMM opens every overlay of its disk.
MANY_DISKS = 8
# A restore copies layers into the machine, 0.65 ms per MB and privately: so much costs some 30 ms.
LARGE_LAYERS_BYTES = 48 << 20
# A machine that runs on may not be restored soon: a new base is worth it when an eighth of it is new.
RUNNING_SHARE = 8
# Waiting snapshots; more come only when flattening cannot keep up, and newer ones make older ones superfluous.
MAX_WAITING = 256
# Below everything interactive, above nothing.
_NICENESS = 10


class _StoppedError(Exception):
    """The saver is being closed."""


@dataclass(frozen=True, kw_only=True)
class Shortened:
    """The same state on another, shorter chain."""

    old: Ground
    new: Ground


class Flattener:
    """`want` what may need it; `await close()`. on_shortened: called in the event loop when one is done."""

    def __init__(
        self, store: SnapshotStore, bases: Bases, on_shortened: Callable[[Shortened], Awaitable[None]]
    ) -> None:
        self._store = store
        self._bases = bases
        self._on_shortened = on_shortened
        self._waiting: OrderedDict[str, tuple[Manifest, bool]] = OrderedDict()
        self._worker: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flatten", initializer=_be_nice)
        self._condition = threading.Condition()
        self._busy = 0
        self._stopped = False

    def want(self, manifest: Manifest, *, stopped: bool) -> None:
        """Shorten the chain of a snapshot if it has become long. stopped: its machine will be restored next."""
        if self._stopped or not _may_need(Ground.of(manifest)):
            return
        # A newer snapshot of the same sandbox holds what an older one waited for; without one, each counts.
        self._waiting[manifest.sandbox_id or manifest.id] = manifest, stopped
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="flatten")

    async def settled(self) -> None:
        """Wait until nothing waits to be shortened."""
        while self._worker is not None and not self._worker.done():
            await asyncio.wait([self._worker])

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within it the background stands still."""
        with self._condition:
            self._busy += 1
        try:
            yield
        finally:
            with self._condition:
                self._busy -= 1
                self._condition.notify_all()

    async def close(self) -> None:
        """Give up what is being done; twice is harmless."""
        self._waiting.clear()
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        await self.settled()
        self._executor.shutdown(wait=False)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            _, (manifest, stopped) = self._waiting.popitem(last=False)
            try:
                shortened = await loop.run_in_executor(self._executor, self._shorten, manifest, stopped)
            except _StoppedError:
                return
            except (SnapshotError, OSError) as error:
                # The snapshot is as good as it was, only slower to restore; or it was removed, with its sandbox.
                if await loop.run_in_executor(self._executor, self._store.manifest_path(manifest.id).exists):
                    _log.warning("Snapshot %s could not be flattened: %s", manifest.id, error)
                continue
            if shortened is not None:
                await self._on_shortened(shortened)

    def _step(self) -> None:
        with self._condition:
            while self._busy and not self._stopped:
                self._condition.wait()
            if self._stopped:
                raise _StoppedError

    def _shorten(self, manifest: Manifest, stopped: bool) -> Shortened | None:
        self._step()
        current = self._store.flattened(manifest.id) or manifest
        old = Ground.of(current)
        if not _may_need(old):
            return None
        with ExitStack() as stack:
            draft = stack.enter_context(self._store.begin())
            memory = self._shorten_memory(draft, old.memory, stopped)
            disks = self._shorten_disks(draft, old)
            new = Ground(memory=memory, disks=disks)
            if new == old:
                return None
            values = current.model_dump(exclude={"id"})
            values |= {"memory": memory, "disks": disks, "flattened_from": manifest.id}
            draft.publish(SnapshotContents.model_validate(values))
        return Shortened(old=Ground.of(manifest), new=new)

    def _shorten_memory(self, draft: Draft, memory: MemoryParts, stopped: bool) -> MemoryParts:
        if not memory.layers:
            return memory
        with ExitStack() as stack:
            path = self._store.checked_path(PartKind.BASE, memory.base)
            base = stack.enter_context(
                BaseMemory.open_file(path, digest=memory.base.digest, size_bytes=memory.size_bytes, check=False)
            )
            layers = self._store.open_layers(memory)
            for layer in layers:
                stack.callback(layer.close)
            image = MemoryImage(base, layers)
            large_bytes = LARGE_LAYERS_BYTES
            if not stopped:
                data_bytes = sum(end - start for start, end in data_extents(base.fd, base.size_bytes))
                large_bytes = max(large_bytes, data_bytes // RUNNING_SHARE)
            if image.layered_bytes >= large_bytes:
                target = draft.path("base")
                digest = image.flatten(target, step=self._step)
                target.chmod(self._bases.mode(family=True))
                return MemoryParts(size_bytes=memory.size_bytes, base=draft.add(PartKind.BASE, target, digest=digest))
            if len(layers) >= LONG_CHAIN or _layer_bytes(memory) >= 2 * image.layered_bytes + LARGE_LAYERS_BYTES:
                target = draft.path("layer")
                digest = image.merge_layers(target, step=self._step)
                layer_part = draft.add(PartKind.LAYER, target, digest=digest)
                return memory.model_copy(update={"layers": (layer_part,)})
            return memory

    def _shorten_disks(self, draft: Draft, ground: Ground) -> tuple[DiskPart, ...]:
        if len(ground.disks) < MANY_DISKS:
            return ground.disks
        lowest, *overlays = ground.disks
        target = draft.path("disk")
        merge_overlays([self._store.checked_path(PartKind.DISK, disk) for disk in overlays], target, step=self._step)
        part = draft.add(PartKind.DISK, target)
        merged = DiskPart(digest=part.digest, size_bytes=part.size_bytes, format="qcow2", backing=lowest.digest)
        return lowest, merged


def rebased(ground: Ground, shortened: Shortened) -> Ground | None:
    """The ground of a machine that lies on the shortened state or on snapshots over it; None if it does not.

    Memory and disks each for themselves: one of them may have been replaced by an earlier shortening already.
    """
    old, new = shortened.old, shortened.new
    memory, disks = ground.memory, ground.disks
    count = len(old.memory.layers)
    if memory.base == old.memory.base and memory.layers[:count] == old.memory.layers:
        memory = new.memory.model_copy(update={"layers": (*new.memory.layers, *memory.layers[count:])})
    if disks[: len(old.disks)] == old.disks:
        above = list(disks[len(old.disks) :])
        if above:
            above[0] = above[0].model_copy(update={"backing": new.disks[-1].digest})
        disks = (*new.disks, *above)
    result = Ground(memory=memory, disks=disks)
    return None if result == ground else result


def _may_need(ground: Ground) -> bool:
    memory = ground.memory
    return (
        len(memory.layers) >= LONG_CHAIN
        or _layer_bytes(memory) >= LARGE_LAYERS_BYTES
        or len(ground.disks) >= MANY_DISKS
    )


def _layer_bytes(memory: MemoryParts) -> int:
    return sum(layer.size_bytes for layer in memory.layers)


def _be_nice() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
