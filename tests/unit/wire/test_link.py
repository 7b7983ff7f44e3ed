"""Links over a real socket pair: calls, streams, back pressure, fairness, errors, ends."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from vm_runtime.wire.carriers import SocketCarrier
from vm_runtime.wire.errors import (
    LinkClosedError,
    LocalProtocolError,
    OpenRejectedError,
    RemoteProtocolError,
    SessionResetError,
    StreamResetError,
    VersionError,
)
from vm_runtime.wire.frames import FrameType, encode_frame
from vm_runtime.wire.greeting import Hello, Welcome
from vm_runtime.wire.link import Link
from vm_runtime.wire.protocol import BOOT_MARKER
from vm_runtime.wire.relay import relay
from vm_runtime.wire.serving import serve
from vm_runtime.wire.stream import Incoming

WINDOW = 256 * 1024


async def carrier(sock: socket.socket) -> SocketCarrier:
    return SocketCarrier(*await asyncio.open_connection(sock=sock))


async def echo(incoming: Incoming) -> None:
    stream = await incoming.accept({"kind": incoming.kind})
    while data := await stream.read():
        await stream.write(data)


async def test_calls_in_both_directions(joined: Any) -> None:
    async def add(incoming: Incoming) -> None:
        await incoming.answer({"sum": incoming.params["a"] + 1})

    async with joined() as (host, guest):
        host.on_open = guest.on_open = add
        results = await asyncio.gather(*(end.call("add", {"a": i}) for i in range(200) for end in (host, guest)))
        assert sorted(r["sum"] for r in results) == sorted([*range(1, 201)] * 2)
        await asyncio.gather(host.ping(), guest.ping())
        await asyncio.gather(host.ping(), guest.ping())
        assert not host._streams and not guest._streams  # nothing is kept of calls


async def test_a_stream_carries_bytes_and_ends_on_each_side(joined: Any) -> None:
    async with joined() as (host, guest):
        guest.on_open = echo
        blob = bytes(range(256)) * 8000
        async with await host.open("echo") as stream:
            assert stream.result == {"kind": "echo"}
            async with asyncio.TaskGroup() as group:

                async def send() -> None:
                    await stream.write(blob)
                    stream.end()
                    stream.end()

                group.create_task(send())
                got = bytearray()
                while data := await stream.read(1000):
                    got += data
            assert got == blob
        with pytest.raises(LocalProtocolError):
            await stream.write(b"late")


async def test_a_slow_reader_blocks_only_its_own_stream(joined: Any) -> None:
    streams: list[Any] = []

    async def hold(incoming: Incoming) -> None:
        if incoming.kind == "echo":
            await echo(incoming)
        else:
            streams.append(await incoming.accept())
            await asyncio.Event().wait()

    async with joined() as (host, guest):
        guest.on_open = hold
        slow = await host.open("slow")
        writer = asyncio.create_task(slow.write(bytes(4 * WINDOW)))
        async with await host.open("echo") as stream:
            await stream.write(b"hello")
            assert await stream.read() == b"hello"
        assert not writer.done()
        assert len(streams[0]._buffer) <= WINDOW
        total = 0
        while total < 4 * WINDOW:
            total += len(await streams[0].read())
        await writer


async def test_refusals_and_failures(joined: Any) -> None:
    async def handler(incoming: Incoming) -> None:
        match incoming.kind:
            case "refuse":
                raise OpenRejectedError("no_such_port", "Nobody listens")
            case "forget":
                return
            case "big":
                await incoming.answer({"a": "x" * 40000})
            case "reset":
                (await incoming.accept()).reset("gone", "why not")

    async with joined() as (host, guest):
        guest.on_open = handler
        for kind, code in (("refuse", "no_such_port"), ("forget", "unanswered"), ("big", "internal")):
            with pytest.raises(OpenRejectedError) as caught:
                await host.call(kind)
            assert caught.value.code == code
        stream = await host.open("reset")
        with pytest.raises(StreamResetError, match="why not"):
            await stream.read()
        with pytest.raises(StreamResetError):
            await stream.write(b"x")


async def test_a_handler_that_is_closed_refuses_its_stream(joined: Any) -> None:
    """As Python does with what is left in the middle."""
    opened: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()

    async def never(incoming: Incoming) -> None:
        await asyncio.Event().wait()

    async def handler(incoming: Incoming) -> None:
        opened.set_result(incoming)
        await never(incoming)

    async with joined() as (host, guest):
        guest.on_open = handler
        calling = asyncio.create_task(host.call("wait"))
        left = guest._run_handler(never, await opened)
        left.send(None)
        left.close()
        with pytest.raises(OpenRejectedError) as caught:
            await calling
        assert caught.value.code == "cancelled"


async def test_a_call_that_times_out_cancels_its_handler(joined: Any) -> None:
    cancelled = asyncio.Event()

    async def hang(incoming: Incoming) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with joined() as (host, guest):
        guest.on_open = hang
        with pytest.raises(TimeoutError):
            await host.call("hang", timeout_s=0.05)
        await asyncio.wait_for(cancelled.wait(), 5)


async def test_opens_beyond_the_peers_limit_wait(joined: Any) -> None:
    release = asyncio.Event()

    async def wait(incoming: Incoming) -> None:
        await release.wait()
        await incoming.answer()

    async with joined() as (host, guest):
        guest.on_open = wait
        calls = [asyncio.create_task(host.call("wait")) for _ in range(300)]
        await guest.ping()
        release.set()
        await asyncio.gather(*calls)


async def test_closing_ends_everything(joined: Any) -> None:
    async with joined() as (host, guest):
        guest.on_open = echo
        stream = await host.open("echo")
        reading = asyncio.create_task(stream.read())
        hanging = asyncio.create_task(guest.open("nobody.serves"))
        await host.ping()
        await host.close("closed", "shutting down")
        await host.close()
        for task in (reading, hanging):
            with pytest.raises(LinkClosedError, match="shutting down"):
                await task
        await guest.wait_closed()
        with pytest.raises(LinkClosedError):
            await host.open("echo")
    assert {task.get_name() for task in asyncio.all_tasks()} == {asyncio.current_task().get_name()}  # type: ignore[union-attr]


async def test_a_new_session_ends_the_old_one_in_the_middle_of_a_frame() -> None:
    left, right = socket.socketpair()
    sessions: asyncio.Queue[Link] = asyncio.Queue()

    async def on_session(link: Link) -> None:
        link.on_open = echo
        await sessions.put(link)
        await link.wait_closed()

    async def welcome(_: Hello) -> Welcome:
        return Welcome(agent_version="t")

    serving = asyncio.create_task(serve(await carrier(right), on_session, make_welcome=welcome))
    reader, writer = await asyncio.open_connection(sock=left)

    class Kept(SocketCarrier):
        """A carrier that stays open between sessions, as a virtio port does."""

        def close(self) -> None:
            pass

    hello = Hello()
    first = await Link.connect(Kept(reader, writer), hello, marker=BOOT_MARKER, timeout_s=5)
    stream = await first.open("echo")
    await stream.write(bytes(WINDOW))
    old = await sessions.get()
    first._main.cancel()  # type: ignore[union-attr]  # a gateway that is killed
    await first.wait_closed()
    writer.write(encode_frame(FrameType.DATA, 1, bytes(60000))[:30000])
    for marker in (hello.next_marker, hello.next_marker):  # the second host knows of no WELCOME to the first's HELLO
        second = Hello()
        link = await Link.connect(Kept(reader, writer), second, marker=bytes.fromhex(marker), timeout_s=5)
        assert isinstance(old.error, SessionResetError)
        old = await sessions.get()
        async with await link.open("echo") as stream:
            await stream.write(b"again")
            assert await stream.read() == b"again"
        link._main.cancel()  # type: ignore[union-attr]
        await link.wait_closed()
    writer.close()
    await serving


async def raw_guest(answer: Any) -> Link:
    """Connect to a guest that answers the host's greeting with what `answer` makes of HELLO."""
    left, right = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=right)
    hello = Hello()

    async def guest() -> None:
        await reader.readexactly(16 + 12)
        writer.write(answer(hello))

    task = asyncio.create_task(guest())
    try:
        return await Link.connect(await carrier(left), hello, marker=BOOT_MARKER, timeout_s=0.5)
    finally:
        await task
        writer.close()


