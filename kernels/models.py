"""The values the gateway sees: sandboxes, requests for them, kernelspecs and events.

Pure data. Knows nothing of HTTP, ZMQ or machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any


class SandboxState(StrEnum):
    """The life of a sandbox (the transitions are in kernels/states.py). `failed` is terminal and carries a reason."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    ASLEEP = "asleep"
    FAILED = "failed"
    GONE = "gone"


class EventKind(StrEnum):
    CREATED = "created"
    STATE = "state"
    EXECUTION_STATE = "execution_state"
    KERNEL_RESTARTING = "kernel_restarting"
    KERNEL_RESTARTED = "kernel_restarted"
    KERNEL_DEAD = "kernel_dead"
    DELETED = "deleted"


@dataclass(frozen=True, kw_only=True)
class CreateSandbox:
    """A request for a sandbox. None means: as the kernelspec says. Sizes beyond the maxima raise `LimitError`.

    kernel_id: the id to use (a UUID), as Jupyter's gateway clients may choose it. env: for the kernel process.
    cwd: where the kernel starts, inside the guest; falls back to the home directory if it is not there.
    """

    template: str
    name: str | None = None
    kernel_id: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    owner: str = "local"
    memory_mib: int | None = None
    vcpus: int | None = None
    disk_mib: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """What a user has: one isolated machine with one kernel. `id` is the Jupyter kernel id (a UUID).

    execution_state: Jupyter's word (starting, idle, busy, restarting, dead). reason: why it failed, or None.
    created_at, last_activity: aware UTC times. `name` is the sandbox's own name; `template` the kernelspec's.
    """

    id: str
    state: SandboxState
    driver: str
    template: str
    parent_id: str | None
    name: str | None
    owner: str
    created_at: datetime
    last_activity: datetime
    execution_state: str
    reason: str | None
    memory_mib: int
    vcpus: int
    disk_mib: int


@dataclass(frozen=True, kw_only=True)
class Kernelspec:
    """A template as Jupyter shows it. `spec` is Jupyter's kernelspec (argv, display_name, language, metadata,
    interrupt_mode). `resource_dir` holds the logo files and nothing else."""

    name: str
    spec: Mapping[str, Any]
    resource_dir: Path


@dataclass(frozen=True, kw_only=True)
class SandboxEvent:
    """A change of one sandbox. `data` holds JSON values only."""

    sandbox_id: str
    kind: EventKind
    data: Mapping[str, Any] = field(default_factory=dict)
