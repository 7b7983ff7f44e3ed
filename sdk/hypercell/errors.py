"""Errors of the SDK; the name says whose fault it is.

HypercellError
+-- NoGatewayError            no gateway was found, or nothing answers where it should be
|   +-- ConnectionLostError       the connection broke during a call that must not be repeated blindly
+-- GatewayRefusedError       the gateway answered with an error (carries its status and its words)
|   +-- TokenError                it does not take this token
|   +-- PermissionDeniedError     not allowed: by a file's rights, or by the gateway's settings
|   +-- InvalidRequestError       it does not understand the request, or the values in it
|   +-- NotFoundError             no such sandbox, snapshot, command or file
|   +-- StateError                not possible in the state in which the sandbox, file or command is
|   +-- LimitError                more than the gateway's configured maximum
|   +-- CapacityError             the host has no room left now; the same call may work later
|   +-- DiskFullError             the sandbox's own disk is full
|   +-- MachineFailedError        the sandbox's machine failed
+-- KernelDiedError           the sandbox's kernel ended while code ran in it; its variables are gone
+-- CodeError                 code that was run raised an exception, and the caller wanted a value
+-- CodeTimeoutError          code ran longer than it was given (also a TimeoutError)
+-- ForkError                 some of the children that were asked for could not be made
+-- CommandFailedError        a command that should succeed did not
+-- ContentBrokenError        content was changed or cut off on its way
+-- ClosedError               used after its `close` or `kill`
+-- MissingPackageError       a package that this function needs is not installed beside the SDK
+-- UnsupportedError          asked for something that a kernel in a machine cannot do
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypercell.aio.sandbox import AsyncSandbox
    from hypercell.blocking.sandbox import Sandbox
    from hypercell.execution import Execution, ExecutionError
    from hypercell.values import CommandResult, ForkFailure


class HypercellError(Exception):
    """Base of all errors of the SDK. `str(error)` is a sentence for people: what is wrong and what to do. They can be
    pickled, as what a process of a pool raises is."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception calls the class with `args`, and these have arguments of other names.
        return _remade, (type(self), self.args), self.__dict__


class NoGatewayError(HypercellError):
    """No gateway was found, or nothing answers at its address."""


class ConnectionLostError(NoGatewayError):
    """The connection broke during a call. What was asked for may have been done: look before asking again."""


class GatewayRefusedError(HypercellError):
    """The gateway answered with an error.

    status: the HTTP status. code: the gateway's short word for the error, empty if it gave none.
    """

    def __init__(self, message: str, *, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class TokenError(GatewayRefusedError):
    """The gateway does not take this token, or none was given."""


class PermissionDeniedError(GatewayRefusedError):
    """Not allowed: the file's rights do not let the user do it, or the gateway's settings; `code` says which."""


class InvalidRequestError(GatewayRefusedError):
    """The gateway does not understand the request; repeating it fails again."""


class NotFoundError(GatewayRefusedError):
    """There is no such sandbox, snapshot, checkpoint, command or file; `code` says which."""


class StateError(GatewayRefusedError):
    """Not possible in the state in which the sandbox, command or file is; the message names both states."""


class LimitError(GatewayRefusedError):
    """More was asked for than the gateway's configured maximum."""


class CapacityError(GatewayRefusedError):
    """The host has no memory, disk or place left; the same call may work later."""


class DiskFullError(GatewayRefusedError):
    """The sandbox's own disk is full: remove files in it, or create one with a larger `disk_mib`."""


class MachineFailedError(GatewayRefusedError):
    """The sandbox's machine died, did not start, or answered nonsense."""


class KernelDiedError(HypercellError):
    """The kernel ended while code ran in it (out of memory, a crash, `os._exit`). Its variables are gone.

    execution: what the code had said until then.
    """

    def __init__(self, message: str, *, execution: Execution | None = None) -> None:
        super().__init__(message)
        self.execution = execution


class CodeError(HypercellError):
    """Code that was run raised an exception. error: name, value and traceback, as the kernel told them."""

    def __init__(self, error: ExecutionError) -> None:
        super().__init__(f"The code raised {error.name}: {error.value}")
        self.error = error


class CodeTimeoutError(HypercellError, TimeoutError):
    """Code ran longer than it was given.

    interrupted: whether it has stopped; if not, `restart()` or `kill()` ends it. execution: what it had said.
    """

    def __init__(self, message: str, *, interrupted: bool, execution: Execution | None = None) -> None:
        super().__init__(message)
        self.interrupted = interrupted
        self.execution = execution


class ForkError(HypercellError):
    """Some children could not be made. failures: why, for each; children: those that were made, which go on (their ids,
    once it was pickled: a connection does not leave its process)."""

    def __init__(self, failures: Sequence[ForkFailure], children: Sequence[AsyncSandbox | Sandbox]) -> None:
        super().__init__(
            f"{len(failures)} of {len(failures) + len(children)} children could not be made: {failures[0].message} "
            "Those that were made go on; they are in `children`."
        )
        self.failures = list(failures)
        self.children: list[Any] = list(children)

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments, state = super().__reduce__()
        ids = [getattr(child, "id", child) for child in self.children]
        return make, arguments, {**state, "children": ids}


class CommandFailedError(HypercellError):
    """A command run with `check=True` ended with another status than 0. result: how, and what it said."""

    def __init__(self, result: CommandResult) -> None:
        if result.timed_out:
            how = "was ended when its time was up"
        elif result.out_of_memory:
            how = "was ended when the sandbox's memory was full (memory_mib of Sandbox.create gives it more)"
        else:
            how = f"ended with {result.signal or f'status {result.exit_code}'}"
        last = (result.stderr or result.stdout).strip().rpartition("\n")[2]
        super().__init__(f"The command {how}" + (f": {last[:500]}" if last else "."))
        self.result = result


class ContentBrokenError(HypercellError):
    """Content was changed or cut off on its way; nothing of it was kept. Repeat the transfer."""


class ClosedError(HypercellError):
    """An object was used after its `close` or `kill`; `connect(id)` makes a new one."""


class MissingPackageError(HypercellError):
    """A package that this function needs is not installed in this Python environment."""


class UnsupportedError(HypercellError):
    """Asked for something that a kernel inside a machine cannot do."""


def _remade(kind: type[HypercellError], args: tuple[Any, ...]) -> HypercellError:
    error = kind.__new__(kind, *args)
    BaseException.__init__(error, *args)  # what OSError, of which a TimeoutError is one, leaves to its own `__init__`
    return error


# What the gateway's `code` means where its status alone does not say (docs/gateway.md, "Errors").
_OF_CODE: dict[str, type[GatewayRefusedError]] = {
    "limit_exceeded": LimitError,
    "too_many_connections": LimitError,
    "disk_full": DiskFullError,
    "no_capacity": CapacityError,
}
_OF_STATUS: dict[int, type[GatewayRefusedError]] = {
    400: InvalidRequestError,
    401: TokenError,
    403: PermissionDeniedError,
    404: NotFoundError,
    405: InvalidRequestError,
    409: StateError,
    413: LimitError,
    416: InvalidRequestError,
    422: InvalidRequestError,
    429: LimitError,
    502: MachineFailedError,
    504: MachineFailedError,
    503: CapacityError,
    507: DiskFullError,
}


def refused(message: str, *, status: int, code: str = "") -> GatewayRefusedError:
    """The error of this tree for an answer of the gateway."""
    kind = _OF_CODE.get(code) or _OF_STATUS.get(status) or GatewayRefusedError
    return kind(message, status=status, code=code)
