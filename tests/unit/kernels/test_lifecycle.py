"""A sandbox's life: created, asleep, awake, paused, without its kernel, without its machine, gone."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from kernels.errors import (
    LimitError,
    MachineFailedError,
    MachineLeftError,
    RequestError,
    SandboxExistsError,
    SandboxStateError,
    SnapshotExistsError,
    UnknownSandboxError,
    UnknownTemplateError,
)
from kernels.exec import CommandOutput, CommandRequest
from kernels.models import CreateSandbox, EventKind, SandboxState
from tests.unit.kernels.conftest import TEMPLATE, Service, TestDriver, started_service
from vm_runtime.states import RunState


async def test_a_new_sandbox_runs_cells_and_leaves_nothing(kernels: Service) -> None:
    sandbox_id = await kernels.new(name="box", env={"COLOUR": "red"})
    sandbox = kernels.get(sandbox_id)
    assert (sandbox.state, sandbox.driver, sandbox.name) == (SandboxState.RUNNING, "fake", "box")
    assert await kernels.run(sandbox_id, "import os; print(os.environ['COLOUR'], 6 * 7)") == "red 42\n"
    assert await kernels.run(sandbox_id, "1 / 0") == "ZeroDivisionError"
    live = kernels.machines.running(sandbox_id)
    paths = live.saved.paths
    usage = await kernels.usage(sandbox_id)
    assert usage.memory_unique_bytes > 1 << 20
    assert (usage.guest is not None) == live.session.knows("machine.usage")
    assert usage.guest is None or 0 < usage.guest.memory_used_bytes < usage.guest.memory_total_bytes
    await kernels.delete(sandbox_id)
    assert live.saved.machine.is_dead
    assert not paths.run_dir.exists() and not paths.disk_dir.exists()
    assert kernels._store.pins().keys() == {"template-" + _template(kernels)}
    with pytest.raises(UnknownSandboxError):
        kernels.get(sandbox_id)


def _template(kernels: Service) -> str:
    (path,) = (kernels._settings.state_dir / "templates").glob("*.json")
    return path.stem[:16]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"template": "nothing"}, UnknownTemplateError),
        ({"memory_mib": 1 << 20}, LimitError),
        ({"memory_mib": (1 << 20) + 1}, LimitError),
        ({"memory_mib": 300}, RequestError),
        ({"disk_mib": 256}, RequestError),
        ({"kernel_id": "no id"}, RequestError),
        ({"checkpoints": "sometimes"}, RequestError),
    ],
)
async def test_a_request_that_cannot_be_met_leaves_nothing(
    kernels: Service, fields: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await kernels.create(CreateSandbox(**{"template": TEMPLATE, **fields}))  # type: ignore[arg-type]
    assert kernels.registry.sandboxes() == []


async def test_a_machine_that_does_not_start_leaves_nothing(kernels: Service, driver: TestDriver) -> None:
    driver.refuses = "not today"
    with pytest.raises(MachineFailedError, match="not today"):
        await kernels.new()
    assert kernels.registry.sandboxes() == []
    driver.refuses = None
    sandbox_id = await kernels.new()
    with pytest.raises(SandboxExistsError):
        await kernels.new(kernel_id=sandbox_id)


async def test_a_sandbox_sleeps_and_wakes_with_its_files(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.run(sandbox_id, "open('kept', 'w').write('x')")
    machine = kernels.machines.running(sandbox_id).saved.machine
    asleep = await kernels.lifecycle.sleep(sandbox_id)
    assert asleep.state is SandboxState.ASLEEP and asleep.snapshot_id is not None
    assert machine.is_dead
    assert await kernels.lifecycle.sleep(sandbox_id) == asleep
    with pytest.raises(SandboxStateError):
        kernels.machines.running(sandbox_id)
    assert (await kernels.lifecycle.wake(sandbox_id)).state is SandboxState.RUNNING
    assert await kernels.run(sandbox_id, "print(open('kept').read())") == "x\n"


async def test_a_life_may_end_in_sleep(kernels: Service) -> None:
    sandbox_id = await kernels.new(max_lifetime_s=0.5, on_timeout="sleep")
    await kernels.until(lambda: kernels.get(sandbox_id).state is SandboxState.ASLEEP)
    await kernels.lifecycle.wake(sandbox_id)
    assert kernels.get(sandbox_id).max_lifetime_s is None
    # One that sleeps already is not put to sleep again when it wakes.
    await kernels.lifecycle.sleep(sandbox_id)
    kernels.configure(sandbox_id, max_lifetime_s=0.1)
    async with asyncio.timeout(60):
        while kernels.get(sandbox_id).max_lifetime_s is not None:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.05)
    assert kernels.get(sandbox_id).state is SandboxState.ASLEEP


async def test_a_name_is_given_to_one_checkpoint(kernels: Service) -> None:
    sandbox_id, other_id = await kernels.new(), await kernels.new()
    await kernels.checkpoints.checkpoint(sandbox_id, name="once")
    with pytest.raises(SnapshotExistsError, match="once"):
        await kernels.checkpoints.checkpoint(sandbox_id, name="once")
    assert len(await kernels.checkpoints.all(sandbox_id)) == 1
    await kernels.checkpoints.checkpoint(other_id, name="once")


@pytest.mark.parametrize("why", ["asleep", "deleted", "elsewhere", "died"])
async def test_what_uses_a_machine_is_told_why_it_left(kernels: Service, why: str) -> None:
    sandbox_id = await kernels.new()
    await kernels.checkpoints.checkpoint(sandbox_id, name="before")
    commands, files = await kernels.commands(sandbox_id), await kernels.files(sandbox_id)
    async with (
        await commands.start(CommandRequest(command="echo on; sleep 60")) as command,
        await files.watch(".") as watch,
    ):
        assert isinstance(await command.next(), CommandOutput)
        change = asyncio.ensure_future(anext(watch.changes()))
        match why:
            case "asleep":
                await kernels.lifecycle.sleep(sandbox_id)
            case "deleted":
                await kernels.delete(sandbox_id)
            case "elsewhere":
                await kernels.checkpoints.goto(sandbox_id, "before")
            case "died":
                await kernels.machines.running(sandbox_id).saved.machine.kill()
        for use in (command.next(), change):
            with pytest.raises((MachineLeftError, MachineFailedError)) as raised:
                async with asyncio.timeout(60):
                    await use
            # A machine that died may have closed its end before anybody here knew.
            if why != "died":
                assert isinstance(raised.value, MachineLeftError) and raised.value.why == why


async def test_a_client_that_asks_a_sleeping_sandbox_wakes_it(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.lifecycle.sleep(sandbox_id)
    assert await kernels.run(sandbox_id, "print('awake')") == "awake\n"
    assert kernels.get(sandbox_id).state is SandboxState.RUNNING


async def test_a_sandbox_that_cannot_be_woken_sleeps_on(kernels: Service, driver: TestDriver) -> None:
    sandbox_id = await kernels.new()
    await kernels.lifecycle.sleep(sandbox_id)
    driver.refuses = "not today"
    with pytest.raises(MachineFailedError, match="not today"):
        await kernels.lifecycle.wake(sandbox_id)
    assert kernels.get(sandbox_id).state is SandboxState.ASLEEP
    driver.refuses = None
    await kernels.lifecycle.wake(sandbox_id)


async def test_a_paused_machine_stands_still_through_a_checkpoint(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    machine = kernels.machines.running(sandbox_id).saved.machine
    assert (await kernels.lifecycle.pause(sandbox_id)).state is SandboxState.PAUSED
    await kernels.checkpoints.checkpoint(sandbox_id, name="still")
    assert machine.state is RunState.PAUSED
    with pytest.raises(SandboxStateError, match="resume it first"):
        await kernels.interrupt(sandbox_id)
    assert (await kernels.lifecycle.resume(sandbox_id)).state is SandboxState.RUNNING
    assert await kernels.run(sandbox_id, "print(1)") == "1\n"


async def test_a_kernel_that_dies_is_restarted_and_given_up_at_last(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver, restart_limit=1) as kernels:
        sandbox_id = await kernels.new()
        kinds = (EventKind.KERNEL_RESTARTING, EventKind.KERNEL_RESTARTED, EventKind.KERNEL_DEAD)
        async with kernels.bus.subscribe() as events:
            for expected in ((EventKind.KERNEL_RESTARTING, EventKind.KERNEL_RESTARTED), (EventKind.KERNEL_DEAD,)):
                async with kernels.client(sandbox_id) as client:
                    client.execute("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
                    seen: list[EventKind] = []
                    async with asyncio.timeout(30):
                        while len(seen) < len(expected):
                            event = await anext(events)
                            seen += [event.kind] if event.kind in kinds else []
                assert tuple(seen) == expected
        assert kernels.get(sandbox_id).execution_state == "dead"


async def test_an_interrupt_ends_a_cell_and_a_restart_its_kernel(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    cell = asyncio.create_task(kernels.run(sandbox_id, "import time\nprint('begun', flush=True)\ntime.sleep(60)"))
    await kernels.until(lambda: kernels.get(sandbox_id).execution_state == "busy")
    await kernels.interrupt(sandbox_id)
    assert (await cell).endswith("KeyboardInterrupt")
    await kernels.run(sandbox_id, "x = 1")
    await kernels.restart(sandbox_id)
    assert await kernels.run(sandbox_id, "x") == "NameError"


async def test_a_machine_that_dies_falls_back_on_its_checkpoint_or_fails(kernels: Service) -> None:
    with_checkpoint, without = await kernels.new(), await kernels.new()
    await kernels.run(with_checkpoint, "open('kept', 'w').write('x')")
    await kernels.checkpoints.checkpoint(with_checkpoint, name="safe")
    for sandbox_id in (with_checkpoint, without):
        os.kill(kernels.machines.running(sandbox_id).saved.machine.pid, signal.SIGKILL)
    await kernels.until(lambda: kernels.get(without).state is SandboxState.FAILED)
    assert "SIGKILL" in str(kernels.get(without).reason)
    with pytest.raises(MachineFailedError):
        await kernels.lifecycle.wake(without)
    await kernels.until(lambda: kernels.get(with_checkpoint).state is SandboxState.ASLEEP)
    assert "checkpoint of" in str(kernels.get(with_checkpoint).reason)
    assert await kernels.run(with_checkpoint, "print(open('kept').read())") == "x\n"


async def test_a_kernel_that_jupyter_deletes_is_left_behind_for_its_notebook(kernels: Service) -> None:
    sandbox_id = await kernels.new(notebook="a.ipynb")
    await kernels.release(sandbox_id)
    assert kernels.get(sandbox_id).released
    assert await kernels.new(notebook="b.ipynb") != sandbox_id
    assert await kernels.new(notebook="a.ipynb") == sandbox_id
    assert not kernels.get(sandbox_id).released


async def test_spare_machines_are_given_out_once(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver, pool_size=1) as kernels:
        await kernels.prepare(progress=lambda text: None)
        async with asyncio.timeout(60):
            while kernels.pool.ready_count() < 1:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
        spare = kernels.pool
        sandbox_id = await kernels.new(env={"COLOUR": "red"})
        assert spare.ready_count() == 0 or kernels.machines.running(sandbox_id)
        assert await kernels.run(sandbox_id, "import os; print(os.environ['COLOUR'])") == "red\n"
