"""Jupyter's kernel messages as the frames of its WebSocket (v1.kernel.websocket.jupyter.org). Pure functions.

uint64le count n, n x uint64le offsets, then channel, header, parent, metadata, content, buffers...; the last
offset is the end (jupyter_server/services/kernels/connection/base.py)
"""

from __future__ import annotations

import json
import struct
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"
PROTOCOL_VERSION = "5.4"
# Of the gateway's own messages.
GATEWAY_SESSION = "hypercell-gateway"


@dataclass(frozen=True, slots=True)
class KernelMessage:
    """A message from the kernel. parent_id: the request it belongs to, empty if none. from_gateway: it was made in the
    place of a kernel that has died."""

    channel: str
    msg_type: str
    parent_id: str
    content: dict[str, Any]
    from_gateway: bool = False


def encode_request(
    *, channel: str, msg_type: str, content: dict[str, Any], session_id: str, subshell_id: str | None = None
) -> tuple[str, bytes]:
    """A request's id, and its frame."""
    msg_id = uuid.uuid4().hex
    header = {
        "msg_id": msg_id,
        "msg_type": msg_type,
        "session": session_id,
        "username": "hypercell",
        "date": datetime.now(timezone.utc).isoformat(),
        "version": PROTOCOL_VERSION,
    }
    if subshell_id is not None:
        header["subshell_id"] = subshell_id
    pieces = [channel.encode(), json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()]
    count = len(pieces) + 1
    offsets = [8 * (count + 1)]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return msg_id, b"".join([struct.pack(f"<{count + 1}Q", count, *offsets), *pieces])


def decode(data: bytes) -> KernelMessage:
    """A message of the kernel; its buffers are left out. Raises ValueError for what is none."""
    try:
        (count,) = struct.unpack_from("<Q", data)
        offsets = struct.unpack_from(f"<{count}Q", data, 8)
        channel, header, parent, _, content = (data[offsets[i] : offsets[i + 1]] for i in range(5))
        head = json.loads(header)
        return KernelMessage(
            channel=channel.decode(),
            msg_type=str(head["msg_type"]),
            parent_id=str(json.loads(parent).get("msg_id", "")),
            content=json.loads(content),
            from_gateway=head.get("session") == GATEWAY_SESSION,
        )
    except (struct.error, IndexError, KeyError, AttributeError, MemoryError) as error:
        raise ValueError(f"This is no message of a kernel: {error}") from error
