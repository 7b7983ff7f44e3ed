"""Commands in a sandbox over plain HTTP: run one to its end, start one in the background, list, signal, kill."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gateway.command_models import BackgroundRequest, CommandAnswer, ExecAnswer, ExecRequest, SignalRequest
from gateway.endpoint import Call, Routes
from kernels.errors import KernelsError
from kernels.exec import AttachedCommand, CommandExited, CommandOutput

routes = Routes()

# What the guest or its machine may answer (gateway/errors.py).
COMMAND_ERRORS = (400, 404, 409, 413, 429, 501, 502, 503, 504)


@dataclass
class _Kept:
    """The first `limit` bytes of an output."""

    limit: int
    data: bytearray = field(default_factory=bytearray)
    truncated: bool = False

    def add(self, data: bytes) -> None:
        room = self.limit - len(self.data)
        self.data += data[:room]
        self.truncated = self.truncated or len(data) > room

    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@routes("POST /api/sandboxes/{sandbox_id}/exec", errors=COMMAND_ERRORS, ends_with_client=True)
async def run_command(call: Call, body: ExecRequest) -> ExecAnswer:
    """Runs a command to its end. It is ended when the client goes. The same path as a WebSocket streams its output and
    takes input (docs/exec_and_files.md)."""
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    kept = {name: _Kept(body.max_output_bytes) for name in ("stdout", "stderr")}
    in_use = call.gateway.in_use(call.path["sandbox_id"])
    async with in_use, await commands.start(body.to_command()) as command:
        feeding = None if body.stdin is None else asyncio.create_task(_feed(command, body.stdin.encode()))
        try:
            while not isinstance(event := await command.next(), CommandExited):
                if isinstance(event, CommandOutput):
                    kept[event.source].add(event.data)
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
    call.gateway.service.registry.touch(call.path["sandbox_id"])
    return ExecAnswer(
        command_id=command.command_id,
        stdout=kept["stdout"].text(),
        stderr=kept["stderr"].text(),
        stdout_truncated=kept["stdout"].truncated,
        stderr_truncated=kept["stderr"].truncated,
        exit_code=event.exit_code,
        signal=event.signal,
        timed_out=event.timed_out,
        out_of_memory=event.out_of_memory,
    )


async def _feed(command: AttachedCommand, data: bytes) -> None:
    try:
        await command.write(data)
        command.end_input()
    except KernelsError:
        return  # the command ended without reading it; `next` reports how


@routes("GET /api/sandboxes/{sandbox_id}/commands", errors=COMMAND_ERRORS)
async def list_commands(call: Call) -> list[CommandAnswer]:
    """Commands that run, and the last background ones that have ended."""
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    return [CommandAnswer.of(info) for info in await commands.list()]


@routes(
    "POST /api/sandboxes/{sandbox_id}/commands",
    status=201,
    errors=COMMAND_ERRORS,
    headers={"Location": "The command's path."},
)
async def start_command(call: Call, body: BackgroundRequest) -> CommandAnswer:
    """Starts a command in the background. The WebSocket `attach` below it follows its output."""
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    async with await commands.start(body.to_command()) as command:
        info = await commands.get(command.command_id)
    call.headers["Location"] = f"/api/sandboxes/{call.path['sandbox_id']}/commands/{info.command_id}"
    return CommandAnswer.of(info)


@routes("GET /api/sandboxes/{sandbox_id}/commands/{command_id}", errors=COMMAND_ERRORS)
async def get_command(call: Call) -> CommandAnswer:
    """One command."""
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    return CommandAnswer.of(await commands.get(call.path["command_id"]))


@routes("DELETE /api/sandboxes/{sandbox_id}/commands/{command_id}", errors=COMMAND_ERRORS)
async def kill_command(call: Call) -> CommandAnswer:
    """Kills a command and all in its session, answers how it ended, and forgets it."""
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    return CommandAnswer.of(await commands.kill(call.path["command_id"]))


@routes("POST /api/sandboxes/{sandbox_id}/commands/{command_id}/signal", errors=COMMAND_ERRORS)
async def signal_command(call: Call, body: SignalRequest) -> None:
    """Sends a command a signal."""
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    await commands.signal(call.path["command_id"], body.number)
