"""Sleep and wake, from outside: what survives, what puts a sandbox to sleep, and what wakes it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.gateways import RunningGateway
from tests.state.all_kinds import CHECK, MAKE
from tests.state.sandboxes import WAIT_S, Api, Notebook, eventually, value_of, vmm_pids
from tests.unit.gateway.client import KernelClient, let_pass, stream_text, waits_for


async def test_all_kinds_of_state_survive(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run(MAKE)
        machines = vmm_pids(state_gateway.run_dir)
        asleep = await api.do(sandbox_id, "sleep")
        assert asleep["state"] == "asleep"
        assert vmm_pids(state_gateway.run_dir).keys() < machines.keys(), "its machine is still there"
        assert sandbox_id in [each["id"] for each in await api.call("GET", "/api/sandboxes")]
        assert sandbox_id in [each["id"] for each in await api.call("GET", "/api/kernels")]
        assert (await api.do(sandbox_id, "sleep"))["state"] == "asleep", "twice is harmless"
        assert (await api.do(sandbox_id, "wake"))["state"] == "running"
        before = time.time()
        assert before - 5 < await notebook.value(CHECK) < time.time() + 5, "the clock"
        # Once more, woken by a cell: a snapshot over a snapshot.
        await api.do(sandbox_id, "sleep")
        assert await notebook.value("next(squares), opened.closed, len(alarms) > 0") == (16, False, True)
    await api.delete(sandbox_id)


async def test_a_cell_goes_on_after_sleep(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        client = notebook.client
        cell = f"print(0, flush=True)\n{waits_for('go')}for i in range(1, 12): print(i, flush=True)\n'done'"
        msg_id = await client.execute(cell)
        seen = await client.until("stream")
        await api.do(sandbox_id, "sleep")
        assert (await api.sandbox(sandbox_id))["state"] == "asleep"
        await api.do(sandbox_id, "wake")
        await let_pass(state_gateway, sandbox_id, "go")
        seen += await notebook.rest(msg_id)
        assert stream_text(seen) == "".join(f"{i}\n" for i in range(12))
        assert "execute_result" in [message["header"]["msg_type"] for message in seen]
    await api.delete(sandbox_id)


async def test_idle_time_puts_it_to_sleep_but_never_in_a_cell(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create(idle_timeout_s=3)
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        # Longer than the idle time.
        cell = asyncio.create_task(notebook.value("import time; x = 7; time.sleep(6); x"))
        states = set()
        while not cell.done():
            states.add((await api.sandbox(sandbox_id))["state"])
            await asyncio.sleep(0.2)
        assert await cell == 7
        assert states == {"running"}
        await api.until_state(sandbox_id, "asleep")
        # An open WebSocket does not keep it awake, and a message wakes it: the client waits a moment.
        assert await notebook.value("x + 1") == 8
        await api.until_state(sandbox_id, "asleep")
    assert await value_of(state_gateway, sandbox_id, "x + 2") == 9, "a new WebSocket"
    await api.call("PATCH", f"/api/sandboxes/{sandbox_id}", {"idle_timeout_s": 0})
    other_id = await api.create(idle_timeout_s=3)
    await api.until_state(other_id, "asleep")
    assert (await api.sandbox(sandbox_id))["state"] == "running"
    for each in (sandbox_id, other_id):
        await api.delete(each)


async def test_a_plain_jupyter_client_wakes_it(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    connection = await api.call("GET", f"/api/sandboxes/{sandbox_id}/connection")
    client, late = AsyncKernelClient(), AsyncKernelClient()
    for each in (client, late):
        each.load_connection_info(connection)
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=60)
        await client.execute_interactive("x = 1", timeout=60)
        await api.do(sandbox_id, "sleep")
        late.start_channels()
        # Sockets that connect and heart beats are no requests; a sleeping kernel is well.
        await beats(connection)
        assert (await api.sandbox(sandbox_id))["state"] == "asleep"
        reply = await client.execute_interactive("x += 1; assert x == 2", timeout=60)
        assert reply["content"]["status"] == "ok"
        assert (await api.sandbox(sandbox_id))["state"] == "running"
        await api.do(sandbox_id, "sleep")
        reply = await late.execute_interactive("assert x == 2", timeout=60)
        assert reply["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        late.stop_channels()
    await api.delete(sandbox_id)


async def beats(connection: dict[str, Any]) -> None:
    """The kernel's heart, seen three times."""
    context = zmq.asyncio.Context()
    heart = context.socket(zmq.REQ)
    try:
        heart.connect(f"ipc://{connection['ip']}-{connection['hb_port']}")
        async with asyncio.timeout(60):
            for beat in (b"1", b"2", b"3"):
                await heart.send(beat)
                assert await heart.recv() == beat
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("wait_ms", [0, 10, 30, 100])
async def test_a_call_in_any_moment_of_a_sleep_is_answered(
    state_gateway: RunningGateway, api: Api, wait_ms: int
) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("ran = 0")
        for count in range(1, 4):
            sleeping = asyncio.create_task(api.do(sandbox_id, "sleep"))
            await asyncio.sleep(wait_ms / 1000)
            async with asyncio.timeout(60):
                assert await notebook.value("ran += 1; ran") == count
            await sleeping
    await api.delete(sandbox_id)


