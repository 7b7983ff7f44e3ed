"""Merging overlays: the result shows what the chain showed, and files that no VMM of ours writes are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_runtime.drivers.qemu import qcow2
from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.overlays import merge_overlays

CLUSTER = qcow2.CLUSTER_BYTES
# Two tables of the second level.
VIRTUAL_BYTES = 1 << 30

Content = dict[int, int | None]  # guest cluster -> the byte it is filled with, None for zeros


def write_overlay(path: Path, content: Content) -> None:
    """An overlay as a VMM would have written it."""
    qcow2.create_overlay(path, virtual_bytes=VIRTUAL_BYTES)
    with path.open("r+b") as file:
        tables: dict[int, int] = {}
        for cluster, byte in content.items():
            index, position = divmod(cluster, CLUSTER // 8)
            if index not in tables:
                tables[index] = file.seek(0, 2)
                file.write(bytes(CLUSTER))
                file.seek(3 * CLUSTER + 8 * index)
                file.write(struct.pack(">Q", tables[index] | 1 << 63))
            entry = 1
            if byte is not None:
                entry = file.seek(0, 2) | 1 << 63
                file.write(bytes([byte]) * CLUSTER)
            file.seek(tables[index] + 8 * position)
            file.write(struct.pack(">Q", entry))


def read_overlay(path: Path) -> Content:
    """What an overlay has, read in the simplest way."""
    data = path.read_bytes()
    content: Content = {}
    (l1_size,) = struct.unpack_from(">I", data, 36)
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    for index in range(l1_size):
        (table,) = struct.unpack_from(">Q", data, l1_offset + 8 * index)
        if table:
            for position in range(CLUSTER // 8):
                (entry,) = struct.unpack_from(">Q", data, (table & ~(1 << 63)) + 8 * position)
                if entry & 1:
                    content[index * (CLUSTER // 8) + position] = None
                elif entry:
                    content[index * (CLUSTER // 8) + position] = data[entry & ~(1 << 63)]
    return content


contents = st.dictionaries(st.integers(0, VIRTUAL_BYTES // CLUSTER - 1), st.none() | st.integers(1, 255), max_size=6)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chain=st.lists(contents, min_size=1, max_size=4))
def test_the_merged_overlay_shows_what_the_chain_shows(chain: list[Content], tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.qcow2" for number in range(len(chain))]
    merged = tmp_path / "merged.qcow2"
    expected: Content = {}
    for path, content in zip(paths, chain, strict=True):
        write_overlay(path, content)
        expected |= content
    try:
        merge_overlays(paths, merged)
        assert read_overlay(merged) == expected
    finally:
        for path in (*paths, merged):
            path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"QFI\0"),  # another format
        (8, struct.pack(">Q", 104)),  # a backing file by name
        (20, struct.pack(">I", 12)),  # other clusters
        (32, struct.pack(">I", 1)),  # encrypted
        (60, struct.pack(">I", 1)),  # internal snapshots
        (72, struct.pack(">Q", 2)),  # an incompatible feature
        (24, struct.pack(">Q", 1 << 50)),  # larger than its table
        (3 * CLUSTER, struct.pack(">Q", 1 << 40)),  # a table beyond the end
        (3 * CLUSTER, struct.pack(">Q", 0x200)),  # a table between clusters
    ],
)
def test_a_hostile_overlay_is_refused_and_leaves_nothing(offset: int, value: bytes, tmp_path: Path) -> None:
    path, merged = tmp_path / "0.qcow2", tmp_path / "merged.qcow2"
    write_overlay(path, {0: 1})
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    with pytest.raises(BrokenSnapshotError):
        merge_overlays([path], merged)
    assert not merged.exists()
