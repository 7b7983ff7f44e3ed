"""Says in plain words why a sandbox ended, from what was seen of it. A function of values."""

from __future__ import annotations

from dataclasses import dataclass

from vm_runtime.drivers.console import complaint, quoted, signal_name


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen. panic: what gVisor wrote when it gave up. console: the end of what was printed."""

    requested: bool
    exit_status: int | None
    signal: int | None
    oom_kills: int
    panic: str
    console: str


def reason(evidence: Evidence) -> str:
    """One sentence, the most certain cause first."""
    if evidence.requested:
        return "It was ended on request."
    if evidence.oom_kills:
        return "The host's kernel ended its sandbox: it used more memory than its limit (cgroup out of memory)."
    if evidence.panic:
        return f"gVisor gave up: {quoted(evidence.panic.splitlines()[0])}"
    if evidence.signal is not None:
        return f"Its sandbox was killed by the signal {signal_name(evidence.signal)}{complaint(evidence.console)}"
    if evidence.exit_status == 0:
        return "The guest powered itself off."
    if evidence.exit_status is not None:
        return f"Its sandbox exited with status {evidence.exit_status}{complaint(evidence.console)}"
    return f"Its sandbox ended, and nobody could see how{complaint(evidence.console)}"
