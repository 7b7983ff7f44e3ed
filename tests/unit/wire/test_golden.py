"""The bytes of version 1, generation 1, frozen: a restored snapshot is an old agent, and speaks what is in here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vm_runtime.wire.errors import RemoteProtocolError
from vm_runtime.wire.generations import GENERATION
from vm_runtime.wire.greeting import Hello, KernelStatus, Limits, Welcome
from vm_runtime.wire.protocol import BOOT_MARKER, WireSession

GOLDEN = json.loads((Path(__file__).parent / "golden" / "version_1.json").read_text())

HELLO = Hello(
    session="00112233445566778899aabbccddeeff",
    next_marker="ffeeddccbbaa99887766554433221100",
    wall_clock_ns=1_700_000_000_123_456_789,
    entropy=bytes(range(64)),
    identity={"sandbox_id": "5a8e", "hostname": "müsli"},
    kernel_key="key",
    restored=True,
    keep_random=False,
    limits=Limits(window_bytes=4096, max_streams=8, max_pending_opens=4),
    extra={"a": [1]},
    generation=1,
)
WELCOME = Welcome(agent_version="1.0", kernel=KernelStatus(state="idle", pid=42, busy=False), extra={}, generation=1)


def send(session: WireSession) -> str:
    return b"".join(session.data_to_send(1 << 20)).hex()


def conversation() -> dict[str, Any]:
    """Every frame of version 1, in the order of a short session."""
    frames: dict[str, Any] = {}
    host = WireSession.host(HELLO, marker=BOOT_MARKER)
    guest = WireSession.guest(limits=Limits(window_bytes=2048))

    def step(name: str, sender: WireSession, receiver: WireSession, skip: int = 0) -> None:
        frames[name] = send(sender)
        receiver.receive_data(bytes.fromhex(frames[name])[skip:])

    step("marker_hello", host, guest, skip=16)
    guest.welcome(WELCOME)
    step("session_welcome", guest, host)
    stream = host.open_stream("kernel.channel", {"channel": "shell"})
    step("open", host, guest)
    guest.accept(stream, {"ok": True})
    step("accept", guest, host)
    host.send_data(stream, b"x" * 1024)
    step("data", host, guest)
    guest.acknowledge(stream, 1024)
    step("window", guest, host)
    host.end(stream)
    step("end", host, guest)
    guest.reset(stream, "gone", "no more")
    step("reset", guest, host)
    call = guest.open_stream("tunnel", {})
    step("open_by_guest", guest, host)
    host.reject(call, "refused", "no")
    step("reject", host, guest)
    host.ping()
    step("ping", host, guest)
    step("pong", guest, host)
    host.close("closed", "bye")
    step("goodbye", host, guest)
    return frames


def test_frames_are_those_of_version_1() -> None:
    assert conversation() == GOLDEN


@pytest.mark.parametrize("name", ["marker_hello", "session_welcome"])
def test_greetings_are_read_back(name: str) -> None:
    payload = json.loads(bytes.fromhex(GOLDEN[name])[28:])
    if name == "marker_hello":
        assert Hello.from_json(payload) == HELLO
        assert Hello.from_json({**payload, "unknown": 1}) == HELLO
    else:
        assert Welcome.from_json(payload).kernel == WELCOME.kernel


def test_later_generations_name_themselves() -> None:
    for greeting in (HELLO, WELCOME):
        first, second = greeting.to_json(), replace(greeting, generation=2).to_json()
        assert {**first, "generation": 2} == second
        assert type(greeting).from_json(first).generation == 1
        assert type(greeting).from_json(second).generation == 2
        with pytest.raises(RemoteProtocolError):
            type(greeting).from_json({**first, "generation": "2"})
    assert Hello().generation == Welcome(agent_version="1").generation == GENERATION
