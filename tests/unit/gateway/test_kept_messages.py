"""What a gateway leaves to the next one for a client that is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import kept_messages
from gateway.errors import FrameError
from gateway.frames import KernelMessage

GOLDEN = Path(__file__).parent / "golden" / "kept-1.bin"
MESSAGES = [
    KernelMessage("iopub", b'{"msg_id": "1", "msg_type": "stream"}', b'{"p": 1}', b"{}", b'{"text": "a"}', []),
    KernelMessage("shell", b'{"msg_id": "2", "msg_type": "execute_reply"}', b"{}", b"{}", b"{}", [b"\0\xff", b""]),
]


def test_what_is_saved_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "kernel"
    kept_messages.save(path, "session", MESSAGES)
    assert path.read_bytes() == GOLDEN.read_bytes()
    assert kept_messages.take(path) == ("session", MESSAGES)
    assert kept_messages.take(path) is None


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_broken_file_is_refused_and_gone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(GOLDEN.read_bytes()[:-cut])
    with pytest.raises(FrameError):
        kept_messages.take(path)
    assert not path.exists()
    path.write_bytes(b"something else\n" + GOLDEN.read_bytes())
    with pytest.raises(FrameError, match="of this version"):
        kept_messages.take(path)
