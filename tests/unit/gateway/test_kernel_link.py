"""A link that is given up while it waits."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
import zmq

from gateway.kernel_link import wait_subscribed
from kernels.models import Sandbox, SandboxState

INFO = {"key": "k", "signature_scheme": "hmac-sha256"}


async def test_a_wait_that_is_cancelled_when_it_ends_is_cancelled() -> None:
    now = datetime.now(UTC)
    sandbox = Sandbox(
        id="a", state=SandboxState.RUNNING, driver="fake", template="tiny", parent_id=None, name=None, owner="local",
        created_at=now, last_activity=now, execution_state="idle", reason=None, memory_mib=256, vcpus=1, disk_mib=64,
    )  # fmt: skip
    delivered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with zmq.Context() as context:
        waiting = asyncio.create_task(wait_subscribed(context, INFO, lambda: delivered, lambda: sandbox))
        await asyncio.sleep(0)
        delivered.set_result(None)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
