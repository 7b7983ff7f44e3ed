"""A kernel's endpoints on the host, before a real agent: connections that are greeted ahead, and who gets them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.session import Session

from kernels.channels import CLIENT_CHANNELS, KernelClients, greet_ahead
from kernels.endpoints import Endpoints
from tests.unit.guest.conftest import KEY, Host, run
from vm_runtime.wire.stream import Stream


class Kernel:
    """Endpoints of a kernel that was greeted ahead. opened: the channels that were opened since."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.opened: list[str] = []
        self.asked = asyncio.Event()
        self.clients = KernelClients(self.asked.set)
        self.endpoints = Endpoints(host.paths.run / "e", self.clients)

    async def open_channel(self, name: str) -> Stream:
        self.opened.append(name)
        assert self.host.link is not None
        return await self.host.link.open("kernel.channel", {"channel": name})

    async def attach(self) -> None:
        self.clients.attach(self.open_channel, await greet_ahead(self.open_channel))
        self.opened.clear()

    async def leave(self) -> int:
        """As before a sleep: the number of requests that the kernel has not answered."""
        answer = await self.clients.quiesce(lambda: self.host.call("kernel.quiesce", quiet=True))
        await self.clients.detach()
        unanswered: int = answer["unanswered"]
        return unanswered

    async def come_back(self) -> None:
        """As after a wake."""
        await self.host.hello(extra={"quiet": True})
        self.clients.attach(self.open_channel)
        await self.clients.rejoined()
        await self.host.call("kernel.quiesce", quiet=False)

    @property
    def info(self) -> dict[str, Any]:
        return self.endpoints.connection_info(KEY)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncKernelClient]:
        jupyter = AsyncKernelClient()
        jupyter.load_connection_info(self.info)  # type: ignore[arg-type]
        jupyter.start_channels(hb=False)
        try:
            await jupyter.wait_for_ready(timeout=120)
            yield jupyter
        finally:
            jupyter.stop_channels()


@pytest.fixture
async def kernel(host: Host) -> AsyncIterator[Kernel]:
    await host.call("kernel.start", key=KEY, env={}, cwd=None)
    kernel = Kernel(host)
    await kernel.endpoints.start()
    await kernel.attach()
    yield kernel
    await kernel.endpoints.close()
    await kernel.clients.detach()


async def test_the_first_client_takes_over_and_the_second_has_its_own(kernel: Kernel) -> None:
    async with kernel.client() as first:
        assert kernel.opened == []
        text, _ = await run(first, "print('first'); 1 + 1")
        assert text == "first\n2"
        async with kernel.client() as second:
            assert sorted(kernel.opened) == sorted(CLIENT_CHANNELS)
            text, _ = await run(second, "_ + 1")
            assert text == "3"
        text, _ = await run(first, "print('still there')")
        assert text == "still there\n"


async def test_input_finds_its_way_through_greeted_connections(kernel: Kernel) -> None:
    async with kernel.client() as jupyter:
        jupyter.execute("print(input('? '))")
        request = await jupyter.get_stdin_msg(timeout=30)
        assert request["content"]["prompt"] == "? "
        jupyter.input("answer")
        async with asyncio.timeout(30):
            while (message := await jupyter.get_iopub_msg())["msg_type"] != "stream":
                pass
        assert message["content"]["text"] == "answer\n"


async def test_one_that_goes_before_it_has_said_who_it_is_takes_only_its_own_along(kernel: Kernel) -> None:
    for name in ("shell", "iopub"):
        path = f"{kernel.info['ip']}-{kernel.info[f'{name}_port']}"
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b"\xff")
        writer.close()
        await writer.wait_closed()
    async with kernel.client() as jupyter:
        text, _ = await run(jupyter, "1")
        assert text == "1"


async def test_a_restart_drops_what_was_greeted(kernel: Kernel) -> None:
    await kernel.host.call("kernel.restart", env={})
    await kernel.clients.reconnect()
    async with kernel.client() as jupyter:
        assert sorted(kernel.opened) == sorted(CLIENT_CHANNELS)
        text, _ = await run(jupyter, "1")
        assert text == "1"


async def test_given_up_while_they_open_they_leave_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "e"
    opening = asyncio.create_task(Endpoints(directory, KernelClients(lambda: None)).start())
    while not list(directory.glob("k-*")):  # noqa: ASYNC110 (nothing tells)
        await asyncio.sleep(0)
    assert not opening.done()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert list(directory.iterdir()) == []


async def test_libzmq_does_not_hang_up_on_who_waits(kernel: Kernel) -> None:
    async with kernel.client() as jupyter:
        code = (
            "import zmq; app = get_ipython().kernel.parent\n"
            "[s.getsockopt(zmq.HANDSHAKE_IVL) for s in"
            " (app.shell_socket, app.control_socket, app.stdin_socket, app.iopub_thread.socket)]"
        )
        text, _ = await run(jupyter, code)
        assert text == "[0, 0, 0, 0]"


@pytest.mark.parametrize("wait_ms", [0, 1, 3, 10, 30])
async def test_a_request_in_any_moment_of_leaving_is_answered_once(kernel: Kernel, wait_ms: int) -> None:
    async with kernel.client() as jupyter:
        await run(jupyter, "ran = []")
        for number in range(6):
            leaving = asyncio.create_task(kernel.leave())
            await asyncio.sleep(wait_ms / 1000)
            msg_id = jupyter.execute(f"ran.append({number}); print({number})")
            await leaving
            await kernel.come_back()
            assert await rest_of(jupyter, msg_id) == f"{number}\n"
        assert (await run(jupyter, "ran"))[0] == "[0, 1, 2, 3, 4, 5]"


