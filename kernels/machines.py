"""The machines of sandboxes and their clients: bringing one up, taking it down, and the lock of each sandbox.

Knows nothing of HTTP, of snapshots in the store, and of why an operation happens: lifecycle.py, checkpoints.py,
forks.py do.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from kernels.channels import KernelClients
from kernels.connected import ConnectedMachine
from kernels.endpoints import Endpoints
from kernels.errors import MachineFailedError, SandboxStateError
from kernels.launcher import Launcher
from kernels.live import LiveSandbox, SandboxObserver
from kernels.models import Sandbox, SandboxState
from kernels.registry import Registry
from kernels.session import Greeting
from kernels.settings import ServiceSettings
from vm_runtime.machine import Machine
from vm_runtime.saving.threads import gather_all, uncancelled
from vm_runtime.snapshots.manifest import Manifest

log = logging.getLogger(__name__)


def identity_of(sandbox: Sandbox) -> dict[str, str]:
    """The identity that is sent to the guest. The host name is the id's first group: short enough for a shell
    prompt."""
    identity = {"sandbox_id": sandbox.id, "hostname": f"sandbox-{sandbox.id.partition('-')[0]}"}
    if sandbox.parent_id is not None:
        identity |= {"parent_id": sandbox.parent_id, "index": str(sandbox.index)}
    return identity if sandbox.name is None else {**identity, "name": sandbox.name}


@dataclass(eq=False)
class Machines:
    """Of one service. `live`: the sandboxes that have one. `lock(id)` serialises what changes a sandbox.

    observer: acts on what happens to machines and on what clients send where there is none. is_stopping: set when the
    gateway begins to stop; clients are then given that as the reason.
    """

    _settings: ServiceSettings
    _registry: Registry
    _launcher: Launcher
    _observer: SandboxObserver
    live: dict[str, LiveSandbox] = field(default_factory=dict, init=False)
    is_stopping: bool = field(default=False, init=False)
    _clients: dict[str, KernelClients] = field(default_factory=dict, init=False)
    _endpoints: dict[str, Endpoints] = field(default_factory=dict, init=False)
    _supervisors: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary, init=False)

    @asynccontextmanager
    async def lock(self, sandbox_id: str) -> AsyncIterator[None]:
        """For any id, known or not. Within it no snapshot of the sandbox is being stored, either."""
        async with self.cell_lock(sandbox_id):
            if (live := self.live.get(sandbox_id)) is not None:
                await live.saved.stored()
            yield

    def cell_lock(self, sandbox_id: str) -> asyncio.Lock:
        """The same for a checkpoint after a cell, which may be captured while the one before is being stored. It exists
        for as long as someone holds it or waits for it."""
        return self._locks.setdefault(sandbox_id, asyncio.Lock())

    def running(self, sandbox_id: str) -> LiveSandbox:
        """The machine of a sandbox that has one. Errors: UnknownSandboxError, MachineFailedError, SandboxStateError."""
        sandbox = self._registry.get(sandbox_id)
        live = self.live.get(sandbox_id)
        if live is not None:
            return live
        if sandbox.state is SandboxState.FAILED:
            raise MachineFailedError(f"Sandbox {sandbox_id} has failed: {sandbox.reason}")
        raise SandboxStateError(sandbox_id, found=sandbox.state, wanted=SandboxState.RUNNING)

    # Clients

    def clients(self, sandbox_id: str) -> KernelClients:
        """The clients of the sandbox's kernel, until `drop_clients`. Errors: UnknownSandboxError."""
        self._registry.get(sandbox_id)
        if sandbox_id not in self._clients:
            self._clients[sandbox_id] = KernelClients(
                lambda: self._observer.client_asks(sandbox_id), lambda: self._registry.touch(sandbox_id)
            )
        return self._clients[sandbox_id]

    def has_request(self, sandbox_id: str) -> bool:
        """Whether a client has sent a request that no kernel has received. Errors: UnknownSandboxError."""
        return self.clients(sandbox_id).has_request

    async def endpoints(self, sandbox_id: str) -> Endpoints:
        """The sandbox's `ipc://` endpoints, opened on first need; they stay until `drop_clients`. Within the sandbox's
        lock. Errors: UnknownSandboxError."""
        clients = self.clients(sandbox_id)
        if sandbox_id not in self._endpoints:
            endpoints = Endpoints(self._endpoints_dir(sandbox_id), clients)
            await endpoints.start()
            self._endpoints[sandbox_id] = endpoints
        return self._endpoints[sandbox_id]

    def had_endpoints(self, sandbox_id: str) -> bool:
        """Whether an earlier gateway had opened some: clients try to connect to them again."""
        return self._endpoints_dir(sandbox_id).exists()

    def _endpoints_dir(self, sandbox_id: str) -> Path:
        return self._settings.run_dir / "k" / sandbox_id.replace("-", "")[:12]

    async def until_clients_have_all(self) -> None:
        """Until the clients of all endpoints have read what their kernels have sent, those that read at all."""
        await gather_all(*(endpoints.until_read() for endpoints in self._endpoints.values()))

    # Up and down

    async def go_live(
        self,
        sandbox_id: str,
        connected: ConnectedMachine,
        *,
        configure: bool = False,
        quiet: bool = False,
        snapshot: Manifest | None = None,
    ) -> None:
        """Makes a machine the sandbox's own. Owns it from the call on: it ends if anything fails.

        configure: send the guest environment, directory and identity (a machine that was made for no one yet).
        quiet: its kernel keeps what it has for clients until those that are here have reached it (`restore`).
        snapshot: the machine has just been restored from it.
        Errors: MachineFailedError, VmRuntimeError.
        """
        try:
            record = self._registry.record(sandbox_id)
            live = LiveSandbox(
                sandbox_id,
                connected,
                clients=self.clients(sandbox_id),
                registry=self._registry,
                observer=self._observer,
                restart_limit=self._settings.restart_limit,
                restart_window_s=self._settings.restart_window_s,
            )
            if snapshot is not None and snapshot.kernel is not None:
                live.cell = snapshot.kernel.execution_count
            live.session.serve_calls(self._observer.calls_of(sandbox_id))
            if configure:
                await live.configure(env=record.env, cwd=record.cwd, identity=identity_of(record.sandbox))
            self._registry.update(
                sandbox_id,
                machine_id=live.saved.machine.id,
                key=live.key,
                marker=live.session.next_marker,
                resumes=False,
            )
            self._registry.move(sandbox_id, SandboxState.RUNNING, execution_state=live.execution_state)
        except BaseException:
            await connected.close()
            raise
        self.live[sandbox_id] = live
        self._supervisors[sandbox_id] = asyncio.create_task(self._supervise(live))
        if quiet:
            await uncancelled(live.take_back())
        else:
            live.start()

    async def exchange(self, sandbox_id: str, connected: ConnectedMachine, snapshot: Manifest) -> None:
        """The sandbox continues in a machine that has been restored from a snapshot (`restore`); the one it has ends.
        Errors: as `go_live`."""
        if sandbox_id in self.live:
            await self.take_down(sandbox_id, "elsewhere")
            self._registry.move(sandbox_id, SandboxState.ASLEEP)
        await self.go_live(sandbox_id, connected, quiet=True, snapshot=snapshot)

    async def _supervise(self, live: LiveSandbox) -> None:
        try:
            reason = await live.run()
            async with self.lock(live.id):
                if self.live.get(live.id) is live:
                    await self.take_down(live.id, "died")
                    self._observer.machine_lost(live.id, reason)
        except Exception:
            log.exception("The machine of sandbox %s is not supervised any more", live.id)

    async def restore(
        self,
        sandbox_id: str,
        snapshot: Manifest,
        *,
        keep_random: bool,
        drop_requests: bool,
        extra: dict[str, Any] | None = None,
        on_running: Callable[[Machine], None] = lambda machine: None,
    ) -> ConnectedMachine:
        """A machine in the state of a snapshot that knows itself as this sandbox, for `exchange`; the one that the
        sandbox has stays what it is.

        drop_requests: cells that waited in the kernel to be run are not, since they ran after the snapshot, or were
        asked of the state that is left; else they run now, as they would have. on_running, errors: as
        `Launcher.restore`.
        """
        record = self._registry.record(sandbox_id)
        greeting = Greeting(
            marker=snapshot.wire_marker,
            identity=identity_of(record.sandbox),
            key=record.key,
            restored=True,
            keep_random=keep_random,
            extra={**(extra or {}), "drop_requests": drop_requests, "quiet": True},
        )
        return await self._launcher.restore(snapshot, greeting, on_running=on_running)

    async def take_down(self, sandbox_id: str, why: str) -> None:
        """Ends the machine, if there is one. The record stays as it is. why: a key of `kernels.errors.LEFT`."""
        live = await self._let_go(sandbox_id)
        if live is not None:
            await live.close("stopping" if self.is_stopping else why)

    async def detach(self, sandbox_id: str) -> None:
        """Lets go of the machine, which runs on; a later gateway adopts it."""
        live = await self._let_go(sandbox_id)
        if live is not None:
            await live.detach()

    async def _let_go(self, sandbox_id: str) -> LiveSandbox | None:
        supervisor = self._supervisors.pop(sandbox_id, None)
        if supervisor is not None and supervisor is not asyncio.current_task():
            supervisor.cancel()
            await asyncio.wait([supervisor])
        return self.live.pop(sandbox_id, None)

    async def drop_clients(self, sandbox_id: str) -> None:
        """Ends the clients' way to a sandbox that is deleted, and not in the registry any more: none can come back."""
        self._clients.pop(sandbox_id, None)
        if sandbox_id in self._endpoints:
            await self._endpoints.pop(sandbox_id).close()
        shutil.rmtree(self._endpoints_dir(sandbox_id), ignore_errors=True)

    async def close_endpoints(self) -> None:
        endpoints = list(self._endpoints.values())
        self._endpoints.clear()
        await gather_all(*(each.close() for each in endpoints))
