"""Commands in a sandbox: run one, start one in the background, follow it, write to it, end it.

Made by sdk/make_blocking.py from aio/commands.py: change that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypercell.aio.commands import AsyncCommand, AsyncCommands
from hypercell.blocking.portal import (
    BlockingCall,
    OnBytes,
    OnText,
    Wrapper,
    here,
    register,
    wrap,
)
from hypercell.blocking.shell import Shell
from hypercell.timeouts import takes_timeout
from hypercell.values import CommandInfo, CommandResult, TerminalSize, User


class Command(Wrapper):
    """A command that was started, or attached to. Use `wait` to follow it to its end, and `close` if you do not.

    command_id: its id in the sandbox. pid: its process there.
    """

    _async: AsyncCommand

    @property
    def command_id(self) -> str:
        """Its id in the sandbox."""
        return self._async.command_id

    @property
    def pid(self) -> int:
        """Its process there."""
        return self._async.pid

    def wait(self, *, check: bool = False) -> CommandResult:
        """Follows the command to its end, calling back with its output.

        check: raise CommandFailedError unless it ended with status 0. Raises ConnectionLostError.
        """
        return BlockingCall().run(self._async.wait(check=check))

    def write(self, data: str | bytes) -> None:
        """Writes to the command's input; waits while it reads none. The command needs `stdin=True` or a terminal."""
        BlockingCall().run(self._async.write(data))

    def end_input(self) -> None:
        """No more input comes."""
        BlockingCall().run(self._async.end_input())

    def resize(self, size: TerminalSize) -> None:
        """Tells the command's terminal its new size."""
        BlockingCall().run(self._async.resize(size))

    def signal(self, name: str) -> None:
        """Sends a signal, such as "SIGINT"."""
        BlockingCall().run(self._async.signal(name))

    def kill(self) -> None:
        """Ends the command and all that it started, at once. One that has ended already is fine."""
        BlockingCall().run(self._async.kill())

    def close(self) -> None:
        """Ends the connection. A foreground command is ended by this; a background one goes on. Twice is harmless."""
        BlockingCall().run(self._async.close())

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exc_info: object) -> None:
        BlockingCall().run(self._async.__aexit__(*exc_info))


class Commands(Wrapper):
    """The commands of one sandbox, as `sandbox.commands`."""

    _async: AsyncCommands

    @takes_timeout
    def run(
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
        return BlockingCall().run(
            self._async.run(
                command,
                cwd=cwd,
                env=env,
                user=user,
                stdin=stdin,
                timeout_s=timeout_s,
                check=check,
                on_stdout=here(on_stdout),
                on_stderr=here(on_stderr),
            )
        )

    @takes_timeout
    def start(
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
    ) -> Command:
        """Starts a command and returns at once.

        background: it goes on when this connection ends; else it ends with it. stdin: whether it may be written to.
        terminal: give it a terminal of this size (its input is open then, its output all stdout). on_bytes: gets stdout
        and stderr undecoded. Output is taken, and callbacks called, while someone calls `wait`.
        """
        result: Command = wrap(
            BlockingCall().run(
                self._async.start(
                    command,
                    cwd=cwd,
                    env=env,
                    user=user,
                    stdin=stdin,
                    terminal=terminal,
                    background=background,
                    timeout_s=timeout_s,
                    on_stdout=here(on_stdout),
                    on_stderr=here(on_stderr),
                    on_bytes=here(on_bytes),
                )
            )
        )
        return result

    def shell(self, *, cwd: str | None = None, env: Mapping[str, str] | None = None, user: User = "user") -> Shell:
        """A shell whose directory, variables and functions stay from one of its commands to the next."""
        result: Shell = wrap(BlockingCall().run(self._async.shell(cwd=cwd, env=env, user=user)))
        return result

    def attach(
        self,
        command_id: str,
        *,
        stdin: bool = False,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_bytes: OnBytes | None = None,
    ) -> Command:
        """Follows a command that runs: first the output that is kept (the newest 512 KiB), then what comes."""
        result: Command = wrap(
            BlockingCall().run(
                self._async.attach(
                    command_id,
                    stdin=stdin,
                    on_stdout=here(on_stdout),
                    on_stderr=here(on_stderr),
                    on_bytes=here(on_bytes),
                )
            )
        )
        return result

    def list(self) -> list[CommandInfo]:
        """What runs, and background commands that have ended."""
        return BlockingCall().run(self._async.list())

    def get(self, command_id: str) -> CommandInfo:
        """One command. Raises NotFoundError."""
        return BlockingCall().run(self._async.get(command_id))

    def kill(self, command_id: str) -> CommandInfo:
        """Ends a command and all that it started, and forgets it. Raises NotFoundError."""
        return BlockingCall().run(self._async.kill(command_id))

    def signal(self, command_id: str, name: str) -> None:
        """Sends a command a signal, such as "SIGINT". Raises NotFoundError."""
        BlockingCall().run(self._async.signal(command_id, name))


register(AsyncCommand, Command)

register(AsyncCommands, Commands)
