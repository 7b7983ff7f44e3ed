"""Keeps chains short in the background, so that the next restore is quick: memory layers and disk overlays.

A snapshot stays what it is; a flattened form of the same state is published beside it (`SnapshotStore.flattened`),
which restores use from then on: one for its memory and one for its disks, so that one can fail alone. One at a time,
with low priority, and standing still while a snapshot is being taken. Interrupted, it leaves nothing. What fails is
reported, and tried again as long as the snapshot exists.

    many layers, little in them together     the upper ones are merged (chains.py): costs what is in them
    much in them                             a new base, which all children then share: costs the machine's data
    many disk overlays                       the upper ones are merged by the driver
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vm_runtime.drivers.base import Failure, FlatteningStatus, Shorter
from vm_runtime.errors import VmRuntimeError
from vm_runtime.paged.backing import BackingChain
from vm_runtime.paged.bases import Bases
from vm_runtime.paged.chains import (
    LARGE_LAYERS_BYTES,
    LONG_CHAIN,
    MANY_DISKS,
    has_many_disks,
    is_long_memory,
    merge_from,
    rebased,
)
from vm_runtime.saving.threads import open_draft
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.layers import MemoryImage
from vm_runtime.snapshots.manifest import Manifest, Part, PartKind, SnapshotContents, State
from vm_runtime.snapshots.memory import BaseMemory, data_extents
from vm_runtime.snapshots.store import Draft, SnapshotStore

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

# A machine that runs on may not be restored soon: a new base is worth it when an eighth of it is new.
RUNNING_SHARE = 8
# Waiting snapshots; more come only when flattening cannot keep up, and newer ones make older ones superfluous.
MAX_WAITING = 256
# What has failed is tried again after so long, and then always after the last: a full disk is cleared in minutes.
RETRY_S = (2.0, 15.0, 60.0, 300.0)
# It stands still for snapshots that are being taken, but no longer than this for each: many busy sandboxes must not
# keep it from shortening their own chains.
PATIENCE_S = 2.0
# Below everything interactive, above nothing.
_NICENESS = 10


class _StoppedError(Exception):
    """The saver is being closed."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    manifest: Manifest
    stopped: bool
    due: float = 0.0
    failure: Failure | None = None


