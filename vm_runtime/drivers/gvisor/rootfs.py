"""The root file system as gVisor reads it: the image's EROFS, uncompressed. Made once, and kept beside the image's.

gVisor reads it itself, without a helper process, and all machines share its pages; it knows neither compression nor
inlined data. Nothing in an image is executed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from vm_runtime.errors import DriverError
from vm_runtime.spec import ImageFiles

# Of what is made; part of a template's identity.
ROOTFS_VERSION = 1
_NAME = f"rootfs.plain-{ROOTFS_VERSION}.erofs"
_TIME = "-T1700000000"
_ERROR_BYTES = 400


def plain_path(image: ImageFiles) -> Path:
    """Where it lies, or would lie."""
    return image.rootfs.parent / _NAME


async def ensure_plain(image: ImageFiles) -> Path:
    """The file, made now (some seconds) if it is missing. Errors: DriverError."""
    path = plain_path(image)
    if not await asyncio.to_thread(path.exists):
        try:
            await _make(image, path)
        except OSError as error:
            raise DriverError(f"{path} could not be made: {error}") from error
    return path


async def _make(image: ImageFiles, path: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix=".plain-", dir=path.parent))
    lock = os.open(path.parent / ".plain.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        if await asyncio.to_thread(path.exists):  # made by whoever had the lock
            return
        tree, made = work / "tree", work / "made"
        await _run("fsck.erofs", f"--extract={tree}", str(image.rootfs))
        await _run("mkfs.erofs", "--quiet", "-Enoinline_data", _TIME, str(made), str(tree))
        made.chmod(0o644)
        made.replace(path)
    finally:
        os.close(lock)
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, work, ignore_errors=True))


async def _run(*command: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise DriverError(f"{command[0]} is not installed: sudo apt-get install erofs-utils") from error
    try:
        _, complaint = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        text = complaint.decode(errors="replace").strip()[-_ERROR_BYTES:]
        raise DriverError(f"{command[0]} could not make the root file system: {text}")
