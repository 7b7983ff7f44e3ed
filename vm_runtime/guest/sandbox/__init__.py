"""`import sandbox`: fork the machine that this code runs in, and go back in its time.

    child = sandbox.fork()            # returns twice, like fork(2)
    if child is None:
        sandbox.exit(explore())       # in the child; the value travels to the parent
    print(child.result())

    sandbox.id, sandbox.parent_id, sandbox.index, sandbox.name    # who am I; always of now
    sandbox.fork(8); sandbox.wait(); child.result(timeout=60); child.kill(); child.url
    sandbox.snapshot("before"); sandbox.restore("before"); sandbox.checkpoints(); sandbox.goto(3); sandbox.undo()
    sandbox.info(); sandbox.tree(); sandbox.sleep(); sandbox.kill(id)

In notebooks, `%sandbox?` shows the same as magics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vm_runtime.guest.sandbox.children import Child
from vm_runtime.guest.sandbox.errors import (
    ChildCrashedError,
    ChildError,
    ChildFailedError,
    ChildTimeoutError,
    ChildUnfinishedError,
    ForkError,
    HostError,
    InterruptedCallError,
    SandboxError,
    ValueRefusedError,
)
from vm_runtime.guest.sandbox.forking import exit, fork, wait
from vm_runtime.guest.sandbox.identity import read as _identity
from vm_runtime.guest.sandbox.timeline import checkpoints, goto, info, kill, restore, sleep, snapshot, tree, undo

if TYPE_CHECKING:
    id: str | None
    parent_id: str | None
    index: int | None
    name: str | None

__all__ = [
    "Child",
    "ChildCrashedError",
    "ChildError",
    "ChildFailedError",
    "ChildTimeoutError",
    "ChildUnfinishedError",
    "ForkError",
    "HostError",
    "InterruptedCallError",
    "SandboxError",
    "ValueRefusedError",
    "checkpoints",
    "exit",
    "fork",
    "goto",
    "info",
    "kill",
    "restore",
    "sleep",
    "snapshot",
    "tree",
    "undo",
    "wait",
]

_LIVE = ("id", "index", "name", "parent_id")


def __getattr__(attribute: str) -> object:
    if attribute in _LIVE:
        return getattr(_identity(), attribute)
    raise AttributeError(f"module 'sandbox' has no attribute {attribute!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LIVE])
