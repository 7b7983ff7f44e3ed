"""What a session reports to its owner: one frozen value per thing the peer did. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vm_runtime.wire.greeting import Hello, Welcome


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """Guest only. You must call `WireSession.welcome` (or `WireSession.close`) afterwards."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class WelcomeReceived:
    """Host only. You must store the HELLO's next marker now."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """You must call `WireSession.accept` or `WireSession.reject` afterwards."""

    stream_id: int
    kind: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StreamAccepted:
    stream_id: int
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StreamRejected:
    stream_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class DataReceived:
    """You must call `WireSession.acknowledge` once these bytes are consumed; it is what bounds your memory."""

    stream_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """`WireSession.sendable` has grown."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The peer sends no more on this stream."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer gave this stream up, in both directions."""

    stream_id: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class PongReceived:
    token: int


@dataclass(frozen=True, slots=True)
class GoodbyeReceived:
    """The peer ended the session. Nothing follows."""

    code: str
    reason: str


Event = (
    HelloReceived
    | WelcomeReceived
    | StreamOpened
    | StreamAccepted
    | StreamRejected
    | DataReceived
    | WindowOpened
    | StreamEnded
    | StreamReset
    | PongReceived
    | GoodbyeReceived
)
