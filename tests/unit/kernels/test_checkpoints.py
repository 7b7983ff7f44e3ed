"""Checkpoints after cells and by name, and going back to them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kernels.errors import RequestError, UnknownSnapshotError
from kernels.models import SandboxState
from tests.unit.kernels.conftest import LIMIT_S, Service, TestDriver, started_service
from vm_runtime.drivers.base import Capture
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.values import AfterCapture, Description, Taken
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.manifest import Manifest


async def test_each_cell_leaves_a_checkpoint_that_says_which(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver, checkpoints="cell") as kernels:
        sandbox_id = await kernels.new()
        for number in (1, 2):
            await kernels.run(sandbox_id, f"open('number', 'w').write('{number}')")
            await kernels.checkpointed(sandbox_id, number)
        assert [each.cell for each in await kernels.checkpoints.all(sandbox_id)] == [1, 2]
        await kernels.checkpoints.goto(sandbox_id, "1")
        assert await kernels.run(sandbox_id, "print(open('number').read())") == "1\n"


async def test_a_cell_is_captured_while_the_checkpoint_before_it_is_being_stored(
    state_dir: Path, driver: TestDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started_service(state_dir, driver, checkpoints="cell") as kernels:
        sandbox_id = await kernels.new()
        snapshots, keep = kernels.snapshots, kernels.snapshots.keep
        machine = kernels.machines.running(sandbox_id).saved.machine
        pauses, pause = asyncio.Semaphore(0), machine.pause
        storing, may_end = asyncio.Event(), asyncio.Event()

        async def held_up(*arguments: Any) -> None:
            storing.set()
            await may_end.wait()
            await keep(*arguments)

        async def counted() -> None:
            await pause()
            pauses.release()

        monkeypatch.setattr(snapshots, "keep", held_up)
        monkeypatch.setattr(machine, "pause", counted)
        await kernels.run(sandbox_id, "open('number', 'w').write('1')")
        await storing.wait()
        await pauses.acquire()
        async with asyncio.timeout(LIMIT_S), kernels.machines.cell_lock(sandbox_id):
            assert kernels.registry.get(sandbox_id).snapshot_id is None
        await kernels.run(sandbox_id, "open('number', 'w').write('2')")
        try:
            async with asyncio.timeout(LIMIT_S):
                await pauses.acquire()  # the second is captured, while the first is being stored
            undoing = asyncio.create_task(kernels.checkpoints.undo(sandbox_id))
        finally:
            may_end.set()
        await undoing
        assert [each.cell for each in await kernels.checkpoints.all(sandbox_id)] == [1, 2, 2]
        assert await kernels.run(sandbox_id, "print(open('number').read())") == "1\n"


async def test_one_goes_to_a_checkpoint_by_name_and_back(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.run(sandbox_id, "open('name', 'w').write('old')")
    old = await kernels.checkpoints.checkpoint(sandbox_id, name="old")
    await kernels.run(sandbox_id, "open('name', 'w').write('new')")
    assert (await kernels.checkpoints.goto(sandbox_id, "old")).state is SandboxState.RUNNING
    assert await kernels.run(sandbox_id, "print(open('name').read())") == "old\n"
    (left,) = [each for each in await kernels.checkpoints.all(sandbox_id) if each.id != old.id]
    assert left.name is not None and left.name.startswith("left at ")
    await kernels.checkpoints.goto(sandbox_id, left.id[:8])
    assert await kernels.run(sandbox_id, "print(open('name').read())") == "new\n"


async def test_what_is_no_checkpoint_is_refused_and_nothing_is_left(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    machine = kernels.machines.running(sandbox_id).saved.machine
    for target in ("nowhere", "7", ""):
        with pytest.raises(UnknownSnapshotError):
            await kernels.checkpoints.goto(sandbox_id, target)
    with pytest.raises(UnknownSnapshotError):
        await kernels.checkpoints.undo(sandbox_id)
    with pytest.raises(RequestError):
        await kernels.checkpoints.checkpoint(sandbox_id, name="x" * 101)
    assert kernels.machines.running(sandbox_id).saved.machine is machine
    assert await kernels.checkpoints.all(sandbox_id) == []


async def test_where_a_checkpoint_cannot_be_restored_the_sandbox_runs_on(kernels: Service, driver: TestDriver) -> None:
    sandbox_id = await kernels.new()
    await kernels.checkpoints.checkpoint(sandbox_id, name="old")
    machine = kernels.machines.running(sandbox_id).saved.machine
    driver.refuses = "not today"
    with pytest.raises(Exception, match="not today"):
        await kernels.checkpoints.goto(sandbox_id, "old")
    assert kernels.machines.running(sandbox_id).saved.machine is machine
    assert await kernels.run(sandbox_id, "print('on')") == "on\n"


async def test_a_guest_takes_checkpoints_and_asks_who_it_is(kernels: Service) -> None:
    sandbox_id = await kernels.new(name="box")
    await kernels.run(sandbox_id, "import sandbox; sandbox.snapshot('from inside')")
    assert [each.name for each in await kernels.checkpoints.all(sandbox_id)] == ["from inside"]
    assert await kernels.run(sandbox_id, "import sandbox; print(sandbox.id)") == f"{sandbox_id}\n"


class Taking(SnapshotHooks):
    """A snapshot whose steps are seen. may_end: it is stored only then; None: it cannot be stored."""

    def __init__(self, may_end: asyncio.Event | None) -> None:
        self.began = False
        self.is_published = asyncio.Event()
        self._may_end = may_end

    async def prepare(self, capture: Capture) -> None:
        self.began = True

    def described(self, description: Description) -> Description:
        if self._may_end is None:
            raise SnapshotError("not this one")
        return description

    async def stored(self, manifest: Manifest) -> None:
        self.is_published.set()
        if self._may_end is not None:
            await self._may_end.wait()


async def test_what_cannot_be_stored_does_not_pile_up(kernels: Service) -> None:
    """What a snapshot that failed held is with the one after it: nothing more is captured until that is stored."""
    live = kernels.machines.running(await kernels.new())
    description = kernels.snapshots.description(live, name=None)

    def take(hook: Taking) -> asyncio.Task[Taken]:
        return asyncio.create_task(live.saved.take(description, then=AfterCapture.RESUME, hooks=[hook]))

    may_end = asyncio.Event()
    with pytest.raises(SnapshotError, match="not this one"):
        await take(Taking(None))
    second, third = Taking(may_end), Taking(may_end)
    taking = [take(second)]
    await second.is_published.wait()
    taking.append(take(third))
    for _ in range(100):  # it would begin within a few turns of the loop
        await asyncio.sleep(0)
    began_early = third.began
    may_end.set()
    await asyncio.gather(*taking)
    assert not began_early
    assert third.began
