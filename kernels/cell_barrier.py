"""A snapshot's place between two cells: the kernel lets none begin from just before the capture until just after it.

So a snapshot that says which cell it comes after holds that cell whole and nothing of the next. The kernel itself
pauses after a cell until it is notified of that (`vm_runtime/guest/cell_gate.py`). Knows nothing of records and of
HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from kernels.errors import CellRunsError, MachineFailedError
from kernels.live import LiveSandbox
from kernels.states import CELL_TRANSITIONS, CellState
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.values import AfterCapture, Description
from vm_runtime.states import RunState

log = logging.getLogger(__name__)

# From the guest's answer until the state is captured: everything is prepared by then, so milliseconds. Also from the
# start of a machine in this state until it is greeted, which decides what becomes of the cells that wait; and how long
# the next cell waits in vain if this process dies just then and nobody takes its place.
HOLD_S = 30.0
# The guest answers within milliseconds; one that hangs is not waited for.
ASK_TIMEOUT_S = 2.0


async def _nothing() -> None:
    pass


class CellBarrier(SnapshotHooks):
    """For one snapshot of a live sandbox.

    strict: raise CellRunsError rather than take a snapshot of a cell that runs.
    waits: whether the kernel is to pause after the next cell, too.
    before_resume: runs in the pause.
    captured: runs when it is over and cells may begin.
    """

    asks_guest = True

    def __init__(
        self,
        live: LiveSandbox,
        *,
        then: AfterCapture,
        strict: bool,
        waits: bool,
        before_resume: Callable[[], Awaitable[object]] | None = None,
        captured: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._live = live
        self._then = then
        self._strict = strict
        self._waits = waits
        self._before_resume = before_resume or _nothing
        self._captured = captured or _nothing
        self._state = CellState.UNKNOWN
        self._asked = False
        self._cell: int | None = None
        self._held_until = 0.0

    async def before_pause(self) -> None:
        if self._live.saved.machine.state is not RunState.RUNNING:
            return  # it stands still, so its kernel can be neither asked nor ahead of what it has reported
        self._asked = True
        # From before it is asked: the guest counts its limit from later on.
        self._held_until = asyncio.get_running_loop().time() + HOLD_S
        try:
            last = await self._live.session.hold_cells(limit_s=HOLD_S, timeout_s=ASK_TIMEOUT_S)
        except MachineFailedError as error:
            if self._strict:
                raise CellRunsError(f"The kernel does not say whether a cell runs: {error}") from error
            return
        self._cell = last.cell
        self._move(CellState.BETWEEN if last.held else CellState.RUNNING, "A cell runs.")

    async def before_resume(self) -> None:
        if self._state is CellState.BETWEEN and asyncio.get_running_loop().time() >= self._held_until:
            self._move(CellState.RUNNING, "The kernel has waited long enough with the next cell.")
        await self._before_resume()

    def _move(self, state: CellState, why: str) -> None:
        """Errors: CellRunsError, if the snapshot would be of a cell that runs and must not."""
        if state not in CELL_TRANSITIONS[self._state]:
            raise RuntimeError(f"Cells are {self._state.value} and cannot be {state.value}")
        self._state = state
        if self._strict and state is CellState.RUNNING:
            raise CellRunsError(why)

    async def captured(self) -> None:
        if self._then is AfterCapture.RESUME:
            await self._release()
        await self._captured()

    async def abandoned(self) -> None:
        await self._release()

    async def _release(self) -> None:
        """Cells may begin in the machine itself, if it runs. Twice is harmless."""
        if self._asked and self._live.saved.machine.state is RunState.RUNNING:
            self._asked = False
            await self._live.release_cells(waits=self._waits)

    def described(self, description: Description) -> Description:
        if self._state is CellState.UNKNOWN or description.kernel is None:  # its owner knows no worse
            return description
        state = "idle" if self._state is CellState.BETWEEN else "busy"
        return replace(
            description, kernel=description.kernel.model_copy(update={"state": state, "execution_count": self._cell})
        )
