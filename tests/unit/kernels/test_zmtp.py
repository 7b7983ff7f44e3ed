"""ZMTP without I/O: what two ends send each other however the bytes are cut, and what hostile bytes can cause."""

from __future__ import annotations

import asyncio
import tempfile
import tracemalloc

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from kernels import zmtp
from kernels.zmtp import GREETING, Event, Message, Pong, Ready, State, ZmtpConnection, ZmtpError

LIMIT = 10_000
PARTS = st.lists(st.binary(max_size=900), min_size=1, max_size=9)
READY = b"\x04\x06\x05READY"


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp, "MAX_MESSAGE_BYTES", LIMIT)


def feed(connection: ZmtpConnection, data: bytes, step: int) -> list[Event]:
    events: list[Event] = []
    for start in range(0, len(data), step):
        events += connection.receive_data(data[start : start + step])
    return events


def joined(identity: bytes = b"me") -> tuple[ZmtpConnection, ZmtpConnection]:
    """Two ends with the handshake done."""
    ours, theirs = ZmtpConnection(b"DEALER", identity), ZmtpConnection(b"ROUTER")
    for _ in range(2):
        theirs.receive_data(ours.data_to_send())
        ours.receive_data(theirs.data_to_send())
    return ours, theirs


def frame(size: int, *, more: bool, long: bool) -> bytes:
    return bytes([more | 2 * long]) + size.to_bytes(8 if long else 1, "big") + bytes(size)


@given(identity=st.binary(max_size=255), step=st.integers(1, 200))
def test_both_ends_learn_who_the_other_is_and_no_ready_comes_before_a_greeting(identity: bytes, step: int) -> None:
    ours, theirs = ZmtpConnection(b"DEALER", identity), ZmtpConnection(b"ROUTER")
    assert ours.data_to_send() == theirs.data_to_send() == GREETING
    assert feed(theirs, GREETING, step) == feed(ours, GREETING, step) == []
    assert feed(theirs, ours.data_to_send(), step) == [Ready(identity)]
    assert feed(ours, theirs.data_to_send(), step) == [Ready(b"")]
    assert ours.is_open
    assert theirs.is_open


def test_who_has_no_name_yet_hears_the_other_and_says_nothing_but_its_greeting() -> None:
    ours, theirs = ZmtpConnection(b"DEALER", None), ZmtpConnection(b"ROUTER")
    theirs.receive_data(ours.data_to_send())
    assert ours.receive_data(theirs.data_to_send()) == [Ready(b"")]
    assert ours.data_to_send() == b""
    assert not ours.is_open
    with pytest.raises(RuntimeError):
        ours.send_message([b"x"])
    ours.introduce(b"name")
    ours.introduce(b"another")
    assert theirs.receive_data(ours.data_to_send()) == [Ready(b"name")]
    assert ours.is_open


@given(messages=st.lists(PARTS, max_size=5), step=st.integers(1, 999))
def test_messages_arrive_as_they_were_sent_with_what_is_asked_between_them(
    messages: list[list[bytes]], step: int
) -> None:
    ours, theirs = joined()
    for number, parts in enumerate(messages):
        ours.send_message(parts)
        ours.ping(str(number).encode())
    assert feed(theirs, ours.data_to_send(), step) == [Message(parts) for parts in messages]
    assert feed(ours, theirs.data_to_send(), step) == [Pong(str(number).encode()) for number in range(len(messages))]


@given(size=st.integers(0, 3000), step=st.integers(1, 999))
def test_a_message_without_an_end_does_not_pass(size: int, step: int) -> None:
    ours, _ = joined()
    with pytest.raises(ZmtpError, match="a message of more than"):
        feed(ours, (frame(size, more=True, long=True) + b"\x04\x05\x04PONG") * (LIMIT // 50), step)


@pytest.mark.parametrize("size", [LIMIT, 2**40, 2**64 - 1])
def test_a_size_is_refused_before_anything_is_kept_for_it(size: int) -> None:
    ours, _ = joined()
    tracemalloc.start()
    with pytest.raises(ZmtpError):
        ours.receive_data(b"\x02" + size.to_bytes(8, "big"))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        GREETING.replace(b"\x7f\x03", b"\x7f\x02"),
        GREETING.replace(b"NULL", b"CURV"),
        GREETING + b"\x00\x01x",
        GREETING + b"\x04\x06\x05ERROR",
        GREETING + b"\x04\x00",
        GREETING + b"\x06" + (2000).to_bytes(8, "big"),
        GREETING + b"\x04\x0b\x05READY\x01I\xff\xff\xff\xff"[:13],
        GREETING + b"\x04\x08\x05READY\xffI",
        GREETING + READY + b"\x08\x00",
        GREETING + READY + b"\x05\x00",
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_what_breaks_the_protocol_is_refused(data: bytes, step: int) -> None:
    with pytest.raises(ZmtpError):
        feed(ZmtpConnection(b"DEALER", b"x"), data, step)


@given(start=st.sampled_from([b"", b"\xff", GREETING, GREETING + READY]), garbage=st.binary(), step=st.integers(1, 99))
def test_garbage_is_an_error_of_the_peer_or_waits_for_more(start: bytes, garbage: bytes, step: int) -> None:
    connection = ZmtpConnection(b"SUB", b"")
    try:
        feed(connection, start + garbage, step)
    except ZmtpError:
        return
    assert connection.state in State
    connection.data_to_send()


@pytest.mark.parametrize("ours_listens", [True, False])
async def test_libzmq_understands_us_and_we_it(ours_listens: bool) -> None:
    context = zmq.asyncio.Context()
    kind = zmq.DEALER if ours_listens else zmq.ROUTER
    theirs = context.socket(kind)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/s"
        arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        if ours_listens:
            theirs.identity = b"them"
            server = await asyncio.start_unix_server(lambda *ends: arrived.put_nowait(ends), path)
            theirs.connect(f"ipc://{path}")
            reader, writer = await arrived.get()
            server.close()
        else:
            theirs.bind(f"ipc://{path}")
            reader, writer = await asyncio.open_unix_connection(path)
        ours = ZmtpConnection(b"ROUTER" if ours_listens else b"DEALER", b"" if ours_listens else b"us")
        events: list[Event] = []

        async def until(wanted: type[Event]) -> None:
            writer.write(ours.data_to_send())
            while not any(isinstance(event, wanted) for event in events):
                events.extend(ours.receive_data(await reader.read(65536)))
                writer.write(ours.data_to_send())

        async with asyncio.timeout(20):
            await until(Ready)
            assert events == [Ready(b"them" if ours_listens else b"")]
            ours.send_message([b"small", b"", bytes(1000)])
            ours.ping(b"7")
            await until(Pong)
            received = await theirs.recv_multipart()
            assert received[-3:] == [b"small", b"", bytes(1000)]
            assert received[:-3] == ([] if ours_listens else [b"us"])
            await theirs.send_multipart([*received[:-3], bytes(300), b"end"])
            await until(Message)
            assert events[1:] == [Pong(b"7"), Message([bytes(300), b"end"])]
        writer.close()
    context.destroy(linger=0)
