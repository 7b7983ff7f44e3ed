"""Serves the host's streams about commands (docs/exec_and_files.md): start, attach, list, signal, resize, kill."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from vm_runtime.guest.commands import Command, Commands
from vm_runtime.guest.output import Cursor
from vm_runtime.guest.params import environment, param, path_text, whole_number
from vm_runtime.guest.process import CommandSpec
from vm_runtime.wire.command_frames import (
    MAX_FRAME_BYTES,
    MAX_REQUEST_BYTES,
    REQUEST_HEADER,
    CommandFrame,
    encode_frame,
    encode_json_frame,
)
from vm_runtime.wire.errors import LinkClosedError, OpenRejectedError, StreamResetError
from vm_runtime.wire.stream import Incoming, Stream

# A terminal larger than this is a mistake; Linux takes 16 bits.
TERMINAL_MAX = 10_000

# A year: longer than any machine lives, and still a number that clocks can add.
TIMEOUT_MAX_S = 366 * 86_400.0

Serve = Callable[[Commands, Incoming], Awaitable[None]]


async def _start_as_root(commands: Commands, incoming: Incoming) -> None:
    await _start(commands, incoming, as_root=True)


async def _start(commands: Commands, incoming: Incoming, *, as_root: bool = False) -> None:
    stream = await incoming.accept()
    command = await commands.start(await _read_spec(stream), as_root=as_root)
    cursor = Cursor()
    if not command.background:
        command.owner = cursor
    started = {"command_id": command.id, "pid": command.pid}
    try:
        await stream.write(encode_json_frame(CommandFrame.STARTED, started))
        await _follow(command, stream, cursor, stdin=command.spec.stdin or command.spec.size is not None)
    except StreamResetError:
        if not command.background:
            command.end_soon()
            await command.wait_ended()
        raise
    except (LinkClosedError, asyncio.CancelledError):
        # The session is over: the gateway ended, or this is a machine that was restored (a fork, one that slept). The
        # command is part of the machine's state, and nobody gave it up: it runs on, to be attached to or killed.
        command.background = True
        raise
    finally:
        command.owner = None
        command.resume()
        if not command.background and command.exit is not None:
            commands.forget(command)


async def _attach(commands: Commands, incoming: Incoming) -> None:
    command = _command(commands, incoming)
    stream = await incoming.accept(command.describe())
    await _follow(command, stream, Cursor(), stdin=param(incoming.params, "stdin", bool, False))


async def _list(commands: Commands, incoming: Incoming) -> None:
    stream = await incoming.accept()
    await stream.write(json.dumps([command.describe() for command in commands.all()]).encode())


async def _signal(commands: Commands, incoming: Incoming) -> None:
    await _command(commands, incoming).signal(whole_number(incoming.params, "signal", 1, 64))
    await incoming.answer()


async def _resize(commands: Commands, incoming: Incoming) -> None:
    rows, columns = _size(incoming.params)
    _command(commands, incoming).resize(rows=rows, columns=columns)
    await incoming.answer()


async def _kill(commands: Commands, incoming: Incoming) -> None:
    command = _command(commands, incoming)
    await command.kill()
    commands.forget(command)
    await incoming.answer(command.describe())


HANDLERS: dict[str, Serve] = {
    "exec.start": _start,
    "root.exec.start": _start_as_root,
    "exec.attach": _attach,
    "exec.list": _list,
    "exec.signal": _signal,
    "exec.resize": _resize,
    "exec.kill": _kill,
}


async def _follow(command: Command, stream: Stream, cursor: Cursor, *, stdin: bool) -> None:
    """Send all output and the end, and pass standard input on. Raises what ended the stream, as soon as it did."""
    tasks = [asyncio.create_task(_send_output(command, stream, cursor)), asyncio.create_task(_wait_lost(stream))]
    feeding = asyncio.create_task(_feed(command, stream)) if stdin else None
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (*tasks, *([feeding] if feeding else [])):
            task.cancel()
        await asyncio.gather(*tasks, *([feeding] if feeding else []), return_exceptions=True)


async def _send_output(command: Command, stream: Stream, cursor: Cursor) -> None:
    end: int | None = None  # what it left running may print for ever
    with command.watching() as changed:
        while end is None:
            changed.clear()
            if command.exit is not None:
                end = command.log.total_bytes
            while (end is None or cursor.position < end) and (output := command.log.read(cursor)):
                if output.skipped_bytes:
                    await stream.write(encode_json_frame(CommandFrame.SKIPPED, {"bytes": output.skipped_bytes}))
                kind, data = CommandFrame(output.kind), memoryview(output.data)
                for begin in range(0, len(data), MAX_FRAME_BYTES):
                    await stream.write(encode_frame(kind, bytes(data[begin : begin + MAX_FRAME_BYTES])))
                command.resume()
                if command.exit is not None and end is None:
                    end = command.log.total_bytes
            if end is None:
                await changed.wait()
    how = command.exit
    assert how is not None
    await stream.write(encode_json_frame(CommandFrame.EXITED, asdict(how)))
    stream.end()


async def _wait_lost(stream: Stream) -> None:
    raise await stream.wait_lost()


async def _feed(command: Command, stream: Stream) -> None:
    """Standard input, to its end. What a command takes no more is dropped, so that the host does not wait for it."""
    while data := await stream.read():
        await command.write(data)
    command.close_stdin()


async def _read_spec(stream: Stream) -> CommandSpec:
    (size,) = REQUEST_HEADER.unpack(await _read_exactly(stream, REQUEST_HEADER.size))
    if size > MAX_REQUEST_BYTES:
        raise OpenRejectedError("too_large", f"Command and environment have at most {MAX_REQUEST_BYTES} bytes.")
    try:
        value = json.loads(await _read_exactly(stream, size))
    except ValueError as error:
        raise OpenRejectedError("bad_params", "The command is no JSON.") from error
    if not isinstance(value, dict):
        raise OpenRejectedError("bad_params", "The command is no JSON object.")
    return _spec(value)


def _spec(value: dict[str, Any]) -> CommandSpec:
    command = param(value, "command", (str, list))
    parts = [command] if isinstance(command, str) else command
    if not parts or not parts[0] or not all(isinstance(part, str) and "\0" not in part for part in parts):
        raise OpenRejectedError("bad_params", "command is a command line, or a list of a program and its arguments.")
    timeout_s = param(value, "timeout_s", (int, float), None)
    if timeout_s is not None and not 0 < timeout_s <= TIMEOUT_MAX_S:
        raise OpenRejectedError("bad_params", f"timeout_s must be above 0, and at most {TIMEOUT_MAX_S:.0f}.")
    terminal = param(value, "tty", dict, None)
    return CommandSpec(
        command=command if isinstance(command, str) else tuple(command),
        cwd=path_text(value, "cwd") if value.get("cwd") is not None else None,
        env=environment(value),
        size=_size(terminal) if terminal is not None else None,
        stdin=param(value, "stdin", bool, False),
        background=param(value, "background", bool, False),
        timeout_s=timeout_s,
    )


def _size(params: Any) -> tuple[int, int]:
    return whole_number(params, "rows", 1, TERMINAL_MAX), whole_number(params, "columns", 1, TERMINAL_MAX)


def _command(commands: Commands, incoming: Incoming) -> Command:
    return commands.get(param(incoming.params, "command_id", str))


async def _read_exactly(stream: Stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.read(count - len(data))
        if not more:
            raise OpenRejectedError("bad_params", "The stream ended before the command was complete.")
        data += more
    return data
