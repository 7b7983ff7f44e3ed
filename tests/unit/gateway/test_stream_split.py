"""Large stream messages are cut so that the pieces together say the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import stream_split
from gateway.frames import KernelMessage
from gateway.stream_split import split_stream

HEADER = b'{"msg_id": "1", "msg_type": "stream"}'
texts = st.text(alphabet=st.sampled_from('a\\"\n\té€😀\ud83d\ude00\u0001/u'), max_size=400)


def _pieces(content: bytes, header: bytes = HEADER) -> list[KernelMessage]:
    return list(split_stream(KernelMessage("iopub", header, b'{"p": 1}', b"{}", content)))


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_split, "MAX_STREAM_BYTES", 60)
    monkeypatch.setattr(stream_split, "PIECE_BYTES", 20)


@pytest.mark.usefixtures("small_limits")
class TestSmallLimits:
    @given(text=texts, ascii_only=st.booleans(), name_first=st.booleans(), compact=st.booleans())
    def test_pieces_say_the_same(self, text: str, ascii_only: bool, name_first: bool, compact: bool) -> None:
        value = {"name": "stderr", "text": text} if name_first else {"text": text, "name": "stderr"}
        separators = (",", ":") if compact else None
        content = json.dumps(value, ensure_ascii=ascii_only, separators=separators).encode("utf-8", "surrogatepass")
        said = ""
        for piece in _pieces(content):
            parsed = json.loads(bytes(piece.content).decode("utf-8", "surrogatepass"))
            assert parsed["name"] == "stderr"
            said += parsed["text"]
            assert (piece.header, piece.parent, piece.channel) == (HEADER, b'{"p": 1}', "iopub")
        assert said.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")

    def test_pieces_are_small(self) -> None:
        content = json.dumps({"name": "stdout", "text": "😀\\" * 1000}).encode()
        assert max(len(piece.content) for piece in _pieces(content)) < 80

    @pytest.mark.parametrize(
        "content",
        [
            json.dumps({"name": "stdout", "text": "x" * 100, "more": 1}).encode(),
            json.dumps({"text": "x" * 100}).encode(),
            b"x" * 100,
        ],
    )
    def test_what_is_not_written_as_a_stream_passes_whole(self, content: bytes) -> None:
        assert [bytes(piece.content) for piece in _pieces(content)] == [content]

    def test_other_messages_pass_whole(self) -> None:
        content = json.dumps({"name": "stdout", "text": "x" * 100}).encode()
        assert len(_pieces(content, b'{"msg_type": "display_data"}')) == 1

    @given(st.binary(max_size=300))
    def test_any_bytes_in_the_text(self, garbage: bytes) -> None:
        content = b'{"name": "stdout", "text": "' + garbage + b'"}'
        assert len(_pieces(content)) >= 1


def test_nothing_is_cut_below_the_limit() -> None:
    content = json.dumps({"name": "stdout", "text": "x" * 9_000_000}).encode()
    assert len(_pieces(content)) == 1


def test_every_piece_fits_into_ten_mebibytes() -> None:
    text = "x\n" * 10_000_000
    pieces = _pieces(json.dumps({"name": "stdout", "text": text}).encode())
    assert max(piece.size for piece in pieces) < 10 * 1024 * 1024
    assert "".join(json.loads(bytes(piece.content))["text"] for piece in pieces) == text


@pytest.mark.parametrize("text", [b"\x80", rb"\ud83d", b"\\"])
def test_text_that_may_be_cut_nowhere_is_cut_all_the_same(text: bytes) -> None:
    """What a hostile kernel says must not be searched for longer than it took to say."""
    content = b'{"name": "stdout", "text": "' + text * (10_000_000 // len(text)) + b'"}'
    pieces = _pieces(content)
    assert 8 <= len(pieces) <= 12
    assert b"".join(bytes(piece.content)[28:-2] for piece in pieces) == content[28:-2]
