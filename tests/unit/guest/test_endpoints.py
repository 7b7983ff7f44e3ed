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

from kernels.endpoints import GREETED_CHANNELS, Endpoints, greet_ahead
from tests.unit.guest.conftest import KEY, Host, run
from vm_runtime.wire.stream import Stream


class Kernel:
    """Endpoints of a kernel that was greeted ahead. opened: the channels that were opened since."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.opened: list[str] = []
        self.endpoints = Endpoints(host.paths.run / "e", lambda: None)

    async def open_channel(self, name: str) -> Stream:
        self.opened.append(name)
        assert self.host.link is not None
        return await self.host.link.open("kernel.channel", {"channel": name})

    async def attach(self) -> None:
        self.endpoints.attach(self.open_channel, await greet_ahead(self.open_channel))
        self.opened.clear()

    @property
    def info(self) -> dict[str, Any]:
        return self.endpoints.connection_info(KEY)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncKernelClient]:
        jupyter = AsyncKernelClient()
        jupyter.load_connection_info(self.info)  # type: ignore[arg-type]
        jupyter.start_channels(hb=False)
        try:
            await jupyter.wait_for_ready(timeout=30)
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


async def test_the_first_client_takes_over_and_the_second_has_its_own(kernel: Kernel) -> None:
    async with kernel.client() as first:
        assert kernel.opened == []
        text, _ = await run(first, "print('first'); 1 + 1")
        assert text == "first\n2"
        async with kernel.client() as second:
            assert sorted(kernel.opened) == sorted(GREETED_CHANNELS)
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
    await kernel.endpoints.drop_connections()
    async with kernel.client() as jupyter:
        assert sorted(kernel.opened) == sorted(GREETED_CHANNELS)
        text, _ = await run(jupyter, "1")
        assert text == "1"


async def test_given_up_while_they_open_they_leave_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "e"
    opening = asyncio.create_task(Endpoints(directory, lambda: None).start())
    while not list(directory.glob("k-*")):  # noqa: ASYNC110 (nothing tells)
        await asyncio.sleep(0)
    assert not opening.done()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not directory.exists()


async def test_libzmq_does_not_hang_up_on_who_waits(kernel: Kernel) -> None:
    async with kernel.client() as jupyter:
        code = (
            "import zmq; app = get_ipython().kernel.parent\n"
            "[s.getsockopt(zmq.HANDSHAKE_IVL) for s in"
            " (app.shell_socket, app.control_socket, app.stdin_socket, app.iopub_thread.socket)]"
        )
        text, _ = await run(jupyter, code)
        assert text == "[0, 0, 0, 0]"


async def test_each_subscriber_is_welcomed(kernel: Kernel) -> None:
    context = zmq.asyncio.Context()
    session = Session(key=KEY.encode())
    try:
        for _ in range(3):
            iopub = context.socket(zmq.SUB)
            iopub.subscribe(b"")
            iopub.connect(f"ipc://{kernel.info['ip']}-{kernel.info['iopub_port']}")
            async with asyncio.timeout(20):
                _, frames = session.feed_identities(await iopub.recv_multipart())
            assert session.deserialize(frames)["msg_type"] == "iopub_welcome"
    finally:
        context.destroy(linger=0)
