"""Prewarms a spare machine: everything that a first client does, done once, so that an emulator has translated it.

A client's connections, handshakes and first requests run through the agent and the kernel like any others. What they
leave (namespace, counters, history) is as new. Knows nothing of pools.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from typing import Any

from kernels.channel_socket import KernelEnd
from kernels.channels import KernelChannels, KernelClients, greet_ahead
from kernels.connected import ConnectedMachine
from kernels.errors import MachineFailedError
from kernels.zmtp import ZmtpError
from vm_runtime.saving.threads import gather_all
from vm_runtime.wire.errors import WireError

# Under emulation on a busy host; a kernel that does not answer for so long is not worth keeping.
PREWARM_TIMEOUT_S = 60.0
DELIMITER = b"<IDS|MSG>"
# Formats a value as the end of a cell is, without showing it: that would make it `_`.
CELL = "None if get_ipython().display_formatter.format(1) else None"


async def prewarm(connected: ConnectedMachine, identity: Mapping[str, str]) -> None:
    """identity: who it is while it is spare. Errors: MachineFailedError; the machine is still the caller's to end."""
    # What `LiveSandbox.configure` will ask.
    await gather_all(
        connected.session.identify(identity), connected.session.call("kernel.start", {"env": {}, "cwd": None})
    )
    clients = KernelClients(lambda: None)
    clients.attach(connected.session.open_channel, await _greet(connected))
    channels = clients.channels(b"prewarm")
    channels.subscribe()
    try:
        async with asyncio.timeout(PREWARM_TIMEOUT_S):
            await _ask(channels, connected.key, "kernel_info_request", {})
            cell = {"code": CELL, "silent": False, "store_history": False}
            await _ask(channels, connected.key, "execute_request", cell)
        # What a checkpoint after a cell sends to the kernel.
        await connected.session.hold_cells(limit_s=0.0)
        await connected.session.call("kernel.release", {"waits": True})
    except (TimeoutError, ValueError) as error:
        raise MachineFailedError("A spare machine's kernel gave no answer that can be read.") from error
    finally:
        channels.close()
        await clients.detach()
    connected.greeted = await _greet(connected)


async def _ask(channels: KernelChannels, key: str, msg_type: str, content: dict[str, Any]) -> None:
    """Until it is answered, and the kernel idle."""
    msg_id = secrets.token_hex(16)
    header = {"msg_id": msg_id, "msg_type": msg_type, "session": "prewarm", "username": "", "version": "5.4"}
    request = [json.dumps(part).encode() for part in (header, {}, {}, content)]
    signature = hmac.new(key.encode(), b"".join(request), hashlib.sha256).hexdigest()
    await channels.send("shell", [DELIMITER, signature.encode(), *request])
    wanted = {"shell", "idle"}
    async for channel, parts in channels:
        _, parent, _, answer = map(json.loads, parts[parts.index(DELIMITER) + 2 :][:4])
        if parent.get("msg_id") == msg_id:
            wanted -= {channel, answer.get("execution_state")}
        if not wanted:
            return


async def _greet(connected: ConnectedMachine) -> dict[str, KernelEnd]:
    try:
        async with asyncio.timeout(PREWARM_TIMEOUT_S):
            return await greet_ahead(connected.session.open_channel)
    except (TimeoutError, WireError, ZmtpError) as error:
        raise MachineFailedError(f"A spare machine's kernel did not greet: {error}") from error
