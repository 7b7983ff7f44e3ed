"""A client's channels: to real kernels, and to hostile ones at the other end of a wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.session import Session

from kernels import channel_socket
from kernels.channel_socket import HIGH_WATER_BYTES
from kernels.channels import MAX_SOCKETS, KernelChannels, KernelClients
from kernels.directories import run_dir_of
from kernels.errors import LimitError
from kernels.zmtp import GREETING, Message, Ready, ZmtpConnection
from tests.unit.kernels.conftest import LIMIT_S, Service
from tests.unit.wire.conftest import join
from vm_runtime.wire.stream import Incoming, Stream


class Client:
    """Of a sandbox's kernel, by its channels."""

    def __init__(self, kernels: Service, sandbox_id: str, name: str = "me") -> None:
        self.channels = kernels.channels(sandbox_id, name)
        self.session = Session(key=kernels.registry.record(sandbox_id).key.encode())

    async def ask(self, code: str, *, channel: str = "shell", allow_stdin: bool = False) -> str:
        """Sends a cell; its id."""
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": allow_stdin}
        request = self.session.msg("execute_request", content)
        await self.channels.send(channel, self.session.serialize(request))
        return str(request["header"]["msg_id"])

    async def rest_of(self, *msg_ids: str) -> str:
        """What cells print, up to the ends and the replies of all of them."""
        return await self._until({(msg_id, what) for msg_id in msg_ids for what in ("shell", "idle")})

    async def output_of(self, msg_id: str) -> str:
        """What a cell prints, which may be another client's."""
        return await self._until({(msg_id, "idle")})

    async def _until(self, wanted: set[tuple[str, str]]) -> str:
        text, msg_ids = "", {msg_id for msg_id, _ in wanted}
        async with asyncio.timeout(LIMIT_S):
            while wanted:
                channel, message = await self.next()
                msg_id = message["parent_header"].get("msg_id")
                if msg_id in msg_ids:
                    text += str(message["content"].get("text", ""))
                    wanted -= {(msg_id, channel), (msg_id, message["content"].get("execution_state"))}
        return text

    async def next(self) -> tuple[str, dict[str, Any]]:
        channel, parts = await anext(self.channels)
        return channel, self.session.deserialize(self.session.feed_identities(parts)[1])

    async def run(self, code: str) -> str:
        return await self.rest_of(await self.ask(code))


@pytest.fixture
async def sandbox_id(kernels: Service) -> str:
    return await kernels.new()


async def test_cells_pass_in_order_and_input_finds_its_way(kernels: Service, sandbox_id: str) -> None:
    client = Client(kernels, sandbox_id)
    ids = [await client.ask(f"print({number})") for number in range(5)]
    assert await client.rest_of(*ids) == "".join(f"{number}\n" for number in range(5))
    asked = await client.ask("print(input('? '))", allow_stdin=True)
    async with asyncio.timeout(LIMIT_S):
        while (await client.next())[0] != "stdin":
            pass
    reply = client.session.msg("input_reply", {"value": "yes"})
    await client.channels.send("stdin", client.session.serialize(reply))
    assert await client.rest_of(asked) == "yes\n"
    client.channels.close()


async def test_they_stay_while_the_machine_goes_and_the_kernel_restarts(kernels: Service, sandbox_id: str) -> None:
    client = Client(kernels, sandbox_id)
    await client.run("1")
    await kernels.lifecycle.sleep(sandbox_id)
    assert await client.run("x = 1; print(x)") == "1\n"  # which wakes it
    await kernels.restart(sandbox_id)
    assert await client.run("print('x' in globals())") == "False\n"
    client.channels.close()


async def test_what_a_client_has_asked_is_done_though_it_has_gone(kernels: Service, sandbox_id: str) -> None:
    client, other = Client(kernels, sandbox_id), Client(kernels, sandbox_id, "other")
    await client.run("1")
    msg_id = await client.ask("print('asked')")
    client.channels.close()
    assert await other.output_of(msg_id) == "asked\n"
    await kernels.lifecycle.sleep(sandbox_id)
    late = Client(kernels, sandbox_id, "late")
    msg_id = await late.ask("print('asked of a sleeping one')")
    late.channels.close()
    assert await other.output_of(msg_id) == "asked of a sleeping one\n"
    with pytest.raises(StopAsyncIteration):
        await anext(late.channels)
    other.channels.close()


async def test_one_that_becomes_another_misses_no_output_and_gets_its_own_replies(
    kernels: Service, sandbox_id: str
) -> None:
    client = Client(kernels, sandbox_id)
    msg_id = await client.ask("import time\nfor i in range(20):\n    print(i, flush=True)\n    time.sleep(0.01)")
    text = ""
    while not text:
        text += (await client.next())[1]["content"].get("text", "")
    client.channels.become(b"other")
    channels = set()
    async with asyncio.timeout(LIMIT_S):
        while True:
            channel, message = await client.next()
            channels.add(channel)
            text += message["content"].get("text", "")
            if message["content"].get("execution_state") == "idle" and message["parent_header"]["msg_id"] == msg_id:
                break
    assert text == "".join(f"{i}\n" for i in range(20))
    assert channels == {"iopub"}
    assert await client.run("print('mine')") == "mine\n"
    client.channels.close()


