"""Makes empty qcow2 overlays, three pages of bytes without a process, and looks at the headers of others.

Knows nothing of machines. Format: QEMU's docs/interop/qcow2.txt, version 3.

    cluster 0   header                    cluster 2   refcount block: clusters 0 to 3 in use
    cluster 1   refcount table            cluster 3.. L1 table, all zero (nothing allocated)

The header names no backing file: the chain is given to QEMU explicitly when a machine starts, since a header that the
VMM can rewrite must never decide which file of the host is opened. Nor does a name that one has written there: it is
overridden. What cannot be overridden (a data file of its own, encryption) is refused by `virtual_bytes`.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from vm_runtime.snapshots.errors import BrokenSnapshotError

CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS
_L2_ENTRIES = CLUSTER_BYTES // 8
_HEADER_BYTES = 104
_REFCOUNT_ORDER = 4  # 2**4 bits each
_MAGIC = 0x514649FB
_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
# One refcount table of one cluster is enough for it.
_MAX_VIRTUAL_BYTES = 16 << 40


def overlay_bytes(virtual_bytes: int) -> bytes:
    """An image of this virtual size without any allocated cluster."""
    l1_entries, l1_clusters = _l1_entries(virtual_bytes), _l1_clusters(virtual_bytes)
    header = _HEADER.pack(
        _MAGIC, 3,
        0, 0,  # no backing file name
        CLUSTER_BITS, virtual_bytes,
        0,  # not encrypted
        l1_entries, 3 * CLUSTER_BYTES,
        CLUSTER_BYTES, 1,  # refcount table: offset, clusters
        0, 0,  # internal snapshots
        0, 0, 0,  # incompatible, compatible, autoclear features
        _REFCOUNT_ORDER, _HEADER_BYTES,
    )  # fmt: skip
    refcount_table = struct.pack(">Q", 2 * CLUSTER_BYTES)
    refcount_block = struct.pack(">H", 1) * (3 + l1_clusters)
    clusters = [header, refcount_table, refcount_block, b"\0" * (l1_clusters * CLUSTER_BYTES)]
    return b"".join(cluster.ljust(CLUSTER_BYTES, b"\0") for cluster in clusters)


def overlay_size(virtual_bytes: int) -> int:
    """Length of the file of such an image. Every allocation makes it longer."""
    return (3 + _l1_clusters(virtual_bytes)) * CLUSTER_BYTES


def create_overlay(path: Path, *, virtual_bytes: int) -> None:
    """Write such an image to a new file, readable by its owner only. FileExistsError if there is one."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(overlay_bytes(virtual_bytes))


def virtual_bytes(fd: int, path: Path) -> int:
    """The size of the disk of an overlay that any VMM may have written. Before a program opens it.

    Raises BrokenSnapshotError for what no VMM of ours writes.
    """
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) != _HEADER.size:
        raise BrokenSnapshotError(f"The disk {path} is truncated.")
    (
        magic, version, _, _, cluster_bits, size_bytes, encryption, _, _, _, _, snapshots, _, incompatible, _, _, _, _,
    ) = _HEADER.unpack(header)  # fmt: skip
    if magic != _MAGIC or version != 3 or cluster_bits != CLUSTER_BITS:
        raise BrokenSnapshotError(f"The disk {path} is no qcow2 file of version 3 with clusters of 64 KiB.")
    if encryption or snapshots or incompatible or not 0 < size_bytes <= _MAX_VIRTUAL_BYTES:
        raise BrokenSnapshotError(f"The disk {path} uses a part of qcow2 that is not expected here.")
    return int(size_bytes)


def _l1_entries(virtual_bytes: int) -> int:
    return -(-virtual_bytes // (CLUSTER_BYTES * _L2_ENTRIES))


def _l1_clusters(virtual_bytes: int) -> int:
    return max(1, -(-_l1_entries(virtual_bytes) * 8 // CLUSTER_BYTES))
