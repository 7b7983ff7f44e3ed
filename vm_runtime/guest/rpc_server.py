"""Remote calls from the agent to the kernel process: small JSON datagrams over a socket pair made before the fork.

The kernel's end: events (`status`, `ready`, `failed`) are sent from any thread; requests are served by one daemon
thread that does nothing at rest. Knows nothing of what the requests do.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

# One datagram: a warm-up's code fits, or an environment of 32 KiB (the wire's own limit) with its escapes; and the
# socket's buffer (208 KiB) holds it.
DATAGRAM_BYTES_MAX = 128 << 10

# The end of a traceback that travels in an event.
TRACEBACK_CHARS_MAX = 4000

Handler = Callable[[dict[str, Any]], Mapping[str, Any] | None]


class RpcServer:
    """The kernel's end. `handlers` maps the name of a request to what answers it (a JSON object, or None for {})."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.handlers: dict[str, Handler] = {}
        self._thread = threading.Thread(target=self._serve, name="hypercell-rpc", daemon=True)
        self._thread.pydev_do_not_trace = True  # type: ignore[attr-defined]  # debugpy must not stop it with the others
        self._thread.is_pydev_daemon_thread = True  # type: ignore[attr-defined]

    def start(self) -> None:
        self._thread.start()

    def notify(self, event: str, **fields: Any) -> None:
        """Send an event. If the agent has ended nobody receives it, and the machine's init ends this process too."""
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps({"event": event, **fields}).encode())

    def _serve(self) -> None:
        while True:
            try:
                data = self._socket.recv(DATAGRAM_BYTES_MAX)
            except OSError:
                return
            if not data:
                return
            request = json.loads(data)
            answer: dict[str, Any] = {"answer": request["id"]}
            try:
                answer["result"] = dict(self.handlers[request["op"]](request) or {})
            except Exception:
                answer["error"] = traceback.format_exc()[-TRACEBACK_CHARS_MAX:]
            with contextlib.suppress(OSError):
                self._socket.send(json.dumps(answer).encode())
