"""What the user's processes may take of the machine, so that agent, init and vmlinux always have room.

Memory that runs out then ends a process of the user's, within a moment and by vmlinux, instead of wearing the machine
down. Interface: Documentation/admin-guide/cgroup-v2.rst and accounting/psi.rst of vmlinux.

    /                the agent, init, the zygote
    /user            all of the user's: memory.max, cpu.weight, memory.pressure
    /user/kernel     the kernel's process and what it starts: memory.max, pids.max
    /user/commands   memory.max, pids.max; below it a group for each command that runs
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")

# io: without it vmlinux cannot write back the dirty pages of one group, and a group at its limit waits for all others'.
CONTROLLERS = "+cpu +io +memory +pids"
COMMAND_CONTROLLERS = "+memory +pids"

# What agent, init and vmlinux may grow by once the limit is set: threads and buffers of transfers, sockets, slabs. In a
# small machine a share of what is available.
ROOM_BYTES = 24 << 20
ROOM_SHARE = 0.25

# Of the user's memory, what the kernel alone can have, and commands alone: where one needs all there is, the other must
# still be able to look.
PART_SHARE = 15 / 16

# Of the user's memory: files there outlive the process that is ended when memory runs out, so they must not be all.
SHARED_MEMORY_SHARE = 2

# Of vmlinux's own bound of threads (which follows the memory): kernel and commands have so much each, and half is left.
PIDS_SHARE = 4

# Where processes wait for memory for most of a window (microseconds: stalled, of how many): vmlinux ends one at a time,
# which is no end where they multiply.
PRESSURE = b"some 1500000 2000000"

# Of the user's memory. With more of it in cached files, files that are read again and again are more than fits: that is
# slow, and goes on. With less of it in one group, that is not at its limit.
FILES_SHARE = 0.1
FULL_SHARE = 0.95 * PART_SHARE

# Against 1024 of each process outside: a hundred busy processes of the user's leave the agent two thirds of a CPU.
CPU_WEIGHT = 50

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # asm-generic/mman.h
_MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 2, 4, 32  # linux/mount.h
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Group:
    """A control group. path: None where there are none (a vmlinux without them, a machine that is not ours). ended: how
    often all of it was ended because memory ran out."""

    path: Path | None = None
    ended: int = 0

    def add(self, pid: int) -> None:
        """Move a process into it; one that has ended is none. Raises OSError."""
        if self.path is not None:
            with contextlib.suppress(ProcessLookupError):
                (self.path / "cgroup.procs").write_text(str(pid))

    def oom_kills(self) -> int:
        """How often memory ran out and one of its processes was ended for it, or all."""
        return self.ended + self._count("memory.events", "oom_kill")

    def refused_forks(self) -> int:
        """How many processes were not made because there were too many."""
        return self._count("pids.events", "max")

    def _count(self, file: str, name: str) -> int:
        return 0 if self.path is None else _numbers(self.path / file).get(name, 0)

    def memory_bytes(self) -> int:
        return 0 if self.path is None else int((self.path / "memory.current").read_text())

    def is_empty(self) -> bool:
        return self._count("cgroup.events", "populated") == 0

    def kill(self) -> None:
        """SIGKILL to all its processes, those included that are being forked. Raises OSError."""
        if self.path is not None:
            (self.path / "cgroup.kill").write_text("1")


class UserLimits:
    """The limits of a machine. You must call `fit` once the machine's own processes have what they need.

    kernel: the group of the kernel's process.
    """

    def __init__(self, root: Path | None = None) -> None:
        """root: where cgroup2 is mounted, None for no limits at all; nor are there any where it could not be mounted.
        Raises OSError."""
        self._user: Path | None = None
        self._commands: Path | None = None
        self._running: dict[int, Group] = {}
        self._pressure: select.epoll | None = None
        self._limit_bytes = 0
        self.kernel = Group()
        if root is None or not root.is_mount() or "memory" not in (root / "cgroup.controllers").read_text().split():
            return
        self._user, self._commands = root / "user", root / "user/commands"
        self.kernel = Group(self._user / "kernel")
        _share(root, CONTROLLERS)
        _share(self._user, CONTROLLERS)
        (self._user / "cpu.weight").write_text(str(CPU_WEIGHT))
        processes = int(Path("/proc/sys/kernel/threads-max").read_text()) // PIDS_SHARE
        for path in (self._user / "kernel", self._commands):
            path.mkdir(exist_ok=True)
            (path / "pids.max").write_text(str(processes))
        _share(self._commands, COMMAND_CONTROLLERS)

    @contextmanager
    def command(self) -> Iterator[Group]:
        """The group of one command while it runs. It is used again then, unless a process was left in it: vmlinux keeps
        groups that were removed for as long as a file is cached for them. Raises OSError."""
        if self._commands is None:
            yield Group()
            return
        number = 0
        while number in self._running or not (group := self._numbered(number)).is_empty():
            number += 1
        self._running[number] = group
        try:
            yield group
        finally:
            del self._running[number]

    def _numbered(self, number: int) -> Group:
        assert self._commands is not None
        path = self._commands / str(number)
        path.mkdir(exist_ok=True)
        return Group(path)

    def fit(self) -> None:
        """Limit the user's memory to what can be had without taking any from the machine's own processes: what the
        user has and what is available. Called in the agent's event loop. Raises OSError."""
        if self._user is None:
            return
        held = int((self._user / "memory.current").read_text()) - _cached(self._user)
        available = _numbers(Path("/proc/meminfo"))["MemAvailable:"] << 10
        room = min(ROOM_BYTES, int(available * ROOM_SHARE))
        limit = self._limit_bytes = max(held, 0) + available - room
        (self._user / "memory.max").write_text(str(limit))
        for name in ("kernel", "commands"):
            (self._user / name / "memory.max").write_text(str(int(limit * PART_SHARE)))
        _resize_tmpfs(SHARED_MEMORY, limit // SHARED_MEMORY_SHARE)
        if self._pressure is None:
            self._watch_pressure(self._user / "memory.pressure")

    def _watch_pressure(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(fd, PRESSURE)
        self._pressure = select.epoll()  # asyncio waits for no EPOLLPRI, but for an epoll that has one
        self._pressure.register(fd, select.EPOLLPRI)
        asyncio.get_running_loop().add_reader(self._pressure.fileno(), self._relieve)

    def _relieve(self) -> None:
        """End all of the group that has most, if its processes have all there is. Not if cached files could be given
        back, and not while those that were ended before still go."""
        assert self._user is not None
        assert self._pressure is not None
        self._pressure.poll(0)  # empty: a look takes the event away, and asyncio has looked
        largest = max((self.kernel, *self._running.values()), key=Group.memory_bytes)
        is_full = largest.memory_bytes() > FULL_SHARE * self._limit_bytes
        if is_full and _cached(self._user) < FILES_SHARE * self._limit_bytes:
            largest.ended += 1
            largest.kill()


def lock_memory() -> None:
    """Keep what this process has touched and will touch in memory: its code is not read anew while memory is short.
    Not inherited by what it forks. Raises OSError."""
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        raise OSError(ctypes.get_errno(), "The agent's memory could not be locked")


def _share(path: Path, controllers: str) -> None:
    """Have the groups below this one be limited."""
    path.mkdir(exist_ok=True)
    (path / "cgroup.subtree_control").write_text(controllers)


def _cached(group: Path) -> int:
    """Bytes of a group that vmlinux can take back: file pages and slabs."""
    numbers = _numbers(group / "memory.stat")
    return sum(numbers[name] for name in ("active_file", "inactive_file", "slab_reclaimable"))


def _resize_tmpfs(path: Path, size_bytes: int) -> None:
    """As far as less than that is in it."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_REMOUNT
    _libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", flags, f"size={size_bytes}".encode())


def _numbers(path: Path) -> dict[str, int]:
    return {
        fields[0]: int(fields[1])
        for line in path.read_text().splitlines()
        if len(fields := line.split()) > 1 and fields[1].isdecimal()
    }
