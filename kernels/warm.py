"""A machine with a greeted guest and a kernel in it, not yet a sandbox: what the pool keeps and a sandbox takes.

Knows nothing of sandboxes or of HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from kernels.session import Greeting, GuestEvent, GuestSession
from kernels.templates import Template
from vm_runtime.drivers.base import Driver, MachinePlace, MachineState
from vm_runtime.machine import Machine
from vm_runtime.snapshots.memory import BaseCache
from vm_runtime.states import RunState


def new_place(state_dir: Path, run_dir: Path) -> MachinePlace:
    """A place that no machine has had: ids are random, since a sandbox has several machines in its life."""
    return place_of(secrets.token_hex(6), state_dir, run_dir)


def place_of(machine_id: str, state_dir: Path, run_dir: Path) -> MachinePlace:
    """Where the machine with this id has its files (docs/architecture.md)."""
    return MachinePlace(id=machine_id, run_dir=run_dir / "m" / machine_id, disk_dir=state_dir / "machines" / machine_id)


class WarmMachine:
    """A machine, the session with its guest, and its kernel's HMAC `key`.

    Its owner ends both with `close()`, or hands them on and forgets it. Events before someone took it are dropped;
    the taker sets `on_event`.
    """

    def __init__(self, machine: Machine, session: GuestSession, key: str) -> None:
        self.machine = machine
        self.session = session
        self.key = key

    @classmethod
    async def greet(cls, machine: Machine, greeting: Greeting) -> WarmMachine:
        """Opens a session. Owns the machine from the call on: it is killed if the guest does not answer."""
        try:
            session = await GuestSession.open(machine.wire_path, greeting)
        except BaseException:
            await machine.kill()
            raise
        return cls(machine, session, greeting.key or "")

    @classmethod
    async def restore(
        cls, driver: Driver, bases: BaseCache, template: Template, place: MachinePlace, *, identity: Mapping[str, str]
    ) -> WarmMachine:
        """A new machine from the template. Errors: VmRuntimeError, MachineFailedError; nothing is left behind then."""
        size_bytes = template.spec.shape.memory_mib << 20
        base = await asyncio.to_thread(
            bases.acquire, template.ram, digest=template.manifest.ram_digest, size_bytes=size_bytes
        )
        async with AsyncExitStack() as stack:
            stack.callback(base.close)
            state = MachineState(base=base, layers=(), device=template.device, disk_chain=(template.disk,))
            machine = await driver.restore(template.spec, state, place=place)
        greeting = Greeting(
            marker=template.manifest.marker, identity=identity, key=secrets.token_hex(32), restored=True
        )
        return await cls.greet(machine, greeting)

    @property
    def dead(self) -> bool:
        return self.machine.state is RunState.DEAD

    def take(self, on_event: Callable[[GuestEvent], None]) -> None:
        """From now on the guest's events go to `on_event`."""
        self.session.on_event = on_event

    async def close(self) -> None:
        """Ends session and machine; twice is harmless."""
        await self.session.close()
        await self.machine.kill()
