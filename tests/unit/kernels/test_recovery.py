"""What a gateway does with what an earlier one left: machines that run, that died, that nobody knows."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kernels.connected import new_paths
from kernels.models import SandboxState
from tests.fake_driver.machine import FakeMachine
from tests.unit.kernels.conftest import Service, TestDriver, started_driver, started_service
from vm_runtime.confinement.process import start_time_ticks
from vm_runtime.errors import MachineError
from vm_runtime.spec import MachineShape, MachineSpec
from vm_runtime.states import RunState


async def leave(kernels: Service) -> None:
    """What a killed gateway leaves: machines that run on, and records as they were last written."""
    for sandbox_id in list(kernels.machines.live):
        await kernels.machines.detach(sandbox_id)
    kernels.registry._records.clear()


@pytest.mark.parametrize("left", [SandboxState.RUNNING, SandboxState.PAUSED])
async def test_a_machine_that_runs_is_found_again(state_dir: Path, driver: TestDriver, left: SandboxState) -> None:
    async with started_service(state_dir, driver) as kernels:
        sandbox_id = await kernels.new()
        await kernels.run(sandbox_id, "x = 42")
        if left is SandboxState.PAUSED:
            await kernels.lifecycle.pause(sandbox_id)
        pid = kernels.machines.running(sandbox_id).saved.machine.pid
        await leave(kernels)
    async with started_driver(state_dir) as later, started_service(state_dir, later) as kernels:
        assert kernels.get(sandbox_id).state is left
        machine = kernels.machines.running(sandbox_id).saved.machine
        assert machine.pid == pid
        if left is SandboxState.PAUSED:
            assert machine.state is RunState.PAUSED
            await kernels.lifecycle.resume(sandbox_id)
        assert await kernels.run(sandbox_id, "print(x)") == "42\n"


async def test_one_that_cannot_be_paused_again_is_not_lost(
    state_dir: Path, driver: TestDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started_service(state_dir, driver) as kernels:
        sandbox_id = await kernels.new()
        await kernels.run(sandbox_id, "x = 42")
        await kernels.lifecycle.pause(sandbox_id)
        await leave(kernels)

    async def fail(machine: FakeMachine) -> None:
        raise MachineError("It does not stop.")

    async with started_driver(state_dir) as later:
        monkeypatch.setattr(FakeMachine, "pause", fail)
        async with started_service(state_dir, later) as kernels:
            assert kernels.get(sandbox_id).state is SandboxState.RUNNING
            assert await kernels.run(sandbox_id, "print(x)") == "42\n"


async def test_machines_that_died_meanwhile_fall_back_or_fail_and_sleepers_sleep_on(
    state_dir: Path, driver: TestDriver
) -> None:
    async with started_service(state_dir, driver) as kernels:
        safe, lost, asleep = [await kernels.new() for _ in range(3)]
        await kernels.checkpoints.checkpoint(safe, name="safe")
        await kernels.lifecycle.sleep(asleep)
        pids = [kernels.machines.running(each).saved.machine.pid for each in (safe, lost)]
        await leave(kernels)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    async with started_driver(state_dir) as later, started_service(state_dir, later) as kernels:
        states = {each.id: each.state for each in kernels.registry.sandboxes()}
        assert states == {safe: SandboxState.ASLEEP, lost: SandboxState.FAILED, asleep: SandboxState.ASLEEP}
        for sandbox_id in (safe, asleep):
            assert await kernels.run(sandbox_id, "print(1)") == "1\n"


async def test_machines_that_nobody_knows_are_ended(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver) as kernels:
        settings = kernels._settings
        image = kernels._images.current()["tiny"]
        spec = MachineSpec(shape=MachineShape(memory_mib=256, vcpus=1, disk_mib=1024), image=image.files)
        paths = new_paths(settings.state_dir, settings.run_dir)
        stray = await kernels.saver.boot(spec, paths=paths, guest=b"", timeout_s=60.0)
        await stray.detach()
        (settings.state_dir / "machines" / "0123").mkdir(parents=True)
    async with started_driver(state_dir) as later, started_service(state_dir, later):
        assert not paths.run_dir.exists()
        assert list((state_dir / "machines").iterdir()) == []
        assert start_time_ticks(stray.machine.pid) is None


async def test_a_clean_stop_puts_all_to_sleep(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver, stop_means_sleep=True) as kernels:
        sandbox_id = await kernels.new()
        await kernels.run(sandbox_id, "open('kept', 'w').write('x')")
        pid = kernels.machines.running(sandbox_id).saved.machine.pid
    assert start_time_ticks(pid) is None
    async with started_service(state_dir, driver) as kernels:
        assert kernels.get(sandbox_id).state is SandboxState.ASLEEP
        assert await kernels.run(sandbox_id, "print(open('kept').read())") == "x\n"
