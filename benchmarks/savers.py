"""Three ways to save a notebook's state and get it back: Hypercell's checkpoints, Kishu, dill's session dump.

Each runs cells in a kernel, saves, and restores; they differ in what a save is. Knows no notebook.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.lab import Lab
from benchmarks.local_kernels import local_kernel
from benchmarks.messages import CellError
from benchmarks.raw_zmq import RawKernel
from vm_runtime.snapshots.manifest import PartKind


@dataclass(frozen=True, kw_only=True)
class Saved:
    """standstill_ms: how long the kernel could do nothing else. total_ms: until the state was stored. size_bytes:
    what it added on disk."""

    standstill_ms: float
    total_ms: float
    size_bytes: int


class StateSaver(ABC):
    """One kernel whose state is saved and restored."""

    @abstractmethod
    async def run(self, cell: str) -> None: ...

    @abstractmethod
    async def save(self) -> Saved:
        """The state after the cell that ran last. Errors: CellError when it cannot be saved."""

    @abstractmethod
    async def ask(self, expression: str) -> Any:
        """Errors: CellError."""

    @abstractmethod
    async def restore(self) -> float:
        """Back to the state that was saved last, in the kernel that there is; ms. Errors: CellError."""

    @abstractmethod
    async def restore_anew(self) -> float:
        """The same when that kernel is gone, with the start of the one that it needs; ms. Errors: CellError."""


class HypercellSaver(StateSaver):
    """A sandbox: a save is a checkpoint, a restore `goto`, which always makes a new machine."""

    def __init__(self, lab: Lab, sandbox_id: str, client: RawKernel) -> None:
        self._lab, self._id, self._client = lab, sandbox_id, client
        self._checkpoint = ""

    async def run(self, cell: str) -> None:
        await self._client.execute(cell)

    async def save(self) -> Saved:
        taken = await self._lab.take(self._id)
        self._checkpoint = taken.manifest.id
        state = taken.manifest.state
        size_bytes = sum(state.of_kind(kind)[-1].size_bytes for kind in (PartKind.LAYER, PartKind.DEVICE))
        return Saved(standstill_ms=taken.pause_ms, total_ms=taken.total_ms, size_bytes=size_bytes)

    async def ask(self, expression: str) -> Any:
        return await self._client.ask(expression)

    async def restore(self) -> float:
        began = perf_counter()
        await self._lab.checkpoints.goto(self._id, self._checkpoint)
        return 1000 * (perf_counter() - began)

    async def restore_anew(self) -> float:
        return await self.restore()


# Times Kishu's hooks, which save after each cell, and keeps their errors, which IPython would only print.
_KISHU_START = """
import time
from IPython import get_ipython
from kishu import init_kishu

init_kishu({path!r})
shell = get_ipython()
kishu = shell.user_ns["_kishu"]
shell.hypercell_benchmark = watch = dict(ms=0.0, error=None)

def watched(hook, first):
    def call(*arguments):
        if first:
            watch.update(ms=0.0, error=None)
        began = time.perf_counter()
        try:
            hook(*arguments)
        except Exception as error:
            watch["error"] = f"{{type(error).__name__}}: {{error}}"
        watch["ms"] += 1000 * (time.perf_counter() - began)
    return call

for name, first in (("pre_run_cell", True), ("post_run_cell", False)):
    hook = getattr(kishu, name)
    shell.events.unregister(name, hook)
    shell.events.register(name, watched(hook, first))
"""
_EMPTY_NOTEBOOK = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
# Without a browser there is no frontend that could save the notebook's file.
_KISHU_ENVIRONMENT = {"ENV_KISHU_TEST_MODE": "1"}


class _LocalSaver(StateSaver):
    """A local kernel, which `begin` starts."""

    def __init__(self, python: Path, home: Path, stack: AsyncExitStack) -> None:
        self._python, self._home, self._outer = python, home, stack
        self._kernel: AsyncExitStack | None = None
        self._client: RawKernel | None = None

    @property
    def client(self) -> RawKernel:
        assert self._client is not None
        return self._client

    async def begin(self) -> None:
        if self._kernel is None:
            self._kernel = await self._outer.enter_async_context(AsyncExitStack())
        kernel = await self._kernel.enter_async_context(local_kernel(self._python, self._home, _KISHU_ENVIRONMENT))
        self._client = kernel.client

    async def restore_anew(self) -> float:
        if self._kernel is not None:
            await self._kernel.aclose()
        began = perf_counter()
        await self.begin()
        started_ms = 1000 * (perf_counter() - began)
        return started_ms + await self.restore()

    async def run(self, cell: str) -> None:
        await self.client.execute(cell)

    async def ask(self, expression: str) -> Any:
        return await self.client.ask(expression)

    async def _timed(self, expression: str) -> float:
        began = perf_counter()
        await self.client.ask(expression)
        return 1000 * (perf_counter() - began)


class KishuSaver(_LocalSaver):
    """Kishu as shipped: it saves after each cell; a restore is a checkout of that commit."""

    def __init__(self, python: Path, home: Path, stack: AsyncExitStack) -> None:
        super().__init__(python, home, stack)
        self._notebook = home / "notebook.ipynb"
        self._notebook.write_text(json.dumps(_EMPTY_NOTEBOOK))
        self._commit = ""
        self._size_before = 0

    async def begin(self) -> None:
        await super().begin()
        code = _KISHU_START.format(path=str(self._notebook))
        # In a namespace of its own: Kishu looks at all that is in the user's.
        await self.client.ask("0", after=f"exec({code!r}, {{}})")

    async def run(self, cell: str) -> None:
        self._size_before = self._size()
        await super().run(cell)

    async def save(self) -> Saved:
        watch = await self.ask("get_ipython().hypercell_benchmark")
        if watch["error"] is not None:
            raise CellError(watch["error"])
        self._commit = await self.ask("_kishu._kishu_branch.get_head().commit_id")
        size_bytes = self._size() - self._size_before
        return Saved(standstill_ms=watch["ms"], total_ms=watch["ms"], size_bytes=size_bytes)

    async def restore(self) -> float:
        return await self._timed(f"str(_kishu.checkout({self._commit!r}))")

    def _size(self) -> int:
        return sum(path.stat().st_size for path in self._home.glob("notebook.kishudb*"))


class DillSaver(_LocalSaver):
    """dill as shipped: a save is a dump of the whole session."""

    def __init__(self, python: Path, home: Path, stack: AsyncExitStack) -> None:
        super().__init__(python, home, stack)
        self._path = home / "session.dill"

    async def save(self) -> Saved:
        self._path.unlink(missing_ok=True)
        took = await self._timed(f"__import__('dill').dump_module({str(self._path)!r})")
        return Saved(standstill_ms=took, total_ms=took, size_bytes=self._path.stat().st_size)

    async def restore(self) -> float:
        if not self._path.exists():
            raise CellError("nothing was saved")
        return await self._timed(f"__import__('dill').load_module({str(self._path)!r}) and None")


@asynccontextmanager
async def hypercell_saver(lab: Lab, template: str) -> AsyncIterator[StateSaver]:
    """A sandbox of a template."""
    async with lab.sandbox(template) as (sandbox_id, client):
        yield HypercellSaver(lab, sandbox_id, client)


@asynccontextmanager
async def local_saver(
    kind: Callable[[Path, Path, AsyncExitStack], _LocalSaver], python: Path, home: Path
) -> AsyncIterator[StateSaver]:
    """A local kernel. home: an empty directory for it and what is saved."""
    async with AsyncExitStack() as stack:
        saver = kind(python, home, stack)
        await saver.begin()
        yield saver
