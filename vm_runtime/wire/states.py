"""The states of a session and of a stream, and what each frame does to them. Tables only.

Theory of operation
-------------------
A session begins with a greeting, whose order the roles fix:

    host                                            guest
    SEARCHING       marker, HELLO  -->              AWAIT_HELLO
                                                    PREPARING        (clock, entropy, ... of HELLO take effect)
    AWAIT_WELCOME  <--  session id, WELCOME         OPEN
    OPEN

In OPEN each end may open streams. A stream is a state per end; both ends run the same table, one sees as SEND what the
other sees as RECEIVE. The states of one end:

    OPENING        we sent OPEN; no answer yet, no data may flow
    INCOMING       the peer sent OPEN; we owe an answer
    OPEN           data flows both ways
    ENDED_LOCAL    we sent END; the peer still sends
    ENDED_REMOTE   the peer sent END; we still send
    CLOSED         forgotten. Frames that were on their way are ignored: only ids that never were opened are errors

The table is about frames as they are sent: an END that waits behind queued data has not been sent. WINDOW may
cross an END of either side, so it is valid in every state in which the one who sends it has not seen our END.
What is not in the table is an error of whoever did it: LocalProtocolError for SEND, RemoteProtocolError for RECEIVE.
"""

from __future__ import annotations

from enum import Enum

from vm_runtime.wire.frames import FrameType


class Role(Enum):
    HOST = "host"
    GUEST = "guest"


class SessionState(Enum):
    SEARCHING = "searching"
    AWAIT_WELCOME = "await_welcome"
    AWAIT_HELLO = "await_hello"
    PREPARING = "preparing"
    OPEN = "open"
    CLOSED = "closed"


# Which frames may be received in which state of the session (all stream frames go by the stream table below).
SESSION_RECEIVE: dict[tuple[SessionState, FrameType], SessionState] = {
    (SessionState.AWAIT_WELCOME, FrameType.WELCOME): SessionState.OPEN,
    (SessionState.AWAIT_WELCOME, FrameType.GOODBYE): SessionState.CLOSED,
    (SessionState.AWAIT_HELLO, FrameType.HELLO): SessionState.PREPARING,
    (SessionState.PREPARING, FrameType.GOODBYE): SessionState.CLOSED,
    (SessionState.OPEN, FrameType.PING): SessionState.OPEN,
    (SessionState.OPEN, FrameType.PONG): SessionState.OPEN,
    (SessionState.OPEN, FrameType.GOODBYE): SessionState.CLOSED,
}


class StreamState(Enum):
    OPENING = "opening"
    INCOMING = "incoming"
    OPEN = "open"
    ENDED_LOCAL = "ended_local"
    ENDED_REMOTE = "ended_remote"
    CLOSED = "closed"


STREAM_SEND: dict[tuple[StreamState, FrameType], StreamState] = {
    (StreamState.OPENING, FrameType.RESET): StreamState.CLOSED,
    (StreamState.INCOMING, FrameType.ACCEPT): StreamState.OPEN,
    (StreamState.INCOMING, FrameType.REJECT): StreamState.CLOSED,
    (StreamState.OPEN, FrameType.DATA): StreamState.OPEN,
    (StreamState.OPEN, FrameType.WINDOW): StreamState.OPEN,
    (StreamState.OPEN, FrameType.END): StreamState.ENDED_LOCAL,
    (StreamState.OPEN, FrameType.RESET): StreamState.CLOSED,
    (StreamState.ENDED_LOCAL, FrameType.WINDOW): StreamState.ENDED_LOCAL,
    (StreamState.ENDED_LOCAL, FrameType.RESET): StreamState.CLOSED,
    (StreamState.ENDED_REMOTE, FrameType.DATA): StreamState.ENDED_REMOTE,
    (StreamState.ENDED_REMOTE, FrameType.END): StreamState.CLOSED,
    (StreamState.ENDED_REMOTE, FrameType.RESET): StreamState.CLOSED,
}

STREAM_RECEIVE: dict[tuple[StreamState, FrameType], StreamState] = {
    (StreamState.OPENING, FrameType.ACCEPT): StreamState.OPEN,
    (StreamState.OPENING, FrameType.REJECT): StreamState.CLOSED,
    (StreamState.INCOMING, FrameType.RESET): StreamState.CLOSED,
    (StreamState.OPEN, FrameType.DATA): StreamState.OPEN,
    (StreamState.OPEN, FrameType.WINDOW): StreamState.OPEN,
    (StreamState.OPEN, FrameType.END): StreamState.ENDED_REMOTE,
    (StreamState.OPEN, FrameType.RESET): StreamState.CLOSED,
    (StreamState.ENDED_LOCAL, FrameType.DATA): StreamState.ENDED_LOCAL,
    (StreamState.ENDED_LOCAL, FrameType.WINDOW): StreamState.ENDED_LOCAL,
    (StreamState.ENDED_LOCAL, FrameType.END): StreamState.CLOSED,
    (StreamState.ENDED_LOCAL, FrameType.RESET): StreamState.CLOSED,
    (StreamState.ENDED_REMOTE, FrameType.WINDOW): StreamState.ENDED_REMOTE,
    (StreamState.ENDED_REMOTE, FrameType.RESET): StreamState.CLOSED,
}
