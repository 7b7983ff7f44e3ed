"""Finds the QEMU program and the CPU model that guests get.

Starts QEMU only to ask its version.
"""

from __future__ import annotations

import asyncio
import functools
import re
import shutil
from pathlib import Path

from vm_runtime.drivers.qemu.arguments import Accelerator
from vm_runtime.errors import DriverUnavailableError

PROGRAM = "qemu-system-x86_64"
OLDEST_VERSION = (7, 2)


async def find_program(name: str) -> tuple[Path, tuple[int, int, int]]:
    """QEMU's path, links resolved, and its version. DriverUnavailableError if it is missing or too old."""
    found = shutil.which(name)
    if found is None:
        raise DriverUnavailableError(f"{name} is not installed: sudo apt install qemu-system-x86")
    path = await asyncio.to_thread(lambda: Path(found).resolve())
    process = await asyncio.create_subprocess_exec(
        path, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    match = re.search(rb"version (\d+)\.(\d+)\.(\d+)", output)
    if process.returncode != 0 or match is None:
        raise DriverUnavailableError(f"{path} --version does not answer a version.")
    version = (int(match[1]), int(match[2]), int(match[3]))
    if version[:2] < OLDEST_VERSION:
        raise DriverUnavailableError(f"{path} is QEMU {version[0]}.{version[1]}; 7.2 or later is needed.")
    return path, version


@functools.cache
def cpu_model(accelerator: Accelerator) -> str:
    """The guest's CPU. Fixed names under KVM, so that snapshots can move between hosts of one vendor and generation."""
    if accelerator is Accelerator.TCG:
        return "max"
    information = Path("/proc/cpuinfo").read_text()
    if not re.search(r"^flags\s*:.*\bavx2\b", information, re.MULTILINE):
        return "Opteron_G3" if "AuthenticAMD" in information else "Nehalem"
    return "EPYC" if "AuthenticAMD" in information else "Haswell-noTSX"
