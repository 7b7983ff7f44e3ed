"""A fork: one snapshot of a running machine and clones of it, at the same time.

The children are started while the parent still runs; when it has been captured, they are loaded from what was captured,
and run. Then the snapshot is stored; a child is only handed out when that has succeeded. Knows no VMM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from vm_runtime.drivers.base import Capture, MachinePaths, UnloadedMachine
from vm_runtime.machine import Machine
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.values import Taken
from vm_runtime.spec import MachineSpec

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Forked:
    """The snapshot of the parent, and for each place the child that runs there, or why there is none."""

    taken: Taken
    children: tuple[SavedMachine | Exception, ...]


class Children(SnapshotHooks):
    """Takes part in the parent's snapshot. `machines` when that is taken: an error of one is kept in its place, and its
    siblings run on."""

    def __init__(self, spec: MachineSpec, child_paths: Sequence[MachinePaths]) -> None:
        self.children = len(child_paths)
        self._spec = spec
        self._child_paths = child_paths
        self._unloaded: list[UnloadedMachine | Exception] = []
        self.machines: list[Machine | Exception] = []

    async def prepare(self, capture: Capture) -> None:
        starting = (capture.start_unloaded(self._spec, paths=paths) for paths in self._child_paths)
        self._unloaded = _errors_kept(await asyncio.gather(*starting, return_exceptions=True))

    async def captured(self) -> None:
        self.machines = _errors_kept(
            await asyncio.gather(*(self._load(unloaded) for unloaded in self._unloaded), return_exceptions=True)
        )

    async def _load(self, unloaded: UnloadedMachine | Exception) -> Machine:
        if isinstance(unloaded, Exception):
            raise unloaded
        return await unloaded.load()

    async def abandoned(self) -> None:
        """Also when some of them cannot be handed out: ends them all."""
        await asyncio.gather(
            *(unloaded.discard() for unloaded in self._unloaded if isinstance(unloaded, UnloadedMachine))
        )


def _errors_kept(results: list[T | BaseException]) -> list[T | Exception]:
    """Raises what is no `Exception`."""
    kept: list[T | Exception] = []
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
        kept.append(result)
    return kept