async def test_connecting_to_a_guest_that_does_not_answer() -> None:
    with pytest.raises(TimeoutError):
        await raw_guest(lambda _: b"Linux version 6.1")


async def test_connecting_to_a_guest_of_another_version() -> None:
    payload = b'{"code":"no_common_version","reason":"too new"}'
    with pytest.raises(VersionError, match="too new"):
        await raw_guest(lambda hello: bytes.fromhex(hello.session) + encode_frame(FrameType.GOODBYE, 0, payload))


async def test_connecting_to_a_guest_that_lies() -> None:
    with pytest.raises(RemoteProtocolError):
        await raw_guest(lambda hello: bytes.fromhex(hello.session) + encode_frame(FrameType.WELCOME, 0, b"[]"))


async def test_an_agent_that_fails_says_so() -> None:
    left, right = socket.socketpair()

    async def broken(_: Hello) -> Welcome:
        raise RuntimeError("no clock")

    async def never(_: Link) -> None:
        raise AssertionError

    serving = asyncio.create_task(serve(await carrier(right), never, make_welcome=broken))
    with pytest.raises(LinkClosedError, match="no clock"):
        await Link.connect(await carrier(left), Hello(), marker=BOOT_MARKER, timeout_s=5)
    await serving


async def test_relay_joins_sockets_through_the_wire(joined: Any) -> None:
    far, far_end = socket.socketpair()
    near, near_end = socket.socketpair()

    async def handler(incoming: Incoming) -> None:
        stream = await incoming.accept()
        await relay(stream, *await asyncio.open_connection(sock=far_end))

    async with joined() as (host, guest):
        guest.on_open = handler
        relaying = asyncio.create_task(relay(await host.open("tunnel"), *await asyncio.open_connection(sock=near_end)))
        near_reader, near_writer = await asyncio.open_connection(sock=near)
        far_reader, far_writer = await asyncio.open_connection(sock=far)
        blob = bytes(range(256)) * 10000

        async def send() -> None:
            near_writer.write(blob)
            await near_writer.drain()
            near_writer.write_eof()

        sending = asyncio.create_task(send())
        assert await far_reader.read(-1) == blob  # ends, as our direction has
        far_writer.write(b"answer")
        far_writer.close()
        assert await near_reader.read(-1) == b"answer"
        await asyncio.gather(sending, relaying)
        near_writer.close()


async def test_relay_passes_a_reset_on(joined: Any) -> None:
    near, near_end = socket.socketpair()

    async def handler(incoming: Incoming) -> None:
        (await incoming.accept()).reset("gone", "")

    async with joined() as (host, guest):
        guest.on_open = handler
        await relay(await host.open("tunnel"), *await asyncio.open_connection(sock=near_end))
        near.setblocking(False)
        assert near.recv(10) == b""
    near.close()
