"""What a user meets when something is wrong: token, gateway, id, a dead machine, a gateway that is restarted."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from pathlib import Path

import pytest

from hypercell import (
    AsyncSandbox,
    ClosedError,
    HypercellError,
    LimitError,
    NoGatewayError,
    NotFoundError,
    Sandbox,
    TokenError,
)
from tests.gateways import RunningGateway, start_gateway


def test_a_wrong_token(at_gateway: RunningGateway) -> None:
    with pytest.raises(TokenError, match="HYPERCELL_TOKEN") as raised:
        Sandbox.list(url=at_gateway.url, token="wrong")
    assert raised.value.status == 401


async def test_a_wrong_token_on_a_websocket(at_gateway: RunningGateway, sandbox: Sandbox) -> None:
    from hypercell.aio.transport import Transport
    from hypercell.locate import Gateway

    async with Transport.leased(Gateway(url=at_gateway.url, token="wrong")) as transport:
        with pytest.raises(TokenError):
            await transport.connect(f"/api/sandboxes/{sandbox.id}/exec")


def test_no_gateway_is_told_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(NoGatewayError, match="does not answer"):
        Sandbox.create(url=url, token="any")
    assert time.monotonic() - began < 5


def test_an_unknown_id(at_gateway: RunningGateway) -> None:
    with pytest.raises(NotFoundError, match="no sandbox with the id") as raised:
        Sandbox.connect(str(uuid.uuid4()))
    assert raised.value.code == "sandbox_not_found"
    with pytest.raises(NotFoundError):
        Sandbox.create(template="no-such-template")
    with pytest.raises(NotFoundError):
        Sandbox.create(snapshot="no-such-snapshot")


def test_more_than_the_maximum(at_gateway: RunningGateway) -> None:
    with pytest.raises(LimitError, match="memory_mib"):
        Sandbox.create(memory_mib=10_000_000)


def test_a_sandbox_that_is_gone(at_gateway: RunningGateway) -> None:
    sandbox = Sandbox.create(checkpoints="off")
    sandbox.run_code("1")
    with Sandbox.connect(sandbox.id) as other:
        other.kill()
    for use in (lambda: sandbox.run_code("1"), sandbox.info, lambda: sandbox.commands.run("true")):
        with pytest.raises(NotFoundError):
            use()
    sandbox.kill()
    for use in (lambda: sandbox.run_code("1"), sandbox.info):
        with pytest.raises(ClosedError, match="was closed"):
            use()


async def test_a_sandbox_that_goes_while_code_runs(at_gateway: RunningGateway) -> None:
    sandbox = await AsyncSandbox.create(checkpoints="off")
    began = asyncio.Event()
    code = "print('on', flush=True)\nimport time; time.sleep(600)"
    running = asyncio.create_task(sandbox.run_code(code, on_stdout=lambda text: began.set()))
    await began.wait()
    async with await AsyncSandbox.connect(sandbox.id) as other:
        await other.kill()
    with pytest.raises(HypercellError):
        await asyncio.wait_for(running, 60)
    await sandbox.close()


def test_the_blocking_api_says_where_it_cannot_be_used(sandbox: Sandbox) -> None:
    from hypercell.blocking.portal import BlockingCall

    async def inside() -> None:
        sandbox.info()

    with pytest.raises(HypercellError, match="AsyncSandbox"):
        BlockingCall().run(inside())


async def test_a_gateway_restarted_in_the_middle_loses_nothing(state_dir: Path) -> None:
    first = start_gateway(state_dir, "--pool-size", "0")
    port = first.url.rpartition(":")[2]
    try:
        async with await AsyncSandbox.create(url=first.url, token=first.token, checkpoints="off") as sandbox:
            began = asyncio.Event()
            code = "import time\nfor i in range(100): print(i, flush=True); time.sleep(0.1)\n'end'"
            running = asyncio.create_task(sandbox.run_code(code, on_stdout=lambda text: began.set()))
            await began.wait()
            await asyncio.to_thread(first.kill)
            first = await asyncio.to_thread(
                lambda: start_gateway(state_dir, "--pool-size", "0", "--port", port, token=first.token)
            )
            execution = await asyncio.wait_for(running, 120)
            assert execution.text == "'end'"
            assert (await sandbox.run_code("i")).text == "99"
            assert (await sandbox.info()).state == "running"
    finally:
        await asyncio.to_thread(first.stop)
