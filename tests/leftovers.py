"""What a test run that was killed has left (gateways, machines, directories) is ended and removed by the next run.

A run notes the state directories that it uses, below a directory that bears its pid and start time. Knows no pytest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import tempfile
from pathlib import Path

from kernels.directories import run_dir_of
from tests.fake_driver import tree
from vm_runtime.confinement.process import start_time_ticks

NOTES = Path(tempfile.gettempdir()) / f"hypercell-tests-{os.geteuid()}"
RUN = f"{os.getpid()}-{start_time_ticks(os.getpid())}"
# In the environment of the gateways that a run starts.
RUN_VARIABLE = "HYPERCELL_TEST_RUN"
_MADE, _USED = "made", "used"


def note_made(state_dir: Path) -> None:
    """Call before anything runs with a state directory that was made for this run alone. Twice is harmless."""
    _note(state_dir, _MADE)


def note_used(state_dir: Path) -> None:
    """Call before a gateway is started with any state directory. Twice is harmless."""
    _note(state_dir, _USED)


def forget() -> None:
    """At the end of this run: what it has left is to be kept."""
    shutil.rmtree(NOTES / RUN, ignore_errors=True)


def sweep() -> None:
    """Ends the gateways of runs that are no more; ends and removes what belongs to the directories they had made."""
    for notes in NOTES.glob("*-*"):
        pid, start_time = map(int, notes.name.split("-"))
        if start_time_ticks(pid) == start_time:
            continue
        for each in sorted(notes.glob(f"*.{_USED}")):
            _end_gateway(run_dir_of(Path(each.read_text())), run=notes.name)
        for each in sorted(notes.glob(f"*.{_MADE}")):
            state_dir = Path(each.read_text())
            _end_machines(run_dir_of(state_dir))
            shutil.rmtree(run_dir_of(state_dir), ignore_errors=True)
            shutil.rmtree(state_dir, ignore_errors=True)
        shutil.rmtree(notes, ignore_errors=True)


def _note(state_dir: Path, how: str) -> None:
    notes = NOTES / RUN
    notes.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = str(state_dir.resolve())
    (notes / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}.{how}").write_text(path)


def _end_gateway(run_dir: Path, *, run: str) -> None:
    """If it was started by that run."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        pid = int(json.loads((run_dir / "gateway.json").read_text())["pid"])
        if f"{RUN_VARIABLE}={run}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            _kill(pid)


def _end_machines(run_dir: Path) -> None:
    for path in run_dir.glob("m/*/machine.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads(path.read_text())
            if start_time_ticks(record["pid"]) == record["start_time"]:
                for pid in tree.pids(record["pid"]):
                    _kill(pid)
            for cgroup in record.get("cgroups", ()):
                Path(cgroup).rmdir()


def _kill(pid: int) -> None:
    """Returns when it has ended."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [])
        finally:
            os.close(pidfd)
