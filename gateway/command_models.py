"""Requests and answers of the HTTP API about commands. Their meaning is in docs/exec_and_files.md."""

from __future__ import annotations

import signal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, TypeAdapter, field_validator

from gateway.models import (
    MAX_ENV_VARIABLES,
    Answer,
    PathText,
    SandboxRequest,
    Timestamp,
    UserName,
    check_env,
)
from kernels.exec import CommandRequest

# Someone waits for the answer with a connection open; what takes longer is run in the background, or on a WebSocket.
EXEC_TIMEOUT_S = 60.0
EXEC_TIMEOUT_MAX_S = 3600.0
# Of each of stdout and stderr in one answer; a WebSocket has no such limit.
OUTPUT_BYTES = 1024 * 1024
OUTPUT_BYTES_MAX = 8 * 1024 * 1024
# As long as vm_runtime/guest/exec.py takes.
TIMEOUT_MAX_S = 366 * 86_400.0
TERMINAL_MAX = 10_000

_Text = Annotated[str, StringConstraints(pattern=r"^[^\u0000]*$")]
_CommandLine = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\u0000]*$")]
Arguments = Annotated[list[_Text], Field(min_length=1, max_length=4096)]


class CommandStart(SandboxRequest):
    """What all ways to start a command have in common."""

    command: _CommandLine | Arguments
    cwd: PathText | None = None
    env: dict[str, str] = Field(default_factory=dict, max_length=MAX_ENV_VARIABLES)
    user: UserName = "user"

    _env = field_validator("env")(check_env)

    @field_validator("command")
    @classmethod
    def _has_program(cls, value: str | list[str]) -> str | list[str]:
        if not value[0]:
            raise ValueError("the program's name is empty")
        return value

    @property
    def given(self) -> dict[str, Any]:
        """What `CommandRequest` has of it."""
        line = self.command if isinstance(self.command, str) else tuple(self.command)
        return {"command": line, "cwd": self.cwd, "env": self.env, "as_root": self.user == "root"}


class ExecRequest(CommandStart):
    """POST /api/sandboxes/{id}/exec: run a command to its end."""

    stdin: str | None = None
    timeout_s: float = Field(EXEC_TIMEOUT_S, gt=0, le=EXEC_TIMEOUT_MAX_S)
    max_output_bytes: int = Field(OUTPUT_BYTES, ge=0, le=OUTPUT_BYTES_MAX)

    def to_command(self) -> CommandRequest:
        return CommandRequest(**self.given, stdin=self.stdin is not None, timeout_s=self.timeout_s)


class BackgroundRequest(CommandStart):
    """POST /api/sandboxes/{id}/commands: start a command and leave it running. stdin: whether one may write to it."""

    stdin: bool = False
    timeout_s: float | None = Field(None, gt=0, le=TIMEOUT_MAX_S)

    def to_command(self) -> CommandRequest:
        return CommandRequest(**self.given, stdin=self.stdin, background=True, timeout_s=self.timeout_s)


class SignalRequest(SandboxRequest):
    """POST /api/sandboxes/{id}/commands/{cid}/signal. Such as SIGINT."""

    signal: str

    @field_validator("signal")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in signal.Signals.__members__:
            raise ValueError(f"there is no signal {value[:40]!r}; SIGINT, SIGTERM and SIGKILL are usual ones")
        return value

    @property
    def number(self) -> int:
        return int(signal.Signals[self.signal])


def signal_name(number: int | None) -> str | None:
    """SIGKILL for 9; SIG64 for what has no name."""
    if number is None:
        return None
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


SignalName = Annotated[str | None, BeforeValidator(signal_name)]


class ExecAnswer(Answer):
    """How a command ended, and its output as text (bytes that are no UTF-8 become U+FFFD). exit_code or signal is
    null. truncated: there was more than max_output_bytes, of which the first are here. out_of_memory: it was ended
    since the machine has too little."""

    command_id: str
    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool
    exit_code: int | None
    signal: SignalName
    timed_out: bool
    out_of_memory: bool


class CommandAnswer(Answer):
    """A command that runs or has ended. output_bytes: of both kinds, ever."""

    command_id: str
    pid: int
    command: str
    cwd: str | None
    background: bool
    tty: bool
    started_at: Timestamp
    output_bytes: int
    running: bool
    exit_code: int | None
    signal: SignalName
    timed_out: bool
    out_of_memory: bool


class TerminalSize(SandboxRequest):
    rows: int = Field(ge=1, le=TERMINAL_MAX)
    columns: int = Field(ge=1, le=TERMINAL_MAX)


class StartFrame(CommandStart):
    """The first message on the WebSocket of exec."""

    type: Literal["start"]
    tty: TerminalSize | None = None
    stdin: bool = False
    background: bool = False
    timeout_s: float | None = Field(None, gt=0, le=TIMEOUT_MAX_S)

    def to_command(self) -> CommandRequest:
        return CommandRequest(
            **self.given,
            size=None if self.tty is None else (self.tty.rows, self.tty.columns),
            stdin=self.stdin,
            background=self.background,
            timeout_s=self.timeout_s,
        )


class StdinEndFrame(SandboxRequest):
    type: Literal["stdin_end"]


class ResizeFrame(TerminalSize):
    type: Literal["resize"]


class SignalFrame(SignalRequest):
    type: Literal["signal"]


ControlFrame = Annotated[StdinEndFrame | ResizeFrame | SignalFrame, Field(discriminator="type")]
CONTROL_FRAME: TypeAdapter[StdinEndFrame | ResizeFrame | SignalFrame] = TypeAdapter(ControlFrame)


class AttachQuery(BaseModel):
    """stdin: whether to write to it."""

    stdin: bool = False
