"""Threads of the agent that touch files as the kernel's user does, with no right that he does not have.

The agent is root. A thread's file-system user and its capabilities are its own in Linux (man setfsuid, capabilities),
so no process has to be started, and bytes move without another copy. Its real user stays root: the user's processes
cannot signal or trace it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from vm_runtime.guest.keeper import User

# Transfers wait for the wire more than for the disk; further threads would only take memory.
THREADS = 4

_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_SYS_SETRESUID, _SYS_SETRESGID = 117, 119  # asm/unistd_64.h
_KEEP = -1

T = TypeVar("T")


class UserThreads:
    """user: None for the agent's own. `close` when done."""

    def __init__(self, user: User | None) -> None:
        initializer = None if user is None else partial(_become, user)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="as-user", initializer=initializer)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args) as the user. Cancelled, it waits until the function has returned: what it acts on is the
        caller's to release then."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=False)


def _become(user: User) -> None:
    """Raises OSError if the thread would keep rights that the user has not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.setfsgid(user.gid)
    libc.setfsuid(user.uid)  # drops the capabilities over files, too
    if libc.setfsuid(user.uid) != user.uid:
        # Where there is no such call (gVisor) the thread's effective user decides; as a system call, since libc's
        # function changes all threads.
        libc.syscall(_SYS_SETRESGID, _KEEP, user.gid, _KEEP)
        libc.syscall(_SYS_SETRESUID, _KEEP, user.uid, _KEEP)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing) != 0:  # the rest: a full disk's reserve, for one
        raise OSError(ctypes.get_errno(), "The capabilities of a thread could not be dropped")
    file_user = libc.setfsuid(user.uid), libc.setfsgid(user.gid)
    if (user.uid, user.gid) not in (file_user, (os.geteuid(), os.getegid())):
        raise OSError(0, f"{os.getpid()}: a thread could not become {user.name}")
