"""Checkpoints and time travel, over the API and with the magics."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.gateways import RunningGateway
from tests.state.sandboxes import Api, Notebook, vmm_of, vmm_pids
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
        await api.call("PATCH", f"/api/sandboxes/{sandbox_id}", {"checkpoints": "off"})
        for count in range(2, 5):
            await notebook.run(f"x = {count}")
        assert len(await api.checkpoints(sandbox_id)) == 1
        await api.do(sandbox_id, "undo")
        assert await notebook.value("x") == 1
    await api.delete(sandbox_id)


async def test_a_program_s_cells_are_told_apart(state_gateway: RunningGateway, api: Api) -> None:
    """Nobody is slow enough: the next cell is there before the checkpoint after the last."""
    sandbox_id = await api.create(checkpoints="cell")
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        for count in range(1, 5):
            await notebook.run(f"x = {count}")
        await api.do(sandbox_id, "undo")
        assert await notebook.value("x") == 3
        await api.do(sandbox_id, "goto", {"target": "1"})
        assert await notebook.value("x") == 1
        # The same from inside: the cell that asks is the one that is taken back.
        await notebook.run("x = 'second'")
        assert "Went back" in stream_text(await notebook.client.run("%sandbox undo"))
        assert await notebook.value("x") == 1
    await api.delete(sandbox_id)


async def test_cells_that_wait_for_each_other_are_told_apart(state_gateway: RunningGateway, api: Api) -> None:
    """Run All: all cells are in the kernel from the beginning, and so in each checkpoint; none is run by going back."""
    sandbox_id = await api.create(checkpoints="cell")
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        for count in range(1, 7):
            await notebook.client.execute(f"x = {count}; ran = [*globals().get('ran', []), {count}]")
        assert await notebook.value("x") == 6
        line = {each["cell"]: each["id"] for each in await api.checkpoints(sandbox_id, count=2)}
        for cell in sorted({1, *line} & set(range(1, 7))):
            await api.do(sandbox_id, "goto", {"target": line[cell]})
            assert await notebook.value("x, ran") == (cell, list(range(1, cell + 1)))
    await api.delete(sandbox_id)


async def replies(notebook: Notebook, asked: list[str]) -> list[str]:
    """The first answer that each of these cells gets."""
    statuses: dict[str, str] = {}
    while not statuses.keys() >= set(asked):
        message = await notebook.client.receive()
        assert message is not None, "the gateway closed the connection"
        if message["header"]["msg_type"] == "execute_reply":
            statuses.setdefault(message["parent_header"]["msg_id"], message["content"]["status"])
    return [statuses[each] for each in asked]


async def test_who_asked_the_state_that_is_left_hears_that_it_does_not_run(
    state_gateway: RunningGateway, api: Api
) -> None:
    sandbox_id = await api.create(checkpoints="cell")
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1")
        await api.checkpoints(sandbox_id, count=1)
        await notebook.run("x = 2")
        _, second = await api.checkpoints(sandbox_id, count=2)
        # From inside, with cells behind the one that asks.
        asked = [await notebook.client.execute(code) for code in ("%sandbox undo", "x = 3", "x = 4")]
        assert await replies(notebook, asked) == ["ok", "aborted", "aborted"]
        assert await notebook.value("x") == 1
        # From outside, while a cell runs and another waits.
        asked = [await notebook.client.execute(code) for code in ("import time; time.sleep(600)", "x = 5")]
        await notebook.client.until("execute_input")
        await api.do(sandbox_id, "goto", {"target": second["id"]})
        assert await replies(notebook, asked) == ["aborted", "aborted"]
        assert await notebook.value("x") == 2
    await api.delete(sandbox_id)


async def test_an_error_still_ends_the_cells_behind_it(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create(checkpoints="cell")
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        for code in ("x = 1", "1 / 0", "x = 2"):
            last = await notebook.client.execute(code)
        assert await replies(notebook, [last]) == ["aborted"]
        assert await notebook.value("x") == 1
        await api.do(sandbox_id, "undo")
        assert await notebook.value("x") == 1
    await api.delete(sandbox_id)


async def test_a_cell_that_waits_can_be_interrupted(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create(checkpoints="cell")
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        for _ in range(5):
            await notebook.run("x = 1")
            asked = await notebook.client.execute("x = 2; import time; time.sleep(600)")
            await notebook.client.until("status")
            await api.call("POST", f"/api/kernels/{sandbox_id}/interrupt", status=204)
            errors = [m["content"]["ename"] for m in await notebook.rest(asked) if m["header"]["msg_type"] == "error"]
            assert errors == ["KeyboardInterrupt"]
    await api.delete(sandbox_id)


async def test_a_lost_machine_s_checkpoint_runs_no_cell_again(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create(checkpoints="cell")
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 0")
        await api.checkpoints(sandbox_id, count=1)  # from the first on the kernel waits after each cell for the next
        await notebook.run("x = 1")
        # It waits in the kernel when the checkpoint after that cell is taken, so it is in it.
        await notebook.client.execute("print('here', flush=True); x = 2; import time; time.sleep(600)")
        await notebook.client.until("stream")
        await api.checkpoints(sandbox_id, count=2)
        os.kill(vmm_of(state_gateway, sandbox_id), signal.SIGKILL)
        await api.until_state(sandbox_id, "asleep")
        assert await notebook.value("x") == 1
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
        (device,) = (part["digest"] for part in manifest["state"]["parts"] if part["kind"] == "device")
        (snapshots / "parts/device" / device).write_bytes(b"not what was saved")
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
