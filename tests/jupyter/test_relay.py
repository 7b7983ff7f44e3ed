"""Our relay when its connection to the gateway breaks: the browser's side stays, and nothing is lost or sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import websockets

from tests.gateways import GatewayAddress
from tests.jupyter.relay_server import V1, Channels, Server, running_server
from tests.jupyter.test_gateway_calls import OUR_RELAY

QUICK_RETRIES = "--GatewayClient.gateway_retry_interval=0.5"


@dataclass(frozen=True, kw_only=True)
class Address:
    url: str
    token: str


@asynccontextmanager
async def breakable_way_to(gateway: GatewayAddress) -> AsyncIterator[tuple[Address, Callable[[], None]]]:
    """A TCP port that leads to the gateway, and a function that breaks all connections through it."""
    target = urlsplit(gateway.url)
    writers: set[asyncio.StreamWriter] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(target.hostname, target.port)
        pair = {writer, upstream_writer}
        writers.update(pair)
        try:
            await asyncio.gather(copy(reader, upstream_writer), copy(upstream_reader, writer))
        finally:
            writers.difference_update(pair)

    def break_all() -> None:
        for writer in list(writers):
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Address(url=f"http://127.0.0.1:{port}", token=gateway.token), break_all
        break_all()


@asynccontextmanager
async def running_relay(gateway: GatewayAddress, directory: Path) -> AsyncIterator[Server]:
    """`running_server`, whose start and end must not block the event loop that carries its connections."""
    server = running_server(gateway, directory, OUR_RELAY, QUICK_RETRIES)
    running = await asyncio.to_thread(server.__enter__)
    try:
        yield running
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def test_a_broken_connection_is_made_anew_and_what_was_missed_arrives(
    gateway: GatewayAddress, tmp_path: Path
) -> None:
    async with breakable_way_to(gateway) as (address, break_all), running_relay(address, tmp_path) as server:
        created = await asyncio.to_thread(server.call, "POST", "/api/kernels", {"name": "python3"})
        kernel_id = created.json()["id"]
        try:
            async with server.connect(kernel_id, subprotocol=V1) as connection:
                channels = Channels(connection)
                assert await channels.output_of("print('before')") == "before\n"
                message_id = await channels.execute(
                    "import time\nfor i in range(30): print('step', i, flush=True); time.sleep(0.1)"
                )
                text = (await channels.receive_for(message_id, "stream"))["content"]["text"]
                break_all()
                while "step 29\n" not in text:
                    text += (await channels.receive_for(message_id, "stream"))["content"]["text"]
                assert text.splitlines() == [f"step {i}" for i in range(30)]
                break_all()
                # Sent while there may be no connection: it waits for the next one.
                assert await channels.output_of("print('after')") == "after\n"
        finally:
            await asyncio.to_thread(server.call, "DELETE", f"/api/kernels/{kernel_id}")


async def test_a_kernel_that_is_gone_closes_the_browser_s_side(gateway: GatewayAddress, tmp_path: Path) -> None:
    direct = Server(url=gateway.url, token=gateway.token)
    async with breakable_way_to(gateway) as (address, break_all), running_relay(address, tmp_path) as server:
        created = await asyncio.to_thread(server.call, "POST", "/api/kernels", {"name": "python3"})
        kernel_id = created.json()["id"]
        async with server.connect(kernel_id, subprotocol=V1) as connection:
            assert await Channels(connection).output_of("print('here')") == "here\n"
            await asyncio.to_thread(direct.call, "DELETE", f"/api/kernels/{kernel_id}")
            break_all()
            with pytest.raises(websockets.ConnectionClosed, match=r"refuses this kernel|was deleted"):
                while True:
                    await connection.recv()
