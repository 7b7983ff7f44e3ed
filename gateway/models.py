"""Requests and answers of Jupyter's API, and what all models share. The OpenAPI document is made from these, and they
check what comes in. The sandbox API's own are in sandbox_models.py.

Jupyter's own requests may carry fields that are not known here (its clients differ), ours may not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    AliasGenerator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from kernels.models import CreateSandbox, Kernelspec, Sandbox, SandboxState

# Linux takes 128 KiB per variable and 2 MiB for all; a request's environment is passed on the wire in one frame.
MAX_ENV_VARIABLES = 512
MAX_ENV_BYTES = 64 * 1024
_UUID = r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"

# JupyterLab's consoles: `console-1-<uuid>`.
_CONSOLE_PATH = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")

# Names and paths are shown, stored and passed on, never opened; long ones are mistakes.
# Whom commands run as, and with whose rights files are touched: the kernel's user, or root.
UserName = Literal["user", "root"]
Name = Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\u0000]*$")]
PathText = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\u0000]*$")]
EnvName = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^=\u0000]*$")]
EnvValue = Annotated[str, StringConstraints(max_length=MAX_ENV_BYTES, pattern=r"^[^\u0000]*$")]
KERNEL_ID = re.compile(_UUID)
KernelId = Annotated[str, StringConstraints(pattern=_UUID)]


def _whole(value: Any) -> Any:
    # JSON has one kind of number: 2.0 is an integer there.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**31 - 1)]


def timestamp(moment: datetime) -> str:
    """UTC with six digits of microseconds and a Z: jupyter_server parses it with `%Y-%m-%dT%H:%M:%S.%fZ`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _moment(value: Any) -> Any:
    # Guests send seconds since 1970.
    moment = datetime.fromtimestamp(value, UTC) if isinstance(value, float | int) else value
    return timestamp(moment) if isinstance(moment, datetime) else moment


Timestamp = Annotated[str, BeforeValidator(_moment), Field(json_schema_extra={"format": "date-time"})]


def notebook_of(path: str | None) -> str | None:
    """The notebook that a kernel for this path belongs to; None for consoles, whose paths nobody opens again."""
    return None if not path or _CONSOLE_PATH.search(path) else path


class JupyterRequest(BaseModel):
    """A request that Jupyter's clients make."""

    model_config = ConfigDict(extra="ignore", strict=True)


def _spellings(field: str) -> str | AliasChoices:
    return AliasChoices(field, "timeout") if field == "timeout_s" else field


class SandboxRequest(BaseModel):
    """A request of the sandbox API. Where it has `timeout_s`, `timeout` is taken as well; both are an error."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=AliasGenerator(validation_alias=_spellings))


class Answer(BaseModel):
    """Anything that is answered."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    @classmethod
    def of(cls, value: object) -> Self:
        """From a value of the layers below that has attributes of these names."""
        return cls.model_validate(value)


class ErrorAnswer(Answer):
    """Every error. code is for programs, message for people, reason is HTTP's phrase."""

    reason: str
    message: str
    code: str


def _texts(value: Any) -> Any:
    """jupyter_server looks at no variable's value: what is no text becomes the text that JSON has for it."""
    if isinstance(value, dict):
        return {name: each if isinstance(each, str) else json.dumps(each) for name, each in value.items()}
    return {} if value is None else value


def check_env(env: dict[str, str]) -> dict[str, str]:
    size = sum(len(name.encode()) + len(value.encode()) for name, value in env.items())
    if size > MAX_ENV_BYTES:
        raise ValueError(f"env has {size} bytes, at most {MAX_ENV_BYTES} are taken")
    return env


class Resources(SandboxRequest):
    """The size of a machine; what is missing is as the kernelspec says."""

    memory_mib: Size | None = None
    vcpus: Size | None = None
    disk_mib: Size | None = None


def _size_in(env: Mapping[str, str], variable: str) -> int | None:
    text = env.get(variable)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError(f"{variable} must be a positive number, not {text[:40]!r}")
    return int(text)


