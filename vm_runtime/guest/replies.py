"""Shell and control replies that wait for their client, instead of being dropped by ZMQ while it is away.

A gateway that comes back connects with the same ZMQ identity, and then gets what it has missed.
"""

from __future__ import annotations

import base64
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import zmq
from zmq.eventloop.zmqstream import ZMQStream

from vm_runtime.guest.outbox import Sign, resigned

# What is kept: replies of a few KB each, some kernels' whole history at most.
KEPT_MAX = 64
KEPT_BYTES_MAX = 4 << 20

# How often delivery is tried again: a client connects some socket first, its shell socket within moments.
RETRY_S = 0.1

# After the last sign of a client it is tried no more, so that a machine at rest is at rest; the next sign begins anew.
RETRY_LIMIT_S = 30.0

# After a change of the key, replies may still arrive that were signed with the old one.
RESIGN_S = 5.0


class ReplyStream(ZMQStream):
    """The kernel's end of a ROUTER socket. As ZMQStream, but what has no peer to go to is kept (bounded, oldest go).

    You must call `prepare_socket` on the socket before it is bound. `send_multipart`, `retry` and `drop` are for the
    stream's own event loop; `send_later`, `resign` for any thread.
    """

    def __init__(self, socket: zmq.Socket[bytes], io_loop: Any = None) -> None:
        self._kept: deque[tuple[bytes, ...]] = deque()
        self._kept_lock = threading.Lock()
        self._sign: Sign | None = None
        self._resign_until_s = 0.0
        self._quiet = False
        self._retry_until_s = 0.0
        self._retrying = False
        super().__init__(socket, io_loop)

    def send_multipart(self, msg: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """Send now or keep. Never waits for a client."""
        frames = tuple(frame if isinstance(frame, bytes) else bytes(memoryview(frame)) for frame in msg)
        with self._kept_lock:
            if self._sign is not None and time.monotonic() < self._resign_until_s:
                frames = resigned(frames, self._sign)
            self._kept.append(frames)
            self._drop_excess()
        self.retry()

    def send_later(self, frames: Sequence[bytes]) -> None:
        """`send_multipart` from another thread."""
        self.io_loop.add_callback(self.send_multipart, frames)

    def retry(self) -> None:
        """There are signs of a client: deliver what is kept, now and for a while from now on."""
        self._retry_until_s = time.monotonic() + RETRY_LIMIT_S
        self._deliver()

    def retry_later(self) -> None:
        """`retry` from another thread."""
        self.io_loop.add_callback(self.retry)

    def set_quiet(self, quiet: bool) -> None:
        """Keep everything from now on, or deliver again. From any thread."""
        with self._kept_lock:
            self._quiet = quiet
        if not quiet:
            self.retry_later()

    def drop(self) -> None:
        """Forget what is kept. From any thread."""
        with self._kept_lock:
            self._kept.clear()

    def resign(self, sign: Sign) -> None:
        """The key has changed: `sign` signs with the new one."""
        with self._kept_lock:
            self._sign = sign
            self._resign_until_s = time.monotonic() + RESIGN_S
            self._kept = deque(resigned(frames, sign) for frames in self._kept)

    def _handle_recv(self) -> None:
        super()._handle_recv()
        if self._kept:
            self.retry()

    def _deliver(self) -> None:
        if self.closed():
            return
        with self._kept_lock:
            if self._quiet:
                return
            waiting: deque[tuple[bytes, ...]] = deque()
            absent: set[bytes] = set()
            for frames in self._kept:
                if frames[0] in absent or not self._sent(frames):
                    absent.add(frames[0])  # the order of one client's replies stays
                    waiting.append(frames)
            self._kept = waiting
        # Whoever touches a socket must look at its events anew: its descriptor signals changes only (zmq_getsockopt).
        self._rebuild_io_state()
        if waiting and not self._retrying and time.monotonic() < self._retry_until_s:
            self._retrying = True
            self.io_loop.call_later(RETRY_S, self._retry_round)

    def _retry_round(self) -> None:
        self._retrying = False
        self._deliver()

    def _sent(self, frames: tuple[bytes, ...]) -> bool:
        try:
            self.socket.send_multipart(frames, flags=zmq.DONTWAIT)
        except zmq.Again:
            return False  # connected, and does not read
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def _drop_excess(self) -> None:
        byte_count = sum(len(frame) for frames in self._kept for frame in frames)
        while len(self._kept) > 1 and (len(self._kept) > KEPT_MAX or byte_count > KEPT_BYTES_MAX):
            byte_count -= sum(map(len, self._kept.popleft()))


def prepare_socket(socket: zmq.Socket[bytes]) -> None:
    """Have a ROUTER report when a peer is unknown (zmq_setsockopt, ZMQ_ROUTER_MANDATORY). Call before it is bound."""
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)


def answer_for(app: Any, *, reply_to: Mapping[str, Any], text: str) -> None:
    """Answer a cell that this kernel has never run, as if it had: the cell that asked for the return to this state.

    reply_to: {"idents": [base64], "header": {...}} of its execute_request. On the RPC server's thread.
    """
    kernel, session = app.kernel, app.session
    parent = {"header": dict(reply_to["header"])}
    session.send(kernel.iopub_socket, "stream", {"name": "stdout", "text": text}, parent, ident=b"stream.stdout")
    content = {
        "status": "ok",
        "execution_count": max(0, kernel.execution_count - 1),
        "user_expressions": {},
        "payload": [],
    }
    _reply(app, reply_to, content)


def abort_for(app: Any, *, reply_to: Mapping[str, Any]) -> None:
    """Answer the client of a cell that this kernel has never received: it is not run, as after an error."""
    _reply(app, reply_to, {"status": "aborted"})


def _reply(app: Any, reply_to: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    kernel, session = app.kernel, app.session
    parent = {"header": dict(reply_to["header"])}
    reply = session.msg("execute_reply", dict(content), parent=parent)
    idents = [base64.b64decode(ident) for ident in reply_to["idents"]]
    kernel.shell_stream.send_later([bytes(frame) for frame in session.serialize(reply, idents)])
    session.send(kernel.iopub_socket, "status", {"execution_state": "idle"}, parent, ident=b"status")
