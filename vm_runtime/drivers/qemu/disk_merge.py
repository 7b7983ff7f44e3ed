"""Merges a chain of qcow2 overlays into one with `qemu-img commit`, confined like a VMM.

The overlays may come from a VMM that was broken into, so no header decides what is opened: each file is an inherited
descriptor, and the chain is given whole. Knows no snapshots; the driver calls it.

    top      an empty overlay in memory, since `commit` wants to write to the file that it commits
    sources  read-only, lowest first
    target   an empty overlay over nothing: what any source has is copied into it, zeros too; the rest stays unset
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import secrets
import shutil
import signal
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vm_runtime.confinement.host import HostConfinement
from vm_runtime.confinement.namespaces import Confinement
from vm_runtime.confinement.process import Process, Spawner, SpawnRequest
from vm_runtime.drivers.console import printable
from vm_runtime.drivers.qemu import qcow2
from vm_runtime.errors import DriverError, DriverUnavailableError
from vm_runtime.snapshots.errors import BrokenSnapshotError, StoreFullError
from vm_runtime.snapshots.memory import removed_on_error

PROGRAM = "qemu-img"

# Files of one run: each costs a descriptor and 130 bytes of arguments. Longer chains take several runs.
BATCH = 64
# Measured: 8 ms for six small overlays, some 300 MB/s for large ones. Slower than this, it hangs.
_LIMIT_S = 60.0
_SLOWEST_BYTES_PER_S = 5 << 20
# Tables of the target: one L2 table (64 KiB) for each 512 MiB of disk, and refcounts.
_METADATA_BYTES = 64 << 20
# The program and its libraries take 200 MiB of address space, the caches of a batch and the threads' stacks as much.
_ADDRESS_SPACE_BYTES = 1 << 30
_CACHE_BYTES = 1 << 20
_STACK_BYTES = 1 << 20
# Threads: one main, at most 64 disk workers (QEMU's own limit).
_PROCESSES = 80
_OPEN_FILES = 256
# Below everything interactive.
_NICENESS = 10
_ERROR_BYTES = 4096
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}


async def merge_overlays(overlays: Sequence[Path], target: Path, *, spawner: Spawner, host: HostConfinement) -> None:
    """Write one new, synced overlay that shows the same as `overlays` over each other, lowest first.

    Raises BrokenSnapshotError, StoreFullError, DriverError (no `qemu-img`, or it hangs); no file is left then, nor
    when cancelled.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise DriverUnavailableError(f"{PROGRAM} is not installed: sudo apt install qemu-utils")
    with ExitStack() as stack:

        def opened(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        sources = [opened(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) for path in overlays]
        sizes = {qcow2.virtual_bytes(fd, path) for fd, path in zip(sources, overlays, strict=True)}
        if len(sizes) != 1:
            raise BrokenSnapshotError(f"The disks to be merged into {target.name} have different sizes.")
        (size_bytes,) = sizes
        with removed_on_error(target):
            qcow2.create_overlay(target, virtual_bytes=size_bytes)
            written = opened(os.open(target, os.O_RDWR | os.O_CLOEXEC))
            data_bytes = sum(os.fstat(fd).st_size for fd in sources)
            confinement = _confinement(host, program, file_bytes=data_bytes + _METADATA_BYTES)
            uid = confinement.uid
            if uid is not None:
                # It opens them again by /proc/self/fd. Their directories are closed to all users but the gateway's.
                os.fchown(written, uid, uid)
                for fd in sources:
                    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | stat.S_IRGRP | stat.S_IROTH)
            for start in range(0, len(sources), BATCH):
                top = opened(os.memfd_create("hypercell-top", os.MFD_CLOEXEC))
                os.write(top, qcow2.overlay_bytes(size_bytes))
                files = [written, *sources[start : start + BATCH], top]
                request = SpawnRequest(
                    argv=[program, *arguments(len(files) - 2)],
                    env=_ENVIRONMENT,
                    descriptors=files,
                    confinement=confinement,
                    namespaces=host.namespaces,
                    cgroups=(),
                )
                await _run(spawner, request, limit_s=_LIMIT_S + data_bytes / _SLOWEST_BYTES_PER_S)
            if uid is not None:
                os.fchown(written, os.geteuid(), os.getegid())
            await asyncio.to_thread(os.fsync, written)


def arguments(count: int) -> list[str]:
    """Those of `qemu-img` for a batch of so many sources; descriptors are numbered from 3: target, sources, top."""
    node: dict[str, Any] | None = None
    for number in range(count + 2):
        node = {
            "driver": "qcow2",
            "read-only": 0 < number <= count,
            "l2-cache-size": _CACHE_BYTES,
            "file": {"driver": "file", "filename": f"/proc/self/fd/{3 + number}", "locking": "off"},
            "backing": node,
        }
    # -d: the top need not be emptied. Whoever stores the target syncs it.
    chain = f"json:{json.dumps(node, separators=(',', ':'))}"
    return ["commit", "-q", "-d", "-t", "unsafe", "-b", "/proc/self/fd/3", chain]


def _confinement(host: HostConfinement, program: str, *, file_bytes: int) -> Confinement:
    rlimits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_AS, _ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_STACK, _STACK_BYTES),
    ]
    if host.drop_user:
        rlimits.append((resource.RLIMIT_NPROC, _PROCESSES))  # counts per user, and this one has nothing else
    directory = Path(program).resolve().parent.parent
    read_only = () if directory.is_relative_to("/usr") else (str(directory),)
    return replace(host.of(secrets.token_hex(8), read_only=read_only, rlimits=tuple(rlimits)), devices=())


async def _run(spawner: Spawner, request: SpawnRequest, *, limit_s: float) -> None:
    """Merge one batch. The program is never kept by the spawner, so it ends with the gateway at the latest."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    process: Process | None = None
    try:
        with os.fdopen(write, "wb"):
            process, _ = await spawner.spawn(replace(request, descriptors=[write, *request.descriptors]))
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
        async with asyncio.timeout(limit_s):
            ended = await process.wait()
        if ended.exit_status != 0:
            complaint = printable(os.read(read, _ERROR_BYTES)).strip()  # it has ended: never blocks
            if "No space left on device" in complaint:
                raise StoreFullError("No room is left for the merged disk; free some, then try again.")
            raise BrokenSnapshotError(f"{PROGRAM} could not merge the disks: {complaint or ended}")
    except TimeoutError as error:
        raise DriverError(f"{PROGRAM} did not merge the disks within {limit_s:.0f} s.") from error
    finally:
        os.close(read)
        if process is not None:
            process.send_signal(signal.SIGKILL)
            await asyncio.shield(process.wait())
            process.close()
