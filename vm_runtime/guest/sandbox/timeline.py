"""This sandbox's own states: snapshots, checkpoints, going back, sleep; and what the host knows about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vm_runtime.guest.sandbox import notebook
from vm_runtime.guest.sandbox.host import ask


def info() -> Mapping[str, Any]:
    """This sandbox, as `GET /api/sandboxes/{id}` describes it."""
    return ask("info").result


def tree() -> Mapping[str, Any]:
    """Its whole family: {"root": id, "nodes": [sandbox, ...]}."""
    return ask("tree").result


def kill(id: str) -> None:
    """End a child, or a child's child, by its id (or the beginning of it)."""
    ask("kill", id=id)


def snapshot(name: str) -> Mapping[str, Any]:
    """Keep the state of now under a name. Returns twice, too: again with {"restored": True} after `restore(name)`."""
    notebook.flush()
    return ask("snapshot", name=name).result


def restore(name: str) -> None:
    """Go back to a snapshot: all variables, files and threads. The rest of this cell is not run.

    It returns only when someone has come back to the state that was left here.
    """
    _leave("restore", name=name)


def sleep() -> None:
    """Stop this sandbox now; the next request of a client wakes it, in the middle of this line."""
    notebook.flush()
    ask("sleep")


def checkpoints() -> list[Mapping[str, Any]]:
    """The states to which `goto` can go, oldest first."""
    return list(ask("checkpoints").result.get("checkpoints", []))


def goto(target: str | int) -> None:
    """Go back to a checkpoint: its id, or the number of the cell after which it was taken. See `restore`."""
    _leave("goto", target=str(target))


def undo() -> None:
    """Go back to before the last cell. See `restore`."""
    _leave("undo")


def _leave(op: str, **params: Any) -> None:
    notebook.flush()
    ask(op, **params, reply_to=notebook.reply_to())
