"""The WebSockets of commands: start one and follow it, or attach to one that runs. Frames: docs/exec_and_files.md."""

from __future__ import annotations

import asyncio

from pydantic import ValidationError

from gateway.command_models import (
    CONTROL_FRAME,
    AttachQuery,
    ResizeFrame,
    SignalFrame,
    StartFrame,
    StdinEndFrame,
    signal_name,
)
from gateway.endpoint import invalid_request
from gateway.errors import ApiError, api_error
from gateway.sandbox_socket import SandboxSocket
from gateway.state import Gateway
from kernels.errors import KernelsError
from kernels.exec import AttachedCommand, CommandExited, CommandOutput, OutputSkipped, SandboxCommands

# The first byte of a binary message.
SOURCES = {"stdout": b"\x01", "stderr": b"\x02"}
# A client that opens an exec WebSocket sends at once what to run.
START_TIMEOUT_S = 60.0


class _CommandSocket(SandboxSocket):
    """Follows a command; a subclass gets it."""

    def initialize(self, gateway: Gateway) -> None:
        super().initialize(gateway)
        self._command: asyncio.Future[AttachedCommand] = asyncio.get_running_loop().create_future()
        self._commands: SandboxCommands | None = None

    async def begin(self, **path: str) -> None:
        self._commands = await self.gateway.service.commands(self.sandbox_id)

    async def command(self) -> AttachedCommand:
        raise NotImplementedError

    async def serve(self) -> None:
        async with self.gateway.in_use(self.sandbox_id), await self.command() as command:
            await self.send({"type": "started", "command_id": command.command_id, "pid": command.pid})
            self._command.set_result(command)
            while True:
                match await command.next():
                    case CommandOutput(source=source, data=data):
                        await self.send(SOURCES[source] + data)
                    case OutputSkipped(skipped_bytes=count):
                        await self.send({"type": "skipped", "bytes": count})
                    case CommandExited() as end:
                        await self.send(
                            {
                                "type": "exited",
                                "exit_code": end.exit_code,
                                "signal": signal_name(end.signal),
                                "timed_out": end.timed_out,
                                "out_of_memory": end.out_of_memory,
                            }
                        )
                        return

    async def on_message(self, message: str | bytes) -> None:
        """Tornado reads the next message when this has returned: a command that takes no input holds its client."""
        self.received()
        try:
            await self._take(message)
        except ValidationError as error:
            await self._refuse(invalid_request(error))
        except KernelsError as error:
            answer = api_error(error)
            if answer.status < 500:
                await self.send({"type": "refused", "message": answer.message, "code": answer.code})

    async def _take(self, message: str | bytes) -> None:
        # Not before it runs; and not at all if it never does (`serve` sends the reason, and closes).
        command = await asyncio.shield(self._command)
        assert self._commands is not None
        self.gateway.service.registry.touch(self.sandbox_id)
        if isinstance(message, bytes):
            await command.write(message)
            return
        match CONTROL_FRAME.validate_json(message):
            case StdinEndFrame():
                command.end_input()
            case ResizeFrame(rows=rows, columns=columns):
                await self._commands.resize(command.command_id, rows=rows, columns=columns)
            case SignalFrame() as frame:
                await self._commands.signal(command.command_id, frame.number)

    async def _refuse(self, error: ApiError) -> None:
        if self._serving is not None:
            self._serving.cancel()
        await self._fail(error)

    def on_close(self) -> None:
        super().on_close()
        self._command.cancel()


class ExecSocket(_CommandSocket):
    """`/api/sandboxes/{id}/exec`: the first message has what to run."""

    def initialize(self, gateway: Gateway) -> None:
        super().initialize(gateway)
        self._start: asyncio.Future[str | bytes] = asyncio.get_running_loop().create_future()

    async def command(self) -> AttachedCommand:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                message = await self._start
        except TimeoutError as error:
            raise ApiError(408, "no_start", "The first message says what to run; none has come.") from error
        if isinstance(message, bytes):
            raise ApiError(400, "invalid_request", "The first message is JSON text that says what to run.")
        try:
            frame = StartFrame.model_validate_json(message)
        except ValidationError as error:
            raise invalid_request(error) from error
        assert self._commands is not None
        return await self._commands.start(frame.to_command())

    async def on_message(self, message: str | bytes) -> None:
        if not self._start.done():
            self._start.set_result(message)
            return
        await super().on_message(message)

    def on_close(self) -> None:
        super().on_close()
        self._start.cancel()


class AttachSocket(_CommandSocket):
    """`/api/sandboxes/{id}/commands/{command_id}/attach`: what output is kept, then what comes."""

    async def begin(self, **path: str) -> None:
        await super().begin(**path)
        self._query: AttachQuery = self.parse_query(AttachQuery)
        self._command_id = path["command_id"]
        assert self._commands is not None
        await self._commands.get(self._command_id)

    async def command(self) -> AttachedCommand:
        assert self._commands is not None
        return await self._commands.attach(self._command_id, stdin=self._query.stdin)
