"""The WebSocket, over a real gateway and a real kernel."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from tests.gateways import RunningGateway
from tests.unit.gateway.client import KernelClient, request, stream_text


@pytest.fixture
async def kernel_id(gateway: RunningGateway) -> AsyncIterator[str]:
    response = await request(gateway, "POST", "/api/kernels", {})
    assert response.code == 201, response.body
    kernel_id: str = json.loads(response.body)["id"]
    yield kernel_id
    await request(gateway, "DELETE", f"/api/kernels/{kernel_id}")


async def until_idle(gateway: RunningGateway, kernel_id: str) -> None:
    """Waits until the kernel's cell has ended."""
    state = ""
    async with asyncio.timeout(60):
        while state != "idle":
            await asyncio.sleep(0.05)
            state = json.loads((await request(gateway, "GET", f"/api/kernels/{kernel_id}")).body)["execution_state"]


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "legacy"])
async def test_a_cell_in_both_forms(gateway: RunningGateway, kernel_id: str, v1: bool) -> None:
    client = await KernelClient.connect(gateway, kernel_id, v1=v1)
    messages = await client.run("print('é😀')\n6 * 7")
    assert stream_text(messages) == "é😀\n"
    assert [m["content"]["data"] for m in messages if m["header"]["msg_type"] == "execute_result"] == [
        {"text/plain": "42"}
    ]
    if not v1:
        assert all(m["msg_id"] == m["header"]["msg_id"] for m in messages)
    await client.close()


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "legacy"])
async def test_buffers_in_both_forms(gateway: RunningGateway, kernel_id: str, v1: bool) -> None:
    client = await KernelClient.connect(gateway, kernel_id, v1=v1)
    code = "from comm import create_comm\ncreate_comm('t', data={'a': 1}, buffers=[b'a\\0b', b'c'])"
    messages = await client.run(code)
    (opened,) = [m for m in messages if m["header"]["msg_type"] == "comm_open"]
    assert [bytes(buffer) for buffer in opened["buffers"]] == [b"a\0b", b"c"]
    await client.close()


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "legacy"])
async def test_thousands_of_buffers_go_both_ways(gateway: RunningGateway, kernel_id: str, v1: bool) -> None:
    client = await KernelClient.connect(gateway, kernel_id, v1=v1)
    await client.run(
        "def opened(comm, message): comm.send({}, buffers=message['buffers'])\n"
        "get_ipython().kernel.comm_manager.register_target('echo', opened)"
    )
    buffers = [str(number).encode() for number in range(10_000)]
    await client.send("comm_open", {"comm_id": "c", "target_name": "echo", "data": {}}, buffers=buffers)
    (answer,) = [m for m in await client.until("comm_msg") if m["header"]["msg_type"] == "comm_msg"]
    assert [bytes(buffer) for buffer in answer["buffers"]] == buffers
    await client.close()


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "legacy"])
async def test_what_is_no_utf8_breaks_no_connection(gateway: RunningGateway, kernel_id: str, v1: bool) -> None:
    client = await KernelClient.connect(gateway, kernel_id, v1=v1)
    # A kernel that packs its messages as it likes.
    pack = "lambda v: json.dumps(v, ensure_ascii=False, default=str).encode('utf-8', 'surrogateescape')"
    await client.run(f"import json; get_ipython().kernel.session.pack = {pack}")
    assert stream_text(await client.run("print('a\\udcffb')")) == "a\ufffdb\n"
    assert stream_text(await client.run("print(1)")) == "1\n"
    await client.close()


async def test_input_is_answered(gateway: RunningGateway, kernel_id: str) -> None:
    client = await KernelClient.connect(gateway, kernel_id)
    await client.execute("print('hello', input('name? '))")
    await client.until("input_request", prompt="name? ")
    await client.send("input_reply", {"value": "Ada"}, channel="stdin")
    assert stream_text(await client.until("status", execution_state="idle")) == "hello Ada\n"
    await client.close()


async def test_an_interrupt_reaches_the_cell(gateway: RunningGateway, kernel_id: str) -> None:
    client = await KernelClient.connect(gateway, kernel_id)
    await client.execute("print('started', flush=True)\nwhile True: pass")
    await client.until("stream")
    assert (await request(gateway, "POST", f"/api/kernels/{kernel_id}/interrupt", {})).code == 204
    reply = (await client.until("execute_reply"))[-1]
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    await client.close()


async def test_the_same_session_misses_nothing(gateway: RunningGateway, kernel_id: str) -> None:
    first = await KernelClient.connect(gateway, kernel_id)
    await first.execute("import time\nfor i in range(8):\n    print(i, flush=True)\n    time.sleep(0.5)")
    seen = stream_text(await first.until("stream"))
    await first.close()
    await until_idle(gateway, kernel_id)
    again = await KernelClient.connect(gateway, kernel_id, session_id=first.session_id)
    seen += stream_text(await again.until("status", execution_state="idle"))
    assert seen == "".join(f"{i}\n" for i in range(8))
    await again.close()


async def test_from_the_moment_of_its_opening_a_listener_misses_nothing(
    gateway: RunningGateway, kernel_id: str
) -> None:
    client = await KernelClient.connect(gateway, kernel_id)
    for number in range(5):
        listener = await KernelClient.connect(gateway, kernel_id)
        await client.execute(f"print({number})")
        assert stream_text(await listener.until("status", execution_state="idle")) == f"{number}\n"
        await client.until("status", execution_state="idle")
        await listener.close()
    await client.close()


