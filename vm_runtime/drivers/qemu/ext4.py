"""Makes the empty file system on the disk of a machine that is booted."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from vm_runtime.errors import DriverError, DriverUnavailableError

PROGRAM = "mke2fs"
PACKAGE = "e2fsprogs"
# Debian has it in /sbin, which is not on an ordinary user's path.
_SYSTEM_PATH = ":/sbin:/usr/sbin"


async def format_disk(path: Path, size_mib: int) -> None:
    """An empty sparse ext4 file system in a new file. Without a journal: the disk is only ever used together with the
    memory that it was captured with, so there is nothing that a journal could repair. Errors: DriverError."""
    with path.open("xb") as file:
        file.truncate(size_mib << 20)
    try:
        process = await asyncio.create_subprocess_exec(
            PROGRAM, "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0",
            str(path),
            env={**os.environ, "PATH": os.environ.get("PATH", "") + _SYSTEM_PATH},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise DriverUnavailableError(f"{PROGRAM} is not installed: sudo apt-get install {PACKAGE}") from error
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise DriverError(f"{PROGRAM} failed ({process.returncode}): {output.decode(errors='replace').strip()}")
