"""Makes empty qcow2 overlays: three pages of bytes, no process.

Knows nothing of machines. Format: QEMU's docs/interop/qcow2.txt, version 3.

    cluster 0   header                    cluster 2   refcount block: clusters 0 to 3 in use
    cluster 1   refcount table            cluster 3.. L1 table, all zero (nothing allocated)

The header names no backing file: the chain is given to QEMU explicitly when a machine starts, since a header that the
VMM can rewrite must never decide which file of the host is opened.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS
_L2_ENTRIES = CLUSTER_BYTES // 8
_HEADER_BYTES = 104
_REFCOUNT_ORDER = 4  # 2**4 bits each
_MAGIC = 0x514649FB


def overlay_bytes(virtual_bytes: int) -> bytes:
    """An image of this virtual size without any allocated cluster."""
    l1_entries, l1_clusters = _l1_entries(virtual_bytes), _l1_clusters(virtual_bytes)
    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII",
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


def _l1_entries(virtual_bytes: int) -> int:
    return -(-virtual_bytes // (CLUSTER_BYTES * _L2_ENTRIES))


def _l1_clusters(virtual_bytes: int) -> int:
    return max(1, -(-_l1_entries(virtual_bytes) * 8 // CLUSTER_BYTES))
