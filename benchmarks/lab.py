"""A `SandboxService` in this process, with what HTTP does not tell: how long machines stood still, and since when they
run. No HTTP server and no client between: what is measured here is the mechanism."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.messages import BenchmarkError
from benchmarks.raw_zmq import RawKernel, raw_kernel
from benchmarks.state_dirs import borrowed_state_dir, service_settings, started_driver
from kernels.connected import new_paths
from kernels.errors import KernelsError
from kernels.models import CreateSandbox, Sandbox
from kernels.service import SandboxService
from vm_runtime.drivers.base import MachinePaths
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.values import AfterCapture, Description, Taken
from vm_runtime.snapshots.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Split:
    """One fork below the kernels layer. pause_ms: of the parent. running_ms: from the call until each child's vCPUs
    ran. stored_ms: until the snapshot was stored and the children were handed out."""

    pause_ms: float
    running_ms: tuple[float, ...]
    stored_ms: float


class Lab(SandboxService):
    """The service with its inside in reach."""

    _taken: list[Taken]
    _more: asyncio.Event

    async def new(self, template: str) -> Sandbox:
        return await self.create(CreateSandbox(template=template))

    async def take(self, sandbox_id: str) -> Taken:
        """A checkpoint, with its times."""
        async with self.machines.lock(sandbox_id):
            return await self.snapshots.take(sandbox_id, then=AfterCapture.RESUME)

    @contextmanager
    def noting_taken(self, taken: list[Taken]) -> Iterator[None]:
        """Within it each snapshot of any sandbox is put into this list; see `wait_taken`."""
        snapshots, take = self.snapshots, self.snapshots.take

        async def noted(*arguments: Any, **options: Any) -> Taken:
            taken.append(await take(*arguments, **options))
            self._more.set()
            return taken[-1]

        self._taken, self._more = taken, asyncio.Event()
        snapshots.take = noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            snapshots.take = take  # type: ignore[method-assign]

    async def wait_taken(self, count: int) -> None:
        """Within `noting_taken`: until there are so many."""
        while len(self._taken) < count:
            self._more.clear()
            await self._more.wait()

    async def settled(self) -> None:
        """Waits until nothing is rewritten in the background."""
        await self.saver.settled()

    def snapshot_of(self, sandbox_id: str) -> Manifest:
        """What a sleeping sandbox wakes from."""
        return self._store.get(self.get(sandbox_id).snapshot_id or "")

    def saved(self, sandbox_id: str) -> SavedMachine:
        """The machine of a sandbox that runs."""
        return self.machines.running(sandbox_id).saved

    def pid(self, sandbox_id: str) -> int:
        """The VMM's."""
        return self.saved(sandbox_id).machine.pid

    async def stored_bytes(self) -> int:
        """Disk space of all parts in the store, templates' too."""
        parts = self._store.directory / "parts"
        return await asyncio.to_thread(lambda: sum(file.stat().st_blocks * 512 for file in parts.rglob("*")))

    async def restore_ms(self, snapshot: Manifest) -> float:
        """A machine in the state of a snapshot, from the call until its vCPUs run; it is ended again."""
        began = perf_counter()
        saved = await self.saver.restore(snapshot, paths=self._paths())
        took = 1000 * (perf_counter() - began)
        await saved.kill()
        return took

    async def split(self, sandbox_id: str, *, count: int) -> Split:
        """A fork into machines that nobody greets; they are ended again."""
        running: list[float] = []

        class Noting(SnapshotHooks):
            def described(self, description: Description) -> Description:
                running.append(1000 * (perf_counter() - began))  # the children have been loaded
                return description

        async with self.machines.lock(sandbox_id):
            live = self.machines.running(sandbox_id)
            description = self.snapshots.description(live, name=None)
            child_paths = [self._paths() for _ in range(count)]
            began = perf_counter()
            forked = await self.saver.fork(live.saved, description, child_paths=child_paths, hooks=[Noting()])
            stored_ms = 1000 * (perf_counter() - began)
            await self.snapshots.keep(sandbox_id, forked.taken.manifest)
        for child in forked.children:
            if not isinstance(child, SavedMachine):
                raise BenchmarkError(f"A child was not made: {child}")
            await child.kill()
        return Split(pause_ms=forked.taken.pause_ms, running_ms=tuple(running) * count, stored_ms=stored_ms)

    async def children_of(self, sandbox_id: str, *, count: int) -> list[Sandbox]:
        """`fork`, all of whose children must come."""
        children: Sequence[Sandbox | KernelsError] = await self.forks.fork(sandbox_id, count=count)
        for child in children:
            if not isinstance(child, Sandbox):
                raise BenchmarkError(f"A child was not made: {child}")
        return [child for child in children if isinstance(child, Sandbox)]

    @asynccontextmanager
    async def connected(self, sandbox_id: str) -> AsyncIterator[RawKernel]:
        """A client on the kernel's own sockets."""
        async with raw_kernel(dict(await self.connection_info(sandbox_id))) as kernel:
            yield kernel

    @asynccontextmanager
    async def sandbox(self, template: str) -> AsyncIterator[tuple[str, RawKernel]]:
        """A new sandbox and a client of it; it is deleted at the end."""
        sandbox_id = (await self.new(template)).id
        try:
            async with self.connected(sandbox_id) as kernel:
                yield sandbox_id, kernel
        finally:
            await self.delete(sandbox_id)

    def _paths(self) -> MachinePaths:
        return new_paths(self._settings.state_dir, self._settings.run_dir)


@asynccontextmanager
async def open_lab(state_dir: Path, *, names: Sequence[str]) -> AsyncIterator[Lab]:
    """A lab on a temporary state directory with these images and their templates."""
    with borrowed_state_dir(state_dir, names=names) as borrowed:
        async with started_driver(borrowed) as driver, Lab(service_settings(borrowed), driver, progress=_quiet) as lab:
            yield lab


def _quiet(text: str) -> None:
    """Progress of a service that takes no time to start and stop is of no interest."""
