"""Messages of the gateway's own, in the form of a kernel's. Pure but for ids and time."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gateway.frames import KernelMessage, Part

# Their session, by which clients can tell them apart.
SESSION = "hypercell-gateway"


def make_message(channel: str, msg_type: str, content: Mapping[str, Any], parent: Part = b"{}") -> KernelMessage:
    """As jupyter_client would write it. parent: the header of the request that it answers; `{}`: of none."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": msg_type,
        "session": SESSION,
        "username": "hypercell",
        "date": datetime.now(UTC).isoformat(),
        "version": "5.4",
    }
    return KernelMessage(channel, json.dumps(header).encode(), parent, b"{}", json.dumps(content).encode())
