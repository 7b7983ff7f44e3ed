"""How children ended: counted by parent, at a cost that does not grow with the siblings."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kernels import child_results as module
from kernels.child_results import ChildResult, ChildResults
from kernels.errors import LimitError


@pytest.fixture
def child_results(tmp_path: Path) -> ChildResults:
    return _loaded(tmp_path)


def _loaded(directory: Path) -> ChildResults:
    child_results = ChildResults(directory)
    child_results.load()
    return child_results


def _children(directory: Path) -> set[str]:
    return {path.stem for path in directory.iterdir()}


def _exited(number: int) -> ChildResult:
    return ChildResult(child_id=f"child-{number}", parent_id="parent", state="exited")


def _offered(number: int) -> ChildResult:
    return ChildResult(child_id=f"child-{number}", parent_id="parent", state="offered", call_id="1")


async def test_a_record_costs_the_same_however_many_siblings_there_are(child_results: ChildResults) -> None:
    calls: list[str] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(event)

    async def cost(number: int) -> int:
        calls.clear()
        await child_results.record(_exited(number), b"value")
        return len(calls)

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        await cost(0)  # which starts the thread that writes
        with_one = await cost(1)
        for number in range(2, 400):
            await child_results.record(_exited(number), b"value")
        with_many = await cost(400)
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    assert with_many < 2 * with_one


async def test_values_and_children_of_one_parent_are_limited(
    child_results: ChildResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PER_PARENT", 3)
    monkeypatch.setattr(module, "MAX_PARENT_BYTES", 100)
    await child_results.record(_offered(1), bytes(60))
    await child_results.record(_exited(1), bytes(90))  # in place of the offer
    await child_results.record(_exited(1), bytes(1))  # the first end counts
    assert child_results.value("child-1") == bytes(90)
    with pytest.raises(LimitError):
        await child_results.record(_exited(2), bytes(11))
    await child_results.record(_exited(2), bytes(10))
    await child_results.record(_exited(3))
    for known in (child_results, _loaded(tmp_path)):
        with pytest.raises(LimitError, match="has 3 results"):
            await known.record(_exited(4))
    await child_results.forget(child_id="child-1")
    await child_results.record(_exited(4), bytes(90))
    await child_results.record(ChildResult(child_id="other", parent_id="other parent", state="exited"), bytes(90))
    await child_results.forget(parent_id="parent")
    assert _children(tmp_path) == {"other"}
    assert child_results.get("child-4") is None
    await child_results.record(_exited(5), bytes(100))


async def test_a_change_of_one_child_costs_those_who_wait_for_it_only(child_results: ChildResults) -> None:
    asked: list[str] = []
    over: set[str] = set()

    def is_over(child_id: str) -> bool:
        asked.append(child_id)
        return child_id in over

    async with asyncio.TaskGroup() as group:
        waits = [
            group.create_task(child_results.wait(ids, timeout_s=None, is_over=is_over))
            for ids in ([f"child-{each}" for each in range(n, n + 50)] for n in range(0, 1000, 50))
        ]
        await asyncio.sleep(0)
        assert len(asked) == 1000
        asked.clear()
        child_results.notify("child-7")
        child_results.notify("nobody's child")
        await asyncio.sleep(0)
        assert asked == ["child-7"]
        await child_results.record(_exited(7))
        over.add("child-77")
        child_results.notify("child-77")
        assert (await waits[0], await waits[1]) == (_exited(7), None)
        for wait in waits[2:]:
            wait.cancel()
    assert await child_results.wait(["child-7", "child-8"], timeout_s=None, is_over=is_over) == _exited(7)
    assert await child_results.wait(["child-8", "child-8"], timeout_s=0, is_over=is_over) is None
    assert not child_results._waits


async def test_who_becomes_its_child_has_the_results_of_its_children(
    child_results: ChildResults, tmp_path: Path
) -> None:
    await child_results.record(_exited(1), b"value")
    await child_results.adopt("parent", "grandparent")
    await child_results.forget(parent_id="parent")
    for known in (child_results, _loaded(tmp_path)):
        found = known.get("child-1")
        assert found is not None and found.parent_id == "grandparent"
        assert known.value("child-1") == b"value"
    await child_results.forget(parent_id="grandparent")
    assert _children(tmp_path) == set()


async def test_what_is_written_when_its_guest_gives_up_is_known(
    child_results: ChildResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, write = asyncio.get_running_loop(), child_results._write
    writing, may_write = asyncio.Event(), threading.Event()

    def late(result: ChildResult, value: bytes) -> None:
        loop.call_soon_threadsafe(writing.set)
        may_write.wait()
        write(result, value)

    monkeypatch.setattr(child_results, "_write", late)
    recording = asyncio.create_task(child_results.record(_exited(1), b"value"))
    await writing.wait()
    recording.cancel()
    await asyncio.sleep(0)
    may_write.set()
    with pytest.raises(asyncio.CancelledError):
        await recording
    assert child_results.get("child-1") == _exited(1)
