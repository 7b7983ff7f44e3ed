"""A machine with a greeted guest and a kernel in it, not yet a sandbox: what the pool keeps and a sandbox takes.

Knows nothing of sandboxes or of HTTP.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from kernels.endpoints import Greeted
from kernels.session import GREETING_TIMEOUT_S, Greeting, GuestSession
from vm_runtime.drivers.base import MachinePaths
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.threads import uncancelled


def new_sandbox_id() -> str:
    """An id that no sandbox has had: a UUID, since it is the Jupyter kernel's id."""
    return str(uuid.uuid4())


def new_paths(state_dir: Path, run_dir: Path) -> MachinePaths:
    """A place that no machine has had: ids are random, since a sandbox has several machines in its life."""
    return paths_of(secrets.token_hex(6), state_dir, run_dir)


def paths_of(machine_id: str, state_dir: Path, run_dir: Path) -> MachinePaths:
    """Where the machine with this id has its files (docs/architecture.md)."""
    return MachinePaths(id=machine_id, run_dir=run_dir / "m" / machine_id, disk_dir=state_dir / "machines" / machine_id)


class ConnectedMachine:
    """A machine, what lies under it, the session with its guest, and its kernel's HMAC `key`.

    identity: what was sent to its guest as such. greeted: connections for its kernel's first client. Events before
    someone took it are dropped. Its owner ends it with `close()`, or hands it on and forgets it: `async with` ends it
    at the end of the block, unless a sandbox has `taken` machine and session by then.
    """

    def __init__(self, saved: SavedMachine, session: GuestSession, key: str, identity: Mapping[str, str]) -> None:
        self.saved = saved
        self.session = session
        self.key = key
        self.identity = identity
        self.greeted: Mapping[str, Greeted] = {}
        self._is_taken = False

    @classmethod
    async def greet(
        cls, saved: SavedMachine, greeting: Greeting, *, timeout_s: float = GREETING_TIMEOUT_S
    ) -> ConnectedMachine:
        """Opens a session. Owns the machine from the call on: it is killed if the guest does not answer."""
        try:
            session = await GuestSession.open(saved.machine.open_wire, greeting, timeout_s=timeout_s)
        except BaseException:
            await saved.kill()
            raise
        return cls(saved, session, greeting.key or "", greeting.identity)

    @property
    def dead(self) -> bool:
        return self.saved.machine.is_dead

    def taken(self) -> None:
        """Machine and session are someone else's from now on."""
        self._is_taken = True

    async def close(self) -> None:
        """Ends session and machine, unless they were taken; finished first when cancelled. Twice is harmless."""
        if not self._is_taken:
            await uncancelled(self._close())

    async def _close(self) -> None:
        try:
            await self.session.close()
        finally:
            await self.saved.kill()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
