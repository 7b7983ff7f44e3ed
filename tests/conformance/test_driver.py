"""What every driver must do, seen through what all that lies above uses: machines, their snapshots, and their end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tests.conformance.conftest import PAUSED, RUNNING, Bench, assert_nothing_left, describe
from vm_runtime.confinement.process import start_time_ticks
from vm_runtime.drivers.base import Capture, DriverSettings
from vm_runtime.drivers.find import driver_names, find_driver
from vm_runtime.errors import DriverUnavailableError, MachineGoneError, MachineStateError
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.values import AfterCapture
from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.states import RunState


async def test_it_is_found_by_its_name_and_says_what_it_cannot_do_and_why(bench: Bench) -> None:
    driver = bench.driver
    assert driver.name in driver_names()
    assert find_driver(driver.name) is type(driver)
    for capability in vars(driver.capabilities).values():
        assert capability.ok == (capability.why_not == "")
    checks = await type(driver).checks(DriverSettings(state_dir=bench.directory))
    assert checks
    assert all(check.problem is not None for check in checks if check.blocking)
    assert driver.identity().startswith(driver.name)
    with pytest.raises(DriverUnavailableError, match="installed are"):
        find_driver("nowhere")


async def test_a_boot_runs_the_guest_and_a_kill_leaves_nothing(bench: Bench) -> None:
    saved = await bench.boot()
    machine = saved.machine
    assert machine.state is RUNNING
    await bench.works(saved)
    usage = await asyncio.to_thread(machine.memory_usage)
    assert usage.unique_bytes > 0
    assert usage.shared_bytes > 0
    (await machine.open_wire()).close()
    machine.set_background(True)

    death = await saved.kill()
    assert death.requested
    assert death == await machine.kill() == await machine.wait_dead()
    assert machine.is_dead
    assert start_time_ticks(machine.pid) is None
    assert_nothing_left(bench, "booted")
    with pytest.raises(MachineStateError, match="is dead"):
        await machine.pause()


async def test_a_pause_stops_the_guest_and_a_resume_lets_it_run(bench: Bench) -> None:
    saved = await bench.boot()
    try:
        await bench.works(saved)
        await saved.machine.pause()
        await saved.machine.pause()
        assert saved.machine.state is PAUSED
        assert await bench.subject.stands(saved.machine)
        await saved.machine.resume()
        await saved.machine.resume()
        await bench.works(saved)
    finally:
        await saved.kill()


async def test_a_machine_that_is_paused_can_be_ended(bench: Bench) -> None:
    saved = await bench.boot()
    await saved.machine.pause()
    assert (await saved.kill()).requested
    assert_nothing_left(bench, "booted")


async def test_a_process_that_is_killed_from_outside_is_noticed_with_its_signal(bench: Bench) -> None:
    saved = await bench.boot()
    await bench.works(saved)
    os.kill(saved.machine.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        death = await saved.machine.wait_dead()
    assert death.signal == signal.SIGKILL
    assert not death.requested
    assert "SIGKILL" in death.reason
    await saved.kill()
    assert_nothing_left(bench, "booted")


async def test_a_snapshot_is_restored_as_often_as_one_likes(bench: Bench) -> None:
    template = await bench.template()
    assert template.parents == ()
    assert template.state.driver == bench.driver.name
    assert bench.store.verify(template.id) == []
    first, second = await asyncio.gather(bench.restore(template, "first"), bench.restore(template, "second"))
    try:
        assert (first.machine.state, second.machine.state) == (RUNNING, RUNNING)
        assert first.machine.spec == bench.spec
        await second.machine.pause()
        await bench.works(first)
        assert await bench.subject.stands(second.machine)
        taken = await first.take(describe(name="one"), then=AfterCapture.RESUME)
        assert first.machine.state is RUNNING
        assert not taken.stopped
        assert taken.manifest.parents == (template.id,)
        assert bench.store.verify(taken.manifest.id) == []
    finally:
        await asyncio.gather(first.kill(), second.kill())
    for name in ("first", "second"):
        assert_nothing_left(bench, name)
    woken = await bench.restore(taken.manifest)
    await bench.works(woken)
    await woken.kill()


async def test_what_sleeps_stands_still_and_wakes(bench: Bench) -> None:
    manifest = await bench.template()
    for _ in range(3):
        saved = await bench.restore(manifest)
        await bench.works(saved)
        taken = await saved.take(describe(), then=AfterCapture.STOP)
        assert taken.stopped
        assert await bench.subject.stands(saved.machine)
        manifest = taken.manifest
        await saved.kill()
    assert len(bench.store.ls()) == 4


async def test_a_fork_runs_children_and_one_that_fails_does_not_fail_the_others(bench: Bench) -> None:
    parent = await bench.restore(await bench.template(), "first")
    machines = [parent]
    try:
        await bench.works(parent)
        child_paths = [bench.paths(f"clone-{number}") for number in range(3)]
        child_paths[0].run_dir.parent.mkdir(exist_ok=True)
        child_paths[0].run_dir.touch()  # no directory: its sockets have no place
        forked = await bench.saver.fork(parent, describe(), child_paths=child_paths)
        failed, *children = forked.children
        assert isinstance(failed, Exception)
        assert not child_paths[0].disk_dir.exists()
        for child in children:
            assert isinstance(child, SavedMachine)
            machines.append(child)
            assert child.machine.state is RUNNING
            assert child.snapshot == forked.taken.manifest
            await bench.works(child)
        assert parent.machine.state is RUNNING
        await bench.works(parent)
    finally:
        await asyncio.gather(*(machine.kill() for machine in machines))
    assert bench.store.pins() == {}


async def test_the_state_of_another_driver_is_refused(bench: Bench) -> None:
    template = await bench.template()
    assert bench.driver.can_load(template.state) is None
    for change in ({"driver": "another"}, {"format": "another-1"}):
        state = template.state.model_copy(update=change)
        assert "another" in str(bench.driver.can_load(state))
        with pytest.raises(BrokenSnapshotError, match="another"):
            await bench.restore(template.model_copy(update={"state": state}))
    assert_nothing_left(bench, "clone")


async def test_a_part_that_is_missing_is_a_broken_snapshot(bench: Bench) -> None:
    template = await bench.template()
    kind, part = template.parts()[-1]
    bench.store.part_path(kind, part.digest).unlink()
    with pytest.raises(BrokenSnapshotError, match="missing"):
        await bench.restore(template)
    assert_nothing_left(bench, "clone")


async def test_a_cancelled_restore_leaves_nothing(bench: Bench) -> None:
    template = await bench.template()
    for delay_s in (0.0, 0.005, 0.02, 0.04):
        task = asyncio.create_task(bench.restore(template))
        await asyncio.sleep(delay_s)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(outcome, BaseException):
            await outcome.kill()
        assert_nothing_left(bench, "clone")


@pytest.mark.parametrize("left", [RUNNING, PAUSED])
async def test_a_later_gateway_adopts_what_an_earlier_one_left(bench: Bench, left: RunState) -> None:
    template = await bench.template()
    clone = await bench.restore(template)
    await bench.works(clone)
    if left is PAUSED:
        await clone.machine.pause()
    await clone.detach()
    await clone.detach()
    await bench.saver.close()
    await bench.driver.close()

    driver = await bench.subject.start(bench.directory)
    saver = bench.new_saver(driver)
    try:
        adopted = await saver.adopt(bench.paths("clone"))
        assert adopted.machine.pid == clone.machine.pid
        assert adopted.machine.state is left
        assert adopted.machine.spec == bench.spec
        assert adopted.snapshot == template
        await adopted.machine.resume()
        await bench.works(adopted)
        taken = await adopted.take(describe(), then=AfterCapture.RESUME)
        assert taken.manifest.parents == (template.id,)
        os.kill(adopted.machine.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            assert (await adopted.machine.wait_dead()).exit_status is None
        await adopted.kill()
        assert_nothing_left(bench, "clone")
        with pytest.raises(MachineGoneError):
            await saver.adopt(bench.paths("clone"))
    finally:
        await saver.close()
        await driver.close()


async def test_adopting_a_machine_that_died_unwatched_removes_its_leftovers(bench: Bench) -> None:
    clone = await bench.restore(await bench.template())
    await clone.detach()
    os.kill(clone.machine.pid, signal.SIGKILL)
    await asyncio.to_thread(wait_gone, clone.machine.pid)
    with pytest.raises(MachineGoneError):
        await bench.saver.adopt(bench.paths("clone"))
    assert_nothing_left(bench, "clone")


async def test_a_stray_machine_is_ended_and_its_disks_are_removed(bench: Bench) -> None:
    clone = await bench.restore(await bench.template())
    await clone.detach()
    await bench.saver.end(bench.paths("clone"))
    await asyncio.to_thread(wait_gone, clone.machine.pid)
    assert_nothing_left(bench, "clone")
    (bench.directory / "d" / "stray").mkdir(parents=True)
    await bench.saver.remove_leftovers(bench.directory / "d", keep=set())
    assert list((bench.directory / "d").iterdir()) == []


class Recorded(SnapshotHooks):
    """Notes its steps; waits in the one named `waits_in` until `go_on`, and fails in the one named `fails_in`."""

    def __init__(self, machine: SavedMachine, *, waits_in: str = "", fails_in: str = "") -> None:
        self._machine = machine
        self._waits_in = waits_in
        self._fails_in = fails_in
        self.steps: list[tuple[str, RunState]] = []
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def _step(self, name: str) -> None:
        self.steps.append((name, self._machine.machine.state))
        if name == self._fails_in:
            raise RuntimeError(f"not in {name}")
        if name == self._waits_in:
            self.reached.set()
            await self.go_on.wait()

    async def prepare(self, capture: Capture) -> None:
        await self._step("prepare")

    async def before_pause(self) -> None:
        await self._step("before_pause")

    async def before_resume(self) -> None:
        await self._step("before_resume")

    async def captured(self) -> None:
        await self._step("captured")

    async def stored(self, manifest: Manifest) -> None:
        await self._step("stored")

    async def abandoned(self) -> None:
        await self._step("abandoned")


async def test_all_who_take_part_in_a_snapshot_come_to_each_step(bench: Bench) -> None:
    saved = await bench.restore(await bench.template(), "first")
    try:
        one, two = Recorded(saved), Recorded(saved)
        await saved.take(describe(), then=AfterCapture.RESUME, hooks=[one, two])
        steps = [("prepare", RUNNING), ("before_pause", RUNNING), ("before_resume", PAUSED), ("captured", RUNNING)]
        assert one.steps == two.steps == [*steps, ("stored", RUNNING)]
        for step, _ in steps:
            for then in AfterCapture:
                one, two = Recorded(saved, fails_in=step), Recorded(saved)
                with pytest.raises(RuntimeError, match=step):
                    await saved.take(describe(), then=then, hooks=[one, two])
                assert one.steps[-1] == two.steps[-1] == ("abandoned", RUNNING)
        assert len(bench.store.ls()) == 2
    finally:
        await saved.kill()


async def test_a_snapshot_that_is_cancelled_leaves_the_machine_as_its_user_left_it(bench: Bench) -> None:
    saved = await bench.restore(await bench.template(), "first")
    try:
        for left in (RUNNING, PAUSED):
            if left is PAUSED:
                await saved.machine.pause()
            hook = Recorded(saved, waits_in="captured")
            taking = asyncio.create_task(saved.take(describe(), then=AfterCapture.STOP, hooks=[hook]))
            await hook.reached.wait()
            taking.cancel()
            hook.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await taking
            assert saved.machine.state is left
            assert hook.steps[-1] == ("abandoned", left)
    finally:
        await saved.kill()


async def test_the_next_snapshot_is_captured_while_one_is_being_stored(bench: Bench) -> None:
    template = await bench.template()
    saved = await bench.restore(template, "first")
    try:
        first = Recorded(saved, waits_in="stored")
        storing = asyncio.create_task(saved.take(describe(), then=AfterCapture.RESUME, hooks=[first]))
        await first.reached.wait()
        second = Recorded(saved, waits_in="captured")
        taking = asyncio.create_task(saved.take(describe(), then=AfterCapture.RESUME, hooks=[second]))
        await second.reached.wait()
        second.go_on.set()
        ending = asyncio.create_task(saved.kill())
        first.go_on.set()
        taken = [await storing, await taking]
        assert [each.manifest.parents for each in taken] == [(template.id,), (taken[0].manifest.id,)]
        assert second.steps[-1][0] == "stored"
        await ending  # only now: what is captured is not lost with the machine
        assert bench.store.verify(taken[1].manifest.id) == []
    finally:
        await saved.kill()


def wait_gone(pid: int) -> None:
    while start_time_ticks(pid) is not None:
        time.sleep(0.01)


def test_every_installed_driver_has_a_case() -> None:
    cases = Path(__file__).with_name("conftest.py").read_text()
    assert all(f'"{name}' in cases for name in driver_names())
