"""A client's connection, to a kernel that has no machine: its states, and what they let pass."""

from __future__ import annotations

import asyncio

import pytest

from gateway.connection import TRANSITIONS, Client, Connection, State
from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink
from gateway.metrics import Metrics
from kernels.channels import KernelClients


def request(number: int) -> KernelMessage:
    header = b'{"msg_id": "%d", "msg_type": "execute_request"}' % number
    return KernelMessage("shell", header, b"{}", b"{}", b"{}")


class Kernel:
    """asked: how many requests have passed to it."""

    def __init__(self) -> None:
        self.asked = 0
        self.clients = KernelClients(self._ask)

    def _ask(self) -> None:
        self.asked += 1

    def connect(self, sent: list[bytes] | None = None) -> Connection:
        def write(data: bytes, binary: bool) -> asyncio.Future[None]:
            if sent is not None:
                sent.append(data)
            future = asyncio.get_running_loop().create_future()
            future.set_result(None)
            return future

        client = Client(write=write, close=lambda code, reason: None, legacy=True)
        link = KernelLink(self.clients.channels(b"session"), "key")
        return Connection(client, "session", link, metrics=Metrics(states=list, pool_ready=int))


async def test_messages_wait_pass_and_are_answered_as_the_state_says() -> None:
    kernel, sent = Kernel(), list[bytes]()
    connection = kernel.connect(sent)
    connection.hold()
    waiting = asyncio.create_task(connection.from_client(request(1)))
    await asyncio.sleep(0)
    assert not waiting.done()
    connection.admit()
    await waiting
    assert kernel.asked == 1
    connection.hold()
    waiting = asyncio.create_task(connection.from_client(request(2)))
    await asyncio.sleep(0)
    assert not waiting.done()
    connection.die("It is lost.")
    await waiting
    assert b'"dead"' in sent[-1]
    assert [b"It is lost." in each for each in sent] == [True, True, False, True]
    await connection.from_client(request(3))
    assert len(sent) == 8  # a line on stderr, a reply, idle and the status, each time
    assert kernel.asked == 1
    connection.admit()
    await connection.from_client(request(4))
    assert kernel.asked == 2, "what was answered here has not passed"
    link, unsent = connection.release()
    assert unsent == []
    link.close()
    assert kernel.clients.has_request, "what a client has asked stays when it goes"


async def test_a_client_that_goes_ends_its_wait() -> None:
    kernel = Kernel()
    connection = kernel.connect()
    connection.hold()
    waiting = asyncio.create_task(connection.from_client(request(1)))
    await asyncio.sleep(0)
    connection.release()
    await waiting
    assert not kernel.asked


@pytest.mark.parametrize("state", State)
async def test_no_method_leaves_the_table(state: State) -> None:
    methods = {
        State.WAITING: Connection.hold,
        State.PASSING: Connection.admit,
        State.DEAD: lambda connection: Connection.die(connection, None),
        State.CLOSED: Connection.release,
    }
    for target, method in methods.items():
        connection = Kernel().connect()
        connection.state = state
        if target in TRANSITIONS[state] | {state}:
            method(connection)
            assert connection.state is target
        else:
            with pytest.raises(RuntimeError, match=f"is {state.value} and cannot be {target.value}"):
                method(connection)
