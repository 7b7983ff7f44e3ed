"""What a serving gateway leaves on its machine: a lock on the state directory, and files that have its address.

Both are removed when the context ends; after a `kill -9` the lock is free by itself and the files name a dead pid.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gateway.errors import StartError
from kernels.directories import GATEWAY_FILE, well_known_file

LOCK_FILE = "gateway.lock"


@contextmanager
def state_lock(state_dir: Path) -> Iterator[None]:
    """Holds the state directory for this process. Errors: StartError naming the pid that holds it, or what is wrong."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(
            f"The state directory {state_dir} cannot be used: {error.strerror}. --state-dir chooses another."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StartError(
                f"A gateway (pid {pid}) is serving {state_dir} already. Stop it, or give this one another --state-dir."
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def gateway_files(*, url: str, token: str, state_dir: Path, run_dir: Path) -> Iterator[None]:
    """Writes `RUN/gateway.json` and the well-known one (unless it names another gateway that lives); removes both."""
    content = {"url": url, "token": token, "pid": os.getpid(), "state_dir": str(state_dir)}
    paths = [run_dir / GATEWAY_FILE]
    if not _names_another(well_known_file()):
        paths.append(well_known_file())
    try:
        for path in paths:
            _write(path, json.dumps(content))
        yield
    finally:
        for path in paths:
            if _pid_in(path) == os.getpid():
                with suppress(FileNotFoundError):
                    path.unlink()


def _names_another(path: Path) -> bool:
    pid = _pid_in(path)
    return pid is not None and pid != os.getpid() and Path(f"/proc/{pid}").exists()


def _pid_in(path: Path) -> int | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    pid = value.get("pid") if isinstance(value, dict) else None
    return pid if isinstance(pid, int) else None


def _write(path: Path, text: str) -> None:
    directory = path.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    # In /tmp someone else may have made it first, to read the token or to give out a false one.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise StartError(f"{directory} belongs to someone else; remove it.")
    # Made with mode 0600 under another name, so that a reader finds the whole file or none.
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
