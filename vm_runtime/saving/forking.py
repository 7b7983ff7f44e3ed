"""A fork: one snapshot of a running machine and clones of it, at the same time.

The children are started while the parent still runs; when it has been captured, they are loaded from what was captured,
and run. Then the snapshot is stored; a child is only handed out when that has succeeded. Knows no VMM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from vm_runtime.drivers.base import Capture, MachinePlace, Shell
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
    siblings go on."""

    def __init__(self, spec: MachineSpec, places: Sequence[MachinePlace]) -> None:
        self.children = len(places)
        self._spec = spec
        self._places = places
        self._shells: list[Shell | Exception] = []
        self.machines: list[Machine | Exception] = []

    async def prepare(self, capture: Capture) -> None:
        starting = (capture.shell(self._spec, place=place) for place in self._places)
        self._shells = _errors_kept(await asyncio.gather(*starting, return_exceptions=True))

    async def captured(self) -> None:
        self.machines = _errors_kept(
            await asyncio.gather(*(self._load(shell) for shell in self._shells), return_exceptions=True)
        )

    async def _load(self, shell: Shell | Exception) -> Machine:
        if isinstance(shell, Exception):
            raise shell
        return await shell.load()

    async def abandoned(self) -> None:
        """Also when some of them cannot be handed out: ends them all."""
        await asyncio.gather(*(shell.discard() for shell in self._shells if isinstance(shell, Shell)))


def _errors_kept(results: list[T | BaseException]) -> list[T | Exception]:
    """Raises what is no `Exception`."""
    kept: list[T | Exception] = []
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
        kept.append(result)
    return kept
