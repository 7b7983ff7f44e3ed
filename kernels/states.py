"""The life of a sandbox as a table (DESIGN.md section 6). Pure; `SandboxService` guards its methods with it."""

from __future__ import annotations

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
