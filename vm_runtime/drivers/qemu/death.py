"""Says in plain words why a VMM ended, from what was seen of it.

A function of values: no processes, no sockets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vm_runtime.drivers.console import complaint, quoted, signal_name

_PANIC = re.compile(r"Kernel panic - not syncing: [^\r\n]*")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen. control_lost: why it was ended by us without a request. shutdown_reason: of QMP's SHUTDOWN event.
    stderr, serial: the ends of what was printed."""

    requested: bool
    exit_status: int | None
    signal: int | None
    control_lost: str | None
    oom_kills: int
    shutdown_reason: str | None
    guest_panicked: bool
    stderr: str
    serial: str


def reason(evidence: Evidence) -> str:
    """One sentence, the most certain cause first."""
    if evidence.requested:
        return "It was ended on request."
    if evidence.control_lost is not None:
        return f"Its VMM was ended since it could not be controlled any more: {quoted(evidence.control_lost)}"
    if evidence.oom_kills:
        return "The host's kernel killed its VMM: it used more memory than its limit (cgroup out of memory)."
    panic = _PANIC.search(evidence.serial)
    if panic is not None:
        return f"The guest's vmlinux panicked: {quoted(panic.group())}"
    if evidence.guest_panicked:
        return "The guest's vmlinux panicked."
    match evidence.shutdown_reason:
        case "guest-shutdown":
            return "The guest powered itself off."
        case "guest-reset":
            return "The guest rebooted or crashed (it reset its CPU), which ends a machine."
        case "host-signal":
            return "Its VMM was asked to end by a signal from the host."
        case "host-error":
            return f"Its VMM gave up after an error of the host{complaint(evidence.stderr)}"
        case _:
            pass
    if evidence.signal is not None:
        return f"Its VMM was killed by the signal {signal_name(evidence.signal)}{complaint(evidence.stderr)}"
    if evidence.exit_status is not None:
        return f"Its VMM exited with status {evidence.exit_status}{complaint(evidence.stderr)}"
    return f"Its VMM ended, and nobody could see how{complaint(evidence.stderr)}"
