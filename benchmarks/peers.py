"""The gateways that are compared, started as processes of our own and ended with everything below them.

Knows how each is started and found in /proc, not what is measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.client import GatewayClient
from benchmarks.messages import BenchmarkError
from benchmarks.processes import descendants, kill_remaining, named, stop
from benchmarks.state_dirs import borrowed_state_dir
from kernels.directories import run_dir_of, well_known_file

ROOT = Path(__file__).parents[1]
# The command of this checkout, run by this interpreter.
HYPERCELLD = (sys.executable, "-c", "import sys; from gateway.cli import main; sys.exit(main())")
# Image and template are there; a busy machine takes long for the imports alone.
START_TIMEOUT_S = 120.0
# A pool of one refills in a second or two; emulated and on a busy machine in some ten.
POOL_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A gateway that answers. pid: of its process, None if unknown. pool_size: warm machines it keeps.

    machines_dir: `RUN/m`, with a record of each machine; None for a gateway whose kernels are its child processes.
    runtime_dir: where the kernels' connection files lie, for a gateway that writes them.
    """

    name: str
    client: GatewayClient
    pid: int | None
    pool_size: int = 0
    machines_dir: Path | None = None
    runtime_dir: Path | None = None

    def kernel_pids(self) -> set[int]:
        """Processes of all kernels, those of warm machines included."""
        if self.machines_dir is not None:
            return set(machine_processes(self.machines_dir))
        return descendants(self.pid) if self.pid is not None else set()

    def oldest(self, pids: set[int]) -> int:
        """Of these kernels' processes (Hypercell only) the one that was started first."""
        assert self.machines_dir is not None
        started = machine_processes(self.machines_dir)
        return min(pids, key=lambda pid: int(started[pid]))

    async def settle(self) -> None:
        """Waits until the pool is full: each start finds a warm machine, and no refill runs beside a measurement."""
        if self.pool_size == 0:
            return
        async with asyncio.timeout(POOL_TIMEOUT_S):
            while True:
                text = (await self.client.get("/metrics")).decode()
                ready = re.search(r"^hypercell_pool_ready (\S+)$", text, re.MULTILINE)
                if ready is not None and float(ready[1]) >= self.pool_size:
                    return
                # The pool has no event that a client could wait for.
                await asyncio.sleep(0.05)


def machine_processes(machines_dir: Path) -> dict[int, str]:
    """pid -> start time of the VMMs that have a record below `RUN/m`."""
    processes = {}
    for path in machines_dir.glob("*/machine.json"):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            # Ended while we looked.
            continue
        processes[int(record["pid"])] = str(record["start_time"])
    return processes


@asynccontextmanager
async def jupyter_kernel_gateway() -> AsyncIterator[Peer]:
    """jupyter_kernel_gateway of this interpreter with its local ipykernel, as shipped but for the output limits."""
    with tempfile.TemporaryDirectory(prefix="hypercell-bench-jkg-") as name:
        home = Path(name)
        port, token = _free_port(), secrets.token_hex(16)
        runtime_dir = home / "runtime"
        environment = {
            "HOME": str(home),
            "IPYTHONDIR": str(home / "ipython"),
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_DATA_DIR": str(home / "data"),
            "JUPYTER_RUNTIME_DIR": str(runtime_dir),
        }
        command = [
            sys.executable,
            "-m",
            "kernel_gateway",
            "--KernelGatewayApp.ip=127.0.0.1",
            f"--KernelGatewayApp.port={port}",
            "--KernelGatewayApp.port_retries=0",
            f"--KernelGatewayApp.auth_token={token}",
            # Its defaults silently drop what exceeds 1 MB/s.
            "--ZMQChannelsWebsocketConnection.limit_rate=False",
        ]
        async with _running("jupyter_kernel_gateway", command, environment, home / "log", port, token) as (client, pid):
            yield Peer(name="jupyter_kernel_gateway", client=client, pid=pid, runtime_dir=runtime_dir)


@asynccontextmanager
async def hypercell(*, name: str, source_dir: Path, pool_size: int) -> AsyncIterator[Peer]:
    """`hypercelld serve` on a state directory of its own that shares image and template with `source_dir`.

    Without checkpoints after cells and without sleep at its end: neither is what a comparison of gateways is about.
    """
    # The well-known file of a gateway that the user runs stays as it is. Short: sockets may lie below it, and their
    # paths have at most 107 bytes.
    with (
        borrowed_state_dir(source_dir) as state_dir,
        tempfile.TemporaryDirectory(prefix="hcb-", dir="/tmp") as runtime_name,
    ):
        port, token = _free_port(), secrets.token_hex(16)
        runtime_root = Path(runtime_name)
        environment = {"XDG_RUNTIME_DIR": str(runtime_root)}
        command = [
            *HYPERCELLD,
            "serve",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--token={token}",
            f"--state-dir={state_dir}",
            f"--pool-size={pool_size}",
            "--checkpoints=off",
            "--idle-timeout-s=0",
            "--no-stop-means-sleep",
        ]
        run_dir = run_dir_of(state_dir)
        if os.geteuid() != 0:
            run_dir = runtime_root / "hypercell" / run_dir.name
        machines_dir = run_dir / "m"
        try:
            async with _running(name, command, environment, state_dir / "log", port, token) as (client, pid):
                peer = Peer(name=name, client=client, pid=pid, pool_size=pool_size, machines_dir=machines_dir)
                await peer.settle()
                yield peer
        finally:
            # Machines outlive a gateway that had to be killed.
            kill_remaining(machine_processes(machines_dir))
            shutil.rmtree(run_dir, ignore_errors=True)


@asynccontextmanager
async def given(url: str, token: str) -> AsyncIterator[Peer]:
    """A Hypercell gateway that runs already. Its process is known if it is the local gateway of this user."""
    client = GatewayClient(url, token)
    try:
        await client.get("/api")
        pid, machines_dir = None, None
        try:
            local = json.loads(well_known_file().read_text())
        except OSError:
            local = {}
        if local.get("url") == url.rstrip("/"):
            pid, machines_dir = int(local["pid"]), run_dir_of(Path(local["state_dir"])) / "m"
        yield Peer(name="hypercell", client=client, pid=pid, machines_dir=machines_dir)
    finally:
        client.close()


@asynccontextmanager
async def _running(
    name: str, command: Sequence[str], environment: dict[str, str], log_path: Path, port: int, token: str
) -> AsyncIterator[tuple[GatewayClient, int]]:
    """Runs a gateway until it answers, and ends it with all its descendants."""
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C is for the benchmark, which then ends its gateways in order.
            start_new_session=True,
        )
    client = GatewayClient(f"http://127.0.0.1:{port}", token)
    try:
        await _wait_answering(name, client, process, log_path)
        yield client, process.pid
    finally:
        client.close()
        below = named(descendants(process.pid))
        await stop(process)
        kill_remaining(below)


async def _wait_answering(
    name: str, client: GatewayClient, process: asyncio.subprocess.Process, log_path: Path
) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while process.returncode is None:
                try:
                    await client.get("/api")
                    return
                except (OSError, BenchmarkError):
                    await asyncio.sleep(0.1)
    except TimeoutError:
        pass
    raise BenchmarkError(f"{name} did not start:\n{_tail(log_path)}")


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-4000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