async def test_a_kernel_waits_for_a_client_that_takes_less_than_it_sends(kernels: Service, sandbox_id: str) -> None:
    client = Client(kernels, sandbox_id)
    await client.run("1")
    size = 20_000_000
    await client.ask(f"import sys; sys.stdout.write('0123456789' * {size // 10}); None")
    inbox, most, text = client.channels._inbox, 0, ""
    async with asyncio.timeout(LIMIT_S):
        while inbox.byte_count < HIGH_WATER_BYTES:
            await inbox.change()
        while len(text) < size:
            most = max(most, inbox.byte_count)
            text += (await client.next())[1]["content"].get("text", "")
    assert text == "0123456789" * (size // 10)
    assert most < HIGH_WATER_BYTES + 500_000  # with the message that was too much
    client.channels.close()


async def test_its_endpoints_are_there_for_who_asks_for_them_and_again_after_a_restart_of_the_gateway(
    kernels: Service, sandbox_id: str, state_dir: Path
) -> None:
    directory = run_dir_of(state_dir) / "k"
    client = Client(kernels, sandbox_id)
    await client.run("1")
    assert not directory.exists()
    assert await kernels.run(sandbox_id, "print(2)") == "2\n"
    (own,) = directory.iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    await kernels.machines.close_endpoints()
    assert list(own.iterdir()) == []
    assert kernels.machines.had_endpoints(sandbox_id)
    client.channels.close()
    await kernels.delete(sandbox_id)
    assert not own.exists()


# Hostile kernels


Answer = Callable[[Stream], Awaitable[None]]


@asynccontextmanager
async def kernel_that(answer: Answer) -> AsyncIterator[KernelClients]:
    """Clients of a kernel whose sockets `answer`."""

    async def on_open(incoming: Incoming) -> None:
        await answer(await incoming.accept())

    clients = KernelClients(lambda: None)
    async with join() as (host, guest):
        guest.on_open = on_open
        clients.attach(lambda name: host.open("kernel.channel", {"channel": name}))
        yield clients
        await clients.detach()


async def greeted(stream: Stream) -> ZmtpConnection:
    """The kernel's end, when both have said READY."""
    ours, events = ZmtpConnection(b"ROUTER"), list[object]()
    await stream.write(ours.data_to_send())
    while not any(isinstance(event, Ready) for event in events):
        events += ours.receive_data(await stream.read())
        await stream.write(ours.data_to_send())
    return ours


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_socket, "RECONNECT_S", 0.001)
    monkeypatch.setattr("kernels.channels.KNOWN_LIMIT_S", 0.01)


@pytest.mark.parametrize(
    "nonsense",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", GREETING + b"\x00\x01x", GREETING + b"\x04\x06\x05READY\x02" + b"\xff" * 8],
    ids=["no greeting", "no READY", "terabytes"],
)
async def test_a_socket_that_talks_nonsense_is_hung_up_and_tried_again(nonsense: bytes) -> None:
    calls = 0

    async def answer(stream: Stream) -> None:
        nonlocal calls
        calls += 1
        if calls <= 4:
            await stream.write(nonsense)
            while await stream.read():
                pass
            return
        ours = await greeted(stream)
        ours.send_message([b"sound"])
        await stream.write(ours.data_to_send())
        await stream.read()

    async with kernel_that(answer) as clients, asyncio.timeout(20):
        channels = clients.channels(b"me", ("shell",))
        assert await anext(channels) == ("shell", [b"sound"])
        assert calls > 4
        channels.close()


async def test_a_message_that_is_cut_off_is_sent_again_and_one_that_was_passed_is_not() -> None:
    messages: list[list[bytes]] = []
    calls = 0

    async def answer(stream: Stream) -> None:
        nonlocal calls
        calls += 1
        ours = await greeted(stream)
        if calls == 1:
            await stream.read(1000)
            stream.reset()
            return
        while data := await stream.read():
            messages.extend(event.parts for event in ours.receive_data(data) if isinstance(event, Message))

    large = [b"large", bytes(2_000_000)]
    async with kernel_that(answer) as clients, asyncio.timeout(20):
        channels = clients.channels(b"me", ("shell",))
        await channels.send("shell", large)
        await until_passed(clients)
        await channels.send("shell", [b"small"])
        await until_passed(clients)
        channels.close()
        await clients.detach()
    assert calls == 2
    assert messages == [large, [b"small"]]


async def until_passed(clients: KernelClients) -> None:
    while clients.has_request:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.001)


async def test_what_waits_for_a_machine_is_bounded() -> None:
    clients = KernelClients(lambda: None)
    channels: KernelChannels = clients.channels(b"me")
    sent = 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            while True:
                await channels.send("shell", [bytes(1000)])
                sent += 1
    assert 200 < sent < 300
    with pytest.raises(LimitError):
        for _ in range(MAX_SOCKETS):
            clients.channels(b"other")
    channels.close()
    await channels.send("shell", [b"dropped"])
