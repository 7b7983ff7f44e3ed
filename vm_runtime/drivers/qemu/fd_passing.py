"""Which files' descriptors a VMM may be passed: of those to which it could not write even if it had been broken
into."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from pathlib import Path

# <linux/fcntl.h>
_F_SEAL_FUTURE_WRITE = 0x10


def may_pass(fd: int, pid: int) -> bool:
    """Whether a process can do no more than read this file: it may open again, for writing, what it has open."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _F_SEAL_FUTURE_WRITE:
            return True
    except OSError:  # not a memfd
        pass
    file, user = os.fstat(fd), _user_of(pid)
    return user not in (None, 0, file.st_uid) and not file.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _user_of(pid: int) -> int | None:
    """The effective user; None if the process has ended."""
    try:
        found = re.search(r"^Uid:\s+\d+\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(found[1]) if found is not None else None
