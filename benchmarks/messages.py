"""Jupyter messages as bytes: requests, and the few fields of answers that the measurements read.

Knows no sockets: client.py (WebSocket) and raw_zmq.py (ZMQ) share it, so that both spend the same time on a message.
"""

from __future__ import annotations

import json
import struct
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

V1_SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"
PROTOCOL_VERSION = "5.3"


class BenchmarkError(Exception):
    """A measurement could not be made; the message says why."""


class CellError(BenchmarkError):
    """The code of a cell raised; the message is the exception's name and text."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A message's JSON parts as they travel, in the order of both protocols."""

    header: bytes
    parent: bytes
    metadata: bytes
    content: bytes


@dataclass(kw_only=True)
class Execution:
    """What came back for one execute_request; times are of `perf_counter`.

    finished: its execute_reply and its idle status have both come.
    """

    message_id: str
    sent_at: float
    replied_at: float | None = None
    idle_at: float | None = None
    error: str | None = None
    stdout_bytes: int = 0
    stdout_lines: int = 0
    messages: int = 0
    results: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.replied_at is not None and self.idle_at is not None

    @property
    def reply_s(self) -> float:
        """From sending to the execute_reply."""
        assert self.replied_at is not None
        return self.replied_at - self.sent_at

    @property
    def cell_s(self) -> float:
        """From sending until reply and idle have come: when a notebook shows the cell as done."""
        assert self.replied_at is not None and self.idle_at is not None
        return max(self.replied_at, self.idle_at) - self.sent_at

    def take(self, parts: Parts) -> None:
        """Counts one message of any channel; those of other requests are ignored.

        Errors: CellError when the code raised.
        """
        if json.loads(parts.parent).get("msg_id") != self.message_id:
            return
        self.messages += 1
        kind = json.loads(parts.header)["msg_type"]
        if kind == "stream":
            content = json.loads(parts.content)
            if content["name"] == "stdout":
                self.stdout_bytes += len(content["text"].encode())
                self.stdout_lines += content["text"].count("\n")
        elif kind == "execute_reply":
            self.replied_at = perf_counter()
            content = json.loads(parts.content)
            if content["status"] != "ok":
                raise CellError(f"{content.get('ename')}: {content.get('evalue')}")
            value = (content.get("user_expressions") or {}).get("value")
            if value is not None:
                if value["status"] != "ok":
                    raise CellError(f"{value['ename']}: {value['evalue']}")
                self.results.append(value["data"]["text/plain"])
        elif kind == "status" and json.loads(parts.content)["execution_state"] == "idle":
            self.idle_at = perf_counter()
        elif kind == "execute_result":
            self.results.append(json.loads(parts.content)["data"]["text/plain"])


def execute_request(
    code: str, *, session_id: str, expression: str | None = None, store_history: bool = False
) -> tuple[str, Parts]:
    """A request and its message id. expression: evaluated after the code, which then runs silently, so that nothing
    that watches cells (Kishu) sees it; its value's repr is the only one of `Execution.results`."""
    message_id = str(uuid.uuid4())
    header = {
        "msg_id": message_id,
        "msg_type": "execute_request",
        "session": session_id,
        "username": "benchmark",
        "date": datetime.now(UTC).isoformat(),
        "version": PROTOCOL_VERSION,
    }
    content: dict[str, Any] = {
        "code": code,
        "silent": expression is not None,
        "store_history": store_history,
        "user_expressions": {} if expression is None else {"value": expression},
        "allow_stdin": False,
        "stop_on_error": True,
    }
    parts = Parts(
        header=json.dumps(header).encode(), parent=b"{}", metadata=b"{}", content=json.dumps(content).encode()
    )
    return message_id, parts


def pack_v1(channel: str, parts: Parts) -> bytes:
    """A frame of the v1 subprotocol: offset count and offsets as little-endian uint64, then the parts."""
    blobs = [channel.encode(), parts.header, parts.parent, parts.metadata, parts.content]
    offsets = [8 * (len(blobs) + 2)]
    for blob in blobs:
        offsets.append(offsets[-1] + len(blob))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(blobs)


def unpack_v1(frame: bytes) -> Parts:
    """The parts of a frame, buffers left out."""
    (count,) = struct.unpack_from("<Q", frame)
    offsets = struct.unpack_from(f"<{count}Q", frame, 8)
    _, header, parent, metadata, content = (frame[offsets[index] : offsets[index + 1]] for index in range(5))
    return Parts(header=header, parent=parent, metadata=metadata, content=content)
