"""Errors of the gateway, and how every error becomes `{"reason", "message", "code"}` with a status.

    GatewayError
    +-- StartError                the operator's: settings, port, lock; `serve` prints it and ends with status 1
    +-- FrameError                the client's: a WebSocket message that is not a kernel message
    +-- ApiError                  the client's or the host's: carries the HTTP status and the code

`code` is for programs and never changes, `message` is for people, `reason` is HTTP's phrase for the status.
"""

from __future__ import annotations

from http import HTTPStatus

from kernels import errors


class GatewayError(Exception):
    """Base of all errors of this package. `str(error)` is a sentence for people."""


class StartError(GatewayError):
    """The gateway cannot start as it was asked to."""


class FrameError(GatewayError):
    """A WebSocket message that is not a kernel message; the connection cannot continue."""


class ApiError(GatewayError):
    """An answer other than success. status: HTTP's; code: for programs; message: what is wrong and what to do."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = phrase(status)
        self.code = code
        self.message = message


# What a guest refuses with (docs/exec_and_files.md). A guest may answer anything else: that is its failure.
_STATUS_OF_REFUSAL = {
    "bad_params": 400,
    "bad_path": 400,
    "bad_cwd": 400,
    "command_not_found": 400,
    "cannot_start": 400,
    "content_broken": 400,
    "permission_denied": 403,
    "file_not_found": 404,
    "unknown_command": 404,
    "directory_not_empty": 409,
    "file_changed": 409,
    "file_exists": 409,
    "is_a_directory": 409,
    "no_terminal": 409,
    "not_a_directory": 409,
    "not_a_file": 409,
    "other_file_system": 409,
    "too_large": 413,
    "too_many_commands": 429,
    "too_many_watches": 429,
    "unknown_kind": 501,
    "disk_full": 507,
}

_STATUS_OF_LEFT = {
    "asleep": (409, "wrong_state"),
    "elsewhere": (409, "wrong_state"),
    "deleted": (404, "sandbox_not_found"),
    "died": (502, "machine_failed"),
    "stopping": (503, "stopping"),
}

# The first class that matches counts; KernelsError itself stands last.
_STATUS_OF: tuple[tuple[type[errors.KernelsError], int, str], ...] = (
    (errors.UnknownSandboxError, 404, "sandbox_not_found"),
    (errors.UnknownTemplateError, 404, "kernelspec_not_found"),
    (errors.UnknownSnapshotError, 404, "snapshot_not_found"),
    (errors.SnapshotInUseError, 409, "snapshot_in_use"),
    (errors.SandboxExistsError, 409, "sandbox_exists"),
    (errors.SnapshotExistsError, 409, "snapshot_exists"),
    (errors.LimitError, 403, "limit_exceeded"),
    (errors.SandboxStateError, 409, "wrong_state"),
    (errors.UnsupportedError, 409, "not_supported"),
    (errors.RequestError, 400, "invalid_request"),
    (errors.CheckpointLimitError, 503, "checkpoint_limit"),
    (errors.CapacityError, 503, "no_capacity"),
    (errors.MachineUnresponsiveError, 504, "machine_unresponsive"),
    (errors.MachineFailedError, 502, "machine_failed"),
    (errors.StorageError, 500, "storage_failed"),
    (errors.TemplateError, 500, "template_failed"),
    (errors.KernelsError, 500, "kernels_error"),
)


def api_error(error: errors.KernelsError | ApiError) -> ApiError:
    """The answer to a request that ended with `error`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, errors.GuestRefusedError):
        status = _STATUS_OF_REFUSAL.get(error.code, 502)
        return ApiError(status, error.code if error.code in _STATUS_OF_REFUSAL else "guest_failed", str(error))
    if isinstance(error, errors.MachineLeftError):
        return ApiError(*_STATUS_OF_LEFT[error.why], str(error))
    status, code = next((status, code) for kind, status, code in _STATUS_OF if isinstance(error, kind))
    return ApiError(status, code, str(error))


def phrase(status: int) -> str:
    """HTTP's words for a status: `phrase(404) == "Not Found"`."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
