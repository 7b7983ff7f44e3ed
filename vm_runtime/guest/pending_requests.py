"""The requests that a kernel has and has not answered: those that wait, and those that are handled.

Their clients wait for an answer, also when the machine goes back to a state that knows nothing of them. Knows nothing
of ipykernel and of what follows.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from vm_runtime.guest.outbox import DELIMITER

# A notebook that is run as a whole; what is beyond is not remembered.
REQUESTS_MAX = 500

# A kernel that handles nothing takes up what has come within milliseconds. What it has not taken up after this long was
# no request: badly signed, or sent twice.
NEVER_TAKEN_UP_S = 60.0

# What `list` answers at most, as JSON: it travels in a HELLO, which has 32 KiB. Some 40 requests.
LISTED_BYTES_MAX = 16 << 10


class PendingRequests:
    """From all threads. frames: a request as it came from a ROUTER socket (zmq frames)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[bytes, Sequence[Any]] = {}
        self._handled: set[bytes] = set()
        self._last_came_s = 0.0

    def add(self, frames: Sequence[Any]) -> None:
        """It has come in."""
        signature = _signature(frames)
        with self._lock:
            if signature and len(self._requests) < REQUESTS_MAX:
                self._requests[signature] = frames
                self._last_came_s = time.monotonic()

    def take_up(self, frames: Sequence[Any]) -> None:
        """It is handled from now on."""
        with self._lock:
            self._handled.add(_signature(frames))

    def remove(self, frames: Sequence[Any]) -> None:
        """It was answered."""
        signature = _signature(frames)
        with self._lock:
            self._requests.pop(signature, None)
            self._handled.discard(signature)

    def __len__(self) -> int:
        with self._lock:
            if not self._handled and time.monotonic() - self._last_came_s > NEVER_TAKEN_UP_S:
                self._requests.clear()
            return len(self._requests)

    def list(self) -> list[dict[str, Any]]:
        """{"idents": [base64], "header": {...}} of each execute request, in the order in which they came."""
        with self._lock:
            requests = list(self._requests.values())
        found: list[dict[str, Any]] = []
        left = LISTED_BYTES_MAX
        for frames in requests:
            at = _delimiter(frames)
            try:
                header = json.loads(frames[at + 2].bytes)
            except ValueError:  # no message of a Jupyter client
                continue
            if not isinstance(header, dict) or header.get("msg_type") != "execute_request":
                continue
            request = {
                "idents": [base64.b64encode(frame.bytes).decode() for frame in frames[:at]],
                "header": header,
            }
            left -= len(json.dumps(request))
            if left < 0:
                break
            found.append(request)
        return found


def _delimiter(frames: Sequence[Any]) -> int:
    return next((at for at, frame in enumerate(frames) if frame.bytes == DELIMITER), -1)


def _signature(frames: Sequence[Any]) -> bytes:
    """Each message has another (its header has an id): empty for what is no message."""
    at = _delimiter(frames)
    return bytes(frames[at + 1].bytes) if at >= 0 and len(frames) > at + 2 else b""
