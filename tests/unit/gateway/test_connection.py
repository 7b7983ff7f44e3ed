"""A client's connection, on sockets of a kernel that does not exist: its states, and what they let pass."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq

from gateway.connection import TRANSITIONS, Client, Connection, State
from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink
from gateway.metrics import Metrics


def request(number: int) -> KernelMessage:
    header = b'{"msg_id": "%d", "msg_type": "execute_request"}' % number
    return KernelMessage("shell", header, b"{}", b"{}", b"{}")


class Kernel:
    """The other end of a link's sockets."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: Path) -> None:
        ports = {f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
        self.info = {"ip": str(directory / "k"), "key": "x", "signature_scheme": "hmac-sha256", **ports}
        self.context = context
        self.shell = context.socket(zmq.ROUTER)
        self.shell.bind(f"ipc://{directory}/k-1")

    def link(self) -> KernelLink:
        return KernelLink(self.context, self.info, uuid.uuid4().hex)

    async def request(self) -> KernelMessage:
        """The next that comes."""
        assert await asyncio.to_thread(self.shell.poll, 20_000)
        _, _, _, header, parent, metadata, content = self.shell.recv_multipart()
        return KernelMessage("shell", header, parent, metadata, content)


@pytest.fixture
async def kernel(tmp_path: Path) -> AsyncIterator[Kernel]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    kernel = Kernel(context, tmp_path)
    yield kernel
    kernel.shell.close(linger=0)
    context.term()


def connect(sent: list[bytes]) -> Connection:
    def write(data: bytes, binary: bool) -> asyncio.Future[None]:
        sent.append(data)
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    client = Client(write=write, close=lambda code, reason: None, legacy=True)
    return Connection(client, "session", Metrics(states=list, pool_ready=int))


async def test_messages_wait_pass_and_are_answered_as_the_state_says(kernel: Kernel) -> None:
    sent: list[bytes] = []
    connection = connect(sent)
    connection.use(kernel.link())
    waiting = asyncio.create_task(connection.from_client(request(1)))
    await asyncio.sleep(0)
    assert not waiting.done()
    connection.admit()
    await waiting
    assert await kernel.request() == request(1)
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
    connection.unlink()
    connection.use(kernel.link())
    connection.admit()
    await connection.from_client(request(4))
    assert await kernel.request() == request(4), "what was answered here has not passed"
    link, unsent = connection.release()
    assert link is not None
    assert unsent == []
    link.close()


async def test_a_client_that_goes_ends_its_wait(kernel: Kernel) -> None:
    connection = connect([])
    waiting = asyncio.create_task(connection.from_client(request(1)))
    await asyncio.sleep(0)
    connection.release()
    await waiting


@pytest.mark.parametrize("state", State)
async def test_no_method_leaves_the_table(state: State) -> None:
    methods = {
        State.WAITING: Connection.unlink,
        State.PASSING: Connection.admit,
        State.DEAD: lambda connection: Connection.die(connection, None),
        State.CLOSED: Connection.release,
    }
    for target, method in methods.items():
        connection = connect([])
        connection.state = state
        if target in TRANSITIONS[state] | {state}:
            method(connection)
            assert connection.state is target
        else:
            with pytest.raises(RuntimeError, match=f"is {state.value} and cannot be {target.value}"):
                method(connection)
