"""The control socket's client against a peer that is right, slow, rude or gone."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vm_runtime.drivers.qemu.qmp import MAX_LINE_BYTES, Qmp, QmpState
from vm_runtime.errors import VmmCommandError, VmmProtocolError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, value: object = None) -> dict[str, Any]:
    command: dict[str, Any] = json.loads(await reader.readline())
    writer.write(json.dumps({"return": value, "id": command["id"]}).encode() + b"\r\n")
    return command


@asynccontextmanager
async def served(peer: Peer) -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hc-") as name:
        path = Path(name, "qmp.sock")
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(GREETING)
            await answer(reader, writer)
            await peer(reader, writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            ended.set()

        async with await asyncio.start_unix_server(serve, path):
            yield path
            await ended.wait()


def ignore(name: str, data: Mapping[str, Any]) -> None:
    pass


async def test_commands_are_answered_and_events_passed_on_between() -> None:
    events: list[tuple[str, Mapping[str, Any]]] = []

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"event": "STOP", "timestamp": {}}\r\n')
        await answer(reader, writer, {"running": False})
        await reader.read()

    async with served(peer) as path:
        client = await Qmp.connect(path, lambda name, data: events.append((name, data)), timeout_s=5)
        assert await client.execute("query-status") == {"running": False}
        assert events == [("STOP", {})]
        await client.close()
        await client.close()
        assert client.state is QmpState.CLOSED
        with pytest.raises(VmmProtocolError, match="closed"):
            await client.execute("cont")


async def test_a_refused_command_keeps_the_connection() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'{"error": {"class": "GenericError", "desc": "no"}}\r\n')
        await answer(reader, writer, 1)
        await reader.read()

    async with served(peer) as path:
        client = await Qmp.connect(path, ignore, timeout_s=5)
        with pytest.raises(VmmCommandError, match="refused cont: no"):
            await client.execute("cont")
        assert await client.execute("stop") == 1
        await client.close()


@pytest.mark.parametrize("rude", [b"no json\n", b"[]\n", b'"x"\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b""])
async def test_a_rude_peer_is_an_error_of_the_command(rude: bytes) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(rude)

    async with served(peer) as path:
        client = await Qmp.connect(path, ignore, timeout_s=5)
        with pytest.raises(VmmProtocolError):
            await client.execute("query-status")
        assert client.state is QmpState.CLOSED
        assert str(await client.wait_lost())
        await client.close()


async def test_an_answer_that_is_too_long_fails_its_command_alone() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        command = json.loads(await reader.readline())
        writer.write(b'{"return": "' + b"x" * (2 * MAX_LINE_BYTES + 65536) + b'", "id": %d}\r\n' % command["id"])
        await answer(reader, writer, {"running": True})
        await reader.read()

    async with served(peer) as path:
        client = await Qmp.connect(path, ignore, timeout_s=5)
        with pytest.raises(VmmProtocolError, match="more than"):
            await client.execute("query-named-block-nodes")
        assert await client.execute("query-status") == {"running": True}
        await client.close()


async def test_an_answer_of_several_mib_is_read() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer, "x" * (4 << 20))
        await reader.read()

    async with served(peer) as path:
        client = await Qmp.connect(path, ignore, timeout_s=5)
        assert len(await client.execute("query-named-block-nodes")) == 4 << 20
        await client.close()


async def test_the_answer_to_a_command_that_was_given_up_is_not_taken_for_that_of_the_next() -> None:
    read = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = json.loads(await reader.readline())
        read.set()
        second = json.loads(await reader.readline())
        for command in (first, second):
            writer.write(json.dumps({"return": command["execute"], "id": command["id"]}).encode() + b"\r\n")
        await reader.read()

    async with served(peer) as path:
        client = await Qmp.connect(path, ignore, timeout_s=5)
        given_up = asyncio.create_task(client.execute("stop"))
        await read.wait()
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert await client.execute("query-status") == "query-status"
        await client.close()


async def test_a_peer_that_says_nothing_runs_into_the_limit() -> None:
    with tempfile.TemporaryDirectory(prefix="hc-") as name, socket.socket(socket.AF_UNIX) as listener:
        path = Path(name, "qmp.sock")
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(TimeoutError):
            await Qmp.connect(path, ignore, timeout_s=0.05)


async def test_descriptors_travel_with_a_command() -> None:
    with tempfile.TemporaryDirectory(prefix="hc-") as name, socket.socket(socket.AF_UNIX) as listener:
        path = Path(name, "qmp.sock")
        listener.bind(str(path))
        listener.listen()

        def serve() -> int:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(GREETING)
                connection.recv(4096)
                connection.sendall(b'{"return": {}}\n')
                _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(16))
                connection.sendall(b'{"return": {}}\n')
                received = array.array("i", ancillary[0][2])
                inode = os.fstat(received[0]).st_ino
                os.close(received[0])
                return inode

        serving = asyncio.create_task(asyncio.to_thread(serve))
        client = await Qmp.connect(path, ignore, timeout_s=5)
        with path.parent.joinpath("file").open("w") as file:
            await client.execute("getfd", {"fdname": "x"}, descriptors=(file.fileno(),))
            assert await serving == os.fstat(file.fileno()).st_ino
        await client.close()
