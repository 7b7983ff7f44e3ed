"""Incremental tracking: what a capture holds is what was written since the last one, and nothing is ever lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_runtime.snapshots.errors import ProcessMemoryError
from vm_runtime.snapshots.injection import call_in_process
from vm_runtime.snapshots.layers import CapturedPart, Layer, MemoryImage
from vm_runtime.snapshots.memory import PAGE_SIZE, BaseMemory
from vm_runtime.snapshots.tracking import CumulativeTracker, start_tracker
from vm_runtime.snapshots.writeprotect import WriteProtectTracker

SIZE_BYTES = 8 << 20
PAGES = SIZE_BYTES // PAGE_SIZE

Start = Callable[[], Any]

_WRITES = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 300), st.sampled_from([0, 0x41, 0x42])), max_size=8
)


def _start(process: Any, *, clean: bool = True) -> WriteProtectTracker:
    return WriteProtectTracker.start(process.pid, address=process.address, size_bytes=SIZE_BYTES, clean=clean)


@pytest.fixture(autouse=True)
def _needs_write_tracking(mapper: Start) -> Iterator[None]:
    try:
        _start(mapper()).close()
    except ProcessMemoryError as error:
        pytest.skip(f"needs userfaultfd's asynchronous write protection and ptrace: {error}")
    yield


def test_a_process_goes_on_undisturbed_after_an_injected_call(mapper: Start) -> None:
    process = mapper()
    seen = process.touch()
    for _ in range(50):
        assert call_in_process(process.pid, 39) == process.pid  # getpid
    assert process.touch() == seen


def test_a_failing_injected_call_is_an_error(mapper: Start) -> None:
    with pytest.raises(ProcessMemoryError, match="Bad file descriptor"):
        call_in_process(mapper().pid, 3, 999)  # close


def test_a_capture_holds_what_was_written_since_the_last_one(mapper: Start) -> None:
    process = mapper()
    with _start(process) as tracker:
        process.write(5, 2, 2)
        assert tracker.capture().page_count == 2
        process.write(1500, 1, 2)
        assert tracker.capture().page_count == 1


def test_a_capture_holds_what_was_put_back(mapper: Start) -> None:
    process = mapper()
    process.write(0, 1000, 1)
    with _start(process) as tracker:
        assert tracker.capture().page_count == 0
        process.touch()  # reading brings file pages in, which are not the process's own
        process.write(5, 2, 2)
        process.write(1500, 1, 2)
        captured = tracker.capture()
        assert captured.page_count == 3
        tracker.put_back(captured.parts)
        process.write(1600, 1, 2)
        assert tracker.capture().page_count == 4
        assert tracker.capture().page_count == 0


def test_a_tracker_that_does_not_start_clean_begins_with_everything(mapper: Start) -> None:
    process = mapper()
    process.write(0, 1000, 1)
    with _start(process, clean=False) as tracker:
        assert tracker.capture().page_count == 1000
    with _start(process, clean=False) as tracker:  # a gateway that starts again
        assert tracker.capture().page_count == 1000
        process.write(7, 1, 3)
        assert tracker.capture().page_count == 1
    assert (
        len([link for link in Path(f"/proc/{process.pid}/fd").iterdir() if "userfaultfd" in str(link.readlink())]) == 1
    )


def test_what_is_written_after_the_copy_ahead_is_in_the_capture(
    mapper: Start, base: BaseMemory, tmp_path: Path
) -> None:
    process = mapper()
    with _start(process) as tracker:
        process.write(0, 1500, 1)
        tracker.prepare()
        process.write(690, 20, 3)
        tracker.catch_up()
        seen = process.write(700, 10, 2)
        captured = tracker.capture()
        assert captured.page_count == 1500
        captured.write(tmp_path / "layer", parent=MemoryImage(base, []))
    layer = Layer.open(tmp_path / "layer", size_bytes=SIZE_BYTES)
    restored = mapper()
    MemoryImage(base, [layer]).restore_into(restored.pid, restored.address)
    layer.close()
    assert restored.touch() == seen


class Ending(Enum):
    """Of an attempt at a snapshot: before the pause, before it is stored, when the next one was captured already, or
    not at all."""

    GIVEN_UP = auto()
    FAILED = auto()
    FAILED_LATE = auto()
    STORED = auto()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.tuples(_WRITES, _WRITES, _WRITES, st.sampled_from(Ending)), min_size=1, max_size=4))
def test_a_chain_of_increments_restores_to_the_memory_that_was_captured(
    mapper: Start, base: BaseMemory, tmp_path_factory: pytest.TempPathFactory, rounds: list[Any]
) -> None:
    """Some snapshots fail, or are given up before the pause; restored processes are captured again, over the same
    chain."""
    directory = tmp_path_factory.mktemp("layers")
    process = mapper()
    layers: list[Layer] = []
    below: tuple[CapturedPart, ...] = ()
    image = MemoryImage(base, ())  # kept open, as of a machine that runs
    tracker = start_tracker(process.pid, address=process.address, size_bytes=SIZE_BYTES, clean=True)
    assert isinstance(tracker, WriteProtectTracker)
    for number, (before, between, late, ending) in enumerate(rounds):
        for page, pages, byte in before:
            process.write(page, min(pages, PAGES - page), byte)
        tracker.prepare()
        for page, pages, byte in between:
            process.write(page, min(pages, PAGES - page), byte)
        tracker.catch_up()
        for page, pages, byte in late:
            process.write(page, min(pages, PAGES - page), byte)
        if ending is Ending.GIVEN_UP and number < len(rounds) - 1:
            continue
        captured, seen = tracker.capture(), process.touch()
        captured, below = replace(captured, parts=(*below, *captured.parts)), ()
        if ending is Ending.FAILED and number < len(rounds) - 1:
            tracker.put_back(captured.parts)
            continue
        if ending is Ending.FAILED_LATE and number < len(rounds) - 1:
            below = captured.parts
            continue
        path = directory / str(number)
        captured.write(path, parent=image)
        layers.append(Layer.open(path, size_bytes=SIZE_BYTES))
        image, anew = image.over(layers[-1]), MemoryImage(base, layers)
        assert (image.segments, image.layers) == (anew.segments, anew.layers)
        assert image.read(0, PAGES) == anew.read(0, PAGES)
        if number % 2:  # go on with a child instead
            tracker.close()
            process.close()
            process = mapper()
            MemoryImage(base, layers).restore_into(process.pid, process.address)
            tracker = start_tracker(process.pid, address=process.address, size_bytes=SIZE_BYTES, clean=True)
    restored = mapper()
    MemoryImage(base, layers).restore_into(restored.pid, restored.address)
    assert restored.touch() == seen
    tracker.close()
    for layer in layers:
        layer.close()
    process.close()
    restored.close()


def test_a_process_out_of_reach_is_tracked_cumulatively(mapper: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    process = mapper()
    with contextlib.closing(
        start_tracker(process.pid, address=process.address, size_bytes=SIZE_BYTES, clean=True)
    ) as tracker:
        assert isinstance(tracker, CumulativeTracker)


def test_closing_twice_is_harmless_and_leaves_no_descriptors(mapper: Start) -> None:
    process = mapper()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    tracker = _start(process)
    tracker.close()
    tracker.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
