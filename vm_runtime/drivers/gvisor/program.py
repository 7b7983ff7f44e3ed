"""Finds runsc. Starts it only to ask its version."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

from vm_runtime.errors import DriverUnavailableError

PROGRAM = "runsc"
# The first one that restores an EROFS root without a gofer as this driver needs it; Debian's of 2024-07 is newer.
OLDEST_VERSION = 20240401
INSTALL = "tools/setup gvisor (or: sudo apt-get install -t bookworm-backports runsc)"


async def find_program(name: str) -> tuple[Path, str]:
    """runsc's path, links resolved, and its version. DriverUnavailableError if it is missing or too old.

    name: a name on the PATH, or a path.
    """
    found = shutil.which(name)
    if found is None:
        raise DriverUnavailableError(f"{name} is not installed: {INSTALL}")
    path = await asyncio.to_thread(lambda: Path(found).resolve())
    process = await asyncio.create_subprocess_exec(
        path, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    match = re.search(rb"runsc version (\S+)", output)
    if process.returncode != 0 or match is None:
        raise DriverUnavailableError(f"{path} --version does not answer a version.")
    version = match[1].decode()
    date = re.search(r"(20\d{6})", version)
    if date is not None and int(date[1]) < OLDEST_VERSION:
        raise DriverUnavailableError(f"{path} is of {date[1]}; one of {OLDEST_VERSION} or later is needed.")
    return path, version