class CreateKernel(JupyterRequest):
    """POST /api/kernels. KERNEL_MEMORY_MIB, KERNEL_VCPUS and KERNEL_DISK_MIB in `env` say the same as `resources`;
    JPY_SESSION_NAME is the notebook's path."""

    name: Name | None = None
    env: Annotated[dict[EnvName, EnvValue], BeforeValidator(_texts)] = Field(
        default_factory=dict, max_length=MAX_ENV_VARIABLES
    )
    path: PathText | None = None
    kernel_id: KernelId | None = None
    resources: Resources | None = None

    _env = field_validator("env")(check_env)

    def to_create(self, default_template: str) -> CreateSandbox:
        """Errors: ValueError for a resource that is no number."""
        resources = self.resources or Resources()
        return CreateSandbox(
            template=self.name or default_template,
            kernel_id=self.kernel_id,
            env=self.env,
            cwd=self.env.get("KERNEL_WORKING_DIR") or self.path or None,
            notebook=notebook_of(self.env.get("JPY_SESSION_NAME")),
            memory_mib=resources.memory_mib or _size_in(self.env, "KERNEL_MEMORY_MIB"),
            vcpus=resources.vcpus or _size_in(self.env, "KERNEL_VCPUS"),
            disk_mib=resources.disk_mib or _size_in(self.env, "KERNEL_DISK_MIB"),
        )


class KernelAnswer(Answer):
    """Jupyter's kernel model. reason: why the kernel is dead, or has gone back to its last checkpoint, else null.
    crashes: how often it has lost its state without being asked to, and has come back."""

    id: str
    name: str
    last_activity: Timestamp
    execution_state: str
    connections: int
    reason: str | None = None
    crashes: int = 0

    @classmethod
    def of_sandbox(cls, sandbox: Sandbox, connections: int) -> KernelAnswer:
        state, reason = sandbox.execution_state, sandbox.reason
        if sandbox.state is SandboxState.FAILED:
            state = "dead"
        elif sandbox.state is SandboxState.ASLEEP and state != "dead":
            state = "idle"  # a cell that sleeps in the middle continues after the wake, but nothing is done now
        if sandbox.unresponsive_since is not None:
            reason = f"Its machine has not answered since {timestamp(sandbox.unresponsive_since)}."
        return cls(
            id=sandbox.id,
            name=sandbox.template,
            last_activity=timestamp(sandbox.last_activity),
            execution_state=state,
            connections=connections,
            reason=reason,
            crashes=sandbox.crashes,
        )


class KernelspecAnswer(Answer):
    """One kernelspec; resources maps names of logos to their URLs."""

    name: str
    spec: dict[str, Any]
    resources: dict[str, str]

    @classmethod
    def of_kernelspec(cls, kernelspec: Kernelspec, files: list[str]) -> KernelspecAnswer:
        """files: the names in the kernelspec's resource directory."""
        resources = {file.rpartition(".")[0] or file: f"/kernelspecs/{kernelspec.name}/{file}" for file in files}
        return cls(name=kernelspec.name, spec=dict(kernelspec.spec), resources=resources)


class KernelspecsAnswer(Answer):
    """All kernelspecs and the name of the one that is used when none is named."""

    default: str
    kernelspecs: dict[str, KernelspecAnswer]


class SessionKernel(JupyterRequest):
    """The kernel that a session wants: one that runs (id) or a new one (name), which gets the id if both are given and
    it is a UUID."""

    id: Name | None = None
    name: Name | None = None


def _lifted(value: Any) -> Any:
    """Clients of before 2016 send {"notebook": {"path"}} instead of path, as jupyter_server still understands it."""
    if isinstance(value, dict) and "path" not in value and isinstance(value.get("notebook"), dict):
        return {"type": "notebook", **value, "path": value["notebook"].get("path")}
    return value


class CreateSession(JupyterRequest):
    """POST /api/sessions."""

    _old = model_validator(mode="before")(_lifted)

    path: PathText
    type: Name
    name: Name | None = None
    kernel: SessionKernel | None = None


class PatchSession(JupyterRequest):
    """PATCH /api/sessions/{id}; what is missing stays."""

    _old = model_validator(mode="before")(_lifted)

    path: PathText | None = None
    type: Name | None = None
    name: Name | None = None
    kernel: SessionKernel | None = None


class NotebookAnswer(Answer):
    """jupyter_server still sends it for clients of before 2016."""

    path: str
    name: str | None


class SessionAnswer(Answer):
    """jupyter_server's session model."""

    id: str
    path: str
    name: str | None
    type: str
    kernel: KernelAnswer
    notebook: NotebookAnswer


class VersionAnswer(Answer):
    """GET /api."""

    version: str


class StatusAnswer(Answer):
    """GET /api/status."""

    started: Timestamp
    last_activity: Timestamp
    connections: int
    kernels: int


class HealthAnswer(Answer):
    """GET /healthz."""

    status: Literal["ok"]
