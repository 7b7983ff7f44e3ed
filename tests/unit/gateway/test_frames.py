"""The codecs against jupyter_server's own, and against hostile input."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)

from gateway.errors import FrameError
from gateway.frames import (
    KernelMessage,
    Signer,
    decode_legacy,
    decode_v1,
    encode_legacy,
    encode_v1,
    from_zmq,
    to_zmq,
)

HEADER = {
    "msg_id": "a-1",
    "msg_type": "execute_request",
    "session": "s",
    "username": "u",
    "date": "d",
    "version": "5.3",
}
json_objects = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20) | st.none(), max_size=4)
messages = st.builds(
    lambda channel, parent, metadata, content, buffers: KernelMessage(
        channel,
        json.dumps(HEADER).encode(),
        json.dumps(parent).encode(),
        json.dumps(metadata).encode(),
        json.dumps(content, ensure_ascii=False).encode(),
        tuple(buffers),
    ),
    st.sampled_from(["shell", "control", "stdin"]),
    json_objects,
    json_objects,
    json_objects,
    st.lists(st.binary(max_size=40), max_size=3),
)


@given(messages)
def test_v1_is_read_and_written_as_jupyter_server_does(message: KernelMessage) -> None:
    data = encode_v1(message)
    channel, parts = deserialize_msg_from_ws_v1(data)
    assert (channel, parts[:4], tuple(parts[4:])) == (
        message.channel,
        [message.header, message.parent, message.metadata, message.content],
        message.buffers,
    )
    assert data == serialize_msg_to_ws_v1(parts, channel)
    assert encode_v1(decode_v1(data)) == data


@given(messages)
def test_legacy_is_read_and_written_as_jupyter_server_does(message: KernelMessage) -> None:
    data, binary = encode_legacy(message)
    assert binary == bool(message.buffers)
    theirs = deserialize_binary_message(data) if binary else json.loads(data)
    assert theirs["msg_id"] == "a-1"
    assert theirs["msg_type"] == "execute_request"
    assert theirs["channel"] == message.channel
    assert theirs["content"] == json.loads(bytes(message.content))
    assert tuple(theirs["buffers"]) == message.buffers
    for mine in (decode_legacy(data if binary else data.decode()), decode_legacy(_theirs_again(theirs))):
        assert mine.channel == message.channel
        assert tuple(mine.buffers) == message.buffers
        assert json.loads(bytes(mine.content)) == theirs["content"]


def _theirs_again(message: dict[str, object]) -> bytes | str:
    return serialize_binary_message(message) if message["buffers"] else json.dumps(message)


@given(messages)
def test_a_kernel_accepts_the_signature(message: KernelMessage) -> None:
    session = Session(key=b"secret")
    frames = to_zmq(message, Signer(b"secret"))
    identities, rest = session.feed_identities([b"client", *map(bytes, frames)])
    assert identities == [b"client"]
    assert session.deserialize(rest)["content"] == json.loads(bytes(message.content))


def test_no_key_no_signature() -> None:
    assert Signer(b"").sign(b"x") == b""


@given(messages, st.lists(st.binary(max_size=10), max_size=2))
def test_zmq_identities_and_signature_are_dropped(message: KernelMessage, topic: list[bytes]) -> None:
    frames = [memoryview(bytes(frame)) for frame in [*topic, *to_zmq(message, Signer(b"k"))]]
    received = from_zmq(message.channel, frames)
    assert received is not None
    assert encode_v1(received) == encode_v1(message)


@given(st.lists(st.binary(max_size=20), min_size=4, max_size=4))
def test_what_is_no_utf8_is_read_as_jupyter_client_does(parts: list[bytes]) -> None:
    received = from_zmq("iopub", [memoryview(part) for part in (b"<IDS|MSG>", b"", *parts, b"\xff")])
    assert received is not None
    passed = [received.header, received.parent, received.metadata, received.content]
    assert [bytes(part).decode() for part in passed] == [part.decode("utf-8", "replace") for part in parts]
    assert list(map(bytes, received.buffers)) == [b"\xff"]


@pytest.mark.parametrize("frames", [[], [b"x"], [b"<IDS|MSG>"], [b"<IDS|MSG>", b"sig", b"{}", b"{}", b"{}"]])
def test_what_is_no_message_is_none(frames: list[bytes]) -> None:
    assert from_zmq("iopub", frames) is None


@given(st.binary(max_size=200))
def test_v1_never_fails_otherwise(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_v1(data)


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**64 - 1), max_size=8), st.binary(max_size=80))
def test_v1_with_any_offsets(count: int, offsets: list[int], rest: bytes) -> None:
    data = struct.pack(f"<{1 + len(offsets)}Q", count, *offsets) + rest
    try:
        message = decode_v1(data)
    except FrameError:
        return
    assert message.size <= len(data)


@given(st.binary(max_size=100) | st.text(max_size=100) | json_objects.map(json.dumps))
def test_legacy_never_fails_otherwise(data: bytes | str) -> None:
    with pytest.raises(FrameError):
        decode_legacy(data)


@pytest.mark.parametrize("channel", ["iopub", "hb", "", None, 7])
def test_a_client_may_not_send_on_other_channels(channel: object) -> None:
    message = {"channel": channel, "header": HEADER, "content": {}}
    if channel in ("", None):
        assert decode_legacy(json.dumps(message)).channel == "shell"
    else:
        with pytest.raises(FrameError, match="shell, control or stdin"):
            decode_legacy(json.dumps(message))


def test_deep_json_is_refused() -> None:
    with pytest.raises(FrameError):
        decode_legacy('{"header": ' + "[" * 100_000)


def test_a_header_that_is_no_json_cannot_be_written_in_the_old_form() -> None:
    with pytest.raises(FrameError):
        encode_legacy(KernelMessage("iopub", b"[]", b"{}", b"{}", b"{}"))
