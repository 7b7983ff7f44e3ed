"""Errors of the wire; the name says whose fault it is.

WireError
+-- LocalProtocolError        this side's: a method was called that its state or a limit does not allow
+-- RemoteProtocolError       the peer's: it broke the protocol or a limit; the session is over
|   +-- VersionError              the two ends have no version in common
+-- LinkClosedError           nobody's or the network's: the session is over, `code` and `reason` say why
|   +-- SessionResetError         the host began a new session (a restore, or a restarted gateway)
+-- StreamResetError          the peer gave one stream up
+-- OpenRejectedError         the peer refused an OPEN; also raised by handlers, to refuse one
"""

from __future__ import annotations


class WireError(Exception):
    """Base of all errors of this package."""


class LocalProtocolError(WireError):
    """A method was called that the state of the session or stream, or a limit of the peer, does not allow."""


class RemoteProtocolError(WireError):
    """The peer broke the protocol or a limit. `code` is what GOODBYE sends it."""

    def __init__(self, message: str, *, code: str = "protocol_error") -> None:
        super().__init__(message)
        self.code = code


class VersionError(RemoteProtocolError):
    """The two ends have no version of the wire in common."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="no_common_version")


class _CodedError(WireError):
    """An error with a machine-readable `code` and a `reason` for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{reason} ({code})" if reason else code)
        self.code = code
        self.reason = reason


class LinkClosedError(_CodedError):
    """The session is over: closed by either end, or its carrier has ended."""


class SessionResetError(LinkClosedError):
    """The host began a new session on the same carrier; everything of this one is void."""

    def __init__(self) -> None:
        super().__init__("session_reset", "The host began a new session")


class StreamResetError(_CodedError):
    """The peer gave this stream up; data that had arrived before can still be read."""


class OpenRejectedError(_CodedError):
    """The peer refused an OPEN. A handler of peer-opened streams raises it to refuse one."""
