"""DeviceCarrier over descriptors that behave as virtio ports do: short, non-blocking, hung up while nobody is there."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import tty
from pathlib import Path

import pytest

from vm_runtime.wire.carriers import Carrier, DeviceCarrier, PipeCarrier, SocketCarrier
from vm_runtime.wire.greeting import Hello, Welcome
from vm_runtime.wire.link import Link
from vm_runtime.wire.protocol import BOOT_MARKER
from vm_runtime.wire.serving import serve
from vm_runtime.wire.stream import Incoming


async def welcome(_: Hello) -> Welcome:
    return Welcome(agent_version="t")


async def on_session(link: Link) -> None:
    async def echo(incoming: Incoming) -> None:
        stream = await incoming.accept()
        while data := await stream.read():
            await stream.write(data)

    link.on_open = echo


async def exercise(host: Carrier, guest: DeviceCarrier) -> None:
    """A session with bulk both ways between two carriers."""
    serving = asyncio.create_task(serve(guest, on_session, make_welcome=welcome))
    async with await Link.connect(host, Hello(), marker=BOOT_MARKER, timeout_s=5) as link:
        blob = os.urandom(700_000)
        stream = await link.open("echo")
        writing = asyncio.create_task(stream.write(blob))
        got = bytearray()
        while len(got) < len(blob):
            got += await stream.read()
        await writing
        assert got == blob
    serving.cancel()
    await asyncio.wait([serving])
    guest.close()


async def test_a_session_over_a_socket_as_device() -> None:
    left, right = socket.socketpair()
    host = SocketCarrier(*await asyncio.open_connection(sock=left))
    await exercise(host, DeviceCarrier(right.detach()))


async def test_a_session_over_a_pty() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    path = Path(os.ttyname(slave))
    await exercise(DeviceCarrier(master), DeviceCarrier(os.open(path, os.O_RDWR | os.O_NOCTTY)))
    os.close(slave)


class Pipes:
    """Two named pipes, and the guest's ends of them."""

    def __init__(self, directory: Path) -> None:
        self.to_guest, self.to_host = directory / "in", directory / "out"
        for path in (self.to_guest, self.to_host):
            os.mkfifo(path)
        self.guest_reads = os.open(self.to_guest, os.O_RDONLY | os.O_NONBLOCK)
        reader = os.open(self.to_host, os.O_RDONLY | os.O_NONBLOCK)
        self.guest_writes = os.open(self.to_host, os.O_WRONLY)
        os.close(reader)

    def host(self) -> PipeCarrier:
        reading = os.open(self.to_host, os.O_RDONLY | os.O_NONBLOCK)
        return PipeCarrier(reading, os.open(self.to_guest, os.O_WRONLY | os.O_NONBLOCK))


async def test_a_session_over_named_pipes(tmp_path: Path) -> None:
    pipes = Pipes(tmp_path)
    await exercise(pipes.host(), DeviceCarrier(pipes.guest_reads, pipes.guest_writes))


async def test_one_host_after_the_other_opens_the_same_pipes(tmp_path: Path) -> None:
    pipes = Pipes(tmp_path)
    guest = DeviceCarrier(pipes.guest_reads, pipes.guest_writes)
    for _ in range(2):
        host = pipes.host()
        await host.write([b"to the guest"])
        assert host.unread_bytes() == 12
        assert await guest.read(100) == b"to the guest"
        assert host.unread_bytes() == 0
        await guest.write([b"to the host"])
        assert await host.read(100) == b"to the host"
        host.close()
        host.close()
    with pytest.raises(BrokenPipeError):
        await guest.write([b"to nobody"])
    guest.close()


async def test_a_pipe_that_is_closed_wakes_whoever_waits(tmp_path: Path) -> None:
    pipes = Pipes(tmp_path)
    host = pipes.host()
    reading = asyncio.create_task(host.read(100))
    writing = asyncio.create_task(host.write([bytes(3_000_000)]))
    await asyncio.sleep(0)
    host.close()
    assert await reading == b""
    with pytest.raises(ConnectionResetError):
        await writing
    os.close(pipes.guest_reads)
    os.close(pipes.guest_writes)


async def test_a_pipe_ends_with_the_guest(tmp_path: Path) -> None:
    pipes = Pipes(tmp_path)
    host = pipes.host()
    os.close(pipes.guest_writes)
    assert await host.read(100) == b""
    host.close()
    os.close(pipes.guest_reads)


async def test_a_host_that_is_gone_is_waited_for_without_spinning(tmp_path: Path) -> None:
    fifo = tmp_path / "port"
    os.mkfifo(fifo)
    hung_up = asyncio.Event()
    carrier = DeviceCarrier(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), on_hang_up=hung_up.set)
    for message in (b"first", b"second"):
        reading = asyncio.create_task(carrier.read(100))
        before = time.process_time()
        await asyncio.sleep(0.2)  # a measurement: nothing must happen in this time
        assert time.process_time() - before < 0.1
        assert not reading.done()
        host = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.write(host, message)
        assert await asyncio.wait_for(reading, 60) == message
        assert not hung_up.is_set()
        os.close(host)  # from now on the device is hung up, and always "readable"
        await asyncio.wait_for(hung_up.wait(), 5)
        hung_up.clear()
    carrier.close()
    carrier.close()


async def test_a_write_waits_for_room() -> None:
    left, right = socket.socketpair()
    carrier = DeviceCarrier(right.detach())
    writing = asyncio.create_task(carrier.write([bytes(3_000_000), b"end"]))
    await asyncio.sleep(0)
    reader, writer = await asyncio.open_connection(sock=left)
    assert (await reader.readexactly(3_000_003))[-3:] == b"end"
    await writing
    carrier.close()
    writer.close()
