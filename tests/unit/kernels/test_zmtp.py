"""The bound on messages from a kernel: counted part by part, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import zmtp
from kernels.zmtp import MessageMeter, MessageTooLongError

LIMIT = 10_000


def frame(size: int, *, more: bool) -> bytes:
    flags = (1 if more else 0) | (2 if size > 255 else 0)
    return bytes([flags]) + size.to_bytes(8 if size > 255 else 1, "big") + bytes(size)


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp, "MAX_MESSAGE_BYTES", LIMIT)


def feed(meter: MessageMeter, data: bytes, step: int) -> None:
    for start in range(0, len(data), step):
        meter.feed(data[start : start + step])


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=9), repeats=st.integers(1, 20), step=st.integers(1, 999)
)
def test_any_number_of_messages_within_the_limit_passes(sizes: list[int], repeats: int, step: int) -> None:
    message = b"".join(frame(size, more=index < len(sizes) - 1) for index, size in enumerate(sizes))
    feed(MessageMeter(), message * repeats, step)


@given(size=st.integers(0, 3000), step=st.integers(1, 999))
def test_a_message_without_an_end_does_not_pass(size: int, step: int) -> None:
    ping = bytes([4, 3]) + b"abc"
    with pytest.raises(MessageTooLongError):
        feed(MessageMeter(), (frame(size, more=True) + ping) * (LIMIT // 50), step)
