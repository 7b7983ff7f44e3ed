"""Joins a stream of the wire to a socket. Knows bytes only, and holds no more than one read of them each way."""

from __future__ import annotations

import asyncio
import contextlib

from vm_runtime.wire.errors import LinkClosedError, StreamResetError
from vm_runtime.wire.stream import Stream

RELAY_BYTES = 64 * 1024


async def relay(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Move bytes both ways until both directions are over; each may end on its own. Closes both ends.

    What goes wrong on one side is passed on to the other: a lost socket resets the stream (`connection_lost`), a reset
    stream or a closed link aborts the socket. None of it is raised here. Cancelled, it drops both.
    """
    finished = False
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_stream_to_socket(stream, writer))
            group.create_task(_socket_to_stream(reader, stream))
        finished = True
    except* (StreamResetError, LinkClosedError):
        pass
    except* OSError as errors:
        stream.reset("connection_lost", str(errors.exceptions[0]))
    finally:
        stream.reset("cancelled", "The relay was given up")
        if finished:
            writer.close()
        else:
            writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _stream_to_socket(stream: Stream, writer: asyncio.StreamWriter) -> None:
    while data := await stream.read(RELAY_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def _socket_to_stream(reader: asyncio.StreamReader, stream: Stream) -> None:
    while data := await reader.read(RELAY_BYTES):
        await stream.write(data)
    stream.end()
