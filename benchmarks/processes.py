"""Processes and their memory, read from /proc; and ending those that we started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

# A gateway ends its kernels first; one that takes longer than this hangs.
STOP_TIMEOUT_S = 60.0
RSS_INTERVAL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Memory:
    """unique_mib: what only this process has (private pages and swap). shared_mib: the rest of what it has mapped."""

    unique_mib: float
    shared_mib: float


def memory_of(pid: int) -> Memory:
    """From smaps_rollup (proc(5)). Errors: OSError when the process has ended."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return Memory(unique_mib=(private + kib["Swap"]) / 1024, shared_mib=(kib["Rss"] - private) / 1024)


def shared_files_mib(pids: Iterable[int], name: str) -> float:
    """What memory files of this name take that any of the processes have mapped, each counted once. Errors: OSError."""
    found: dict[int, int] = {}
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            span, _, _, _, inode, *path = line.split(None, 5)
            if path and path[0].startswith(f"/memfd:{name}") and int(inode) not in found:
                start, stop = (int(part, 16) for part in span.split("-"))
                file = Path(f"/proc/{pid}/map_files/{start:x}-{stop:x}")
                found[int(inode)] = file.stat().st_blocks * 512
    return sum(found.values()) / 2**20


def rss_mib(pid: int) -> float:
    """Resident memory; cheap enough to be asked many times a second."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(kw_only=True)
class Growth:
    """mib: the largest growth so far; None for a process that is not known."""

    mib: float | None = None


@asynccontextmanager
async def watched_growth(pid: int | None) -> AsyncIterator[Growth]:
    """The largest growth of a process's resident memory while the context is open."""
    growth = Growth()
    if pid is None:
        yield growth
        return
    before = rss_mib(pid)
    growth.mib = 0.0

    async def watch() -> None:
        while True:
            growth.mib = max(growth.mib or 0.0, rss_mib(pid) - before)
            await asyncio.sleep(RSS_INTERVAL_S)

    watcher = asyncio.create_task(watch())
    try:
        yield growth
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


def descendants(pid: int) -> set[int]:
    """All processes below this one, without it."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                # The command's name, in parentheses, may hold anything; the parent is the second field after it.
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(directory.name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo.extend(below)
    return found


def start_time(pid: int) -> str | None:
    """Names a process together with its pid, which may be given out again; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def named(pids: Iterable[int]) -> dict[int, str]:
    """pid -> start time of those that live."""
    return {pid: began for pid in pids if (began := start_time(pid)) is not None}


def kill_remaining(processes: dict[int, str]) -> list[int]:
    """SIGKILL to those of `named` that still live; answers their pids."""
    remaining = [pid for pid, began in processes.items() if start_time(pid) == began]
    for pid in remaining:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return remaining


async def stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, then SIGKILL where that does not help; returns when it has ended."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
