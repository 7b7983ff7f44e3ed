"""iopub without loss: ipykernel's output thread and streams, on top of the bounded `Outbox`.

ipykernel's own drops messages when a subscriber is slow or absent, and its streams grow without limit meanwhile.
Here a slow subscriber blocks the thread, and that blocks whoever prints; while nobody listens, output is spooled.
"""

from __future__ import annotations

import codecs
import os
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from io import StringIO
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread, OutStream
from ipykernel.thread import CONTROL_THREAD_NAME, SHELL_CHANNEL_THREAD_NAME

from vm_runtime.guest.outbox import Outbox

# Text of one stream message: at most twice this many characters, so at most 1 MiB of UTF-8: far below the 10 MiB at
# which jupyter_server's gateway client closes a connection, and few enough messages for 50 MB of output.
STREAM_CHARS = 128 << 10

# Messages that ZMQ holds per subscriber: times the largest stream message it is what a slow one costs the guest.
SEND_HWM = 16

# How long the iopub thread waits for a slow subscriber before it looks at its other events (new subscribers, timers).
SEND_WAIT_MS = 100

# How long a flush waits for the iopub thread; with a slow subscriber it must not hold up the writer for long.
FLUSH_WAIT_S = 0.25

# Messages sent before the thread looks at its other events.
SENDS_PER_ROUND = 64

# One read from the pipe that stands in for file descriptor 1 or 2: the size of a Linux pipe.
PIPE_READ_BYTES = 64 << 10

# These threads must answer whatever happens, so they never wait for room. What they publish is bounded by requests.
_SERVICE_THREADS = frozenset({CONTROL_THREAD_NAME, SHELL_CHANNEL_THREAD_NAME, "IOPub"})


def prepare_socket(socket: zmq.Socket[bytes]) -> None:
    """Set up an XPUB socket so that it never drops and reports each subscriber: call before it is bound."""
    socket.setsockopt(zmq.SNDHWM, SEND_HWM)
    socket.setsockopt(zmq.SNDTIMEO, SEND_WAIT_MS)
    socket.setsockopt(zmq.XPUB_NODROP, 1)
    socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # each subscriber is welcomed and so knows that it misses nothing more


class LosslessIOPubThread(IOPubThread):
    """ipykernel's iopub thread, with the outbox between it and everyone else."""

    def __init__(self, socket: zmq.Socket[bytes], *, session: Any) -> None:
        self.outbox = Outbox()
        self.on_subscriber: Callable[[], None] = lambda: None
        self._retrying = False  # of the iopub thread only
        super().__init__(socket, pipe=True, session=session)

    def send_multipart(self, *args: Any, **kwargs: Any) -> None:
        """Queue a message. Waits for room, except on service threads. A forked child sends through ipykernel's pipe."""
        if not self._is_master_process():
            super().send_multipart(*args, **kwargs)
            return
        self.wait_for_room()
        self.put(args[0])

    def wait_for_room(self) -> None:
        if threading.current_thread().name not in _SERVICE_THREADS:
            self.outbox.wait_for_room()

    def wait_sent(self, timeout_s: float) -> None:
        if self.thread.is_alive():
            self.outbox.wait_sent(timeout_s)

    def put(self, frames: list[bytes]) -> None:
        """Queue a message without waiting. Callers other than service threads have waited for room."""
        self.outbox.put(frames)
        self._wake()

    def set_quiet(self, quiet: bool) -> None:
        """Keep everything from now on, or send it again. From any thread."""
        self.outbox.set_quiet(quiet)
        self._wake()

    def stop(self) -> None:
        """Stop the thread, then send what is left as far as the subscriber takes it at once."""
        self.outbox.release()
        super().stop()
        self._send_round(flags=zmq.DONTWAIT)

    def _wake(self) -> None:
        if self.thread.is_alive():
            self.io_loop.add_callback(self._run_round)

    def _run_round(self) -> None:
        if self._retrying:
            return  # the subscriber is slow: one waiting send at a time, however many messages come
        self._send_round()
        if self.outbox.head() is not None:
            self._retrying = True
            self.io_loop.add_callback(self._retry)
        # Output of forked children arrives through a pipe that is read only while there is room.
        if self._pipe_flag:
            if self.outbox.has_room():
                if not self._pipe_in.receiving():
                    self._pipe_in.on_recv(self._handle_pipe_msg)
            elif self._pipe_in.receiving():
                self._pipe_in.stop_on_recv()

    def _retry(self) -> None:
        self._retrying = False
        self._run_round()

    def _send_round(self, *, flags: int = 0) -> None:
        for _ in range(SENDS_PER_ROUND):
            if self.closed:
                return
            self.take_subscriptions()
            frames = self.outbox.head()
            if frames is None:
                return
            try:
                self.socket.send_multipart(frames, flags=flags)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno in (zmq.ENOTSOCK, zmq.ETERM):  # closed meanwhile: the kernel is going
                    return
                raise
            self.outbox.pop()

    def take_subscriptions(self) -> None:
        """Before each send: a send takes in that a subscriber has left, too, after which nothing wakes whoever reads it
        (ZMQ_FD is edge-triggered, zmq_getsockopt(3)), and all that follows would be sent to nobody."""
        try:
            while self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                self._note_subscription(self.socket.recv_multipart(zmq.NOBLOCK))
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.ENOTSOCK, zmq.ETERM):
                raise

    def _handle_subscription(self, frames: list[bytes]) -> None:
        """What ipykernel's stream has read from XPUB."""
        self._note_subscription(frames)
        self._run_round()

    def _note_subscription(self, frames: list[bytes]) -> None:
        """XPUB reports each subscriber to a topic (1) and the loss of the last one (0)."""
        for frame in frames:
            topic = frame[1:]
            if frame[:1] == b"\x01":
                self._welcome(topic)
            if topic == b"" and frame[:1] in (b"\x00", b"\x01"):
                self.outbox.set_listening(frame == b"\x01")
                if frame == b"\x01":
                    self.on_subscriber()

    def _welcome(self, topic: bytes) -> None:
        """Queue the welcome before all else, and after it a message about what the spool could not keep."""
        dropped = self.outbox.take_dropped() if topic == b"" else None
        if dropped is not None:
            text = (
                f"\n[{dropped.byte_count} bytes of older output were dropped: nobody was connected to receive them]\n"
            )
            content = {"name": "stderr", "text": text}
            parent = {"header": self.session.unpack(dropped.parent_header)}
            note = self.session.msg("stream", content, parent=parent if parent["header"] else None)
            self.outbox.put(self.session.serialize(note, b"stream.stderr"), first=True)
        content = {"subscription": topic.decode("utf-8", errors="replace")}
        welcome = self.session.msg("iopub_welcome", content)
        self.outbox.put(self.session.serialize(welcome, topic or None), first=True)


