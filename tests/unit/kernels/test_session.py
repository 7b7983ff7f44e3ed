"""A session with a guest that sends what it likes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from kernels import session as module
from kernels.errors import MachineFailedError
from kernels.exec import CommandRequest, SandboxCommands
from kernels.files import SandboxFiles
from kernels.session import Greeting, GuestEvent, GuestSession, KernelExited, KernelStatus, condensed
from tests.unit.kernels.conftest import Service
from vm_runtime.wire.carriers import Carrier, SocketCarrier
from vm_runtime.wire.command_frames import CommandFrame, encode_frame
from vm_runtime.wire.greeting import Hello, Welcome
from vm_runtime.wire.link import Link
from vm_runtime.wire.protocol import BOOT_MARKER
from vm_runtime.wire.serving import serve
from vm_runtime.wire.stream import Incoming

FLOOD = 5000
GREETING = Greeting(marker=BOOT_MARKER.hex(), identity={}, key=None, restored=False)


@asynccontextmanager
async def guest(
    directory: Path, behave: Callable[[Link], Awaitable[None]]
) -> AsyncIterator[Callable[[], Awaitable[Carrier]]]:
    """One that answers a greeting and then does as it likes. How to reach it; at the end it waits for its wire's."""
    path, served = directory / "wire.sock", asyncio.Event()

    async def welcome(hello: Hello) -> Welcome:
        return Welcome(agent_version="1", kernel=None, extra={})

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(SocketCarrier(reader, writer), behave, make_welcome=welcome)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        served.set()

    async with await asyncio.start_unix_server(accept, path), asyncio.timeout(60):
        yield lambda: SocketCarrier.connect_unix(path)
        await served.wait()


def status(state: Literal["busy", "idle"], cell: int | None = None) -> KernelStatus:
    return KernelStatus(state=state, cell=cell)


def test_of_many_changes_of_state_the_last_two_count() -> None:
    exited = KernelExited(pid=1)
    flood: list[GuestEvent] = [status("busy"), status("idle", 1), exited] * 100
    assert condensed([*flood, status("busy"), status("idle", 7)]) == [exited] * 100 + [
        status("busy"),
        status("idle", 7),
    ]
    assert condensed([status("idle", 7), status("busy")]) == [status("idle", 7), status("busy")]
    assert condensed([]) == []


async def test_a_flood_of_events_is_condensed_and_its_end_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READS_PER_S", 1e6)

    async def flood(link: Link) -> None:
        async with await link.open("events") as stream:
            lines = [json.dumps({"event": "kernel.status", "state": state}) for state in ("busy", "idle")]
            await stream.write("".join(f"{line}\n" for line in lines * FLOOD).encode())
            last = {"event": "kernel.status", "state": "idle", "execution_count": 99}
            await stream.write(json.dumps(last).encode() + b"\n")
            await link.wait_closed()

    async with guest(tmp_path, flood) as open_wire:
        session = await GuestSession.open(open_wire, GREETING)
        events: list[GuestEvent] = []
        ended = asyncio.Event()

        def note(event: GuestEvent) -> None:
            events.append(event)
            if event == status("idle", 99):
                ended.set()

        session.on_event = note
        await ended.wait()
        await session.close()
    assert len(events) < FLOOD / 10


async def test_a_session_that_is_given_up_while_it_begins_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOCK_LATE_S", -1.0)
    asked = asyncio.Event()

    async def never_answer(incoming: Incoming) -> None:
        asked.set()
        await asyncio.Event().wait()

    async def session(link: Link) -> None:
        link.on_open = never_answer
        await link.wait_closed()

    async with guest(tmp_path, session) as open_wire:
        opening = asyncio.create_task(GuestSession.open(open_wire, GREETING))
        await asked.wait()
        opening.cancel()  # the guest waits for the end of its wire


async def test_exits_that_a_kernel_cannot_have_had_are_not_queued(kernels: Service) -> None:
    live = kernels.machines.running(await kernels.new())
    for pid in range(FLOOD):
        live.on_event(KernelExited(pid=pid))
    assert live._exits.qsize() < 10


async def test_a_greeting_that_is_none_opens_no_wire() -> None:
    opened = False

    async def open_wire() -> Carrier:
        nonlocal opened
        opened = True
        raise OSError

    with pytest.raises(ValueError, match="hex"):
        await GuestSession.open(open_wire, Greeting(marker="no hex", identity={}, key=None, restored=False))
    assert not opened


@pytest.mark.parametrize("kind", ["exec.start", "exec.attach", "files.read"])
async def test_a_stream_whose_beginning_is_made_up_is_given_up(tmp_path: Path, kind: str) -> None:
    given_up = asyncio.Event()

    async def answer(incoming: Incoming) -> None:
        stream = await incoming.accept({"command_id": "/", "offset": -1})
        if kind == "exec.start":
            await stream.write(encode_frame(CommandFrame.STARTED, b"[]"))
        await stream.wait_lost()
        given_up.set()

    async def lie(link: Link) -> None:
        link.on_open = answer
        await link.wait_closed()

    async with guest(tmp_path, lie) as open_wire:
        session = await GuestSession.open(open_wire, GREETING)
        with pytest.raises(MachineFailedError):
            match kind:
                case "exec.start":
                    await SandboxCommands(session).start(CommandRequest(command="true"))
                case "exec.attach":
                    await SandboxCommands(session).attach("a", stdin=False)
                case _:
                    await SandboxFiles(session).read("file")
        await given_up.wait()
        await session.close()
