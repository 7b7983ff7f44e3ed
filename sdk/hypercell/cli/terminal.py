"""`hypercell exec`: a command in a sandbox, with pipes or with a terminal that behaves like one's own."""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext

from hypercell.aio.commands import AsyncCommand, wait_raw
from hypercell.cli.output import print_json
from hypercell.cli.sandboxes import connect
from hypercell.errors import HypercellError
from hypercell.values import CommandResult, TerminalSize

READ_BYTES = 64 * 1024
EXIT_TIMED_OUT = 124
# As shells say it: the status of a command that a signal ended.
EXIT_OF_SIGNAL = 128


async def run_command(options: argparse.Namespace) -> int:
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not arguments:
        raise HypercellError("Say what to run: hypercell exec SANDBOX COMMAND ...")
    command = arguments[0] if len(arguments) == 1 else arguments
    async with await connect(options, options.sandbox) as sandbox:
        if options.detach:
            background = await sandbox.commands.start(
                command, cwd=options.cwd, user=options.user, env=dict(options.env), timeout_s=options.timeout
            )
            await background.close()
            print_json(await sandbox.commands.get(background.command_id)) if options.json else print(
                background.command_id
            )
            return 0
        if options.tty and options.json:
            raise HypercellError("-t shows a terminal, and --json prints the output as JSON: use one of them.")
        if options.tty and not sys.stdin.isatty():
            raise HypercellError("-t needs a terminal, and standard input is none; use -i to pass it on.")
        running = await sandbox.commands.start(
            command,
            cwd=options.cwd,
            user=options.user,
            env={"TERM": os.environ.get("TERM", "xterm"), **dict(options.env)} if options.tty else dict(options.env),
            stdin=options.interactive or options.tty,
            terminal=_terminal_size() if options.tty else None,
            background=False,
            timeout_s=options.timeout,
        )
        async with running, _input(running, options):
            if options.json:
                result = await running.wait()
                print_json(result)
            else:
                result = await wait_raw(running, _Passed(is_terminal=options.tty))
            return exit_code(result)


def exit_code(result: CommandResult) -> int:
    """What the command `exec` ends with."""
    if result.timed_out:
        return EXIT_TIMED_OUT
    if result.exit_code is not None:
        return result.exit_code
    number = getattr(signal, result.signal or "", signal.SIGKILL)
    return EXIT_OF_SIGNAL + int(number)


class _Passed:
    """The command's output on this one's, byte for byte: it may be a picture that goes into a file."""

    def __init__(self, *, is_terminal: bool) -> None:
        self._is_terminal = is_terminal

    def write(self, data: bytes, *, is_stdout: bool) -> None:
        if self._is_terminal:
            _write(data)
            return
        buffer = sys.stdout.buffer if is_stdout else sys.stderr.buffer
        buffer.write(data)
        buffer.flush()

    def skip(self, count: int) -> None:
        print(f"hypercell: {count} bytes of output are kept no more", file=sys.stderr)


def _write(data: bytes) -> None:
    # A terminal that is not read any more, or is full for a moment, must not end the session.
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(sys.stdout.fileno(), view) :]
        except BlockingIOError:
            continue


def _terminal_size() -> TerminalSize:
    size = os.get_terminal_size(sys.stdin.fileno())
    return TerminalSize(rows=max(size.lines, 1), columns=max(size.columns, 1))


@asynccontextmanager
async def _input(running: AsyncCommand, options: argparse.Namespace) -> AsyncIterator[None]:
    """Passes on standard input, and in a terminal every key and every change of its size."""
    if not (options.interactive or options.tty):
        yield
        return
    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(_pass_on(running, is_terminal=options.tty))]
    resized: asyncio.Event = asyncio.Event()
    if options.tty:
        loop.add_signal_handler(signal.SIGWINCH, resized.set)
        tasks.append(asyncio.create_task(_resize(running, resized)))
    try:
        with _raw_terminal() if options.tty else nullcontext():
            yield
    finally:
        if options.tty:
            loop.remove_signal_handler(signal.SIGWINCH)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _resize(running: AsyncCommand, resized: asyncio.Event) -> None:
    while True:
        await resized.wait()
        resized.clear()
        await running.resize(_terminal_size())


async def _pass_on(running: AsyncCommand, *, is_terminal: bool) -> None:
    """Reads standard input in steps of the event loop where it can be polled, else (a file) in a thread."""
    descriptor = sys.stdin.fileno()
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        loop.add_reader(descriptor, readable.set)
        is_polled = True
    except PermissionError:
        is_polled = False
    try:
        while True:
            if is_polled:
                await readable.wait()
                readable.clear()
                # It may have been set once more for what was read since; a read that blocks would never end.
                if not select.select([descriptor], [], [], 0)[0]:
                    continue
                data = os.read(descriptor, READ_BYTES)
            else:
                data = await asyncio.to_thread(os.read, descriptor, READ_BYTES)
            if not data:
                break
            await running.write(data)
        if not is_terminal:
            await running.end_input()
    finally:
        if is_polled:
            loop.remove_reader(descriptor)


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the other side, Ctrl-C too; the terminal is put back at the end."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
