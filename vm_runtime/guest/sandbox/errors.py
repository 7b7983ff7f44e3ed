"""What the module `sandbox` raises. All messages are sentences for the user of a notebook.

SandboxError
+-- HostError               the host refused, or could not; `code` is for programs
|   +-- ForkError           this child could not be made; its siblings may have been
|   +-- InterruptedCallError   the host may or may not have done it
+-- ValueRefusedError       a value that cannot cross between sandboxes
+-- ChildError              a child has no result
    +-- ChildFailedError    its code raised; `remote_traceback` is the child's
    +-- ChildCrashedError   its machine or its kernel ended
    +-- ChildUnfinishedError   its cell has ended without `sandbox.exit`
    +-- ChildTimeoutError   it takes longer than the caller wanted to wait (also a TimeoutError)
"""

from __future__ import annotations


class SandboxError(Exception):
    """Anything that goes wrong with sandboxes."""


class HostError(SandboxError):
    """The host refused the call or could not do it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ForkError(HostError):
    """A child could not be made."""


class InterruptedCallError(HostError):
    """The connection to the host was renewed during the call: it may or may not have been done."""


class ValueRefusedError(SandboxError):
    """A value that cannot be written, is too large, or cannot be read here."""


class ChildError(SandboxError):
    """A child that has no result to give."""


class ChildFailedError(ChildError):
    """The child's code raised an exception. remote_traceback: its text."""

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\n{self.remote_traceback}" if self.remote_traceback else text


class ChildCrashedError(ChildError):
    """The child ended without a result."""


class ChildUnfinishedError(ChildError):
    """The child's cell has ended without a result; the child still runs."""


class ChildTimeoutError(ChildError, TimeoutError):
    """The child has not ended in time; it still runs."""
