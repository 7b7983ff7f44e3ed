"""What a killed test run leaves is ended and removed by the next (tests/leftovers.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kernels.directories import run_dir_of
from tests import leftovers
from tests.gateways import ROOT
from vm_runtime.confinement.process import start_time_ticks

KILLED_RUN = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.unit.kernels.conftest import started_driver, started_service
async def main():
    state_dir = Path(sys.argv[1])
    async with started_driver(state_dir) as driver, started_service(state_dir, driver) as kernels:
        print(kernels.machines.running(await kernels.new()).saved.machine.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


def test_a_killed_run_s_machine_and_directories_are_removed(state_dir: Path) -> None:
    command = [sys.executable, "-c", KILLED_RUN, str(state_dir)]
    killed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(killed.stdout)
    assert start_time_ticks(pid) is not None and run_dir_of(state_dir).exists()
    leftovers.sweep()
    assert start_time_ticks(pid) is None
    assert not run_dir_of(state_dir).exists() and not state_dir.exists()
