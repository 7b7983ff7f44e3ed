"""Requests and answers of the sandbox API (docs/gateway.md, "Sandboxes")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator

from gateway.errors import api_error
from gateway.models import (
    MAX_ENV_VARIABLES,
    Answer,
    EnvName,
    EnvValue,
    ErrorAnswer,
    KernelId,
    Name,
    PathText,
    SandboxRequest,
    Size,
    Timestamp,
    check_env,
    timestamp,
)
from kernels.errors import KernelsError
from kernels.models import (
    CreateSandbox,
    OnTimeout,
    Sandbox,
    SandboxState,
)

# A request for more is a mistake; `max_children` is the limit that counts.
MAX_FORK_COUNT = 10_000

# Tags are for finding things, not for storing them; they have no characters that stand between tags in a query.
MAX_TAGS = 32
TagName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\u0000-\u001f=,]*$")]
TagValue = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\u0000-\u001f,]*$")]

# Of sandboxes in one answer, where a limit is asked for.
MAX_PAGE = 1000
_STATES = rf"^({'|'.join(SandboxState)})(,({'|'.join(SandboxState)}))*$"

# A hundred years: longer waits are meant as "never", which is 0.
MAX_SECONDS = 3.2e9


def _number(value: Any) -> Any:
    # Strict models take no integer for a float, JSON knows no difference.
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Seconds = Annotated[float, BeforeValidator(_number), Field(ge=0, le=MAX_SECONDS)]
Policy = Annotated[
    str,
    StringConstraints(pattern=r"^(off|cell|timer:[1-9][0-9]{0,5})$"),
    Field(description="When checkpoints are taken by themselves: off, cell (after every one) or timer:<minutes>."),
]
Tags = Annotated[dict[TagName, TagValue], Field(max_length=MAX_TAGS)]
CheckpointName = Annotated[str, StringConstraints(min_length=1, max_length=100)]
# A checkpoint's or snapshot's id or its beginning, its name, or a cell's number.
Target = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\u0000]*$")]


class NewSandbox(SandboxRequest):
    """POST /api/sandboxes. What is missing is as the template or the gateway's settings say; times of 0 mean never.

    notebook: the path of the notebook it is for. snapshot: start from this one (id or name) instead of the template's.
    on_timeout: what happens when max_lifetime_s is over; one that was put to sleep by it has none any more.
    """

    template: Name | None = None
    name: Name | None = None
    kernel_id: KernelId | None = None
    env: dict[EnvName, EnvValue] = Field(default_factory=dict, max_length=MAX_ENV_VARIABLES)
    cwd: PathText | None = None
    memory_mib: Size | None = None
    vcpus: Size | None = None
    disk_mib: Size | None = None
    notebook: PathText | None = None
    idle_timeout_s: Seconds | None = None
    max_lifetime_s: Seconds | None = None
    checkpoints: Policy | None = None
    snapshot: Target | None = None
    on_timeout: OnTimeout = "delete"
    tags: Tags = Field(default_factory=dict)

    _env = field_validator("env")(check_env)

    def to_create(self, default_template: str) -> CreateSandbox:
        given = {**dict(self), "template": self.template or default_template}
        return CreateSandbox(**{**given, "max_lifetime_s": self.max_lifetime_s or None})


class SandboxChanges(SandboxRequest):
    """PATCH /api/sandboxes/{id}; what is missing stays. A name of null removes it. max_lifetime_s counts from now;
    times of 0 or null mean never."""

    name: Name | None = None
    idle_timeout_s: Seconds | None = None
    max_lifetime_s: Seconds | None = None
    checkpoints: Policy | None = None
    on_timeout: OnTimeout | None = None
    tags: Tags | None = None

    def changes(self, *, age_s: float) -> dict[str, Any]:
        """For `SandboxService.configure`. age_s: of the sandbox, whose life time is counted from its creation."""
        changes = self.model_dump(exclude_unset=True)
        if "idle_timeout_s" in changes:
            changes["idle_timeout_s"] = self.idle_timeout_s or 0.0
        if "max_lifetime_s" in changes:
            changes["max_lifetime_s"] = age_s + self.max_lifetime_s if self.max_lifetime_s else None
        for name in ("checkpoints", "on_timeout", "tags"):
            if changes.get(name) is None:
                changes.pop(name, None)
        return changes


class SandboxAnswer(Answer):
    """A sandbox; its id is the Jupyter kernel id. released: a Jupyter client has deleted the kernel, and it is kept
    asleep for the next who opens `notebook`. unresponsive_since: its machine runs and has not answered since then;
    execution_state is unknown meanwhile. idle_timeout_s: 0 is never. max_lifetime_s: from created_at on.
    checkpoint_problem: why its last checkpoint could not be taken, or why they are rarer than cells."""

    id: str
    state: Literal["creating", "running", "paused", "asleep", "failed", "gone"]
    driver: str
    template: str
    parent_id: str | None
    index: int
    name: str | None
    owner: str
    created_at: Timestamp
    last_activity: Timestamp
    execution_state: str
    reason: str | None
    memory_mib: int
    vcpus: int
    disk_mib: int
    snapshot_id: str | None
    unresponsive_since: Timestamp | None
    notebook: str | None
    released: bool
    idle_timeout_s: float
    max_lifetime_s: float | None
    checkpoints: str
    checkpoint_problem: str | None
    on_timeout: OnTimeout
    tags: Mapping[str, str]


class DeleteQuery(BaseModel):
    """DELETE /api/sandboxes/{id}. descendants: also all that came from it by forks."""

    model_config = ConfigDict(extra="forbid")

    descendants: bool = False


class SandboxesQuery(BaseModel):
    """GET /api/sandboxes: those that match everything given, oldest first. tags: `name=value` or `name`, separated by
    commas. states: separated by commas. after: `<created_at>,<id>` of the last one of the page before."""

    model_config = ConfigDict(extra="forbid")

    tags: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    states: Annotated[str, StringConstraints(pattern=_STATES)] | None = None
    name: Name | None = None
    template: Name | None = None
    limit: int | None = Field(None, ge=1, le=MAX_PAGE)
    after: Annotated[str, StringConstraints(max_length=100, pattern=r"^[0-9T:.Z-]+,[0-9a-f-]+$")] | None = None

    def select(self, sandboxes: Sequence[Sandbox]) -> list[Sandbox]:
        """The page that is asked for."""
        wanted = [tag.partition("=") for tag in (self.tags or "").split(",") if tag]
        states = set((self.states or "").split(",")) - {""}
        found = [
            each
            for each in sandboxes
            if (not states or each.state in states)
            and self.name in (None, each.name)
            and self.template in (None, each.template)
            and all(name in each.tags and (not equals or each.tags[name] == value) for name, equals, value in wanted)
            and (self.after is None or _place(each) > self.after)
        ]
        return sorted(found, key=_place)[: self.limit]


def _place(sandbox: Sandbox) -> str:
    return f"{timestamp(sandbox.created_at)},{sandbox.id}"


class ConnectionAnswer(Answer):
    """Jupyter's connection file of a kernel on this machine."""

    transport: Literal["ipc"]
    ip: str
    shell_port: int
    iopub_port: int
    stdin_port: int
    control_port: int
    hb_port: int
    key: str
    signature_scheme: str
    kernel_name: str


