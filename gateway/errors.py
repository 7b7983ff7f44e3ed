"""Errors of the gateway, and how every error becomes `{"reason", "message", "code"}` with a status.

    GatewayError
    +-- StartError                the operator's: settings, port, lock; `serve` prints it and ends with status 1
    +-- FrameError                the client's: a WebSocket message that is not a kernel message
    +-- ApiError                  the client's or the host's: carries the HTTP status and the code

`code` is for programs and never changes, `message` is for people, `reason` is HTTP's phrase for the status.
"""

from __future__ import annotations

from http import HTTPStatus

from kernels.errors import (
    CapacityError,
    KernelsError,
    LimitError,
    MachineFailedError,
    SandboxExistsError,
    SandboxStateError,
    TemplateError,
    UnknownSandboxError,
    UnknownTemplateError,
)


class GatewayError(Exception):
    """Base of all errors of this package. `str(error)` is a sentence for people."""


class StartError(GatewayError):
    """The gateway cannot start as it was asked to."""


class FrameError(GatewayError):
    """A WebSocket message that is not a kernel message; the connection cannot go on."""


class ApiError(GatewayError):
    """An answer other than success. status: HTTP's; code: for programs; message: what is wrong and what to do."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


# The first class that matches counts; KernelsError itself stands last.
_STATUS_OF: tuple[tuple[type[KernelsError], int, str], ...] = (
    (UnknownSandboxError, 404, "sandbox_not_found"),
    (UnknownTemplateError, 404, "kernelspec_not_found"),
    (SandboxExistsError, 409, "sandbox_exists"),
    (LimitError, 403, "limit_exceeded"),
    (SandboxStateError, 409, "wrong_state"),
    (CapacityError, 503, "no_capacity"),
    (MachineFailedError, 502, "machine_failed"),
    (TemplateError, 500, "template_failed"),
    (KernelsError, 500, "kernels_error"),
)


def api_error(error: KernelsError) -> ApiError:
    """The answer to a request that ended with `error`."""
    status, code = next((status, code) for kind, status, code in _STATUS_OF if isinstance(error, kind))
    return ApiError(status, code, str(error))


def phrase(status: int) -> str:
    """HTTP's words for a status: `phrase(404) == "Not Found"`."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
