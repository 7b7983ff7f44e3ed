"""Carriers: what moves a session's bytes. One small interface and the three kinds there are. Knows no frames."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import select
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

# One write to a virtio port takes at most this (Linux, drivers/char/virtio_console.c, port_fops_write).
DEVICE_WRITE_BYTES = 32 * 1024

# One read gives at most one buffer of the port, a page; one that gives less has emptied it.
DEVICE_READ_BYTES = 4096

# What the event loop may hold for a socket in either direction, before the reader or the writer waits.
SOCKET_BUFFER_BYTES = 128 * 1024

Buffer = bytes | memoryview


class Carrier(Protocol):
    """A byte stream. One reader and one writer at a time; errors are OSError."""

    async def read(self, max_bytes: int) -> bytes:
        """At least one byte, as soon as there are any; b"" at the end of the stream."""

    async def write(self, buffers: Sequence[Buffer]) -> None:
        """Write all, and wait until there is room for more. Cancelled, it may have written a part."""

    def close(self) -> None:
        """Release what it holds. Closing twice is harmless."""


class SocketCarrier:
    """A connected socket, as asyncio's pair of streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=SOCKET_BUFFER_BYTES)

    @classmethod
    async def connect_unix(cls, path: Path) -> SocketCarrier:
        """Connect to a UNIX socket (a machine's `wire.sock`). Raises OSError."""
        return cls(*await asyncio.open_unix_connection(path, limit=SOCKET_BUFFER_BYTES))

    async def read(self, max_bytes: int) -> bytes:
        return await self._reader.read(max_bytes)

    async def write(self, buffers: Sequence[Buffer]) -> None:
        if self._writer.transport.is_closing():
            raise ConnectionResetError("The socket of the wire is closed")
        self._writer.writelines(buffers)
        await self._writer.drain()

    def close(self) -> None:
        # Not close(): that would wait for a peer which may never read again. A GOODBYE has been drained before.
        self._writer.transport.abort()


class PipeCarrier:
    """Two pipes, on the host. It ends when nobody has the reading one open for writing any more. Takes over both
    descriptors and closes them."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = reading
        self._writing = writing
        for fd in (reading, writing):
            os.set_blocking(fd, False)
        self._loop = asyncio.get_running_loop()
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._closed = False

    async def read(self, max_bytes: int) -> bytes:
        while not self._closed:
            try:
                return os.read(self._reading, max_bytes)
            except BlockingIOError:
                self._readable.clear()
                self._loop.add_reader(self._reading, self._readable.set)
                try:
                    await self._readable.wait()
                finally:
                    if not self._closed:
                        self._loop.remove_reader(self._reading)
        return b""

    async def write(self, buffers: Sequence[Buffer]) -> None:
        data = memoryview(b"".join(buffers))
        while data:
            if self._closed:
                raise ConnectionResetError("The pipe of the wire is closed")
            try:
                data = data[os.write(self._writing, data) :]
            except BlockingIOError:
                self._writable.clear()
                self._loop.add_writer(self._writing, self._writable.set)
                try:
                    await self._writable.wait()
                finally:
                    if not self._closed:
                        self._loop.remove_writer(self._writing)

    def unread_bytes(self) -> int:
        """How much of what was written is still in the pipe."""
        found = array.array("i", [0])
        fcntl.ioctl(self._writing, termios.FIONREAD, found)
        return found[0]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._reading)
        self._loop.remove_writer(self._writing)
        os.close(self._reading)
        os.close(self._writing)
        self._readable.set()
        self._writable.set()


class DeviceCarrier:
    """A character device such as a virtio port, or one pipe for each direction, in the guest.

    While no host is connected the device is always "readable" (read gives b"") and hung up, so an event loop that polls
    it would spin. An edge-triggered epoll of our own, itself watched by the loop, wakes us only when something changes.
    `read` never gives b"": a host that is gone is waited for. writing: where to write, if not to `fd`. Takes over the
    descriptors and closes them.

    on_hang_up: called when something has changed and no host is connected.
    """

    def __init__(self, fd: int, writing: int | None = None, *, on_hang_up: Callable[[], None] = lambda: None) -> None:
        self._fd = fd
        self._writing = fd if writing is None else writing
        self._on_hang_up = on_hang_up
        self._changed = asyncio.Event()
        self._writable = asyncio.Event()
        self._epoll = select.epoll()
        for each in {self._fd, self._writing}:
            os.set_blocking(each, False)
            self._epoll.register(each, select.EPOLLIN | select.EPOLLOUT | select.EPOLLHUP | select.EPOLLET)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._wake)
        self._closed = False

    def _wake(self) -> None:
        for _, events in self._epoll.poll(0):
            self._changed.set()
            self._writable.set()
            if events & select.EPOLLHUP:
                self._on_hang_up()

    async def read(self, max_bytes: int) -> bytes:
        while True:
            self._check_open()
            # Cleared before looking: an edge between the look and the wait stays in the epoll and sets it again.
            self._changed.clear()
            if data := self._read_available(max_bytes):
                if len(data) >= max_bytes:
                    await asyncio.sleep(0)  # a device that always has data must not starve other tasks
                return data
            await self._changed.wait()

    def _read_available(self, max_bytes: int) -> bytes:
        chunks: list[bytes] = []
        total = 0
        while total < max_bytes:
            try:
                chunk = os.read(self._fd, max_bytes - total)
            except BlockingIOError:
                break
            chunks.append(chunk)
            total += len(chunk)
            if len(chunk) < DEVICE_READ_BYTES:
                break
        return b"".join(chunks)

    async def write(self, buffers: Sequence[Buffer]) -> None:
        data = memoryview(b"".join(buffers))
        while data:
            self._check_open()
            self._writable.clear()
            try:
                written = os.write(self._writing, data[:DEVICE_WRITE_BYTES])
            except BlockingIOError:
                await self._writable.wait()
                continue
            data = data[written:]
            await asyncio.sleep(0)  # a device that always has room must not starve the reader

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionResetError("The device of the wire is closed")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        for each in {self._fd, self._writing}:
            os.close(each)
        self._changed.set()
        self._writable.set()
