"""Messages on their way to a client: none is lost with its connection."""

from __future__ import annotations

import asyncio

import pytest

from gateway.frames import KernelMessage
from gateway.metrics import Metrics
from gateway.outgoing import HIGH_WATER_BYTES, Outgoing


def line(number: int, size: int = 0) -> KernelMessage:
    return KernelMessage("iopub", b'{"msg_type": "stream"}', b"{}", b"{}", b'{"text": "%d%s"}' % (number, b" " * size))


class Socket:
    """Takes what is written; the test says what has left."""

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[None]] = []
        self.outgoing = Outgoing(self.write, legacy=False, metrics=Metrics(states=list, pool_ready=int))

    def write(self, data: bytes, binary: bool) -> asyncio.Future[None]:
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]


@pytest.mark.parametrize("breaks", [True, False])
async def test_what_a_connection_has_taken_and_not_sent_is_there_when_it_has_ended(breaks: bool) -> None:
    socket = Socket()
    for number in range(3):
        socket.outgoing.put(line(number))
    socket.futures[0].set_result(None)
    if breaks:  # else it ends while they are on their way to a client that reads slowly
        socket.futures[1].set_exception(ConnectionResetError())
        await asyncio.sleep(0)
        socket.outgoing.put(line(3))
        socket.futures[3].set_exception(ConnectionResetError())
    await asyncio.sleep(0)
    assert socket.outgoing.close() == [line(number) for number in ((1, 2, 3) if breaks else (1, 2))]
    assert socket.outgoing.close() == []


async def test_what_waits_comes_after_what_leaves() -> None:
    socket = Socket()
    first, second = line(0, HIGH_WATER_BYTES), line(1)
    socket.outgoing.put(first)
    socket.outgoing.put(second)
    assert len(socket.futures) == 1
    assert socket.outgoing.close() == [first, second]
