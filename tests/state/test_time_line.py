"""Checkpoints and time travel, over the API and with the magics."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.gateways import RunningGateway
from tests.state.sandboxes import Api, Notebook, vmm_pids
from tests.unit.gateway.client import stream_text


async def test_back_to_cells_and_forth_to_the_line_that_was_left(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1; numbers = iter(range(10)); next(numbers)")
        await api.do(sandbox_id, "checkpoints", status=201)
        await notebook.run("x = 2; y = 'only here'; open('/tmp/file', 'w').write('two'); next(numbers)")
        await api.do(sandbox_id, "checkpoints", {"name": "second"}, status=201)
        await notebook.run("x = 3; import pathlib; pathlib.Path('/tmp/file').unlink()")
        await api.do(sandbox_id, "checkpoints", status=201)
        line = await api.checkpoints(sandbox_id)
        assert [(each["cell"], each["name"]) for each in line] == [(1, None), (2, "second"), (3, None)]

        await api.do(sandbox_id, "goto", {"target": "1"})
        assert await notebook.value("x, 'y' in globals(), __import__('os').path.exists('/tmp/file')") == (
            1,
            False,
            False,
        )
        left = [each for each in await api.checkpoints(sandbox_id) if each["name"] and each["name"] != "second"]
        assert len(left) == 1, "the line that was left can be returned to"
        await api.do(sandbox_id, "goto", {"target": "second"})
        assert await notebook.value("x, y, open('/tmp/file').read(), next(numbers)") == (2, "only here", "two", 2)
        await api.do(sandbox_id, "goto", {"target": left[0]["id"][:12]})
        assert await notebook.value("x, __import__('os').path.exists('/tmp/file')") == (3, False)
        await api.do(sandbox_id, "goto", {"target": left[0]["name"]})
        assert await notebook.value("x") == 3
        await api.do(sandbox_id, "goto", {"target": "no such"}, status=404)
        assert await notebook.value("x") == 3
    await api.delete(sandbox_id)


async def test_undo_takes_back_one_cell_after_another(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        for code in ("df = [1, 2, 3]", "df.append(4)", "del df"):
            await notebook.run(code)
            await api.do(sandbox_id, "checkpoints", status=201)
        await api.do(sandbox_id, "undo")
        assert await notebook.value("df") == [1, 2, 3, 4]
    await api.delete(sandbox_id)


async def test_undo_twice_goes_back_two_cells(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        for count in range(1, 4):
            await notebook.run(f"x = {count}")
            await api.do(sandbox_id, "checkpoints", status=201)
        await api.do(sandbox_id, "undo")
        await api.do(sandbox_id, "undo")
        assert await notebook.value("x") == 1
    await api.delete(sandbox_id)


async def test_a_first_cell_cannot_be_undone(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create(checkpoints="off")
    await api.do(sandbox_id, "undo", status=404)
    await api.delete(sandbox_id)


async def test_magics_take_the_notebook_back(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("df = [1, 2]")
        await api.do(sandbox_id, "checkpoints", status=201)
        await notebook.run("del df")
        told = stream_text(await notebook.client.run("%sandbox undo"))
        assert "Went back" in told
        assert await notebook.value("df") == [1, 2]
        await notebook.run("%sandbox snapshot here")
        await notebook.run("df = 'changed'")
        assert "Went back" in stream_text(await notebook.client.run("%sandbox goto here"))
        assert await notebook.value("df") == [1, 2]
        (listing,) = await notebook.displays("%sandbox checkpoints")
        assert "here" in listing["data"]["text/plain"]
    await api.delete(sandbox_id)


async def test_goto_wakes_a_sleeping_sandbox(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1")
        await api.do(sandbox_id, "checkpoints", {"name": "one"}, status=201)
        await notebook.run("x = 2")
        await api.do(sandbox_id, "sleep")
        assert (await api.do(sandbox_id, "goto", {"target": "one"}))["state"] == "running"
        assert await notebook.value("x") == 1
        # What it slept on is not lost.
        (*_, asleep) = [each for each in await api.checkpoints(sandbox_id) if each["name"] is None]
        await api.do(sandbox_id, "goto", {"target": asleep["id"]})
        assert await notebook.value("x") == 2
    await api.delete(sandbox_id)


async def test_cells_are_checkpointed_by_themselves(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create(checkpoints="cell")
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1")
        (first,) = await api.checkpoints(sandbox_id, count=1)
        assert (first["cell"], first["name"]) == (1, None)
        # Cells that wait for each other are not held up by checkpoints.
        await asyncio.gather(*(notebook.client.execute(f"x = {count}") for count in range(10)))
        assert await notebook.value("x") == 9
        await api.call("PATCH", f"/api/sandboxes/{sandbox_id}", {"checkpoints": "off"})
        await api.do(sandbox_id, "undo")
        assert await notebook.value("x") in range(10)
    await api.delete(sandbox_id)


async def test_a_paused_sandbox_is_taken_back_too(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1")
        await api.do(sandbox_id, "checkpoints", {"name": "one"}, status=201)
        await notebook.run("x = 2")
        machines = len(vmm_pids(state_gateway.run_dir))
        await api.do(sandbox_id, "pause")
        await api.do(sandbox_id, "goto", {"target": "one"})
        assert len(vmm_pids(state_gateway.run_dir)) == machines, "the machine that was left has ended"
        assert await notebook.value("x") == 1
    await api.delete(sandbox_id)


async def test_a_sandbox_that_cannot_go_back_goes_on(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1")
        await api.do(sandbox_id, "checkpoints", {"name": "one"}, status=201)
        await notebook.run("x = 2; numbers = iter(range(10)); next(numbers)")
        (checkpoint,) = await api.checkpoints(sandbox_id)
        snapshots = state_gateway.state_dir / "snapshots"
        manifest = json.loads((snapshots / "manifests" / f"{checkpoint['id']}.json").read_text())
        (snapshots / "parts/device" / manifest["device"]["digest"]).write_bytes(b"not what was saved")
        machines = vmm_pids(state_gateway.run_dir)
        refused = await api.do(sandbox_id, "goto", {"target": "one"}, status=502)
        assert "could not be restored" in refused["message"]
        assert vmm_pids(state_gateway.run_dir) == machines, "the same machine, and no other"
        assert await notebook.value("x, next(numbers)") == (2, 1)
    await api.delete(sandbox_id)


async def test_a_guest_moves_no_pages_by_itself(state_gateway: RunningGateway, api: Api) -> None:
    """What a machine shares with its clones it must not copy into huge pages when nobody looks."""
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        interval = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs"
        assert await notebook.value(f"int(open({interval!r}).read())") == 2**32 - 1
    await api.delete(sandbox_id)


@pytest.mark.parametrize("name", ["", "x" * 101])
async def test_bad_names_are_refused(api: Api, name: str) -> None:
    sandbox_id = await api.create()
    await api.do(sandbox_id, "checkpoints", {"name": name}, status=400)
    await api.delete(sandbox_id)


async def test_deleting_the_sandbox_removes_its_checkpoints(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    checkpoint = await api.do(sandbox_id, "checkpoints", status=201)
    await api.delete(sandbox_id)
    assert checkpoint["id"] not in [each["id"] for each in await api.call("GET", "/api/snapshots")]
