"""Fuzz target: no input from a guest crashes, blocks or bloats the host's side of the wire.

    python tests/fuzz/fuzz_wire.py [--seconds 60] [--seed N]     random mutations of a real conversation, reproducible
    python tests/fuzz/fuzz_wire.py --atheris [libFuzzer options]  guided by coverage, where atheris is installed

Both run `check`, which feeds one input to a host in every state that it can be in.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vm_runtime.wire import events as ev
from vm_runtime.wire.errors import RemoteProtocolError
from vm_runtime.wire.frames import FrameType, encode_frame
from vm_runtime.wire.greeting import Hello, Welcome
from vm_runtime.wire.payloads import encode_json
from vm_runtime.wire.protocol import BOOT_MARKER, MAX_PENDING_CONTROL_BYTES, WireSession
from vm_runtime.wire.states import SessionState

HELLO = Hello(session="ab" * 16, next_marker="cd" * 16, wall_clock_ns=0, entropy=bytes(64))
GREETING = bytes.fromhex(HELLO.session) + encode_frame(
    FrameType.WELCOME, 0, encode_json(Welcome(agent_version="fuzz").to_json())
)
# One answer to an OPEN beyond the limit at most: the limit is looked at after each frame.
MAX_CONTROL = MAX_PENDING_CONTROL_BYTES + 64 * 1024


def seeds() -> list[bytes]:
    """What a real guest sends, after its greeting: each frame, as the beginning of mutations."""

    def coded(key: str) -> bytes:
        return json.dumps({"code": "c", key: "why"}).encode()

    return [
        GREETING,
        encode_frame(FrameType.OPEN, 2, b'{"kind":"events","params":{"a":[1,2,{"b":null}]}}'),
        encode_frame(FrameType.OPEN, 4, b'{"kind":"k"}'),
        encode_frame(FrameType.ACCEPT, 1, b'{"pid":1}'),
        encode_frame(FrameType.REJECT, 3, coded("message")),
        encode_frame(FrameType.DATA, 1, bytes(range(200))),
        encode_frame(FrameType.DATA, 2, b'{"event":"kernel.status"}\n'),
        encode_frame(FrameType.WINDOW, 1, (131072).to_bytes(4, "big")),
        encode_frame(FrameType.END, 1),
        encode_frame(FrameType.END, 2),
        encode_frame(FrameType.RESET, 1, coded("reason")),
        encode_frame(FrameType.RESET, 2, coded("reason")),
        encode_frame(FrameType.PING, 0, bytes(8)),
        encode_frame(FrameType.PONG, 0, bytes(8)),
        encode_frame(FrameType.GOODBYE, 0, coded("reason")),
    ]


def held_bytes(session: WireSession) -> int:
    """What the session holds because of its peer."""
    queued = sum(record.queued for record in session._streams.values())
    return session._control_bytes + len(session._partial) + queued


def host(*, greeted: bool) -> WireSession:
    session = WireSession.host(HELLO, marker=BOOT_MARKER)
    session.data_to_send(1 << 20)
    if greeted:
        session.receive_data(GREETING)
        session.open_stream("kernel.channel", {"channel": "shell"})
        session.open_stream("kernel.start", {})
        session.ping()
    return session


def drive(session: WireSession, data: bytes, piece: int) -> None:
    """Feed data in pieces to a host that answers as a Link does, and never reads faster than its peer lets it."""
    unread: dict[int, int] = {}
    for offset in range(0, len(data), piece):
        events = session.receive_data(data[offset : offset + piece])
        lost = {event.stream_id for event in events if isinstance(event, ev.StreamReset)}
        if session.state is SessionState.CLOSED:
            return
        for event in events:
            match event:
                case ev.StreamOpened(stream_id, kind) if stream_id not in lost:
                    if kind == "events":
                        session.accept(stream_id, {"ok": True})
                    else:
                        session.reject(stream_id, "unknown", kind)
                case ev.StreamAccepted(stream_id) | ev.WindowOpened(stream_id):
                    if room := session.sendable(stream_id):
                        session.send_data(stream_id, bytes(room))
                case ev.DataReceived(stream_id, payload):
                    unread[stream_id] = unread.get(stream_id, 0) + len(payload)
                    if unread[stream_id] > session.limits.window_bytes // 2:
                        session.acknowledge(stream_id, unread.pop(stream_id))
                case ev.StreamEnded(stream_id) if stream_id not in lost:
                    session.end(stream_id)
        assert held_bytes(session) <= MAX_CONTROL + 64 * 256 * 1024, "the session holds too much"
        assert len(session._streams) <= session.limits.max_streams + 2


def check(data: bytes) -> None:
    """One input. Anything but an ordinary return is a finding."""
    for greeted in (False, True):
        for piece in (len(data) or 1, 7):
            session = host(greeted=greeted)
            try:
                drive(session, data, piece)
            except RemoteProtocolError:
                assert session.state is SessionState.CLOSED
                assert len(b"".join(session.data_to_send(1 << 20))) < 64 * 1024
                assert session.data_to_send(1) == []


def mutate(rng: random.Random, corpus: list[bytes]) -> bytes:
    """A sequence of real frames with some damage."""
    data = bytearray(b"".join(rng.choices(corpus, k=rng.randint(1, 12))))
    if rng.random() < 0.3:
        data[:0] = GREETING
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        position = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[position : position + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[position : position + rng.randint(1, 30)]
            case 2:
                data[position:position] = rng.randbytes(rng.randint(1, 30))
            case 3:
                data[position:position] = rng.choice(corpus) * rng.choice((1, 3, 300))
            case 4:
                data[position : position + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x00\x01\x00\x00", b"[[[["))
    return bytes(data)


def run(*, seconds: float, seed: int, max_inputs: int | None = None) -> int:
    """Random mutations for a time; how many. A finding is written to a file named after the seed and raised."""
    rng, corpus, count = random.Random(seed), seeds(), 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (max_inputs is None or count < max_inputs):
        data = mutate(rng, corpus)
        try:
            check(data)
        except BaseException:
            Path(f"crash-wire-{seed}-{count}.bin").write_bytes(data)
            raise
        count += 1
    return count


def main() -> None:
    if "--atheris" in sys.argv:
        import atheris

        sys.argv.remove("--atheris")
        atheris.instrument_all()
        atheris.Setup(sys.argv, check)
        atheris.Fuzz()
        return
    parser = argparse.ArgumentParser(description="Fuzz the host's side of the wire.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    print(f"{run(seconds=options.seconds, seed=options.seed)} inputs, nothing found")


if __name__ == "__main__":
    main()
