"""WebSockets of kernels that sleep, wake, go back in time and lose their machines or their gateway."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateways import RunningGateway, start_gateway
from tests.state.sandboxes import vmm_of
from tests.unit.gateway.client import KernelClient, Message, let_pass, request, stream_text, waits_for


@pytest.fixture
async def kernel_id(gateway: RunningGateway) -> AsyncIterator[str]:
    kernel_id = await new_kernel(gateway)
    yield kernel_id
    await request(gateway, "DELETE", f"/api/sandboxes/{kernel_id}")


async def new_kernel(gateway: RunningGateway, *, notebook: str | None = None) -> str:
    env = {"JPY_SESSION_NAME": notebook} if notebook is not None else {}
    response = await request(gateway, "POST", "/api/kernels", {"env": env})
    assert response.code == 201, response.body
    kernel_id: str = json.loads(response.body)["id"]
    return kernel_id


async def post(gateway: RunningGateway, kernel_id: str, operation: str) -> None:
    response = await request(gateway, "POST", f"/api/sandboxes/{kernel_id}/{operation}", {})
    assert response.code == 200, response.body


async def state_of(gateway: RunningGateway, kernel_id: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((await request(gateway, "GET", f"/api/sandboxes/{kernel_id}")).body)
    return state


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "legacy"])
async def test_a_message_wakes_a_kernel_that_fell_asleep(gateway: RunningGateway, kernel_id: str, v1: bool) -> None:
    clients = [await KernelClient.connect(gateway, kernel_id, v1=v1) for _ in range(2)]
    await clients[0].run("x = 0")
    for number in range(1, 4):
        await post(gateway, kernel_id, "sleep")
        assert stream_text(await clients[0].run("x += 1\nprint(f'{x}\\n', end='')")) == f"{number}\n"
        assert stream_text(await clients[1].until("stream")) == f"{number}\n"
    for client in clients:
        await client.close()


async def test_connecting_wakes_nobody_until_it_asks(gateway: RunningGateway, kernel_id: str) -> None:
    await post(gateway, kernel_id, "sleep")
    client = await KernelClient.connect(gateway, kernel_id)
    for _ in range(3):  # what its sockets say to each other is no request
        assert (await state_of(gateway, kernel_id))["state"] == "asleep"
    assert stream_text(await client.run("print('awake')")) == "awake\n"
    await client.close()


async def test_a_cell_sleeps_in_the_middle_and_goes_on(gateway: RunningGateway, kernel_id: str) -> None:
    client = await KernelClient.connect(gateway, kernel_id)
    msg_id = await client.execute(f"print('before', flush=True)\n{waits_for('go')}print('after')")
    seen = await client.until("stream")
    await post(gateway, kernel_id, "sleep")
    assert (await state_of(gateway, kernel_id))["state"] == "asleep"
    await post(gateway, kernel_id, "wake")
    await let_pass(gateway, kernel_id, "go")
    seen += await client.until("status", execution_state="idle")
    assert stream_text(seen) == "before\nafter\n"
    assert seen[-1]["parent_header"]["msg_id"] == msg_id
    await client.close()


async def test_a_notebook_gets_its_kernel_back(gateway: RunningGateway) -> None:
    notebook = f"/home/me/{uuid.uuid4()}.d/n.ipynb"
    kernel_id = await new_kernel(gateway, notebook=notebook)
    client = await KernelClient.connect(gateway, kernel_id)
    await client.run("x = 'kept'")
    await client.execute(f"print(0, flush=True)\n{waits_for('go')}for i in (1, 2): print(i, flush=True)")
    await client.until("stream")
    assert (await request(gateway, "DELETE", f"/api/kernels/{kernel_id}")).code == 204
    while not client.ended:
        await client.receive()
    assert client.websocket.close_reason == "the kernel was deleted"
    await client.close()
    # Jupyter's clients do not see it, the sandbox API does.
    assert (await request(gateway, "GET", f"/api/kernels/{kernel_id}")).code == 404
    kernels = json.loads((await request(gateway, "GET", "/api/kernels")).body)
    assert kernel_id not in [kernel["id"] for kernel in kernels]
    sandbox = await state_of(gateway, kernel_id)
    assert (sandbox["state"], sandbox["released"], sandbox["notebook"]) == ("asleep", True, notebook)
    assert await new_kernel(gateway, notebook=notebook) == kernel_id
    client = await KernelClient.connect(gateway, kernel_id)
    await let_pass(gateway, kernel_id, "go")
    output = stream_text(await client.until("status", execution_state="idle"))
    while not output.endswith("2\n"):
        output += stream_text(await client.until("status", execution_state="idle"))
    assert output in ("1\n2\n", "0\n1\n2\n")
    assert stream_text(await client.run("print(x)")) == "kept\n"
    await client.close()
    assert (await request(gateway, "DELETE", f"/api/sandboxes/{kernel_id}")).code == 204
    again = await new_kernel(gateway, notebook=notebook)
    assert again != kernel_id
    await request(gateway, "DELETE", f"/api/sandboxes/{again}")


async def test_a_session_gets_its_kernel_back(gateway: RunningGateway) -> None:
    body = {"path": f"{uuid.uuid4()}/n.ipynb", "type": "notebook", "kernel": {}}
    session = json.loads((await request(gateway, "POST", "/api/sessions", body)).body)
    assert (await request(gateway, "DELETE", f"/api/sessions/{session['id']}")).code == 204
    assert (await request(gateway, "GET", f"/api/sessions/{session['id']}")).code == 404
    again = json.loads((await request(gateway, "POST", "/api/sessions", body)).body)
    assert again["kernel"]["id"] == session["kernel"]["id"]
    assert again["id"] != session["id"]
    await request(gateway, "DELETE", f"/api/sandboxes/{session['kernel']['id']}")


async def until_closed(client: KernelClient) -> list[Message]:
    """What the gateway still sends before it ends the connection."""
    messages = []
    while (message := await client.receive()) is not None:
        messages.append(message)
    return messages


def told(messages: list[Message]) -> str:
    """What was written to stderr."""
    streams = [m["content"] for m in messages if m["header"]["msg_type"] == "stream"]
    return "".join(content["text"] for content in streams if content["name"] == "stderr")


async def test_a_lost_machine_goes_on_from_its_checkpoint(state_dir: Path) -> None:
    gateway = start_gateway(state_dir, "--pool-size", "0")
    try:
        kernel_id = await new_kernel(gateway)
        client = await KernelClient.connect(gateway, kernel_id)
        await client.run("x = 'of the checkpoint'")
        assert (await request(gateway, "POST", f"/api/sandboxes/{kernel_id}/checkpoints")).code == 201
        await client.execute("x = 'lost'\nprint('begun', flush=True)\nwhile True: pass")
        seen = await client.until("stream")
        os.kill(vmm_of(gateway, kernel_id), signal.SIGKILL)
        seen = await client.until("status", execution_state="restarting")
        assert "goes on from its checkpoint of 20" in told(seen)
        # In the output of the cell that did not end.
        (word,) = [m for m in seen if m["header"]["msg_type"] == "stream"]
        assert word["parent_header"]["msg_type"] == "execute_request"
        late = await KernelClient.connect(gateway, kernel_id)
        assert "goes on from its checkpoint of 20" in told(await late.until("status", execution_state="restarting"))
        assert stream_text(await client.run("print(x)")) == "of the checkpoint\n"
        for each in (client, late):
            await each.close()
    finally:
        gateway.stop()


PRINTS = "import time\nfor i in range(400):\n    print(i, flush=True)\n    time.sleep(0.01)\n'done'"
PRINTED = "".join(f"{i}\n" for i in range(400))


async def test_a_stop_in_the_middle_of_a_cell_loses_nothing_and_it_goes_on_by_itself(state_dir: Path) -> None:
    gateway = start_gateway(state_dir, "--pool-size", "0")
    try:
        kernel_id = await new_kernel(gateway)
        client = await KernelClient.connect(gateway, kernel_id)
        msg_id = await client.execute(PRINTS)
        seen = await client.until("stream")
        for _ in range(2):
            gateway.process.send_signal(signal.SIGTERM)
            seen += await until_closed(client)
            assert client.websocket.close_code == 1001
            gateway.stop()
            gateway = start_gateway(state_dir, "--pool-size", "0", token=gateway.token)
            client = await KernelClient.connect(gateway, kernel_id, session_id=client.session_id)
            seen += await client.until("stream")
        # Nothing is sent: it was woken because it was in the middle of something.
        seen += await client.until("execute_result")
        wanted = {"idle", "execute_reply"}
        while wanted:
            message = await client.receive()
            assert message is not None
            seen.append(message)
            wanted -= {message["content"].get("execution_state"), message["header"]["msg_type"]}
        assert stream_text(seen) == PRINTED
        assert {message["parent_header"]["msg_id"] for message in seen} == {msg_id}
        await client.close()
    finally:
        gateway.stop()


async def test_what_a_client_that_is_away_has_not_seen_outlives_a_stop(state_dir: Path) -> None:
    gateway = start_gateway(state_dir, "--pool-size", "0")
    try:
        kernel_id = await new_kernel(gateway)
        client = await KernelClient.connect(gateway, kernel_id)
        await client.execute(PRINTS)
        seen = await client.until("stream")
        client.websocket.close()
        seen += await until_closed(client)
        gateway.stop()
        gateway = start_gateway(state_dir, "--pool-size", "0", token=gateway.token)
        client = await KernelClient.connect(gateway, kernel_id, session_id=client.session_id)
        seen += await client.until("execute_result")
        assert stream_text(seen) == PRINTED
        await client.close()
    finally:
        gateway.stop()
