"""Prewarms a spare machine: everything that a first client does, done once, so that an emulator has translated it.

A client's connections, handshakes and first requests run through the agent and the kernel like any others. What they
leave (namespace, counters, history) is as new. Knows nothing of pools.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.connect import KernelConnectionInfo

from kernels.connected import ConnectedMachine
from kernels.endpoints import Endpoints, Greeted, greet_ahead
from kernels.errors import MachineFailedError
from kernels.zmtp import HandshakeError
from vm_runtime.saving.threads import gather_all
from vm_runtime.wire.errors import WireError

# Under emulation on a busy host; a kernel that does not answer for so long is not worth keeping.
PREWARM_TIMEOUT_S = 60.0
# Formats a value as the end of a cell is, without showing it: that would make it `_`.
CELL = "None if get_ipython().display_formatter.format(1) else None"


async def prewarm(connected: ConnectedMachine, run_dir: Path, identity: Mapping[str, str]) -> None:
    """identity: who it is while it is spare. Errors: MachineFailedError; the machine is still the caller's to end."""
    # What `LiveSandbox.configure` will ask.
    await gather_all(
        connected.session.identify(identity), connected.session.call("kernel.start", {"env": {}, "cwd": None})
    )
    endpoints = Endpoints(run_dir / "k" / f"x{secrets.token_hex(5)}", lambda: None)
    try:
        await endpoints.start()
        endpoints.attach(connected.session.open_channel, await _greet(connected))
        client = AsyncKernelClient()
        client.load_connection_info(cast(KernelConnectionInfo, endpoints.connection_info(connected.key)))
        # Without heart beats: on a busy host a late one would count as the kernel's death.
        client.start_channels(hb=False)
        try:
            async with asyncio.timeout(PREWARM_TIMEOUT_S):
                await client.wait_for_ready(timeout=PREWARM_TIMEOUT_S)
                await client.execute_interactive(CELL, store_history=False, timeout=PREWARM_TIMEOUT_S)
        except (TimeoutError, RuntimeError) as error:
            raise MachineFailedError(f"A spare machine's kernel did not answer: {error}") from error
        finally:
            client.stop_channels()
        # What a checkpoint after a cell sends to the kernel.
        await connected.session.hold_cells(limit_s=0.0)
        await connected.session.call("kernel.release", {"waits": True})
    finally:
        await endpoints.close()
    connected.greeted = await _greet(connected)


async def _greet(connected: ConnectedMachine) -> dict[str, Greeted]:
    try:
        async with asyncio.timeout(PREWARM_TIMEOUT_S):
            return await greet_ahead(connected.session.open_channel)
    except (TimeoutError, WireError, HandshakeError) as error:
        raise MachineFailedError(f"A spare machine's kernel did not greet: {error}") from error
