"""How children ended: counted by parent, at a cost that does not grow with the siblings."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kernels import outcomes as module
from kernels.errors import LimitError
from kernels.outcomes import Outcome, Outcomes


@pytest.fixture
def outcomes(tmp_path: Path) -> Outcomes:
    return _loaded(tmp_path)


def _loaded(directory: Path) -> Outcomes:
    outcomes = Outcomes(directory)
    outcomes.load()
    return outcomes


def _children(directory: Path) -> set[str]:
    return {path.stem for path in directory.iterdir()}


def _exited(number: int) -> Outcome:
    return Outcome(child_id=f"child-{number}", parent_id="parent", state="exited")


def _offered(number: int) -> Outcome:
    return Outcome(child_id=f"child-{number}", parent_id="parent", state="offered", call_id="1")


async def test_a_record_costs_the_same_however_many_siblings_there_are(outcomes: Outcomes) -> None:
    calls: list[str] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(event)

    async def cost(number: int) -> int:
        calls.clear()
        await outcomes.record(_exited(number), b"value")
        return len(calls)

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        await cost(0)  # which starts the thread that writes
        with_one = await cost(1)
        for number in range(2, 400):
            await outcomes.record(_exited(number), b"value")
        with_many = await cost(400)
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    assert with_many < 2 * with_one


async def test_values_and_children_of_one_parent_are_limited(
    outcomes: Outcomes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PER_PARENT", 3)
    monkeypatch.setattr(module, "MAX_PARENT_BYTES", 100)
    await outcomes.record(_offered(1), bytes(60))
    await outcomes.record(_exited(1), bytes(90))  # in place of the offer
    await outcomes.record(_exited(1), bytes(1))  # the first end counts
    assert outcomes.value("child-1") == bytes(90)
    with pytest.raises(LimitError):
        await outcomes.record(_exited(2), bytes(11))
    await outcomes.record(_exited(2), bytes(10))
    await outcomes.record(_exited(3))
    for known in (outcomes, _loaded(tmp_path)):
        with pytest.raises(LimitError, match="has 3 results"):
            await known.record(_exited(4))
    await outcomes.forget(child_id="child-1")
    await outcomes.record(_exited(4), bytes(90))
    await outcomes.record(Outcome(child_id="other", parent_id="other parent", state="exited"), bytes(90))
    await outcomes.forget(parent_id="parent")
    assert _children(tmp_path) == {"other"}
    assert outcomes.get("child-4") is None
    await outcomes.record(_exited(5), bytes(100))


async def test_a_change_of_one_child_costs_those_who_wait_for_it_only(outcomes: Outcomes) -> None:
    asked: list[str] = []
    over: set[str] = set()

    def is_over(child_id: str) -> bool:
        asked.append(child_id)
        return child_id in over

    async with asyncio.TaskGroup() as group:
        waits = [
            group.create_task(outcomes.wait(ids, timeout_s=None, is_over=is_over))
            for ids in ([f"child-{each}" for each in range(n, n + 50)] for n in range(0, 1000, 50))
        ]
        await asyncio.sleep(0)
        assert len(asked) == 1000
        asked.clear()
        outcomes.poke("child-7")
        outcomes.poke("nobody's child")
        await asyncio.sleep(0)
        assert asked == ["child-7"]
        await outcomes.record(_exited(7))
        over.add("child-77")
        outcomes.poke("child-77")
        assert (await waits[0], await waits[1]) == (_exited(7), None)
        for wait in waits[2:]:
            wait.cancel()
    assert await outcomes.wait(["child-7", "child-8"], timeout_s=None, is_over=is_over) == _exited(7)
    assert await outcomes.wait(["child-8", "child-8"], timeout_s=0, is_over=is_over) is None
    assert not outcomes._waits


async def test_who_becomes_its_child_has_the_results_of_its_children(outcomes: Outcomes, tmp_path: Path) -> None:
    await outcomes.record(_exited(1), b"value")
    await outcomes.adopt("parent", "grandparent")
    await outcomes.forget(parent_id="parent")
    for known in (outcomes, _loaded(tmp_path)):
        found = known.get("child-1")
        assert found is not None and found.parent_id == "grandparent"
        assert known.value("child-1") == b"value"
    await outcomes.forget(parent_id="grandparent")
    assert _children(tmp_path) == set()
