"""Requests around a sleep: none is lost, what is unanswered keeps a sandbox awake, and what is asked wakes it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient

from kernels.models import SandboxState
from tests.unit.kernels.conftest import LIMIT_S, Service


async def reply_to(client: AsyncKernelClient, message_id: str) -> dict[str, Any]:
    """Waits for the reply to a request."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            reply: dict[str, Any] = await client.get_shell_msg()
            if reply["parent_header"]["msg_id"] == message_id:
                return reply


@pytest.mark.parametrize("wait_ms", [0, 5, 20, 50])
async def test_what_is_asked_in_any_moment_of_a_sleep_is_answered(kernels: Service, wait_ms: int) -> None:
    sandbox_id = await kernels.new()
    async with kernels.client(sandbox_id) as client:
        await client.wait_for_ready(timeout=LIMIT_S)
        for _ in range(3):
            sleeping = asyncio.create_task(kernels.lifecycle.sleep(sandbox_id))
            await asyncio.sleep(wait_ms / 1000)
            reply = await reply_to(client, client.execute("1 + 1"))
            assert reply["content"]["status"] == "ok"
            await sleeping


async def test_what_is_asked_of_a_paused_sandbox_waits_and_wakes_it_when_it_is_put_to_sleep(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    async with kernels.client(sandbox_id) as client:
        await client.wait_for_ready(timeout=LIMIT_S)
        await kernels.lifecycle.pause(sandbox_id)
        message_id = client.execute("1 + 1")
        await kernels.lifecycle.resume(sandbox_id)
        assert (await reply_to(client, message_id))["content"]["status"] == "ok"
        await kernels.lifecycle.pause(sandbox_id)
        message_id = client.execute("1 + 1")
        async with asyncio.timeout(LIMIT_S):
            while not kernels.machines.has_request(sandbox_id):  # noqa: ASYNC110 - it is on its way through ZMQ
                await asyncio.sleep(0.01)
        await kernels.lifecycle.sleep(sandbox_id)
        assert (await reply_to(client, message_id))["content"]["status"] == "ok"
        assert kernels.get(sandbox_id).state is SandboxState.RUNNING


async def test_a_sandbox_with_something_to_answer_does_not_fall_asleep(kernels: Service) -> None:
    sandbox_id = await kernels.new(idle_timeout_s=0.5)
    async with kernels.client(sandbox_id) as client:
        await client.wait_for_ready(timeout=LIMIT_S)
        code = (
            "import comm, time\n"
            "comm.get_comm_manager().register_target('slow', lambda c, m: c.on_msg(lambda m: time.sleep(3)))"
        )
        await reply_to(client, client.execute(code))
        states = []

        async def watch() -> None:
            async with kernels.bus.subscribe() as events:
                async for event in events:
                    states.append(event.data.get("state"))

        watching = asyncio.create_task(watch())
        # No cell runs, and nobody sends anything, but a widget's callback does something.
        client.shell_channel.send(client.session.msg("comm_open", {"comm_id": "c", "target_name": "slow"}))
        client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": "c", "data": {}}))
        await reply_to(client, client.execute("1 + 1"))
        assert SandboxState.ASLEEP not in states
        watching.cancel()
        await kernels.until(lambda: kernels.get(sandbox_id).state is SandboxState.ASLEEP)


async def test_an_interrupt_of_nothing_wakes_nobody(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.lifecycle.sleep(sandbox_id)
    await kernels.interrupt(sandbox_id)
    assert kernels.get(sandbox_id).state is SandboxState.ASLEEP


async def test_a_wake_that_fails_is_an_event_and_the_next_request_tries_again(kernels: Service, driver: Any) -> None:
    sandbox_id = await kernels.new()
    async with kernels.client(sandbox_id) as client:
        await client.wait_for_ready(timeout=LIMIT_S)
        await kernels.lifecycle.sleep(sandbox_id)
        driver.refuses = "It is not to be."
        async with kernels.bus.subscribe() as events, asyncio.timeout(LIMIT_S):
            first = client.execute("1")
            async for event in events:
                if event.kind == "wake_failed":
                    break
        assert "It is not to be." in event.data["reason"]
        assert event.data["no_room"] is False
        driver.refuses = None
        second = client.execute("2")
        for message_id in (first, second):
            assert (await reply_to(client, message_id))["content"]["status"] == "ok"
