"""Forks: children, limits, failures, cell boundaries, and a parent that becomes its child."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kernels.child_results import ChildResult
from kernels.connected import ConnectedMachine
from kernels.errors import LimitError, MachineFailedError, SandboxStateError
from kernels.models import Sandbox, SandboxState
from tests.fake_driver.states import FakeStates
from tests.unit.kernels.conftest import Service, TestDriver, started_service
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.states import RunState

# A cell that waits until the test lets it go.
WAIT = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)"


def let_go(kernels: Service, sandbox_id: str) -> None:
    (kernels.machines.running(sandbox_id).saved.paths.disk_dir / "home" / "go").touch()


async def fork(kernels: Service, sandbox_id: str, count: int = 1, *, mid_cell: bool = False) -> list[Sandbox]:
    children = await kernels.forks.fork(sandbox_id, count=count, mid_cell=mid_cell)
    assert all(isinstance(child, Sandbox) for child in children), children
    return [child for child in children if isinstance(child, Sandbox)]


async def test_children_have_the_files_and_a_place_in_the_family(kernels: Service) -> None:
    parent = await kernels.new()
    await kernels.run(parent, "open('name', 'w').write('parent')")
    one, two = await fork(kernels, parent, 2)
    assert (one.index, two.index, one.parent_id, one.state) == (0, 1, parent, SandboxState.RUNNING)
    await kernels.run(one.id, "open('name', 'w').write('one')")
    for sandbox_id, name in ((parent, "parent"), (one.id, "one"), (two.id, "parent")):
        assert await kernels.run(sandbox_id, "print(open('name').read())") == f"{name}\n"
    (grandchild,) = await fork(kernels, one.id)
    assert [each.id for each in kernels.forks.tree(two.id)] == [parent, one.id, two.id, grandchild.id]
    await kernels.lifecycle.sleep(parent)
    (late,) = await fork(kernels, parent)
    assert kernels.get(parent).state is SandboxState.ASLEEP
    assert await kernels.run(late.id, "print(open('name').read())") == "parent\n"


async def test_limits_are_checked_before_the_first_child(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver, max_children=1, max_depth=1) as kernels:
        parent = await kernels.new()
        for count in (0, 2):
            with pytest.raises(LimitError):
                await kernels.forks.fork(parent, count=count)
        (child,) = await fork(kernels, parent)
        for sandbox_id in (parent, child.id):
            with pytest.raises(LimitError):
                await kernels.forks.fork(sandbox_id, count=1)
        assert len(kernels.registry.sandboxes()) == 2


async def test_a_fork_waits_for_a_cell_of_which_only_the_kernel_knows(kernels: Service) -> None:
    """The cell has begun, and the word of it has not come yet: what is captured then must not be its middle."""
    parent = await kernels.new()
    await kernels.run(parent, "1")
    cell = asyncio.create_task(kernels.run(parent, f"{WAIT}\nopen('done', 'w').close()"))
    await kernels.until(lambda: kernels.get(parent).execution_state == "busy")
    kernels.registry.execution_state(parent, "idle")
    forking = asyncio.create_task(fork(kernels, parent))
    await kernels.until(lambda: len(kernels.registry.sandboxes()) == 2)
    kernels.registry.execution_state(parent, "busy")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(forking), 0.5)
    let_go(kernels, parent)
    (child,) = await forking
    await cell
    assert await kernels.run(child.id, "import os; print(os.path.exists('done'))") == "True\n"
    (checkpoint,) = await kernels.checkpoints.all(parent)
    assert checkpoint.cell == 2


async def test_a_fork_in_mid_cell_says_so(kernels: Service) -> None:
    parent = await kernels.new()
    cell = asyncio.create_task(kernels.run(parent, WAIT))
    await kernels.until(lambda: kernels.get(parent).execution_state == "busy")
    await fork(kernels, parent, mid_cell=True)
    assert not cell.done()
    (checkpoint,) = await kernels.checkpoints.all(parent)
    assert checkpoint.cell is None
    let_go(kernels, parent)
    await cell


async def offered(kernels: Service) -> tuple[str, str]:
    """A parent and a child that offers its state."""
    parent = await kernels.new()
    await kernels.run(parent, "open('name', 'w').write('parent')")
    (child,) = await fork(kernels, parent)
    await kernels.run(child.id, "open('name', 'w').write('child')")
    result = ChildResult(child_id=child.id, parent_id=parent, state="offered", call_id="c")
    await kernels.forks.child_results.record(result)
    return parent, child.id


async def test_a_parent_becomes_its_child(kernels: Service) -> None:
    parent, child = await offered(kernels)
    became = await kernels.forks.become(parent, child)
    assert (became.id, became.state) == (parent, SandboxState.RUNNING)
    assert [each.id for each in kernels.registry.sandboxes()] == [parent]
    assert await kernels.run(parent, "print(open('name').read())") == "child\n"
    with pytest.raises(SandboxStateError):
        await kernels.forks.become(parent, child)


@pytest.mark.parametrize("left", [RunState.RUNNING, RunState.PAUSED])
async def test_where_a_parent_cannot_become_its_child_both_go_on(
    kernels: Service, driver: TestDriver, left: RunState
) -> None:
    parent, child = await offered(kernels)
    if left is RunState.PAUSED:
        await kernels.lifecycle.pause(child)
    before = kernels.get(parent).snapshot_id
    driver.refuses = "not today"
    with pytest.raises(MachineFailedError, match="not today"):
        await kernels.forks.become(parent, child)
    driver.refuses = None
    assert kernels.get(parent).state is SandboxState.RUNNING
    assert kernels.get(parent).snapshot_id == before
    assert kernels.machines.running(child).saved.machine.state is left
    assert await kernels.run(parent, "print(open('name').read())") == "parent\n"
    if left is RunState.PAUSED:
        await kernels.lifecycle.resume(child)
    assert await kernels.run(child, "print(open('name').read())") == "child\n"
    # The state that was not taken over is no checkpoint of the parent.
    assert [each.id for each in await kernels.checkpoints.all(parent)] == [before]
    await kernels.forks.become(parent, child)
    assert await kernels.run(parent, "print(open('name').read())") == "child\n"


async def test_a_child_that_nobody_expected_to_fail_fails_alone(
    kernels: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parent = await kernels.new()
    go_live = kernels.machines.go_live
    failed: list[ConnectedMachine] = []

    async def fail_once(sandbox_id: str, connected: ConnectedMachine, **options: Any) -> None:
        if not failed:
            failed.append(connected)
            raise OSError("The disk is full.")
        await go_live(sandbox_id, connected, **options)

    monkeypatch.setattr(kernels.machines, "go_live", fail_once)
    results = await kernels.forks.fork(parent, count=2)
    assert sorted(isinstance(result, Sandbox) for result in results) == [False, True]
    assert failed[0].dead and "The disk is full." in caplog.text
    assert len(kernels.registry.sandboxes()) == 2


async def test_a_child_that_does_not_start_is_an_error_in_its_place(kernels: Service, driver: TestDriver) -> None:
    parent = await kernels.new()
    await kernels.lifecycle.sleep(parent)
    driver.refuses = "not today"
    results = await kernels.forks.fork(parent, count=2)
    assert [str(result) for result in results] == ["not today"] * 2
    assert [each.id for each in kernels.registry.sandboxes()] == [parent]


async def test_children_of_a_fork_that_cannot_be_stored_leave_nothing(
    kernels: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*arguments: object) -> None:
        raise SnapshotError("not today")

    parent = await kernels.new()
    monkeypatch.setattr(kernels.snapshots, "keep", refused)
    with pytest.raises(MachineFailedError, match="not today"):
        await kernels.forks.fork(parent, count=2)
    assert [each.id for each in kernels.registry.sandboxes()] == [parent]
    states = kernels.saver._states
    assert isinstance(states, FakeStates)
    assert states.held == {kernels.machines.running(parent).saved.machine.id}