async def test_what_is_asked_of_a_paused_sandbox_is_answered_after_sleep_and_wake(
    state_gateway: RunningGateway, api: Api
) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1")
        await api.do(sandbox_id, "pause")
        value = asyncio.create_task(notebook.value("x + 1"))
        assert (await api.sandbox(sandbox_id))["state"] == "paused"
        # What waits wakes it as soon as it can.
        await api.do(sandbox_id, "sleep")
        assert await value == 2
        assert (await api.sandbox(sandbox_id))["state"] == "running"
        await api.do(sandbox_id, "pause")
        value = asyncio.create_task(notebook.value("x + 2"))
        await api.do(sandbox_id, "resume")
        assert await value == 3
    await api.delete(sandbox_id)


async def test_a_request_behind_a_callback_keeps_it_awake(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create(idle_timeout_s=1)
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run(
            "import comm, time\n"
            "comm.get_comm_manager().register_target('slow', lambda c, m: c.on_msg(lambda m: time.sleep(5)))"
        )
        await notebook.client.send("comm_open", {"comm_id": "c", "target_name": "slow", "data": {}})
        await notebook.client.send("comm_msg", {"comm_id": "c", "data": {}})
        value = asyncio.create_task(notebook.value("1 + 1"))
        states = set()
        while not value.done():
            states.add((await api.sandbox(sandbox_id))["state"])
            await asyncio.sleep(0.2)
        assert await value == 2
        assert states == {"running"}
        await api.until_state(sandbox_id, "asleep")
    await api.delete(sandbox_id)


async def test_an_interrupt_of_nothing_wakes_nobody(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1")
        await api.do(sandbox_id, "sleep")
        await api.call("POST", f"/api/kernels/{sandbox_id}/interrupt", status=204)
        assert (await api.sandbox(sandbox_id))["state"] == "asleep"
        msg_id = await notebook.client.execute("print('begun', flush=True)\nwhile True: pass")
        await notebook.client.until("stream")
        await api.do(sandbox_id, "sleep")
        await api.call("POST", f"/api/kernels/{sandbox_id}/interrupt", status=204)
        names = [message["content"].get("ename") for message in await notebook.rest(msg_id)]
        assert "KeyboardInterrupt" in names
    await api.delete(sandbox_id)


async def test_many_rounds_lose_nothing(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    rounds = 8
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("import os\nkept = []\nn = 0")
        for count in range(1, rounds + 1):
            await notebook.run("n += 1; kept.append(os.urandom(100_000)); open(f'/tmp/{n}', 'w').write(str(n))")
            await api.do(sandbox_id, "sleep")
            await api.do(sandbox_id, "wake")
            assert await notebook.value("n, len(kept), len(set(kept))") == (count, count, count)
        assert await notebook.value("[int(open(f'/tmp/{i + 1}').read()) for i in range(n)]") == list(
            range(1, rounds + 1)
        )
    await api.delete(sandbox_id)


async def test_delete_ends_a_sleeping_sandbox_for_good(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    await api.do(sandbox_id, "sleep")
    await api.delete(sandbox_id)
    await api.call("GET", f"/api/sandboxes/{sandbox_id}", status=404)
    await api.do(sandbox_id, "wake", status=404)
    assert not list((state_gateway.state_dir / "snapshots/pins").glob(f"*{sandbox_id}*"))


async def test_many_requests_at_once_wake_it_once(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    await api.do(sandbox_id, "sleep")
    before = vmm_pids(state_gateway.run_dir)
    clients = await asyncio.gather(*(KernelClient.connect(state_gateway, sandbox_id) for _ in range(8)))
    await asyncio.gather(*(client.run("1") for client in clients), *(api.do(sandbox_id, "wake") for _ in range(8)))
    await asyncio.gather(*(client.close() for client in clients))
    assert len(vmm_pids(state_gateway.run_dir).keys() - before.keys()) == 1
    await api.delete(sandbox_id)


@pytest.mark.parametrize("what", ["sleep", "wake"])
async def test_unknown_sandboxes_are_404(api: Api, what: str) -> None:
    await api.do("00000000-0000-4000-8000-000000000000", what, status=404)


async def test_a_life_time_ends_it(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create(max_lifetime_s=3)
    await api.do(sandbox_id, "sleep")
    async with asyncio.timeout(WAIT_S):
        while sandbox_id in [each["id"] for each in await api.call("GET", "/api/sandboxes")]:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.1)
    await eventually(lambda: not list((state_gateway.state_dir / "snapshots/pins").glob(f"*{sandbox_id}*")))


async def test_a_second_is_a_second(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        clocks = "import time; time.time(), time.monotonic()"
        before, (wall, monotonic) = time.time(), await notebook.value(clocks)
        reached = time.time() - before
        await asyncio.sleep(5)  # what is measured by both clocks
        again, (wall_then, monotonic_then) = time.time(), await notebook.value(clocks)
        slack = reached + time.time() - again + 0.1
        for guest in (wall_then - wall, monotonic_then - monotonic):
            assert abs(guest - (again - before)) < slack
    await api.delete(sandbox_id)
