"""Pages that are mapped instead of copied: a process sees the same, has less of its own, and is tracked as before."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_runtime.snapshots import sharing
from vm_runtime.snapshots.errors import ProcessMemoryError
from vm_runtime.snapshots.family import open_family
from vm_runtime.snapshots.injection import calls_in_process
from vm_runtime.snapshots.layers import CapturedPages, Layer, MemoryImage
from vm_runtime.snapshots.memory import PAGE_SIZE, BaseMemory
from vm_runtime.snapshots.pages import count_pages, find_mapping, written_pages
from vm_runtime.snapshots.sharing import place_pages
from vm_runtime.snapshots.tracking import start_tracker

SIZE_BYTES = 8 << 20
PAGES = SIZE_BYTES // PAGE_SIZE
NR_GETPID, NR_MMAP, NR_MUNMAP = 39, 9, 11

Start = Callable[[], Any]

_WRITES = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 60), st.sampled_from([0, 0x41, 0x42])), max_size=12
)


@pytest.fixture(autouse=True)
def _needs_injection(mapper: Start) -> None:
    try:
        with calls_in_process(mapper().pid):
            pass
    except ProcessMemoryError as error:
        pytest.skip(f"needs ptrace: {error}")


def _track(process: Any) -> Any:
    return start_tracker(process.pid, address=process.address, size_bytes=SIZE_BYTES, clean=True)


def _write(process: Any, writes: list[tuple[int, int, int]]) -> None:
    for page, pages, byte in writes:
        process.write(page, min(pages, PAGES - page), byte)


def _captured(process: Any, tracker: Any) -> CapturedPages:
    tracker.prepare(share_from_pages=0)
    captured: CapturedPages = tracker.capture()
    return captured


def _share(captured: CapturedPages, child: Any) -> None:
    shared = captured.shared()
    place_pages(child.pid, child.address, shared.pieces, passed=child.pass_files(shared.files))


def _own(process: Any) -> int:
    return count_pages(written_pages(process.pid, process.address, SIZE_BYTES))


def test_many_calls_are_made_in_a_process_that_is_stopped_once(mapper: Start) -> None:
    process = mapper()
    seen = process.touch()
    with calls_in_process(process.pid) as thread:
        assert {thread.call(NR_GETPID) for _ in range(500)} == {process.pid}
        with pytest.raises(ProcessMemoryError, match=os.strerror(errno.EBADF)):
            thread.call(NR_MMAP, 0, PAGE_SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, 1 << 30, 0)
        assert thread.call(NR_GETPID) == process.pid  # one that failed was a whole call
    assert process.touch() == seen


def test_a_row_of_calls_ends_at_the_first_that_fails_and_leaves_nothing(mapper: Start) -> None:
    process = mapper()
    seen = process.touch()
    maps = Path(f"/proc/{process.pid}/maps")
    before = maps.read_text()
    access, flags = mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
    free = 1 << 40
    at = [free + number * 2 * PAGE_SIZE for number in range(1000)]
    with calls_in_process(process.pid) as thread:
        thread.call_each(NR_MMAP, [])
        thread.call_each(NR_MMAP, [(address, PAGE_SIZE, access, flags, 2**64 - 1, 0) for address in at])
        assert (
            sum(line.startswith(tuple(f"{address:x}-" for address in at)) for line in maps.read_text().splitlines())
            == 1000
        )
        with pytest.raises(ProcessMemoryError, match=os.strerror(errno.EINVAL)):
            thread.call_each(NR_MUNMAP, [*((each, PAGE_SIZE, 0, 0, 0, 0) for each in at), (1, 1, 0, 0, 0, 0)])
        assert thread.call(NR_GETPID) == process.pid
    assert maps.read_text() == before
    assert process.touch() == seen


def test_long_runs_are_mapped_and_short_ones_copied(mapper: Start, base: BaseMemory) -> None:
    parent, child = mapper(), mapper()
    with _track(parent) as tracker:
        parent.write(0, 1000, 1)
        seen = parent.write(1500, 2, 2)
        _share(_captured(parent, tracker), child)
        assert child.touch() == seen
        assert _own(child) == 2
        # It is found again although pages of another file lie over its beginning.
        assert find_mapping(child.pid, inode=os.fstat(base.fd).st_ino, size_bytes=SIZE_BYTES) == child.address
        changed = child.write(10, 1, 3)
        assert changed != seen == parent.touch()


def test_nobody_can_write_to_what_is_shared(mapper: Start) -> None:
    process = mapper()
    with _track(process) as tracker:
        process.write(0, 600, 1)
        captured = _captured(process, tracker)
        fd = captured.files()[0]
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, PAGE_SIZE)
        for size in (0, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)


def test_where_nothing_can_be_mapped_all_is_copied(mapper: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise ProcessMemoryError("no")

    parent, child = mapper(), mapper()
    monkeypatch.setattr(sharing, "calls_in_process", refuse)
    with _track(parent) as tracker:
        seen = parent.write(0, 1000, 1)
        _share(_captured(parent, tracker), child)
        assert child.touch() == seen
        assert _own(child) == 1000


@pytest.fixture
def chain(tmp_path_factory: pytest.TempPathFactory, base: BaseMemory) -> Iterator[Callable[..., list[Layer]]]:
    """Layers that are what a process wrote, one after the other."""
    opened: list[Layer] = []

    def take(process: Any, tracker: Any, rounds: list[list[tuple[int, int, int]]]) -> list[Layer]:
        directory: Path = tmp_path_factory.mktemp("layers")
        layers: list[Layer] = []
        for number, writes in enumerate(rounds):
            _write(process, writes)
            _captured(process, tracker).write(directory / str(number), parent=MemoryImage(base, layers))
            layers.append(Layer.open(directory / str(number), size_bytes=SIZE_BYTES))
        opened.extend(layers)
        return layers

    yield take
    for layer in opened:
        layer.close()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(_WRITES, max_size=2), last=_WRITES, later=_WRITES)
def test_a_family_sees_what_was_captured_and_has_nothing_of_its_own(
    mapper: Start,
    base: BaseMemory,
    chain: Any,
    tmp_path_factory: pytest.TempPathFactory,
    rounds: Any,
    last: Any,
    later: Any,
) -> None:
    parent, child, clone = mapper(), mapper(), mapper()
    with _track(parent) as tracker:
        layers = chain(parent, tracker, rounds)
        _write(parent, last)
        captured, seen = _captured(parent, tracker), parent.touch()
    lower = MemoryImage(base, layers)
    with open_family(lower, captured) as pages:
        place_pages(child.pid, child.address, pages.pieces, passed=child.pass_files(pages.files))
    assert child.touch() == seen
    # What lies at an edge of what is mapped may be too short for a mapping of its own.
    assert _own(child) <= sum(piece.pages for piece in pages.pieces if piece.pages < sharing.LONG_RUN_PAGES)
    # What it writes then is in its own snapshot, which lies on that of the capture.
    with _track(child) as tracker:
        _write(child, later)
        seen = child.touch()
        directory = tmp_path_factory.mktemp("child")
        captured.write(directory / "0", parent=lower)
        below = MemoryImage(base, [*layers, Layer.open(directory / "0", size_bytes=SIZE_BYTES)])
        _captured(child, tracker).write(directory / "1", parent=below)
    above = Layer.open(directory / "1", size_bytes=SIZE_BYTES)
    image = MemoryImage(base, [*below.layers, above])
    image.restore_into(clone.pid, clone.address, passed=clone.pass_files(image.files()))
    assert clone.touch() == seen
    below.layers[-1].close()
    above.close()
    for process in (parent, child, clone):
        process.close()


def test_a_family_does_not_need_ptrace(mapper: Start, base: BaseMemory, chain: Any) -> None:
    parent, child = mapper(), mapper()
    with _track(parent) as tracker:
        layers = chain(parent, tracker, [[(0, 50, 1), (200, 30, 0), (400, 1, 2)]])
        seen = parent.write(20, 700, 3)
        captured = _captured(parent, tracker)
        with open_family(MemoryImage(base, layers), captured) as pages:
            place_pages(child.pid, child.address, pages.pieces, passed={})
    assert child.touch() == seen
