"""A shell in a sandbox whose directory, variables and functions stay from one command to the next.

Each command is one of its own, with its output, time limit and end. What stays is in a file in the sandbox, which each
reads first and writes last: so it outlives the gateway, sleep and this program, and every child of a fork has its own.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from hypercell.aio.callbacks import OnText
from hypercell.errors import HypercellError
from hypercell.timeouts import takes_timeout
from hypercell.values import CommandResult, User

if TYPE_CHECKING:
    from hypercell.aio.commands import AsyncCommands

# Arguments: the file, and the command line. The first command has no file, and keeps the environment it is started in.
# Variables that bash sets itself are left out, as each shell has its own.
_SCRIPT = r"""
__hypercell_file=$1 __hypercell_line=$2
set --
if [ -e "$__hypercell_file" ]; then
    unset $(compgen -e) 2>/dev/null
    . "$__hypercell_file" 2>/dev/null
fi
__hypercell_keep() {
    ( umask 077
      own='BASH[A-Z_]*|DIRSTACK|EPOCH[A-Z]*|EUID|FUNCNAME|GROUPS|HISTCMD|LINENO|OPTERR|OPTIND|PIPESTATUS|PPID|RANDOM'
      own="$own|SECONDS|SHELLOPTS|SHLVL|SRANDOM|UID|__hypercell_[a-z]*|own|_"
      { declare -p | grep -vE "^declare -[-a-zA-Z]+ ($own)(=|\$)"; declare -f; printf 'cd %q\n' "$PWD"; } \
          > "$__hypercell_file.new" && mv -f "$__hypercell_file.new" "$__hypercell_file" )
}
trap __hypercell_keep EXIT
eval "$__hypercell_line"
"""


class AsyncShell:
    """Get one with `await sandbox.commands.shell()`. Commands run one after the other. `async with` closes it."""

    def __init__(self, commands: AsyncCommands, *, user: User) -> None:
        self._commands = commands
        self._user = user
        self._file = f"/tmp/.hypercell-shell-{secrets.token_hex(8)}"
        self._turn = asyncio.Lock()

    async def _begin(self, *, cwd: str | None, env: Mapping[str, str] | None) -> AsyncShell:
        await self._commands.run(self._command(":"), cwd=cwd, env=env, user=self._user, check=True)
        return self

    def _command(self, line: str) -> list[str]:
        return ["bash", "-c", _SCRIPT, "bash", self._file, line]

    @takes_timeout
    async def run(
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
        async with self._turn:
            return await self._commands.run(
                self._command(command),
                stdin=stdin,
                timeout_s=timeout_s,
                user=self._user,
                check=check,
                on_stdout=on_stdout,
                on_stderr=on_stderr,
            )

    async def close(self) -> None:
        """Forgets what stayed. Twice is harmless."""
        with suppress(HypercellError):
            await self._commands.run(["rm", "-f", self._file], user=self._user)

    async def __aenter__(self) -> AsyncShell:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
