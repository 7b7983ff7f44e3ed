"""A process with all that it has started: paused, resumed and measured together. Linux only; reads /proc."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

# Stopped, traced, or ended.
_STANDING = ("T", "t", "Z", "X", None)


def pids(root: int) -> list[int]:
    """The process and its descendants, parents first. Without those that have just ended."""
    found = [root]
    for pid in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found.extend(map(int, children.read_text().split()))
    return found


def stop(root: int) -> None:
    """Pause all of them, also those that are being started just now. Blocking."""
    stopped: set[int] = set()
    while new := [pid for pid in pids(root) if pid not in stopped]:
        for pid in new:
            _send(pid, signal.SIGSTOP)
        for pid in new:
            while _state(pid) not in _STANDING:
                time.sleep(0.001)  # a signal is delivered when its process next runs; nothing tells
        stopped.update(new)


def resume(root: int) -> None:
    for pid in pids(root):
        _send(pid, signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    """Whether a process is paused; False if it has ended."""
    return _state(pid) in ("T", "t")


def memory_bytes(root: int) -> tuple[int, int]:
    """(what is theirs alone, what they share with others), in RAM or swap. Blocking."""
    own = total = 0
    for pid in pids(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
            own += kib["Private_Clean"] + kib["Private_Dirty"] + kib["Swap"]
            total += kib["Rss"] + kib["Swap"]
    return own << 10, (total - own) << 10


def _state(pid: int) -> str | None:
    """The letter of proc(5); None if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return None


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
