"""The queue between the kernel's threads and its iopub thread: bounded while someone listens, a spool while not.

Holds serialized messages only; knows nothing of ZMQ.

While a subscriber listens, writers of bulk output wait for room (back pressure): nothing is lost, memory stays bounded.
While nobody listens, nobody waits: the newest output is kept, and what was dropped is counted and reported to the next
client.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Writers wait while more than this is queued. Two stream messages of the largest size keep the iopub thread busy;
# more would only be memory, and written pages in every snapshot.
QUEUE_BYTES_MAX = 2 << 20

# What is kept while nobody listens: enough for a long night's log, small beside the smallest machine (256 MiB).
SPOOL_BYTES_MAX = 16 << 20

# A full spool is brought down to this, so that the search for old output is not repeated per message.
SPOOL_BYTES_AFTER_DROP = SPOOL_BYTES_MAX * 3 // 4

# What Python itself needs for a queued message of a few frames, counted so that many tiny messages are bounded too.
MESSAGE_OVERHEAD_BYTES = 512

STREAM_TOPIC = b"stream."
DELIMITER = b"<IDS|MSG>"

# From the four JSON frames of a message to its signature, a hex digest.
Sign = Callable[[list[bytes]], bytes]


@dataclass(frozen=True)
class Dropped:
    """Output that the spool could not keep. parent_header: JSON of the last dropped message's parent, or b"{}"."""

    byte_count: int
    parent_header: bytes


@dataclass(frozen=True)
class _Message:
    frames: tuple[bytes, ...]
    byte_count: int

    @property
    def is_stream(self) -> bool:
        return self.frames[0].startswith(STREAM_TOPIC)


class Outbox:
    """A FIFO of messages. `put` from any thread; `head`, `pop` and `set_listening` from the iopub thread only."""

    def __init__(self) -> None:
        # An RLock inside: a signal handler or finalizer may print while its thread is in here.
        self._changed = threading.Condition()
        self._messages: deque[_Message] = deque()
        self._bytes = 0
        self._dropped_bytes = 0
        self._dropped_parent = b"{}"
        self._listening = False
        self._quiet = False
        self._released = False

    @property
    def listening(self) -> bool:
        """Whether what is queued can be sent."""
        return self._listening and not self._quiet

    @property
    def queued_bytes(self) -> int:
        return self._bytes

    def put(self, frames: Sequence[bytes | memoryview], *, first: bool = False) -> None:
        """Queue one message (topic, delimiter, signature, four JSON frames, buffers). Never waits.

        Buffers are copied, since their owner may change them before they are sent.
        """
        copied = tuple(frame if isinstance(frame, bytes) else bytes(frame) for frame in frames)
        message = _Message(copied, sum(map(len, copied)) + MESSAGE_OVERHEAD_BYTES)
        with self._changed:
            if first:
                self._messages.appendleft(message)
            else:
                self._messages.append(message)
            self._bytes += message.byte_count
            if not self.listening and self._bytes > SPOOL_BYTES_MAX:
                self._drop_oldest()

    def has_room(self) -> bool:
        return self._bytes < QUEUE_BYTES_MAX or not self.listening or self._released

    def wait_for_room(self) -> None:
        """Wait until bulk output may be queued. A signal handler that raises (KeyboardInterrupt) ends the wait."""
        if self.has_room():
            return
        with self._changed:
            while not self.has_room():
                self._changed.wait()

    def wait_sent(self, timeout_s: float) -> None:
        """Wait until all that is queued was sent, or nobody listens, or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._messages or not self.listening or self._released, timeout_s)

    def head(self) -> tuple[bytes, ...] | None:
        """The oldest message, or None if there is none or nobody listens."""
        with self._changed:
            return self._messages[0].frames if self.listening and self._messages else None

    def pop(self) -> None:
        """Forget the oldest message: it was sent."""
        with self._changed:
            self._bytes -= self._messages.popleft().byte_count
            if self._bytes < QUEUE_BYTES_MAX:
                self._changed.notify_all()

    def set_listening(self, listening: bool) -> None:
        with self._changed:
            self._listening = listening
            self._look_again()

    def set_quiet(self, quiet: bool) -> None:
        """As if nobody listened, or no longer. From any thread."""
        with self._changed:
            self._quiet = quiet
            self._look_again()

    def _look_again(self) -> None:
        if not self.listening:
            if self._bytes > SPOOL_BYTES_MAX:
                self._drop_oldest()
            self._changed.notify_all()

    def release(self) -> None:
        """Nobody waits any more, for good: the kernel is shutting down."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def take_dropped(self) -> Dropped | None:
        """What the spool dropped since the last call."""
        with self._changed:
            if self._dropped_bytes == 0:
                return None
            dropped = Dropped(self._dropped_bytes, self._dropped_parent)
            self._dropped_bytes = 0
            self._dropped_parent = b"{}"
            return dropped

    def resign(self, sign: Sign) -> None:
        """Sign everything queued anew, with the new key's `sign`."""
        with self._changed:
            self._messages = deque(_Message(resigned(each.frames, sign), each.byte_count) for each in self._messages)

    def clear(self) -> None:
        """Forget everything queued and dropped (after the warm-up of a template)."""
        with self._changed:
            self._messages.clear()
            self._bytes = 0
            self._dropped_bytes = 0
            self._changed.notify_all()

    def _drop_oldest(self) -> None:
        """Make room: the oldest `stream` messages first; only where that is not enough, others too."""
        excess = self._bytes - SPOOL_BYTES_AFTER_DROP
        for streams_only in (True, False):
            kept: deque[_Message] = deque()
            for message in self._messages:
                if excess > 0 and (message.is_stream or not streams_only):
                    excess -= message.byte_count
                    self._bytes -= message.byte_count
                    self._dropped_bytes += message.byte_count - MESSAGE_OVERHEAD_BYTES
                    self._dropped_parent = message.frames[message.frames.index(DELIMITER) + 3]
                else:
                    kept.append(message)
            self._messages = kept
            if self._bytes <= SPOOL_BYTES_MAX:
                return


def resigned(frames: tuple[bytes, ...], sign: Sign) -> tuple[bytes, ...]:
    """A message with another signature; frames that are no message stay as they are."""
    if DELIMITER not in frames:
        return frames
    at = frames.index(DELIMITER) + 1
    return (*frames[:at], sign(list(frames[at + 1 : at + 5])), *frames[at + 1 :])
