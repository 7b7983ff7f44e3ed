"""Merges a chain of qcow2 overlays into one, so that a disk's chain stays short.

Reads only what VMMs here write: version 3, clusters of 64 KiB, no backing name, encryption, compression, internal
snapshots or extensions; everything else is refused, since the files may come from a VMM that was broken into. Format:
QEMU's docs/interop/qcow2.txt. Blocking file I/O: call it from a thread.

The merged file:  header | refcount table | refcount blocks | L1 table | L2 tables | data, ascending
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.memory import removed_on_error, write_all

_CLUSTER_BITS = 16
_CLUSTER_BYTES = 1 << _CLUSTER_BITS
_L2_ENTRIES = _CLUSTER_BYTES // 8
_REFCOUNTS_PER_BLOCK = _CLUSTER_BYTES // 2
_MAGIC = 0x514649FB
_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
_HEADER_BYTES = 104
_REFCOUNT_ORDER = 4  # 2**4 bits each

_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_ZERO = 1
_OFFSET = 0x00FFFFFFFFFFFE00

# One refcount table of one cluster is enough for 16 TiB of disk.
_MAX_VIRTUAL_BYTES = 16 << 40

# A guest cluster that is zero, and is not to be looked for below.
_IS_ZERO = -1


@dataclass(frozen=True, kw_only=True)
class _Overlay:
    fd: int
    virtual_bytes: int
    l1: tuple[int, ...]

    @classmethod
    def read(cls, fd: int, path: Path) -> _Overlay:
        header = os.pread(fd, _HEADER.size, 0)
        if len(header) != _HEADER.size:
            raise BrokenSnapshotError(f"The disk {path} is truncated.")
        (
            magic, version, backing, _, cluster_bits, virtual_bytes, encryption, l1_size, l1_offset,
            _, _, snapshots, _, incompatible, _, _, _, _,
        ) = _HEADER.unpack(header)  # fmt: skip
        if magic != _MAGIC or version != 3 or cluster_bits != _CLUSTER_BITS:
            raise BrokenSnapshotError(f"The disk {path} is no qcow2 file of version 3 with clusters of 64 KiB.")
        if backing or encryption or snapshots or incompatible:
            raise BrokenSnapshotError(f"The disk {path} uses a part of qcow2 that is not expected here.")
        needed = -(-virtual_bytes // (_CLUSTER_BYTES * _L2_ENTRIES))
        if virtual_bytes > _MAX_VIRTUAL_BYTES or l1_size < needed:
            raise BrokenSnapshotError(f"The disk {path} has an impossible size.")
        table = os.pread(fd, needed * 8, l1_offset)
        if len(table) != needed * 8:
            raise BrokenSnapshotError(f"The disk {path} is truncated.")
        return cls(fd=fd, virtual_bytes=virtual_bytes, l1=struct.unpack(f">{needed}Q", table))

    def clusters(self, path: Path) -> Iterator[tuple[int, int]]:
        """(guest cluster, offset in the file or _IS_ZERO) of all that is allocated."""
        size_bytes = os.fstat(self.fd).st_size
        for index, entry in enumerate(self.l1):
            offset = entry & _OFFSET
            if not offset:
                continue
            table = os.pread(self.fd, _CLUSTER_BYTES, offset)
            if offset % _CLUSTER_BYTES or len(table) != _CLUSTER_BYTES:
                raise BrokenSnapshotError(f"The disk {path} has an impossible table.")
            for position, found in enumerate(struct.unpack(f">{_L2_ENTRIES}Q", table)):
                if not found:
                    continue
                data = found & _OFFSET
                if found & _COMPRESSED or data % _CLUSTER_BYTES or data >= size_bytes:
                    raise BrokenSnapshotError(f"The disk {path} has an impossible table.")
                if found & _ZERO:
                    yield index * _L2_ENTRIES + position, _IS_ZERO
                elif data:
                    yield index * _L2_ENTRIES + position, data


def merge_overlays(paths: Sequence[Path], target: Path, *, step: Callable[[], None] = lambda: None) -> None:
    """Write one new, synced overlay that shows the same as `paths` over each other, lowest first.

    step: called between the pieces of long work. Raises BrokenSnapshotError, StoreFullError; no file is left then.
    """
    with ExitStack() as stack:
        overlays: list[_Overlay] = []
        seen: dict[int, tuple[int, int]] = {}
        for number, path in enumerate(paths):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            overlay = _Overlay.read(fd, path)
            if overlays and overlay.virtual_bytes != overlays[0].virtual_bytes:
                raise BrokenSnapshotError(f"The disk {path} has another size than those below it.")
            overlays.append(overlay)
            seen.update((cluster, (number, offset)) for cluster, offset in overlay.clusters(path))
            step()
        with removed_on_error(target), target.open("xb", buffering=0) as file:
            _write(file.fileno(), overlays, dict(sorted(seen.items())), step)
            os.fsync(file.fileno())


def _write(
    target: int, overlays: Sequence[_Overlay], seen: dict[int, tuple[int, int]], step: Callable[[], None]
) -> None:
    virtual_bytes = overlays[0].virtual_bytes
    l1_entries = -(-virtual_bytes // (_CLUSTER_BYTES * _L2_ENTRIES))
    l1_clusters = max(1, -(-l1_entries * 8 // _CLUSTER_BYTES))
    tables = sorted({cluster // _L2_ENTRIES for cluster in seen})
    data = [cluster for cluster, (_, offset) in seen.items() if offset != _IS_ZERO]
    fixed = 2 + l1_clusters + len(tables) + len(data)
    blocks = -(-fixed // (_REFCOUNTS_PER_BLOCK - 1))  # each block counts itself too
    total = fixed + blocks
    l1_at = 2 + blocks
    l2_at = l1_at + l1_clusters
    data_at = l2_at + len(tables)

    header = _HEADER.pack(
        _MAGIC, 3, 0, 0, _CLUSTER_BITS, virtual_bytes, 0, l1_entries, l1_at * _CLUSTER_BYTES,
        _CLUSTER_BYTES, 1, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, _HEADER_BYTES,
    )  # fmt: skip
    write_all(target, header.ljust(_CLUSTER_BYTES, b"\0"), 0)
    refcount_table = struct.pack(f">{blocks}Q", *((2 + number) * _CLUSTER_BYTES for number in range(blocks)))
    write_all(target, refcount_table.ljust(_CLUSTER_BYTES, b"\0"), _CLUSTER_BYTES)
    write_all(target, (b"\0\1" * total).ljust(blocks * _CLUSTER_BYTES, b"\0"), 2 * _CLUSTER_BYTES)

    l1 = [0] * l1_entries
    l2 = {table: [0] * _L2_ENTRIES for table in tables}
    for number, table in enumerate(tables):
        l1[table] = (l2_at + number) * _CLUSTER_BYTES | _COPIED
    position = data_at
    for cluster, (source, offset) in seen.items():
        entry = _ZERO
        if offset != _IS_ZERO:
            step()
            content = os.pread(overlays[source].fd, _CLUSTER_BYTES, offset)
            write_all(target, content.ljust(_CLUSTER_BYTES, b"\0"), position * _CLUSTER_BYTES)
            entry = position * _CLUSTER_BYTES | _COPIED
            position += 1
        l2[cluster // _L2_ENTRIES][cluster % _L2_ENTRIES] = entry
    write_all(target, struct.pack(f">{l1_entries}Q", *l1).ljust(l1_clusters * _CLUSTER_BYTES, b"\0"), l1_at << 16)
    for number, table in enumerate(tables):
        write_all(target, struct.pack(f">{_L2_ENTRIES}Q", *l2[table]), (l2_at + number) * _CLUSTER_BYTES)
