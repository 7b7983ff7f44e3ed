"""What runs in the machine uses of it: processors, memory, disk. As numbers for the host, from /proc and the disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

# Over how long the processors are looked at: vmlinux counts their time in hundredths of a second.
SAMPLE_S = 0.25


async def usage_of(disk: Path) -> dict[str, Any]:
    """cpu_percent: of all processors together, now. cpu_used_ms: since the machine was booted."""
    (busy, total), ticks = _processor_times(), os.sysconf("SC_CLK_TCK")
    await asyncio.sleep(SAMPLE_S)
    busy_then, total_then = _processor_times()
    memory = _memory()
    room = await asyncio.to_thread(os.statvfs, disk)
    return {
        "cpu_percent": min(100, round(100 * (busy_then - busy) / max(1, total_then - total))),
        "cpu_used_ms": busy_then * 1000 // ticks,
        "memory_total_bytes": memory["MemTotal"],
        "memory_used_bytes": memory["MemTotal"] - memory["MemAvailable"],
        "disk_total_bytes": room.f_blocks * room.f_frsize,
        "disk_used_bytes": (room.f_blocks - room.f_bfree) * room.f_frsize,
    }


def _processor_times() -> tuple[int, int]:
    """Ticks in which all processors worked, and all ticks (man proc_stat)."""
    times = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = times[3] + times[4]
    return sum(times) - idle, sum(times)


def _memory() -> dict[str, int]:
    """In bytes, by vmlinux's names (man proc_meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}