async def test_a_cell_that_prints_loses_nothing_while_its_host_comes_and_goes(kernel: Kernel) -> None:
    async with kernel.client() as jupyter, kernel.client() as other:
        await run(jupyter, "import time")
        msg_id = jupyter.execute("for i in range(200):\n    print(i, flush=True)\n    time.sleep(0.005)")
        rounds, text = 0, ""
        while not text.endswith("199\n"):
            text += await some_output(jupyter, msg_id)
            await kernel.leave()
            await kernel.come_back()
            rounds += 1
        assert text == "".join(f"{i}\n" for i in range(200))
        assert rounds > 2
        assert await rest_of(jupyter, msg_id) == ""
        # Nobody is served before all are subscribed again.
        assert (await run(other, "1"))[0] == "1"
        msg_id = other.execute("print('for both')")
        await kernel.leave()
        await kernel.come_back()
        assert await output_of(jupyter, msg_id) == await output_of(other, msg_id) == "for both\n"


async def test_what_a_client_asks_while_there_is_no_machine_waits_and_asks_for_one(kernel: Kernel) -> None:
    async with kernel.client() as jupyter:
        assert await kernel.leave() == 0
        opened = len(kernel.opened)
        assert not kernel.asked.is_set()
        msg_id = jupyter.execute("print('later')")
        async with asyncio.timeout(20):
            await kernel.asked.wait()
        assert kernel.clients.has_request
        assert len(kernel.opened) == opened
        await kernel.come_back()
        assert await rest_of(jupyter, msg_id) == "later\n"
        assert not kernel.clients.has_request


async def test_a_reply_from_after_the_host_has_left_waits_for_its_client(kernel: Kernel) -> None:
    async with kernel.client() as jupyter:
        msg_id = jupyter.execute("import time; time.sleep(0.3); print('done')")
        await busy(jupyter, msg_id)
        assert await kernel.leave() == 1
        await until_unanswered(kernel, 0, quiet=True)
        await kernel.come_back()
        assert await rest_of(jupyter, msg_id) == "done\n"


async def test_every_request_that_is_not_answered_counts(kernel: Kernel) -> None:
    async with kernel.client() as jupyter:
        code = (
            "import comm, time\n"
            "comm.get_comm_manager().register_target('slow', lambda c, m: c.on_msg(lambda m: time.sleep(0.5)))"
        )
        await run(jupyter, code)
        await until_unanswered(kernel, 0)
        jupyter.shell_channel.send(jupyter.session.msg("comm_open", {"comm_id": "c", "target_name": "slow"}))
        msg = jupyter.session.msg("comm_msg", {"comm_id": "c", "data": {}})
        jupyter.shell_channel.send(msg)
        await busy(jupyter, msg["header"]["msg_id"])
        msg_id = jupyter.execute("1")
        await until_unanswered(kernel, 2)
        await rest_of(jupyter, msg_id)
        await until_unanswered(kernel, 0)


async def until_unanswered(kernel: Kernel, count: int, *, quiet: bool = False) -> None:
    """Waits until the kernel has so many requests that it has not answered."""
    async with asyncio.timeout(20):
        while (await kernel.host.call("kernel.quiesce", quiet=quiet))["unanswered"] != count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # nothing tells


async def busy(jupyter: AsyncKernelClient, msg_id: str) -> None:
    """Waits until the kernel has begun with a request."""
    async with asyncio.timeout(20):
        while (message := await jupyter.get_iopub_msg())["parent_header"].get("msg_id") != msg_id:
            pass
    assert message["content"]["execution_state"] == "busy"


async def rest_of(jupyter: AsyncKernelClient, msg_id: str) -> str:
    """What a cell still prints, up to its end and its reply."""
    text = await output_of(jupyter, msg_id)
    async with asyncio.timeout(20):
        while (await jupyter.get_shell_msg())["parent_header"]["msg_id"] != msg_id:
            pass
    return text


async def some_output(jupyter: AsyncKernelClient, msg_id: str) -> str:
    """The next that a cell prints."""
    async with asyncio.timeout(60):
        while True:
            message = await jupyter.get_iopub_msg()
            if message["msg_type"] == "stream" and message["parent_header"].get("msg_id") == msg_id:
                return str(message["content"]["text"])


async def output_of(jupyter: AsyncKernelClient, msg_id: str) -> str:
    text = ""
    async with asyncio.timeout(60):
        while True:
            message: dict[str, Any] = await jupyter.get_iopub_msg()
            if message["parent_header"].get("msg_id") == msg_id:
                text += str(message["content"].get("text", ""))
                if message["content"].get("execution_state") == "idle":
                    return text


async def test_each_subscriber_is_welcomed(kernel: Kernel) -> None:
    context = zmq.asyncio.Context()
    session = Session(key=KEY.encode())
    try:
        for _ in range(3):
            iopub = context.socket(zmq.SUB)
            iopub.subscribe(b"")
            iopub.connect(f"ipc://{kernel.info['ip']}-{kernel.info['iopub_port']}")
            async with asyncio.timeout(60):
                _, frames = session.feed_identities(await iopub.recv_multipart())
            assert session.deserialize(frames)["msg_type"] == "iopub_welcome"
    finally:
        context.destroy(linger=0)
