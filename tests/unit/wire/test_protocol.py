"""The session as a state machine: two of them joined by arbitrary splits, misuse, hostile peers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vm_runtime.wire import events as ev
from vm_runtime.wire.errors import LocalProtocolError, RemoteProtocolError, VersionError
from vm_runtime.wire.frames import HEADER, FrameType, encode_frame
from vm_runtime.wire.greeting import Hello, Limits, Welcome
from vm_runtime.wire.marker import MarkerScanner
from vm_runtime.wire.protocol import (
    BOOT_MARKER,
    MAX_PENDING_CONTROL_BYTES,
    MAX_SKIPPED_BYTES,
    MAX_UNANSWERED_RESETS,
    WireSession,
)
from vm_runtime.wire.states import SessionState

SMALL = Limits(window_bytes=1024, max_streams=4, max_pending_opens=2)


def drain(session: WireSession) -> bytes:
    out = b""
    while buffers := session.data_to_send(1 << 16):
        out += b"".join(buffers)
    return out


def greet(limits: Limits | None = None) -> tuple[WireSession, WireSession]:
    host = WireSession.host(Hello(limits=limits or Limits()), marker=BOOT_MARKER)
    guest = WireSession.guest(limits=limits)
    guest.receive_data(drain(host)[16:])
    guest.welcome(Welcome(agent_version="t"))
    host.receive_data(drain(guest))
    assert host.state is guest.state is SessionState.OPEN
    return host, guest


def opened(kind: str, stream_id: int, **params: Any) -> bytes:
    return encode_frame(FrameType.OPEN, stream_id, json.dumps({"kind": kind, "params": params}).encode())


class TwoEnds(RuleBasedStateMachine):
    """Both ends do anything they may, bytes arrive in any pieces: each stream's bytes arrive in order, within windows,
    and no end ever blames the other."""

    @initialize()
    def begin(self) -> None:
        self.ends = greet(SMALL)
        self.flight = [bytearray(), bytearray()]  # to host, to guest
        self.open: list[dict[int, str]] = [{}, {}]
        self.sent: list[dict[int, bytearray]] = [{}, {}]
        self.got: list[dict[int, bytearray]] = [{}, {}]
        self.unread: list[dict[int, int]] = [{}, {}]
        self.ended: list[set[int]] = [set(), set()]
        self.pending: list[list[int]] = [[], []]
        self.reset: set[int] = set()

    def pump(self, end: int) -> None:
        self.flight[1 - end] += b"".join(self.ends[end].data_to_send(700))

    @rule(end=st.integers(0, 1))
    def open_stream(self, end: int) -> None:
        if self.ends[end].can_open:
            self.ends[end].open_stream("k", {"n": 1})

    @rule(end=st.integers(0, 1), ok=st.booleans())
    def answer(self, end: int, ok: bool) -> None:
        if self.pending[end]:
            stream = self.pending[end].pop(0)
            if stream in self.reset:
                return
            if ok:
                self.ends[end].accept(stream, {})
                self.add(end, stream)
            else:
                self.ends[end].reject(stream, "no", "no")

    def add(self, end: int, stream: int) -> None:
        self.open[end][stream] = "open"
        self.sent[end][stream] = bytearray()
        self.got[end][stream] = bytearray()
        self.unread[end][stream] = 0

    def pick(self, end: int, data: st.DataObject) -> int | None:
        streams = [s for s in self.open[end] if s not in self.reset]
        return data.draw(st.sampled_from(streams)) if streams else None

    @rule(end=st.integers(0, 1), size=st.integers(1, 3000), data=st.data())
    def send(self, end: int, size: int, data: st.DataObject) -> None:
        stream = self.pick(end, data)
        if stream is None or stream in self.ended[end]:
            return
        room = self.ends[end].sendable(stream)
        piece = bytes((len(self.sent[end][stream]) + i) % 251 for i in range(min(size, room)))
        self.ends[end].send_data(stream, piece)
        self.sent[end][stream] += piece
        with pytest.raises(LocalProtocolError):
            self.ends[end].send_data(stream, b"x" * (room - len(piece) + 1))

    @rule(end=st.integers(0, 1), data=st.data())
    def end_stream(self, end: int, data: st.DataObject) -> None:
        stream = self.pick(end, data)
        if stream is not None and stream not in self.ended[end]:
            self.ends[end].end(stream)
            self.ended[end].add(stream)

    @rule(end=st.integers(0, 1), data=st.data())
    def reset_stream(self, end: int, data: st.DataObject) -> None:
        stream = self.pick(end, data)
        if stream is not None:
            self.ends[end].reset(stream, "r", "")
            self.reset.add(stream)

    @rule(end=st.integers(0, 1), data=st.data())
    def consume(self, end: int, data: st.DataObject) -> None:
        stream = self.pick(end, data)
        if stream is not None and self.unread[end][stream]:
            count = data.draw(st.integers(1, self.unread[end][stream]))
            self.ends[end].acknowledge(stream, count)
            self.unread[end][stream] -= count

    @rule(end=st.integers(0, 1), size=st.integers(1, 2000))
    def deliver(self, end: int, size: int) -> None:
        self.pump(1 - end)
        piece = bytes(self.flight[end][:size])
        del self.flight[end][:size]
        for event in self.ends[end].receive_data(piece):
            match event:
                case ev.StreamOpened(stream):
                    self.pending[end].append(stream)
                case ev.StreamAccepted(stream):
                    self.add(end, stream)
                case ev.DataReceived(stream, payload):
                    self.got[end][stream] += payload
                    self.unread[end][stream] += len(payload)
                case ev.StreamReset(stream):
                    self.reset.add(stream)

    @invariant()
    def windows_hold_and_bytes_are_in_order(self) -> None:
        for end in (0, 1):
            for stream, got in self.got[end].items():
                assert self.unread[end][stream] <= SMALL.window_bytes
                assert self.sent[1 - end].get(stream, b"")[: len(got)] == got
            assert len(self.open[end]) - len(self.open[end]) <= SMALL.max_streams


TwoEnds.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestTwoEnds = TwoEnds.TestCase


@given(st.binary(max_size=4000), st.lists(st.integers(1, 400), max_size=30), st.booleans())
@settings(max_examples=150, deadline=None)
def test_garbage_is_only_ever_the_peers_fault(garbage: bytes, cuts: list[int], greeted: bool) -> None:
    session = greet()[0] if greeted else WireSession.host(Hello(), marker=BOOT_MARKER)
    try:
        for cut in [*cuts, len(garbage)]:
            session.receive_data(garbage[:cut])
            garbage = garbage[cut:]
    except RemoteProtocolError:
        assert session.state is SessionState.CLOSED
        assert session.receive_data(b"more") == []


@given(st.binary(max_size=300), st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=20))
@settings(max_examples=100, deadline=None)
def test_a_marker_is_found_however_it_is_cut(before: bytes, after: bytes, cuts: list[int]) -> None:
    scanner = MarkerScanner(b"0" * 16, bytes(range(16)))
    data, found, rest = before + bytes(range(16)) + after, False, b""
    for cut in [*cuts, len(data)]:
        piece, data = data[:cut], data[cut:]
        hit, piece = scanner.feed(piece)
        found = found or hit
        rest = piece if hit else rest + piece
    assert found and rest == after


def test_a_guest_is_greeted_behind_leftovers() -> None:
    host = WireSession.host(Hello(), marker=BOOT_MARKER)
    guest = WireSession.guest()
    for byte in drain(host)[16:]:
        guest.receive_data(bytes([byte]))
    guest.welcome(Welcome(agent_version="t"))
    assert host.receive_data(b"leftover" * 999 + drain(guest))[0] == ev.WelcomeReceived(
        Welcome(agent_version="t"),
    )


def test_a_host_gives_up_on_endless_leftovers() -> None:
    host = WireSession.host(Hello(), marker=BOOT_MARKER)
    with pytest.raises(RemoteProtocolError, match="No greeting"):
        for _ in range(MAX_SKIPPED_BYTES // 65536 + 1):
            host.receive_data(bytes(65536))


def test_no_common_version_is_told_to_both() -> None:
    hello = Hello()
    host = WireSession.host(hello, marker=BOOT_MARKER)
    payload = json.dumps({**hello.to_json(), "versions": [7, 9], "limits": "of the future"}).encode()
    guest = WireSession.guest()
    with pytest.raises(VersionError):
        guest.receive_data(encode_frame(FrameType.HELLO, 0, payload))
    (event,) = host.receive_data(drain(guest))
    assert isinstance(event, ev.GoodbyeReceived) and event.code == "no_common_version"


@pytest.mark.parametrize(
    "change",
    [
        {"session": "x"},
        {"next_marker": "AB" * 16},
        {"entropy": "AA=="},
        {"entropy": "not base64!"},
        {"wall_clock_ns": True},
        {"wall_clock_ns": -1},
        {"identity": {"a": 1}},
        {"identity": {str(i): "" for i in range(65)}},
        {"kernel_key": 5},
        {"versions": [2, 1]},
        {"versions": [True, 1]},
        {"restored": 1},
        {"limits": {}},
        {"limits": {"window_bytes": 0, "max_streams": 1, "max_pending_opens": 1}},
        {"extra": []},
    ],
)
def test_a_wrong_hello_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        Hello.from_json({**Hello().to_json(), **change})


HOSTILE: dict[str, Callable[[], bytes]] = {
    "unknown type": lambda: HEADER.pack(99, 0, 0, 0, 0),
    "flags": lambda: HEADER.pack(FrameType.END, 1, 0, 1, 0),
    "huge length": lambda: HEADER.pack(FrameType.DATA, 0, 0, 2, 2**32 - 1),
    "empty data": lambda: HEADER.pack(FrameType.DATA, 0, 0, 2, 0),
    "never opened": lambda: encode_frame(FrameType.DATA, 2, b"x"),
    "answer to nothing": lambda: encode_frame(FrameType.ACCEPT, 1, b"{}"),
    "our id": lambda: opened("k", 3),
    "id goes back": lambda: opened("k", 6) + opened("k", 4),
    "bad kind": lambda: opened("K!", 2),
    "second welcome": lambda: encode_frame(FrameType.WELCOME, 0, b"{}"),
    "hello to a host": lambda: encode_frame(FrameType.HELLO, 0, b"{}"),
    "pong alone": lambda: encode_frame(FrameType.PONG, 0, bytes(8)),
    "bad utf-8": lambda: encode_frame(FrameType.OPEN, 2, b'{"kind":"\xff"}'),
    "nan": lambda: encode_frame(FrameType.OPEN, 2, b'{"kind":"k","params":{"a":NaN}}'),
    "infinity": lambda: encode_frame(FrameType.OPEN, 2, b'{"kind":"k","params":{"a":1e999}}'),
    "long int": lambda: encode_frame(FrameType.OPEN, 2, b'{"kind":"k","params":{"a":' + b"9" * 9000 + b"}}"),
    "surrogate": lambda: encode_frame(FrameType.OPEN, 2, b'{"kind":"k","params":{"a":"\\ud800"}}'),
    "nested": lambda: encode_frame(FrameType.OPEN, 2, b"[" * 32000),
    "nested a bit": lambda: encode_frame(
        FrameType.OPEN, 2, b'{"kind":"k","params":{"a":' + b"[" * 40 + b"]" * 40 + b"}}"
    ),
    "pending opens": lambda: b"".join(opened("k", 2 * i) for i in range(1, 66)),
    "zero window": lambda: opened("k", 2) + encode_frame(FrameType.WINDOW, 2, bytes(4)),
    "ping flood": lambda: encode_frame(FrameType.PING, 0, bytes(8)) * (MAX_PENDING_CONTROL_BYTES // 84 + 1),
    "rapid reset": lambda: b"".join(
        opened("k", 2 * i) + encode_frame(FrameType.RESET, 2 * i, b'{"code":"c"}')
        for i in range(1, MAX_UNANSWERED_RESETS + 2)
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_end_the_session_with_a_reason(name: str) -> None:
    host, guest = greet()
    with pytest.raises(RemoteProtocolError):
        host.receive_data(HOSTILE[name]())
    (event,) = guest.receive_data(drain(host))
    assert isinstance(event, ev.GoodbyeReceived) and event.reason


def test_more_than_the_window_is_an_error() -> None:
    host, guest = greet(SMALL)
    stream = host.open_stream("k", {})
    guest.receive_data(drain(host))
    guest.accept(stream, {})
    host.receive_data(drain(guest))
    host.receive_data(encode_frame(FrameType.DATA, stream, bytes(1024)))
    with pytest.raises(RemoteProtocolError, match="window"):
        host.receive_data(encode_frame(FrameType.DATA, stream, b"x"))


def test_a_bulk_transfer_does_not_delay_others() -> None:
    host, guest = greet()
    streams = [host.open_stream("k", {}) for _ in range(2)]
    guest.receive_data(drain(host))
    for stream in streams:
        guest.accept(stream, {})
    host.receive_data(drain(guest))
    host.send_data(streams[0], bytes(256 * 1024))
    host.send_data(streams[1], b"small")
    host.ping()
    guest_events = guest.receive_data(b"".join(host.data_to_send(64 * 1024)))
    assert ev.DataReceived(streams[1], b"small") in guest_events
    assert b"".join(guest.data_to_send(100))[0] == FrameType.PONG


def test_many_tiny_writes_are_joined() -> None:
    host, guest = greet()
    stream = host.open_stream("k", {})
    guest.receive_data(drain(host))
    guest.accept(stream, {})
    host.receive_data(drain(guest))
    for _ in range(5000):
        host.send_data(stream, b"x")
    assert len(host.data_to_send(1 << 20)) <= 4


def test_misuse_is_the_callers_fault() -> None:
    host, guest = greet()
    with pytest.raises(LocalProtocolError):
        host.open_stream("k", {"a": "x" * 40000})
    with pytest.raises(LocalProtocolError):
        host.open_stream("k", {"a": float("nan")})
    with pytest.raises(LocalProtocolError):
        host.open_stream("Bad Kind", {})
    with pytest.raises(LocalProtocolError):
        host.accept(2, {})
    with pytest.raises(LocalProtocolError):
        host.end(1)
    with pytest.raises(LocalProtocolError):
        guest.welcome(Welcome(agent_version="again"))
    host.close("closed", "")
    host.close("closed", "")
    with pytest.raises(LocalProtocolError):
        host.open_stream("k", {})
