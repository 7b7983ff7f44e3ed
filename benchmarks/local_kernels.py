"""Kernels of an own virtual environment, started as processes without a gateway: what Kishu, dill and pickle save."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.messages import BenchmarkError
from benchmarks.processes import descendants, kill_remaining, named
from benchmarks.raw_zmq import RawKernel, raw_kernel

REQUIREMENTS = Path(__file__).parent / "local-requirements.txt"
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class LocalKernel:
    """A kernel that answers. client: connected to it. pid: its process."""

    client: RawKernel
    pid: int


async def build_venv(cache_dir: Path, *, progress: Callable[[str], None]) -> Path:
    """The Python of `cache_dir/venv`, with local-requirements.txt installed; made where it is missing or outdated."""
    venv = cache_dir / "venv"
    python, stamp = venv / "bin" / "python", venv / "installed.txt"
    wanted = REQUIREMENTS.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        progress("Installing Kishu, dill and scikit-learn for local kernels (a minute, once) ...")
        await _run(sys.executable, "-m", "venv", "--clear", str(venv))
        await _run(str(python), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS))
        stamp.write_text(wanted)
    return python


@asynccontextmanager
async def local_kernel(
    python: Path, home: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[LocalKernel]:
    """A kernel that ends with the context, with whatever it has started. home: its home and working directory."""
    with tempfile.TemporaryDirectory(prefix="hcb-", dir="/tmp") as name:
        connection_file = Path(name) / f"kernel-{secrets.token_hex(8)}.json"
        info = {
            "transport": "ipc",
            "ip": str(Path(name) / "k"),
            "key": secrets.token_hex(16),
            "signature_scheme": "hmac-sha256",
            **{f"{channel}_port": number for number, channel in enumerate(CHANNELS, start=1)},
        }
        connection_file.write_text(json.dumps(info))
        process = await asyncio.create_subprocess_exec(
            str(python), "-m", "ipykernel_launcher", "-f", str(connection_file),
            cwd=home,
            env={**os.environ, "HOME": str(home), "IPYTHONDIR": str(home / "ipython"), **(environment or {})},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await _wait_bound(Path(f"{info['ip']}-1"), process)
            async with raw_kernel(info) as client:
                yield LocalKernel(client=client, pid=process.pid)
        finally:
            below = named(descendants(process.pid))
            if process.returncode is None:
                process.kill()
            await process.wait()
            kill_remaining(below)


async def _wait_bound(shell_socket: Path, process: asyncio.subprocess.Process) -> None:
    while not await asyncio.to_thread(shell_socket.exists):
        if process.returncode is not None:
            raise BenchmarkError(f"A local kernel ended with {process.returncode}.")
        # A new file in a directory has no event that asyncio could wait for.
        await asyncio.sleep(0.01)


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{output.decode(errors='replace')[-2000:]}")
