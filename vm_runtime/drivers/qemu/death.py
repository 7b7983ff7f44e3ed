"""Says in plain words why a VMM ended, from what was seen of it.

A function of values: no processes, no sockets.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

# Guest text shown to people: one screen is enough, and a hostile guest chooses what is in it.
MAX_QUOTE_CHARACTERS = 300

_PANIC = re.compile(r"Kernel panic - not syncing: [^\r\n]*")
# C0 controls but line feed and tab, DEL, and C1: terminals act on them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Some of QEMU's complaints say nothing about why it ended.
_HARMLESS = re.compile(r"warning:", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen.

    control_lost: why it was ended by us without a request.
    shutdown_reason: of QMP's SHUTDOWN event.
    stderr, serial: the ends of what was printed.
    """

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
        return f"Its VMM was ended since it could not be controlled any more: {_quote(evidence.control_lost)}"
    if evidence.oom_kills:
        return "The host's kernel killed its VMM: it used more memory than its limit (cgroup out of memory)."
    panic = _PANIC.search(evidence.serial)
    if panic is not None:
        return f"The guest's vmlinux panicked: {_quote(panic.group())}"
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
            return f"Its VMM gave up after an error of the host{_complaint(evidence.stderr)}"
        case _:
            pass
    if evidence.signal is not None:
        return f"Its VMM was killed by the signal {_signal_name(evidence.signal)}{_complaint(evidence.stderr)}"
    if evidence.exit_status is not None:
        return f"Its VMM exited with status {evidence.exit_status}{_complaint(evidence.stderr)}"
    return f"Its VMM ended, and nobody could see how{_complaint(evidence.stderr)}"


def printable(data: bytes) -> str:
    """Text of a guest or VMM for people's eyes: undecodable bytes and control characters do no harm."""
    return _CONTROL.sub("", data.decode(errors="replace"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name of its own
        return str(number)


def _complaint(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip() and not _HARMLESS.search(line)]
    return f": {_quote(lines[-1])}" if lines else "."


def _quote(text: str) -> str:
    text = "".join(character for character in text.strip() if character.isprintable())
    return text if len(text) <= MAX_QUOTE_CHARACTERS else text[:MAX_QUOTE_CHARACTERS] + "..."