class Flattener:
    """`want` what may need it; `await close()`.

    merge_disks: the driver's. on_shortened: called in the event loop when a state has a shorter form; an error that it
    raises counts as a failure. on_failed: called for each failed attempt.
    """

    def __init__(
        self,
        store: SnapshotStore,
        bases: Bases,
        *,
        merge_disks: Callable[[Sequence[Path], Path], Awaitable[None]],
        on_shortened: Callable[[Shorter], Awaitable[None]],
        on_failed: Callable[[Failure], None],
    ) -> None:
        self._store = store
        self._merge_disks = merge_disks
        self._bases = bases
        self._on_shortened = on_shortened
        self._on_failed = on_failed
        # By sandbox: a newer snapshot holds what an older one waited for. A snapshot of no sandbox counts for itself.
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._worker: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flatten", initializer=_be_nice)
        self._condition = threading.Condition()
        self._users = Counter[str]()
        self._merging: asyncio.Future[None] | None = None
        self._patience_s = PATIENCE_S
        self._stopped = False
        self._failures = 0
        self._merged_bytes = 0

    def want(self, manifest: Manifest, *, stopped: bool) -> None:
        """Shorten the chain of a snapshot, which may need it. stopped: its machine will be restored next."""
        if self._stopped:
            return
        key = manifest.sandbox_id or manifest.id
        # One that has failed keeps waiting for its time.
        before = self._jobs.pop(key, _Job(manifest=manifest, stopped=stopped))
        self._jobs[key] = replace(before, manifest=manifest, stopped=stopped)
        if len(self._jobs) > MAX_WAITING:
            self._jobs.popitem(last=False)
        self._wake()

    def status(self) -> FlatteningStatus:
        return FlatteningStatus(
            waiting=len(self._jobs),
            failing=tuple(job.failure for job in self._jobs.values() if job.failure is not None),
            failures=self._failures,
            merged_bytes=self._merged_bytes,
        )

    async def settled(self) -> None:
        """Wait until nothing waits to be shortened but what has failed and will be tried again."""
        await self._settled.wait()

    async def hurried(self, *, limit_s: float) -> None:
        """As `settled`, at most so long, with another attempt of what has failed. Meanwhile it does not stand still."""
        for key, job in self._jobs.items():
            self._jobs[key] = replace(job, due=0.0)
        self._wake()
        with self._counted("urgent"), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self.settled()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within it the background stands still, for a while."""
        with self._counted("busy"):
            yield

    @contextmanager
    def _counted(self, use: str) -> Iterator[None]:
        with self._condition:
            self._users[use] += 1
            self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._users[use] -= 1
                self._condition.notify_all()

    async def close(self) -> None:
        """Give up what is being done; twice is harmless."""
        self._jobs.clear()
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        if self._merging is not None:
            self._merging.cancel()
        self._changed.set()
        if self._worker is not None:
            await asyncio.wait([self._worker])
        self._executor.shutdown(wait=False)

    # -- the worker -----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._jobs and (self._worker is None or self._worker.done()):
            self._worker = asyncio.create_task(self._work(), name="flatten")
        if self._jobs:
            self._settled.clear()
        self._changed.set()

    async def _work(self) -> None:
        now = asyncio.get_running_loop().time
        try:
            while self._jobs and not self._stopped:
                key, job = min(self._jobs.items(), key=lambda item: item[1].due)
                if job.due > now():
                    self._settled.set()
                    self._changed.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(job.due):
                            await self._changed.wait()
                    continue
                reason = await self._shorten(job.manifest, stopped=job.stopped)
                newest = self._jobs.get(key)
                if newest is None:
                    continue
                if reason is None:
                    if newest is job:
                        del self._jobs[key]
                    else:
                        self._jobs[key] = replace(newest, due=0.0, failure=None)
                    continue
                attempts = 1 + (job.failure.attempts if job.failure is not None else 0)
                failure = Failure(
                    snapshot_id=job.manifest.id, sandbox_id=job.manifest.sandbox_id, reason=reason, attempts=attempts
                )
                due = now() + RETRY_S[min(attempts, len(RETRY_S)) - 1]
                self._jobs[key] = replace(newest, due=due, failure=failure)
                self._failures += 1
                self._on_failed(failure)
        except _StoppedError:
            pass
        finally:
            self._settled.set()

    async def _shorten(self, manifest: Manifest, *, stopped: bool) -> str | None:
        """Memory and disks, each for itself. Answers what has failed, unless the snapshot has been removed."""
        self._patience_s = PATIENCE_S
        reasons: list[str] = []

        async def attempt(work: Awaitable[None]) -> None:
            try:
                await work
            except (SnapshotError, VmRuntimeError, OSError) as error:
                reasons.append(str(error))

        await attempt(self._shorten_memory(manifest, stopped=stopped))
        await attempt(self._shorten_disks(manifest))
        current = await self._in_thread(self._current, manifest)
        if current is not manifest:
            # Also of an earlier attempt, after which a machine may have stayed where it was.
            old, new = BackingChain.of(manifest.state), BackingChain.of(current.state)
            await attempt(self._on_shortened(partial(_rebased_state, old=old, new=new)))
        if not reasons or not await self._in_thread(self._store.manifest_path(manifest.id).exists):
            return None
        _log.warning("Snapshot %s could not be flattened: %s", manifest.id, " ".join(reasons))
        return " ".join(reasons)

    async def _shorten_memory(self, manifest: Manifest, *, stopped: bool) -> None:
        backing = BackingChain.of((await self._in_thread(self._current, manifest)).state)
        if not is_long_memory(backing):
            return
        async with open_draft(self._store) as draft:
            merged = await self._in_thread(self._merge_memory, draft, backing, stopped)
            if merged != backing:
                await self._in_thread(self._publish, draft, manifest, merged)

    async def _shorten_disks(self, manifest: Manifest) -> None:
        backing = BackingChain.of((await self._in_thread(self._current, manifest)).state)
        if not has_many_disks(backing):
            return
        # The lowest is the template's, shared by different users.
        start = 1 + merge_from([disk.size_bytes for disk in backing.disks[1:]], most=MANY_DISKS - 1)
        below, upper = backing.disks[:start], backing.disks[start:]
        async with open_draft(self._store) as draft:
            paths = await self._in_thread(lambda: [self._store.checked_path(PartKind.DISK, disk) for disk in upper])
            target = draft.path("disk")
            await self._in_thread(self._step)
            self._merging = asyncio.ensure_future(self._merge_disks(paths, target))
            await asyncio.wait([self._merging])
            if self._merging.cancelled():
                raise _StoppedError
            self._merging.result()
            part = await self._in_thread(draft.add, PartKind.DISK, target)
            self._merged_bytes += part.size_bytes
            await self._in_thread(self._publish, draft, manifest, replace(backing, disks=(*below, part)))

    # -- in threads -----------------------------------------------------------------------------------------------

    async def _in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _current(self, manifest: Manifest) -> Manifest:
        """The shortest form so far."""
        return self._store.flattened(manifest.id) or manifest

    def _publish(self, draft: Draft, manifest: Manifest, backing: BackingChain) -> None:
        values = manifest.model_dump(exclude={"id"})
        values |= {
            "state": _as(manifest.state, backing),
            "flattened_from": manifest.id,
            "created_at": datetime.datetime.now(datetime.UTC),  # the newest is the shortest
        }
        draft.publish(SnapshotContents.model_validate(values))

    def _step(self) -> None:
        """Between the pieces of long work: stands still while a snapshot is being taken, while there is patience."""
        with self._condition:
            while self._users["busy"] and not self._users["urgent"] and not self._stopped and self._patience_s > 0:
                started = time.monotonic()
                self._condition.wait(self._patience_s)
                self._patience_s -= time.monotonic() - started
            if self._stopped:
                raise _StoppedError

    def _merge_memory(self, draft: Draft, backing: BackingChain, stopped: bool) -> BackingChain:
        self._step()
        with ExitStack() as stack:
            path = self._store.checked_path(PartKind.BASE, backing.base)
            base = stack.enter_context(
                BaseMemory.open_file(path, digest=backing.base.digest, size_bytes=backing.memory_bytes)
            )
            layers = self._store.open_layers(backing.layers, memory_bytes=backing.memory_bytes)
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
                self._merged_bytes += target.stat().st_blocks * 512
                return replace(backing, base=draft.add(PartKind.BASE, target, digest=digest), layers=())
            start = merge_from([layer.size_bytes for layer in backing.layers], most=LONG_CHAIN)
            if stopped or backing.layer_bytes >= 2 * image.layered_bytes + LARGE_LAYERS_BYTES:
                start = 0
            if start >= len(layers) - 1:
                return backing
            target = draft.path("layer")
            digest = MemoryImage(base, layers[start:]).merge_layers(target, step=self._step)
            part = draft.add(PartKind.LAYER, target, digest=digest)
            self._merged_bytes += part.size_bytes
            return replace(backing, layers=(*backing.layers[:start], part))


def _rebased_state(state: State, *, old: BackingChain, new: BackingChain) -> State | None:
    backing = rebased(BackingChain.of(state), old=old, new=new)
    return None if backing is None else _as(state, backing)


def _as(state: State, backing: BackingChain) -> State:
    """The same state on another backing chain."""
    device: Part | None = next(iter(state.of_kind(PartKind.DEVICE)), None)
    return backing.state(driver=state.driver, format=state.format, needs=state.needs, device=device)


def _be_nice() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
