"""The states of a sandbox, and of the cells of a kernel that is captured, each as a table. Pure.

`Registry.move` is guarded by the first, `CellBarrier` by the second; there is no other way to another state.
"""

from __future__ import annotations

from enum import Enum

from kernels.errors import SandboxStateError
from kernels.models import SandboxState as S

TRANSITIONS: dict[S, frozenset[S]] = {
    S.CREATING: frozenset({S.RUNNING, S.FAILED, S.GONE}),
    S.RUNNING: frozenset({S.PAUSED, S.ASLEEP, S.FAILED, S.GONE}),
    S.PAUSED: frozenset({S.RUNNING, S.ASLEEP, S.FAILED, S.GONE}),
    S.ASLEEP: frozenset({S.RUNNING, S.FAILED, S.GONE}),
    S.FAILED: frozenset({S.GONE}),
    S.GONE: frozenset(),
}


def check(sandbox_id: str, found: S, wanted: S) -> None:
    """Raises `SandboxStateError` unless a sandbox that is `found` may become `wanted`."""
    if wanted not in TRANSITIONS[found]:
        sources = " or ".join(sorted(source for source, targets in TRANSITIONS.items() if wanted in targets))
        raise SandboxStateError(sandbox_id, found=found, wanted=sources)


class CellState(Enum):
    """UNKNOWN: the kernel has not been asked, or has not answered. BETWEEN: no cell runs and none begins, for as long
    as they are held. RUNNING: one runs, or may have begun."""

    UNKNOWN = "unknown"
    BETWEEN = "between"
    RUNNING = "running"


CELL_TRANSITIONS: dict[CellState, frozenset[CellState]] = {
    CellState.UNKNOWN: frozenset({CellState.BETWEEN, CellState.RUNNING}),
    CellState.BETWEEN: frozenset({CellState.RUNNING}),
    CellState.RUNNING: frozenset(),
}
