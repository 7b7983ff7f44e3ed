"""Where messages end, how large they are, and which PONG came: however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import zmtp
from kernels.zmtp import Frames, MessageTooLongError, ping

LIMIT = 10_000


def frame(size: int, *, more: bool) -> bytes:
    flags = (1 if more else 0) | (2 if size > 255 else 0)
    return bytes([flags]) + size.to_bytes(8 if size > 255 else 1, "big") + bytes(size)


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp, "MAX_MESSAGE_BYTES", LIMIT)


def feed(frames: Frames, data: bytes, step: int) -> None:
    for start in range(0, len(data), step):
        frames.feed(data[start : start + step])


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=9), repeats=st.integers(1, 20), step=st.integers(1, 999)
)
def test_any_number_of_messages_within_the_limit_passes(sizes: list[int], repeats: int, step: int) -> None:
    message = b"".join(frame(size, more=index < len(sizes) - 1) for index, size in enumerate(sizes))
    feed(Frames(), message * repeats, step)


@given(size=st.integers(0, 3000), step=st.integers(1, 999))
def test_a_message_without_an_end_does_not_pass(size: int, step: int) -> None:
    ping = bytes([4, 3]) + b"abc"
    with pytest.raises(MessageTooLongError):
        feed(Frames(), (frame(size, more=True) + ping) * (LIMIT // 50), step)


@given(sizes=st.lists(st.integers(0, 900), min_size=1, max_size=9), repeats=st.integers(1, 5), step=st.integers(1, 999))
def test_each_end_of_a_message_is_found(sizes: list[int], repeats: int, step: int) -> None:
    message = b"".join(frame(size, more=index < len(sizes) - 1) for index, size in enumerate(sizes))
    frames, ends, rest, fed = Frames(), [], message * repeats, 0
    while rest:
        taken = frames.feed(rest[:step], to_end=True)
        rest, fed = rest[taken:], fed + taken
        if frames.at_end:
            ends.append(fed)
    assert ends == [len(message) * (number + 1) for number in range(repeats)]


@given(step=st.integers(1, 99), between=st.booleans())
def test_the_last_pong_is_known(step: int, between: bool) -> None:
    frames = Frames()
    for context in (b"1", b"a longer context"):
        pong = ping(context).replace(b"PING\0\0", b"PONG")
        pong = bytes([4, len(pong) - 2]) + pong[2:]
        feed(frames, frame(300, more=True) + pong + frame(1, more=False) if between else pong, step)
        assert (frames.pong, frames.at_end) == (context, True)
