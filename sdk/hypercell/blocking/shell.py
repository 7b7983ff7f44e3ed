"""A shell in a sandbox whose directory, variables and functions stay from one command to the next.

Made by sdk/make_blocking.py from aio/shell.py: change that.
"""

from __future__ import annotations

from hypercell.aio.shell import AsyncShell
from hypercell.blocking.portal import (
    BlockingCall,
    OnText,
    Wrapper,
    here,
    register,
)
from hypercell.timeouts import takes_timeout
from hypercell.values import CommandResult


class Shell(Wrapper):
    """Get one with `sandbox.commands.shell()`. Commands run one after the other. `with` closes it."""

    _async: AsyncShell

    @takes_timeout
    def run(
        self,
        command: str,
        *,
        stdin: str | bytes | None = None,
        timeout_s: float | None = None,
        timeout: float | None = None,
        check: bool = False,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
    ) -> CommandResult:
        """Runs a command line to its end, as `commands.run` does; what it changes of the shell stays."""
        return BlockingCall().run(
            self._async.run(
                command,
                stdin=stdin,
                timeout_s=timeout_s,
                check=check,
                on_stdout=here(on_stdout),
                on_stderr=here(on_stderr),
            )
        )

    def close(self) -> None:
        """Forgets what stayed. Twice is harmless."""
        BlockingCall().run(self._async.close())

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *exc_info: object) -> None:
        BlockingCall().run(self._async.__aexit__(*exc_info))


register(AsyncShell, Shell)
