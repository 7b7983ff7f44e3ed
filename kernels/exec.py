"""Commands in a sandbox: start, follow, list, signal, kill. The host's end of vm_runtime/guest/exec.py.

Knows nothing of sandboxes' lives or of HTTP.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated, Any, Literal

from pydantic import Field

from kernels.errors import GuestRefusedError, RequestError
from kernels.guest_values import Count, GuestValue, Moment, Text, asking, guest_errors, parse_json, read_json
from kernels.session import GuestSession
from vm_runtime.wire.command_frames import (
    MAX_REQUEST_BYTES,
    REQUEST_HEADER,
    CommandFrame,
    CommandFrameReader,
)
from vm_runtime.wire.payloads import encode_text
from vm_runtime.wire.stream import Stream

# A guest ends a command itself when its time is up, within its own GRACE_S; one that has not after this long hangs.
OVERTIME_S = 30.0


@dataclass(frozen=True, kw_only=True)
class CommandRequest:
    """What to run: a command line for a shell, or a program with its arguments.

    cwd: from the kernel user's home, which it is where None.
    size: (rows, columns) of a terminal, None for pipes.
    stdin: whether it has any (a terminal always has).
    background: it stays when its client goes.
    as_root: not as the kernel's user.
    """

    command: str | tuple[str, ...]
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    stdin: bool = False
    background: bool = False
    timeout_s: float | None = None
    as_root: bool = False

    def encode(self) -> bytes:
        """As the agent takes it. Errors: RequestError if it is too large."""
        value = {
            "command": self.command if isinstance(self.command, str) else list(self.command),
            "cwd": self.cwd,
            "env": dict(self.env),
            "tty": None if self.size is None else {"rows": self.size[0], "columns": self.size[1]},
            "stdin": self.stdin,
            "background": self.background,
            "timeout_s": self.timeout_s,
        }
        data = encode_text(json.dumps(value, ensure_ascii=False))
        if len(data) > MAX_REQUEST_BYTES:
            raise RequestError(
                f"Command and environment have {len(data)} bytes, at most {MAX_REQUEST_BYTES} are taken; "
                "write a large script to a file and run that."
            )
        return REQUEST_HEADER.pack(len(data)) + data


class StartedCommand(GuestValue):
    """command_id: becomes a part of URLs and headers."""

    command_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    pid: Count


class CommandInfo(StartedCommand):
    """A command that runs or has ended. started_at: seconds since 1970, by the guest's clock. out_of_memory: an older
    agent does not report it."""

    command: Text
    cwd: Text | None = None
    background: bool
    tty: bool
    started_at: Moment
    output_bytes: Count
    running: bool
    exit_code: Count | None = Field(None, validation_alias="exit_status")
    signal: Count | None = None
    timed_out: bool
    out_of_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class CommandOutput:
    source: Literal["stdout", "stderr"]
    data: bytes


class OutputSkipped(GuestValue):
    """Output that the guest keeps no more: before one attached, or because one read too slowly."""

    skipped_bytes: Count = Field(validation_alias="bytes")


class CommandExited(GuestValue):
    """exit_code or signal is None. timed_out: it was ended because its time was up; out_of_memory: because the machine
    has too little."""

    exit_code: Count | None = Field(None, validation_alias="exit_status")
    signal: Count | None = None
    timed_out: bool
    out_of_memory: bool = False


CommandEvent = CommandOutput | OutputSkipped | CommandExited


class AttachedCommand:
    """A stream to a command. `async with` it: leaving before its end gives it up, which ends a foreground command.

    Read it with `next`; what is not read holds a foreground command, and is skipped of a background one. limit: entered
    and left with it.
    """

    def __init__(self, stream: Stream, *, command_id: str, pid: int, limit: AbstractAsyncContextManager[None]) -> None:
        self.command_id = command_id
        self.pid = pid
        self._stream = stream
        self._limit = limit
        self._frames = CommandFrameReader()
        self._events: deque[CommandEvent] = deque()  # those of one read

    async def next(self) -> CommandEvent:
        """The next event; CommandExited is the last one. Errors: GuestRefusedError, MachineFailedError."""
        while not self._events:
            with guest_errors():
                data = await self._stream.read()
                if not data:
                    raise GuestRefusedError("command_lost", "The command's stream ended before the command.")
                for kind, payload in self._frames.feed(data):
                    self._events.append(_event(kind, payload))
        return self._events.popleft()

    async def write(self, data: bytes) -> None:
        """To its standard input, waiting for room. What it takes no more is dropped. Errors: as `next`."""
        with guest_errors():
            await self._stream.write(data)

    def end_input(self) -> None:
        """The end of its standard input (Ctrl-D on a terminal)."""
        self._stream.end()

    def close(self) -> None:
        """Give it up; twice is harmless."""
        self._stream.reset("cancelled", "The client has gone")

    async def __aenter__(self) -> AttachedCommand:
        await self._limit.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self.close()
        return await self._limit.__aexit__(exc_type, exc, traceback)


class SandboxCommands:
    """The commands of one sandbox. All methods raise GuestRefusedError (`code` says what the guest would not do) and
    MachineFailedError."""

    def __init__(self, session: GuestSession) -> None:
        self._open = session.open_stream
        self._deadlines = session.deadlines

    async def start(self, request: CommandRequest) -> AttachedCommand:
        """Errors: RequestError, if it is too large."""
        data = request.encode()
        async with asking(self._deadlines, "exec.start"):
            stream = await self._open("root.exec.start" if request.as_root else "exec.start", {})
            try:
                await stream.write(data)
                frames = CommandFrameReader()
                found: list[tuple[CommandFrame, bytes]] = []
                while not found:
                    received = await stream.read()
                    if not received:
                        raise GuestRefusedError("command_lost", "The command's stream ended before it began.")
                    found = frames.feed(received)
                (_, payload), *rest = found
                started = StartedCommand.parse(parse_json(payload))
                events = [_event(kind, data) for kind, data in rest]
            except BaseException:
                stream.reset()
                raise
        limit_s = None if request.timeout_s is None else request.timeout_s + OVERTIME_S
        limit = self._deadlines.within(limit_s, "the end of a command")
        command = AttachedCommand(stream, command_id=started.command_id, pid=started.pid, limit=limit)
        command._frames = frames
        command._events.extend(events)
        return command

    async def attach(self, command_id: str, *, stdin: bool) -> AttachedCommand:
        """All output that is still kept, then what comes. stdin: whether to write to it."""
        with guest_errors():
            stream = await self._open("exec.attach", {"command_id": command_id, "stdin": stdin})
        try:
            info = CommandInfo.parse(stream.result)
        except BaseException:
            stream.reset()
            raise
        limit = self._deadlines.within(None, "the end of a command")
        return AttachedCommand(stream, command_id=info.command_id, pid=info.pid, limit=limit)

    async def list(self) -> list[CommandInfo]:
        """Those that run, and the last background ones that have ended, oldest first."""
        async with asking(self._deadlines, "exec.list"), await self._open("exec.list", {}) as stream:
            found = await read_json(stream)
        return [CommandInfo.parse(value) for value in found] if isinstance(found, list) else []

    async def get(self, command_id: str) -> CommandInfo:
        for info in await self.list():
            if info.command_id == command_id:
                return info
        raise GuestRefusedError("unknown_command", f"There is no command with the id {command_id[:64]}.")

    async def signal(self, command_id: str, number: int) -> None:
        """SIGTERM, SIGHUP and SIGKILL reach all of the command's session, others its foreground process group."""
        await self._call("exec.signal", {"command_id": command_id, "signal": number})

    async def resize(self, command_id: str, *, rows: int, columns: int) -> None:
        await self._call("exec.resize", {"command_id": command_id, "rows": rows, "columns": columns})

    async def kill(self, command_id: str) -> CommandInfo:
        """SIGKILL to all of its session; how it ended. It is forgotten then."""
        return CommandInfo.parse(await self._call("exec.kill", {"command_id": command_id}))

    async def _call(self, kind: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        with guest_errors():
            async with await self._open(kind, params) as stream:
                return stream.result


def _event(kind: CommandFrame, payload: bytes) -> CommandEvent:
    """Errors: MachineFailedError."""
    match kind:
        case CommandFrame.STDOUT:
            return CommandOutput(source="stdout", data=payload)
        case CommandFrame.STDERR:
            return CommandOutput(source="stderr", data=payload)
        case CommandFrame.SKIPPED:
            return OutputSkipped.parse(parse_json(payload))
        case _:
            return CommandExited.parse(parse_json(payload))
