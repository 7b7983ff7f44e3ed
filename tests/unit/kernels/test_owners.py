"""A machine has one owner at every moment: whatever is given up, or fails half-way, leaves none without, and nothing of
what runs half done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.connected import new_paths
from kernels.errors import KernelsError, StorageError
from kernels.models import SandboxState
from kernels.session import GuestSession
from tests.fake_driver.states import FakeStates
from tests.unit.kernels.conftest import LIMIT_S, Service, TestDriver, started_driver, started_service
from tests.unit.kernels.test_forks import offered
from tests.unit.kernels.test_recovery import leave
from vm_runtime.saving.values import AfterCapture
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.states import RunState


class Held:
    """A method that waits, once it is called, until it `may_go_on`."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self._method: Callable[..., Awaitable[Any]] = getattr(owner, name)
        self._called = asyncio.Event()
        self._may_go_on = asyncio.Event()
        patch.setattr(owner, name, self._call)

    async def _call(self, *args: Any, **options: Any) -> Any:
        self._called.set()
        await self._may_go_on.wait()
        return await self._method(*args, **options)

    async def cancelled_there(self, work: Awaitable[Any]) -> None:
        """Begins the work, and cancels it when the method has been called."""
        task = asyncio.ensure_future(work)
        called = asyncio.create_task(self._called.wait())
        await asyncio.wait([task, called], return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        await asyncio.sleep(0)
        self._may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task


def machines(kernels: Service) -> set[str]:
    return {path.name for path in (kernels._settings.run_dir / "m").glob("*")}


def owned(kernels: Service) -> set[str]:
    return {live.saved.machine.id for live in kernels.machines.live.values()}


async def test_a_fork_of_what_sleeps_ends_the_children_that_run_already(
    kernels: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = await kernels.new()
    await kernels.lifecycle.sleep(parent)
    restore, first = kernels.saver.restore, asyncio.Event()

    async def one_of_two(*args: Any, **options: Any) -> Any:
        if first.is_set():
            await asyncio.Event().wait()
        first.set()
        saved = await restore(*args, **options)
        may_cancel.set()
        return saved

    may_cancel = asyncio.Event()
    monkeypatch.setattr(kernels.saver, "restore", one_of_two)
    forking = asyncio.create_task(kernels.forks.fork(parent, count=2))
    await may_cancel.wait()
    forking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forking
    assert machines(kernels) == set()
    assert [each.id for each in kernels.registry.sandboxes()] == [parent]


async def test_children_end_where_their_fork_cannot_be_written_down(
    kernels: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = await kernels.new()

    def fail(*args: object) -> None:
        raise OSError("The disk is full.")

    monkeypatch.setattr(kernels.registry, "checkpoint_problem", fail)
    with pytest.raises(OSError, match="The disk is full"):
        await kernels.forks.fork(parent, count=2)
    assert machines(kernels) == owned(kernels)
    assert list(kernels.machines.live) == [parent]


async def test_a_child_that_waits_for_its_lock_ends_with_the_fork(kernels: Service) -> None:
    parent = await kernels.new()
    forking = asyncio.create_task(kernels.forks.fork(parent, count=1))
    await kernels.until(lambda: len(kernels.registry.sandboxes()) == 2)
    (child,) = [each.id for each in kernels.registry.sandboxes() if each.id != parent]
    lock = kernels.machines.cell_lock(child)
    async with lock:
        while not lock._waiters:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        forking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forking
    assert machines(kernels) == owned(kernels)
    assert list(kernels.machines.live) == [parent]


async def test_who_has_left_a_machine_goes_on_in_the_other(kernels: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox_id = await kernels.new()
    await kernels.checkpoints.checkpoint(sandbox_id, name="old")
    left = kernels.machines.running(sandbox_id).saved
    await Held(monkeypatch, left, "kill").cancelled_there(kernels.checkpoints.goto(sandbox_id, "old"))
    assert left.machine.is_dead and machines(kernels) == owned(kernels)
    assert await kernels.run(sandbox_id, "print('on')") == "on\n"


@pytest.mark.parametrize("gone_to", ["checkpoint", "child"])
async def test_where_the_next_state_cannot_be_kept_both_go_on(
    kernels: Service, monkeypatch: pytest.MonkeyPatch, gone_to: str
) -> None:
    parent, child = await offered(kernels)
    await kernels.checkpoints.checkpoint(parent, name="old")
    restored: list[Any] = []
    keep, restore = kernels.snapshots.keep, kernels.machines.restore

    async def noted(*args: Any, **options: Any) -> Any:
        restored.append(await restore(*args, **options))
        return restored[-1]

    async def full(*args: Any) -> None:
        if restored:
            raise StorageError("The disk is full.")
        await keep(*args)

    monkeypatch.setattr(kernels.machines, "restore", noted)
    monkeypatch.setattr(kernels.snapshots, "keep", full)
    with pytest.raises(KernelsError, match="The disk is full"):
        if gone_to == "child":
            await kernels.forks.become(parent, child)
        else:
            await kernels.checkpoints.goto(parent, "old")
    assert restored[0].dead and machines(kernels) == owned(kernels)
    for sandbox_id, name in ((parent, "parent"), (child, "child")):
        live = kernels.machines.running(sandbox_id)
        assert live.saved.machine.state is RunState.RUNNING and not live.holds_clients
        assert await kernels.run(sandbox_id, "print(open('name').read())") == f"{name}\n"


async def test_a_parent_that_becomes_its_child_does_so_to_the_end(
    kernels: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, child = await offered(kernels)
    await Held(monkeypatch, kernels.saver, "restore").cancelled_there(kernels.forks.become(parent, child))
    assert [each.id for each in kernels.registry.sandboxes()] == [parent]
    assert kernels.forks.child_results.get(child) is None
    assert machines(kernels) == owned(kernels)
    assert await kernels.run(parent, "print(open('name').read())") == "child\n"


@pytest.mark.parametrize("moment", ["asked what is unanswered", "stored", "paused", "told the time"])
async def test_what_was_to_stand_still_is_given_back_to_its_clients(
    kernels: Service, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    sandbox_id = await kernels.new()
    live = kernels.machines.running(sandbox_id)
    async with kernels.client(sandbox_id) as client:
        await client.wait_for_ready(timeout=LIMIT_S)
        match moment:
            case "asked what is unanswered":
                held, work = Held(monkeypatch, live, "_quiet"), kernels.lifecycle.sleep(sandbox_id)
            case "stored":
                held, work = Held(monkeypatch, kernels.snapshots, "keep"), kernels.lifecycle.sleep(sandbox_id)
            case "paused":
                held, work = Held(monkeypatch, live.saved.machine, "pause"), kernels.lifecycle.pause(sandbox_id)
            case _:
                await kernels.lifecycle.pause(sandbox_id)
                held, work = Held(monkeypatch, live.session, "correct_clock"), kernels.lifecycle.resume(sandbox_id)
        await held.cancelled_there(work)
        assert live.saved.machine.state is RunState.RUNNING and not live.holds_clients
        assert kernels.get(sandbox_id).state is SandboxState.RUNNING
        reply = await client.execute_interactive("1", timeout=LIMIT_S)
        assert reply["content"]["status"] == "ok"


@pytest.mark.parametrize("state", [SandboxState.ASLEEP, SandboxState.GONE])
async def test_whose_machine_ends_is_what_it_was_to_be(
    kernels: Service, monkeypatch: pytest.MonkeyPatch, state: SandboxState
) -> None:
    sandbox_id = await kernels.new()
    ending = Held(monkeypatch, kernels.machines.running(sandbox_id).saved, "kill")
    if state is SandboxState.GONE:
        await ending.cancelled_there(kernels.delete(sandbox_id))
        assert sandbox_id not in kernels.registry
    else:
        await ending.cancelled_there(kernels.lifecycle.sleep(sandbox_id))
        assert kernels.get(sandbox_id).state is SandboxState.ASLEEP
    assert machines(kernels) == set()


async def test_a_machine_that_is_being_ended_ends(kernels: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox_id = await kernels.new()
    snapshot = (await kernels.snapshots.take(sandbox_id, then=AfterCapture.RESUME)).manifest
    connected = await kernels.machines.restore(sandbox_id, snapshot, keep_random=True, drop_requests=True)
    await Held(monkeypatch, connected.session, "close").cancelled_there(connected.close())
    assert machines(kernels) == owned(kernels)


async def test_what_a_machine_was_to_lie_on_is_kept_for_none(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.checkpoints.checkpoint(sandbox_id, name="old")
    snapshot = kernels._store.get(str(kernels.get(sandbox_id).snapshot_id))
    await kernels.lifecycle.sleep(sandbox_id)
    before, pin = kernels._store.pins().keys(), kernels._store.pin
    loop, pinning, may_pin, pinned = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), asyncio.Event()

    def late(*args: Any, **options: Any) -> None:
        loop.call_soon_threadsafe(pinning.set)
        may_pin.wait()
        pin(*args, **options)
        loop.call_soon_threadsafe(pinned.set)

    kernels._store.pin = late  # type: ignore[method-assign]
    paths = new_paths(kernels._settings.state_dir, kernels._settings.run_dir)
    restoring = asyncio.create_task(kernels.saver.restore(snapshot, paths=paths))
    await pinning.wait()
    restoring.cancel()
    await asyncio.wait([restoring], timeout=0.1)  # if it does not wait for the thread
    may_pin.set()
    await pinned.wait()
    with pytest.raises(asyncio.CancelledError):
        await restoring
    assert kernels._store.pins().keys() == before


async def test_a_machine_that_cannot_be_found_again_ends(
    state_dir: Path, driver: TestDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started_service(state_dir, driver) as kernels:
        sandbox_id = await kernels.new()
        await kernels.checkpoints.checkpoint(sandbox_id, name="safe")
        await leave(kernels)
        assert len(machines(kernels)) == 1

    async def fail(states: FakeStates, *args: object) -> None:
        raise SnapshotError("What lies under it is damaged.")

    async with started_driver(state_dir) as later:
        with monkeypatch.context() as patch:
            patch.setattr(FakeStates, "set_backing", fail)
            async with started_service(state_dir, later) as kernels:
                assert kernels.get(sandbox_id).state is SandboxState.ASLEEP
                assert machines(kernels) == set()


async def test_a_start_that_is_given_up_ends_no_machine_that_it_has_found(
    state_dir: Path, driver: TestDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started_service(state_dir, driver) as kernels:
        sandbox_id = await kernels.new()
        await kernels.run(sandbox_id, "open('kept', 'w').write('x')")
        await leave(kernels)
    async with started_driver(state_dir) as later:
        starting = Service(
            kernels._settings.model_copy(update={"stop_means_sleep": True}), later, progress=lambda text: None
        )
        with monkeypatch.context() as patch:
            await Held(patch, GuestSession, "open").cancelled_there(starting.__aenter__())
        async with started_service(state_dir, later) as again:
            assert await again.run(sandbox_id, "print(open('kept').read())") == "x\n"
