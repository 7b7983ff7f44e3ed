"""What a sandbox's checkpoints take of the host's disk is kept within the budget, also while a cell runs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.gateways import running_gateway
from tests.state.sandboxes import WAIT_S, Api, Notebook

WRITTEN_BYTES = 4_000_000
CELL = f"""
import os
while True:
    with open("big", "wb") as file:
        file.write(os.urandom({WRITTEN_BYTES}))
    os.sync()
    print(".", flush=True)
    input()
"""


async def _ids(api: Api, sandbox_id: str) -> list[str]:
    return [checkpoint["id"] for checkpoint in await api.checkpoints(sandbox_id)]


async def test_the_oldest_checkpoints_go_while_a_cell_runs(module_state_dir: Path) -> None:
    flags = ("--pool-size", "0", "--checkpoints", "off", "--checkpoint-budget-mib", "16")
    with running_gateway(module_state_dir, *flags) as gateway:
        api = Api(gateway)
        sandbox_id = await api.create()
        async with Notebook.open(gateway, sandbox_id) as notebook:
            await notebook.client.execute(CELL)
            taken = []
            for _ in range(12):
                await notebook.client.until("input_request")
                taken.append(await api.do(sandbox_id, "checkpoints", status=201))
                await notebook.client.send("input_reply", {"value": ""}, channel="stdin")
            await notebook.client.until("input_request")
            # Its disk is in the running machine's chain until that is shortened.
            deadline = time.monotonic() + WAIT_S
            while taken[0]["id"] in (found := await _ids(api, sandbox_id)):
                assert time.monotonic() < deadline, found
                await asyncio.sleep(0.1)
            assert taken[-1]["id"] in found
            assert (await api.sandbox(sandbox_id))["execution_state"] == "busy"
        await api.delete(sandbox_id)