async def test_what_a_session_sends_again_after_a_break_runs_once(gateway: RunningGateway, kernel_id: str) -> None:
    client = await KernelClient.connect(gateway, kernel_id)
    count = "count = globals().get('count', 0) + 1"
    msg_id = await client.execute(count)
    await client.until("execute_reply")
    for close_first in (True, False, True):
        if close_first:
            await client.close()
        again = await KernelClient.connect(gateway, kernel_id, session_id=client.session_id)
        await again.execute(count, msg_id=msg_id)
        assert stream_text(await again.run("print(count)")) == "1\n"
        client = again
    await client.close()


async def test_another_session_gets_the_output_but_no_replies(gateway: RunningGateway, kernel_id: str) -> None:
    first = await KernelClient.connect(gateway, kernel_id)
    await first.execute("import time\nfor i in range(3):\n    print(i, flush=True)\n    time.sleep(0.5)")
    await first.until("stream")
    await first.close()
    await until_idle(gateway, kernel_id)
    other = await KernelClient.connect(gateway, kernel_id)
    messages = await other.until("status", execution_state="idle")
    assert stream_text(messages).endswith("2\n")
    assert {message["channel"] for message in messages} == {"iopub"}
    await other.close()


async def test_a_newer_connection_of_a_session_replaces_the_older(gateway: RunningGateway, kernel_id: str) -> None:
    older = await KernelClient.connect(gateway, kernel_id)
    newer = await KernelClient.connect(gateway, kernel_id, session_id=older.session_id)
    while not older.ended:
        await older.receive()
    assert older.websocket.close_code == 1000
    await older.close()
    assert stream_text(await newer.run("print(1)")) == "1\n"
    model = json.loads((await request(gateway, "GET", f"/api/kernels/{kernel_id}")).body)
    assert model["connections"] == 1
    await newer.close()


async def test_every_client_sees_a_restart_and_a_crash(gateway: RunningGateway, kernel_id: str) -> None:
    clients = [await KernelClient.connect(gateway, kernel_id, v1=v1) for v1 in (True, False)]
    await clients[0].run("x = 1")
    assert (await request(gateway, "POST", f"/api/kernels/{kernel_id}/restart", {})).code == 200
    assert stream_text(await clients[0].run("print('x' in globals())")) == "False\n"
    await clients[1].execute("import os; os._exit(1)")
    for client in clients:
        messages = await client.until("status", execution_state="restarting")
        assert messages[-1]["parent_header"] == {}
        errors = [each["content"]["ename"] for each in messages if each["header"]["msg_type"] == "execute_reply"]
        assert errors == (["KernelDied"] if client is clients[1] else [])
        assert stream_text(await client.run("print('alive')")) == "alive\n"
        await client.close()


async def test_fifty_megabytes_come_whole_in_messages_below_ten(gateway: RunningGateway, kernel_id: str) -> None:
    client = await KernelClient.connect(gateway, kernel_id)
    size = 50_000_000
    # The client is Tornado's with its default limit of 10 MiB: a larger message would end the connection.
    messages = await client.run(f"import sys\nsys.stdout.write('0123456789' * {size // 10});\nNone")
    assert stream_text(messages) == "0123456789" * (size // 10)
    await client.close()


async def test_what_is_no_message_ends_the_connection(gateway: RunningGateway, kernel_id: str) -> None:
    client = await KernelClient.connect(gateway, kernel_id)
    await client.websocket.write_message(b"junk", binary=True)
    while not client.ended:
        await client.receive()
    assert client.websocket.close_code == 1007
    assert "v1 message" in (client.websocket.close_reason or "")
    await client.close()


async def test_a_deleted_kernel_closes_its_connections(gateway: RunningGateway, kernel_id: str) -> None:
    client = await KernelClient.connect(gateway, kernel_id)
    assert (await request(gateway, "DELETE", f"/api/kernels/{kernel_id}")).code == 204
    while not client.ended:
        await client.receive()
    assert client.websocket.close_reason == "the kernel was deleted"
    await client.close()


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({"X-Forwarded-For": "203.0.113.1"}, "", 401),
        ({"Authorization": "token wrong", "X-Forwarded-For": "203.0.113.1"}, "", 401),
        ({"Origin": "https://evil.example"}, "token={token}", 403),
        ({}, "token={token}&session_id=a%2Fb", 400),
    ],
)
async def test_strangers_are_refused(
    gateway: RunningGateway, kernel_id: str, headers: dict[str, str], query: str, status: int
) -> None:
    url = f"{gateway.url.replace('http', 'ws', 1)}/api/kernels/{kernel_id}/channels?"
    with pytest.raises(HTTPClientError) as refused:
        await websocket_connect(HTTPRequest(url + query.format(token=gateway.token), headers=headers))
    assert refused.value.code == status


async def test_an_unknown_kernel_is_refused(gateway: RunningGateway) -> None:
    with pytest.raises(HTTPClientError) as refused:
        await KernelClient.connect(gateway, str(uuid.uuid4()))
    assert refused.value.code == 404
