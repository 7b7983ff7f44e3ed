"""Real gateways for tests: `hypercelld serve` as a process of its own, with the image and template of one directory.

Image and template are made once (minutes) and kept in `.state/test` of this checkout: the next run takes seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kernels.directories import run_dir_of
from tests import leftovers
from vm_runtime.snapshots.manifest import Manifest

ROOT = Path(__file__).parent.parent
STATE = Path(os.environ.get("HYPERCELL_TEST_STATE", ROOT / ".state" / "test"))
# The first start builds image and template: 2 to 4 minutes on two idle CPUs.
START_TIMEOUT_S = 1500.0
STOP_TIMEOUT_S = 120.0


class GatewayAddress(Protocol):
    """Where a gateway is reached, and with which token."""

    @property
    def url(self) -> str: ...

    @property
    def token(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class RunningGateway:
    """A serving gateway. `process` may be killed by a test that starts another one on the same `state_dir`."""

    url: str
    token: str
    state_dir: Path
    run_dir: Path
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """`kill -9`, as by a careless operator or a power loss of this one process."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """A clean stop; fails the test if it does not end with status 0."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=STOP_TIMEOUT_S)
        assert status == 0, f"hypercelld ended with {status}:\n{self.log.read_text()}"


def start_gateway(state_dir: Path, *flags: str, token: str | None = None, port: int = 0) -> RunningGateway:
    """Starts a gateway and waits until it serves. The caller stops or kills it. port: 0 is any that is free."""
    state_dir.mkdir(parents=True, exist_ok=True)
    token = token or secrets.token_hex(16)
    leftovers.note_used(state_dir)
    log = state_dir / "gateway.log"
    run_dir = run_dir_of(state_dir)
    presence = run_dir / "gateway.json"
    command = [
        sys.executable, "-m", "gateway.cli", "serve", "--host", "127.0.0.1", "--port", str(port), "--token", token,
        "--state-dir", str(state_dir), *flags,
    ]  # fmt: skip
    with log.open("wb") as output:
        environment = {**os.environ, leftovers.RUN_VARIABLE: leftovers.RUN}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (presence.exists() and (found := json.loads(presence.read_text()))["pid"] == process.pid):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"hypercelld did not serve ({process.poll()}):\n{log.read_text()}")
        time.sleep(0.05)
    return RunningGateway(url=found["url"], token=token, state_dir=state_dir, run_dir=run_dir, process=process, log=log)


def copy_state(target: Path) -> Path:
    """A state directory with the images and templates of the shared one (hard links) and nothing else.

    Not the rest of the shared snapshots, which belong to sandboxes there, and never an SQLite file: two gateways would
    write the same one.
    """
    target.mkdir(parents=True)
    leftovers.note_made(target)
    for name in ("images", "templates", "accelerator.json"):
        if (STATE / name).exists():
            subprocess.run(["cp", "-al", STATE / name, target / name], check=True)
    for pin in (STATE / "snapshots/pins").glob("template-*.json"):
        _link(pin, target)
        for snapshot_id in json.loads(pin.read_text())["snapshots"]:
            manifest = STATE / f"snapshots/manifests/{snapshot_id}.json"
            _link(manifest, target)
            for kind, part in Manifest.parse(manifest.read_bytes()).parts():
                _link(STATE / f"snapshots/parts/{kind}/{part.digest}", target)
    return target


def _link(path: Path, target: Path) -> None:
    linked = target / path.relative_to(STATE)
    linked.parent.mkdir(parents=True, exist_ok=True)
    if not linked.exists():
        linked.hardlink_to(path)


@contextmanager
def running_gateway(state_dir: Path, *flags: str) -> Iterator[RunningGateway]:
    """A gateway that is stopped cleanly at the end, unless the test ended it."""
    gateway = start_gateway(state_dir, *flags)
    try:
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.stop()