class ForkRequest(SandboxRequest):
    """POST /api/sandboxes/{id}/fork. name: of the children, else the parent's. same_random: the children's user-level
    random numbers continue as the parent's would. mid_cell: do not wait for the end of the cell that runs."""

    count: Annotated[Size, Field(le=MAX_FORK_COUNT)] = 1
    name: Name | None = None
    same_random: bool = False
    mid_cell: bool = False


class FailedChild(Answer):
    """Takes the place of a child that could not be made; its siblings are none the worse."""

    error: ErrorAnswer


class ForkAnswer(Answer):
    """One entry per child, in order of their indices."""

    children: list[SandboxAnswer | FailedChild]


def child_answer(child: Sandbox | KernelsError) -> SandboxAnswer | FailedChild:
    if isinstance(child, Sandbox):
        return SandboxAnswer.of(child)
    return FailedChild(error=ErrorAnswer.of(api_error(child)))


class TreeAnswer(Answer):
    """A family: the root's id, and every sandbox that is still there, parents before children (`parent_id`)."""

    root: str
    nodes: list[SandboxAnswer]


class NewCheckpoint(SandboxRequest):
    """POST /api/sandboxes/{id}/checkpoints."""

    name: CheckpointName | None = None


class CheckpointAnswer(Answer):
    """A point on a sandbox's time line. cell: the execution count after which it was taken, null if unknown. bytes:
    what it added to the store."""

    id: str
    name: str | None
    cell: int | None
    created_at: Timestamp
    bytes: int


class GotoRequest(SandboxRequest):
    """POST /api/sandboxes/{id}/goto. target: a checkpoint's id or the beginning of it, its name, or a cell's number."""

    target: Target


class SnapshotAnswer(Answer):
    """A snapshot in the store. sandbox_id: whose time line it is on. cell, bytes: as a checkpoint's."""

    id: str
    name: str | None
    owner: str
    sandbox_id: str | None
    template: str
    cell: int | None
    created_at: Timestamp
    bytes: int


class SnapshotsQuery(BaseModel):
    """GET /api/snapshots. owner: only theirs."""

    model_config = ConfigDict(extra="forbid")

    owner: Name | None = None


class GuestUsageAnswer(Answer):
    """cpu_percent: of all its processors together, just now. cpu_used_ms: since its machine was booted."""

    cpu_percent: int
    cpu_used_ms: int
    memory_total_bytes: int
    memory_used_bytes: int
    disk_total_bytes: int
    disk_used_bytes: int


class UsageAnswer(Answer):
    """What a sandbox's machine takes of the host's memory; 0 without one (asleep). unique: what would be free if it
    ended. shared: pages that others use as well. guest: what runs in it uses of its machine; null while it sleeps or is
    paused, and where its agent does not report it."""

    memory_unique_bytes: int
    memory_shared_bytes: int
    guest: GuestUsageAnswer | None


class EventAnswer(Answer):
    """One event: what happened to which sandbox. data: as docs/gateway.md lists them by kind."""

    sandbox_id: str
    kind: str
    data: Mapping[str, Any]
