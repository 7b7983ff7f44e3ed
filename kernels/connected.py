"""A machine with a greeted guest and a kernel in it, not yet a sandbox: what the pool keeps and a sandbox takes.

Knows nothing of sandboxes or of HTTP.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from pathlib import Path

from kernels.channel_socket import KernelEnd
from kernels.session import GREETING_TIMEOUT_S, Greeting, GuestSession
from vm_runtime.drivers.base import MachinePaths
from vm_runtime.saving.machine import SavedMachine


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

    identity: what was sent to its guest as such. greeted: connections for its kernel's first client. Its owner ends it
    with `close()`, or hands it on and forgets it. Events before someone took it are dropped.
    """

    def __init__(self, saved: SavedMachine, session: GuestSession, key: str, identity: Mapping[str, str]) -> None:
        self.saved = saved
        self.session = session
        self.key = key
        self.identity = identity
        self.greeted: Mapping[str, KernelEnd] = {}

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

    async def close(self) -> None:
        """Ends session and machine; twice is harmless."""
        await self.session.close()
        await self.saved.kill()
