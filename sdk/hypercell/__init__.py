"""Hypercell's client side: sandboxes with Python kernels in microVMs.

    from hypercell import Sandbox

    with Sandbox.create() as sandbox:
        print(sandbox.run_code("1 + 1").text)

Nothing is imported before it is used, so that `import hypercell` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypercell.aio.commands import AsyncCommand as AsyncCommand
    from hypercell.aio.commands import AsyncCommands as AsyncCommands
    from hypercell.aio.files import AsyncFiles as AsyncFiles
    from hypercell.aio.sandbox import AsyncSandbox as AsyncSandbox
    from hypercell.aio.shell import AsyncShell as AsyncShell
    from hypercell.aio.watch import AsyncWatch as AsyncWatch
    from hypercell.blocking.commands import Command as Command
    from hypercell.blocking.commands import Commands as Commands
    from hypercell.blocking.files import Files as Files
    from hypercell.blocking.sandbox import Sandbox as Sandbox
    from hypercell.blocking.shell import Shell as Shell
    from hypercell.blocking.watch import Watch as Watch
    from hypercell.errors import CapacityError as CapacityError
    from hypercell.errors import ClosedError as ClosedError
    from hypercell.errors import CodeError as CodeError
    from hypercell.errors import CodeTimeoutError as CodeTimeoutError
    from hypercell.errors import CommandFailedError as CommandFailedError
    from hypercell.errors import ConnectionLostError as ConnectionLostError
    from hypercell.errors import ContentBrokenError as ContentBrokenError
    from hypercell.errors import DiskFullError as DiskFullError
    from hypercell.errors import ForkError as ForkError
    from hypercell.errors import GatewayRefusedError as GatewayRefusedError
    from hypercell.errors import HypercellError as HypercellError
    from hypercell.errors import InvalidRequestError as InvalidRequestError
    from hypercell.errors import KernelDiedError as KernelDiedError
    from hypercell.errors import LimitError as LimitError
    from hypercell.errors import MachineFailedError as MachineFailedError
    from hypercell.errors import MissingPackageError as MissingPackageError
    from hypercell.errors import NoGatewayError as NoGatewayError
    from hypercell.errors import NotFoundError as NotFoundError
    from hypercell.errors import PermissionDeniedError as PermissionDeniedError
    from hypercell.errors import StateError as StateError
    from hypercell.errors import TokenError as TokenError
    from hypercell.errors import UnsupportedError as UnsupportedError
    from hypercell.execution import Execution as Execution
    from hypercell.execution import ExecutionError as ExecutionError
    from hypercell.execution import Logs as Logs
    from hypercell.execution import Result as Result
    from hypercell.values import CheckpointInfo as CheckpointInfo
    from hypercell.values import CommandInfo as CommandInfo
    from hypercell.values import CommandResult as CommandResult
    from hypercell.values import FileChange as FileChange
    from hypercell.values import FileInfo as FileInfo
    from hypercell.values import ForkFailure as ForkFailure
    from hypercell.values import GuestMetrics as GuestMetrics
    from hypercell.values import SandboxEvent as SandboxEvent
    from hypercell.values import SandboxInfo as SandboxInfo
    from hypercell.values import SandboxMetrics as SandboxMetrics
    from hypercell.values import SandboxTree as SandboxTree
    from hypercell.values import SnapshotInfo as SnapshotInfo
    from hypercell.values import TerminalSize as TerminalSize

__version__ = "0.2.0"

_ERRORS = (
    "CapacityError ClosedError CodeError CodeTimeoutError CommandFailedError ConnectionLostError ContentBrokenError "
    "DiskFullError ForkError GatewayRefusedError HypercellError InvalidRequestError KernelDiedError LimitError "
    "MachineFailedError MissingPackageError NoGatewayError NotFoundError PermissionDeniedError StateError TokenError "
    "UnsupportedError"
)
_VALUES = (
    "CheckpointInfo CommandInfo CommandResult FileChange FileInfo ForkFailure GuestMetrics SandboxEvent SandboxInfo "
    "SandboxMetrics SandboxTree SnapshotInfo TerminalSize"
)
_MODULES = {
    "hypercell.aio.commands": "AsyncCommand AsyncCommands",
    "hypercell.aio.files": "AsyncFiles",
    "hypercell.aio.sandbox": "AsyncSandbox",
    "hypercell.aio.shell": "AsyncShell",
    "hypercell.aio.watch": "AsyncWatch",
    "hypercell.blocking.commands": "Command Commands",
    "hypercell.blocking.files": "Files",
    "hypercell.blocking.sandbox": "Sandbox",
    "hypercell.blocking.shell": "Shell",
    "hypercell.blocking.watch": "Watch",
    "hypercell.errors": _ERRORS,
    "hypercell.execution": "Execution ExecutionError Logs Result",
    "hypercell.values": _VALUES,
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hypercell' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
