"""The life of a machine as one table: which run state may follow which.

Knows nothing of VMMs. A sandbox's own states are in kernels/states.py.

    starting -> running <-> paused        any of them -> dead
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from vm_runtime.errors import MachineStateError


class RunState(StrEnum):
    """STARTING: the VMM is up, the guest has not run yet. PAUSED: vCPUs stand still. DEAD: the VMM has ended."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    RunState.STARTING: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.DEAD}),
    RunState.RUNNING: frozenset({RunState.PAUSED, RunState.DEAD}),
    RunState.PAUSED: frozenset({RunState.RUNNING, RunState.DEAD}),
    RunState.DEAD: frozenset(),
}


def require(found: RunState, *wanted: RunState) -> None:
    """Guard of a method: raises MachineStateError unless the machine is in one of the wanted states."""
    if found not in wanted:
        raise MachineStateError(found=found.value, wanted=" or ".join(state.value for state in wanted))


def advance(found: RunState, to: RunState) -> RunState:
    """The next state, or MachineStateError if the table does not have this transition."""
    if to not in TRANSITIONS[found]:
        wanted = " or ".join(state.value for state, after in TRANSITIONS.items() if to in after)
        raise MachineStateError(found=found.value, wanted=wanted)
    return to
