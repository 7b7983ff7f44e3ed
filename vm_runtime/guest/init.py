"""PID 1 of the guest: mounts, loopback, the user's account; then it reaps, keeps the agent alive and powers off.

Knows nothing of the wire. It runs after /hypercell/start, as `python3 -I -S`. Where vmlinux is not Linux itself
(gVisor), it refuses some of this; that is then left out, with a line on the console.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vm_runtime.guest.keeper import User
from vm_runtime.guest.limits import CGROUPS, lock_memory
from vm_runtime.guest.paths import Paths

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 2, 4, 8, 4096  # linux/mount.h
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h
RB_POWER_OFF = 0x4321FEDC  # linux/reboot.h

# The agent must outlive what the kernel does to memory. See man proc_pid_oom_score_adj.
OOM_SCORE_ADJ = -1000

# Open files of the agent and of all that it starts, soft and hard: far above Linux's 1,024 and 4,096, which are for
# machines with many users, and what containers usually give.
OPEN_FILES = (65_536, 1_048_576)

# How long processes have between SIGTERM and SIGKILL when the machine is powered off.
POWER_OFF_GRACE_S = 2.0

# An agent that ends at once, again and again, is started no faster than this.
RESTART_PAUSE_S = 1.0

USER_NAME = "user"
USER_ID = 1000


@dataclass(frozen=True)
class Mount:
    """One line of the table. `needed`: without it the machine is no use; others are taken where vmlinux has them."""

    source: str
    target: str
    kind: str
    flags: int
    data: str = ""
    needed: bool = True


# /proc, /sys, /dev and /run come with us from the initramfs and are mounted only where they are not. /tmp lies on the
# machine's disk: in a tmpfs it would take guest memory, and be part of every snapshot's. The kernel's sockets have a
# place of their own, since the user can write there and must not fill the agent's.
MOUNTS = (
    Mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC),
    Mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC),
    Mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755"),
    Mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"),
    Mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666", needed=False),
    Mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777", needed=False),
    Mount("tmpfs", str(Paths().kernel_dir), "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700,size=1m"),
    Mount("cgroup2", str(CGROUPS), "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC),
)

_libc = ctypes.CDLL(None, use_errno=True)


def mount_all() -> None:
    """Mount what is not mounted yet. Raises OSError for what is needed."""
    for mount in MOUNTS:
        if os.path.ismount(mount.target):
            continue
        with contextlib.suppress(OSError):
            Path(mount.target).mkdir(parents=True, exist_ok=True)
        arguments = (
            mount.source.encode(),
            mount.target.encode(),
            mount.kind.encode(),
            mount.flags,
            mount.data.encode(),
        )
        if _libc.mount(*arguments) != 0 and mount.needed:
            raise OSError(ctypes.get_errno(), f"{mount.target} could not be mounted")
    Path("/tmp").chmod(0o1777)


def keep_hosts_in_memory(hosts: Path) -> None:
    """/etc/hosts becomes `hosts`, with the same content: each greeting writes the machine's name there (renewal.py),
    which must not write to the disk. Raises OSError."""
    hosts.write_bytes(Path("/etc/hosts").read_bytes())
    if _libc.mount(str(hosts).encode(), b"/etc/hosts", None, MS_BIND, None) != 0:
        raise OSError(ctypes.get_errno(), "/etc/hosts could not be replaced")


def keep_pages_in_place() -> None:
    """Stop khugepaged, which copies pages that nobody has written into huge ones: 2 MiB at a time that a machine would
    no longer share with its clones, and that the next snapshot would hold. New memory still comes in huge pages."""
    with contextlib.suppress(OSError):  # a vmlinux without it
        Path("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs").write_text(str(2**32 - 1))


def loopback_up() -> None:
    """127.0.0.1: what ipykernel's child processes and the user's own servers need."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("16sh", fcntl.ioctl(sock, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))


def ensure_user(home: Path) -> User:
    """The ordinary user whom kernels run as: its account, its home, and where pip puts its packages."""
    _ensure_line(Path("/etc/passwd"), f"{USER_NAME}:x:{USER_ID}:{USER_ID}::{home}:/bin/bash")
    _ensure_line(Path("/etc/group"), f"{USER_NAME}:x:{USER_ID}:")
    # On sys.path only if it is there when the zygote starts.
    site = home / f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    site.mkdir(parents=True, exist_ok=True)
    for directory in (site, *site.parents):
        os.chown(directory, USER_ID, USER_ID)
        if directory == home:
            break
    return User(uid=USER_ID, gid=USER_ID, name=USER_NAME)


def _ensure_line(path: Path, line: str) -> None:
    name = line.split(":", 1)[0] + ":"
    text = path.read_text() if path.exists() else ""
    if not any(old.startswith(name) for old in text.splitlines()):
        path.write_text(text + ("" if text.endswith("\n") or not text else "\n") + line + "\n")


def start_agent(user: User, wire: tuple[int, int] | None) -> int:
    """Fork the agent: it has what init has imported, and starts without a second interpreter. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.setsid()
        from vm_runtime.guest.agent import AgentSettings, main

        main(AgentSettings(paths=Paths(), user=user, owns_machine=True, wire=wire))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def power_off() -> NoReturn:
    """End everything in order and switch the machine off."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGTERM)
    deadline_s = time.monotonic() + POWER_OFF_GRACE_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline_s:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                signal.sigtimedwait([signal.SIGCHLD], max(0.0, deadline_s - time.monotonic()))
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    os.sync()
    _libc.reboot(RB_POWER_OFF)
    os._exit(0)  # where there is no switch, the end of PID 1 ends the machine


def _reap() -> set[int]:
    """The pids of all children that have ended."""
    ended = set()
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            ended.add(pid)
    return ended


def raise_limits() -> None:
    """Open files, see above. How many processes there may be, their groups say (limits.py): a limit per user would
    count those of the last kernel against the next. Raises OSError."""
    resource.setrlimit(resource.RLIMIT_NOFILE, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NPROC, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def outlive_others() -> None:
    """Of what vmlinux ends when memory runs out, this is the last. Raises OSError."""
    Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))


def main(wire: tuple[int, int] | None = None) -> NoReturn:
    """Never returns: the end of PID 1 is a panic. wire: see `AgentSettings`; given where vmlinux is not Linux."""
    watched = [signal.SIGCHLD, signal.SIGTERM]
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    paths = Paths()

    def hosts() -> None:
        keep_hosts_in_memory(paths.hosts)

    for step in (mount_all, keep_pages_in_place, loopback_up, raise_limits, outlive_others, hosts, lock_memory):
        try:
            step()
        except (OSError, ValueError) as error:  # setrlimit(2) that is refused is a ValueError
            if wire is None:
                raise
            print(f"hypercell-init: {step.__name__}: {error}", file=sys.stderr, flush=True)
    user = ensure_user(paths.home)
    agent = start_agent(user, wire)
    while True:
        if signal.sigwait(watched) == signal.SIGTERM:
            power_off()
        if agent in _reap():
            # Zygote and kernel belong to an agent; without it nobody would ever talk to them again.
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            time.sleep(RESTART_PAUSE_S)
            agent = start_agent(user, wire)


if __name__ == "__main__":
    main()
