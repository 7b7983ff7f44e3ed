"""Commands in a sandbox: run one, start one in the background, follow it, write to it, end it.

Frames and meaning: docs/exec_and_files.md.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from hypercell.aio.callbacks import OnBytes, OnText, call_back
from hypercell.aio.shell import AsyncShell
from hypercell.aio.transport import Transport, leave_to_parent, refusal_in
from hypercell.errors import ClosedError, CommandFailedError, ConnectionLostError, HypercellError, NotFoundError
from hypercell.identifiers import in_path
from hypercell.timeouts import takes_timeout
from hypercell.values import CommandInfo, CommandResult, TerminalSize, User

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

# The gateway takes messages up to 1 MiB; pieces of this size let a slow reader hold its writer early.
INPUT_PIECE_BYTES = 256 * 1024
# What `run` keeps of each of stdout and stderr for its result; callbacks get everything.
MAX_KEPT_CHARACTERS = 16 * 1024 * 1024


class RawOutput(Protocol):
    """Takes a command's output as it comes, undecoded; `wait_raw` has it."""

    def write(self, data: bytes, *, is_stdout: bool) -> None:
        """More of stdout, or else of stderr."""

    def skip(self, count: int) -> None:
        """So many bytes, of both kinds, are kept no more."""


class _Kept:
    """Text of one output, decoded across pieces, up to a limit."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[str] = []
        self._characters = 0
        self.dropped = 0

    def add(self, data: bytes, *, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        kept = text[: MAX_KEPT_CHARACTERS - self._characters]
        self._characters += len(kept)
        self.dropped += len(text) - len(kept)
        self._pieces.append(kept)
        return text

    def text(self) -> str:
        return "".join(self._pieces)


class AsyncCommand:
    """A command that was started, or attached to. Use `wait` to follow it to its end, and `close` if you do not.

    command_id: its id in the sandbox. pid: its process there.
    """

    def __init__(
        self,
        transport: Transport,
        path: str,
        websocket: ClientConnection,
        *,
        command_id: str,
        pid: int,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_bytes: OnBytes | None = None,
    ) -> None:
        self.command_id = command_id
        self.pid = pid
        self._process = os.getpid()
        self._transport = transport
        self._path = f"{path}/commands/{in_path(command_id, 'command')}"
        self._websocket = websocket
        self._on_stdout, self._on_stderr, self._on_bytes = on_stdout, on_stderr, on_bytes
        self._raw: RawOutput | None = None
        self._result: CommandResult | None = None
        self._waiting: asyncio.Task[CommandResult] | None = None

    async def wait(self, *, check: bool = False) -> CommandResult:
        """Follows the command to its end, calling back with its output.

        check: raise CommandFailedError unless it ended with status 0. Raises ConnectionLostError.
        """
        if self._result is None:
            self._check_process()
            if self._waiting is None:
                self._waiting = asyncio.create_task(self._follow())
            self._result = await asyncio.shield(self._waiting)
        if check and not self._result.ok:
            raise CommandFailedError(self._result)
        return self._result

    async def _follow(self) -> CommandResult:
        from websockets.exceptions import ConnectionClosed

        stdout, stderr, skipped = _Kept(), _Kept(), 0
        while True:
            try:
                message = await self._websocket.recv()
            except ConnectionClosed as error:
                if self._transport.is_released:
                    raise ClosedError(
                        f"The connection to command {self.command_id} was closed, which ends a foreground command."
                    ) from error
                raise ConnectionLostError(
                    f"The connection to command {self.command_id} broke. That ends a foreground command. A background "
                    "one goes on, and any does if it was the gateway that ended: `commands.attach` follows it."
                ) from error
            if isinstance(message, bytes):
                is_stdout = message[:1] == b"\x01"
                if self._raw is not None:
                    self._raw.write(message[1:], is_stdout=is_stdout)
                    continue
                await call_back(self._on_bytes, message[1:])
                text = (stdout if is_stdout else stderr).add(message[1:])
                await call_back(self._on_stdout if is_stdout else self._on_stderr, text)
                continue
            frame = json.loads(message)
            if frame["type"] == "skipped":
                skipped += int(frame["bytes"])
                if self._raw is not None:
                    self._raw.skip(int(frame["bytes"]))
            elif frame["type"] == "error":
                raise refusal_in(frame)
            elif frame["type"] == "exited":
                stdout.add(b"", final=True)
                stderr.add(b"", final=True)
                await self.close()
                return CommandResult(
                    exit_code=frame["exit_code"],
                    signal=frame["signal"],
                    timed_out=frame["timed_out"],
                    out_of_memory=frame["out_of_memory"],
                    stdout=stdout.text(),
                    stderr=stderr.text(),
                    skipped_bytes=skipped + stdout.dropped + stderr.dropped,
                )

    async def write(self, data: str | bytes) -> None:
        """Writes to the command's input; waits while it reads none. The command needs `stdin=True` or a terminal."""
        raw = data.encode() if isinstance(data, str) else data
        for start in range(0, len(raw), INPUT_PIECE_BYTES):
            await self._send(raw[start : start + INPUT_PIECE_BYTES])

    async def end_input(self) -> None:
        """No more input comes."""
        await self._send(json.dumps({"type": "stdin_end"}))

    async def resize(self, size: TerminalSize) -> None:
        """Tells the command's terminal its new size."""
        await self._send(json.dumps({"type": "resize", "rows": size.rows, "columns": size.columns}))

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ClosedError(
                f"Command {self.command_id} is followed by the process from which this one was forked; "
                "`commands.attach` follows it here."
            )

    async def _send(self, message: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        self._check_process()
        try:
            await self._websocket.send(message)
        except ConnectionClosed as error:
            raise ConnectionLostError(f"Command {self.command_id} has ended, or the connection to it.") from error

    async def signal(self, name: str) -> None:
        """Sends a signal, such as "SIGINT"."""
        await self._transport.call("POST", f"{self._path}/signal", body={"signal": name})

    async def kill(self) -> None:
        """Ends the command and all that it started, at once. One that has ended already is fine."""
        with suppress(NotFoundError):
            await self._transport.call("DELETE", self._path)

    async def close(self) -> None:
        """Ends the connection. A foreground command is ended by this; a background one goes on. Twice is harmless."""
        if self._process != os.getpid():
            leave_to_parent(self._websocket)
            return
        await self._websocket.close()
        waiting = self._waiting
        if waiting is not None and waiting is not asyncio.current_task():
            # It may be in a callback that does not return.
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def __aenter__(self) -> AsyncCommand:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class AsyncCommands:
    """The commands of one sandbox, as `sandbox.commands`."""

    def __init__(self, transport: Transport, sandbox_id: str) -> None:
        self._transport = transport
        self._path = f"/api/sandboxes/{in_path(sandbox_id, 'sandbox')}"

    def _path_of(self, command_id: str) -> str:
        return f"{self._path}/commands/{in_path(command_id, 'command')}"

    @takes_timeout
    async def run(
        self,
        command: str | Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: User = "user",
        stdin: str | bytes | None = None,
        timeout_s: float | None = None,
        timeout: float | None = None,
        check: bool = False,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
    ) -> CommandResult:
        """Runs a command to its end.

        command: a command line for the sandbox's shell, or a program with its arguments. What it starts with `&` goes
        on when it ends. cwd: where, from the user's home. user: "root" for what that may. stdin: all of its input.
        timeout_s: it is ended after so long, and the result says `timed_out`. check: raise CommandFailedError unless it
        ends with status 0. on_stdout, on_stderr: get the output as it comes. Cancelled, it ends the command.
        """
        running = await self.start(
            command,
            cwd=cwd,
            env=env,
            user=user,
            stdin=stdin is not None,
            timeout_s=timeout_s,
            background=False,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
        )
        feeding = None if stdin is None else asyncio.create_task(_feed(running, stdin))
        try:
            return await running.wait(check=check)
        finally:
            await running.close()
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    @takes_timeout
    async def start(
        self,
        command: str | Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: User = "user",
        stdin: bool = False,
        terminal: TerminalSize | None = None,
        background: bool = True,
        timeout_s: float | None = None,
        timeout: float | None = None,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_bytes: OnBytes | None = None,
    ) -> AsyncCommand:
        """Starts a command and returns at once.

        background: it goes on when this connection ends; else it ends with it. stdin: whether it may be written to.
        terminal: give it a terminal of this size (its input is open then, its output all stdout). on_bytes: gets stdout
        and stderr undecoded. Output is taken, and callbacks called, while someone awaits `wait`.
        """
        websocket = await self._transport.connect(f"{self._path}/exec")
        start: dict[str, Any] = {
            "type": "start",
            "command": command if isinstance(command, str) else list(command),
            "cwd": cwd,
            "env": dict(env or {}),
            "user": user,
            "stdin": stdin,
            "background": background,
            "timeout_s": timeout_s,
        }
        if terminal is not None:
            start["tty"] = {"rows": terminal.rows, "columns": terminal.columns}
        return await self._started(
            websocket, json.dumps(start), on_stdout=on_stdout, on_stderr=on_stderr, on_bytes=on_bytes
        )

    async def shell(
        self, *, cwd: str | None = None, env: Mapping[str, str] | None = None, user: User = "user"
    ) -> AsyncShell:
        """A shell whose directory, variables and functions stay from one of its commands to the next."""
        return await AsyncShell(self, user=user)._begin(cwd=cwd, env=env)

    async def attach(
        self,
        command_id: str,
        *,
        stdin: bool = False,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_bytes: OnBytes | None = None,
    ) -> AsyncCommand:
        """Follows a command that runs: first the output that is kept (the newest 512 KiB), then what comes."""
        websocket = await self._transport.connect(f"{self._path_of(command_id)}/attach", query={"stdin": stdin})
        return await self._started(websocket, None, on_stdout=on_stdout, on_stderr=on_stderr, on_bytes=on_bytes)

    async def _started(
        self,
        websocket: ClientConnection,
        start: str | None,
        *,
        on_stdout: OnText | None,
        on_stderr: OnText | None,
        on_bytes: OnBytes | None,
    ) -> AsyncCommand:
        from websockets.exceptions import ConnectionClosed

        try:
            if start is not None:
                await websocket.send(start)
            frame = json.loads(await websocket.recv())
            if frame["type"] != "started":
                raise refusal_in(frame)
        except ConnectionClosed as error:
            raise ConnectionLostError("The connection broke while the command was started; it may run.") from error
        except BaseException:
            await websocket.close()
            raise
        return AsyncCommand(
            self._transport,
            self._path,
            websocket,
            command_id=str(frame["command_id"]),
            pid=int(frame["pid"]),
            on_stdout=on_stdout,
            on_stderr=on_stderr,
            on_bytes=on_bytes,
        )

    async def list(self) -> list[CommandInfo]:
        """What runs, and background commands that have ended."""
        return [CommandInfo.parse(value) for value in await self._transport.call("GET", f"{self._path}/commands")]

    async def get(self, command_id: str) -> CommandInfo:
        """One command. Raises NotFoundError."""
        return CommandInfo.parse(await self._transport.call("GET", self._path_of(command_id)))

    async def kill(self, command_id: str) -> CommandInfo:
        """Ends a command and all that it started, and forgets it. Raises NotFoundError."""
        answer = await self._transport.call("DELETE", self._path_of(command_id))
        if answer is None:
            # It was asked for twice, because the connection broke: the first one did it, and its answer is lost.
            raise NotFoundError(
                f"Command {command_id} is gone, but how it ended was lost with the connection.",
                status=404,
                code="unknown_command",
            )
        return CommandInfo.parse(answer)

    async def signal(self, command_id: str, name: str) -> None:
        """Sends a command a signal, such as "SIGINT". Raises NotFoundError."""
        await self._transport.call("POST", f"{self._path_of(command_id)}/signal", body={"signal": name})


async def wait_raw(command: AsyncCommand, output: RawOutput) -> CommandResult:
    """As `command.wait`, for the command `hypercell`, which passes output on: `output` gets all of it, and the result
    and the callbacks none."""
    command._raw = output
    return await command.wait()


async def _feed(command: AsyncCommand, data: str | bytes) -> None:
    # A command that ends without reading its input is no failure of this.
    with suppress(HypercellError):
        await command.write(data)
        await command.end_input()