class BoundedOutStream(OutStream):
    """stdout or stderr of the kernel: at most `STREAM_CHARS` wait in it, then the writer sends them itself."""

    pub_thread: LosslessIOPubThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._waiting_chars = 0
        self._has_unsent = False
        super().__init__(*args, **kwargs)
        stream = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget_in_child(stream()))

    def write(self, string: str) -> int:
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string)}")
        if self.pub_thread is None:
            raise ValueError("I/O operation on closed file")
        if not self._is_master_process():
            return super().write(string) or 0
        if len(string) <= STREAM_CHARS:
            self._write_piece(string)
        else:
            for start in range(0, len(string), STREAM_CHARS):
                self._write_piece(string[start : start + STREAM_CHARS])
        self._schedule_flush()
        return len(string)

    def flush(self) -> None:
        """Send what was written, as far as the subscriber takes it at once: what this process does next may end it.

        When it returns, what was written lies before whatever this thread publishes next.
        """
        if self.pub_thread is None:
            return
        self._queue()
        # Every cell ends with a flush, and a wait costs two switches of threads: only for text.
        if self._has_unsent and self._is_master_process() and threading.current_thread().name not in _SERVICE_THREADS:
            self._has_unsent = False
            self.pub_thread.wait_sent(FLUSH_WAIT_S)

    def _queue(self) -> None:
        if self._is_master_process() and self.pub_thread.thread.is_alive():
            self.pub_thread.wait_for_room()
        self._flush()

    def _write_piece(self, piece: str) -> None:
        with self._buffer_lock:
            self._buffers[frozenset(self.parent_header.items())].write(piece)
            self._waiting_chars += len(piece)
            self._has_unsent = True
        if self._waiting_chars >= STREAM_CHARS:
            self._queue()

    def _schedule_flush(self) -> None:
        if not self._flush_pending:
            self._flush_pending = True
            self._io_loop.add_callback(self._io_loop.call_later, self.flush_interval, self._flush)

    def _flush(self) -> None:
        if not self._is_master_process():
            super()._flush()
            return
        self._flush_pending = False
        if threading.current_thread().name in _SERVICE_THREADS and not self.pub_thread.outbox.has_room():
            self._schedule_flush()
            return
        # Taking and queueing are one step, so that output of several threads keeps its order.
        with self._buffer_lock:
            self._waiting_chars = 0
            for parent, text in self._flush_buffers():
                if text:
                    message = self.session.msg("stream", {"name": self.name, "text": text}, parent=parent)
                    self.pub_thread.put(self.session.serialize(message, self.topic))

    def _watch_pipe_fd(self) -> None:
        """Forward what libraries and subprocesses write to the file descriptor (larger reads, whole characters)."""
        if self._fid is None:
            return
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            while data := os.read(self._fid, PIPE_READ_BYTES):
                if not self._should_watch:
                    return
                self.write(decoder.decode(data))
        except Exception:
            self._exc = sys.exc_info()


def _forget_in_child(stream: BoundedOutStream | None) -> None:
    """In a forked child: the lock may be held by a thread that is not here, and the text is the parent's to send."""
    if stream is not None:
        stream._buffer_lock = threading.RLock()
        stream._buffers = defaultdict(StringIO)
