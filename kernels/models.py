"""The values the gateway sees: sandboxes, requests for them, kernelspecs and events.

Pure data. Knows nothing of HTTP, ZMQ or machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from kernels.guest_values import Count, GuestValue


class SandboxState(StrEnum):
    """The life of a sandbox (the transitions are in kernels/states.py). `failed` is terminal and carries a reason."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    ASLEEP = "asleep"
    FAILED = "failed"
    GONE = "gone"


class CheckpointPolicy(StrEnum):
    """When checkpoints are taken by themselves. OFF: only by name. CELL: after every cell. Or "timer:<minutes>"."""

    OFF = "off"
    CELL = "cell"


# What happens to a sandbox at the end of its life time. One that was put to sleep has none any more.
OnTimeout = Literal["delete", "sleep"]


class EventKind(StrEnum):
    CREATED = "created"
    STATE = "state"
    EXECUTION_STATE = "execution_state"
    KERNEL_RESTARTING = "kernel_restarting"
    KERNEL_RESTARTED = "kernel_restarted"
    KERNEL_DEAD = "kernel_dead"
    WAKE_FAILED = "wake_failed"
    DELETED = "deleted"
    CHECKPOINT = "checkpoint"
    CHECKPOINT_PROBLEM = "checkpoint_problem"
    FLATTENING_FAILED = "flattening_failed"
    UNRESPONSIVE = "unresponsive"


@dataclass(frozen=True, kw_only=True)
class CreateSandbox:
    """A request for a sandbox. None means: as the kernelspec says. Sizes beyond the maxima raise `LimitError`.

    kernel_id: the id to use (a UUID), as Jupyter's gateway clients may choose it.
    env: for the kernel process.
    cwd: where the kernel starts, inside the guest; falls back to the home directory if it is not there.
    notebook: the path of the notebook it is for: a later request of the same owner for the same path gets the sandbox
        that was left behind, if there is one.
    idle_timeout_s: asleep after so long without activity (0: never).
    max_lifetime_s: deleted so long after its creation (None: never), or put to sleep, as on_timeout says.
    checkpoints: see `CheckpointPolicy`.
    snapshot: start from this snapshot (id or name) instead of the template's.
    tags: words to find it by.
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
    notebook: str | None = None
    idle_timeout_s: float | None = None
    max_lifetime_s: float | None = None
    checkpoints: str | None = None
    snapshot: str | None = None
    on_timeout: OnTimeout = "delete"
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """What a user has: one isolated machine with one kernel. `id` is the Jupyter kernel id (a UUID).

    execution_state: Jupyter's word (starting, idle, busy, restarting, dead; unknown while the machine does not answer,
        since `unresponsive_since`).
    reason: why it failed, or None.
    created_at, last_activity: aware UTC times. `name` is the sandbox's own name; `template` the kernelspec's.
    index: which of its siblings it is, for a child of a fork, else 0.
    snapshot_id: what it wakes from, or its newest checkpoint.
    checkpoint_problem: why its last one could not be taken, or why they are rarer than cells; None if neither is so.
    released: its Jupyter client has deleted it; it is kept asleep for the next who opens `notebook`.
    crashes: how often its kernel has lost its state without being asked to, and has come back.
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
    index: int = 0
    snapshot_id: str | None = None
    unresponsive_since: datetime | None = None
    notebook: str | None = None
    released: bool = False
    idle_timeout_s: float = 0.0
    max_lifetime_s: float | None = None
    checkpoints: str = CheckpointPolicy.OFF
    checkpoint_problem: str | None = None
    on_timeout: OnTimeout = "delete"
    tags: Mapping[str, str] = field(default_factory=dict)
    crashes: int = 0


@dataclass(frozen=True, kw_only=True)
class SandboxUsage:
    """What a sandbox takes. memory_unique_bytes: of the host's memory, what would be free if it ended; shared: pages
    that others use as well. guest: what runs in it uses of its machine; None where that is unknown."""

    memory_unique_bytes: int = 0
    memory_shared_bytes: int = 0
    guest: GuestUsage | None = None


class GuestUsage(GuestValue):
    """cpu_percent: of all its processors together, just now. cpu_used_ms: since its machine was booted."""

    cpu_percent: Count
    cpu_used_ms: Count
    memory_total_bytes: Count
    memory_used_bytes: Count
    disk_total_bytes: Count
    disk_used_bytes: Count


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A snapshot on a sandbox's time line. cell: the execution count after which it was taken, None if unknown.
    bytes: what it added to the store."""

    id: str
    name: str | None
    cell: int | None
    created_at: datetime
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Snapshot(Checkpoint):
    """A snapshot in the store. sandbox_id: whose time line it is on, if it is on one."""

    owner: str
    sandbox_id: str | None
    template: str


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
