"""Descriptors that are closed at the end of a block, and what a file's own file system promises about it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened(path: Path | str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Not inherited by what is started meanwhile. Raises OSError."""
    with closing(os.open(path, flags | os.O_CLOEXEC)) as fd:
        yield fd


def sync(path: Path) -> None:
    """Make a file, or the renames and removals in a directory, survive a power loss. Blocking."""
    with opened(path) as fd:
        os.fsync(fd)


def try_lock(fd: int) -> bool:
    """Whether nobody else held this lock, which is then ours."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
