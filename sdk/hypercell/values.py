"""The values the SDK answers with: sandboxes, files, commands, checkpoints. Pure data, parsed from the gateway's JSON.

Fields that a newer gateway adds are left out; those that an older one does not know have their defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Literal, TypeVar

# Whom commands run as, and with whose rights files are touched: the kernel's user, or root.
User = Literal["user", "root"]
# What happens to a sandbox when its time is up.
OnTimeout = Literal["delete", "sleep"]


P = TypeVar("P", bound="_Parsed")


class _Parsed:
    """A dataclass made from JSON of the same field names."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def parse(cls: type[P], value: Mapping[str, Any]) -> P:
        """Raises TypeError if a field without default is missing."""
        known = {}
        for one in dataclasses.fields(cls):
            if one.name in value:
                found = value[one.name]
                is_time = isinstance(found, str) and "datetime" in str(one.type)
                known[one.name] = datetime.fromisoformat(found.replace("Z", "+00:00")) if is_time else found
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class SandboxInfo(_Parsed):
    """What the gateway knows about a sandbox.

    state: creating, running, paused, asleep, failed or gone. execution_state: the kernel's (idle, busy, ...).
    reason: why it failed. unresponsive_since: its machine runs and has not answered since then; a restart or `kill`
    ends it. index: which of its siblings it is, for a child of a fork. idle_timeout_s: it sleeps after so long without
    activity (0: never). max_lifetime_s: it is deleted so long after its creation (None: never), or put to sleep
    (on_timeout). checkpoint_problem: why its last checkpoint could not be taken, or why they are rarer than cells.
    """

    id: str
    state: str
    driver: str
    template: str
    parent_id: str | None
    name: str | None
    created_at: datetime
    last_activity: datetime
    execution_state: str
    memory_mib: int
    vcpus: int
    disk_mib: int
    reason: str | None = None
    index: int = 0
    snapshot_id: str | None = None
    unresponsive_since: datetime | None = None
    notebook: str | None = None
    released: bool = False
    idle_timeout_s: float = 0.0
    max_lifetime_s: float | None = None
    checkpoints: str = "off"
    checkpoint_problem: str | None = None
    on_timeout: OnTimeout = "delete"
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SandboxTree:
    """A sandbox's family: root is the id of the first ancestor that is left, nodes are all of them."""

    root: str
    nodes: list[SandboxInfo]

    def children(self, sandbox_id: str) -> list[SandboxInfo]:
        """The direct children, oldest first."""
        return sorted((node for node in self.nodes if node.parent_id == sandbox_id), key=lambda node: node.created_at)


@dataclass(frozen=True, kw_only=True)
class ForkFailure:
    """A child that was asked for and could not be made; its siblings are there."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo(_Parsed):
    """A point on a sandbox's time line. cell: the execution count after which it was taken. bytes: what it added."""

    id: str
    name: str | None
    created_at: datetime
    cell: int | None = None
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class SnapshotInfo(_Parsed):
    """A snapshot from which sandboxes can be created. sandbox_id: whose time line it is on. bytes: what it adds to the
    store."""

    id: str
    name: str | None
    template: str
    created_at: datetime
    sandbox_id: str | None = None
    cell: int | None = None
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class SandboxEvent:
    """A change of a sandbox. kind: created, state, execution_state, checkpoint, ...; data: what the gateway says."""

    sandbox_id: str
    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FileInfo(_Parsed):
    """A file, directory or link. kind: file, directory, link, pipe, socket or device. mode: octal, like "0644".
    target: where a link leads."""

    name: str
    path: str
    kind: str
    size_bytes: int
    mode: str
    uid: int
    gid: int
    modified_at: datetime
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class FileChange(_Parsed):
    """event: created, modified, attributes, deleted, renamed, or overflow (changes were missed: look again).
    old_path: what a renamed one was called."""

    event: str
    path: str
    old_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class CommandInfo(_Parsed):
    """A command that runs or has ended. output_bytes: of both kinds, ever."""

    command_id: str
    pid: int
    command: str
    cwd: str | None
    background: bool
    tty: bool
    started_at: datetime
    output_bytes: int
    running: bool
    exit_code: int | None = None
    signal: str | None = None
    timed_out: bool = False
    out_of_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """How a command ended. exit_code is None if a signal ended it, which `signal` names then.

    stdout, stderr: what it said while it was followed. skipped_bytes: output that was kept no more. out_of_memory: it
    was ended, since the sandbox has too little memory (`Sandbox.create(memory_mib=...)`).
    """

    exit_code: int | None
    signal: str | None
    timed_out: bool
    stdout: str
    stderr: str
    skipped_bytes: int = 0
    out_of_memory: bool = False

    @property
    def ok(self) -> bool:
        """Whether it ended with status 0."""
        return self.exit_code == 0


@dataclass(frozen=True, kw_only=True)
class TerminalSize:
    """A terminal's size in characters."""

    rows: int = 24
    columns: int = 80


@dataclass(frozen=True, kw_only=True)
class SandboxMetrics(_Parsed):
    """What a sandbox takes of the host's memory; 0 while it sleeps. unique: what would be free if it ended. shared:
    pages that others (its template, its relatives) use as well. guest: what runs in it uses of its machine; None while
    it sleeps or is paused, and for one that was made by an older version."""

    memory_unique_bytes: int
    memory_shared_bytes: int
    guest: GuestMetrics | None = None


@dataclass(frozen=True, kw_only=True)
class GuestMetrics(_Parsed):
    """What runs in a sandbox uses of its machine. cpu_percent: of all its processors together, just now. cpu_used_ms:
    since its machine was booted. The disk's numbers are those of the file system that `/home` is on."""

    cpu_percent: int
    cpu_used_ms: int
    memory_total_bytes: int
    memory_used_bytes: int
    disk_total_bytes: int
    disk_used_bytes: int
