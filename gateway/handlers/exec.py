"""Commands in a sandbox over plain HTTP: run one to its end, start one in the background, list, signal, kill."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gateway.command_models import (
    BackgroundRequest,
    CommandAnswer,
    ExecAnswer,
    ExecRequest,
    SignalRequest,
)
from gateway.endpoint import Call, Endpoint, Operation, Reply
from gateway.handlers.sandboxes import SANDBOX_ID
from kernels.errors import KernelsError
from kernels.exec import AttachedCommand, CommandExited, CommandOutput

COMMAND_ID = {**SANDBOX_ID, "command_id": "The command's id."}
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


async def run_command(call: Call) -> Reply:
    """Cancelled (the client has gone), the command is ended."""
    request: ExecRequest = call.body
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    kept = {name: _Kept(request.max_output_bytes) for name in ("stdout", "stderr")}
    in_use = call.gateway.in_use(call.path["sandbox_id"])
    async with in_use, await commands.start(request.to_command()) as command:
        feeding = None if request.stdin is None else asyncio.create_task(_feed(command, request.stdin.encode()))
        try:
            while not isinstance(event := await command.next(), CommandExited):
                if isinstance(event, CommandOutput):
                    kept[event.source].add(event.data)
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
    call.gateway.service.touch(call.path["sandbox_id"])
    answer = ExecAnswer(
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
    return Reply(body=answer)


async def _feed(command: AttachedCommand, data: bytes) -> None:
    try:
        await command.write(data)
        command.end_input()
    except KernelsError:
        return  # the command ended without reading it; `next` tells how


async def list_commands(call: Call) -> Reply:
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    return Reply(body=[CommandAnswer.of(info) for info in await commands.list()])


async def start_command(call: Call) -> Reply:
    request: BackgroundRequest = call.body
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    async with await commands.start(request.to_command()) as command:
        info = await commands.get(command.command_id)
    location = f"/api/sandboxes/{call.path['sandbox_id']}/commands/{info.command_id}"
    return Reply(status=201, body=CommandAnswer.of(info), headers={"Location": location})


async def get_command(call: Call) -> Reply:
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    return Reply(body=CommandAnswer.of(await commands.get(call.path["command_id"])))


async def kill_command(call: Call) -> Reply:
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    return Reply(body=CommandAnswer.of(await commands.kill(call.path["command_id"])))


async def signal_command(call: Call) -> Reply:
    request: SignalRequest = call.body
    commands = await call.gateway.service.commands(call.path["sandbox_id"])
    await commands.signal(call.path["command_id"], request.number)
    return Reply(status=204)


ENDPOINTS = (
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/exec",
        parameters=SANDBOX_ID,
        operations={
            "POST": Operation(
                name="runCommand",
                summary="Runs a command to its end. It is ended when the client goes. "
                "The same path as a WebSocket streams its output and takes input (docs/exec_and_files.md).",
                run=run_command,
                body=ExecRequest,
                reply=ExecAnswer,
                errors=COMMAND_ERRORS,
                ends_with_client=True,
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/commands",
        parameters=SANDBOX_ID,
        operations={
            "GET": Operation(
                name="listCommands",
                summary="Commands that run, and the last background ones that have ended.",
                run=list_commands,
                reply=list[CommandAnswer],
                errors=COMMAND_ERRORS,
            ),
            "POST": Operation(
                name="startCommand",
                summary="Starts a command in the background. The WebSocket `attach` below it follows its output.",
                run=start_command,
                body=BackgroundRequest,
                reply=CommandAnswer,
                status=201,
                errors=COMMAND_ERRORS,
                headers={"Location": "The command's path."},
            ),
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/commands/{command_id}",
        parameters=COMMAND_ID,
        operations={
            "GET": Operation(
                name="getCommand", summary="One command.", run=get_command, reply=CommandAnswer, errors=COMMAND_ERRORS
            ),
            "DELETE": Operation(
                name="killCommand",
                summary="Kills a command and all in its session, answers how it ended, and forgets it.",
                run=kill_command,
                reply=CommandAnswer,
                errors=COMMAND_ERRORS,
            ),
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/commands/{command_id}/signal",
        parameters=COMMAND_ID,
        operations={
            "POST": Operation(
                name="signalCommand",
                summary="Sends a command a signal.",
                run=signal_command,
                body=SignalRequest,
                status=204,
                errors=COMMAND_ERRORS,
            )
        },
    ),
)
