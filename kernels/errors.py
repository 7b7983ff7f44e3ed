"""Errors of the kernels layer; the name says whose fault it is.

KernelsError
+-- RequestError              the caller's: bad values
|   +-- UnknownSandboxError       no sandbox has this id
|   +-- UnknownTemplateError      no kernelspec has this name
|   +-- UnknownSnapshotError      no snapshot or checkpoint is meant by this
|   +-- SnapshotInUseError        a sandbox needs it
|   +-- SandboxExistsError        the id asked for is taken
|   +-- SnapshotExistsError       the sandbox has a checkpoint of this name
|   +-- LimitError                more than the configured maximum
|   +-- SandboxStateError         not possible in the state the sandbox is in
|   +-- UnsupportedError          the driver cannot do it here
|   +-- GuestRefusedError         the guest's own system would not do it (no such file, disk full); `code` says what
+-- CapacityError             the host's: no memory, disk or slot left now; try later
|   +-- CheckpointLimitError      no further snapshot can be stored until those before it were merged
+-- MachineFailedError        the machine died or did not start
|   +-- MachineUnresponsiveError  it runs and does not answer
+-- MachineLeftError          nobody's: the sandbox lost its machine while something used it; `why` says for what
+-- StorageError              the host's: the snapshot store is full, or cannot be read
+-- CellRunsError             nobody's: the kernel is not between two cells
+-- TemplateError             the template could not be built
"""

from __future__ import annotations


class KernelsError(Exception):
    """Base of all errors of this package. `str(error)` is a sentence for people: what is wrong and what to do."""


class RequestError(KernelsError):
    """The caller's fault; repeating the same request fails again."""


class UnknownSandboxError(RequestError):
    """No sandbox has this id."""

    def __init__(self, sandbox_id: str) -> None:
        super().__init__(f"There is no sandbox with the id {sandbox_id}. GET /api/sandboxes lists those that exist.")
        self.sandbox_id = sandbox_id


class UnknownTemplateError(RequestError):
    """No kernelspec has this name."""


class UnknownSnapshotError(RequestError):
    """No snapshot or checkpoint is meant by this id, name or cell number."""


class SnapshotInUseError(RequestError):
    """A sandbox needs this snapshot."""


class SandboxExistsError(RequestError):
    """The id asked for is taken."""


class SnapshotExistsError(RequestError):
    """The sandbox has a checkpoint of this name."""


class LimitError(RequestError):
    """More was asked for than the configured maximum."""


class SandboxStateError(RequestError):
    """The sandbox is in a state in which this is not possible."""

    def __init__(self, sandbox_id: str, *, found: str, wanted: str) -> None:
        super().__init__(f"Sandbox {sandbox_id} is {found}; this needs it to be {wanted}.")
        self.found = found
        self.wanted = wanted


class UnsupportedError(RequestError):
    """The driver cannot do it on this host. fix: a command or setting, where there is one."""

    def __init__(self, why_not: str, *, fix: str | None) -> None:
        super().__init__(f"{why_not} Try: {fix}" if fix else why_not)
        self.fix = fix


class GuestRefusedError(RequestError):
    """The guest's own system would not do it. code: for programs, such as file_not_found (docs/exec_and_files.md)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CapacityError(KernelsError):
    """The host has no memory, disk or slot left; the same request may work later."""


class CheckpointLimitError(CapacityError):
    """No further snapshot of this sandbox can be stored until those before it were merged; it was not even paused."""


class MachineFailedError(KernelsError):
    """The machine of a sandbox died or did not start; the message holds the reason and the end of its serial log."""


class MachineUnresponsiveError(MachineFailedError):
    """The machine of a sandbox runs, but it or its kernel does not answer. A restart or a delete ends it from
    outside."""


class MachineLeftError(KernelsError):
    """The sandbox lost its machine while something used it. why: one of `LEFT`."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{LEFT[why]} while this was in use.")
        self.why = why


LEFT = {
    "asleep": "The sandbox was put to sleep (commands go on when it wakes, and can be attached to)",
    "elsewhere": "The sandbox went to another state of its time line",
    "deleted": "The sandbox was deleted",
    "died": "The sandbox's machine died",
    "stopping": "The gateway began to stop (commands go on in its next start, and can be attached to)",
}


class StorageError(KernelsError):
    """The snapshot store is full, or what is in it cannot be read; sandboxes that run are not affected."""


class CellRunsError(KernelsError):
    """The kernel is not, or not surely, between two cells."""


class TemplateError(KernelsError):
    """A template could not be built; the message says at which step and why."""
