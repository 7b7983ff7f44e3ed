"""The programs that a build runs: what they started ends with them."""

from __future__ import annotations

import asyncio
import os

import pytest

from vm_runtime.images.host import run_tool, tool_environment


async def test_a_tool_that_does_not_end_is_ended_when_nobody_waits_any_more() -> None:
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    script = "trap '' TERM; echo $$; while :; do sleep 1; done"
    running = asyncio.create_task(
        run_tool(
            ["sh", "-c", script], environment=tool_environment({}), on_line=lambda line: started.set_result(int(line))
        )
    )
    pid = await started
    for _ in range(2):
        running.cancel()
        for _ in range(5):  # it begins to end the tool
            await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
