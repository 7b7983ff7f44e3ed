"""What names a part: the digest of its content, which depends on its kind, and how a checked file is known again.

A disk's digest leaves out the blocks that are zero, as a base's does, so that it costs what was written:

    sha256( b"hypercell-disk-1\\n" + <u64 size> + sha256(index) + sha256(content) )

with 4 KiB blocks for pages (memory.py), the last one filled up with zeros. Blocking file I/O: call it from a thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vm_runtime.snapshots.layers import file_digest
from vm_runtime.snapshots.manifest import PartKind
from vm_runtime.snapshots.memory import CHUNK_BYTES, PAGE_SIZE, MemoryDigest, data_extents, memory_digest, non_zero_runs

_DISK_MAGIC = b"hypercell-disk-1\n"


def part_digest(kind: PartKind, path: Path) -> str:
    """The digest of a part's file; of bases and disks only what is not zero is read."""
    match kind:
        case PartKind.BASE:
            return memory_digest(path)
        case PartKind.DISK:
            return disk_digest(path)
        case _:
            return file_digest(path)


def disk_digest(path: Path) -> str:
    """The digest of a disk's file, raw or qcow2; does not depend on where a file system puts holes."""
    with path.open("rb", buffering=0) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        digest = MemoryDigest(size_bytes, magic=_DISK_MAGIC)
        for start, end in data_extents(file.fileno(), size_bytes):
            for offset in range(start, end, CHUNK_BYTES):
                chunk = os.pread(file.fileno(), min(CHUNK_BYTES, end - offset), offset)
                chunk += bytes(-len(chunk) % PAGE_SIZE)
                view = memoryview(chunk)
                for run_start, run_end in non_zero_runs(chunk):
                    digest.add((offset + run_start) // PAGE_SIZE, view[run_start:run_end])
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """What tells that a file is the one that was checked, unchanged.

    Whoever writes to a file changes `mtime_ns`, which only its owner can put back, and `ctime_ns`, which nobody can; it
    is left out, as 0, of files that get and lose further links, which change it too.
    """

    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, kind: PartKind, path: Path) -> Self:
        """Raises FileNotFoundError."""
        found = path.stat()
        return cls(
            inode=found.st_ino,
            size_bytes=found.st_size,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns if kind is PartKind.BASE else 0,
        )
