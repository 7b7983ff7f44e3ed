"""Replies wait for their client; a kernel that went back answers the cell that asked for it."""

from __future__ import annotations

import asyncio
import json

import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from tests.unit.guest.conftest import KEY, client, run, waits_for
from tests.unit.guest.sandbox_host import SandboxHost, sandbox_host
from vm_runtime.guest.paths import CHANNEL_PORTS

host = pytest.fixture(sandbox_host)


def dealer(context: zmq.asyncio.Context, host: SandboxHost, channel: str) -> zmq.asyncio.Socket:
    """A client's socket with an identity of its own, as a gateway's that comes back."""
    socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
    socket.set(zmq.IDENTITY, b"the-client")
    socket.set(zmq.LINGER, 0)
    socket.connect(f"ipc://{host.paths.kernel_socket(CHANNEL_PORTS[channel])}")
    return socket


async def test_a_reply_waits_for_its_client_and_is_signed_with_the_new_key(host: SandboxHost) -> None:
    first, context = zmq.asyncio.Context(), zmq.asyncio.Context()
    session = Session(key=KEY.encode())
    shell = dealer(first, host, "shell")
    go = host.paths.home / "go"
    try:
        for code in (waits_for(go), "1 + 1"):
            session.send(shell, "execute_request", {"code": code, "silent": False})
        await host.wait_event(b"busy")
        first.destroy(linger=0)  # returns when its connection is closed
        go.touch()
        await host.wait_event(b"idle")
        await host.wait_event(b"idle")
        await host.begin(restored=True, kernel_key="second-key")
        async with client(host, key="second-key") as other:  # someone else's replies are not held up
            assert (await run(other, "print(2)"))[0] == "2\n"
        shell = dealer(context, host, "shell")
        renewed = Session(key=b"second-key")
        counts = []
        for _ in range(2):
            async with asyncio.timeout(60):
                _, frames = renewed.feed_identities(await shell.recv_multipart())
            counts.append(renewed.deserialize(frames)["content"]["execution_count"])
        assert counts == [1, 2]
    finally:
        context.destroy(linger=0)


async def test_the_restored_kernel_answers_the_cell_that_asked_to_go_back(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        await run(jupyter, "x = 1")
        cell = asyncio.ensure_future(run(jupyter, "%sandbox goto 1"))
        call = await host.next_call("goto")
        assert call.params["target"] == "1"
        reply_to = json.loads(json.dumps(call.params["reply_to"]))
        await host.call("kernel.stop", grace_s=0)
        await host.call("kernel.restart")  # stands for the older state, which never ran that cell
        answer = {"reply_to": reply_to, "text": "Went back to cell 1.\n"}
        await host.begin(restored=True, extra={"answer": answer})
        text, reply = await cell
    assert text == "Went back to cell 1.\n"
    assert (reply["status"], reply["execution_count"]) == ("ok", 0)


async def test_the_state_that_was_left_goes_on_when_one_returns_to_it(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        cell = asyncio.ensure_future(run(jupyter, "%sandbox goto 1\nprint('back again')"))
        await host.next_call("goto")
        await host.begin(restored=True)
        assert await cell == ("back again\n", (await cell)[1])
        assert (await cell)[1]["status"] == "ok"
