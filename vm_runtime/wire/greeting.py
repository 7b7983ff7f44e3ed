"""HELLO and WELCOME, the two greetings of a session, and the limits they carry. Knows nothing of frames.

Unknown keys are ignored, so that a newer end can send more; known keys are checked strictly. A restored snapshot is an
old agent: what is added later is optional, or belongs to `extra`.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vm_runtime.wire.errors import RemoteProtocolError
from vm_runtime.wire.generations import GENERATION

# The versions of the wire that this code speaks. The lowest rises only when no stored snapshot has an older agent.
MIN_VERSION = 1
MAX_VERSION = 1

MARKER_BYTES = 16
ENTROPY_BYTES = 64
MAX_IDENTITY_ENTRIES = 64
MAX_STRING_CHARACTERS = 1024

_HEX32 = re.compile(r"[0-9a-f]{32}", re.ASCII)


def _checked(value: Mapping[str, Any], key: str, kind: type, default: object = ...) -> Any:
    """value[key] if it is of that type (bool is no int); RemoteProtocolError if not, or if missing with no default."""
    found = value.get(key, default)
    if found is ...:
        raise RemoteProtocolError(f"Greeting without {key}")
    if found is default:
        return found
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise RemoteProtocolError(f"Greeting with a {key} that is no {kind.__name__}")
    if isinstance(found, str) and len(found) > MAX_STRING_CHARACTERS:
        raise RemoteProtocolError(f"Greeting with a {key} of {len(found)} characters")
    return found


def _checked_int(value: Mapping[str, Any], key: str, low: int, high: int) -> int:
    found: int = _checked(value, key, int)
    if not low <= found <= high:
        raise RemoteProtocolError(f"Greeting with {key} {found}; it is between {low} and {high}")
    return found


def _checked_hex(value: Mapping[str, Any], key: str) -> str:
    found: str = _checked(value, key, str)
    if not _HEX32.fullmatch(found):
        raise RemoteProtocolError(f"Greeting with a {key} that is not 32 hexadecimal digits")
    return found


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one end is ready to receive; the other end obeys.

    window_bytes: unread bytes per stream. 256 KiB is 8 ms of a 31 MB/s wire, more than any round trip on one machine.
    max_streams: streams that the other end has open. 256: five channels for each of fifty clients of one kernel;
    with all windows full and nobody reading, 64 MiB, the most one guest can take of a gateway.
    max_pending_opens: those of them not yet answered. 64 at 32 KiB are 2 MiB.
    """

    window_bytes: int = 256 * 1024
    max_streams: int = 256
    max_pending_opens: int = 64

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Limits:
        """Checked limits of the peer. The upper bounds only keep the numbers sane; each end bounds its own queues."""
        return cls(
            window_bytes=_checked_int(value, "window_bytes", 1024, 16 * 1024 * 1024),
            max_streams=_checked_int(value, "max_streams", 1, 65536),
            max_pending_opens=_checked_int(value, "max_pending_opens", 1, 65536),
        )


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The host's greeting. What has to be new in every session is, where it is not given, and the time is that of now:
    make it right before `Link.connect`.

    session, next_marker: 32 hex digits.
    wall_clock_ns: since 1970, UTC.
    entropy: 64 bytes for the guest's random pool.
    identity: who the guest is now (sandbox_id, hostname, ...).
    kernel_key: the kernel's new HMAC key; None keeps it.
    restored: whether the guest comes from a snapshot.
    keep_random: leave the kernel's random numbers as they are.
    generation: of the host's code (generations.py).
    """

    session: str = field(default_factory=lambda: secrets.token_hex(MARKER_BYTES))
    next_marker: str = field(default_factory=lambda: secrets.token_hex(MARKER_BYTES))
    wall_clock_ns: int = field(default_factory=time.time_ns)
    entropy: bytes = field(default_factory=lambda: os.urandom(ENTROPY_BYTES), repr=False)
    identity: Mapping[str, str] = field(default_factory=dict)
    kernel_key: str | None = field(default=None, repr=False)
    restored: bool = False
    keep_random: bool = False
    versions: tuple[int, int] = (MIN_VERSION, MAX_VERSION)
    limits: Limits = field(default_factory=Limits)
    extra: Mapping[str, Any] = field(default_factory=dict)
    generation: int = GENERATION

    def to_json(self) -> dict[str, Any]:
        return {
            "versions": list(self.versions),
            "session": self.session,
            "next_marker": self.next_marker,
            "wall_clock_ns": self.wall_clock_ns,
            "entropy": base64.b64encode(self.entropy).decode(),
            "identity": dict(self.identity),
            "kernel_key": self.kernel_key,
            "restored": self.restored,
            "keep_random": self.keep_random,
            "limits": asdict(self.limits),
            "extra": dict(self.extra),
            **_generation_json(self.generation),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Hello:
        """A checked HELLO; RemoteProtocolError says which field is wrong."""
        try:
            entropy = base64.b64decode(_checked(value, "entropy", str), validate=True)
        except (binascii.Error, ValueError) as error:
            raise RemoteProtocolError("Greeting with an entropy that is not base64") from error
        if len(entropy) != ENTROPY_BYTES:
            raise RemoteProtocolError(f"Greeting with {len(entropy)} bytes of entropy; it has {ENTROPY_BYTES}")
        identity = _checked(value, "identity", dict)
        if len(identity) > MAX_IDENTITY_ENTRIES:
            raise RemoteProtocolError(f"Greeting with an identity of {len(identity)} entries")
        return cls(
            versions=parse_versions(value),
            session=_checked_hex(value, "session"),
            next_marker=_checked_hex(value, "next_marker"),
            wall_clock_ns=_checked_int(value, "wall_clock_ns", 0, 2**63 - 1),
            entropy=entropy,
            identity={key: _checked(identity, key, str) for key in identity},
            kernel_key=_checked(value, "kernel_key", str, None),
            restored=_checked(value, "restored", bool, False),
            keep_random=_checked(value, "keep_random", bool, False),
            limits=Limits.from_json(_checked(value, "limits", dict)),
            extra=_checked(value, "extra", dict, {}),
            generation=_generation(value),
        )


@dataclass(frozen=True, kw_only=True)
class KernelStatus:
    """The kernel in the guest. state: starting, idle or busy ... (the agent's word); pid: in the guest."""

    state: str
    pid: int
    busy: bool

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> KernelStatus:
        return cls(
            state=_checked(value, "state", str),
            pid=_checked_int(value, "pid", 0, 2**31 - 1),
            busy=_checked(value, "busy", bool),
        )


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The guest's answer. `version` and `limits` are filled in by the session; the agent gives the rest.

    kernel: None where no kernel runs. generation: of the agent's code (generations.py).
    """

    agent_version: str
    kernel: KernelStatus | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    version: int = MAX_VERSION
    limits: Limits = field(default_factory=Limits)
    generation: int = GENERATION

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "agent_version": self.agent_version,
            "kernel": None if self.kernel is None else asdict(self.kernel),
            "limits": asdict(self.limits),
            "extra": dict(self.extra),
            **_generation_json(self.generation),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Welcome:
        """A checked WELCOME; RemoteProtocolError says which field is wrong."""
        kernel = _checked(value, "kernel", dict, None)
        return cls(
            version=_checked_int(value, "version", 1, 65535),
            agent_version=_checked(value, "agent_version", str),
            kernel=None if kernel is None else KernelStatus.from_json(kernel),
            limits=Limits.from_json(_checked(value, "limits", dict)),
            extra=_checked(value, "extra", dict, {}),
            generation=_generation(value),
        )


def _generation(value: Mapping[str, Any]) -> int:
    return _checked_int(value, "generation", 1, 65535) if "generation" in value else 1


def _generation_json(generation: int) -> dict[str, int]:
    """The first generation did not name itself."""
    return {"generation": generation} if generation > 1 else {}


def parse_session(value: Mapping[str, Any]) -> str:
    """The session id of a HELLO whose other fields may be wrong: with it the guest can at least answer that."""
    return _checked_hex(value, "session")


def parse_versions(value: Mapping[str, Any]) -> tuple[int, int]:
    """(lowest, highest) version in a HELLO, which must be readable in every version to come."""
    found = _checked(value, "versions", list)
    if len(found) != 2 or not all(type(item) is int and 1 <= item <= 65535 for item in found) or found[0] > found[1]:
        raise RemoteProtocolError("Greeting with versions that are not [lowest, highest]")
    return found[0], found[1]


def choose_version(offered: tuple[int, int]) -> int | None:
    """The highest version that both ends speak, None where there is none."""
    version = min(offered[1], MAX_VERSION)
    return version if version >= max(offered[0], MIN_VERSION) else None
