"""Written pages found, copied, stored and restored: what a restored process sees is what the captured one saw."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_runtime.snapshots.errors import BrokenSnapshotError, ProcessMemoryError
from vm_runtime.snapshots.layers import Layer, MemoryImage, Segment, file_digest, overlay
from vm_runtime.snapshots.memory import PAGE_SIZE, BaseMemory
from vm_runtime.snapshots.pages import PageBuffer, find_mapping, read_pagemap, union, written_pages
from vm_runtime.snapshots.tracking import CumulativeTracker, capture

SIZE_BYTES = 8 << 20
PAGES = SIZE_BYTES // PAGE_SIZE

Start = Callable[[], Any]

# Bytes 0 and 0x41, so that pages become zero, and become equal to what is below, often.
_WRITES = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 40), st.sampled_from([0, 0x41, 0x42])), max_size=25
)


def _tracker(process: Any) -> CumulativeTracker:
    return CumulativeTracker(process.pid, address=process.address, size_bytes=SIZE_BYTES)


def test_written_pages_are_those_written_and_no_others(mapper: Start, base: BaseMemory) -> None:
    process = mapper()
    process.touch()
    assert written_pages(process.pid, process.address, SIZE_BYTES) == []
    process.write(3, 2, 1)
    process.write(5, 1, 1)
    process.write(1000, 1, 0)
    assert written_pages(process.pid, process.address, SIZE_BYTES) == [(3, 3), (1000, 1)]
    assert find_mapping(process.pid, inode=os.fstat(base.fd).st_ino, size_bytes=SIZE_BYTES) == process.address


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=_WRITES)
def test_both_ways_to_find_pages_agree(mapper: Start, writes: list[tuple[int, int, int]]) -> None:
    process = mapper()
    for page, pages, byte in writes:
        process.write(page, min(pages, PAGES - page), byte)
    fd = os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY)
    try:
        assert read_pagemap(fd, process.address, SIZE_BYTES) == written_pages(process.pid, process.address, SIZE_BYTES)
    finally:
        os.close(fd)
        process.close()


def test_many_runs_are_found_once(mapper: Start) -> None:
    """More runs than one internal buffer of the kernel holds (512), and than one vector of process_vm_readv (1024)."""
    process = mapper()
    for page in range(0, PAGES, 2):
        seen = process.write(page, 1, 7)
    runs = written_pages(process.pid, process.address, SIZE_BYTES)
    assert runs == [(page, 1) for page in range(0, PAGES, 2)]
    assert seen == process.touch()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(_WRITES, min_size=1, max_size=3))
def test_base_and_layers_restored_are_the_memory_that_was_captured(
    mapper: Start, base: BaseMemory, tmp_path_factory: pytest.TempPathFactory, rounds: list[list[tuple[int, int, int]]]
) -> None:
    directory = tmp_path_factory.mktemp("layers")
    process = mapper()
    layers: list[Layer] = []
    tracker = _tracker(process)
    seen = process.touch()
    for number, writes in enumerate(rounds):
        for page, pages, byte in writes:
            seen = process.write(page, min(pages, PAGES - page), byte)
        tracker.prepare()
        captured = tracker.capture()
        path = directory / str(number)
        digest, size_bytes = captured.write(path, parent=MemoryImage(base, layers))
        assert (file_digest(path), path.stat().st_size) == (digest, size_bytes)
        layers.append(Layer.open(path, size_bytes=SIZE_BYTES, digest=digest))
    image = MemoryImage(base, layers)
    restored = mapper()
    image.restore_into(restored.pid, restored.address)
    assert restored.touch() == seen
    image.flatten(directory / "flat")
    assert file_digest(directory / "flat") == seen
    for layer in layers:
        layer.close()
    process.close()
    restored.close()


def test_an_unchanged_page_is_not_stored_again(mapper: Start, base: BaseMemory, tmp_path: Path) -> None:
    process = mapper()
    process.write(10, 200, 0x41)
    _, first_bytes = _tracker(process).capture().write(tmp_path / "1", parent=MemoryImage(base, []))
    layer = Layer.open(tmp_path / "1", size_bytes=SIZE_BYTES)
    process.write(50, 2, 0x42)
    _, second_bytes = _tracker(process).capture().write(tmp_path / "2", parent=MemoryImage(base, [layer]))
    assert first_bytes == 201 * PAGE_SIZE
    assert second_bytes == 3 * PAGE_SIZE
    layer.close()


def test_pages_that_became_zero_are_stored_without_content(mapper: Start, base: BaseMemory, tmp_path: Path) -> None:
    process = mapper()
    seen = process.write(0, 300, 0)  # the first hundred hold data in the base, the others are zero there
    _, size_bytes = _tracker(process).capture().write(tmp_path / "1", parent=MemoryImage(base, []))
    assert size_bytes == PAGE_SIZE
    layer = Layer.open(tmp_path / "1", size_bytes=SIZE_BYTES)
    assert layer.zero_runs == ((0, 100),)
    restored = mapper()
    MemoryImage(base, [layer]).restore_into(restored.pid, restored.address)
    assert restored.touch() == seen
    layer.close()


def test_two_clones_do_not_see_each_other(mapper: Start) -> None:
    one, other = mapper(), mapper()
    before = other.touch()
    one.write(0, 100, 9)
    assert other.touch() == before


def test_a_capture_needs_no_prepared_buffer_and_survives_a_small_one(mapper: Start) -> None:
    process = mapper()
    process.write(0, 64, 5)
    for buffer in (None, PageBuffer(1)):
        assert capture(process.pid, process.address, SIZE_BYTES, buffer=buffer).page_count == 64


def test_a_process_that_is_gone_is_said_to_be(mapper: Start) -> None:
    process = mapper()
    process.write(0, 1, 1)
    process.close()
    with pytest.raises(ProcessMemoryError, match="gone"):
        capture(process.pid, process.address, SIZE_BYTES)


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"X", "not a layer"),
        (8, b"\x02", "format 2"),
        (16, b"\x01", "bytes of memory"),
        (24, b"\x00\x02", "truncated"),
        (32, b"\x09", "truncated"),
        (40, b"\xff\xff\xff", "impossible"),
        (48, b"\x00", "impossible"),
        (PAGE_SIZE + 5, b"!", "changed"),
    ],
)
def test_a_tampered_layer_is_refused(
    mapper: Start, base: BaseMemory, tmp_path: Path, offset: int, content: bytes, reason: str
) -> None:
    process = mapper()
    process.write(2, 1, 1)
    path = tmp_path / "layer"
    digest, _ = _tracker(process).capture().write(path, parent=MemoryImage(base, []))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
    with pytest.raises(BrokenSnapshotError, match="changed"):
        Layer.open(path, size_bytes=SIZE_BYTES, digest=digest)
    if reason != "changed":
        with pytest.raises(BrokenSnapshotError, match=reason):
            Layer.open(path, size_bytes=SIZE_BYTES)


_SEGMENTS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8).map(union)


@given(lower=_SEGMENTS, upper=_SEGMENTS)
def test_overlay_is_what_painting_page_by_page_gives(
    lower: list[tuple[int, int]], upper: list[tuple[int, int]]
) -> None:
    painted: dict[int, tuple[int, int]] = {}
    layers = [
        [Segment(first, pages, source, 1000 * first) for first, pages in runs]
        for source, runs in enumerate((lower, upper))
    ]
    for segments in layers:
        for first, pages, source, position in segments:
            painted.update({first + done: (source, position + done) for done in range(pages)})
    result = overlay(*layers)
    assert result == sorted(result)
    assert {
        first + done: (source, position + done) for first, pages, source, position in result for done in range(pages)
    } == painted
    assert sum(segment.pages for segment in result) == len(painted)
