"""What is kept for clients that are away is bounded, and a gap in it is told."""

from __future__ import annotations

import asyncio
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.buffering import BufferBudget, MessageBuffer
from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink
from gateway.metrics import Metrics
from gateway.outgoing import HIGH_WATER_BYTES, Outgoing
from gateway.own_messages import make_message
from kernels.channels import KernelClients

SESSION_ID = "session"


def _output(text: str, channel: str = "iopub") -> KernelMessage:
    return KernelMessage(channel, b'{"msg_id": "1", "msg_type": "stream"}', b'{"p": 1}', b"{}", text.encode())


@pytest.fixture
async def link() -> KernelLink:
    """A link to a kernel that is not there: it stays silent."""
    return KernelLink(KernelClients(lambda: None).channels(SESSION_ID.encode()), "key")


async def test_the_same_session_gets_all_and_another_the_output(link: KernelLink) -> None:
    buffer = MessageBuffer(SESSION_ID, link, max_bytes=10_000, budget=BufferBudget(10_000))
    kept = [_output("1"), _output("2", "shell"), _output("3")]
    for message in kept:
        buffer.keep(message)
    assert buffer.release(for_session=SESSION_ID) == kept
    for message in kept:
        buffer.keep(message)
    assert buffer.release(for_session="another") == [kept[0], kept[2]]
    buffer.close()


async def test_the_oldest_goes_and_the_client_is_told(link: KernelLink) -> None:
    budget = BufferBudget(10_000)
    buffer = MessageBuffer(SESSION_ID, link, max_bytes=200, budget=budget)
    for number in range(10):
        buffer.keep(_output(f"{number}" * 40))
    assert budget.used <= 200
    notice, *rest = buffer.release(for_session=SESSION_ID)
    assert [bytes(message.content)[:1] for message in rest] == [b"8", b"9"]
    assert "8 messages" in json.loads(bytes(notice.content))["text"]
    assert notice.parent == b'{"p": 1}'
    assert budget.used == 0
    buffer.close()


async def test_all_parked_kernels_share_a_budget(link: KernelLink) -> None:
    budget = BufferBudget(100)
    buffer = MessageBuffer(SESSION_ID, link, max_bytes=10_000, budget=budget)
    for _ in range(10):
        buffer.keep(_output("x" * 20))
    assert budget.used <= 100
    buffer.close()
    assert budget.used == 0


class _SlowSocket:
    """Takes what is written and says when it has left only when told to."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.futures: list[asyncio.Future[None]] = []

    def write(self, data: bytes, binary: bool) -> asyncio.Future[None]:
        self.written.append(data)
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    async def take_all(self) -> None:
        while self.futures:
            futures, self.futures = self.futures, []
            for future in futures:
                future.set_result(None)
            await asyncio.sleep(0)


async def test_a_slow_client_stops_the_source_and_loses_nothing() -> None:
    socket = _SlowSocket()
    metrics = Metrics(states=list, pool_ready=lambda: 0)
    outgoing = Outgoing(socket.write, legacy=False, metrics=metrics)
    for _ in range(30):
        outgoing.put(_output("x" * 1_000_000))
    waiting = asyncio.create_task(outgoing.wait_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert outgoing.unsent_bytes < HIGH_WATER_BYTES + 1_100_000
    await socket.take_all()
    await waiting
    assert len(socket.written) == 30
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.labels in ({}, {"direction": "to_client", "channel": "iopub"})
    }
    assert samples["hypercell_messages_total"] == 30
    assert samples["hypercell_back_pressure_seconds_total"] > 0


async def test_what_was_not_sent_can_be_kept() -> None:
    socket = _SlowSocket()
    metrics = Metrics(states=list, pool_ready=lambda: 0)
    outgoing = Outgoing(socket.write, legacy=True, metrics=metrics)
    for _ in range(10):
        outgoing.put(make_message("iopub", "display_data", {"data": "x" * 1_000_000}))
    assert len(outgoing.close()) == 10, "also those that were written and have not left"
    outgoing.put(_output("too late"))
    assert len(socket.written) < 10
